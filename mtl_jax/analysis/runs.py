"""Finished runs as the comparison sees them: what was set, what came out, and after how long."""

import ast
import bisect
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.analysis.files import read_object
from mtl_jax.analysis.transfer import Scores, Seed
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl

PLAIN = "plain"
# Weights that are known before the run: what every other method has to beat.
STATIC_METHODS = frozenset((PLAIN, "StaticWeights", "TaskMean", "TransferObjective"))
# Runs are only compared over the same number of updates of the same size.
BUDGET = ("Run.steps", "Data.batch_size", "Data.inputs_length", "Data.targets_length")
_SEEDS = ("Run.seed", "Data.seed")
# Settings that change no number that a run is compared by.
_SILENT = re.compile(
    r"(Run\.(directory|steps|seed|log_every|evaluate_untrained|tensorboard|compile_cache))"
    r"|(Data\.(seed|prefetch|data_dir|task_modules))|Checkpoint\..*|Eval\..*|Generate\..*|Infer\..*"
    r"|Balance\.(method|modules|(monitor|affinity)_every)|Mixture\.name"
)
# What a baseline of one task must have in common with a run that it is held against.
_ALIKE = re.compile(
    r"T5\.(?!attention|scan_layers|remat).*|Optimizer\.(?!freeze|learning_rate_scale).*"
)
_BASELINE_ROWS = ("chance", "majority")
_START = re.compile(r"^(\w+\.\w+) = ")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
      path: its directory.
      method: how its tasks shared the update, `PLAIN` for plain training.
      seed: of the run and of its data.
      settings: by Gin name, as in config.gin.
      variant: the settings and the method's options that set it apart from other runs, without
        seeds and names of folders.
      trained: the tasks it was trained on, named as in its scores.
      label_of: registered task -> its name in the scores.
      by_step: step -> (task, metric) -> value, a mean over the task's prompts.
      clock: (step, seconds of training until then), ascending.
    """

    path: Path
    method: str
    seed: Seed
    settings: Mapping[str, Any]
    variant: Mapping[str, Any]
    trained: tuple[str, ...]
    label_of: Mapping[str, str]
    by_step: Mapping[int, Scores]
    clock: Sequence[tuple[int, float]]

    @property
    def scores(self) -> Scores:
        """The values of the last evaluation."""
        return self.by_step[max(self.by_step)]

    @property
    def seconds(self) -> float | None:
        """Seconds of training in all, None where metrics.jsonl does not tell."""
        return self.clock[-1][1] if self.clock else None

    def seconds_until(self, step: int) -> float | None:
        """Seconds of training until a step, read off between log lines; None where unknown."""
        if not self.clock or step > self.clock[-1][0]:
            return None
        steps, seconds = zip((0, 0.0), *self.clock, strict=True)
        return float(np.interp(step, steps, seconds))


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the values in the config.gin that a run wrote, by name such as "Run.steps".

    Raises:
      UserError: there is none, or a value is damaged; names the file and the line.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: name the folder that `mtl-jax train` wrote to.")
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if _START.match(line)]
    settings: dict[str, Any] = {}
    for number in starts:
        end = bisect.bisect_right(starts, number)
        block = lines[number : starts[end] if end < len(starts) else len(lines)]
        name, text = "\n".join(block).split(" = ", 1)
        # Comments and empty lines that follow a value are not part of it.
        try:
            settings[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"{path}, line {number + 1}: the value of {name} is damaged ({error})."
            ) from error
    return settings


def trained_on(folder: str | Path) -> set[str]:
    """Returns the registered names of the tasks that a run was trained on."""
    return set(read_object(Path(folder) / "tasks.json") or {})


def read_run(folder: str | Path, trained: Collection[str] | None = None) -> Run:
    """Reads a finished run.

    Args:
      folder: its directory.
      trained: tasks that are not held out, whatever their description says: those that this run or
        one that it is compared with was trained on; None: those of this run.

    Raises:
      UserError: a file is missing or damaged, or the run has not been evaluated at its end.
    """
    path = Path(folder)
    settings = read_settings(path / "config.gin")
    described = read_object(path / "method.json") or {}
    method = described.get("method", settings.get("Balance.method")) or PLAIN
    options = described.get("options") or {}
    if not isinstance(method, str) or not isinstance(options, dict):
        raise UserError(f"{path / 'method.json'}: needs a text 'method' and an object 'options'.")
    rows = _evaluated(read_jsonl(path / "results.jsonl"), settings.get("Eval.split"), path)
    known = trained_on(path) if trained is None else trained
    by_step = _scores_by_step(rows, known)
    steps = settings.get("Run.steps")
    if steps is None or max(by_step) < steps:
        raise UserError(
            f"{path} is evaluated up to step {max(by_step):,} of {steps}: finish the run (or "
            "`mtl-jax eval` it), or leave it out."
        )
    names = read_object(path / "tasks.json") or {}
    datasets = {row["task"]: _label(row, known) for row in rows}
    labels = {name: datasets.get(name, name) for name in names}
    variant = {name: value for name, value in settings.items() if not _SILENT.fullmatch(name)}
    return Run(
        path=path,
        method=method,
        seed=tuple(int(settings.get(name, 0)) for name in _SEEDS),
        settings=settings,
        variant=variant | {f"{method}.{name}": value for name, value in options.items()},
        trained=tuple(dict.fromkeys(labels[name] for name in names)),
        label_of=labels,
        by_step=by_step,
        clock=training_clock(read_jsonl(path / "metrics.jsonl")),
    )


def _evaluated(
    rows: Sequence[dict[str, Any]], split: str | None, path: Path
) -> list[dict[str, Any]]:
    """The rows with a value of a metric, on the split that the run evaluates."""
    for number, row in enumerate(rows, start=1):
        for name in ("task", "metric", "value", "step"):
            if name not in row:
                raise UserError(f"{path / 'results.jsonl'}, line {number}: {name!r} is missing.")
    kept = [
        row
        for row in rows
        if row["metric"] not in _BASELINE_ROWS
        and row["value"] is not None
        and np.isfinite(row["value"])
        and (split is None or row.get("split", split) == split)
    ]
    if not kept:
        raise UserError(f"{path} has no results: set Eval.tasks, or run `mtl-jax eval`.")
    return kept


def _label(row: Mapping[str, Any], trained: Collection[str]) -> str:
    """A task in a comparison is a dataset; prompts that are held out are a task of their own."""
    dataset = row.get("dataset") or row["task"]
    held_out = row.get("trained") is False and row["task"] not in trained
    return f"{dataset} (held out)" if held_out else str(dataset)


def _scores_by_step(
    rows: Sequence[Mapping[str, Any]], trained: Collection[str]
) -> dict[int, dict[tuple[str, str], float]]:
    newest: dict[tuple[int, str, str], tuple[str, float]] = {}
    for row in rows:  # where a step was evaluated twice, the later row counts
        key = (int(row["step"]), row["task"], row["metric"])
        newest[key] = (_label(row, trained), float(row["value"]))
    gathered: dict[int, dict[tuple[str, str], list[float]]] = {}
    for (step, _, metric), (label, value) in newest.items():
        gathered.setdefault(step, {}).setdefault((label, metric), []).append(value)
    return {
        step: {key: float(np.mean(values)) for key, values in of_step.items()}
        for step, of_step in sorted(gathered.items())
    }


def training_clock(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Returns (step, seconds of training until then) from the lines of metrics.jsonl.

    The first line holds the time of compiling, which says nothing of a method at length: its pace
    is taken from the lines after it, where there are some.
    """
    rows = [row for row in metrics if row.get("seconds_per_step") is not None]
    paces = [float(row["seconds_per_step"]) for row in rows]
    if len(paces) > 1:
        paces[0] = float(np.mean(paces[1:]))
    clock, last, total = [], 0, 0.0
    for row, pace in zip(rows, paces, strict=True):
        total += (int(row["step"]) - last) * pace
        last = int(row["step"])
        clock.append((last, total))
    return clock


def check_budget(runs: Sequence[Run]) -> None:
    """Refuses runs that had different numbers of updates, or updates of another size.

    Raises:
      UserError: names the setting and two runs.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in BUDGET:
            if run.settings.get(name) != first.settings.get(name):
                raise UserError(
                    f"{name} is {first.settings.get(name)} in {first.path} but "
                    f"{run.settings.get(name)} in {run.path}: such runs cannot be compared; leave "
                    "one out or train it again."
                )


def check_baselines(single: Sequence[Run], multi: Sequence[Run]) -> None:
    """Refuses single-task runs of another model or optimizer than every run of several tasks.

    Raises:
      UserError: names the setting and two runs.
    """
    for run in single if multi else ():
        for name, value in run.settings.items():
            others = [other.settings.get(name) for other in multi]
            if _ALIKE.fullmatch(name) and value not in others:
                raise UserError(
                    f"{name} is {value!r} in {run.path}, a run on one task, but {others[0]!r} in "
                    f"{multi[0].path}: a baseline must have the model and the optimizer of a run "
                    "that it is held against; leave it out or train it again."
                )

"""Everything that a report needs, read from sweeps and runs into one list of results."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import sweep_files
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl

# The columns under which `mtl-jax train` and `eval` write the answers without a model.
_RUN_BASELINES = {"chance": "random", "majority": "majority"}
# Protocols of a run's evaluation; the last scores the target alone, which no sweep does.
_RANKED, _GENERATED, _SCORED = "t0", "generate", "target_score"
_RIGHT = 99.95  # scores are rounded when they are written
_CANDIDATES = 4  # right and wrong predictions of each cell that are kept to be read

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """One model: `label` is unique in the report."""

    label: str
    run: str
    step: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prediction to be read."""

    checkpoint: Checkpoint
    dataset: str
    prompt: str
    shots: int
    row: Row

    def answer(self, protocol: str) -> Row:
        """What the protocol made of it."""
        found: Row = self.row["by_protocol"][protocol]
        return found


@dataclasses.dataclass
class Result:
    """One task with so many shots under one checkpoint.

    Attributes:
      checkpoint, task, dataset, prompt, family, language, trained, split, shots: what was asked.
      original: its prompt is known to be for the original task.
      n: examples.
      truncated: those that were cut in some pass.
      skipped: rows that the prompt left out; None: not known.
      exemplars: solved examples in front of an input, on average; None: not known.
      values: (protocol, metric) -> value, in the order of the file.
      baselines: (baseline, metric) -> value.
      scores: protocol -> score of each example, 0 to 100, in the order of `indices`.
      indices: of the examples in their split.
      samples: a few predictions.
    """

    checkpoint: Checkpoint
    task: str
    dataset: str
    prompt: str
    family: str
    language: str
    original: bool
    trained: bool
    split: str
    shots: int
    n: int = 0
    truncated: int = 0
    skipped: int | None = None
    exemplars: float | None = None
    values: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    baselines: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    indices: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    samples: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def about(self) -> tuple[str, str, str, int]:
        """What was asked, whatever the answer."""
        return self.checkpoint.label, self.task, self.split, self.shots


@dataclasses.dataclass
class Material:
    """What one report is about.

    Attributes:
      name: for the title.
      results: of all checkpoints.
      checkpoints: run by run, ascending in step.
      shots: ascending.
      command: of the one sweep; empty where there are several folders.
      versions: of the first folder.
      seconds: that the models took in all; None where no folder tells.
      tokens: that they read and wrote.
      older: cells that a newer one of the same task replaces, made with other settings.
    """

    name: str
    results: list[Result]
    checkpoints: list[Checkpoint]
    shots: list[int]
    command: str = ""
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    tokens: int = 0
    older: int = 0


@dataclasses.dataclass
class _Found:
    """A result with what decides between two of the same name."""

    folder: Path
    key: str
    time: float
    result: Result
    seconds: float = 0.0
    tokens: int = 0


def gather_results(folders: Sequence[Path]) -> Material:
    """Reads sweeps and runs.

    Two folders may hold the same checkpoint: what is the same is taken once, and where names agree
    but settings or weights do not, the label of the checkpoint begins with that of its folder.

    Raises:
      UserError: a folder that is neither a sweep nor a run, or has no results; a damaged file.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = _short_names(folders)
    found = [one for folder in folders for one in _read(folder, names[folder])]
    if not found:
        where = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{where} has no results yet: run `mtl-jax sweep` first.")
    _tell_apart(found, names)
    newest: dict[tuple[str, str, str, int], _Found] = {}
    older = 0
    for one in found:
        known = newest.get(one.result.about)
        older += known is not None and known.key != one.key
        if known is None or (one.time, one.key) > (known.time, known.key):
            newest[one.result.about] = one
    results = [one.result for one in newest.values()]
    runs = list(dict.fromkeys(result.checkpoint.run for result in results))
    checkpoints = sorted(
        {result.checkpoint for result in results},
        key=lambda c: (runs.index(c.run), c.step, c.label),
    )
    places = {checkpoint: place for place, checkpoint in enumerate(checkpoints)}
    results.sort(key=lambda result: (places[result.checkpoint], result.shots))
    seconds = sum(one.seconds for one in newest.values())
    command = _text(folders[0] / "command.txt") if len(folders) == 1 else ""
    return Material(
        name=" + ".join(names[folder] for folder in folders),
        results=results,
        checkpoints=checkpoints,
        shots=sorted({result.shots for result in results}),
        command=command.splitlines()[0] if command else "",
        versions=_versions(folders[0]),
        seconds=seconds or None,
        tokens=sum(one.tokens for one in newest.values()),
        older=older,
    )


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The last parts of the paths, as many as it takes to tell the folders apart."""
    parts = {folder: folder.resolve().parts for folder in folders}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {folder: "/".join(parts[folder][-count:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            break
    return names


def _tell_apart(found: Sequence[_Found], names: Mapping[Path, str]) -> None:
    """Puts the folder before a checkpoint's label if another folder means another model by it."""
    keys: dict[tuple[str, str, str, int], dict[Path, set[str]]] = {}
    for one in found:
        keys.setdefault(one.result.about, {}).setdefault(one.folder, set()).add(one.key)
    unlike = {
        about[0]
        for about, by_folder in keys.items()
        if len(by_folder) > 1 and not set.intersection(*by_folder.values())
    }
    for one in found:
        old = one.result.checkpoint
        if old.label not in unlike:
            continue
        folder = names[one.folder]
        new = Checkpoint(f"{folder}/{old.label}", f"{folder}/{old.run}", old.step)
        one.result.checkpoint = new
        one.result.samples = [dataclasses.replace(s, checkpoint=new) for s in one.result.samples]


def _read(folder: Path, name: str) -> list[_Found]:
    if sweep_files.is_sweep(folder):
        return [
            one
            for cell in sweep_files.cell_folders(folder)
            if (one := _read_cell(folder, cell)) is not None
        ]
    if (folder / sweep_files.RESULTS).exists():
        return _read_run(folder, name)
    what = "holds neither a sweep nor results of a run" if folder.is_dir() else "is not a folder"
    raise UserError(f"{folder} {what}: name what `mtl-jax sweep` or `mtl-jax train` wrote to.")


def _read_cell(folder: Path, cell: Path) -> _Found | None:
    """A cell whose results are there."""
    rows = read_jsonl(cell / sweep_files.RESULTS)
    if not rows:
        return None
    facts = sweep_files.read_facts(cell)
    result = Result(
        checkpoint=Checkpoint(facts.checkpoint, facts.run, facts.step),
        task=facts.task,
        dataset=facts.dataset,
        prompt=facts.prompt or facts.task,
        family=facts.family,
        language=facts.language,
        original=facts.original,
        trained=facts.trained,
        split=facts.split,
        shots=facts.shots,
        n=facts.n,
        truncated=max(facts.truncated.values(), default=0),
        skipped=facts.skipped,
        exemplars=facts.exemplars,
    )
    try:
        for row in rows:
            into = result.baselines if row["protocol"] in sweep_files.BASELINES else result.values
            if row["value"] is not None:
                into[row["protocol"], row["metric"]] = float(row["value"])
        _add_scores(result, sweep_files.predictions(cell))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{cell}: {sweep_files.RESULTS} or {sweep_files.PREDICTIONS} is damaged ({error!r}). "
            "Delete the cell's folder and run the sweep again."
        ) from error
    return _Found(
        folder=folder,
        key=facts.key,
        time=(cell / sweep_files.RESULTS).stat().st_mtime,
        result=result,
        seconds=sum(facts.seconds.values()),
        tokens=sum(facts.tokens.values()),
    )


def _read_run(folder: Path, name: str) -> list[_Found]:
    """The evaluations of a training run; its predictions are of the newest step only."""
    found: dict[tuple[str, str, int], _Found] = {}
    values: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in read_jsonl(folder / sweep_files.RESULTS):
        try:
            task, step, split = row["task"], int(row["step"]), row.get("split", "")
            metric, value = row["metric"], row["value"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / sweep_files.RESULTS} is damaged ({error!r}).") from error
        if (task, split, step) not in found:
            result = Result(
                checkpoint=Checkpoint(f"{name}@{step}", name, step),
                task=task,
                dataset=row.get("dataset") or task,
                prompt=row.get("prompt") or task,
                family=row.get("family") or "",
                language=row.get("language") or "",
                original=bool(row.get("original")),
                trained=bool(row.get("trained")),
                split=split,
                shots=int(row.get("shots") or 0),
                n=int(row.get("n") or 0),
                truncated=int(row.get("truncated") or 0),
            )
            found[task, split, step] = _Found(folder, f"{folder}@{step}", 0.0, result)
            values[task, split, step] = {}
        result, known = found[task, split, step].result, values[task, split, step]
        if value is None:
            continue
        if metric in _RUN_BASELINES:
            result.baselines[_RUN_BASELINES[metric], "accuracy"] = float(value)
        else:
            known[metric] = float(value)
    for key, one in found.items():
        rows = read_jsonl(folder / "predictions" / f"{one.result.task}.jsonl")
        protocol = _run_protocol(one.result, rows)
        one.result.values = {(protocol, metric): value for metric, value in values[key].items()}
        if protocol != _SCORED:
            rows = [row for row in rows if row.get("step") == one.result.checkpoint.step]
            _add_scores(one.result, [_as_prediction(row, protocol) for row in rows])
    return list(found.values())


def _run_protocol(result: Result, predictions: Sequence[Row]) -> str:
    """The protocol of a sweep that does what the evaluation of a training run did.

    It ranks by T0's rule, the sum of the log-probabilities with the end of sequence, and only what
    it ranks has these baselines.
    """
    if result.baselines:
        return _RANKED
    answered = not predictions or "prediction" in predictions[0]
    return _GENERATED if answered else _SCORED


def _as_prediction(row: Row, protocol: str) -> Row:
    """A line of a run's predictions as a sweep has them."""
    answer = row.get("prediction", "")
    right = row.get("correct", str(answer).strip() == str(row.get("targets", "")).strip())
    told = {"prediction": answer, "score": 100.0 * bool(right)}
    if row.get("choices"):
        told["values"] = row["scores"]
    return {**row, "by_protocol": {protocol: told}}


def _add_scores(result: Result, predictions: Sequence[Row]) -> None:
    """Takes the scores of all examples, and a few of them as samples."""
    if not predictions:
        return
    result.indices = np.array([row["index"] for row in predictions], np.int64)
    for protocol in predictions[0]["by_protocol"]:
        result.scores[protocol] = np.array(
            [row["by_protocol"][protocol]["score"] for row in predictions], np.float64
        )
    first = next(iter(result.scores), None)
    if first is None:
        return
    right = result.scores[first] >= _RIGHT
    for places in (np.flatnonzero(~right), np.flatnonzero(right)):
        for place in _spread(places, _CANDIDATES):
            result.samples.append(
                Sample(
                    result.checkpoint,
                    result.dataset,
                    result.prompt,
                    result.shots,
                    predictions[place],
                )
            )


def _spread(places: np.ndarray, count: int) -> Iterable[int]:
    """At most `count` of the places, evenly apart."""
    if len(places) <= count:
        return [int(place) for place in places]
    return [int(places[i * len(places) // count]) for i in range(count)]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _versions(folder: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_text(folder / "versions.json") or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

"""Methods compared over tasks and seeds: at equal steps, at equal time, against single tasks.

Several run directories become one `Comparison`. Runs of one task are the baselines; the others are
grouped by method and settings, and the runs of a group are its seeds.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.analysis.gradients import mean_cosine, read_gradients
from mtl_jax.analysis.intervals import Interval, mean_interval, paired_difference
from mtl_jax.analysis.run_analysis import FOLDER
from mtl_jax.analysis.runs import (
    STATIC_METHODS,
    Run,
    check_baselines,
    check_budget,
    read_run,
    trained_on,
)
from mtl_jax.analysis.state_files import align
from mtl_jax.analysis.trade_offs import TradeOff, trade_off
from mtl_jax.analysis.transfer import (
    NegativeTransfer,
    Scores,
    Seed,
    lower_is_better,
    negative_transfer,
    transfer_matrix,
)
from mtl_jax.errors import UserError, suggest

Key = tuple[str, str]  # (task, metric)
AVERAGE, WORST = "average", "worst task"


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One method at one budget, over its seeds.

    Attributes:
      label: the method, with the settings that set it apart from its like.
      static: whether its weights are known before the run.
      seeds: how many runs.
      values: each (task, metric).
      average: of the trained tasks' first metrics; None where one is better when lower.
      held_out: the same of the tasks that were not trained on; None where there is none.
      worst: over seeds, the lowest of the trained tasks' first metrics, which no average hides.
      over_static: by how much `average` is above that of the best static method, seed by seed;
        None for that method, and where no seed is common.
      transfer: against the single-task runs; None where none was given.
      seconds: training time at this budget, None where unknown.
      step: how far training was; between two evaluations, values lie on the line between theirs.
    """

    label: str
    static: bool
    seeds: int
    values: Mapping[Key, Interval]
    average: Interval | None
    held_out: Interval | None
    worst: Interval | None
    over_static: Interval | None
    transfer: NegativeTransfer | None
    seconds: float | None
    step: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that the page shows; see `as_json`.

    Attributes:
      keys: the (task, metric) pairs that all multi-task runs have.
      trained: the tasks of `keys` that were trained on.
      left_out: pairs that only some of the runs have.
      by_steps: at the end of training.
      by_time: where each method was after `seconds`; empty where times are unknown.
      without_time: methods that were not evaluated within that time.
      seconds: training time of the quickest method, a mean over its seeds, as are the times that
        are held against it.
      trade_offs: of the methods, at the end of training.
      baselines: task -> number of its single-task runs.
      transfer: (source, target) -> relative delta; empty with less than two single tasks.
      lower: metrics that are better when lower.
      steps: updates of every run.
      runs: (name, label of its method or its only task, seed) of every run.
      alignment: linear CKA between runs, of `state_files.align`.
    """

    keys: tuple[Key, ...]
    trained: tuple[str, ...]
    left_out: tuple[Key, ...]
    by_steps: tuple[MethodResult, ...]
    by_time: tuple[MethodResult, ...]
    without_time: tuple[str, ...]
    seconds: float | None
    trade_offs: tuple[TradeOff, ...]
    baselines: Mapping[str, int]
    transfer: Mapping[tuple[str, str], Interval | None]
    lower: frozenset[str]
    steps: int
    runs: tuple[tuple[str, str, str], ...]
    alignment: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Returns the comparison as plain values for comparison.json; deltas are fractions."""
        return {
            "confidence": 0.95,
            "tasks": [{"task": task, "metric": metric} for task, metric in self.keys],
            "trained_tasks": list(self.trained),
            "left_out": [{"task": task, "metric": metric} for task, metric in self.left_out],
            "lower_is_better": sorted(self.lower),
            "equal_steps": [_method_json(result) for result in self.by_steps],
            "equal_time": {
                "seconds": self.seconds,
                "methods": [_method_json(result) for result in self.by_time],
                "not_evaluated_in_time": list(self.without_time),
            },
            "trade_offs": [dataclasses.asdict(trade_off) for trade_off in self.trade_offs],
            "single_task_runs": dict(self.baselines),
            "transfer": [
                {"trained_on": source, "evaluated_on": target, "delta": d and d.as_json()}
                for (source, target), d in self.transfer.items()
            ],
            "steps": self.steps,
            "runs": [
                {"run": name, "method": label, "seed": seed} for name, label, seed in self.runs
            ],
            "alignment": self.alignment,
        }


def _method_json(result: MethodResult) -> dict[str, Any]:
    def interval(value: Interval | None) -> dict[str, Any] | None:
        return None if value is None else value.as_json()

    tasks: dict[str, dict[str, Any]] = {}
    for (task, metric), value in result.values.items():
        tasks.setdefault(task, {})[metric] = value.as_json()
    return {
        "label": result.label,
        "static": result.static,
        "seeds": result.seeds,
        "step": result.step,
        "seconds": result.seconds,
        "tasks": tasks,
        "average": interval(result.average),
        "average_held_out": interval(result.held_out),
        "worst_task": interval(result.worst),
        "average_over_best_static": interval(result.over_static),
        "against_single_tasks": result.transfer and result.transfer.as_json(),
    }


def compare(
    folders: Sequence[str | Path], *, lower: Collection[str] = (), tasks: Sequence[str] = ()
) -> Comparison:
    """Reads runs and compares them.

    Args:
      folders: run directories: methods x seeds, and single-task runs as baselines.
      lower: metrics that are better when lower, beside those known by name.
      tasks: two tasks for a trade-off plot; by default the most conflicting ones, where gradients
        were recorded.

    Raises:
      UserError: a run that is missing, damaged, unfinished, given twice or trained on another
        budget; or runs without a common result.
    """
    trained_tasks = set().union(*map(trained_on, folders))
    runs = [read_run(folder, trained_tasks) for folder in folders]
    check_budget(runs)
    single = [run for run in runs if len(run.trained) == 1]
    multi = [run for run in runs if len(run.trained) != 1]
    check_baselines(single, multi)
    baselines = _baselines(single)
    groups = _groups(multi)
    keys, left_out = _shared([run.scores for run in multi])
    named = dict.fromkeys(task for task, _ in keys)
    trained = [t for t in named if any(t in run.trained for run in multi)] or list(named)
    view = _View(keys, tuple(trained), baselines, frozenset(lower))
    ends = {label: [(max(r.by_step), r.scores) for r in of] for label, of in groups.items()}
    by_steps = view.results(groups, ends)
    seconds = _quickest(groups)
    by_time, late = view.within(seconds, groups) if seconds is not None else ((), ())
    folders_of = [run.path.absolute().name for run in runs]
    short = len(set(folders_of)) == len(folders_of)
    names = {r.path: n if short else str(r.path) for r, n in zip(runs, folders_of, strict=True)}
    sources = list(baselines)
    metrics = {metric for run in runs for _, metric in run.scores}
    return Comparison(
        keys=keys,
        trained=view.trained,
        left_out=left_out,
        by_steps=by_steps,
        by_time=by_time,
        without_time=late,
        seconds=seconds,
        trade_offs=tuple(view.trade_offs(by_steps, _pair(multi, named, tasks))),
        baselines={task: len(of_task) for task, of_task in baselines.items()},
        transfer=transfer_matrix(baselines, sources, lower) if len(sources) > 1 else {},
        lower=frozenset(metric for metric in metrics if lower_is_better(metric, lower)),
        steps=int(runs[0].settings["Run.steps"]),
        runs=tuple(
            (names[run.path], _of_run(run, groups), " ".join(dict.fromkeys(map(str, run.seed))))
            for run in runs
        ),
        alignment=align({names[run.path]: run.path / FOLDER for run in runs}),
    )


def _of_run(run: Run, groups: Mapping[str, Sequence[Run]]) -> str:
    """The label of a run's method, or the task it was trained on alone."""
    label = next((label for label, of_group in groups.items() if run in of_group), None)
    return label or f"{run.trained[0]} alone"


def _mean_seconds(runs: Sequence[Run], step: int) -> float | None:
    """Training time of a method until a step, its mean over seeds; None where one is unknown."""
    times = [run.seconds_until(step) for run in runs]
    known = [time for time in times if time is not None]
    return float(np.mean(known)) if len(known) == len(times) else None


def _quickest(groups: Mapping[str, Sequence[Run]]) -> float | None:
    """Training time of the quickest method, None where one method's is unknown."""
    times = [_mean_seconds(runs, max(runs[0].by_step)) for runs in groups.values()]
    known = [time for time in times if time is not None]
    return min(known) if known and len(known) == len(times) else None


def _after(
    runs: Sequence[Run], seconds: float, keys: Sequence[Key]
) -> list[tuple[int, Scores]] | None:
    """(step, scores) of each run of a method after so many seconds of training.

    The step is the method's, by the mean time of its seeds, and scores between two evaluations lie
    on the line between theirs: machines are never so quiet that two methods of the same cost reach
    the same evaluation. None where the time ends before the first evaluation.
    """
    common = sorted(
        step
        for step in set.intersection(*(set(run.by_step) for run in runs))
        if all(key in run.by_step[step] for run in runs for key in keys)
    )
    times = [_mean_seconds(runs, step) for step in common]
    known = [(n, time) for n, time in zip(common, times, strict=True) if time is not None]
    if not known or known[0][1] > seconds:
        return None
    steps, ends = zip(*known, strict=True)
    place = float(np.interp(seconds, ends, steps))
    return [
        (
            round(place),
            {
                key: float(np.interp(place, steps, [run.by_step[step][key] for step in steps]))
                for key in keys
            },
        )
        for run in runs
    ]


def _baselines(single: Sequence[Run]) -> dict[str, dict[Seed, Scores]]:
    """Task -> seed -> scores of the run on that task alone."""
    found: dict[str, dict[Seed, Scores]] = {}
    paths: dict[tuple[str, Seed], Path] = {}
    for run in single:
        (task,) = run.trained
        if not any(task == name for name, _ in run.scores):
            raise UserError(
                f"{run.path} was trained on {task!r} alone but does not evaluate it: add it to "
                "Eval.tasks and run `mtl-jax eval`, or leave the run out."
            )
        if (task, run.seed) in paths:
            raise UserError(_twice(paths[task, run.seed], run.path, f"single-task runs of {task}"))
        paths[task, run.seed] = run.path
        found.setdefault(task, {})[run.seed] = run.scores
    return found


def _groups(multi: Sequence[Run]) -> dict[str, list[Run]]:
    """Label -> the seeds of one method with one set of settings."""
    variants: dict[tuple[str, str], list[Run]] = {}
    for run in multi:
        variants.setdefault((run.method, repr(sorted(run.variant.items()))), []).append(run)
    for of_variant in variants.values():
        by_seed: dict[Seed, Run] = {}
        for run in of_variant:
            if run.seed in by_seed:
                raise UserError(_twice(by_seed[run.seed].path, run.path, "runs of one method"))
            by_seed[run.seed] = run
    return {
        _label(method, of_variant[0], [v[0] for (m, _), v in variants.items() if m == method]): (
            of_variant
        )
        for (method, _), of_variant in variants.items()
    }


def _twice(first: Path, second: Path, what: str) -> str:
    return (
        f"{first} and {second} are {what} with the same settings and seeds, and would count as two "
        "draws: leave one out, or train it with another Run.seed and Data.seed."
    )


def _label(method: str, run: Run, alike: Sequence[Run]) -> str:
    """The method's name, with the values that set this run apart from others of its method."""
    apart = [
        _in_words(name.removeprefix(method + "."), run.variant[name])
        for name in run.variant
        if any(other.variant.get(name) != run.variant[name] for other in alike)
    ]
    return f"{method} ({', '.join(apart)})" if apart else method


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and value:
        parts = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
        return f"{name} {', '.join(parts)}"
    return f"{name}={value!r}"


def _paired(values: Mapping[Seed, float], others: Mapping[Seed, float]) -> Interval | None:
    """Difference over the seeds that both sides have, None where there is none."""
    seeds = [seed for seed in values if seed in others]
    if not seeds:
        return None
    return paired_difference([values[s] for s in seeds], [others[s] for s in seeds])


def _shared(scores: Sequence[Scores]) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    """The pairs that all runs have, and those that only some have."""
    every = list(dict.fromkeys(key for run in scores for key in run))
    keys = tuple(key for key in every if all(key in run for run in scores))
    if scores and not keys:
        raise UserError(
            "These runs have no task and metric in common: evaluate the same Eval.tasks in all."
        )
    return keys, tuple(key for key in every if key not in keys)


def _pair(runs: Sequence[Run], known: Collection[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """The two tasks of the trade-off plot: those given, or the ones whose gradients differ most."""
    for task in tasks:
        if task not in known:
            raise UserError(
                f"--tasks: {task!r} is not evaluated in all runs.{suggest(task, known)}"
            )
    if tasks and len(set(tasks)) != 2:
        raise UserError(f"--tasks takes two different tasks, got {', '.join(tasks)}.")
    if tasks:
        return tuple(tasks)
    cosines: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        gradients = read_gradients(run.path / "gradients.jsonl")
        if gradients is None:
            continue
        cosine_KNN = mean_cosine(gradients).cosine_KNN
        labels = [run.label_of.get(task, task) for task in gradients.tasks]
        for i, a in enumerate(labels):
            for j, b in enumerate(labels):
                if a < b and a in known and b in known:
                    values = cosine_KNN[:, i, j]
                    cosines.setdefault((a, b), []).extend(values[~np.isnan(values)])
    means = {pair: float(np.mean(values)) for pair, values in cosines.items() if values}
    return min(means.items(), key=lambda item: item[1])[0] if means else ()


@dataclasses.dataclass(frozen=True)
class _View:
    """What all methods are measured by."""

    keys: tuple[Key, ...]
    trained: tuple[str, ...]
    baselines: Mapping[str, Mapping[Seed, Scores]]
    lower: frozenset[str]

    def first_keys(self, trained: bool) -> list[Key]:
        """The first metric of each task that was (not) trained on."""
        first = {task: (task, metric) for task, metric in reversed(self.keys)}
        tasks = dict.fromkeys(task for task, _ in self.keys)
        return [first[task] for task in tasks if (task in self.trained) == trained]

    def result(
        self, label: str, runs: Sequence[Run], found: Sequence[tuple[int, Scores]]
    ) -> MethodResult:
        """One method from its runs and, for each, the step and scores to look at."""
        scores = [of_run for _, of_run in found]
        by_seed = {
            run.seed: {key: of_run[key] for key in self.keys if key[0] in self.trained}
            for run, of_run in zip(runs, scores, strict=True)
        }
        first = self.first_keys(True)
        return MethodResult(
            label=label,
            static=runs[0].method in STATIC_METHODS,
            seeds=len(runs),
            values={key: mean_interval([s[key] for s in scores]) for key in self.keys},
            average=self._over(scores, first, np.mean),
            held_out=self._over(scores, self.first_keys(False), np.mean),
            worst=self._over(scores, first, np.min),
            over_static=None,
            transfer=negative_transfer(by_seed, self.baselines, self.lower)
            if self.baselines
            else None,
            seconds=_mean_seconds(runs, found[0][0]),
            step=found[0][0],
        )

    def results(
        self, groups: Mapping[str, Sequence[Run]], found: Mapping[str, Sequence[tuple[int, Scores]]]
    ) -> tuple[MethodResult, ...]:
        """All methods of `found`, each held against the best static one."""
        results = [self.result(label, groups[label], found[label]) for label in found]
        averages = {
            label: {
                run.seed: interval.mean
                for run, (_, scores) in zip(groups[label], found[label], strict=True)
                if (interval := self._over([scores], self.first_keys(True), np.mean)) is not None
            }
            for label in found
        }
        static = [r for r in results if r.static and r.average is not None]
        if not static:
            return tuple(results)
        best = max(static, key=lambda r: r.average.mean if r.average else -np.inf).label
        return tuple(
            r
            if r.label == best
            else dataclasses.replace(r, over_static=_paired(averages[r.label], averages[best]))
            for r in results
        )

    def within(
        self, seconds: float, groups: Mapping[str, Sequence[Run]]
    ) -> tuple[tuple[MethodResult, ...], tuple[str, ...]]:
        """The methods after so many seconds, and those that were not evaluated by then."""
        after = {label: _after(runs, seconds, self.keys) for label, runs in groups.items()}
        found = {label: scores for label, scores in after.items() if scores is not None}
        return self.results(groups, found), tuple(label for label in after if label not in found)

    def _over(self, scores: Sequence[Scores], keys: Sequence[Key], fold: Any) -> Interval | None:
        """A fold over tasks in each run, then over seeds; None where a metric counts mistakes."""
        if not keys or any(lower_is_better(metric, self.lower) for _, metric in keys):
            return None
        return mean_interval([float(fold([of_run[key] for key in keys])) for of_run in scores])

    def trade_offs(self, results: Sequence[MethodResult], pair: Sequence[str]) -> list[TradeOff]:
        """The plots: average against worst task, and the chosen two tasks."""
        found = []
        names, static = [r.label for r in results], [r.static for r in results]
        averages = [(r.average, r.worst) for r in results if r.average and r.worst]
        if results and len(averages) == len(results):
            axes = (AVERAGE, WORST)
            found.append(trade_off(axes, (False, False), names, static, averages))
        if results and pair:
            first = {task: (task, metric) for task, metric in reversed(self.keys)}
            x, y = (first[task] for task in pair)
            lower = (lower_is_better(x[1], self.lower), lower_is_better(y[1], self.lower))
            values = [(r.values[x], r.values[y]) for r in results]
            axes = (f"{x[0]} ({x[1]})", f"{y[0]} ({y[1]})")
            found.append(trade_off(axes, lower, names, static, values))
        return found

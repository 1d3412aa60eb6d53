"""What training together gained or cost against a model for each task, with intervals over seeds.

`Delta_m = 1/T sum_t 1/M_t sum_m (-1)^l_m (M_mtl - M_stl) / |M_stl|` (Maninis et al. 2019,
"Attentive Single-Tasking of Multiple Tasks", section 4; l_m = 1 where lower is better). The
absolute value keeps the sign right for scores below zero and changes nothing above.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.analysis.intervals import Interval, mean_interval

Scores = Mapping[tuple[str, str], float]  # (task, metric) -> value
Seed = tuple[int, ...]

# By the last word of a metric's name; anything else is better when higher.
LOWER_IS_BETTER = frozenset(
    ("loss", "perplexity", "nll", "error", "wer", "cer", "ter", "mae", "mse", "rmse", "bpb")
)


def lower_is_better(metric: str, named: Collection[str] = ()) -> bool:
    """Whether a metric counts mistakes: by the last word of its name, or because it is `named`."""
    return metric in named or metric.replace("/", "_").split("_")[-1].lower() in LOWER_IS_BETTER


def relative_delta(value: float, baseline: float, lower: bool) -> float | None:
    """Relative gain over a baseline, negative where it is worse; None for a baseline of zero."""
    if baseline == 0:
        return None
    return (-1.0 if lower else 1.0) * (value - baseline) / abs(baseline)


def delta_m(scores: Scores, baselines: Scores, lower: Collection[str] = ()) -> float | None:
    """Maninis' Delta_m as a fraction: the mean over tasks of the mean over a task's metrics.

    Args:
      scores: of the multi-task model; its tasks and metrics are those that count.
      baselines: of the single-task models; what they have beyond that is not looked at.
      lower: metrics that are better when lower, beside those known by name.

    Returns:
      The mean, or None if a baseline is missing or zero: half a mean would mislead.
    """
    by_task = _by_task(metric_deltas(scores, baselines, lower))
    return _mean([_mean(values) for values in by_task.values()])


def metric_deltas(
    scores: Scores, baselines: Scores, lower: Collection[str] = ()
) -> dict[tuple[str, str], float | None]:
    """`relative_delta` of each (task, metric); None where there is no baseline."""
    return {
        (task, metric): None
        if (task, metric) not in baselines
        else relative_delta(value, baselines[task, metric], lower_is_better(metric, lower))
        for (task, metric), value in scores.items()
    }


def _by_task(deltas: Mapping[tuple[str, str], float | None]) -> dict[str, list[float | None]]:
    by_task: dict[str, list[float | None]] = {}
    for (task, _), value in deltas.items():
        by_task.setdefault(task, []).append(value)
    return by_task


@dataclasses.dataclass(frozen=True)
class NegativeTransfer:
    """The report of one method against single-task baselines; deltas are fractions.

    Attributes:
      delta: Delta_m over the seeds, None where it has no number.
      missing: tasks without a usable baseline, which is why.
      by_metric: relative delta of each (task, metric).
      by_task: mean over each task's metrics.
      worst: the task with the lowest delta, None where no task has one.
      paired: whether each seed was compared with the baselines of the same seed. If not, with
        their mean over seeds, and the intervals leave the baselines' own spread out.
    """

    delta: Interval | None
    missing: tuple[str, ...]
    by_metric: Mapping[tuple[str, str], Interval | None]
    by_task: Mapping[str, Interval | None]
    worst: str | None
    paired: bool

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain values."""

        def plain(interval: Interval | None) -> dict[str, Any] | None:
            return None if interval is None else interval.as_json()

        metrics: dict[str, dict[str, Any]] = {}
        for (task, metric), value in self.by_metric.items():
            metrics.setdefault(task, {})[metric] = plain(value)
        return {
            "delta_m": plain(self.delta),
            "missing_baselines": list(self.missing),
            "by_task": {task: plain(value) for task, value in self.by_task.items()},
            "by_metric": metrics,
            "worst_task": self.worst,
            "paired_seeds": self.paired,
        }


def negative_transfer(
    runs: Mapping[Seed, Scores],
    baselines: Mapping[str, Mapping[Seed, Scores]],
    lower: Collection[str] = (),
) -> NegativeTransfer:
    """Compares a method's runs with single-task runs, seed by seed where the seeds are the same.

    Args:
      runs: scores of the method by seed; the (task, metric) pairs that all runs have count.
      baselines: task -> seed -> scores of the model trained on that task alone.
      lower: metrics that are better when lower, beside those known by name.
    """
    shared = [key for key in next(iter(runs.values())) if all(key in run for run in runs.values())]
    tasks = list(dict.fromkeys(task for task, _ in shared))
    known = [baselines[task] for task in tasks if baselines.get(task)]
    paired = bool(known) and all(seed in of_task for of_task in known for seed in runs)
    deltas, whole = [], []
    for seed, scores in runs.items():
        own = {key: scores[key] for key in shared}
        beside = _beside(shared, baselines, seed if paired else None)
        deltas.append(metric_deltas(own, beside, lower))
        whole.append(delta_m(own, beside, lower))
    by_metric = {key: _over_seeds([found[key] for found in deltas]) for key in shared}
    means = [{task: _mean(found) for task, found in _by_task(d).items()} for d in deltas]
    by_task = {task: _over_seeds([of_seed[task] for of_seed in means]) for task in tasks}
    numbers = {task: value.mean for task, value in by_task.items() if value is not None}
    return NegativeTransfer(
        delta=_over_seeds(whole),
        missing=tuple(task for task, value in by_task.items() if value is None),
        by_metric=by_metric,
        by_task=by_task,
        worst=min(numbers, key=lambda task: numbers[task]) if numbers else None,
        paired=paired,
    )


def _beside(
    keys: Sequence[tuple[str, str]],
    baselines: Mapping[str, Mapping[Seed, Scores]],
    seed: Seed | None,
) -> dict[tuple[str, str], float]:
    """Baseline values of one seed, or means over seeds for `seed` None."""
    found = {}
    for task, metric in keys:
        of_task = baselines.get(task, {})
        runs = of_task.values() if seed is None else [of_task[seed]] if seed in of_task else []
        values = [scores[task, metric] for scores in runs if (task, metric) in scores]
        if values:
            found[task, metric] = float(np.mean(values))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _over_seeds(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known and len(known) == len(values) else None


def transfer_matrix(
    baselines: Mapping[str, Mapping[Seed, Scores]],
    tasks: Sequence[str],
    lower: Collection[str] = (),
) -> dict[tuple[str, str], Interval | None]:
    """What a model trained on one task alone does on another, relative to that other's own model.

    Args:
      baselines: task -> seed -> scores of the model trained on that task alone, on all tasks.
      tasks: the rows (trained on) and columns (evaluated on).
      lower: metrics that are better when lower, beside those known by name.

    Returns:
      (source, target) -> mean relative delta over the target's metrics and the seeds, None where
      one was not evaluated. The diagonal is 0.
    """
    matrix: dict[tuple[str, str], Interval | None] = {}
    for target in tasks:
        for source in tasks:
            runs = {
                seed: {key: value for key, value in scores.items() if key[0] == target}
                for seed, scores in baselines.get(source, {}).items()
            }
            if source == target or not runs or not all(runs.values()):
                own = bool(runs) and all(runs.values())
                matrix[source, target] = mean_interval([0.0]) if own else None
                continue
            own_runs = {target: baselines.get(target, {})}
            matrix[source, target] = negative_transfer(runs, own_runs, lower).delta
    return matrix

"""What one run's files say about its tasks, as numbers and as files in its folder `analysis`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.analysis.affinity import Grouping, best_grouping, propose_groups
from mtl_jax.analysis.files import read_object, write_csv, write_json
from mtl_jax.analysis.gradients import (
    Gradients,
    MeanCosine,
    first_order,
    mean_cosine,
    read_gradients,
    weighted_mean,
)
from mtl_jax.analysis.ordering import average_linkage
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl

FOLDER = "analysis"
# Values per task in metrics.jsonl, written as NAME/TASK.
TRACES = ("loss", "tokens", "weight", "effective_share", "gradient_norm", "epochs")
_MOST_GROUPS = 6
SCALARS = ("conflict_rate", "solver_fallback")

_FIRST_ORDER = (
    "row onto column: share of the column's loss that a plain gradient step on the row's loss "
    "takes away, to first order, averaged over training"
)
_LOOKAHEAD = (
    "row onto column: share of the column's loss that a plain gradient step on the row's loss took "
    "away on the same batch, averaged over the steps that looked ahead"
)

Series = list[tuple[int, float]]  # (step, value)


@dataclasses.dataclass(frozen=True)
class Affinity:
    """Which tasks help which, and which to train together.

    Attributes:
      by_line_LNN: of row onto column, at each line of gradients.jsonl; NaN where unknown.
      mean_NN: averaged over training.
      lines: how many of the lines know a pair.
      grouping: the best one.
    """

    by_line_LNN: np.ndarray
    mean_NN: np.ndarray
    lines: int
    grouping: Grouping


@dataclasses.dataclass(frozen=True)
class RunAnalysis:
    """The multi-task side of one run; what its files do not have is empty or None.

    Attributes:
      method: of method.json: name and options.
      rates: of rates.json: mixing rates by task that DoReMi has found.
      traces: name of `TRACES` -> task -> values over training.
      scalars: name of `SCALARS` -> values over training.
      gradients: of gradients.jsonl.
      cosine: their cosines averaged over training.
      order: of the tasks of `gradients`, alike ones side by side.
      first_order: affinity by the Gramians; None with fewer than two tasks or nothing known.
      lookahead: affinity as measured by steps on single tasks (`Balance.affinity_every`), or None.
      representations: of analysis/representations.json, which `mtl-jax report --representations`
        writes.
    """

    method: Mapping[str, Any]
    rates: Mapping[str, float]
    traces: Mapping[str, Mapping[str, Series]]
    scalars: Mapping[str, Series]
    gradients: Gradients | None
    cosine: MeanCosine | None
    order: Sequence[int]
    first_order: Affinity | None
    lookahead: Affinity | None
    representations: Mapping[str, Any] | None


def analyse(run: Path) -> RunAnalysis:
    """Reads a run's files.

    Raises:
      UserError: a file is damaged; names it and, where it has lines, the line.
    """
    metrics = read_jsonl(run / "metrics.jsonl")
    gradients = read_gradients(run / "gradients.jsonl")
    cosine, linear, ahead = None, None, None
    order: list[int] = []
    if gradients is not None:
        cosine = mean_cosine(gradients)
        order = _alike(cosine.cosine_KNN)
        linear = _affinity(first_order(gradients, metrics), gradients.steps_L)
        ahead = _affinity(gradients.lookahead_LNN, gradients.lookaheads_L)
    return RunAnalysis(
        method=read_object(run / "method.json") or {},
        rates=_rates(run / "rates.json"),
        traces={name: found for name in TRACES if (found := _by_task(metrics, name))},
        scalars={name: series for name in SCALARS if (series := _series(metrics, name))},
        gradients=gradients,
        cosine=cosine,
        order=order,
        first_order=linear,
        lookahead=ahead,
        representations=read_object(run / FOLDER / "representations.json"),
    )


def _affinity(by_line_LNN: np.ndarray, weight_L: np.ndarray) -> Affinity | None:
    mean_NN = weighted_mean(by_line_LNN, weight_L)
    if len(mean_NN) < 2 or np.isnan(mean_NN).all():
        return None
    lines = int((~np.isnan(by_line_LNN)).any(axis=(1, 2)).sum())
    return Affinity(by_line_LNN, mean_NN, lines, best_grouping(mean_NN))


def agreement(analysis: RunAnalysis) -> float | None:
    """Correlation of both affinities over pairs of different tasks, on the lines that have both.

    None with fewer than three such pairs, or where one of the two is constant.
    """
    if analysis.first_order is None or analysis.lookahead is None:
        return None
    linear, ahead = analysis.first_order.by_line_LNN, analysis.lookahead.by_line_LNN
    both = ~np.isnan(linear) & ~np.isnan(ahead)
    means = [
        weighted_mean(np.where(both, values, np.nan), np.ones(len(values)))
        for values in (linear, ahead)
    ]
    pairs = ~np.eye(linear.shape[1], dtype=bool) & ~np.isnan(means[0])
    x, y = (mean[pairs] for mean in means)
    if x.size < 3 or not x.std() or not y.std():
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _alike(cosine_KNN: np.ndarray) -> list[int]:
    """The order of clusters by 1 - cosine, averaged over the groups that know a pair."""
    mean = weighted_mean(cosine_KNN, np.ones(len(cosine_KNN)))
    return average_linkage(1.0 - mean)[0]


def _rates(path: Path) -> dict[str, float]:
    rates = read_object(path) or {}
    for task, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise UserError(f"{path} is damaged: the rate of {task!r} is no number.")
    return rates


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> Series:
    return [(row["step"], float(row[name])) for row in metrics if row.get(name) is not None]


def _by_task(metrics: Sequence[Mapping[str, Any]], name: str) -> dict[str, Series]:
    prefix = f"{name}/"
    keys = sorted({key for row in metrics for key in row if key.startswith(prefix)})
    found = {key.removeprefix(prefix): _series(metrics, key) for key in keys}
    return {task: series for task, series in found.items() if series}


def save(analysis: RunAnalysis, run: Path) -> list[Path]:
    """Writes the numbers behind the pictures into `run/analysis` and returns the files.

    loss.csv, weight.csv and so on: a line per step, a column per task. cosine.csv: a line per step,
    group and pair that was seen. cosine.json: means over training and the order of the tasks.
    affinity.json: first-order affinity and the proposed groups; lookahead.json: the same of the
    measured one; lookahead.csv: both at each line that has it.

    Raises:
      UserError: no space or no permission.
    """
    folder = run / FOLDER
    written = [_write_trace(folder, name, by_task) for name, by_task in analysis.traces.items()]
    if analysis.scalars:
        written.append(_write_trace(folder, "conflict", analysis.scalars))
    if analysis.gradients is None or analysis.cosine is None:
        return written
    gradients, cosine = analysis.gradients, analysis.cosine
    written.append(_write_pairs(folder / "cosine.csv", gradients))
    by_group = {
        group: {
            "cosine": cosine.cosine_KNN[k],
            "told_from_noise": cosine.told_KNN[k],
            "split_half_cosine": cosine.noise_KN[k],
        }
        for k, group in enumerate(gradients.groups)
    }
    order = [gradients.tasks[i] for i in analysis.order]
    facts = {"tasks": gradients.tasks, "order": order, "groups": by_group}
    written.append(write_json(folder / "cosine.json", facts))
    written.append(_write_affinity(folder / "affinity.json", _FIRST_ORDER, analysis, linear=True))
    if analysis.lookahead is not None:
        path = folder / "lookahead.json"
        written.append(_write_affinity(path, _LOOKAHEAD, analysis, linear=False))
        written.append(_write_lookaheads(folder / "lookahead.csv", analysis))
    return written


def _write_trace(folder: Path, name: str, by_task: Mapping[str, Series]) -> Path:
    columns = {task: dict(series) for task, series in by_task.items()}
    steps = sorted({step for series in columns.values() for step in series})
    rows = ([step, *(series.get(step) for series in columns.values())] for step in steps)
    return write_csv(folder / f"{name}.csv", ["step", *columns], rows)


def _write_pairs(path: Path, gradients: Gradients) -> Path:
    rows = (
        [
            *(int(step), group, gradients.tasks[i], gradients.tasks[j]),
            *(gradients.cosine_LKNN[line, k, i, j], gradients.gram_LKNN[line, k, i, j]),
            gradients.noise_LKN[line, k, i] if i == j else None,
        ]
        for line, step in enumerate(gradients.step_L)
        for k, group in enumerate(gradients.groups)
        for i in range(len(gradients.tasks))
        for j in range(i + 1)
        if not np.isnan(gradients.cosine_LKNN[line, k, i, j])
    )
    header = ["step", "group", "task", "other", "cosine", "inner_product", "split_half_cosine"]
    return write_csv(path, header, rows)


def _write_affinity(path: Path, meaning: str, analysis: RunAnalysis, linear: bool) -> Path:
    assert analysis.gradients is not None
    tasks, found = analysis.gradients.tasks, analysis.lookahead
    if linear:
        found = analysis.first_order
    facts: dict[str, Any] = {"meaning": meaning, "tasks": tasks}
    if found is None:
        facts |= {"affinity": None, "lines": 0}
    else:
        facts |= {"affinity": found.mean_NN, "lines": found.lines}
        # Under this name a run can take the groups for sharing parameters.
        facts["groups"] = _named(found.grouping, tasks)
        facts |= {"score": found.grouping.score, "exact": found.grouping.exact}
        # For a wanted number of groups, such as of models that shall be served.
        facts["groups_by_count"] = {
            count: _named(propose_groups(found.mean_NN, count), tasks)
            for count in range(2, min(len(tasks), _MOST_GROUPS + 1))
        }
    if not linear:
        facts["correlation_with_first_order"] = agreement(analysis)
    return write_json(path, facts)


def _write_lookaheads(path: Path, analysis: RunAnalysis) -> Path:
    gradients, ahead, linear = analysis.gradients, analysis.lookahead, analysis.first_order
    assert gradients is not None
    assert ahead is not None
    rows = (
        [
            *(int(step), task, onto, ahead.by_line_LNN[line, i, j]),
            None if linear is None else linear.by_line_LNN[line, i, j],
        ]
        for line, step in enumerate(gradients.step_L)
        for i, task in enumerate(gradients.tasks)
        for j, onto in enumerate(gradients.tasks)
        if not np.isnan(ahead.by_line_LNN[line, i, j])
    )
    return write_csv(path, ["step", "task", "onto", "affinity", "first_order"], rows)


def _named(grouping: Grouping, tasks: Sequence[str]) -> list[list[str]]:
    return [[tasks[i] for i in group] for group in grouping.groups]

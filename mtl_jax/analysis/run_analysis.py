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
    mean_cosine,
    read_gradients,
    training_affinity,
    weighted_mean,
)
from mtl_jax.analysis.ordering import average_linkage
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl

FOLDER = "analysis"
# Values per task in metrics.jsonl, written as NAME/TASK.
TRACES = ("weight", "effective_share", "gradient_norm", "epochs")
_MOST_GROUPS = 6
SCALARS = ("conflict_rate", "solver_fallback")

Series = list[tuple[int, float]]  # (step, value)


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
      affinity_NN: of row onto column.
      grouping: the best one by affinity; None with fewer than two tasks or nothing known.
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
    affinity_NN: np.ndarray | None
    grouping: Grouping | None
    representations: Mapping[str, Any] | None


def analyse(run: Path) -> RunAnalysis:
    """Reads a run's files.

    Raises:
      UserError: a file is damaged; names it and, where it has lines, the line.
    """
    metrics = read_jsonl(run / "metrics.jsonl")
    gradients = read_gradients(run / "gradients.jsonl")
    cosine, affinity_NN, grouping = None, None, None
    order: list[int] = []
    if gradients is not None:
        cosine = mean_cosine(gradients)
        order = _alike(cosine.cosine_KNN)
        affinity_NN = training_affinity(gradients, metrics)
        if len(gradients.tasks) > 1 and not np.isnan(affinity_NN).all():
            grouping = best_grouping(affinity_NN)
    return RunAnalysis(
        method=read_object(run / "method.json") or {},
        rates=_rates(run / "rates.json"),
        traces={name: found for name in TRACES if (found := _by_task(metrics, name))},
        scalars={name: series for name in SCALARS if (series := _series(metrics, name))},
        gradients=gradients,
        cosine=cosine,
        order=order,
        affinity_NN=affinity_NN,
        grouping=grouping,
        representations=read_object(run / FOLDER / "representations.json"),
    )


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

    weight.csv and so on: a line per step, a column per task. cosine.csv: a line per step, group
    and pair that was seen. cosine.json: means over training and the order of the tasks.
    affinity.json: the matrix and the proposed groups.

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
    written.append(_write_affinity(folder / "affinity.json", analysis, gradients))
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


def _write_affinity(path: Path, analysis: RunAnalysis, gradients: Gradients) -> Path:
    affinity_NN, grouping = analysis.affinity_NN, analysis.grouping
    facts: dict[str, Any] = {
        "meaning": "row onto column: share of the column's loss that a plain gradient step on "
        "the row's loss takes away, to first order, averaged over training",
        "tasks": gradients.tasks,
        "affinity": affinity_NN,
        "lines": len(gradients.step_L),
    }
    if grouping is not None and affinity_NN is not None:
        # Under this name a run can take the groups for sharing parameters.
        facts["groups"] = _named(grouping, gradients.tasks)
        facts |= {"score": grouping.score, "exact": grouping.exact}
        # For a wanted number of groups, such as of models that shall be served.
        facts["groups_by_count"] = {
            count: _named(propose_groups(affinity_NN, count), gradients.tasks)
            for count in range(2, min(len(gradients.tasks), _MOST_GROUPS + 1))
        }
    return write_json(path, facts)


def _named(grouping: Grouping, tasks: Sequence[str]) -> list[list[str]]:
    return [[tasks[i] for i in group] for group in grouping.groups]

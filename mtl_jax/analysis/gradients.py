"""Gramians and cosines of the tasks' gradients over training, from a run's gradients.jsonl.

A line of the file holds, for one log step: `step`; `tasks` and `groups`, names; `steps`, how many
steps are averaged; `gram` and `cosine`, [K][N][N], means over the steps where both tasks were
present, null where never; `noise`, [K][N], the cosine of a task's gradients on two halves of its
examples, null where unknown; `loss`, [N], means of the tasks' losses, which older files lack. With
`Balance.affinity_every`, in lines of steps that looked ahead: `affinity`, [N][N], row onto column,
and `lookaheads`, how many steps it averages.

Letters: L lines, K groups of parameters, N tasks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.analysis.affinity import gramian_affinity
from mtl_jax.analysis.intervals import t_critical
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl


@dataclasses.dataclass(frozen=True)
class Gradients:
    """All lines of gradients.jsonl over the tasks and groups that any of them names.

    Attributes:
      tasks: N names.
      groups: K names.
      step_L: the log steps.
      steps_L: how many steps each line averages.
      gram_LKNN: NaN where unknown, as the two below.
      cosine_LKNN: cosines.
      noise_LKN: cosines of the halves of a task's batch.
      loss_LN: mean losses of the tasks.
      lookahead_LNN: affinity of row onto column, measured by steps on single tasks.
      lookaheads_L: how many steps each line averages there; 0: none.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    step_L: np.ndarray
    steps_L: np.ndarray
    gram_LKNN: np.ndarray
    cosine_LKNN: np.ndarray
    noise_LKN: np.ndarray
    loss_LN: np.ndarray
    lookahead_LNN: np.ndarray
    lookaheads_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class MeanCosine:
    """Cosines averaged over training.

    Attributes:
      cosine_KNN: NaN where unknown.
      noise_KN: mean cosine of the halves of a task's own batch, NaN where unknown.
      told_KNN: bool; False where a cosine cannot be told from 0: its 95 % t-interval over the log
        lines holds 0, or two halves of one of the tasks do not agree with each other (cosine of
        the halves not above 0), so that its gradient is noise.
    """

    cosine_KNN: np.ndarray
    noise_KN: np.ndarray
    told_KNN: np.ndarray


def read_gradients(path: Path) -> Gradients | None:
    """Reads gradients.jsonl.

    Returns:
      Its lines, or None if there is no such file or it is empty.

    Raises:
      UserError: a line is damaged; names the file and the line.
    """
    rows = read_jsonl(path)
    if not rows:
        return None
    for number, row in enumerate(rows, start=1):
        _check(row, f"{path}, line {number}")
    tasks = tuple(dict.fromkeys(name for row in rows for name in row["tasks"]))
    groups = tuple(dict.fromkeys(name for row in rows for name in row["groups"]))
    shape = (len(rows), len(groups), len(tasks), len(tasks))
    gram, cosine = np.full(shape, np.nan), np.full(shape, np.nan)
    noise = np.full(shape[:3], np.nan)
    loss = np.full((len(rows), len(tasks)), np.nan)
    ahead = np.full((len(rows), len(tasks), len(tasks)), np.nan)
    for i, row in enumerate(rows):
        # The tasks or groups of a continued run may be others.
        task_ids = [tasks.index(name) for name in row["tasks"]]
        group_ids = [groups.index(name) for name in row["groups"]]
        block = np.ix_([i], group_ids, task_ids, task_ids)
        gram[block], cosine[block] = _numbers(row["gram"]), _numbers(row["cosine"])
        noise[np.ix_([i], group_ids, task_ids)] = _numbers(row["noise"])
        if "loss" in row:
            loss[i, task_ids] = _numbers(row["loss"])
        if "affinity" in row:
            ahead[np.ix_([i], task_ids, task_ids)] = _numbers(row["affinity"])
    step = np.array([row["step"] for row in rows])
    steps = np.array([row["steps"] for row in rows], float)
    aheads = np.array([row.get("lookaheads", 0) for row in rows], float)
    return Gradients(tasks, groups, step, steps, gram, cosine, noise, loss, ahead, aheads)


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)  # null becomes NaN


def _check(row: Mapping[str, Any], place: str) -> None:
    for name, kind in (("step", int), ("steps", int), ("tasks", list), ("groups", list)):
        if not isinstance(row.get(name), kind):
            raise UserError(f"{place}: {name!r} must be of type {kind.__name__}.")
    for name in ("tasks", "groups"):
        names = row[name]
        if not all(isinstance(item, str) for item in names) or len(set(names)) < len(names):
            raise UserError(f"{place}: {name!r} must be different names.")
    tasks, groups = len(row["tasks"]), len(row["groups"])
    square = (groups, tasks, tasks)
    shapes = {"gram": square, "cosine": square, "noise": square[:2]}
    shapes |= {"loss": (tasks,)} if "loss" in row else {}
    if "affinity" in row:
        shapes["affinity"] = (tasks, tasks)
        if not isinstance(row.get("lookaheads"), int):
            raise UserError(f"{place}: 'lookaheads' must be of type int.")
    for name, shape in shapes.items():
        try:
            found = _numbers(row.get(name)).shape
        except (TypeError, ValueError):
            found = ()
        if found != shape:
            raise UserError(f"{place}: {name!r} must be numbers or null of the shape {shape}.")


def mean_cosine(gradients: Gradients) -> MeanCosine:
    """Cosines averaged over the lines, each by its steps, with what can be told from noise."""
    weight_L = gradients.steps_L
    cosine_KNN = weighted_mean(gradients.cosine_LKNN, weight_L)
    noise_KN = weighted_mean(gradients.noise_LKN, weight_L)
    told = np.abs(cosine_KNN) > _half_width(gradients.cosine_LKNN)
    silent_KN = noise_KN <= 0  # False where unknown
    told &= ~(silent_KN[:, :, None] | silent_KN[:, None, :])
    return MeanCosine(cosine_KNN, noise_KN, told)


def stages(gradients: Gradients, count: int = 3) -> list[tuple[int, int, np.ndarray]]:
    """Cosines over training: (first step, last step, cosines [N, N]) of equal parts of the lines.

    A cosine is the mean over the groups of parameters that know it. Empty with fewer than two
    lines for each part.
    """
    if len(gradients.step_L) < 2 * count:
        return []
    found = []
    for part in np.array_split(np.arange(len(gradients.step_L)), count):
        cosine_KNN = weighted_mean(gradients.cosine_LKNN[part], gradients.steps_L[part])
        cosine_NN = weighted_mean(cosine_KNN, np.ones(len(cosine_KNN)))
        steps = gradients.step_L[part]
        found.append((int(steps[0]), int(steps[-1]), cosine_NN))
    return found


def weighted_mean(values: np.ndarray, weight_L: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    weight = known * weight_L.reshape((-1,) + (1,) * (values.ndim - 1))
    total = weight.sum(axis=0)
    summed = (np.where(known, values, 0.0) * weight).sum(axis=0)
    return np.where(total > 0, summed / np.maximum(total, 1e-300), np.nan)


def _half_width(values_LKNN: np.ndarray) -> np.ndarray:
    """Half the t-interval of the mean over lines; 0 with fewer than three lines, NaN with none."""
    known = ~np.isnan(values_LKNN)
    count = known.sum(axis=0)
    mean = np.where(known, values_LKNN, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = (np.where(known, values_LKNN - mean, 0.0) ** 2).sum(axis=0)
    error = np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    critical = {int(n): t_critical(int(n) - 1) for n in np.unique(count) if n >= 3}
    factor = np.vectorize(lambda n: critical.get(int(n), 0.0), otypes=[float])(count)
    return np.where(count > 0, factor * error, np.nan)


def first_order(gradients: Gradients, metrics: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """First-order affinity of the whole model at each line, [L, N, N]; NaN where unknown.

    The groups' Gramians add up to the model's. The rate, and in older files the losses, are those
    that metrics.jsonl has for the same step. The rate is the optimizer's, whose steps are no plain
    gradient steps: pairs can be compared, the scale is nominal.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for row in metrics:
        by_step.setdefault(row["step"], {}).update(row)
    lines = []
    for i, step in enumerate(gradients.step_L):
        row = by_step.get(int(step), {})
        logged = _numbers([row.get(f"loss/{task}") for task in gradients.tasks])
        losses = np.where(np.isnan(gradients.loss_LN[i]), logged, gradients.loss_LN[i])
        rate = row.get("learning_rate")
        gram_NN = gradients.gram_LKNN[i].sum(axis=0)  # NaN unless every group knows the pair
        lines.append(gramian_affinity(gram_NN, losses, np.nan if rate is None else rate))
    return np.stack(lines)

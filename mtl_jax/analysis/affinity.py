"""How much a step on one task helps another, and which tasks to train together.

The affinity of task i onto task j is the share by which a step on i lowers the loss of j,
`Z_ij = 1 - l_j(theta - eta g_i) / l_j(theta)` (Fifty et al. 2021, "Efficiently Identifying Task
Groupings for Multi-Task Learning", TAG); to first order in the rate it is `eta G_ij / l_j` with
the Gramian `G_ij = <g_i, g_j>`. It speaks of one small step, so it is not yet transfer.

Letter: N tasks; rows help, columns are helped.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mtl_jax.errors import UserError

# Up to here every partition is looked at: 3 ** 12 / 2 subsets of subsets.
EXHAUSTIVE_TASKS = 12


def lookahead_affinity(losses_N: np.ndarray, losses_after_NN: np.ndarray) -> np.ndarray:
    """TAG's affinity [N, N] from measured losses.

    Args:
      losses_N: before the step.
      losses_after_NN: row i: the losses of all tasks after a step on task i alone.

    Raises:
      UserError: shapes that do not fit, or a loss before the step that is not positive.
    """
    before, after = np.asarray(losses_N, float), np.asarray(losses_after_NN, float)
    if before.ndim != 1 or after.shape != (before.size, before.size):
        raise UserError(f"Affinity of {before.size} tasks needs losses [N, N], got {after.shape}.")
    if not (before > 0).all():
        raise UserError(f"Affinity divides by the losses, which must be positive: {before}.")
    return 1.0 - after / before[None, :]


def measure_affinity(
    losses: Callable[[np.ndarray], np.ndarray],
    gradient: Callable[[np.ndarray, int], np.ndarray],
    params: np.ndarray,
    learning_rate: float,
) -> np.ndarray:
    """TAG's affinity [N, N] by taking a step on each task and looking at all losses.

    Args:
      losses: from parameters to losses [N].
      gradient: from parameters and the number of a task to that task's gradient.
      params: where to look.
      learning_rate: of the steps of plain gradient descent.
    """
    before = np.asarray(losses(params), float)
    after = [losses(params - learning_rate * gradient(params, task)) for task in range(before.size)]
    return lookahead_affinity(before, np.stack(after))


def gramian_affinity(gram_NN: np.ndarray, losses_N: np.ndarray, rate: float) -> np.ndarray:
    """First-order affinity [N, N], `rate * G_ij / l_j`; NaN where the Gramian or the loss is."""
    losses = np.asarray(losses_N, float)
    safe = np.where(losses > 0, losses, np.nan)
    return rate * np.asarray(gram_NN, float) / safe[None, :]


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Tasks by number in groups.

    Attributes:
      groups: task numbers, each group sorted, groups by their first task.
      score: what was maximised, the sum of the groups' scores.
      exact: whether no other partition has a higher score.
    """

    groups: tuple[tuple[int, ...], ...]
    score: float
    exact: bool


Score = Callable[[Sequence[int]], float]  # of a group


def propose_groups(affinity_NN: np.ndarray, count: int) -> Grouping:
    """The partition into `count` groups whose tasks get most help within their group.

    TAG's objective: the sum over tasks of the mean affinity from the other tasks of the group; a
    task alone gets 0, for nobody helps or harms it. Exact up to 12 tasks (dynamic programming over
    subsets); beyond that, groups are joined greedily and single tasks moved while that helps.

    Args:
      affinity_NN: affinity of row onto column; an unknown pair (NaN) counts as 0.
      count: of groups, none of them empty.

    Raises:
      UserError: not between 1 and N groups.
    """
    affinity = _known(affinity_NN)
    if not 1 <= count <= len(affinity):
        raise UserError(f"{len(affinity)} tasks make 1 to {len(affinity)} groups, not {count}.")

    def score(group: Sequence[int]) -> float:
        return _within(affinity, group) / max(len(group) - 1, 1)

    return _partition(score, len(affinity), range(count, count + 1))


def best_grouping(affinity_NN: np.ndarray) -> Grouping:
    """The partition with the largest sum of affinities within groups, over all numbers of groups.

    Correlation clustering (Bansal et al. 2004): tasks that help each other belong together, tasks
    that harm each other apart. The mean of `propose_groups` cannot choose the number, for the best
    pairs always have a larger mean than a large group. Exact up to 12 tasks, greedy beyond; among
    equals the fewest groups.

    Args:
      affinity_NN: affinity of row onto column; an unknown pair (NaN) counts as 0.
    """
    affinity = _known(affinity_NN)

    def score(group: Sequence[int]) -> float:
        return _within(affinity, group)

    return _partition(score, len(affinity), range(1, len(affinity) + 1))


def _known(affinity_NN: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(affinity_NN, float), nan=0.0)


def _within(affinity: np.ndarray, group: Sequence[int]) -> float:
    """Sum of the affinities between different tasks of a group."""
    inside = affinity[np.ix_(group, group)]
    return float(inside.sum() - np.trace(inside))


def _partition(score: Score, tasks: int, counts: range) -> Grouping:
    exact = tasks <= EXHAUSTIVE_TASKS
    groups = _exhaustive(score, tasks, counts) if exact else _greedy(score, tasks, counts)
    ordered = tuple(sorted(tuple(sorted(group)) for group in groups))
    return Grouping(ordered, sum(map(score, ordered)), exact)


def _exhaustive(score: Score, tasks: int, counts: range) -> list[list[int]]:
    masks = np.arange(1 << tasks)
    scores = np.array([score(_members(int(mask))) for mask in masks])
    most = counts[-1]
    # best[k][mask]: of `mask` in k groups. The group of the lowest task is chosen first, so that
    # every partition is met once.
    best = np.full((most + 1, 1 << tasks), -np.inf)
    best[0, 0] = 0.0
    chosen = np.zeros((most + 1, 1 << tasks), int)
    for mask in range(1, 1 << tasks):
        lowest = mask & -mask
        subsets = masks[: mask + 1]
        subsets = subsets[(subsets & mask == subsets) & (subsets & lowest > 0)]
        totals = best[:most, mask ^ subsets] + scores[subsets]
        picks = totals.argmax(axis=1)
        best[1:, mask] = totals[np.arange(most), picks]
        chosen[1:, mask] = subsets[picks]
    whole = (1 << tasks) - 1
    highest = best[list(counts), whole].max()
    tolerance = 1e-12 * max(1.0, abs(highest))
    count = next(k for k in counts if best[k, whole] >= highest - tolerance)
    groups, mask = [], whole
    for left in range(count, 0, -1):
        groups.append(_members(int(chosen[left, mask])))
        mask ^= int(chosen[left, mask])
    return groups


def _members(mask: int) -> list[int]:
    return [task for task in range(mask.bit_length()) if mask >> task & 1]


def _greedy(score: Score, tasks: int, counts: range) -> list[list[int]]:
    """Joins the two groups that gain most, while there are too many or it gains."""
    groups = {task: [task] for task in range(tasks)}
    scores = {task: score([task]) for task in groups}
    gains: dict[tuple[int, int], float] = {}

    def add_gains(new: int) -> None:
        for other in groups:
            if other != new:
                joined = score(groups[other] + groups[new])
                gains[min(other, new), max(other, new)] = joined - scores[other] - scores[new]

    for task in groups:
        add_gains(task)
    while len(groups) > counts[0]:
        a, b = max(gains, key=lambda pair: gains[pair])
        if len(groups) <= counts[-1] and gains[a, b] <= 0:
            break
        scores[a] += scores.pop(b) + gains[a, b]
        groups[a] = groups[a] + groups.pop(b)
        gains = {pair: gain for pair, gain in gains.items() if not {a, b} & set(pair)}
        add_gains(a)
    found = list(groups.values())
    while move := _best_move(score, found):
        task, source, target = move
        found[source].remove(task)
        found[target].append(task)
    return found


def _best_move(score: Score, groups: list[list[int]]) -> tuple[int, int, int] | None:
    """The move of one task between groups that helps most, or None if none helps."""
    best, found = 1e-12, None
    scores = [score(group) for group in groups]
    for source, group in enumerate(groups):
        for task in group if len(group) > 1 else ():
            lost = scores[source] - score([other for other in group if other != task])
            for target, other in enumerate(groups):
                if target != source:
                    won = score([*other, task]) - scores[target]
                    if won - lost > best:
                        best, found = won - lost, (task, source, target)
    return found

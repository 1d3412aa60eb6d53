"""Checkpoints against each other, on the same examples under the same prompts."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mtl_jax.sweep_report import bootstrap
from mtl_jax.sweep_report.gather import Checkpoint
from mtl_jax.sweep_report.lines import (
    Ends,
    Line,
    View,
    all_indices,
    in_view,
    scores_matrix,
    views,
)

# With more checkpoints, each is compared with the first alone: pairs grow with the square.
_ALL_PAIRS = 5


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better `second` is than `first` on one dataset, or on the average of all.

    Attributes:
      first, second: the checkpoints.
      shots, protocol: as in a `View`.
      dataset: empty: the average over datasets.
      metric: what is compared; empty for the average.
      prompts: that both were asked with.
      n: examples that both answered.
      mean: second less first.
      interval: bootstrap over examples.
      p: two-sided, by sign flips.
      adjusted: p after Holm, over the datasets of one pair, number of shots and protocol; None for
        the average, which is one test.
    """

    first: Checkpoint
    second: Checkpoint
    shots: int
    protocol: str
    dataset: str
    metric: str
    prompts: int
    n: int
    mean: float
    interval: Ends
    p: float
    adjusted: float | None = None


@dataclasses.dataclass(frozen=True)
class _Tested:
    difference: Difference
    replicates_B: np.ndarray
    flipped_F: np.ndarray


def pairs(checkpoints: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Checkpoint]]:
    """Which checkpoints are compared, each pair with the earlier first."""
    if len(checkpoints) > _ALL_PAIRS:
        return [(checkpoints[0], other) for other in checkpoints[1:]]
    return list(itertools.combinations(checkpoints, 2))


def compare_checkpoints(
    found: Sequence[Line], checkpoints: Sequence[Checkpoint], seed: int = 0
) -> list[Difference]:
    """All comparisons of metrics that are means of examples' scores, the average of each first."""
    tested = _each_dataset(found, checkpoints, seed)
    made: list[Difference] = []
    settings = dict.fromkeys((view.shots, view.protocol) for view in views(found))
    for shots, protocol in settings:
        for first, second in pairs(checkpoints):
            members = [
                tested[key]
                for line in in_view(found, View(second, shots, protocol))
                if (key := (first, second, shots, line.view.protocol, line.dataset, line.split))
                in tested
            ]
            made += _family(members, protocol)
    return made


def _family(members: Sequence[_Tested], protocol: str) -> Iterator[Difference]:
    """The tests of one table: the average, and every dataset after Holm's correction."""
    if not members:
        return
    if len(members) > 1:
        mean = float(np.mean([one.difference.mean for one in members]))
        replicates_B = np.mean([one.replicates_B for one in members], axis=0)
        flipped_F = np.mean([one.flipped_F for one in members], axis=0)
        yield dataclasses.replace(
            members[0].difference,
            protocol=protocol,
            dataset="",
            metric="",
            prompts=sum(one.difference.prompts for one in members),
            n=sum(one.difference.n for one in members),
            mean=mean,
            interval=bootstrap.interval(replicates_B),
            p=bootstrap.p_value(mean, flipped_F),
        )
    adjusted = bootstrap.holm([one.difference.p for one in members])
    for one, p in zip(members, adjusted, strict=True):
        yield dataclasses.replace(one.difference, protocol=protocol, adjusted=p)


def _each_dataset(
    found: Sequence[Line], checkpoints: Sequence[Checkpoint], seed: int
) -> dict[tuple[Checkpoint, Checkpoint, int, str, str, str], _Tested]:
    """One test for each pair, shots, protocol, dataset and split."""
    places: dict[tuple[str, str], dict[View, Line]] = {}
    for line in found:
        if line.main and line.replicates is not None:
            places.setdefault((line.dataset, line.split), {})[line.view] = line
    tested = {}
    for (dataset, split), by_view in places.items():
        indices_N = all_indices(result for line in by_view.values() for result in line.results)
        jobs = [
            (first, second, line, matrix)
            for line in by_view.values()
            for first, second in pairs(checkpoints)
            if second == line.view.checkpoint
            and (before := by_view.get(dataclasses.replace(line.view, checkpoint=first)))
            and (matrix := _difference(before, line, indices_N)) is not None
        ]
        if not jobs:
            continue
        matrices = [matrix for *_, matrix in jobs]
        name = f"{dataset}/{split}"
        means_KB = bootstrap.mean_replicates(matrices, bootstrap.generator(seed, name))
        added_KN = np.stack([bootstrap.contributions(matrix) for matrix in matrices])
        flipped_FK = bootstrap.flipped(added_KN, bootstrap.generator(seed + 1, name))
        for k, (first, second, line, matrix) in enumerate(jobs):
            mean = float(added_KN[k].sum())
            difference = Difference(
                first,
                second,
                line.view.shots,
                line.view.protocol,
                dataset,
                line.metric,
                prompts=len(matrix),
                n=int(np.isfinite(matrix).any(axis=0).sum()),
                mean=mean,
                interval=bootstrap.interval(means_KB[k]),
                p=bootstrap.p_value(mean, flipped_FK[:, k]),
            )
            key = (first, second, line.view.shots, line.view.protocol, dataset, split)
            tested[key] = _Tested(difference, means_KB[k], flipped_FK[:, k])
    return tested


def _difference(first: Line, second: Line, indices_N: np.ndarray) -> np.ndarray | None:
    """Second less first, [P, N], for the prompts of both; None: they share no prompt or example."""
    before = {result.task: result for result in first.results}
    both = [result for result in second.results if result.task in before]
    if not both:
        return None
    protocol = first.view.protocol
    earlier_PN = scores_matrix([before[result.task] for result in both], protocol, indices_N)
    later_PN = scores_matrix(both, protocol, indices_N)
    if earlier_PN is None or later_PN is None:
        return None
    difference_PN = later_PN - earlier_PN
    known_P = np.isfinite(difference_PN).any(axis=1)
    return difference_PN[known_P] if known_P.any() else None

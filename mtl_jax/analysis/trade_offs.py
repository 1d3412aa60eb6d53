"""Two measures of several methods, and the front of those whose weights are set before training."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtl_jax.analysis import pareto
from mtl_jax.analysis.intervals import Interval


@dataclasses.dataclass(frozen=True)
class Point:
    """A method in a trade-off plot; `where` is its place to the front of the static methods."""

    label: str
    static: bool
    x: Interval
    y: Interval
    where: str
    volume_gain: float


@dataclasses.dataclass(frozen=True)
class TradeOff:
    """Two measures of all methods, with the front of the static ones.

    Attributes:
      x_axis: the measure to the right, `y_axis` the one upwards.
      y_axis: such as a task with its metric.
      lower: for each axis whether lower is better.
      points: all methods.
      front: labels of the static methods that no other static one dominates, by x.
      volume: hypervolume of that front above `reference`.
      reference: a tenth of each measure's range below the worst point.
    """

    x_axis: str
    y_axis: str
    lower: tuple[bool, bool]
    points: tuple[Point, ...]
    front: tuple[str, ...]
    volume: float
    reference: tuple[float, float]


def trade_off(
    axes: tuple[str, str],
    lower: tuple[bool, bool],
    names: Sequence[str],
    static: Sequence[bool],
    values: Sequence[tuple[Interval, Interval]],
) -> TradeOff:
    """Places methods on two measures.

    Args:
      axes: names of the measures, to the right and upwards.
      lower: for each whether lower is better.
      names: of the methods.
      static: for each whether its weights are known before the run.
      values: both measures of each method.
    """
    sign = np.where(lower, -1.0, 1.0)
    points = np.array([[x.mean, y.mean] for x, y in values]) * sign
    low, high = points.min(axis=0), points.max(axis=0)
    reference = low - 0.1 * np.where(high > low, high - low, 1.0)
    is_static = np.array(static, bool)
    fixed = points[is_static]
    volume = pareto.hypervolume(fixed, reference)
    placed = []
    for i, (x, y) in enumerate(values):
        others = points[is_static & (np.arange(len(points)) != i)]
        where = pareto.position(points[i], others) if len(others) else pareto.OVER
        joined = pareto.hypervolume(np.concatenate([fixed, points[i : i + 1]]), reference)
        placed.append(Point(names[i], bool(static[i]), x, y, where, joined - volume))
    order = np.argsort(points[:, 0])
    on_front = [i for i in order if is_static[i] and pareto.front(fixed)[is_static[:i].sum()]]
    return TradeOff(
        x_axis=axes[0],
        y_axis=axes[1],
        lower=lower,
        points=tuple(placed),
        front=tuple(names[i] for i in on_front),
        volume=volume,
        reference=(float(reference[0] * sign[0]), float(reference[1] * sign[1])),
    )


COLUMNS = (
    *("x_axis", "y_axis", "method", "static", "x", "x_low", "x_high", "y", "y_low", "y_high"),
    *("position", "on_front", "volume_gain"),
)


def rows(found: Sequence[TradeOff]) -> list[list[object]]:
    """All points of all plots as lines of a table with `COLUMNS`; a missing interval is None."""
    return [
        [
            *(plot.x_axis, plot.y_axis, point.label, int(point.static)),
            *(point.x.mean, point.x.low, point.x.high),
            *(point.y.mean, point.y.low, point.y.high),
            *(point.where, int(point.label in plot.front), point.volume_gain),
        ]
        for plot in found
        for point in plot.points
    ]

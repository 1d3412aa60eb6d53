"""Trade-offs between tasks: the Pareto front of runs and the volume it dominates.

Points are [P, M]: P runs, M measures, larger is better; negate a measure where lower is better.
"""

from collections.abc import Sequence

import numpy as np

from mtl_jax.errors import UserError

OVER, ON, BELOW = "over", "on", "below"


def dominates(a_M: np.ndarray, b_M: np.ndarray) -> bool:
    """Whether `a` is at least as good as `b` in every measure and better in one."""
    return bool(np.all(a_M >= b_M) and np.any(a_M > b_M))


def front(points_PM: np.ndarray) -> np.ndarray:
    """Returns bool [P]: which points no other point dominates; equal points are all on the front.

    Raises:
      UserError: the points are no table of finite numbers.
    """
    points_PM = _checked(points_PM)
    return np.array([not any(dominates(b, a) for b in points_PM) for a in points_PM], bool)


def hypervolume(points_PM: np.ndarray, reference_M: Sequence[float]) -> float:
    """Volume that the points dominate above a reference (Zitzler and Thiele 1999), exactly.

    Slices along the last measure, and so on down to two measures, where it is a staircase. The
    work grows as P ** (M - 1): meant for some tens of points and a handful of measures.

    Args:
      points_PM: points; what is not above the reference in every measure adds nothing.
      reference_M: the corner that the volume is measured from.

    Raises:
      UserError: the reference has not one number for each measure.
    """
    points_PM = _checked(points_PM)
    reference = np.asarray(reference_M, np.float64)
    if reference.shape != points_PM.shape[1:]:
        raise UserError(
            f"The hypervolume's reference has {reference.size} numbers but the points have "
            f"{points_PM.shape[1]} measures."
        )
    shifted = points_PM - reference
    return _volume(shifted[np.all(shifted > 0, axis=1)])


def _volume(points_PM: np.ndarray) -> float:
    if not len(points_PM):
        return 0.0
    if points_PM.shape[1] == 1:
        return float(points_PM.max())
    points_PM = points_PM[front(points_PM)]
    order = np.argsort(-points_PM[:, -1])
    heights = np.append(points_PM[order, -1], 0.0)
    volume = 0.0
    # Between two heights the slice is dominated by the points that reach the upper one.
    for i in range(len(order)):
        if thickness := heights[i] - heights[i + 1]:
            volume += thickness * _volume(points_PM[order[: i + 1], :-1])
    return float(volume)


def position(point_M: np.ndarray, others_PM: np.ndarray) -> str:
    """Where a point lies to the front of others.

    Returns:
      "below" where another point dominates it, "on" where another equals it, and "over" where it
      adds to the volume that the others dominate.
    """
    others_PM = _checked(others_PM)
    point = np.asarray(point_M, np.float64)
    if any(dominates(other, point) for other in others_PM):
        return BELOW
    return ON if any(np.array_equal(other, point) for other in others_PM) else OVER


def _checked(points_PM: np.ndarray) -> np.ndarray:
    points = np.asarray(points_PM, np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise UserError(f"Pareto points must be finite numbers [runs, measures], not {points!r}.")
    return points

"""Means over seeds with their t-intervals, and differences of runs that share their seeds.

Student's t distribution of whole degrees of freedom has closed forms (Abramowitz and Stegun,
Handbook of Mathematical Functions, 26.7.3 and 26.7.4), so no library is needed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.errors import UserError

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over `n` values and the ends of its interval, None where one value has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        """Returns the interval as plain values."""
        return dataclasses.asdict(self)

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length, None where there is none."""
        return None if self.high is None else self.high - self.mean


def _two_sided(angle: float, degrees: int) -> float:
    """P(|t| <= sqrt(degrees) tan(angle)) of Student's t with whole degrees of freedom."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    first = 2 if degrees % 2 else 1
    term = cosine if degrees % 2 else 1.0
    total = term
    for k in range(first, degrees - 2, 2):
        term *= k / (k + 1) * cosine**2
        total += term
    if degrees % 2:
        return 2 / math.pi * (angle + sine * total)
    return sine * total


def t_critical(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Returns t such that a share `confidence` of Student's distribution lies within [-t, t].

    Raises:
      UserError: less than one degree of freedom, or a confidence outside of (0, 1).
    """
    if degrees < 1:
        raise UserError(f"A t-interval needs at least 1 degree of freedom, got {degrees}.")
    if not 0 < confidence < 1:
        raise UserError(f"A confidence lies between 0 and 1, got {confidence}.")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and t-interval of values that are independent draws, such as results over seeds.

    Args:
      values: at least one number.
      confidence: share of such intervals that hold the true mean.

    Raises:
      UserError: no value, or one that is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise UserError(f"A mean over seeds needs finite values, got {list(values)}.")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, None, None, 1)
    error = float(array.std(ddof=1)) / math.sqrt(array.size)
    half = t_critical(array.size - 1, confidence) * error
    return Interval(mean, mean - half, mean + half, int(array.size))


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """Mean and t-interval of `first - second`, pair by pair (the same seed on both sides).

    Raises:
      UserError: the sides are not of one length.
    """
    if len(first) != len(second):
        raise UserError(f"Paired differences need pairs, got {len(first)} and {len(second)}.")
    return mean_interval(np.asarray(first, float) - np.asarray(second, float), confidence)

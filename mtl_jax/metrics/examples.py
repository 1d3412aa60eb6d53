"""What metrics have in common: right answers, groups, and means over examples."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

Target = Any  # one answer, or a list of answers any of which is right
Score = Callable[[Any, Any], float]  # of (reference, prediction), 0 to 1
_Fn = TypeVar("_Fn", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A target or prediction of an example that is measured together with others.

    Attributes:
      value: the answer, or the list of right ones.
      group: equal for the examples that belong together.
    """

    value: Any
    group: Hashable


def values(items: Sequence[Any]) -> list[Any]:
    """The items, out of their groups."""
    return [item.value if isinstance(item, Grouped) else item for item in items]


def references(target: Target) -> list[Any]:
    """The right answers of an example."""
    return list(target) if isinstance(target, list | tuple) else [target]


def mean_of_best(score: Score, targets: Sequence[Target], predictions: Sequence[Any]) -> float:
    """100 times the mean over examples of the best score over references."""
    best = [
        max(score(reference, prediction) for reference in references(target))
        for target, prediction in zip(values(targets), values(predictions), strict=True)
    ]
    return 100.0 * float(np.mean(best))


def mean_over_examples(fn: _Fn) -> _Fn:
    """Marks a metric whose values are means over examples; see `per_example`."""
    fn.__dict__["per_example"] = True
    return fn


def per_example(fn: Callable[..., Any]) -> bool:
    """Whether a metric is a mean over examples.

    Then `fn([target], [prediction])` is the score of one example, and the mean of these scores is
    the metric. It is not so for metrics of a whole corpus (BLEU, F1, correlations) or of groups,
    nor is it known of functions that are not from here.
    """
    return bool(getattr(fn, "per_example", False))

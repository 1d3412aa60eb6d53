"""Metrics over groups of examples: MultiRC and ReCoRD of SuperGLUE (Wang et al. 2019).

Targets and predictions are `Grouped`; the postprocessor `grouped` makes them. If an evaluation is
limited to a part of the examples, so are the groups, and the values are not comparable.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.metrics.answers import squad
from mtl_jax.metrics.examples import Grouped, values
from mtl_jax.metrics.labels import binary_f1


def _check(metric: str, targets: Sequence[Grouped]) -> None:
    for target in targets:
        if not isinstance(target, Grouped):
            raise UserError(
                f"The metric {metric} needs to know which examples belong together, got the "
                f"target {target!r}: give the task postprocess_fn=metrics.grouped(FIELD, ...)."
            )


def multirc(targets: Sequence[Grouped], predictions: Sequence[Grouped]) -> dict[str, float]:
    """MultiRC: `f1a`, binary F1 over all answers, and `em`, share of questions all right.

    Khashabi et al. 2018. An example is one answer to a question, 1 if it is correct; the group is
    the question.

    Raises:
      UserError: a target has no group, or its value is neither 0 nor 1.
    """
    _check("multirc", targets)
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for target, prediction in zip(targets, predictions, strict=True):
        right[target.group] &= target.value == prediction.value
    return {
        "f1a": binary_f1("multirc", targets, predictions),
        "em": 100.0 * float(np.mean(list(right.values()))),
    }


def record(targets: Sequence[Grouped], predictions: Sequence[Grouped]) -> dict[str, float]:
    """ReCoRD: SQuAD's `em` and `f1`, the best over all right entities, once for each query.

    Zhang et al. 2018. An example's value is the list of right entities; the group is the passage
    with its query. Rows may repeat a query (for training, once per right entity): the first counts.

    Raises:
      UserError: a target has no group.
    """
    _check("record", targets)
    first: dict[Hashable, int] = {}
    for i, target in enumerate(targets):
        first.setdefault(target.group, i)
    chosen = list(first.values())
    return squad(values([targets[i] for i in chosen]), values([predictions[i] for i in chosen]))

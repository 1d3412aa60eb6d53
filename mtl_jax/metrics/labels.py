"""Metrics of labels and numbers over a whole corpus, for classification and regression.

A label is anything that can be compared, such as the text of a class or what `choice_index` makes
of it. A prediction that is no label of the targets is wrong, whatever it is.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.metrics.examples import values

_NOT_A_NUMBER = -1.0  # T5's value of a text that is no number
_INVALID = -1


def _numbered(
    metric: str, targets: Sequence[Any], predictions: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels as numbers from 0 on, in order of appearance; -1: a prediction that is no label."""
    labels = values(targets)
    if not all(isinstance(label, Hashable) for label in labels):
        raise UserError(
            f"The metric {metric} needs one label for each target, got "
            f"{next(x for x in labels if not isinstance(x, Hashable))!r}."
        )
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    predicted = [numbers.get(prediction, _INVALID) for prediction in values(predictions)]
    return np.array([numbers[label] for label in labels]), np.array(predicted)


def binary_f1(name: str, targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    """F1 of label 1, in per cent; see `f1`."""
    from sklearn.metrics import f1_score

    labels = values(targets)
    wrong = [label for label in labels if label not in (0, 1)]
    if wrong:
        raise UserError(
            f"The metric {name} needs targets 0 and 1, got {wrong[0]!r}: give the task "
            "postprocess_fn=metrics.choice_index, which numbers the answer choices."
        )
    true = np.array([int(label) for label in labels])
    # A prediction that is no label counts as the opposite of the target.
    predicted = [
        int(prediction) if prediction in (0, 1) else 1 - label
        for prediction, label in zip(values(predictions), true.tolist(), strict=True)
    ]
    return 100.0 * float(f1_score(true, predicted, zero_division=0))


def f1(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """F1 of the positive class, as MRPC and QQP in GLUE (and T5's `f1_score_with_invalid`).

    Args:
      targets: 0 or 1 (or booleans).
      predictions: 0 or 1; anything else counts as the opposite of the target.

    Raises:
      UserError: a target is neither.
    """
    return {"f1": binary_f1("f1", targets, predictions)}


def macro_f1(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Unweighted mean of the F1 of each class, as CommitmentBank in SuperGLUE.

    The classes are the labels of the targets; predictions that are none of them count as missed.
    """
    from sklearn.metrics import f1_score

    true, predicted = _numbered("macro_f1", targets, predictions)
    classes = list(range(int(true.max()) + 1))
    score = f1_score(true, predicted, labels=classes, average="macro", zero_division=0)
    return {"macro_f1": 100.0 * float(score)}


def mcc(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Matthews' correlation coefficient times 100, as CoLA in GLUE; also for many classes.

    0 where it is not defined: all targets, or all predictions, have one label. Predictions that are
    no label of the targets are one class more.
    """
    from sklearn.metrics import matthews_corrcoef

    true, predicted = _numbered("mcc", targets, predictions)
    if len({*true.tolist(), *predicted.tolist()}) < 2:
        return {"mcc": 0.0}  # sklearn warns where there is one class only
    return {"mcc": 100.0 * float(matthews_corrcoef(true, predicted))}


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _NOT_A_NUMBER
    return number if math.isfinite(number) else _NOT_A_NUMBER


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1 on; equal numbers share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson_spearman(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Pearson's and Spearman's correlation times 100, as STS-B in GLUE.

    Args:
      targets: numbers, or texts of numbers.
      predictions: likewise; what is no finite number counts as -1, as in T5.

    Returns:
      `pearson_corrcoef` and `spearman_corrcoef`; 0 where one side is constant.
    """
    true = np.array([_number(value) for value in values(targets)])
    predicted = np.array([_number(value) for value in values(predictions)])
    return {
        "pearson_corrcoef": 100.0 * _correlation(true, predicted),
        "spearman_corrcoef": 100.0 * _correlation(_ranks(true), _ranks(predicted)),
    }

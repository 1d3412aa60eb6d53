"""Metrics with SeqIO's signature: `fn(targets, predictions) -> {name: value}`.

Every value is a percentage (0 to 100), as in T5. A target is one answer, or a list of answers any
of which is right (then the best counts). `rouge_score` is imported when first used.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

Target = str | Sequence[str]


def _references(target: Target) -> list[str]:
    return list(target) if isinstance(target, list | tuple) else [target]  # type: ignore[list-item]


def _mean_of_best(
    score: Callable[[str, str], float], targets: Sequence[Target], predictions: Sequence[str]
) -> float:
    """100 times the mean over examples of the best score over references."""
    best = [
        max(score(reference, prediction) for reference in _references(target))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return 100.0 * float(np.mean(best))


def accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to the target: texts, or what a postprocessor made of them."""
    return {"accuracy": _mean_of_best(lambda t, p: float(t == p), targets, predictions)}


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to the target up to white space around them."""

    def same(reference: str, prediction: str) -> float:
        return float(reference.strip() == prediction.strip())

    return {"exact_match": _mean_of_best(same, targets, predictions)}


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(reference: str, prediction: str) -> float:
    reference_tokens = normalise_answer(reference).split()
    prediction_tokens = normalise_answer(prediction).split()
    common = collections.Counter(reference_tokens) & collections.Counter(prediction_tokens)
    same = sum(common.values())
    if same == 0:  # also for two empty answers, as in SQuAD's first evaluation script and T5
        return 0.0
    precision, recall = same / len(prediction_tokens), same / len(reference_tokens)
    return 2 * precision * recall / (precision + recall)


def squad(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD 1.1: `em`, exact match of normal forms, and `f1` of their tokens (as in T5)."""

    def same(reference: str, prediction: str) -> float:
        return float(normalise_answer(reference) == normalise_answer(prediction))

    return {
        "em": _mean_of_best(same, targets, predictions),
        "f1": _mean_of_best(_token_f1, targets, predictions),
    }


def rougeL(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-L F1 of whole texts, without stemming; the best reference counts (`rouge_score`)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"])

    def score(reference: str, prediction: str) -> float:
        return scorer.score(reference, prediction)["rougeL"].fmeasure

    return {"rougeL": _mean_of_best(score, targets, predictions)}

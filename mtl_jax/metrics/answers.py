"""Metrics of short answers: right or wrong, and the overlap of words.

Targets are strings or lists of right ones, predictions strings. `accuracy` takes whatever a
postprocessor made of them.
"""

import collections
import re
import string
from collections.abc import Sequence

from mtl_jax.metrics.examples import Target, mean_of_best, mean_over_examples, values

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# TriviaQA's official script puts spaces in place of these.
_TRIVIA_QA = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`_", " "))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _normalise_sni(text: str) -> str:
    return _squeeze(text.lower().translate(_NO_PUNCTUATION))


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    return _squeeze(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)))


def _normalise_trivia_qa(text: str) -> str:
    return _squeeze(_ARTICLES.sub(" ", text.lower().translate(_TRIVIA_QA)))


def _same(reference: object, prediction: object) -> float:
    return float(reference == prediction)


def _token_f1(reference: str, prediction: str) -> float:
    """F1 of the words of normal forms."""
    reference_words, prediction_words = reference.split(), prediction.split()
    common = collections.Counter(reference_words) & collections.Counter(prediction_words)
    same = sum(common.values())
    if same == 0:  # also for two empty answers, as in SQuAD's first evaluation script and T5
        return 0.0
    precision, recall = same / len(prediction_words), same / len(reference_words)
    return 2 * precision * recall / (precision + recall)


@mean_over_examples
def accuracy(targets: Sequence[Target], predictions: Sequence[object]) -> dict[str, float]:
    """Share of predictions equal to the target: texts, or what a postprocessor made of them."""
    return {"accuracy": mean_of_best(_same, targets, predictions)}


@mean_over_examples
def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to the target up to white space around them."""

    def score(reference: str, prediction: str) -> float:
        return _same(reference.strip(), prediction.strip())

    return {"exact_match": mean_of_best(score, targets, predictions)}


@mean_over_examples
def exact_match_sni(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match as in Super-NaturalInstructions: SQuAD's normal form, but articles are kept."""

    def score(reference: str, prediction: str) -> float:
        return _same(_normalise_sni(reference), _normalise_sni(prediction))

    return {"exact_match_sni": mean_of_best(score, targets, predictions)}


@mean_over_examples
def squad(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD 1.1: `em`, exact match of normal forms, and `f1` of their words (as in T5).

    Rajpurkar et al. 2016. Two empty answers match, but their F1 is 0.
    """

    def em(reference: str, prediction: str) -> float:
        return _same(normalise_answer(reference), normalise_answer(prediction))

    def f1(reference: str, prediction: str) -> float:
        return _token_f1(normalise_answer(reference), normalise_answer(prediction))

    return {
        "em": mean_of_best(em, targets, predictions),
        "f1": mean_of_best(f1, targets, predictions),
    }


@mean_over_examples
def squad_v2(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD 2.0: as `squad`, and an empty prediction is right where no answer is.

    Rajpurkar et al. 2018, the official script without its search for a threshold. The target of a
    question that cannot be answered is `""` or an empty list; references whose normal form is empty
    do not count beside others.
    """

    def answerable(target: Target) -> list[str]:
        texts = target if isinstance(target, list | tuple) else [target]
        return [text for text in map(normalise_answer, texts) if text] or [""]

    def f1(reference: str, prediction: str) -> float:
        if not reference or not prediction:
            return _same(reference, prediction)
        return _token_f1(reference, prediction)

    normal = [answerable(target) for target in values(targets)]
    said = [normalise_answer(prediction) for prediction in values(predictions)]
    return {"em": mean_of_best(_same, normal, said), "f1": mean_of_best(f1, normal, said)}


@mean_over_examples
def trivia_qa(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """TriviaQA's `em` and `f1`: as `squad`, but punctuation becomes spaces (as in T5).

    Joshi et al. 2017.
    """

    def em(reference: str, prediction: str) -> float:
        return _same(_normalise_trivia_qa(reference), _normalise_trivia_qa(prediction))

    def f1(reference: str, prediction: str) -> float:
        return _token_f1(_normalise_trivia_qa(reference), _normalise_trivia_qa(prediction))

    return {
        "em": mean_of_best(em, targets, predictions),
        "f1": mean_of_best(f1, targets, predictions),
    }

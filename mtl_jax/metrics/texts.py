"""Metrics of generated texts: ROUGE (package rouge_score) and BLEU (package sacrebleu).

Targets are strings or lists of references, predictions strings. There are several ROUGEs, and
their numbers differ: the names here tell them apart.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.metrics.examples import (
    Target,
    mean_of_best,
    mean_over_examples,
    references,
    values,
)

_T5_TYPES = ("rouge1", "rouge2", "rougeLsum")


@functools.cache
def _scorer(types: tuple[str, ...], use_stemmer: bool) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(types), use_stemmer=use_stemmer)


def _sentences(text: str) -> str:
    """A sentence a line, as T5 prepares texts for rougeLsum."""
    return text.replace(" . ", " .\n")


@mean_over_examples
def rouge(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """T5's ROUGE: F1 of `rouge1`, `rouge2` and `rougeLsum`, without stemming (Lin 2004).

    The mean over examples, not T5's mid of a bootstrap, which is random (by a few hundredths). Of
    several references the best counts, for each type on its own.
    """
    scorer = _scorer(_T5_TYPES, use_stemmer=False)
    scores = []
    for target, prediction in zip(values(targets), values(predictions), strict=True):
        said = _sentences(prediction)
        of_references = [scorer.score(_sentences(r), said) for r in references(target)]
        scores.append([max(s[kind].fmeasure for s in of_references) for kind in _T5_TYPES])
    means = np.mean(scores, axis=0)
    return {kind: 100.0 * float(mean) for kind, mean in zip(_T5_TYPES, means, strict=True)}


def _rougeL(targets: Sequence[Target], predictions: Sequence[str], use_stemmer: bool) -> float:
    scorer = _scorer(("rougeL",), use_stemmer)

    def score(reference: str, prediction: str) -> float:
        return scorer.score(reference, prediction)["rougeL"].fmeasure

    return mean_of_best(score, targets, predictions)


@mean_over_examples
def rougeL(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-L F1 of whole texts, without stemming; the best reference counts."""
    return {"rougeL": _rougeL(targets, predictions, use_stemmer=False)}


@mean_over_examples
def rougeL_stemmed(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-L F1 with Porter's stemmer, as Super-NaturalInstructions; the best reference counts."""
    return {"rougeL_stemmed": _rougeL(targets, predictions, use_stemmer=True)}


def _corpus_bleu(targets: Sequence[Target], predictions: Sequence[str], tokenize: str) -> float:
    import sacrebleu

    of_examples = [references(target) for target in values(targets)]
    most = max(map(len, of_examples))
    # sacrebleu wants the first reference of every example, then the second, and so on.
    streams = [[texts[i] if i < len(texts) else None for texts in of_examples] for i in range(most)]
    result = sacrebleu.corpus_bleu(
        values(predictions),
        streams,  # type: ignore[arg-type]  # None: this example has no more references
        smooth_method="exp",
        force=True,  # no warning about texts that look tokenised
        lowercase=False,
        tokenize=tokenize,
        use_effective_order=False,
    )
    return float(result.score)


def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """BLEU of the corpus with T5's settings: sacrebleu's tokenizer `intl`, smoothing `exp`.

    Papineni et al. 2002; Post 2018. Examples may differ in their number of references.
    """
    return {"bleu": _corpus_bleu(targets, predictions, "intl")}


def bleu_13a(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """BLEU of the corpus as WMT and lm-evaluation-harness: sacrebleu's own tokenizer `13a`."""
    return {"bleu_13a": _corpus_bleu(targets, predictions, "13a")}

"""Metrics with SeqIO's signature: `fn(targets, predictions) -> {name: value}`.

Every value is a percentage (0 to 100), as in T5; correlations are 100 times the coefficient. What
targets and predictions are is said in each module: answers and texts are strings (or lists of right
ones), labels what `choice_index` makes of strings, groups `Grouped` values. `rouge_score`,
`sacrebleu` and `sklearn` are imported when first used.
"""

from mtl_jax.metrics.answers import (
    accuracy,
    exact_match,
    exact_match_sni,
    normalise_answer,
    squad,
    squad_v2,
    trivia_qa,
)
from mtl_jax.metrics.examples import Grouped, Target, per_example
from mtl_jax.metrics.groups import multirc, record
from mtl_jax.metrics.labels import f1, macro_f1, mcc, pearson_spearman
from mtl_jax.metrics.postprocessors import choice_index, grouped, references_in
from mtl_jax.metrics.texts import bleu, bleu_13a, rouge, rougeL, rougeL_stemmed

__all__ = [
    "Grouped",
    "Target",
    "accuracy",
    "bleu",
    "bleu_13a",
    "choice_index",
    "exact_match",
    "exact_match_sni",
    "f1",
    "grouped",
    "macro_f1",
    "mcc",
    "multirc",
    "normalise_answer",
    "pearson_spearman",
    "per_example",
    "record",
    "references_in",
    "rouge",
    "rougeL",
    "rougeL_stemmed",
    "squad",
    "squad_v2",
    "trivia_qa",
]

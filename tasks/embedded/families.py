"""All families of the embedded suite."""

from mtl_jax.tasks.embedded.comparing import NLI, PARAPHRASE
from mtl_jax.tasks.embedded.judging import SENTIMENT, TOPIC, WORD_SENSE
from mtl_jax.tasks.embedded.reading import DATA_TO_TEXT, DIALOGUE, QA, SUMMARY
from mtl_jax.tasks.embedded.symbols import ARITHMETIC, TRANSLATION

FAMILIES = (
    SENTIMENT,
    NLI,
    QA,
    SUMMARY,
    TRANSLATION,
    DIALOGUE,
    ARITHMETIC,
    TOPIC,
    DATA_TO_TEXT,
    PARAPHRASE,
    WORD_SENSE,
)

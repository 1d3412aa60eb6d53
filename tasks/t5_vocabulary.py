"""T5's vocabulary and the features of T0's protocol."""

import functools

import seqio

from mtl_jax.tasks.data_folder import data_file


@functools.cache
def _vocabulary(path: str) -> seqio.SentencePieceVocabulary:
    return seqio.SentencePieceVocabulary(path, extra_ids=100)


def t5_vocabulary() -> seqio.SentencePieceVocabulary:
    """The 32,000 pieces of T5, T5 1.1 and Flan-T5 and 100 extra ids (models have 32,128 rows).

    Raises:
        UserError: the data folder or `vocab/spiece.model` in it is missing.
    """
    return _vocabulary(str(data_file("vocab", "spiece.model")))


def t0_features() -> dict[str, seqio.Feature]:
    """`inputs` without and `targets` with the end of sequence, as T0 was trained and evaluated."""
    vocabulary = t5_vocabulary()
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }

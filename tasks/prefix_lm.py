"""Prefix language modelling of plain text as a SeqIO source.

Raffel et al. 2020, section 3.3.1: a text is divided at a random place; the encoder reads the first
part and the decoder writes the rest. Training T5 1.1 on with this objective gives the "LM-adapted"
models (Lester et al. 2021) that T0 and FLAN start from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax.errors import UserError
from mtl_jax.tasks.text_chunks import Files, TextChunksSource, add_text_task, log_likelihood


class PrefixLMSource(TextChunksSource):
    """Chunks of text divided in two; yields int32 `inputs` and `targets`, EOS included.

    A chunk of n tokens is divided after 1 to n - 1 of them, each place equally likely (T5's
    random_prefix_noise_mask). See `TextChunksSource`.
    """

    def __init__(
        self,
        split_to_files: Mapping[str, Files],
        vocabulary: seqio.Vocabulary,
        length: int,
        num_input_examples: Mapping[str, int] | None = None,
    ):
        """Checks the length; reads no file yet.

        Args:
            split_to_files: split to text files in UTF-8; `.gz` is decompressed.
            vocabulary: any.
            length: tokens of a chunk; no side is longer, EOS included.
            num_input_examples: split to number of chunks, for mixing rates by examples.

        Raises:
            UserError: a chunk of fewer than two tokens cannot be divided.
        """
        if length < 2:
            raise UserError(f"The length of a prefix LM must be at least 2 tokens, got {length}.")
        super().__init__(split_to_files, vocabulary, length, num_input_examples)
        self.inputs_length = self.targets_length = length

    def sides(
        self, tokens_N: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the beginning of a chunk and the rest."""
        place = int(generator.integers(1, len(tokens_N)))
        first, rest = (np.append(part, self.eos_id) for part in np.split(tokens_N, [place]))
        return first.astype(np.int32), rest.astype(np.int32)


def add_prefix_lm_task(
    name: str,
    split_to_files: Mapping[str, Files],
    vocabulary: seqio.Vocabulary,
    length: int = 512,
    *,
    num_input_examples: Mapping[str, int] | None = None,
    metric_fns: Sequence[Callable[..., Any]] = (log_likelihood,),
    citation: str = "",
) -> PrefixLMSource:
    """Registers a SeqIO Task of prefix language modelling; see `PrefixLMSource`.

    Train with `Data.inputs_length` and `Data.targets_length` of `length`.
    """
    source = PrefixLMSource(split_to_files, vocabulary, length, num_input_examples)
    add_text_task(name, source, "prefix lm", metric_fns, citation)
    return source

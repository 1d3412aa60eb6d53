"""T5's span corruption of plain text as a SeqIO source.

Raffel et al. 2020, section 3.1.4: spans of tokens drop out of the inputs, a sentinel in the place
of each; the targets are the same sentinels, each followed by what dropped out. The sentinels are
the extra ids of the vocabulary, from its top downwards.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax.errors import UserError
from mtl_jax.tasks.text_chunks import Files, TextChunksSource, add_text_task, log_likelihood


@dataclasses.dataclass(frozen=True)
class Noise:
    """How much drops out: `density` of the tokens, in spans of `mean_span_length` tokens."""

    density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density < 1.0:
            raise UserError(f"noise_density must be between 0 and 1, got {self.density}.")
        if self.mean_span_length < 1.0:
            raise UserError(
                f"mean_noise_span_length must be at least 1, got {self.mean_span_length}."
            )

    def counts(self, length: int) -> tuple[int, int]:
        """Returns (tokens that drop out, number of spans) of a chunk of at least two tokens."""
        tokens = min(max(round(length * self.density), 1), length - 1)
        # Every span needs a token that stays before it.
        spans = min(max(round(tokens / self.mean_span_length), 1), length - tokens)
        return tokens, spans

    def lengths(self, length: int) -> tuple[int, int]:
        """Returns the lengths of the inputs and targets of a chunk, with sentinels and EOS."""
        tokens, spans = self.counts(length)
        return length - tokens + spans + 1, tokens + spans + 1

    def chunk_length(self, inputs_length: int) -> int:
        """Returns how many raw tokens fill `inputs_length`: 568 for 512 (T5's random_spans_helper).

        Raises:
            UserError: not even two tokens fit.
        """
        if inputs_length < self.lengths(2)[0]:
            raise UserError(
                f"inputs_length = {inputs_length} is too short for span corruption: it must be at "
                f"least {self.lengths(2)[0]}."
            )
        length = 2
        while self.lengths(length + 1)[0] <= inputs_length:
            length += 1
        return length

    def mask(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """Returns bool [length], True where tokens drop out; it starts with tokens that stay.

        All ways to cut the tokens into spans are equally likely, as in T5's
        random_spans_noise_mask.
        """
        tokens, spans = self.counts(length)
        lengths_2S = np.stack(
            [_segments(length - tokens, spans, generator), _segments(tokens, spans, generator)]
        )
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths_2S.T.reshape(-1))


def _segments(items: int, segments: int, generator: np.random.Generator) -> np.ndarray:
    """Cuts `items` into so many non-empty segments, at places drawn evenly; returns lengths."""
    cuts = np.sort(generator.choice(items - 1, segments - 1, replace=False)) + 1
    return np.diff([0, *cuts, items])


def corrupt(
    tokens_N: np.ndarray, noise_N: np.ndarray, first_sentinel: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits tokens into inputs and targets.

    Args:
        tokens_N: int32.
        noise_N: bool, True where a token drops out; False at the first one.
        first_sentinel: the id that stands for the first span; the next ones count down.
        eos_id: ends both sides.

    Returns:
        (inputs, targets), int32: `a b <0> e <1> EOS` and `<0> c d <1> f EOS` for `a b c d e f`.
    """
    starts_N = noise_N & ~np.concatenate([[False], noise_N[:-1]])
    places = np.flatnonzero(starts_N)
    sentinels = first_sentinel - np.arange(len(places))
    inputs = np.where(starts_N, first_sentinel + 1 - np.cumsum(starts_N), tokens_N)
    inputs = inputs[starts_N | ~noise_N]
    before = np.cumsum(noise_N)[places] - 1  # noise tokens before each span
    targets = np.insert(tokens_N[noise_N], before, sentinels)
    return np.append(inputs, eos_id).astype(np.int32), np.append(targets, eos_id).astype(np.int32)


class SpanCorruptionSource(TextChunksSource):
    """Chunks of text with spans dropped out; yields int32 `inputs` and `targets`, EOS included.

    Chunks fill `inputs_length` exactly; the last one is shorter. See `TextChunksSource`.
    """

    def __init__(
        self,
        split_to_files: Mapping[str, Files],
        vocabulary: seqio.Vocabulary,
        inputs_length: int,
        noise_density: float = 0.15,
        mean_noise_span_length: float = 3.0,
        num_input_examples: Mapping[str, int] | None = None,
    ):
        """Checks the lengths; reads no file yet.

        Args:
            split_to_files: split to text files in UTF-8; `.gz` is decompressed.
            vocabulary: with at least as many extra ids as a chunk has spans.
            inputs_length: encoder tokens, EOS included.
            noise_density: share of the tokens that drop out.
            mean_noise_span_length: in tokens.
            num_input_examples: split to number of chunks, for mixing rates by examples. Not
                counted here, for that would read the files.

        Raises:
            UserError: a value that cannot be used, or a vocabulary with too few extra ids.
        """
        self._noise = Noise(noise_density, mean_noise_span_length)
        chunk_length = self._noise.chunk_length(inputs_length)
        super().__init__(split_to_files, vocabulary, chunk_length, num_input_examples)
        self.inputs_length, self.targets_length = self._noise.lengths(chunk_length)
        _, spans = self._noise.counts(chunk_length)
        if vocabulary.extra_ids < spans:
            raise UserError(
                f"Span corruption of {inputs_length} tokens needs {spans} sentinels, but the "
                f"vocabulary has {vocabulary.extra_ids} extra ids: make it with extra_ids={spans} "
                "or more, or shorten inputs_length."
            )
        self._first_sentinel = vocabulary.vocab_size - 1

    def sides(
        self, tokens_N: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns a chunk with spans dropped out, and the spans."""
        noise_N = self._noise.mask(len(tokens_N), generator)
        return corrupt(tokens_N, noise_N, self._first_sentinel, self.eos_id)


def add_span_corruption_task(
    name: str,
    split_to_files: Mapping[str, Files],
    vocabulary: seqio.Vocabulary,
    inputs_length: int = 512,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    *,
    num_input_examples: Mapping[str, int] | None = None,
    metric_fns: Sequence[Callable[..., Any]] = (log_likelihood,),
    citation: str = "",
) -> SpanCorruptionSource:
    """Registers a SeqIO Task of span corruption; its values are those of `SpanCorruptionSource`.

    Train with `Data.inputs_length` and `Data.targets_length` as the source has them (512 and 114
    by default), or the chunks are cut.
    """
    source = SpanCorruptionSource(
        split_to_files,
        vocabulary,
        inputs_length,
        noise_density,
        mean_noise_span_length,
        num_input_examples,
    )
    add_text_task(name, source, "span corruption", metric_fns, citation)
    return source

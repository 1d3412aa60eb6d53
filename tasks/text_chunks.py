"""Plain text as chunks of tokens: what objectives for pre-training are made of."""

import abc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax.errors import UserError, suggest
from mtl_jax.row_files import ALL, Corrupt, LeftOut, lines, tolerated
from mtl_jax.sources import Example, RowsDataSource
from mtl_jax.task_info import describe

Files = Sequence[str | os.PathLike[str]]


class TextChunksSource(RowsDataSource):
    """Chunks of text, each made into int32 `inputs` and `targets` by an objective.

    The files of a split are tokenized on first use, line by line, joined and cut into chunks of
    `chunk_length`; the last one is shorter. The tokens of a split are held in memory (4 bytes
    each). Where there are at least as many files as shards, a shard is every n-th file, joined and
    cut by themselves, and others are not read for it; else it is every n-th chunk. What is drawn
    for a chunk depends on the seed and the chunk alone, whatever the order and the number of
    processes; without a seed it is that of seed 0. The training stream gives every epoch another
    seed.

    Attributes:
        vocabulary: that the text is tokenized with.
        eos_id: ends inputs and targets.
        chunk_length: tokens of a chunk, without EOS.
    """

    def __init__(
        self,
        split_to_files: Mapping[str, Files],
        vocabulary: seqio.Vocabulary,
        chunk_length: int,
        num_input_examples: Mapping[str, int] | None,
    ):
        super().__init__(tuple(split_to_files))
        self._files = {split: tuple(files) for split, files in split_to_files.items()}
        self.vocabulary, self.eos_id = vocabulary, int(vocabulary.eos_id)
        self.chunk_length = chunk_length
        self._counts = dict(num_input_examples or {})
        # By files read together, and how many of their lines might be left out.
        self._read_chunks: dict[tuple[Any, ...], tuple[Sequence[Example], LeftOut]] = {}

    @abc.abstractmethod
    def sides(
        self, tokens_N: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Makes (inputs, targets), int32 with EOS, of a chunk of at least two tokens."""

    def __str__(self) -> str:
        return f"{type(self).__name__}({ {k: [*map(str, v)] for k, v in self._files.items()} })"

    def num_input_examples(self, split: str) -> int | None:  # type: ignore[override]
        """Returns the number of chunks if it was given, else None (SeqIO: not known)."""
        return self._counts.get(split)

    def rows(self, split: str) -> Sequence[Example]:
        """Returns the chunks, `{"tokens": int32}`, read on first use.

        Raises:
            UserError: no such split, or a file that cannot be read; no text in the split.
        """
        if split not in self._files:
            raise UserError(
                f"{self}: no split {split!r}; it has {', '.join(self._files)}."
                f"{suggest(split, self._files)}"
            )
        return self._read(split, None)[0]

    def corrupt(self, split: str, shards: Sequence[seqio.ShardInfo]) -> Mapping[str, int]:
        """Returns how many corrupt lines were left out of these shards' files, by file.

        Reads them if need be.
        """
        reads = [self._read(split, shard) for shard in shards]
        return {name: n for _, left_out in reads for name, n in left_out.counts.items()}

    def apart(self, split: str, shard_info: seqio.ShardInfo | None) -> bool:
        """Whether a shard is read without the rows of others: it is then some of the files."""
        return shard_info is not None and 1 < shard_info.num_shards <= len(self._files[split])

    def share(
        self, split: str, shard_info: seqio.ShardInfo | None
    ) -> tuple[Sequence[Example], np.ndarray]:
        """Returns chunks, and the numbers [N] of those in a shard."""
        if not self.apart(split, shard_info):
            return super().share(split, shard_info)
        chunks, _ = self._read(split, shard_info)
        return chunks, np.arange(len(chunks))

    def _read(
        self, split: str, shard_info: seqio.ShardInfo | None
    ) -> tuple[Sequence[Example], LeftOut]:
        """The chunks of all files, or of a shard's where it has files of its own."""
        files = self._files[split]
        if shard_info is not None and self.apart(split, shard_info):
            files = files[shard_info.index :: shard_info.num_shards]
        names, most = tuple(os.fspath(file) for file in files), tolerated(split)
        if (key := (split, most, names)) not in self._read_chunks:
            left_out = LeftOut(most)
            texts = itertools.chain.from_iterable(_lines(name, left_out) for name in names)
            encode = self.vocabulary.encode
            tokens_N = np.fromiter(
                itertools.chain.from_iterable(encode(text) for text in texts), np.int32
            )
            starts = range(0, len(tokens_N), self.chunk_length)
            chunks = [tokens_N[start : start + self.chunk_length] for start in starts]
            # A single token left over has nothing to keep or nothing to drop.
            found = [{"tokens": chunk} for chunk in chunks if len(chunk) > 1]
            if not found and files is self._files[split]:
                raise UserError(f"{self}: split {split!r} has no text.")
            self._read_chunks[key] = found, left_out
        return self._read_chunks[key]

    def examples(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        start: int = 0,
    ) -> Iterator[Example]:
        """Yields `{"inputs", "targets"}`, int32, from the `start`-th of the shard on."""
        seed = int(seed or 0)
        chunks, order_N = self.drawn(split, shuffle, seed, shard_info)
        # Numbers of chunks are of the own files, so these are told apart.
        own = [shard_info.index] if shard_info and self.apart(split, shard_info) else []
        for number in order_N[start:]:
            generator = np.random.default_rng([seed, *own, number])
            sides = self.sides(chunks[number]["tokens"], generator)
            yield dict(zip(("inputs", "targets"), sides, strict=True))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_by_chunks: Any,
    ) -> tf.data.Dataset:
        """Returns the examples as a dataset of int32 vectors, made while it is read."""
        # Here rather than inside TensorFlow, which would bury a mistake.
        self.share(split, shard_info)
        tokens = {side: tf.TensorSpec([None], tf.int32) for side in ("inputs", "targets")}
        return tf.data.Dataset.from_generator(
            lambda: self.examples(split, shuffle, seed, shard_info), output_signature=tokens
        )


def _lines(name: str, left_out: LeftOut) -> Iterator[str]:
    if not os.path.isfile(name):
        raise UserError(f"Text file {name} cannot be read: there is no such file.")
    for _, line in lines(name):
        if isinstance(line, Corrupt):
            left_out.add(name, ALL, UserError(line.reason))
        else:
            yield line


def log_likelihood(targets: Sequence[Any], scores: Sequence[float]) -> dict[str, float]:
    """SeqIO score metric: the mean over examples of the targets' summed log-likelihood."""
    del targets
    return {"log_likelihood": float(np.mean(scores))}


def add_text_task(
    name: str,
    source: TextChunksSource,
    family: str,
    metric_fns: Sequence[Callable[..., Any]],
    citation: str,
) -> None:
    """Registers a SeqIO Task over chunks of text."""
    feature = seqio.Feature(source.vocabulary, add_eos=True)
    describe(name, dataset=name, family=family, citation=citation)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[],  # the source yields tokens
        output_features={"inputs": feature, "targets": feature},
        metric_fns=list(metric_fns),
        shuffle_buffer_size=None,  # the source permutes the whole split
    )

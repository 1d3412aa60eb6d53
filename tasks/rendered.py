"""A data source that writes its examples one by one, when they are read: prompts, exemplars, ...

SeqIO's own FunctionDataSource cannot be sharded: every shard would write every example.
"""

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax.caching import ROW
from mtl_jax.errors import UserError, suggest
from mtl_jax.sources import RowsDataSource

Example = dict[str, Any]
# From the number of a row and the seed of the epoch (None: the example that is evaluated, the same
# at every reading) to its example; None: this row gives none.
Write = Callable[[int, int | None], Example | None]

_DTYPES = {int: tf.int64, float: tf.float64, bool: tf.bool}
_CHUNK = 32  # examples handed to TensorFlow at once: one call into Python costs more than a row


class RenderedDataSource(RowsDataSource):
    """Examples made from rows lazily and in any number of shards.

    With `shuffle` the rows of the shard are permuted as a whole; which rows are in a shard does not
    depend on the seed. A subclass has a name for errors (`__str__`) and `open`.
    """

    rows_of_a_part = 10_000  # that one worker of SeqIO's caching job writes

    def __init__(self, splits: Sequence[str]):
        super().__init__(splits)
        self._kept: dict[str, list[int]] = {}
        self._skipped: dict[str, int] = {}

    @abc.abstractmethod
    def open(self, split: str) -> tuple[int, Write]:
        """Returns the number of rows of a split and what writes their examples.

        An example has texts, numbers, booleans, or lists of texts, and always the same fields.
        """

    def open_shard(self, split: str, shard_info: seqio.ShardInfo) -> tuple[np.ndarray, Write]:
        """Returns the numbers [N] of a shard's rows, and what writes their examples."""
        count, write = self.open(split)
        return np.arange(shard_info.index, count, shard_info.num_shards), write

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows, the ones that give no example included."""
        return self.open(split)[0]

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the parts that workers of SeqIO's caching job write; each reads all rows."""
        count = -(-self.num_input_examples(split) // self.rows_of_a_part)
        return [f"{split}-{part}" for part in range(max(1, count))]

    def kept(self, split: str) -> Sequence[int] | None:
        """Returns the rows that gave an example in the last complete pass in order; None: none yet.

        The same row has the same number under every prompt, whatever rows a prompt leaves out.
        """
        return self._kept.get(split)

    def skipped(self, split: str) -> int | None:
        """Returns how many rows of a split gave no example.

        Known after one complete pass over the unsharded split, before that None.
        """
        return self._skipped.get(split)

    def check_split(self, split: str) -> None:
        """Makes sure that there is this split.

        Raises:
            UserError: there is not; names those that there are.
        """
        if split not in self.splits:
            raise UserError(
                f"{self} has no split {split!r}.{suggest(split, self.splits)} "
                f"It has: {', '.join(self.splits)}."
            )

    def rows(self, split: str) -> Sequence[Example]:
        """Returns all examples of a split, written now, without the rows that give none."""
        return list(self.examples(split, shuffle=False))

    def examples(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        start: int = 0,
    ) -> Iterator[Example]:
        """Yields the examples of a shard from the `start`-th on.

        What is drawn anew for each epoch is drawn by `seed`, and only with `shuffle`: without it
        every reading gives the examples that are evaluated.
        """
        for _, example in self._numbered(split, shuffle, seed, shard_info, start):
            yield example

    def _numbered(
        self,
        split: str,
        shuffle: bool,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        start: int = 0,
    ) -> Iterator[tuple[int, Example]]:
        """Yields the number of the row and its example."""
        self.check_split(split)
        shard = shard_info or seqio.ShardInfo(0, 1)
        order_N, write = self.open_shard(split, shard)
        if shuffle:
            order_N = np.random.default_rng(seed).permutation(order_N)
        kept: list[int] = []
        for index in order_N:
            example = write(int(index), seed if shuffle else None)
            if example is None:
                continue
            kept.append(int(index))
            if len(kept) > start:
                yield int(index), example
        if shard.num_shards == 1:
            self._skipped[split] = len(order_N) - len(kept)
            if not shuffle:
                self._kept[split] = kept

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_by_rows: Any,
    ) -> tf.data.Dataset:
        """Returns the examples as a dataset, written while it is read; with `caching.ROW`.

        Raises:
            UserError: no example of the split shows what fields there are.
        """
        seed = None if seed is None else int(seed)
        shown = itertools.chain(  # of its own shard, if that has any
            self.examples(split, shuffle=False, shard_info=shard_info),
            self.examples(split, shuffle=False),
        )
        first = next(shown, None)
        if first is None:
            raise UserError(f"{self}: split {split!r} gives no examples.")
        columns = {name: _Column(value) for name, value in (first | {ROW: 0}).items()}

        def chunks() -> Iterator[dict[str, Any]]:
            numbered = self._numbered(split, shuffle, seed, shard_info)
            examples = (example | {ROW: number} for number, example in numbered)
            while chunk := list(itertools.islice(examples, _CHUNK)):
                yield {
                    name: column.of([example[name] for example in chunk])
                    for name, column in columns.items()
                }

        specs = {name: column.spec for name, column in columns.items()}
        dataset = tf.data.Dataset.from_generator(chunks, output_signature=specs).unbatch()
        lists = [name for name, column in columns.items() if column.is_list]
        return dataset.map(lambda example: _dense(example, lists)) if lists else dataset


class _Column:
    """How the values of a field go to TensorFlow, told from one of them."""

    def __init__(self, value: Any):
        self.is_list = isinstance(value, list | tuple)
        self._dtype = _DTYPES.get(type(value), tf.string)
        self.spec: tf.TypeSpec = (
            tf.RaggedTensorSpec([None, None], self._dtype, ragged_rank=1)
            if self.is_list
            else tf.TensorSpec([None], self._dtype)
        )

    def of(self, values: list[Any]) -> Any:
        if self.is_list:
            return tf.ragged.constant(values, dtype=self._dtype, ragged_rank=1)
        return tf.constant(values, dtype=self._dtype)


def _dense(example: dict[str, Any], lists: Sequence[str]) -> dict[str, Any]:
    """Lists as tensors of rank 1, as the other sources give them."""
    for name in lists:
        if isinstance(example[name], tf.RaggedTensor):
            example[name] = example[name].to_tensor()
    return example

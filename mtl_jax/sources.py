"""SeqIO data sources for local JSONL, TSV and Parquet files.

    seqio.TaskRegistry.add("my_task", JsonlDataSource({"train": "train.jsonl.gz"}), ...)

The rows are held in memory, of a training split of many files only those of the own files (see
`FileRowsDataSource`); for data beyond that SeqIO's own TextLineDataSource or TFExampleDataSource
read in the streaming way.
"""

import abc
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax import processes
from mtl_jax.errors import UserError, suggest
from mtl_jax.row_files import (
    ALL,
    Corrupt,
    Example,
    LeftOut,
    Share,
    parsed,
    read_jsonl,
    read_parquet,
    read_tsv,
    stamp,
    tolerated,
)

# TensorFlow only reads and prepares text here: it must never reserve an accelerator's memory.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_DTYPES = {"str": tf.string, "int": tf.int64, "float": tf.float32, "bool": tf.bool}


class RowsDataSource(seqio.DataSource):
    """Rows in memory: sharded by index or by file, shuffled as a whole.

    `examples` gives the rows to Python without any TensorFlow; the training stream uses it where
    no TensorFlow preprocessor stands before the tokenizer.
    """

    # The whole split is permuted, so a shuffle buffer behind it need not be large.
    permutes_whole_split = True

    def __init__(self, splits: Sequence[str]):
        super().__init__(splits=splits, performs_internal_shuffling=True)

    @abc.abstractmethod
    def rows(self, split: str) -> Sequence[Example]:
        """Returns the examples of a split; all have the same fields."""

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Any number of shards is possible."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name: shards are cut by row number."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows of a split."""
        return len(self.rows(split))

    def kept(self, split: str) -> Sequence[int] | None:
        """Returns the rows that give an example, in order; None: all, or not known yet."""
        del split
        return None

    def skipped(self, split: str) -> int | None:
        """Returns how many rows give no example; None: not known before a whole pass."""
        del split
        return 0

    def corrupt(self, split: str, shards: Sequence[seqio.ShardInfo]) -> Mapping[str, int]:
        """Returns how many corrupt rows were left out of these shards' files, by file."""
        del split, shards
        return {}

    def apart(self, split: str, shard_info: seqio.ShardInfo | None) -> bool:
        """Whether a shard is read without the rows of others."""
        del split, shard_info
        return False

    def share(
        self, split: str, shard_info: seqio.ShardInfo | None
    ) -> tuple[Sequence[Example], np.ndarray]:
        """Returns rows, and the numbers [N] of those in a shard: row i is in shard i % n."""
        rows = self.rows(split)
        shard = shard_info or seqio.ShardInfo(0, 1)
        return rows, np.arange(shard.index, len(rows), shard.num_shards)

    def drawn(
        self, split: str, shuffle: bool, seed: int | None, shard_info: seqio.ShardInfo | None
    ) -> tuple[Sequence[Example], np.ndarray]:
        """As `share`, the numbers in the order of reading."""
        rows, order_N = self.share(split, shard_info)
        return rows, np.random.default_rng(seed).permutation(order_N) if shuffle else order_N

    def examples(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        start: int = 0,
    ) -> Iterator[Example]:
        """Yields the examples of `get_dataset`, in the same order, from the `start`-th on."""
        rows, order_N = self.drawn(split, shuffle, seed, shard_info)
        return (rows[i] for i in order_N[start:])

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_by_rows: Any,
    ) -> tf.data.Dataset:
        """Returns a dataset of dictionaries: scalars, or 1-D tensors where the field is a list."""
        rows, order_N = self.drawn(split, shuffle, seed, shard_info)
        if not rows:
            shard = f" in the files of shard {shard_info.index}" if shard_info else ""
            raise UserError(f"{self}: split {split!r} has no rows{shard}.")
        mine = [rows[i] for i in order_N]
        # Numbers may be written with and without a point, and all shards give the same type where
        # they are read together. Read apart, a shard knows its own, in whatever process it is.
        known = mine if self.apart(split, shard_info) else rows
        return tf.data.Dataset.from_tensor_slices(
            {name: _column([row[name] for row in mine], known, name) for name in rows[0]}
        )


def _column(values: Sequence[Any], known: Sequence[Example], name: str) -> Any:
    kinds = {_kind(row[name]) for row in known if row[name] != []} or {"list of str"}
    kind = max(kinds, key=lambda kind: "float" in kind)
    dtype = _DTYPES[kind.removeprefix("list of ")]
    if kind.startswith("list"):
        return tf.ragged.constant(values, dtype=dtype, ragged_rank=1)
    return tf.constant(values, dtype=dtype, shape=[len(values)])


def _kind(value: Any) -> str:
    """Names the type of a field: str, int, float, bool, 'list of str', ..., or "" for others."""
    if isinstance(value, (list, tuple)):
        kinds = {_kind(item) for item in value}
        if not kinds:
            return "list of str"
        if kinds == {"int", "float"}:
            return "list of float"
        kind = kinds.pop() if len(kinds) == 1 else ""
        return f"list of {kind}" if kind in _DTYPES else ""
    # bool is an int in Python, so it is asked for first.
    for python_type in (bool, str, int, float):
        if isinstance(value, python_type):
            return python_type.__name__
    return ""


@dataclasses.dataclass(frozen=True)
class _Read:
    """Rows of files read together.

    Attributes:
        rows: the examples.
        numbers: of each in its file.
        left_out: the corrupt ones.
    """

    rows: list[Example]
    numbers: list[int]
    left_out: LeftOut


class FileRowsDataSource(RowsDataSource):
    """What sources of files share: paths, the cache of parsed files, the check of fields.

    Where `num_input_examples` is given, a process reads its shard of a split alone: every n-th file
    if there are at least as many files as shards, as with SeqIO's own sources; else every n-th line
    of each, passing over the others unread. Where it is not, all rows are read and counted, and a
    shard is every n-th of them.
    """

    unit = "line"  # what the numbers of `read_file` count

    def __init__(
        self,
        split_to_path: Mapping[str, Paths],
        example: Callable[[Example], Example | None] | None = None,
        num_input_examples: Mapping[str, int] | None = None,
    ):
        """Names the files; they are read on first use.

        Args:
            split_to_path: split to a file or several; `.gz` is decompressed.
            example: plain Python from a row to an example (`{"inputs": ..., "targets": ...}`), or
                to None, which drops the row. None keeps every row as it is.
            num_input_examples: split to number of examples, for mixing rates; where it is not
                given, all files are read to know it.

        Raises:
            UserError: `num_input_examples` is of a split that there is not, or not positive.
        """
        super().__init__(tuple(split_to_path))
        self._paths = {
            split: (paths,) if isinstance(paths, (str, os.PathLike)) else tuple(paths)
            for split, paths in split_to_path.items()
        }
        self._example = example
        self._counts = dict(num_input_examples or {})
        for split, count in self._counts.items():
            if split not in self._paths or not isinstance(count, int) or count < 1:
                raise UserError(
                    f"{self}: num_input_examples[{split!r}] = {count!r} must be a positive whole "
                    f"number of one of the splits {', '.join(self._paths)}."
                )
        # By files read together, and how many of their rows might be left out.
        self._reads: dict[tuple[Any, ...], _Read] = {}

    def num_input_examples(self, split: str) -> int:
        """Returns the number of examples as it was given, else of the rows."""
        return self._counts[split] if split in self._counts else len(self.rows(split))

    def corrupt(self, split: str, shards: Sequence[seqio.ShardInfo]) -> Mapping[str, int]:
        """Returns how many corrupt rows were left out of these shards' files, by file.

        Reads them if need be.
        """
        return {
            path: count
            for shard in shards
            for path, count in self._read(split, shard).left_out.counts.items()
        }

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the parts that workers of SeqIO's caching job write: files, or the split."""
        return [*map(str, self._paths[split])] if split in self._counts else [split]

    def apart(self, split: str, shard_info: seqio.ShardInfo | None) -> bool:
        """Whether a shard is read without the rows of others."""
        return shard_info is not None and shard_info.num_shards > 1 and split in self._counts

    def share(
        self, split: str, shard_info: seqio.ShardInfo | None
    ) -> tuple[Sequence[Example], np.ndarray]:
        """Returns rows, and the numbers [N] of those in a shard."""
        if shard_info is None or not self.apart(split, shard_info):
            return super().share(split, shard_info)
        read = self._read(split, shard_info)
        numbers_N = np.array(read.numbers, int)
        if not self._file_by_file(split, shard_info):
            return read.rows, np.flatnonzero(numbers_N % shard_info.num_shards == shard_info.index)
        return read.rows, np.arange(len(numbers_N))

    def _file_by_file(self, split: str, shard_info: seqio.ShardInfo) -> bool:
        return shard_info.num_shards <= len(self._paths[split])

    @abc.abstractmethod
    def read_file(self, path: str, share: Share) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(line number, row)` of a share of one file."""

    def __str__(self) -> str:
        return f"{type(self).__name__}({ {k: [*map(str, v)] for k, v in self._paths.items()} })"

    def rows(self, split: str) -> Sequence[Example]:
        """Returns the examples of a split, read on first use.

        Raises:
            UserError: no such split or file, a malformed line, a row on which `example` fails, or
                rows of different fields.
        """
        return self._read(split, None).rows

    def _read(self, split: str, shard_info: seqio.ShardInfo | None) -> _Read:
        """The rows of all files, or at least those of a shard that is read apart."""
        if split not in self._paths:
            raise UserError(
                f"{self}: no split {split!r}; it has {', '.join(self._paths)}."
                f"{suggest(split, self._paths)}"
            )
        paths, share = [os.fspath(path) for path in self._paths[split]], ALL
        if shard_info is not None and self.apart(split, shard_info):
            if self._file_by_file(split, shard_info):
                paths = paths[shard_info.index :: shard_info.num_shards]
            # A process that is alone reads all shards, so it goes through the files but once.
            elif processes.several():
                share = shard_info.index, shard_info.num_shards
        key = split, *paths, share, tolerated(split)
        if key not in self._reads:
            read = _Read([], [], LeftOut(tolerated(split)))
            for path in paths:
                for number, row in self.read_file(path, share):
                    try:
                        example = self._make(row, f"{path}, {self.unit} {number}")
                        if example is not None:
                            self._check(example, read.rows, f"{path}, {self.unit} {number}")
                            read.rows.append(example)
                            read.numbers.append(number)
                    except UserError as error:
                        read.left_out.add(path, share, error)
            self._reads[key] = read
        return self._reads[key]

    def _make(self, row: Example | Corrupt, where: str) -> Example | None:
        if isinstance(row, Corrupt):
            raise UserError(row.reason)
        if self._example is None:
            return dict(row)  # parsed rows are shared between sources
        try:
            return self._example(row)
        except KeyError as error:
            raise UserError(
                f"{where}: there is no field {error}; the row has {', '.join(row)}."
                f"{suggest(str(error).strip(chr(39)), row)}"
            ) from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except Exception as error:
            raise UserError(
                f"{where}: the function `example` fails on this row: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _check(self, example: Example, earlier: list[Example], where: str) -> None:
        """Fields and their types must agree with the first example: a tensor has one type."""
        first = earlier[0] if earlier else example
        if example.keys() != first.keys():
            odd = sorted(example.keys() ^ first.keys())
            raise UserError(
                f"{where}: the fields differ from those of the first row: {', '.join(odd)}. "
                "Give every row the same fields."
            )
        for name, value in example.items():
            # Also in the first, which in other shares of the same file is another one.
            if value is None and (example is first or isinstance(first[name], str)):
                example[name] = ""
                continue
            if isinstance(value, str) and not _is_text(value):
                raise UserError(
                    f"{where}: field {name!r} holds half a character ({value!r:.60}), which cannot "
                    "be written as UTF-8."
                )
            kind, expected = _kind(value), _kind(first[name])
            if not kind:
                raise UserError(
                    f"{where}: field {name!r} holds {value!r:.60}; a field may hold text, a "
                    "number, true/false or a list of one of them. Leave others out with `example`."
                )
            empty_list = value == [] or first[name] == []
            if kind != expected and not empty_list and {kind, expected} != {"int", "float"}:
                raise UserError(
                    f"{where}: field {name!r} is {kind}, but {expected} in the first row."
                )


def _is_text(value: str) -> bool:
    """Whether it can be encoded: JSON may escape one half of a pair of surrogates."""
    if value.isascii():  # at once
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class JsonlDataSource(FileRowsDataSource):
    """One JSON object a line, plain or gzip; see `FileRowsDataSource`."""

    def read_file(self, path: str, share: Share) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(line number, row)` of one file; blank lines are passed over."""
        return parsed(path, stamp(path), read_jsonl, share)


class TsvDataSource(FileRowsDataSource):
    """Tab-separated values without quoting, plain or gzip; all fields are text.

    The first line names the columns unless `columns` does.
    """

    def __init__(
        self,
        split_to_path: Mapping[str, Paths],
        example: Callable[[Example], Example | None] | None = None,
        columns: Sequence[str] = (),
        num_input_examples: Mapping[str, int] | None = None,
    ):
        super().__init__(split_to_path, example, num_input_examples)
        self._columns = tuple(columns)

    def read_file(self, path: str, share: Share) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(line number, row)` of one file; blank lines are passed over."""
        return parsed(path, stamp(path), read_tsv, share, self._columns)


class ParquetDataSource(FileRowsDataSource):
    """Parquet files, read with pyarrow; nested columns need an `example` that makes them plain."""

    unit = "row"

    def read_file(self, path: str, share: Share) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(row number, row)` of one file, from 1 on."""
        return parsed(path, stamp(path), read_parquet, share)

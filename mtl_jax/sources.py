"""SeqIO data sources for local JSONL, TSV and Parquet files.

    seqio.TaskRegistry.add("my_task", JsonlDataSource({"train": "train.jsonl.gz"}), ...)

The rows are held in memory; for files beyond that SeqIO's own TextLineDataSource or
TFExampleDataSource read in the streaming way.
"""

import abc
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax.errors import UserError, suggest
from mtl_jax.row_files import Corrupt, Example, parsed, read_jsonl, read_parquet, read_tsv, stamp

# TensorFlow only reads and prepares text here: it must never reserve an accelerator's memory.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_log = logging.getLogger(__name__)
_DTYPES = {"str": tf.string, "int": tf.int64, "float": tf.float32, "bool": tf.bool}


class RowsDataSource(seqio.DataSource):
    """Rows in memory: sharded by index, shuffled as a whole.

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

    def order(
        self, split: str, shuffle: bool, seed: int | None, shard_info: seqio.ShardInfo | None
    ) -> np.ndarray:
        """Returns the row numbers of a shard (row i is in shard i % n) in the order of reading."""
        count = len(self.rows(split))
        shard = shard_info or seqio.ShardInfo(0, 1)
        order_N = np.arange(shard.index, count, shard.num_shards)
        return np.random.default_rng(seed).permutation(order_N) if shuffle else order_N

    def examples(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        start: int = 0,
    ) -> Iterator[Example]:
        """Yields the examples of `get_dataset`, in the same order, from the `start`-th on."""
        rows = self.rows(split)
        return (rows[i] for i in self.order(split, shuffle, seed, shard_info)[start:])

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_by_rows: Any,
    ) -> tf.data.Dataset:
        """Returns a dataset of dictionaries: scalars, or 1-D tensors where the field is a list."""
        rows = self.rows(split)
        order_N = self.order(split, shuffle, seed, shard_info)
        if not rows:
            raise UserError(f"{self}: split {split!r} has no rows.")
        return tf.data.Dataset.from_tensor_slices(
            {name: _column(rows, order_N, name) for name in rows[0]}
        )


def _column(rows: Sequence[Example], order_N: np.ndarray, name: str) -> Any:
    values = [rows[i][name] for i in order_N]
    # Of all rows, not only this shard's: numbers may be written with and without a point, and
    # every shard must give the same type.
    kinds = {_kind(row[name]) for row in rows if row[name] != []} or {"list of str"}
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


class FileRowsDataSource(RowsDataSource):
    """What sources of files share: paths, the cache of parsed files, the check of fields."""

    unit = "line"  # what the numbers of `read_file` count

    def __init__(
        self,
        split_to_path: Mapping[str, Paths],
        example: Callable[[Example], Example | None] | None = None,
    ):
        """Names the files; they are read on first use.

        Args:
            split_to_path: split to a file or several; `.gz` is decompressed.
            example: plain Python from a row to an example (`{"inputs": ..., "targets": ...}`), or
                to None, which drops the row. None keeps every row as it is.
        """
        super().__init__(tuple(split_to_path))
        self._paths = {
            split: (paths,) if isinstance(paths, (str, os.PathLike)) else tuple(paths)
            for split, paths in split_to_path.items()
        }
        self._example = example
        self._rows: dict[str, list[Example]] = {}
        self._corrupt: dict[str, int] = {}  # rows left out, by split
        self._tolerated: tuple[str, int] = ("", 0)

    def tolerate(self, split: str, rows: int) -> None:
        """Lets so many corrupt rows of a split be left out, each with a warning; of others none."""
        if (split, rows) != self._tolerated:
            self._tolerated = split, rows
            self._rows.clear()
            self._corrupt.clear()

    def corrupt(self, split: str) -> int:
        """Returns how many corrupt rows of a split were left out; reads it if need be."""
        self.rows(split)
        return self._corrupt[split]

    @abc.abstractmethod
    def read_file(self, path: str) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(line number, row)` of one file."""

    def __str__(self) -> str:
        return f"{type(self).__name__}({ {k: [*map(str, v)] for k, v in self._paths.items()} })"

    def rows(self, split: str) -> Sequence[Example]:
        """Returns the examples of a split, read on first use.

        Raises:
            UserError: no such split or file, a malformed line, a row on which `example` fails, or
                rows of different fields.
        """
        if split not in self._paths:
            raise UserError(
                f"{self}: no split {split!r}; it has {', '.join(self._paths)}."
                f"{suggest(split, self._paths)}"
            )
        if split not in self._rows:
            found: list[Example] = []
            wrong: list[UserError] = []
            for path in [os.fspath(path) for path in self._paths[split]]:
                for number, row in self.read_file(path):
                    try:
                        example = self._make(row, f"{path}, {self.unit} {number}")
                        if example is not None:
                            self._check(example, found, f"{path}, {self.unit} {number}")
                            found.append(example)
                    except UserError as error:
                        wrong.append(error)
                        self._leave_out(split, wrong)
            self._rows[split], self._corrupt[split] = found, len(wrong)
        return self._rows[split]

    def _leave_out(self, split: str, wrong: Sequence[UserError]) -> None:
        """Warns of the newest corrupt row, or raises it where no more may be left out."""
        tolerated_split, most = self._tolerated
        if tolerated_split != split or not most:
            raise wrong[-1]
        if len(wrong) > most:
            raise UserError(
                f"{wrong[-1]} {most} rows before it are corrupt, too, and were left out: as many "
                "as Data.max_corrupt allows. Mend the file, or allow more."
            ) from wrong[-1]
        _log.warning("left out corrupt row %d (at most %d): %s", len(wrong), most, wrong[-1])

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
            if value is None and isinstance(first[name], str):
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

    def read_file(self, path: str) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(line number, row)` of one file; blank lines are passed over."""
        return parsed(path, stamp(path), read_jsonl)


class TsvDataSource(FileRowsDataSource):
    """Tab-separated values without quoting, plain or gzip; all fields are text.

    The first line names the columns unless `columns` does.
    """

    def __init__(
        self,
        split_to_path: Mapping[str, Paths],
        example: Callable[[Example], Example | None] | None = None,
        columns: Sequence[str] = (),
    ):
        super().__init__(split_to_path, example)
        self._columns = tuple(columns)

    def read_file(self, path: str) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(line number, row)` of one file; blank lines are passed over."""
        return parsed(path, stamp(path), read_tsv, self._columns)


class ParquetDataSource(FileRowsDataSource):
    """Parquet files, read with pyarrow; nested columns need an `example` that makes them plain."""

    unit = "row"

    def read_file(self, path: str) -> Sequence[tuple[int, Example | Corrupt]]:
        """Returns `(row number, row)` of one file, from 1 on."""
        return parsed(path, stamp(path), read_parquet)

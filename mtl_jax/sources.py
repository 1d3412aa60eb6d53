"""SeqIO data sources for local JSONL, TSV and Parquet files.

    seqio.TaskRegistry.add("my_task", JsonlDataSource({"train": "train.jsonl.gz"}), ...)

The rows are held in memory; for files beyond that SeqIO's own TextLineDataSource or
TFExampleDataSource read in the streaming way.
"""

import abc
import functools
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax.errors import UserError, suggest

# TensorFlow only reads and prepares text here: it must never reserve an accelerator's memory.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

Example = dict[str, Any]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

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

    @abc.abstractmethod
    def read_file(self, path: str) -> Sequence[tuple[int, Example]]:
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
            for path in [os.fspath(path) for path in self._paths[split]]:
                for number, row in self.read_file(path):
                    example = self._make(row, f"{path}, {self.unit} {number}")
                    if example is not None:
                        self._check(example, found, f"{path}, {self.unit} {number}")
                        found.append(example)
            self._rows[split] = found
        return self._rows[split]

    def _make(self, row: Example, where: str) -> Example | None:
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


class JsonlDataSource(FileRowsDataSource):
    """One JSON object a line, plain or gzip; see `FileRowsDataSource`."""

    def read_file(self, path: str) -> Sequence[tuple[int, Example]]:
        """Returns `(line number, row)` of one file; blank lines are passed over."""
        return _parsed(path, _stamp(path), _read_jsonl)


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

    def read_file(self, path: str) -> Sequence[tuple[int, Example]]:
        """Returns `(line number, row)` of one file; blank lines are passed over."""
        return _parsed(path, _stamp(path), _read_tsv, self._columns)


class ParquetDataSource(FileRowsDataSource):
    """Parquet files, read with pyarrow; nested columns need an `example` that makes them plain."""

    unit = "row"

    def read_file(self, path: str) -> Sequence[tuple[int, Example]]:
        """Returns `(row number, row)` of one file, from 1 on."""
        return _parsed(path, _stamp(path), _read_parquet)


def read_rows(path: str | os.PathLike[str]) -> Sequence[tuple[str, Example]]:
    """Reads a file by its ending; returns `("line 7" or "row 7", row)`, each a new dictionary.

    The endings are those of `ROW_FILES`. The fields of a TSV file are texts, its first line names
    them; JSONL and Parquet may hold anything.

    Raises:
        UserError: another ending, no such file, or one that cannot be read.
    """
    name = os.fspath(path)
    for ending, read in ROW_FILES.items():
        if name.endswith(ending):
            unit = "row" if read is _read_parquet else "line"
            parsed = _parsed(name, _stamp(name), read)
            return [(f"{unit} {number}", dict(row)) for number, row in parsed]
    raise UserError(f"Data file {name}: its name must end with {', '.join(ROW_FILES)}.")


def count_rows(path: str | os.PathLike[str]) -> int:
    """Returns how many rows `read_rows` gives, without parsing them.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    name = os.fspath(path)
    return _counted(name, _stamp(name))


@functools.lru_cache(maxsize=1024)
def _counted(path: str, stamp: tuple[int, int]) -> int:
    del stamp
    if path.endswith(".parquet"):
        return _open_parquet(path).metadata.num_rows
    if path.endswith((".tsv", ".tsv.gz")):
        return max(sum(bool(line) for _, line in _lines(path)) - 1, 0)  # one names the columns
    return sum(bool(line.strip()) for _, line in _lines(path))


def _stamp(path: str) -> tuple[int, int]:
    """Identifies a version of a file.

    Raises:
        UserError: there is no such file.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        folder = pathlib.Path(path).parent
        near = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        hint = suggest(pathlib.Path(path).name, near) or ("" if near else " The folder is missing.")
        raise UserError(f"Data file {path}: {error.strerror}.{hint}") from error
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _parsed(
    path: str,
    stamp: tuple[int, int],
    read: Callable[..., list[tuple[int, Example]]],
    *options: Any,
) -> Sequence[tuple[int, Example]]:
    """Parses a file once for the several tasks (prompts) that read it one after the other."""
    del stamp  # part of the key of the cache: a changed file is read again
    return read(path, *options)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yields `(number, line)` of a text file, plain or gzip, without line ends."""
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"Data file {path} cannot be read: {error}.") from error


def _read_jsonl(path: str) -> list[tuple[int, Example]]:
    rows = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}). "
                "Every line must be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON object is needed, not {line.strip()[:40]}."
            )
        rows.append((number, row))
    return rows


def _read_tsv(path: str, columns: Sequence[str] = ()) -> list[tuple[int, Example]]:
    rows = []
    for number, line in _lines(path):
        if not line:
            continue
        values = line.split("\t")
        if not columns:
            columns = values
            continue
        if len(values) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(values)} columns instead of {len(columns)} "
                f"({', '.join(columns)})."
            )
        rows.append((number, dict(zip(columns, values, strict=True))))
    return rows


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"Data file {path} cannot be read: {error}.") from error


def _read_parquet(path: str) -> list[tuple[int, Example]]:
    import pyarrow

    with _open_parquet(path) as file:
        try:
            return list(enumerate(file.read().to_pylist(), 1))
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"Data file {path} cannot be read: {error}.") from error


# What `read_rows` reads, by the ending of the file's name.
ROW_FILES: Mapping[str, Callable[..., list[tuple[int, Example]]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".tsv": _read_tsv,
    ".tsv.gz": _read_tsv,
    ".parquet": _read_parquet,
}

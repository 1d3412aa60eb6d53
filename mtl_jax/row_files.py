"""Files of rows: JSONL, TSV and Parquet to dictionaries; a line that cannot be read is named."""

import functools
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_jax.errors import UserError, suggest

Example = dict[str, Any]


@dataclass(frozen=True)
class Corrupt:
    """In the place of a row: what is wrong with its line, file and number included."""

    reason: str


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
            unit = "row" if read is read_parquet else "line"
            rows = []
            for number, row in parsed(name, stamp(name), read):
                if isinstance(row, Corrupt):
                    raise UserError(row.reason)
                rows.append((f"{unit} {number}", dict(row)))
            return rows
    raise UserError(f"Data file {name}: its name must end with {', '.join(ROW_FILES)}.")


def count_rows(path: str | os.PathLike[str]) -> int:
    """Returns how many rows `read_rows` gives, without parsing them.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    name = os.fspath(path)
    return _counted(name, stamp(name))


@functools.lru_cache(maxsize=1024)
def _counted(path: str, stamp: tuple[int, int]) -> int:
    del stamp
    if path.endswith(".parquet"):
        return _open_parquet(path).metadata.num_rows
    if path.endswith((".tsv", ".tsv.gz")):
        return max(sum(bool(line) for _, line in _lines(path)) - 1, 0)  # one names the columns
    return sum(isinstance(line, Corrupt) or bool(line.strip()) for _, line in _lines(path))


def stamp(path: str) -> tuple[int, int]:
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
def parsed(
    path: str,
    stamp: tuple[int, int],
    read: Callable[..., list[tuple[int, Example | Corrupt]]],
    *options: Any,
) -> Sequence[tuple[int, Example | Corrupt]]:
    """Parses a file once for the several tasks (prompts) that read it one after the other."""
    del stamp  # part of the key of the cache: a changed file is read again
    return read(path, *options)


def _lines(path: str) -> Iterator[tuple[int, str | Corrupt]]:
    """Yields `(number, line)` of a text file, plain or gzip, without line ends."""
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield number, Corrupt(f"{path}, line {number}: not UTF-8 ({error}).")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"Data file {path} cannot be read: {error}.") from error


def read_jsonl(path: str) -> list[tuple[int, Example | Corrupt]]:
    """Returns `(line number, row)` of one JSON object a line; blank lines are passed over."""
    rows: list[tuple[int, Example | Corrupt]] = []
    for number, line in _lines(path):
        if isinstance(line, Corrupt):
            rows.append((number, line))
        elif line.strip():
            rows.append((number, _json_object(line, f"{path}, line {number}")))
    return rows


def _json_object(line: str, where: str) -> Example | Corrupt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Corrupt(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}). "
            "Every line must be one JSON object."
        )
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        return Corrupt(f"{where}: JSON that cannot be read ({error}).")
    if isinstance(row, dict):
        return row
    return Corrupt(f"{where}: a JSON object is needed, not {line.strip()[:40]}.")


def read_tsv(path: str, columns: Sequence[str] = ()) -> list[tuple[int, Example | Corrupt]]:
    """Returns `(line number, row)`; the first line names the columns where `columns` does not."""
    rows: list[tuple[int, Example | Corrupt]] = []
    for number, line in _lines(path):
        if isinstance(line, Corrupt):
            rows.append((number, line))
            continue
        if not line:
            continue
        values = line.split("\t")
        if not columns:
            columns = values
        elif len(values) == len(columns):
            rows.append((number, dict(zip(columns, values, strict=True))))
        else:
            reason = (
                f"{path}, line {number}: {len(values)} columns instead of {len(columns)} "
                f"({', '.join(columns)})."
            )
            rows.append((number, Corrupt(reason)))
    return rows


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"Data file {path} cannot be read: {error}.") from error


def read_parquet(path: str) -> list[tuple[int, Example | Corrupt]]:
    """Returns `(row number, row)` from 1 on."""
    import pyarrow

    with _open_parquet(path) as file:
        try:
            return list(enumerate(file.read().to_pylist(), 1))
        # Text that is not UTF-8 is an error of Python's.
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise UserError(f"Data file {path} cannot be read: {error}.") from error


# What `read_rows` reads, by the ending of the file's name.
ROW_FILES: Mapping[str, Callable[..., list[tuple[int, Example | Corrupt]]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".tsv": read_tsv,
    ".tsv.gz": read_tsv,
    ".parquet": read_parquet,
}

"""Files of rows: JSONL, TSV and Parquet to dictionaries; a line that cannot be read is named.

What is wrong with a row ends the reading, or leaves the row out: `tolerate` says of how many.
"""

import functools
import gzip
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_jax.errors import UserError, suggest

Example = dict[str, Any]

# Which rows are read: those of number i, from 1 on, with i % n = k, as (k, n).
Share = tuple[int, int]
ALL: Share = (0, 1)

_log = logging.getLogger(__name__)
_tolerance: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Corrupt:
    """In the place of a row.

    Attributes:
        reason: what is wrong with its line, file and number included.
        rest: whether all that follows in the file is lost with it.
    """

    reason: str
    rest: bool = False


def tolerate(split: str, rows: int) -> None:
    """Lets each reading of files leave out so many corrupt rows of a split; of others none."""
    global _tolerance
    _tolerance = split, rows


def tolerated(split: str) -> int:
    """Returns how many corrupt rows of a split a reading may leave out."""
    return _tolerance[1] if _tolerance[0] == split else 0


class LeftOut:
    """The corrupt rows of one reading, each named in a warning, up to a bound.

    Attributes:
        counts: how many there were, by file and, if that was read in part, by share.
    """

    def __init__(self, most: int):
        self.counts: dict[str, int] = {}
        self._most = most

    def add(self, path: str, share: Share, error: UserError) -> None:
        """Leaves out one more row of a file, or of the share of it that is read.

        Raises:
            UserError: the given one, where no row may be left out; that there are too many.
        """
        if not self._most:
            raise error
        before = sum(self.counts.values())
        if before == self._most:
            raise UserError(
                f"{error} {before} rows before it are corrupt, too, and were left out: as many "
                "as Data.max_corrupt allows. Mend the file, or allow more."
            ) from error
        # Processes with other lines of a file have other corrupt ones.
        name = path if share == ALL else f"{path} {share}"
        self.counts[name] = self.counts.get(name, 0) + 1
        _log.warning("left out corrupt row %d (at most %d): %s", before + 1, self._most, error)


def read_rows(path: str | os.PathLike[str]) -> Sequence[tuple[str, Example]]:
    """As `read_share` of all rows, none of them corrupt; returns `("line 7" or "row 7", row)`."""
    rows = read_share(path, ALL, LeftOut(0))
    return [(f"{unit_of(path)} {number}", row) for number, row in rows]


def unit_of(path: str | os.PathLike[str]) -> str:
    """Returns what numbers count in a file: "line" or "row"."""
    return "row" if os.fspath(path).endswith(".parquet") else "line"


def read_share(
    path: str | os.PathLike[str], share: Share, left_out: LeftOut
) -> Sequence[tuple[int, Example]]:
    """Reads a file by its ending; returns `(line or row number, row)`, each a new dictionary.

    The endings are those of `ROW_FILES`. The fields of a TSV file are texts, its first line names
    them; JSONL and Parquet may hold anything.

    Args:
        path: of the file.
        share: the rows that are read.
        left_out: takes the corrupt rows, as far as it may.

    Raises:
        UserError: another ending, no such file, or one that cannot be read.
    """
    name = os.fspath(path)
    for ending, read in ROW_FILES.items():
        if name.endswith(ending):
            rows = []
            for number, row in parsed(name, stamp(name), read, share):
                if isinstance(row, Corrupt):
                    left_out.add(name, share, UserError(row.reason))
                else:
                    rows.append((number, dict(row)))
            return rows
    raise UserError(f"Data file {name}: its name must end with {', '.join(ROW_FILES)}.")


def count_rows(path: str | os.PathLike[str], most_corrupt: int = 0) -> int:
    """Returns how many rows `read_rows` gives where all are in order, without parsing them.

    Raises:
        UserError: no such file, or, unless rows may be corrupt, one that breaks off.
    """
    name = os.fspath(path)
    return _counted(name, stamp(name), most_corrupt > 0)


@functools.lru_cache(maxsize=1024)
def _counted(path: str, stamp: tuple[int, int], may_break_off: bool) -> int:
    del stamp
    if path.endswith(".parquet"):
        return _open_parquet(path).metadata.num_rows
    table = path.endswith((".tsv", ".tsv.gz"))
    count = 0
    for _, line in lines(path):
        if isinstance(line, Corrupt):
            if line.rest and not may_break_off:
                raise UserError(line.reason)
            count += 1
        else:
            count += bool(line.rstrip("\n") if table else line.strip())
    return max(count - 1, 0) if table else count  # one names the columns


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


def lines(path: str) -> Iterator[tuple[int, str | Corrupt]]:
    """Yields `(number, line)` of a text file, plain or gzip; a line ends with LF or with nothing.

    Raises:
        UserError: the file cannot be read, for another reason than its own damage.
    """
    number = 0
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8").replace("\r\n", "\n")
                except UnicodeDecodeError as error:
                    yield number, Corrupt(f"{path}, line {number}: not UTF-8 ({error}).")
    # Damage, and no failing disk or network: that is for whoever starts the run again.
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"Data file {path} cannot be read from line {number + 1} on: {error}."
        yield number + 1, Corrupt(reason, rest=True)
    except OSError as error:
        raise UserError(f"Data file {path} cannot be read: {error}.") from error


def read_jsonl(path: str, share: Share = ALL) -> list[tuple[int, Example | Corrupt]]:
    """Returns `(line number, row)` of one JSON object a line; blank lines are passed over."""
    rows: list[tuple[int, Example | Corrupt]] = []
    index, count = share
    for number, line in lines(path):
        if number % count != index:
            continue
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


def read_tsv(
    path: str, share: Share = ALL, columns: Sequence[str] = ()
) -> list[tuple[int, Example | Corrupt]]:
    """Returns `(line number, row)`; the first line names the columns where `columns` does not."""
    rows: list[tuple[int, Example | Corrupt]] = []
    found = lines(path)
    if not columns:
        titles = next((line for _, line in found if line != "\n"), "")
        if isinstance(titles, Corrupt):
            raise UserError(titles.reason)
        columns = titles.rstrip("\n").split("\t")
    index, count = share
    for number, line in found:
        if number % count != index:
            continue
        if isinstance(line, Corrupt):
            rows.append((number, line))
            continue
        if not (text := line.rstrip("\n")):
            continue
        values = text.split("\t")
        if len(values) == len(columns):
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


def read_parquet(path: str, share: Share = ALL) -> list[tuple[int, Example | Corrupt]]:
    """Returns `(row number, row)` from 1 on; a damaged row group is as many corrupt rows."""
    import pyarrow

    found: list[tuple[int, Example | Corrupt]] = []
    index, count = share
    before = 0
    with _open_parquet(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            own = [i for i in range(size) if (before + i + 1) % count == index]
            numbers = [before + i + 1 for i in own]
            before += size
            try:
                rows = file.read_row_group(group).take(own).to_pylist() if own else []
            # Text that is not UTF-8 is an error of Python's.
            except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
                if getattr(error, "errno", None):  # of the system, as in `lines`
                    raise UserError(f"Data file {path} cannot be read: {error}.") from error
                reason = " ".join(str(error).split()).rstrip(".")
                lost = Corrupt(f"Data file {path} cannot be read: row group {group}: {reason}.")
                rows = [lost] * len(own)
            found += zip(numbers, rows, strict=True)
    return found


# What `read_rows` reads, by the ending of the file's name.
ROW_FILES: Mapping[str, Callable[..., list[tuple[int, Example | Corrupt]]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".tsv": read_tsv,
    ".tsv.gz": read_tsv,
    ".parquet": read_parquet,
}

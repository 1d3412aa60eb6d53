"""Where the rows of a benchmark come from: local files, TFDS, or Hugging Face datasets.

An `Origin` names the fields of a row once, as Hugging Face datasets has them, so that templates of
PromptSource apply; rows from elsewhere are brought to the same fields. The first place that has the
split gives its rows:

    local        <data folder>/<name>/<split>.jsonl (.jsonl.gz, .tsv, .tsv.gz, .parquet)
    tfds         TensorFlow Datasets, as prepared on this machine or else downloaded
    huggingface  the package `datasets`, from its cache or else downloaded

The environment variable MTL_JAX_SOURCES restricts and orders them: `MTL_JAX_SOURCES=local` never
reaches for the network.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import processes
from mtl_jax.errors import UserError, suggest
from mtl_jax.row_files import (
    ALL,
    ROW_FILES,
    LeftOut,
    Share,
    count_rows,
    read_share,
    tolerated,
    unit_of,
)
from mtl_jax.tasks.benchmarks.fields import Fields, describe_fields, from_text, misfit
from mtl_jax.tasks.data_folder import data_folder

SOURCES = ("local", "tfds", "huggingface")
VARIABLE = "MTL_JAX_SOURCES"
# Splits that are offered when a local file has them, whatever the published data set has.
LOCAL_SPLITS = ("train", "validation", "test")
_PARQUET_BRANCH = "refs/convert/parquet"
_REASON_ENDS = (60, 120)  # characters of a long reason: its beginning, and its end, the cause

Row = Mapping[str, Any]
Convert = Callable[[dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A TensorFlow dataset.

    Attributes:
        name: with configuration and version, `"glue/cola:2.0.0"`.
        splits: our name of a split to TFDS's, where they differ.
        convert: to the fields of the origin, where they differ.
    """

    name: str
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    convert: Convert | None = None


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face hub, or a local folder that `datasets.load_dataset` takes.

    Attributes:
        path: `"nyu-mll/glue"`.
        config: `"cola"`; None for the only one.
        splits: our name of a split to theirs, where they differ.
        convert: to the fields of the origin, where they differ.
    """

    path: str
    config: str | None = None
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    convert: Convert | None = None


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A second place for local files, with fields of its own.

    Attributes:
        path: below the data folder, without the ending; `{split}` stands for the split. Without
            `{split}` the file is the only split.
        convert: to the fields of the origin, where they differ.
    """

    path: str
    convert: Convert | None = None


@dataclasses.dataclass(frozen=True)
class Read:
    """What was read of a split.

    Attributes:
        rows: all of them, or those of a share.
        numbers: int [N], of each row, which is in share i % n; None: shares are parts in a row.
        left_out: the corrupt rows.
    """

    rows: Sequence[Row]
    numbers: np.ndarray | None
    left_out: LeftOut


@dataclasses.dataclass(frozen=True, eq=False)  # equal by identity, so a key of caches
class Origin:
    """A published data set and the places it can be had from.

    Attributes:
        name: of the folder of local files; `glue_cola`.
        fields: field to type (see `fields`): what a row has at least.
        splits: the labelled splits and their published numbers of rows.
        labels: how many labels the field `label` counts, from 0 on; 0: there is no such field.
        shipped: other places of local files.
        tfds: None if TensorFlow Datasets has not got it.
        huggingface: None if the hub has not got it.
    """

    name: str
    fields: Fields
    splits: Mapping[str, int]
    labels: int = 0
    shipped: Shipped | None = None
    tfds: Tfds | None = None
    huggingface: HuggingFace | None = None

    def rows(self, split: str) -> Sequence[Row]:
        """Returns the rows of a split, read on first use and then kept.

        Of a local file as many corrupt rows are left out as `row_files.tolerate` allows.

        Raises:
            UserError: no place has them (says what was tried and what to put where), or a local
                file is malformed.
        """
        return self._read(split, ALL).rows

    def share(self, split: str, share: Share) -> tuple[Sequence[Row], np.ndarray]:
        """Returns rows, and the positions [N] in them of one of several shares.

        In a job of several processes the rows of others are not read: other lines of a local file
        are passed over, of TFDS only a part of the split is opened, and those of Hugging Face stay
        on disk. What is in a share is the same in any process.

        Raises:
            UserError: see `rows`.
        """
        read, (index, count) = self._read(split, share), share
        if read.numbers is not None:
            return read.rows, np.flatnonzero(read.numbers % count == index)
        parts = 1 if processes.several() else count
        return read.rows, np.array_split(np.arange(len(read.rows)), parts)[index % parts]

    def _read(self, split: str, share: Share) -> Read:
        folder, _ = _local_folder()
        # A process that is alone has all shares, so it reads the rows but once.
        share = share if processes.several() else ALL
        return _load(self, split, folder, chosen_sources(), tolerated(split), share)

    def corrupt(self, split: str, shares: Sequence[Share]) -> Mapping[str, int]:
        """Returns how many corrupt rows of these shares were left out, by file.

        Reads them if need be.
        """
        reads = [self._read(split, share) for share in shares]
        return {name: n for read in reads for name, n in read.left_out.counts.items()}

    def local_file(self, split: str) -> tuple[Path, Convert | None] | None:
        """Returns the local file of a split and how its rows are converted, or None."""
        folder, _ = _local_folder()
        if folder is None or "local" not in chosen_sources():
            return None
        return _find(self, split, folder)

    def described(self) -> str:
        """The fields in words: "sentence (text), label (whole number, 0 to 1)"."""
        text = describe_fields(self.fields)
        if not self.labels:
            return text
        return text.replace("label (whole number", f"label (whole number, 0 to {self.labels - 1}")

    def split_names(self) -> tuple[str, ...]:
        """Returns the published splits, and those that a local file has besides."""
        more = [split for split in LOCAL_SPLITS if split not in self.splits]
        return (*self.splits, *(split for split in more if self.local_file(split)))

    def count(self, split: str) -> int:
        """Returns the number of rows: of the local file if there is one, else as published."""
        found = self.local_file(split)
        return count_rows(found[0], tolerated(split)) if found else self.splits[split]


def chosen_sources() -> tuple[str, ...]:
    """The places that may give rows, in order, from MTL_JAX_SOURCES.

    Raises:
        UserError: the variable names something else.
    """
    text = os.environ.get(VARIABLE, "")
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in SOURCES:
            raise UserError(
                f"The environment variable {VARIABLE} names {name!r}; it is a list of "
                f"{', '.join(SOURCES)}, separated by commas.{suggest(name, SOURCES)}"
            )
    return names or SOURCES


def _local_folder() -> tuple[Path | None, str]:
    """The data folder, or None and why there is none."""
    try:
        return data_folder(), ""
    except UserError as error:
        return None, str(error)


def _find(origin: Origin, split: str, folder: Path) -> tuple[Path, Convert | None] | None:
    places: list[tuple[str, Convert | None]] = [(f"{origin.name}/{split}", None)]
    if origin.shipped and ("{split}" in origin.shipped.path or split in origin.splits):
        places.append((origin.shipped.path.format(split=split), origin.shipped.convert))
    for place, convert in places:
        for ending in ROW_FILES:
            path = folder / f"{place}{ending}"
            if path.is_file():
                return path, convert
    return None


@functools.cache
def _load(
    origin: Origin,
    split: str,
    folder: Path | None,
    sources: tuple[str, ...],
    most_corrupt: int,
    share: Share,
) -> Read:
    tried = []
    for source in sources:
        if source == "local":
            if folder is None:
                tried.append(f"local files: {_local_folder()[1]}")
                continue
            found = _find(origin, split, folder)
            if found:
                return _read_local(origin, *found, share, LeftOut(most_corrupt))
            tried.append(f"local files: there is no {origin.name}/{split}.* in {folder}")
            continue
        where = origin.tfds if source == "tfds" else origin.huggingface
        if where is None:
            tried.append(f"{source}: has no such data set")
            continue
        try:
            if isinstance(where, Tfds):
                rows, numbers = _read_tfds(where, split, share), None
            else:
                rows = _read_hub(origin, split)
                numbers = np.arange(len(rows))
        except Exception as error:  # these libraries fail in any way at all
            name = where.name if isinstance(where, Tfds) else where.path
            tried.append(f"{source} ({name}): {_reason(error)}")
            continue
        _check_first(origin, rows, f"{source} {origin.name} {split}", share)
        return Read(rows, numbers, LeftOut(most_corrupt))
    raise UserError(
        f"Data set {origin.name!r}: its split {split!r} cannot be had. Tried: {'; '.join(tried)}. "
        f"{how_to_supply(origin, split)}"
    )


def how_to_supply(origin: Origin, split: str) -> str:
    """Says which file gives a split, and what must be in it."""
    return (
        f"To supply it, put the file {origin.name}/{split}.jsonl (or another of "
        f"{', '.join(ROW_FILES)}) into the data folder, which MTL_JAX_DATA or Data.data_dir names; "
        f"a row has the fields {origin.described()}."
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    first, last = _REASON_ENDS
    return text if len(text) <= first + last else f"{text[:first]} ... {text[-last:]}"


def _read_local(
    origin: Origin, path: Path, convert: Convert | None, share: Share, left_out: LeftOut
) -> Read:
    rows, numbers = [], []
    for number, row in read_share(path, share, left_out):
        where = f"{path}, {unit_of(path)} {number}"
        try:
            rows.append(_made(origin, row, convert, where, ".tsv" in path.name))
            numbers.append(number)
        except UserError as error:
            left_out.add(str(path), share, error)
    if not rows and share == ALL:
        raise UserError(f"Data file {path} has no rows.")
    return Read(rows, np.array(numbers, int), left_out)


def _made(
    origin: Origin, row: dict[str, Any], convert: Convert | None, where: str, texts: bool
) -> Row:
    """The fields of the origin from a row of a local file."""
    if texts:
        row = from_text(row, origin.fields, where)
    if convert:
        try:
            row = convert(row)
        except Exception as error:
            raise UserError(
                f"{where}: cannot be brought to the fields "
                f"{origin.described()} ({type(error).__name__}: {error})."
            ) from error
    _check(origin, row, where)
    return row


def _check(origin: Origin, row: Row, where: str) -> None:
    wrong = misfit(row, origin.fields)
    if not wrong and origin.labels and not 0 <= row["label"] < origin.labels:
        wrong = f"label is {row['label']}, which is not between 0 and {origin.labels - 1}"
    if wrong:
        raise UserError(
            f"{where}: {wrong}. The data set {origin.name!r} has the fields {origin.described()}."
        )


def _check_first(origin: Origin, rows: Sequence[Row], where: str, share: Share) -> None:
    """Looks at the first row alone: these places have types, and may be far larger than memory."""
    if len(rows):
        _check(origin, rows[0], f"{where}, row 0")
    elif share == ALL:
        raise UserError(f"{where}: there are no rows.")


def plain(value: Any) -> Any:
    """What TFDS gives as NumPy, in Python's own types; bytes become text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()] if value.ndim else plain(value.item())
    return value.item() if isinstance(value, np.generic) else value


def _read_tfds(where: Tfds, split: str, share: Share) -> Sequence[Row]:
    import tensorflow_datasets as tfds

    # TFDS itself looks at the variable only once, when it is imported.
    folder = os.environ.get("TFDS_DATA_DIR")
    builder = tfds.builder(where.name, try_gcs=False, data_dir=folder)
    builder.download_and_prepare()  # nothing to do if it is prepared already
    index, count = share
    # Of files it opens those that the part is in.
    part = tfds.even_splits(where.splits.get(split, split), count)[index]
    dataset = builder.as_dataset(split=part, shuffle_files=False)
    rows = [plain(row) for row in tfds.as_numpy(dataset)]
    return [where.convert(row) for row in rows] if where.convert else rows


@functools.cache
def _read_hub(origin: Origin, split: str) -> Sequence[Row]:
    import datasets

    where = origin.huggingface
    assert where is not None  # asked for by `_load` alone
    load = functools.partial(
        datasets.load_dataset, where.path, where.config, split=where.splits.get(split, split)
    )
    try:
        rows = load()
    except RuntimeError as error:
        # Code of strangers is not run; the hub keeps most of such data sets as Parquet, too.
        if "script" not in str(error):
            raise
        rows = load(revision=_PARQUET_BRANCH)
    return Converted(rows, where.convert)


class Converted(Sequence[Row]):
    """Rows made when they are asked for: `datasets` maps its files, which may exceed the memory."""

    def __init__(self, rows: Sequence[Any], convert: Callable[[Any], Row] | None):
        self._rows, self._convert = rows, convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = dict(self._rows[int(index)])
        return self._convert(row) if self._convert else row

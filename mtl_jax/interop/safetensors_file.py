"""Safetensors files: a JSON header with the place of every tensor, then the tensors.

Read and written here and not by the library of that name, whose memory map counts every page of a
file that was ever touched as ours. Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.interop.source import written
from mtl_jax.interop.stored import DTYPES, Stored, blocks

_LONGEST_HEADER = 100_000_000  # the library's limit


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; none is read.

    Raises:
      UserError: the file is cut off or is no safetensors file, or a tensor is of a dtype other
        than float32, float16 and bfloat16.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise UserError(
                    f"{path} is a pointer of Git LFS, not the file itself: fetch it (git lfs pull)."
                )
            if len(start) < 8 or length > _LONGEST_HEADER:
                raise UserError(f"{path} is no safetensors file.")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) < length:
        raise UserError(f"{path} is cut off: its header has {length} bytes, the file {size}.")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _Entry(name, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file: its header is damaged.") from error
    return {name: entry.stored(path, 8 + length, size) for name, entry in entries.items()}


class _Entry:
    """A tensor's line of the header."""

    def __init__(self, name: str, entry: dict[str, Any]):
        self.name = name
        self.dtype = str(entry["dtype"])
        self.shape = tuple(int(size) for size in entry["shape"])
        self.begin, self.end = (int(offset) for offset in entry["data_offsets"])

    def stored(self, path: Path, data: int, size: int) -> Stored:
        if self.dtype not in DTYPES:
            raise UserError(
                f"{path}: tensor {self.name} ({written(self.shape)}) is of dtype {self.dtype}; "
                f"only {', '.join(DTYPES)} can be read."
            )
        found = Stored(path, self.name, data + self.begin, DTYPES[self.dtype], self.shape)
        if found.nbytes != self.end - self.begin or self.begin < 0:
            raise UserError(
                f"{path}: tensor {self.name} should be {written(self.shape)} {self.dtype}, "
                f"{found.nbytes} bytes, but the header gives it {self.end - self.begin}."
            )
        if data + self.end > size:
            there = max(0, size - found.offset)
            raise UserError(
                f"{path} is cut off: tensor {self.name} ({written(self.shape)}) has "
                f"{found.nbytes} bytes, of which {there} are there. Fetch or copy the file again."
            )
        return found


def write(
    path: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    dtype: str,
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a file, one tensor after the other.

    Args:
      path: the file.
      shapes: names and shapes of the tensors, in order.
      dtype: a name of `DTYPES`.
      read: gives the tensor of a name, float32.

    Raises:
      OSError: no space, or the file may not be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers demands it
    end = 0
    for name, shape in shapes:
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _ in shapes:
            for _, part in blocks(read(name)):
                stored = np.ascontiguousarray(part, DTYPES[dtype])
                file.write(stored.view(np.uint8).data)  # bfloat16 is no type to `memoryview`

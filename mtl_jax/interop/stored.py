"""Arrays that lie in a file as they are, read by their offset: nothing else of it is touched."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mtl_jax.errors import UserError

BLOCK_BYTES = 1 << 26  # what is converted, compared or written at a time

# Hugging Face's names of dtypes in safetensors; flax's are numpy's.
DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a file.

    Attributes:
      file: where.
      name: of the tensor, for messages.
      offset: in bytes.
      dtype: as stored.
      shape: its sizes, the last one contiguous.
    """

    file: Path
    name: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array as float32.

        Raises:
          UserError: the file is gone or too short.
        """
        return self._raw(0, math.prod(self.shape)).reshape(self.shape).astype("<f4", copy=False)

    def along_second_axis(self, index: int) -> np.ndarray:
        """The slice `[:, index]` as float32; pages of the rest are touched, but not copied."""
        try:
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return np.array(mapped[:, index], np.float32)

    def equals(self, other: "Stored") -> bool:
        """Whether both hold the same bits; compared block by block."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(self._blocks(), other._blocks(), strict=True)
        return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)

    def _blocks(self) -> Iterator[np.ndarray]:
        total, block = math.prod(self.shape), BLOCK_BYTES // self.dtype.itemsize
        for start in range(0, total, block):
            yield self._raw(start, min(block, total - start))

    def _raw(self, start: int, count: int) -> np.ndarray:
        try:
            offset = self.offset + start * self.dtype.itemsize
            values = np.fromfile(self.file, self.dtype, count, offset=offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if values.size != count:
            raise self._unreadable(EOFError("the file has become shorter"))
        return values

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self.file}: tensor {self.name} cannot be read: {error}.")


def read_tensorstore(array: Any) -> np.ndarray:
    """A tensorstore as float32, read block by block: read at once, all chunks are held twice."""
    x = np.empty(array.shape, np.float32)
    if x.ndim == 0:
        x[...] = array.read().result()
    else:
        for rows, part in blocks(x):
            part[...] = array[rows].read().result()
    return x


def blocks(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Parts of an array along its first axis, each at most about `BLOCK_BYTES` large."""
    rows = rows_of_block(x.shape)
    for start in range(0, x.shape[0], rows):
        part = slice(start, min(start + rows, x.shape[0]))
        yield part, x[part]


def rows_of_block(shape: tuple[int, ...]) -> int:
    """How many rows of a float32 array make up a block; at least one."""
    row_bytes = max(4 * math.prod(shape[1:]), 1)
    return max(1, min(shape[0], BLOCK_BYTES // row_bytes))

"""The places of the arrays in a msgpack file as flax writes it, found without reading them.

Sources: https://github.com/msgpack/msgpack/blob/master/spec.md and `flax.serialization`, which
packs an array as extension 1: a list of shape, name of dtype and bytes; arrays above 1 GiB come as
a map of flat pieces.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.interop.source import written
from mtl_jax.interop.stored import Stored

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _SCALAR = 1, 3  # codes of flax's extensions; 2 is a complex number
_LONGEST_TEXT = 1 << 20
# First byte -> kind, and how many bytes of length follow.
_SIZED = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_NUMBERS = {
    0xCA: ">f4",
    0xCB: ">f8",
    **{0xCC + i: f">u{1 << i}" for i in range(4)},
    **{0xD0 + i: f">i{1 << i}" for i in range(4)},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An array in several flat pieces.

    Attributes:
      parts: one after the other.
      shape: of the whole.
    """

    parts: Sequence[Stored]
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The whole array as float32."""
        whole = np.empty(math.prod(self.shape), np.float32)
        start = 0
        for part in self.parts:
            end = start + math.prod(part.shape)
            whole[start:end] = part.read().reshape(-1)
            start = end
        return whole.reshape(self.shape)

    def along_second_axis(self, index: int) -> np.ndarray:
        """The slice `[:, index]` as float32."""
        return self.read()[:, index].copy()


def starts_with_map(start: bytes) -> bool:
    """Whether the first byte of a file is that of a map with entries, as in every file of flax."""
    return bool(start) and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF))


def read_tree(path: Path) -> dict[str, Any]:
    """The tree in a file; arrays are `Stored` or `Pieces`, everything else is as it is.

    Raises:
      UserError: the file is cut off, damaged or of another kind; the tensor where it ends is named.
    """
    try:
        with path.open("rb") as file:
            tree = _Walk(path, file).value(())
            rest = file.read(1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(tree, dict) or rest:
        raise UserError(f"{path} is no checkpoint of T5X: it does not hold one tree of arrays.")
    return tree


class _Walk:
    """One pass over a file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def value(self, keys: tuple[str, ...]) -> Any:
        """The value at the current position, which is then behind it."""
        kind, content = self.head(keys)
        if kind == "value":
            return content
        if kind == "map":
            return self.mapping(keys, content)
        if kind == "list":
            return [self.value((*keys, str(number))) for number in range(content)]
        if kind == "ext":
            return self.extension(keys, content)
        if content > _LONGEST_TEXT:
            raise self.damaged(keys)
        text = self.take(keys, content)
        return text.decode(errors="replace") if kind == "str" else text

    def head(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """The kind of the next value and its size, or ("value", it)."""
        first = self.take(keys, 1)[0]
        if first <= 0x7F or first >= 0xE0:
            return "value", first if first <= 0x7F else first - 0x100
        if first <= 0x8F:
            return "map", first - 0x80
        if first <= 0x9F:
            return "list", first - 0x90
        if first <= 0xBF:
            return "str", first - 0xA0
        if first in _CONSTANTS:
            return "value", _CONSTANTS[first]
        if first in _SIZED:
            kind, width = _SIZED[first]
            return kind, int.from_bytes(self.take(keys, width), "big")
        if first in _NUMBERS:
            dtype = np.dtype(_NUMBERS[first])
            return "value", np.frombuffer(self.take(keys, dtype.itemsize), dtype)[0].item()
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        raise self.damaged(keys)

    def mapping(self, keys: tuple[str, ...], size: int) -> Any:
        """A map of texts, or the array that is packed as one."""
        found = {}
        for _ in range(size):
            key = self.value(keys)
            if not isinstance(key, str):
                raise self.damaged(keys)
            found[key] = self.value((*keys, key))
        if not found.get(_CHUNKED):
            return found
        shape, parts = found.get("shape"), found.get("chunks")
        if not isinstance(shape, dict) or not isinstance(parts, dict):
            raise self.damaged(keys)
        sizes = tuple(shape[str(axis)] for axis in range(len(shape)))
        whole = Pieces([parts[str(number)] for number in range(len(parts))], sizes)
        if sum(math.prod(part.shape) for part in whole.parts) != math.prod(whole.shape):
            raise self.damaged(keys)
        return whole

    def extension(self, keys: tuple[str, ...], size: int) -> Any:
        """An array, which is not read but passed over."""
        code = self.take(keys, 1)[0]
        if code not in (_ARRAY, _SCALAR):
            raise self.damaged(keys)
        end = self.file.tell() + size
        kind, count = self.head(keys)
        if (kind, count) != ("list", 3):
            raise self.damaged(keys)
        shape, name = self.value(keys), self.value(keys)
        kind, nbytes = self.head(keys)
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        try:
            dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
            found = Stored(self.path, "/".join(keys), self.file.tell(), dtype, tuple(shape))
        except TypeError as error:
            raise self.damaged(keys) from error
        if kind != "bin" or found.nbytes != nbytes or found.offset + nbytes != end:
            raise self.damaged(keys)
        if end > self.size:
            raise self.cut_off(keys, f" ({written(found.shape)} {dtype.name})")
        self.file.seek(end)
        return found

    def take(self, keys: tuple[str, ...], count: int) -> bytes:
        """The next bytes."""
        content = self.file.read(count)
        if len(content) < count:
            raise self.cut_off(keys)
        return content

    def cut_off(self, keys: tuple[str, ...], shape: str = "") -> UserError:
        return UserError(
            f"{self.path} is cut off after {self.size} bytes, within tensor "
            f"{'/'.join(keys)}{shape}: copy it again."
        )

    def damaged(self, keys: tuple[str, ...]) -> UserError:
        return UserError(
            f"{self.path} is damaged, or no msgpack file of flax: it cannot be understood at "
            f"{'/'.join(keys) or 'its beginning'} (byte {self.file.tell()})."
        )

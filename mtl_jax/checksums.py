"""Checksums of a checkpoint's files: what a disk or a copy has damaged is found, not trained on.

Each item of a checkpoint (`state`, `data_state`, `meta`, `measured`) has its own list,
`checksums.json`, with the size and the hash of each of its files. It is written before the
checkpoint gets its final name, so that a complete checkpoint has it. Checkpoints from before there
were lists have none, and nothing can be said of them.
"""

import concurrent.futures
import errno
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.storage import replace_text, retried

NAME = "checksums.json"
_AT_ONCE = 1 << 20
_THREADS = 8  # hashing lets other threads run


def write(item: Path) -> None:
    """Lists the files of a folder, at any depth, in its `checksums.json`.

    Raises:
      OSError: a file cannot be read, or the list not written; or there are no files, as where the
        folder was moved away while it was written to.
    """
    paths = sorted(path for path in item.rglob("*") if path.is_file() and path.name != NAME)
    if not paths:
        raise FileNotFoundError(errno.ENOENT, "the files of a checkpoint have vanished", str(item))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = retried(f"read {item.name}", lambda: list(threads.map(_hash, paths)))
    files = {
        path.relative_to(item).as_posix(): [path.stat().st_size, text]
        for path, text in zip(paths, found, strict=True)
    }
    # A folder that has vanished by now must not come back with nothing but the list.
    replace_text(item / NAME, json.dumps({"blake2b": files}, indent=1) + "\n", parents=False)


def listing(handler: Any, there: Callable[[], bool]) -> Any:
    """Lets an Orbax handler `write` before its files get their final name, and returns it.

    Args:
      handler: of an item of a checkpoint.
      there: whether the folder of checkpoints is still the one that the files were written to.
    """
    # Not a subclass: Orbax knows which arguments go to which handler by its very class.
    finalize = handler.finalize

    def finalize_and_list(directory: Any) -> None:
        finalize(directory)
        if not there():  # some of the files may be where the folder is now
            raise FileNotFoundError(errno.ENOENT, "it has vanished", str(directory))
        write(Path(directory))

    handler.finalize = finalize_and_list
    return handler


def problem(items: Sequence[Path], part: int = 0, parts: int = 1) -> str:
    """Compares the files of folders with their lists; returns what differs first, or "".

    Args:
      items: folders; one without a list is passed over.
      part: of the files, sorted, those with a number n where n % parts == part are read: several
        processes can share the work. The lists themselves are looked at by each.
      parts: how many parts there are.

    Raises:
      OSError: a file is there, but cannot be read.
    """
    wanted: list[tuple[Path, int, str]] = []
    for item in items:
        if not (item / NAME).is_file():
            continue
        try:
            files = json.loads((item / NAME).read_text(encoding="utf-8"))["blake2b"]
            wanted += [(item / name, int(size), str(text)) for name, (size, text) in files.items()]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            return f"{item.name}/{NAME} is no list of checksums ({type(error).__name__}: {error})"
    for path, _, _ in wanted:
        if ".." in path.parts or not any(path.is_relative_to(item) for item in items):
            return f"{NAME} leaves its folder, to {path}"
    mine = sorted(wanted)[part::parts]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return next(filter(None, threads.map(lambda of_file: _differs(*of_file), mine)), "")


def _differs(path: Path, size: int, text: str) -> str:
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        return f"{name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{name} has {found:,} bytes instead of {size:,}"
    return "" if _hash(path) == text else f"{name} has other bytes than were written"


def _hash(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_AT_ONCE):
            found.update(piece)
    return found.hexdigest()

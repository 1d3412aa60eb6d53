"""Writing files: whole or not at all, and every refusal of the system told in one message."""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mtl_jax.errors import UserError

_NUMBER_IN_TEXT = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")
# What network storage says when it is only slow, restarted or unreachable for a moment.
_TRANSIENT = {
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT),
    *(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ENOLCK, errno.EREMOTEIO),
    *(errno.EMFILE, errno.ENFILE),  # too many open files
}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# What `flock` says where there are no locks.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
RETRY_SECONDS = (0.5, 2.0, 8.0)  # before the second, third and fourth try
_SHARED_TRIES = 10
PLACE = ".place"
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, the one that it came from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def first_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def said(error: BaseException, status: str) -> bool:
    """Whether the error or a cause of it names a status of XLA or tensorstore in its text."""
    return any(status in str(cause) for cause in causes(error))


def withheld(error: BaseException) -> bool:
    """Whether the storage refused to read, so that what lies there may be sound.

    No permission, a failing device, a network that does not answer; not: a file that is missing, or
    that is something else.
    """
    number = _number(error)
    if number is not None:
        return number not in _NOT_THERE
    kinds = PermissionError | TimeoutError | ConnectionError
    return any(isinstance(cause, kinds) for cause in causes(error)) or any(
        said(error, status) for status in ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    )


def transient(error: BaseException) -> bool:
    """Whether the storage refused for a reason that may pass by itself: no full disk, no lock."""
    return _number(error) in _TRANSIENT


def retried(action: str, act: Callable[[], _T]) -> _T:
    """Returns `act()`; tries again after `RETRY_SECONDS` where the storage fails for a moment.

    Args:
      action: what is being tried, for the warning.
      act: reads or writes; may be called several times.

    Raises:
      Exception: of the last try, or at once where waiting cannot help.
    """
    for seconds in RETRY_SECONDS:
        try:
            return act()
        except Exception as error:  # tensorstore gives the system's refusal as a ValueError
            if not transient(error):
                raise
            told = first_line(error)
            _log.warning("could not %s (%s): trying again in %g s", action, told, seconds)
        time.sleep(seconds)  # here, where the error and what its frames hold are gone
    return act()


def append_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Appends lines to a file, which is made if its folder is there; all of them or nothing.

    What is written is never doubled. A half line at the end, left by a kill, is cut off first:
    `read_jsonl` does not count it either, and the next line would join it.

    Args:
      path: the file.
      text: whole lines.
      shared: other processes append to it, too, one after the other where the storage has locks.
        Otherwise this one is alone.

    Raises:
      OSError: the file could not be written, or its folder is gone.
    """
    action, rest = f"write {path.name}", text.encode("utf-8")
    with _opened(path, shared=shared) as descriptor:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            size = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(descriptor, size)
        try:
            while rest:
                rest = rest[retried(action, functools.partial(os.write, descriptor, rest)) :]
        except OSError:
            with contextlib.suppress(OSError):  # then the next one cuts it off
                os.ftruncate(descriptor, size)
            raise


@contextlib.contextmanager
def _opened(path: Path, *, shared: bool) -> Iterator[int]:
    """A descriptor to append to a file by; `shared`: nobody else has one that is so, meanwhile."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    for turn in range(1, _SHARED_TRIES + 1):
        descriptor = retried(f"open {path.name}", lambda: os.open(path, flags, 0o666))
        try:
            locked = shared and _lock(descriptor)
            # Whoever had the lock may have put another file in its place. Not for ever, as a
            # mounted bucket may number the same file anew.
            if not locked or _is_at(descriptor, path) or turn == _SHARED_TRIES:
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Waits for the lock of a file, which closing it undoes; False: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def replace_text(target: Path, text: str, *, parents: bool = True) -> None:
    """Replaces the file `target` by `text` in one move; see `replace_bytes`."""
    replace_bytes(target, text.encode("utf-8"), parents=parents)


def replace_bytes(target: Path, content: bytes, *, parents: bool = True) -> None:
    """Replaces the file `target` by `content` in one move; a kill leaves the old or the new file.

    Args:
      target: the file.
      content: what it shall hold.
      parents: make its folder where there is none.

    Raises:
      OSError: the file could not be written, also not later (`retried`); its old content is still
        there.
    """
    retried(f"write {target.name}", lambda: _replace_bytes(target, content, parents))


def _replace_bytes(target: Path, content: bytes, parents: bool) -> None:
    if parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    # Threads, and processes of several hosts, may write the same file of a shared folder at once.
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    temporary = target.with_name(f".{target.name}.{writer}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class Place:
    """Tells a folder from another one that takes its name.

    By its number on the disk; or, as a mounted bucket may number the same folder anew, by a random
    text in a file of it.
    """

    def __init__(self, folder: Path, *, mark: bool):
        """Remembers the folder, which is there.

        Args:
          folder: which one.
          mark: write the file, if there is none.

        Raises:
          OSError: it cannot be written.
        """
        self._folder, self._number = folder, _disk_number(folder)
        self._file, self._text = folder / PLACE, ""
        if mark and not self._file.exists():
            replace_text(self._file, f"{secrets.token_hex(8)}\n", parents=False)

    def same(self) -> bool:
        """Whether the folder of that name is still the one that was remembered."""
        if _disk_number(self._folder) == self._number:
            # Here and not above: another process may write it.
            self._text = self._text or self._read()
            return True
        return bool(self._text) and self._read() == self._text

    def _read(self) -> str:
        try:
            return retried(f"read {PLACE}", lambda: self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return ""


def _disk_number(folder: Path) -> tuple[int, int] | None:
    try:
        found = retried(f"look at {folder.name}", folder.stat)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turns a refusal of the storage into one clear UserError; other errors pass unchanged.

    Args:
      action: what is being tried, such as "write metrics.jsonl".
      path: where.

    Raises:
      UserError: no space, no permission, a file in the way, a failing device.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, path)
        if reason is None:
            raise
        raise UserError(f"Could not {action} in {path}: {reason}.") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file; a half-written last line, left by a kill, is left out.

    Raises:
      UserError: another line is no JSON object; file and line number are named.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        # Every complete line ends in a line feed, so the last piece is empty or cut off.
        if number == len(lines) or not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object.")
        rows.append(row)
    return rows


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drops from a JSONL file every line of a step after `last_step`, and a half-written last line.

    A run that continues from the checkpoint of `last_step` writes those steps again.
    """
    if not path.exists():
        return
    # Nobody appends to what is about to be replaced.
    with storage_errors(f"write {path.name}", path.parent), _opened(path, shared=True):
        kept = [row for row in read_jsonl(path) if row.get("step", 0) <= last_step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        if text != path.read_text(encoding="utf-8"):
            replace_text(path, text, parents=False)


def _number(error: BaseException) -> int | None:
    """Returns the number of the operating system's refusal (`errno`), or None if there is none.

    Tensorstore gives the operating system's refusal as the text of a ValueError, so the text is
    searched too, along the chain of causes.
    """
    for cause in causes(error):
        if found := _NUMBER_IN_TEXT.search(str(cause)):
            return int(found[1] or found[2])
        if isinstance(number := getattr(cause, "errno", None), int):
            return number
    return None


def _reason(error: BaseException, path: Path) -> str | None:
    """Returns why the storage refused, or None if the error has another cause."""
    number = _number(error)
    if number == errno.ENOSPC:
        folder = next((p for p in (path, *path.parents) if p.exists()), Path.cwd())
        free = shutil.disk_usage(folder).free / 2**20
        return f"no space left on the device ({free:,.0f} MiB free)"
    if number == errno.EDQUOT:
        return "the disk quota is used up"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission there"
    if number is not None:
        return os.strerror(number)
    of_system = (cause for cause in causes(error) if isinstance(cause, OSError))
    return next((str(cause) or type(cause).__name__ for cause in of_system), None)

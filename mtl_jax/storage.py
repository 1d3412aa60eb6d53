"""Writing files: whole or not at all, and every refusal of the system told in one message."""

import contextlib
import errno
import functools
import json
import logging
import os
import re
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
}
RETRY_SECONDS = (0.5, 2.0, 8.0)  # before the second, third and fourth try of a write
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, the one that it came from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def said(error: BaseException, status: str) -> bool:
    """Whether the error or a cause of it names a status of XLA or tensorstore in its text."""
    return any(status in str(cause) for cause in causes(error))


def refused(error: BaseException) -> bool:
    """Whether there is no permission, by the error or a cause of it."""
    return any(isinstance(cause, PermissionError) for cause in causes(error)) or said(
        error, "PERMISSION_DENIED"
    )


def transient(error: BaseException) -> bool:
    """Whether the storage refused for a reason that may pass by itself: no full disk, no lock."""
    return _number(error) in _TRANSIENT


def retried(action: str, write: Callable[[], _T]) -> _T:
    """Returns `write()`; tries again after `RETRY_SECONDS` where the storage fails for a moment.

    Args:
      action: what is being tried, for the warning.
      write: may be called several times.

    Raises:
      OSError: of the last try, or at once where waiting cannot help.
    """
    for seconds in RETRY_SECONDS:
        try:
            return write()
        except OSError as error:
            if not transient(error):
                raise
            _log.warning("could not %s (%s): trying again in %g s", action, error, seconds)
            time.sleep(seconds)
    return write()


def append_text(path: Path, text: str) -> None:
    """Appends to a file, which is made if its folder is there; what is written is never doubled.

    Raises:
      OSError: the file could not be written, or its folder is gone.
    """
    action, rest = f"write {path.name}", text.encode("utf-8")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    descriptor = retried(action, lambda: os.open(path, flags, 0o666))
    try:
        while rest:
            rest = rest[retried(action, functools.partial(os.write, descriptor, rest)) :]
    finally:
        os.close(descriptor)


def replace_text(target: Path, text: str) -> None:
    """Replaces the file `target` by `text` in one move; see `replace_bytes`."""
    replace_bytes(target, text.encode("utf-8"))


def replace_bytes(target: Path, content: bytes) -> None:
    """Replaces the file `target` by `content` in one move; a kill leaves the old or the new file.

    Raises:
      OSError: the file could not be written, also not later (`retried`); its old content is still
        there.
    """
    retried(f"write {target.name}", lambda: _replace_bytes(target, content))


def _replace_bytes(target: Path, content: bytes) -> None:
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


def place_on_disk(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that takes its name; None: there is none."""
    try:
        found = folder.stat()
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
    kept = [row for row in read_jsonl(path) if row.get("step", 0) <= last_step]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    if text != path.read_text(encoding="utf-8"):
        with storage_errors(f"write {path.name}", path.parent):
            replace_text(path, text)


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
    return next((str(cause) for cause in causes(error) if isinstance(cause, OSError)), None)

"""Writing files: whole or not at all, and every refusal of the system told in one message."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError

_NUMBER_IN_TEXT = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")


def replace_text(target: Path, text: str) -> None:
    """Replaces the file `target` by `text` in one move; see `replace_bytes`."""
    replace_bytes(target, text.encode("utf-8"))


def replace_bytes(target: Path, content: bytes) -> None:
    """Replaces the file `target` by `content` in one move; a kill leaves the old or the new file.

    Raises:
      OSError: the file could not be written; its old content is still there.
    """
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


def _reason(error: BaseException, path: Path) -> str | None:
    """Returns why the storage refused, or None if the error has another cause.

    Tensorstore gives the operating system's refusal as the text of a ValueError, so the text is
    searched too, along the chain of causes.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        if found := _NUMBER_IN_TEXT.search(str(cause)):
            number = int(found[1] or found[2])
        if number == errno.ENOSPC:
            folder = next((p for p in (path, *path.parents) if p.exists()), Path.cwd())
            free = shutil.disk_usage(folder).free / 2**20
            return f"no space left on the device ({free:,.0f} MiB free)"
        if number == errno.EDQUOT:
            return "the disk quota is used up"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return "no permission there"
        if isinstance(number, int):
            return os.strerror(number)
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return None

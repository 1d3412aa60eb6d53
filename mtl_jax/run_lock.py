"""One run in a run directory: the second one refuses, and a killed one blocks nobody.

The file `lock` is locked with `flock`, which the system undoes when the process ends in whatever
way. Storage shared between machines may keep such locks to each machine, or have none, so the file
also says who holds it, and the holder touches it every few seconds: whoever finds there a name that
the lock says nothing of first watches whether it is still touched. No clocks are compared.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError
from mtl_jax.storage import NO_LOCKS, storage_errors

NAME = "lock"
BEAT_SECONDS = 5.0
WATCHED_BEATS = 4  # a holder that was slow for three of them is not taken for dead


class RunLock:
    """A context in which no other run can train in a directory."""

    def __init__(self, folder: Path, *, primary: bool = True):
        """Nothing is touched before `__enter__`.

        Args:
          folder: the run directory, which is there.
          primary: False in all but one process of a job; those do nothing.
        """
        self._path, self._primary = folder / NAME, primary
        self._descriptor = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        """Takes the lock.

        Raises:
          UserError: another run has it; names machine, process and since when.
        """
        if not self._primary:
            return self
        with storage_errors("lock the run directory", self._path.parent):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take()
            except BaseException:
                os.close(self._descriptor)
                raise
        self._thread = threading.Thread(target=self._beat, name="mtl_jax lock", daemon=True)
        self._thread.start()
        return self

    def _take(self) -> None:
        locked = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(_holder(self._path))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locked = False  # so that only the beats protect it
        holder = _holder(self._path)
        # Where there are locks, a process of this machine would hold it if it were alive.
        unclear = bool(holder) and not (locked and holder.get("host") == socket.gethostname())
        if unclear and _beats(self._path):
            self._refuse(holder)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "since": now})

    def _refuse(self, holder: dict[str, Any]) -> None:
        raise UserError(
            f"{self._path.parent} is in use: process {holder.get('pid', 'unknown')} on "
            f"{holder.get('host', 'an unknown machine')} has trained there since "
            f"{holder.get('since', 'an unknown time')}. Stop it, or choose another Run.directory."
        )

    def _write(self, holder: dict[str, Any]) -> None:
        text = json.dumps(holder) + "\n" if holder else ""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # storage that fails is told where it is written to
                os.utime(self._descriptor)

    def __exit__(self, *exception: object) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # as above; the lock is free all the same
            self._write({})
        os.close(self._descriptor)


def _holder(path: Path) -> dict[str, Any]:
    """Who holds the lock, as far as the file tells."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beats(path: Path) -> bool:
    """Watches whether the file is touched."""
    before = os.stat(path).st_mtime_ns
    for _ in range(WATCHED_BEATS):
        time.sleep(BEAT_SECONDS)
        with path.open("rb"):  # network storage looks for news where a file is opened
            if os.stat(path).st_mtime_ns != before:
                return True
    return False

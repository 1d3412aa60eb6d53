"""Who works on a cell: files that several processes, also of several hosts, agree by.

A claim is a file `claim.json` in the cell's folder, made only where there is none, and touched
again and again by whoever holds it. One whose holder has died is taken over: at once on the same
host, elsewhere when it has not been touched for a while. Should two processes ever take over the
same cell, both write the same files, whole or not at all; only time is lost.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from mtl_jax.storage import storage_errors

CLAIM = "claim.json"


class Claims:
    """The claims of this process; a thread keeps them fresh while the `with` block lasts."""

    def __init__(self, root: Path, stale_after: float):
        """Claims nothing yet.

        Args:
          root: a folder on the same storage as the claims; must be there.
          stale_after: seconds without a touch after which a claim of another process is void.
        """
        self._root, self._stale_after = root, stale_after
        self._held: set[Path] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        for folder in list(self._held):
            self.release(folder)

    def take(self, folder: Path) -> bool:
        """Claims a folder, unless another process holds it.

        Raises:
          UserError: no space or no permission.
        """
        path = folder / CLAIM
        with storage_errors("claim a cell", folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not _made(path):
                if not self._is_void(path):
                    return False
                # Whoever renames it first has it; the others find nothing to rename.
                void = path.with_name(f".{CLAIM}.{socket.gethostname()}.{os.getpid()}")
                try:
                    os.replace(path, void)
                except FileNotFoundError:
                    return False
                void.unlink(missing_ok=True)
                if not _made(path):
                    return False
        with self._lock:
            self._held.add(folder)
        return True

    def release(self, folder: Path) -> None:
        """Gives a claim back."""
        with self._lock:
            self._held.discard(folder)
        with contextlib.suppress(OSError):
            (folder / CLAIM).unlink(missing_ok=True)

    def is_held(self, folder: Path) -> bool:
        """Whether a process holds a claim to the folder and is alive."""
        path = folder / CLAIM
        return path.exists() and not self._is_void(path)

    def _is_void(self, path: Path) -> bool:
        try:
            touched, text = path.stat().st_mtime, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return True
        try:
            holder = json.loads(text)
        except ValueError:  # it is just being written
            holder = {}
        if holder.get("host") == _host() and not _alive(int(holder["pid"])):
            return True
        return self._now() - touched > self._stale_after

    def _now(self) -> float:
        """The time by the clock of the storage, which may be another host's."""
        probe = self._root / f".clock.{socket.gethostname()}.{os.getpid()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _keep_fresh(self) -> None:
        while not self._end.wait(self._stale_after / 8):
            with self._lock:
                held = list(self._held)
            for folder in held:
                with contextlib.suppress(OSError):
                    os.utime(folder / CLAIM)


def _made(path: Path) -> bool:
    """Makes a claim; False: there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    holder: dict[str, Any] = {"host": _host(), "pid": os.getpid(), "time": round(time.time(), 3)}
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(holder, file)
    return True


def _host() -> str:
    """The machine, and within it the space in which numbers of processes are unique."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process
    return True

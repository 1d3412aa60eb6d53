"""Claims: one process a cell, and what a dead process held is taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from mtl_jax.sweeps import claims
from mtl_jax.sweeps.claims import CLAIM, Claims


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cell"


def write(folder, host, pid, age=0.0):
    folder.mkdir(exist_ok=True)
    (folder / CLAIM).write_text(json.dumps({"host": host, "pid": pid, "time": 0}))
    then = time.time() - age
    os.utime(folder / CLAIM, (then, then))


def test_a_cell_is_one_process_s(tmp_path, folder):
    with Claims(tmp_path, 60) as ours, Claims(tmp_path, 60) as others:
        assert ours.take(folder)
        assert not others.take(folder)
        assert others.is_held(folder)
        ours.release(folder)
        assert not others.is_held(folder)
        assert others.take(folder)
    # What a process holds when it ends in order is free again.
    assert not (folder / CLAIM).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]


def test_a_dead_process_of_this_host_holds_nothing(tmp_path, folder):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    with Claims(tmp_path, 1000) as ours:
        write(folder, claims._host(), done.pid)
        assert not ours.is_held(folder)
        assert ours.take(folder)
        # A living one does, and so does a process of another host with the same number.
        for host, pid in ((claims._host(), os.getppid()), ("elsewhere", done.pid)):
            other = tmp_path / f"cell-{pid}"
            write(other, host, pid)
            assert not ours.take(other)


def test_a_claim_that_is_not_touched_is_void(tmp_path, folder):
    with Claims(tmp_path, 30) as ours:
        write(folder, "elsewhere", 1, age=20)
        assert not ours.take(folder)
        write(folder, "elsewhere", 1, age=40)
        assert ours.take(folder)
        assert json.loads((folder / CLAIM).read_text())["pid"] == os.getpid()


def test_held_claims_are_kept_fresh(tmp_path, folder):
    with Claims(tmp_path, 1) as ours:
        assert ours.take(folder)
        first = (folder / CLAIM).stat().st_mtime
        end = time.monotonic() + 10  # a busy machine may let the thread wait
        while (folder / CLAIM).stat().st_mtime == first and time.monotonic() < end:
            time.sleep(0.05)
        assert (folder / CLAIM).stat().st_mtime > first

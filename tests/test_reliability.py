"""What a run is protected by, part by part; whole runs with faults: test_reliability_runs.py."""

import errno
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import seqio

from mtl_jax import checksums, data, run_lock, storage
from mtl_jax.checkpoint import Checkpointer, DamagedCheckpoint
from mtl_jax.errors import UserError
from mtl_jax.run_lock import RunLock


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------- faults


@pytest.fixture
def slept(monkeypatch):
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


def fail_first(monkeypatch, place, name, count, error):
    """Lets the next `count` calls of a function fail."""
    true, left = getattr(place, name), [count]

    def flaky(*arguments, **named):
        if left[0]:
            left[0] -= 1
            raise error
        return true(*arguments, **named)

    monkeypatch.setattr(place, name, flaky)


# ---------------------------------------------------------------------------- checkpoints


def make_state(step):
    keys = jax.random.split(jax.random.key(step), 3)
    return {
        "params": {"w": jax.random.normal(keys[0], (40, 30)), "b": jnp.arange(5.0)},
        "opt_state": {"m": jax.random.normal(keys[1], (40, 30))},
        "step": jnp.int32(step),
    }


ABSTRACT = jax.eval_shape(lambda: make_state(0))
POSITION, META = {"draw": 12, "tasks": {"a": [3, 4]}}, {"model": {"emb_dim": 4}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), POSITION, META)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored_as_saved(checkpointer):
    """Whether step 2 comes back bit by bit; False: it is told to be damaged."""
    told = ""
    try:
        state, position, meta = checkpointer.restore(2, ABSTRACT)
    except DamagedCheckpoint as error:
        told = str(error)
    if told:
        assert "damaged" in told
        assert "continue from step 1" in told
        return False
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(2)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (position, meta) == (POSITION, META)
    return True


def test_a_flipped_bit_in_any_file_is_found_or_harms_nothing(damaged):
    """One bit at a random place of every file of a checkpoint, one file after the other."""
    draw = np.random.default_rng(0)
    files = sorted(path for path in (damaged / "2").rglob("*") if path.is_file())
    found = 0
    for path in files:
        content = path.read_bytes()
        if not content:
            continue
        for _ in range(2):
            spoiled = bytearray(content)
            spoiled[draw.integers(len(content))] ^= 1 << draw.integers(8)
            path.write_bytes(spoiled)
            with Checkpointer(damaged, read_only=True) as reader:
                sound = restored_as_saved(reader)
            found += not sound
            listed = path.relative_to(damaged / "2").parts[0] in ("state", "data_state", "meta")
            assert sound is not listed or path.name == "commit_success.txt", path
        path.write_bytes(content)
    assert found >= 10
    with Checkpointer(damaged, read_only=True) as reader:
        assert restored_as_saved(reader), "mended"


def test_a_file_cut_short_or_gone_is_found(damaged):
    files = [p for p in sorted((damaged / "2" / "state").rglob("*")) if p.is_file()]
    marks = {checksums.NAME, "commit_success.txt"}  # Orbax's own mark comes after the list
    for path in [path for path in files if path.name not in marks]:
        content = path.read_bytes()
        for spoil in (lambda: os.truncate(path, len(content) // 2), path.unlink):  # noqa: B023
            spoil()
            problem = checksums.problem([damaged / "2" / "state"])
            assert path.name in problem or not content
            path.write_bytes(content)
    assert not checksums.problem([damaged / "2" / "state"])


def test_several_processes_share_the_reading(damaged):
    (victim,) = [path for path in (damaged / "2/state").rglob("_METADATA")]
    victim.write_bytes(victim.read_bytes()[:-1])
    found = [checksums.problem([damaged / "2" / "state"], part, 3) for part in range(3)]
    assert sorted(map(bool, found)) == [False, False, True]


def test_checkpoints_without_checksums_are_read_as_before(damaged):
    for path in (damaged / "2").rglob(checksums.NAME):
        path.unlink()
    with Checkpointer(damaged, read_only=True) as reader:
        assert restored_as_saved(reader)


def test_what_is_set_aside_stays_whole_and_makes_room(damaged):
    with Checkpointer(damaged) as checkpointer:
        aside = checkpointer.set_aside([2])
        assert checkpointer.steps() == [1]
        checkpointer.save(2, make_state(5), POSITION, META, wait=True)
        assert checkpointer.set_aside([2]) == aside
    assert sorted(path.name for path in aside.iterdir()) == ["2", "2.2"]
    shutil.rmtree(damaged)
    shutil.copytree(aside, damaged)
    with Checkpointer(damaged, read_only=True) as reader:
        reader.restore(2, ABSTRACT)


@pytest.fixture
def flaky(monkeypatch):
    """Lets the next saves fail in the background: `flaky(number, errno)`."""
    monkeypatch.setattr("mtl_jax.checkpoint.RETRY_SECONDS", (0.01, 0.02, 0.03))
    write, failing = checksums.write, []

    def fail(item):
        if failing:
            raise OSError(failing[0], os.strerror(failing.pop()))
        write(item)

    monkeypatch.setattr(checksums, "write", fail)
    return lambda count, number: failing.extend([number] * count)


def test_a_save_is_repeated_where_the_storage_fails_for_a_moment(tmp_path, flaky, caplog):
    caplog.set_level(logging.WARNING, "mtl_jax")
    with Checkpointer(tmp_path / "c") as checkpointer:
        flaky(3, errno.EIO)
        assert checkpointer.save(1, make_state(1), POSITION, META, wait=True)
        assert checkpointer.steps() == [1]
        assert caplog.text.count("could not save the checkpoint of step 1") == 3
        flaky(4, errno.ESTALE)
        with pytest.raises(UserError, match="Could not save the checkpoint of step 2"):
            checkpointer.save(2, make_state(2), POSITION, META, wait=True)
    with Checkpointer(tmp_path / "c", read_only=True) as reader:
        assert reader.steps() == [1]
        reader.restore(1, ABSTRACT)


def test_a_save_that_failed_in_the_background_asks_for_another(tmp_path, flaky):
    with Checkpointer(tmp_path / "c") as checkpointer:
        flaky(1, errno.EIO)
        checkpointer.save(1, make_state(1), POSITION, META)
        deadline = time.monotonic() + 30
        while not checkpointer.lost():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        checkpointer.save(2, make_state(2), POSITION, META)
        assert not checkpointer.lost()
        checkpointer.wait()
        assert checkpointer.steps() == [2]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_sound_checkpoint_that_cannot_be_read_is_not_called_damaged(
    saved, monkeypatch, slept, number
):
    """Neither by its checksums nor by Orbax: it is read again, and then the storage is blamed."""
    error = OSError(number, os.strerror(number))
    for place, name in ((checksums, "problem"), (ocp.CheckpointManager, "restore")):
        slept.clear()
        with monkeypatch.context() as patch, Checkpointer(saved, read_only=True) as reader:
            fail_first(patch, place, name, 3, error)
            assert restored_as_saved(reader)
            assert slept == list(storage.RETRY_SECONDS)
        with monkeypatch.context() as patch, Checkpointer(saved, read_only=True) as reader:
            fail_first(patch, place, name, 4, error)
            told = rf"not read the checkpoint of step 2 in .*: {os.strerror(number)}"
            with pytest.raises(UserError, match=told) as raised:
                reader.restore(2, ABSTRACT)
            assert type(raised.value) is UserError


def test_tensorstore_tells_of_the_system_in_words(saved, monkeypatch, slept):
    error = ValueError("UNKNOWN: Error reading 0.0 [OS error 5: EIO Input/output error]")
    fail_first(monkeypatch, ocp.CheckpointManager, "restore", 3, error)
    with Checkpointer(saved, read_only=True) as reader:
        assert restored_as_saved(reader)
    assert len(slept) == 3


def test_a_list_of_checksums_is_made_where_reading_fails_for_a_moment(tmp_path, monkeypatch, slept):
    """In a job of several processes, too, where no save is repeated as a whole."""
    (tmp_path / "a").write_text("a")
    fail_first(monkeypatch, checksums, "_hash", 1, OSError(errno.ESTALE, "stale"))
    checksums.write(tmp_path)
    assert not checksums.problem([tmp_path])
    assert len(slept) == 1


def test_a_checkpoint_that_is_saved_anew_is_checked_anew(damaged):
    """After going back; what is known of the one before says nothing of it."""
    with Checkpointer(damaged) as checkpointer:
        checkpointer.verify(2)
        checkpointer.set_aside([2])
        checkpointer.save(2, make_state(2), POSITION, META, wait=True)
        checkpointer.verify(2)
        checkpointer.set_aside([2])
        checkpointer.save(2, make_state(2), POSITION, META, wait=True)
        (damaged / "2" / "meta" / "metadata").write_text('{"model": 7}')
        with pytest.raises(DamagedCheckpoint, match="meta/metadata has"):
            checkpointer.verify(2)


def test_a_full_disk_is_not_waited_for(tmp_path, flaky, caplog):
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, META, wait=True)
        flaky(1, errno.ENOSPC)
        with pytest.raises(UserError, match="no space left on the device"):
            checkpointer.save(2, make_state(2), POSITION, META, wait=True)
        assert "trying again" not in caplog.text
        checkpointer.restore(1, ABSTRACT)


def test_a_vanished_folder_is_told(tmp_path):
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, META, wait=True)
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(UserError, match=r"run/checkpoints has vanished"):
            checkpointer.save(2, make_state(2), POSITION, META)
    assert not (tmp_path / "run").exists()
    with Checkpointer(tmp_path / "moved" / "checkpoints", read_only=True) as reader:
        reader.restore(1, ABSTRACT)


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_file_is_written_again_after_a_moment(tmp_path, monkeypatch, slept, name):
    fail_first(monkeypatch, os, name, 3, OSError(errno.EIO, os.strerror(errno.EIO)))
    storage.replace_text(tmp_path / "a", "whole")
    assert slept == list(storage.RETRY_SECONDS)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "whole"


def test_what_does_not_pass_is_told_at_once(tmp_path, monkeypatch, slept):
    storage.replace_text(tmp_path / "a", "old")
    for number in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
        fail_first(monkeypatch, os, "fsync", 1, OSError(number, os.strerror(number)))
        with pytest.raises(OSError, match=os.strerror(number)):
            storage.replace_text(tmp_path / "a", "new")
        monkeypatch.undo()
        assert (tmp_path / "a").read_text() == "old"


def test_appended_lines_are_neither_lost_nor_doubled(tmp_path, monkeypatch, slept):
    """The system takes a part of each line, then fails for a moment, again and again."""
    true, turn = os.write, [0]

    def flaky(descriptor, content):
        turn[0] += 1
        if turn[0] % 3 == 0:
            raise OSError(errno.EAGAIN, "busy")
        return true(descriptor, content[:5])

    monkeypatch.setattr(os, "write", flaky)
    for number in range(4):
        storage.append_text(tmp_path / "a", f"line number {number}\n")
    assert (tmp_path / "a").read_text() == "".join(f"line number {n}\n" for n in range(4))
    assert slept
    with pytest.raises(FileNotFoundError):
        storage.append_text(tmp_path / "gone" / "a", "x")


# ---------------------------------------------------------------------------- data

MODULE = """
import pathlib, seqio
from mtl_jax.sources import JsonlDataSource
FEATURE = seqio.Feature(seqio.ByteVocabulary(extra_ids=0), add_eos=True)
seqio.TaskRegistry.add(
    "reliability_corrupt",
    source=JsonlDataSource({"train": pathlib.Path(__file__).with_name("rows.jsonl")}),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={"inputs": FEATURE, "targets": FEATURE},
)
"""


def test_corrupt_rows_are_counted_in_the_stream(tmp_path, monkeypatch):
    """The batches are those of the same file without its corrupt rows."""
    rows = [json.dumps({"inputs": f"question {n}", "targets": str(n)}) for n in range(9)]
    (tmp_path / "reliability_corrupt.py").write_text(MODULE)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows[:4], '{"inputs": "ha', *rows[4:], "null"]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = {"mixture": "reliability_corrupt", "task_modules": ("reliability_corrupt",)}
    sizes = {"inputs_length": 32, "targets_length": 8, "batch_size": 2, "prefetch": 0}

    def batches(**changes):
        cfg = data.DataConfig(**values, **sizes, **changes)
        data.load_modules(cfg)
        with data.TrainStream(cfg, {"reliability_corrupt": 1}) as stream:
            found = [next(stream) for _ in range(8)]
            return found, stream.counters_by_task(found[-1])["reliability_corrupt"]

    with pytest.raises(UserError, match=r"rows\.jsonl, line 5: not valid JSON"):
        batches()
    left_out, counted = batches(max_corrupt=2)
    assert counted["corrupt"] == 2
    path.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(seqio.TaskRegistry.get("reliability_corrupt").source, "_reads", {})
    mended, counts = batches(max_corrupt=2)
    assert counts == {name: n for name, n in counted.items() if name != "corrupt"}
    for ours, theirs in zip(left_out, mended, strict=True):
        assert ours.state == theirs.state
        for name, array in ours.arrays.items():
            np.testing.assert_array_equal(array, theirs.arrays[name])


def test_the_table_of_faults_names_tests_that_there_are():
    tests = pathlib.Path(__file__).parent
    page = (tests.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}" in (tests / file).read_text(encoding="utf-8"), (file, name)


# ---------------------------------------------------------------------------- the lock

_HOLDER = """
    import pathlib, sys, time
    from mtl_jax.run_lock import RunLock
    with RunLock(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_HOLDER), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # also the third
            with pytest.raises(UserError) as refused, RunLock(tmp_path):
                pass
            assert f"process {holder.pid} on {socket.gethostname()}" in str(refused.value)
            assert "since 20" in str(refused.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert lines(tmp_path / "lock")[0]["pid"] == holder.pid
    with RunLock(tmp_path):
        assert lines(tmp_path / "lock")[0]["pid"] == os.getpid()
    assert not (tmp_path / "lock").read_text()
    with RunLock(tmp_path, primary=False), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine_is_watched(tmp_path, monkeypatch, alive):
    """Storage on which `flock` does not reach the other machine: its beats tell of it."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    lock = tmp_path / "lock"
    lock.write_text('{"host": "elsewhere", "pid": 7, "since": "2026-01-01"}\n')
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(UserError, match="process 7 on elsewhere"), RunLock(tmp_path):
                pass
            assert "elsewhere" in lock.read_text()
        else:
            with RunLock(tmp_path):
                before = lock.stat().st_mtime_ns
                time.sleep(0.3)
                assert lock.stat().st_mtime_ns > before, "others see that this one lives"
    finally:
        ended.set()
        if alive:
            thread.join()

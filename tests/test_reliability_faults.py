"""Faults injected into single parts: what is told, what stays, what is not lost."""

import errno
import fcntl
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from test_reliability import ABSTRACT, META, POSITION, make_state

from mtl_jax import checksums, processes, results, run_lock, storage
from mtl_jax.checkpoint import CheckpointConfig, Checkpointer, DamagedCheckpoint
from mtl_jax.errors import UserError
from mtl_jax.run_directory import RunDirectory
from mtl_jax.run_lock import RunLock

# ---------------------------------------------------------------------------- vanished folders


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("raw", [ValueError("NOT_FOUND: Error reading"), KeyError("x")])
def test_whatever_fails_in_a_vanished_folder_is_told_as_that(tmp_path, monkeypatch, wait, raw):
    """Orbax and tensorstore speak of it in many ways, which depend on the moment."""

    def vanish(item):
        if not (tmp_path / "moved").exists():
            (tmp_path / "run").rename(tmp_path / "moved")
        raise raw

    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(1, make_state(1), POSITION, META, wait=True)
    monkeypatch.setattr(checksums, "write", vanish)
    with pytest.raises(UserError, match="checkpoints has vanished"), checkpointer:
        checkpointer.save(2, make_state(2), POSITION, META, wait=wait)
    assert not (tmp_path / "run").exists()
    with Checkpointer(tmp_path / "moved" / "checkpoints", read_only=True) as reader:
        assert reader.latest() == 1
        reader.restore(1, ABSTRACT)


def test_a_list_of_checksums_makes_no_folder(tmp_path, monkeypatch):
    """The folder vanishes after its files have been hashed."""
    item = tmp_path / "run" / "state"
    item.mkdir(parents=True)
    (item / "a").write_text("a")
    replace = storage.replace_bytes

    def vanish(*arguments, **named):
        (tmp_path / "run").rename(tmp_path / "moved")
        replace(*arguments, **named)

    monkeypatch.setattr(storage, "replace_bytes", vanish)
    with pytest.raises(FileNotFoundError):
        checksums.write(item)
    assert not (tmp_path / "run").exists()


def save_twice(checkpointer, between):
    with checkpointer:
        try:
            checkpointer.save(2, make_state(2), POSITION, META)
        finally:
            between.join()
        checkpointer.save(3, make_state(3), POSITION, META, wait=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_folder_that_vanishes_at_any_moment_of_a_save(tmp_path):
    """Twenty moments; every one is told alike, and the checkpoint before is whole."""
    draw = random.Random(0)
    for trial in range(20):
        run, moved = tmp_path / f"run{trial}", tmp_path / f"moved{trial}"
        checkpointer = Checkpointer(run / "checkpoints")
        checkpointer.save(1, make_state(1), POSITION, META, wait=True)
        timer = threading.Timer(draw.uniform(0, 0.12), run.rename, [moved])
        timer.start()
        with pytest.raises(UserError, match="has vanished"):
            save_twice(checkpointer, timer)
        assert not [path for path in run.rglob("*") if path.name.isdigit()]
        with Checkpointer(moved / "checkpoints", read_only=True) as reader:
            reader.restore(None, ABSTRACT)


def test_a_folder_is_known_by_its_number_or_its_mark(tmp_path, monkeypatch):
    folder, numbers = tmp_path / "c", iter(range(100))
    folder.mkdir()
    place = storage.Place(folder, mark=True)
    assert place.same()
    shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "moved")
    assert not place.same()
    folder.mkdir()
    assert not place.same(), "another one of that name"
    shutil.rmtree(folder)
    (tmp_path / "moved").rename(folder)
    # As a mounted bucket does it, which numbers its folders anew.
    monkeypatch.setattr(storage, "_disk_number", lambda folder: (0, next(numbers)))
    assert place.same()
    (folder / storage.PLACE).write_text("another\n")
    assert not place.same()
    shutil.rmtree(folder)
    assert not place.same()


# ---------------------------------------------------------------------------- checkpoints

BEST = CheckpointConfig(keep=1, keep_best=1, best_metric="accuracy")


def save(folder, values):
    with Checkpointer(folder, BEST) as checkpointer:
        for step, value in values.items():
            checkpointer.save(step, make_state(step), POSITION, META, {"accuracy": value})
        checkpointer.wait()
        return checkpointer.steps()


@pytest.mark.parametrize("content", ['{"half', '{"accuracy": 0.1}', '{"accuracy": null}', "[]"])
def test_a_damaged_metric_neither_stops_a_run_nor_deletes_a_checkpoint(tmp_path, caplog, content):
    caplog.set_level(logging.WARNING, "mtl_jax")
    assert save(tmp_path / "c", {1: 0.9, 2: 0.2}) == [1, 2]
    (tmp_path / "c" / "1" / "measured" / "metadata").write_text(content)
    assert save(tmp_path / "c", {3: 0.5, 4: 0.4}) == [1, 3, 4]
    assert caplog.text.count("measured at the checkpoint of step 1 cannot be read") == 1
    with Checkpointer(tmp_path / "c", read_only=True) as reader:
        reader.restore(1, ABSTRACT)


@pytest.mark.parametrize(
    ("content", "kept"),
    [('{"accuracy": 0.9}', [1, 4]), ('{"other": 0.9}', [3, 4]), ('{"half', [1, 3, 4])],
)
def test_metrics_that_orbax_wrote(tmp_path, content, kept):
    """Of an earlier version, without a list of checksums."""
    save(tmp_path / "c", {1: 0.9, 2: 0.2})
    shutil.rmtree(tmp_path / "c" / "1" / "measured")
    old = tmp_path / "c" / "1" / "metrics"
    old.mkdir()
    (old / "metrics").write_text(content)
    with Checkpointer(tmp_path / "c", read_only=True) as reader:
        assert reader.steps() == [1, 2]
    assert save(tmp_path / "c", {3: 0.5, 4: 0.4}) == kept


@pytest.fixture
def one_of_two(monkeypatch):
    """This process believes to be the first of two; what it hands out is in the list."""
    handed = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda value: [handed.append(value) or value] * 2)
    return handed


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_what_one_process_cannot_read_is_told_to_all(tmp_path, monkeypatch, one_of_two, number):
    """None may go on alone: the others wait for it where problems are exchanged."""
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, META, wait=True)

        def fail(*arguments):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(checksums, "problem", fail)
            with pytest.raises(UserError, match=r"not read the checkpoint of step 1") as caught:
                checkpointer.verify(1)
        assert type(caught.value) is UserError
        ((told, refusal),) = one_of_two
        assert os.strerror(number) in told
        assert refusal == number
        assert len(waits) == 3 * (number == errno.EIO)
        # And what only another one cannot read.
        for theirs, kind in (((told, number), UserError), (("a is missing", 0), DamagedCheckpoint)):
            monkeypatch.setattr(processes, "gather", lambda value, told=theirs: [value, told])
            with pytest.raises(UserError, match="step 1") as caught:
                checkpointer.verify(1)
            assert type(caught.value) is kind
        monkeypatch.setattr(processes, "gather", lambda value: [value, ("", 0)])
        checkpointer.verify(1)


def test_a_failed_save_ends_the_whole_job(tmp_path, monkeypatch, capsys, one_of_two):
    """Before Orbax waits for the other processes, which wait for this one."""
    ended = []
    monkeypatch.setattr(processes, "abort", ended.append)
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, make_state(1), POSITION, META, wait=True)

    def fail(item):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checksums, "write", fail)
    with pytest.raises(UserError, match="no space left"), checkpointer:
        checkpointer.save(2, make_state(2), POSITION, META, wait=True)
    assert ended == [1]
    told = capsys.readouterr().err
    assert "process 0 of 1 stops: Could not save the checkpoint of step 2" in told
    assert "no space left on the device" in told


def test_orbax_does_not_ask_whether_the_job_is_told_to_stop(tmp_path, monkeypatch):
    """It would do so with the number of a step that is past, and set JAX's count of them back."""
    asked = []
    name = "jax.experimental.multihost_utils.reached_preemption_sync_point"
    monkeypatch.setattr(name, lambda step: bool(asked.append(step)))
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, META, wait=True)
    assert not asked


def test_a_list_of_checksums_from_a_stranger_is_at_most_damaged(tmp_path):
    (tmp_path / "state").mkdir()
    for content in ('{"blake2b": {"a": [1e999, "0"]}}', '{"blake2b": {"a": [1]}}', "[1]", "{"):
        (tmp_path / "state" / checksums.NAME).write_text(content)
        assert "is no list of checksums" in checksums.problem([tmp_path / "state"])


# ---------------------------------------------------------------------------- lock


def test_a_second_run_of_one_machine_is_refused_where_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
            pass
        left = (tmp_path / "lock").read_text()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < 0.2, "a run that has ended leaves nothing to watch"
    (tmp_path / "lock").write_text(left)  # as a kill leaves it
    with RunLock(tmp_path):
        pass


# ---------------------------------------------------------------------------- lines


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    path, true, turn = tmp_path / "a.jsonl", os.write, [0]
    storage.append_text(path, '{"step": 1}\n')

    def full(descriptor, content):
        turn[0] += 1
        if turn[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(descriptor, content[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        storage.append_text(path, '{"step": 2}\n')
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'
    storage.append_text(path, '{"step": 3}\n')
    assert [row["step"] for row in storage.read_jsonl(path)] == [1, 3]


@pytest.mark.parametrize("before", ["", '{"step": 1}\n'])
def test_a_half_line_of_a_kill_does_not_join_the_next_one(tmp_path, before):
    path = tmp_path / "events.jsonl"
    path.write_text(f'{before}{{"step": 2, "ev')
    storage.append_text(path, '{"step": 3}\n')
    assert path.read_text() == f'{before}{{"step": 3}}\n'


_WRITER = """
    import os, pathlib, sys
    from mtl_jax import storage
    write = os.write
    os.write = lambda descriptor, content: write(descriptor, content[:5])
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(200):
        storage.append_text(pathlib.Path(sys.argv[1]), f'{{"theirs": {number}}}\\n', shared=True)
"""


def test_lines_of_several_processes_are_neither_lost_nor_mixed(tmp_path, monkeypatch):
    """An evaluation beside a training; the system takes a few bytes of a line at a time."""
    program = textwrap.dedent(_WRITER)
    path, pipes = tmp_path / "results.jsonl", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writer = subprocess.Popen([sys.executable, "-c", program, path], text=True, **pipes)
    write = os.write
    try:
        assert writer.stdout.readline() == "ready\n"
        monkeypatch.setattr(os, "write", lambda number, content: write(number, content[:7]))
        writer.stdin.write("go\n")
        writer.stdin.flush()
        for number in range(200):
            results.append_results(tmp_path, [{"ours": number, "step": 1}])
            if number % 20 == 10:  # as a training does that goes on from a checkpoint
                results.append_results(tmp_path, [{"ours": -1, "step": 3}])
                storage.truncate_jsonl(path, 2)
    finally:
        monkeypatch.undo()
        writer.communicate()
    rows = storage.read_jsonl(path)
    assert [row["ours"] for row in rows if "ours" in row] == list(range(200))
    assert [row["theirs"] for row in rows if "theirs" in row] == list(range(200))


def test_a_half_line_in_shared_results_is_cut_off(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"step": 1}\n{"st')
    results.append_results(tmp_path, [{"step": 2}])
    assert [row["step"] for row in storage.read_jsonl(tmp_path / "results.jsonl")] == [1, 2]


def test_lines_are_shared_where_there_are_no_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    results.append_results(tmp_path, [{"step": 1}])
    assert storage.read_jsonl(tmp_path / "results.jsonl") == [{"step": 1}]


def test_files_of_a_run_do_not_make_its_vanished_directory_anew(tmp_path):
    run = RunDirectory(tmp_path / "run").create()
    run.write_text("tokenizer/parts/a.txt", "a")
    assert (run.path / "tokenizer" / "parts" / "a.txt").read_text() == "a"
    shutil.rmtree(run.path)
    for write in (run.write_text, run.write_json):
        for name in ("a", "tokenizer/a"):
            with pytest.raises(UserError, match=f"write {name} in .*/run: No such file"):
                write(name, "x")
    assert not run.path.exists()


def test_results_do_not_make_a_vanished_run_directory_anew(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"append to results\.jsonl in .*/run: No such file"):
        results.append_results(run, [{"step": 1}])
    with pytest.raises(UserError, match=r"predictions of a in .*: No such file"):
        results.write_predictions(run / "predictions", "a", [{"step": 1}])
    assert not run.exists()
    run.mkdir()
    results.append_results(run, [{"step": 1}])
    results.write_predictions(run / "predictions", "a", [{"step": 1}])
    assert (run / "predictions" / "a.jsonl").read_text() == '{"step": 1}\n'

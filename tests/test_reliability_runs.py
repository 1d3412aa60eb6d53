"""Whole runs with faults, each against the run that had none (docs/reliability.md)."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_processes import finish, start_job
from test_train import assert_same, contents, environment, failure, flags, lines, losses, restored

from mtl_jax import build, checksums, cli, config, data, logbook, sharding, starting, train
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.run_lock import RunLock

pytestmark = [
    pytest.mark.slow,
    # Orbax writes many arrays at once; of those that fail it raises the first and closes its event
    # loop, of which the others complain at some later time.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    ),
]

STEPS = 12
BASE = {"Run__steps": STEPS, "Checkpoint__every": 2, "Checkpoint__keep": 20, "Eval__tasks": "()"}


def argv(directory, **changes):
    return flags(directory, **(BASE | changes))


def position(directory, number):
    """The position in the data, and what the guard knew, of a checkpoint."""
    path = directory / "checkpoints" / str(number) / "data_state" / "metadata"
    return json.loads(path.read_text())


def assert_same_run(directory, other):
    """Losses, random numbers, data, optimizer: bit by bit."""
    assert losses(directory) == losses(other)
    assert_same(restored(directory, STEPS), restored(other, STEPS))
    assert position(directory, STEPS) == position(other, STEPS)
    assert (directory / "data.json").read_text() == (other / "data.json").read_text()


def events(directory):
    path = directory / "events.jsonl"
    return lines(path) if path.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, so that they share their compiled programs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nothing happened to."""
    assert cli.main(argv(folder / "whole")) == 0
    assert not events(folder / "whole")
    return folder / "whole"


@pytest.fixture
def new(folder, tmp_path):
    return folder / tmp_path.name


@pytest.fixture
def copy(whole, new):
    return shutil.copytree(whole, new)


# ---------------------------------------------------------------------------- kill -9


def test_twenty_kills_at_random_moments(tmp_path):
    """Also of the state of a method and of the guard; most kills fall into a save."""
    steps = 48
    changes = {
        **{"Balance.method": "FAMO", "Guard.on_bad_loss": "skip", "Guard.spike_factor": 50.0},
        **{"Guard.spike_window": 5, "Checkpoint.every": 2, "Eval.tasks": "()"},
    }
    given = flags("unused", **{name.replace(".", "__"): x for name, x in changes.items()})
    given = [word for word in given if not word.startswith(("--gin.Run.dir", "--gin.Run.steps"))]
    program = Path(__file__).with_name("killing.py")
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "0", "20", str(steps), *given],
        env=environment() | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout)
    log = (tmp_path / "log").read_text()
    assert told["status"] == 0, log[-3000:]
    assert len(told["kills"]) == 20
    assert None not in told["kills"], "it ended before all kills: give it more steps"
    # A start removes what the kill before has left, so these were being written.
    assert sum(kill["from_step"] and bool(kill["saving"]) for kill in told["kills"]) >= 3, told
    assert "damaged" not in log
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert [row["step"] for row in losses(killed)] == list(range(1, steps + 1))
    assert losses(killed) == losses(whole)
    assert position(killed, steps) == position(whole, steps)
    assert position(whole, steps)["guard"]["losses"]
    assert (killed / "data.json").read_text() == (whole / "data.json").read_text()
    # Made on one device, and read on those of this process.
    state = restored(killed, steps)
    assert jax.tree.leaves(state.balance)
    assert_same(state, restored(whole, steps))


# ---------------------------------------------------------------------------- damaged checkpoints


def flip(directory, number, seed=0):
    """One bit in the file of arrays."""
    files = (directory / "checkpoints" / str(number) / "state").rglob("d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[np.random.default_rng(seed).integers(len(content))] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(copy, whole, capsys):
    for name in ("11", "12"):
        shutil.rmtree(copy / "checkpoints" / name, ignore_errors=True)
    flip(copy, 10)
    os.truncate(copy / "checkpoints" / "8" / "meta" / "metadata", 5)
    assert cli.main(argv(copy)) == 0
    told = capsys.readouterr().err
    assert "warning: The checkpoint of step 10" in told
    assert "warning: The checkpoint of step 8" in told
    assert "Continuing from step 6" in told
    assert [(row["event"], row["step"]) for row in events(copy)] == [
        ("damaged", 10),
        ("damaged", 8),
    ]
    aside = {path.name for path in (copy / "checkpoints.set_aside").iterdir()}
    assert aside == {"8", "10"}
    assert_same_run(copy, whole)


def test_where_all_are_damaged_the_run_does_not_begin_anew(copy, capsys):
    for path in (copy / "checkpoints").glob("[0-9]*"):
        flip(copy, int(path.name))
    before = contents(copy)
    message = failure(capsys, argv(copy, Run__steps=20))
    assert f"step {STEPS} in {copy}/checkpoints cannot be read" in message
    assert contents(copy) == before


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(copy, capsys):
    flip(copy, 10)
    asked = ["eval", f"--gin_file={copy}/config.gin", "--gin.Eval.tasks=('tiny_first',)"]
    message = failure(capsys, [*asked, f"--checkpoint={copy}/checkpoints/10"])
    assert "The checkpoint of step 10" in message
    assert "damaged" in message
    assert cli.main([*asked, f"--checkpoint={copy}/checkpoints/8"]) == 0


# ---------------------------------------------------------------------------- storage


def at_step(monkeypatch, number, action):
    """Does something once, when a step has been dispatched."""
    add = logbook.Logbook.add

    def acting(self, step, *rest):
        add(self, step, *rest)
        if step == number:
            action()

    monkeypatch.setattr(logbook.Logbook, "add", acting)


def test_a_full_disk_stops_the_run_and_harms_nothing(new, whole, capsys, monkeypatch):
    """The system refuses to make files large, as it refuses on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        deadline = time.monotonic() + 60
        while not (new / "checkpoints" / "6").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    at_step(monkeypatch, 7, fill)
    try:
        message = failure(capsys, argv(new))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in message
    monkeypatch.undo()
    with Checkpointer(new / "checkpoints", read_only=True) as reader:
        assert reader.latest() == 6
    assert cli.main(argv(new)) == 0
    assert_same_run(new, whole)


def test_a_vanished_directory_stops_the_run(new, whole, capsys, monkeypatch):
    moved = new.with_name(f"{new.name}_moved")
    at_step(monkeypatch, 7, lambda: new.rename(moved))  # while step 6 is being saved, or after it
    message = failure(capsys, argv(new))
    assert str(new) in message
    monkeypatch.undo()
    # What was being written when it vanished must not become half a checkpoint.
    assert not [path for path in new.rglob("checkpoints/*") if path.name.isdigit()]
    shutil.rmtree(new, ignore_errors=True)
    moved.rename(new)
    assert cli.main(argv(new)) == 0
    assert_same_run(new, whole)


class Killed(BaseException):
    """Ends a run as a kill does: nothing more is written."""


def test_a_kill_between_two_lines_of_metrics_loses_no_step(new, monkeypatch):
    """Every step is in a line, by the next checkpoint at the latest."""
    changes = {"Run__steps": 8, "Run__log_every": 5}
    other = new.with_name(f"{new.name}_other")
    assert cli.main(argv(other, **changes)) == 0
    assert [row["step"] for row in losses(other)] == [2, 4, 5, 6, 8]

    def kill():
        raise Killed

    monkeypatch.setattr(logbook.Logbook, "__exit__", lambda *arguments: None)
    at_step(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        cli.main(argv(new, **changes))
    monkeypatch.undo()
    assert [row["step"] for row in losses(new)] == [2, 4]
    assert cli.main(argv(new, **changes)) == 0
    assert losses(new) == losses(other)


def test_told_to_stop_where_every_step_is_evaluated(new, monkeypatch):
    """The evaluation is done, written, saved behind, and not made again."""
    changes = {"Run__steps": 5, "Eval__every": 1, "Eval__tasks": "('tiny_first',)"}
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(argv(new, **changes)) == cli.TO_BE_CONTINUED
    monkeypatch.undo()
    with Checkpointer(new / "checkpoints", read_only=True) as reader:
        assert reader.latest() == 3
    assert [row["step"] for row in losses(new)] == [1, 2, 3]
    assert cli.main(argv(new, **changes)) == 0
    other = new.with_name(f"{new.name}_other")
    assert cli.main(argv(other, **changes)) == 0
    assert losses(new) == losses(other)
    assert lines(new / "results.jsonl") == lines(other / "results.jsonl")
    assert position(new, 5) == position(other, 5)
    assert_same(restored(new, 5), restored(other, 5))


def test_storage_that_fails_for_a_moment_is_waited_for(new, whole, monkeypatch, caplog):
    """The save of step 4 fails in the background; the step after it saves instead."""
    monkeypatch.setattr("mtl_jax.checkpoint.RETRY_SECONDS", (0.0, 0.0, 0.0))
    write, calls = checksums.write, []

    def flaky(item):
        calls.append(item)
        if len(calls) in (4, 8):  # of the second save; and of a later one
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(item)

    monkeypatch.setattr(checksums, "write", flaky)
    assert cli.main(argv(new)) == 0
    assert caplog.text.count("could not save the checkpoint") == 2
    assert_same_run(new, whole)


def test_a_second_run_refuses(copy, capsys):
    with RunLock(copy):
        before = contents(copy)
        message = failure(capsys, argv(copy, Run__steps=20))
        assert f"process {os.getpid()} on " in message
        assert contents(copy) == before
    assert cli.main(argv(copy)) == 0


# ---------------------------------------------------------------------------- bad losses


@pytest.fixture
def spoil(monkeypatch):
    """Spoils the n-th batches of the data, whenever they come: `spoil({5}, change)`."""
    following = data.TrainStream.__next__
    known: dict[int, int] = {}  # examples drawn until then -> number of the batch

    def install(numbers, change):
        def spoiled(self):
            batch = following(self)
            drawn = int(batch.counters[:, 0].sum()), *(s.draw for s in batch.snapshots)
            number = known.setdefault(drawn, len(known) + 1)
            if number in numbers:
                change(batch.arrays)
            return batch

        monkeypatch.setattr(data.TrainStream, "__next__", spoiled)

    return install


def with_nan(arrays):
    arrays["decoder_loss_weights"][:] = np.nan


def with_other_targets(arrays):
    """Tokens that no task has: unlikely ones for a model that has learned a little."""
    real = arrays["decoder_target_tokens"] > 0
    arrays["decoder_target_tokens"][real] = 250


def test_a_bad_update_is_left_out_and_counted(new, spoil):
    spoil({5, 8}, with_nan)
    changes = {"Guard__on_bad_loss": "skip", "Checkpoint__every": 1}
    assert cli.main(argv(new, **changes)) == 0
    for number in (5, 8):
        before, after = restored(new, number - 1), restored(new, number)
        assert int(after.step) == number
        assert_same(before.replace(step=after.step), after)
    rows = losses(new)
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 8]
    assert rows[-1]["skipped_updates"] == 2
    assert [row["step"] for row in events(new)] == [5, 8]
    # Stopped in between and continued: the same.
    other = new.with_name(f"{new.name}_other")
    assert cli.main(argv(other, Run__steps=6, **changes)) == 0
    assert cli.main(argv(other, **changes)) == 0
    assert_same_run(other, new)


def test_a_spike_is_left_out(new, spoil):
    spoil({9}, with_other_targets)
    watching = new.with_name(f"{new.name}_watching")
    assert cli.main(argv(watching)) == 0
    of_step = {row["step"]: row["loss"] for row in losses(watching)}
    median = np.median([of_step[step] for step in (4, 5, 6, 7)])
    assert of_step[9] > 1.4 * median, "the spike is one"
    changes = {"Guard__spike_factor": 1.4, "Guard__spike_window": 4}
    assert cli.main(argv(new, Guard__on_bad_loss="skip", **changes)) == 0
    assert [row["step"] for row in events(new)] == [9]
    # Until then the same losses, but for sums that another program makes in another order.
    before = [row["loss"] for row in losses(new)[:8]]
    np.testing.assert_allclose(before, [of_step[step] for step in range(1, 9)], rtol=1e-5)
    stopped = new.with_name(f"{new.name}_stopped")
    assert cli.main(argv(stopped, **changes)) == 1
    with Checkpointer(stopped / "checkpoints", read_only=True) as reader:
        assert reader.latest() == 8


@pytest.mark.parametrize(
    ("bad", "change", "watched", "back_to", "aside"),
    [
        (6, with_nan, {}, 2, ["4"]),
        (9, with_other_targets, {"Guard__spike_factor": 1.4, "Guard__spike_window": 4}, 6, ["8"]),
    ],
    ids=["not_finite", "spike"],
)
def test_a_run_goes_back_and_on_with_other_data(new, spoil, bad, change, watched, back_to, aside):
    """The data of the bad step and of those gone back over are not seen again."""
    spoil({bad}, change)
    changes = {"Guard__on_bad_loss": "roll_back", "Guard__roll_back_steps": 3, **watched}
    assert cli.main(argv(new, **changes)) == 0
    (event,) = events(new)
    assert (event["step"], event["back_to"], event["roll_backs"]) == (bad, back_to, 1)
    assert [path.name for path in (new / "checkpoints.set_aside").iterdir()] == aside
    assert [row["step"] for row in losses(new)] == list(range(1, STEPS + 1))
    assert position(new, 12)["guard"]["roll_backs"] == 1

    # A second way to the same state, in a plain loop.
    given = [word.removeprefix("--gin.") for word in argv(new)[1:]]
    session = build.build(config.load([], given))
    state = restored(new, back_to)
    update = train.compile_step(session)
    rng = starting.replicated_key(session.mesh, session.config.run.seed, 1)
    task_ids = session.run.task_ids(data.task_names("tiny"))
    with train.open_stream(session, task_ids) as stream:
        batches = [next(stream) for _ in range(bad + STEPS - back_to)]
    for number, batch in enumerate(batches[bad:], start=back_to + 1):
        arrays = sharding.put_batch(session.mesh, batch.arrays)
        state, metrics = update(state, arrays, rng, None, None)
        assert int(state.step) == number
        assert float(metrics["loss"]) == pytest.approx(losses(new)[number - 1]["loss"], rel=1e-6)
    assert_same(state, restored(new, STEPS))

    # Stopped after it has gone back and continued: the same.
    other = new.with_name(f"{new.name}_other")
    assert cli.main(argv(other, Run__steps=bad + 1, **changes)) == 0
    assert cli.main(argv(other, **changes)) == 0
    assert_same_run(other, new)


def test_going_back_is_bounded_and_may_lead_to_the_start(new, spoil, capsys):
    spoil({1, 2, 3}, with_nan)
    changes = {"Guard__on_bad_loss": "roll_back", "Guard__max_roll_backs": 2}
    assert "2 times the run went back" in failure(capsys, argv(new, **changes))
    assert [row["event"] for row in events(new)] == ["roll_back", "roll_back", "stop"]
    assert [row["step"] for row in events(new)] == [1, 1, 1]
    changes["Guard__max_roll_backs"] = 3
    assert cli.main(argv(new, **changes)) == 0
    assert position(new, STEPS)["guard"]["roll_backs"] == 3


@pytest.mark.parametrize(("way", "bound"), [("roll_back", "max_roll_backs"), ("skip", "max_skips")])
def test_all_processes_of_a_job_decide_alike(tmp_path, way, bound):
    """A learning rate that ruins the parameters: every later loss is bad, in both processes."""
    changes = {
        **{"Optimizer__learning_rate": 1e38, "Checkpoint__every": 1, "Eval__tasks": "()"},
        **{"Guard__on_bad_loss": way, f"Guard__{bound}": 2},
    }
    job = start_job(tmp_path / "run", 2, **changes)
    said = finish(job)
    assert [process.returncode for process in job] == [1, 1], said
    assert f"as many as Guard.{bound} allows" in said[0]
    assert [row["event"] for row in events(tmp_path / "run")] == [way, way, "stop"]
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as reader:
        assert reader.latest() >= 1

"""Which of a run's checkpoints it goes on from, and which it goes back to."""

import errno
import os
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import pytest

from mtl_jax import checksums, processes, report, storage, train
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError
from mtl_jax.guard import Guard, RollBack
from mtl_jax.guard_config import GuardConfig
from mtl_jax.run_directory import RunDirectory
from mtl_jax.storage import read_jsonl


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict


def make_state(step):
    return State(jnp.int32(step), {"w": jnp.full((4, 3), float(step))})


class Run:
    """A run whose checkpoints are those of steps 2, 4 and 6."""

    def __init__(self, folder, **guard):
        self.folder, self.aside = folder, folder / "checkpoints.set_aside"
        folder.mkdir(exist_ok=True)
        self.checkpointer = Checkpointer(folder / "checkpoints")
        for step in () if self.checkpointer.steps() else (2, 4, 6):
            self.checkpointer.save(step, make_state(step), {"read": 10 * step}, {})
        self.checkpointer.wait()
        run = RunDirectory(folder)
        self.guard = Guard(GuardConfig(**guard), run)
        self.stream = SimpleNamespace(restore=lambda state: setattr(self, "position", state))
        abstract = jax.eval_shape(lambda: make_state(0))
        check = {"check_model": lambda meta, place: None}
        self.session = SimpleNamespace(run=run, abstract_state=abstract, **check)

    def continued(self):
        """The step that it goes on from, and the position in the data."""
        parts = self.session, self.checkpointer, self.stream, self.guard
        state = train.continued(*parts)
        assert (state.params["w"] == int(state.step)).all()
        return int(state.step), self.position

    def go_back(self, bad_step):
        parts = dict.fromkeys(("told", "evaluator", "eval_tasks", "meta", "update", "rng"))
        parts |= dict.fromkeys(("reference", "state"))
        own = self.session, self.stream, self.checkpointer, self.guard, report.Ledger()
        training = train.Training(*own, **parts)
        step = training.go_back(RollBack(bad_step, "bad", SimpleNamespace(state="behind")))
        assert self.position == "behind"
        return step

    def damage(self, *steps):
        for step in steps:
            (self.folder / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")

    def moved(self):
        names = self.aside.iterdir() if self.aside.exists() else ()
        return sorted(path.name for path in names)

    def events(self):
        return [(row["event"], row["step"]) for row in read_jsonl(self.folder / "events.jsonl")]


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run", on_bad_loss="roll_back", roll_back_steps=3)
    with made.checkpointer:
        yield made


@pytest.fixture
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


def test_a_run_goes_on_from_the_newest_sound_checkpoint(run):
    run.damage(6)
    assert run.continued() == (4, {"read": 40})
    assert run.moved() == ["6"]
    assert run.events() == [("damaged", 6)]


def test_where_the_storage_fails_nothing_is_moved(run, monkeypatch, waits):
    run.damage(4)

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "problem", fail)
        with pytest.raises(UserError, match=r"step 6 in .*: Input/output error"):
            run.continued()
    assert len(waits) == 3
    assert not run.aside.exists()
    assert not run.events()
    assert run.continued()[0] == 6


def test_all_processes_go_on_from_a_checkpoint_that_the_first_one_sees(run, monkeypatch):
    """Storage may show the newest one to some of them later."""
    told = []
    monkeypatch.setattr(processes, "from_primary", lambda steps: told.append(steps) or [2, 4])
    assert run.continued()[0] == 4
    assert told == [[2, 4, 6]]
    assert not run.moved()


def test_a_process_waits_for_what_the_first_one_sees(run, tmp_path, monkeypatch):
    run.checkpointer.close()
    newest = run.folder / "checkpoints" / "6"
    newest.rename(tmp_path / "hidden")
    late, waits = Run(run.folder), []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == shown_after:
            (tmp_path / "hidden").rename(newest)

    monkeypatch.setattr(storage.time, "sleep", wait)
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    monkeypatch.setattr(processes, "from_primary", lambda steps: [2, 4, 6])
    with late.checkpointer:
        shown_after = 9  # never
        with pytest.raises(UserError, match=r"step 6 in .*: Stale file handle"):
            late.continued()
        assert not late.moved()
        waits.clear()
        shown_after = 2
        assert late.continued() == (6, {"read": 60})
        assert waits == list(storage.RETRY_SECONDS[:2])


@pytest.mark.parametrize(
    ("damaged", "back_to", "moved"),
    [
        ((), 4, ["6"]),
        ((4,), 2, ["4", "6"]),
        ((2, 4), 6, ["2", "4"]),  # younger than it should be, but it is sound
        ((6,), 4, ["6"]),
    ],
)
def test_going_back_passes_over_damaged_checkpoints(run, damaged, back_to, moved):
    """From a bad step 7 at least three steps: to 4."""
    run.damage(*damaged)
    assert run.go_back(7) == back_to
    assert run.moved() == moved
    tried = [("damaged", step) for step in sorted(damaged, reverse=True) if step <= 4]
    assert run.events() == [*tried, ("roll_back", 7)]
    assert run.checkpointer.steps() == [n for n in (2, 4, 6) if str(n) not in moved]


def test_going_back_where_all_are_damaged_moves_nothing(run):
    run.damage(2, 4, 6)
    with pytest.raises(UserError, match=r"step 4 .* damaged"):
        run.go_back(7)
    assert not run.moved()

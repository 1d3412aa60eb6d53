"""Whole runs through the command line: files, resumption, mistakes, evaluation."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import build, cli, config, data, starting, step
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError

STEPS = 8
TASKS = ("tiny_copy", "tiny_first", "tiny_reverse")
VALUES = {
    "Data.task_modules": "('tiny_tasks',)",
    "Data.mixture": "tiny",
    "Data.inputs_length": 16,
    "Data.targets_length": 12,
    "Data.batch_size": 8,
    "T5.vocab_size": 272,
    "T5.emb_dim": 16,
    "T5.num_heads": 2,
    "T5.head_dim": 8,
    "T5.mlp_dim": 32,
    "T5.num_encoder_layers": 1,
    "T5.num_decoder_layers": 1,
    "T5.dropout_rate": 0.1,
    "Optimizer.schedule": "constant",
    "Optimizer.learning_rate": 0.05,
    "Run.steps": STEPS,
    "Run.log_every": 1,
    "Checkpoint.every": 3,
    "Eval.tasks": "('tiny_copy', 'tiny_first')",
    "Eval.inputs_length": 16,
    "Eval.targets_length": 8,
    "Eval.max_decode_length": 4,
    "Eval.batch_size": 8,
}
# What depends on the clock is no part of a comparison.
CLOCK = {"time", "tokens_per_second", "seconds_per_step"}


def flags(directory, **changes):
    """`train` with the values above; a change is written Run__steps=3."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    values = VALUES | given | {"Run.directory": directory}
    return ["train", *(f"--gin.{name}={value}" for name, value in values.items())]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(directory):
    """The metrics of every training step, without what depends on the clock."""
    rows = [row for row in lines(directory / "metrics.jsonl") if "loss" in row]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def contents(directory):
    """Every file below a folder with its bytes."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def restored(directory, number):
    """The train state of a checkpoint."""
    session = build.build(config.load([str(directory / "config.gin")]))
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpointer:
        return checkpointer.restore(number, session.abstract_state)[0]


def assert_same(tree, other):
    """Bit by bit."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def environment():
    """For a child process: the same devices and the same compiler as here."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_THREEFRY_PARTITIONABLE": "1",
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from start to end in this process: (its directory, how often the step was traced)."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    traced = []
    with pytest.MonkeyPatch.context() as patch:
        train_step = step.train_step

        def counted(*args, **options):
            traced.append(args)
            return train_step(*args, **options)

        patch.setattr(step, "train_step", counted)
        assert cli.main(flags(directory, Run__evaluate_untrained=True)) == 0
    return directory, len(traced)


@pytest.fixture
def beside(finished, tmp_path):
    """A new run directory's path beside the finished run, whose compiled programs it shares."""
    return finished[0].parent / tmp_path.name


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be continued or spoiled."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def failure(capsys, argv):
    """The message of a command that fails as a user's mistake must: one line, status 1."""
    capsys.readouterr()
    assert cli.main(argv) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"mtl-jax {argv[0]}: ")
    return message


def test_a_run_leaves_its_whole_story(finished):
    directory, traces = finished
    assert traces == 1
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        *("config.gin", "command.txt", "versions.json", "model-info.txt", "mixture.txt"),
        *("tasks.json", "metrics.jsonl", "results.jsonl", "data.json", "ledger.json"),
        *("report.html", "checkpoints", "predictions"),
    }
    assert json.loads((directory / "tasks.json").read_text()) == {
        name: number for number, name in enumerate(TASKS, start=1)
    }
    assert {int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit()} == {
        *(3, 6, 8)
    }
    assert "15,088" in (directory / "model-info.txt").read_text()
    assert json.loads((directory / "versions.json").read_text())["jax"] == jax.__version__


def test_losses_of_every_task_add_up(finished):
    rows = losses(finished[0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        tokens = {name: row.get(f"tokens/{name}", 0.0) for name in TASKS}
        assert sum(tokens.values()) == row["target_tokens"] > 0
        for kind in ("loss", "accuracy"):
            total = sum(row[f"{kind}/{name}"] * count for name, count in tokens.items() if count)
            np.testing.assert_allclose(row[kind], total / row["target_tokens"], rtol=1e-6)
        assert row["learning_rate"] == pytest.approx(0.05)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    # A fresh model knows nothing of 272 tokens.
    assert abs(rows[0]["loss"] - np.log(272)) < 1.5


def test_results_of_the_untrained_and_the_trained_model(finished):
    rows = lines(finished[0] / "results.jsonl")
    assert {row["step"] for row in rows} == {0, STEPS}
    assert {(row["task"], row["metric"]) for row in rows if row["step"] == STEPS} == {
        ("tiny_copy", "exact_match"),
        *(("tiny_first", metric) for metric in ("accuracy", "chance", "majority")),
    }
    assert {row["n"] for row in rows} == {5}


def test_time_ledger_sums_to_the_wall_time(finished):
    (entry,) = json.loads((finished[0] / "ledger.json").read_text())
    assert {"data", "compile", "step", "eval", "checkpoint", "other"} <= set(entry["seconds"])
    assert sum(entry["seconds"].values()) == pytest.approx(entry["wall"], abs=0.01)
    assert entry["seconds"]["compile"] > 0
    assert entry["seconds"]["other"] < 0.2 * entry["wall"]


def test_config_gin_is_the_configuration(finished):
    directory, _ = finished
    ours = config.load([str(directory / "config.gin")])
    given = [word.removeprefix("--gin.") for word in flags(directory)[1:]]
    meant = config.load([], [*given, "Run.evaluate_untrained=True"])
    assert ours == meant
    assert ours.text == (directory / "config.gin").read_text()


def test_resumed_run_equals_the_uninterrupted_one_bit_by_bit(finished, beside):
    directory = beside
    assert cli.main(flags(directory, Run__steps=4, Eval__tasks="()")) == 0
    assert len(losses(directory)) == 4
    assert cli.main(flags(directory, Eval__tasks="()")) == 0
    assert losses(directory) == losses(finished[0])
    assert_same(restored(directory, STEPS), restored(finished[0], STEPS))
    assert (directory / "data.json").read_text() == (finished[0] / "data.json").read_text()
    assert len(json.loads((directory / "ledger.json").read_text())) == 2


@pytest.mark.slow
def test_command_txt_reruns_the_run(finished, beside):
    command = (finished[0] / "command.txt").read_text()
    result = subprocess.run(
        ["sh", "-c", command.replace(str(finished[0]), str(beside))],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "exact_match" in result.stdout
    assert f"Run directory: {beside}" in result.stdout
    assert losses(beside) == losses(finished[0])
    # What a user sees beside the table: our lines, and no library's.
    for line in result.stderr.splitlines():
        assert line.startswith(("T5 with", "step ", "evaluat")), line


KILLED = """
import os, signal, sys
from mtl_jax import cli, logbook
add = logbook.Logbook.add
def add_or_die(self, number, *rest):
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, number, *rest)
logbook.Logbook.add = add_or_die
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_losses(finished, beside):
    """Killed in step 7: checkpoint 3 is complete, and 6 may be half written."""
    directory = beside
    argv = flags(directory, Run__evaluate_untrained=True)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, *argv],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.latest() in (3, 6)
    assert losses(directory) == losses(finished[0])[: len(losses(directory))]
    assert json.loads((directory / "ledger.json").read_text())  # kept with every line of metrics
    assert cli.main(flags(directory, Eval__tasks="()")) == 0
    assert losses(directory) == losses(finished[0])
    assert_same(restored(directory, STEPS), restored(finished[0], STEPS))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_task(copy, capsys, monkeypatch):
    following = data.TrainStream.__next__

    def spoiled(self):
        batch = following(self)
        of_task = batch.arrays["decoder_task_ids"] == TASKS.index("tiny_first") + 1
        assert of_task.any()
        batch.arrays["decoder_loss_weights"][of_task] = np.nan
        return batch

    monkeypatch.setattr(data.TrainStream, "__next__", spoiled)
    before = contents(copy / "checkpoints")
    message = failure(capsys, flags(copy, Run__steps=12, Eval__tasks="()"))
    assert f"The loss at step {STEPS + 1} is nan, from task tiny_first. The run stops" in message
    assert contents(copy / "checkpoints") == before
    assert len(losses(copy)) == STEPS


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    directory = tmp_path / "dry"
    assert cli.main([*flags(directory), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "15,088" in shown
    assert "mesh data 8 x fsdp 1 x tensor 1" in shown.lower().replace("mesh: ", "mesh ")
    assert "Model FLOPs per step" in shown
    assert "tiny_reverse" in shown
    assert "50.00%" in shown
    # Adafactor at these sizes keeps one moment for every parameter: 15,088 x 4 bytes.
    assert shown.count("58.9 KiB") >= 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["drop", "keep"])
def test_restore_from_takes_parameters_or_the_whole_state(finished, tmp_path, what):
    changes = {"Run__restore_from": finished[0], "Run__restore_optimizer": what}
    given = [word.removeprefix("--gin.") for word in flags(tmp_path / "new", **changes)[1:]]
    state = starting.start_state(build.build(config.load([], given)))
    saved = restored(finished[0], STEPS)
    assert_same(state.params, saved.params)
    if what == "keep":
        assert_same(state, saved)
    else:
        assert int(state.step) == 0
        # A fresh Adafactor's moments are zero.
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_a_kept_optimizer_goes_on_from_its_step(finished, beside):
    changes = {"Run__restore_from": finished[0], "Run__restore_optimizer": "keep"}
    assert cli.main(flags(beside, Run__steps=STEPS + 2, Eval__tasks="()", **changes)) == 0
    assert [row["step"] for row in losses(beside)] == [STEPS + 1, STEPS + 2]
    assert losses(beside)[0]["loss"] < losses(finished[0])[0]["loss"] - 0.1


def test_checkpoint_of_another_architecture_changes_nothing(copy, capsys):
    before = contents(copy)
    message = failure(capsys, flags(copy, Run__steps=12, T5__mlp_dim=48))
    assert "mlp" in message
    assert "32" in message
    assert "48" in message
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"T5__vocab_size": 200},
            ["vocabulary has 259 ids", "T5.vocab_size = 200", "at least 259"],
        ),
        ({"Data__mixture": "tiny_copi"}, ["'tiny_copi'", "Did you mean", "tiny_copy"]),
        ({"Data__mixture": "''"}, ["Data.mixture is empty"]),
        ({"Eval__tasks": "('tiny_revers',)"}, ["'tiny_revers'", "Did you mean 'tiny_reverse'"]),
        ({"Eval__split": "empty"}, ["tiny_copy", "split 'empty' is empty"]),
        ({"Data__task_modules": "('tiny_taks',)"}, ["tiny_taks"]),
        ({"Mesh__data": 3}, ["The mesh data 3", "8 devices"]),
        ({"Data__batch_size": 12}, ["Data.batch_size = 12", "multiple of 8"]),
        ({"Run__restore_from": "/nowhere/at/all"}, ["/nowhere/at/all"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_clear_message(tmp_path, capsys, changes, words):
    message = failure(capsys, flags(tmp_path / "run", **changes))
    for word in words:
        assert word in message


def test_a_run_without_a_directory_is_refused(capsys):
    assert "Run.directory is empty" in failure(capsys, flags("''"))


def test_eval_appends_results_of_the_newest_checkpoint(copy, capsys):
    before = lines(copy / "results.jsonl")
    argv = ["eval", f"--gin_file={copy}/config.gin", f"--gin.Run.directory={copy}"]
    assert cli.main([*argv, "--gin.Eval.tasks=('tiny_reverse','tiny_first')"]) == 0
    assert "reverse" in capsys.readouterr().out
    rows = lines(copy / "results.jsonl")
    assert rows[: len(before)] == before
    added = rows[len(before) :]
    assert {row["step"] for row in added} == {STEPS}
    assert {row["task"] for row in added} == {"tiny_reverse", "tiny_first"}
    # The same model on the same examples as at the end of training.
    assert [r for r in added if r["task"] == "tiny_first"] == [
        r for r in before if r["task"] == "tiny_first" and r["step"] == STEPS
    ]
    assert len((copy / "predictions" / "tiny_reverse.jsonl").read_text().splitlines()) == 5


def test_eval_without_a_checkpoint_says_so(tmp_path, capsys):
    argv = ["eval", *flags(tmp_path / "none")[1:]]
    message = failure(capsys, argv)
    assert "checkpoint" in message.lower()
    assert str(tmp_path / "none") in message


def test_position_of_other_data_is_refused(copy, capsys):
    before = contents(copy / "checkpoints")
    message = failure(capsys, flags(copy, Run__steps=12, Data__seed=1))
    assert "position in the data has seed = 0, this run has 1" in message
    assert contents(copy / "checkpoints") == before


def test_train_is_callable_without_the_command_line(tmp_path):
    """The constructors and `build` work without Gin; a mistake is an exception there."""
    given = [word.removeprefix("--gin.") for word in flags(tmp_path / "run")[1:]]
    session = build.build(config.load([], given))
    assert session.num_parameters == 15_088
    assert not session.run.path.exists()
    with pytest.raises(UserError, match=r"Run.directory is empty"):
        build.build(config.load([]))

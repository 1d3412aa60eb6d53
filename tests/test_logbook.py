"""Metrics of the loop: means over the steps of a line, one step late, and what stops a run."""

import json
import types

import numpy as np
import pytest

from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import make_balancer
from mtl_jax.data_config import DataConfig
from mtl_jax.errors import UserError
from mtl_jax.guard import Guard
from mtl_jax.guard_config import GuardConfig
from mtl_jax.logbook import Logbook
from mtl_jax.model_config import T5Config
from mtl_jax.packing import COUNTERS
from mtl_jax.report import Ledger
from mtl_jax.run_config import RunConfig
from mtl_jax.run_directory import RunDirectory
from mtl_jax.sharing.plan import make_plan
from mtl_jax.sharing.sharing_config import Rooms

TASK_IDS = {"first": 1, "second": 2, "never drawn": 3}


@pytest.fixture
def session(tmp_path):
    run = RunDirectory(tmp_path / "run").create()
    cfg = types.SimpleNamespace(
        run=RunConfig(directory=str(run.path), log_every=2, steps=100),
        data=DataConfig(batch_size=4, inputs_length=10, targets_length=5),
        model=T5Config(vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16),
    )
    return types.SimpleNamespace(
        config=cfg,
        run=run,
        balancer=make_balancer(BalanceConfig(), None, tuple(TASK_IDS), cfg.model),
        sharing=make_plan(Rooms(), (), cfg.model),
        examples=lambda: {"first": 10, "second": None, "never drawn": 7},
    )


def guard_of(session):
    return Guard(GuardConfig(), session.run)


@pytest.fixture
def book(session):
    with Logbook(session, TASK_IDS, Ledger(), first=0, guard=guard_of(session)) as opened:
        yield opened


def metrics(losses, tokens, correct=(0, 0), **changes):
    """What the step gives, for the first two tasks; losses and hits are sums over tokens."""
    loss = np.sum(losses) / np.sum(tokens)
    scalars = {"loss": loss, "z_loss": 0.5, "grad_norm": 2.0, "learning_rate": 0.25}
    vectors = {"task_loss_sum": losses, "task_tokens": tokens, "task_correct": correct}
    padded = {name: np.array([0.0, *pair, 0.0], np.float32) for name, pair in vectors.items()}
    return scalars | padded | changes


def batch(encoder=0.0, decoder=0.0, drawn=0):
    """What the logbook reads of a batch: shares of padding, and examples so far."""
    counters: np.ndarray = np.zeros((2, len(COUNTERS)), np.int64)
    counters[:, COUNTERS.index("examples")] = drawn, 3
    of_shard = types.SimpleNamespace(
        shard=0, counters=counters, origin={"tasks": ["first", "second"]}
    )
    return types.SimpleNamespace(padding=(encoder, decoder), snapshots=(of_shard,))


def lines(session):
    text = (session.run.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_sums_its_steps_and_weighs_by_tokens(session, book):
    book.add(1, metrics((6.0, 0.0), (3, 0), (1, 0)), batch(0.1, 0.2))
    book.add(
        2,
        metrics((2.0, 30.0), (1, 10), (1, 5), z_loss=1.5, grad_norm=4.0),
        batch(0.3, 0.4, drawn=4),
    )
    assert not lines(session)  # step 2 may still be running
    book.add(3, metrics((1.0, 1.0), (1, 1)), batch(1.0, 1.0))
    (line,) = lines(session)
    expected = {
        "step": 2,
        "loss": (6 + 2 + 30) / 14,
        "accuracy": 7 / 14,
        "z_loss": 1.0,
        "grad_norm": 4.0,
        "learning_rate": 0.25,
        "target_tokens": 14,
        "encoder_padding": 0.2,
        "decoder_padding": 0.3,
        "loss/first": 8 / 4,
        "accuracy/first": 2 / 4,
        "tokens/first": 4,
        "loss/second": 3.0,
        "accuracy/second": 0.5,
        "tokens/second": 10,
        "epochs/first": 0.4,
        "effective_share/first": (3 / 3 + 1 / 11) / 2,
        "effective_share/second": (0 + 10 / 11) / 2,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert not any("never drawn" in name for name in line)
    assert "epochs/second" not in line  # nobody knows how many examples it has
    # 4 rows of 10 + 5 positions a step, of which 20 % and 30 % are padding.
    speed = line["tokens_per_second"] * line["seconds_per_step"]
    assert speed == pytest.approx(4 * (10 * 0.8 + 5 * 0.7))
    # A run that is killed now has an account of its time.
    (entry,) = json.loads((session.run.path / "ledger.json").read_text())
    assert sum(entry["seconds"].values()) == pytest.approx(entry["wall"], abs=0.01)


def test_finish_writes_what_is_left_and_tells_of_cuts(session, capsys):
    book = Logbook(session, TASK_IDS, Ledger(), first=0, guard=guard_of(session))
    for number in (1, 2, 3):
        book.add(number, metrics((number, 0.0), (1, 0)), batch())
    counters = {"examples": 50, "truncated_inputs": 20, "truncated_targets": 10}
    counters |= {"longest_input": 1234, "longest_target": 4}
    rare = counters | {"examples": 1000, "truncated_inputs": 1, "truncated_targets": 0}
    with book:
        book.finish({"first": counters, "second": rare}, {})
    assert [(line["step"], line["loss"]) for line in lines(session)] == [(2, 1.5), (3, 3.0)]
    assert json.loads((session.run.path / "data.json").read_text())["first"] == counters
    shown = capsys.readouterr().err
    assert "warning: 31 inputs or targets of 1,050 examples were cut" in shown
    assert "longest input 1,234 tokens" in shown
    assert "first (30), second (1)" in shown


def test_a_cut_in_a_hundred_examples_is_not_worth_a_warning(book, capsys):
    counters = {"examples": 1000, "truncated_inputs": 10, "truncated_targets": 0}
    book.finish({"first": counters | {"longest_input": 1234, "longest_target": 4}}, {})
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            metrics((np.nan, 1.0), (1, 1)),
            "The loss at step 7 is nan, from task first. The run stops; earlier checkpoints are "
            "untouched",
        ),
        (metrics((np.inf, np.nan), (1, 1)), "from task first, second"),
        (
            metrics((1.0, 1.0), (1, 1), grad_norm=np.float32(np.inf)),
            r"The gradient at step 7 is not finite \(norm inf\)",
        ),
    ],
)
def test_what_is_not_finite_stops_the_run(session, book, values, message):
    book.add(7, values, batch())
    with pytest.raises(UserError, match=message):
        book.flush()
    assert not lines(session)
    book.flush()  # told once; closing must not fail again


def test_evaluation_becomes_means_over_tasks_without_baselines(session, book):
    def row(dataset, metric, value):
        return {"dataset": dataset, "metric": metric, "value": value}

    means = book.write_results(
        4,
        [
            row("rte", "accuracy", 60.0),
            row("rte", "accuracy", 50.0),
            row("cb", "accuracy", 100.0),
            row("cb", "f1", 30.0),
            row("cb", "chance", 33.3),
            row("cb", "majority", 50.0),
        ],
    )
    assert means == {
        **{"accuracy": 70.0, "accuracy/rte": 55.0, "accuracy/cb": 100.0},
        **{"f1": 30.0, "f1/cb": 30.0},
    }
    (line,) = lines(session)
    assert line["step"] == 4
    assert line["eval/accuracy/rte"] == 55.0


def test_a_continued_run_drops_what_lies_behind_its_checkpoint(session):
    with Logbook(session, TASK_IDS, Ledger(), first=0, guard=guard_of(session)) as book:
        for number in (1, 2, 3, 4, 5):
            book.add(number, metrics((number, 0.0), (1, 0)), batch())
    assert [line["step"] for line in lines(session)] == [2, 4]
    with Logbook(session, TASK_IDS, Ledger(), first=3, guard=guard_of(session)) as book:
        assert book.step == 3
    assert [line["step"] for line in lines(session)] == [2]


def test_all_steps_until_a_save_have_a_line(session, book):
    """Log_every is 2: without it, a run that is killed and goes on from step 3 lacks that one."""
    for number in (1, 2, 3):
        book.add(number, metrics((6.0, 0.0), (number, 0)), batch())
    book.write()
    assert [(line["step"], line["target_tokens"]) for line in lines(session)] == [(2, 3), (3, 3)]
    book.write()
    book.add(4, metrics((6.0, 0.0), (4, 0)), batch())
    book.write()
    assert [line["step"] for line in lines(session)] == [2, 3, 4]

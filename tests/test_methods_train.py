"""Whole runs under methods through the command line: files, resumption, rates, mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_train import TASKS, assert_same, failure, flags, lines, losses, restored

from mtl_jax import build, cli, config, report, step, task_info
from mtl_jax.analysis import gradients
from mtl_jax.checkpoint import Checkpointer

# Eight devices and three tasks: three rows a device, one for each block.
GRADNORM = {
    "Data__batch_size": 24,
    "Balance__method": "GradNorm",
    "Balance__groups": "last_shared",
    "Run__log_every": 2,
}


@pytest.fixture(scope="module")
def gradnorm(tmp_path_factory):
    """A finished run under a method that needs gradients of single tasks."""
    directory = tmp_path_factory.mktemp("methods") / "gradnorm"
    assert cli.main(flags(directory, **GRADNORM)) == 0
    return directory


@pytest.mark.slow
def test_a_run_tells_weights_and_gradients_of_its_tasks(gradnorm):
    assert json.loads((gradnorm / "method.json").read_text()) == {
        "method": "GradNorm",
        "options": {"alpha": 1.5, "lr": 0.025, "floor": 0.01},
    }
    rows = losses(gradnorm)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8]  # and before the checkpoint of step 3
    for row in rows:
        shares = [row[f"effective_share/{name}"] for name in TASKS]
        np.testing.assert_allclose(sum(shares), 1.0, rtol=1e-6)
        # The lines before and after the checkpoint are of one step each, without some task perhaps.
        there = [name for name in TASKS if row["step"] in (2, 6, 8) or f"weight/{name}" in row]
        assert len(there) > 1
        # GradNorm's weights sum to the number of tasks that are there.
        assert len(there) - 1.0 <= sum(row[f"weight/{name}"] for name in there) <= len(there) + 0.1
        assert all(row[f"gradient_norm/{name}"] > 0 for name in there)
        assert 0.0 <= row["conflict_rate"] <= 1.0
        assert row["solver_fallback"] == 0.0
    assert rows[-1]["epochs/tiny_copy"] > rows[0]["epochs/tiny_copy"] > 0
    written = lines(gradnorm / "gradients.jsonl")
    assert [row["step"] for row in written] == [2, 3, 4, 6, 8]
    assert written[0]["tasks"] == list(TASKS)
    assert written[0]["groups"] == ["last decoder layer"]
    cosine = np.array(written[0]["cosine"], float)
    np.testing.assert_allclose(np.diagonal(cosine[0]), 1.0, rtol=1e-5)
    np.testing.assert_allclose(cosine[0], cosine[0].T)
    # What the report reads is what the run writes.
    assert gradients.read_gradients(gradnorm / "gradients.jsonl")
    assert "cosine" in (gradnorm / "report.html").read_text()


@pytest.mark.slow
def test_a_stopped_run_under_a_method_continues_bit_by_bit(gradnorm):
    directory = gradnorm.parent / "stopped"
    assert cli.main(flags(directory, **GRADNORM, Run__steps=3)) == 0
    assert cli.main(flags(directory, **GRADNORM)) == 0
    whole, found = restored(gradnorm, 8), restored(directory, 8)
    assert jax.tree.leaves(whole.balance)
    assert_same(whole, found)
    assert losses(directory)[-1] == losses(gradnorm)[-1]
    assert lines(directory / "gradients.jsonl")[-1] == lines(gradnorm / "gradients.jsonl")[-1]


@pytest.mark.slow
def test_a_run_looks_ahead_and_trains_as_if_it_did_not(tmp_path, capsys):
    """Training is as without (bit for bit: test_lookahead.py), and both affinities are near."""
    looks = {"Data__batch_size": 24, "Run__log_every": 4, "Balance__monitor_every": 2}
    rows = []
    for name, more in (("without", {}), ("with", {"Balance__affinity_every": 4})):
        assert cli.main(flags(tmp_path / name, **looks, **more)) == 0
        rows.append(losses(tmp_path / name))
    for plain, looked in zip(*rows, strict=True):
        assert plain == pytest.approx(looked, rel=1e-4)
    assert "for the affinity 4 forward passes" in capsys.readouterr().err
    written = lines(tmp_path / "with" / "gradients.jsonl")
    # The first and the fifth step; lines are written at the checkpoints of steps 3 and 6, too.
    assert [row["step"] for row in written if "affinity" in row] == [3, 6]
    assert all(row["lookaheads"] == 1 for row in written if "affinity" in row)
    analysis = tmp_path / "with" / "analysis"
    found, linear = (
        json.loads((analysis / name).read_text()) for name in ("lookahead.json", "affinity.json")
    )
    assert found["tasks"] == linear["tasks"] == list(TASKS)
    assert found["correlation_with_first_order"] > 0.5
    assert "measured one step ahead" in (tmp_path / "with" / "report.html").read_text()


@pytest.mark.slow
def test_the_dry_run_tells_the_cost(gradnorm, capsys):
    assert cli.main([*flags(gradnorm.parent / "dry", **GRADNORM), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "Balance: GradNorm: one backward pass over microbatches of one task each" in out
    # 15,088 parameters of 4 bytes, thrice.
    assert "0.2 MiB a device for 3 tasks' gradients" in out
    assert "3 microbatches" in out


@pytest.mark.slow
def test_rates_follow_the_method_and_a_stopped_run_goes_on_with_them(tmp_path):
    values = {
        "Balance__method": "DWA",
        "DWA__window_steps": 1,
        "DWA__temperature": 0.05,
        "Balance__follow_rates": True,
        "Eval__every": 2,
        "Checkpoint__every": 1,
        "Checkpoint__keep": 9,
    }
    whole, stopped, fixed = (tmp_path / name for name in ("whole", "stopped", "fixed"))
    assert cli.main(flags(whole, **values)) == 0
    for steps in (4, 5, 8):
        assert cli.main(flags(stopped, **values, Run__steps=steps)) == 0
    assert_same(restored(whole, 8), restored(stopped, 8))
    assert losses(whole)[-1] == losses(stopped)[-1]
    rates = json.loads((whole / "rates.json").read_text())
    assert set(rates) == set(TASKS)
    again = config.load([str(whole / "config.gin"), str(whole / "rates.gin")])
    assert dict(again.mixture.rates) == pytest.approx(rates)
    assert again.data.mixture == again.mixture.name == "found_rates"

    # From each evaluation on the stream draws by the rates of the state at that step.
    session = build.build(config.load([str(whole / "config.gin")]))
    with Checkpointer(whole / "checkpoints", read_only=True) as checkpointer:
        found = {n: checkpointer.restore(n, session.abstract_state)[:2] for n in (1, 2, 4, 5)}
    assert "rates" not in found[1][1]
    for number, evaluation in ((2, 2), (4, 4), (5, 4)):
        of_state = session.rates(found[evaluation][0])
        assert found[number][1]["rates"] == [of_state[task] for task in sorted(TASKS)]
    assert found[2][1]["rates"] != found[4][1]["rates"]
    # So other examples are drawn than without them, but for those until the first evaluation; those
    # that wait for a row come first.
    values |= {"Balance__follow_rates": False, "Run__steps": 4}
    assert cli.main(flags(fixed, **values)) == 0
    followed, not_followed = losses(whole), losses(fixed)
    assert followed[:2] == not_followed[:2]
    for row, what in ((2, "epochs"), (3, "epochs"), (3, "tokens")):
        of_tasks = [[rows[row][f"{what}/{x}"] for x in TASKS] for rows in (followed, not_followed)]
        assert of_tasks[0] != of_tasks[1]


def test_the_rate_of_a_family_is_divided_as_the_mixture_divides_it(tmp_path, monkeypatch):
    """Copy 1 and reverse 2 of one family, first of another; r = 1/2 and 1 in DWA."""
    for task, family in zip(TASKS, ("order", "choice", "order"), strict=True):
        about = dataclasses.replace(task_info.info(task), family=family)
        monkeypatch.setitem(task_info._INFOS, task, about)
    values = {"Balance__method": "DWA", "DWA__temperature": 1.0, "Balance__by": "family"}
    argv = flags(tmp_path, **values)[1:]
    session = build.build(config.load([], [word.removeprefix("--gin.") for word in argv]))
    assert session.balancer.names == ("order", "choice")
    balance = session.balancer.init()
    twice = np.full(2, 2)
    learned = dataclasses.replace(
        balance.method, newer=np.array([1.0, 3.0]), older=np.array([2.0, 3.0]), windows=twice
    )
    state = step.TrainState(0, {}, (), dataclasses.replace(balance, method=learned))
    order, choice = np.exp([0.5, 1.0]) / np.exp([0.5, 1.0]).sum()
    assert session.rates(state) == pytest.approx(
        {"tiny_copy": order / 3, "tiny_first": choice, "tiny_reverse": 2 * order / 3}, rel=1e-6
    )


@pytest.mark.slow
def test_with_one_task_a_run_under_any_method_is_plain_training_bit_by_bit(tmp_path):
    values = {"Data__mixture": "tiny_copy", "Run__steps": 3, "Eval__tasks": "()"}
    arms = {
        "": {},
        "PCGrad": {"Balance__groups": "layer"},
        "UncertaintyWeights": {"UncertaintyWeights__lr": 1.0},
        "TransferObjective": {"TransferObjective__target": "('tiny_first',)"},
    }
    for method, more in arms.items():
        given = values | more | {"Balance__method": f"{method!r}"}
        assert cli.main(flags(tmp_path / f"run{method}", **given)) == 0
    plain, *others = (tmp_path / f"run{method}" for method in arms)
    assert len({row["loss"] for row in losses(plain)}) == 3
    for other in others:
        assert losses(other) == losses(plain)
        assert_same(restored(other, 3), restored(plain, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"Balance__method": "PCGrad", "Data__batch_size": 8},
            "PCGrad needs microbatches of one task each, but a batch of 8 rows cannot be divided",
        ),
        (
            {"Balance__method": "PCGrad", "Data__batch_size": 48, "Data__blocks": 3}
            | {"Step__microbatches": 2},
            "Step.microbatches = 2 and Data.blocks = 3 must be the same",
        ),
        (
            {"Balance__method": "StaticWeights", "StaticWeights__factors": "{'tiny_cpy': 2.0}"},
            "'tiny_cpy' is none of the tasks. Did you mean 'tiny_copy'",
        ),
        ({"Balance__method": "DoReMi"}, "DoReMi.reference is empty"),
        (
            {"Balance__method": "DWA", "Balance__follow_rates": True},
            "Balance.follow_rates sets rates at evaluations: set Eval.tasks and Eval.every",
        ),
        ({"CAGrad__c": 0.3}, "CAGrad.c is a field of a method that is not chosen"),
        (
            {"Balance__method": "TaskMean", "Balance__groups": "layer"},
            "Balance.groups is for methods that look at the gradients of single tasks",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(changes, message, tmp_path, capsys):
    directory = tmp_path / "run"
    assert message in failure(capsys, flags(directory, **changes))
    assert not directory.exists()


@pytest.mark.slow
def test_a_comparison_trains_what_is_missing_and_writes_its_page(tmp_path, capsys):
    """Two methods and three tasks alone; the second call only compares."""
    given = {"Run__steps": 4, "Eval__tasks": "('tiny',)"}
    arms = "{'plain': [], 'mean': ['Balance.method=TaskMean']}"
    root = tmp_path / "compared"
    words = flags(root, **given)[1:]
    words = ["compare", *words, f"--gin.Compare.arms={arms}", "--gin.Compare.seeds=1"]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert "TaskMean" in table
    assert {path.name for path in root.iterdir() if path.is_dir()} >= {
        *("plain-seed0", "mean-seed0"),
        *(f"single-{task}-seed0" for task in TASKS),
    }
    assert (root / "comparison.html").exists()
    comparison = json.loads((root / "comparison.json").read_text())
    assert len(comparison["runs"]) == 5
    times = {path: path.stat().st_mtime_ns for path in root.rglob("checkpoints/4/*")}
    assert cli.main(words) == 0
    assert capsys.readouterr().out == table
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("checkpoints/4/*")}
    # A run of the comparison can be repeated alone.
    alone = config.load([str(root / "single-tiny_copy-seed0" / "config.gin")])
    assert alone.data.mixture == "tiny_copy"
    assert report.read_jsonl(root / "single-tiny_copy-seed0" / "results.jsonl")

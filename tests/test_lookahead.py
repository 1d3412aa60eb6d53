"""TAG's affinity in the train step: against steps that are really taken, and without a trace."""

import csv
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balanced_steps import CFG, KEY, NAMES, PARAMS, SETTINGS, balancer, batch, initial, stepper
from jax.flatten_util import ravel_pytree
from synthetic_runs import TASKS, add_gradients, write_run
from test_report import Page

from mtl_jax import cli, objective
from mtl_jax.analysis import affinity
from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import describe_cost
from mtl_jax.balanced import Problem
from mtl_jax.errors import UserError

FLAT, UNRAVEL = ravel_pytree(PARAMS)


@functools.cache
def affinity_in_step(cfg=CFG, names=NAMES, **values):
    """From a batch and a rate to what the step tells of affinity and Gramian."""
    chosen = balancer(names=names, **({"monitor_every": 1, "affinity_every": 1} | values))

    def compute(params, rows, rate):
        problem = Problem(cfg, SETTINGS, chosen, {}, None, rate=rate)
        rows = problem.prepared(rows)
        seen = problem.observations(rows, jnp.int32(0), KEY)
        _, sums, _, told = problem.gradients(params, rows, chosen.init(), seen)
        mean = sums["task_loss_sum"][1:] / sums["task_tokens"][1:]
        return told["affinity"], told["gram"], mean

    return jax.jit(compute)


def losses(flat, rows):
    """Mean losses of the tasks from flat parameters, the batch in one piece."""
    plain = objective.StepConfig(z_loss=1e-3)
    sums = objective.loss_sum(CFG, plain, 3, UNRAVEL(flat), rows)[1]
    return sums["task_loss_sum"][1:] / sums["task_tokens"][1:]


def loss_of(task, flat, rows):
    """The mean loss of one task, by its tokens alone; gradients go through it."""
    mine = rows["decoder_loss_weights"] * (rows["decoder_task_ids"] == task)
    plain = objective.StepConfig(z_loss=1e-3)
    total = objective.loss_sum(CFG, plain, 3, UNRAVEL(flat), rows | {"decoder_loss_weights": mine})[
        0
    ]
    return total / mine.sum()


@functools.cache
def by_callables(rate):
    """`measure_affinity`: each step taken on the host, each loss computed anew."""
    rows = batch()
    gradients = jax.jit(
        lambda x: [jax.grad(functools.partial(loss_of, t))(x, rows) for t in (1, 2, 3)]
    )
    found = gradients(FLAT)
    compiled = jax.jit(functools.partial(losses, rows=rows))
    return affinity.measure_affinity(
        lambda flat: np.asarray(compiled(jnp.asarray(flat, jnp.float32)), np.float64),
        lambda flat, task: np.asarray(found[task], np.float64),
        np.asarray(FLAT, np.float64),
        rate,
    )


@pytest.mark.parametrize("rate", [0.1, 0.001])
def test_it_is_what_steps_that_are_taken_do(rate):
    """Ratios of float32 losses, near 1: 1e-6 is sixteen of their last places (measured: 3e-7)."""
    found, _, _ = affinity_in_step()(PARAMS, batch(), jnp.float32(rate))
    expected = by_callables(rate)
    assert np.abs(expected).max() > 0.02
    assert np.abs(expected - expected.T).max() > 0.002, "affinity has a direction"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_small_steps_approach_the_gramian_form():
    """A tenth of the rate, a tenth of the relative error."""
    errors = []
    for rate in (1e-3, 1e-4):
        found, gram, mean = affinity_in_step()(PARAMS, batch(), jnp.float32(rate))
        linear = affinity.gramian_affinity(np.asarray(gram[0]), np.asarray(mean), rate)
        errors.append(np.abs(found - linear).max() / np.abs(linear).max())
    # Of the second one 1e-7 / 2e-3 is rounding.
    assert errors[1] < 0.005
    assert 9.0 < errors[0] / errors[1] < 11.0


@pytest.mark.slow
def test_gradients_of_any_rows_give_the_same():
    found = [
        affinity_in_step(task_gradients=how)(PARAMS, batch(), jnp.float32(0.1))[0]
        for how in ("microbatch", "vmap")
    ]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_in_bfloat16_only_the_gradients_are_rounded():
    """Losses in bfloat16 would differ by their last place, 4e-3 of them, or not at all."""
    half = dataclasses.replace(CFG, dtype="bfloat16")
    found, expected = (
        np.asarray(affinity_in_step(cfg)(PARAMS, batch(), jnp.float32(1e-3))[0])
        for cfg in (half, CFG)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max())


def test_an_absent_task_has_none_and_changes_none():
    rows = batch(tasks=(1, 2, 1, 2))
    found = np.asarray(affinity_in_step()(PARAMS, rows, jnp.float32(0.1))[0])
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, 2]).all()
    two = affinity_in_step(names=NAMES[:2])(PARAMS, rows, jnp.float32(0.1))[0]
    np.testing.assert_allclose(found[:2, :2], two, rtol=0, atol=1e-6)


# XLA divides a program for a CPU among several runs of its code generator, which round some last
# places by what else is in their part.
ONE_PART = {"xla_cpu_parallel_codegen_split_count": 1}


@pytest.mark.parametrize(
    ("method", "looks"),
    [
        (None, {"monitor_every": 1}),
        pytest.param("PCGrad", {}, marks=pytest.mark.slow),
        pytest.param("MGDA", {"task_gradients": "vmap"}, marks=pytest.mark.slow),
        pytest.param("FAMO", {"monitor_every": 2}, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_bit_for_bit(method, looks):
    """Two of four steps look ahead; parameters, moments and metrics are as if none did."""
    found = []
    for values in (looks, looks | {"affinity_every": 2}):
        chosen = balancer(method, **values)
        state, told = initial(chosen), []
        update = jax.jit(stepper(chosen)).lower(state, batch(), KEY).compile(ONE_PART)
        for number in range(4):
            state, metrics = update(state, batch(seed=number), KEY)
            told.append(metrics)
        found.append((state, told))
    (without, plain), (with_it, looked) = found
    for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(with_it), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(plain, looked, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    known = [bool(np.isfinite(metrics["affinity"]).any()) for metrics in looked]
    assert known == [True, False, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing looks at them: set Balance.monitor_every = 4, too"),
        ({"monitor_every": 3}, "must be a multiple of Balance.monitor_every = 3"),
        ({"method": "PCGrad", "every_n_steps": 8}, "multiple of Balance.every_n_steps = 8"),
        ({"monitor_every": 2, "task_gradients": "sketch"}, "which 'sketch' does not keep"),
    ],
)
def test_where_there_are_no_gradients_to_go_along(values, message):
    with pytest.raises(UserError, match=message):
        BalanceConfig(affinity_every=4, **values)


def test_the_cost_is_told():
    said = describe_cost(balancer(monitor_every=5, affinity_every=10), 2**22)
    assert "; for the affinity 4 forward passes, about 1.3 x the time of a plain step more" in said
    assert said.endswith("at every 10th step, and 4.0 MiB a device")
    assert "affinity" not in describe_cost(balancer(monitor_every=5), 2**22)


COSINES = np.array(
    [[1, 0.1, 0.5, 0.6], [0.1, 1, -0.4, -0.2], [0.5, -0.4, 1, 0.0], [0.6, -0.2, 0.0, 1]]
)


def test_measured_affinity_stands_beside_the_gramian_form(tmp_path):
    """Groups are those of the measured one, which is made to differ."""
    folder = write_run(tmp_path / "run", dict.fromkeys(TASKS, 50.0))
    ahead = 0.02 * COSINES + 0.001 * np.arange(16).reshape(4, 4)
    ahead[1, 2] = ahead[2, 1] = 0.03
    add_gradients(folder, COSINES, lookahead_NN=ahead, jitter=0.0)
    assert cli.main(["report", str(folder)]) == 0
    found = json.loads((folder / "analysis" / "lookahead.json").read_text())
    np.testing.assert_allclose(found["affinity"], ahead)
    assert found["lines"] == 15
    assert found["groups"] == [["nli", "qa", "sentiment", "topic"]]
    linear = json.loads((folder / "analysis" / "affinity.json").read_text())
    assert linear["groups"] == [["nli", "sentiment", "topic"], ["qa"]]
    assert linear["lines"] == 30
    pairs = ~np.eye(4, dtype=bool)
    expected = np.corrcoef(COSINES[pairs], ahead[pairs])[0, 1]
    assert found["correlation_with_first_order"] == pytest.approx(expected)
    with (folder / "analysis" / "lookahead.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 * 16
    assert (rows[1]["task"], rows[1]["onto"], rows[1]["step"]) == ("nli", "qa", "20")
    assert float(rows[1]["affinity"]) == pytest.approx(ahead[0, 1])
    assert float(rows[1]["first_order"]) == pytest.approx(0.02 * COSINES[0, 1])
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for fact in (
        "measured one step ahead", "to first order, from the Gramians", "as the mean over 15 log",
        f"The Gramians propose others; over pairs of tasks both forms correlate at {expected:.2f}.",
        "analysis/lookahead.csv",
    ):  # fmt: skip
        assert fact in page.text, fact

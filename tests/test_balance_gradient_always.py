"""What holds for every gradient-side method: absent tasks, scales, orders, bad input, descent."""

import dataclasses

import balance_cases as cases
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from balance_cases import GOLDEN

from mtl_jax.balance.common_descent import CAGrad
from mtl_jax.balance.method import METHODS

pytestmark = pytest.mark.slow


def start(name, tasks):
    """A state of one group that is not the initial one: after two steps with all tasks."""
    state = METHODS[name]().init(tasks, 1)
    for seed in (100, 101):
        seen = cases.observe(
            cases.gradients("conflict", tasks, seed), seed=seed, losses=np.arange(tasks) + seed
        )
        _, state, _ = cases.solve(name, seen, state)
    return state


def without(state, tasks, kept):
    """The state of the kept tasks alone: every axis of N entries is a task's."""

    def cut(leaf):
        leaf = np.asarray(leaf)
        for axis in range(1, leaf.ndim):
            leaf = leaf.take(kept, axis=axis)
        return jnp.asarray(leaf)

    return jax.tree.map(cut, state)


@pytest.mark.parametrize("name", cases.ALL)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from(["normal", "mild", "conflict"]), st.data())
@hypothesis.settings(deadline=None, max_examples=15)
def test_absent_tasks_do_not_exist(name, seed, family, data):
    """Weights and states are those of a batch, and a run, that has only the present tasks.

    To 1e-4: the same sums in another order, amplified where gradients nearly cancel.
    """
    present = data.draw(st.sampled_from(PATTERNS))
    kept = np.flatnonzero(present)
    jacobian, losses = cases.gradients(family, 5, seed), 1 + np.arange(5.0)
    state = start(name, 5)
    seen = cases.observe(jacobian, present=present, seed=seed, losses=losses)
    # Absent tasks' entries are not looked at, whatever stands there.
    both = present[:, None] & present[None, :]
    seen = dataclasses.replace(seen, gram=jnp.where(both, seen.gram, 7.0))
    weights_KN, after, _ = cases.solve(name, seen, state)
    fewer = cases.observe(jacobian[kept], seed=seed, losses=losses[kept])
    expected_KN, expected_after, _ = cases.solve(name, fewer, without(state, 5, kept))
    assert not np.any(weights_KN[:, ~present])
    np.testing.assert_allclose(weights_KN[:, kept], expected_KN, rtol=1e-4, atol=1e-4)
    for new, expected in zip(
        jax.tree.leaves(without(after, 5, kept)), jax.tree.leaves(expected_after), strict=True
    ):
        np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-5)
    gone = np.flatnonzero(~present)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[:, gone], np.asarray(old)[:, gone])


PATTERNS = [
    np.array(pattern, bool)
    for pattern in ([1, 1, 0, 1, 1], [0, 1, 0, 1, 0], [1, 0, 1, 1, 0], [0, 0, 1, 1, 1])
]


@pytest.mark.parametrize("name", cases.ALL)
def test_one_task_alone_has_weight_one(name):
    for jacobian in (cases.gradients("normal", 3, 0), 1e-20 * cases.gradients("normal", 3, 0)):
        seen = cases.observe(jacobian, present=[False, True, False])
        weights_KN, state, fallen = cases.solve(name, seen)
        np.testing.assert_array_equal(weights_KN, [[0.0, 1.0, 0.0]])
        assert fallen == 0
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def bad(what):
    jacobian = cases.gradients("normal", 3, 0)
    seen = cases.observe(jacobian)
    match what:
        case "zeros":
            gram = 0 * seen.gram
        case "too small":
            gram = 1e-34 * seen.gram
        case "nan":
            gram = seen.gram.at[0, 0, 1].set(jnp.nan)
        case "infinite":
            gram = seen.gram.at[0, 2, 2].set(jnp.inf)
        case "overflow":
            gram = jnp.full_like(seen.gram, 3e38)
    return dataclasses.replace(seen, gram=gram)


@pytest.mark.parametrize("what", ["zeros", "too small", "nan", "infinite", "overflow"])
@pytest.mark.parametrize("name", cases.ALL)
def test_what_cannot_be_solved_falls_back_on_the_mean(name, what):
    """One group of two is bad: its weights are the mean's, its state stays, it is counted."""
    groups = 1 if name == "GradNorm" else 2
    good, seen = cases.observe(cases.gradients("normal", 3, 0)), bad(what)
    if groups == 2:
        seen = dataclasses.replace(seen, gram=jnp.concatenate([seen.gram, good.gram]))
    state = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * groups), start(name, 3))
    weights_KN, after, fallen = cases.solve(name, seen, state)
    assert fallen == 1
    np.testing.assert_array_equal(weights_KN[0], np.full(3, np.float32(1 / 3)))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
    if groups == 2:
        assert np.abs(weights_KN[1] - 1 / 3).max() > 1e-3


@pytest.mark.parametrize("name", cases.ALL)
def test_extreme_but_valid_gradients_are_solved(name):
    """Scales of 1e-12 and 1e15, one zero gradient, one gradient twice, one and its negative."""
    usual = cases.gradients("normal", 4, 1)
    zero = usual * np.array([[1], [1], [0], [1]])
    twice = usual[[0, 1, 1, 2]]
    against = np.stack([usual[0], -usual[0], usual[1], usual[2]])
    for jacobian in (1e-12 * usual, 1e15 * usual, zero, twice, against):
        weights_KN, _, fallen = cases.solve(name, cases.observe(jacobian))
        assert fallen == 0
        d = weights_KN[0] @ jacobian
        # No method's update is longer than all unit gradients in a row, times its scale.
        longest = np.abs(weights_KN).sum() if name in ("NashMTL", "IMTLG", "GradVac") else 4
        assert np.linalg.norm(d) <= longest * np.linalg.norm(jacobian, axis=1).sum()


@pytest.mark.parametrize("name", [n for n in cases.DETERMINISTIC if n not in ("IMTLG", "NashMTL")])
def test_updates_with_a_zero_or_repeated_gradient(name):
    """A zero gradient: known results. The same gradient twice: both have the same weight."""
    usual = cases.gradients("conflict", 3, 2)
    zero = np.concatenate([usual[:2], np.zeros((1, 20))])
    d = cases.solve(name, cases.observe(zero))[0][0] @ zero
    match name:
        case "MGDA":  # zero lies in the hull
            np.testing.assert_array_equal(d, np.zeros(20))
        case "UPGrad" | "AlignedMTL":  # the mean over three
            two = cases.solve(name, cases.observe(usual[:2]))[0][0] @ usual[:2]
            np.testing.assert_allclose(d, two * 2 / 3, atol=1e-5)
    twice = usual[[0, 1, 1, 2]]
    weights_N = cases.solve(name, cases.observe(twice))[0][0]
    np.testing.assert_allclose(weights_N[1], weights_N[2], atol=1e-4)


def test_cagrad_with_a_zero_gradient_changes_just_so_much_that_nobody_loses():
    """The worst gain is at most that of the zero gradient: the projection on the dual cone."""
    jacobian = cases.gradients("conflict", 3, 2) * np.array([[1.0], [0.2], [0.0]])
    g_0 = jacobian.mean(axis=0)
    units = jacobian[:2] / np.linalg.norm(jacobian[:2], axis=1, keepdims=True)
    step = scipy.optimize.nnls(units.T, -g_0)[0] @ units
    assert 0.1 < np.linalg.norm(step) / np.linalg.norm(g_0) < 0.9
    d = cases.solve(CAGrad(c=0.9), cases.observe(jacobian))[0][0] @ jacobian
    np.testing.assert_allclose(d, g_0 + step, atol=1e-5)


@pytest.mark.parametrize("name", cases.DETERMINISTIC)
@hypothesis.given(st.permutations(range(4)), st.integers(0, 1000), st.floats(-5, 5))
@hypothesis.settings(deadline=None, max_examples=10)
def test_order_and_common_scale_do_not_matter(name, order, seed, log_scale):
    order, scale = np.array(order), 10.0**log_scale
    jacobian = cases.gradients("mild", 4, seed)
    weights_N = cases.solve(name, cases.observe(jacobian))[0][0]
    moved_N = cases.solve(name, cases.observe(scale * jacobian[order]))[0][0]
    moved_N = moved_N * (scale if name == "NashMTL" else 1)
    tolerance = 1e-2 if name == "AlignedMTL" else 1e-4  # its smallest eigenvalue: 1e-4 of the rest
    np.testing.assert_allclose(moved_N, weights_N[order], rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("name", cases.ALL)
def test_same_key_same_bits(name):
    jacobians = [
        cases.gradients("conflict", 4, seed) for seed in range(1 if name == "GradNorm" else 3)
    ]
    seen = cases.observe(*jacobians, seed=5)
    state = METHODS[name]().init(4, len(jacobians))
    once, again = (jax.jit(METHODS[name]().weights)(state, seen)[0] for _ in range(2))
    np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize("name", cases.RANDOM)
def test_keys_and_groups_have_orders_of_their_own(name):
    jacobian = cases.gradients("conflict", 4, 0)
    seen = cases.observe(*[jacobian] * 8, seed=1)
    weights_KN = cases.solve(name, seen)[0]
    assert len(np.unique(weights_KN.round(5), axis=0)) > 3
    other_KN = cases.solve(name, cases.observe(*[jacobian] * 8, seed=2))[0]
    assert np.abs(weights_KN - other_KN).max() > 1e-3


def descend(name, hessians, centres, steps=400, rate=0.05):
    """Where gradient descent on quadratics `(x - a)'H(x - a) / 2` ends."""
    method = METHODS[name]()
    blank = cases.observe(np.eye(len(centres)))
    hessians, centres = jnp.float32(hessians), jnp.float32(centres)

    def jacobian(x):
        return jnp.einsum("tpq,tq->tp", hessians, x[None] - centres)

    def step(number, x):
        rows = jacobian(x)
        rng = jax.random.fold_in(blank.rng, number)
        seen = dataclasses.replace(blank, gram=(rows @ rows.T)[None], rng=rng)
        weights_KN, _, _ = method.weights(method.init(len(centres), 1), seen)
        return x - rate * weights_KN[0] @ rows

    x = jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, x))(jnp.ones(centres.shape[1]))
    return np.asarray(x, np.float64), np.asarray(jacobian(x), np.float64)


HESSIANS = [np.diag([1.0, 2.0, 3.0]), np.diag([3.0, 1.0, 0.5]), np.diag([0.5, 2.0, 2.0])]
CENTRES = [[2.0, 0.0, 1.0], [-1.0, 3.0, 0.0], [0.0, -1.0, -2.0]]


def test_cagrad_converges_to_the_minimum_of_the_mean_loss():
    """And so tells a right one from one that only looks right: the others stop elsewhere."""
    optimum = np.linalg.solve(np.sum(HESSIANS, axis=0), np.einsum("tpq,tq->p", HESSIANS, CENTRES))
    x, _ = descend("CAGrad", HESSIANS, CENTRES)
    np.testing.assert_allclose(x, optimum, atol=1e-4)
    for name in ("MGDA", "UPGrad", "PCGrad"):
        x, _ = descend(name, HESSIANS, CENTRES)
        assert np.abs(x - optimum).max() > 0.05


@pytest.mark.parametrize("name", ["MGDA", "UPGrad", "PCGrad", "CAGrad", "AlignedMTL"])
def test_descent_ends_where_no_direction_helps_all(name):
    """The shortest vector of the gradients' hull vanishes: from 1.4 to below 1e-2."""
    _, rows = descend(name, HESSIANS, CENTRES)
    # Any short convex combination proves it.
    weights_N = cases.solve("MGDA", cases.observe(rows))[0][0]
    np.testing.assert_allclose(weights_N.sum(), 1, rtol=1e-6)
    assert weights_N.min() >= 0
    assert np.linalg.norm(weights_N @ rows) < 1e-2


def test_traced_under_vmap():
    """Over batches of observations, as over groups: the golden example at four scales."""
    seen = cases.observe(GOLDEN)
    scales = jnp.array([1.0, 2.0, 3.0, 4.0])
    grams = scales[:, None, None, None] * seen.gram[None]
    method = METHODS["CAGrad"]()
    found = jax.vmap(lambda gram: method.weights((), dataclasses.replace(seen, gram=gram))[0])(
        grams
    )
    expected = np.tile(cases.solve("CAGrad", seen)[0], (4, 1, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)

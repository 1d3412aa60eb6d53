"""Gradient-side methods against NumPy from the papers, golden values, and what must always hold."""

import balance_cases as cases
import balance_oracles as oracles
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balance_cases import GOLDEN

from mtl_jax.balance.common_descent import CAGrad
from mtl_jax.balance.method import METHODS
from mtl_jax.balance.solvers import nonnegative_qp
from mtl_jax.balance.surgery import GradVac, PCGrad, visiting_order
from mtl_jax.errors import UserError

pytestmark = pytest.mark.slow

# Combined gradients of GOLDEN that TorchJD publishes and LibMTL reproduces (all but AlignedMTL), to
# the four digits published. UPGrad's carries TorchJD's regularisation of 1e-4, so it is a bit off;
# NashMTL's has norm sqrt(2), which is FairGrad(alpha=1) there.
GOLDENS = {
    "PCGrad": [0.5848, 3.8012, 3.8012],
    "GradVac": [0.5848, 3.8012, 3.8012],
    "MGDA": [0.0, 1.0, 1.0],
    "CAGrad": [0.1835, 1.2041, 1.2041],
    "IMTLG": [0.0767, 1.0, 1.0],
    "NashMTL": [0.0766, 0.9985, 0.9985],
    "UPGrad": [0.2929, 1.9004, 1.9004],
    "AlignedMTL": [0.2133, 0.9673, 0.9673],
}
ORACLES = {
    "MGDA": oracles.mgda,
    "UPGrad": oracles.upgrad,
    "CAGrad": lambda jacobian: oracles.cagrad(jacobian, 0.5),
    "NashMTL": oracles.nash,
    "IMTLG": oracles.imtlg,
    "AlignedMTL": oracles.aligned_mtl,
}
SEEDS = range(4)
# Relative distances, float32 against float64. Where gradients nearly cancel
# ("opposed": an eigenvalue of 1e-3) or depend on each other ("flat"), the rounding of G decides:
# the square of a length is known to 6e-8 x (sum of y)^2, a length near zero to the root of that.
TOLERANCES = {
    "normal": 1e-5,
    "mild": 1e-5,
    "scaled": 1e-5,
    "wide": 1e-5,
    "conflict": 1e-5,
    "opposed": 1e-3,
    "flat": 1e-3,
}
# Not where a method is another one than its paper's: dependent gradients have no solution in some,
# and AlignedMTL leaves out what float32 cannot hold (its own test is below).
EXCEPT = {
    ("NashMTL", "flat"),
    ("IMTLG", "flat"),
    ("AlignedMTL", "flat"),
    ("AlignedMTL", "scaled"),
    ("AlignedMTL", "wide"),
    ("AlignedMTL", "mild"),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_values(name):
    weights_KN, _, fallen = cases.solve(name, cases.observe(GOLDEN))
    np.testing.assert_allclose(
        weights_KN[0] @ GOLDEN, GOLDENS[name], atol=7e-4 if name == "UPGrad" else 1e-4
    )
    assert fallen == 0


def test_nash_mtl_is_that_of_the_libraries_but_for_its_length():
    """TorchJD and LibMTL clip it to `max_norm`, 1 by default; the paper's has norm sqrt(tasks)."""
    d = cases.solve("NashMTL", cases.observe(GOLDEN))[0][0] @ GOLDEN
    np.testing.assert_allclose(d / np.linalg.norm(d), [0.0542, 0.7061, 0.7061], atol=5e-5)


# Those that solve a problem by iteration, at as many tasks as well.
@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        *((name, tasks) for name in ORACLES for tasks in (2, 3, 4, 8)),
        *((name, 16) for name in ("MGDA", "UPGrad", "CAGrad", "NashMTL")),
    ],
)
def test_methods_equal_their_papers_in_numpy(name, tasks):
    """All families and seeds at once, as groups of parameters."""
    named = [(f, s) for f in TOLERANCES if (name, f) not in EXCEPT for s in SEEDS]
    jacobians = [cases.gradients(family, tasks, seed) for family, seed in named]
    weights_KN, _, fallen = cases.solve(name, cases.observe(*jacobians))
    assert fallen == 0
    for (family, seed), jacobian, weights_N in zip(named, jacobians, weights_KN, strict=True):
        found, expected = weights_N @ jacobian, ORACLES[name](jacobian)
        # Of dependent gradients the update may be zero; else its own length is the measure, that of
        # MGDA or NashMTL is the shortest gradient's.
        flat = family == "flat"
        distance = cases.far(found, expected, jacobian) if flat else cases.off(found, expected)
        assert distance < TOLERANCES[family], (family, seed)


@pytest.mark.parametrize("tasks", [2, 3, 4, 8])
def test_pcgrad_is_the_loop_of_its_paper(tasks):
    named = [(family, seed) for family in TOLERANCES for seed in SEEDS]
    jacobians = [cases.gradients(family, tasks, seed) for family, seed in named]
    seen = cases.observe(*jacobians)
    weights_KN, _, _ = cases.solve(PCGrad(orders=1), seen)
    mean_KN, _, _ = cases.solve(PCGrad(orders=3), seen)
    for number, (jacobian, (family, _)) in enumerate(zip(jacobians, named, strict=True)):
        rng = jax.random.fold_in(seen.rng, number)
        orders = [visiting_order(jax.random.fold_in(rng, i), seen.present) for i in range(3)]
        tolerance = TOLERANCES[family]
        loops = [oracles.pcgrad(jacobian, np.asarray(order_NN)) for order_NN in orders]
        assert cases.far(weights_KN[number] @ jacobian, loops[0], jacobian) < tolerance
        mean = np.mean(loops, axis=0)
        assert cases.far(mean_KN[number] @ jacobian, mean, jacobian) < tolerance


def test_visiting_orders_are_all_equally_likely():
    """4 tasks: 24 orders of a row; chi-square of 4800 draws, 23 degrees: 58 has p = 1e-4."""
    keys = jax.random.split(jax.random.key(0), 1200)
    orders = jax.vmap(lambda key: visiting_order(key, jnp.ones(4, bool)))(keys)
    rows = np.asarray(orders).reshape(-1, 4)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(4), (4800, 1)))
    _, counts = np.unique(rows @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 58


def test_gradvac_is_the_loop_of_its_paper_over_steps_with_absent_tasks():
    method, phi = GradVac(beta=0.3), np.zeros((4, 4))
    state = method.init(4, 1)
    for number in range(6):
        present = np.array([True, number != 2, True, number not in (1, 4)])
        jacobian = cases.gradients("conflict" if number % 2 else "normal", 4, number)
        seen = cases.observe(jacobian, present=present, seed=number)
        order = np.asarray(visiting_order(jax.random.fold_in(seen.rng, 0), seen.present))
        weights_KN, state, _ = cases.solve(method, seen, state)
        here = np.flatnonzero(present)
        rank = np.cumsum(present) - 1
        visits = [[rank[j] for j in order[i] if present[j]] for i in here]
        expected, phi[np.ix_(here, here)] = oracles.gradvac(
            jacobian[here], phi[np.ix_(here, here)], visits, 0.3
        )
        assert cases.far(weights_KN[0] @ jacobian, expected, jacobian) < 1e-5
        np.testing.assert_allclose(state[0], phi, atol=1e-5)


def test_gradvac_raises_a_cosine_to_its_target():
    """For two tasks with a target of 0.4 and beta small, each changed gradient has that cosine."""
    phi = jnp.full((1, 2, 2), 0.4)
    weights_KN, _, _ = cases.solve(GradVac(), cases.observe(GOLDEN), phi)
    first, second = GOLDEN
    # The coefficients of the sum: 1 + what the other took. So each changed gradient is known.
    changed = (first + (weights_KN[0, 1] - 1) * second, second + (weights_KN[0, 0] - 1) * first)
    for g, other in zip(changed, (second, first), strict=True):
        cosine = g @ other / np.linalg.norm(g) / np.linalg.norm(other)
        np.testing.assert_allclose(cosine, 0.4, atol=1e-6)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
def test_cagrad_has_no_duality_gap(c):
    """A certificate that needs no solver; weights are float32, hence 1e-5 of the objective."""
    families = ("normal", "mild", "conflict")
    jacobians = [cases.gradients(family, 4, seed) for family in families for seed in SEEDS]
    weights_KN, _, _ = cases.solve(CAGrad(c=c), cases.observe(*jacobians))
    for jacobian, weights_N in zip(jacobians, weights_KN, strict=True):
        gap, radius = oracles.cagrad_gap(jacobian, weights_N, c)
        assert abs(gap) < 1e-5
        np.testing.assert_allclose(radius, 1, atol=1e-5)


def test_cagrad_of_radius_zero_is_the_mean_and_rescaling_divides():
    seen = cases.observe(cases.gradients("normal", 4, 0))
    np.testing.assert_array_equal(cases.solve(CAGrad(c=0.0), seen)[0], np.full((1, 4), 0.25))
    plain, rescaled = (cases.solve(CAGrad(0.5, rescale), seen)[0] for rescale in (False, True))
    np.testing.assert_allclose(rescaled, plain / 1.25, rtol=1e-6)


@hypothesis.given(st.integers(0, 10**6), st.floats(-6, 6))
@hypothesis.settings(deadline=None, max_examples=40)
def test_without_conflict_surgery_changes_nothing(seed, log_scale):
    jacobian = np.abs(cases.gradients("mild", 4, seed)) * 10.0**log_scale
    seen = cases.observe(jacobian, seed=seed)
    np.testing.assert_array_equal(cases.solve("PCGrad", seen)[0], np.ones((1, 4)))
    np.testing.assert_array_equal(cases.solve("UPGrad", seen)[0], np.full((1, 4), 0.25))


@pytest.mark.parametrize("family", ["normal", "scaled", "conflict"])
def test_two_tasks_upgrad_is_half_of_pcgrad(family):
    seen = cases.observe(*[cases.gradients(family, 2, seed) for seed in range(20)])
    np.testing.assert_allclose(
        2 * cases.solve("UPGrad", seen)[0], cases.solve("PCGrad", seen)[0], rtol=1e-5
    )


def test_upgrad_conflicts_with_no_task_and_is_linear_in_each_scale():
    jacobian = cases.gradients("conflict", 4, 0)
    weights_N = cases.solve("UPGrad", cases.observe(jacobian))[0][0]
    assert np.min(jacobian @ (weights_N @ jacobian)) > -1e-5
    scales = [np.array([s, 1, 2, 5]) for s in (1, 2, 3)]
    found = [
        w @ (s[:, None] * jacobian)
        for s in scales
        for w in cases.solve("UPGrad", cases.observe(s[:, None] * jacobian))[0]
    ]
    np.testing.assert_allclose(found[0] + found[2], 2 * found[1], atol=1e-4)


def test_mgda_is_optimal_and_equals_the_closed_form_of_two():
    first, second = GOLDEN
    w = np.clip((second - first) @ second / np.sum((second - first) ** 2), 0, 1)
    weights_N = cases.solve("MGDA", cases.observe(GOLDEN))[0][0]
    np.testing.assert_allclose(weights_N, [w, 1 - w], atol=1e-6)
    jacobian = cases.gradients("mild", 8, 0)
    weights_N = cases.solve("MGDA", cases.observe(jacobian))[0][0]
    gains = jacobian @ (weights_N @ jacobian)
    np.testing.assert_allclose(weights_N.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(gains[weights_N > 0], gains.min(), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_nash_gains_and_imtlg_projections_are_equal(scale):
    jacobian = scale * cases.gradients("mild", 4, 3)
    seen = cases.observe(jacobian)
    nash = cases.solve("NashMTL", seen)[0][0]
    np.testing.assert_allclose(nash * (jacobian @ jacobian.T @ nash), np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(nash @ jacobian), 2, rtol=1e-5)
    imtlg = cases.solve("IMTLG", seen)[0][0]
    projections = jacobian @ (imtlg @ jacobian) / np.linalg.norm(jacobian, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-4)
    np.testing.assert_allclose(imtlg.sum(), 1, rtol=1e-5)


def test_aligned_mtl_balances_what_float32_holds():
    weights_N = cases.solve("AlignedMTL", cases.observe(3 * np.eye(4)))[0][0]
    np.testing.assert_allclose(weights_N, np.full(4, 0.25), rtol=1e-6)
    # Norms 100 apart: eigenvalues 1e4 apart, so that the smallest has three digits.
    jacobian = np.diag([1.0, 0.1, 0.01]) @ cases.gradients("normal", 3, 0)
    d = cases.solve("AlignedMTL", cases.observe(jacobian))[0][0] @ jacobian
    expected = oracles.aligned_mtl(jacobian)
    assert np.linalg.norm(d - expected) < 3e-3 * np.linalg.norm(expected)
    # A gradient 1e5 times smaller is left out, but for its weight as one of three.
    jacobian = np.diag([1.0, 0.5, 1e-5]) @ np.linalg.qr(cases.gradients("normal", 20, 0))[0][:3]
    d = cases.solve("AlignedMTL", cases.observe(jacobian))[0][0] @ jacobian
    expected = 0.5 * (jacobian[0] + jacobian[1] / 0.5) / 3
    np.testing.assert_allclose(d, expected, atol=1e-5)


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=25)
def test_the_qp_meets_its_conditions_of_optimality(data):
    """y, Hy + q >= 0 and y (Hy + q) = 0, to rounding: 1e-5 of the terms."""
    seed, rank = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 8))
    rng = np.random.default_rng(seed)
    units = rng.normal(size=(6, rank))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    hessian, valid = units @ units.T, rng.random(6) < 0.8
    # In the span of the rows: the problem is bounded.
    linear = units @ rng.normal(size=rank) * 10.0 ** data.draw(st.integers(-6, 6))
    y = np.asarray(
        nonnegative_qp(jnp.float32(hessian), jnp.float32(linear), jnp.asarray(valid)), np.float64
    )
    assert np.all(y >= 0)
    assert not np.any(y[~valid])
    slack = (hessian @ y + linear)[valid]
    size = np.abs(linear).max() + y.sum()
    assert slack.min(initial=0) > -1e-5 * size
    assert np.abs(slack * y[valid]).max(initial=0) < 1e-5 * size**2


def test_options_are_checked():
    names = ["a", "b"]
    for name, field, value in (
        ("PCGrad", "orders", 0),
        ("GradVac", "beta", 0.0),
        ("GradVac", "beta", 1.5),
        ("CAGrad", "c", -0.1),
        ("CAGrad", "c", float("nan")),
        ("GradNorm", "alpha", -1.0),
        ("GradNorm", "lr", 0.0),
        ("GradNorm", "floor", float("inf")),
    ):
        with pytest.raises(UserError, match=rf"{name}\.{field} "):
            METHODS[name](**{field: value}).check(names)
    for name in cases.ALL:
        METHODS[name]().check(names)
        assert METHODS[name].cost

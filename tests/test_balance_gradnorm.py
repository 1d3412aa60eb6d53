"""GradNorm against LibMTL's trajectory, NumPy from the paper, and its fixed point."""

import balance_cases as cases
import balance_oracles as oracles
import jax
import numpy as np
import pytest

from mtl_jax.balance.gradnorm import GradNorm
from mtl_jax.errors import UserError

# Three tasks |A_t theta - b_t|^2 / 2 on three shared parameters.
A = np.array(
    [
        [[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
        [[0.0, 3.0, 0.0], [1.0, 0.0, -1.0]],
        [[0.5, 0.0, 0.0], [0.0, 0.2, 0.1]],
    ]
)
B = np.array([[1.0, 2.0], [-3.0, 1.0], [0.3, -0.2]])
THETA = np.array([0.5, -0.5, 0.25])
# Weights of LibMTL 1.1.5's GradNorm (its class alone, float64, epoch 1, `train_loss_buffer` holding
# the losses at THETA), `loss_scale` moved by torch.optim.Adam(lr=0.025) and theta by gradient
# descent of rate 0.05 along the combined gradient: the weights used in steps 1 to 8, by alpha.
LIBMTL = {
    1.5: [
        [1.0, 1.0, 1.0],
        [0.983196808, 0.983196807, 1.033606385],
        [0.996076602, 0.954783494, 1.049139904],
        [1.012152582, 0.926805004, 1.061042414],
        [1.029993475, 0.899658880, 1.070347645],
        [1.049074015, 0.873393955, 1.077532030],
        [1.069132489, 0.847974225, 1.082893286],
        [1.090014813, 0.823342749, 1.086642438],
    ],
    0.0: [
        [1.0, 1.0, 1.0],
        [0.983196808, 0.983196807, 1.033606385],
        [0.967441595, 0.965830384, 1.066728021],
        [0.950879895, 0.948827745, 1.100292360],
        [0.933625588, 0.932086170, 1.134288242],
        [0.915820994, 0.915488120, 1.168690886],
        [0.897582666, 0.898941077, 1.203476258],
        [0.879002581, 0.882378912, 1.238618507],
    ],
}


@pytest.mark.parametrize("alpha", LIBMTL)
def test_trajectory_of_libmtl(alpha):
    """Float32 against float64: 1e-5 after eight steps."""
    method = GradNorm(alpha=alpha, lr=0.025)
    state, theta = method.init(3, 1), THETA
    for expected_N in LIBMTL[alpha]:
        errors = np.einsum("tmp,p->tm", A, theta) - B
        jacobian = np.einsum("tmp,tm->tp", A, errors)
        seen = cases.observe(jacobian, losses=0.5 * np.sum(errors**2, axis=1))
        weights_KN, state, fallen = cases.solve(method, seen, state)
        assert fallen == 0
        np.testing.assert_allclose(weights_KN[0], expected_N, rtol=1e-5)
        theta = theta - 0.05 * weights_KN[0] @ jacobian


def test_trajectory_in_numpy_with_absent_tasks_and_the_floor():
    rng = np.random.default_rng(3)
    losses = rng.uniform(0.5, 2, (12, 4)) * [1, 10, 0.1, 1e-4]  # the last begins below the floor
    jacobians = rng.normal(size=(12, 4, 6)) * [[[1], [30], [0.1], [1]]]
    present = rng.random((12, 4)) < 0.7
    present[3] = [False, True, False, False]  # alone
    norms = np.linalg.norm(jacobians, axis=2)
    expected = oracles.gradnorm_trajectory(norms, losses, present, 1.5, 0.05, 0.01)
    method = GradNorm(alpha=1.5, lr=0.05, floor=0.01)
    state = method.init(4, 1)
    for number in range(12):
        seen = cases.observe(jacobians[number], present=present[number], losses=losses[number])
        before = state
        weights_KN, state, _ = cases.solve(method, seen, state)
        np.testing.assert_allclose(weights_KN[0], expected[number], rtol=2e-5)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(old[0, ~present[number]], new[0, ~present[number]])


def test_without_pull_all_weighted_norms_become_equal():
    """alpha = 0 and frozen gradients: within a step of Adam, 0.001 of each weight's logarithm."""
    method, jacobian = GradNorm(alpha=0.0, lr=0.001), np.diag([1.0, 2.0, 4.0])
    state = method.init(3, 1)
    seen = cases.observe(jacobian)

    def step(_, carry):
        return method.weights(carry[1], seen)[:2]

    start = (np.zeros((1, 3), np.float32), state)
    weights_KN, _ = jax.jit(lambda: jax.lax.fori_loop(0, 3000, step, start))()
    balanced = np.asarray(weights_KN[0]) * [1, 2, 4]
    np.testing.assert_allclose(balanced, np.full(3, 12 / 7), rtol=1e-2)


def test_a_slow_task_gains_weight():
    method, state = GradNorm(), GradNorm().init(2, 1)
    for loss in (1.0, 0.8, 0.6, 0.4):
        seen = cases.observe(np.eye(2), losses=[loss, 1.0])
        weights_KN, state, _ = cases.solve(method, seen, state)
    assert weights_KN[0, 1] > 1.02 > 0.98 > weights_KN[0, 0]


def test_several_groups_are_refused():
    with pytest.raises(UserError, match=r"not 3: set Balance\.groups = 'last_shared'"):
        GradNorm().init(2, 3)

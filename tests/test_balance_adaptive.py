"""Loss-side methods that learn, against closed forms, hand calculation and NumPy from the papers.

Weights are float32: a value that is computed in a few operations agrees to 1e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balance_batches import NAMES, observe, one_step, random_batches, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.balance.adaptive import DWA, DifficultyWeights, UncertaintyWeights
from mtl_jax.balance.famo import FAMO
from mtl_jax.balance.group_dro import DoReMi, GroupDRO


def test_uncertainty_of_frozen_losses():
    """s goes to log l, so w to 1 / (2 l). 1e-4: Adam's steps get small, not nothing."""
    losses = np.array([1.0, 2.0, 0.5, 4.0])
    seen = observe(np.ones(4), losses)
    method = UncertaintyWeights(lr=0.01)

    def body(state, _):
        return method.observe(state, seen, None), None

    state, _ = jax.lax.scan(body, method.init(4, 1), length=3000)
    weights_N, _, logs = method.weights(state, seen)
    np.testing.assert_allclose(weights_N, 1 / (2 * losses), rtol=1e-4)
    np.testing.assert_allclose(logs["log_variance"], np.log(losses), atol=1e-4)


def adam_in_numpy(gradient, start, lr, steps, decay=0.0):
    """Kingma and Ba's Algorithm 1 in float64, with the decay in the gradient; all iterates."""
    x, mean, square, iterates = np.array(start, np.float64), 0.0, 0.0, []
    for step in range(1, steps + 1):
        grad = gradient(x, step - 1) + decay * x
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad * grad
        x = x - lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        iterates.append(x)
    return np.stack(iterates)


def test_uncertainty_is_joint_training():
    """w is of the s before the step, s learns from the losses of the step. 2e-6: float32."""
    batches = list(random_batches(15, 2, seed=6))
    batches = [
        (observe([1, 2], seen.losses + 0.3, step=i), a) for i, (seen, a) in enumerate(batches)
    ]
    losses = np.stack([np.asarray(seen.losses, np.float64) for seen, _ in batches])

    def gradient(s, step):
        return 0.5 - 0.5 * np.exp(-s) * losses[step]

    s = adam_in_numpy(gradient, np.zeros(2), 0.1, 15)
    weights, state = run(UncertaintyWeights(lr=0.1), batches, tasks=2)
    np.testing.assert_array_equal(weights[0], [0.5, 0.5])
    np.testing.assert_allclose(weights[1:], 0.5 * np.exp(-s[:-1]), rtol=2e-6)
    np.testing.assert_allclose(state.log_variance, s[-1], atol=2e-6)


def test_uncertainty_has_its_bounds():
    method = UncertaintyWeights(lr=1.0, s_min=-2.0, s_max=1.0)
    batches = [(observe([1, 1], [1e-5, 1e3]), jnp.zeros(2))] * 20
    weights, _ = run(method, batches, tasks=2)
    np.testing.assert_allclose(weights[-1], 0.5 * np.exp([2.0, -1.0]), rtol=1e-6)


def test_dwa_by_hand():
    """Two windows of two steps: means 2, 4 and then 1, 3; so r = 1/2, 3/4."""
    losses = [[3, 4], [1, 4], [1, 2], [1, 4], [9, 9]]
    weights, _ = run(
        DWA(temperature=2.0, window_steps=2),
        [(observe([1, 5], row), jnp.zeros(2)) for row in losses],
        tasks=2,
    )
    np.testing.assert_array_equal(weights[:4], np.ones((4, 2)))
    exponentials = np.exp([0.25, 0.375])
    np.testing.assert_allclose(weights[4], 2 * exponentials / exponentials.sum(), rtol=1e-6)


def test_dwa_of_constant_losses_and_of_losses_of_zero():
    method = DWA(window_steps=3)
    weights, _ = run(method, [(observe([1, 1, 1, 1], [1, 2, 3, 0]), jnp.zeros(4))] * 12)
    np.testing.assert_allclose(weights, np.ones((12, 4)), rtol=1e-6)


def test_dwa_keeps_the_means_of_an_absent_task():
    """Task 1 misses a window: its two means stay, and its next window joins them."""
    steps = [([4, 8], [1, 1]), ([2, 6], [1, 1]), ([1, 0], [1, 0]), ([1, 3], [1, 1])]
    batches = [(observe(tokens, losses), jnp.zeros(2)) for losses, tokens in steps]
    method = DWA(window_steps=1)
    state = method.init(2, 1)
    ratios = []
    for seen, after_N in batches:
        _, state, _ = one_step(method, state, seen, after_N)
        ratios.append(np.asarray(method.ratios(state)))
    np.testing.assert_allclose(ratios, [[1, 1], [0.5, 0.75], [0.5, 0.75], [1, 0.5]], rtol=1e-6)
    assert method.rates(method.init(2, 1), ("a", "b")) is None
    rates = method.rates(state, ("a", "b"))
    expected = np.exp([0.5, 0.25]) / np.exp([0.5, 0.25]).sum()
    assert rates == pytest.approx(dict(zip("ab", expected, strict=True)), rel=1e-6)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4, unique=True), st.sampled_from([0.0, 1, 3])
)
@settings(max_examples=30, deadline=None)
def test_difficulty_falls_with_what_is_mastered(accuracy, gamma):
    """-(1 - k)^gamma log k in float64; 1e-5: float32's 1 - k, where k is near 1."""
    method = DifficultyWeights(gamma=gamma)
    seen = observe(np.ones(4), np.zeros(4), accuracy)
    state = method.observe(method.init(4, 1), seen, None)
    weights_N = np.asarray(method.weights(state, seen)[0])
    k = np.clip(accuracy, 1e-3, 1.0)
    np.testing.assert_allclose(weights_N, -((1 - k) ** gamma) * np.log(k), rtol=1e-5, atol=1e-6)
    assert (np.diff(weights_N[np.argsort(accuracy)]) <= 0).all()


def test_difficulty_moves_on_past_batches():
    method = DifficultyWeights(gamma=0.0, metric="likelihood", decay=0.75, k_init=0.25)
    losses = -np.log([[0.8, 0.4], [0.4, 0.4]])
    tokens = [[1, 0], [1, 1]]
    batches = [(observe(t, row), jnp.zeros(2)) for t, row in zip(tokens, losses, strict=True)]
    weights, state = run(method, batches, tasks=2)
    np.testing.assert_allclose(
        weights, [[-np.log(0.25), 0], [-np.log(0.8), -np.log(0.25)]], rtol=1e-6
    )
    np.testing.assert_allclose(state.skill, [0.75 * 0.8 + 0.25 * 0.4, 0.4], rtol=1e-6)
    total = -np.log(0.7) - np.log(0.4)
    expected = {"a": -np.log(0.7) / total, "b": -np.log(0.4) / total}
    assert method.rates(state, ("a", "b")) == pytest.approx(expected, rel=1e-6)
    assert method.rates(method.init(2, 1), ("a", "b")) is None
    one = observe([1, 1], [0, 1])
    rates = method.rates(method.observe(method.init(2, 1), one, None), ("a", "b"))
    assert rates == pytest.approx({"a": 0.005 / 1.005, "b": 1 / 1.005}, rel=1e-6)
    mastered = method.observe(method.init(2, 1), observe([1, 1], [0, 0]), None)
    assert method.rates(mastered, ("a", "b")) is None


def famo_in_numpy(before, after, bound, lr, decay):
    """Weights of every step in float64, written from the paper's Algorithm 2."""
    weights = []

    def softmax(xi):
        return np.exp(xi - xi.max()) / np.exp(xi - xi.max()).sum()

    def gradient(xi, step):
        z = softmax(xi)
        ratio = z / (before[step] - bound + 1e-8)
        weights.append(ratio / ratio.sum())
        fell = np.log(before[step] - bound + 1e-8) - np.log(after[step] - bound + 1e-8)
        jacobian = np.diag(z) - np.outer(z, z)
        return jacobian.T @ fell

    adam_in_numpy(gradient, np.zeros(before.shape[1]), lr, len(before), decay)
    return np.stack(weights)


@pytest.mark.parametrize("lower_bound", [0.0, 0.15])
def test_famo_in_numpy(lower_bound):
    """200 steps; 2e-5: Adam divides float32 differences of logarithms by their size."""
    rng = np.random.default_rng(8)
    before = rng.uniform(0.5, 3.0, (200, 4)).astype(np.float32).astype(np.float64)
    after = (before * rng.uniform(0.8, 1.02, (200, 4))).astype(np.float32).astype(np.float64)
    expected = famo_in_numpy(before, after, lower_bound, 0.025, 1e-3)
    batches = [
        (observe(np.ones(4), b), jnp.asarray(a, jnp.float32))
        for b, a in zip(before, after, strict=True)
    ]
    weights, _ = run(FAMO(lower_bound=lower_bound), batches)
    np.testing.assert_allclose(weights, expected, rtol=2e-5)
    assert np.abs(weights[-1] - weights[0]).max() > 0.01


def test_famo_below_its_bound_stays_finite():
    method = FAMO(lower_bound={"qa": 1.0})
    weights, _ = run(method, [(observe(np.ones(4), [0.5, 1, 1, 1]), jnp.full(4, 0.4))] * 3)
    np.testing.assert_allclose(weights[0], [1, 0, 0, 0], atol=1e-6)


# Robustness.


def test_group_dro_in_numpy():
    """Sagawa's Algorithm 1, all groups present: q ~ q exp(eta l), before the model's update."""
    batches = [(observe(np.ones(4), seen.losses + 0.1), a) for seen, a in random_batches(30, 4)]
    weights, state = run(GroupDRO(eta=0.3), batches)
    q, expected = np.full(4, 0.25), []
    for seen, _ in batches:
        q = q * np.exp(0.3 * np.asarray(seen.losses, np.float64))
        q /= q.sum()
        expected.append(q)
    np.testing.assert_allclose(weights, expected, rtol=2e-5)  # 30 steps of float32 logarithms
    rates = GroupDRO().rates(state, NAMES)
    assert list(rates.values()) == pytest.approx(q, rel=2e-5)
    assert sum(rates.values()) == pytest.approx(1, abs=1e-12)


def test_group_dro_comes_back_from_far_behind():
    """A weight of exp(-400), which float32 has not, still grows when its loss is the largest."""
    method = GroupDRO(eta=1.0)
    _, state = run(method, [(observe([1, 1], [4, 0]), jnp.zeros(2))] * 100, tasks=2)
    weights, _ = run(method, [(observe([1, 1], [0, 4]), jnp.zeros(2))] * 200, state, tasks=2)
    np.testing.assert_allclose(weights[-1], [0, 1], atol=1e-6)


def doremi(smoothing, batches=None, steps=10):
    if batches is None:
        seen = observe([1, 1], [1.3, 1.1], excess=[0.3, 0.1])
        batches = [(seen, jnp.zeros(2))] * steps
    return run(DoReMi(reference="run", smoothing=smoothing, every_n_steps=1), batches, tasks=2)


def test_doremi_of_a_constant_excess():
    """After 10 steps of eta = 1: softmax(10 [.3, .1]), or .8806 with the smoothing of 1e-4."""
    weights, _ = doremi(0.0)
    np.testing.assert_allclose(weights[-1], np.exp([3, 1]) / np.exp([3, 1]).sum(), rtol=3e-6)
    weights, state = doremi(1e-4)
    np.testing.assert_allclose(weights[-1], [0.8806, 0.1194], atol=5e-5)
    alpha, expected = np.full(2, 0.5), []
    for _ in range(10):
        alpha = alpha * np.exp([0.3, 0.1])
        alpha = (1 - 1e-4) * alpha / alpha.sum() + 1e-4 / 2
        expected.append(alpha)
    np.testing.assert_allclose(weights, expected, rtol=3e-6)
    method = DoReMi(reference="run")
    assert method.rates(method.init(2, 1), ("a", "b")) is None
    rates = method.rates(state, ("a", "b"))
    assert list(rates.values()) == pytest.approx(np.mean(expected, 0), rel=3e-6)


def test_doremi_reuses_the_last_excess_of_an_absent_task():
    """Task 1 is there once, with excess .5: its alpha goes on to grow, its weight is 0."""
    there = observe([1, 1], [1.2, 1.5], excess=[0.2, 0.5])
    gone = observe([1, 0], [1.2, 0.0], excess=[0.2, 0.0])
    weights, state = doremi(0.0, [(there, jnp.zeros(2))] + [(gone, jnp.zeros(2))] * 3)
    np.testing.assert_allclose(weights[1:], [[1, 0]] * 3, rtol=1e-6)
    expected = np.exp([0.8, 2.0]) / np.exp([0.8, 2.0]).sum()
    np.testing.assert_allclose(np.exp(state.log_weights), expected, rtol=3e-6)


def test_doremi_waits_for_tasks_never_seen():
    better = observe([1, 0], [0.5, 0.0], excess=[0.0, 0.0])
    _, state = doremi(1e-4, [(better, jnp.zeros(2))] * 5)
    np.testing.assert_allclose(np.exp(state.log_weights), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(state.excess, [0, 0])

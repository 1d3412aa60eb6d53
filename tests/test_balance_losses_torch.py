"""Loss-side methods against TorchJD's scalarizers, driven as its documentation says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balance_batches import observe, run

from mtl_jax.balance.adaptive import DWA, UncertaintyWeights
from mtl_jax.balance.famo import FAMO
from mtl_jax.balance.weighting import RandomWeights

pytestmark = pytest.mark.torch

TASKS = 4


def losses_of_a_run(steps, seed):
    """Float32 [steps, 4]: losses before and after each update."""
    rng = np.random.default_rng(seed)
    level = np.array([3.0, 1.0, 0.3, 2.0])
    before = level * np.exp(-0.02 * np.arange(steps)[:, None] * rng.random(TASKS))
    before = before * rng.uniform(0.8, 1.2, (steps, TASKS))
    after = before * rng.uniform(0.85, 1.02, (steps, TASKS))
    return before.astype(np.float32), after.astype(np.float32)


def weights_of(method, before, after):
    """Float32 [steps, 4]: the weights of every step."""
    seen = [observe(np.ones(TASKS), old, step=step) for step, old in enumerate(before)]
    return run(method, zip(seen, jnp.asarray(after), strict=True))[0]


def torch_weights(scalarizer, losses):
    """What the scalarizer multiplies the gradients of the losses by."""
    import torch

    values = torch.tensor(losses, requires_grad=True)
    total = scalarizer(values)
    (weights,) = torch.autograd.grad(total, values, retain_graph=True)
    return weights.numpy(), total


@pytest.mark.parametrize(("bound", "decay"), [(0.0, 1e-3), (0.1, 1e-3), (0.0, 0.1)])
def test_famo(bound, decay):
    """20 steps, weights to 1e-6 of 1.

    Both are float32. They differ by roundings of 6e-8 in the logarithms of two losses, whose
    difference Adam scales to its own size; by 20 steps of 0.025 that stays below 1e-6.
    """
    import torch
    from torchjd.scalarization import FAMO as TorchFAMO

    before, after = losses_of_a_run(20, seed=1)
    theirs = TorchFAMO(TASKS, min_losses=torch.full((TASKS,), bound), weight_decay=decay)
    expected = []
    for old, new in zip(before, after, strict=True):
        expected.append(torch_weights(theirs, old)[0])
        theirs.update(torch.tensor(new))
    weights = weights_of(FAMO(lower_bound=bound, weight_decay=decay), before, after)
    np.testing.assert_allclose(weights, np.stack(expected), rtol=0, atol=1e-6)
    assert np.abs(weights[-1] - weights[0]).max() > 0.01


def test_uncertainty_weights():
    """s by PyTorch's Adam on TorchJD's objective; weights to 1e-6 of about 1 after 30 steps."""
    import torch
    from torchjd.scalarization import UW

    before, after = losses_of_a_run(30, seed=2)
    theirs = UW(TASKS)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.05)
    expected = []
    for old in before:
        weights, total = torch_weights(theirs, old)
        expected.append(weights)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    weights = weights_of(UncertaintyWeights(lr=0.05), before, after)
    np.testing.assert_allclose(weights, np.stack(expected), rtol=0, atol=1e-6)


def test_dwa():
    """Three windows of seven steps and a bit; 1e-6: sums of seven float32 numbers."""
    from torchjd.scalarization import DWA as TorchDWA

    before, after = losses_of_a_run(25, seed=3)
    theirs, expected = TorchDWA(temperature=0.5), []
    for step, old in enumerate(before, 1):
        expected.append(torch_weights(theirs, old)[0])
        if step % 7 == 0:
            theirs.step()
    weights = weights_of(DWA(temperature=0.5, window_steps=7), before, after)
    np.testing.assert_allclose(weights, np.stack(expected), rtol=1e-6)
    assert np.abs(weights[-1] - 1).max() > 0.01


def test_random_weights_have_torchjds_distribution():
    """Two-sample Kolmogorov-Smirnov on the weights; below 1e-3 by chance once in 1000 seeds."""
    import torch
    from scipy.stats import ks_2samp
    from torchjd.scalarization import Random

    torch.manual_seed(0)
    ones = np.ones(TASKS, np.float32)
    theirs = np.stack([torch_weights(Random(), ones)[0] for _ in range(2000)])
    seen = observe(ones, ones)
    ours = jax.vmap(lambda key: RandomWeights().weights((), dataclasses.replace(seen, rng=key))[0])(
        jax.random.split(jax.random.key(1), 2000)
    )
    np.testing.assert_allclose(theirs.sum(1), np.asarray(ours).sum(1), rtol=1e-6)
    for task in range(TASKS):
        assert ks_2samp(theirs[:, task], np.asarray(ours)[:, task]).pvalue > 1e-3

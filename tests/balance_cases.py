"""Gradients to weigh, and what is observed of them, for the tests of gradient-side methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balance import common_descent, gradnorm, surgery
from mtl_jax.balance.method import METHODS, Observations

GOLDEN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # TorchJD's and LibMTL's example
DETERMINISTIC = tuple(
    kind.__name__
    for kind in (
        common_descent.MGDA,
        common_descent.UPGrad,
        common_descent.CAGrad,
        common_descent.NashMTL,
        common_descent.IMTLG,
        common_descent.AlignedMTL,
    )
)
RANDOM = (surgery.PCGrad.__name__, surgery.GradVac.__name__)
ALL = (*RANDOM, *DETERMINISTIC, gradnorm.GradNorm.__name__)


def gradients(family, tasks, seed, size=20):
    """Random gradients J_TP, float64."""
    rng = np.random.default_rng([seed, tasks])
    rows = rng.normal(size=(tasks, size))
    opposed = np.where(np.arange(tasks) % 2, -2.0, 2.0)[:, None] * np.eye(size)[0]
    match family:
        case "normal":
            return rows
        case "mild":
            return rows * 10.0 ** rng.uniform(-1, 1, (tasks, 1))
        case "scaled":  # norms between 1e-6 and 1e6
            return rows * 10.0 ** rng.uniform(-6, 6, (tasks, 1))
        case "wide":  # norms from 1e-3 to 1e3, evenly in their logarithms
            units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            return units * 10.0 ** rng.permutation(np.linspace(-3, 3, tasks))[:, None]
        case "conflict":  # cosines of about -0.7
            return 0.3 * rows + opposed
        case "opposed":  # cosines down to -0.998
            return 0.03 * rows + opposed
        case "flat":  # in three dimensions: more than three tasks depend on each other
            return rows[:, :3]
    raise ValueError(family)


def observe(*jacobians, present=None, seed=0, losses=None):
    """Observations of one group of parameters for each J_TP; all tasks present by default."""
    gram_KNN = np.stack([jacobian @ jacobian.T for jacobian in jacobians])
    count = gram_KNN.shape[1]
    present_N = np.ones(count, bool) if present is None else np.asarray(present)
    gram_KNN = gram_KNN * present_N[None, :, None] * present_N[None, None, :]
    losses = np.ones(count) if losses is None else losses
    # Tokens, and so shares, take no part: every present task has as many.
    return Observations(
        step=jnp.int32(0),
        tokens=jnp.asarray(7 * present_N, jnp.float32),
        shares=jnp.asarray(present_N / max(present_N.sum(), 1), jnp.float32),
        losses=jnp.asarray(np.asarray(losses) * present_N, jnp.float32),
        correct=jnp.zeros(count, jnp.float32),
        gram=jnp.asarray(gram_KNN, jnp.float32),
        excess=None,
        rng=jax.random.key(seed),
        names=tuple(f"task_{number}" for number in range(count)),
    )


@functools.cache
def _compiled(method):
    """Equal methods share their compiled functions."""
    return jax.jit(method.weights)


def solve(method, seen, state=None):
    """(weights [K, N] as float64, state, number of groups that fell back) of a method or name."""
    method = METHODS[method]() if isinstance(method, str) else method
    groups, tasks, _ = seen.gram.shape
    state = method.init(tasks, groups) if state is None else state
    weights_KN, state, logs = _compiled(method)(state, seen)
    return np.asarray(weights_KN, np.float64), state, int(logs["solver_fallback"])


def far(found_P, expected_P, jacobian_TP):
    """Distance of two combined gradients in norms of the mean gradient, or of the longer of both.

    The former is what the distance means for training; the latter is for methods whose update has a
    length of its own.
    """
    mean = np.linalg.norm(jacobian_TP.mean(axis=0))
    return np.linalg.norm(found_P - expected_P) / max(mean, np.linalg.norm(expected_P))


def off(found_P, expected_P):
    """Distance of two combined gradients in lengths of the second, however short it is."""
    return np.linalg.norm(found_P - expected_P) / np.linalg.norm(expected_P)

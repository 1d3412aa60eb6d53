"""Every method in the train step: three tasks without the second are the two others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balanced_steps import (
    CFG,
    EVERY_METHOD,
    FROZEN,
    KEY,
    NAMES,
    OF_GRADIENTS,
    OF_LOSSES,
    SETTINGS,
    balancer,
    batch,
    of_one,
    opposed,
    working,
)

from mtl_jax.balance.method import METHODS
from mtl_jax.balanced import Problem

STEPS = 3  # DWA's second window ends with the second
# Ids of the microbatches' tasks; the same rows.
THREE, TWO = (NAMES, (1, 3, 1, 3)), ((NAMES[0], NAMES[2]), (1, 2, 1, 2))
pytestmark = pytest.mark.slow


def stepper(chosen):
    """One step of plain gradient descent, so that an update is what a gradient is."""
    reference = FROZEN if chosen.needs("reference") else None

    def compute(params, rows, state, number):
        problem = Problem(CFG, SETTINGS, chosen, {}, None)
        rows = problem.prepared(rows, reference)
        seen = problem.observations(rows, number, KEY)
        grads, sums, state, told = problem.gradients(params, rows, state, seen)
        params = jax.tree.map(lambda x, grad: x - 0.05 * grad, params, grads)
        state = problem.observed(params, rows, state, seen, sums)
        return params, state, told["balance_weight"]

    return jax.jit(compute)


def run(compute, tasks, state):
    """(weights of all steps [steps, K, N], parameters after)."""
    params, weights = opposed(), []
    for number in range(STEPS):
        rows = batch(tasks=tasks, seed=number, targets=(1, 2, 1, 2))
        params, state, weights_KN = compute(params, rows, state, jnp.int32(number))
        weights.append(weights_KN)
    return np.stack(weights), params


def assert_absent(found, expected):
    """The second task has no weight; the others' weights and the parameters are the same.

    Up to the order of float32 sums, which solutions and two updates amplify.
    """
    np.testing.assert_array_equal(found[0][..., 1], 0.0)
    assert np.abs(expected[0]).max(axis=(1, 2)).min() > 1e-3
    np.testing.assert_allclose(found[0][..., [0, 2]], expected[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@functools.cache
def compiled(methods, names):
    chosen = of_one(methods, names)
    return stepper(chosen), chosen.init()


def test_every_method_is_here():
    assert {*OF_GRADIENTS.methods, *OF_LOSSES.methods} == set(METHODS)


@pytest.mark.parametrize(("methods", "name"), EVERY_METHOD)
def test_a_task_without_tokens_is_as_if_there_were_none(methods, name):
    found, expected = (
        run(compute, tasks, working(state, methods, name))
        for names, tasks in (THREE, TWO)
        for compute, state in [compiled(methods, names)]
    )
    assert_absent(found, expected)


@pytest.mark.parametrize(
    "values",
    [{"task_gradients": "vmap", "groups": "layer"}, {"task_gradients": "sketch"}],
    ids=str,
)
def test_so_it_is_however_gradients_of_single_tasks_are_made(values):
    found, expected = (
        run(stepper(chosen), tasks, chosen.init())
        for names, tasks in (THREE, TWO)
        for chosen in [balancer("CAGrad", names=names, **values)]
    )
    assert_absent(found, expected)

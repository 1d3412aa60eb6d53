"""DoReMi in the train step against NumPy written from Algorithm 1 of Xie et al. 2023."""

import functools

import jax
import numpy as np
import pytest
from balanced_steps import BLOCKS, CFG, KEY, PARAMS, balancer, batch, initial, stepper

from mtl_jax import objective
from mtl_jax.balance.group_dro import DoReMi

ETA, SMOOTHING, STEPS = 1.0, 0.01, 3
TASKS = (1, 2, 3)


def shaken(params):
    """A reference that is better at some tokens and worse at others."""
    random = np.random.RandomState(11)
    return jax.tree.map(lambda x: (x * (1 + 0.3 * random.randn(*x.shape))).astype(x.dtype), params)


REFERENCE = shaken(PARAMS)


@functools.cache
def forward():
    return jax.jit(functools.partial(objective.forward, CFG))


def token_losses(params, rows):
    """-log p of each target token, float64, from logits alone."""
    logits = np.asarray(forward()(params, rows), np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = rows["decoder_target_tokens"][..., None]
    return -np.take_along_axis(log_p, targets, axis=-1)[..., 0]


def domain_means(values, rows, by_example):
    """Means over each domain's target tokens, or over its examples' means."""
    real = rows["decoder_loss_weights"] > 0
    found = []
    for task in TASKS:
        mine = (rows["decoder_task_ids"] == task) & real
        if by_example:  # a row of this batch is one example
            found.append(np.mean([values[r][m].mean() for r, m in enumerate(mine) if m.any()]))
        else:
            found.append(values[mine].sum() / mine.sum())
    return np.array(found)


@pytest.mark.parametrize(
    ("parts", "reduction", "every"),
    [
        (1, "token_mean", 2),
        pytest.param(1, "token_mean", 1, marks=pytest.mark.slow),
        pytest.param(BLOCKS, "token_mean", 1, marks=pytest.mark.slow),
        pytest.param(BLOCKS, "example_mean", 1, marks=pytest.mark.slow),
    ],
)
def test_weights_of_a_run_are_those_of_the_algorithm(parts, reduction, every):
    """Three updates; 1e-5: exponentials of sums of float32 losses."""
    method = DoReMi(eta=ETA, smoothing=SMOOTHING, reference="given", every_n_steps=every)
    chosen = balancer(method, reduction=reduction)
    # z-loss is part of the objective, and of no -log p.
    settings = objective.StepConfig(microbatches=parts, z_loss=1e-3)
    update, state = jax.jit(stepper(chosen, settings)), initial(chosen)
    alpha, excess, alphas = np.full(3, 1 / 3), np.zeros(3), []
    for number in range(STEPS):
        rows = batch(seed=number)
        if number % every:  # nothing is asked of the reference
            nothing = jax.tree.map(lambda x: x * np.float32(np.nan), REFERENCE)
            state, told = update(state, rows, KEY, nothing)
            np.testing.assert_allclose(told["balance/excess_loss"], excess, rtol=1e-5)
            np.testing.assert_allclose(told["balance_weight"][0], alpha, rtol=1e-5)
            alphas.append(alpha)
            continue
        losses, reference = token_losses(state.params, rows), token_losses(REFERENCE, rows)
        difference, by_example = losses - reference, reduction == "example_mean"
        excess = domain_means(np.maximum(difference, 0.0), rows, by_example)
        alpha = alpha * np.exp(ETA * excess)
        alpha = (1 - SMOOTHING) * alpha / alpha.sum() + SMOOTHING / 3
        alphas.append(alpha)
        state, told = update(state, rows, KEY, REFERENCE)
        np.testing.assert_allclose(told["balance/excess_loss"], excess, rtol=1e-5)
        np.testing.assert_allclose(told["balance_weight"][0], alpha, rtol=1e-5)
        # A clip of the domains' means would be seen: where tokens are on both sides it is less.
        assert (excess - np.maximum(domain_means(difference, rows, by_example), 0)).max() > 0.05
    rates = method.rates(jax.device_get(state.balance.method), ("a", "b", "c"))
    np.testing.assert_allclose(list(rates.values()), np.mean(alphas, axis=0), rtol=1e-5)

"""Batches as a method sees them, and a run over them as the train step makes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balance.method import LOSSES_AFTER, Observations

NAMES = ("qa", "nli_a", "nli_b", "sum")
KEY = jax.random.key(7)


def observe(tokens, losses=None, correct=None, excess=None, step=0, names=None):
    """Observations of a batch; values of absent tasks are 0, as promised."""
    tokens = np.asarray(tokens, np.float32)
    there = tokens > 0

    def mean(values):
        return jnp.asarray(np.where(there, 0.0 if values is None else values, 0.0), jnp.float32)

    return Observations(
        step=jnp.asarray(step, jnp.int32),
        tokens=jnp.asarray(tokens),
        shares=jnp.asarray(tokens / np.maximum(tokens.sum(), 1.0)),
        losses=mean(losses),
        correct=mean(correct),
        gram=None,
        excess=None if excess is None else mean(excess),
        rng=jax.random.fold_in(KEY, step),
        names=NAMES[: len(tokens)] if names is None else names,
    )


@functools.partial(jax.jit, static_argnums=0)
def one_step(method, state, seen, after_N):
    """A step as the train step makes it; losses are hidden from those that do not ask for them."""
    before = seen
    if not method.needs:
        zeros = jnp.zeros_like(seen.losses)
        before = dataclasses.replace(seen, losses=zeros, correct=zeros)
    weights_N, state, logs = method.weights(state, before)
    state = method.observe(state, seen, after_N if LOSSES_AFTER in method.needs else None)
    return weights_N, state, logs


def random_batches(count, tasks, seed=0, absent=None):
    """(observations, losses after) of a run of `count` batches; `absent` is never there."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        tokens = rng.integers(1, 50, tasks) * (rng.random(tasks) < 0.8)
        if absent is not None:
            tokens[absent] = 0
        losses = rng.uniform(0.2, 3.0, tasks)
        after = np.where(tokens > 0, losses * rng.uniform(0.8, 1.05, tasks), 0.0)
        values = losses, rng.random(tasks), losses * rng.uniform(0.0, 0.5, tasks)
        yield observe(tokens, *values, step=step), jnp.asarray(after, jnp.float32)


def run(method, batches, state=None, tasks=4):
    """Weights of every step, and the last state."""
    state = method.init(tasks, 1) if state is None else state
    weights = []
    for seen, after_N in batches:
        weights_N, state, _ = one_step(method, state, seen, after_N)
        weights.append(np.asarray(weights_N))
    return np.stack(weights), state

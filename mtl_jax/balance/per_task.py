"""What several methods share: values by task name, softmax over present tasks, Adam task by task.

Letter: N tasks.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.errors import UserError, suggest

Value = TypeVar("Value")

LEAST_SHARE = 0.01  # for `as_rates`


def require(fits: bool, field: str, what: str, value: object) -> None:
    """Refuses a value that does not fit.

    Args:
      fits: written so that "not a number" is refused, too.
      field: its Gin name.
      what: what it must be, in words.
      value: what it is.

    Raises:
      UserError: it does not fit.
    """
    if not fits:
        raise UserError(f"{field} must be {what}, got {value!r}.")


def by_name(field: str, values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """Values by task from values by name or glob, as in `Mixture.rates`.

    A name beats a glob, a later glob an earlier one.

    Args:
      field: for messages.
      values: by name or glob ("glue_*").
      names: the tasks.

    Returns:
      The value of every task that is named, in the order of `names`.

    Raises:
      UserError: a name or glob fits no task; near names are given.
    """
    found: dict[str, Value] = {}
    for pattern in sorted(values, key=lambda pattern: pattern in names):
        fitting = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not fitting:
            hint = suggest(pattern, names) or f" They are {', '.join(names)[:200]}."
            raise UserError(f"{field}: {pattern!r} is none of the tasks.{hint}")
        found.update(dict.fromkeys(fitting, values[pattern]))
    return {name: found[name] for name in names if name in found}


def softmax(logits_N: jax.Array, present_N: jax.Array) -> jax.Array:
    """Softmax among the present tasks, 0 for the others (for all, where none is present)."""
    return jax.nn.softmax(logits_N, where=present_N)


def as_rates(
    names: Sequence[str], weights_N: jax.Array, least: float = 0.0
) -> dict[str, float] | None:
    """Weights as mixture rates.

    Args:
      names: the tasks.
      weights_N: not negative.
      least: part of an even share that no task falls below: one that is never drawn is never
        measured again.

    Returns:
      Rates by name that sum to one; None where the weights are all 0, or not finite.
    """
    weights = np.asarray(weights_N, np.float64)
    total = weights.sum()
    if not np.isfinite(total) or total <= 0.0:
        return None
    shares = np.maximum(weights / total, least / len(names))
    return dict(zip(names, (shares / shares.sum()).tolist(), strict=True))


@flax.struct.dataclass
class AdamState:
    """Moments of one number for each task; every task counts its own steps.

    Attributes:
      count: int32 [N], steps in which the task was present.
      mean: float32 [N], first moment.
      square: float32 [N], second moment.
    """

    count: jax.Array
    mean: jax.Array
    square: jax.Array


def adam_init(num_tasks: int) -> AdamState:
    """The state before the first step."""
    # Separate arrays: a train state whose buffers are donated must not hold one twice.
    return AdamState(
        jnp.zeros(num_tasks, jnp.int32),
        jnp.zeros(num_tasks, jnp.float32),
        jnp.zeros(num_tasks, jnp.float32),
    )


def adam(
    state: AdamState, grads_N: jax.Array, present_N: jax.Array, beta1: float, beta2: float
) -> tuple[jax.Array, AdamState]:
    """One step of Adam (Kingma and Ba 2015, epsilon 1e-8 as in its Algorithm 1).

    The bias correction is each task's own, so that a task that comes late, or seldom, learns as one
    that was alone; the state of absent tasks stays bit for bit.

    Args:
      state: before.
      grads_N: float32, of the quantity that is learned.
      present_N: bool, the tasks that take a step.
      beta1: decay of the first moment.
      beta2: decay of the second moment.

    Returns:
      (float32 [N]: what to subtract after multiplication with the learning rate, 0 for absent
      tasks; the state after).
    """
    count_N = state.count + 1
    mean_N = beta1 * state.mean + (1.0 - beta1) * grads_N
    square_N = beta2 * state.square + (1.0 - beta2) * grads_N * grads_N
    unbiased_mean_N = mean_N / _one_minus_power(beta1, count_N)
    unbiased_square_N = square_N / _one_minus_power(beta2, count_N)
    steps_N = unbiased_mean_N / (jnp.sqrt(unbiased_square_N) + 1e-8)
    after = AdamState(count_N, mean_N, square_N)
    kept = jax.tree.map(lambda new, old: jnp.where(present_N, new, old), after, state)
    return jnp.where(present_N, steps_N, 0.0), kept


def _one_minus_power(beta: float, count_N: jax.Array) -> jax.Array:
    """1 - beta^count; as it stands, float32 would keep four digits of it for 0.999 at first."""
    log_beta = math.log(beta) if beta > 0.0 else -math.inf
    return -jnp.expm1(count_N * log_beta)

"""How a step on one task alone would change the losses of all: TAG's affinity, not its limit.

Letter: N tasks; rows help, columns are helped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def affinity(
    losses: Callable[[Tree], jax.Array],
    params: Tree,
    slots: Tree,
    tokens_N: jax.Array,
    rate: jax.Array,
) -> jax.Array:
    """The lookahead affinity `Z_ij = 1 - l_j(theta - rate g_i) / l_j(theta)` of one batch.

    Fifty et al. 2021, "Efficiently Identifying Task Groupings for Multi-Task Learning" (arXiv
    2109.04617), equation 1. One copy of the parameters exists at a time.

    Args:
      losses: from parameters to the mean loss of every task on the batch, float32 [N].
      params: theta, what is trained.
      slots: gradients of the tasks' summed token losses, with a leading axis of tasks.
      tokens_N: float32, target tokens of each task in the batch.
      rate: float32 scalar, of the steps of plain gradient descent.

    Returns:
      Float32 [N, N]; NaN where one of the two tasks is absent, or the loss before is not positive.
    """
    count, present_N = tokens_N.shape[0], tokens_N > 0
    scales_N = rate / jnp.maximum(tokens_N, 1.0)

    def after(_: None, number: jax.Array) -> tuple[None, jax.Array]:
        task = jnp.maximum(number - 1, 0)
        scale = jnp.where(number > 0, scales_N[task], 0.0)
        return None, losses(jax.tree.map(lambda x, slot: x - scale * slot[task], params, slots))

    # No step at all comes first, in the very program of the others: small affinities are of the
    # size of rounding, and two programs need not round alike.
    _, found = jax.lax.scan(after, None, jnp.arange(count + 1))
    before_N, after_NN = found[0], found[1:]
    known_NN = present_N[:, None] & (present_N & (before_N > 0))[None, :]
    ratio_NN = after_NN / jnp.where(before_N > 0, before_N, 1.0)[None, :]
    return jnp.where(known_NN, 1.0 - ratio_NN, jnp.nan)

"""The mathematics of one tile of attention, for any backend and either orientation.

A tile is [queries, keys] or its transpose; whatever belongs to queries alone comes as a column or
as a row, as the tile wants it. Nothing here but jax.numpy.

With logits s = q k^T + bias, hidden pairs at `HIDDEN`, lse = log sum exp s over a query's keys:
    o = sum_k exp(s - lse) v
    ds = exp(s - lse) * (do v^T - delta),  delta = sum(do * o)
(Dao et al. 2022, "FlashAttention", appendix B; no 1/sqrt(d), and a bias, as in T5.)
"""

import jax
import jax.numpy as jnp
import numpy as np

HIDDEN = -1e30  # a pair that must not meet
FLOOR = -1e10  # the running maximum starts here, so that exp(HIDDEN - maximum) is 0 in every row
NOTHING = 1e30  # log-sum-exp of a query without keys: its probabilities come out as 0
LOG2_E = float(np.log2(np.e))


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one axis of each, float32 out; exact (no tf32, no bf16 passes) for float32 in."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def logits(a: jax.Array, b: jax.Array, bias: jax.Array | float, same: jax.Array) -> jax.Array:
    """Queries [m, K] and keys [n, K], or keys and queries -> float32 [m, n], hidden pairs `HIDDEN`.

    Args:
      a: rows of the tile.
      b: columns of the tile.
      bias: broadcasts to [m, n]; holds `HIDDEN` where the causal mask hides.
      same: bool [m, n], query and key are of one segment.
    """
    return jnp.where(same, product(a, b, (1, 1)) + bias, HIDDEN)


def online_softmax(
    s: jax.Array, maximum: jax.Array, total: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of the running softmax over the keys, which lie along `axis`.

    Args:
      s: float32 tile of logits.
      maximum: so far, with size 1 along `axis`; `FLOOR` at first.
      total: sum of exp(s - maximum) so far, same shape; 0 at first.
      axis: of the keys.

    Returns:
      (exp(s - new maximum), factor that rescales what was summed before, new maximum, new total).
    """
    new = jnp.maximum(maximum, jnp.max(s, axis=axis, keepdims=True))
    # exp2 of a fused multiply-add: one instruction less per pair than exp of a difference.
    p = jnp.exp2(s * LOG2_E - new * LOG2_E)
    factor = jnp.exp2((maximum - new) * LOG2_E)
    return p, factor, new, total * factor + jnp.sum(p, axis=axis, keepdims=True)


def log_sum_exp(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """Of the finished running softmax; `NOTHING` for a query that saw no key."""
    return jnp.where(total > 0.0, maximum + jnp.log(jnp.maximum(total, 1e-37)), NOTHING)


def normalised(acc: jax.Array, total: jax.Array) -> jax.Array:
    """The accumulated values over the total, and 0 for a query that saw no key."""
    return acc * jnp.where(total > 0.0, 1.0 / jnp.maximum(total, 1e-37), 0.0)


def probabilities(s: jax.Array, lse: jax.Array) -> jax.Array:
    """exp(s - lse), in the backward pass."""
    return jnp.exp2(s * LOG2_E - lse * LOG2_E)


def logits_gradient(p: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
    """Gradient of the logits (and so of the bias) of a tile, float32."""
    return p * (dp - delta)

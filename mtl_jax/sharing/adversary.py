"""A classifier of tasks behind a gradient reversal (Ganin et al. 2016; for tasks: Liu et al. 2017).

It learns to tell tasks apart by the encoder's states; the encoder gets minus lambda times its
gradient and learns states that do not tell.

Letters: B rows, L encoder length, D embedding, S segments of a row (0 is padding), H hidden, N
tasks.
"""

import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.model import Params
from mtl_jax.sharing.bank import Leaf, Make, key_of
from mtl_jax.sharing.plan import SharingPlan
from mtl_jax.sharing.sharing_config import AdversaryConfig


@jax.custom_vjp
def reverse_gradient(x: jax.Array, strength: jax.Array) -> jax.Array:
    """`x`, whose gradient is multiplied by minus `strength` (Ganin et al. 2016, equation 17)."""
    return x


def _reverse_forward(x: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, strength


def _reverse_backward(strength: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (-strength.astype(gradient.dtype) * gradient, jnp.zeros_like(strength))


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)


def strength(cfg: AdversaryConfig, step: jax.Array) -> jax.Array:
    """Lambda at a step, float32 scalar."""
    done = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / cfg.ramp_steps)
    shape = {
        "constant": jnp.ones_like(done),
        "linear": done,
        "ganin": 2.0 / (1.0 + jnp.exp(-10.0 * done)) - 1.0,
    }
    return cfg.weight * shape[cfg.schedule]


def leaves(plan: SharingPlan, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Adds the classifier: kernels [D, H] and [H, N], or [D, N], and biases."""
    cfg, made = plan.rooms.adversary, dict(base)
    if not cfg.weight:
        return made
    sizes = [plan.base.emb_dim, *([cfg.hidden_dim] if cfg.hidden_dim else []), len(plan.names)]
    for number, (size, features) in enumerate(itertools.pairwise(sizes)):
        path = f"sharing/adversary/dense_{number}"
        axes = ("embed" if number == 0 else None, None)
        made[f"{path}/kernel"] = Leaf(axes, _kernel_maker(f"{path}/kernel", size, features))
        made[f"{path}/bias"] = Leaf((None,), _bias_maker(features))
    return made


def _kernel_maker(path: str, size: int, features: int) -> Make:
    def make(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        normal = jax.random.normal(key_of(rng, path), (size, features))
        return normal / np.sqrt(size).astype(np.float32)

    return make


def _bias_maker(features: int) -> Make:
    return lambda rng, plain: jnp.zeros(features)


def _places(segments_BL: jax.Array) -> jax.Array:
    """Int32 [B, L]: the position of each token in its segment."""
    positions_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1])[None], segments_BL.shape)
    starts = jnp.diff(segments_BL, axis=1, prepend=jnp.full_like(segments_BL[:, :1], -1)) != 0
    return positions_BL - jax.lax.cummax(jnp.where(starts, positions_BL, 0), axis=1)


def _seen(segments_BL: jax.Array, exclude_prefix: int) -> jax.Array:
    return (segments_BL > 0) & (_places(segments_BL) >= exclude_prefix)


def count(segments_BL: jax.Array, exclude_prefix: int) -> jax.Array:
    """The number of examples that `loss` counts in these rows, float32 scalar."""
    first_seen = (segments_BL > 0) & (_places(segments_BL) == exclude_prefix)
    return jnp.sum(first_seen.astype(jnp.float32))


def pooled(
    encoded_BLD: jax.Array, segments_BL: jax.Array, exclude_prefix: int
) -> tuple[jax.Array, jax.Array]:
    """Means of the encoder's states over each segment of each row, without its first tokens.

    Args:
      encoded_BLD: of the encoder.
      segments_BL: int32, numbered from 1 in each row, 0 for padding.
      exclude_prefix: how many tokens at the start of each segment do not count.

    Returns:
      (means_BSD, float32, S = L + 1; counts_BS, the tokens that each is a mean of).
    """
    length = segments_BL.shape[1]
    seen_BL = _seen(segments_BL, exclude_prefix).astype(jnp.float32)

    def sums(x: jax.Array) -> jax.Array:
        by_row = functools.partial(jax.ops.segment_sum, num_segments=length + 1)
        return jax.vmap(by_row)(x, segments_BL)

    counts_BS = sums(seen_BL)
    sums_BSD = sums(encoded_BLD.astype(jnp.float32) * seen_BL[..., None])
    return sums_BSD / jnp.maximum(counts_BS, 1.0)[..., None], counts_BS


def classify(params: Params, x: jax.Array) -> jax.Array:
    """Logits [..., N] of states [..., D]; `params` is the subtree "sharing/adversary"."""
    for number in range(len(params)):
        layer = params[f"dense_{number}"]
        x = jax.nn.relu(x) if number else x
        rows = x.reshape(-1, x.shape[-1]) @ layer["kernel"] + layer["bias"][None]
        x = rows.reshape(*x.shape[:-1], -1)
    return x


def loss(
    cfg: AdversaryConfig,
    params: Params,
    encoded_BLD: jax.Array,
    segments_BL: jax.Array,
    task_ids_BL: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The classifier's cross-entropy, to be added to the loss of the tasks.

    Its gradient is the classifier's own for `params`, and minus lambda times it for `encoded_BLD`.

    Args:
      cfg: the adversary.
      params: the subtree "sharing/adversary".
      encoded_BLD: of the encoder.
      segments_BL: int32, 0 for padding.
      task_ids_BL: int32, the task of every token, 0 for padding.
      step: int32 scalar, updates done so far.

    Returns:
      (sum of the cross-entropy over examples, the number of examples, both float32 scalars; what to
      log: sums "adversary_correct", and "adversary_strength").
    """
    factor = strength(cfg, step)
    encoded_BLD = reverse_gradient(encoded_BLD, factor)
    means_BSD, counts_BS = pooled(encoded_BLD, segments_BL, cfg.exclude_prefix)
    logits_BSN = classify(params, means_BSD)
    by_row = functools.partial(jax.ops.segment_max, num_segments=means_BSD.shape[1])
    tasks_BS = jnp.maximum(jax.vmap(by_row)(task_ids_BL, segments_BL), 0)
    real_BS = ((counts_BS > 0) & (tasks_BS > 0)).astype(jnp.float32)
    target_BS = jnp.maximum(tasks_BS - 1, 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits_BSN), target_BS[..., None], axis=-1)
    correct_BS = (jnp.argmax(logits_BSN, axis=-1) == target_BS) * real_BS
    metrics = {"adversary_correct": jnp.sum(correct_BS), "adversary_strength": factor}
    return -jnp.sum(picked[..., 0] * real_BS), jnp.sum(real_BS), metrics

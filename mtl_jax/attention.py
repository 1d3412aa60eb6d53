"""T5 attention: no 1/sqrt(d), an additive bias by relative position, and packed segments.

`attend` has one meaning and three implementations: the reference below, and in `kernels/` plain XLA
loops and hand-written kernels that keep no array of queries x keys.

Letters in names: B batch, T query positions, S key positions, H heads, K head dimension, L inputs,
R continuations of a row (decoding).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mtl_jax.errors import UserError
from mtl_jax.kernels.bias import relative_bias, relative_position_bucket
from mtl_jax.kernels.flash import Call, flash_attention
from mtl_jax.model_config import ATTENTION

MASKED = -1e10  # as in T5X: far below any logit, yet finite in float32

# Up to so many pairs of a row and head, one product of everything is the fastest on a CPU
# (benchmarks/attention.py).
NAIVE_PAIRS = 128 * 128


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    bias_table: jax.Array | None,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    causal: bool = False,
    bidirectional: bool = True,
    max_distance: int = 128,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Attention of T5 over packed rows.

    A query sees the keys of its own segment; segment 0 is padding, which sees and shows nothing.
    Queries without any key give zeros. Softmax statistics are float32 in every dtype.

    Args:
      q_BTHK: queries; logits are not scaled by 1/sqrt(K).
      k_BSHK: keys.
      v_BSHK: values.
      bias_table: [buckets, heads], or None (cross-attention).
      q_segments_BT: int32.
      kv_segments_BS: int32.
      causal: hide keys after the query.
      bidirectional: how the bias table is laid out (encoder True, decoder False).
      max_distance: of the bias.
      dropout_rate: probability to drop a key of a head for all queries of a row, as in T5X. What is
        dropped is a function of `dropout_rng` and the indices alone, the same in every
        implementation and on every mesh.
      dropout_rng: required when `dropout_rate` is to apply; None turns dropout off.
      impl: a name of `model_config.ATTENTION`.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.

    Raises:
      UserError: an unknown `impl`, or "pallas" compiled for a device without a kernel.
    """
    if dropout_rng is not None and dropout_rate > 0.0:
        v_BSHK = _drop_keys(v_BSHK, dropout_rate, dropout_rng)
    arrays = (q_BTHK, k_BSHK, v_BSHK, bias_table, q_segments_BT, kv_segments_BS)
    static: Any = {"causal": causal, "bidirectional": bidirectional, "max_distance": max_distance}
    kind = chosen(impl, q_BTHK.shape[1], k_BSHK.shape[1])
    if kind == "naive":
        return _naive(*arrays, **static)
    return _flash(Call(impl=kind, **static), *arrays)


_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("attention_platform", default="")


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
    """What is traced inside is for this platform, such as "tpu", whatever JAX's default device is.

    `jax.lax.platform_dependent` would need no such help, but it traces every implementation: that
    is seconds for a train step.
    """
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def chosen(impl: str, queries: int, keys: int) -> str:
    """What `attend` runs: "naive", or an implementation of `kernels.flash`.

    Args:
      impl: a name of `model_config.ATTENTION`.
      queries: T.
      keys: S.

    Raises:
      UserError: an unknown name, or "pallas" for a platform without a kernel.
    """
    target = _PLATFORM.get() or jax.default_backend()
    kernel = {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu"}.get(target)
    if impl not in ATTENTION:
        raise UserError(f"T5.attention must be one of {', '.join(ATTENTION)}, got {impl!r}.")
    if impl == "pallas" and kernel is None:
        raise UserError(
            f'T5.attention = "pallas" has no kernel for "{target}"; use "auto" or "xla".'
        )
    if impl == "auto" and kernel is None:
        return "naive" if queries * keys <= NAIVE_PAIRS else "xla"
    return impl if impl in ("naive", "xla") else kernel or "xla"


def _drop_keys(v_BSHK: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    # Dropping a weight for all queries alike is dropping the value that it multiplies, which any
    # implementation can do without knowing of it.
    batch, keys, heads, _ = v_BSHK.shape
    keep_BHS = jax.random.bernoulli(rng, 1.0 - rate, (batch, heads, keys))
    scale_BHS = keep_BHS.astype(v_BSHK.dtype) / (1.0 - rate)
    return v_BSHK * scale_BHS.swapaxes(1, 2)[..., None]


def _flash(call: Call, *arrays: jax.Array | None) -> jax.Array:
    """`flash_attention` on every device's share of the batch and the heads.

    XLA cannot partition a kernel by itself, and would run the loops of `xla` on whole arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(flash_attention, call)
    if mesh.empty or mesh.size == 1 or not nn.get_logical_axis_rules():
        return run(*arrays)

    def place(x: jax.Array | None, *names: str) -> PartitionSpec:
        if x is None:
            return PartitionSpec()
        axes = nn.logical_to_mesh_axes(names)
        shards = [math.prod(mesh.shape[a] for a in _names(axis)) for axis in axes]
        # What does not divide is computed whole by every device.
        fits = zip(axes, x.shape, shards, strict=True)
        return PartitionSpec(*(axis if size % count == 0 else None for axis, size, count in fits))

    q = place(arrays[0], "batch", "length", "heads", "kv")
    segments = place(arrays[4], "batch", "length")
    table = place(arrays[3], "relpos_buckets", "heads")
    # The table is whole on every share of the batch, so its gradient is summed over them.
    return jax.shard_map(
        run, in_specs=(q, q, q, table, segments, segments), out_specs=q, check_vma=False
    )(*arrays)


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _naive(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    bias_table: jax.Array | None,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    causal: bool,
    bidirectional: bool,
    max_distance: int,
) -> jax.Array:
    queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
    logits = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    if bias_table is not None:
        bias = relative_bias(
            bias_table, queries, keys, bidirectional=bidirectional, max_distance=max_distance
        )
        logits = logits + bias.astype(jnp.float32)[None]
    seen_BTS = (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]) & (
        kv_segments_BS[:, None, :] > 0
    )
    if causal:
        seen_BTS &= (np.arange(queries)[:, None] >= np.arange(keys)[None, :])[None]
    return _weighted_values(logits, seen_BTS, v_BSHK)


def step_over_past(
    q_BRHK: jax.Array,
    k_BRHKS: jax.Array,
    v_BRHKS: jax.Array,
    own_k_BRHK: jax.Array,
    own_v_BRHK: jax.Array,
    bias_table: jax.Array,
    position: jax.Array,
    *,
    max_distance: int = 128,
) -> jax.Array:
    """One decoding step of self-attention: the query at `position` over earlier keys and its own.

    The cache is only read; who owns it writes this step's entry afterwards. Its positions stand
    last, where a CPU's vectors run over them.

    Args:
      q_BRHK: the queries of this step, for each row its R continuations.
      k_BRHKS: cached keys; those at `position` and later are not seen.
      v_BRHKS: cached values.
      own_k_BRHK: the keys of this step.
      own_v_BRHK: the values of this step.
      bias_table: [buckets, heads] of the decoder.
      position: int32 scalar, position of the query.
      max_distance: of the bias.

    Returns:
      [B, R, H, K].
    """
    keys = k_BRHKS.shape[-1]
    # The last one is the step's own.
    distance = jnp.append(jnp.arange(keys, dtype=jnp.int32) - position, jnp.int32(0))
    bucket = relative_position_bucket(
        distance, bidirectional=False, num_buckets=bias_table.shape[0], max_distance=max_distance
    )
    bias_HS = jnp.take(bias_table, bucket, axis=0).T.astype(jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    past = product("BRHK,BRHKS->BRHS", q_BRHK, k_BRHKS)
    own = product("BRHK,BRHK->BRH", q_BRHK, own_k_BRHK)
    logits = jnp.concatenate([past, own[..., None]], axis=-1) + bias_HS[None, None]
    seen_S = jnp.append(distance[:-1] < 0, True)
    weights = _softmax(logits, seen_S[None, None, None]).astype(v_BRHKS.dtype)
    out_BRHK = jnp.einsum("BRHS,BRHKS->BRHK", weights[..., :-1], v_BRHKS)
    return out_BRHK + weights[..., -1:] * own_v_BRHK


def step_over_inputs(
    q_BRHK: jax.Array, k_BHKL: jax.Array, v_BHKL: jax.Array, segments_BL: jax.Array
) -> jax.Array:
    """One decoding step of cross-attention: all continuations of a row over its inputs.

    Args:
      q_BRHK: the queries of this step.
      k_BHKL: keys of the inputs, shared by the continuations.
      v_BHKL: values of the inputs.
      segments_BL: int32, 0 where there is no input.

    Returns:
      [B, R, H, K].
    """
    logits = jnp.einsum("BRHK,BHKL->BHRL", q_BRHK, k_BHKL, preferred_element_type=jnp.float32)
    weights = _softmax(logits, (segments_BL > 0)[:, None, None, :]).astype(v_BHKL.dtype)
    return jnp.einsum("BHRL,BHKL->BRHK", weights, v_BHKL)


def _weighted_values(logits_BHTS: jax.Array, seen_BTS: jax.Array, v_BSHK: jax.Array) -> jax.Array:
    weights = _softmax(logits_BHTS, seen_BTS[:, None])
    return jnp.einsum("BHTS,BSHK->BTHK", weights.astype(v_BSHK.dtype), v_BSHK)


def _softmax(logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Over the last axis; what is not seen has weight 0, also for a query that sees nothing."""
    weights = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1)
    return jnp.where(seen, weights, 0.0)

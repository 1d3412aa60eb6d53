"""T5 attention: no 1/sqrt(d), an additive bias by relative position, and packed segments.

Letters in names: B batch, T query positions, S key positions, H heads, K head dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e10  # as in T5X: far below any logit, yet finite in float32


def relative_position_bucket(
    distance: np.ndarray | jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """Bucket of a relative position, T5 (Raffel et al. 2020, section 2.1; same numbers as T5X).

    Args:
      distance: int32, any shape: key position minus query position.
      bidirectional: encoder (half of the buckets for each sign) or decoder (keys ahead: bucket 0).
      num_buckets: buckets in all.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 of the shape of `distance`, values in [0, num_buckets).
    """
    behind = -jnp.asarray(distance, jnp.int32)
    bucket = jnp.zeros_like(behind)
    if bidirectional:
        num_buckets //= 2
        bucket = jnp.where(behind < 0, num_buckets, 0)
        behind = jnp.abs(behind)
    else:
        behind = jnp.maximum(behind, 0)
    exact = num_buckets // 2
    log_ratio = jnp.log(jnp.maximum(behind, 1).astype(jnp.float32) / exact) / np.log(
        max_distance / exact
    )
    # The small constant keeps exact powers on their side of the boundary, as in T5X.
    far = exact + ((log_ratio + np.finfo(np.float32).eps) * (num_buckets - exact)).astype(jnp.int32)
    return bucket + jnp.where(behind < exact, behind, jnp.minimum(far, num_buckets - 1))


def relative_bias(
    table: jax.Array, queries: int, keys: int, *, bidirectional: bool, max_distance: int
) -> jax.Array:
    """The bias of all (query, key) pairs from the table.

    The bias depends on `key - query` alone, so one row of `queries + keys` values is looked up and
    laid out as a Toeplitz matrix by a reshape: the gradient is then a plain sum, where a gather of
    all pairs would need a slow scatter.

    Args:
      table: [buckets, heads].
      queries: T.
      keys: S.
      bidirectional: as in `relative_position_bucket`.
      max_distance: as in `relative_position_bucket`.

    Returns:
      [heads, T, S] in the dtype of the table.
    """
    period = queries + keys
    offset = np.arange(period)
    distance = np.where(offset < keys, offset, offset - period)
    bucket = relative_position_bucket(
        distance,
        bidirectional=bidirectional,
        num_buckets=table.shape[0],
        max_distance=max_distance,
    )
    row = jnp.take(
        table, bucket, axis=0
    ).T  # [heads, period]; entry n is the bias of distance n modulo the period
    heads = table.shape[1]
    tiled = jnp.broadcast_to(row[:, None, :], (heads, queries, period)).reshape(heads, -1)
    toeplitz = tiled[:, : queries * (period - 1)].reshape(heads, queries, period - 1)
    return toeplitz[:, :, :keys]


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
) -> jax.Array:
    """Attention of T5 over packed rows; the reference implementation.

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
      dropout_rate: probability to drop an attention weight, the same for all queries of a head.
      dropout_rng: required when `dropout_rate` is to apply; None turns dropout off.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
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
    return _weighted_values(logits, seen_BTS, v_BSHK, dropout_rate, dropout_rng)


def attend_cached(
    q_B1HK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    bias_table: jax.Array | None,
    position: jax.Array | None,
    kv_segments_BS: jax.Array,
    *,
    max_distance: int = 128,
) -> jax.Array:
    """One decoding step: the query at `position` over a cache of keys and values.

    Args:
      q_B1HK: the query of this step.
      k_BSHK: cached keys.
      v_BSHK: cached values.
      bias_table: [buckets, heads] of the decoder, or None (cross-attention).
      position: int32 scalar, position of the query: later keys are hidden. None (cross-attention):
        every key is seen; a bias table needs a position.
      kv_segments_BS: int32, 0 where there is no key.
      max_distance: of the bias.

    Returns:
      [B, 1, H, K].
    """
    logits = jnp.einsum("BTHK,BSHK->BHTS", q_B1HK, k_BSHK, preferred_element_type=jnp.float32)
    seen_BTS = (kv_segments_BS > 0)[:, None, :]
    if position is not None:
        distance = jnp.arange(k_BSHK.shape[1], dtype=jnp.int32) - position
        seen_BTS &= (distance <= 0)[None, None, :]
        if bias_table is not None:
            bucket = relative_position_bucket(
                distance,
                bidirectional=False,
                num_buckets=bias_table.shape[0],
                max_distance=max_distance,
            )
            bias_HS = jnp.take(bias_table, bucket, axis=0).T.astype(jnp.float32)
            logits = logits + bias_HS[None, :, None, :]
    return _weighted_values(logits, seen_BTS, v_BSHK, 0.0, None)


def _weighted_values(
    logits_BHTS: jax.Array,
    seen_BTS: jax.Array,
    v_BSHK: jax.Array,
    dropout_rate: float,
    dropout_rng: jax.Array | None,
) -> jax.Array:
    seen = seen_BTS[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits_BHTS, MASKED), axis=-1)
    weights = jnp.where(seen, weights, 0.0)
    if dropout_rng is not None and dropout_rate > 0.0:
        batch, heads, _, keys = weights.shape
        keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, (batch, heads, 1, keys))
        weights = weights * (keep.astype(weights.dtype) / (1.0 - dropout_rate))
    return jnp.einsum("BHTS,BSHK->BTHK", weights.astype(v_BSHK.dtype), v_BSHK)

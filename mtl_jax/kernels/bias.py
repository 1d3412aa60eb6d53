"""T5's relative position bias: buckets, Toeplitz tiles, and the gradient of the table.

The bias of a pair depends on `distance = key position - query position` alone, and is constant
beyond `max_distance` on either side. So a block of pairs far from the diagonal has one scalar per
head, and all blocks with the same `base = first key - first query` have the same tile.

Letters in names: H heads, N buckets, T query positions, S key positions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.kernels.blocks import Near
from mtl_jax.kernels.tile import HIDDEN


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


def wrapped_distances(rows: int, columns: int) -> np.ndarray:
    """The distances of a tile in the order of `toeplitz`: 0, 1, ..., and then the negative ones."""
    offset = np.arange(rows + columns)
    return np.where(offset < columns, offset, offset - (rows + columns))


def toeplitz(values: jax.Array, rows: int, columns: int) -> jax.Array:
    """[..., rows + columns] in the order of `wrapped_distances` -> [..., rows, columns].

    Entry (r, c) is the value of distance c - r. A reshape does it, so the gradient is a plain sum
    where a gather of all pairs would need a slow scatter.
    """
    period, lead = rows + columns, values.shape[:-1]
    tiled = jnp.broadcast_to(values[..., None, :], (*lead, rows, period)).reshape(*lead, -1)
    return tiled[..., : rows * (period - 1)].reshape(*lead, rows, period - 1)[..., :columns]


def diagonal_sums(tile: jax.Array) -> jax.Array:
    """[..., rows, columns] -> [..., rows + columns], the sums over equal distances.

    The transpose of `toeplitz`, in the same order.
    """
    *lead, rows, columns = tile.shape
    none = [(0, 0)] * len(lead)
    flat = jnp.pad(tile, [*none, (0, 0), (0, rows - 1)]).reshape(*lead, -1)
    return jnp.sum(jnp.pad(flat, [*none, (0, rows)]).reshape(*lead, rows, rows + columns), axis=-2)


def relative_bias(
    table: jax.Array, queries: int, keys: int, *, bidirectional: bool, max_distance: int
) -> jax.Array:
    """The bias of all (query, key) pairs from the table.

    Args:
      table: [buckets, heads].
      queries: T.
      keys: S.
      bidirectional: as in `relative_position_bucket`.
      max_distance: as in `relative_position_bucket`.

    Returns:
      [heads, T, S] in the dtype of the table.
    """
    bucket = relative_position_bucket(
        wrapped_distances(queries, keys),
        bidirectional=bidirectional,
        num_buckets=table.shape[0],
        max_distance=max_distance,
    )
    return toeplitz(jnp.take(table, bucket, axis=0).T, queries, keys)


def _buckets_of(near: Near, num_buckets: int) -> tuple[jax.Array, jax.Array]:
    """Buckets of the near tiles [near.count, q + k], and of the two far sides [2]."""
    bases = near.first + near.step * np.arange(near.count)
    distance = bases[:, None] + wrapped_distances(near.q, near.k)[None, :]
    bucket = lambda d: relative_position_bucket(  # noqa: E731
        d,
        bidirectional=near.bidirectional,
        num_buckets=num_buckets,
        max_distance=near.max_distance,
    )
    return bucket(distance), bucket(np.array([-near.max_distance, near.max_distance]))


def tiles(table_NH: jax.Array | None, near: Near, heads: int) -> tuple[jax.Array, jax.Array]:
    """The tiles of the near blocks and the scalars of the far ones.

    Args:
      table_NH: float [buckets, heads], or None for no bias: zeros.
      near: which blocks are near.
      heads: H.

    Returns:
      (float32 [heads, near.count, near.q, near.k]; float32 [heads, 2]: keys far behind, far ahead).
      Under a causal mask the pairs with the key ahead hold `tile.HIDDEN`: every block that the
      diagonal crosses is near, so the mask costs nothing in a kernel.
    """
    if table_NH is None:
        near_H = jnp.zeros((heads, near.count, near.q + near.k), jnp.float32)
        far_HP = jnp.zeros((heads, 2), jnp.float32)
    else:
        near_bucket, far_bucket = _buckets_of(near, table_NH.shape[0])
        table_HN = table_NH.astype(jnp.float32).T
        near_H, far_HP = table_HN[:, near_bucket], table_HN[:, far_bucket]
    if near.causal:
        bases = near.first + near.step * np.arange(near.count)
        ahead = bases[:, None] + wrapped_distances(near.q, near.k)[None, :] > 0
        near_H = jnp.where(ahead[None], jnp.float32(HIDDEN), near_H)
    return toeplitz(near_H, near.q, near.k), far_HP


def table_gradient(
    tiles_HtTS: jax.Array, far_HP: jax.Array, near: Near, num_buckets: int
) -> jax.Array:
    """The gradient of the table from sums of the logits' gradient.

    Args:
      tiles_HtTS: float32 [heads, near.count, near.q, near.k], summed over all blocks of each base.
      far_HP: float32 [heads, 2], summed over the far blocks: keys behind, keys ahead.
      near: which blocks are near.
      num_buckets: rows of the table.

    Returns:
      float32 [num_buckets, heads]. Sums over a one-hot matrix, not a scatter: on a GPU that would
      add in an order that changes from run to run.
    """
    near_bucket, far_bucket = _buckets_of(near, num_buckets)
    sums = diagonal_sums(tiles_HtTS).reshape(tiles_HtTS.shape[0], -1)
    sums = jnp.concatenate([sums, far_HP], axis=1)
    buckets = jnp.concatenate([near_bucket.reshape(-1), far_bucket])
    one_hot = jax.nn.one_hot(buckets, num_buckets, dtype=jnp.float32)
    # A few thousand products: the workspace of a matrix product would be larger than all else.
    return jnp.sum(sums[:, :, None] * one_hot[None], axis=1).T

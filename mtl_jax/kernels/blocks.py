"""Blocks of queries and keys: which ones can meet, and which ones need a bias tile of their own.

Letters in names: B batch, T query positions, S key positions, I blocks of queries, J blocks of
keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Near:
    """The bases (first key minus first query of a block) whose tile is not one constant.

    Attributes:
      q: queries of a block.
      k: keys of a block; `q` divides `k` or `k` divides `q`.
      causal: keys after their query are hidden.
      bidirectional: the bias tells keys ahead apart.
      max_distance: the bias is constant from this distance on.
    """

    q: int
    k: int
    causal: bool
    bidirectional: bool
    max_distance: int

    @property
    def step(self) -> int:
        """Bases are multiples of this."""
        return min(self.q, self.k)

    @property
    def first(self) -> int:
        """The smallest near base: in the one before, even the last key is far behind."""
        return -((self.max_distance + self.k - 2) // self.step) * self.step

    @property
    def last(self) -> int:
        """The largest near base: in the next one, even the last query has all keys far ahead."""
        # Without directions all keys ahead have the bias of distance 0, so ahead is far at once;
        # blocks that the diagonal crosses stay near for the sake of the causal mask.
        future = self.max_distance if self.bidirectional and not self.causal else 1
        return (future + self.q - 2) // self.step * self.step

    @property
    def count(self) -> int:
        """How many bases are near."""
        return (self.last - self.first) // self.step + 1

    def keys_of(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The near key blocks [start, stop) of query block `i`, before clipping to what exists."""
        start = _ceil(jnp.maximum(i * self.q + self.first, 0), self.k)
        return start, _floor(i * self.q + self.last, self.k) + 1

    def queries_of(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The near query blocks [start, stop) of key block `j`, before clipping."""
        start = _ceil(jnp.maximum(j * self.k - self.last, 0), self.q)
        return start, _floor(j * self.k - self.first, self.q) + 1

    def index(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Which near tile the block (i, j) has; outside [0, count) for far blocks."""
        base = j * self.k - i * self.q - self.first
        return jnp.where(base < 0, -1, _floor(jnp.maximum(base, 0), self.step))


def _floor(value: jax.Array, size: int) -> jax.Array:
    # Of numbers that are not negative; `//` would compile to a correction for the others.
    return jax.lax.div(value, jnp.asarray(size, value.dtype))


def _ceil(value: jax.Array, size: int) -> jax.Array:
    return _floor(value + (size - 1), size)


def power_of_two(length: int, least: int = 16) -> int:
    """The smallest power of two that holds `length`: blocks need not be longer."""
    return max(least, 1 << (length - 1).bit_length())


def padded(length: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-length // block) * block


def pad_to(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Zeros behind, up to `length`."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def meeting(
    q_segments_BT: jax.Array, kv_segments_BS: jax.Array, q: int, k: int, causal: bool
) -> jax.Array:
    """Whether any query of a block may see any key of another: bool [B, I, J].

    Segments are compared by their range within a block, so rows in order (packed ones) are exact
    and others get a superset.
    """
    big = jnp.iinfo(jnp.int32).max

    def extent(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        x = segments.reshape(segments.shape[0], -1, size)
        return jnp.min(jnp.where(x > 0, x, big), axis=2), jnp.max(x, axis=2)

    q_low, q_high = extent(q_segments_BT, q)
    k_low, k_high = extent(kv_segments_BS, k)
    meet = (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])
    # A block of padding only has the range [big, 0].
    meet &= (q_high > 0)[:, :, None] & (k_high > 0)[:, None, :]
    if causal:
        last_query = np.arange(meet.shape[1]) * q + q - 1
        first_key = np.arange(meet.shape[2]) * k
        meet &= (first_key[None, :] <= last_query[:, None])[None]
    return meet


def key_ranges(meet_BIJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For every query block the range [start, stop) of key blocks that it meets: int32 [B, I]."""
    number = np.arange(meet_BIJ.shape[2], dtype=np.int32)[None, None]
    stop = jnp.max(jnp.where(meet_BIJ, number + 1, 0), axis=2)
    start = jnp.min(jnp.where(meet_BIJ, number, meet_BIJ.shape[2]), axis=2)
    return jnp.minimum(start, stop), stop


def query_ranges(meet_BIJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For every key block the range [start, stop) of query blocks that it meets: int32 [B, J]."""
    return key_ranges(meet_BIJ.swapaxes(1, 2))

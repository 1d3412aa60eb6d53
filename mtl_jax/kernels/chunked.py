"""The blocks of attention as plain XLA loops: the CPU's implementation and everyone's fallback.

Rows of the batch go one after another, so that each skips the blocks that its own segments skip;
the outer loop goes over blocks of queries (of keys in the backward pass), the inner one over the
blocks that these can meet.

Letters in names: B batch, T query positions, S key positions, H heads, K head dimension, N buckets,
I blocks of queries, J blocks of keys; lower-case t, s: positions within a block.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.kernels import bias, blocks, tile

# Long enough for a matrix product, short enough for a cache.
BLOCK = 128


class _Layout:
    """Padded arrays and the ranges of blocks; what forward and backward pass share."""

    def __init__(self, call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any):
        size_q, size_k = call.blocks or (BLOCK, BLOCK)
        self.t = min(size_q, blocks.power_of_two(q.shape[1]))
        self.s = min(size_k, blocks.power_of_two(k.shape[1]))
        self.rows, self.queries, self.heads, self.dim = q.shape
        length_q, length_k = (
            blocks.padded(q.shape[1], self.t),
            blocks.padded(k.shape[1], self.s),
        )
        self.q = blocks.pad_to(q, 1, length_q)
        self.k, self.v = blocks.pad_to(k, 1, length_k), blocks.pad_to(v, 1, length_k)
        self.q_seg = blocks.pad_to(q_seg, 1, length_q)
        self.kv_seg = blocks.pad_to(kv_seg, 1, length_k)
        self.near = blocks.Near(self.t, self.s, call.causal, call.bidirectional, call.max_distance)
        self.biased = table is not None
        self.tiles, self.far = bias.tiles(table, self.near, self.heads)
        self.meet = blocks.meeting(self.q_seg, self.kv_seg, self.t, self.s, call.causal)


def _block(x: jax.Array, row: Any, number: Any, size: int) -> jax.Array:
    """[B, positions, ...] -> [size, ...]: one block of one row."""
    start = (row, number * size) + (0,) * (x.ndim - 2)
    return jax.lax.dynamic_slice(x, start, (1, size, *x.shape[2:]))[0]


def _bias_of(lay: _Layout, i: Any, j: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(bias broadcasting to [H, t, s], whether the block is near, its tile, its far side)."""
    index = lay.near.index(i, j)
    is_near = (index >= 0) & (index < lay.near.count)
    index, side = jnp.clip(index, 0, lay.near.count - 1), (index > 0).astype(jnp.int32)
    near_Hts = jax.lax.dynamic_index_in_dim(lay.tiles, index, axis=1, keepdims=False)
    far_H = jax.lax.dynamic_index_in_dim(lay.far, side, axis=1, keepdims=False)
    return jnp.where(is_near, near_Hts, far_H[:, None, None]), is_near, index, side


def _logits(lay: _Layout, q_tHK: Any, k_sHK: Any, qs_t: Any, ks_s: Any, bias_Hts: Any) -> jax.Array:
    s_Hts = jnp.einsum("tHK,sHK->Hts", q_tHK, k_sHK, preferred_element_type=jnp.float32)
    same = (qs_t[:, None] == ks_s[None, :]) & (ks_s > 0)[None, :]
    return jnp.where(same[None], s_Hts + bias_Hts, tile.HIDDEN)


def forward(call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any) -> Any:
    """(o_BTHK float32, lse_BHT float32); see `flash.flash_attention`."""
    lay = _Layout(call, q, k, v, table, q_seg, kv_seg)
    start_BI, stop_BI = blocks.key_ranges(lay.meet)
    count_i = start_BI.shape[1]

    def query_block(_: None, number: jax.Array) -> tuple[None, Any]:
        row, i = jnp.divmod(number, count_i)
        q_tHK, qs_t = _block(lay.q, row, i, lay.t), _block(lay.q_seg, row, i, lay.t)

        def key_block(j: jax.Array, carry: Any) -> Any:
            acc_HtK, maximum, total = carry
            k_sHK, v_sHK = _block(lay.k, row, j, lay.s), _block(lay.v, row, j, lay.s)
            ks_s = _block(lay.kv_seg, row, j, lay.s)
            bias_Hts = _bias_of(lay, i, j)[0]
            s_Hts = _logits(lay, q_tHK, k_sHK, qs_t, ks_s, bias_Hts)
            p, factor, maximum, total = tile.online_softmax(s_Hts, maximum, total, axis=2)
            pv = jnp.einsum(
                "Hts,sHK->HtK", p.astype(v.dtype), v_sHK, preferred_element_type=jnp.float32
            )
            return acc_HtK * factor + pv, maximum, total

        zero = jnp.zeros((lay.heads, lay.t, 1), jnp.float32)
        initial = (jnp.zeros((lay.heads, lay.t, lay.dim), jnp.float32), zero + tile.FLOOR, zero)
        acc, maximum, total = jax.lax.fori_loop(
            start_BI[row, i], stop_BI[row, i], key_block, initial
        )
        o_tHK = tile.normalised(acc, total).transpose(1, 0, 2)
        return None, (o_tHK, tile.log_sum_exp(maximum, total)[..., 0])

    numbers = jnp.arange(lay.rows * count_i, dtype=jnp.int32)
    _, (o, lse) = jax.lax.scan(query_block, None, numbers)
    o_BTHK = o.reshape(lay.rows, -1, lay.heads, lay.dim)[:, : lay.queries]
    lse_BIHt = lse.reshape(lay.rows, count_i, lay.heads, lay.t)
    lse_BHT = lse_BIHt.swapaxes(1, 2).reshape(lay.rows, lay.heads, -1)[:, :, : lay.queries]
    return o_BTHK, lse_BHT


def backward(
    call: Any,
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    q_seg: Any,
    kv_seg: Any,
    do: Any,
    lse_BHT: Any,
    delta_BHT: Any,
) -> tuple[Any, ...]:
    """(dq_BTHK, dk_BSHK, dv_BSHK float32, dtable_NH float32 or None)."""
    lay = _Layout(call, q, k, v, table, q_seg, kv_seg)
    start_BJ, stop_BJ = blocks.query_ranges(lay.meet)
    count_j, length_q = start_BJ.shape[1], lay.q.shape[1]
    do = blocks.pad_to(do, 1, length_q)
    lse_BTH = blocks.pad_to(lse_BHT.swapaxes(1, 2), 1, length_q)
    delta_BTH = blocks.pad_to(delta_BHT.swapaxes(1, 2), 1, length_q)

    def key_block(carry: Any, number: jax.Array) -> tuple[Any, Any]:
        dq_BTHK, tiles, far = carry
        row, j = jnp.divmod(number, count_j)
        k_sHK, v_sHK = _block(lay.k, row, j, lay.s), _block(lay.v, row, j, lay.s)
        ks_s = _block(lay.kv_seg, row, j, lay.s)

        def query_block(i: jax.Array, carry: Any) -> Any:
            dq_BTHK, tiles, far, dk_sHK, dv_sHK = carry
            q_tHK, do_tHK = _block(lay.q, row, i, lay.t), _block(do, row, i, lay.t)
            lse_Ht1 = _block(lse_BTH, row, i, lay.t).T[..., None]
            delta_Ht1 = _block(delta_BTH, row, i, lay.t).T[..., None]
            bias_Hts, is_near, index, side = _bias_of(lay, i, j)
            qs_t = _block(lay.q_seg, row, i, lay.t)
            s_Hts = _logits(lay, q_tHK, k_sHK, qs_t, ks_s, bias_Hts)
            p = tile.probabilities(s_Hts, lse_Ht1)
            dp = jnp.einsum("tHK,sHK->Hts", do_tHK, v_sHK, preferred_element_type=jnp.float32)
            ds = tile.logits_gradient(p, dp, delta_Ht1)
            if lay.biased:
                # Far tiles count by their sum alone.
                near = jax.lax.dynamic_index_in_dim(tiles, index, axis=1, keepdims=False)
                near = near + jnp.where(is_near, ds, 0.0)
                tiles = jax.lax.dynamic_update_index_in_dim(tiles, near, index, axis=1)
                sums_H1 = jnp.where(is_near, 0.0, jnp.sum(ds, axis=(1, 2)))[:, None]
                far = far + sums_H1 * (jnp.arange(2) == side)[None]
            p, ds = p.astype(v.dtype), ds.astype(q.dtype)
            f32: Any = {"preferred_element_type": jnp.float32}
            dv_sHK = dv_sHK + jnp.einsum("Hts,tHK->sHK", p, do_tHK, **f32)
            dk_sHK = dk_sHK + jnp.einsum("Hts,tHK->sHK", ds, q_tHK, **f32)
            dq_tHK = jnp.einsum("Hts,sHK->tHK", ds, k_sHK, **f32)
            dq_tHK = dq_tHK + _block(dq_BTHK, row, i, lay.t)
            dq_BTHK = jax.lax.dynamic_update_slice(dq_BTHK, dq_tHK[None], (row, i * lay.t, 0, 0))
            return dq_BTHK, tiles, far, dk_sHK, dv_sHK

        zero = jnp.zeros((lay.s, lay.heads, lay.dim), jnp.float32)
        dq_BTHK, tiles, far, dk, dv = jax.lax.fori_loop(
            start_BJ[row, j], stop_BJ[row, j], query_block, (dq_BTHK, tiles, far, zero, zero)
        )
        return (dq_BTHK, tiles, far), (dk, dv)

    initial = (
        jnp.zeros(lay.q.shape, jnp.float32),
        jnp.zeros(lay.tiles.shape if lay.biased else (), jnp.float32),
        jnp.zeros(lay.far.shape if lay.biased else (), jnp.float32),
    )
    numbers = jnp.arange(lay.rows * count_j, dtype=jnp.int32)
    (dq, tiles, far), (dk, dv) = jax.lax.scan(key_block, initial, numbers)
    dk, dv = (x.reshape(lay.rows, -1, lay.heads, lay.dim)[:, : k.shape[1]] for x in (dk, dv))
    dtable = bias.table_gradient(tiles, far, lay.near, table.shape[0]) if lay.biased else None
    return dq[:, : lay.queries], dk, dv, dtable

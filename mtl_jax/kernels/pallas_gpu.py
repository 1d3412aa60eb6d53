"""Attention kernels for NVIDIA GPUs, in Pallas on its Triton backend.

One program owns a block of queries (of keys in the pass for dk and dv) and loops over the blocks it
can meet: first those far on one side of the diagonal, whose bias is one scalar, then the near ones,
which load their tile, then those far on the other side. The bias gradient of the near tiles has a
pass of its own: its programs own a tile of the bias and loop over the blocks that share it, so
nothing is added atomically.

Pallas' Triton backend is deprecated in newer JAX. What only it has is in `_compiler_params`; the
bodies use loads, `jax.numpy` and loops, as jax-triton and Mosaic GPU kernels would.

Letters in names: B batch, T query positions, S key positions, H heads, K head dimension, N buckets,
I blocks of queries, J blocks of keys, n near tiles.
"""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from mtl_jax.kernels import bias, blocks, tile


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block sizes of one pass and how Triton compiles it."""

    q: int
    k: int
    warps: int
    stages: int


# The fastest of some forty tried on an H200 (docs/kernel.md); the keys are the passes.
TUNINGS = {
    "forward": Tuning(64, 64, 4, 2),
    "queries": Tuning(64, 64, 4, 2),
    "keys": Tuning(64, 64, 4, 3),
    "table": Tuning(64, 64, 4, 3),
}
# Products of float32 run outside the tensor cores and hold their operands in registers: longer
# blocks spill them and take minutes to compile.
FLOAT32 = Tuning(32, 32, 8, 1)
_LEAST = 16  # of every dimension of a product on the tensor cores


def _compiler_params(tuning: Tuning) -> Any:
    """What only the Triton backend takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton

        return triton.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages)


def _call(kernel: Any, tuning: Tuning, interpret: bool, **specs: Any) -> Any:
    params = {} if interpret else {"compiler_params": _compiler_params(tuning)}
    call = pl.pallas_call(kernel, interpret=interpret, **params, **specs)

    def run(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return call(*args)

    return run


class _Layout:
    """Padded arrays, near tiles and ranges of blocks for one pass."""

    def __init__(self, call: Any, name: str, q: Any, k: Any, table: Any, q_seg: Any, kv_seg: Any):
        tuning = FLOAT32 if q.dtype == jnp.float32 else TUNINGS[name]
        if call.blocks:
            tuning = dataclasses.replace(tuning, q=call.blocks[0], k=call.blocks[1])
        self.t = min(tuning.q, blocks.power_of_two(q.shape[1], _LEAST))
        self.s = min(tuning.k, blocks.power_of_two(k.shape[1], _LEAST))
        if name in ("keys", "table"):
            # The one sums the far blocks and the other the near ones, along diagonals of blocks.
            self.t = self.s = min(self.t, self.s)
        self.tuning, self.interpret = tuning, call.interpret
        self.rows, _, self.heads, self.dim = q.shape
        self.length_q = blocks.padded(q.shape[1], self.t)
        self.length_k = blocks.padded(k.shape[1], self.s)
        self.causal, self.biased = call.causal, table is not None
        self.tiled = self.biased or self.causal
        self.near = blocks.Near(self.t, self.s, call.causal, call.bidirectional, call.max_distance)
        self.tiles, self.far = bias.tiles(table, self.near, self.heads)
        self.q_seg = blocks.pad_to(q_seg, 1, self.length_q)
        # Padding among the keys never equals a query's segment, not even padding's.
        kv_seg = blocks.pad_to(kv_seg, 1, self.length_k)
        self.meet = blocks.meeting(self.q_seg, kv_seg, self.t, self.s, call.causal)
        self.kv_seg = jnp.where(kv_seg > 0, kv_seg, -1)

    def query(self, x: Any) -> Any:
        return blocks.pad_to(x, 1, self.length_q)

    def key(self, x: Any) -> Any:
        return blocks.pad_to(x, 1, self.length_k)

    def statistic(self, x_BHT: Any) -> Any:
        return blocks.pad_to(x_BHT, 2, self.length_q)


def _sections(lay: _Layout, start: Any, near: tuple[Any, Any], stop: Any) -> tuple[Any, Any]:
    """Where the near blocks begin and end within [start, stop)."""
    if not lay.tiled:
        return stop, stop
    begin = jnp.clip(near[0], start, stop)
    return begin, jnp.clip(near[1], begin, stop)


def _keys_before_near_after(lay: _Layout, i: Any, refs: Any, body: Any, carry: Any) -> Any:
    """Runs `body(j, carry, bias)` over the key blocks that query block i meets."""
    start_ref, stop_ref, tiles_ref, far_ref = refs
    start, stop = start_ref[i], stop_ref[i]
    begin, end = _sections(lay, start, lay.near.keys_of(i), stop)

    def far(side: int) -> Any:
        value = far_ref[side] if lay.biased else 0.0
        return lambda j, carry: body(j, carry, value)

    def near(j: Any, carry: Any) -> Any:
        return body(j, carry, tiles_ref[lay.near.index(i, j)])

    carry = jax.lax.fori_loop(start, begin, far(0), carry)
    if lay.tiled:
        carry = jax.lax.fori_loop(begin, end, near, carry)
        if not lay.causal:
            carry = jax.lax.fori_loop(end, stop, far(1), carry)
    return carry


def _forward_kernel(lay: _Layout, *refs: Any) -> None:
    start, stop, q_ref, k_ref, v_ref, qs_ref, ks_ref, tiles_ref, far_ref, o_ref, lse_ref = refs
    i = pl.program_id(0)
    q, qs = q_ref[...], qs_ref[...]

    def body(j: Any, carry: Any, add: Any) -> Any:
        acc, maximum, total = carry
        keys = pl.ds(j * lay.s, lay.s)
        same = qs[:, None] == ks_ref[keys][None, :]
        s = tile.logits(q, k_ref[keys, :], add, same)
        p, factor, maximum, total = tile.online_softmax(s, maximum, total, axis=1)
        v = v_ref[keys, :]
        return acc * factor + tile.product(p.astype(v.dtype), v, (1, 0)), maximum, total

    zero = jnp.zeros((lay.t, 1), jnp.float32)
    initial = (jnp.zeros((lay.t, lay.dim), jnp.float32), zero + tile.FLOOR, zero)
    bounds = (start, stop, tiles_ref, far_ref)
    acc, maximum, total = _keys_before_near_after(lay, i, bounds, body, initial)
    o_ref[...] = tile.normalised(acc, total).astype(o_ref.dtype)
    lse_ref[...] = tile.log_sum_exp(maximum, total)[:, 0]


def _queries_kernel(lay: _Layout, *refs: Any) -> None:
    start, stop, q_ref, k_ref, v_ref, qs_ref, ks_ref, tiles_ref, far_ref = refs[:9]
    do_ref, lse_ref, delta_ref, dq_ref, exact_ref = refs[9:]
    i = pl.program_id(0)
    q, do, qs = q_ref[...], do_ref[...], qs_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

    def body(j: Any, carry: Any, add: Any) -> Any:
        dq, row_sums = carry
        keys = pl.ds(j * lay.s, lay.s)
        k = k_ref[keys, :]
        p = tile.probabilities(tile.logits(q, k, add, qs[:, None] == ks_ref[keys][None, :]), lse)
        ds = tile.logits_gradient(p, tile.product(do, v_ref[keys, :], (1, 1)), delta)
        return dq + tile.product(ds.astype(k.dtype), k, (1, 0)), row_sums + jnp.sum(ds, axis=1)

    initial = (jnp.zeros((lay.t, lay.dim), jnp.float32), jnp.zeros((lay.t,), jnp.float32))
    bounds = (start, stop, tiles_ref, far_ref)
    dq, row_sums = _keys_before_near_after(lay, i, bounds, body, initial)
    dq_ref[...] = dq.astype(dq_ref.dtype)
    # Rows of ds sum to 0, but for the rounding of the outputs that delta was made of. The other
    # passes add over the queries, where that rounding would show (most of all in the table).
    exact_ref[...] = delta_ref[...] + row_sums


def _keys_kernel(lay: _Layout, *refs: Any) -> None:
    start_ref, stop_ref, q_ref, k_ref, v_ref, qs_ref, ks_ref, tiles_ref, far_ref = refs[:9]
    do_ref, lse_ref, delta_ref, dk_ref, dv_ref, dfar_ref = refs[9:]
    j = pl.program_id(0)
    k, v, ks = k_ref[...], v_ref[...], ks_ref[...]

    def body(i: Any, carry: Any, add: Any, side: int | None) -> Any:
        # Tiles are [keys, queries] here, so that no product needs a transposed left side.
        dk, dv, *far_sums = carry
        queries = pl.ds(i * lay.t, lay.t)
        q, do = q_ref[queries, :], do_ref[queries, :]
        s = tile.logits(k, q, add, ks[:, None] == qs_ref[queries][None, :])
        p = tile.probabilities(s, lse_ref[queries][None, :])
        dv = dv + tile.product(p.astype(do.dtype), do, (1, 0))
        ds = tile.logits_gradient(p, tile.product(v, do, (1, 1)), delta_ref[queries][None, :])
        if lay.biased and side is not None:
            far_sums[side] = far_sums[side] + jnp.sum(ds, axis=1)
        return dk + tile.product(ds.astype(q.dtype), q, (1, 0)), dv, *far_sums

    def far(side: int) -> Any:
        value = far_ref[side] if lay.biased else 0.0
        return lambda i, carry: body(i, carry, value, side)

    start, stop = start_ref[j], stop_ref[j]
    begin, end = _sections(lay, start, lay.near.queries_of(j), stop)
    zero, sums = jnp.zeros(k.shape, jnp.float32), jnp.zeros((lay.s,), jnp.float32)
    carry = (zero, zero, sums, sums)
    if not lay.causal:
        carry = jax.lax.fori_loop(start, begin, far(1), carry)
    if lay.tiled:
        near = lambda i, carry: body(i, carry, tiles_ref[lay.near.index(i, j)], None)  # noqa: E731
        carry = jax.lax.fori_loop(begin, end, near, carry)
        carry = jax.lax.fori_loop(end, stop, far(0), carry)
    dk, dv, behind, ahead = carry
    dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
    dfar_ref[0], dfar_ref[1] = jnp.sum(behind), jnp.sum(ahead)


def _table_kernel(lay: _Layout, parts: int, *refs: Any) -> None:
    count_ref, list_ref, q_ref, k_ref, v_ref, qs_ref, ks_ref, tiles_ref = refs[:8]
    do_ref, lse_ref, delta_ref, sums_ref = refs[8:]
    n, h, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    offset = n + lay.near.first // lay.near.step  # blocks of keys minus blocks of queries
    add = tiles_ref[...]

    def body(number: Any, total: Any) -> Any:
        pair = list_ref[n, part + number * parts]
        blocks_q = jnp.int32(lay.length_q // lay.t)
        row, i = jax.lax.div(pair, blocks_q), jax.lax.rem(pair, blocks_q)
        queries, keys = pl.ds(i * lay.t, lay.t), pl.ds((i + offset) * lay.s, lay.s)
        q, do = q_ref[row, queries, h, :], do_ref[row, queries, h, :]
        k, v = k_ref[row, keys, h, :], v_ref[row, keys, h, :]
        same = qs_ref[row, queries][:, None] == ks_ref[row, keys][None, :]
        p = tile.probabilities(tile.logits(q, k, add, same), lse_ref[row, h, queries][:, None])
        delta = delta_ref[row, h, queries][:, None]
        return total + tile.logits_gradient(p, tile.product(do, v, (1, 1)), delta)

    mine = jax.lax.div(count_ref[n] - part + (parts - 1), jnp.int32(parts))
    zero = jnp.zeros((lay.t, lay.s), jnp.float32)
    sums_ref[...] = jax.lax.fori_loop(0, mine, body, zero)


# ---------------------------------------------------------------------------------------------
# Passes: grids and block specifications
# ---------------------------------------------------------------------------------------------


def _specs(lay: _Layout, over: str) -> list[Any]:
    """Of (start, stop, q, k, v, q_segments, kv_segments, tiles, far), grid (block, head, row)."""
    own_q, own_k = over == "queries", over == "keys"
    count = lay.length_q // lay.t if own_q else lay.length_k // lay.s

    def side(own: bool, size: int, length: int) -> Any:
        if own:
            return pl.BlockSpec((None, size, None, lay.dim), lambda x, h, b: (b, x, h, 0))
        return pl.BlockSpec((None, length, None, lay.dim), lambda x, h, b: (b, 0, h, 0))

    def segments(own: bool, size: int, length: int) -> Any:
        if own:
            return pl.BlockSpec((None, size), lambda x, h, b: (b, x))
        return pl.BlockSpec((None, length), lambda x, h, b: (b, 0))

    bounds = pl.BlockSpec((None, count), lambda x, h, b: (b, 0))
    key = side(own_k, lay.s, lay.length_k)
    return [
        bounds,
        bounds,
        side(own_q, lay.t, lay.length_q),
        key,
        key,
        segments(own_q, lay.t, lay.length_q),
        segments(own_k, lay.s, lay.length_k),
        pl.BlockSpec((None, *lay.tiles.shape[1:]), lambda x, h, b: (h, 0, 0, 0)),
        pl.BlockSpec((None, 2), lambda x, h, b: (h, 0)),
    ]


def forward(call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any) -> Any:
    """(o_BTHK in the dtype of v, lse_BHT float32); see `flash.flash_attention`."""
    queries, dim = q.shape[1], q.shape[3]
    q, k, v = (_wide(x) for x in (q, k, v))
    lay = _Layout(call, "forward", q, k, table, q_seg, kv_seg)
    start, stop = blocks.key_ranges(lay.meet)
    o, lse = _call(
        functools.partial(_forward_kernel, lay),
        lay.tuning,
        lay.interpret,
        grid=(lay.length_q // lay.t, lay.heads, lay.rows),
        in_specs=_specs(lay, "queries"),
        out_specs=[_specs(lay, "queries")[2], _statistic_block(lay)],
        out_shape=[
            jax.ShapeDtypeStruct((lay.rows, lay.length_q, lay.heads, lay.dim), v.dtype),
            jax.ShapeDtypeStruct((lay.rows, lay.heads, lay.length_q), jnp.float32),
        ],
        name="t5_attention_forward",
    )(start, stop, lay.query(q), lay.key(k), lay.key(v), lay.q_seg, lay.kv_seg, lay.tiles, lay.far)
    return o[:, :queries, :, :dim], lse[:, :, :queries]


def _wide(x: jax.Array) -> jax.Array:
    """Zeros behind the head dimension up to a power of two, as Triton wants; they add nothing."""
    return blocks.pad_to(x, 3, blocks.power_of_two(x.shape[3], _LEAST))


def _statistic_block(lay: _Layout) -> Any:
    return pl.BlockSpec((None, None, lay.t), lambda x, h, b: (b, h, x))


def backward(
    call: Any,
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    q_seg: Any,
    kv_seg: Any,
    do: Any,
    lse: Any,
    delta: Any,
) -> tuple[Any, ...]:
    """(dq_BTHK, dk_BSHK, dv_BSHK, dtable_NH float32 or None)."""
    queries, keys, dim = q.shape[1], k.shape[1], q.shape[3]
    q, k, v, do = (_wide(x) for x in (q, k, v, do))
    args = (q, k, v, table, q_seg, kv_seg, do, lse, delta)
    dq, delta = _queries_pass(call, *args)
    args = (*args[:-1], delta)
    dk, dv, dfar = _keys_pass(call, *args)
    dtable = None if table is None else _table_pass(call, *args, dfar)
    return dq[:, :queries, :, :dim], dk[:, :keys, :, :dim], dv[:, :keys, :, :dim], dtable


def _queries_pass(
    call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any, do: Any, *stats: Any
) -> Any:
    """(dq, delta without the rounding of the outputs)."""
    lay = _Layout(call, "queries", q, k, table, q_seg, kv_seg)
    start, stop = blocks.key_ranges(lay.meet)
    specs, stat = _specs(lay, "queries"), _statistic_block(lay)
    dq, delta = _call(
        functools.partial(_queries_kernel, lay),
        lay.tuning,
        lay.interpret,
        grid=(lay.length_q // lay.t, lay.heads, lay.rows),
        in_specs=[*specs, specs[2], stat, stat],
        out_specs=[specs[2], stat],
        out_shape=[
            jax.ShapeDtypeStruct((lay.rows, lay.length_q, lay.heads, lay.dim), q.dtype),
            jax.ShapeDtypeStruct((lay.rows, lay.heads, lay.length_q), jnp.float32),
        ],
        name="t5_attention_queries",
    )(
        *(start, stop, lay.query(q), lay.key(k), lay.key(v), lay.q_seg, lay.kv_seg),
        *(lay.tiles, lay.far, lay.query(do), *(lay.statistic(x) for x in stats)),
    )
    return dq, delta[:, :, : q.shape[1]]


def _keys_pass(
    call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any, do: Any, *stats: Any
) -> Any:
    lay = _Layout(call, "keys", q, k, table, q_seg, kv_seg)
    start, stop = blocks.query_ranges(lay.meet)
    lay.tiles = lay.tiles.swapaxes(2, 3)
    specs = _specs(lay, "keys")
    stat = pl.BlockSpec((None, None, lay.length_q), lambda x, h, b: (b, h, 0))
    shape = (lay.rows, lay.length_k, lay.heads, lay.dim)
    count = lay.length_k // lay.s
    dk, dv, dfar = _call(
        functools.partial(_keys_kernel, lay),
        lay.tuning,
        lay.interpret,
        grid=(lay.length_k // lay.s, lay.heads, lay.rows),
        in_specs=[*specs, specs[2], stat, stat],
        out_specs=[
            *[specs[3]] * 2,
            pl.BlockSpec((None, None, None, 2), lambda x, h, b: (b, h, x, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, k.dtype),
            jax.ShapeDtypeStruct(shape, v.dtype),
            jax.ShapeDtypeStruct((lay.rows, lay.heads, count, 2), jnp.float32),
        ],
        name="t5_attention_keys",
    )(
        *(start, stop, lay.query(q), lay.key(k), lay.key(v), lay.q_seg, lay.kv_seg),
        *(lay.tiles, lay.far, lay.query(do), *(lay.statistic(x) for x in stats)),
    )
    return dk, dv, jnp.sum(dfar, axis=(0, 2))


# Three programs for each multiprocessor of an H100 or H200 (132): as many as run at a time. It also
# bounds the partial sums: 396 tiles of 64 x 64 float32 are 6.5 MB, whatever the batch and lengths.
TABLE_PROGRAMS = 396


def _pairs(lay: _Layout) -> tuple[jax.Array, jax.Array]:
    """The pairs of blocks that meet, by near tile: (how many [n], row * I + block [n, B * I])."""
    first = lay.near.first // lay.near.step
    i = np.arange(lay.meet.shape[1])[None, :]
    j = i + np.arange(first, first + lay.near.count)[:, None]
    exists = (j >= 0) & (j < lay.meet.shape[2])
    met_BnI = lay.meet[:, i, np.clip(j, 0, lay.meet.shape[2] - 1)] & exists[None]
    met_nP = met_BnI.swapaxes(0, 1).reshape(lay.near.count, -1)
    order = jnp.argsort(jnp.logical_not(met_nP), axis=1, stable=True).astype(jnp.int32)
    return jnp.sum(met_nP, axis=1, dtype=jnp.int32), order


def _table_pass(
    call: Any,
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    q_seg: Any,
    kv_seg: Any,
    do: Any,
    lse: Any,
    delta: Any,
    dfar: Any,
) -> jax.Array:
    lay = _Layout(call, "table", q, k, table, q_seg, kv_seg)
    near, tile_shape = lay.near.count, (lay.t, lay.s)
    counts, order = _pairs(lay)
    parts = max(1, min(order.shape[1], TABLE_PROGRAMS // (near * lay.heads)))
    whole = pl.BlockSpec()
    sums = _call(
        functools.partial(_table_kernel, lay, parts),
        lay.tuning,
        lay.interpret,
        grid=(near, lay.heads, parts),
        in_specs=[
            *[whole] * 7,
            pl.BlockSpec((None, None, *tile_shape), lambda n, h, p: (h, n, 0, 0)),
            *[whole] * 3,
        ],
        out_specs=pl.BlockSpec((None, None, None, *tile_shape), lambda n, h, p: (p, h, n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((parts, lay.heads, near, *tile_shape), jnp.float32),
        name="t5_attention_table",
    )(
        *(counts, order, lay.query(q), lay.key(k), lay.key(v), lay.q_seg, lay.kv_seg, lay.tiles),
        *(lay.query(do), lay.statistic(lse), lay.statistic(delta)),
    )
    return bias.table_gradient(jnp.sum(sums, axis=0), dfar, lay.near, table.shape[0])

"""Attention kernels for TPUs, in Pallas on Mosaic.

The grid walks over all pairs of blocks, the inner axis in order; scratch memory carries the running
sums from one pair to the next, so what lies in VMEM does not grow with the lengths. Pairs that
cannot meet do nothing, and their blocks are not fetched. Tiles are [keys, queries]: what belongs
to a query is then a row, the layout in which a TPU keeps a vector without padding it 128 times.
The bias gradient adds up in the pass over the keys, whose grid has the heads outermost: the tiles
of a head stay in VMEM until all its blocks are through.

Letters in names: B batch, T query positions, S key positions, H heads, K head dimension, N buckets,
I blocks of queries, J blocks of keys, n bias tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtl_jax.kernels import bias, blocks, tile

# Longer blocks feed the matrix unit better, shorter ones skip more; not yet tuned on hardware.
BLOCK = 256
_LANES = 128  # of a vector register: blocks are whole multiples


class _Layout:
    """Padded arrays [B, H, positions, K], bias tiles and ranges of blocks."""

    def __init__(self, call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any):
        size_q, size_k = call.blocks or (BLOCK, BLOCK)
        self.t = min(size_q, blocks.power_of_two(q.shape[1], _LANES))
        self.s = min(size_k, blocks.power_of_two(k.shape[1], _LANES))
        self.rows, _, self.heads, self.dim = q.shape
        self.length_q = blocks.padded(q.shape[1], self.t)
        self.length_k = blocks.padded(k.shape[1], self.s)
        self.count_q, self.count_k = self.length_q // self.t, self.length_k // self.s
        self.q, self.k, self.v = self.query(q), self.key(k), self.key(v)
        q_seg = blocks.pad_to(q_seg, 1, self.length_q)
        kv_seg = blocks.pad_to(kv_seg, 1, self.length_k)
        self.meet = blocks.meeting(q_seg, kv_seg, self.t, self.s, call.causal)
        # As rows; padding among the keys never equals a query's segment, not even padding's.
        self.q_seg = q_seg[:, None, :]
        self.kv_seg = jnp.where(kv_seg > 0, kv_seg, -1)[:, None, :]
        self.interpret = call.interpret
        self.biased = table is not None
        self.tiled = self.biased or call.causal
        self.near = blocks.Near(self.t, self.s, call.causal, call.bidirectional, call.max_distance)
        near, far = bias.tiles(table, self.near, self.heads)
        # The far sides as the first and the last tile: no special case for them in the kernels.
        far = jnp.broadcast_to(far[:, :, None, None], (self.heads, 2, self.t, self.s))
        tiles = jnp.concatenate([far[:, :1], near, far[:, 1:]], axis=1)
        self.tiles = tiles.swapaxes(2, 3)

    def query(self, x_BTHK: Any) -> Any:
        return blocks.pad_to(x_BTHK.swapaxes(1, 2), 2, self.length_q)

    def key(self, x_BSHK: Any) -> Any:
        return blocks.pad_to(x_BSHK.swapaxes(1, 2), 2, self.length_k)

    def statistic(self, x_BHT: Any) -> Any:
        return blocks.pad_to(x_BHT, 2, self.length_q)[:, :, None, :]

    def tile_number(self, i: Any, j: Any) -> Any:
        """Place of the pair's tile among `tiles`."""
        return jnp.clip(self.near.index(i, j), -1, self.near.count) + 1


def _specs(lay: _Layout, order: str) -> dict[str, Any]:
    """Block specifications for a grid in this order of b, h, i, j; a skipped pair fetches nothing.

    The inner axis is clamped to the range of blocks that meet, and a block that the step before has
    fetched already is not fetched again.
    """
    by_query = order[-1] == "j"

    def index(ids: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        *axes, start_ref, stop_ref = ids
        at = dict(zip(order, axes, strict=True))
        b, h, i, j = at["b"], at["h"], at["i"], at["j"]
        outer, inner = (i, j) if by_query else (j, i)
        low = start_ref[b, outer]
        inner = jnp.clip(inner, low, jnp.maximum(low, stop_ref[b, outer] - 1))
        # A row of padding meets nothing and has the range [0, 0).
        return (b, h, outer, inner) if by_query else (b, h, inner, outer)

    def spec(shape: tuple[int, ...], place: Any) -> Any:
        return pl.BlockSpec(shape, lambda *ids: place(*index(ids)))

    return {
        "q": spec((1, 1, lay.t, lay.dim), lambda b, h, i, j: (b, h, i, 0)),
        "k": spec((1, 1, lay.s, lay.dim), lambda b, h, i, j: (b, h, j, 0)),
        "q_seg": spec((1, 1, lay.t), lambda b, h, i, j: (b, 0, i)),
        "kv_seg": spec((1, 1, lay.s), lambda b, h, i, j: (b, 0, j)),
        "tiles": spec((1, 1, lay.s, lay.t), lambda b, h, i, j: (h, lay.tile_number(i, j), 0, 0)),
        "statistic": spec((1, 1, 1, lay.t), lambda b, h, i, j: (b, h, 0, i)),
        "sums": spec((1, *lay.tiles.shape[1:]), lambda b, h, i, j: (h, 0, 0, 0)),
    }


def _call(
    lay: _Layout, kernel: Any, order: str, ins: str, outs: Any, scratch: Any, name: str
) -> Any:
    sizes = {"b": lay.rows, "h": lay.heads, "i": lay.count_q, "j": lay.count_k}
    specs = _specs(lay, order)
    in_order = 1 if order.startswith("bh") else 3
    semantics: Any = ("parallel",) * (4 - in_order) + ("arbitrary",) * in_order
    params = pltpu.CompilerParams(dimension_semantics=semantics)
    return pl.pallas_call(
        functools.partial(kernel, lay),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=tuple(sizes[axis] for axis in order),
            in_specs=[specs[name] for name in ins.split()],
            out_specs=[specs[name] for name, _, _ in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outs],
        compiler_params=params,
        interpret=lay.interpret,
        name=name,
    )


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]; by a transposition of whole registers, which the hardware does."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _logits(lay: _Layout, q: Any, k: Any, q_seg_ref: Any, kv_seg_ref: Any, tiles_ref: Any) -> Any:
    """The tile [keys, queries] of logits."""
    same = _column(kv_seg_ref[0]) == q_seg_ref[0]
    return tile.logits(k, q, tiles_ref[0, 0] if lay.tiled else 0.0, same)


def _forward_kernel(lay: _Layout, start_ref: Any, stop_ref: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, q_seg_ref, kv_seg_ref, tiles_ref, o_ref, lse_ref = refs[:8]
    acc_ref, maximum_ref, total_ref = refs[8:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        maximum_ref[...] = jnp.full_like(maximum_ref, tile.FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when((j >= start_ref[b, i]) & (j < stop_ref[b, i]))
    def _pair() -> None:
        s = _logits(lay, q_ref[0, 0], k_ref[0, 0], q_seg_ref, kv_seg_ref, tiles_ref)
        p, factor, maximum, total = tile.online_softmax(s, maximum_ref[...], total_ref[...], axis=0)
        v = v_ref[0, 0]
        # [K, queries]: the factor is a row then, too.
        acc_ref[...] = acc_ref[...] * factor + tile.product(v, p.astype(v.dtype), (0, 0))
        maximum_ref[...], total_ref[...] = maximum, total

    @pl.when(j == lay.count_k - 1)
    def _end() -> None:
        o = tile.normalised(acc_ref[...], total_ref[...])
        o_ref[0, 0] = o.T.astype(o_ref.dtype)
        lse_ref[0, 0] = tile.log_sum_exp(maximum_ref[...], total_ref[...])


def _queries_kernel(lay: _Layout, start_ref: Any, stop_ref: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, q_seg_ref, kv_seg_ref, tiles_ref, do_ref, lse_ref, delta_ref = refs[:9]
    dq_ref, exact_ref, acc_ref, sums_ref = refs[9:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when((j >= start_ref[b, i]) & (j < stop_ref[b, i]))
    def _pair() -> None:
        k = k_ref[0, 0]
        s = _logits(lay, q_ref[0, 0], k, q_seg_ref, kv_seg_ref, tiles_ref)
        p = tile.probabilities(s, lse_ref[0, 0])
        dp = tile.product(v_ref[0, 0], do_ref[0, 0], (1, 1))
        ds = tile.logits_gradient(p, dp, delta_ref[0, 0])
        sums_ref[...] += jnp.sum(ds, axis=0, keepdims=True)
        acc_ref[...] += tile.product(ds.astype(k.dtype), k, (0, 0))

    @pl.when(j == lay.count_k - 1)
    def _end() -> None:
        dq_ref[0, 0] = acc_ref[...].astype(dq_ref.dtype)
        # Without the rounding of the outputs that delta was made of; see pallas_gpu.py.
        exact_ref[0, 0] = delta_ref[0, 0] + sums_ref[...]


def _keys_kernel(lay: _Layout, start_ref: Any, stop_ref: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, q_seg_ref, kv_seg_ref, tiles_ref, do_ref, lse_ref, delta_ref = refs[:9]
    *outs, dk_acc_ref, dv_acc_ref = refs[9:]
    b, j, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _start() -> None:
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    if lay.biased:

        @pl.when((b == 0) & (j == 0) & (i == 0))
        def _start_of_head() -> None:
            outs[2][...] = jnp.zeros_like(outs[2])

    @pl.when((i >= start_ref[b, j]) & (i < stop_ref[b, j]))
    def _pair() -> None:
        q, do = q_ref[0, 0], do_ref[0, 0]
        s = _logits(lay, q, k_ref[0, 0], q_seg_ref, kv_seg_ref, tiles_ref)
        p = tile.probabilities(s, lse_ref[0, 0])
        dv_acc_ref[...] += tile.product(p.astype(do.dtype), do, (1, 0))
        ds = tile.logits_gradient(p, tile.product(v_ref[0, 0], do, (1, 1)), delta_ref[0, 0])
        dk_acc_ref[...] += tile.product(ds.astype(q.dtype), q, (1, 0))
        if lay.biased:
            outs[2][0, lay.tile_number(i, j)] += ds

    @pl.when(i == lay.count_q - 1)
    def _end() -> None:
        outs[0][0, 0] = dk_acc_ref[...].astype(outs[0].dtype)
        outs[1][0, 0] = dv_acc_ref[...].astype(outs[1].dtype)


def forward(call: Any, q: Any, k: Any, v: Any, table: Any, q_seg: Any, kv_seg: Any) -> Any:
    """(o_BTHK in the dtype of v, lse_BHT float32); see `flash.flash_attention`."""
    lay = _Layout(call, q, k, v, table, q_seg, kv_seg)
    outs = [
        ("q", lay.q.shape, v.dtype),
        ("statistic", (lay.rows, lay.heads, 1, lay.length_q), jnp.float32),
    ]
    scratch = [(lay.dim, lay.t), (1, lay.t), (1, lay.t)]
    ins = "q k k q_seg kv_seg tiles"
    run = _call(lay, _forward_kernel, "bhij", ins, outs, scratch, "t5_attention_forward")
    o, lse = run(
        *blocks.key_ranges(lay.meet), lay.q, lay.k, lay.v, lay.q_seg, lay.kv_seg, lay.tiles
    )
    return o.swapaxes(1, 2)[:, : q.shape[1]], lse[:, :, 0, : q.shape[1]]


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
    lay = _Layout(call, q, k, v, table, q_seg, kv_seg)
    do, lse, delta = lay.query(do), lay.statistic(lse), lay.statistic(delta)
    arrays = (lay.q, lay.k, lay.v, lay.q_seg, lay.kv_seg, lay.tiles, do, lse)
    ins = "q k k q_seg kv_seg tiles q statistic statistic"
    outs = [("q", lay.q.shape, q.dtype), ("statistic", lse.shape, jnp.float32)]
    scratch = [(lay.t, lay.dim), (1, lay.t)]
    run = _call(lay, _queries_kernel, "bhij", ins, outs, scratch, "t5_attention_queries")
    dq, delta = run(*blocks.key_ranges(lay.meet), *arrays, delta)
    outs = [("k", lay.k.shape, k.dtype), ("k", lay.v.shape, v.dtype)]
    if lay.biased:
        outs.append(("sums", lay.tiles.shape, jnp.float32))
    scratch = [(lay.s, lay.dim), (lay.s, lay.dim)]
    run = _call(lay, _keys_kernel, "hbji", ins, outs, scratch, "t5_attention_keys")
    dk, dv, *sums = run(*blocks.query_ranges(lay.meet), *arrays, delta)
    dtable = None
    if lay.biased:
        sums_HnTS = sums[0].swapaxes(2, 3)
        far = jnp.sum(sums_HnTS[:, :: lay.near.count + 1], axis=(2, 3))
        dtable = bias.table_gradient(sums_HnTS[:, 1:-1], far, lay.near, table.shape[0])
    dq, dk, dv = (x.swapaxes(1, 2) for x in (dq, dk, dv))
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], dtable

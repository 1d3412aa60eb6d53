"""Attention with a custom gradient that keeps no array of queries x keys.

Letters in names: B batch, T query positions, S key positions, H heads, K head dimension, N buckets.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtl_jax.kernels import chunked, pallas_gpu, pallas_tpu

IMPLEMENTATIONS = ("xla", "pallas_gpu", "pallas_tpu")
_MODULES = {"xla": chunked, "pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call of `flash_attention`.

    Attributes:
      causal: hide keys after their query.
      bidirectional: how the bias table is laid out.
      max_distance: of the bias.
      impl: one of `IMPLEMENTATIONS`.
      interpret: run a kernel in Pallas' interpreter, on any device.
      blocks: (queries, keys) of a block in place of the implementation's own choice.
    """

    causal: bool
    bidirectional: bool
    max_distance: int
    impl: str
    interpret: bool = False
    blocks: tuple[int, int] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(
    call: Call,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    table_NH: jax.Array | None,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
) -> jax.Array:
    """`attention.attend` for one device, without dropout.

    The gradient is that of FlashAttention (Dao et al. 2022, algorithm 4), in separate passes for
    the queries and for the keys, which needs no atomic addition: equal inputs give equal bits.

    Args:
      call: what is static.
      q_BTHK: float32 or bfloat16.
      k_BSHK: same dtype.
      v_BSHK: same dtype.
      table_NH: float32, or None for no bias.
      q_segments_BT: int32; 0 is padding.
      kv_segments_BS: int32; 0 is padding.

    Returns:
      o_BTHK in the dtype of `v_BSHK`.
    """
    return _forward(call, q_BTHK, k_BSHK, v_BSHK, table_NH, q_segments_BT, kv_segments_BS)[0]


def _forward(call: Call, *arrays: Any) -> tuple[jax.Array, Any]:
    o_BTHK, lse_BHT = _MODULES[call.impl].forward(call, *arrays)
    # A remat policy may save these two by name; it then need not run the kernel again.
    o_BTHK = checkpoint_name(o_BTHK, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return o_BTHK.astype(arrays[2].dtype), (*arrays, o_BTHK, lse_BHT)


def _backward(call: Call, saved: Any, do_BTHK: jax.Array) -> tuple[Any, ...]:
    q, k, v, table_NH, q_segments, kv_segments, o_BTHK, lse_BHT = saved
    delta_BHT = jnp.einsum(
        "BTHK,BTHK->BHT", do_BTHK.astype(jnp.float32), o_BTHK.astype(jnp.float32)
    )
    dq, dk, dv, dtable = _MODULES[call.impl].backward(
        call, q, k, v, table_NH, q_segments, kv_segments, do_BTHK, lse_BHT, delta_BHT
    )
    if table_NH is not None:
        dtable = dtable.astype(table_NH.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dtable, None, None


flash_attention.defvjp(_forward, _backward)

"""The blocks of a T5 as Flax Linen modules; `model.py` puts them together.

Letters: B batch, L encoder length, T decoder length, S key length, D embedding, H heads,
K head dimension, E = H*K joined heads, F mlp, V vocabulary, N layers.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import attention
from mtl_jax.model_config import ACTIVATIONS, REMAT, T5Config

Cache = dict[str, jax.Array]

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _query_init(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, head_dim: int) -> jax.Array:
    # T5 leaves logits unscaled and takes the factor 1/sqrt(K) into the initial query instead.
    return fan_in(key, shape, dtype) / np.sqrt(head_dim).astype(np.float32)


class Dense(nn.Module):
    """A linear map without bias: kernel [in, out]."""

    features: int
    axes: tuple[str, str]
    dtype: str
    init: Any = fan_in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        # As one matrix of rows: the gradients of a product with more axes are three times slower
        # in XLA on CPUs (benchmarks/README.md), and no different elsewhere.
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        return jnp.dot(rows, kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """Root-mean-square norm with a scale and no mean or bias (T5), computed in float32."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activated(names: tuple[str, ...], branches: tuple[jax.Array, ...]) -> jax.Array:
    """The product of the activated branches, each [..., F].

    Its gradient keeps the branches alone, which the products before it keep anyway, and computes
    the activations again: they are the widest arrays of a layer, and a GPU spends more time on
    moving one than on making it.
    """
    return math.prod(ACTIVATIONS[n](x) for n, x in zip(names, branches, strict=True))


def _activated_forward(names: tuple[str, ...], branches: tuple[jax.Array, ...]) -> Any:
    return _activated(names, branches), branches


def _activated_backward(names: tuple[str, ...], branches: Any, gradient: jax.Array) -> Any:
    return jax.vjp(functools.partial(_activated.fun, names), branches)[1](gradient)


_activated.defvjp(_activated_forward, _activated_backward)


class Mlp(nn.Module):
    """Feed-forward block: wi (or gated wi_0 * wi_1), dropout, wo."""

    cfg: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        cfg = self.cfg
        gated = len(cfg.mlp_activations) > 1
        branches = tuple(
            Dense(cfg.mlp_dim, ("embed", "mlp"), cfg.dtype, name=f"wi_{i}" if gated else "wi")(
                x_BLD
            )
            for i in range(len(cfg.mlp_activations))
        )
        h_BLF = _activated(cfg.mlp_activations, branches)
        h_BLF = dropout(cfg, self.deterministic)(h_BLF)
        h_BLF = nn.with_logical_constraint(h_BLF, ("batch", "length", "mlp"))
        return Dense(cfg.emb_dim, ("mlp", "embed"), cfg.dtype, name="wo")(h_BLF)


class Attention(nn.Module):
    """Projections around `attention.attend`; with a cache, one decoding step."""

    cfg: T5Config
    deterministic: bool
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kv_BSD: jax.Array | None,
        bias_table: jax.Array | None,
        q_segments_BT: jax.Array,
        kv_segments_BS: jax.Array,
        cache: Cache | None = None,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """`kv_BSD` None means that the keys and values are in the cache (cross-attention)."""
        cfg = self.cfg
        heads = (cfg.num_heads, cfg.head_dim)

        def project(name: str, y: jax.Array, init: Any = fan_in) -> jax.Array:
            dense = Dense(
                cfg.num_heads * cfg.head_dim, ("embed", "joined_kv"), cfg.dtype, init, name=name
            )
            y = dense(y).reshape(*y.shape[:-1], *heads)
            return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

        query = project("query", x_BTD, functools.partial(_query_init, head_dim=cfg.head_dim))
        if kv_BSD is not None:
            key, value = project("key", kv_BSD), project("value", kv_BSD)
        if cache is None:
            use_dropout = not self.deterministic and cfg.dropout_rate > 0.0
            out_BTHK = attention.attend(
                query,
                key,
                value,
                bias_table,
                q_segments_BT,
                kv_segments_BS,
                causal=self.causal,
                bidirectional=not self.causal,
                max_distance=cfg.relpos_max_distance,
                dropout_rate=cfg.dropout_rate,
                dropout_rng=self.make_rng("dropout") if use_dropout else None,
                impl=cfg.attention,
            )
        else:
            if kv_BSD is not None and position is not None:
                insert = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
                cache = {
                    "key": insert(cache["key"], key.astype(cache["key"].dtype), position),
                    "value": insert(cache["value"], value.astype(cache["value"].dtype), position),
                }
            out_BTHK = attention.attend_cached(
                query,
                cache["key"],
                cache["value"],
                bias_table,
                position,
                kv_segments_BS,
                max_distance=cfg.relpos_max_distance,
            )
        out = out_BTHK.reshape(*x_BTD.shape[:-1], -1)
        return Dense(cfg.emb_dim, ("joined_kv", "embed"), cfg.dtype, name="out")(out), cache


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and added to the residual stream."""

    cfg: T5Config
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, bias_table: jax.Array, segments_BL: jax.Array
    ) -> tuple[jax.Array, None]:
        """The residual stream; the None is what `nn.scan` wants of a body without outputs."""
        cfg, drop = self.cfg, dropout(self.cfg, self.deterministic)
        h = LayerNorm(cfg.dtype, name="pre_attention_layer_norm")(x_BLD)
        h, _ = Attention(cfg, self.deterministic, name="attention")(
            h, h, bias_table, segments_BL, segments_BL
        )
        x_BLD = x_BLD + drop(h)
        h = LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(x_BLD)
        x_BLD = x_BLD + drop(Mlp(cfg, self.deterministic, name="mlp")(h))
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "embed")), None


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention and MLP; with a cache, one decoding step."""

    cfg: T5Config
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: dict[str, Cache] | None,
        encoded_BLD: jax.Array | None,
        bias_table: jax.Array,
        segments: dict[str, jax.Array],
        position: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Cache] | None]:
        """The residual stream and, where one was given, the cache with this step's entry."""
        cfg, drop = self.cfg, dropout(self.cfg, self.deterministic)
        cached: dict[str, Cache | None] = {"self": None, "cross": None} | (cache or {})
        h = LayerNorm(cfg.dtype, name="pre_self_attention_layer_norm")(x_BTD)
        h, self_cache = Attention(cfg, self.deterministic, causal=True, name="self_attention")(
            h, h, bias_table, segments["self_q"], segments["self_kv"], cached["self"], position
        )
        x_BTD = x_BTD + drop(h)
        h = LayerNorm(cfg.dtype, name="pre_cross_attention_layer_norm")(x_BTD)
        h, _ = Attention(cfg, self.deterministic, name="encoder_decoder_attention")(
            h, encoded_BLD, None, segments["cross_q"], segments["cross_kv"], cached["cross"]
        )
        x_BTD = x_BTD + drop(h)
        h = LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(x_BTD)
        x_BTD = x_BTD + drop(Mlp(cfg, self.deterministic, name="mlp")(h))
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "embed"))
        if cache is None or self_cache is None:
            return x_BTD, None
        return x_BTD, {"self": self_cache, "cross": cache["cross"]}


def dropout(cfg: T5Config, deterministic: bool) -> nn.Dropout:
    """T5's dropout: one mask for all positions of a row."""
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)


def stack(layer: Any, cfg: T5Config, length: int, deterministic: bool, in_axes: Any) -> Any:
    """The layers of a stack as one module whose parameters carry a leading axis."""
    if cfg.remat != "none":
        layer = nn.remat(layer, policy=REMAT[cfg.remat], prevent_cse=not cfg.scan_layers)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if cfg.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(cfg, deterministic)

"""The blocks of a T5 as Flax Linen modules; `model.py` puts them together.

Letters: B batch, L encoder length, T decoder length, S key length, D embedding, H heads,
K head dimension, E = H*K joined heads, F mlp, V vocabulary, N layers, R continuations of a row.
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


class RelativeBias(nn.Module):
    """The bias table; stored [heads, buckets] as in T5X, returned [buckets, heads]."""

    cfg: T5Config

    @nn.compact
    def __call__(self) -> jax.Array:
        """[buckets, heads]."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        return self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.cfg.num_heads, self.cfg.relpos_buckets),
            jnp.float32,
        ).T


class Attention(nn.Module):
    """Projections around `attention.attend`; with a cache, one decoding step."""

    cfg: T5Config
    deterministic: bool
    causal: bool = False

    def setup(self) -> None:
        """Makes the parts, which both ways of calling share."""
        cfg = self.cfg
        joined = cfg.num_heads * cfg.head_dim
        query_init = functools.partial(_query_init, head_dim=cfg.head_dim)
        self.query = Dense(joined, ("embed", "joined_kv"), cfg.dtype, query_init)
        self.key = Dense(joined, ("embed", "joined_kv"), cfg.dtype)
        self.value = Dense(joined, ("embed", "joined_kv"), cfg.dtype)
        self.out = Dense(cfg.emb_dim, ("joined_kv", "embed"), cfg.dtype)

    def project(self, dense: Dense, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, H, K]."""
        y = dense(x_BTD)
        y = y.reshape(*y.shape[:-1], self.cfg.num_heads, self.cfg.head_dim)
        return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

    def join(self, out_BTHK: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, T, D]."""
        return self.out(out_BTHK.reshape(*out_BTHK.shape[:-2], -1))

    def __call__(
        self,
        x_BTD: jax.Array,
        kv_BSD: jax.Array,
        bias_table: jax.Array | None,
        q_segments_BT: jax.Array,
        kv_segments_BS: jax.Array,
    ) -> jax.Array:
        """[B, T, D], of all positions at once."""
        cfg = self.cfg
        use_dropout = not self.deterministic and cfg.dropout_rate > 0.0
        out_BTHK = attention.attend(
            self.project(self.query, x_BTD),
            self.project(self.key, kv_BSD),
            self.project(self.value, kv_BSD),
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
        return self.join(out_BTHK)

    def step(
        self, x_BRD: jax.Array, cache: Cache, bias_table: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One step over earlier ones: [B, R, D], and the entry [B, R, H, K] for the cache."""
        key, value = self.project(self.key, x_BRD), self.project(self.value, x_BRD)
        out_BRHK = attention.attend_cached(
            self.project(self.query, x_BRD),
            cache["key"],
            cache["value"],
            key,
            value,
            bias_table,
            position,
            max_distance=self.cfg.relpos_max_distance,
        )
        return self.join(out_BRHK), {"key": key, "value": value}

    def step_over_inputs(
        self, x_BRD: jax.Array, inputs: Cache, segments_BL: jax.Array
    ) -> jax.Array:
        """One step over the keys and values of `model.start_cache`: [B, R, D]."""
        query = self.project(self.query, x_BRD)
        return self.join(
            attention.attend_inputs(query, inputs["key"], inputs["value"], segments_BL)
        )


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and added to the residual stream."""

    cfg: T5Config
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, bias_table: jax.Array | None, segments_BL: jax.Array
    ) -> tuple[jax.Array, None]:
        """The residual stream; the None is what `nn.scan` wants of a body without outputs.

        `bias_table` is that of the stack; None: the layer has one of its own (umT5).
        """
        cfg, drop = self.cfg, dropout(self.cfg, self.deterministic)
        if bias_table is None:
            bias_table = RelativeBias(cfg, name="relpos_bias")()
        h = LayerNorm(cfg.dtype, name="pre_attention_layer_norm")(x_BLD)
        h = Attention(cfg, self.deterministic, name="attention")(
            h, h, bias_table, segments_BL, segments_BL
        )
        x_BLD = x_BLD + drop(h)
        h = LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(x_BLD)
        x_BLD = x_BLD + drop(Mlp(cfg, self.deterministic, name="mlp")(h))
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "embed")), None


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention and MLP, each behind a norm."""

    cfg: T5Config
    deterministic: bool

    def setup(self) -> None:
        """Makes the parts, which both ways of calling share."""
        cfg = self.cfg
        if cfg.relpos_per_layer:
            self.relpos_bias = RelativeBias(cfg)
        self.pre_self_attention_layer_norm = LayerNorm(cfg.dtype)
        self.self_attention = Attention(cfg, self.deterministic, causal=True)
        self.pre_cross_attention_layer_norm = LayerNorm(cfg.dtype)
        self.encoder_decoder_attention = Attention(cfg, self.deterministic)
        self.pre_mlp_layer_norm = LayerNorm(cfg.dtype)
        self.mlp = Mlp(cfg, self.deterministic)
        self.drop = dropout(cfg, self.deterministic)

    def __call__(
        self,
        x_BTD: jax.Array,
        encoded_BLD: jax.Array,
        bias_table: jax.Array | None,
        segments: dict[str, jax.Array],
    ) -> tuple[jax.Array, None]:
        """The residual stream; None for `nn.scan`."""
        bias_table = self.relpos_bias() if bias_table is None else bias_table
        h = self.pre_self_attention_layer_norm(x_BTD)
        h = self.self_attention(h, h, bias_table, segments["self_q"], segments["self_kv"])
        x_BTD = x_BTD + self.drop(h)
        h = self.pre_cross_attention_layer_norm(x_BTD)
        h = self.encoder_decoder_attention(
            h, encoded_BLD, None, segments["cross_q"], segments["cross_kv"]
        )
        x_BTD = x_BTD + self.drop(h)
        x_BTD = x_BTD + self.drop(self.mlp(self.pre_mlp_layer_norm(x_BTD)))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "embed")), None

    def step(
        self,
        x_BRD: jax.Array,
        cache: dict[str, Cache],
        bias_table: jax.Array | None,
        segments_BL: jax.Array,
        position: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """One decoding step: the residual stream, and this layer's entry for the cache."""
        bias_table = self.relpos_bias() if bias_table is None else bias_table
        h = self.pre_self_attention_layer_norm(x_BRD)
        h, entry = self.self_attention.step(h, cache["self"], bias_table, position)
        x_BRD = x_BRD + h
        h = self.pre_cross_attention_layer_norm(x_BRD)
        x_BRD = x_BRD + self.encoder_decoder_attention.step_over_inputs(
            h, cache["cross"], segments_BL
        )
        return x_BRD + self.mlp(self.pre_mlp_layer_norm(x_BRD)), entry


def dropout(cfg: T5Config, deterministic: bool) -> nn.Dropout:
    """T5's dropout: one mask for all positions of a row."""
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)


def stack(layer: Any, cfg: T5Config, length: int, deterministic: bool) -> Any:
    """The layers of a stack as one module whose parameters carry a leading axis."""
    if cfg.remat != "none":
        layer = nn.remat(layer, policy=REMAT[cfg.remat], prevent_cse=not cfg.scan_layers)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
        unroll=1 if cfg.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(cfg, deterministic)

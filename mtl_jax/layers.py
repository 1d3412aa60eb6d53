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

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _query_init(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, head_dim: int) -> jax.Array:
    # T5 leaves logits unscaled and takes the factor 1/sqrt(K) into the initial query instead.
    return fan_in(key, shape, dtype) / np.sqrt(head_dim).astype(np.float32)


class Dense(nn.Module):
    """A linear map without bias: kernel [in, out]."""

    features: int
    axes: tuple[str | None, str | None]
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


def rms_norm(x: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """Root-mean-square norm with a scale and no mean or bias (T5), computed in float32.

    Args:
      x: [..., D].
      scale: [D].
      dtype: of the result.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return (x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(dtype)


class LayerNorm(nn.Module):
    """`rms_norm` with its scale."""

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
        return rms_norm(x, scale, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(names: tuple[str, ...], branches: tuple[jax.Array, ...]) -> jax.Array:
    """The product of the activated branches, each [..., F].

    Its gradient keeps the branches alone, which the products before it keep anyway, and computes
    the activations again: they are the widest arrays of a layer, and a GPU spends more time on
    moving one than on making it.
    """
    return math.prod(ACTIVATIONS[n](x) for n, x in zip(names, branches, strict=True))


def _activation_forward(names: tuple[str, ...], branches: tuple[jax.Array, ...]) -> Any:
    return activated(names, branches), branches


def _activation_backward(names: tuple[str, ...], branches: Any, gradient: jax.Array) -> Any:
    return jax.vjp(functools.partial(activated.fun, names), branches)[1](gradient)


activated.defvjp(_activation_forward, _activation_backward)


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
        h_BLF = activated(cfg.mlp_activations, branches)
        h_BLF = dropout(cfg, self.deterministic)(h_BLF)
        h_BLF = nn.with_logical_constraint(h_BLF, ("batch", "length", "mlp"))
        return Dense(cfg.emb_dim, ("mlp", "embed"), cfg.dtype, name="wo")(h_BLF)


class Adapter(nn.Module):
    """A bottleneck behind a block: `h + gelu(h down) up` (Houlsby et al. 2019, section 2.1).

    Without biases, as all of a T5; it starts as the identity.
    """

    cfg: T5Config

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], of what the block adds to the residual stream."""
        cfg = self.cfg
        inner = nn.gelu(Dense(cfg.adapter_dim, ("embed", None), cfg.dtype, name="down")(h))
        zeros = nn.initializers.zeros
        return h + Dense(cfg.emb_dim, (None, "embed"), cfg.dtype, zeros, name="up")(inner)


def _adapted(cfg: T5Config, h: jax.Array, name: str) -> jax.Array:
    """What a block gives, or what its adapter makes of it if there are any."""
    return Adapter(cfg, name=f"{name}_adapter")(h) if cfg.adapter_dim else h


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
    """Projections around `attention.attend`."""

    cfg: T5Config
    deterministic: bool
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kv_BSD: jax.Array,
        bias_table: jax.Array | None,
        q_segments_BT: jax.Array,
        kv_segments_BS: jax.Array,
    ) -> jax.Array:
        """[B, T, D]; `incremental.py` does the same for one position at a time."""
        cfg = self.cfg
        heads = (cfg.num_heads, cfg.head_dim)

        def project(name: str, y: jax.Array, init: Any = fan_in) -> jax.Array:
            dense = Dense(
                cfg.num_heads * cfg.head_dim, ("embed", "joined_kv"), cfg.dtype, init, name=name
            )
            y = dense(y).reshape(*y.shape[:-1], *heads)
            return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

        use_dropout = not self.deterministic and cfg.dropout_rate > 0.0
        out_BTHK = attention.attend(
            project("query", x_BTD, functools.partial(_query_init, head_dim=cfg.head_dim)),
            project("key", kv_BSD),
            project("value", kv_BSD),
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
        out = out_BTHK.reshape(*x_BTD.shape[:-1], -1)
        return Dense(cfg.emb_dim, ("joined_kv", "embed"), cfg.dtype, name="out")(out)


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
        x_BLD = x_BLD + drop(_adapted(cfg, h, "attention"))
        h = LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(x_BLD)
        h = Mlp(cfg, self.deterministic, name="mlp")(h)
        x_BLD = x_BLD + drop(_adapted(cfg, h, "mlp"))
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "embed")), None


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention and MLP, each behind a norm."""

    cfg: T5Config
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        encoded_BLD: jax.Array,
        bias_table: jax.Array | None,
        segments: dict[str, jax.Array],
    ) -> tuple[jax.Array, None]:
        """The residual stream, and None, as `EncoderLayer`."""
        cfg, drop = self.cfg, dropout(self.cfg, self.deterministic)
        if bias_table is None:
            bias_table = RelativeBias(cfg, name="relpos_bias")()
        h = LayerNorm(cfg.dtype, name="pre_self_attention_layer_norm")(x_BTD)
        h = Attention(cfg, self.deterministic, causal=True, name="self_attention")(
            h, h, bias_table, segments["self_q"], segments["self_kv"]
        )
        x_BTD = x_BTD + drop(_adapted(cfg, h, "self_attention"))
        h = LayerNorm(cfg.dtype, name="pre_cross_attention_layer_norm")(x_BTD)
        h = Attention(cfg, self.deterministic, name="encoder_decoder_attention")(
            h, encoded_BLD, None, segments["cross_q"], segments["cross_kv"]
        )
        x_BTD = x_BTD + drop(_adapted(cfg, h, "encoder_decoder_attention"))
        h = LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(x_BTD)
        h = Mlp(cfg, self.deterministic, name="mlp")(h)
        x_BTD = x_BTD + drop(_adapted(cfg, h, "mlp"))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "embed")), None


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

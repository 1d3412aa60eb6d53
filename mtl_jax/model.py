"""The T5 family: one encoder-decoder, pure functions over a plain dictionary of parameters.

Names of parameters are T5X's; the layers of a stack are stored stacked, as `[layers, ...]`.
`scan_layers` chooses between a loop and an unrolled graph: same parameters, same numbers.

Letters: B batch, L encoder length, T decoder length, S key length, D embedding, H heads,
K head dimension, E = H*K joined heads, F mlp, V vocabulary, N layers.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.layers import (
    DecoderLayer,
    EncoderLayer,
    LayerNorm,
    RelativeBias,
    dropout,
    fan_in,
    rms_norm,
    stack,
)
from mtl_jax.model_config import T5Config

Params = dict[str, Any]
__all__ = [
    "Params",
    "T5Config",
    "abstract_params",
    "decode",
    "encode",
    "init",
    "logits",
    "output_params",
    "param_axes",
    "product_with_output",
    "unstack_encoder",
]


class Embedding(nn.Module):
    """The token table, shared by encoder, decoder and (T5 1.0) the output."""

    cfg: T5Config

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (self.cfg.vocab_size, self.cfg.emb_dim),
            jnp.float32,
        )


class OutputKernel(nn.Module):
    """The output matrix [embed, vocab] of T5 1.1."""

    cfg: T5Config

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(
            "kernel",
            nn.with_logical_partitioning(fan_in, ("embed", "vocab")),
            (self.cfg.emb_dim, self.cfg.vocab_size),
            jnp.float32,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x_RD: jax.Array, kernel_DV: jax.Array, dtype: str) -> jax.Array:
    """The product of operands rounded to `dtype`, summed up in float32, forward and backward.

    Derived by JAX, the backward products would take a float32 operand each, which runs them at
    the rate of float32, and round their sums to `dtype`.
    """
    return jnp.dot(x_RD.astype(dtype), kernel_DV.astype(dtype), preferred_element_type=jnp.float32)


def _rounded_forward(x_RD: jax.Array, kernel_DV: jax.Array, dtype: str) -> Any:
    x_RD, kernel_DV = x_RD.astype(dtype), kernel_DV.astype(dtype)
    return _rounded_product(x_RD, kernel_DV, dtype), (x_RD, kernel_DV)


def _rounded_backward(dtype: str, operands: Any, gradient_RV: jax.Array) -> Any:
    (x_RD, kernel_DV), gradient_RV = operands, gradient_RV.astype(dtype)
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return product(gradient_RV, kernel_DV.T), product(x_RD.T, gradient_RV)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


class Encoder(nn.Module):
    """Embedded tokens to the final norm."""

    cfg: T5Config
    deterministic: bool

    def setup(self) -> None:
        cfg = self.cfg
        if not cfg.relpos_per_layer:
            self.relpos_bias = RelativeBias(cfg)
        self.layers = stack(EncoderLayer, cfg, cfg.num_encoder_layers, self.deterministic)
        self.encoder_norm = LayerNorm(cfg.dtype)
        self.dropout = dropout(cfg, self.deterministic)

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
        bias_table = None if self.cfg.relpos_per_layer else self.relpos_bias()
        x_BLD, _ = self.layers(self.dropout(x_BLD), bias_table, segments_BL)
        return self.dropout(self.encoder_norm(x_BLD))


class Decoder(nn.Module):
    """Embedded tokens to the final norm, and the output layer."""

    cfg: T5Config
    deterministic: bool

    def setup(self) -> None:
        cfg = self.cfg
        if not cfg.relpos_per_layer:
            self.relpos_bias = RelativeBias(cfg)
        self.layers = stack(DecoderLayer, cfg, cfg.num_decoder_layers, self.deterministic)
        self.decoder_norm = LayerNorm(cfg.dtype)
        self.dropout = dropout(cfg, self.deterministic)
        if not cfg.logits_via_embedding:
            self.logits_dense = OutputKernel(cfg)

    def __call__(
        self, x_BTD: jax.Array, encoded_BLD: jax.Array, segments: dict[str, jax.Array]
    ) -> jax.Array:
        bias_table = None if self.cfg.relpos_per_layer else self.relpos_bias()
        x_BTD, _ = self.layers(self.dropout(x_BTD), encoded_BLD, bias_table, segments)
        return self.dropout(self.decoder_norm(x_BTD))

    def logits(self, hidden_BTD: jax.Array, embedding_VD: jax.Array | None) -> jax.Array:
        """`embedding_VD` is for tied models."""
        kernel_DV = self.logits_dense() if embedding_VD is None else embedding_VD.T
        return product_with_output(self.cfg, hidden_BTD, kernel_DV)


def product_with_output(cfg: T5Config, hidden_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """Logits_BTV, float32, of the decoder's hidden states and the output matrix."""
    # float32 whatever the rest computes in: its rounding goes straight into the loss.
    hidden_BTD = hidden_BTD.astype(jnp.float32)
    if cfg.rescale_logits:
        hidden_BTD = hidden_BTD / np.sqrt(cfg.emb_dim).astype(np.float32)
    rows_RD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])  # as in `layers.Dense`
    if cfg.logits_dtype == "float32":
        out_RV = jnp.dot(rows_RD, kernel_DV)
    else:
        out_RV = _rounded_product(rows_RD, kernel_DV, cfg.logits_dtype)
    out_BTV = out_RV.reshape(*hidden_BTD.shape[:-1], -1)
    return nn.with_logical_constraint(out_BTV, ("batch", "length", "vocab"))


def _rows(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """The table's rows [B, L, D] of the tokens.

    Over copies of the model (the axis `data`) each copy sums up the gradient of its own tokens, and
    the sums are added. Left to itself XLA gathers the gradients of all tokens in every copy: with
    more tokens in a batch than words that is more, and it may go from slice to slice.
    """
    mesh = jax.sharding.get_abstract_mesh()
    copies = 1 if mesh.empty else mesh.shape.get("data", 1)
    if copies == 1 or tokens_BL.shape[0] % copies or tokens_BL.size < table_VD.shape[0]:
        return jnp.take(table_VD, tokens_BL, axis=0)
    tables = jnp.broadcast_to(table_VD, (copies, *table_VD.shape))
    tables = nn.with_logical_constraint(tables, ("copies", "vocab", "embed"))
    tokens = tokens_BL.reshape(copies, -1, tokens_BL.shape[1])
    tokens = nn.with_logical_constraint(tokens, ("copies", "rows", "length"))
    rows = jax.vmap(lambda table, own: jnp.take(table, own, axis=0))(tables, tokens)
    rows = nn.with_logical_constraint(rows, ("copies", "rows", "length", None))
    return rows.reshape(*tokens_BL.shape, -1)


class T5(nn.Module):
    """All parameters under T5X's names; the functions below are its only users."""

    cfg: T5Config
    deterministic: bool = True

    def setup(self) -> None:
        self.token_embedder = Embedding(self.cfg)
        self.encoder = Encoder(self.cfg, self.deterministic)
        self.decoder = Decoder(self.cfg, self.deterministic)

    def embed(self, tokens: jax.Array) -> jax.Array:
        x = _rows(self.token_embedder(), tokens).astype(self.cfg.dtype)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))

    def encode(self, tokens_BL: jax.Array, segments_BL: jax.Array) -> jax.Array:
        return self.encoder(self.embed(tokens_BL), segments_BL)

    def decode(self, tokens_BT: jax.Array, *args: Any) -> Any:
        return self.decoder(self.embed(tokens_BT), *args)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        tied = self.cfg.logits_via_embedding
        return self.decoder.logits(hidden_BTD, self.token_embedder() if tied else None)

    def everything(self, tokens_BL: jax.Array) -> jax.Array:
        """Touches every parameter; for initialisation."""
        segments = {name: tokens_BL for name in ("self_q", "self_kv", "cross_q", "cross_kv")}
        return self.logits(self.decode(tokens_BL, self.encode(tokens_BL, tokens_BL), segments))


# ---------------------------------------------------------------------------------------------
# Functions: all that the rest of the code sees
# ---------------------------------------------------------------------------------------------


def _boxed_init(cfg: T5Config, rng: jax.Array) -> Any:
    # A loop makes the same parameters as unrolled layers and compiles much faster.
    cfg = dataclasses.replace(cfg, scan_layers=True)
    return T5(cfg).init(rng, jnp.ones((1, 1), jnp.int32), method="everything")["params"]


def init(cfg: T5Config, rng: jax.Array) -> Params:
    """Fresh parameters, float32, with T5's initial scales.

    Args:
      cfg: the shape.
      rng: a PRNG key.

    Returns:
      Nested dictionary; kernels are [in, out], layers are stacked as [layers, ...].
    """
    return nn.unbox(_boxed_init(cfg, rng))


def abstract_params(cfg: T5Config) -> Params:
    """The tree of `init` as `jax.ShapeDtypeStruct`, without computing anything."""
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


def param_axes(cfg: T5Config) -> Params:
    """The tree of `init` with a tuple of logical axis names at each leaf."""
    boxed = jax.eval_shape(functools.partial(_boxed_init, cfg), jax.random.key(0))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_box)


def _apply(cfg: T5Config, params: Params, method: str, *args: Any, rng: Any = None) -> Any:
    module = T5(cfg, deterministic=rng is None)
    rngs = None if rng is None else {"dropout": rng}
    return module.apply({"params": params}, *args, method=method, rngs=rngs)


def encode(
    cfg: T5Config,
    params: Params,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Runs the encoder.

    Args:
      cfg: the shape.
      params: tree of `init`.
      tokens_BL: int32.
      segments_BL: int32, 0 for padding; tokens of one segment see each other only.
      dropout_rng: a PRNG key to apply dropout, None for none.

    Returns:
      encoded_BLD in `cfg.dtype`.
    """
    if isinstance(params["encoder"]["layers"], tuple):
        return _encode_unstacked(cfg, params, tokens_BL, segments_BL)
    return _apply(cfg, params, "encode", tokens_BL, segments_BL, rng=dropout_rng)


def unstack_encoder(cfg: T5Config, params: Params) -> Params:
    """The tree with the encoder's layers apart, which `encode` takes, too, without dropout.

    Out of their stack unrolled layers are copied at every call.
    """
    stacked = params["encoder"]["layers"]
    layers = tuple(
        jax.tree.map(lambda leaf: leaf[n], stacked)  # noqa: B023
        for n in range(cfg.num_encoder_layers)
    )
    return params | {"encoder": params["encoder"] | {"layers": layers}}


def _encode_unstacked(
    cfg: T5Config, params: Params, tokens_BL: jax.Array, segments_BL: jax.Array
) -> jax.Array:
    encoder = params["encoder"]
    bias_table = None if cfg.relpos_per_layer else encoder["relpos_bias"]["rel_embedding"].T
    x_BLD = _apply(cfg, params, "embed", tokens_BL)
    for layer in encoder["layers"]:
        module = EncoderLayer(cfg, deterministic=True)
        x_BLD, _ = module.apply({"params": layer}, x_BLD, bias_table, segments_BL)
    return rms_norm(x_BLD, encoder["encoder_norm"]["scale"], cfg.dtype)


def decode(
    cfg: T5Config,
    params: Params,
    encoded_BLD: jax.Array,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array,
    cross_segments_BT: jax.Array,
    encoder_segments_BL: jax.Array,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Runs the decoder over given (shifted) tokens.

    Args:
      cfg: the shape.
      params: tree of `init`.
      encoded_BLD: from `encode`.
      tokens_BT: int32 decoder inputs.
      segments_BT: int32, 0 for padding; self-attention stays within a segment.
      cross_segments_BT: int32; a position sees the encoder positions of this segment. Equal to
        `segments_BT` for packed rows; all ones where many targets share one input.
      encoder_segments_BL: int32, as given to `encode`.
      dropout_rng: a PRNG key to apply dropout, None for none.

    Returns:
      hidden_BTD in `cfg.dtype`.
    """
    segments = {
        "self_q": segments_BT,
        "self_kv": segments_BT,
        "cross_q": cross_segments_BT,
        "cross_kv": encoder_segments_BL,
    }
    args = (tokens_BT, encoded_BLD, segments)
    return _apply(cfg, params, "decode", *args, rng=dropout_rng)


def logits(cfg: T5Config, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Output logits_BTV, float32, of the decoder's hidden states.

    Operands of the product are `cfg.logits_dtype`. Of `params`, `output_params` is enough.
    """
    return _apply(cfg, params, "logits", hidden_BTD)


def output_params(cfg: T5Config, params: Params) -> Params:
    """The part of the tree that `logits` reads: the output kernel, or the embedding if tied."""
    if cfg.logits_via_embedding:
        return {"token_embedder": params["token_embedder"]}
    return {"decoder": {"logits_dense": params["decoder"]["logits_dense"]}}

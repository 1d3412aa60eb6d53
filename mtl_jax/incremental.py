"""One decoding step at a time: weights laid out for it, the cache, the step.

A step multiplies a few rows with every weight of the decoder, so it lasts as long as reading those.
`prepare` therefore lays layers apart (out of their stack XLA would copy them at every step) and
joins products of the same input into one: on two cores of a CPU that doubles their rate.

Letters: B batch, R continuations of a row, L inputs, S positions of the cache, D embedding,
H heads, K head dimension, E = H*K joined heads, C products of one input, F mlp, N layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import attention, model
from mtl_jax.layers import activated, rms_norm
from mtl_jax.model_config import T5Config

Weights = dict[str, Any]
Cache = dict[str, Any]
Entry = dict[str, jax.Array]  # "key" and "value"
Kernels = tuple[jax.Array, ...]


def prepare(cfg: T5Config, params: model.Params) -> Weights:
    """The decoder's weights as `decode_step` reads them, in `cfg.dtype`.

    Do it outside of the decoding loop, and once for many calls.

    Args:
      cfg: the shape.
      params: tree of `model.init`.

    Returns:
      A layer's kernels: qkv [D, 3 E], out [E, D], cross_query [D, E], cross_key_value [D, 2 E],
      cross_out [E, D], wi [D, C F], wo [F, D]; its norms; its bias table, if it has its own; its
      adapters' kernels, if it has any, under the names of the blocks they stand behind. Joined
      kernels are a tuple of one; where heads are sharded of several, since joining would move the
      borders of the shards. A layer is an entry of the tuple "layers", or of a leading axis N if
      `cfg.scan_layers`. Beside them "embedding", "norm", "output" [D, V] and, where the layers
      share one, "bias_table".
    """
    decoder = params["decoder"]
    layers: Any = jax.vmap(lambda layer: _prepare_layer(cfg, layer))(decoder["layers"])
    if not cfg.scan_layers:
        layers = tuple(
            jax.tree.map(lambda leaf: leaf[n], layers)  # noqa: B023
            for n in range(cfg.num_decoder_layers)
        )
    embedding = params["token_embedder"]["embedding"]
    tied = cfg.logits_via_embedding
    weights = {
        "layers": layers,
        "embedding": embedding,
        "norm": decoder["decoder_norm"]["scale"],
        # Of its own, though it is the embedding: XLA's product of few rows with a transposed matrix
        # is five times slower on a CPU.
        "output": embedding.T if tied else decoder["logits_dense"]["kernel"],
    }
    if not cfg.relpos_per_layer:
        weights["bias_table"] = decoder["relpos_bias"]["rel_embedding"].T
    return weights


def _prepare_layer(cfg: T5Config, layer: model.Params) -> Weights:
    own, cross, mlp = layer["self_attention"], layer["encoder_decoder_attention"], layer["mlp"]

    def kernel(module: Any) -> jax.Array:
        return module["kernel"].astype(cfg.dtype)

    def joined(module: Any, *names: str) -> Kernels:
        kernels = tuple(kernel(module[name]) for name in names)
        mesh = jax.sharding.get_abstract_mesh()
        sharded = not mesh.empty and mesh.shape.get("tensor", 1) > 1
        return kernels if sharded else (jnp.concatenate(kernels, axis=-1),)

    gated = len(cfg.mlp_activations) > 1
    norms = ("pre_self_attention", "pre_cross_attention", "pre_mlp")
    weights = {
        "qkv": joined(own, "query", "key", "value"),
        "out": kernel(own["out"]),
        "cross_query": kernel(cross["query"]),
        "cross_key_value": joined(cross, "key", "value"),
        "cross_out": kernel(cross["out"]),
        "wi": joined(mlp, *(("wi_0", "wi_1") if gated else ("wi",))),
        "wo": kernel(mlp["wo"]),
        **{name: layer[f"{name}_layer_norm"]["scale"] for name in norms},
    }
    if cfg.relpos_per_layer:
        weights["bias_table"] = layer["relpos_bias"]["rel_embedding"].T
    if cfg.adapter_dim:
        for name in ("self_attention", "encoder_decoder_attention", "mlp"):
            adapter = layer[f"{name}_adapter"]
            weights[f"{name}_adapter"] = (kernel(adapter["down"]), kernel(adapter["up"]))
    return weights


def start_cache(
    cfg: T5Config,
    weights: Weights,
    encoded_BLD: jax.Array,
    encoder_segments_BL: jax.Array,
    max_length: int,
    decodes: int = 1,
) -> Cache:
    """The decoding cache: keys and values of the inputs, once, and room for what is generated.

    Args:
      cfg: the shape.
      weights: from `prepare`.
      encoded_BLD: from `model.encode`.
      encoder_segments_BL: int32, 0 for padding.
      max_length: tokens to be generated at most.
      decodes: R, continuations of each row; they share the keys and values of its inputs.

    Returns:
      {"self": {"key", "value"} [B, R, H, K, max_length], "cross": {"key", "value"} [B, H, K, L],
       "segments": [B, L]}; "self" and "cross" are tuples with an entry for each layer, or have a
      leading axis N if `cfg.scan_layers`.
    """
    batch, heads = encoded_BLD.shape[0], (cfg.num_heads, cfg.head_dim)

    def cross_of(layer: Weights) -> Entry:
        def place(x_BLE: jax.Array) -> jax.Array:
            x_BHKL = x_BLE.reshape(*x_BLE.shape[:-1], *heads).transpose(0, 2, 3, 1)
            return nn.with_logical_constraint(x_BHKL, ("batch", "heads", "kv", None))

        outs = _products(encoded_BLD.astype(cfg.dtype), layer["cross_key_value"], 2)
        return dict(zip(("key", "value"), map(place, outs), strict=True))

    def empty(*lead: int) -> Entry:
        zeros = jnp.zeros((*lead, batch, decodes, *heads, max_length), cfg.dtype)
        names = (*(None,) * len(lead), "batch", None, "heads", "kv", None)
        zeros = nn.with_logical_constraint(zeros, names)
        return {"key": zeros, "value": zeros}

    if cfg.scan_layers:
        own: Any = empty(cfg.num_decoder_layers)
        cross: Any = jax.lax.map(cross_of, weights["layers"])
    else:
        own = tuple(empty() for _ in weights["layers"])
        cross = tuple(cross_of(layer) for layer in weights["layers"])
    return {"self": own, "cross": cross, "segments": encoder_segments_BL}


def decode_step(
    cfg: T5Config, weights: Weights, cache: Cache, tokens_BR: jax.Array, position: jax.Array
) -> tuple[jax.Array, Cache]:
    """One decoding step for every continuation of every row.

    Args:
      cfg: the shape.
      weights: from `prepare`.
      cache: from `start_cache` or the step before.
      tokens_BR: int32, the tokens at `position` (0 at position 0).
      position: int32 scalar, below the `max_length` of the cache.

    Returns:
      (logits_BRV, float32, and the next cache).
    """
    x_BRD = jnp.take(weights["embedding"], tokens_BR, axis=0).astype(cfg.dtype)
    x_BRD = nn.with_logical_constraint(x_BRD, ("batch", None, "embed"))

    def step(x_BRD: jax.Array, layer: tuple[Weights, Entry, Entry]) -> tuple[jax.Array, Entry]:
        table: Any = layer[0].get("bias_table", weights.get("bias_table"))
        return _layer_step(cfg, *layer, table, cache["segments"], position, x_BRD)

    layers = (weights["layers"], cache["self"], cache["cross"])
    entries: Any
    if cfg.scan_layers:
        x_BRD, entries = jax.lax.scan(step, x_BRD, layers)
    else:
        made = []
        for layer in zip(*layers, strict=True):
            x_BRD, entry = step(x_BRD, layer)
            made.append(entry)
        entries = tuple(made)
    hidden_BRD = rms_norm(x_BRD, weights["norm"], cfg.dtype)

    # A position that depends on the outcome, so that every layer has read its cache before it is
    # written: without an order XLA would copy the caches, twice at each step.
    last = jnp.int32(2**30) - (hidden_BRD.reshape(-1)[0] > 0).astype(jnp.int32)
    place = jnp.minimum(position, last)

    def write(old: jax.Array, entry: jax.Array) -> jax.Array:
        entry = entry[..., None].astype(old.dtype)  # [..., B, R, H, K, 1]
        return jax.lax.dynamic_update_slice_in_dim(old, entry, place, entry.ndim - 1)

    logits_BRV = model.product_with_output(cfg, hidden_BRD, weights["output"])
    return logits_BRV, cache | {"self": jax.tree.map(write, cache["self"], entries)}


def _layer_step(
    cfg: T5Config,
    layer: Weights,
    own: Entry,
    cross: Entry,
    bias_table: jax.Array,
    segments_BL: jax.Array,
    position: jax.Array,
    x_BRD: jax.Array,
) -> tuple[jax.Array, Entry]:
    """The residual stream behind one layer, and what this step adds to the layer's cache."""
    rows = x_BRD.shape[:2]

    def split(x_BRE: jax.Array) -> jax.Array:
        return x_BRE.reshape(*rows, cfg.num_heads, cfg.head_dim)

    h = rms_norm(x_BRD, layer["pre_self_attention"], cfg.dtype)
    query, key, value = map(split, _products(h, layer["qkv"], 3))
    out = attention.step_over_past(
        query,
        own["key"],
        own["value"],
        key,
        value,
        bias_table,
        position,
        max_distance=cfg.relpos_max_distance,
    )
    h = _product(out.reshape(*rows, -1), layer["out"])
    x_BRD = x_BRD + _adapted(h, layer.get("self_attention_adapter"))

    h = rms_norm(x_BRD, layer["pre_cross_attention"], cfg.dtype)
    query = split(_product(h, layer["cross_query"]))
    out = attention.step_over_inputs(query, cross["key"], cross["value"], segments_BL)
    h = _product(out.reshape(*rows, -1), layer["cross_out"])
    x_BRD = x_BRD + _adapted(h, layer.get("encoder_decoder_attention_adapter"))

    h = rms_norm(x_BRD, layer["pre_mlp"], cfg.dtype)
    h = activated(cfg.mlp_activations, _products(h, layer["wi"], len(cfg.mlp_activations)))
    x_BRD = x_BRD + _adapted(_product(h, layer["wo"]), layer.get("mlp_adapter"))
    return x_BRD, {"key": key, "value": value}


def _adapted(h_BRD: jax.Array, adapter: Kernels | None) -> jax.Array:
    """What the adapter makes of it, as `layers.Adapter`; None: there is none."""
    if adapter is None:
        return h_BRD
    down, up = adapter
    return h_BRD + _product(nn.gelu(_product(h_BRD, down)), up)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., in] and [in, out] -> [..., out], as one matrix of rows (see `layers.Dense`)."""
    rows = jnp.dot(x.reshape(-1, x.shape[-1]), kernel)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def _products(x: jax.Array, kernels: Kernels, count: int) -> tuple[jax.Array, ...]:
    """`count` products of one input."""
    outs = [_product(x, kernel) for kernel in kernels]
    return tuple(outs if len(outs) == count else jnp.split(outs[0], count, axis=-1))


def reorder_cache(cfg: T5Config, cache: Cache, source_BR: jax.Array) -> Cache:
    """The cache in which continuation r of row b is the one that was `source_BR[b, r]`.

    Args:
      cfg: the shape.
      cache: from `decode_step`.
      source_BR: int32, values in [0, R).
    """
    lead = (None,) if cfg.scan_layers else ()

    def gather(leaf: jax.Array) -> jax.Array:
        index = source_BR[(*lead, ..., None, None, None)]
        return jnp.take_along_axis(leaf, index, axis=len(lead) + 1)

    return cache | {"self": jax.tree.map(gather, cache["self"])}

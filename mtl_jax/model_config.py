"""The shape of a T5."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from mtl_jax.errors import UserError, suggest

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": nn.gelu,  # the tanh approximation, as in T5 1.1 ("gelu_new")
    "silu": nn.silu,
    "linear": lambda x: x,
}
_policies = jax.checkpoint_policies
REMAT = {
    "none": None,
    # The attention kernel is no matrix product to JAX, so what it leaves is kept by name.
    "minimal": _policies.save_from_both_policies(
        _policies.checkpoint_dots_with_no_batch_dims,
        _policies.save_only_these_names("attention_out", "attention_lse"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# What `T5Config.attention` may be.
ATTENTION = {
    "auto": "the kernel on TPU and NVIDIA GPU; elsewhere xla, or naive for short rows",
    "naive": "the reference: all logits at once",
    "xla": "blocks in plain XLA loops, linear memory, any device",
    "pallas": "the hand-written kernel, TPU and NVIDIA GPU",
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5.

    Attributes:
      vocab_size: rows of the embedding; at least as many as the tasks' vocabulary has.
      emb_dim: D.
      num_heads: H.
      head_dim: K.
      mlp_dim: F.
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      mlp_activations: one name for a plain MLP (T5 1.0: relu), two for a gated one (1.1).
      logits_via_embedding: tie the output to the embedding (T5 1.0).
      rescale_logits: multiply what enters the output product by 1/sqrt(D); None: as T5 does, where
        the output is tied.
      dropout_rate: on embeddings, residual branches, MLP and attention weights, in training.
      dtype: of the computation, "float32" or "bfloat16"; parameters are always float32.
      logits_dtype: "float32" or "bfloat16", of what enters the output product, the largest of the
        model; logits are summed up and returned in float32 either way.
      relpos_buckets: buckets of the relative position bias.
      relpos_max_distance: distances from here on share the last bucket.
      relpos_per_layer: every layer has a bias table of its own (umT5); else those of a stack share
        one.
      scan_layers: compile one layer and loop (fast to compile) or unroll (faster to run on CPU).
      attention: implementation, a name of `ATTENTION`; all compute the same function.
      remat: what to recompute in the backward pass: "none", "minimal" (keeps matrix products)
        or "full" (keeps only the input of each layer).
      adapter_dim: width of the bottleneck behind every attention and MLP (Houlsby et al. 2019); 0
        for none. To train adapters with sharing among tasks, set `Adapter.dim` instead.
    """

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: Sequence[str] = ("gelu", "linear")
    logits_via_embedding: bool = False
    rescale_logits: bool | None = None
    dropout_rate: float = 0.0
    dtype: str = "float32"
    logits_dtype: str = "float32"
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    relpos_per_layer: bool = False
    scan_layers: bool = True
    attention: str = "auto"
    remat: str = "none"
    adapter_dim: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.mlp_activations, str) or not 1 <= len(self.mlp_activations) <= 2:
            raise UserError(
                "T5.mlp_activations must be a list of one activation (a plain MLP) or two (a gated "
                f"one), got {self.mlp_activations!r}."
            )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        if self.rescale_logits is None:
            object.__setattr__(self, "rescale_logits", self.logits_via_embedding)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "adapter_dim" else 1
            if field.type in ("int", int) and value < least:
                raise UserError(f"T5.{field.name} must be at least {least}, got {value}.")
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(
                    f"T5.mlp_activations: unknown activation {name!r}.{suggest(name, ACTIVATIONS)}"
                    f" Known: {', '.join(ACTIVATIONS)}."
                )
        # Half of the buckets, in the decoder, stand for one distance each; the other half divides
        # what lies between them and the maximum. The encoder does so in each direction.
        if self.relpos_buckets < 4 or self.relpos_buckets % 2:
            raise UserError(
                f"T5.relpos_buckets must be even and at least 4, got {self.relpos_buckets}."
            )
        if self.relpos_max_distance <= self.relpos_buckets // 2:
            raise UserError(
                "T5.relpos_max_distance must be larger than half of T5.relpos_buckets "
                f"({self.relpos_buckets // 2}), got {self.relpos_max_distance}."
            )
        if self.attention not in ATTENTION:
            raise UserError(
                f"T5.attention: unknown implementation {self.attention!r}."
                f"{suggest(self.attention, ATTENTION)} Known: {', '.join(ATTENTION)}."
            )
        if self.remat not in REMAT:
            raise UserError(f"T5.remat must be one of {', '.join(REMAT)}, got {self.remat!r}.")
        for name in ("dtype", "logits_dtype"):
            if (value := getattr(self, name)) not in ("float32", "bfloat16"):
                raise UserError(f"T5.{name} must be 'float32' or 'bfloat16', got {value!r}.")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"T5.dropout_rate must be in [0, 1), got {self.dropout_rate}.")

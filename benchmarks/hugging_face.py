"""The same T5 by Hugging Face's transformers in PyTorch, and one train step of it.

What the benchmarks of the whole step compare mtl_jax with. Needs `torch` and `transformers`, which
the project itself does not.
"""

import gc
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
import variants
from step_time import batch_of
from torch.nn.attention.flex_attention import flex_attention

from mtl_jax.model_config import T5Config

LEARNING_RATE = 1e-4
PARAMETERS = {
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
}
INPUTS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")


def flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    position_bias: torch.Tensor,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """T5's attention by PyTorch's flex attention; needs `torch.compile` around it, and a GPU.

    Transformers' own ("flex_attention") indexes the bias, whose first dimension is 1, by the row of
    the batch, and so reads out of bounds from the second row on. Its signature is transformers';
    arrays are [B, H, T, K], the bias [1, H, T, S].
    """
    bias = position_bias[0]

    def with_bias(score: Any, row: Any, head: Any, query_index: Any, key_index: Any) -> Any:
        score = score + bias[head, query_index, key_index]
        # No block mask: 128 targets are one block, of which nothing could be left out.
        return torch.where(query_index >= key_index, score, -float("inf")) if causal else score

    causal = module.is_causal
    # Attention to the encoder comes with a bias of constant zeros.
    score_mod = with_bias if causal or not module.is_decoder else None
    out = flex_attention(query, key, value, score_mod=score_mod, scale=scaling)
    return out.transpose(1, 2), None


transformers.AttentionInterface.register("flex", flex)


def build(cfg: T5Config, attention: str) -> torch.nn.Module:
    """A randomly initialised T5 1.1 of the shape of `cfg`, float32.

    Args:
      cfg: the shape; T5 1.1 (a gated GELU, an output layer of its own).
      attention: "sdpa" or "eager", which are transformers' own, or "flex", see `flex`.

    Raises:
      ValueError: `cfg` is no T5 1.1, or this version of transformers lacks the implementation.
    """
    if cfg.mlp_activations != ("gelu", "linear") or cfg.logits_via_embedding:
        raise ValueError("only T5 1.1 is compared: gelu and linear, no logits_via_embedding")
    config = transformers.T5Config(
        vocab_size=cfg.vocab_size,
        d_model=cfg.emb_dim,
        d_kv=cfg.head_dim,
        d_ff=cfg.mlp_dim,
        num_layers=cfg.num_encoder_layers,
        num_decoder_layers=cfg.num_decoder_layers,
        num_heads=cfg.num_heads,
        relative_attention_num_buckets=cfg.relpos_buckets,
        relative_attention_max_distance=cfg.relpos_max_distance,
        dropout_rate=cfg.dropout_rate,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # transformers 5 reads this as "do not scale the output"
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention)
    # ... and ties the output layer to the embedding all the same; T5 1.1 has its own.
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn_like(model.lm_head.weight) * cfg.emb_dim**-0.5
    )
    return model


def count(model: torch.nn.Module) -> int:
    """Returns the number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def load(model: torch.nn.Module, params: dict[str, Any]) -> None:
    """Copies parameters of `mtl_jax.model.init` into a model of `build`, in place."""
    own = dict(model.named_parameters())
    given = dict(_renamed(params))
    if own.keys() != given.keys():
        raise ValueError(f"parameters differ: {sorted(own.keys() ^ given.keys())}")
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(torch.tensor(np.asarray(value)))


def _renamed(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name in transformers, array [out, in])."""
    yield "shared.weight", params["token_embedder"]["embedding"]
    yield "lm_head.weight", params["decoder"]["logits_dense"]["kernel"].T
    attentions = {
        "encoder": [("SelfAttention", "attention", "pre_attention_layer_norm")],
        "decoder": [
            ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
            ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ],
    }
    for stack, blocks in attentions.items():
        own, layers = params[stack], params[stack]["layers"]
        first = f"{stack}.block.0.layer.0.SelfAttention"
        yield f"{first}.relative_attention_bias.weight", own["relpos_bias"]["rel_embedding"].T
        yield f"{stack}.final_layer_norm.weight", own[f"{stack}_norm"]["scale"]
        for number in range(len(layers["mlp"]["wo"]["kernel"])):
            block = f"{stack}.block.{number}.layer"
            for index, (theirs, ours, norm) in enumerate(blocks):
                for name in ("query", "key", "value", "out"):
                    letter = {"out": "o"}.get(name, name[0])
                    kernel = layers[ours][name]["kernel"][number]
                    yield f"{block}.{index}.{theirs}.{letter}.weight", kernel.T
                yield f"{block}.{index}.layer_norm.weight", layers[norm]["scale"][number]
            last = len(blocks)
            for name in ("wi_0", "wi_1", "wo"):
                kernel = layers["mlp"][name]["kernel"][number]
                yield f"{block}.{last}.DenseReluDense.{name}.weight", kernel.T
            scale = layers["pre_mlp_layer_norm"]["scale"][number]
            yield f"{block}.{last}.layer_norm.weight", scale


class TrainStep:
    """Forward, backward and AdamW; a call is one update and returns the loss before it.

    Args:
      model: of `build`; moved to the device.
      device: a PyTorch device.
      precision: "float32"; "autocast" (float32 parameters, products in bfloat16); or "bfloat16"
        (parameters and AdamW's moments too, which trains worse).
      compiled: "compile" puts forward and backward through `torch.compile`, anew for every shape;
        "regional" only the layers, which share what is compiled, and the cross-entropy, in a
        fraction of the time; "" nothing.
    """

    def __init__(self, model: torch.nn.Module, device: str, precision: str, compiled: str):
        self.device = device
        self.model = model.to(device, PARAMETERS[precision]).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

        def loss(inputs: torch.Tensor, shifted: torch.Tensor, targets: torch.Tensor) -> Any:
            # No mask: every row is full. The cache is for generation.
            given = {"input_ids": inputs, "decoder_input_ids": shifted, "use_cache": False}
            with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
                if compiled == "regional":
                    return cross_entropy(model(**given).logits.flatten(0, 1), targets.flatten())
                return model(**given, labels=targets).loss

        if compiled == "regional":
            cross_entropy = torch.compile(torch.nn.functional.cross_entropy, dynamic=False)
            for block in (*model.encoder.block, *model.decoder.block):
                block.compile(dynamic=False)
        self._loss = torch.compile(loss, dynamic=False) if compiled == "compile" else loss

    def put(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
        """A batch in mtl_jax's layout as this step's arguments on the device; rows are full."""
        return tuple(torch.tensor(batch[name].astype(np.int64)).to(self.device) for name in INPUTS)

    def __call__(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One update; the loss lies on the device."""
        loss = self._loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Trainer:
    """Runs the step of one variant on full rows of random tokens; the face of `jax_step.Trainer`.

    Args:
      cfg: the model.
      variant: see `variants.py`.
      lengths: tokens of a row's (inputs, targets).
    """

    def __init__(self, cfg: T5Config, variant: str, lengths: tuple[int, int]):
        self._cfg, self._lengths = cfg, lengths
        given = {"attention": "sdpa", "precision": "float32", "compiled": ""}
        self._chosen = given | variants.settings("hf", variant)["step"]
        self._on_gpu = torch.cuda.is_available()
        self._step: TrainStep | None = None
        if self._on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32, as JAX does by default

    @property
    def device_kind(self) -> str:
        """Name of the device, as `mtl_jax.flops` knows it."""
        return torch.cuda.get_device_name() if self._on_gpu else "cpu"

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        with torch.device("meta"):
            return count(build(self._cfg, "sdpa"))

    @property
    def model(self) -> torch.nn.Module:
        """The model, once prepared."""
        return self._step.model

    def prepare(self, rows: int) -> None:
        """A fresh model and optimizer and a batch of so many rows; compiles with the first step."""
        self._step = self._batch = self._loss = None  # first make room
        torch.compiler.reset()
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        device = "cuda" if self._on_gpu else "cpu"
        torch.manual_seed(0)
        with torch.device(device):
            model = build(self._cfg, self._chosen["attention"])
        self._step = TrainStep(model, device, self._chosen["precision"], self._chosen["compiled"])
        self._batch = self._step.put(batch_of(self._cfg, (rows, *self._lengths), 1))

    def step(self) -> None:
        """One update, waited for."""
        self._loss = self._step(self._batch)
        if self._on_gpu:
            torch.cuda.synchronize()

    def loss(self) -> float:
        """The loss of the last step."""
        return float(self._loss)

    def peak_bytes(self) -> int:
        """Most device memory since `prepare`; on a CPU that of the process."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

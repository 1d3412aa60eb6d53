"""Hugging Face's `config.json` of the T5 family, to and from `T5Config`.

Two things of it are not what they seem. `tie_word_embeddings` says, up to transformers 4, whether
the output is tied and whether it is scaled by 1/sqrt(d_model); version 5 writes `true` always, ties
unless both matrices are in the file and differ, and has `scale_decoder_outputs` (T5), scales by
`tie_word_embeddings` (umT5) or never (mT5). Hence tying is decided by the tensors here, and scaling
by the fields that the writing version had.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError
from mtl_jax.interop.source import CONFIG
from mtl_jax.model_config import T5Config

MODEL_TYPES = ("t5", "mt5", "umt5")
# Theirs -> ours, where the value is the same.
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "relative_attention_num_buckets": "relpos_buckets",
    "relative_attention_max_distance": "relpos_max_distance",
    "dropout_rate": "dropout_rate",
}
# transformers' own defaults, the same for all three model types.
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
}
_PROJECTIONS = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_DEFAULT_PROJECTION = {"t5": "relu", "mt5": "gated-gelu", "umt5": "gated-gelu"}
# Fields with one value that the model computes; others would need another model.
_FIXED = {
    "layer_norm_epsilon": (1e-6,),
    "tie_encoder_decoder": (False, None),
    "is_encoder_decoder": (True,),
    "pad_token_id": (0,),
    "decoder_start_token_id": (0, None),
    "scalable_attention": (True,),
}


def to_ours(config: Mapping[str, Any], place: Path, *, tied: bool) -> T5Config:
    """The model that a `config.json` describes.

    Args:
      config: its content.
      place: the file, for messages.
      tied: whether the output is tied to the embedding, by the tensors.

    Raises:
      UserError: not of the T5 family, a field is missing, or has a value that ours cannot compute.
    """
    kind = model_type(config, place)
    for name, allowed in _FIXED.items():
        if name in config and config[name] not in allowed:
            raise UserError(
                f"{place}: {name} = {config[name]!r} is not supported, only {allowed[0]!r}."
            )
    values: dict[str, Any] = {}
    for theirs, ours in _SIZES.items():
        value = config.get(theirs, _DEFAULTS.get(theirs))
        if theirs == "num_decoder_layers" and value is None:
            value = config.get("num_layers")  # as transformers reads it
        wanted = (int, float) if theirs == "dropout_rate" else (int,)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{place}: {theirs} must be a number, it is {value!r}.")
        values[ours] = value
    try:
        return T5Config(
            **values,
            mlp_activations=_activations(config, kind, place),
            logits_via_embedding=tied,
            rescale_logits=is_scaled(config, kind),
            relpos_per_layer=kind == "umt5",
        )
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def model_type(config: Mapping[str, Any], place: Path) -> str:
    """The `model_type`; a UserError unless it is of the T5 family."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{place}: model_type = {kind!r} is not supported, only {', '.join(MODEL_TYPES)} "
            "(T5, T5 1.1, ByT5, mT5, umT5)."
        )
    return str(kind)


def is_scaled(config: Mapping[str, Any], kind: str) -> bool:
    """Whether the output is scaled by 1/sqrt(d_model), as the version that wrote the file did."""
    tie = config.get("tie_word_embeddings")
    if kind == "t5":
        scaled = config.get("scale_decoder_outputs")
        return tie is not False if scaled is None else bool(scaled)
    if kind == "umt5":
        return tie is not False
    return tie is True and major_version(config) < 5


def major_version(config: Mapping[str, Any]) -> int:
    """Of the transformers that wrote a `config.json`; 0 where it does not say."""
    version = str(config.get("transformers_version") or "0").split(".")[0]
    return int(version) if version.isdigit() else 0


def _activations(config: Mapping[str, Any], kind: str, place: Path) -> tuple[str, ...]:
    name = config.get("feed_forward_proj", _DEFAULT_PROJECTION[kind])
    if name not in _PROJECTIONS:
        raise UserError(
            f"{place}: feed_forward_proj = {name!r} is not supported, only "
            f"{', '.join(_PROJECTIONS)}."
        )
    # These are derived from it, and win over it where they are in the file.
    derived = {
        "dense_act_fn": name.split("-")[-1].replace("gelu_new", "gelu").replace("gelu", "gelu_new"),
        "is_gated_act": name.startswith("gated-"),
    }
    for field, value in derived.items():
        if config.get(field, value) != value:
            raise UserError(
                f"{place}: {field} = {config[field]!r} contradicts feed_forward_proj = {name!r}."
            )
    return _PROJECTIONS[name]


def from_ours(
    cfg: T5Config, original: Mapping[str, Any] | None, dtype: str
) -> tuple[dict[str, Any], list[str]]:
    """A `config.json` that transformers 4 and 5 read as this model, as far as they can.

    Args:
      cfg: the model.
      original: the `config.json` that the model came with, whose other fields are kept.
      dtype: "float32" or "bfloat16", of the tensors.

    Returns:
      (the content, notes on what transformers will compute otherwise).

    Raises:
      UserError: the model's activations have no name there, or it has adapters.
    """
    if cfg.adapter_dim:
        raise UserError(
            f"T5.adapter_dim = {cfg.adapter_dim}: Hugging Face's T5 has no adapters. Train with "
            "Lora instead, which becomes part of the kernels, or convert --to mtl_jax."
        )
    config = dict(original or {})
    kind = config.get("model_type", "t5")
    if (kind == "umt5") != cfg.relpos_per_layer:
        kind = "umt5" if cfg.relpos_per_layer else "t5"
    names = {activations: name for name, activations in reversed(_PROJECTIONS.items())}
    if tuple(cfg.mlp_activations) not in names:
        raise UserError(
            f"T5.mlp_activations = {tuple(cfg.mlp_activations)!r} has no name in {CONFIG}."
        )
    name = names[tuple(cfg.mlp_activations)]
    if _PROJECTIONS.get(config.get("feed_forward_proj", "")) == tuple(cfg.mlp_activations):
        name = config["feed_forward_proj"]
    config |= {theirs: getattr(cfg, ours) for theirs, ours in _SIZES.items()}
    config |= {
        "model_type": kind,
        "feed_forward_proj": name,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    config.setdefault("eos_token_id", 1)
    classes = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
    config["architectures"] = [f"{classes[kind]}ForConditionalGeneration"]
    for derived in ("dense_act_fn", "is_gated_act", "torch_dtype", "dtype"):
        config.pop(derived, None)
    # Version 5 writes `dtype` and reads both.
    config["torch_dtype"] = dtype
    return config, _say_output(config, cfg, kind)


def _say_output(config: dict[str, Any], cfg: T5Config, kind: str) -> list[str]:
    """Sets the fields that decide on tying and scaling; returns what they cannot say."""
    tied, scaled = cfg.logits_via_embedding, bool(cfg.rescale_logits)
    config.pop("scale_decoder_outputs", None)
    if kind == "t5":
        config["scale_decoder_outputs"] = scaled
        config["tie_word_embeddings"] = tied or scaled
    else:
        config["tie_word_embeddings"] = scaled
        if kind == "mt5" and scaled and major_version(config) >= 5:
            del config["transformers_version"]
    notes = []
    if kind == "umt5" and not scaled:
        notes.append(
            "this umT5 does not scale its output by 1/sqrt(d_model), but transformers 5 does so in "
            "every umT5: its logits there are smaller by that factor (transformers 4 is right)"
        )
    if kind == "mt5" and scaled:
        notes.append(
            "this mT5 scales its output by 1/sqrt(d_model), but transformers 5 does so in no mT5: "
            "its logits there are larger by that factor (transformers 4 is right)"
        )
    if tied != scaled:
        notes.append(
            f"the output is {'' if tied else 'not '}tied to the embedding and "
            f"{'' if scaled else 'not '}scaled, which only transformers 5 can tell apart; version "
            "4 computes other logits"
        )
    return notes

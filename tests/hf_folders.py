"""Hugging Face directories made with numpy alone, by the names that transformers gives tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES = dict(vocab_size=24, d_model=8, num_heads=2, d_kv=3, d_ff=10, num_layers=2)
COMMON = SIZES | dict(
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    dropout_rate=0.1,
    layer_norm_epsilon=1e-6,
    is_encoder_decoder=True,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    num_decoder_layers=2,
)
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": COMMON | {"model_type": "t5", "feed_forward_proj": "relu"},
    "t5_1_1": COMMON | {"model_type": "t5"} | GATED,
    "mt5": COMMON | {"model_type": "mt5"} | GATED,
    "umt5": COMMON | {"model_type": "umt5", "feed_forward_proj": "gated-gelu"},
    "byt5": COMMON | {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 1} | GATED,
}
UNTIED = ("t5_1_1", "mt5", "umt5", "byt5")


def shapes(config: dict[str, Any], *, untied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    dim, inner, ff = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    bias = (config["relative_attention_num_buckets"], config["num_heads"])
    found: dict[str, tuple[int, ...]] = {"shared.weight": (config["vocab_size"], dim)}

    def attention(name: str) -> None:
        found.update({f"{name}.{letter}.weight": (inner, dim) for letter in "qkv"})
        found[f"{name}.o.weight"] = (dim, inner)

    wi = ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated") else ("wi",)
    for stack, blocks in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        for n in range(config[blocks]):
            block = f"{stack}.block.{n}.layer"
            attention(f"{block}.0.SelfAttention")
            if n == 0 or config["model_type"] == "umt5":
                found[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = bias
            last = 1
            if stack == "decoder":
                attention(f"{block}.1.EncDecAttention")
                last = 2
            found.update({f"{block}.{last}.DenseReluDense.{name}.weight": (ff, dim) for name in wi})
            found[f"{block}.{last}.DenseReluDense.wo.weight"] = (dim, ff)
            found.update({f"{block}.{i}.layer_norm.weight": (dim,) for i in range(last + 1)})
        found[f"{stack}.final_layer_norm.weight"] = (dim,)
    if untied:
        found["lm_head.weight"] = (config["vocab_size"], dim)
    return found


def tensors(family: str, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """Random float32 tensors of a family's model."""
    rng = np.random.default_rng(seed)
    wanted = shapes(CONFIGS[family] | changes, untied=family in UNTIED)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in wanted.items()}


def write(
    folder: Path,
    config: dict[str, Any],
    arrays: dict[str, np.ndarray],
    shards: int = 1,
) -> Path:
    """Writes the directory with the library of Hugging Face."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: arrays[key] for key in sorted(arrays)[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make(folder: Path, family: str, shards: int = 1, **changes: Any) -> Path:
    """A directory of a family's model, with the files of a tokenizer."""
    write(folder, CONFIGS[family] | changes, tensors(family, **changes), shards)
    (folder / "spiece.model").write_bytes(b"a vocabulary")
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 4}')
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 0, "num_beams": 3}')
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, read with the library of Hugging Face."""
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= read_file(path)
    return found


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file."""
    from safetensors.numpy import load_file

    return load_file(path)

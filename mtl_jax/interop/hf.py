"""Directories of Hugging Face: names of tensors, reading and writing."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.interop import hf_config, safetensors_file
from mtl_jax.interop.source import (
    CONFIG,
    GENERATION_CONFIG,
    Source,
    TensorPath,
    check_tensors,
    pieces,
    read_json,
)
from mtl_jax.interop.stored import DTYPES, Stored
from mtl_jax.model_config import T5Config

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, OUTPUT = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the first files of T5, never used.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
# Block of a layer -> its number and class in Hugging Face's.
_BLOCKS = {
    "encoder": {
        "pre_attention_layer_norm": (0, "layer_norm"),
        "attention": (0, "SelfAttention"),
        "relpos_bias": (0, "SelfAttention"),
        "pre_mlp_layer_norm": (1, "layer_norm"),
        "mlp": (1, "DenseReluDense"),
    },
    "decoder": {
        "pre_self_attention_layer_norm": (0, "layer_norm"),
        "self_attention": (0, "SelfAttention"),
        "relpos_bias": (0, "SelfAttention"),
        "pre_cross_attention_layer_norm": (1, "layer_norm"),
        "encoder_decoder_attention": (1, "EncDecAttention"),
        "pre_mlp_layer_norm": (2, "layer_norm"),
        "mlp": (2, "DenseReluDense"),
    },
}


def tensor_name(path: TensorPath, layer: int | None) -> str:
    """Hugging Face's name of one of our tensors; see `is_transposed` for its axes."""
    stack, *rest = path
    if stack == "token_embedder":
        return EMBEDDING
    if rest[0] == "logits_dense":
        return OUTPUT
    if rest[0] in ("encoder_norm", "decoder_norm"):
        return f"{stack}.final_layer_norm.weight"
    if rest[0] == "relpos_bias":  # one for the stack, kept in its first layer
        layer = 0
    else:
        rest = rest[1:]
    number, name = _BLOCKS[stack][rest[0]]
    words = [f"{stack}.block.{layer}.layer.{number}.{name}"]
    if rest[0] == "relpos_bias":
        words.append("relative_attention_bias")
    elif len(rest) == 3:
        words.append(_ATTENTION.get(rest[1], rest[1]))
    return ".".join([*words, "weight"])


def is_transposed(path: TensorPath) -> bool:
    """Linear maps are [out, in] there, position biases [buckets, heads]; ours are the reverse."""
    return path[-1] in ("kernel", "rel_embedding")


def names_and_shapes(cfg: T5Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All tensors of a model as Hugging Face has them."""
    for path, layer, shape in pieces(cfg):
        yield tensor_name(path, layer), shape[::-1] if is_transposed(path) else shape


class HfSource(Source):
    """A directory with `config.json` and safetensors."""

    def __init__(self, folder: Path):
        """Reads the configuration and the headers of all files, and checks them.

        Raises:
          UserError: not a T5, or incomplete, damaged or foreign files.
        """
        config = read_json(folder / CONFIG)
        hf_config.model_type(config, folder / CONFIG)
        self._stored = _headers(folder)
        if not any(name.startswith("decoder.") for name in self._stored):
            raise UserError(
                f"{folder} holds an encoder alone (T5EncoderModel): a whole T5, with its decoder, "
                "is needed."
            )
        self.documents = {CONFIG: config}
        if (folder / GENERATION_CONFIG).is_file():
            self.documents[GENERATION_CONFIG] = read_json(folder / GENERATION_CONFIG)
        self.tokenizer_folder = folder
        tied = self._take_out_copies(folder, config)
        self.config = hf_config.to_ours(config, folder / CONFIG, tied=tied)
        shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        check_tensors(folder, dict(names_and_shapes(self.config)), shapes, CONFIG)
        self.description = f"Hugging Face {config['model_type']}"

    def read(self, path: TensorPath, layer: int | None) -> np.ndarray:
        """See `Source.read`."""
        x = self._stored[tensor_name(path, layer)].read()
        return x.T if is_transposed(path) else x

    def _take_out_copies(self, folder: Path, config: dict) -> bool:
        """Drops tensors that say nothing new; returns whether the output is tied."""
        stored = self._stored
        stored.pop(_UNUSED, None)
        # transformers leaves out either name of tensors that are one in its memory.
        copies = [name for name in (*_COPIES, OUTPUT) if name in stored]
        if EMBEDDING not in stored and copies[:1] and copies[0] in _COPIES:
            stored[EMBEDDING] = stored.pop(copies.pop(0))
        if EMBEDDING not in stored:
            return OUTPUT not in stored
        for name in set(copies) & set(_COPIES):
            if not stored[EMBEDDING].equals(stored.pop(name)):
                raise UserError(
                    f"{folder}: tensor {name} differs from {EMBEDDING}; encoder and decoder with "
                    "embeddings of their own are not supported."
                )
        if OUTPUT not in stored:
            return True
        if stored[EMBEDDING].equals(stored[OUTPUT]):
            del stored[OUTPUT]
            return True
        if config.get("tie_word_embeddings") is True and hf_config.major_version(config) < 5:
            self.notes = (
                f"{folder / CONFIG} says tie_word_embeddings = true, but {OUTPUT} differs from "
                f"{EMBEDDING}: the output is taken as not tied, as transformers 5 does",
            )
        return False


def _headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a directory by name."""
    if (folder / WEIGHTS).is_file():
        return safetensors_file.read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("pytorch_model*.bin*"))
        if others:
            raise UserError(
                f"{folder} holds PyTorch's {others[0]}, which is a program when it is loaded; save "
                "it as safetensors first: AutoModelForSeq2SeqLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR) with PyTorch and transformers."
            )
        raise UserError(f"{folder} has a {CONFIG}, but neither {WEIGHTS} nor {INDEX}.")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UserError(f"{folder / INDEX}: weight_map must give a file name for every tensor.")
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            count = sum(1 for file in weight_map.values() if file == name)
            raise UserError(f"{folder}: {name} is missing; {INDEX} says it has {count} tensors.")
        found |= safetensors_file.read_header(folder / name)
    lost = [name for name in weight_map if name not in found]
    if lost:
        raise UserError(
            f"{folder / weight_map[lost[0]]} lacks tensor {lost[0]}, which {INDEX} says it has."
        )
    return found


def write(source: Source, folder: Path, dtype: str, max_shard_bytes: int) -> list[str]:
    """Writes a model to an empty directory, tensor by tensor.

    Args:
      source: what to write.
      folder: where.
      dtype: "float32" or "bfloat16".
      max_shard_bytes: a file is not larger, unless a single tensor is.

    Returns:
      Notes for the user.

    Raises:
      UserError: the source cannot be read, or the model has no name there.
      OSError: the folder cannot be written.
    """
    cfg = source.config
    config, notes = hf_config.from_ours(cfg, source.documents.get(CONFIG), dtype)
    documents = {CONFIG: config}
    if GENERATION_CONFIG in source.documents:
        documents[GENERATION_CONFIG] = source.documents[GENERATION_CONFIG]
    places = {tensor_name(path, layer): (path, layer) for path, layer, _ in pieces(cfg)}

    def read(name: str) -> np.ndarray:
        path, layer = places[name]
        x = source.read(path, layer)
        return x.T if is_transposed(path) else x

    code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    shards = _shards(dict(names_and_shapes(cfg)), DTYPES[code].itemsize, max_shard_bytes)
    files = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[WEIGHTS if len(shards) == 1 else name] = shapes
    for name, shapes in files.items():
        safetensors_file.write(folder / name, shapes, code, read)
    if len(files) > 1:
        weight_map = {tensor: name for name, shapes in files.items() for tensor, _ in shapes}
        total = sum(int(np.prod(shape)) for shapes in shards for _, shape in shapes)
        metadata = {"total_size": total * DTYPES[code].itemsize, "total_parameters": total}
        documents[INDEX] = {"metadata": metadata, "weight_map": weight_map}
    for name, value in documents.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return notes


def _shards(
    shapes: dict[str, tuple[int, ...]], itemsize: int, most: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in order, shared out to files."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * itemsize
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards

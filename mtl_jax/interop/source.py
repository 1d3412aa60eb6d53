"""What a checkpoint of any format gives: the model's shape, and one layer's tensor at a time."""

import abc
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import model, tokenizer
from mtl_jax.errors import UserError, suggest
from mtl_jax.model_config import T5Config

TensorPath = tuple[str, ...]  # of our tree, such as ("decoder", "layers", "mlp", "wo", "kernel")

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_NAMES_SHOWN = 3


class Source(abc.ABC):
    """A checkpoint opened for reading; its tensors' names, shapes and sizes are checked by then.

    Attributes:
      config: the model.
      description: what was opened, for a user's eyes.
      step: training steps done, 0 where the format does not tell.
      tokenizer_folder: where tokenizer files are, if there are any.
      documents: contents of Hugging Face's `config.json` and `generation_config.json`, by name,
        where the checkpoint is from there.
      notes: what the user should know of how the checkpoint was understood.
      prompt: token ids in front of every input, whose vectors were trained (`Prompt`).
    """

    config: T5Config
    description: str
    step: int = 0
    tokenizer_folder: Path
    documents: Mapping[str, Any] = {}
    notes: Sequence[str] = ()
    prompt: Sequence[int] = ()

    @abc.abstractmethod
    def read(self, path: TensorPath, layer: int | None) -> np.ndarray:
        """Reads one tensor, float32 (possibly a transposed view of what was read).

        Args:
          path: of the tree of `model.init`.
          layer: which layer, for tensors below "layers", whose leading axis is then missing; None
            for all others.

        Raises:
          UserError: its file cannot be read any more.
        """

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer that are there."""
        return tokenizer.files(self.tokenizer_folder)


def by_path(tree: Any) -> dict[TensorPath, Any]:
    """The leaves of a tree of parameters by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


@functools.lru_cache(maxsize=4)
def tensors(cfg: T5Config) -> Mapping[TensorPath, tuple[int, ...]]:
    """The shape of every parameter by path; layers are stacked."""
    return {path: leaf.shape for path, leaf in by_path(model.abstract_params(cfg)).items()}


def pieces(cfg: T5Config) -> Iterator[tuple[TensorPath, int | None, tuple[int, ...]]]:
    """Every parameter of every layer: path, layer (None if not stacked) and the layer's shape."""
    for path, shape in tensors(cfg).items():
        if "layers" in path:
            yield from ((path, layer, shape[1:]) for layer in range(shape[0]))
        else:
            yield path, None, shape


def check_tensors(
    place: Path,
    wanted: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
    described_by: str,
) -> None:
    """Compares names and shapes.

    Args:
      place: the checkpoint, for the message.
      wanted: shapes by name.
      found: shapes by name.
      described_by: where `wanted` comes from.

    Raises:
      UserError: a tensor of another shape (both are told), a missing or an unknown one.
    """
    for name, shape in wanted.items():
        if name in found and tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{place}: tensor {name} is {written(found[name])}, but by {described_by} it must "
                f"be {written(shape)}. The two do not belong together, or one of them is damaged."
            )
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing:
        near = suggest(missing[0], unknown, 1)
        raise UserError(
            f"{place}: tensor {missing[0]} ({written(wanted[missing[0]])}) is missing"
            f"{_more(missing)}; {described_by} asks for it.{near} The checkpoint is incomplete or "
            "of another model."
        )
    if unknown:
        raise UserError(
            f"{place}: tensor {unknown[0]} ({written(found[unknown[0]])}) is unknown"
            f"{_more(unknown)}: a T5 as described by {described_by} has none of that name."
        )


def written(shape: Sequence[int]) -> str:
    """A shape for a user's eyes, `4x16`."""
    return "x".join(map(str, shape)) or "a scalar"


def _more(names: Sequence[str]) -> str:
    rest = names[1 : 1 + _NAMES_SHOWN]
    if not rest:
        return ""
    return f" (and so are {len(names) - 1} more: {', '.join(rest)}{', ...' * (len(names) > 4)})"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON, or is cut off ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return value

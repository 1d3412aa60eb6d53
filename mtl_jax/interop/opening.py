"""Which format a path is of, the `Source` that reads it, and parameters on devices from there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.interop.hf import HfSource
from mtl_jax.interop.native import NativeSource
from mtl_jax.interop.source import CONFIG, Source, TensorPath
from mtl_jax.interop.t5x import T5xSource, is_t5x

FORMATS = {
    "mtl_jax": "a run directory or one of its checkpoints, or a converted checkpoint",
    "hf": "a Hugging Face directory",
    "t5x": "a T5X checkpoint",
}


def detect(path: str | Path) -> str:
    """The format of a checkpoint: "mtl_jax", "hf" or "t5x".

    Raises:
      UserError: nothing is there, or nothing that can be read; says what was found.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        if (path / "checkpoints").is_dir() or path.name == "checkpoints" or _is_step(path):
            return "mtl_jax"
        if CONFIG in names:
            return "hf"
    else:
        names = [path.name]
    if is_t5x(path):
        return "t5x"
    if any(re.search(r"\.ckpt-\d+|\.ckpt\.index$", name) for name in names):
        raise UserError(
            f"{path} is a checkpoint of TensorFlow (Mesh TensorFlow's T5), which is not supported: "
            "convert it to T5X with T5X's own script, or take the model from Hugging Face."
        )
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if weights and path.is_dir():
        raise UserError(
            f"{path} holds {weights[0]}, but no {CONFIG}: a Hugging Face directory has both."
        )
    inside = [name for name in names if re.fullmatch(r"checkpoint_\d+", name)]
    if inside:
        raise UserError(
            f"{path} is a folder of T5X checkpoints: name one, such as {path / inside[-1]}."
        )
    found = f"a folder with {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}"
    raise UserError(
        f"{path} is no checkpoint that can be read: it is "
        f"{found if path.is_dir() else 'a file of another kind'}. What can be read is "
        f"{'; '.join(FORMATS.values())}."
    )


def _is_step(path: Path) -> bool:
    return bool(re.fullmatch(r"\d+", path.name)) and path.parent.name == "checkpoints"


def open_source(
    path: str | Path,
    step: int | None = None,
    t5x_options: Mapping[str, Any] | None = None,
    task: str | None = None,
) -> Source:
    """Opens a checkpoint of any format and checks all names, shapes and sizes; reads no tensor.

    Args:
      path: see `detect`.
      step: which checkpoint of a run; None: the newest, or the one that the path names.
      t5x_options: keyword arguments of `T5xSource`, used for such a checkpoint alone.
      task: of a run whose tasks have parameters of their own: whose; "*": the mean of all.

    Raises:
      UserError: no checkpoint, or a damaged or foreign one.
    """
    path = Path(path).expanduser()
    kind = detect(path)
    if kind == "mtl_jax":
        return NativeSource(path, step, task)
    if task is not None:
        raise UserError(f"{path} is {FORMATS[kind]}, which has no parameters of tasks.")
    if step is not None:
        raise UserError(f"{path} is {FORMATS[kind]}, which has no steps to choose from.")
    return HfSource(path) if kind == "hf" else T5xSource(path, **(t5x_options or {}))


def load_params(source: Source, abstract_params: Any) -> Any:
    """The parameters as arrays on devices; one tensor at a time is in the host's memory.

    Args:
      source: from `open_source`.
      abstract_params: tree of `model.init` as `jax.ShapeDtypeStruct`, with the shardings and dtypes
        wanted (without a sharding, an array goes to the default device).

    Returns:
      The tree of jax arrays.

    Raises:
      UserError: a tensor cannot be read.
    """

    def load(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        path: TensorPath = tuple(entry.key for entry in keys)
        host = np.empty(leaf.shape, leaf.dtype)
        if "layers" in path:
            for layer in range(leaf.shape[0]):
                host[layer] = source.read(path, layer)
        else:
            host[...] = source.read(path, None)
        return jax.device_put(host, leaf.sharding)

    return jax.tree_util.tree_map_with_path(load, abstract_params)

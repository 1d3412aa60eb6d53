"""Checkpoints as T5X writes them: one msgpack file of flax, or zarr directories beside it."""

from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import tensorstore

from mtl_jax import model
from mtl_jax.interop.source import by_path, tensors

_COLUMNS_ARE_HEADS = ("query", "key", "value")


def target(
    cfg: model.T5Config, params: model.Params, *, stacked: bool, heads_apart: bool = False
) -> dict[str, Any]:
    """The parameters as T5X has them.

    Args:
      cfg: the model.
      params: of `model.init`.
      stacked: layers along the second axis, instead of apart.
      heads_apart: kernels of attention with an axis for the heads, as in `scalable_t5`.
    """
    out: dict[str, Any] = {}
    heads = (cfg.num_heads, cfg.head_dim)

    def put(keys: tuple[str, ...], x: np.ndarray) -> None:
        node = out
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.ascontiguousarray(x)

    for path, x in by_path(params).items():
        lead = x.shape[: "layers" in path]
        if heads_apart and path[-2] in _COLUMNS_ARE_HEADS:
            x = x.reshape(*lead, cfg.emb_dim, *heads)
        elif heads_apart and path[-2] == "out":
            x = x.reshape(*lead, *heads, cfg.emb_dim)
        if "layers" not in path:
            put(path, x)
        elif stacked:
            put((path[0], path[0], *path[2:]), np.moveaxis(x, 0, 1))
        else:
            for n in range(x.shape[0]):
                put((path[0], f"layers_{n}", *path[2:]), x[n])
    return out


def write(
    folder: Path,
    target: dict[str, Any],
    states: dict[str, Any] | None = None,
    *,
    step: int = 7,
    zarr: bool = False,
    wrapped: bool = True,
) -> Path:
    """Writes a checkpoint; returns its folder, whose file `checkpoint` is one, too.

    Args:
      folder: a new one.
      target: tree of parameters.
      states: tree of the optimizer's state of each.
      step: updates done.
      zarr: arrays of two axes and more in directories of their own.
      wrapped: as newer versions of T5X.
    """
    folder.mkdir(parents=True)

    def leaf(path: Any, x: np.ndarray) -> Any:
        if not zarr or x.ndim < 2:
            return x
        name = ".".join(entry.key for entry in path)
        chunks = [max(1, size // 2) for size in x.shape]
        metadata = {
            "chunks": chunks, "compressor": {"id": "gzip", "level": 1}, "dtype": "<f4",
            "shape": list(x.shape),
        }  # fmt: skip
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder / name}"},
            "metadata": metadata,
        }
        tensorstore.open(spec, create=True).result().write(x).result()
        kvstore = {"driver": "gfile", "path": name}
        return {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}

    state = {"step": np.int32(step), "param_states": states or {}}
    tree = jax.tree_util.tree_map_with_path(leaf, {"target": target, "state": state})
    tree = {"version": 3, "optimizer": tree} if wrapped else {"version": 3, **tree}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves by name, `encoder/layers_0/mlp/wo/kernel`."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The tree of leaves by name."""
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def ours(cfg: model.T5Config, leaves: dict[str, np.ndarray]) -> model.Params:
    """The way back: our tree of arrays by the names of T5X, whichever layout they have."""
    made = {}
    for path, shape in tensors(cfg).items():
        name = "/".join(path)
        if "layers" not in path:
            whole = leaves[name]
        elif (stacked := name.replace("layers", path[0], 1)) in leaves:
            whole = np.moveaxis(leaves[stacked], 1, 0)
        else:
            names = (name.replace("layers", f"layers_{n}", 1) for n in range(shape[0]))
            whole = np.stack([leaves[one] for one in names])
        made[name] = whole.reshape(shape)
    return nested(made)

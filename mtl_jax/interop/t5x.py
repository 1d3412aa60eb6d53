"""T5X checkpoints: one msgpack file of flax, whose large arrays may be zarr directories beside it.

Read in place: the file is walked through once for the places of its arrays, and an array is read
when it is asked for. A T5X checkpoint has no configuration; what its tensors do not tell (the
maximum distance of position biases, the activation) is T5's unless the user says otherwise.

Layers are apart (`encoder/layers_0/...`) or stacked along the second axis of each tensor
(`encoder/encoder/...`, T5X's `scalable_t5`). Kernels of attention are matrices, or have an axis for
the heads and one for their dimensions (`scalable_t5`).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.interop import msgpack_file
from mtl_jax.interop.source import (
    Source,
    TensorPath,
    check_tensors,
    pieces,
    tensors,
    written,
)
from mtl_jax.interop.stored import read_tensorstore
from mtl_jax.model_config import T5Config

FILE = "checkpoint"  # the msgpack file of a directory
STACKS = ("encoder", "decoder")
OUT = "out"
ATTENTION = ("query", "key", "value", OUT)
MAX_DISTANCE = 128
_CACHE_BYTES = 1 << 28


def is_t5x(path: Path) -> bool:
    """Whether a file or directory looks like a T5X checkpoint."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        # TensorFlow's file of the same name is text.
        return msgpack_file.starts_with_map(opened.read(1))


class Zarr:
    """A tensor in a zarr directory."""

    def __init__(self, folder: Path, name: str, context: Any):
        """Opens it.

        Raises:
          UserError: it is missing or damaged.
        """
        import tensorstore

        self.name, self._folder = name, folder
        spec = {
            "driver": "zarr",
            # Whatever the checkpoint says (gfile, gcs): the arrays lie beside it.
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "recheck_cached_data": False,
            "fill_missing_data_reads": False,
        }
        if not folder.is_dir():
            raise UserError(f"{folder} is missing, where tensor {name} should be.")
        with self._damage():
            self._array = tensorstore.open(spec, read=True, context=context).result()
        self.shape = tuple(self._array.shape)

    def read(self) -> np.ndarray:
        """The whole array as float32."""
        with self._damage():
            return read_tensorstore(self._array)

    def along_second_axis(self, index: int) -> np.ndarray:
        """The slice `[:, index]` as float32."""
        with self._damage():
            return read_tensorstore(self._array[:, index])

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            shape = f" ({written(self.shape)})" if hasattr(self, "shape") else ""
            raise UserError(
                f"{self._folder}: tensor {self.name}{shape} cannot be read, its files are damaged "
                f"or missing ({str(error)[:200]})."
            ) from error


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of our tensors lies in a checkpoint of T5X.

    Attributes:
      shape: there; with the layers, if they are stacked.
      groups: for each axis of our tensor (of one layer) the axes there that it is made of.
      layers: the axis of the layers there; None: there is none.
    """

    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    layers: int | None


class T5xSource(Source):
    """A T5X checkpoint, its file or its directory."""

    def __init__(
        self,
        path: Path,
        relpos_max_distance: int | None = None,
        mlp_activations: Sequence[str] | None = None,
    ):
        """Finds all tensors and infers the model from their shapes.

        Args:
          path: the msgpack file or the directory that has it.
          relpos_max_distance: None: T5's, 128.
          mlp_activations: None: T5's, relu or gelu and linear.

        Raises:
          UserError: damaged or incomplete, or not a T5.
        """
        file = path / FILE if path.is_dir() else path
        tree = msgpack_file.read_tree(file)
        tree = tree.get("optimizer", tree)
        target = tree.get("target") if isinstance(tree, dict) else None
        if not isinstance(target, dict):
            raise UserError(f"{file} has no parameters: a T5X checkpoint has them at 'target'.")
        self.tree = tree
        self.tokenizer_folder = file.parent
        self.file = file
        self.tensors = self.opened(target)
        self.stacked = any(name.startswith("encoder/encoder/") for name in self.tensors)
        self.config = self._infer(relpos_max_distance, mlp_activations)
        wanted = {
            self.name(piece_path, layer): self.layout(piece_path).shape
            for piece_path, layer, _ in pieces(self.config)
        }
        found = {name: leaf.shape for name, leaf in self.tensors.items()}
        check_tensors(path, wanted, found, "the other tensors")
        state = tree.get("state")
        step: Any = state.get("step") if isinstance(state, dict) else None
        self.step = int(step.read() if hasattr(step, "read") else step or 0)
        layers = "stacked" if self.stacked else "apart"
        self.description = f"T5X checkpoint of step {self.step}, layers {layers}"

    def opened(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a part of the checkpoint by path; zarr directories are opened.

        Raises:
          UserError: something else is there, or a directory is missing or damaged.
        """
        found: dict[str, Any] = {}

        def walk(node: Any, keys: tuple[str, ...]) -> None:
            name = "/".join(keys)
            if isinstance(node, dict) and isinstance(node.get("kvstore"), dict):
                folder = Path(str(node["kvstore"].get("path", "")).rstrip("/")).name
                if folder in ("", ".."):
                    raise UserError(f"{self.file}: tensor {name} names no folder of its own.")
                found[name] = Zarr(self.file.parent / folder, name, self._context)
            elif isinstance(node, dict):
                for key, child in node.items():
                    walk(child, (*keys, key))
            elif hasattr(node, "along_second_axis"):
                found[name] = node
            else:
                raise UserError(f"{self.file}: tensor {name} is no array but {node!r:.80}.")

        walk(tree, ())
        return found

    @functools.cached_property
    def _context(self) -> Any:
        """One cache for all arrays: chunks hold many layers, which are read one by one."""
        import tensorstore

        return tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def name(self, path: TensorPath, layer: int | None) -> str:
        """T5X's name of one of our tensors."""
        inside = path[0] if self.stacked else f"layers_{layer}"
        return "/".join(inside if key == "layers" else key for key in path)

    def layout(self, path: TensorPath) -> Layout:
        """How one of our tensors lies in the file."""
        shape = self.layer_shape(path)
        parts: list[tuple[int, ...]] = [(size,) for size in shape]
        if self._heads_apart and path[-2] in ATTENTION:
            parts[0 if path[-2] == OUT else 1] = (self.config.num_heads, self.config.head_dim)
        sizes = [size for part in parts for size in part]
        axes = list(range(len(sizes)))
        layers = 1 if self.stacked and "layers" in path else None
        if layers is not None:
            sizes.insert(layers, tensors(self.config)[path][0])
            axes = [axis + (axis >= layers) for axis in axes]
        ends = np.cumsum([len(part) for part in parts])
        groups = (axes[end - len(part) : end] for end, part in zip(ends, parts, strict=True))
        return Layout(tuple(sizes), tuple(map(tuple, groups)), layers)

    def read(self, path: TensorPath, layer: int | None) -> np.ndarray:
        """See `Source.read`."""
        return self.read_as(path, layer, self.tensors[self.name(path, layer)])

    def read_as(self, path: TensorPath, layer: int | None, array: Any) -> np.ndarray:
        """Reads an array that lies as the tensor at `path` does; otherwise as `read`."""
        stacked = self.layout(path).layers is not None
        x = array.along_second_axis(layer) if stacked else array.read()
        return x.reshape(self.layer_shape(path))

    def layer_shape(self, path: TensorPath) -> tuple[int, ...]:
        """The shape of one of our tensors; of one layer, if it is in layers."""
        return tensors(self.config)[path]["layers" in path :]

    @functools.cached_property
    def _first(self) -> str:
        return "encoder/encoder" if self.stacked else "encoder/layers_0"

    @functools.cached_property
    def _heads_apart(self) -> bool:
        matrix = 2 + self.stacked
        query = self._shape(f"{self._first}/attention/query/kernel", matrix, matrix + 1)
        return len(query) > matrix

    def _layers(self, stack: str) -> int:
        if self.stacked:
            return self._shape(f"{stack}/{stack}/mlp/wo/kernel", 3)[1]
        names = {name.split("/")[1] for name in self.tensors if name.startswith(f"{stack}/layers_")}
        return len(names)

    def _shape(self, name: str, *axes: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise UserError(
                f"{self.file}: tensor {name} is missing. Only T5's encoder-decoders can be read."
            )
        shape = self.tensors[name].shape
        if len(shape) not in axes:
            raise UserError(
                f"{self.file}: tensor {name} is {written(shape)}, but must have "
                f"{' or '.join(map(str, axes))} axes."
            )
        return shape

    def _infer(self, max_distance: int | None, activations: Sequence[str] | None) -> T5Config:
        first = self._first
        own = f"{first}/relpos_bias/rel_embedding"
        per_layer = own in self.tensors
        bias = self._shape(
            own if per_layer else "encoder/relpos_bias/rel_embedding",
            3 if per_layer and self.stacked else 2,
        )
        vocab_size, emb_dim = self._shape("token_embedder/embedding", 2)
        out = self.tensors[f"{first}/attention/query/kernel"].shape[-1 - self._heads_apart :]
        joined = math.prod(out)
        gated = f"{first}/mlp/wi_0/kernel" in self.tensors
        if joined % bias[0]:
            raise UserError(
                f"{self.file}: tensor {first}/attention/query/kernel has {joined} columns, which "
                f"{bias[0]} heads (of relpos_bias/rel_embedding) cannot share."
            )
        self.notes = (
            "a T5X checkpoint does not say everything: T5.relpos_max_distance is taken as "
            f"{max_distance or MAX_DISTANCE}, T5.mlp_activations as "
            f"{', '.join(activations or (('gelu', 'linear') if gated else ('relu',)))}",
        )
        return T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=bias[0],
            head_dim=joined // bias[0],
            mlp_dim=self._shape(f"{first}/mlp/wo/kernel", 2 + self.stacked)[0],
            num_encoder_layers=self._layers("encoder"),
            num_decoder_layers=self._layers("decoder"),
            mlp_activations=activations or (("gelu", "linear") if gated else ("relu",)),
            logits_via_embedding="decoder/logits_dense/kernel" not in self.tensors,
            relpos_buckets=bias[-1],
            relpos_max_distance=MAX_DISTANCE if max_distance is None else max_distance,
            relpos_per_layer=per_layer,
        )

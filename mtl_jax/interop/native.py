"""Our own checkpoints, read and written a layer at a time.

`Checkpointer` reads what is written here, and the other way round; only the layout of the arrays on
disk differs, because Orbax itself would hold whole stacks of layers in memory.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mtl_jax import model, patterns, tokenizer
from mtl_jax.checkpoint import Checkpointer, locate
from mtl_jax.config_types import format_value
from mtl_jax.errors import UserError
from mtl_jax.interop.source import (
    Source,
    TensorPath,
    by_path,
    check_tensors,
    tensors,
    written,
)
from mtl_jax.interop.stored import blocks, read_tensorstore, rows_of_block
from mtl_jax.model_config import T5Config
from mtl_jax.sharing import tree
from mtl_jax.sharing.embeddings import prompt_ids
from mtl_jax.sharing.plan import SharingPlan, from_description
from mtl_jax.step import TrainState

GIN_FILE = "model.gin"
OPTIMIZER_GIN_FILE = "optimizer.gin"
# How a run computes, not what: these stay the user's choice.
_OF_A_RUN = ("dtype", "logits_dtype", "scan_layers", "attention", "remat")
# Chunks written by training hold many layers; kept, they are not decompressed for each layer.
_CACHE_BYTES = 1 << 28


class NativeSource(Source):
    """One step of a training run, or a converted checkpoint.

    Where tasks have parameters of their own, it is the plain T5 of one of them.
    """

    def __init__(self, path: Path, step: int | None = None, task: str | None = None):
        """Opens the step that `path` or `step` names, by default the newest.

        Args:
          path: a run directory, its checkpoints or one of them.
          step: which of them.
          task: where tasks have parameters of their own: whose; for a task that the model was not
            trained on its cluster, or "*" for the mean of all.

        Raises:
          UserError: no such checkpoint, its tensors are not those of its own description, or a task
            is missing, unknown, or without parameters of its own.
        """
        folder, named = locate(path)
        if step is not None and named is not None and step != named:
            raise UserError(f"{path} is the checkpoint of step {named}, not of step {step}.")
        with Checkpointer(folder, read_only=True) as checkpointer:
            chosen = named if step is None else step
            meta = checkpointer.meta(chosen)
            self.step = checkpointer.latest() or 0 if chosen is None else chosen
            self._folder = checkpointer.directory / str(self.step) / "state"
            self.config = _config(meta, self._folder.parent)
        self._shapes: Mapping[TensorPath, tuple[int, ...]] = tensors(self.config)
        self.prompt = tuple(meta.get("prompt", ()))
        self._share(meta, path, task)
        wanted = {"/".join(path): shape for path, shape in self._shapes.items()}
        found = {name: self._stored_shape(tuple(name.split("/"))) for name in wanted}
        check_tensors(self._folder.parent, wanted, found, "its own description")
        self.documents = dict(meta.get("source", {}).get("documents", {}))
        self.tokenizer_folder = folder.parent / tokenizer.FOLDER
        self.description = f"mtl_jax checkpoint of step {self.step}"
        self._arrays: dict[TensorPath, Any] = {}

    def _share(self, meta: dict[str, Any], path: Path, task: str | None) -> None:
        """Takes in how tasks share parameters, and whose are to be read."""
        self._plan: SharingPlan | None = None
        self._task = 0
        if "sharing" not in meta:
            if task is not None:
                raise UserError(
                    f"{path} has the same parameters for all tasks: leave out the task {task!r}."
                )
            return
        plan = self._plan = from_description(meta["sharing"], self.config)
        if task is None and plan.by_task:
            raise UserError(
                f"{path} has parameters of tasks: say whose are meant (--task, Infer.task, task=). "
                f"{plan.choices}"
            )
        self._task = 0 if task is None else plan.task_id(task)
        whole = jax.eval_shape(
            lambda rng: tree.init(plan, rng, model.init(plan.base, rng)), jax.random.key(0)
        )
        self._shapes = {keys: leaf.shape for keys, leaf in by_path(whole).items()}
        self.config = plan.model_config
        self.prompt = prompt_ids(plan)

    @functools.cached_property
    def _plain(self) -> Mapping[TensorPath, np.ndarray]:
        """The tensors of the task's plain T5; the whole model is in memory for this."""
        assert self._plan is not None
        leaves = {"/".join(path): jnp.asarray(self._stored(path, None)) for path in self._shapes}
        made = tree.plain(self._plan, patterns.as_tree(leaves), self._task)
        return by_path(jax.device_get(made))

    def read(self, path: TensorPath, layer: int | None) -> np.ndarray:
        """See `Source.read`."""
        if self._plan is None:
            return self._stored(path, layer)
        return self._plain[path] if layer is None else self._plain[path][layer]

    def _stored(self, path: TensorPath, layer: int | None) -> np.ndarray:
        try:
            array = self._array(path)
            return read_tensorstore(array if layer is None else array[layer])
        except ValueError as error:
            raise UserError(
                f"{self._folder}: tensor {'/'.join(path)} cannot be read, its files are damaged or "
                f"incomplete ({str(error)[:200]})."
            ) from error

    def _stored_shape(self, path: TensorPath) -> tuple[int, ...]:
        # One by one: Orbax asks for all at once, and after a failure the others complain, too.
        try:
            return tuple(self._opened(path, cache_bytes=0).shape)
        except ValueError as error:
            raise UserError(
                f"{self._folder}: tensor {'/'.join(path)} ({written(self._shapes[path])}) "
                f"cannot be opened, its files are damaged or missing ({str(error)[:200]})."
            ) from error

    def _array(self, path: TensorPath) -> Any:
        """The tensorstore of a tensor; errors are ValueErrors."""
        if path not in self._arrays:
            array = self._opened(path, cache_bytes=0)
            if "layers" in path and array.chunk_layout.read_chunk.shape[0] > 1:
                array = self._opened(path, _CACHE_BYTES)
            self._arrays = {path: array}  # the one before goes, and its cache
        return self._arrays[path]

    def _opened(self, path: TensorPath, cache_bytes: int) -> Any:
        import tensorstore

        name, folder = ".".join(("params", *path)), f"file://{self._folder}/"
        if (self._folder / "manifest.ocdbt").exists():
            place: Any = {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
        else:
            place = {"driver": "file", "path": f"{self._folder / name}/"}
        spec = {
            "driver": "zarr",
            "kvstore": place,
            "fill_missing_data_reads": False,
            "recheck_cached_data": False,
        }
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        return tensorstore.open(spec, read=True, context=context).result()


def sharing_of(path: Path) -> SharingPlan | None:
    """How tasks share parameters in the newest checkpoint of a run; None: all of them.

    Raises:
      UserError: no checkpoint, or a damaged one.
    """
    folder, step = locate(path)
    with Checkpointer(folder, read_only=True) as checkpointer:
        meta = checkpointer.meta(step)
    return from_description(meta["sharing"], _config(meta, folder)) if "sharing" in meta else None


def _config(meta: dict[str, Any], place: Path) -> T5Config:
    known = {field.name for field in dataclasses.fields(T5Config)}
    values = meta.get("model")
    if not isinstance(values, dict):
        raise UserError(f"{place} does not say what model it is of; it is no mtl_jax checkpoint.")
    if unknown := sorted(values.keys() - known):
        raise UserError(
            f"{place} has the model's fields {', '.join(unknown)}, which this version of mtl_jax "
            "does not know: use the version that wrote it."
        )
    return T5Config(**values)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tensor that is read while it is written; a leaf for Orbax.

    Attributes:
      shape: of the whole tensor.
      stacked: whether its first axis is that of the layers.
      read: gives a layer, or the whole tensor for None where it is not stacked.
      dtype: as written, as zarr names it.
    """

    shape: tuple[int, ...]
    stacked: bool
    read: Callable[[int | None], np.ndarray]
    dtype: str = "<f4"

    def layers(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields (index, array): one layer after the other, or the whole tensor."""
        if not self.stacked:
            yield (), self.read(None)
        else:
            for layer in range(self.shape[0]):
                yield (layer,), self.read(layer)


@dataclasses.dataclass(frozen=True)
class KeptOptimizer:
    """An optimizer's state that goes along with the parameters.

    Attributes:
      step: updates done.
      name: `Optimizer.name`.
      min_dim_size_to_factor: with which the optimizer has such a state.
      momentum: whether it is in the state.
      state: of the optax chain without what has no state, with `Streamed` leaves.
    """

    step: int
    name: str
    min_dim_size_to_factor: int
    momentum: bool
    state: Any

    @property
    def description(self) -> dict[str, Any]:
        """For the checkpoint's meta; a run that takes the state is compared with it."""
        names = ("name", "min_dim_size_to_factor", "momentum")
        return {name: getattr(self, name) for name in names}

    @property
    def gin_text(self) -> str:
        """What the state asks of the optimizer, as a Gin file."""
        lines = [
            "# For Run.restore_optimizer = 'keep'. A state does not show how steps were made: all",
            "# other fields of Optimizer must be as in the run that the checkpoint is from.",
            f"Optimizer.name = {self.name!r}",
            f"Optimizer.min_dim_size_to_factor = {self.min_dim_size_to_factor}",
        ]
        if self.momentum:
            lines.append("# There is momentum: Optimizer.momentum must be T5X's Adafactor.beta1.")
        return "\n".join([*lines, ""])


class _StreamHandler(ocp.type_handlers.TypeHandler):
    """Writes `Streamed` leaves as zarr arrays, in chunks of one layer at most."""

    def typestr(self) -> str:
        # Whoever restores finds a plain array.
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("written only")

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        raise NotImplementedError("written only")

    async def serialize(
        self, values: Sequence[Streamed], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            await _write_array(value, Path(info.parent_dir) / info.name)
        return []  # nothing is left to be waited for


async def _write_array(value: Streamed, folder: Path) -> None:
    import tensorstore

    lead = (1,) if value.stacked else ()
    layer_shape = value.shape[len(lead) :]
    block = (rows_of_block(layer_shape), *layer_shape[1:]) if layer_shape else ()
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": value.shape,
            "chunks": (*lead, *block),
            "dtype": value.dtype,
            "compressor": {"id": "zstd", "level": 1},
        },
        # A chunk of zeros is no missing chunk: readers take a missing one for damage.
        "store_data_equal_to_fill_value": True,
    }
    array = await tensorstore.open(spec, create=True)
    for index, x in value.layers():
        if x.ndim == 0:
            await array.write(x)
            continue
        for rows, part in blocks(x):
            await array[(*index, rows)].write(np.ascontiguousarray(part))


def write(source: Source, folder: Path, kept: KeptOptimizer | None = None) -> None:
    """Writes `checkpoints/` and `model.gin` to an empty directory, a layer at a time.

    Args:
      source: what to write.
      folder: where.
      kept: the optimizer's state, to be written, too, and `optimizer.gin` with what it needs; the
        checkpoint is then that of its step.

    Raises:
      UserError: the source cannot be read.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamHandler()))
    manager = ocp.CheckpointManager(
        (folder / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry),
            "data_state": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )
    params: dict[str, Any] = {}
    for path, shape in tensors(source.config).items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        read = functools.partial(source.read, path)
        node[path[-1]] = Streamed(shape, "layers" in path, read)
    meta: dict[str, Any] = {
        "model": dataclasses.asdict(source.config),
        "task_ids": {},
        "source": {"description": source.description, "documents": dict(source.documents)},
    }
    if source.prompt:
        meta["prompt"] = list(source.prompt)
    state: Any = {"params": params}
    if kept is not None:
        number: Any = whole_number(kept.step)
        state = TrainState(number, params, kept.state)
        meta["optimizer"] = kept.description
        (folder / OPTIMIZER_GIN_FILE).write_text(kept.gin_text, encoding="utf-8")
    with contextlib.closing(manager):
        manager.save(
            0 if kept is None else kept.step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data_state=ocp.args.JsonSave({}),
                meta=ocp.args.JsonSave(meta),
            ),
        )
    (folder / GIN_FILE).write_text(gin_text(source.config), encoding="utf-8")


def whole_number(value: int) -> Streamed:
    """An int32 scalar."""
    return Streamed((), False, lambda layer: np.asarray(value, np.int32), "<i4")


def gin_text(cfg: T5Config) -> str:
    """The model as a Gin file."""
    lines = [
        f"T5.{field.name} = {format_value(getattr(cfg, field.name))}\n"
        for field in dataclasses.fields(cfg)
        if field.name not in _OF_A_RUN
    ]
    return "# The model of this checkpoint; restore it with Run.restore_from.\n" + "".join(lines)

"""The mesh, the table of logical axis rules, and where every array of a run lives."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax import attention, host_memory
from mtl_jax.errors import UserError
from mtl_jax.model_config import T5Config

AXES = ("data", "fsdp", "tensor")
STACKED = ("tasks", "layers")  # leading logical axes that no optimizer factors

# Logical axis -> mesh axes, in order of priority: an array uses each mesh axis once, so an
# activation ("batch", "length", "embed") spends `fsdp` on its batch, a kernel on its embed axis.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("copies", "data"),  # the batch in two axes
    ("rows", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("embed", "fsdp"),
    ("kv", None),
    ("length", None),
    ("relpos_buckets", None),
    ("layers", None),
    ("tasks", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out.

    Attributes:
      data: copies of the model, each with its share of the rows; -1 takes the devices that the
        other axes leave.
      fsdp: shards of every parameter along its embedding axis; rows are split over them too.
      tensor: shards of heads, MLP and vocabulary.
      slices: parts of the machine that only a data-centre network joins. `data` is split over them
        first, so that only the gradients of whole copies cross that network. -1 takes what TPUs
        say of themselves, and one part elsewhere; for GPUs, it may be the number of machines.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = -1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            given = ", ".join(f"Mesh.{a} = {s}" for a, s in zip(AXES, sizes, strict=True))
            raise UserError(f"Mesh sizes are positive, and one of them may be -1; got {given}.")
        if self.slices == 0 or self.slices < -1:
            raise UserError(f"Mesh.slices is positive, or -1 to ask TPUs; got {self.slices}.")


def configure_jax() -> None:
    """Sets how JAX draws random numbers and runs a CPU's programs; the one place that does so."""
    # Numbers must not depend on how arrays are sharded.
    jax.config.update("jax_threefry_partitionable", True)
    # In the thread that calls, where it is one device: `host_memory` keeps what that one frees.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over the devices; on a CPU also `host_memory.keep`.

    Args:
      cfg: sizes.
      devices: all devices of all processes by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, do not fit a TPU's torus, or a
        copy of the model would lie across slices; names axis and sizes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % known or (not free and known != len(devices)):
        wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"The mesh {wanted} does not fit {len(devices)} devices: the sizes must multiply to "
            f"{len(devices)}; set one of Mesh.data, Mesh.fsdp, Mesh.tensor to -1 for the rest. "
            f"Sizes that divide {len(devices)}: {_divisors(len(devices))}."
        )
    if devices[0].platform == "cpu":
        host_memory.keep()
    for axis in free:
        sizes[axis] = len(devices) // known
    slices = _slices(cfg, devices)
    if sizes["data"] % len(slices):
        raise UserError(
            f"Mesh.data = {sizes['data']} cannot be split over {len(slices)} slices (Mesh.slices): "
            f"Mesh.fsdp x Mesh.tensor must divide the {len(slices[0])} devices of a slice; "
            f"products that would: {_divisors(len(slices[0]))}."
        )
    shape = (sizes["data"] // len(slices), sizes["fsdp"], sizes["tensor"])
    types = (AxisType.Auto,) * len(AXES)
    try:
        meshes = [jax.make_mesh(shape, AXES, axis_types=types, devices=part) for part in slices]
    except NotImplementedError as error:  # JAX lays each axis over whole axes of a TPU's torus
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"The mesh {wanted} cannot be laid over this torus of {devices[0].device_kind}: "
            "Mesh.data, Mesh.fsdp and Mesh.tensor must each be 1, the size of an axis of the "
            "torus, or a product of such sizes."
        ) from error
    if len(meshes) == 1:
        return meshes[0]
    # Within a slice as JAX finds it best for the torus; slices one after another.
    return Mesh(np.concatenate([mesh.devices for mesh in meshes]), AXES, axis_types=types)


def _slices(cfg: MeshConfig, devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each slice."""
    of_slice: dict[int, list[Any]] = {}
    for device in devices:
        # Other platforms number machines so, and a copy of the model may well lie across these.
        known = device.platform == "tpu" and getattr(device, "slice_index", None)
        of_slice.setdefault(known or 0, []).append(device)
    parts = [of_slice[index] for index in sorted(of_slice)]
    if cfg.slices == -1 or cfg.slices == len(parts):
        return parts
    if len(parts) > 1:
        raise UserError(f"Mesh.slices = {cfg.slices}, but the devices are of {len(parts)} slices.")
    if len(devices) % cfg.slices:
        raise UserError(
            f"Mesh.slices = {cfg.slices} does not divide {len(devices)} devices; sizes that would "
            f"work: {_divisors(len(devices))}."
        )
    # Devices that do not say: those of a process stand together.
    together = sorted(devices, key=lambda device: (device.process_index, device.id))
    size = len(devices) // cfg.slices
    return [together[start : start + size] for start in range(0, len(devices), size)]


def _divisors(number: int, limit: int = 4096) -> str:
    return ", ".join(str(n) for n in range(1, min(number, limit) + 1) if number % n == 0)


def validate(mesh: Mesh | AbstractMesh, model: T5Config, rows: int, microbatches: int = 1) -> None:
    """Checks before compiling that every sharded dimension divides.

    Raises:
      UserError: names the mesh axis, the dimension and the sizes that would work.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    replicas = mesh.shape["data"] * fsdp
    for field, axis, size in (
        ("emb_dim", "fsdp", fsdp),
        ("num_heads", "tensor", tensor),
        ("mlp_dim", "tensor", tensor),
        ("vocab_size", "tensor", tensor),
    ):
        dimension = getattr(model, field)
        if dimension % size:
            raise UserError(
                f"Mesh.{axis} = {size} does not divide T5.{field} = {dimension}; sizes that "
                f"would work: {_divisors(dimension, 256)}."
            )
    if rows % (replicas * microbatches):
        raise UserError(
            f"Data.batch_size = {rows} must be a multiple of {replicas * microbatches}: Mesh.data "
            f"{mesh.shape['data']} x Mesh.fsdp {fsdp} x Step.microbatches {microbatches}."
        )


def replicas(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split over the mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(axes: Sequence[str | None], rules: Sequence[Any] = RULES) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return nn.logical_to_mesh_axes(tuple(axes), rules)


def params_shardings(mesh: Mesh, axes: Any) -> Any:
    """Shardings of the parameters, from their tree of logical axis names."""
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), axes, is_leaf=is_axes)


def state_shardings(mesh: Mesh, axes: Any, state: Any) -> Any:
    """Shardings of a whole train state; the optimizer's arrays lie where their parameter lies.

    An optimizer's array belongs to the parameter whose path its own path ends with. Adafactor's
    factored moments lack one axis of it: `v_row` the larger of the two last-sorted axes, `v_col`
    the other, as in `optax.adafactor`; leading axes of `STACKED` are never factored.

    Args:
      mesh: the mesh.
      axes: tree of logical axis names of the parameters.
      state: abstract state (`jax.eval_shape`), with the fields of `step.TrainState`.
    """
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    names = {
        _keys(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
    }
    shapes = {
        _keys(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for start in range(len(keys)):
            if keys[start:] in names:
                own = _axes_of_state(leaf.shape, names[keys[start:]], shapes[keys[start:]], keys)
                return NamedSharding(mesh, spec(own))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(
        str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", ""))))
        for entry in path
    )


def _axes_of_state(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    param_shape: tuple[int, ...],
    keys: Sequence[str],
) -> tuple[str | None, ...]:
    if shape == param_shape:
        return axes
    stacked = sum(1 for _ in itertools.takewhile(lambda axis: axis in STACKED, axes))
    order = np.argsort(param_shape[stacked:])
    if len(order) >= 2 and ("v_row" in keys or "v_col" in keys):
        gone = stacked + int(order[-1] if "v_row" in keys else order[-2])
        if shape == param_shape[:gone] + param_shape[gone + 1 :]:
            return axes[:gone] + axes[gone + 1 :]
    return (None,) * len(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch [B, length] live."""
    return NamedSharding(mesh, spec(("batch", "length")))


def bytes_per_device(tree: Any) -> int:
    """Of arrays, or shapes, with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def readers(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process feeds, and how many parts there are.

    Processes whose devices hold the same rows (`tensor` reaches over several processes) are one
    reader: they read the same examples.

    Raises:
      UserError: the processes' rows overlap in part, so that none can read a part of its own.
    """
    rows: Any = batch_sharding(mesh).devices_indices_map((replicas(mesh), 1))
    of_process: dict[int, set[int]] = {}
    for device, (part, _) in rows.items():
        of_process.setdefault(device.process_index, set()).add(part.start or 0)
    parts = sorted({tuple(sorted(found)) for found in of_process.values()})
    even = sum(map(len, parts)) == replicas(mesh) and len({len(part) for part in parts}) == 1
    if not even or any(part[-1] - part[0] >= len(part) for part in parts):
        raise UserError(
            f"The mesh {dict(mesh.shape)} gives the {len(of_process)} processes rows that overlap "
            "in part: let Mesh.tensor be a divisor or a multiple of the devices of a process."
        )
    return parts.index(tuple(sorted(of_process[jax.process_index()]))), len(parts)


def put_batch(mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as global arrays [global rows, length] on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in arrays.items()
    }


def put_whole(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
    """An array that every process has whole, on the devices; each keeps its part of it."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Traces inside are for this mesh: activations get their place by the rule table."""
    platform = attention.platform(mesh.devices.flat[0].platform)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), platform:
        yield

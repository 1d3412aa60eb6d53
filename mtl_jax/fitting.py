"""Which values make a run smaller, by an estimate of the memory that each choice needs.

The estimate only orders the choices; whether one fits is for the compiler to say. What the compiler
said of one choice scales the estimate of the others.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh

from mtl_jax import sharding
from mtl_jax.errors import UserError

if TYPE_CHECKING:
    from mtl_jax.config import Config

# T5.remat -> time of a step beside that without, roughly: what is computed a second time.
_REMAT_COST = {"none": 1.0, "minimal": 1.1, "full": 4 / 3}
_MOST_MICROBATCHES = 64
_MOST_TENSOR = 8
# Gin's name of a room -> its name in `Config`.
_ROOMS = {"T5": "model", "Step": "step", "Mesh": "mesh", "Eval": "eval"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values to set instead of the run's.

    Attributes:
      values: name, such as "T5.remat" -> value; what stays is not among them.
      config: with these values.
      cost: time beside that of the run as it is, a rough guess that orders the choices.
      estimates: program -> bytes on one device.
    """

    values: dict[str, Any]
    config: "Config"
    cost: float
    estimates: dict[str, float]

    @property
    def flags(self) -> str:
        """The values as flags of a command line."""
        shown = {
            name: f"\"'{value}'\"" if isinstance(value, str) else str(value)
            for name, value in self.values.items()
        }
        return " ".join(f"--gin.{name}={value}" for name, value in shown.items())


def with_values(config: "Config", values: Mapping[str, Any]) -> "Config":
    """The configuration with other values, by their names in Gin."""
    for name, value in values.items():
        room, _, field = name.partition(".")
        old = getattr(config, _ROOMS[room])
        changed: dict[str, Any] = {_ROOMS[room]: dataclasses.replace(old, **{field: value})}
        config = dataclasses.replace(config, **changed)
    return config


def choices(
    config: "Config",
    sizes: Mapping[str, int],
    programs: list[str],
    param_bytes: float,
    other_bytes: float,
) -> list[Choice]:
    """Other values that could need less memory, those that should cost the least time first.

    Args:
      config: the run as it is.
      sizes: of its mesh, by axis.
      programs: that are to fit.
      param_bytes: of the whole model in float32.
      other_bytes: of the rest of the train state, whole.
    """
    remats = list(_REMAT_COST)[list(_REMAT_COST).index(config.model.remat) :]
    parts = list(_doubled(config.step.microbatches, _MOST_MICROBATCHES))
    evaluated = set(programs) & {"eval", "decode"}
    rows = list(_halved(config.eval.batch_size)) if evaluated else [config.eval.batch_size]
    found = []
    for mesh, remat, part, batch in itertools.product(
        _meshes(sizes),
        remats if "train" in programs else remats[:1],
        parts if "train" in programs else parts[:1],
        rows,
    ):
        values = {"T5.remat": remat, "Step.microbatches": part, "Eval.batch_size": batch}
        values |= {f"Mesh.{axis}": size for axis, size in mesh.items()}
        kept = {
            "T5.remat": config.model.remat,
            "Step.microbatches": config.step.microbatches,
            "Eval.batch_size": config.eval.batch_size,
            **{f"Mesh.{axis}": size for axis, size in sizes.items()},
        }
        values = {n: v for n, v in values.items() if v != kept[n]}
        if not values or not _divides(config, mesh, part, batch if evaluated else None):
            continue
        if any(name.startswith("Mesh.") for name in values):
            values |= {f"Mesh.{axis}": size for axis, size in mesh.items()}
        other = with_values(config, values)
        estimates = {
            name: estimate(other, mesh, name, param_bytes, other_bytes) for name in programs
        }
        cost = _cost(config, sizes, other, mesh)
        found.append(Choice(values, other, cost, estimates))
    return sorted(found, key=lambda choice: choice.cost)


def estimate(
    config: "Config",
    sizes: Mapping[str, int],
    program: str,
    param_bytes: float,
    other_bytes: float,
) -> float:
    """Bytes on one device that a program of `precompile_config.PROGRAMS` needs, roughly."""
    model = config.model
    item = 2 if model.dtype == "bfloat16" else 4
    shards, tensor = sizes["fsdp"] * sizes["tensor"], sizes["tensor"]
    replicas = sizes["data"] * sizes["fsdp"]
    wide = model.num_heads * model.head_dim
    state = (param_bytes + other_bytes) / shards
    layers = model.num_encoder_layers + model.num_decoder_layers
    gathered = 2 * param_bytes / 4 * item / tensor / layers
    kinds = {
        "full": model.emb_dim,
        "minimal": 3 * model.emb_dim + (4 * wide + 2 * model.mlp_dim) / tensor,
        "none": 8 * model.emb_dim + (6 * wide + 6 * model.mlp_dim) / tensor,
    }
    if program == "train":
        rows = config.data.batch_size / replicas / config.step.microbatches
        encoder, decoder = config.data.inputs_length, config.data.targets_length
        tokens = encoder * model.num_encoder_layers + decoder * model.num_decoder_layers
        kept = rows * tokens * kinds[model.remat] * item
        at_once = rows * max(encoder, decoder) * kinds["none"] * item
        logits = rows * decoder * model.vocab_size / tensor * 8
        sums = (2 if config.step.microbatches > 1 else 1) * param_bytes / shards
        return state + sums + gathered + kept + max(at_once, logits)
    rows = config.eval.batch_size / replicas
    at_once = rows * config.eval.inputs_length * kinds["none"] * item
    if program == "eval":
        logits = rows * config.eval.targets_length * model.vocab_size / tensor * 8
        return state + gathered + max(at_once, logits)
    length = config.eval.inputs_length + config.eval.max_decode_length
    cache = rows * length * model.num_decoder_layers * 2 * wide / tensor * item
    weights = param_bytes / 4 * item / shards
    return state + gathered + weights + 2 * cache + at_once


def _cost(config: "Config", sizes: Mapping[str, int], other: "Config", mesh: Any) -> float:
    def doublings(new: float, old: float) -> float:
        return abs(math.log2(new / old))

    cost = _REMAT_COST[other.model.remat] / _REMAT_COST[config.model.remat]
    # A microbatch gathers all parameters again; tensor parallelism sums activations in each layer.
    cost += 0.06 * doublings(other.step.microbatches, config.step.microbatches)
    cost += 0.05 * doublings(mesh["fsdp"], sizes["fsdp"])
    cost += 0.15 * doublings(mesh["tensor"], sizes["tensor"])
    return cost + 0.02 * doublings(other.eval.batch_size, config.eval.batch_size)


def _meshes(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Meshes of as many devices that divide the parameters into no fewer shards."""
    devices = math.prod(sizes.values())
    for tensor in _doubled(sizes["tensor"], max(_MOST_TENSOR, sizes["tensor"])):
        for fsdp in (n for n in range(1, devices + 1) if devices % (n * tensor) == 0):
            ratio = fsdp / sizes["fsdp"]
            if fsdp * tensor >= sizes["fsdp"] * sizes["tensor"] and math.log2(ratio).is_integer():
                yield {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def _divides(config: "Config", mesh: Mapping[str, int], parts: int, batch: int | None) -> bool:
    replicas = mesh["data"] * mesh["fsdp"]
    shape = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    try:
        sharding.validate(shape, config.model, config.data.batch_size, parts)
    except UserError:
        return False
    return batch is None or batch % replicas == 0


def _doubled(first: int, most: int) -> Iterator[int]:
    while first <= most:
        yield first
        first *= 2


def _halved(first: int) -> Iterator[int]:
    yield first
    while first % 2 == 0:
        first //= 2
        yield first

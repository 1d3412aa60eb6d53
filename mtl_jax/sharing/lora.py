"""Low-rank differences of kernels (LoRA), and inventories of them that tasks mix (Polytropon).

Letters: E entries, N layers, I in, R rank, O out, M inventory.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.sharing.bank import SHARED, Leaf, Leaves, key_of, pick, sharing_path
from mtl_jax.sharing.plan import SharingPlan


def _mixing_path(path: str) -> str:
    return sharing_path("task", "mixing", path.removesuffix("kernel") + "logits")


def leaves(plan: SharingPlan, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Adds A, B and, for an inventory, the logits of its mixtures.

    B starts at zero, so that all tasks start as the plain T5. A starts equal for all tasks or
    clusters, and different for the pairs of an inventory, which could not tell themselves apart.
    """
    made = dict(base)
    for path in plan.lora_paths:
        made |= _pair(plan, path)
        if plan.rooms.lora.owner == "inventory":
            made[_mixing_path(path)] = _logits(plan, path)
    return made


def _pair(plan: SharingPlan, path: str) -> dict[str, Leaf]:
    cfg, axes = plan.rooms.lora, plan.axes[path]
    bank: tuple[int, ...] = () if cfg.owner == SHARED else (plan.entries(cfg.owner),)
    distinct = bank if cfg.owner == "inventory" else ()

    def make_a(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        *layers, size, _ = plain[path].shape
        # As PEFT's: uniform with a variance of 1 / (3 in).
        shape, bound = (*distinct, *layers, size, cfg.rank), 1 / math.sqrt(size)
        value = jax.random.uniform(key_of(rng, path), shape, jnp.float32, -bound, bound)
        return jnp.broadcast_to(value, (*bank, *layers, size, cfg.rank))

    def make_b(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        *layers, _, size = plain[path].shape
        return jnp.zeros((*bank, *layers, cfg.rank, size), jnp.float32)

    lead = ("tasks",) * len(bank)
    return {
        sharing_path(cfg.owner, "lora_a", path): Leaf((*lead, *axes[:-1], None), make_a),
        sharing_path(cfg.owner, "lora_b", path): Leaf((*lead, *axes[:-2], None, axes[-1]), make_b),
    }


def _logits(plan: SharingPlan, path: str) -> Leaf:
    cfg, layers = plan.rooms.lora, plan.axes[path][:-2]

    def make(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        shape = (len(plan.names), *plain[path].shape[:-2], cfg.inventory)
        key = key_of(rng, _mixing_path(path))
        return jax.random.uniform(key, shape, jnp.float32, -1e-3, 1e-3)

    return Leaf(("tasks", *layers, None), make)


def apply(plan: SharingPlan, plain: Leaves, params: Leaves, task: jax.Array) -> Leaves:
    """The parameters of a plain T5, by path, with the task's differences added to its kernels."""
    cfg = plan.rooms.lora
    scale = (cfg.alpha or cfg.rank) / cfg.rank
    factors = {path: _factors(plan, params, path) for path in plan.lora_paths}
    if cfg.owner in ("task", "cluster"):
        factors = pick(factors, plan.index(cfg.owner, task))
    changed = dict(plain)
    for path, (a, b) in factors.items():
        if cfg.owner == "inventory":
            weights = mixture(plan, params, path, task)
            a, b = _mixed(weights, a), _mixed(weights, b)
        # In full precision: what is exported must be what was trained, on whatever device.
        changed[path] = plain[path] + scale * jnp.matmul(a, b, precision="highest")
    return changed


def _factors(plan: SharingPlan, params: Leaves, path: str) -> Any:
    owner = plan.rooms.lora.owner
    return tuple(params[sharing_path(owner, name, path)] for name in ("lora_a", "lora_b"))


def mixture(plan: SharingPlan, params: Leaves, path: str, task: jax.Array) -> jax.Array:
    """A task's weights of the inventory, [M] or [N, M]: sigmoid(logits) / sum.

    Ponti et al. 2023, section 3.2, without the noise of its training. An unknown task takes the
    mean.
    """
    index = plan.index("task", task)
    chosen = jax.nn.sigmoid(pick(params[_mixing_path(path)], index))
    chosen = jnp.where(index < 0, jnp.ones_like(chosen), chosen)
    return chosen / jnp.sum(chosen, axis=-1, keepdims=True)


def _mixed(weights: jax.Array, factor: jax.Array) -> jax.Array:
    """[N, M] and [M, N, i, o] -> [N, i, o]; factors are mixed, not their products, as published."""
    layered = "nm,mnio->nio" if weights.ndim == 2 else "m,mio->io"
    return jnp.einsum(layered, weights, factor, precision="highest")

"""The tree of parameters of a sharing plan, and the plain T5 of a task in it.

Letters: N tasks, E entries of a bank.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import model, patterns
from mtl_jax.layers import fan_in
from mtl_jax.sharing import adversary, copies, embeddings, experts, lora
from mtl_jax.sharing.bank import Leaf, Make, base_leaf, key_of, owner_of
from mtl_jax.sharing.plan import SharingPlan, is_adapter

Params = model.Params
# In the order in which they change the parameters of the plain T5.
_STRUCTURES = (copies, experts, lora, embeddings, adversary)


def _leaves(plan: SharingPlan) -> dict[str, Leaf]:
    leaves: dict[str, Leaf] = {}
    for path, names in plan.axes.items():
        fresh = plan.rooms.adapter.dim and is_adapter(path)
        leaves[path] = Leaf(names, _adapter_maker(plan, path)) if fresh else base_leaf(path, names)
    for structure in _STRUCTURES:
        leaves = structure.leaves(plan, leaves)
    return leaves


def _adapter_maker(plan: SharingPlan, path: str) -> Make:
    """As `layers.Adapter` starts, for all layers of a stack."""
    stack, cfg = path.split("/")[0], plan.model_config
    layers = getattr(cfg, f"num_{stack}_layers")

    def make(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        if path.endswith("/up/kernel"):
            return jnp.zeros((layers, cfg.adapter_dim, cfg.emb_dim), jnp.float32)
        one = functools.partial(fan_in, shape=(cfg.emb_dim, cfg.adapter_dim), dtype=jnp.float32)
        return jax.vmap(lambda key: one(key))(jax.random.split(key_of(rng, path), layers))

    return make


def init(plan: SharingPlan, rng: jax.Array, plain_params: Params) -> Params:
    """The tree that is trained, started from a plain T5; pure, so that it can be traced.

    Args:
      plan: how tasks share parameters.
      rng: a PRNG key.
      plain_params: tree of `model.init(plan.base, ...)`, or of a checkpoint; copies of it start
        equal, and differences at zero, so that every task starts as this model.

    Returns:
      The tree of the plain T5 without what tasks own, and "sharing"; `plain_params` itself for the
      empty plan.
    """
    if plan.empty:
        return plain_params
    plain = patterns.by_path(plain_params)
    return patterns.as_tree({x: leaf.make(rng, plain) for x, leaf in _leaves(plan).items()})


def axes(plan: SharingPlan) -> Any:
    """The tree of `init` with a tuple of logical axis names at each leaf.

    The leading axis of every bank is "tasks".
    """
    return patterns.as_tree({path: leaf.axes for path, leaf in _leaves(plan).items()})


def plain(plan: SharingPlan, params: Params, task: jax.Array | int) -> Params:
    """The parameters of the plain T5 of a task, for `plan.model_config`.

    Args:
      plan: how tasks share parameters.
      params: tree of `init`.
      task: int32 scalar, traced or not: the task's id, 0 for one that is not known.
    """
    if plan.empty:
        return params
    leaves, task = patterns.by_path(params), jnp.asarray(task, jnp.int32)
    made = copies.assemble(plan, leaves, task)
    if plan.rooms.experts.number:
        made = experts.apply(plan, made, leaves, task)
    if plan.rooms.lora.rank:
        made = lora.apply(plan, made, leaves, task)
    if plan.rooms.sharing.task_embedding or plan.rooms.prompt.length:
        made = embeddings.apply(plan, made, leaves, task)
    return patterns.as_tree(made)


def penalty(plan: SharingPlan, params: Params, present_N: jax.Array) -> jax.Array:
    """What the structures add to the loss of a global batch, float32 scalar.

    Args:
      plan: how tasks share parameters.
      params: tree of `init`.
      present_N: bool, the tasks in the batch; those of others get no gradient.
    """
    leaves, total = patterns.by_path(params), jnp.float32(0.0)
    if plan.rooms.sharing.soft_penalty:
        total = total + copies.penalty(plan, leaves, present_N)
    if plan.rooms.experts.balance_weight:
        total = total + experts.balance(plan, leaves, present_N)
    return total


def keep_absent(plan: SharingPlan, old: Any, new: Any, present_N: jax.Array) -> Any:
    """`new`, but the entries of tasks that are not in the batch stay bit by bit as in `old`.

    A zero gradient is not enough: momentum and weight decay would move them. The optimizer's count
    of steps is that of the whole tree: AdamW takes the first steps of a task that comes late for
    later ones and makes them up to (1 - beta1) / sqrt(1 - beta2), about 3, times as long.

    Args:
      plan: how tasks share parameters.
      old: parameters, or an optimizer's state of them, before the update.
      new: after it.
      present_N: bool, the tasks in the batch.
    """
    if plan.empty:
        return new

    def keep(path: Any, before: Any, after: Any) -> Any:
        keys = tuple(str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path)
        owner = owner_of(keys)
        present_E = None if owner is None else plan.present(owner, present_N)
        # Adafactor has an array of one zero where a moment does not apply.
        if owner is None or present_E is None or after.shape[:1] != (plan.entries(owner),):
            return after
        return jnp.where(present_E.reshape(-1, *(1,) * (after.ndim - 1)), after, before)

    return jax.tree_util.tree_map_with_path(keep, old, new)


def report(plan: SharingPlan, params: Any) -> str:
    """Counts of the parameters, shared and owned, as lines of text.

    Args:
      plan: how tasks share parameters.
      params: tree of `init`, or of its shapes.
    """
    counts: dict[str, int] = {}
    for path, leaf in patterns.by_path(params).items():
        keys = path.split("/")
        kind = keys[1] if keys[0] == "sharing" else "shared"
        counts[kind] = counts.get(kind, 0) + math.prod(leaf.shape)
    titles = {
        "shared": "shared by all tasks",
        "experts": f"{plan.rooms.experts.number} experts",
        "inventory": f"inventory of {plan.rooms.lora.inventory}",
        "cluster": f"{len(plan.cluster_names)} clusters",
        "task": f"{len(plan.names)} tasks",
        "adversary": "adversary (training only)",
    }
    lines = []
    for kind, title in titles.items():
        if kind in counts:
            each = ""
            if kind in ("experts", "inventory", "cluster", "task"):
                each = f", {counts[kind] // plan.entries(kind):,} each"
            lines.append(f"{title}: {counts[kind]:,} parameters{each}")
    lines.append(f"all: {sum(counts.values()):,} parameters")
    return "\n".join(lines)

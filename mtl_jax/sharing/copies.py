"""Layers and parameters that each task or cluster has of its own; soft sharing.

What is owned is no longer in the backbone: of a stacked parameter [layers, ...] the backbone keeps
the layers that nobody owns, in their order, and a bank [E, layers of the range, ...] the others.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import patterns
from mtl_jax.sharing.bank import Leaf, Leaves, copied, pick, sharing_path
from mtl_jax.sharing.plan import SharingPlan, is_adapter


def _name(first: int | None, end: int | None) -> str:
    return "copies" if first is None else f"layers_{first}_to_{end}"


def leaves(plan: SharingPlan, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of the tree, of those of the plain T5: what is owned has moved to banks."""
    made = dict(base)
    for path, pieces in plan.owned.items():
        leaf = made.pop(path)
        for first, end, owner in pieces:
            bank = copied(plan.entries(owner), _layers(leaf, np.s_[first:end]))
            made[sharing_path(owner, _name(first, end), path)] = bank
        rest = _shared_layers(plan, path)
        if len(rest):
            made[path] = _layers(leaf, rest)
    return made


def _layers(leaf: Leaf, which: slice | np.ndarray) -> Leaf:
    whole = isinstance(which, slice) and which == slice(None)
    if whole:
        return leaf
    return Leaf(leaf.axes, lambda rng, plain: leaf.make(rng, plain)[which])


def _shared_layers(plan: SharingPlan, path: str) -> np.ndarray:
    """The layers of an owned parameter that nobody owns."""
    if plan.owned[path][0][0] is None:
        return np.arange(0)
    stack = path.split("/")[0]
    number = getattr(plan.base, f"num_{stack}_layers")
    layers = np.arange(number)
    return np.setdiff1d(layers, [n for f, e, _ in plan.owned[path] for n in layers[f:e]])


def assemble(plan: SharingPlan, params: Leaves, task: jax.Array) -> Leaves:
    """The parameters of the plain T5 for a task, by path.

    Args:
      plan: who owns what.
      params: the whole tree by path.
      task: int32 scalar, the task's id.
    """
    plain = {path: leaf for path, leaf in params.items() if not path.startswith("sharing/")}
    banks: dict[str, Leaves] = {"task": {}, "cluster": {}}
    for path, pieces in plan.owned.items():
        for first, end, owner in pieces:
            name = sharing_path(owner, _name(first, end), path)
            banks[owner][name] = params[name]
    # One choice for all banks of an owner.
    mine: Leaves = {}
    for owner, bank in banks.items():
        if bank:
            mine |= pick(bank, plan.index(owner, task))
    for path, pieces in plan.owned.items():
        parts = [mine[sharing_path(owner, _name(f, e), path)] for f, e, owner in pieces]
        plain[path] = _join(plan, path, plain.get(path), parts)
    return plain


def _join(
    plan: SharingPlan, path: str, rest: jax.Array | None, parts: list[jax.Array]
) -> jax.Array:
    """All layers in their order, of the backbone's and those that are owned."""
    pieces = plan.owned[path]
    if pieces[0][0] is None:
        return parts[0]
    layers = _shared_layers(plan, path)
    joined, done = [], 0
    for (first, _, _), part in zip(pieces, parts, strict=True):
        before = int(np.sum(layers < first))
        if before > done and rest is not None:
            joined.append(rest[done:before])
        joined.append(part)
        done = before
    if rest is not None and done < len(layers):
        joined.append(rest[done:])
    return jnp.concatenate(joined) if len(joined) > 1 else joined[0]


def _drawn(plan: SharingPlan) -> Iterator[tuple[str, str]]:
    """Owner and path of the banks that the soft penalty is of."""
    for path, pieces in plan.owned.items():
        of_adapter = plan.rooms.adapter.dim and is_adapter(path)
        if patterns.matches(plan.rooms.sharing.soft_pattern, path) and not of_adapter:
            for first, end, owner in pieces:
                yield owner, sharing_path(owner, _name(first, end), path)


def penalty(plan: SharingPlan, params: Leaves, present_N: jax.Array) -> jax.Array:
    """Soft sharing: `lambda/2 sum_t |theta_t - mean theta|^2` (Duong et al. 2015).

    The gradient of a copy is `lambda (theta_t - mean theta)`; the copies of tasks that are not in
    the batch get none.
    """
    total = jnp.float32(0.0)
    for owner, name in _drawn(plan):
        bank = params[name]
        present = plan.present(owner, present_N)
        assert present is not None
        present = present.reshape(-1, *(1,) * (bank.ndim - 1))
        bank = jnp.where(present, bank, jax.lax.stop_gradient(bank))
        total = total + jnp.sum(jnp.square(bank - jnp.mean(bank, axis=0, keepdims=True)))
    return 0.5 * plan.rooms.sharing.soft_penalty * total

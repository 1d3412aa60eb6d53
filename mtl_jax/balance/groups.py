"""Groups of parameters: Gramians of the tasks' gradients by group, and weights put back on them.

Gradients of single tasks come as `slots`: the tree of the parameters with a leading axis of tasks.

Letters: N tasks, K groups, L layers of a stack.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import patterns
from mtl_jax.model_config import T5Config
from mtl_jax.optim import STACKED

Tree = Any


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which group every parameter belongs to.

    Attributes:
      kind: a name of `balance_config.GROUPS`.
      names: of the K groups.
      layers: number of encoder and of decoder layers.
    """

    kind: str
    names: tuple[str, ...]
    layers: tuple[int, int]

    @property
    def size(self) -> int:
        """K."""
        return len(self.names)

    def place(self, path: str) -> int | range | None:
        """The group of a parameter, those of its layers, or None: no part of any Gramian."""
        if self.kind == "enc_dec" and path.startswith("sharing/"):
            # What tasks own of a stack is part of it: sharing/OWNER/STRUCTURE/path.
            path = path.split("/", 3)[-1]
        stack, _, rest = path.partition("/")
        layered = stack in STACKED and rest.startswith("layers/")
        if self.kind == "layer":
            if not layered:
                return self.size - 1
            first = 0 if stack == "encoder" else self.layers[0]
            return range(first, first + self.layers[STACKED.index(stack)])
        if self.kind == "enc_dec":
            return STACKED.index(stack) if stack in STACKED else 2
        if self.kind == "last_shared" and not (layered and stack == "decoder"):
            return None
        return 0


def make_grouping(kind: str, cfg: T5Config) -> Grouping:
    """The grouping of a model's parameters."""
    counts = cfg.num_encoder_layers, cfg.num_decoder_layers
    if kind == "layer":
        of_stacks = zip(STACKED, counts, strict=True)
        names = (*(f"{stack} {i}" for stack, count in of_stacks for i in range(count)), "rest")
    else:
        names = {
            "whole_model": ("whole model",),
            "enc_dec": ("encoder", "decoder", "rest"),
            "last_shared": ("last decoder layer",),
        }[kind]
    return Grouping(kind, names, counts)


def inner_products(grouping: Grouping, slots: Tree) -> jax.Array:
    """Float32 [K, N, N]: the Gramian of each group's slots."""

    def product(x: jax.Array, layered: bool) -> jax.Array:
        x = x.astype(jnp.float32)
        if layered:
            x = jnp.moveaxis(x, 1, 0)
        # Over all axes but the tasks' at once, without a reshape: the axes may be sharded.
        inner = tuple(range(1 + layered, x.ndim))
        batch = ((0,), (0,)) if layered else ((), ())
        return jax.lax.dot_general(x, x, ((inner, inner), batch), precision="highest")

    return _by_group(grouping, slots, product)


def squared_norms(grouping: Grouping, grads: Tree) -> jax.Array:
    """Float32 [K]: the squared norm of each group's part of one gradient."""

    def square(x: jax.Array, layered: bool) -> jax.Array:
        return jnp.sum(jnp.square(x.astype(jnp.float32)), tuple(range(int(layered), x.ndim)))

    return _by_group(grouping, grads, square, tasks=0)


def _by_group(
    grouping: Grouping,
    tree: Tree,
    measure: Callable[[jax.Array, bool], jax.Array],
    tasks: int = 1,
) -> jax.Array:
    """Sums `measure(leaf, by layer)` into groups; `tasks`: leading axes before the layers'."""
    parts: list[list[jax.Array]] = [[] for _ in grouping.names]
    for path, leaf in patterns.by_path(tree).items():
        where = grouping.place(path)
        if where is None:
            continue
        if grouping.kind == "last_shared":
            leaf = leaf[(slice(None),) * tasks + (-1,)]
        if isinstance(where, int):
            parts[where].append(measure(leaf, False))
            continue
        measured = measure(leaf, True)
        for layer, group in enumerate(where):
            parts[group].append(measured[layer])
    # A group may have no trained parameter: nothing is seen in it.
    found = next(part[0] for part in parts if part)
    return jnp.stack([sum(part, start=jnp.zeros_like(found)) for part in parts])


def combine(grouping: Grouping, slots: Tree, weights_KN: jax.Array) -> Tree:
    """The gradients, each task's times its weight in the parameter's group, summed over tasks."""

    def one(where: int | range, leaf: jax.Array) -> jax.Array:
        weights = weights_KN[where if isinstance(where, int) else slice(where.start, where.stop)]
        if isinstance(where, int):
            return jnp.einsum("n,n...->...", weights, leaf)
        return jnp.einsum("ln,nl...->l...", weights, leaf)

    return _mapped(grouping, slots, one)


def scale(grouping: Grouping, grads: Tree, weights_K: jax.Array) -> Tree:
    """One gradient, each parameter's part times the weight of its group."""

    def one(where: int | range, leaf: jax.Array) -> jax.Array:
        if isinstance(where, int):
            return weights_K[where] * leaf
        of_layers = weights_K[where.start : where.stop]
        return of_layers.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf

    return _mapped(grouping, grads, one)


def _mapped(grouping: Grouping, tree: Tree, one: Callable[[Any, jax.Array], jax.Array]) -> Tree:
    def place(path: str) -> int | range:
        where = grouping.place(path)
        return 0 if where is None else where

    return patterns.as_tree({p: one(place(p), leaf) for p, leaf in patterns.by_path(tree).items()})

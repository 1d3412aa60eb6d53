"""Parameters with an entry for each task or cluster, and the leaves that a plan adds.

Letters: E entries, N tasks.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.optim import BANKS

SHARED = "shared"  # beside the banks: what all tasks have in common

Leaves = dict[str, jax.Array]  # by path
Make = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of the tree that sharing makes.

    Attributes:
      axes: logical axis names.
      make: (PRNG key, parameters of the plain T5 by path) -> its initial value.
    """

    axes: tuple[str | None, ...]
    make: Make


def base_leaf(path: str, axes: tuple[str | None, ...]) -> Leaf:
    """A parameter of the plain T5 as it is."""
    return Leaf(axes, lambda rng, plain: plain[path])


def sharing_path(owner: str, structure: str, path: str) -> str:
    """Where a leaf of `owner` (a bank, or `SHARED`) lives."""
    return f"sharing/{owner}/{structure}/{path}"


def owner_of(keys: tuple[str, ...]) -> str | None:
    """The bank that a leaf belongs to, by its path; also of an optimizer's state of it."""
    if "sharing" not in keys:
        return None
    owner = keys[keys.index("sharing") + 1]
    return owner if owner in BANKS else None


def copied(entries: int, leaf: Leaf) -> Leaf:
    """A bank whose entries all start as `leaf` does."""

    def make(rng: jax.Array, plain: Mapping[str, jax.Array]) -> jax.Array:
        value = leaf.make(rng, plain)
        return jnp.broadcast_to(value, (entries, *value.shape))

    return Leaf(("tasks", *leaf.axes), make)


def pick(bank: Any, index: jax.Array) -> Any:
    """The entry of each bank of a tree; the mean of all entries where `index` is -1.

    Args:
      bank: tree of [E, ...].
      index: int32 scalar, traced or not.
    """

    def entry(bank: Any) -> Any:
        place = jnp.maximum(index, 0)
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=place, axis=0, keepdims=False)
        return jax.tree.map(take, bank)

    def mean(bank: Any) -> Any:
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), bank)

    return jax.lax.cond(index < 0, mean, entry, bank)


def key_of(rng: jax.Array, path: str) -> jax.Array:
    """A PRNG key for a leaf, which other leaves do not move."""
    return jax.random.fold_in(rng, np.uint32(zlib.crc32(path.encode())))

"""Gradients of single tasks, three ways, and what is seen in them.

In text-to-text learning an example belongs to one task, so that microbatches of one task each give
the gradients of all tasks for about one backward pass: gradient accumulation with N accumulators.

Letters: N tasks, K groups of parameters, S numbers of a sketch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mtl_jax import patterns
from mtl_jax.balance import groups
from mtl_jax.balance.groups import Grouping

Tree = Any
TASK_IDS = "decoder_balance_ids"  # of a batch: which task's gradient a target token is part of
# (rows of a microbatch, its number, float32 [N + 1] weight of each task's tokens, 0 is padding)
#   -> (gradients of the weighted sum of token losses, sums)
Part = Callable[[Any, jax.Array, jax.Array], tuple[Tree, Any]]


@flax.struct.dataclass
class TaskGradients:
    """What one batch tells of its tasks' gradients.

    Attributes:
      gram: float32 [K, N, N], inner products of the gradients of the tasks' mean losses.
      split_half: float32 [K, N], the cosine of two halves of a task's own microbatches, as expected
        from all of them; NaN where there are fewer than two.
      slots: the sums of gradients with a leading axis of tasks; None from a sketch.
    """

    gram: jax.Array
    split_half: jax.Array
    slots: Tree


def task_of(rows: Mapping[str, jax.Array]) -> jax.Array:
    """The task id, int32 scalar, of rows that hold one task; 0 where all is padding."""
    return jnp.max(rows[TASK_IDS])


def _is_real(rows: Mapping[str, jax.Array]) -> jax.Array:
    """1.0, or 0.0 where all is padding."""
    return (task_of(rows) > 0).astype(jnp.float32)


def one_task_each(blocks: Mapping[str, jax.Array]) -> jax.Array:
    """Whether no microbatch [M, rows, T] of a batch holds a second task."""
    ids_MRT = blocks[TASK_IDS]
    highest_M11 = jnp.max(ids_MRT, axis=(1, 2), keepdims=True)
    return jnp.all((ids_MRT == 0) | (ids_MRT == highest_M11))


def by_microbatch(
    grouping: Grouping,
    axes: Mapping[str, tuple[str | None, ...]] | None,
    part: Part,
    params: Tree,
    blocks: Any,
    tokens_N: jax.Array,
) -> tuple[TaskGradients, Any]:
    """Exact gradients from microbatches of one task each.

    Args:
      grouping: of the parameters.
      axes: logical axes of the parameters by path, for the slots to lie as these do; None: one
        device.
      part: gradients of one microbatch.
      params: what is differentiated.
      blocks: a batch, each array [M, rows, ...]; a microbatch holds one task.
      tokens_N: target tokens of each task in the batch.

    Returns:
      (the gradients, the sums of all parts).
    """
    count, tasks = tokens_N.shape[0], tokens_N.shape[0] + 1
    unit = jnp.ones(tasks, jnp.float32)

    def body(carry: Any, numbered: Any) -> tuple[Any, None]:
        slots, squares_KN, parts_N, sums = carry
        index, rows = numbered
        grads, more = part(rows, index, unit)
        # Padding alone has gradient 0, wherever it is added.
        task = jnp.maximum(task_of(rows), 1) - 1
        slots = jax.tree.map(lambda slot, grad: slot.at[task].add(grad), slots, grads)
        squares_KN = squares_KN.at[:, task].add(groups.squared_norms(grouping, grads))
        return (slots, squares_KN, parts_N.at[task].add(_is_real(rows)), _added(sums, more)), None

    start = (
        _zero_slots(axes, params, count),
        jnp.zeros((grouping.size, count), jnp.float32),
        jnp.zeros(count, jnp.float32),
        _zeros(part, blocks, unit),
    )
    (slots, squares_KN, parts_N, sums), _ = jax.lax.scan(body, start, _numbered(blocks))
    sums_gram = groups.inner_products(grouping, slots)
    halves_KN = _split_half_cosine(jnp.diagonal(sums_gram, axis1=1, axis2=2), squares_KN, parts_N)
    return TaskGradients(_of_means(sums_gram, tokens_N), halves_KN, slots), sums


def by_vmap(
    grouping: Grouping,
    axes: Mapping[str, tuple[str | None, ...]] | None,
    part: Part,
    params: Tree,
    blocks: Any,
    tokens_N: jax.Array,
) -> tuple[TaskGradients, Any]:
    """Exact gradients of any rows: the backward pass is done for every task; see `by_microbatch`.

    Rows may mix tasks. The forward pass is shared, its activations are kept once, their gradients
    N times.
    """
    count = tokens_N.shape[0]
    one_hot = jnp.eye(count, count + 1, k=1, dtype=jnp.float32)

    def body(carry: Any, numbered: Any) -> tuple[Any, None]:
        slots, sums = carry
        index, rows = numbered
        grads, more = jax.vmap(lambda weights: part(rows, index, weights))(one_hot)
        # The sums do not depend on the weights: those of any task are those of all.
        more = jax.tree.map(lambda x: x[0], more)
        return (jax.tree.map(jnp.add, slots, grads), _added(sums, more)), None

    start = _zero_slots(axes, params, count), _zeros(part, blocks, one_hot[0])
    (slots, sums), _ = jax.lax.scan(body, start, _numbered(blocks))
    gram = _of_means(groups.inner_products(grouping, slots), tokens_N)
    unknown_KN = jnp.full((grouping.size, count), jnp.nan, jnp.float32)
    return TaskGradients(gram, unknown_KN, slots), sums


def by_sketch(
    grouping: Grouping,
    size: int,
    seed: jax.Array,
    part: Part,
    params: Tree,
    blocks: Any,
    tokens_N: jax.Array,
) -> tuple[TaskGradients, Any]:
    """Estimated Gramians without a slot for each task; the gradients take a second pass.

    CountSketch (Charikar, Chen and Farach-Colton 2002): entry i of a gradient is added with a
    random sign to one of S numbers. Inner products of sketches are unbiased estimates of those of
    the gradients, with an error of about the product of the norms over sqrt(S): good for weights
    that vary smoothly with the Gramian, not for signs of cosines near zero.

    Args:
      grouping: of the parameters.
      size: S, for each group.
      seed: uint32 scalar, of the signs and places.
      part: see `by_microbatch`.
      params: see `by_microbatch`.
      blocks: see `by_microbatch`.
      tokens_N: see `by_microbatch`.
    """
    count = tokens_N.shape[0]
    unit = jnp.ones(count + 1, jnp.float32)

    def body(carry: Any, numbered: Any) -> tuple[Any, None]:
        sketches_KNS, squares_KN, parts_N, sums = carry
        index, rows = numbered
        grads, more = part(rows, index, unit)
        task = jnp.maximum(task_of(rows), 1) - 1
        sketches_KNS = sketches_KNS.at[:, task].add(_sketch(grouping, size, grads, seed))
        squares_KN = squares_KN.at[:, task].add(groups.squared_norms(grouping, grads))
        carry = sketches_KNS, squares_KN, parts_N.at[task].add(_is_real(rows)), _added(sums, more)
        return carry, None

    start = (
        jnp.zeros((grouping.size, count, size), jnp.float32),
        jnp.zeros((grouping.size, count), jnp.float32),
        jnp.zeros(count, jnp.float32),
        _zeros(part, blocks, unit),
    )
    (sketches_KNS, squares_KN, parts_N, sums), _ = jax.lax.scan(body, start, _numbered(blocks))
    gram = jnp.einsum("kns,kms->knm", sketches_KNS, sketches_KNS, precision="highest")
    halves_KN = _split_half_cosine(jnp.diagonal(gram, axis1=1, axis2=2), squares_KN, parts_N)
    return TaskGradients(_of_means(gram, tokens_N), halves_KN, None), sums


def weighted_pass(
    grouping: Grouping, part: Part, params: Tree, blocks: Any, factors_KN: jax.Array
) -> tuple[Tree, Any]:
    """The update's gradient from microbatches of one task each, with a weight for every group.

    Args:
      grouping: of the parameters.
      part: see `by_microbatch`.
      params: see `by_microbatch`.
      blocks: see `by_microbatch`.
      factors_KN: what the gradient of a task's summed token losses is multiplied by.
    """
    unit = jnp.ones(factors_KN.shape[1] + 1, jnp.float32)

    def body(carry: Any, numbered: Any) -> tuple[Any, None]:
        total, sums = carry
        index, rows = numbered
        grads, more = part(rows, index, unit)
        task = jnp.maximum(task_of(rows), 1) - 1
        grads = groups.scale(grouping, grads, factors_KN[:, task])
        return (jax.tree.map(jnp.add, total, grads), _added(sums, more)), None

    start = jax.tree.map(jnp.zeros_like, params), _zeros(part, blocks, unit)
    return jax.lax.scan(body, start, _numbered(blocks))[0]


def cosines(gram_KNN: jax.Array) -> jax.Array:
    """Float32 [K, N, N]: cosines of gradients; NaN where one of the two is absent or zero."""
    norms_KN = jnp.sqrt(jnp.diagonal(gram_KNN, axis1=1, axis2=2))
    products_KNN = norms_KN[:, :, None] * norms_KN[:, None, :]
    return jnp.where(products_KNN > 0, gram_KNN / products_KNN, jnp.nan)


def _of_means(sums_gram_KNN: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """Gramian of mean losses from that of summed ones."""
    each_N = jnp.maximum(tokens_N, 1.0)
    return sums_gram_KNN / (each_N[:, None] * each_N[None, :])[None]


def _split_half_cosine(norms_KN: jax.Array, squares_KN: jax.Array, parts_N: jax.Array) -> jax.Array:
    """The expected cosine between the sums of two halves of a task's microbatches.

    With m parts g_i, c the mean of <g_i, g_j> over pairs and v that of |g_i|^2, two random halves
    have expected inner product (m/2)^2 c, and expected squared norm (m/2) v + (m/2)(m/2 - 1) c.
    """
    parts_1N = parts_N[None]
    pairs_1N = jnp.maximum(parts_1N * (parts_1N - 1.0), 1.0)
    cross_KN = (norms_KN - squares_KN) / pairs_1N
    mean_KN = squares_KN / jnp.maximum(parts_1N, 1.0)
    half_1N = parts_1N / 2.0
    length_KN = mean_KN + (half_1N - 1.0) * cross_KN
    known_KN = (parts_1N > 1.0) & (length_KN > 0)
    return jnp.where(known_KN, half_1N * cross_KN / jnp.where(known_KN, length_KN, 1.0), jnp.nan)


def _zero_slots(
    axes: Mapping[str, tuple[str | None, ...]] | None, params: Tree, count: int
) -> Tree:
    def zeros(path: str, leaf: jax.Array) -> jax.Array:
        slot = jnp.zeros((count, *leaf.shape), leaf.dtype)
        return slot if axes is None else nn.with_logical_constraint(slot, ("tasks", *axes[path]))

    leaves = patterns.by_path(params).items()
    return patterns.as_tree({path: zeros(path, leaf) for path, leaf in leaves})


def _zeros(part: Part, blocks: Any, weights: jax.Array) -> Any:
    """Sums to start from."""
    first = jax.tree.map(lambda x: x[0], blocks)
    shapes = jax.eval_shape(part, first, jnp.int32(0), weights)[1]
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _numbered(blocks: Any) -> tuple[jax.Array, Any]:
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jnp.arange(count, dtype=jnp.int32), blocks


def _added(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)


def _sketch(grouping: Grouping, size: int, grads: Tree, seed: jax.Array) -> jax.Array:
    """Float32 [K, S]: a sketch of each group's part of one gradient."""
    sketches = [jnp.zeros(size, jnp.float32) for _ in grouping.names]
    for number, (path, leaf) in enumerate(patterns.by_path(grads).items()):
        where = grouping.place(path)
        if where is None:
            continue
        if grouping.kind == "last_shared":
            leaf = leaf[-1]
        if isinstance(where, int):
            sketches[where] += _count_sketch(leaf, size, seed, number)
            continue
        of_layers = jax.vmap(functools.partial(_count_sketch, size=size, seed=seed, number=number))
        for group, sketch in zip(where, of_layers(leaf), strict=True):
            sketches[group] += sketch
    return jnp.stack(sketches)


def _count_sketch(x: jax.Array, size: int, seed: jax.Array, number: int) -> jax.Array:
    """Places and signs are hashes of (seed, number of the parameter, index): nothing is stored."""
    index = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in range(x.ndim - 1, -1, -1):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index + place * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits = _hash(_hash(index ^ seed) + jnp.uint32(number * 0x9E3779B9 % 2**32))
    sign = jnp.where(bits >> 31, 1.0, -1.0)
    place = (bits % jnp.uint32(size)).astype(jnp.int32)
    return jnp.zeros(size, jnp.float32).at[place].add(sign * x.astype(jnp.float32))


def _hash(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

"""Gradient surgery: each task's gradient is changed until it conflicts with no other, then summed.

Both methods visit the other tasks one after the other in a random order, and every task sees the
others' gradients as they were. The changed gradients are kept as coefficients of the unit vectors
`g_j / |g_j|`, so that norms of any scale stay exact.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.balance import per_task
from mtl_jax.balance.gradient_method import Geometry, GradientMethod
from mtl_jax.balance.method import Observations, State, register

# Targets of GradVac stay this far from 1, where a gradient would need infinitely much of another.
_LARGEST_TARGET = 1.0 - 1e-6


def visiting_order(rng: jax.Array, present_N: jax.Array) -> jax.Array:
    """Int32 [N, N]: row i lists all tasks in the random order in which task i visits them.

    The order among present tasks depends on their ranks among present tasks alone: it is what it
    would be if absent tasks did not exist.
    """
    rank_N = jnp.cumsum(present_N) - 1

    def score(i: jax.Array, j: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(rng, i), j))

    score_NN = jax.vmap(lambda i: jax.vmap(lambda j: score(i, j))(rank_N))(rank_N)
    # Absent tasks share the rank of a present one; they go last, where visits change nothing.
    return jnp.argsort(jnp.where(present_N[None, :], score_NN, 2.0), axis=1)


# (cosine, target) of every pair of a visit, norms of the visiting -> how much of the unit vector.
_Correction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _operate(
    group: Geometry, order_NN: jax.Array, target_NN: jax.Array, correction: _Correction
) -> tuple[jax.Array, jax.Array]:
    """Every task visits all others.

    Args:
      group: the gradients.
      order_NN: of `visiting_order`.
      target_NN: float32, passed to `correction`, entry by entry.
      correction: of (projections of the visiting gradients on unit vectors, targets, norms of the
        visiting gradients), all [N]; returns what to add of each unit vector.

    Returns:
      (weights [N] of the sum of the changed gradients; the cosines met at each visit [N, N], 0
      where there was none).
    """
    rows_N = jnp.arange(group.valid_N.size)

    def visit(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        unit_NN, met_NN = carry  # row i: coefficients of task i's changed gradient
        j_N = order_NN[:, k]
        onto_NN = unit_NN @ group.cosine_NN
        onto_N = onto_NN[rows_N, j_N]
        norm_N = jnp.sqrt(jnp.maximum(jnp.sum(onto_NN * unit_NN, axis=1), 0.0))
        happens_N = group.valid_N & group.valid_N[j_N] & (j_N != rows_N)
        added_N = jnp.where(happens_N, correction(onto_N, target_NN[rows_N, j_N], norm_N), 0.0)
        cosine_N = jnp.where(happens_N & (norm_N > 0), onto_N / norm_N, 0.0)
        met_NN = met_NN.at[rows_N, j_N].set(jnp.clip(cosine_N, -1.0, 1.0))
        return unit_NN.at[rows_N, j_N].add(added_N), met_NN

    eye_NN = jnp.eye(group.valid_N.size, dtype=jnp.float32)
    start = eye_NN * group.norms_N[:, None]
    unit_NN, met_NN = jax.lax.fori_loop(
        0, group.valid_N.size, visit, (start, jnp.zeros_like(start))
    )
    # What a task keeps of its own gradient is all of it: exactly 1, and so for a zero gradient.
    others_NN = jnp.where(eye_NN > 0, 0.0, unit_NN)
    return 1.0 + jnp.sum(others_NN, axis=0) * group.inverse_N, met_NN


@register
@dataclasses.dataclass(frozen=True)
class PCGrad(GradientMethod):
    """Projects each task's gradient onto the normal plane of every gradient it conflicts with.

    For each i, visiting j != i in random order: `g_i -= min(0, g_i.g_j) / |g_j|^2 g_j`; the update
    is the sum over i (not the mean: it is N times longer where nothing conflicts). Yu et al. 2020,
    "Gradient surgery for multi-task learning", algorithm 1.

    When to use: tasks that conflict now and then, and a well-known method to compare with. The
    result depends on the order; more `orders` make it less noisy.

    Attributes:
      orders: the result is the mean over this many random orders.
    """

    orders: int = 1

    cost: ClassVar[str] = "gradients of every task held apart; no state"

    def check(self, names: Sequence[str]) -> None:
        """See `Method.check`."""
        per_task.require(self.orders >= 1, "PCGrad.orders", "at least 1", self.orders)

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`."""

        def one(number: jax.Array) -> jax.Array:
            order_NN = visiting_order(jax.random.fold_in(rng, number), group.present_N)
            no_target_NN = jnp.zeros_like(group.cosine_NN)
            weights_N, _ = _operate(
                group, order_NN, no_target_NN, lambda onto, target, norm: jnp.maximum(-onto, 0.0)
            )
            return weights_N

        return jnp.mean(jax.vmap(one)(jnp.arange(self.orders)), axis=0), state


def _vaccine(onto_N: jax.Array, target_N: jax.Array, norm_N: jax.Array) -> jax.Array:
    """How much of the unit vector raises the cosine to the target; 0 where it is there already.

    The rule of Wang et al. 2021, where the other gradient is measured in units of its own norm.
    """
    cosine_N = jnp.clip(onto_N / jnp.maximum(norm_N, 1e-30), -1.0, 1.0)
    sine_N = jnp.sqrt(1.0 - cosine_N**2)
    target_sine_N = jnp.sqrt(1.0 - target_N**2)
    added_N = norm_N * (target_N * sine_N / target_sine_N - cosine_N)
    return jnp.where(cosine_N < target_N, added_N, 0.0)


@register
@dataclasses.dataclass(frozen=True)
class GradVac(GradientMethod):
    """Gradient vaccine: raises cosines of gradients to what they usually are, not just to zero.

    As PCGrad, but where the cosine `phi` of i with j is below its running mean `phi_hat`, so much
    of g_j is added that it equals `phi_hat`; then `phi_hat += beta (phi - phi_hat)`, from 0. Wang
    et al. 2021, "Gradient vaccine: investigating and improving multi-task optimization in massively
    multilingual models", algorithm 1. The means are kept for each group of parameters and are
    updated only for pairs in the batch.

    When to use: many related tasks (languages) and gradients in groups, best one for each layer.

    Attributes:
      beta: the step of the running mean; 0.01 is the paper's (libraries take 0.5).
    """

    beta: float = 0.01

    cost: ClassVar[str] = "gradients of every task held apart; a state of groups x tasks x tasks"

    def check(self, names: Sequence[str]) -> None:
        """See `Method.check`."""
        fits = 0 < self.beta <= 1
        per_task.require(fits, "GradVac.beta", "above 0 and at most 1", self.beta)

    def init(self, num_tasks: int, num_groups: int) -> State:
        """The running means of the cosines: float32 [K, N, N], zero."""
        return jnp.zeros((num_groups, num_tasks, num_tasks), jnp.float32)

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`."""
        order_NN = visiting_order(rng, group.present_N)
        target_NN = jnp.clip(state, -_LARGEST_TARGET, _LARGEST_TARGET)
        weights_N, met_NN = _operate(group, order_NN, target_NN, _vaccine)
        pair_NN = group.valid_N[:, None] & group.valid_N[None, :]
        pair_NN &= ~jnp.eye(group.valid_N.size, dtype=bool)
        return weights_N, jnp.where(pair_NN, state + self.beta * (met_NN - state), state)

"""GradNorm: weights that learn to make the tasks' gradients balanced."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.balance import per_task
from mtl_jax.balance.gradient_method import Geometry, GradientMethod
from mtl_jax.balance.method import Observations, State, register
from mtl_jax.errors import UserError


@register
@dataclasses.dataclass(frozen=True)
class GradNorm(GradientMethod):
    """Gradient norms are made equal, and larger for tasks that lag behind.

    Weights `w = N softmax(v)`, gradient norms `G_t = w_t |g_t|`, relative losses
    `r_t = (l_t / l_t(0)) / mean`. After each step Adam moves v down
    `sum |G_t - mean(G) r_t^alpha|`, the target being held constant. Chen et al. 2018, "GradNorm:
    gradient normalization for adaptive loss balancing in deep multitask networks", equations 1 and
    2; with a softmax, which keeps the weights positive, in place of dividing by their sum.

    `G_t` is linear in the weight, so the derivative with respect to v is closed and nothing is
    differentiated twice. `l_t(0)` is the loss of the first batch that has the task; a task not in
    the batch keeps its v and its moments.

    When to use: losses of different scale or pace, and one number to tune.

    Attributes:
      alpha: how strongly lagging tasks are pulled along; 0 makes all norms equal.
      lr: Adam's learning rate for v.
      floor: least `l_t(0)`: a task that is solved from the start must not look as if it lagged.
    """

    alpha: float = 1.5
    lr: float = 0.025
    floor: float = 0.01

    cost: ClassVar[str] = "gradients of every task held apart; a state of a few vectors"

    def check(self, names: Sequence[str]) -> None:
        """See `Method.check`."""
        alpha_fits = 0 <= self.alpha < math.inf
        per_task.require(alpha_fits, "GradNorm.alpha", "finite and not negative", self.alpha)
        for field in ("lr", "floor"):
            value = getattr(self, field)
            fits = 0 < value < math.inf
            per_task.require(fits, f"GradNorm.{field}", "positive and finite", value)

    def init(self, num_tasks: int, num_groups: int) -> State:
        """V, first losses (0: not seen) and Adam's state, one for each task: leaves [1, N].

        Raises:
          UserError: there is more than one group: losses are weighted, and a loss has one weight.
        """
        if num_groups != 1:
            raise UserError(
                f"GradNorm needs one group of parameters, not {num_groups}: set Balance.groups = "
                "'last_shared', as in its paper, or 'whole_model'."
            )
        return {
            "v": jnp.zeros((1, num_tasks), jnp.float32),
            "first_losses": jnp.zeros((1, num_tasks), jnp.float32),
            "adam": jax.tree.map(lambda leaf_N: leaf_N[None], per_task.adam_init(num_tasks)),
        }

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`."""
        present_N = group.present_N
        count = jnp.sum(present_N)
        share_N = per_task.softmax(state["v"], present_N)
        weights_N = count * share_N

        unseen_N = present_N & (state["first_losses"] == 0)
        first_N = jnp.where(unseen_N, jnp.maximum(seen.losses, self.floor), state["first_losses"])
        ratio_N = jnp.where(present_N, seen.losses / jnp.where(present_N, first_N, 1.0), 0.0)
        # All losses zero: all are as far as one can be.
        mean_ratio = jnp.sum(ratio_N) / count
        pace_N = jnp.where(mean_ratio > 0, ratio_N / jnp.maximum(mean_ratio, 1e-30), 1.0)

        norms_N = group.norms_N * group.scale
        balanced_N = weights_N * norms_N
        target_N = jnp.sum(balanced_N) / count * pace_N**self.alpha
        pull_N = share_N * jnp.sign(balanced_N - target_N) * norms_N * count
        slope_N = pull_N - share_N * jnp.sum(pull_N)

        # Alone in the batch a task has no one to balance with: that is no step for Adam.
        steps_N, adam = per_task.adam(state["adam"], slope_N, present_N & (count > 1), 0.9, 0.999)
        after = {"v": state["v"] - self.lr * steps_N, "first_losses": first_N, "adam": adam}
        return weights_N, after

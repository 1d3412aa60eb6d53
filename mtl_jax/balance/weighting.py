"""Weights that are set beforehand, or drawn: no loss is looked at.

Letter: N tasks.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balance import per_task
from mtl_jax.balance.method import Method, Observations, State, register
from mtl_jax.errors import UserError


@register
@dataclasses.dataclass(frozen=True)
class StaticWeights(Method):
    """Plain training with a factor for each task: the baseline to beat, once its factors are tuned.

    `w_t = factor_t x share_t`: a factor multiplies what the task counts in plain training, so that
    factors of 1 are plain training, bit for bit, and a factor of 2 is as if every token of the task
    counted twice. (Kurin et al. 2022 and Xin et al. 2022: tuned factors match the methods that
    compute theirs.)

    Attributes:
      factors: by name of a task or glob ("glue_*"); a name beats a glob, a later glob an
        earlier one. Tasks that are not named have 1.
      normalise: divide by the batch's mean factor, so that the weights of a batch sum to 1 and the
        factors say only how the tasks stand to each other.
    """

    factors: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    normalise: bool = False

    def __post_init__(self) -> None:
        for name, factor in self.factors.items():
            per_task.require(
                0.0 <= factor < math.inf,
                f"StaticWeights.factors[{name!r}]",
                "at least 0 and finite",
                factor,
            )

    def check(self, names: Sequence[str]) -> None:
        """Refuses names of no task, and factors that leave nothing to train.

        Raises:
          UserError: names the field and what would fit.
        """
        if not self._factors_of(names).any():
            raise UserError("StaticWeights.factors: every task has weight 0; leave one above 0.")

    def _factors_of(self, names: Sequence[str]) -> np.ndarray:
        found = per_task.by_name("StaticWeights.factors", self.factors, names)
        return np.array([found.get(name, 1.0) for name in names], np.float32)

    def weights(self, state: State, seen: Observations) -> tuple[jax.Array, State, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        factors_N = jnp.asarray(self._factors_of(seen.names))
        if self.normalise:
            # Factors of 1 make the two sums the same number, so that nothing changes by a bit.
            tokens, weighed = jnp.sum(seen.tokens), jnp.sum(factors_N * seen.tokens)
            factors_N = jnp.where(weighed > 0.0, factors_N / (weighed / tokens), 0.0)
        return factors_N * seen.shares, state, {}


@register
@dataclasses.dataclass(frozen=True)
class TaskMean(Method):
    """The mean of the present tasks' mean losses: every task counts the same, long targets or not.

    `w_t = 1 / number of present tasks`.
    """

    def weights(self, state: State, seen: Observations) -> tuple[jax.Array, State, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        return per_task.softmax(jnp.zeros_like(seen.tokens), seen.present), state, {}


@register
@dataclasses.dataclass(frozen=True)
class RandomWeights(Method):
    """New random weights at every step: the control that a method must beat to be worth its name.

    `w = softmax(z)` over the present tasks, `z_t ~ N(0, 1)`; the weights sum to 1. Lin et al. 2022,
    "Reasonable Effectiveness of Random Weighting" (RLW), Algorithm 2.
    """

    def weights(self, state: State, seen: Observations) -> tuple[jax.Array, State, dict[str, Any]]:
        """The weights of this step; see `Method.weights`.

        A task's number depends on the step's key and its name alone, not on the other tasks.
        """
        hashes_N = np.array([zlib.crc32(name.encode()) for name in seen.names], np.uint32)
        keys_N = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(seen.rng, jnp.asarray(hashes_N))
        logits_N = jax.vmap(jax.random.normal)(keys_N)
        return per_task.softmax(logits_N, seen.present), state, {}


@register
@dataclasses.dataclass(frozen=True)
class TransferObjective(Method):
    """Training for the sake of some tasks: `L_source + alpha L_target`.

    L_source and L_target are the means over the tokens (examples, where `Balance.reduction` is
    "example_mean") of each group in the batch, so a task's weight is its share of its group, times
    alpha in the target group. A group that is absent from a batch adds nothing. With alpha 0 the
    target's losses have weight exactly 0.

    Attributes:
      source: names of tasks or globs ("glue_*"); a name beats a glob, and a glob of `target` one of
        `source`, so that `source = ['*']` means all others.
      target: names or globs of the tasks that count alpha.
      alpha: weight of the target group; with schedule "linear" its last value.
      schedule: "constant", or "linear": from `first_alpha` to `alpha` in `steps` steps, then
        constant.
      first_alpha: alpha at step 0; only with "linear".
      steps: how long alpha changes; only with "linear".
    """

    source: Sequence[str] = ()
    target: Sequence[str] = ()
    alpha: float = 1.0
    schedule: str = "constant"
    first_alpha: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        for field in ("source", "target"):
            names = getattr(self, field)
            per_task.require(
                not isinstance(names, str), f"TransferObjective.{field}", "a list of names", names
            )
            object.__setattr__(self, field, tuple(names))
        for field in ("alpha", "first_alpha"):
            value = getattr(self, field)
            per_task.require(
                0.0 <= value < math.inf,
                f"TransferObjective.{field}",
                "at least 0 and finite",
                value,
            )
        schedule = self.schedule
        per_task.require(
            schedule in ("constant", "linear"),
            "TransferObjective.schedule",
            "'constant' or 'linear'",
            schedule,
        )
        if schedule == "linear":
            field = "TransferObjective.steps"
            per_task.require(
                self.steps >= 1, field, "at least 1 with schedule 'linear'", self.steps
            )
        elif self.first_alpha or self.steps:
            raise UserError(
                "TransferObjective.first_alpha and steps need TransferObjective.schedule = "
                f"'linear'; it is {schedule!r}."
            )

    def check(self, names: Sequence[str]) -> None:
        """Refuses groups that are empty, overlap, or leave a task out.

        Raises:
          UserError: names the field and what would fit.
        """
        self._is_target(names)

    def _is_target(self, names: Sequence[str]) -> np.ndarray:
        """Bool [N]: the tasks of the target group."""
        for field in ("source", "target"):
            per_task.by_name(
                f"TransferObjective.{field}", dict.fromkeys(getattr(self, field)), names
            )
        both = sorted(set(self.source) & set(self.target))
        if both:
            raise UserError(
                f"TransferObjective.source and target both have {both[0]!r}: remove one of the two."
            )
        groups = dict.fromkeys(self.source, False) | dict.fromkeys(self.target, True)
        found = per_task.by_name("TransferObjective", groups, names)
        left = [name for name in names if name not in found]
        if left:
            raise UserError(
                f"TransferObjective: {', '.join(left[:5])}{' and others' if left[5:] else ''} in "
                "neither source nor target; add the names, or source = ['*'] for all others."
            )
        for field, group in (("source", False), ("target", True)):
            if group not in found.values():
                raise UserError(
                    f"TransferObjective.{field} has no task: name one that the other has not."
                )
        return np.array([found[name] for name in names])

    def alpha_at(self, step: jax.Array) -> jax.Array:
        """The float32 weight of the target group after `step` updates."""
        if self.schedule == "constant":
            return jnp.asarray(self.alpha, jnp.float32)
        part = jnp.minimum(jnp.asarray(step, jnp.float32) / self.steps, 1.0)
        return (1.0 - part) * self.first_alpha + part * self.alpha

    def weights(self, state: State, seen: Observations) -> tuple[jax.Array, State, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        target_N = jnp.asarray(self._is_target(seen.names))
        alpha = self.alpha_at(seen.step)
        target_tokens = jnp.sum(seen.tokens, where=target_N)
        source_tokens = jnp.sum(seen.tokens, where=~target_N)
        # As in `Observations.shares`: no task of a group in the batch is no division by 0.
        within_N = seen.tokens / jnp.maximum(jnp.where(target_N, target_tokens, source_tokens), 1.0)
        return jnp.where(target_N, alpha, 1.0) * within_N, state, {"alpha": alpha}

"""Distributional robustness over tasks: weights go to where the loss, or its excess, is largest.

Letter: N tasks.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mtl_jax.balance import per_task
from mtl_jax.balance.method import LOSSES, REFERENCE, Method, Observations, register
from mtl_jax.errors import UserError


def ascend(
    log_weights_N: jax.Array, gains_N: jax.Array, moving_N: jax.Array, smoothing: float
) -> jax.Array:
    """One step of exponentiated gradient ascent on the simplex.

    `q_t ~ q_t exp(gain_t)`, then `q = (1 - smoothing) q + smoothing / N`, among the moving tasks,
    whose sum stays what it is; so the others are as if they did not exist, and keep theirs bit for
    bit.

    Args:
      log_weights_N: float32, log q: of a task that is far from the worst, q itself would be 0.
      gains_N: float32, step size times what the adversary maximises.
      moving_N: bool.
      smoothing: part of the weight that is spread evenly.

    Returns:
      Float32 [N], log q after.
    """
    mass = jax.nn.logsumexp(log_weights_N, where=moving_N)
    new_N = jax.nn.log_softmax(log_weights_N + gains_N, where=moving_N)
    if smoothing:
        even = math.log(smoothing) - jnp.log(jnp.sum(moving_N, dtype=jnp.float32))
        new_N = jnp.logaddexp(new_N + math.log1p(-smoothing), even)
    return jnp.where(moving_N, new_N + mass, log_weights_N)


def _check(name: str, eta: float, smoothing: float) -> None:
    per_task.require(0.0 < eta < math.inf, f"{name}.eta", "positive and finite", eta)
    per_task.require(0.0 <= smoothing < 1.0, f"{name}.smoothing", "in [0, 1)", smoothing)


def _even(num_tasks: int) -> jax.Array:
    return jnp.full(num_tasks, -math.log(num_tasks), jnp.float32)


@register
@dataclasses.dataclass(frozen=True)
class GroupDRO(Method):
    """Trains for the worst task: `min over the model, max over q of sum_t q_t l_t`.

    `q_t ~ q_t exp(eta l_t)` with the losses of the very batch, then one step of the model with
    weights q; they sum to 1 over the present tasks. An absent task keeps its q. Sagawa et al. 2020,
    Algorithm 1. Losses of tasks must be comparable; where the smallest reachable loss differs from
    task to task, `DoReMi` compares with a reference.

    The state is log q.

    Attributes:
      eta: step size of q (0.01 in the authors' code).
      smoothing: part of q that is spread evenly at every step, so that no task is forgotten; 0 in
        the paper.
    """

    needs = frozenset({LOSSES})
    cost = "a forward pass before the update where a batch is computed in parts"

    eta: float = 0.01
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check("GroupDRO", self.eta, self.smoothing)

    def init(self, num_tasks: int, num_groups: int) -> jax.Array:
        """The state before the first step."""
        return _even(num_tasks)

    def weights(
        self, state: jax.Array, seen: Observations
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        state = ascend(state, self.eta * seen.losses, seen.present, self.smoothing)
        return per_task.softmax(state, seen.present), state, {"group_weight": jnp.exp(state)}

    def rates(self, state: jax.Array, names: Sequence[str]) -> dict[str, float] | None:
        """Mixture rates that follow q: the worse a task's loss, the more often it is drawn.

        At least a hundredth of an even share. A weight multiplies a mean, so these rates do not
        count a second time in the objective: they make the means that weigh more less noisy.
        """
        return per_task.as_rates(names, jax.nn.softmax(state), per_task.LEAST_SHARE)


@flax.struct.dataclass
class DoReMiState:
    """Of `DoReMi`.

    Attributes:
      log_weights: float32 [N], log alpha.
      average: float32 [N], mean of alpha over the steps so far.
      excess: float32 [N], last excess loss of each task.
      seen: bool [N], whether there was one.
      steps: int32 scalar, alphas in the average.
    """

    log_weights: jax.Array
    average: jax.Array
    excess: jax.Array
    seen: jax.Array
    steps: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class DoReMi(Method):
    """Finds mixture rates: more for tasks where a small model is worse than it could be.

    `excess_t` is the mean over the task's tokens of `max(l - l of the reference, 0)`, with the
    token's cross-entropies; `alpha_t ~ alpha_t exp(eta excess_t)`; then `alpha = (1 - smoothing)
    alpha + smoothing / N`, and one step of the model with weights alpha on the task means. The
    result is the average of alpha over all steps (`rates`), the mixture rates of a second run. Xie
    et al. 2023, Algorithm 1.

    - The weights are alpha divided by its sum over the present tasks. The paper's objective
      weighs means of domains, so nothing need be divided by a sampling rate (the authors' code,
      which weighs tokens, must).
    - An absent task's alpha moves by its last excess, as in the authors' code. A task that was
      never there keeps 1 / N of the weight (there: it moves by the logarithm of the vocabulary's
      size).

    Attributes:
      eta: step size of alpha.
      smoothing: part of alpha that is spread evenly at every step.
      reference: the checkpoint of the reference model, trained on the same tasks.
      every_n_steps: steps between two updates of alpha, in which it holds and the reference is not
        computed. 1 is the paper's; 10 spares most of the reference's forward pass, which makes a
        step a quarter longer.
    """

    needs = frozenset({LOSSES, REFERENCE})
    cost = "GroupDRO's, and every_n_steps a forward pass of the reference, kept in memory"

    eta: float = 1.0
    smoothing: float = 1e-4
    reference: str = ""
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        _check("DoReMi", self.eta, self.smoothing)
        if self.every_n_steps < 1:
            raise UserError(f"DoReMi.every_n_steps must be at least 1, got {self.every_n_steps}.")

    @property
    def reference_every(self) -> int:
        """See `Method.reference_every`."""
        return self.every_n_steps

    def check(self, names: Sequence[str]) -> None:
        """Refuses to run without a reference.

        Raises:
          UserError: names the field and what would fit.
        """
        if not self.reference:
            raise UserError(
                "DoReMi.reference is empty: give the checkpoint or run directory of a model that "
                "was trained on the same tasks."
            )

    def init(self, num_tasks: int, num_groups: int) -> DoReMiState:
        """The state before the first step."""
        return DoReMiState(
            log_weights=_even(num_tasks),
            average=jnp.full(num_tasks, 1.0 / num_tasks, jnp.float32),
            excess=jnp.zeros(num_tasks, jnp.float32),
            seen=jnp.zeros(num_tasks, bool),
            steps=jnp.zeros((), jnp.int32),
        )

    def weights(
        self, state: DoReMiState, seen: Observations
    ) -> tuple[jax.Array, DoReMiState, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        assert seen.excess is not None  # it is among the needs
        looked = seen.step % self.every_n_steps == 0
        new_N = seen.present & looked
        excess_N = jnp.where(new_N, seen.excess, state.excess)
        ever_N = state.seen | new_N
        log_N = ascend(state.log_weights, self.eta * excess_N, ever_N, self.smoothing)
        log_N = jnp.where(looked, log_N, state.log_weights)
        alpha_N = jax.nn.softmax(log_N)
        steps = state.steps + 1
        average_N = state.average + (alpha_N - state.average) / steps
        after = DoReMiState(log_N, average_N, excess_N, ever_N, steps)
        logs = {"domain_weight": alpha_N, "excess_loss": excess_N}
        return per_task.softmax(log_N, seen.present), after, logs

    def rates(self, state: DoReMiState, names: Sequence[str]) -> dict[str, float] | None:
        """The average of alpha: the method's result, as rates of a second run's mixture.

        None before the first step. Where a mixture follows them while they are found, the means of
        tasks that weigh more get less noisy; the objective stays.
        """
        if not int(state.steps):
            return None
        return per_task.as_rates(names, state.average)

"""Weights that follow the course of each task's own loss or accuracy.

They learn after the update, from the losses of its batch, and so cost nothing beyond a plain step.

Letter: N tasks.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balance import per_task
from mtl_jax.balance.method import Method, Observations, register

# Below this a mean loss is taken for this: a ratio of two losses must not divide by zero.
LEAST_LOSS = 1e-6


@flax.struct.dataclass
class UncertaintyState:
    """Of `UncertaintyWeights`; `log_variance` is float32 [N]."""

    log_variance: jax.Array
    adam: per_task.AdamState


@register
@dataclasses.dataclass(frozen=True)
class UncertaintyWeights(Method):
    """Learned noise of each task: `minimise sum_t 1/2 exp(-s_t) l_t + 1/2 s_t` over s, too.

    So `w_t = 1/2 exp(-s_t)`. Where losses stand still, s_t goes to log l_t and w_t to 1 / (2 l_t):
    tasks that are fitted better weigh more, without bound as a loss goes to 0, so keep `s_min`. The
    objective may be negative; choose checkpoints by something else. Kendall, Gal and Cipolla 2018,
    equation 7 with s = log sigma^2.

    s has its own Adam, with no weight decay: the model's optimizer (Adafactor, with steps relative
    to the size of a parameter, clipping and a schedule) is not meant for it. The update of s is
    that of joint training: its gradient at the s and the losses of the very step.

    Attributes:
      s_init: s of every task at first (LibMTL has -0.5).
      lr: learning rate of s; about how far s moves in one step, at most.
      s_min: s never goes below; the largest weight is 1/2 exp(-s_min), 10 by default.
      s_max: s never goes above.
      beta1: Adam's first moment.
      beta2: Adam's second moment.
    """

    s_init: float = 0.0
    lr: float = 0.01
    s_min: float = -3.0
    s_max: float = 10.0
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        name = "UncertaintyWeights"
        finite = -math.inf < self.s_min <= self.s_init <= self.s_max < math.inf
        order = (self.s_min, self.s_init, self.s_max)
        per_task.require(finite, f"{name}.s_min, s_init and s_max", "finite and in order", order)
        per_task.require(0.0 < self.lr < math.inf, f"{name}.lr", "positive and finite", self.lr)
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            per_task.require(0.0 <= value < 1.0, f"{name}.{field}", "in [0, 1)", value)

    def init(self, num_tasks: int, num_groups: int) -> UncertaintyState:
        """The state before the first step."""
        log_variance_N = jnp.full(num_tasks, self.s_init, jnp.float32)
        return UncertaintyState(log_variance_N, per_task.adam_init(num_tasks))

    def weights(
        self, state: UncertaintyState, seen: Observations
    ) -> tuple[jax.Array, UncertaintyState, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        weights_N = jnp.where(seen.present, 0.5 * jnp.exp(-state.log_variance), 0.0)
        return weights_N, state, {"log_variance": state.log_variance}

    def observe(
        self, state: UncertaintyState, seen: Observations, losses_after: jax.Array | None
    ) -> UncertaintyState:
        """One step of Adam on s, from the losses before the update."""
        s_N = state.log_variance
        grads_N = 0.5 - 0.5 * jnp.exp(-s_N) * seen.losses
        steps_N, adam = per_task.adam(state.adam, grads_N, seen.present, self.beta1, self.beta2)
        moved_N = jnp.clip(s_N - self.lr * steps_N, self.s_min, self.s_max)
        return UncertaintyState(jnp.where(seen.present, moved_N, s_N), adam)


@flax.struct.dataclass
class DWAState:
    """Of `DWA`.

    Attributes:
      step: int32 scalar, steps of the window that runs.
      sums: float32 [N], losses of the window that runs.
      counts: int32 [N], steps of it in which the task was present.
      newer: float32 [N], mean loss of the last window in which the task was present.
      older: float32 [N], of the one before.
      windows: int32 [N], how many of the two there are.
    """

    step: jax.Array
    sums: jax.Array
    counts: jax.Array
    newer: jax.Array
    older: jax.Array
    windows: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class DWA(Method):
    """Dynamic weight average: tasks whose loss falls more slowly weigh more.

    `w = N softmax(r / temperature)` over the N present tasks, `r_t` the task's mean loss of the
    last window of steps over that of the window before; the weights average to 1 and multiply the
    task means, so the objective is about N times the mean loss. Before a task has two windows its r
    is 1, and all weights are 1 while no task has. Liu, Johns and Davison 2019, equation 7, whose
    windows are epochs; an endless mixture has none.

    A window's mean is over the steps in which the task was present, each counting once. Windows in
    which it was not are left out: it keeps its last two means.

    Attributes:
      temperature: larger makes the weights more alike (2 in the paper).
      window_steps: steps of a window; long enough to average over the noise of batches, and short
        enough that a run has many.
    """

    temperature: float = 2.0
    window_steps: int = 100

    def __post_init__(self) -> None:
        temperature = self.temperature
        per_task.require(
            0.0 < temperature < math.inf, "DWA.temperature", "positive and finite", temperature
        )
        steps = self.window_steps
        per_task.require(steps >= 1, "DWA.window_steps", "at least 1", steps)

    def init(self, num_tasks: int, num_groups: int) -> DWAState:
        """The state before the first step."""
        numbers = [jnp.zeros(num_tasks, jnp.float32) for _ in range(3)]
        counts = [jnp.zeros(num_tasks, jnp.int32) for _ in range(2)]
        return DWAState(
            step=jnp.zeros((), jnp.int32),
            sums=numbers[0],
            counts=counts[0],
            newer=numbers[1],
            older=numbers[2],
            windows=counts[1],
        )

    def ratios(self, state: DWAState) -> jax.Array:
        """Float32 [N]: r, the loss of the last window over that of the one before."""
        ratio_N = jnp.maximum(state.newer, LEAST_LOSS) / jnp.maximum(state.older, LEAST_LOSS)
        return jnp.where(state.windows >= 2, ratio_N, 1.0)

    def weights(
        self, state: DWAState, seen: Observations
    ) -> tuple[jax.Array, DWAState, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        ratios_N = self.ratios(state)
        number = jnp.sum(seen.present, dtype=jnp.float32)
        weights_N = number * per_task.softmax(ratios_N / self.temperature, seen.present)
        return weights_N, state, {"loss_ratio": ratios_N}

    def observe(
        self, state: DWAState, seen: Observations, losses_after: jax.Array | None
    ) -> DWAState:
        """Adds the losses before the update to the window, and closes it at its last step."""
        step = state.step + 1
        sums_N = jnp.where(seen.present, state.sums + seen.losses, state.sums)
        counts_N = state.counts + seen.present
        ends = step == self.window_steps
        learnt_N = ends & (counts_N > 0)
        mean_N = sums_N / jnp.maximum(counts_N, 1)
        return DWAState(
            step=jnp.where(ends, 0, step),
            sums=jnp.where(ends, 0.0, sums_N),
            counts=jnp.where(ends, 0, counts_N),
            newer=jnp.where(learnt_N, mean_N, state.newer),
            older=jnp.where(learnt_N, state.newer, state.older),
            windows=jnp.where(learnt_N, jnp.minimum(state.windows + 1, 2), state.windows),
        )

    def rates(self, state: DWAState, names: Sequence[str]) -> dict[str, float] | None:
        """Mixture rates that follow the weights: slower tasks are drawn more often.

        They are the weights with every task present, and sum to one; None while no task has two
        windows. A weight multiplies a mean, so these rates do not count a second time in the
        objective: they make the means that weigh more less noisy.
        """
        if not np.any(np.asarray(state.windows) >= 2):
            return None
        return per_task.as_rates(names, jax.nn.softmax(self.ratios(state) / self.temperature))


@flax.struct.dataclass
class DifficultyState:
    """Of `DifficultyWeights`.

    Attributes:
      skill: float32 [N], k.
      measured: bool [N], whether k was ever measured.
    """

    skill: jax.Array
    measured: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class DifficultyWeights(Method):
    """Dynamic task prioritisation: the worse a task is done, the more it weighs.

    `w_t = -(1 - k_t)^gamma log k_t`, the focal loss of k_t, a moving average in (0, 1] of how well
    the task is done in training; k comes from past batches alone. Guo et al. 2018, "Dynamic Task
    Prioritization", equations 2 to 4 (task level only; we have no weights of examples).

    The weights multiply the task means and have no fixed sum: they fade as all tasks are learned.

    Attributes:
      gamma: larger puts more on the hardest tasks; 0 gives -log k.
      metric: "accuracy": share of target tokens predicted rightly, the targets before them given;
        "likelihood": exp(-mean loss), the geometric mean of the tokens' probabilities (of the loss
        that is trained: z-loss and label smoothing lower it).
      decay: of the moving average; the first measurement is taken as it is.
      k_init: k of a task that was never measured.
      k_min: k never counts as less, so that no weight is infinite.
    """

    gamma: float = 2.0
    metric: str = "accuracy"
    decay: float = 0.95
    k_init: float = 0.5
    k_min: float = 1e-3

    def __post_init__(self) -> None:
        name, known = "DifficultyWeights", ("accuracy", "likelihood")
        per_task.require(self.metric in known, f"{name}.metric", " or ".join(known), self.metric)
        for field, fits, what in (
            ("gamma", 0.0 <= self.gamma < math.inf, "at least 0 and finite"),
            ("decay", 0.0 <= self.decay < 1.0, "in [0, 1)"),
            ("k_init", 0.0 < self.k_init <= 1.0, "in (0, 1]"),
            ("k_min", 0.0 < self.k_min < 1.0, "in (0, 1)"),
        ):
            per_task.require(fits, f"{name}.{field}", what, getattr(self, field))

    def init(self, num_tasks: int, num_groups: int) -> DifficultyState:
        """The state before the first step."""
        skill_N = jnp.full(num_tasks, self.k_init, jnp.float32)
        return DifficultyState(skill_N, jnp.zeros(num_tasks, bool))

    def _priority(self, state: DifficultyState) -> jax.Array:
        skill_N = jnp.clip(state.skill, self.k_min, 1.0)
        return -((1.0 - skill_N) ** self.gamma) * jnp.log(skill_N)

    def weights(
        self, state: DifficultyState, seen: Observations
    ) -> tuple[jax.Array, DifficultyState, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        weights_N = jnp.where(seen.present, self._priority(state), 0.0)
        return weights_N, state, {"skill": state.skill}

    def observe(
        self, state: DifficultyState, seen: Observations, losses_after: jax.Array | None
    ) -> DifficultyState:
        """Moves k towards the measure of the batch, from before the update."""
        now_N = seen.correct if self.metric == "accuracy" else jnp.exp(-seen.losses)
        moved_N = self.decay * state.skill + (1.0 - self.decay) * now_N
        new_N = jnp.where(state.measured, moved_N, now_N)
        return DifficultyState(
            jnp.where(seen.present, new_N, state.skill), state.measured | seen.present
        )

    def rates(self, state: DifficultyState, names: Sequence[str]) -> dict[str, float] | None:
        """Mixture rates that follow the weights: harder tasks are drawn more often.

        They are the weights of all tasks, divided by their sum, at least a hundredth of an even
        share; None where nothing was measured yet, or all weights are 0. A weight multiplies a
        mean, so these rates do not count a second time in the objective.
        """
        if not np.any(np.asarray(state.measured)):
            return None
        return per_task.as_rates(names, self._priority(state), per_task.LEAST_SHARE)

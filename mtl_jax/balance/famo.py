"""FAMO: all losses fall at about the same pace, by looking at losses alone.

Letter: N tasks.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balance import per_task
from mtl_jax.balance.method import LOSSES, LOSSES_AFTER, Method, Observations, register

EPSILON = 1e-8  # added to losses before their logarithm, as in the authors' code


@flax.struct.dataclass
class FAMOState:
    """Of `FAMO`; `logits` is float32 [N], the paper's xi."""

    logits: jax.Array
    adam: per_task.AdamState


@register
@dataclasses.dataclass(frozen=True)
class FAMO(Method):
    """Fast adaptive multitask optimization: descend on the logarithms of the losses, evenly.

    With `z = softmax(xi)` over the present tasks and `D_t = l_t - b_t + 1e-8`, the update follows
    the gradient of `c sum_t z_t log D_t`, so `w_t = (z_t / D_t) / sum_s (z_s / D_s)`; the weights
    sum to 1. After it, `d_t = log D_t(before) - log D_t(after)` on the same batch says by how much
    each loss fell, and xi takes a step of Adam against `J' d + weight_decay xi`, J the Jacobian of
    the softmax: tasks that fell most lose weight. Liu, Feng, Stone and Liu 2023, Algorithms 1, 2.

    Where a loss is below its bound, D_t is 1e-8, so the bound must be one.

    Attributes:
      lr: learning rate of xi.
      weight_decay: of xi, added to the gradient before Adam (not AdamW's): 1e-3 in the paper,
        LibMTL and TorchJD, 1e-5 in the authors' experiments.
      lower_bound: b, what a loss cannot go below; one number, or numbers by name of a task or glob,
        0 for tasks that are not named.
    """

    needs = frozenset({LOSSES, LOSSES_AFTER})
    cost = "a forward pass after the update, and one before it where a batch is computed in parts"

    lr: float = 0.025
    weight_decay: float = 1e-3
    lower_bound: float | Mapping[str, float] = dataclasses.field(default=0.0, hash=False)

    def __post_init__(self) -> None:
        for field in ("lr", "weight_decay"):
            value = getattr(self, field)
            per_task.require(
                0.0 <= value < math.inf, f"FAMO.{field}", "at least 0 and finite", value
            )
        for bound in self._bounds_by_name().values():
            per_task.require(math.isfinite(bound), "FAMO.lower_bound", "finite", bound)

    def _bounds_by_name(self) -> Mapping[str, float]:
        if isinstance(self.lower_bound, Mapping):
            return self.lower_bound
        return {"*": self.lower_bound}

    def _bounds(self, names: Sequence[str]) -> np.ndarray:
        found = per_task.by_name("FAMO.lower_bound", self._bounds_by_name(), names)
        return np.array([found.get(name, 0.0) for name in names], np.float32)

    def check(self, names: Sequence[str]) -> None:
        """Refuses bounds of no task.

        Raises:
          UserError: names the field and what would fit.
        """
        self._bounds(names)

    def init(self, num_tasks: int, num_groups: int) -> FAMOState:
        """The state before the first step."""
        return FAMOState(jnp.zeros(num_tasks, jnp.float32), per_task.adam_init(num_tasks))

    def _excess(self, names: Sequence[str], losses_N: jax.Array) -> jax.Array:
        return jnp.maximum(losses_N - jnp.asarray(self._bounds(names)), 0.0) + EPSILON

    def weights(
        self, state: FAMOState, seen: Observations
    ) -> tuple[jax.Array, FAMOState, dict[str, Any]]:
        """The weights of this step; see `Method.weights`."""
        shares_N = per_task.softmax(state.logits, seen.present)
        ratios_N = shares_N / self._excess(seen.names, seen.losses)
        total = jnp.sum(ratios_N)
        weights_N = jnp.where(seen.present, ratios_N / total, 0.0)
        return weights_N, state, {"log_loss_weight": shares_N}

    def observe(
        self, state: FAMOState, seen: Observations, losses_after: jax.Array | None
    ) -> FAMOState:
        """One step of Adam on xi, from the losses of the batch before and after the update."""
        assert losses_after is not None  # it is among the needs
        before_N = self._excess(seen.names, seen.losses)
        after_N = self._excess(seen.names, losses_after)
        fell_N = jnp.log(before_N) - jnp.log(after_N)
        shares_N = per_task.softmax(state.logits, seen.present)
        grads_N = shares_N * (fell_N - jnp.sum(shares_N * fell_N))
        grads_N = grads_N + self.weight_decay * state.logits
        steps_N, adam = per_task.adam(state.adam, grads_N, seen.present, 0.9, 0.999)
        return FAMOState(state.logits - self.lr * steps_N, adam)

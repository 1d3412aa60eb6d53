"""A method at work in a train step: its state, its weights, what of them is logged.

Letters: N tasks, K groups of parameters (K = 1 for methods that see losses alone).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.groups import Grouping, make_grouping
from mtl_jax.balance.method import (
    GRAM,
    LOSSES,
    LOSSES_AFTER,
    METHODS,
    REFERENCE,
    Method,
    Observations,
    State,
)
from mtl_jax.errors import UserError
from mtl_jax.model_config import T5Config

_SMALL = 1e-30


@flax.struct.dataclass
class BalanceState:
    """What a method knows, as part of the train state.

    Attributes:
      method: its own state.
      weights: float32 [K, N], those of the last solution; for steps between two of them.
      solved: bool [N], the tasks that were there at some solution.
    """

    method: State
    weights: jax.Array
    solved: jax.Array


@dataclasses.dataclass(frozen=True)
class Balancer:
    """A configuration of `Balance` made concrete; static under jit.

    Attributes:
      cfg: the values.
      method: None: plain training.
      names: of the N tasks that share the update (`Balance.by`), in the order of its vectors.
      of_task: for each id of a SeqIO task, padding's first, its index in `names` plus one.
      grouping: of the model's parameters.
      axes: logical axes of the parameters by path; None: one device.
    """

    cfg: BalanceConfig
    method: Method | None
    names: tuple[str, ...]
    of_task: tuple[int, ...]
    grouping: Grouping
    axes: Mapping[str, tuple[str | None, ...]] | None = None

    def needs(self, what: str) -> bool:
        """Whether the method asks for `what` (`method.NEEDS`)."""
        return self.method is not None and what in self.method.needs

    @property
    def every(self) -> int:
        """Steps between two looks at the gradients of single tasks; 0: never."""
        return self.cfg.every_n_steps if self.needs(GRAM) else self.cfg.monitor_every

    @property
    def wants_blocks(self) -> bool:
        """Whether the microbatches must each hold one task."""
        return self.every > 0 and self.cfg.task_gradients != "vmap"

    def slots_bytes(self, parameter_bytes: int) -> int:
        """Bytes on one device for gradients of single tasks; 0 where none are made.

        Args:
          parameter_bytes: of the trained parameters on one device.
        """
        if not self.every:
            return 0
        if self.cfg.task_gradients == "sketch":
            return 4 * self.cfg.sketch_size * len(self.names) * self.grouping.size
        return len(self.names) * parameter_bytes

    def init(self) -> BalanceState | tuple[()]:
        """The state before the first step; empty where there is no method."""
        if self.method is None:
            return ()
        groups = self.grouping.size if self.needs(GRAM) else 1
        equal_KN = jnp.full((groups, len(self.names)), 1.0 / len(self.names), jnp.float32)
        unsolved_N = jnp.zeros(len(self.names), bool)
        return BalanceState(self.method.init(len(self.names), groups), equal_KN, unsolved_N)

    def weights(
        self, state: BalanceState | tuple[()], seen: Observations
    ) -> tuple[jax.Array, BalanceState | tuple[()], dict[str, jax.Array]]:
        """The weights [K, N] of this step, the state, and what the method logs."""
        if self.method is None or isinstance(state, tuple):
            return seen.shares[None], state, {}
        shown, scale_KN = self._pre_normalized(seen)
        weights, inner, logs = self.method.weights(state.method, shown)
        weights_KN = weights if weights.ndim == 2 else weights[None]
        if scale_KN is not None:
            weights_KN = weights_KN * scale_KN
        weights_KN = self._rescaled(weights_KN, seen)
        # What is absent now may be there before the next solution: with its last weight, or, if it
        # has none yet, with one like the others'.
        present_1N = seen.present[None]
        there = jnp.maximum(jnp.sum(present_1N), 1)
        mean_K1 = jnp.sum(weights_KN, axis=1, where=present_1N, keepdims=True) / there
        absent_KN = jnp.where(state.solved[None], state.weights, mean_K1)
        held_KN = jnp.where(present_1N, weights_KN, absent_KN)
        return weights_KN, BalanceState(inner, held_KN, state.solved | seen.present), logs

    def held_weights(self, state: BalanceState, seen: Observations) -> jax.Array:
        """The weights [K, N] of the last solution, for a step between two."""
        return jnp.where(seen.present[None], state.weights, 0.0)

    def observe(
        self,
        state: BalanceState | tuple[()],
        seen: Observations,
        losses_after: jax.Array | None,
    ) -> BalanceState | tuple[()]:
        """The state after the update."""
        if self.method is None or isinstance(state, tuple):
            return state
        return dataclasses.replace(
            state, method=self.method.observe(state.method, seen, losses_after)
        )

    def _pre_normalized(self, seen: Observations) -> tuple[Observations, jax.Array | None]:
        """What the method sees, and what its weights [K, N] must then be multiplied by."""
        if self.cfg.pre_normalize == "none" or seen.gram is None:
            return seen, None
        if self.cfg.pre_normalize == "l2":
            size_KN = jnp.sqrt(jnp.maximum(jnp.einsum("knn->kn", seen.gram), 0.0))
        else:
            size_KN = jnp.broadcast_to(seen.losses[None], seen.gram.shape[:2])
        scale_KN = jnp.where(size_KN > _SMALL, 1.0 / jnp.maximum(size_KN, _SMALL), 0.0)
        gram_KNN = seen.gram * scale_KN[:, :, None] * scale_KN[:, None, :]
        return dataclasses.replace(seen, gram=gram_KNN), scale_KN

    def _rescaled(self, weights_KN: jax.Array, seen: Observations) -> jax.Array:
        if self.cfg.rescale == "sum_to_one":
            total_K1 = jnp.sum(weights_KN, axis=1, keepdims=True)
            return weights_KN / jnp.where(jnp.abs(total_K1) > _SMALL, total_K1, 1.0)
        if self.cfg.rescale == "mean_norm" and seen.gram is not None:
            # Each group's update as long as the plain one's: sqrt(w' G w) for both.
            def norms_K(w_KN: jax.Array) -> jax.Array:
                return jnp.sqrt(jnp.maximum(jnp.einsum("kn,knm,km->k", w_KN, seen.gram, w_KN), 0.0))

            plain_KN = jnp.broadcast_to(seen.shares[None], weights_KN.shape)
            own_K, plain_K = norms_K(weights_KN), norms_K(plain_KN)
            factor_K = jnp.where(own_K > _SMALL, plain_K / jnp.maximum(own_K, _SMALL), 1.0)
            return weights_KN * factor_K[:, None]
        return weights_KN


def make_balancer(
    cfg: BalanceConfig,
    method: Method | None,
    owners: Sequence[str],
    model: T5Config,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
) -> Balancer:
    """A balancer for these tasks.

    With one task there is nothing to share: training is the plain one, whatever the method and
    whatever tasks its fields name.

    Args:
      cfg: the values.
      method: of `cfg.method`; None: that with its defaults.
      owners: of each SeqIO task, by id from 1 on, what it counts as in the update: itself, or the
        dataset or family it is of.
      model: whose parameters are grouped.
      axes: logical axes of the parameters by path; None: one device.

    Raises:
      UserError: options that do not fit the tasks.
    """
    names = tuple(dict.fromkeys(owners))
    if len(names) < 2:
        cfg = BalanceConfig(modules=cfg.modules, by=cfg.by, reduction=cfg.reduction)
        method = None
    else:
        method = METHODS[cfg.method]() if method is None and cfg.method else method
        _check(cfg, method, names)
    of_task = (0, *(names.index(owner) + 1 for owner in owners))
    return Balancer(cfg, method, names, of_task, make_grouping(cfg.groups, model), axes)


def _check(cfg: BalanceConfig, method: Method | None, names: Sequence[str]) -> None:
    if method is None:
        return
    method.check(names)
    if cfg.follow_rates and not hasattr(method, "rates"):
        raise UserError(
            f"Balance.follow_rates: {cfg.method} has no rates in its state; methods that have: "
            f"{', '.join(sorted(n for n, m in METHODS.items() if hasattr(m, 'rates')))}."
        )


def describe_cost(balancer: Balancer, parameter_bytes: int) -> str:
    """One line: the method, what a step costs beyond a plain one, what memory.

    Args:
      balancer: of the run.
      parameter_bytes: of the trained parameters on one device.
    """
    cfg, count = balancer.cfg, len(balancer.names)
    kept, moved = balancer.slots_bytes(parameter_bytes) / 2**20, parameter_bytes / 2**20
    words = [] if balancer.needs(GRAM) else [_loss_side_cost(balancer, moved)]
    if balancer.every:
        passes = {
            "microbatch": "one backward pass over microbatches of one task each, about 1.1-1.4 x",
            "vmap": f"a backward pass for each of {count} tasks, about {(1 + 2 * count) / 3:.1f} x",
            "sketch": "two passes over microbatches of one task each, about 2 x",
        }[cfg.task_gradients]
        more = {"vmap": f", and {count} times the gradients of activations"}
        words += [
            f"{passes} the time of a plain step{_often(balancer.every)}",
            f"{kept:,.1f} MiB a device for {count} tasks' gradients"
            + more.get(cfg.task_gradients, ""),
        ]
    if cfg.affinity_every:
        words += [
            f"for the affinity {count + 1} forward passes, about {(count + 1) / 3:.1f} x the "
            f"time of a plain step more{_often(cfg.affinity_every)}, and {moved:,.1f} MiB a device"
        ]
    return f"{cfg.method or 'plain'}: {'; '.join(words)}"


def _often(every: int) -> str:
    return "" if every == 1 else f" at every {every}th step"


def _loss_side_cost(balancer: Balancer, parameter_mib: float) -> str:
    more = float(balancer.needs(LOSSES_AFTER))
    if balancer.method is not None and balancer.needs(REFERENCE):
        more += 1 / balancer.method.reference_every
    words = (
        f"about {1 + more / 3:.2f} x the time of a plain step" if more else "a plain step's time"
    )
    if balancer.needs(REFERENCE):
        words += f" and {parameter_mib:,.1f} MiB a device for the reference"
    if balancer.needs(LOSSES):
        words += "; a forward pass more where there are microbatches or Step.loss_chunk"
    return words

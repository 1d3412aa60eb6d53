"""The train step: gradients, update, and what is told of them; one pure function.

Letters: N tasks (index 0 is padding).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mtl_jax import model, objective, optim
from mtl_jax.balance.balancer import Balancer
from mtl_jax.balanced import Problem
from mtl_jax.model_config import T5Config
from mtl_jax.objective import Batch, Metrics, StepConfig


@flax.struct.dataclass
class TrainState:
    """All that an update changes; saved and restored as one.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32 tree of `model.init`.
      opt_state: of the optax chain.
      balance: of the method that shares the update among tasks; empty: none.
    """

    step: jax.Array
    params: model.Params
    opt_state: Any
    balance: Any = ()


def init_state(
    cfg: T5Config,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    balancer: Balancer | None = None,
) -> TrainState:
    """A fresh state; trace it under jit with output shardings to build it in place."""
    params = model.init(cfg, rng)
    balance = () if balancer is None else balancer.init()
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), balance)


def train_step(
    cfg: T5Config,
    step_cfg: StepConfig,
    optimizer_cfg: optim.OptimizerConfig,
    num_tasks: int,
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    reference: model.Params | None = None,
    *,
    balancer: Balancer | None = None,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      cfg: the model.
      step_cfg: the objective.
      optimizer_cfg: the update rule.
      num_tasks: number of real tasks.
      state: before the update.
      batch: one global batch.
      rng: the run's PRNG key; the step number is folded in, so a restart draws the same numbers.
      reference: parameters of a frozen model, for a method that compares with it.
      balancer: how the tasks share the update; None: the mean over all tokens.

    Returns:
      (the state after, metrics: scalars "loss" (mean over tokens, z-loss included), "z_loss",
      "grad_norm" (of what is trained, before clipping), "learning_rate", the per-task sums of
      `objective.loss_sum`, and with a balancer what `Problem.gradients` tells).
    """
    use_dropout = cfg.dropout_rate > 0.0
    dropout_rng = jax.random.fold_in(rng, state.step) if use_dropout else None
    trained, frozen = optim.split(optimizer_cfg, state.params)
    problem, balance = None, state.balance
    told: Metrics = {}
    if balancer is None:
        grads, sums = objective.gradients(
            cfg, step_cfg, num_tasks, trained, batch, dropout_rng, frozen
        )
    else:
        problem = Problem(cfg, step_cfg, balancer, frozen, dropout_rng)
        batch = problem.prepared(batch)
        seen = problem.observations(batch, state.step, rng, reference)
        grads, sums, balance, told = problem.gradients(trained, batch, balance, seen)
    optimizer = optim.make_optimizer(optimizer_cfg)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    if problem is not None:
        balance = problem.observed(trained, batch, balance, seen, sums)
    tokens = jnp.maximum(jnp.sum(sums["task_tokens"]), 1.0)
    metrics = {
        "loss": jnp.sum(sums["task_loss_sum"]) / tokens,
        "z_loss": sums["z_loss_sum"] / tokens,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optim.learning_rate(optimizer_cfg, state.step),
    }
    told |= {name: sums[name] for name in ("task_loss_sum", "task_tokens", "task_correct")}
    params = optim.merge(trained, frozen)
    return TrainState(state.step + 1, params, opt_state, balance), metrics | told

"""The train step: gradients, update, and what is told of them; one pure function.

Letters: N tasks (index 0 is padding).
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mtl_jax import model, objective, optim, patterns
from mtl_jax.balance.balancer import Balancer
from mtl_jax.balanced import Problem
from mtl_jax.model_config import T5Config
from mtl_jax.objective import Batch, Metrics, Shared, StepConfig
from mtl_jax.sharing import tree
from mtl_jax.sharing.adversary import strength
from mtl_jax.sharing.plan import SharingPlan


@flax.struct.dataclass
class TrainState:
    """All that an update changes; saved and restored as one.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32 tree of `model.init`, or of `sharing.tree.init`.
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
    plan: SharingPlan | None = None,
    given: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """A fresh state; trace it under jit with output shardings to build it in place.

    Args:
      cfg: the model that was asked for; with a plan its `base`.
      optimizer: the update rule.
      rng: a PRNG key.
      balancer: how the tasks share the update; None: the mean over all tokens.
      plan: how they share parameters; None: all of them.
      given: parameters of `cfg` that are there already, by path; the others are made.
    """
    params = patterns.as_tree(patterns.by_path(model.init(cfg, rng)) | dict(given or {}))
    if plan is not None:
        params = tree.init(plan, jax.random.fold_in(rng, 1), params)
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
    limit: jax.Array | None = None,
    *,
    balancer: Balancer | None = None,
    plan: SharingPlan | None = None,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      cfg: the model; with a plan its `model_config`.
      step_cfg: the objective.
      optimizer_cfg: the update rule.
      num_tasks: number of real tasks.
      state: before the update.
      batch: one global batch.
      rng: the run's PRNG key; the step number is folded in, so a restart draws the same numbers.
      reference: parameters of a frozen model, for a method that compares with it.
      limit: float32 scalar; an update whose loss is above it or not finite, or whose gradient is
        not finite, is left out. None: none is.
      balancer: how the tasks share the update; None: the mean over all tokens.
      plan: how they share parameters; then a microbatch holds one task, or tasks to which the plan
        gives the same parameters.

    Returns:
      (the state after, metrics: scalars "loss" (mean over tokens, z-loss included), "z_loss",
      "grad_norm" (of what is trained, before clipping), "learning_rate", the per-task sums of
      `objective.loss_sum`, with a limit "skipped", whether all but the step number is as it was,
      with a balancer what `Problem.gradients` tells, and with a plan
      "sharing/..." scalars and "mixed_sharing", whether a microbatch held what it must not).
    """
    shared = None if plan is None or plan.empty else Shared(plan, state.step)
    use_dropout = cfg.dropout_rate > 0.0
    dropout_rng = jax.random.fold_in(rng, state.step) if use_dropout else None
    trained, frozen = optim.split(optimizer_cfg, state.params)
    problem, balance = None, state.balance
    told: Metrics = {}
    if balancer is None:
        grads, sums = objective.gradients(
            *(cfg, step_cfg, num_tasks, trained, batch, dropout_rng, frozen), shared=shared
        )
    else:
        rate = optim.learning_rate(optimizer_cfg, state.step)
        problem = Problem(cfg, step_cfg, balancer, frozen, dropout_rng, shared, rate)
        batch = problem.prepared(batch, reference, state.step)
        seen = problem.observations(batch, state.step, rng)
        grads, sums, balance, told = problem.gradients(trained, batch, balance, seen)
    if shared is not None:
        grads, more = _with_penalty(shared, grads, trained, frozen, sums)
        told |= more | {"mixed_sharing": shared.mixed(batch, step_cfg.microbatches)}
    optimizer = optim.make_optimizer(optimizer_cfg)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    before, trained = trained, optax.apply_updates(trained, updates)
    if shared is not None:
        present_N = sums["task_tokens"][1:] > 0
        trained = tree.keep_absent(shared.plan, before, trained, present_N)
        opt_state = tree.keep_absent(shared.plan, state.opt_state, opt_state, present_N)
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
    after = TrainState(state.step + 1, params, opt_state, balance)
    if limit is not None:
        after, told["skipped"] = _unless_bad(state, after, metrics, limit)
    return after, metrics | told


def _unless_bad(
    before: TrainState, after: TrainState, metrics: Metrics, limit: jax.Array
) -> tuple[TrainState, jax.Array]:
    """The state after the update, or if that is bad the one before, a step on; and whether."""
    loss = metrics["loss"]
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])) | (loss > limit)
    kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)
    return kept.replace(step=after.step), bad


def _with_penalty(
    shared: Shared, grads: model.Params, trained: model.Params, frozen: model.Params, sums: Metrics
) -> tuple[model.Params, Metrics]:
    """The gradient with that of what sharing adds to the loss, and what to log of it."""
    rooms, told = shared.plan.rooms, {}
    if rooms.sharing.soft_penalty or rooms.experts.balance_weight:
        present_N = sums["task_tokens"][1:] > 0
        value, more = jax.value_and_grad(
            lambda trained: tree.penalty(shared.plan, optim.merge(trained, frozen), present_N)
        )(trained)
        grads = jax.tree.map(jnp.add, grads, more)
        told["sharing/penalty"] = value
    if rooms.adversary.weight:
        examples = jnp.maximum(sums["adversary_examples"], 1.0)
        told["sharing/adversary_loss"] = sums["adversary_loss_sum"] / examples
        told["sharing/adversary_accuracy"] = sums["adversary_correct"] / examples
        told["sharing/adversary_strength"] = strength(rooms.adversary, shared.step)
    return grads, told

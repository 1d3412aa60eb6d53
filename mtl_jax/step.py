"""The train step: per-task losses, microbatches, one pure function.

Letters: B rows, T decoder length, V vocabulary, N tasks (index 0 is padding).
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mtl_jax import loss, model, optim
from mtl_jax.errors import UserError
from mtl_jax.loss import cross_entropy as cross_entropy  # it was defined here
from mtl_jax.model_config import T5Config

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The objective.

    Attributes:
      microbatches: parts that the batch is split into, one after the other; the gradient is that
        of the whole batch.
      z_loss: weight of the squared log-partition, which keeps logits from drifting (T5X: 1e-4).
      label_smoothing: probability mass taken from the target and spread over the vocabulary.
      loss_chunk: tokens whose logits exist at a time, which saves memory; 0 for all at once. At
        least one token of every row of a microbatch is taken.
    """

    microbatches: int = 1
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    loss_chunk: int = 0

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise UserError(f"Step.microbatches must be at least 1, got {self.microbatches}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"Step.label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        if self.z_loss < 0.0:
            raise UserError(f"Step.z_loss must not be negative, got {self.z_loss}.")
        if self.loss_chunk < 0:
            raise UserError(
                f"Step.loss_chunk must not be negative, got {self.loss_chunk}; 0 turns it off."
            )


@flax.struct.dataclass
class TrainState:
    """All that an update changes; saved and restored as one.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32 tree of `model.init`.
      opt_state: of the optax chain.
    """

    step: jax.Array
    params: model.Params
    opt_state: Any


def init_state(
    cfg: T5Config, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """A fresh state; trace it under jit with output shardings to build it in place."""
    params = model.init(cfg, rng)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def forward(
    cfg: T5Config, params: model.Params, batch: Batch, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Logits_BTV of a batch in the layout of the data stream (teacher forcing)."""
    return model.logits(cfg, params, hidden_states(cfg, params, batch, dropout_rng))


def hidden_states(
    cfg: T5Config, params: model.Params, batch: Batch, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Hidden_BTD of the decoder, before the output layer."""
    encoded_BLD = model.encode(
        cfg,
        params,
        batch["encoder_input_tokens"],
        batch["encoder_segment_ids"],
        dropout_rng=None if dropout_rng is None else jax.random.fold_in(dropout_rng, 0),
    )
    return model.decode(
        cfg,
        params,
        encoded_BLD,
        batch["decoder_input_tokens"],
        segments_BT=batch["decoder_segment_ids"],
        cross_segments_BT=batch["decoder_segment_ids"],
        encoder_segments_BL=batch["encoder_segment_ids"],
        dropout_rng=None if dropout_rng is None else jax.random.fold_in(dropout_rng, 1),
    )


def loss_sum(
    cfg: T5Config,
    step_cfg: StepConfig,
    num_tasks: int,
    params: model.Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of token losses of a batch, and sums per task.

    Args:
      cfg: the model.
      step_cfg: the objective.
      num_tasks: number of real tasks; per-task vectors have `num_tasks + 1` entries, 0 is padding.
      params: tree of `model.init`.
      batch: see `data.py`.
      dropout_rng: a PRNG key, or None for no dropout.

    Returns:
      (scalar, {"z_loss_sum": [], "task_loss_sum", "task_tokens", "task_correct": [N]}).
    """
    weights_BT = batch["decoder_loss_weights"]
    total, tokens = loss.weighted_loss(
        cfg,
        params,
        hidden_states(cfg, params, batch, dropout_rng),
        batch["decoder_target_tokens"],
        weights_BT,
        z_loss=step_cfg.z_loss,
        label_smoothing=step_cfg.label_smoothing,
        chunk=step_cfg.loss_chunk,
    )
    per_task = functools.partial(
        jax.ops.segment_sum,
        segment_ids=batch["decoder_task_ids"].reshape(-1),
        num_segments=num_tasks + 1,
    )
    return total, {
        "z_loss_sum": jnp.sum(tokens.z_loss * weights_BT),
        "task_loss_sum": per_task((tokens.loss * weights_BT).reshape(-1)),
        "task_tokens": per_task(weights_BT.reshape(-1)),
        "task_correct": per_task((tokens.correct * weights_BT).reshape(-1)),
    }


def split_microbatches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...]; every part takes rows from every device's share."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def gradients(
    cfg: T5Config,
    step_cfg: StepConfig,
    num_tasks: int,
    params: model.Params,
    batch: Batch,
    dropout_rng: jax.Array | None,
    frozen: model.Params | None = None,
) -> tuple[model.Params, Metrics]:
    """Gradient of the mean token loss over the global batch, whatever the microbatches.

    The normaliser is the weight of all target tokens of the batch, taken before splitting; the
    microbatches are then summed (T5X normalises each one and sums, which changes the objective).
    The gradient is with respect to `params`; those in `frozen` (`optim.split`) are constants.
    """
    tokens = jnp.maximum(jnp.sum(batch["decoder_loss_weights"]), 1.0)

    def part(rng: jax.Array | None, rows: Batch) -> tuple[model.Params, Metrics]:
        def objective(params: model.Params) -> tuple[jax.Array, Metrics]:
            whole = optim.merge(params, frozen)
            total, sums = loss_sum(cfg, step_cfg, num_tasks, whole, rows, rng)
            return total / tokens, sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, sums

    if step_cfg.microbatches == 1:
        return part(dropout_rng, batch)
    parts = split_microbatches(batch, step_cfg.microbatches)

    def body(total: Any, numbered: Any) -> tuple[Any, None]:
        index, rows = numbered
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, index)
        return jax.tree.map(jnp.add, total, part(rng, rows)), None

    shapes = jax.eval_shape(part, dropout_rng, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    numbers = jnp.arange(step_cfg.microbatches, dtype=jnp.int32)
    return jax.lax.scan(body, zeros, (numbers, parts))[0]


def train_step(
    cfg: T5Config,
    step_cfg: StepConfig,
    optimizer_cfg: optim.OptimizerConfig,
    num_tasks: int,
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
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

    Returns:
      (the state after, metrics: scalars "loss" (mean over tokens, z-loss included), "z_loss",
      "grad_norm" (of what is trained, before clipping), "learning_rate", and the per-task sums of
      `loss_sum`).
    """
    use_dropout = cfg.dropout_rate > 0.0
    dropout_rng = jax.random.fold_in(rng, state.step) if use_dropout else None
    trained, frozen = optim.split(optimizer_cfg, state.params)
    grads, sums = gradients(cfg, step_cfg, num_tasks, trained, batch, dropout_rng, frozen)
    optimizer = optim.make_optimizer(optimizer_cfg)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    params = optim.merge(optax.apply_updates(trained, updates), frozen)
    tokens = jnp.maximum(jnp.sum(sums["task_tokens"]), 1.0)
    metrics = {
        "loss": jnp.sum(sums["task_loss_sum"]) / tokens,
        "z_loss": sums.pop("z_loss_sum") / tokens,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optim.learning_rate(optimizer_cfg, state.step),
    }
    return TrainState(state.step + 1, params, opt_state), metrics | sums

"""The objective: per-task losses of a batch and their gradient, over microbatches.

Letters: B rows, T decoder length, V vocabulary, N tasks (index 0 is padding).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import loss, model, optim
from mtl_jax.errors import UserError
from mtl_jax.model_config import T5Config
from mtl_jax.sharing import adversary, tree
from mtl_jax.sharing.plan import SharingPlan

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# Float32 [N] that each task's tokens are multiplied by, or what makes it of the sums per task.
Weigh = jax.Array | Callable[[Metrics], jax.Array]
# Of a batch: what tokens count in the objective, where it is not "decoder_loss_weights".
OBJECTIVE_WEIGHTS = "decoder_objective_weights"
# Of a batch: `token_losses` of a frozen model that the losses are compared with.
REFERENCE_LOSSES = "decoder_reference_losses"


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


@dataclasses.dataclass(frozen=True)
class Shared:
    """How tasks share parameters, in one step.

    Attributes:
      plan: who owns what. A microbatch must hold one task, or tasks with the same parameters.
      step: int32 scalar, updates done so far.
    """

    plan: SharingPlan
    step: jax.Array

    def plain(self, params: model.Params, batch: Batch) -> model.Params:
        """The parameters of the plain T5 of the batch's task."""
        return tree.plain(self.plan, params, jnp.max(batch["decoder_task_ids"]))

    def mixed(self, batch: Batch, microbatches: int) -> jax.Array:
        """Whether a microbatch holds tasks that the plan gives different parameters."""
        if not self.plan.by_task:
            return jnp.bool_(False)
        alike = (0, *(self.plan.evaluation_id(name) for name in self.plan.names))
        ids_BT = jnp.asarray(alike, jnp.int32)[batch["decoder_task_ids"]]
        ids_MRT = split_microbatches({"ids": ids_BT}, microbatches)["ids"]
        highest_M11 = jnp.max(ids_MRT, axis=(1, 2), keepdims=True)
        return jnp.any((ids_MRT > 0) & (ids_MRT != highest_M11))

    def adversary(self, params: model.Params, batch: Batch, encoded_BLD: jax.Array) -> Metrics:
        """What the adversary finds in a microbatch; empty: there is none."""
        cfg = self.plan.rooms.adversary
        if not cfg.weight:
            return {}
        of_segments = batch["encoder_segment_ids"], batch["encoder_task_ids"]
        own = params["sharing"]["adversary"]
        total, count, told = adversary.loss(cfg, own, encoded_BLD, *of_segments, self.step)
        return {
            "adversary_loss_sum": total,
            "adversary_examples": count,
            "adversary_correct": told["adversary_correct"],
        }


def forward(
    cfg: T5Config, params: model.Params, batch: Batch, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Logits_BTV of a batch in the layout of the data stream (teacher forcing)."""
    return model.logits(cfg, params, hidden_states(cfg, params, batch, dropout_rng))


def hidden_states(
    cfg: T5Config, params: model.Params, batch: Batch, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Hidden_BTD of the decoder, before the output layer."""
    return _decoded(cfg, params, batch, _encoded(cfg, params, batch, dropout_rng), dropout_rng)


def _encoded(
    cfg: T5Config, params: model.Params, batch: Batch, dropout_rng: jax.Array | None
) -> jax.Array:
    return model.encode(
        cfg,
        params,
        batch["encoder_input_tokens"],
        batch["encoder_segment_ids"],
        dropout_rng=None if dropout_rng is None else jax.random.fold_in(dropout_rng, 0),
    )


def _decoded(
    cfg: T5Config,
    params: model.Params,
    batch: Batch,
    encoded_BLD: jax.Array,
    dropout_rng: jax.Array | None,
) -> jax.Array:
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
    weigh: Weigh | None = None,
    shared: Shared | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of token losses of a batch, and sums per task.

    Args:
      cfg: the model.
      step_cfg: the objective.
      num_tasks: number of real tasks; per-task vectors have `num_tasks + 1` entries, 0 is padding.
      params: tree of `model.init`.
      batch: see `data.py`; with "decoder_objective_weights", these weigh the tokens in the sum.
        "decoder_reference_losses" are those of another model (`token_losses`).
      dropout_rng: a PRNG key, or None for no dropout.
      weigh: float32 [N] that the tokens of each task are multiplied by in the scalar, or a function
        that makes it of the sums (not with `Step.loss_chunk`).
      shared: how tasks share parameters; `params` is then the tree of `sharing.tree.init`.

    Returns:
      (scalar, {"z_loss_sum": [], "task_loss_sum", "task_tokens", "task_correct": [N]}, and with
      "decoder_objective_weights" "task_objective_sum" and "task_mass": so weighed; with
      "decoder_reference_losses" "task_excess_sum", of what each token's cross-entropy is above the
      reference's, at least 0, and weighed as in the scalar; with an adversary
      "adversary_loss_sum", "adversary_examples" and "adversary_correct", which are no part of the
      scalar).
    """
    plain = params if shared is None else shared.plain(params, batch)
    encoded_BLD = _encoded(cfg, plain, batch, dropout_rng)
    weights_BT, ids_BT = batch["decoder_loss_weights"], batch["decoder_task_ids"]
    counted_BT = batch.get(OBJECTIVE_WEIGHTS, weights_BT)

    def sums_of(tokens: loss.TokenLosses) -> Metrics:
        of_tasks = functools.partial(per_task, ids_BT, num_tasks)
        sums = {
            "z_loss_sum": jnp.sum(tokens.z_loss * weights_BT),
            "task_loss_sum": of_tasks(tokens.loss * weights_BT),
            "task_tokens": of_tasks(weights_BT),
            "task_correct": of_tasks(tokens.correct * weights_BT),
        }
        if OBJECTIVE_WEIGHTS in batch:
            sums["task_objective_sum"] = of_tasks(tokens.loss * counted_BT)
            sums["task_mass"] = of_tasks(counted_BT)
        if REFERENCE_LOSSES in batch:
            above_BT = tokens.loss - tokens.z_loss - batch[REFERENCE_LOSSES]
            sums["task_excess_sum"] = of_tasks(jnp.maximum(above_BT, 0.0) * counted_BT)
        return sums

    # Behind a barrier, what follows is one program, so that weights of 1 change no bit of it.
    weights: Any = jax.lax.optimization_barrier(counted_BT)
    if callable(weigh):
        weights = lambda tokens: counted_BT * weigh(sums_of(tokens))[ids_BT]  # noqa: E731
    elif weigh is not None:
        weights = jax.lax.optimization_barrier(counted_BT * weigh[ids_BT])
    total, tokens = loss.weighted_loss(
        cfg,
        plain,
        _decoded(cfg, plain, batch, encoded_BLD, dropout_rng),
        batch["decoder_target_tokens"],
        weights,
        z_loss=step_cfg.z_loss,
        label_smoothing=step_cfg.label_smoothing,
        chunk=step_cfg.loss_chunk,
    )
    found = {} if shared is None else shared.adversary(params, batch, encoded_BLD)
    return total, sums_of(tokens) | found


def token_losses(
    cfg: T5Config,
    step_cfg: StepConfig,
    params: model.Params,
    batch: Batch,
    shared: Shared | None = None,
) -> jax.Array:
    """Float32 [B, T]: the cross-entropy of each target token, without dropout and z-loss.

    In the microbatches of the step, so that it needs no more memory, and under `shared` each has
    its task's parameters.
    """

    def part(rows: Batch) -> jax.Array:
        plain = params if shared is None else shared.plain(params, rows)
        _, tokens = loss.weighted_loss(
            cfg,
            plain,
            hidden_states(cfg, plain, rows),
            rows["decoder_target_tokens"],
            rows["decoder_loss_weights"],
            z_loss=0.0,
            label_smoothing=step_cfg.label_smoothing,
            chunk=step_cfg.loss_chunk,
        )
        return tokens.loss

    if step_cfg.microbatches == 1:
        return part(batch)
    losses_MRT = jax.lax.map(part, split_microbatches(batch, step_cfg.microbatches))
    return losses_MRT.swapaxes(0, 1).reshape(batch["decoder_target_tokens"].shape)


def per_task(ids_BT: jax.Array, num_tasks: int, values_BT: jax.Array) -> jax.Array:
    """Float32 [N]: sums of `values_BT` by task id, the padding's first."""
    return jax.ops.segment_sum(values_BT.reshape(-1), ids_BT.reshape(-1), num_tasks + 1)


def with_example_weights(batch: Batch) -> Batch:
    """The batch with "decoder_objective_weights": every example counts as one, however long.

    A target token weighs one over the length of its target, so that the sum of token losses is that
    of mean losses of examples, and the sum of weights the number of examples.
    """
    weights_BT, segments_BT = batch["decoder_loss_weights"], batch["decoder_segment_ids"]
    most = segments_BT.shape[1] + 1  # a segment has a token, so no row has more

    def lengths(weights_T: jax.Array, segments_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(weights_T, segments_T, most)[segments_T]

    lengths_BT = jax.vmap(lengths)(weights_BT, segments_BT)
    return batch | {OBJECTIVE_WEIGHTS: weights_BT / jnp.maximum(lengths_BT, 1.0)}


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
    weigh: Weigh | None = None,
    shared: Shared | None = None,
) -> tuple[model.Params, Metrics]:
    """Gradient of the mean token loss over the global batch, whatever the microbatches.

    The normaliser is the weight of all target tokens of the batch, taken before splitting; the
    microbatches are then summed (T5X normalises each one and sums, which changes the objective).
    The gradient is with respect to `params`; those in `frozen` (`optim.split`) are constants.
    `weigh` and `shared` are those of `loss_sum`; a function can be given as `weigh` with one
    microbatch only. An adversary's mean loss over the examples of the global batch is added.
    """
    examples = jnp.float32(1.0)
    if shared is not None and shared.plan.rooms.adversary.weight:
        exclude = shared.plan.rooms.adversary.exclude_prefix
        examples = jnp.maximum(adversary.count(batch["encoder_segment_ids"], exclude), 1.0)
    tokens = jnp.maximum(jnp.sum(batch.get(OBJECTIVE_WEIGHTS, batch["decoder_loss_weights"])), 1.0)

    def part(rng: jax.Array | None, rows: Batch) -> tuple[model.Params, Metrics]:
        def objective(params: model.Params) -> tuple[jax.Array, Metrics]:
            whole = optim.merge(params, frozen)
            total, sums = loss_sum(cfg, step_cfg, num_tasks, whole, rows, rng, weigh, shared)
            total = total / tokens
            if "adversary_loss_sum" in sums:
                total = total + sums["adversary_loss_sum"] / examples
            return total, sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, sums

    return over_microbatches(step_cfg, part, batch, dropout_rng)


def over_microbatches(
    step_cfg: StepConfig,
    part: Callable[[jax.Array | None, Batch], Any],
    batch: Batch,
    dropout_rng: jax.Array | None,
) -> Any:
    """The sum of `part(PRNG key, rows)` over the microbatches of a batch."""
    if step_cfg.microbatches == 1:
        return part(dropout_rng, batch)
    parts = split_microbatches(batch, step_cfg.microbatches)

    def body(total: Any, numbered: Any) -> tuple[Any, None]:
        index, rows = numbered
        return jax.tree.map(jnp.add, total, part(part_rng(dropout_rng, index), rows)), None

    shapes = jax.eval_shape(part, dropout_rng, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    numbers = jnp.arange(step_cfg.microbatches, dtype=jnp.int32)
    return jax.lax.scan(body, zeros, (numbers, parts))[0]


def part_rng(dropout_rng: jax.Array | None, index: jax.Array) -> jax.Array | None:
    """The PRNG key of a microbatch."""
    return None if dropout_rng is None else jax.random.fold_in(dropout_rng, index)

"""The gradient of one batch under a method of `balance/`: what is observed, and how it is weighed.

Letters: N tasks without padding, as `Balance.by` counts them, K groups of parameters,
M microbatches, S SeqIO tasks with padding (`objective.py`'s N).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import model, objective, optim
from mtl_jax.balance import groups, lookahead, task_gradients
from mtl_jax.balance.balancer import Balancer
from mtl_jax.balance.method import GRAM, LOSSES, LOSSES_AFTER, Observations
from mtl_jax.balance.task_gradients import TaskGradients
from mtl_jax.model_config import T5Config
from mtl_jax.objective import OBJECTIVE_WEIGHTS, REFERENCE_LOSSES, Batch, Metrics, StepConfig

BalanceState = Any
BALANCE_IDS = task_gradients.TASK_IDS
# (gradients, sums, weights [K, N], state, what the method logs, what single tasks' gradients tell)
_Result = tuple[model.Params, Metrics, jax.Array, BalanceState, Metrics, Metrics]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One step's model, objective and method; its functions are traced.

    Attributes:
      cfg: the model.
      step_cfg: the objective.
      balancer: the method.
      frozen: parameters that are not trained (`optim.split`).
      dropout_rng: of this step; None: no dropout.
      shared: how tasks share parameters; None: all of them.
      rate: float32 scalar, the learning rate of this step, where `Balance.affinity_every` looks
        ahead by it.
    """

    cfg: T5Config
    step_cfg: StepConfig
    balancer: Balancer
    frozen: model.Params
    dropout_rng: jax.Array | None
    shared: objective.Shared | None = None
    rate: jax.Array | None = None

    @property
    def _tasks(self) -> int:
        return len(self.balancer.names)

    @property
    def _seqio_tasks(self) -> int:
        return len(self.balancer.of_task) - 1

    @property
    def _of_task_S(self) -> jax.Array:
        return jnp.asarray(self.balancer.of_task, jnp.int32)

    def prepared(
        self,
        batch: Batch,
        reference: model.Params | None = None,
        step: jax.Array | int = 0,
    ) -> Batch:
        """The batch with the method's own task ids, and what tokens count in the objective.

        Args:
          batch: one global batch.
          reference: parameters of the frozen model, where the method asks for one; its losses are
            put into the batch.
          step: int32 scalar, updates done so far; the reference is not computed at every one
            (`Method.reference_every`).
        """
        if self.balancer.cfg.reduction == "example_mean":
            batch = objective.with_example_weights(batch)
        if reference is not None:
            batch = batch | {REFERENCE_LOSSES: self._reference_losses(reference, batch, step)}
        return batch | {BALANCE_IDS: self._of_task_S[batch["decoder_task_ids"]]}

    def _reference_losses(
        self, reference: model.Params, batch: Batch, step: jax.Array | int
    ) -> jax.Array:
        look = lambda: objective.token_losses(  # noqa: E731
            *(self.cfg, self.step_cfg, reference, batch, self.shared)
        )
        assert self.balancer.method is not None
        every = self.balancer.method.reference_every
        if every == 1:
            return look()
        # Above everything: nothing is in excess of it.
        none = jnp.full(batch["decoder_target_tokens"].shape, jnp.inf, jnp.float32)
        return jax.lax.cond(step % every == 0, look, lambda: none)

    def observations(self, batch: Batch, step: jax.Array, rng: jax.Array) -> Observations:
        """What is known before the forward pass; losses are zeros yet.

        Args:
          batch: of `prepared`.
          step: int32 scalar, updates done so far.
          rng: the run's PRNG key.
        """
        counted_BT = batch.get(OBJECTIVE_WEIGHTS, batch["decoder_loss_weights"])
        tokens_N = objective.per_task(batch[BALANCE_IDS], self._tasks, counted_BT)[1:]
        # Behind a barrier, or the compiler may make them twice, and not in the same way.
        shares_N = jax.lax.optimization_barrier(tokens_N / jnp.maximum(jnp.sum(tokens_N), 1.0))
        zeros = jnp.zeros_like(tokens_N)
        return Observations(
            step=step,
            tokens=tokens_N,
            shares=shares_N,
            losses=zeros,
            correct=zeros,
            gram=None,
            excess=None,
            # Apart from what dropout folds in: a method's numbers are its own.
            rng=jax.random.fold_in(jax.random.fold_in(rng, 0x6D746C), step),
            names=self.balancer.names,
        )

    def gradients(
        self, params: model.Params, batch: Batch, state: BalanceState, seen: Observations
    ) -> tuple[model.Params, Metrics, BalanceState, Metrics]:
        """The gradient of the weighted objective.

        Args:
          params: what is trained.
          batch: of `prepared`.
          state: of the method.
          seen: of `observations`.

        Returns:
          (gradients, sums of `objective.loss_sum`, the method's state, and to log:
          "balance_weight" [K, N], "balance_present" [N]; with gradients of single tasks "gram"
          [K, N, N], "split_half_cosine" [K, N], "gradients_seen" (whether in this step) and
          "mixed_microbatches"; with `Balance.affinity_every` "affinity" [N, N], NaN in steps
          without; "balance/..." as the method has it).
        """
        every = self.balancer.every
        with_gram = lambda: self._with_gram(params, batch, state, seen)  # noqa: E731
        without = lambda: self._without_gram(params, batch, state, seen)  # noqa: E731
        if every == 0:
            result, looked = without(), jnp.bool_(False)
        elif every == 1:
            result, looked = with_gram(), jnp.bool_(True)
        else:
            looked = seen.step % every == 0
            result = jax.lax.cond(looked, with_gram, without)
        grads, sums, weights_KN, state, logs, of_tasks = result
        told = {"balance_weight": weights_KN, "balance_present": seen.present}
        told |= {f"balance/{name}": value for name, value in logs.items()}
        if every:
            told |= of_tasks | {"gradients_seen": looked}
        if self.balancer.wants_blocks:
            told["mixed_microbatches"] = ~task_gradients.one_task_each(self._blocks(batch))
        return grads, sums, state, told

    def observed(
        self,
        trained: model.Params,
        batch: Batch,
        state: BalanceState,
        seen: Observations,
        sums: Metrics,
    ) -> BalanceState:
        """The method's state after the update.

        Args:
          trained: parameters after the update.
          batch: of `prepared`.
          state: of `gradients`.
          seen: of `observations`.
          sums: of `gradients`.
        """
        after = None
        if self.balancer.needs(LOSSES_AFTER):
            whole = optim.merge(trained, self.frozen)
            after = self._losses(self._sums(whole, batch, self.dropout_rng))
        return self.balancer.observe(state, self._informed(seen, sums), after)

    # -----------------------------------------------------------------------------------------

    def _with_gram(
        self, params: model.Params, batch: Batch, state: BalanceState, seen: Observations
    ) -> _Result:
        """By way of the gradients of single tasks."""
        grouping, blocks = self.balancer.grouping, self._blocks(batch)
        part = self._part(params)
        found, sums = self._task_gradients(part, params, blocks, seen)
        seen = dataclasses.replace(self._informed(seen, sums), gram=found.gram)
        weights_KN, state, logs = self.balancer.weights(state, seen)
        factors_KN = self._factors(weights_KN, seen)
        if found.slots is not None:
            grads = groups.combine(grouping, found.slots, factors_KN)
        else:
            grads, sums = task_gradients.weighted_pass(grouping, part, params, blocks, factors_KN)
        of_tasks = {"gram": found.gram, "split_half_cosine": found.split_half}
        if self.balancer.cfg.affinity_every:
            of_tasks["affinity"] = self._affinity(found, params, batch, seen)
        return grads, sums, weights_KN, state, logs, of_tasks

    def _affinity(
        self, found: TaskGradients, params: model.Params, batch: Batch, seen: Observations
    ) -> jax.Array:
        """TAG's affinity [N, N] on this batch, with its dropout; NaN in a step without.

        The losses are computed in float32 whatever `T5.dtype`: in bfloat16 a step of the size of a
        learning rate is lost among the weights' digits.
        """
        rate = self.rate
        assert rate is not None
        exact = dataclasses.replace(
            self, cfg=dataclasses.replace(self.cfg, dtype="float32", logits_dtype="float32")
        )

        def losses(params: model.Params) -> jax.Array:
            whole = optim.merge(params, self.frozen)
            return exact._losses(exact._sums(whole, batch, self.dropout_rng))

        def measured() -> jax.Array:
            return lookahead.affinity(losses, params, found.slots, seen.tokens, rate)

        unknown_NN = jnp.full((self._tasks, self._tasks), jnp.nan, jnp.float32)
        due = seen.step % self.balancer.cfg.affinity_every == 0
        return jax.lax.cond(due, measured, lambda: unknown_NN)

    def _task_gradients(
        self, part: task_gradients.Part, params: model.Params, blocks: Batch, seen: Observations
    ) -> tuple[TaskGradients, Metrics]:
        balancer, given = self.balancer, (part, params, blocks, seen.tokens)
        how = balancer.cfg.task_gradients
        if how == "sketch":
            # Other places and signs at every step, so that errors do not add up.
            seed = jax.random.bits(jax.random.fold_in(seen.rng, 1))
            size = balancer.cfg.sketch_size
            return task_gradients.by_sketch(balancer.grouping, size, seed, *given)
        make = {"microbatch": task_gradients.by_microbatch, "vmap": task_gradients.by_vmap}[how]
        return make(balancer.grouping, balancer.axes, *given)

    def _without_gram(
        self, params: model.Params, batch: Batch, state: BalanceState, seen: Observations
    ) -> _Result:
        """One backward pass of the weighted objective."""
        if self.balancer.needs(GRAM):
            return self._between_solutions(params, batch, state, seen)
        weigh: objective.Weigh | None = None
        if self.balancer.needs(LOSSES) and self._one_pass:
            # The losses of this very pass: the weights are made before it turns back.
            before = state
            weigh = lambda sums: self._ratios(  # noqa: E731
                self.balancer.weights(before, self._informed(seen, sums))[0], seen
            )
            grads, sums = self._weighted(params, batch, weigh)
            seen = self._informed(seen, sums)
            weights_KN, state, logs = self.balancer.weights(state, seen)
        else:
            if self.balancer.needs(LOSSES):
                whole = optim.merge(params, self.frozen)
                seen = self._informed(seen, self._sums(whole, batch, self.dropout_rng))
            weights_KN, state, logs = self.balancer.weights(state, seen)
            if self.balancer.method is not None:
                weigh = self._ratios(weights_KN, seen)
            grads, sums = self._weighted(params, batch, weigh)
        return grads, sums, weights_KN, state, logs, self._unseen()

    def _between_solutions(
        self, params: model.Params, batch: Batch, state: BalanceState, seen: Observations
    ) -> _Result:
        """With the weights of the last solution."""
        unseen = self._unseen()
        weights_KN = self.balancer.held_weights(state, seen)
        if self.balancer.grouping.size == 1:
            grads, sums = self._weighted(params, batch, self._ratios(weights_KN, seen))
        else:
            factors_KN = self._factors(weights_KN, seen)
            part, blocks = self._part(params), self._blocks(batch)
            grads, sums = task_gradients.weighted_pass(
                self.balancer.grouping, part, params, blocks, factors_KN
            )
        # Nothing is solved, nothing is logged: zeros of the same shapes.
        solve = lambda gram: self.balancer.weights(state, dataclasses.replace(seen, gram=gram))[2]  # noqa: E731
        logs = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(solve, unseen["gram"])
        )
        return grads, sums, weights_KN, state, logs, unseen

    @property
    def _one_pass(self) -> bool:
        """Whether the losses of the whole batch are there before any gradient is made."""
        return self.step_cfg.microbatches == 1 and not self.step_cfg.loss_chunk

    def _unseen(self) -> Metrics:
        """In the place of what gradients of single tasks tell, where none were looked at."""
        shape, tasks = (self.balancer.grouping.size, self._tasks), self._tasks
        unseen = {
            "gram": jnp.zeros((*shape, tasks), jnp.float32),
            "split_half_cosine": jnp.zeros(shape, jnp.float32),
        }
        if self.balancer.cfg.affinity_every:
            unseen["affinity"] = jnp.full((tasks, tasks), jnp.nan, jnp.float32)
        return unseen

    def _ratios(self, weights_KN: jax.Array, seen: Observations) -> jax.Array:
        """[S] that token losses are multiplied by before their mean over all tokens.

        1 exactly where a weight is the task's share of the tokens, so that such weights change no
        bit of the plain objective.
        """
        shares_N = jnp.where(seen.present, seen.shares, 1.0)
        ratios_N = jnp.where(seen.present, weights_KN[0] / shares_N, 0.0)
        return jnp.concatenate([jnp.zeros(1, jnp.float32), ratios_N])[self._of_task_S]

    def _factors(self, weights_KN: jax.Array, seen: Observations) -> jax.Array:
        """[K, N] that gradients of summed token losses are multiplied by."""
        factors_KN = weights_KN / jnp.maximum(seen.tokens, 1.0)[None]
        return jnp.broadcast_to(factors_KN, (self.balancer.grouping.size, self._tasks))

    def _weighted(
        self, params: model.Params, batch: Batch, weigh: objective.Weigh | None
    ) -> tuple[model.Params, Metrics]:
        return objective.gradients(
            *(self.cfg, self.step_cfg, self._seqio_tasks, params, batch),
            *(self.dropout_rng, self.frozen, weigh, self.shared),
        )

    def _part(self, params: model.Params) -> task_gradients.Part:
        """Gradients of the sum of token losses of one microbatch, each times its task's weight."""

        def part(rows: Batch, index: jax.Array, weights: jax.Array) -> Any:
            several = self.step_cfg.microbatches > 1
            rng = objective.part_rng(self.dropout_rng, index) if several else self.dropout_rng

            def total(params: model.Params) -> tuple[jax.Array, Metrics]:
                whole = optim.merge(params, self.frozen)
                return objective.loss_sum(
                    *(self.cfg, self.step_cfg, self._seqio_tasks, whole, rows, rng),
                    weights[self._of_task_S],
                    self.shared,
                )

            (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
            return grads, sums

        return part

    def _blocks(self, batch: Batch) -> Batch:
        """[M, rows, length]: the microbatches."""
        return objective.split_microbatches(batch, self.step_cfg.microbatches)

    def _sums(self, params: model.Params, batch: Batch, dropout_rng: jax.Array | None) -> Metrics:
        """The sums of a forward pass alone."""
        return objective.over_microbatches(
            self.step_cfg,
            lambda rng, rows: objective.loss_sum(
                *(self.cfg, self.step_cfg, self._seqio_tasks, params, rows, rng),
                shared=self.shared,
            )[1],
            batch,
            dropout_rng,
        )

    def _losses(self, sums: Metrics) -> jax.Array:
        """Mean loss of each task, float32 [N]; 0 where it is absent."""
        name = "task_objective_sum" if "task_mass" in sums else "task_loss_sum"
        return self._mean(sums, name)

    def _mean(self, sums: Metrics, total: str) -> jax.Array:
        """Float32 [N]: a sum per SeqIO task as mean over what the objective counts; 0: absent."""
        mass = "task_mass" if "task_mass" in sums and total != "task_correct" else "task_tokens"
        total_N, count_N = (
            jax.ops.segment_sum(sums[x], self._of_task_S, self._tasks + 1)[1:]
            for x in (total, mass)
        )
        return total_N / jnp.where(count_N > 0, count_N, 1.0)

    def _informed(self, seen: Observations, sums: Metrics) -> Observations:
        """With the losses of this batch; no gradient goes through them."""
        sums = jax.lax.stop_gradient(sums)
        losses_N, correct_N = self._losses(sums), self._mean(sums, "task_correct")
        excess_N = self._mean(sums, "task_excess_sum") if "task_excess_sum" in sums else None
        return dataclasses.replace(seen, losses=losses_N, correct=correct_N, excess=excess_N)

"""One Evaluator, in training and alone: rank classification, scores of targets, and generation.

The examples of all tasks go through the model together, sorted into a few shapes, and come back to
their tasks for the metrics. Results are rows of `results.jsonl`, predictions one file per task.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import buckets, decode, results
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalConfig, EvalExample, EvalTask
from mtl_jax.model import Params
from mtl_jax.model_config import T5Config
from mtl_jax.placement import Placement
from mtl_jax.results import Outcome, Row
from mtl_jax.sharing import embeddings, tree
from mtl_jax.sharing.plan import SharingPlan

__all__ = [
    "EvalConfig",
    "EvalExample",
    "EvalTask",
    "Evaluator",
    "Placement",
]


class Evaluator:
    """Evaluates tasks; keep one for a whole run, since it holds the compiled functions."""

    def __init__(
        self,
        model_config: T5Config,
        placement: Placement | None,
        config: EvalConfig,
        plan: SharingPlan | None = None,
    ):
        """Sets up an evaluator; nothing is compiled yet.

        Args:
          model_config: the model; with a plan its `model_config`.
          placement: how batches are placed; None: on the default device.
          config: what is evaluated.
          plan: how tasks share parameters; a task that it does not know is evaluated as task 0.

        Raises:
          UserError: the batch cannot be spread evenly over the devices.
        """
        self._model, self._config = model_config, config
        self._placement = placement or Placement()
        if config.batch_size % self._placement.row_multiple:
            raise UserError(
                f"Eval.batch_size = {config.batch_size} must be a multiple of the "
                f"{self._placement.row_multiple} devices that share the rows of a batch."
            )
        self._sharing = None if plan is None or plan.empty else plan
        self._prompt = list(embeddings.prompt_ids(plan)) if plan is not None else []
        self._plain = jax.jit(self._plain_params)
        self._score = jax.jit(self._score_batch, static_argnames="num_choices")
        self._generate = jax.jit(self._generate_batch)
        self.compiled_shapes = 0  # batch shapes compiled so far

    def run(
        self,
        params: Params,
        tasks: Sequence[EvalTask],
        step: int,
        run_dir: str | Path | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Row]:
        """Evaluates `tasks` and writes `predictions/TASK.jsonl` and `results.jsonl`.

        Tasks whose examples have choices are ranked by summed log-likelihood; tasks with score
        metrics get the log-likelihoods of their targets; the others generate greedily.

        Args:
          params: of the model, or of the plan, on the devices.
          tasks: what to evaluate.
          step: of training, for the rows.
          run_dir: where to write; None writes nothing.
          progress: called with (rows done, rows in all) after each batch.

        Returns:
          One row per task and metric: task, dataset, prompt, family, trained, split, step, metric,
          value, n, truncated. The metrics "chance" and "majority" are the baselines of ranked
          tasks, in per cent.

        Raises:
          UserError: a task without examples, or with choices for a part of them; no space or no
            permission in the run directory.
        """
        for task in tasks:
            if not task.examples:
                raise UserError(f"Task {task.name!r} has no examples in split {task.split!r}.")
        outcomes = self._outcomes(params, tasks, progress)
        rows: list[Row] = []
        folder = Path(run_dir) if run_dir is not None and jax.process_index() == 0 else None
        for task, of_task in zip(tasks, outcomes, strict=True):
            results.warn(task)
            predictions = results.predicted_texts(task, of_task)
            rows += results.rows_of_task(task, of_task, predictions, step)
            if folder is not None:
                records = results.records(task, of_task, predictions, step)
                results.write_predictions(folder / "predictions", task.name, records)
        if folder is not None:
            results.append_results(folder, rows)
        return rows

    def _outcomes(
        self,
        params: Params,
        tasks: Sequence[EvalTask],
        progress: Callable[[int, int], None] | None,
    ) -> list[list[Outcome]]:
        outcomes = [[Outcome() for _ in task.examples] for task in tasks]
        ranks, scores, generations = [], [], []
        for task, of_task in zip(tasks, outcomes, strict=True):
            ranked = task.ranked
            group = 0 if self._sharing is None else self._sharing.evaluation_id(task.name)
            request = functools.partial(buckets.Request, group=group)
            for example, outcome in zip(task.examples, of_task, strict=True):
                inputs = [*self._prompt, *example.inputs]
                if ranked:
                    ranks.append(request((outcome, True), inputs, example.choice_tokens))
                if task.score_metric_fns:
                    scores.append(request((outcome, False), inputs, [example.targets]))
                if not ranked and (task.metric_fns or not task.score_metric_fns):
                    generations.append(request((outcome, task.eos_id), inputs))
        plan = functools.partial(
            buckets.plan,
            batch_size=self._config.batch_size,
            row_multiple=self._placement.row_multiple,
            max_shapes=self._config.max_shapes,
        )
        done, total = 0, len(ranks) + len(scores) + len(generations)
        widest = max((len(request.choices) for request in ranks + scores), default=1)
        run_scores = functools.partial(self._run_scores, num_choices=buckets.bucket(widest))
        to_score, to_generate = plan(ranks + scores), plan(generations)
        for group in sorted({batch.requests[0].group for batch in to_score + to_generate}):
            mine = self._params_of(params, group)
            for run, batches in ((run_scores, to_score), (self._run_generations, to_generate)):
                for rows in run(mine, [b for b in batches if b.requests[0].group == group]):
                    done += rows
                    if progress is not None:
                        progress(done, total)
        return outcomes

    def _params_of(self, params: Params, task: int) -> Params:
        """The parameters of the plain T5 of a task."""
        if self._sharing is None:
            return params
        with self._placement.context():
            return self._plain(params, np.int32(task))

    def _plain_params(self, params: Params, task: jax.Array) -> Params:
        assert self._sharing is not None
        return tree.plain(self._sharing, params, task)

    def _run_scores(
        self, params: Params, batches: Sequence[buckets.Batch], *, num_choices: int
    ) -> Iterator[int]:
        def dispatch(batch: buckets.Batch) -> Any:
            choices = [request.choices for request in batch.requests]
            packed = decode.pack_choices(choices, batch.rows, batch.targets_length)
            arrays = dict(zip(("inputs", "targets", "segments"), packed, strict=True))
            arrays |= batch.encoder_arrays()
            return self._score(params, self._placement.put(arrays), num_choices=num_choices)

        for batch, (scores_BC, lengths_BC) in self._placement.pipelined(batches, dispatch):
            for i, request in enumerate(batch.requests):
                (outcome, ranked), count = request.key, len(request.choices)
                if ranked:
                    outcome.scores = scores_BC[i, :count]
                    outcome.choice_lengths = lengths_BC[i, :count]
                else:
                    outcome.target_score = float(scores_BC[i, 0])
            yield len(batch.requests)

    def _run_generations(self, params: Params, batches: Sequence[buckets.Batch]) -> Iterator[int]:
        def dispatch(batch: buckets.Batch) -> Any:
            # One for each row, so that tasks of several vocabularies share batches and shapes.
            eos_ids_B1: np.ndarray = np.full((batch.rows, 1), -1, np.int32)
            eos_ids_B1[: len(batch.requests), 0] = [request.key[1] for request in batch.requests]
            arrays = batch.encoder_arrays() | {"eos_ids": eos_ids_B1}
            return self._generate(params, self._placement.put(arrays))

        for batch, tokens_BT in self._placement.pipelined(batches, dispatch):
            for i, request in enumerate(batch.requests):
                outcome, eos_id = request.key
                outcome.generated = _text_tokens(tokens_BT[i].tolist(), eos_id)
            yield len(batch.requests)

    def _score_batch(self, params: Params, batch: dict[str, Any], *, num_choices: int) -> Any:
        self.compiled_shapes += 1  # this body runs only when it is traced
        return self._placement.replicate(
            decode.score_choices(
                self._model,
                params,
                batch["encoder_inputs"],
                batch["encoder_segments"],
                batch["inputs"],
                batch["targets"],
                batch["segments"],
                num_choices,
            )
        )

    def _generate_batch(self, params: Params, batch: dict[str, Any]) -> Any:
        self.compiled_shapes += 1
        return self._placement.replicate(
            decode.greedy(
                self._model,
                params,
                batch["encoder_inputs"],
                batch["encoder_segments"],
                self._config.max_decode_length,
                batch["eos_ids"][:, 0],
            )
        )


def _text_tokens(generated: list[int], eos_id: int) -> list[int]:
    """What was generated before the end of sequence, without padding."""
    end = generated.index(eos_id) if eos_id in generated else len(generated)
    return [token for token in generated[:end] if token != 0]

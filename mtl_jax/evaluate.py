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

__all__ = [
    "EvalConfig",
    "EvalExample",
    "EvalTask",
    "Evaluator",
    "Placement",
]


class Evaluator:
    """Evaluates tasks; keep one for a whole run, since it holds the compiled functions."""

    def __init__(self, model_config: T5Config, placement: Placement | None, config: EvalConfig):
        """Sets up an evaluator; nothing is compiled yet.

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
          params: of the model, on the devices.
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
            for example, outcome in zip(task.examples, of_task, strict=True):
                if ranked:
                    ranks.append(
                        buckets.Request((outcome, True), example.inputs, example.choice_tokens)
                    )
                if task.score_metric_fns:
                    scores.append(
                        buckets.Request((outcome, False), example.inputs, [example.targets])
                    )
                if not ranked and (task.metric_fns or not task.score_metric_fns):
                    generations.append(buckets.Request((outcome, task.eos_id), example.inputs))
        plan = functools.partial(
            buckets.plan,
            batch_size=self._config.batch_size,
            row_multiple=self._placement.row_multiple,
            max_shapes=self._config.max_shapes,
        )
        done, total = 0, len(ranks) + len(scores) + len(generations)
        finished = (
            self._run_scores(params, plan(ranks + scores)),
            self._run_generations(params, plan(generations)),
        )
        for batches in finished:
            for rows in batches:
                done += rows
                if progress is not None:
                    progress(done, total)
        return outcomes

    def _run_scores(self, params: Params, batches: Sequence[buckets.Batch]) -> Iterator[int]:
        widest = max((len(r.choices) for batch in batches for r in batch.requests), default=1)
        num_choices = buckets.bucket(widest)

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

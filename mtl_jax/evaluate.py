"""One Evaluator, in training and alone: rank classification, scores of targets, and generation.

The examples of all tasks go through the model together, sorted into a few shapes, and come back to
their tasks for the metrics. Results are rows of `results.jsonl`, predictions one file per task.
The `Engine`, which asks the model, is also that of sweeps.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

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
    "Answer",
    "Engine",
    "EvalConfig",
    "EvalExample",
    "EvalTask",
    "Evaluator",
    "Placement",
]

_PREPARED = 2  # batches laid out ahead of the device
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said about one row.

    Attributes:
      scores: float32 [C], summed log-probabilities of the choices; empty where it generated.
      last: float32 [C], the part of the last token in each sum.
      lengths: int32 [C], tokens of each choice.
      tokens: what was generated, up to the end of sequence, without it.
    """

    scores: np.ndarray
    last: np.ndarray
    lengths: np.ndarray
    tokens: list[int]


_NOTHING: np.ndarray = np.zeros(0, np.float32)


class Engine:
    """Asks a model about rows, batch by batch; keep it, since it holds the compiled functions.

    While the device works on a batch, the next one waits for it, and a thread lays out those after.

    Attributes:
      prompt: tokens in front of every input, whose vectors the sharing plan trained.
      compiled_shapes: batch shapes compiled so far.
      compile_seconds: what that took.
    """

    def __init__(
        self, model_config: T5Config, placement: Placement | None, plan: SharingPlan | None = None
    ):
        """Nothing is compiled yet.

        Args:
          model_config: the model; with a plan its `model_config`.
          placement: how batches are placed; None: on the default device.
          plan: how tasks share parameters; a task that it does not know is evaluated as task 0.
        """
        self._model = model_config
        self._placement = placement or Placement()
        self._sharing = None if plan is None or plan.empty else plan
        self.prompt = list(embeddings.prompt_ids(plan)) if plan is not None else []
        self._plain = jax.jit(self._plain_params)
        self._score = jax.jit(self._score_batch, static_argnames="num_choices")
        self._generate = jax.jit(self._generate_batch, static_argnames="max_length")
        self._mine: tuple[Params, int, Params] | None = None  # of the last group
        self.compiled_shapes = 0
        self.compile_seconds = 0.0

    def group(self, task: str) -> int:
        """Whose parameters answer for a task: the `group` of its rows."""
        return 0 if self._sharing is None else self._sharing.evaluation_id(task)

    def answers(
        self, params: Params, batches: Iterable[buckets.Batch], num_choices: int
    ) -> Iterator[tuple[buckets.Batch, list[Answer]]]:
        """Puts rows to the model.

        Args:
          params: of the model, or of the plan, on the devices.
          batches: taken from the iterable in a thread, a few ahead.
          num_choices: at least as many as any row has; the same for all calls compiles least.

        Yields:
          Each batch with an answer for each of its requests, in the order of the batches.
        """

        def dispatch(prepared: tuple[buckets.Batch, dict[str, np.ndarray]]) -> Any:
            batch, arrays = prepared
            before, start = self.compiled_shapes, time.perf_counter()
            first = batch.requests[0]
            mine, placed = self._params_of(params, first.group), self._placement.put(arrays)
            if first.choices:
                result = self._score(mine, placed, num_choices=num_choices)
            else:
                result = self._generate(mine, placed, max_length=first.max_length)
            if self.compiled_shapes > before:
                self.compile_seconds += time.perf_counter() - start
            return result

        prepared = _ahead(map(_laid_out, batches), _PREPARED)
        for (batch, _), result in self._placement.pipelined(prepared, dispatch):
            yield batch, [_answer(request, result, i) for i, request in enumerate(batch.requests)]
        self._mine = None

    def lowered(
        self, params: Params, batch: buckets.Batch, num_choices: int, place: Any
    ) -> jax.stages.Lowered:
        """The program that `answers` runs for a batch of this shape, traced from shapes alone.

        Args:
          params: of a plain T5, as shapes with shardings.
          batch: of which only the shape matters; without choices it generates.
          num_choices: as in `answers`.
          place: the sharding of the batch.
        """
        arrays = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
            for name, array in _laid_out(batch)[1].items()
        }
        first = batch.requests[0]
        with self._placement.context():
            if first.choices:
                return self._score.lower(params, arrays, num_choices=num_choices)
            return self._generate.lower(params, arrays, max_length=first.max_length)

    def lowered_plain(self, params: Params) -> jax.stages.Lowered | None:
        """The program that makes a task's plain T5 of the plan's parameters; None: they are one."""
        if self._sharing is None:
            return None
        task = jax.ShapeDtypeStruct((), np.int32)
        with self._placement.context():
            return self._plain.lower(params, task)

    def _params_of(self, params: Params, task: int) -> Params:
        """The parameters of the plain T5 of a task."""
        if self._sharing is None:
            return params
        if self._mine is None or self._mine[0] is not params or self._mine[1] != task:
            self._mine = None  # frees the last one's memory first
            self._mine = params, task, self._plain(params, np.int32(task))
        return self._mine[2]

    def _plain_params(self, params: Params, task: jax.Array) -> Params:
        assert self._sharing is not None
        return tree.plain(self._sharing, params, task)

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

    def _generate_batch(self, params: Params, batch: dict[str, Any], *, max_length: int) -> Any:
        self.compiled_shapes += 1
        return self._placement.replicate(
            decode.greedy(
                self._model,
                params,
                batch["encoder_inputs"],
                batch["encoder_segments"],
                max_length,
                batch["eos_ids"][:, 0],
            )
        )


def _laid_out(batch: buckets.Batch) -> tuple[buckets.Batch, dict[str, np.ndarray]]:
    """A batch with its arrays, int32 [rows, length]."""
    arrays = batch.encoder_arrays()
    if batch.requests[0].choices:
        choices = [request.choices for request in batch.requests]
        packed = decode.pack_choices(choices, batch.rows, batch.targets_length)
        arrays |= dict(zip(("inputs", "targets", "segments"), packed, strict=True))
    else:
        # One for each row, so that tasks of several vocabularies share batches and shapes.
        arrays["eos_ids"] = np.full((batch.rows, 1), -1, np.int32)
        arrays["eos_ids"][: len(batch.requests), 0] = [r.eos_id for r in batch.requests]
    return batch, arrays


def _answer(request: buckets.Request, result: Any, row: int) -> Answer:
    if not request.choices:
        return Answer(_NOTHING, _NOTHING, _NOTHING, _text_tokens(result[row], request.eos_id))
    scores_C, lengths_C, last_C = (column[row, : len(request.choices)] for column in result)
    return Answer(scores_C, last_C, lengths_C, [])


def _text_tokens(generated: np.ndarray, eos_id: int) -> list[int]:
    """What was generated before the end of sequence, without padding."""
    tokens = generated.tolist()
    end = tokens.index(eos_id) if eos_id in tokens else len(tokens)
    return [token for token in tokens[:end] if token != 0]


def _ahead(items: Iterable[_Item], depth: int) -> Iterator[_Item]:
    """The items, made by a thread at most `depth` ahead; what it raises is raised here."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(is_item: bool, value: Any) -> None:
        while not stop.is_set():
            try:
                return made.put((is_item, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = made.get()
            if is_item:
                yield value
            elif value is not None:
                raise value
            else:
                return
    finally:
        stop.set()
        thread.join()


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
        self._config = config
        self._row_multiple = (placement or Placement()).row_multiple
        if config.batch_size % self._row_multiple:
            raise UserError(
                f"Eval.batch_size = {config.batch_size} must be a multiple of the "
                f"{self._row_multiple} devices that share the rows of a batch."
            )
        self._engine = Engine(model_config, placement, plan)

    @property
    def engine(self) -> Engine:
        """What asks the model."""
        return self._engine

    @property
    def compiled_shapes(self) -> int:
        """Batch shapes compiled so far."""
        return self._engine.compiled_shapes

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
          One row per task and metric: task, dataset, prompt, family, trained, original, language,
          split, step, metric, value, n, truncated. The metrics "chance" and "majority" are the
          baselines of ranked tasks, in per cent.

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
        scores, generations = [], []
        for task, of_task in zip(tasks, outcomes, strict=True):
            ranked, group = task.ranked, self._engine.group(task.name)
            for example, outcome in zip(task.examples, of_task, strict=True):
                inputs = [*self._engine.prompt, *example.inputs]
                if ranked:
                    choices = example.choice_tokens
                    scores.append(buckets.Request((outcome, True), inputs, choices, group))
                if task.score_metric_fns:
                    targets = [example.targets]
                    scores.append(buckets.Request((outcome, False), inputs, targets, group))
                if not ranked and (task.metric_fns or not task.score_metric_fns):
                    longest = self._config.max_decode_length
                    generations.append(
                        buckets.Request((outcome, False), inputs, (), group, longest, task.eos_id)
                    )
        widest = max((len(request.choices) for request in scores), default=1)
        shape = self._config.batch_size, self._row_multiple, self._config.max_shapes
        batches = [*buckets.plan(scores, *shape), *buckets.plan(generations, *shape)]
        batches.sort(key=lambda batch: batch.requests[0].group)
        done, total = 0, len(scores) + len(generations)
        for batch, answers in self._engine.answers(params, batches, buckets.bucket(widest)):
            for request, answer in zip(batch.requests, answers, strict=True):
                outcome, ranked = request.key
                if not request.choices:
                    outcome.generated = answer.tokens
                elif ranked:
                    outcome.scores, outcome.choice_lengths = answer.scores, answer.lengths
                else:
                    outcome.target_score = float(answer.scores[0])
            done += len(answers)
            if progress is not None:
                progress(done, total)
        return outcomes

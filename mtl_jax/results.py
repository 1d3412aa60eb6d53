"""From what the model said to metrics, rows of `results.jsonl` and files of predictions."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import metrics
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalExample, EvalTask
from mtl_jax.storage import append_text, replace_text, storage_errors

logger = logging.getLogger(__name__)

BASELINES = ("chance", "majority")
_TRUNCATION_WARNING = 0.01  # a larger share of shortened examples is worth a line

Row = dict[str, Any]


@dataclasses.dataclass
class Outcome:
    """What the model said about one example."""

    scores: np.ndarray | None = None  # [C] of the choices
    choice_lengths: np.ndarray | None = None  # [C]
    target_score: float | None = None
    generated: list[int] | None = None


def baselines(examples: Sequence[EvalExample]) -> dict[str, float]:
    """Chance and majority class of examples with choices, in per cent.

    Chance picks one of an example's choices at random; majority always picks the position among
    the choices at which the right answer stands most often.
    """
    chances = [e.choices.count(e.targets_text) / len(e.choices) for e in examples]
    position = majority_position(examples)
    at_position = [e.choices[position : position + 1] == [e.targets_text] for e in examples]
    return {
        "chance": 100.0 * float(np.mean(chances)),
        "majority": 100.0 * float(np.mean(at_position)),
    }


def majority_position(examples: Sequence[EvalExample]) -> int:
    """The position among the choices at which the right answer stands most often."""
    positions = Counter(
        e.choices.index(e.targets_text) for e in examples if e.targets_text in e.choices
    )
    return max(positions, key=positions.__getitem__, default=0)


def warn(task: EvalTask) -> None:
    """Logs a line if more than 1 % of the examples were cut, or targets are not among choices."""
    count = len(task.examples)
    if task.truncated > _TRUNCATION_WARNING * count:
        logger.warning(
            "%s: %d of %d examples (%.1f %%) were cut to fit Eval.inputs_length or "
            "Eval.targets_length.",
            task.name,
            task.truncated,
            count,
            100 * task.truncated / count,
        )
    lost = sum(bool(e.choices) and e.targets_text not in e.choices for e in task.examples)
    if lost:
        logger.warning(
            "%s: in %d of %d examples the target is not among the choices; they count as wrong.",
            task.name,
            lost,
            count,
        )


def predicted_texts(task: EvalTask, outcomes: Sequence[Outcome]) -> list[str] | None:
    """The chosen or generated texts; None for a task that only scores its targets.

    Raises:
      UserError: the scores of choices are not finite.
    """
    texts = []
    for example, outcome in zip(task.examples, outcomes, strict=True):
        if outcome.scores is not None:
            texts.append(example.choices[largest(outcome.scores, example.index)])
        elif outcome.generated is not None:
            texts.append(task.detokenize(outcome.generated))
        else:
            return None
    return texts


def largest(values: np.ndarray, index: int) -> int:
    """The position of the first largest value of an example's choices.

    Args:
      values: float [C].
      index: of the example, for the message.

    Raises:
      UserError: a value is not finite; the largest of such values says nothing about the model.
    """
    if not np.isfinite(values).all():
        raise UserError(
            f"the model's log-probabilities of example {index} are not finite: the checkpoint has "
            "diverged, or needs T5.dtype = 'float32'"
        )
    return int(np.argmax(values))


def processed(task: EvalTask, texts: Iterable[str], is_target: bool) -> list[Any]:
    """Texts, one for each example, as the task's postprocessor makes them for the metrics.

    Raises:
      UserError: the postprocessor fails.
    """
    if task.postprocess is None:
        return list(texts)
    made = []
    for text, example in zip(texts, task.examples, strict=True):
        try:
            made.append(task.postprocess(text, example=example.fields, is_target=is_target))
        except UserError:
            raise
        except Exception as error:  # whatever a user's function raises
            side = "the target" if is_target else "the answer"
            raise UserError(
                f"Task {task.name!r}: the postprocessor {function_name(task.postprocess)} fails on "
                f"{side} {text!r} of example {example.index}: {type(error).__name__}: {error}"
            ) from error
    return made


def function_name(fn: Callable[..., Any]) -> str:
    """A function's name for messages; a `functools.partial`, say, has none of its own."""
    return str(getattr(fn, "__name__", repr(fn)))


def rows_of_task(
    task: EvalTask,
    outcomes: Sequence[Outcome],
    predictions: Sequence[str] | None,
    step: int,
) -> list[Row]:
    """One row for each metric and baseline of a task; see `Evaluator.run`."""
    targets = processed(task, (example.targets_text for example in task.examples), True)
    values: dict[str, float] = {}
    if predictions is not None:
        answers = processed(task, predictions, False)
        for fn in task.metric_fns or ([metrics.accuracy] if task.ranked else []):
            values |= numbers(task.name, fn(targets, answers))
    for fn in task.score_metric_fns:
        values |= numbers(task.name, fn(targets, [outcome.target_score for outcome in outcomes]))
    if not values:
        logger.warning("%s has no metrics: only its predictions are written.", task.name)
    if task.ranked:
        values |= baselines(task.examples)
    facts = {
        "task": task.name,
        "dataset": task.info.dataset,
        "prompt": task.info.prompt,
        "family": task.info.family,
        "trained": task.info.trained,
        "original": task.info.original,
        "language": task.info.language,
        "split": task.split,
        "step": int(step),
    }
    counts = {"n": len(task.examples), "truncated": task.truncated}
    return [{**facts, "metric": name, "value": value, **counts} for name, value in values.items()]


def numbers(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Metric values as plain numbers; SeqIO wraps some of them (`.value`), and some are texts."""
    plain = {}
    for name, value in values.items():
        value = getattr(value, "value", value)
        try:
            plain[name] = float(value)
        except (TypeError, ValueError):
            logger.warning("%s: metric %s is no number and is left out.", task, name)
    return plain


def records(
    task: EvalTask,
    outcomes: Sequence[Outcome],
    predictions: Sequence[str] | None,
    step: int,
) -> Iterator[Row]:
    """One line of the predictions file for each example.

    Yields:
      index, step, inputs, targets; prediction where there is one; target_score for score metrics;
      and for ranked tasks choices, scores (summed log-probabilities), n_tokens, chosen, correct.
    """
    for i, (example, outcome) in enumerate(zip(task.examples, outcomes, strict=True)):
        record: Row = {
            "index": example.index,
            "step": int(step),
            "inputs": example.inputs_text,
            "targets": example.targets_text,
        }
        if predictions is not None:
            record["prediction"] = predictions[i]
        if outcome.target_score is not None:
            record["target_score"] = round(outcome.target_score, 6)
        if outcome.scores is not None and outcome.choice_lengths is not None:
            chosen = int(np.argmax(outcome.scores))
            record |= {
                "choices": example.choices,
                "scores": [round(float(score), 6) for score in outcome.scores],
                "n_tokens": outcome.choice_lengths.tolist(),
                "chosen": chosen,
                "correct": example.choices[chosen] == example.targets_text,
            }
        yield record


def _lines(records: Iterable[Row]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_predictions(folder: Path, task: str, records: Iterable[Row]) -> None:
    """Replaces `folder/TASK.jsonl` as a whole; makes the folder, but not the run directory.

    Raises:
      UserError: no space or no permission, or the run directory has vanished.
    """
    with storage_errors(f"write the predictions of {task}", folder):
        folder.mkdir(exist_ok=True)
        replace_text(folder / f"{task}.jsonl", _lines(records), parents=False)


def append_results(run_dir: Path, rows: Iterable[Row]) -> None:
    """Appends rows to `results.jsonl`, to which other processes may append at the same time.

    Raises:
      UserError: no space or no permission, or the run directory has vanished.
    """
    with storage_errors("append to results.jsonl", run_dir):
        append_text(run_dir / "results.jsonl", _lines(rows), shared=True)

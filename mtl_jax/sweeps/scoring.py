"""From the stored passes of a cell to its predictions and its rows of the table; no model runs."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax import metrics, results, sweep_files
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalExample, EvalTask
from mtl_jax.protocols import ChoiceScores, Protocol
from mtl_jax.sweep_files import CELL_FACTS, PREDICTIONS, RESULTS, Row
from mtl_jax.sweeps.cells import Cell, Question

_DRAWS = 20  # of random answers, where their expected score has no closed form

MetricFn = Callable[..., Mapping[str, Any]]
Baselines = list[tuple[str, dict[str, float]]]

# They depend on no checkpoint: made once for all cells of a question.
_BASELINES: weakref.WeakKeyDictionary[Question, dict[tuple[Protocol, ...], Baselines]]
_BASELINES = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one protocol, or a baseline, answers to the examples of a task.

    Attributes:
      texts: an answer for each example.
      values: of the choices, by which they were ranked; None: nothing was ranked.
    """

    texts: list[str]
    values: list[np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """The answers of a protocol and what they are worth.

    Attributes:
      answers: to each example.
      scores: of each example, 0 to 100.
      metrics: of the whole task.
    """

    answers: Answers
    scores: list[float]
    metrics: dict[str, float]


def is_scored(cell: Cell) -> bool:
    """Whether the table's rows of a cell are all there, and made as they would be made now."""
    if not (cell.folder / RESULTS).exists() or not (cell.folder / CELL_FACTS).exists():
        return False
    return sweep_files.read_facts(cell.folder).scoring == cell.scoring


def score(cell: Cell) -> list[str]:
    """Writes predictions.jsonl and results.jsonl of a cell whose passes are all on disk.

    Returns:
      Why protocols or baselines have no results; these are left out.

    Raises:
      UserError: a damaged pass, no space or no permission.
    """
    question = cell.question
    stored = {name: cell.stored(name) for name in question.passes}
    scored: dict[Protocol, Scored] = {}
    baselines: Baselines = []
    problems = []
    for protocol in question.protocols:
        try:
            scored[protocol] = _scored(question, protocol, stored)
        except UserError as error:
            problems.append(str(error))
    try:
        baselines = _baselines(question, tuple(scored))
    except UserError as error:
        problems.append(str(error))
    sweep_files.write_lines(cell.folder / PREDICTIONS, _predictions(question, scored))
    sweep_files.write_lines(cell.folder / RESULTS, _rows(cell, scored, baselines))
    return list(dict.fromkeys(problems))


def _scored(question: Question, protocol: Protocol, stored: Mapping[str, Sequence[Row]]) -> Scored:
    answers = _answers(question, protocol, stored)
    values = _metrics(question, [protocol], answers.texts)
    return Scored(answers, _example_scores(question, protocol, answers.texts), values)


def _answers(
    question: Question, protocol: Protocol, stored: Mapping[str, Sequence[Row]]
) -> Answers:
    names, examples = protocol.passes_for(question.ranked), question.task.examples
    if not protocol.ranks(question.ranked):
        return Answers([line["text"] for line in stored[names[0]]])
    values = []
    for i, example in enumerate(examples):
        passes = {name: _scores(stored[name][i]) for name in names}
        values.append(protocol.values(passes, example.choices))
    chosen = [
        example.choices[results.largest(of_example, example.index)]
        for example, of_example in zip(examples, values, strict=True)
    ]
    return Answers(chosen, values)


def _scores(line: Row) -> ChoiceScores:
    sums, eos = (np.array(line[name], np.float64) for name in ("sums", "eos"))  # null becomes NaN
    return ChoiceScores(sums, eos, np.array(line["n_tokens"]))


# ------------------------------------------------------------------------------- metrics


def _metrics(
    question: Question, protocols: Iterable[Protocol], texts: Sequence[str]
) -> dict[str, float]:
    """The values of all metrics that the protocols report, for answers in the order of examples."""
    values: dict[str, float] = {}
    for fns, protocol in _different(question, protocols):
        targets, answers = _compared(question.task, protocol, texts)
        for fn in fns:
            values |= _values(question, fn, targets, answers)
    return values


def _different(
    question: Question, protocols: Iterable[Protocol]
) -> list[tuple[tuple[MetricFn, ...], Protocol]]:
    """The protocols that differ in their metrics; most report the same ones."""
    return list({_metric_fns(question, protocol): protocol for protocol in protocols}.items())


def _metric_fns(question: Question, protocol: Protocol) -> tuple[MetricFn, ...]:
    return protocol.metric_fns(question.task.metric_fns, question.ranked)


def _compared(
    task: EvalTask, protocol: Protocol, texts: Sequence[str]
) -> tuple[list[Any], list[Any]]:
    """The targets and answers that the protocol's metrics compare."""
    right = [example.targets_text for example in task.examples]
    targets, answers = results.processed(task, right, True), results.processed(task, texts, False)
    return protocol.compared(targets, answers, right, texts)


def _values(
    question: Question, fn: MetricFn, targets: Sequence[Any], answers: Sequence[Any]
) -> dict[str, float]:
    try:
        return results.numbers(question.name, fn(targets, answers))
    except UserError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise UserError(
            f"the metric {results.function_name(fn)} fails on what the model said: "
            f"{type(error).__name__}: {error}"
        ) from error


def _rows(cell: Cell, scored: Mapping[Protocol, Scored], baselines: Baselines) -> list[Row]:
    """The rows of the table: metrics of each protocol, then baselines."""
    question = cell.question
    rows = []
    for protocol, of_protocol in scored.items():
        cut = max(question.truncated(name) for name in protocol.passes_for(question.ranked))
        rows += _table_rows(cell, protocol.name, of_protocol.metrics, cut)
    for name, values in baselines:
        rows += _table_rows(cell, name, values, 0)
    return rows


def _table_rows(cell: Cell, protocol: str, values: Mapping[str, float], cut: int) -> list[Row]:
    question, checkpoint, info = cell.question, cell.checkpoint, cell.question.info
    row: Row = {
        "run": checkpoint.run,
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "task": question.name,
        "dataset": info.dataset,
        "prompt": info.prompt,
        "family": info.family,
        "language": info.language,
        "original": info.original,
        "trained": cell.trained,
        "split": question.task.split,
        "shots": question.shots,
        "protocol": protocol,
        "metric": "",
        "value": 0.0,
        "n": len(question.task.examples),
        "truncated": cut,
        "skipped": question.task.skipped,
    }
    return [row | {"metric": name, "value": value} for name, value in values.items()]


# ------------------------------------------------------------------------------- baselines


def _baselines(question: Question, protocols: tuple[Protocol, ...]) -> Baselines:
    made = _BASELINES.setdefault(question, {})
    if protocols not in made:
        made[protocols] = _made_baselines(question, protocols)
    return made[protocols]


def _made_baselines(question: Question, protocols: Sequence[Protocol]) -> Baselines:
    examples = question.task.examples
    found: Baselines = []
    if question.ranked:
        found.append(("random", _random(question, protocols)))
        position = results.majority_position(examples)
        texts = [e.choices[position] if position < len(e.choices) else "" for e in examples]
        found.append(("majority", _metrics(question, protocols, texts)))
    else:
        # The question itself, without the instruction or the exemplars around it.
        texts = [str(example.fields.get("query", example.inputs_text)) for example in examples]
        found.append(("copy_input", _metrics(question, protocols, texts)))
    texts = [str(example.fields.get("demonstration") or "") for example in examples]
    if any(texts):  # an instruction may have some without any shots
        found.append(("copy_demonstration", _metrics(question, protocols, texts)))
    return found


def _random(question: Question, protocols: Sequence[Protocol]) -> dict[str, float]:
    """The expected score of a random choice: exact for means over examples, else of some draws."""
    examples = question.task.examples
    values: dict[str, float] = {}
    for fns, protocol in _different(question, protocols):
        draws = _drawn(question, protocol) if not all(map(metrics.per_example, fns)) else []
        for fn in fns:
            if metrics.per_example(fn):
                values |= _expected(question, protocol, fn)
            else:
                values |= _mean([(_values(question, fn, *draw), 1) for draw in draws])
    # That of others is also accuracy, if not marked as a mean.
    if "accuracy" in values and question.task.postprocess is None:
        values["accuracy"] = results.baselines(examples)["chance"]
    return values


def _expected(question: Question, protocol: Protocol, fn: MetricFn) -> dict[str, float]:
    """The mean over examples of the mean over choices of what a choice scores as the answer."""
    by_count: dict[int, list[EvalExample]] = {}
    for example in question.task.examples:
        by_count.setdefault(len(example.choices), []).append(example)
    parts = []
    for count, members in by_count.items():
        # All choices of all examples, as if each were an example: its mean is the mean of means.
        repeated = [example for example in members for _ in range(count)]
        texts = [choice for example in members for choice in example.choices]
        task = dataclasses.replace(question.task, examples=repeated)
        compared = _compared(task, protocol, texts)
        parts.append((_values(question, fn, *compared), len(members)))
    return _mean(parts)


def _drawn(question: Question, protocol: Protocol) -> list[tuple[list[Any], list[Any]]]:
    """Targets and answers for a few draws of random choices."""
    rng, examples = np.random.default_rng(0), question.task.examples
    drawn = (
        [e.choices[int(rng.integers(len(e.choices)))] for e in examples] for _ in range(_DRAWS)
    )
    return [_compared(question.task, protocol, texts) for texts in drawn]


def _mean(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """The weighted mean of values of the same names."""
    whole = sum(weight for _, weight in parts)
    return {
        name: float(sum(values[name] * weight for values, weight in parts) / whole)
        for name in parts[0][0]
    }


# ------------------------------------------------------------------------------- predictions


def _predictions(question: Question, scored: Mapping[Protocol, Scored]) -> list[Row]:
    task = question.task
    targets: list[Any] = [example.targets_text for example in task.examples]
    if scored:  # and so nothing is wrong with the targets
        targets = results.processed(task, targets, True)
    lines = []
    for i, example in enumerate(task.examples):
        by_protocol: dict[str, Row] = {}
        for protocol, of_protocol in scored.items():
            answers = of_protocol.answers
            entry: Row = {"prediction": answers.texts[i], "score": of_protocol.scores[i]}
            if answers.values is not None:
                entry["values"] = [round(float(value), 6) for value in answers.values[i]]
            by_protocol[protocol.name] = entry
        right = targets[i]
        several = isinstance(right, list | tuple) and all(isinstance(t, str) for t in right)
        lines.append(
            {
                "index": example.index,
                "inputs": example.inputs_text,
                "targets": list(right) if several else example.targets_text,
                "choices": example.choices,
                "by_protocol": by_protocol,
            }
        )
    return lines


def _example_scores(question: Question, protocol: Protocol, texts: Sequence[str]) -> list[float]:
    """0 to 100 for each example: the first metric, or exact match where that is of the whole."""
    targets, answers = _compared(question.task, protocol, texts)
    fns = _metric_fns(question, protocol)
    first = fns[0] if fns and metrics.per_example(fns[0]) else metrics.accuracy
    scores = []
    for target, answer in zip(targets, answers, strict=True):
        values = _values(question, first, [target], [answer])
        scores.append(round(next(iter(values.values())), 4))
    return scores

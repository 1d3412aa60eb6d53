"""From the stored passes of a cell to its predictions and its rows of the table; no model runs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax import metrics, results, sweep_files
from mtl_jax.errors import UserError
from mtl_jax.protocols import ChoiceScores, Protocol
from mtl_jax.storage import read_jsonl
from mtl_jax.sweep_files import PREDICTIONS, RESULTS, Row
from mtl_jax.sweeps.cells import Cell, Question

_DRAWS = 20  # of random answers, where their expected score has no closed form

MetricFn = Callable[..., Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one protocol, or a baseline, answers to the examples of a task.

    Attributes:
      texts: an answer for each example.
      values: of the choices, by which they were ranked; None: nothing was ranked.
    """

    texts: list[str]
    values: list[np.ndarray] | None = None


def is_scored(cell: Cell) -> bool:
    """Whether the table's rows of a cell are those of its protocols."""
    wanted = {protocol.name for protocol in cell.question.protocols}
    rows = read_jsonl(cell.folder / RESULTS)
    found = {row["protocol"] for row in rows} - set(sweep_files.BASELINES)
    facts = {(row["run"], row["trained"]) for row in rows}
    return found == wanted and facts == {(cell.checkpoint.run, cell.trained)}


def score(cell: Cell) -> list[str]:
    """Writes predictions.jsonl and results.jsonl of a cell whose passes are all on disk.

    Returns:
      Why protocols could not answer; these are left out.

    Raises:
      UserError: a damaged pass, no space or no permission.
    """
    question = cell.question
    stored = {name: cell.stored(name) for name in question.passes}
    answers, problems = {}, []
    for protocol in question.protocols:
        try:
            answers[protocol] = _answers(question, protocol, stored)
        except UserError as error:
            problems.append(str(error))
    sweep_files.write_lines(cell.folder / PREDICTIONS, _predictions(question, answers))
    # Last, because a cell that has these rows is done.
    sweep_files.write_lines(cell.folder / RESULTS, _rows(cell, answers))
    return problems


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
    chosen = [e.choices[int(np.argmax(v))] for e, v in zip(examples, values, strict=True)]
    return Answers(chosen, values)


def _scores(line: Row) -> ChoiceScores:
    return ChoiceScores(*(np.array(line[name]) for name in ("sums", "eos", "n_tokens")))


# ------------------------------------------------------------------------------- metrics


def _metrics(
    question: Question, protocols: Iterable[Protocol], texts: Sequence[str]
) -> dict[str, float]:
    """The values of all metrics that the protocols report, for answers in the order of examples."""
    values: dict[str, float] = {}
    # Most protocols report the same metrics.
    for fns, protocol in {_metric_fns(question, p): p for p in protocols}.items():
        targets, answers = _compared(question, protocol, texts)
        for fn in fns:
            values |= _values(question, fn, targets, answers)
    return values


def _metric_fns(question: Question, protocol: Protocol) -> tuple[MetricFn, ...]:
    return protocol.metric_fns(question.task.metric_fns, question.ranked)


def _compared(
    question: Question, protocol: Protocol, texts: Sequence[str]
) -> tuple[list[Any], list[Any]]:
    """The targets and answers that the protocol's metrics compare."""
    task = question.task
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
            f"the metric {fn.__name__} fails on what the model said: {type(error).__name__}: "
            f"{error}"
        ) from error


def _rows(cell: Cell, answers: Mapping[Protocol, Answers]) -> list[Row]:
    """The rows of the table: metrics of each protocol, then baselines."""
    question = cell.question
    rows = []
    for protocol, of_protocol in answers.items():
        values = _metrics(question, [protocol], of_protocol.texts)
        cut = max(question.truncated(name) for name in protocol.passes_for(question.ranked))
        rows += _table_rows(cell, protocol.name, values, cut)
    for name, values in _baselines(question, list(answers)):
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


def _baselines(
    question: Question, protocols: Sequence[Protocol]
) -> list[tuple[str, dict[str, float]]]:
    examples = question.task.examples
    found = []
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
    """The expected score of a random choice: exact for accuracy, else the mean of some draws."""
    examples = question.task.examples
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(_DRAWS):
        texts = [e.choices[int(rng.integers(len(e.choices)))] for e in examples]
        draws.append(_metrics(question, protocols, texts))
    values = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
    if "accuracy" in values and question.task.postprocess is None:
        values["accuracy"] = results.baselines(examples)["chance"]
    return values


# ------------------------------------------------------------------------------- predictions


def _predictions(question: Question, answers: Mapping[Protocol, Answers]) -> list[Row]:
    task = question.task
    targets = results.processed(task, (e.targets_text for e in task.examples), True)
    scores = {
        protocol: _example_scores(question, protocol, of_protocol.texts)
        for protocol, of_protocol in answers.items()
    }
    lines = []
    for i, example in enumerate(task.examples):
        by_protocol: dict[str, Row] = {}
        for protocol, of_protocol in answers.items():
            entry: Row = {"prediction": of_protocol.texts[i], "score": scores[protocol][i]}
            if of_protocol.values is not None:
                entry["values"] = [round(float(value), 6) for value in of_protocol.values[i]]
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
    targets, answers = _compared(question, protocol, texts)
    fns = _metric_fns(question, protocol)
    first = fns[0] if fns and metrics.per_example(fns[0]) else metrics.accuracy
    scores = []
    for target, answer in zip(targets, answers, strict=True):
        values = _values(question, first, [target], [answer])
        scores.append(round(next(iter(values.values())), 4))
    return scores

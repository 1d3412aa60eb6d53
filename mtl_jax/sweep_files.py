"""The folder of a sweep, for those who write it (sweeps/) and those who read it (sweep_report/).

    config.gin, command.txt, versions.json      as in a run directory
    cells/CHECKPOINT/TASK/CELL/                 one cell: a checkpoint, a task, a number of shots
        cell.json                               what it is (`CellFacts`)
        PASS.jsonl                              what the model said in one pass, a line per example
        predictions.jsonl                       all passes and protocols together, to be read
        results.jsonl                           rows of the table
    plan.json                                   which cells the newest start is about, in order
    results.jsonl                               the table: the rows of these cells
    report.html, results.md, results.tex

Cells that are no part of the plan, such as those of a prompt that has changed since, stay on disk
but are not in the table.

A pass is one way of asking the model (`sweeps/`): it stands on disk whole or not at all, so a file
that is there is done. Protocols (protocols.py) are arithmetic over passes.

A line of a ranking pass is `{"index", "sums", "eos", "n_tokens"}`, lists over the choices: the
log-probability of the choice's own tokens without the end of sequence, that of the end of sequence
after it, and the number of the former; null stands for a log-probability that is not finite. A line
of a generating pass is `{"index", "text"}`.

A line of predictions.jsonl is `{"index", "inputs", "targets", "choices", "by_protocol"}`, where
`targets` is one text or a list of right texts, `choices` is empty for generation, and
`by_protocol` has for each protocol `{"prediction", "score"}`, `score` being 0 to 100 for this
example under the task's first metric (exact match where that metric has no value for one example),
and for ranking also `"values"`, that by which the choices were ranked.

A row of results.jsonl has the columns `RESULT_COLUMNS`. `protocol` may also name a baseline
(`BASELINES`), which answers without any model.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl, replace_text, storage_errors

CELLS, CELL_FACTS, PLAN = "cells", "cell.json", "plan.json"
PREDICTIONS, RESULTS = "predictions.jsonl", "results.jsonl"
# Answers without a model: a random choice, the choice that is right most often, the input itself,
# the answer of the first example in front of the input.
BASELINES = ("random", "majority", "copy_input", "copy_demonstration")
RESULT_COLUMNS = (
    *("run", "checkpoint", "step", "task", "dataset", "prompt", "family", "language", "original"),
    *("trained", "split", "shots", "protocol", "metric", "value", "n", "truncated", "skipped"),
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CellFacts:
    """What a cell is.

    Attributes:
      run: name of the run or folder that the checkpoint is of.
      checkpoint: unique in the sweep, such as `p3@400`; also the name of a folder.
      step: of training.
      task: its registered name (of the task without shots).
      dataset, prompt, family, language, original: of its `TaskInfo`.
      trained: whether the dataset is known to be in the checkpoint's training mixture.
      split: of the task.
      shots: examples in front of each input.
      key: fingerprint of all that the cell's numbers depend on; ends the name of its folder.
      n: examples.
      skipped: rows that the prompt left out; None: not known.
      truncated: examples cut in each pass that was made.
      seconds: that each pass took.
      tokens: encoder and decoder tokens of each pass.
      scoring: fingerprint of all that the rows of the table depend on beside the passes; empty:
        they are not all there, or from before there were such fingerprints.
      exemplars: examples that stand in front of an input on average, fewer than `shots` where
        there is no room for all; None: not known.
    """

    run: str
    checkpoint: str
    step: int
    task: str
    dataset: str
    prompt: str
    family: str
    language: str
    original: bool
    trained: bool
    split: str
    shots: int
    key: str
    n: int
    skipped: int | None
    truncated: Mapping[str, int]
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]
    scoring: str = ""
    exemplars: float | None = None


def cell_folder(root: Path, checkpoint: str, task: str, shots: int, key: str) -> Path:
    """Where a cell lies."""
    return root / CELLS / checkpoint / task / f"{shots}shot-{key[:10]}"


def write_plan(root: Path, folders: Iterable[Path]) -> None:
    """Says which cells the sweep is about; they need not be there yet.

    Raises:
      UserError: no space or no permission.
    """
    names = [folder.relative_to(root / CELLS).as_posix() for folder in folders]
    with storage_errors(f"write {PLAN}", root):
        replace_text(root / PLAN, json.dumps({"cells": names}, indent=1) + "\n")


def cell_folders(root: Path) -> list[Path]:
    """The cells of a sweep that have their facts, in the order of its plan.

    Without a plan: all of them, sorted by path.

    Raises:
      UserError: plan.json is damaged.
    """
    path = root / PLAN
    if not path.exists():
        return sorted(path.parent for path in (root / CELLS).glob(f"*/*/*/{CELL_FACTS}"))
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["cells"]
        folders = [root / CELLS / name for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Delete it.") from error
    return [folder for folder in folders if (folder / CELL_FACTS).exists()]


def read_facts(folder: Path) -> CellFacts:
    """The facts of a cell.

    Raises:
      UserError: cell.json is damaged or of another version.
    """
    path = folder / CELL_FACTS
    try:
        return CellFacts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Delete the cell's folder.") from error


def write_facts(folder: Path, facts: CellFacts) -> None:
    """Writes cell.json.

    Raises:
      UserError: no space or no permission.
    """
    with storage_errors(f"write {CELL_FACTS}", folder):
        text = json.dumps(dataclasses.asdict(facts), ensure_ascii=False, indent=1)
        replace_text(folder / CELL_FACTS, text + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSONL file as a whole.

    Raises:
      UserError: no space or no permission.
    """
    with storage_errors(f"write {path.name}", path.parent):
        replace_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def predictions(folder: Path) -> list[Row]:
    """The lines of a cell's predictions.jsonl; empty: not there yet.

    Raises:
      UserError: a line is no JSON object.
    """
    return read_jsonl(folder / PREDICTIONS)


def cell_rows(root: Path) -> Iterator[Row]:
    """The rows of the table, cell by cell.

    Raises:
      UserError: a line is no JSON object.
    """
    for folder in cell_folders(root):
        yield from read_jsonl(folder / RESULTS)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / CELLS).is_dir()

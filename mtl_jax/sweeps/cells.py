"""Cells: what one is, which rows of the model it needs, and where the answers go.

A cell is a checkpoint and a `Question`: a task with a number of shots. Its passes (`PASSES` of
protocols.py) put the same examples to the model in different ways; where two passes come to the
same tokens, they share a row.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mtl_jax import buckets, protocols
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalConfig, EvalExample, EvalTask, Tokens
from mtl_jax.evaluate import Answer
from mtl_jax.storage import read_jsonl
from mtl_jax.sweep_files import Row, cell_folder
from mtl_jax.sweeps.checkpoints import Checkpoint
from mtl_jax.sweeps.fingerprint import described
from mtl_jax.task_info import TaskInfo

_KEY_VERSION = 1
_SCORING_VERSION = 1  # another one makes all rows of tables anew from the stored passes
_DECIMALS = 6
# The choices of a null pass that share a row; it has one input for all of them.
_NULL_CHOICES = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """What one pass wants of a row of the model.

    Attributes:
      pass_name: which pass.
      example: position in the task.
      choice: the first of the example's choices that it is about.
      position: the first of the row's choices that these are.
      count: how many.
    """

    pass_name: str
    example: int
    choice: int = 0
    position: int = 0
    count: int = 0


@dataclasses.dataclass
class ModelRow:
    """One row for the model, whatever the checkpoint."""

    inputs: np.ndarray
    choices: list[np.ndarray]
    max_length: int
    parts: list[Part]

    @property
    def lengths(self) -> tuple[int, int]:
        """Encoder tokens, and decoder tokens of all choices together."""
        return len(self.inputs), sum(map(len, self.choices))


@dataclasses.dataclass(frozen=True)
class Amount:
    """Rows of the model by their lengths.

    Attributes:
      ranked: (encoder tokens, decoder tokens) -> rows to be scored.
      generated: (encoder tokens, tokens to make at most) -> rows to be continued.
    """

    ranked: Mapping[tuple[int, int], int]
    generated: Mapping[tuple[int, int], int]

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(self.ranked.values()) + sum(self.generated.values())

    def tokens(self, side: int) -> int:
        """Encoder tokens (0), or decoder tokens (1), to be made at most."""
        both = (*self.ranked.items(), *self.generated.items())
        return sum(lengths[side] * count for lengths, count in both)


@dataclasses.dataclass(eq=False)
class Question:
    """A task with a number of shots, ready to be put to any checkpoint.

    Attributes:
      name: registered name of the task without shots.
      info: of that task.
      shots: examples in front of each input.
      task: with shots; its inputs are whole, to be cut by each pass in its own way.
      lengths: the room `Eval`.
      protocols: presets that apply to it.
      shots_split: where the shots are from.
      seed: of their drawing.
    """

    name: str
    info: TaskInfo
    shots: int
    task: EvalTask
    lengths: EvalConfig
    protocols: tuple[protocols.Protocol, ...]
    shots_split: str
    seed: int

    def __post_init__(self) -> None:
        self.truncated = functools.cache(self._truncated)
        self.amount = functools.cache(self._amount)

    @functools.cached_property
    def ranked(self) -> bool:
        """Whether the examples have answer choices."""
        return self.task.ranked

    @functools.cached_property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes that the protocols need."""
        names = (name for p in self.protocols for name in p.passes_for(self.ranked))
        return tuple(dict.fromkeys(names))

    def max_length(self, pass_name: str) -> int:
        """Tokens that a generating pass makes at most."""
        return protocols.PASSES[pass_name].max_decode_length or self.lengths.max_decode_length

    @functools.cached_property
    def choice_tokens(self) -> list[list[np.ndarray]]:
        """Of each example the tokens of its choices, cut, each with an end of sequence."""
        end, room = self.task.eos_id, self.lengths.targets_length - 1
        if end < 0 and self.ranked:
            raise UserError(
                f"Task {self.name!r}: the vocabulary of its targets has no end of sequence, which "
                "ranking puts behind every choice."
            )

        return [
            [
                np.concatenate([self._body(tokens)[:room], np.array([end], np.int32)])
                for tokens in example.choice_tokens
            ]
            for example in self.task.examples
        ]

    def _body(self, tokens: Tokens) -> np.ndarray:
        """A choice without its end of sequence."""
        body = np.asarray(tokens, np.int32)
        return body[:-1] if len(body) and body[-1] == self.task.eos_id else body

    def _inputs(self, pass_name: str, example: EvalExample) -> tuple[np.ndarray, bool]:
        form = protocols.PASSES[pass_name]
        return self.task.asked(
            example.inputs,
            self.lengths.inputs_length,
            eos=form.eos,
            truncate=form.truncate,
            null=form.null,
        )

    def _truncated(self, pass_name: str) -> int:
        """How many examples a pass cuts, in their inputs or in a choice."""
        ranks, room = protocols.PASSES[pass_name].kind == "rank", self.lengths.targets_length - 1
        return sum(
            self._inputs(pass_name, example)[1]
            or (ranks and any(len(self._body(c)) > room for c in example.choice_tokens))
            for example in self.task.examples
        )

    def rows(self, passes: Sequence[str]) -> Iterator[ModelRow]:
        """The rows of the model that passes need; equal ones of an example are one."""
        kinds = {name: protocols.PASSES[name] for name in passes}
        for i, example in enumerate(self.task.examples):
            of_example: dict[tuple[str, bytes], ModelRow] = {}
            for name, form in kinds.items():
                if form.null:
                    continue
                inputs, _ = self._inputs(name, example)
                key = form.kind, inputs.tobytes()
                if key not in of_example:
                    choices = self.choice_tokens[i] if form.kind == "rank" else []
                    of_example[key] = ModelRow(inputs, list(choices), 0, [])
                row = of_example[key]
                row.parts.append(Part(name, i, count=len(row.choices)))
                if form.kind == "generate":
                    # Greedy: what is made in fewer steps is the beginning of it.
                    row.max_length = max(row.max_length, self.max_length(name))
            yield from of_example.values()
        for name in (name for name, form in kinds.items() if form.null):
            yield from self._null_rows(name)

    def _amount(self, passes: tuple[str, ...]) -> "Amount":
        """The work of passes."""
        ranked: Counter[tuple[int, int]] = Counter()
        generated: Counter[tuple[int, int]] = Counter()
        for row in self.rows(passes):
            if row.choices:
                ranked[row.lengths] += 1
            else:
                generated[len(row.inputs), row.max_length] += 1
        return Amount(ranked, generated)

    def _null_rows(self, name: str) -> Iterator[ModelRow]:
        """Each choice once for all examples that have it: it is asked for without their input."""
        users: dict[bytes, list[tuple[int, int]]] = {}
        for i, choices in enumerate(self.choice_tokens):
            for c, tokens in enumerate(choices):
                users.setdefault(tokens.tobytes(), []).append((i, c))
        inputs, _ = self._inputs(name, self.task.examples[0])
        different = list(users.items())
        for start in range(0, len(different), _NULL_CHOICES):
            together = different[start : start + _NULL_CHOICES]
            yield ModelRow(
                inputs,
                [np.frombuffer(text, np.int32) for text, _ in together],
                0,
                [
                    Part(name, i, choice=c, position=position, count=1)
                    for position, (_, of_choice) in enumerate(together)
                    for i, c in of_choice
                ],
            )

    @functools.cached_property
    def cut(self) -> int:
        """How many examples are cut by that pass that cuts the most."""
        return max(map(self.truncated, self.passes), default=0)

    @functools.cached_property
    def exemplars(self) -> float | None:
        """Examples that stand in front of an input on average; None: the task does not tell."""
        counts = [example.fields.get("exemplars") for example in self.task.examples]
        known = [int(count) for count in counts if count is not None]
        return float(np.mean(known)) if known and len(known) == len(counts) else None

    @functools.cached_property
    def widest(self) -> int:
        """The most choices that a row has."""
        null = _NULL_CHOICES if any(protocols.PASSES[name].null for name in self.passes) else 1
        return max([null, *map(len, self.choice_tokens)])

    @functools.cached_property
    def largest_token(self) -> int:
        """The largest token that is put to a model."""
        sides: list[Tokens] = [example.inputs for example in self.task.examples]
        sides += [tokens for choices in self.choice_tokens for tokens in choices]
        return max((int(np.max(tokens)) for tokens in sides if len(tokens)), default=0)

    @functools.cached_property
    def digest(self) -> str:
        """Fingerprint of the examples' texts and tokens and of all that says how they are asked."""
        task, lengths = self.task, self.lengths
        digest = hashlib.sha256()
        facts = [
            *(_KEY_VERSION, self.name, task.split, self.shots, task.eos_id, task.inputs_eos_id),
            *(lengths.inputs_length, lengths.targets_length, lengths.max_decode_length),
            *([lengths.limit, lengths.seed] if lengths.limit else []),
            *([self.shots_split, self.seed] if self.shots else []),
        ]
        digest.update(json.dumps(facts).encode())
        for example in task.examples:
            texts = [example.index, example.inputs_text, example.targets_text, example.choices]
            digest.update(json.dumps(texts).encode())
            for tokens in (example.inputs, *example.choice_tokens):
                digest.update(np.asarray(tokens, np.int32).tobytes() + b";")
        return digest.hexdigest()

    @functools.cached_property
    def scoring(self) -> str:
        """Fingerprint of all that makes results of the passes: metrics, postprocessor, fields."""
        task = self.task
        metric_fns = {p.name: p.metric_fns(task.metric_fns, self.ranked) for p in self.protocols}
        digest = hashlib.sha256()
        for value in (_SCORING_VERSION, self.info, metric_fns, task.postprocess, task.skipped):
            digest.update(described(value).encode() + b";")
        for example in task.examples:
            digest.update(described(example.fields).encode() + b";")
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A checkpoint and a question.

    Attributes:
      checkpoint: what is asked.
      question: what it is asked.
      trained: whether the dataset is in the checkpoint's training mixture.
      root: of the sweep.
    """

    checkpoint: Checkpoint
    question: Question
    trained: bool
    root: Path

    @functools.cached_property
    def key(self) -> str:
        """Fingerprint of all that the cell's numbers depend on."""
        text = f"{self.checkpoint.identity}/{self.checkpoint.step}/{self.question.digest}"
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def scoring(self) -> str:
        """Fingerprint of all that the cell's rows of the table depend on beside its passes."""
        text = f"{self.question.scoring}/{self.trained}/{self.checkpoint.run}"
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def folder(self) -> Path:
        """Where it lies."""
        question = self.question
        return cell_folder(self.root, self.checkpoint.name, question.name, question.shots, self.key)

    @property
    def title(self) -> str:
        """For messages."""
        shots = f", {self.question.shots} shots" if self.question.shots else ""
        return f"{self.question.name}{shots} with {self.checkpoint.name}"

    def pass_path(self, name: str) -> Path:
        """The file of a pass."""
        return self.folder / f"{name}.jsonl"

    def missing(self) -> list[str]:
        """The passes that are not on disk."""
        return [name for name in self.question.passes if not self.pass_path(name).exists()]

    def stored(self, name: str) -> list[Row]:
        """The lines of a pass.

        Raises:
          UserError: the file is damaged, or of other examples.
        """
        path = self.pass_path(name)
        rows, examples = read_jsonl(path), self.question.task.examples
        if [row.get("index") for row in rows] != [example.index for example in examples]:
            raise UserError(f"{path} is damaged: it has other examples than the task. Delete it.")
        return rows


class Asking:
    """The missing passes of one cell while the model works on them.

    Attributes:
      cell: whose.
      passes: those that are made.
      seconds: that each pass took so far.
      tokens: encoder and decoder tokens of each pass so far.
    """

    def __init__(self, cell: Cell, passes: Sequence[str], group: int, prompt: Sequence[int]):
        """Lays out the answers.

        Args:
          cell: whose.
          passes: those to be made.
          group: `Engine.group` of its task.
          prompt: tokens in front of every input.
        """
        self.cell, self.passes = cell, tuple(passes)
        self._group, self._prompt = group, np.asarray(prompt, np.int32)
        self._rows = list(cell.question.rows(passes))
        self._left = len(self._rows)
        self.seconds = dict.fromkeys(passes, 0.0)
        self.tokens = dict.fromkeys(passes, 0)
        task = cell.question.task
        self._lines: dict[str, list[Row]] = {
            name: [self._empty(name, example) for example in task.examples] for name in passes
        }

    @property
    def rows(self) -> int:
        """Rows for the model."""
        return len(self._rows)

    def _empty(self, name: str, example: EvalExample) -> Row:
        if protocols.PASSES[name].kind == "generate":
            return {"index": example.index, "text": ""}
        count = len(example.choices)
        sums, eos, n_tokens = [0.0] * count, [0.0] * count, [0] * count
        return {"index": example.index, "sums": sums, "eos": eos, "n_tokens": n_tokens}

    def requests(self) -> Iterator[buckets.Request]:
        """The rows for the model."""
        task = self.cell.question.task
        for row in self._rows:
            inputs = np.concatenate([self._prompt, row.inputs]) if len(self._prompt) else row.inputs
            yield buckets.Request(
                key=(self, row),
                inputs=inputs,
                choices=row.choices,
                group=self._group,
                max_length=row.max_length,
                eos_id=task.eos_id,
            )

    def take(self, row: ModelRow, answer: Answer, seconds: float) -> bool:
        """Books an answer; tells whether it was the last one.

        Args:
          row: what was asked.
          answer: what the model said.
          seconds: the row's share of the time of its batch.
        """
        first = row.parts[0].pass_name
        self.seconds[first] += seconds
        self.tokens[first] += len(row.inputs) + int(answer.lengths.sum()) + len(answer.tokens)
        for part in row.parts:
            line = self._lines[part.pass_name][part.example]
            if protocols.PASSES[part.pass_name].kind == "generate":
                question = self.cell.question
                tokens = answer.tokens[: question.max_length(part.pass_name)]
                line["text"] = question.task.detokenize(tokens)
                continue
            for k in range(part.count):
                place, c = part.position + k, part.choice + k
                # In float64, so that the difference loses nothing.
                last = float(answer.last[place])
                line["sums"][c] = _stored_number(float(answer.scores[place]) - last)
                line["eos"][c] = _stored_number(last)
                line["n_tokens"][c] = int(answer.lengths[place]) - 1
        self._left -= 1
        return self._left == 0

    def lines(self, name: str) -> list[Row]:
        """The lines of a finished pass."""
        return self._lines[name]


def _stored_number(value: float) -> float | None:
    """As it stands in the file of a pass: JSON has no number that is not finite."""
    return round(value, _DECIMALS) + 0.0 if math.isfinite(value) else None

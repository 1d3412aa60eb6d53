"""What is evaluated: the configuration, and a task made ready with its texts and tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtl_jax.errors import UserError
from mtl_jax.task_info import TaskInfo


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, how often and in what batches.

    Attributes:
      tasks: names of tasks or mixtures, or globs; empty: nothing is evaluated.
      split: the split of every task.
      batch_size: rows of a batch; the choices of an example share one row.
      max_decode_length: tokens to generate at most.
      limit: examples of a task at most, a subset drawn with `seed`; 0: all. `n` in the results
        tells how many there were.
      inputs_length: longer inputs are cut (and counted).
      targets_length: longer targets and choices are cut (and counted).
      every: steps of training between evaluations; 0: only at the end.
      seed: of the subset.
      max_shapes: batch shapes at most, for each of scoring and generating; fewer compile faster,
        more pad less.
    """

    tasks: Sequence[str] = ()
    split: str = "validation"
    batch_size: int = 64
    max_decode_length: int = 64
    limit: int = 0
    inputs_length: int = 512
    targets_length: int = 128
    every: int = 0
    seed: int = 0
    max_shapes: int = 8

    def __post_init__(self) -> None:
        least = {"limit": 0, "every": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < least.get(field.name, 1):
                bound = least.get(field.name, 1)
                raise UserError(f"Eval.{field.name} must be at least {bound}, got {value}.")


@dataclasses.dataclass
class EvalExample:
    """One example as text and as tokens (with the end of sequence where the task's features say).

    Attributes:
      index: position in the split.
      inputs: encoder tokens.
      targets: tokens of the right answer.
      inputs_text: the prompt.
      targets_text: the right answer.
      choices: the answers to rank; empty: none.
      choice_tokens: tokens of each choice.
      fields: the other features of the example, for the task's postprocessor.
    """

    index: int
    inputs: list[int]
    targets: list[int]
    inputs_text: str
    targets_text: str
    choices: list[str] = dataclasses.field(default_factory=list)
    choice_tokens: list[list[int]] = dataclasses.field(default_factory=list)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class EvalTask:
    """A task made ready for evaluation.

    Attributes:
      name: the task's registered name.
      info: its dataset, prompt and family.
      split: where the examples are from.
      examples: all that are to be evaluated.
      metric_fns: `fn(targets, predictions) -> {name: value}`; for choices, accuracy if none.
      score_metric_fns: `fn(targets, scores) -> {name: value}`, log-likelihoods of the targets.
      postprocess: SeqIO's: `fn(text, example=fields, is_target=bool)`, applied to targets and
        predictions before the metrics; None leaves the text as it is.
      detokenize: from generated tokens, without end of sequence and padding, to text.
      truncated: how many examples were cut to fit the lengths.
      eos_id: ends what is generated; -1: nothing ends it before `max_decode_length`.
    """

    name: str
    info: TaskInfo
    split: str
    examples: list[EvalExample]
    metric_fns: Sequence[Callable[..., Mapping[str, Any]]]
    score_metric_fns: Sequence[Callable[..., Mapping[str, Any]]]
    postprocess: Callable[..., Any] | None
    detokenize: Callable[[list[int]], str]
    truncated: int = 0
    eos_id: int = 1

    @property
    def ranked(self) -> bool:
        """Whether the examples have answer choices.

        Raises:
          UserError: some have and some have not, or a choice has no tokens.
        """
        with_choices = [bool(example.choices) for example in self.examples]
        if any(with_choices) and not all(with_choices):
            index = self.examples[with_choices.index(False)].index
            raise UserError(
                f"Task {self.name!r}, {self.split} example {index} has no answer choices but other "
                "examples have: give choices to all examples of a task or to none."
            )
        for example in self.examples:
            if not all(example.choice_tokens):
                raise UserError(
                    f"Task {self.name!r}, {self.split} example {example.index}: an answer choice "
                    "without tokens cannot be ranked; let the task's targets end with EOS."
                )
        return any(with_choices)

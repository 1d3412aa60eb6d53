"""What is evaluated: the configuration, and a task made ready with its texts and tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.task_info import TaskInfo

Tokens = Sequence[int] | np.ndarray


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
      use_cached: read SeqIO's offline caches (Data.cache_dirs); a task whose cache is missing is
        refused, one that cannot have a cache is read as ever.
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
    use_cached: bool = False

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
    inputs: Tokens
    targets: Tokens
    inputs_text: str
    targets_text: str
    choices: list[str] = dataclasses.field(default_factory=list)
    choice_tokens: list[Tokens] = dataclasses.field(default_factory=list)
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
      inputs_eos_id: that of the inputs' vocabulary; -1: it has none.
      eos_after_trim: whether inputs that are cut still end with it.
      skipped: rows of the split that give no example; None: not known.
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
    inputs_eos_id: int = 1
    eos_after_trim: bool = False
    skipped: int | None = None

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
            if not all(map(len, example.choice_tokens)):
                raise UserError(
                    f"Task {self.name!r}, {self.split} example {example.index}: an answer choice "
                    "without tokens cannot be ranked; let the task's targets end with EOS."
                )
        return any(with_choices)

    def asked(
        self,
        tokens: Tokens,
        length: int,
        *,
        eos: bool | None = None,
        truncate: str = "right",
        null: bool = False,
    ) -> tuple[np.ndarray, bool]:
        """An input as it is put to the model.

        Args:
          tokens: the whole input, as the task's features say.
          length: longer inputs are cut.
          eos: whether it ends with the end of sequence, also if it is cut; None: as it does.
          truncate: the end at which it is cut, "right" or "left".
          null: an empty input instead: the end of sequence alone.

        Returns:
          int32 tokens, and whether some were cut off.

        Raises:
          UserError: an end of sequence is asked for, and the vocabulary has none.
        """
        if (eos or null) and self.inputs_eos_id < 0:
            raise UserError(
                f"Task {self.name!r}: the vocabulary of its inputs has no end of sequence, which "
                "the protocol puts behind them."
            )
        end = np.array([self.inputs_eos_id], np.int32)
        if null:
            return end, False
        whole = np.asarray(tokens, np.int32)
        ended = bool(len(whole)) and whole[-1] == self.inputs_eos_id
        body = whole[:-1] if ended else whole
        wants_end = ended if eos is None else eos
        if len(body) + wants_end <= length:
            return (np.concatenate([body, end]) if wants_end else body), False
        if truncate == "left":
            kept = body[len(body) - (length - wants_end) :]
            return (np.concatenate([kept, end]) if wants_end else kept), True
        keeps_end = wants_end and (eos is True or self.eos_after_trim)
        kept = body[: length - keeps_end]
        return (np.concatenate([kept, end]) if keeps_end else kept), True

"""Instructions with a definition and examples in front of the input, as in Tk-Instruct.

Wang et al. 2022, Super-NaturalInstructions; the encoding is that of Tk-Instruct's `ni_collator.py`:

    Definition: Say whether the review is good or bad.

     Positive Example 1 -
    Input: A fine film.
     Output: good.

    Now complete the following example -
    Input: Dull.
    Output:

A text that does not end in ASCII punctuation gets a full stop, the output of an example included.
Examples are added in their order as long as the whole has no more than `max_tokens` tokens with
its end of sequence; the first that does not fit ends it. An input that is too long even alone is
left whole here; reading cuts it, from the right.
"""

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence

from mtl_jax.errors import UserError

# Tk-Instruct looks at the last character of what was written so far, so an empty text gets its full
# stop behind the blank of its label.
_PUNCTUATION = frozenset(string.punctuation)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What a task says of itself.

    Attributes:
        definition: what is to be done.
        examples: with texts `input`, `output` and perhaps `explanation`.
    """

    definition: str
    examples: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Which parts of an instruction stand in front of an input.

    Tk-Instruct's models are trained and evaluated with the defaults ("def + 2 pos").

    Attributes:
        definition: whether it stands first.
        examples: how many, at most; Tk-Instruct's data has two.
        explanations: whether the examples tell why their output is right.
        max_tokens: of the whole, with an end of sequence.
    """

    definition: bool = True
    examples: int = 2
    explanations: bool = False
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("examples", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"Encoding.{name} must be at least {least}, not {value}.")
        if self.explanations and not self.examples:
            raise UserError(
                "Encoding.explanations needs examples to explain: set Encoding.examples."
            )

    @property
    def name(self) -> str:
        """What it is called as a prompt, such as `definition, 2 examples`."""
        parts = ["definition"] if self.definition else []
        if self.examples:
            parts.append(f"{self.examples} example{'s' * (self.examples > 1)}")
        if self.explanations:
            parts.append("explained")
        return ", ".join(parts) or "input alone"

    def encode(
        self, instruction: Instruction, text: str, count_tokens: Callable[[str], int]
    ) -> tuple[str, int]:
        """Writes an input with its instruction.

        Args:
            instruction: of the task.
            text: the input.
            count_tokens: the number of tokens of a text, without an end of sequence.

        Returns:
            The whole, and how many examples it has.
        """
        query = (
            f"Now complete the following example -\n{_ended(f'Input: {text.strip()}')}\nOutput: "
        )
        start = ""
        if self.definition:
            start = _ended(f"Definition: {instruction.definition.strip()}") + "\n\n"
        taken: list[str] = []
        for number, example in enumerate(instruction.examples[: self.examples], 1):
            written = self._example(number, example)
            # Tk-Instruct counts with blanks between the examples, but writes them without.
            counted = start + " ".join(taken) + written + query
            if count_tokens(counted) + 1 > self.max_tokens:
                break
            taken.append(written)
        return start + "".join(taken) + query, len(taken)

    def _example(self, number: int, example: Mapping[str, str]) -> str:
        text = _ended(f" Positive Example {number} -\nInput: {example['input'].strip()}") + "\n"
        text = _ended(f"{text} Output: {example['output'].strip()}") + "\n"
        if self.explanations and "explanation" in example:
            text = _ended(f"{text} Explanation: {example['explanation'].strip()}") + "\n"
        return text + "\n"


def _ended(text: str) -> str:
    return text if text[-1] in _PUNCTUATION else text + "."

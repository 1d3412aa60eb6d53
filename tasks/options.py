"""Answer choices written into the input, in several forms: a template becomes a template.

FLAN (Wei et al. 2022; Longpre et al. 2023) ends the inputs of its classification tasks with the
choices, one a line below `OPTIONS:`. BIG-Bench Hard and many exams letter them.

    with_options(template, "flan")                   with_options(template, "letters")

    Is this good or bad? A fine film.                Is this good or bad? A fine film.
    OPTIONS:                                         OPTIONS:
    - good                                           (A) good
    - bad                                            (B) bad
"""

import dataclasses
import hashlib
import random
from collections.abc import Mapping
from typing import Any

from mtl_jax.errors import UserError, suggest
from mtl_jax.tasks.prompts import Rendered, Template

# Style to what the choices are called in names of prompts.
STYLES = {
    "none": "",
    "flan": "options",
    "letters": "lettered options",
    "letters_only": "options answered by letter",
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class OptionsTemplate(Template):
    """A template whose inputs end with the choices; made by `with_options`."""

    style: str = "none"
    shuffled: bool = False

    def render(self, row: Mapping[str, Any], row_name: str = "") -> Rendered | None:
        """Renders as `Template` does, then adds the choices.

        Raises:
            UserError: as `Template.render`; or no choices for this row, more than 26 to be
                lettered, or a target that is none of them where it is answered by letter.
        """
        rendered = super().render(row, row_name)
        if rendered is None:
            return None
        try:
            return _add_options(rendered, self.style, self._order(rendered))
        except UserError as error:
            raise UserError(f"Template {self.name!r}, {row_name or 'a row'}: {error}") from error

    def _order(self, rendered: Rendered) -> list[str]:
        """The choices as they are to be written; a drawn order depends on the example alone."""
        if not self.shuffled:
            return rendered.choices
        text = "\0".join([rendered.inputs, *rendered.choices])
        seed = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return random.Random(seed).sample(rendered.choices, len(rendered.choices))


def with_options(template: Template, style: str, shuffled: bool = False) -> Template:
    """Returns the template with its choices written at the end of the input.

    Args:
        template: has answer choices.
        style: `none`: the template as it is. `flan`: one a line after a dash. `letters`: one a
            line after a letter, `(A) good`; the answer is still the text of the choice.
            `letters_only`: the same, but the choices to rank are `(A)`, `(B)`, ... and so is the
            target.
        shuffled: write them in an order drawn for each example from its text. The choices that are
            ranked keep their own order, but letters follow the written one.

    Raises:
        UserError: an unknown style, no answer choices, or `shuffled` without a style.
    """
    if style not in STYLES:
        raise UserError(
            f"Template {template.name!r}: there is no style of options {style!r}."
            f"{suggest(style, STYLES)} The styles are {', '.join(STYLES)}."
        )
    if style == "none":
        if shuffled:
            raise UserError(
                f"Template {template.name!r}: options of style 'none' are not written, so they "
                "cannot be shuffled; choose a style."
            )
        return template
    if not template.answer_choices:
        raise UserError(
            f"Template {template.name!r} has no answer_choices, so there are no options to write; "
            "leave it out or take the style 'none'."
        )
    fields = {f.name: getattr(template, f.name) for f in dataclasses.fields(Template)}
    named = f"{template.name}, {'shuffled ' if shuffled else ''}{STYLES[style]}"
    fields |= {"name": named, "choices_in_prompt": True}
    return OptionsTemplate(**fields, style=style, shuffled=shuffled)


def _add_options(rendered: Rendered, style: str, written: list[str]) -> Rendered:
    """The example with its choices, in the order `written`, at the end of its input."""
    if not written:
        raise UserError("there are no answer choices to write as options.")
    if style == "flan":
        lines = [f"- {choice}" for choice in written]
        return dataclasses.replace(rendered, inputs=_joined(rendered.inputs, lines))
    if len(written) > len(_LETTERS):
        raise UserError(f"{len(written)} options are more than there are letters.")
    letters = [f"({letter})" for letter, _ in zip(_LETTERS, written, strict=False)]
    lines = [f"{letter} {choice}" for letter, choice in zip(letters, written, strict=True)]
    inputs = _joined(rendered.inputs, lines)
    if style == "letters":
        return dataclasses.replace(rendered, inputs=inputs)
    if rendered.targets not in written:
        raise UserError(f"the target {rendered.targets!r} is none of its answer choices.")
    return Rendered(inputs, letters[written.index(rendered.targets)], letters)


def _joined(inputs: str, lines: list[str]) -> str:
    return "\n".join([inputs, "OPTIONS:", *lines])

"""From texts to what metrics want: postprocessors, `fn(text, example=fields, is_target=bool)`.

SeqIO calls a task's `postprocess_fn` on its targets and on the predictions. `example` holds the
other features of the example, and so only what the task's source and preprocessors pass on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mtl_jax.errors import UserError, suggest
from mtl_jax.metrics.examples import Grouped

Postprocessor = Callable[..., Any]

_SEPARATOR = "|||"  # of answer choices, as in PromptSource
_NO_CHOICE, _NO_TARGET = -1, -2


def _field(example: Mapping[str, Any], name: str) -> Any:
    if name not in example:
        raise UserError(
            f"A postprocessor needs the field {name!r} of an example, which has: "
            f"{', '.join(sorted(example)) or 'nothing'}.{suggest(name, example)}"
        )
    return example[name]


def _plain(value: Any) -> Any:
    """Python's own values in place of NumPy's arrays and bytes."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def choice_index(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> int:
    """The position of an answer among the example's `answer_choices`, from 0 on.

    With choices in the order of the labels, as in "no ||| yes", this is the label.

    Returns:
      -1 for a prediction, -2 for a target that is none of the choices: so it is never right.
    """
    choices = [c.strip() for c in str(_plain(_field(example, "answer_choices"))).split(_SEPARATOR)]
    if text.strip() in choices:
        return choices.index(text.strip())
    return _NO_TARGET if is_target else _NO_CHOICE


def references_in(field: str) -> Postprocessor:
    """A postprocessor that gives as target all right answers, a list in a field of the example."""

    def postprocess(
        text: str, *, example: Mapping[str, Any], is_target: bool = False
    ) -> str | list[str]:
        if not is_target:
            return text
        found = _plain(_field(example, field))
        return found if isinstance(found, list) else [found]

    return postprocess


def grouped(*fields: str, value: Postprocessor | None = None) -> Postprocessor:
    """A postprocessor that puts examples into groups, for `multirc` and `record`.

    Args:
      *fields: examples whose fields of these names are equal are one group.
      value: makes the value; None: the text itself. For MultiRC `choice_index`, for ReCoRD
        `references_in(...)`.
    """

    def postprocess(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> Grouped:
        group = tuple(str(_plain(_field(example, name))) for name in fields)
        if value is None:
            return Grouped(text, group)
        return Grouped(value(text, example=example, is_target=is_target), group)

    return postprocess

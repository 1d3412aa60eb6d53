"""What a template makes of rows, before anything is registered. Free of TensorFlow."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mtl_jax.tasks.prompts import Rendered, Template


@dataclasses.dataclass
class Preview:
    """A template over rows.

    Attributes:
        examples: the first examples, each with the name of its row.
        rows: how many rows there were.
        skipped: rows for which the template rendered empty.
        unlisted: the name of the first row whose target is none of its choices, so that ranking the
            choices cannot be right; empty where there is none.
    """

    examples: list[tuple[str, Rendered]]
    rows: int = 0
    skipped: int = 0
    unlisted: str = ""


def preview(template: Template, rows: Iterable[tuple[str, Mapping[str, Any]]], n: int) -> Preview:
    """Renders a template over all rows and keeps the first `n` examples.

    Args:
        template: the prompt.
        rows: `(name for messages, fields)`.
        n: how many examples to keep.

    Raises:
        UserError: the template fails on a row; names template, row and variable.
    """
    found = Preview([])
    for name, row in rows:
        found.rows += 1
        rendered = template.render(row, name)
        if rendered is None:
            found.skipped += 1
            continue
        if len(found.examples) < n:
            found.examples.append((name, rendered))
        if not found.unlisted and rendered.choices and rendered.targets not in rendered.choices:
            found.unlisted = name
    return found

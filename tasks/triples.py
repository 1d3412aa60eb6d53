"""Knowledge as (subject, relation, object) triples, written as text for the input.

    rows = with_triples(rows, "facts", budget=64, vocabulary=vocabulary)
    Template("describe", "{{knowledge}} Describe this. ||| {{text}}")

Text-to-text models read triples as a line of text (Kale and Rastogi 2020, Text-to-Text Pre-Training
for Data-to-Text Tasks; Ribeiro et al. 2021 for tags in front of the parts):

    pipes   Alan Bean | occupation | astronaut && Alan Bean | born in | Wheeler
    tags    <S> Alan Bean <P> occupation <O> astronaut <S> Alan Bean <P> born in <O> Wheeler
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio

from mtl_jax.errors import UserError, suggest
from mtl_jax.tasks.prompted import Rows

STYLES = ("pipes", "tags")

_SEPARATORS = {"pipes": " && ", "tags": " "}
_PARTS = ("subject", "relation", "object")
Triple = tuple[str, str, str]


def as_triple(value: Any) -> Triple:
    """Reads a triple: a list of three, a mapping of subject, relation, object, or `a | b | c`.

    White space at the ends of the parts and within them becomes one blank.

    Raises:
        UserError: it is none of these, or a part is empty.
    """
    if isinstance(value, str):
        parts = value.split("|")
    elif isinstance(value, Mapping):
        if missing := [part for part in _PARTS if part not in value]:
            raise UserError(
                f"the triple {_short(value)} has no {missing[0]!r}.{suggest(missing[0], value)}"
            )
        parts = [value[part] for part in _PARTS]
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = []
    texts = [" ".join(str(part).split()) for part in parts]
    if len(texts) != 3 or not all(texts):
        raise UserError(
            f"{_short(value)} is no triple: give [subject, relation, object], a mapping with these "
            "names, or 'subject | relation | object'."
        )
    subject, relation, object_ = texts
    return subject, relation, object_


def linearise(
    triples: Sequence[Any],
    budget: int | None = None,
    count_tokens: Callable[[str], int] = len,
    style: str = "pipes",
) -> tuple[str, int]:
    """Writes triples as one line within a budget of tokens.

    Each in turn is taken if the line has no more than `budget` tokens with it; one that is too
    long is passed over, and shorter ones behind it may still be taken.

    Args:
        triples: see `as_triple`; the most important first.
        budget: tokens at most; None: no limit.
        count_tokens: the number of tokens of a text.
        style: `pipes` or `tags`.

    Returns:
        The line, empty where nothing fits, and how many triples were left out.

    Raises:
        UserError: an unknown style, a negative budget, or what is no triple.
    """
    if style not in STYLES:
        raise UserError(
            f"There is no style of triples {style!r}.{suggest(style, STYLES)} "
            f"The styles are {', '.join(STYLES)}."
        )
    if budget is not None and budget < 0:
        raise UserError(f"The budget of triples must be at least 0 tokens, not {budget}.")
    line, dropped = "", 0
    for value in triples:
        subject, relation, object_ = as_triple(value)
        written = (
            f"{subject} | {relation} | {object_}"
            if style == "pipes"
            else f"<S> {subject} <P> {relation} <O> {object_}"
        )
        longer = line + _SEPARATORS[style] + written if line else written
        if budget is None or count_tokens(longer) <= budget:
            line = longer
        else:
            dropped += 1
    return line, dropped


def with_triples(
    rows: Rows,
    field: str,
    budget: int | None,
    vocabulary: seqio.Vocabulary,
    style: str = "pipes",
) -> Rows:
    """Adds fields to rows: `knowledge`, their triples as text, and `knowledge_dropped`, a number.

    Args:
        rows: gives the rows of a split, as in `PromptedTask`.
        field: of the rows, with a list of triples (see `as_triple`).
        budget: tokens of `knowledge` at most, without an end of sequence; None: no limit.
        vocabulary: counts the tokens.
        style: see `linearise`.

    Returns:
        A function like `rows`; it keeps the rows of each split.

    Raises:
        UserError: on reading: a row without the field, with `knowledge` already, or with something
            that is no triple; names the split and the row.
    """

    def knowing(row: Mapping[str, Any]) -> dict[str, Any]:
        if field not in row:
            raise UserError(
                f"there is no field {field!r} of triples; the row has "
                f"{', '.join(map(str, row))}.{suggest(field, row)}"
            )
        if taken := [name for name in ("knowledge", "knowledge_dropped") if name in row]:
            raise UserError(f"the field {taken[0]!r} is there already; rename it.")
        if isinstance(row[field], str | Mapping) or not isinstance(row[field], Sequence):
            raise UserError(f"field {field!r} holds {_short(row[field])}, not a list of triples.")
        line, dropped = linearise(
            row[field], budget, lambda text: len(vocabulary.encode(text)), style
        )
        return {**row, "knowledge": line, "knowledge_dropped": dropped}

    @functools.cache
    def of_split(split: str) -> Sequence[Mapping[str, Any]]:
        found = []
        for number, row in enumerate(rows(split)):
            try:
                found.append(knowing(row))
            except UserError as error:
                raise UserError(f"{split} row {number}: {error}") from error
        return found

    return of_split


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

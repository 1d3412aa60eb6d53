"""The fields of a row and their types, and rows made to fit them.

A type is `str`, `int`, `float`, `bool`, a list of one (`[str]`), or a mapping
(`{"text": [str]}`).
"""

import json
from collections.abc import Mapping
from typing import Any

from mtl_jax.errors import UserError, suggest

Fields = Mapping[str, Any]

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def describe_type(kind: Any) -> str:
    """A type in words: `[str]` is "list of text"."""
    if isinstance(kind, list):
        return f"list of {describe_type(kind[0])}"
    if isinstance(kind, Mapping):
        return f"mapping of {describe_fields(kind)}"
    return _NAMES[kind]


def describe_fields(fields: Fields) -> str:
    """Fields in words: "sentence (text), label (whole number)"."""
    return ", ".join(f"{name} ({describe_type(kind)})" for name, kind in fields.items())


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list | tuple) and all(_fits(item, kind[0]) for item in value)
    if isinstance(kind, Mapping):
        return isinstance(value, Mapping) and not misfit(value, kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def misfit(row: Mapping[str, Any], fields: Fields) -> str:
    """Says what about a row does not fit the fields; "" if it does. More fields do no harm."""
    for name, kind in fields.items():
        if name not in row:
            return f"there is no field {name!r}{suggest(name, row).rstrip('?')}"
        if not _fits(row[name], kind):
            return f"field {name!r} should be {describe_type(kind)}, but is {row[name]!r:.60}"
    return ""


def _parse(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return _TRUTH[text.strip().lower()]
    return kind(text) if kind in (int, float) else json.loads(text)


def from_text(row: Mapping[str, str], fields: Fields, where: str) -> dict[str, Any]:
    """A row of a TSV file with the types of the fields.

    Numbers are parsed, lists are written as JSON, and the parts of a mapping are columns
    (`translation.de`) or JSON.

    Raises:
        UserError: a text that is no such value.
    """
    out: dict[str, Any] = dict(row)
    for name, kind in fields.items():
        nested = {f"{name}.{part}": part for part in kind} if isinstance(kind, Mapping) else {}
        if nested and name not in row and all(column in row for column in nested):
            part_fields = {column: kind[part] for column, part in nested.items()}
            parsed = from_text({column: row[column] for column in nested}, part_fields, where)
            out[name] = {part: parsed[column] for column, part in nested.items()}
        elif name in row:
            try:
                out[name] = _parse(row[name], kind)
            except (ValueError, KeyError) as error:
                raise UserError(
                    f"{where}: field {name!r} should be {describe_type(kind)}, but is "
                    f"{row[name]!r:.60}."
                ) from error
    return out

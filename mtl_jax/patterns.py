r"""Regular expressions over the paths of parameters, such as `decoder/layers/mlp/wi_0/kernel`.

A pattern must match a whole path, as in T5X: `encoder/.*` is all of the encoder, `encoder` is
nothing.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import flax.traverse_util

from mtl_jax.errors import UserError, suggest


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dictionary by path; `as_tree` is the way back."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def as_tree(leaves: dict[str, Any]) -> Any:
    """The nested dictionary of leaves by path."""
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def check(field: str, patterns: Sequence[str]) -> None:
    """Refuses what is no regular expression.

    Raises:
      UserError: names the field and the pattern.
    """
    if isinstance(patterns, str):
        raise UserError(f"{field} must be a list of patterns, got the text {patterns!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{field}: {pattern!r} is no regular expression ({error}).") from error


def matches(pattern: str, path: str) -> re.Match | None:
    """The match of the whole path, or None."""
    return re.fullmatch(pattern, path)


def decide(field: str, patterns: Sequence[str], paths: Iterable[str]) -> dict[str, int]:
    """Which pattern decides about each path: the first that matches.

    Args:
      field: for messages, such as `Run.restore_map`.
      patterns: in order.
      paths: of all parameters that a pattern may be meant for.

    Returns:
      Index of the pattern by path, without the paths that none matches.

    Raises:
      UserError: a pattern that decides about no path; near paths are named.
    """
    paths = list(paths)
    decided: dict[str, int] = {}
    for number, pattern in enumerate(patterns):
        found = [path for path in paths if matches(pattern, path)]
        if not found:
            raise UserError(_no_match(field, pattern, paths))
        left = [path for path in found if path not in decided]
        if not left:
            before = sorted({patterns[decided[path]] for path in found})
            raise UserError(
                f"{field}: {pattern!r} changes nothing, for earlier patterns decide about all that "
                f"it matches ({', '.join(map(repr, before))}): the first match counts. Put it "
                "before them or remove it."
            )
        decided.update(dict.fromkeys(left, number))
    return decided


def _no_match(field: str, pattern: str, paths: Sequence[str]) -> str:
    inside = [path for path in paths if path.startswith(pattern.rstrip("/") + "/")]
    if inside:
        hint = f" To mean all parameters below it, write {pattern.rstrip('/') + '/.*'!r}."
    else:
        hint = suggest(pattern, paths) or f" Paths look like {', '.join(map(repr, paths[:2]))}."
    return f"{field}: {pattern!r} matches no parameter; it must match a whole path.{hint}"

"""Values of configuration fields: do they fit an annotation, and how are they written in Gin."""

import collections.abc
import math
import types
import typing
from typing import Any

LINE_LENGTH = 100


def matched(value: Any, annotation: Any) -> tuple[bool, Any]:
    """Tells whether a literal fits an annotation, and the value to store.

    An int fits a float (and becomes one), a list or tuple fits a sequence or tuple (and becomes a
    tuple, so that frozen dataclasses stay hashable); a bool is no number, a str is no sequence.

    Args:
        value: a Python literal.
        annotation: a type as `typing.get_type_hints` gives it.

    Returns:
        (fits, value as stored); the value is meaningless when it does not fit.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        # The exact alternative first: 1 for int | float stays an int.
        for option in arguments:
            fits, result = matched(value, option)
            if fits and type(result) is type(value):
                return True, result
        results = [matched(value, option) for option in arguments]
        return next((result for result in results if result[0]), (False, None))
    if origin is typing.Literal:
        fits = any(value == option and type(value) is type(option) for option in arguments)
        return fits, value
    if annotation in (None, type(None)):
        return value is None, None
    if annotation is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return fits, float(value) if fits else None
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if annotation in (bool, str):
        return isinstance(value, annotation), value
    return _matched_container(value, origin or annotation, arguments)


def _matched_container(value: Any, origin: Any, arguments: tuple) -> tuple[bool, Any]:
    if origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        if not isinstance(value, dict):
            return False, None
        key_type, item_type = arguments or (Any, Any)
        keys = [matched(key, key_type) for key in value]
        items = [matched(item, item_type) for item in value.values()]
        stored = {key: item for (_, key), (_, item) in zip(keys, items, strict=True)}
        return all(fits for fits, _ in keys + items), stored
    if origin not in (list, tuple, collections.abc.Sequence):
        raise TypeError(f"no Gin value can fill a field of type {origin}")
    if not isinstance(value, list | tuple):
        return False, None
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return False, None
        pairs = [matched(item, kind) for item, kind in zip(value, arguments, strict=True)]
    else:
        kind = arguments[0] if arguments else Any
        pairs = [matched(item, kind) for item in value]
    make = list if origin is list else tuple
    return all(fits for fits, _ in pairs), make(result for _, result in pairs)


def is_text_type(annotation: Any) -> bool:
    """Tells whether any text may stand in a field of this annotation."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(is_text_type(option) for option in typing.get_args(annotation))
    return annotation is str


def type_name(annotation: Any) -> str:
    """Returns the annotation in a user's words: "an int", "a list of str", "a float or None"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(option) for option in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if annotation in (None, type(None)):
        return "None"
    if origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        key, item = (type_name(argument).split(" ", 1)[-1] for argument in arguments)
        return f"a dict of {key} to {item}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a tuple of {len(arguments)} values"
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list of {type_name(arguments[0]).split(' ', 1)[-1]}"
    name = getattr(annotation, "__name__", str(annotation))
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def format_value(value: Any, indent: int = 0) -> str:
    """Returns a literal as Gin text, long containers one item to a line.

    Raises:
        TypeError: the value has no literal (NaN, objects).
    """
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float) and not math.isnan(value):
        return repr(value)
    if isinstance(value, collections.abc.Mapping):
        items = [f"{format_value(key)}: {format_value(item)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list | tuple):
        items = [format_value(item, indent + 4) for item in value]
        opening, closing = "()" if isinstance(value, tuple) else "[]"
    else:
        raise TypeError(f"{value!r} cannot be written as a Gin value")
    comma = "," if isinstance(value, tuple) and len(items) == 1 else ""
    line = f"{opening}{', '.join(items)}{comma}{closing}"
    if len(line) + indent <= LINE_LENGTH or not items:
        return line
    margin = " " * (indent + 4)
    return "\n".join([opening, *(f"{margin}{item}," for item in items), " " * indent + closing])

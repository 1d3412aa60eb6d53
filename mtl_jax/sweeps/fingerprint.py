"""Descriptions of values and functions that are equal in every process, to be hashed."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

_PLAIN = (str, bytes, int, float, bool, type(None))


def described(value: Any, within: tuple[int, ...] = ()) -> str:
    """A text that is different where values differ, or functions do other things.

    A function is described by its name, its compiled code, its defaults and what it encloses, so
    that what `metrics.references_in("a")` makes differs from what `metrics.references_in("b")`
    makes; not by the functions that it calls. Other objects that are no data are described by
    their type.

    Args:
      value: a value, container, function, dataclass.
      within: identities of the values that this one is a part of.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in within:  # a function that encloses itself
        return "..."
    parts = functools.partial(described, within=(*within, id(value)))
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return parts(value.tolist())
        content = hashlib.sha256(value.tobytes()).hexdigest()
        return f"{value.dtype}{value.shape}{content}"
    if isinstance(value, Mapping):
        pairs = sorted((parts(key), parts(item)) for key, item in value.items())
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(parts, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(parts, value)) + "]"
    return _described_object(value, parts)


def _described_object(value: Any, parts: "functools.partial[str]") -> str:
    if isinstance(value, functools.partial):
        return f"partial{parts([value.func, value.args, value.keywords])}"
    if isinstance(value, types.MethodType):
        return f"method{parts([value.__self__, value.__func__])}"
    if isinstance(value, types.CodeType):
        return f"code{parts([value.co_code, value.co_names, value.co_consts])}"
    if isinstance(value, types.FunctionType):
        enclosed = [_content(cell) for cell in value.__closure__ or ()]
        of_call = [value.__defaults__, value.__kwdefaults__]
        return f"{_name(value)}{parts([value.__code__, of_call, enclosed])}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_name(type(value))}{parts(fields)}"
    return _name(value) if hasattr(value, "__qualname__") else _name(type(value))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"

"""Importing the modules that a user names in a configuration, for what they register."""

import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterable

from mtl_jax.errors import UserError, suggest


def load(field: str, names: Iterable[str]) -> None:
    """Imports modules; the working directory is importable.

    Args:
        field: where they are named, for messages.
        names: full names of modules.

    Raises:
        UserError: no such module, or one that fails while it is imported.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    for name in names:
        try:
            importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{field}: {_import_failure(name, error)}") from error


def _import_failure(name: str, error: Exception) -> str:
    """Says that a module is not there, or which line of it went wrong."""
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent and f"{name}.".startswith(f"{absent}."):
        here = [path.stem for path in pathlib.Path().glob("*.py")]
        hint = suggest(name.removesuffix(".py"), here)
        return (
            f"there is no Python module {name!r} in {os.getcwd()} or among the installed "
            f"packages.{hint}"
        )
    if isinstance(error, SyntaxError) and error.filename:
        where, reason = f" at {error.filename}, line {error.lineno}", error.msg
    else:
        where, reason = _line_of_module(error), str(error)
    return f"the import of {name!r} fails{where}: {type(error).__name__}: {reason}"


def _line_of_module(error: Exception) -> str:
    """Returns the innermost line in the folder of the module: rarely is a library to blame."""
    # The first frame is that of `load`; between it and the module lie those of the import.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)[1:]
        if "importlib" not in frame.filename
    ]
    if not frames:
        return ""
    folder = pathlib.Path(frames[0].filename).parent
    line = [frame for frame in frames if pathlib.Path(frame.filename).parent == folder][-1]
    return f" at {line.filename}, line {line.lineno}"

"""Where the real data lies: the folder that MTL_JAX_DATA names. Free of TensorFlow.

`Data.data_dir` arrives here the same way: `mtl_jax.data.load_modules` sets the variable to it.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError, suggest

VARIABLE = "MTL_JAX_DATA"
_HOW = f"Set the environment variable {VARIABLE} or Data.data_dir to the data folder."


def data_folder() -> Path:
    """The data folder, which MTL_JAX_DATA names.

    Raises:
        UserError: none is named, or the named one is not a folder.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        raise UserError(f"These tasks read a data folder and none is named. {_HOW}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"The data folder {path!r}, given by the environment variable {VARIABLE}, is not a "
            f"folder. {_HOW}"
        )
    return folder.resolve()


def data_file(*parts: str) -> Path:
    """The file or folder `parts` of the data folder.

    Raises:
        UserError: there is no data folder, or it lacks this file.
    """
    folder = data_folder()
    path = folder.joinpath(*parts)
    if not path.exists():
        existing = path.parent
        while not existing.is_dir():
            existing = existing.parent
        names = [entry.name for entry in existing.iterdir()]
        missing = path.relative_to(existing).parts[0]
        raise UserError(
            f"The data folder {str(folder)!r} has no {'/'.join(parts)}.{suggest(missing, names)} "
            f"{_HOW}"
        )
    return path


def read_json_lines(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a `.jsonl.gz` file.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object with all of `fields`.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    for field in fields:
                        row[field]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}, line {number}: not a JSON object with {', '.join(fields)} "
                        f"({type(error).__name__}: {error})."
                    ) from error
                yield row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read after line {number}: {error}.") from error

"""Numbers beside pictures: CSV and JSON files in a run's folder `analysis`."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.storage import replace_text, storage_errors


def plain(value: Any) -> Any:
    """Returns arrays and numbers as JSON has them; what is not finite is None."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def write_json(path: Path, value: Any) -> Path:
    """Replaces a JSON file as a whole and returns its path.

    Raises:
      UserError: no space or no permission.
    """
    with storage_errors(f"write {path.name}", path.parent):
        replace_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Replaces a CSV file as a whole and returns its path; unknown values are empty.

    Raises:
      UserError: no space or no permission.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        cells = (plain(cell) for cell in row)
        writer.writerow(["" if cell is None else cell for cell in cells])
    with storage_errors(f"write {path.name}", path.parent):
        replace_text(path, text.getvalue())
    return path


def read_object(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it must hold one JSON object.")
    return value

"""Pooled encoder states of a run in its folder `analysis`: written once, compared between runs.

representations.npz holds `states` (float32 [N, D]), `labels` (int32 [N], the task of each) and
`inputs` (a digest of the texts); representations.json what they say of the tasks.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.analysis import representations
from mtl_jax.analysis.files import write_json
from mtl_jax.errors import UserError
from mtl_jax.storage import replace_bytes, storage_errors

_NPZ, _JSON = "representations.npz", "representations.json"
_FOLDS = 5
# The values of a probe with shuffled tasks lie close together; each costs five fits.
_PROBE_SHUFFLES, _SHUFFLES = 5, 19


def describe_states(
    states_ND: np.ndarray, labels_N: np.ndarray, tasks: Sequence[str], step: int
) -> dict[str, Any]:
    """What pooled states say of the tasks, each measure with its null; as in representations.json.

    Args:
      states_ND: one row for each input.
      labels_N: int, the number of its task.
      tasks: names.
      step: of the checkpoint.

    Raises:
      UserError: fewer than two tasks, or fewer than five inputs of one.
    """
    coordinates, shares = representations.pca(states_ND)
    measures = {
        "probe_accuracy": (representations.probe_accuracy, _PROBE_SHUFFLES),
        "silhouette": (representations.silhouette, _SHUFFLES),
        "between_share": (representations.between_share, _SHUFFLES),
    }
    tested = {
        name: vars(representations.with_null(statistic, states_ND, labels_N, shuffles=shuffles))
        for name, (statistic, shuffles) in measures.items()
    }
    return {
        "tasks": list(tasks),
        "labels": labels_N,
        "step": step,
        "pca": coordinates,
        "pca_shares": shares,
        **tested,
    }


def save_states(
    folder: Path,
    states_ND: np.ndarray,
    labels_N: np.ndarray,
    tasks: Sequence[str],
    texts: Sequence[str],
    step: int,
) -> Path:
    """Writes both files into `folder` and returns the path of the JSON file.

    Raises:
      UserError: see `describe_states`; no space or no permission.
    """
    described = describe_states(states_ND, labels_N, tasks, step)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    buffer = io.BytesIO()
    states = np.asarray(states_ND, np.float32)
    np.savez(buffer, states=states, labels=np.asarray(labels_N, np.int32), inputs=np.array(digest))
    with storage_errors(f"write {_NPZ}", folder):
        replace_bytes(folder / _NPZ, buffer.getvalue())
    return write_json(folder / _JSON, described)


def align(folders: Mapping[str, Path]) -> dict[str, Any] | None:
    """Linear CKA between runs on the same inputs.

    Args:
      folders: name of a run -> its folder `analysis`.

    Returns:
      runs, cka [R][R], examples, and null_mean: the mean over pairs of runs with the examples of
      one shuffled. None unless two runs or more have states, all of the same inputs.

    Raises:
      UserError: a file is damaged.
    """
    found = {
        name: _load(folder / _NPZ) for name, folder in folders.items() if (folder / _NPZ).exists()
    }
    if len(found) < 2 or len({digest for _, digest in found.values()}) > 1:
        return None
    names = list(found)
    states = [found[name][0] for name in names]
    generator = np.random.default_rng(0)
    cka = np.eye(len(names))
    null = []
    for i, x in enumerate(states):
        for j, y in enumerate(states[:i]):
            cka[i, j] = cka[j, i] = representations.linear_cka(x, y)
            null.append(representations.linear_cka(x, generator.permutation(y)))
    return {
        "runs": names,
        "cka": cka,
        "examples": len(states[0]),
        "null_mean": float(np.mean(null)),
    }


def _load(path: Path) -> tuple[np.ndarray, str]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["states"], str(stored["inputs"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({error}): write it again by `mtl-jax report --representations`."
        ) from error

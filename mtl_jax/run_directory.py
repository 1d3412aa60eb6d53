"""The run directory: one folder that tells the whole story of a run.

config.gin        the resolved configuration, enough to repeat the run
command.txt       the command that reruns it
versions.json     Python, packages, revision, platform and device
model-info.txt    every parameter: shape, logical and mesh axes, bytes per device
tokenizer/        the vocabulary, so that the checkpoints can be used alone
mixture.txt       the tasks with their examples, rates, shares and expected epochs
mixture.json      the same as a list of rows, for programs
tasks.json        the id of every task, frozen by name
metrics.jsonl     one line per log step (and TensorBoard events)
events.jsonl      what went wrong and what was done about it, if anything
results.jsonl     one line per task, metric and evaluated step
predictions/      one JSONL file per evaluated task
checkpoints/      one folder per saved step; what is damaged or was left behind by going back is
                  moved to checkpoints.set_aside/
lock              who trains here now (`run_lock.py`)
ledger.json       where the time went
report.html       all of it on one page
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.storage import append_text, replace_bytes, storage_errors
from mtl_jax.task_info import TaskInfo, info, same_examples

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio", "mtl_jax")
# Variables that change what the command does; they are written in front of it.
_ENVIRONMENT = ("MTL_JAX_DATA", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
# Any of these marks a folder as a run's own.
_MARKERS = (
    *("config.gin", "command.txt", "versions.json", "tasks.json", "metrics.jsonl"),
    # What an evaluation leaves in a folder of its own.
    *("results.jsonl", "predictions"),
)


class RunDirectory:
    """The files of one run, each replaced as a whole so that a kill never leaves half a file."""

    def __init__(self, path: str | Path, *, primary: bool = True):
        """Names the folder; nothing is touched before `create`.

        Args:
          path: the folder. A local or mounted path.
          primary: False in all but one process of a job; those read but never write.

        Raises:
          UserError: `path` is empty or an address such as gs://bucket.
        """
        text = os.fspath(path)
        if not text:
            raise UserError("Run.directory is empty: name the folder that the run shall write to.")
        if "://" in text:
            raise UserError(
                f"Run.directory = {text!r} is an address, not a folder: mount the storage and give "
                "the mounted path."
            )
        self.path = Path(text).expanduser()
        self.primary = primary

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """The folder of predictions, one JSONL file per evaluated task."""
        return self.path / "predictions"

    def create(self) -> "RunDirectory":
        """Makes the folder or takes an earlier run's, and checks that it can be written to.

        Raises:
          UserError: a file is in the way, the folder holds files that are no run's, or there is no
            permission or space. Nothing that exists is changed.
        """
        if not self.primary:
            return self
        for folder in (self.path, *self.path.parents):
            if folder.exists() and not folder.is_dir():
                raise UserError(
                    f"Cannot make the run directory {self.path}: {folder} is a file. Choose "
                    "another Run.directory or move the file away."
                )
        with storage_errors("make the run directory", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in self.path.iterdir()}
        if names and not names.intersection((*_MARKERS, "checkpoints", "lock")):
            raise UserError(
                f"{self.path} is not empty and holds no run (for example {min(names)}). Choose "
                "another Run.directory."
            )
        # A real write, because permission bits do not tell for root or network storage.
        with (
            storage_errors("write to the run directory", self.path),
            tempfile.TemporaryFile(dir=self.path) as probe,
        ):
            probe.write(b"\0" * 4096)
        return self

    def is_run(self) -> bool:
        """Tells whether the folder holds a run."""
        return any((self.path / name).exists() for name in _MARKERS)

    def write_text(self, name: str, text: str) -> Path:
        """Replaces the file `name` by `text` in one move, and returns its path.

        Raises:
          UserError: no permission or no space; the file's earlier content is still there.
        """
        return self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Replaces the file `name` by `content`; see `write_text`."""
        target = self.path / name
        if self.primary:
            with storage_errors(f"write {name}", self.path):
                # Folders within the run, but not the run's own where it has vanished.
                for folder in reversed(target.relative_to(self.path).parents[:-1]):
                    (self.path / folder).mkdir(exist_ok=True)
                replace_bytes(target, content, parents=False)
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Replaces the JSON file `name` by `value`; see `write_text`."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def append_json(self, name: str, row: Any) -> None:
        """Appends a line to the JSONL file `name`.

        Raises:
          UserError: no permission or no space, or the folder has vanished.
        """
        if self.primary:
            with storage_errors(f"write {name}", self.path):
                append_text(self.path / name, json.dumps(row, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Returns the content of the JSON file `name`, or None if there is no such file.

        Raises:
          UserError: the file is not JSON.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged, it is not JSON ({error}).") from error

    def write_command(self, argv: Sequence[str]) -> Path:
        """Writes command.txt: the command line that reruns the run, runnable by `sh command.txt`.

        Commands of earlier starts in the same folder stay below as comments.

        Args:
          argv: the words of the command, such as `["mtl-jax", "train", "--gin_file=..."]`.
        """
        variables = [
            f"{name}={shlex.quote(os.environ[name])}"
            for name in _ENVIRONMENT
            if os.environ.get(name)
        ]
        command = " ".join([*variables, shlex.join(argv)])
        command = f"cd {shlex.quote(os.getcwd())} && {command}"
        path = self.path / "command.txt"
        earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if earlier and earlier[0] != command:
            now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
            earlier[0] = f"# until {now}: {earlier[0]}"
        else:
            earlier = earlier[1:]
        return self.write_text("command.txt", "\n".join([command, *earlier]) + "\n")

    def task_ids(self, names: Sequence[str]) -> dict[str, int]:
        """Returns the id of every task ever seen in this run: known ones keep theirs.

        New names get the next free ids in the order given. Id 0 is padding. Nothing is written.

        Args:
          names: the tasks of this start.

        Raises:
          UserError: tasks.json is damaged.
        """
        stored = self.read_json("tasks.json")
        ids: dict[str, int] = {} if stored is None else stored
        values = list(ids.values()) if isinstance(ids, dict) else [0]
        if sorted(values) != list(range(1, len(values) + 1)):
            raise UserError(
                f"{self.path / 'tasks.json'} is damaged: it must map each task to its own id "
                "1, 2, 3 and so on."
            )
        for name in names:
            ids.setdefault(name, len(ids) + 1)
        return ids

    def freeze_task_ids(self, names: Sequence[str]) -> dict[str, int]:
        """Returns `task_ids(names)` and keeps them in tasks.json.

        Raises:
          UserError: tasks.json is damaged, or no permission or space.
        """
        ids = self.task_ids(names)
        if ids != self.read_json("tasks.json"):
            self.write_json("tasks.json", ids)
        return ids


def trained_on(path: str | Path) -> list[dict[str, Any]] | None:
    """Returns what a run was trained on, and the run that it started from, and so on.

    Args:
      path: a run directory, its `checkpoints` folder or a step in it.

    Returns:
      Rows with `task`, `dataset`, `family` and `share`, of tasks that are drawn at all; None where
      the folder tells nothing of it. A run that has only tasks.json tells names, and the
      registered tasks of these names what they are about.

    Raises:
      UserError: a file is damaged.
    """
    given = Path(path).expanduser()
    runs = [folder for folder in (given, *given.parents[:2]) if (folder / "tasks.json").exists()]
    if not runs:
        return None
    run = RunDirectory(runs[0], primary=False)
    rows = run.read_json("mixture.json")
    if rows is None:
        known = [info(name) for name in run.read_json("tasks.json")]
        rows = [{**dataclasses.asdict(about), "share": None} for about in known]
    found = [row for row in rows if row["share"] != 0]
    # Written by ourselves: a literal on a line of its own.
    gin = run.path / "config.gin"
    text = gin.read_text(encoding="utf-8") if gin.exists() else ""
    before = re.search(r"^Run\.restore_from = '([^'\n]+)'$", text, re.MULTILINE)
    earlier = trained_on(before[1]) if before and Path(before[1]) != given else None
    return found + (earlier or [])


def seen_in_training(
    tasks: Iterable[TaskInfo], trained: Iterable[Mapping[str, Any]], by: str = "dataset"
) -> dict[str, list[str]]:
    """Returns which of the evaluated tasks share their dataset with tasks that were trained on.

    Args:
      tasks: what is evaluated.
      trained: rows of `trained_on`.
      by: "dataset", also under another name (`task_info.same_examples`), or "family" for a
        stricter question.

    Returns:
      Names of the trained tasks by name of the evaluated one; those without any are left out.
    """

    def keys(value: str) -> frozenset[int | str]:
        return same_examples(value) if by == "dataset" else frozenset({value})

    of: dict[int | str, dict[str, None]] = {}  # names in the order of the mixture, each once
    for row in trained:
        for key in keys(row[by]) if row[by] else ():
            of.setdefault(key, {})[row["task"]] = None
    found = {}
    for task in tasks:
        value = getattr(task, by)
        seen = {name: None for key in keys(value) for name in of.get(key, ())} if value else {}
        if seen:
            found[task.task] = list(seen)
    return found


def versions() -> dict[str, Any]:
    """Returns what the numbers of a run depend on: versions, revision, platform and devices.

    Reads package metadata only: naming SeqIO's version does not import it.
    """
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: _package_version(name) for name in _PACKAGES},
        "revision": _git_revision(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Returns the revision of the checkout that this package lies in, or None."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def model_info(abstract_params: Any, axes: Any, shardings: Any) -> str:
    """Returns the table of all parameters for model-info.txt.

    Args:
      abstract_params: pytree with `.shape` and `.dtype` at the leaves.
      axes: the same tree with a tuple of logical axis names for each parameter.
      shardings: the same tree with a `jax.sharding.Sharding` for each parameter.

    Returns:
      One line per parameter: path, shape, dtype, logical axes, mesh axes, bytes per device; then
      the totals.
    """
    rows = [("parameter", "shape", "dtype", "logical axes", "mesh axes", "bytes per device")]
    counts, sizes, local_sizes = [], [], []

    def add(path: Any, leaf: Any, names: tuple[str | None, ...], sharding: Any) -> None:
        item_bytes = np.dtype(leaf.dtype).itemsize
        counts.append(math.prod(leaf.shape))
        sizes.append(counts[-1] * item_bytes)
        local_sizes.append(math.prod(sharding.shard_shape(tuple(leaf.shape))) * item_bytes)
        rows.append(
            (
                jax.tree_util.keystr(path, simple=True, separator="/"),
                " x ".join(map(str, leaf.shape)) or "scalar",
                np.dtype(leaf.dtype).name,
                ", ".join(name or "-" for name in names) or "-",
                _mesh_axes(sharding, len(leaf.shape)),
                f"{local_sizes[-1]:,}",
            )
        )

    jax.tree_util.tree_map_with_path(add, abstract_params, axes, shardings)
    totals = (
        f"\n{sum(counts):,} parameters in {len(counts)} tensors, {sum(sizes):,} bytes, "
        f"{sum(local_sizes):,} bytes per device\n"
    )
    return "\n".join(_aligned(rows)) + "\n" + totals


def _mesh_axes(sharding: Any, rank: int) -> str:
    """Returns the mesh axes of each dimension, `-` where it is whole on every device."""
    spec = tuple(getattr(sharding, "spec", ()))
    spec += (None,) * (rank - len(spec))
    names = ["+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec]
    return ", ".join(name or "-" for name in names) or "-"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.rjust(width) if column == last else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def enable_compile_cache(run_directory: str | Path, *, enabled: bool = True) -> str | None:
    """Lets XLA keep compiled programs beside the run directories, so that a second start is quick.

    JAX's own environment variables, such as JAX_COMPILATION_CACHE_DIR, win.

    Args:
      run_directory: the run's folder; the cache is the folder `.jax_cache` beside it, shared by all
        runs there.
      enabled: False switches the cache off.

    Returns:
      The cache's folder, or None when off.
    """
    if not enabled:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    own = Path(run_directory).expanduser().absolute().parent / ".jax_cache"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(own)  # it may be gs://...
    settings: Mapping[str, Any] = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        if name == "jax_compilation_cache_dir" or name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder

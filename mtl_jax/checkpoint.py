"""Checkpoints: training state, position in the data and description saved and restored as one unit.

A thin layer over Orbax's `CheckpointManager`. One checkpoint is the folder `checkpoints/STEP` with
three items: `state` (the pytree of arrays, sharded), `data_state` (JSON) and `meta` (JSON), each
with checksums of its files, which are compared before anything is read. It gets its final name only
when all of it is written, so that a killed save leaves no half checkpoint, and an older checkpoint
is deleted only after a newer one is complete. The newest is never deleted.
"""

import contextlib
import errno
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from mtl_jax import checksums, processes
from mtl_jax.checkpoint_config import CheckpointConfig
from mtl_jax.checkpoint_fit import PARAMS, check, is_param, tensors
from mtl_jax.checkpoint_manager import ITEMS, MEASURED, Manager, save_args_of
from mtl_jax.errors import UserError, suggest
from mtl_jax.storage import (
    RETRY_SECONDS,
    Place,
    causes,
    first_line,
    retried,
    said,
    storage_errors,
    transient,
    withheld,
)

__all__ = ["CheckpointConfig", "Checkpointer", "DamagedCheckpoint", "locate"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were saved, or are not all there."""


def locate(path: str | Path) -> tuple[Path, int | None]:
    """The folder `checkpoints` that a path means, and the step that it names, if it does."""
    path = Path(path).expanduser()
    if re.fullmatch(r"\d+", path.name) and path.parent.name == "checkpoints":
        return path.parent, int(path.name)
    return (path / "checkpoints" if (path / "checkpoints").is_dir() else path), None


class Checkpointer:
    """Saves and restores the checkpoints of one run directory.

    In a job of several processes every process makes a Checkpointer and calls each method in the
    same order; Orbax writes each array's shards from the process that holds them.
    """

    def __init__(
        self,
        directory: str | Path,
        cfg: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
    ):
        """Opens the folder, creating it unless `read_only`.

        Args:
          directory: the folder of checkpoints, `RUN/checkpoints`.
          cfg: what to keep; defaults to `CheckpointConfig()`.
          read_only: never writes or deletes; for evaluation beside a run that is still training.
            Otherwise the left-overs of saves that were killed are removed.

        Raises:
          UserError: the folder cannot be made or, with `read_only`, is not there.
        """
        # Orbax demands an absolute path.
        self.directory = Path(directory).absolute()
        self._cfg = cfg or CheckpointConfig()
        self._read_only = read_only
        if read_only and not self.directory.is_dir():
            raise UserError(f"No checkpoints here: {self.directory} is not a folder.")
        if not read_only and self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} must be a folder for checkpoints, but is a file.")
        self._checked: set[tuple[int, str]] = set()
        self._writing: int | None = None  # the step of the save whose end has not been seen
        self._failures = 0  # in a row
        self._try_again: float | None = None  # from when on
        self._opened: Place | None = None
        self._open()

    def _open(self) -> None:
        with storage_errors("open the folder of checkpoints", self.directory):
            self._manager = Manager(
                *(self.directory, self._cfg, self._there, self._end_job), read_only=self._read_only
            )
            if self._opened is None:
                mark = not self._read_only and processes.primary()
                self._opened = Place(self.directory, mark=mark)

    def _there(self) -> bool:
        """Whether the folder is the one that was opened: Orbax would make another in its place."""
        with contextlib.suppress(OSError):  # then what is done there will tell
            return self._opened is None or self._opened.same()
        return True

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """One clear UserError for what the storage refuses; `action`: see `storage_errors`."""
        try:
            with storage_errors(action, self.directory):
                yield
        except Exception as error:
            # What Orbax and tensorstore say of it depends on where it hits them.
            if self._there():
                raise
            raise UserError(
                f"Could not {action}: the folder {self.directory} has vanished. Was it moved? The "
                "same command continues from what is in its place."
            ) from error

    def _end_job(self, error: Exception) -> None:
        """Ends a job of several processes, whose others wait for the save that has failed here."""
        if not processes.several():
            return
        try:
            with self._errors(f"save the checkpoint of step {self._writing}"):
                raise error
        except Exception as told:
            reason = str(told) if isinstance(told, UserError) else first_line(told)
        print(f"mtl-jax: process {processes.place()} stops: {reason}", file=sys.stderr)
        processes.abort(1)

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> bool:
        """Starts to save one checkpoint; returns as soon as the arrays are copied to the host.

        Where the storage fails for a moment, it waits and tries again.

        Args:
          step: number of finished training steps.
          state: pytree of jax arrays.
          data_state: JSON-able position in the data after that step.
          meta: JSON-able description; holds the model's sizes and the task ids.
          metrics: measured values at this step, by name; `best_metric` is looked up among them.
            None where nothing was measured: such a checkpoint never counts as a best one.
          wait: return when it is complete.

        Returns:
          False if this step is already saved (nothing is done), else True.

        Raises:
          UserError: a newer checkpoint exists, `best_metric` is not among `metrics`, the folder has
            vanished, or this or the previous background save could not be written.
        """
        with self._errors(f"save the checkpoint of step {step}"):
            if not self._there():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        steps = self.steps()
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise UserError(
                f"Cannot save step {step}: {self.directory} already holds the later step "
                f"{steps[-1]}. Continue from that one, or train into a new run directory."
            )
        best = self._best_metric(metrics)
        # Of this step there may have been others, which were set aside.
        self._checked = {(other, item) for other, item in self._checked if other != step}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree.map(save_args_of, state)),
            data_state=ocp.args.JsonSave(dict(data_state)),
            meta=ocp.args.JsonSave(dict(meta)),
            **({MEASURED: ocp.args.JsonSave(best)} if best else {}),
        )
        # A failure of the save before is overtaken by this one.
        self.lost()
        while True:
            with self._errors(f"save the checkpoint of step {step}"):
                try:
                    self._writing = step
                    # `force`, because the decision to save has been made by the caller.
                    self._manager.save(step, args=items, metrics=best, force=True)
                    self._try_again = None
                    if wait:
                        self._settle()
                    return True
                except Exception as error:
                    time.sleep(self._failed(step, error))

    def lost(self) -> bool:
        """Whether a save failed in the background and is to be repeated now: save the next step.

        Cheap, so that it can be asked after every step; False while the next try has to wait.

        Raises:
          UserError: it failed for a reason that does not pass, or too often.
        """
        step = self._writing
        if step is not None and not self._manager.is_saving_in_progress():
            with self._errors(f"save the checkpoint of step {step}"):
                try:
                    self._settle()
                except Exception as error:
                    self._try_again = time.monotonic() + self._failed(step, error)
        return self._try_again is not None and time.monotonic() >= self._try_again

    def _settle(self) -> None:
        """Waits for the background save; raises what it failed with."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        finally:
            step, self._writing = self._writing, None
        if step is not None:
            self._failures = 0

    def _failed(self, step: int, error: Exception) -> float:
        """Seconds to wait before another try; raises `error` where none can help."""
        self._writing = None
        # Several processes would have to agree on it: their job ends and is started again.
        hopeless = not transient(error) or self._failures == len(RETRY_SECONDS)
        if hopeless or processes.several() or not self._there():
            raise error
        seconds = RETRY_SECONDS[self._failures]
        self._failures += 1
        _log.warning(
            "could not save the checkpoint of step %d (%s): trying again in %g s",
            *(step, first_line(error), seconds),
        )
        # What the failed save has left is removed, and forgotten.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._open()
        return seconds

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        if self._read_only:
            # Another process may have saved or deleted since.
            with storage_errors("list the checkpoints", self.directory):
                retried("list the checkpoints", self._manager.reload)
        return sorted(self._manager.all_steps())

    def restore(
        self, step: int | None, abstract_state: Any
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Restores a whole checkpoint, on whatever mesh `abstract_state` describes.

        Args:
          step: which one; None for the newest.
          abstract_state: pytree of `jax.ShapeDtypeStruct`, with the sharding wanted for each array
            (without one, an array goes to the first device).

        Returns:
          The state (jax arrays, same tree), the data state and the meta.

        Raises:
          UserError: there is no such checkpoint, it holds other tensors (the first one that
            differs is named, with both shapes), or its files are damaged or may not be read.
          RuntimeError: of JAX, unchanged, where the memory does not suffice.
        """
        step = self._existing(step)
        check(self._place(step), tensors(abstract_state), self._stored(step))
        return self._read(step, abstract_state)

    def restore_parameters(
        self, step: int | None, abstract_parameters: Any, *, some: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Restores only `state.params`, as evaluation needs it, reading nothing of the optimizer.

        Args:
          step: which one; None for the newest.
          abstract_parameters: like `abstract_state` of `restore`, for the parameters alone.
          some: the checkpoint may hold others, which are not read.

        Returns:
          The parameters (jax arrays, same tree) and the meta.

        Raises:
          UserError: as `restore`.
        """
        step = self._existing(step)
        wanted = tensors({"params": abstract_parameters})
        stored = self._stored(step)
        names = [name for name in stored if is_param(name) and (name in wanted or not some)]
        check(self._place(step), wanted, {name: stored[name] for name in names})
        state, _, meta = self._read(step, {"params": abstract_parameters})
        return state["params"], meta

    def parameters(self, step: int | None) -> dict[str, Any]:
        """Shapes and dtypes of a checkpoint's parameters by path, without reading any array."""
        stored = self._stored(self._existing(step))
        return {name.removeprefix(PARAMS): x for name, x in stored.items() if is_param(name)}

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns the meta of a checkpoint (None for the newest) without reading any array."""
        step = self._existing(step)
        self.verify(step, ("meta",))
        with self._damage_errors(step):
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return dict(self._again(step, lambda: self._manager.restore(step, args=items)).meta)

    def wait(self) -> None:
        """Blocks until the background save is complete; raises UserError if it failed."""
        with self._errors("finish a checkpoint"):
            self._settle()

    def close(self) -> None:
        """Completes the background save and frees the threads; raises UserError if it failed."""
        try:
            self.wait()
        finally:
            with self._errors("finish a checkpoint"):
                self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _best_metric(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        """Returns the one metric to store; a value that is not finite can never be the best."""
        name = self._cfg.best_metric
        if metrics is None or not name:
            return None
        if name not in metrics:
            raise UserError(
                f"Checkpoint.best_metric = {name!r} was not measured.{suggest(name, metrics)} "
                f"Measured: {', '.join(sorted(metrics)) or 'nothing'}."
            )
        value = float(metrics[name])
        return {name: value} if math.isfinite(value) else None

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} holds no complete checkpoint.")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(
                f"{self.directory} holds no complete checkpoint of step {step}, but of "
                f"{', '.join(map(str, steps))}."
            )
        return step

    def _stored(self, step: int) -> dict[str, Any]:
        """Shapes and dtypes on disk by path, without reading any array."""
        self.verify(step)
        with self._damage_errors(step):
            metadata = self._again(step, lambda: self._manager.item_metadata(step)).state
            if metadata is None:
                # Orbax answers so too where the folder may not be read; this raises the reason.
                list((self.directory / str(step) / ITEMS[0]).iterdir())
                raise FileNotFoundError("the description of its tensors is missing")
            return tensors(metadata.tree)

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        abstract = jax.tree.map(_with_sharding, abstract)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                # Which tensors there are has been checked. What holds none, as the state of no
                # method, older checkpoints need not have.
                partial_restore=True,
            ),
            data_state=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        with self._damage_errors(step):
            restored = self._again(step, lambda: self._manager.restore(step, args=items))
        return restored.state, dict(restored.data_state), dict(restored.meta)

    def _again(self, step: int, read: Callable[[], _T]) -> _T:
        """`read()`, again where the storage fails for a moment; not where others wait in theirs."""
        if processes.several():
            return read()
        return retried(f"read the checkpoint of step {step}", read)

    @contextlib.contextmanager
    def _damage_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        # What a damaged file raises depends on where it is hit: JSON, tensorstore or Orbax.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # These are no fault of the files: nobody must be led to delete them. JAX's own tell of
            # too little memory, or that another process of the job has died.
            of_jax = any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes(error))
            if of_jax or said(error, "RESOURCE_EXHAUSTED"):
                raise
            if withheld(error):
                with storage_errors(f"read the checkpoint of step {step}", self.directory):
                    raise
            older = [other for other in self.steps() if other < step]
            advice = (
                f"`mtl-jax train` would continue from step {older[-1]}; name "
                f"{self.directory / str(older[-1])} to read that one."
                if older
                else "There is no older checkpoint."
            )
            raise DamagedCheckpoint(
                f"{self._place(step)} cannot be read, its files are damaged or incomplete "
                f"({first_line(error)}). {advice}"
            ) from error

    def _place(self, step: int) -> str:
        return f"The checkpoint of step {step} in {self.directory}"

    def verify(self, step: int, items: Sequence[str] = ITEMS) -> None:
        """Compares the files of a checkpoint with their checksums, once.

        In a job of several processes each reads a part of them, and all get the same answer.

        Raises:
          DamagedCheckpoint: names the file that is not as it was written.
          UserError: the files may not be read, or the storage fails, also later (`retried`).
        """
        new = [item for item in items if (step, item) not in self._checked]
        folder = self.directory / str(step)
        several = processes.several() and "state" in new  # the others are a few bytes
        part = (jax.process_index(), jax.process_count()) if several else (0, 1)

        def look() -> str:
            if processes.several() and not folder.is_dir():
                # Another process has seen it: to this one the news has not come yet.
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
            return checksums.problem([folder / item for item in new], *part)

        with self._damage_errors(step):
            found, number = "", 0
            try:
                found = retried(f"read the checkpoint of step {step}", look)
            except OSError as error:
                if not several:
                    raise
                found, number = first_line(error), error.errno or errno.EIO
            of_each = processes.gather((found, number)) if several else [(found, number)]
            for problem, refusal in of_each:
                if refusal:
                    raise OSError(refusal, problem)
                if problem:
                    raise ValueError(problem)
        self._checked.update((step, item) for item in new)
        if step not in self._manager.all_steps():
            self._manager.reload()  # it was not to be seen when the folder was opened

    def set_aside(self, steps: Sequence[int]) -> Path:
        """Moves checkpoints out of the way of later ones; nothing is deleted.

        Returns:
          Where they are: the folder `checkpoints.set_aside` beside that of the checkpoints.

        Raises:
          UserError: the storage refuses.
        """
        self.wait()
        aside = self.directory.with_name(f"{self.directory.name}.set_aside")
        if processes.primary():
            with storage_errors("set checkpoints aside", aside):
                aside.mkdir(exist_ok=True)
                # The newest first: a kill in between leaves a row of checkpoints without a gap.
                for step in sorted(steps, reverse=True):
                    names = [str(step), *(f"{step}.{number}" for number in range(2, 1000))]
                    free = next(name for name in names if not (aside / name).exists())
                    (self.directory / str(step)).rename(aside / free)
        processes.gather(None)  # nobody looks before they are gone
        self._manager.reload()
        return aside


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

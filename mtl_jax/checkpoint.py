"""Checkpoints: training state, position in the data and description saved and restored as one unit.

A thin layer over Orbax's `CheckpointManager`. One checkpoint is the folder `checkpoints/STEP` with
three items: `state` (the pytree of arrays, sharded), `data_state` (JSON) and `meta` (JSON). It gets
its final name only when all of it is written, so that a killed save leaves no half checkpoint, and
an older checkpoint is deleted only after a newer one is complete. The newest is never deleted.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mtl_jax.errors import UserError, suggest
from mtl_jax.storage import storage_errors

_ITEMS = ("state", "data_state", "meta")
_PARAMS = "params/"
_NAMES_SHOWN = 5
_CHUNK_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; a checkpoint stays if any of the `keep` rules wants it.

    Attributes:
      every: save every so many steps; 0 saves only at the end.
      keep: how many of the newest stay; at least 1.
      keep_best: how many of the best by `best_metric` stay; 0 for none.
      best_metric: name in the `metrics` given to `Checkpointer.save`; needed by `keep_best`.
      best_mode: "max" if a larger metric is better, "min" if a smaller one is.
      keep_every: checkpoints whose step is a multiple of this stay for ever; 0 for none.
      asynchronous: write in the background while training goes on.
    """

    every: int = 1000
    keep: int = 3
    keep_best: int = 0
    best_metric: str = ""
    best_mode: str = "max"
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(
                f"Checkpoint.keep = {self.keep}: it must be at least 1, for the newest checkpoint "
                "is never deleted."
            )
        for name in ("every", "keep_best", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"Checkpoint.{name} = {getattr(self, name)}: it must be 0 or more.")
        if self.best_mode not in ("max", "min"):
            raise UserError(
                f"Checkpoint.best_mode = {self.best_mode!r}: it must be 'max' or 'min'."
                f"{suggest(self.best_mode, ('max', 'min'))}"
            )
        if bool(self.keep_best) != bool(self.best_metric):
            raise UserError(
                "Checkpoint.keep_best and Checkpoint.best_metric belong together: set both or "
                f"neither (now {self.keep_best} and {self.best_metric!r})."
            )


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
        with storage_errors("open the folder of checkpoints", self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory, options=self._options(), item_handlers=_item_handlers()
            )

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts to save one checkpoint; returns as soon as the arrays are copied to the host.

        Args:
          step: number of finished training steps.
          state: pytree of jax arrays.
          data_state: JSON-able position in the data after that step.
          meta: JSON-able description; holds the model's sizes and the task ids.
          metrics: measured values at this step, by name; `best_metric` is looked up among them.
            None where nothing was measured: such a checkpoint never counts as a best one.

        Returns:
          False if this step is already saved (nothing is done), else True.

        Raises:
          UserError: a newer checkpoint exists, `best_metric` is not among `metrics`, or this or the
            previous background save could not be written.
        """
        steps = self.steps()
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise UserError(
                f"Cannot save step {step}: {self.directory} already holds the later step "
                f"{steps[-1]}. Continue from that one, or train into a new run directory."
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree.map(_save_args, state)),
            data_state=ocp.args.JsonSave(dict(data_state)),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with storage_errors(f"save the checkpoint of step {step}", self.directory):
            self._manager.check_for_errors()
            # `force`, because the decision to save has been made by the caller.
            self._manager.save(step, args=items, metrics=self._best_metric(metrics), force=True)
        return True

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        if self._read_only:
            # Another process may have saved or deleted since.
            self._manager.reload()
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
        self._check_tensors(step, _tensors(abstract_state), self._stored(step))
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
        wanted = _tensors({"params": abstract_parameters})
        stored = self._stored(step)
        names = [name for name in stored if _is_param(name) and (name in wanted or not some)]
        self._check_tensors(step, wanted, {name: stored[name] for name in names})
        state, _, meta = self._read(step, {"params": abstract_parameters})
        return state["params"], meta

    def parameters(self, step: int | None) -> dict[str, Any]:
        """Shapes and dtypes of a checkpoint's parameters by path, without reading any array."""
        stored = self._stored(self._existing(step))
        return {name.removeprefix(_PARAMS): x for name, x in stored.items() if _is_param(name)}

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns the meta of a checkpoint (None for the newest) without reading any array."""
        step = self._existing(step)
        with self._damage_errors(step):
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return dict(self._manager.restore(step, args=items).meta)

    def wait(self) -> None:
        """Blocks until the background save is complete; raises UserError if it failed."""
        with storage_errors("finish a checkpoint", self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Completes the background save and frees the threads; raises UserError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _options(self) -> ocp.CheckpointManagerOptions:
        if self._read_only:
            return ocp.CheckpointManagerOptions(read_only=True)
        cfg = self._cfg
        policies = ocp.checkpoint_managers
        rules: list[Any] = [policies.LatestN(n=cfg.keep)]
        if cfg.keep_best:
            rules.append(
                policies.BestN(
                    get_metric_fn=self._read_best_metric,
                    reverse=cfg.best_mode == "min",
                    n=cfg.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if cfg.keep_every:
            rules.append(policies.EveryNSteps(interval_steps=cfg.keep_every))
        return ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            # Orbax stores metrics only where a `best_fn` is given; the policy above decides.
            best_fn=self._read_best_metric if cfg.keep_best else None,
            best_mode=cfg.best_mode,
            enable_async_checkpointing=cfg.asynchronous,
            cleanup_tmp_directories=True,
        )

    def _read_best_metric(self, metrics: Mapping[str, float]) -> float:
        return float(metrics[self._cfg.best_metric])

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
        with self._damage_errors(step):
            metadata = self._manager.item_metadata(step).state
            if metadata is None:
                # Orbax answers so too where the folder may not be read; this raises the reason.
                list((self.directory / str(step) / _ITEMS[0]).iterdir())
                raise FileNotFoundError("the description of its tensors is missing")
            return _tensors(metadata.tree)

    def _check_tensors(self, step: int, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
        """Compares names, shapes and dtypes with what is on disk, before anything is read."""
        place = f"The checkpoint of step {step} in {self.directory}"
        shared = wanted.keys() & stored.keys()
        differing = [name for name in shared if _describe(wanted[name]) != _describe(stored[name])]
        missing = sorted(wanted.keys() - stored.keys(), key=_params_first)
        extra = sorted(stored.keys() - wanted.keys(), key=_params_first)
        only_params = all(map(_is_param, stored)) and not any(map(_is_param, missing))
        if missing and only_params and not differing and not extra:
            raise UserError(
                f"{place} holds parameters but no optimizer state: start from it in a new run "
                "directory, by Run.restore_from with Run.restore_optimizer = 'drop'."
            )
        problems = []
        for name in sorted(differing, key=_params_first)[:1]:
            ours, theirs = _describe(wanted[name]), _describe(stored[name])
            problems.append(f"tensor {name} is {theirs} in the checkpoint and {ours} in the run")
        if missing:
            problems.append(f"the checkpoint lacks {_enumerate(missing)}")
        if extra:
            problems.append(f"the run has no place for {_enumerate(extra)}")
        if not problems:
            return
        different = "; ".join(problems)
        if any(map(_is_param, [*differing, *missing, *extra])):
            raise UserError(
                f"{place} does not fit this run's model or optimizer: {different}. Use the "
                "configuration it was trained with, or another run directory."
            )
        if all(name.startswith("balance/") for name in [*differing, *missing, *extra]):
            raise UserError(
                f"{place} was trained with another way to share the update: {different}. Give "
                "Balance.method and Balance.by the values it was trained with, or start from its "
                "parameters in a new run directory, by Run.restore_from."
            )
        raise UserError(
            f"{place} fits this run's model, but not its optimizer: {different}. Give "
            "Optimizer.name, Optimizer.freeze and the like the values it was trained with, or "
            "start from its parameters in a new run directory, by Run.restore_from with "
            "Run.restore_optimizer = 'drop'."
        )

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        abstract = jax.tree.map(_with_sharding, abstract)
        with self._damage_errors(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        abstract,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                        # Which tensors there are has been checked. What holds none, as the state
                        # of no method, older checkpoints need not have.
                        partial_restore=True,
                    ),
                    data_state=ocp.args.JsonRestore(),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        return restored.state, dict(restored.data_state), dict(restored.meta)

    @contextlib.contextmanager
    def _damage_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        # What a damaged file raises depends on where it is hit: JSON, tensorstore or Orbax.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # These are no fault of the files: nobody must be led to delete them.
            if _is_said(error, "RESOURCE_EXHAUSTED"):
                raise
            if _is_refused(error):
                with storage_errors(f"read the checkpoint of step {step}", self.directory):
                    raise
            older = [other for other in self.steps() if other < step]
            advice = (
                f"Delete {self.directory / str(step)} to continue from step {older[-1]}."
                if older
                else "There is no older checkpoint."
            )
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} cannot be read, its files are "
                f"damaged or incomplete ({_first_line(error)}). {advice}"
            ) from error


def _item_handlers() -> dict[str, Any]:
    state, data_state, meta = _ITEMS
    return {
        state: ocp.PyTreeCheckpointHandler(),
        data_state: ocp.JsonCheckpointHandler(),
        meta: ocp.JsonCheckpointHandler(),
    }


def _save_args(leaf: Any) -> ocp.SaveArgs:
    """Arrays are cut along their first axis, so that a layer can be read without its stack."""
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim else ())


def _is_param(name: str) -> bool:
    return name.startswith(_PARAMS)


def _params_first(name: str) -> tuple[bool, str]:
    return not _is_param(name), name


def _tensors(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as `params/encoder/mlp/wi_0/kernel`.

    Dataclasses, named tuples and lists come back from disk as dicts and lists; only the names of
    their entries are compared.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    shape = "x".join(str(size) for size in getattr(leaf, "shape", ())) or "scalar"
    return f"{shape} {jax.numpy.dtype(leaf.dtype).name}"


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_said(error: BaseException, status: str) -> bool:
    """Whether the error or a cause of it names a status of XLA or tensorstore in its text."""
    return any(status in str(cause) for cause in _causes(error))


def _is_refused(error: BaseException) -> bool:
    return any(isinstance(cause, PermissionError) for cause in _causes(error)) or _is_said(
        error, "PERMISSION_DENIED"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

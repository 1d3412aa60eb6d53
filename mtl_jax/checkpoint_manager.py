"""Orbax's manager of checkpoints, with our rules of what stays and our checksums.

Where `Checkpoint.keep_best` asks for it, a checkpoint has a fourth item: what was measured.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from mtl_jax import checksums
from mtl_jax.checkpoint_config import CheckpointConfig
from mtl_jax.storage import first_line

ITEMS = ("state", "data_state", "meta")
MEASURED = "measured"
_CHUNK_BYTES = 1 << 26
_log = logging.getLogger(__name__)


class Manager(ocp.CheckpointManager):
    """Differs from Orbax's own where that one trusts files or loses a signal."""

    def __init__(
        self,
        directory: Path,
        cfg: CheckpointConfig,
        there: Callable[[], bool],
        failed: Callable[[Exception], None],
        *,
        read_only: bool,
    ):
        """Opens the folder.

        Args:
          directory: the folder of checkpoints; an absolute path.
          cfg: what to keep.
          there: whether the folder is still the one that was opened.
          failed: called in the background with what a save there has failed with, before the
            other processes of a job are waited for.
          read_only: nothing is written or deleted.
        """
        # Before the rest: it asks for the metrics of what is there.
        self._best = "" if read_only else cfg.best_metric
        self._unknown: set[int] = set()  # checkpoints whose metric cannot be read
        self._on_failure = failed
        kinds = ocp.PyTreeCheckpointHandler, *[ocp.JsonCheckpointHandler] * 3
        made = [checksums.listing(kind(), there) for kind in kinds]
        handlers = dict(zip((*ITEMS, MEASURED), made, strict=True))
        options = ocp.CheckpointManagerOptions(read_only=True)
        if not read_only:
            options = self._writing_options(cfg)
        super().__init__(directory, options=options, item_handlers=handlers)

    def _writing_options(self, cfg: CheckpointConfig) -> ocp.CheckpointManagerOptions:
        policies = ocp.checkpoint_managers
        rules: list[Any] = [policies.LatestN(n=cfg.keep)]
        if cfg.keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics[cfg.best_metric],
                reverse=cfg.best_mode == "min",
                n=cfg.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            rules += [best, _Steps(self._unknown)]
        if cfg.keep_every:
            rules.append(policies.EveryNSteps(interval_steps=cfg.keep_every))
        return ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            enable_async_checkpointing=cfg.asynchronous,
            cleanup_tmp_directories=True,
        )

    def metrics(self, step: int) -> dict[str, float] | None:
        """What was measured at a checkpoint; None where nothing was, or its file is damaged.

        Orbax's own trusts the file, and cannot be opened at all where it is no JSON.
        """
        folder = Path(self.directory) / str(step)
        # Earlier versions let Orbax write it, without a list of checksums.
        places = (folder / MEASURED / "metadata", folder / "metrics" / "metrics")
        path = next((path for path in places if path.parent.is_dir()), None)
        if not self._best or path is None:
            return None
        try:
            if problem := checksums.problem([path.parent]):
                raise ValueError(problem)
            found = json.loads(path.read_text(encoding="utf-8"))
            if self._best not in found:  # another one was asked for then
                return None
            value = float(found[self._best])
            if not math.isfinite(value):
                raise ValueError(f"{value} is no metric")
            return {self._best: value}
        except (OSError, ValueError, TypeError, OverflowError) as error:
            if step not in self._unknown:
                _log.warning(
                    "what was measured at the checkpoint of step %d cannot be read (%s): it stays, "
                    "but does not count as a best one",
                    *(step, first_line(error)),
                )
            self._unknown.add(step)
            return None

    def reached_preemption(self, step: int) -> bool:
        """Whether the job is told to stop: never, as the run itself asks, once for each step.

        Orbax asks again in the background with the number of the step that it has saved. That sets
        JAX's count of steps back, and then processes miss the step at which all of them shall stop.
        """
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self._on_failure(error)
            raise


class _Steps:
    """A rule of Orbax by which some checkpoints stay."""

    def __init__(self, steps: set[int]):
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step in self._steps for checkpoint in checkpoints]


def save_args_of(leaf: Any) -> ocp.SaveArgs:
    """Arrays are cut along their first axis, so that a layer can be read without its stack."""
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim else ())

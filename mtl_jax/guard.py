"""A loss that is not finite, or jumps: found, counted, and met as `Guard.on_bad_loss` says.

The loss of step n is compared with those up to n - 2, because the loss of n - 1 is not known where
step n is dispatched; so the answer does not depend on when a loss was read, and a run that was
killed and goes on gives the same one.
"""

import collections
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mtl_jax import processes, sharding
from mtl_jax.errors import UserError
from mtl_jax.guard_config import GuardConfig
from mtl_jax.run_directory import RunDirectory

_ADVICE = (
    "Look at that task's data, or lower Optimizer.learning_rate, or set Optimizer.clip_norm, or "
    "let Guard.on_bad_loss 'skip' such updates or 'roll_back'."
)


class RollBack(Exception):
    """The run shall go back and leave out the data up to and with those of `batch`."""

    def __init__(self, step: int, reason: str, batch: Any):
        super().__init__(reason)
        self.step, self.reason, self.batch = step, reason, batch


class Guard:
    """Judges the loss of every step; the same in all processes, as metrics are.

    Attributes:
      skips: updates left out so far.
      roll_backs: so far.
    """

    def __init__(self, cfg: GuardConfig, run: RunDirectory):
        """Starts with no losses seen.

        Args:
          cfg: what to do.
          run: gets a line of events.jsonl for all that happens.
        """
        self._cfg, self._run = cfg, run
        # One more than the window, for the loss of step n - 1 may be among them.
        self._losses: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=cfg.spike_window + 1
        )
        self.skips = self.roll_backs = 0
        self._in_a_row = 0
        self._argument: tuple[np.float32, jax.Array] | None = None  # the last one that was made

    def limit(self, step: int) -> float:
        """The loss above which that of a step is bad; infinite where none is."""
        if not self._cfg.spike_factor:
            return math.inf
        before = [loss for number, loss in self._losses if number <= step - 2]
        window = before[-self._cfg.spike_window :]
        if len(window) < self._cfg.spike_window:
            return math.inf
        return float(np.float32(self._cfg.spike_factor * statistics.median(window)))

    def argument(self, step: int, mesh: jax.sharding.Mesh) -> jax.Array | None:
        """`limit` for the step's program, on all devices; None where the program does not ask."""
        if self._cfg.on_bad_loss != "skip":
            return None
        value = np.float32(self.limit(step))
        if self._argument is None or self._argument[0] != value:
            place = sharding.replicated(mesh)
            # Unlike device_put, it sends nothing between processes.
            made = jax.make_array_from_callback((), place, lambda index: value)
            self._argument = value, made
        return self._argument[1]

    def judge(self, step: int, values: Mapping[str, Any], batch: Any, reason: str) -> bool:
        """Whether the step was a good one; to be asked once for each, in their order.

        Args:
          step: its number.
          values: its metrics, on the host.
          batch: what it was trained on.
          reason: what is wrong if the loss or the gradient is not finite; else "".

        Raises:
          UserError: the run shall stop.
          RollBack: it shall go back.
        """
        loss, limit = float(values["loss"]), self.limit(step)
        if not reason and loss > limit:
            reason = (
                f"The loss at step {step} is {loss:.4g}, more than Guard.spike_factor = "
                f"{self._cfg.spike_factor:g} times the median {limit / self._cfg.spike_factor:.4g}"
            )
        if not reason:
            self._in_a_row = 0
            if self._cfg.spike_factor:
                self._losses.append((step, loss))
            return True
        if self._cfg.on_bad_loss == "roll_back":
            self._check(step, "roll_back", reason, self.roll_backs, self._cfg.max_roll_backs)
            raise RollBack(step, reason, batch)
        if self._cfg.on_bad_loss == "stop":
            raise UserError(
                f"{reason}. The run stops; earlier checkpoints are untouched. {_ADVICE}"
            )
        self._check(step, "skip", reason, self._in_a_row, self._cfg.max_skips)
        self.skips += 1
        self._in_a_row += 1
        self.tell(step, "skip", f"{reason}: update {self.skips} that is left out")
        return False

    def _check(self, step: int, way: str, reason: str, count: int, most: int) -> None:
        if count < most:
            return
        what = "updates in a row were left out" if way == "skip" else "times the run went back"
        name = "max_skips" if way == "skip" else "max_roll_backs"
        self.tell(step, "stop", reason)
        raise UserError(
            f"{reason}. {most} {what}, as many as Guard.{name} allows: the run stops; earlier "
            f"checkpoints are untouched. {_ADVICE}"
        )

    def tell(self, step: int, event: str, reason: str, **more: Any) -> None:
        """A warning on the screen and a line of events.jsonl, which is never shortened.

        Raises:
          UserError: it cannot be written.
        """
        print(f"warning: {reason}", file=processes.screen(), flush=True)
        row = {"time": round(time.time(), 3), "step": step, "event": event, "reason": reason}
        self._run.append_json("events.jsonl", row | more)

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; {} where nothing has happened and no loss is compared."""
        if not (self._losses or self.skips or self.roll_backs):
            return {}
        counts = {"skips": self.skips, "in_a_row": self._in_a_row, "roll_backs": self.roll_backs}
        return {"guard": {**counts, "losses": [[number, loss] for number, loss in self._losses]}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes what `as_json` gave; what lacks it starts with no losses seen."""
        mine = saved.get("guard", {})
        self.skips, self._in_a_row = mine.get("skips", 0), mine.get("in_a_row", 0)
        self.roll_backs = mine.get("roll_backs", 0)
        self._losses.clear()
        self._losses.extend((int(number), float(loss)) for number, loss in mine.get("losses", []))

    def target(self, bad: RollBack, steps: list[int]) -> int | None:
        """Which of the checkpoints to go back to, None: to the start."""
        old = [step for step in steps if step <= bad.step - self._cfg.roll_back_steps]
        return max(old) if old else min(steps, default=None)

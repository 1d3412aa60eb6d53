"""The values that say when a run saves a checkpoint and which of them stay."""

import dataclasses

from mtl_jax.errors import UserError, suggest


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

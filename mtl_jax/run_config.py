"""The values that say how long a run is and where it leaves what it finds."""

import dataclasses
import re
from collections.abc import Sequence

from mtl_jax import patterns
from mtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunConfig:
    r"""One run.

    Attributes:
      directory: the run directory; a run found there is continued.
      steps: updates in all.
      seed: of the initial parameters and of dropout (the data has its own, `Data.seed`).
      log_every: steps between two lines of metrics.jsonl.
      evaluate_untrained: also evaluate the fresh parameters, as step 0, to compare with.
      restore_from: a run directory, its `checkpoints` folder or one step in it, to start from when
        `directory` holds no checkpoint yet; empty: start from fresh parameters.
      restore_optimizer: "drop" takes only the parameters of `restore_from` and starts at step 0;
        "keep" takes optimizer state and step number too. The position in the data starts anew.
      restore_map: pairs (pattern, source) that say where in `restore_from` a parameter of this run
        comes from, as T5X's assignment map. The first pattern that matches a parameter's whole path
        decides (`patterns.py`); `source` is the path in the checkpoint, with groups of the pattern
        as \1, or '' (or None) to leave the parameter fresh. What no pattern matches comes from
        its own path. Shapes must fit, the rest of the model may be another.
      tensorboard: write TensorBoard events beside metrics.jsonl.
      compile_cache: keep compiled programs beside the run directory for the next start.
    """

    directory: str = ""
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    evaluate_untrained: bool = False
    restore_from: str = ""
    restore_optimizer: str = "drop"
    restore_map: Sequence[tuple[str, str | None]] = ()
    tensorboard: bool = False
    compile_cache: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"Run.steps must not be negative, got {self.steps}.")
        if self.log_every < 1:
            raise UserError(f"Run.log_every must be at least 1, got {self.log_every}.")
        if self.restore_optimizer not in ("keep", "drop"):
            raise UserError(
                f"Run.restore_optimizer must be 'keep' or 'drop', got {self.restore_optimizer!r}."
            )
        if self.restore_optimizer == "keep" and not self.restore_from:
            raise UserError(
                "Run.restore_optimizer = 'keep' needs a checkpoint: set Run.restore_from."
            )
        self._check_map()

    def _check_map(self) -> None:
        object.__setattr__(self, "restore_map", tuple(map(tuple, self.restore_map)))
        patterns.check("Run.restore_map", [pattern for pattern, _ in self.restore_map])
        if self.restore_map and not self.restore_from:
            raise UserError("Run.restore_map needs a checkpoint: set Run.restore_from.")
        if self.restore_map and self.restore_optimizer == "keep":
            raise UserError(
                "Run.restore_map takes parameters alone, and Run.restore_optimizer = 'keep' a "
                "whole state: set Run.restore_optimizer = 'drop' or remove the map."
            )
        for pattern, source in self.restore_map:
            try:
                # A template is checked before the first match is sought.
                re.compile(pattern).sub(source or "", "")
            except (re.error, IndexError) as error:
                raise UserError(
                    f"Run.restore_map: {source!r} does not fit the pattern {pattern!r} ({error})."
                ) from error

"""The values that say how long a run is and where it leaves what it finds."""

import dataclasses

from mtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run.

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

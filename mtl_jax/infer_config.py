"""The values of `mtl-jax infer`."""

import dataclasses

from mtl_jax.errors import UserError

ON_BAD_LINE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """How a file of inputs is worked through.

    Attributes:
      batch_size: rows at a time.
      window: batches whose rows are sorted by length together, and written together.
      inputs_length: longer inputs are cut (and counted).
      dtype: of parameters and computation, "float32" or "bfloat16".
      attention: as `T5.attention`.
      step: checkpoint of a run; -1: the newest, or the one that --checkpoint names.
      task: of a model whose tasks have parameters of their own: which one the inputs are of; for a
        task that it was not trained on its cluster, or '*' for the mean of all.
      tokenizer: folder with the vocabulary; empty: the one that the checkpoint carries along.
      on_bad_line: "stop" at a line that is no valid row, or "skip" it into OUTPUT.skipped.jsonl.
      log_probs: write the log-probability of each generated token, too.
    """

    batch_size: int = 32
    window: int = 8
    inputs_length: int = 512
    dtype: str = "float32"
    attention: str = "auto"
    step: int = -1
    task: str = ""
    tokenizer: str = ""
    on_bad_line: str = "stop"
    log_probs: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "window", "inputs_length"):
            if getattr(self, name) < 1:
                raise UserError(f"Infer.{name} must be at least 1, got {getattr(self, name)}.")
        if self.on_bad_line not in ON_BAD_LINE:
            raise UserError(
                f"Infer.on_bad_line must be one of {', '.join(ON_BAD_LINE)}, got "
                f"{self.on_bad_line!r}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"Infer.dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.")
        if self.step < -1:
            raise UserError(f"Infer.step must be a step, or -1 for the newest, got {self.step}.")

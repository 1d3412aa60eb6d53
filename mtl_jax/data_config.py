"""The values that say which data a run reads; free of TensorFlow, so they can be read early."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl_jax.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """What the training stream reads and how it lays it out.

    Attributes:
        mixture: name of a registered SeqIO Task or Mixture, or the name given by MixtureConfig.
        task_modules: Python modules imported for their registrations; the working directory is
            importable.
        data_dir: the data folder; empty: the environment variable MTL_JAX_DATA.
        split: the split of every task.
        inputs_length: encoder tokens of a row.
        targets_length: decoder tokens of a row.
        batch_size: rows of the GLOBAL batch.
        pack: several examples in a row (False: one).
        seed: of the drawing of tasks and of the shuffling.
        shuffle: whether each epoch of each task is shuffled.
        num_shards: virtual shards; 0 means the number of processes. The global batch depends on
            the number of shards, not on the number of processes that read them.
        prefetch: batches made ahead by a background thread; 0 makes them on demand.
        use_cached: read SeqIO's offline cache where a task has one.
        lookahead: examples, for every row of a shard, that may wait for a row they fit in.
    """

    mixture: str = ""
    task_modules: Sequence[str] = ()
    data_dir: str = ""
    split: str = "train"
    inputs_length: int = 512
    targets_length: int = 128
    batch_size: int = 32
    pack: bool = True
    seed: int = 0
    shuffle: bool = True
    num_shards: int = 0
    prefetch: int = 2
    use_cached: bool = False
    lookahead: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_modules", _names("Data.task_modules", self.task_modules))
        for least, fields in (
            (1, ("inputs_length", "targets_length", "batch_size")),
            (0, ("num_shards", "prefetch", "lookahead")),
        ):
            for field in fields:
                if getattr(self, field) < least:
                    raise UserError(
                        f"Data.{field} must be at least {least}, not {getattr(self, field)}."
                    )


@dataclass(frozen=True)
class MixtureConfig:
    """A SeqIO Mixture made from Gin.

    Attributes:
        name: of the new mixture; empty: none is made.
        tasks: names of tasks or mixtures, or globs ("p3_*") over the registered tasks.
        rates: "equal", "examples" (the number of training examples, SeqIO's order: cap, then
            temperature), or numbers by task name or glob.
        maximum: cap on the number of examples a task counts for; only with rates="examples".
        temperature: rates become rate ** (1 / temperature); only with rates="examples".
    """

    name: str = ""
    tasks: Sequence[str] = ()
    rates: Mapping[str, float] | str = "examples"
    maximum: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names("Mixture.tasks", self.tasks))
        if self.tasks and not self.name:
            raise UserError("Mixture.tasks is given but Mixture.name is not: name the mixture.")
        # Written so that "not a number" is refused too.
        if not self.temperature > 0:
            raise UserError(f"Mixture.temperature must be positive, not {self.temperature}.")
        if self.maximum is not None and not self.maximum > 0:
            raise UserError(f"Mixture.maximum must be positive or None, not {self.maximum}.")


def _names(field: str, names: Sequence[str]) -> tuple[str, ...]:
    # A bare text is a sequence too: of its letters.
    if isinstance(names, str):
        raise UserError(f"{field} must be a list of names, not {names!r}: write [{names!r}].")
    return tuple(names)

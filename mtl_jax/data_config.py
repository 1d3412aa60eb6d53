"""The values that say which data a run reads; free of TensorFlow, so they can be read early."""

import dataclasses
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
        blocks: blocks of rows in a batch, each of one task, which are the step's microbatches; 0:
            rows of several tasks, or as many blocks as Balance and Sharing need. The rates stay
            those of examples.
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
    blocks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_modules", _names("Data.task_modules", self.task_modules))
        for least, fields in (
            (1, ("inputs_length", "targets_length", "batch_size")),
            (0, ("num_shards", "prefetch", "lookahead", "blocks")),
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
            temperature), "unimax" (equal shares, but no task more often than `max_epochs`), or
            numbers by task name or glob.
        maximum: cap on the number of examples a task counts for; only with rates="examples".
        maximum_per_dataset: T0's cap: a task with more examples counts for this number divided by
            the number of tasks of its dataset in the mixture; only with rates="examples".
        temperature: rates become rate ** (1 / temperature); only with rates="examples".
        max_epochs: how often a task may be repeated within the budget; only with rates="unimax".
        budget: what the whole run reads, in the unit of the tasks' sizes: examples, summed over all
            tasks (packing puts several into a row: about steps x rows x examples in a row); only
            with rates="unimax". A run that goes on for longer repeats more.
    """

    name: str = ""
    tasks: Sequence[str] = ()
    rates: Mapping[str, float] | str = "examples"
    maximum: float | None = None
    maximum_per_dataset: float | None = None
    temperature: float = 1.0
    max_epochs: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names("Mixture.tasks", self.tasks))
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if given and not self.name:
            raise UserError(
                f"Mixture.{given[0]} is given but Mixture.name is not: name the mixture."
            )
        # Written so that "not a number" is refused too.
        if not self.temperature > 0:
            raise UserError(f"Mixture.temperature must be positive, not {self.temperature}.")
        for field in ("maximum", "maximum_per_dataset", "max_epochs", "budget"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise UserError(f"Mixture.{field} must be positive or None, not {value}.")
        self._check_rates()

    def _check_rates(self) -> None:
        """Refuses options of other rates than those of the mixture."""
        for rates, options in _RATE_OPTIONS.items():
            changed = [field for field in options if getattr(self, field) != options[field]]
            if changed and self.rates != rates:
                raise UserError(
                    f"Mixture.{changed[0]} is set, but {' and '.join(options)} need "
                    f"Mixture.rates={rates!r}; it is {self.rates!r}."
                )
        missing = [field for field in _RATE_OPTIONS["unimax"] if getattr(self, field) is None]
        if self.rates == "unimax" and missing:
            raise UserError(f"Mixture.{missing[0]} is missing: Mixture.rates='unimax' needs it.")
        if self.maximum is not None and self.maximum_per_dataset is not None:
            raise UserError(
                "Mixture.maximum and Mixture.maximum_per_dataset are two caps: remove one."
            )


# Which rates the options of a mixture belong to, and what they are where they are not set.
_RATE_OPTIONS: dict[str, dict[str, float | None]] = {
    "examples": {"maximum": None, "maximum_per_dataset": None, "temperature": 1.0},
    "unimax": {"max_epochs": None, "budget": None},
}


def _names(field: str, names: Sequence[str]) -> tuple[str, ...]:
    # A bare text is a sequence too: of its letters.
    if isinstance(names, str):
        raise UserError(f"{field} must be a list of names, not {names!r}: write [{names!r}].")
    return tuple(names)

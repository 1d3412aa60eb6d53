"""The values that say which data a run reads; free of TensorFlow, so they can be read early."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_jax.errors import UserError, suggest


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
        use_cached: train on SeqIO's offline caches; a task whose cache is missing is refused, one
            that cannot have a cache is read as ever.
        cache_dirs: folders of caches, sought in this order (also for Eval.use_cached).
        lookahead: examples, for every row of a shard, that may wait for a row they fit in.
        blocks: blocks of rows in a batch, each of one task, which are the step's microbatches; 0:
            rows of several tasks, or as many blocks as Balance and Sharing need. The rates stay
            those of examples.
        exclude: a file of `mtl-jax decontaminate --remove`: its examples are not trained on. The
            rates stay as they are; a task that loses all of its examples is left out.
        max_corrupt: records of `split` that each task may leave out because they cannot be read,
            each with a warning and counted in data.json (docs/reliability.md); 0: the first one
            ends the run.
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
    cache_dirs: Sequence[str] = ()
    lookahead: int = 4
    blocks: int = 0
    exclude: str = ""
    max_corrupt: int = 0

    def __post_init__(self) -> None:
        for field in ("task_modules", "cache_dirs"):
            object.__setattr__(self, field, _names(f"Data.{field}", getattr(self, field)))
        for least, fields in (
            (1, ("inputs_length", "targets_length", "batch_size")),
            (0, ("num_shards", "prefetch", "lookahead", "blocks", "max_corrupt")),
        ):
            for field in fields:
                if getattr(self, field) < least:
                    raise UserError(
                        f"Data.{field} must be at least {least}, not {getattr(self, field)}."
                    )


# A number for all tasks, or numbers by task name or glob (or several with commas): a name beats a
# glob, a later glob an earlier one, and tasks that none fits have none.
Caps = float | Mapping[str, float] | None


@dataclass(frozen=True)
class MixtureConfig:
    """A SeqIO Mixture made from Gin.

    Attributes:
        name: of the new mixture; empty: none is made.
        tasks: names of tasks or mixtures, or globs ("p3_*") over the registered tasks.
        parts: instead of `tasks`: weights of parts of the mixture, {'p3_*': 0.4, 'cot_*': 0.1}. A
            part is a name or a glob, or several with commas. Its weight is that of all its tasks
            together; among them the rates are those of `rates`, but a part that is the name of a
            mixture keeps the rates inside it.
        hold_out: what is left out of the mixture, by what (keys of `HOLD_OUT_BY`):
            {'dataset': ['glue_qqp'], 'family': ['nli'], 'task': ['p3_*']}, names or globs.
        leave_one_out: "family", "dataset" or "task": besides the mixture, one without each family
            is made, of the name NAME_without_FAMILY; Data.mixture says which is trained on.
        rates: "equal", "examples" (the number of training examples, SeqIO's order: cap, then
            temperature), "unimax" (equal shares, but no task more often than `max_epochs`), or
            numbers by task name or glob.
        maximum: cap on the number of examples a task counts for, or caps by task name or glob; only
            with rates="examples".
        maximum_per_dataset: T0's cap, or caps by task name or glob: a task with more examples
            counts for this number divided by the number of tasks of its dataset in the mixture;
            only with rates="examples".
        maximum_dataset_total: cap, or caps by task name or glob, on what all tasks of a dataset
            (that the cap is for) count for together; each has its part of it by its examples; only
            with rates="examples".
        temperature: rates become rate ** (1 / temperature); only with rates="examples".
        max_epochs: how often a task may be repeated within the budget; only with rates="unimax".
        budget: what the whole run reads, in the unit of the tasks' sizes: examples, summed over all
            tasks (packing puts several into a row: about steps x rows x examples in a row); only
            with rates="unimax". A run that goes on for longer repeats more.
    """

    name: str = ""
    tasks: Sequence[str] = ()
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    hold_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    leave_one_out: str = ""
    rates: Mapping[str, float] | str = "examples"
    maximum: Caps = None
    maximum_per_dataset: Caps = None
    maximum_dataset_total: Caps = None
    temperature: float = 1.0
    max_epochs: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names("Mixture.tasks", self.tasks))
        self._check_parts()
        for by, names in self.hold_out.items():
            _check_kind("Mixture.hold_out", by)
            _names(f"Mixture.hold_out[{by!r}]", names)
        if self.leave_one_out:
            _check_kind("Mixture.leave_one_out", self.leave_one_out)
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)]
        if given and not self.name:
            raise UserError(
                f"Mixture.{given[0]} is given but Mixture.name is not: name the mixture."
            )
        # Written so that "not a number" is refused too.
        if not self.temperature > 0:
            raise UserError(f"Mixture.temperature must be positive, not {self.temperature}.")
        for name in (*CAPS, "max_epochs", "budget"):
            value = getattr(self, name)
            for pattern, number in _numbers(value).items():
                if not number > 0:
                    where = f"[{pattern!r}]" if isinstance(value, Mapping) else ""
                    raise UserError(
                        f"Mixture.{name}{where} must be positive or None, not {number}."
                    )
        self._check_rates()

    def _check_parts(self) -> None:
        if self.parts and self.tasks:
            raise UserError(
                "Mixture.parts and Mixture.tasks both say which tasks are mixed: remove one."
            )
        for pattern, weight in self.parts.items():
            if not 0 < weight < math.inf:
                raise UserError(
                    f"Mixture.parts[{pattern!r}] must be a positive number, not {weight}."
                )

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
        if self.rates == "unimax" and self.parts:
            raise UserError(
                "Mixture.rates = 'unimax' shares a budget among all tasks and Mixture.parts weighs "
                "them: remove one."
            )
        whole = [name for name in CAPS if isinstance(getattr(self, name), float | int)]
        if len(whole) > 1:
            raise UserError(f"Mixture.{whole[0]} and Mixture.{whole[1]} are two caps: remove one.")


# By what tasks are held out: fields of TaskInfo.
HOLD_OUT_BY = ("dataset", "family", "task")
CAPS = ("maximum", "maximum_per_dataset", "maximum_dataset_total")
# Which rates the options of a mixture belong to, and what they are where they are not set.
_RATE_OPTIONS: dict[str, dict[str, float | None]] = {
    "examples": {**dict.fromkeys(CAPS), "temperature": 1.0},
    "unimax": {"max_epochs": None, "budget": None},
}


def _default(of: dataclasses.Field[Any]) -> Any:
    if of.default_factory is not dataclasses.MISSING:
        return of.default_factory()
    return of.default


def _numbers(value: Caps) -> Mapping[str, float]:
    if isinstance(value, Mapping):
        return value
    return {} if value is None else {"*": value}


def _check_kind(where: str, kind: str) -> None:
    if kind not in HOLD_OUT_BY:
        raise UserError(
            f"{where}: {kind!r} is none of {', '.join(map(repr, HOLD_OUT_BY))}."
            f"{suggest(kind, HOLD_OUT_BY)}"
        )


def _names(field: str, names: Sequence[str]) -> tuple[str, ...]:
    # A bare text is a sequence too: of its letters.
    if isinstance(names, str):
        raise UserError(f"{field} must be a list of names, not {names!r}: write [{names!r}].")
    return tuple(names)

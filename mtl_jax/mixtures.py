"""Tasks and mixtures by name: importing their modules, mixtures from Gin, rates, vocabularies."""

import fnmatch
import functools
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import seqio

from mtl_jax import user_modules
from mtl_jax.data_config import DataConfig, MixtureConfig
from mtl_jax.errors import UserError, suggest
from mtl_jax.reading import tasks_of
from mtl_jax.task_info import info

DATA_FOLDER_VARIABLE = "MTL_JAX_DATA"


def load_modules(config: DataConfig) -> None:
    """Imports the task modules for their registrations, and makes the data folder known to them.

    The folder reaches the modules as the environment variable MTL_JAX_DATA.

    Raises:
        UserError: no such module or folder, or a module that fails while it is imported.
    """
    if config.data_dir:
        if not pathlib.Path(config.data_dir).is_dir():
            raise UserError(f"Data.data_dir: {config.data_dir} is not a folder.")
        os.environ[DATA_FOLDER_VARIABLE] = os.path.abspath(config.data_dir)
    user_modules.load("Data.task_modules", config.task_modules)


def provider(name: str) -> seqio.Task | seqio.Mixture:
    """Returns the registered task or mixture of a name.

    Raises:
        UserError: there is none; names the nearest ones.
    """
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name)
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    hint = suggest(name, known)
    raise UserError(
        f"No task or mixture {name!r} is registered.{hint} "
        + ("" if hint else f"{len(known)} are; `mtl-jax tasks` lists them. ")
        + "Is its module among Data.task_modules (for `mtl-jax tasks`: --module)?"
    )


def expand(names: Iterable[str]) -> list[str]:
    """Resolves names and globs over tasks and mixtures, in the order given, each once.

    A glob stands for tasks; if none fits it, for mixtures.

    Raises:
        UserError: a name is not registered, or a glob fits nothing.
    """
    found: dict[str, None] = {}
    for name in names:
        if not any(mark in name for mark in "*?["):
            provider(name)  # complains of an unknown one
            found[name] = None
            continue
        for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
            fitting = fnmatch.filter(sorted(registry.names()), name)
            if fitting:
                found.update(dict.fromkeys(fitting))
                break
        else:
            provider(name)
    return list(found)


def task_names(mixture: str) -> list[str]:
    """Returns the sorted names of the tasks of a mixture (or the name of the task itself)."""
    return [task.name for task in tasks_of(provider(mixture))]


def build_mixture(config: MixtureConfig) -> str:
    """Registers the mixture that Gin describes and returns its name ("" where none is described).

    Raises:
        UserError: a value that cannot be used; names the field.
    """
    if not config.name:
        return ""
    if not config.tasks:
        raise UserError(f"Mixture.tasks is empty: say which tasks {config.name!r} mixes.")
    # Mixtures among the tasks are opened: a rate belongs to a task, and none is counted twice.
    names = list(dict.fromkeys(task for name in expand(config.tasks) for task in task_names(name)))
    rates = _rates(config, names)
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if config.name in known:
        existing = seqio.MixtureRegistry.names()
        if config.name not in existing or not _same(config.name, rates):
            raise UserError(
                f"Mixture.name: {config.name!r} is already registered; choose another name."
            )
        return config.name
    try:
        seqio.MixtureRegistry.add(config.name, list(rates.items()))
    except ValueError as error:
        raise UserError(f"Mixture {config.name!r}: {error}") from error
    return config.name


def _same(name: str, rates: Mapping[str, Any]) -> bool:
    registered = seqio.MixtureRegistry.get(name).rate_per_task_name
    return {n: repr(r) for n, r in registered.items()} == {n: repr(r) for n, r in rates.items()}


def _rates(config: MixtureConfig, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(config.rates, Mapping):
        return _explicit_rates(config.rates, names)
    if config.rates == "equal":
        return dict.fromkeys(names, 1.0)
    if config.rates == "examples":
        if config.maximum_per_dataset is None:
            rate = functools.partial(
                examples_rate, maximum=config.maximum, temperature=config.temperature
            )
            return dict.fromkeys(names, rate)
        tasks_of_dataset = Counter(info(name).dataset for name in names)
        return {
            name: functools.partial(
                dataset_rate,
                maximum=config.maximum_per_dataset,
                tasks=tasks_of_dataset[info(name).dataset],
                temperature=config.temperature,
            )
            for name in names
        }
    if config.rates == "unimax":
        sizes = [examples_rate(seqio.TaskRegistry.get(name)) for name in names]
        # The configuration has checked that the two are given.
        shares = unimax_shares(sizes, config.max_epochs or 0.0, config.budget or 0.0)
        return dict(zip(names, shares, strict=True))
    raise UserError(
        f"Mixture.rates must be 'equal', 'examples', 'unimax' or a dictionary of numbers, "
        f"not {config.rates!r}.{suggest(str(config.rates), ['equal', 'examples', 'unimax'])}"
    )


def unimax_shares(sizes: Sequence[float], max_epochs: float, budget: float) -> list[float]:
    """UniMax: as equal as can be without repeating any task more than `max_epochs` times.

    From the smallest task on, each gets an equal part of what is left of the budget, but not more
    than `max_epochs` times its size; what it leaves goes to the larger ones. Where the budget is
    more than all tasks together may take, they are in proportion to their sizes. Chung et al. 2023,
    "UniMax: Fairer and More Effective Language Sampling", Algorithm 1 (there in characters).

    Args:
        sizes: of the tasks, positive.
        max_epochs: the most times a task may be repeated.
        budget: what is read of all tasks, in the unit of the sizes.

    Returns:
        Shares in the order of the sizes; they sum to one.
    """
    taken = [0.0] * len(sizes)
    left = budget
    ascending = sorted(range(len(sizes)), key=lambda task: sizes[task])
    for place, task in enumerate(ascending):
        taken[task] = min(left / (len(sizes) - place), max_epochs * sizes[task])
        left -= taken[task]
    total = sum(taken)
    return [part / total for part in taken]


def _explicit_rates(rates: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """A name beats a glob, a later glob an earlier one."""
    found: dict[str, float] = {}
    ordered = sorted(rates, key=lambda pattern: pattern in names)
    for pattern in ordered:
        rate = rates[pattern]
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate >= 0:
            raise UserError(f"Mixture.rates[{pattern!r}] must be a number >= 0, not {rate!r}.")
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise UserError(
                f"Mixture.rates: {pattern!r} is none of Mixture.tasks.{suggest(pattern, names)}"
            )
        found.update(dict.fromkeys(fitting, float(rate)))
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"Mixture.rates has no rate for {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}."
        )
    return {name: found[name] for name in names}


def examples_rate(
    task: seqio.Task, maximum: float | None = None, temperature: float = 1.0
) -> float:
    """The number of training examples, cut at `maximum`, then ** (1 / temperature): SeqIO's order.

    Raises:
        UserError: the number of examples is not known.
    """
    if not task.cache_dir and not count_examples(task, "train"):
        raise UserError(
            f"Task {task.name!r} does not know its number of training examples: give its source "
            "num_input_examples, or give Mixture.rates as numbers."
        )
    return seqio.mixing_rate_num_examples(task, maximum=maximum, temperature=temperature)


def dataset_rate(task: seqio.Task, maximum: float, tasks: int, temperature: float) -> float:
    """The number of training examples, but the tasks (prompts) of a large dataset share `maximum`.

    T0's cap (Sanh et al. 2022), before the temperature as SeqIO's.

    Args:
        task: one of the tasks of a dataset.
        maximum: a task with more examples counts for this divided by `tasks`.
        tasks: of the dataset in the mixture.
        temperature: the rate becomes rate ** (1 / temperature).

    Raises:
        UserError: the number of examples is not known.
    """
    examples = examples_rate(task)
    return (examples if examples <= maximum else maximum / tasks) ** (1 / temperature)


def count_examples(task: seqio.Task, split: str) -> int | None:
    """Returns the number of examples the source states, None where it does not know."""
    return task.num_input_examples(split) if split in task.splits else None


def rates_of(mixture: str) -> dict[str, float]:
    """Returns the rate of every task of a mixture, nested mixtures resolved (a task alone: 1)."""
    found = provider(mixture)
    if isinstance(found, seqio.Task):
        return {mixture: 1.0}
    try:
        return {task.name: float(found.get_rate(task)) for task in found.tasks}
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"Mixture {mixture!r}: its rates cannot be computed: {error}") from error


@dataclass(frozen=True)
class MixtureRow:
    """A line of mixture.txt; `examples` is None where the source does not know."""

    task: str
    dataset: str
    prompt: str
    examples: int | None
    rate: float
    share: float


def mixture_table(mixture: str, split: str = "train") -> list[MixtureRow]:
    """Returns one row for each task of a mixture, sorted by name; `share` sums to one."""
    rates = rates_of(mixture)
    total = sum(rates.values())
    rows = []
    for name, rate in rates.items():
        about = info(name)
        count = count_examples(seqio.TaskRegistry.get(name), split)
        share = rate / total if total else 0.0
        rows.append(MixtureRow(name, about.dataset, about.prompt, count, rate, share))
    return rows


def vocabulary(names: Iterable[str]) -> seqio.Vocabulary:
    """Returns the vocabulary that the tasks share.

    Raises:
        UserError: the tasks, or the two sides of one, have different vocabularies.
    """
    seen: dict[str, Any] = {}
    for name in names:
        for side, feature in seqio.TaskRegistry.get(name).output_features.items():
            label = f"{name} ({side})"
            for other, known in seen.items():
                if known != feature.vocabulary:
                    raise UserError(
                        f"The tasks have different vocabularies: {other} has {known}, "
                        f"{label} has {feature.vocabulary}. One model has one vocabulary."
                    )
            if not seen:
                seen[label] = feature.vocabulary
    if not seen:
        raise UserError("There are no tasks, so there is no vocabulary.")
    return next(iter(seen.values()))


def check_split(task: seqio.Task, split: str) -> None:
    """Makes sure that a task has a split and that its source does not say it is empty.

    Raises:
        UserError: it has not, or it is.
    """
    if split not in task.splits:
        raise UserError(
            f"Task {task.name!r} has no split {split!r}; it has {', '.join(task.splits)}."
            f"{suggest(split, task.splits)}"
        )
    if task.num_input_examples(split) == 0:
        raise UserError(
            f"Task {task.name!r}: its split {split!r} is empty. Give it data or leave it out."
        )

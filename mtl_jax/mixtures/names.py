"""Tasks and mixtures by name: importing their modules, globs, rates, vocabularies, splits."""

import fnmatch
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import seqio

from mtl_jax import caching, row_files, user_modules
from mtl_jax.data_config import DataConfig
from mtl_jax.errors import UserError, suggest
from mtl_jax.overlap import Exclusions
from mtl_jax.reading import tasks_of

DATA_FOLDER_VARIABLE = "MTL_JAX_DATA"


def load_modules(config: DataConfig) -> None:
    """Imports the task modules for their registrations; makes data folder and caches known to them.

    The folder reaches the modules as the environment variable MTL_JAX_DATA.

    Raises:
        UserError: no such module or folder, or a module that fails while it is imported.
    """
    if config.data_dir:
        if not pathlib.Path(config.data_dir).is_dir():
            raise UserError(f"Data.data_dir: {config.data_dir} is not a folder.")
        os.environ[DATA_FOLDER_VARIABLE] = os.path.abspath(config.data_dir)
    caching.add_folders(config.cache_dirs)
    row_files.tolerate(config.split, config.max_corrupt)
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


def rates_of(mixture: str) -> dict[str, float]:
    """Returns the rate of every task of a mixture, nested mixtures resolved (a task alone: 1)."""
    found = provider(mixture)
    if isinstance(found, seqio.Task):
        return {mixture: 1.0}
    try:
        return {task.name: float(found.get_rate(task)) for task in found.tasks}
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"Mixture {mixture!r}: its rates cannot be computed: {error}") from error


def training_rates(config: DataConfig, excluded: Exclusions) -> dict[str, float]:
    """As `rates_of` the training mixture, but 0 for tasks that lose all of their examples.

    Raises:
        UserError: the file names no example of the mixture.
    """
    rates = rates_of(config.mixture)
    cut = {name: excluded.count(name, config.split) for name in rates}
    if config.exclude and excluded.counts and not any(cut.values()):
        others = sorted({task for task, _ in excluded.counts})
        raise UserError(
            f"Data.exclude: {config.exclude} names no example of the split {config.split!r} of "
            f"{config.mixture!r}; it is about {', '.join(others[:3])}"
            f"{' and others' if len(others) > 3 else ''}."
        )
    for name in [name for name, count in cut.items() if count]:
        known = count_examples(seqio.TaskRegistry.get(name), config.split)
        if known is not None and cut[name] >= known:
            rates[name] = 0.0
    return rates


def count_examples(task: seqio.Task, split: str) -> int | None:
    """Returns the number of examples the source states, None where it does not know."""
    return task.num_input_examples(split) if split in task.splits else None


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

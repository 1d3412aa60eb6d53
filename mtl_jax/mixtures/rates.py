"""How often the tasks of a mixture are drawn: by their examples with caps, UniMax, numbers."""

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import seqio

from mtl_jax.data_config import CAPS, MixtureConfig
from mtl_jax.errors import UserError, suggest
from mtl_jax.mixtures.names import count_examples
from mtl_jax.task_info import info

Rate = float | Callable[[seqio.Task], float]
_Value = TypeVar("_Value")


def task_rates(
    config: MixtureConfig, names: Sequence[str], known: Sequence[str] = ()
) -> dict[str, Rate]:
    """Returns the rate of each task, a number or what SeqIO asks for one when it is needed.

    Args:
        config: says how.
        names: of the tasks.
        known: of others that names and globs in the configuration may be for, without effect: they
            are held out.

    Raises:
        UserError: a value that cannot be used; names the field.
    """
    if isinstance(config.rates, Mapping):
        return _explicit_rates(config.rates, names, known)
    if config.rates == "equal":
        return dict.fromkeys(names, 1.0)
    if config.rates == "examples":
        return _rates_by_examples(config, names, known)
    if config.rates == "unimax":
        sizes = [examples_rate(seqio.TaskRegistry.get(name)) for name in names]
        # The configuration has checked that the two are given.
        shares = unimax_shares(sizes, config.max_epochs or 0.0, config.budget or 0.0)
        return dict(zip(names, shares, strict=True))
    raise UserError(
        f"Mixture.rates must be 'equal', 'examples', 'unimax' or a dictionary of numbers, "
        f"not {config.rates!r}.{suggest(str(config.rates), ['equal', 'examples', 'unimax'])}"
    )


def number(rate: Rate, task: str) -> float:
    """Returns a rate as a number."""
    return float(rate(seqio.TaskRegistry.get(task)) if callable(rate) else rate)


def pieces(pattern: str) -> list[str]:
    """Returns the names and globs of "a, b_*"."""
    return [stripped for piece in pattern.split(",") if (stripped := piece.strip())]


def by_pattern(
    field: str, given: Mapping[str, _Value], names: Sequence[str], known: Sequence[str] = ()
) -> dict[str, _Value]:
    """Returns the values of the tasks: a name beats a glob, a later glob an earlier one.

    Args:
        field: for messages.
        given: values by name or glob, or several with commas.
        names: of the tasks.
        known: of others, which get no value, but a pattern may fit these alone.

    Raises:
        UserError: a pattern fits none of the names.
    """
    single = [(piece, value) for pattern, value in given.items() for piece in pieces(pattern)]
    found: dict[str, _Value] = {}
    for pattern, value in sorted(single, key=lambda pair: pair[0] in names):
        fitting = fnmatch.filter(names, pattern)
        if not fitting and not fnmatch.filter(known, pattern):
            near = suggest(pattern, [*names, *known])
            raise UserError(f"{field}: {pattern!r} is none of the mixture's tasks.{near}")
        found.update(dict.fromkeys(fitting, value))
    return found


def _explicit_rates(
    rates: Mapping[str, float], names: Sequence[str], known: Sequence[str]
) -> dict[str, Rate]:
    for pattern, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate >= 0:
            raise UserError(f"Mixture.rates[{pattern!r}] must be a number >= 0, not {rate!r}.")
    found = by_pattern("Mixture.rates", rates, names, known)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"Mixture.rates has no rate for {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}."
        )
    return {name: float(found[name]) for name in names}


def _rates_by_examples(
    config: MixtureConfig, names: Sequence[str], known: Sequence[str]
) -> dict[str, Rate]:
    caps: dict[str, dict[str, float]] = {}
    for field in CAPS:
        given = getattr(config, field)
        if isinstance(given, Mapping):
            caps[field] = by_pattern(f"Mixture.{field}", given, names, known)
        else:
            caps[field] = {} if given is None else dict.fromkeys(names, given)
    of_dataset: dict[str, list[str]] = {}
    for name in names:
        of_dataset.setdefault(info(name).dataset, []).append(name)
    return {
        name: _capped_rate(name, caps, of_dataset[info(name).dataset], config.temperature)
        for name in names
    }


def _capped_rate(
    name: str,
    caps: Mapping[str, Mapping[str, float]],
    siblings: Sequence[str],
    temperature: float,
) -> Rate:
    """The rate of a task under the cap that holds for it; `siblings` are those of its dataset."""
    own = [field for field in CAPS if name in caps[field]]
    if len(own) > 1:
        raise UserError(
            f"Mixture.{own[0]} and Mixture.{own[1]} are two caps for {name!r}: keep one."
        )
    maximum = caps[own[0]][name] if own else None
    if maximum is None or own == ["maximum"]:
        return functools.partial(examples_rate, maximum=maximum, temperature=temperature)
    # Prompts of the same dataset in another part of the mixture have caps of their own.
    siblings = [sibling for sibling in siblings if caps[own[0]].get(sibling) == maximum]
    if own == ["maximum_per_dataset"]:
        return functools.partial(
            dataset_rate, maximum=maximum, tasks=len(siblings), temperature=temperature
        )
    return functools.partial(
        dataset_total_rate, maximum=maximum, tasks=tuple(siblings), temperature=temperature
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


def dataset_total_rate(
    task: seqio.Task, maximum: float, tasks: Sequence[str], temperature: float
) -> float:
    """The number of training examples, but all tasks of a dataset count for at most `maximum`.

    What T0's cap was meant for: there 9 prompts of a dataset of 400,000 rows, just below the cap
    of 500,000, count for 3.6 million.

    Args:
        task: one of the tasks of a dataset.
        maximum: where they have more examples together, each has its part of this.
        tasks: names of the tasks of the dataset in the mixture.
        temperature: the rate of all together becomes rate ** (1 / temperature), so that a dataset
            weighs no more for having more prompts.

    Raises:
        UserError: the number of examples of one of them is not known.
    """
    together = sum(examples_rate(seqio.TaskRegistry.get(name)) for name in tasks)
    total = min(maximum, together) ** (1 / temperature)
    return total * examples_rate(task) / together

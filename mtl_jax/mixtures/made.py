"""Mixtures made from Gin: parts with weights, what is held out, and one family left out in turn."""

import fnmatch
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import seqio

from mtl_jax.data_config import MixtureConfig
from mtl_jax.errors import UserError, suggest
from mtl_jax.mixtures.names import expand, rates_of, task_names
from mtl_jax.mixtures.rates import Rate, number, pieces, task_rates
from mtl_jax.task_info import info

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parts:
    """The tasks of each part, and those that its globs fit but that are not for training."""

    tasks: dict[str, list[str]]
    evaluation: list[str]

    @property
    def all_tasks(self) -> list[str]:
        return [name for names in self.tasks.values() for name in names]


def build_mixture(config: MixtureConfig) -> str:
    """Registers the mixture that Gin describes, and those of `Mixture.leave_one_out`.

    Returns:
        Its name; "" where none is described, or where Data.mixture must say which of several.
        Tasks that globs fit but that are not for training (`TaskInfo.trained`) are left out; a line
        of the log says how many.

    Raises:
        UserError: a value that cannot be used; names the field.
    """
    if not config.name:
        return ""
    parts = _parts(config)
    out = _held_out(config, parts)
    if parts.evaluation:
        _log.warning(
            "Mixture %s: %d tasks that globs fit are not for training and left out, such as %s; "
            "name them in full to train on them.",
            config.name,
            len(parts.evaluation),
            parts.evaluation[0],
        )
    rates = _weighted(config, parts, out) if config.parts else _plain(config, parts, out)
    _register("Mixture.name", config.name, rates)
    if config.leave_one_out:
        leave_one_out(config.name, config.leave_one_out)
        return ""
    return config.name


def held_out(config: MixtureConfig) -> list[str]:
    """Returns the tasks that `Mixture.hold_out` takes out of the mixture, in the mixture's order.

    Raises:
        UserError: a name in it fits no task of the mixture.
    """
    if not config.name or not config.hold_out:
        return []
    parts = _parts(config)
    out = _held_out(config, parts)
    return [name for name in parts.all_tasks if name in out]


def leave_one_out(mixture: str, by: str = "family") -> list[str]:
    """Registers, for each family among a mixture's tasks, the mixture without it.

    The other tasks keep their rates. Tasks of no known family are in all of them.

    Args:
        mixture: a registered mixture of several tasks.
        by: "family", "dataset" or "task".

    Returns:
        Their names, MIXTURE_without_FAMILY, sorted.

    Raises:
        UserError: there are not two families to leave out in turn.
    """
    rates = rates_of(mixture)
    groups: dict[str, set[str]] = {}
    for task in rates:
        if value := getattr(info(task), by):
            groups.setdefault(f"{mixture}_without_{_slug(value)}", set()).add(task)
    if len(groups) < 2:
        raise UserError(
            f"Mixture.leave_one_out = {by!r}: the tasks of {mixture!r} are of {len(groups)} "
            f"{by}, and two are needed to leave one out in turn."
        )
    for name, left_out in groups.items():
        rest = {task: rate for task, rate in rates.items() if task not in left_out}
        if not rest:
            raise UserError(f"{name} would have no task: all are of one {by}.")
        _register("Mixture.leave_one_out", name, rest)
    return sorted(groups)


def _slug(value: str) -> str:
    return re.sub(r"\W+", "_", value.lower()).strip("_")


def _parts(config: MixtureConfig) -> _Parts:
    """The tasks of each part; without parts, of one of the name "".

    Mixtures are opened: a rate belongs to a task, and none is counted twice.
    """
    evaluation: list[str] = []
    if not config.parts:
        if not config.tasks:
            raise UserError(f"Mixture.tasks is empty: say which tasks {config.name!r} mixes.")
        return _Parts({"": _opened("Mixture.tasks", config.tasks, evaluation)}, evaluation)
    parts = {part: _opened("Mixture.parts", pieces(part), evaluation) for part in config.parts}
    seen: dict[str, str] = {}
    for part, names in parts.items():
        for name in names:
            if (other := seen.setdefault(name, part)) != part:
                raise UserError(
                    f"Mixture.parts: {name!r} is in {other!r} and in {part!r}: a task belongs to "
                    "one part."
                )
    return _Parts(parts, [name for name in evaluation if name not in seen])


def _opened(field: str, patterns: Sequence[str], evaluation: list[str]) -> list[str]:
    """The tasks of names and globs; a glob's tasks that are not for training go to the list."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = expand([pattern])
        dropped = []
        if names != [pattern]:
            tasks = set(seqio.TaskRegistry.names())
            dropped = [name for name in names if name in tasks and not info(name).trained]
        if dropped == names:
            raise UserError(
                f"{field}: all {len(names)} tasks that {pattern!r} fits are for evaluation and not "
                f"for training, such as {names[0]!r}; name them in full to train on them."
            )
        kept = [name for name in names if name not in dropped]
        found.update(dict.fromkeys(task for name in kept for task in task_names(name)))
        evaluation += [name for name in dropped if name not in evaluation]
    return list(found)


def _held_out(config: MixtureConfig, parts: _Parts) -> set[str]:
    tasks = parts.all_tasks
    out: set[str] = set()
    for by, patterns in config.hold_out.items():
        values = {task: getattr(info(task), by) for task in [*tasks, *parts.evaluation]}
        for pattern in patterns:
            fitting = [t for t, value in values.items() if fnmatch.fnmatchcase(value, pattern)]
            if not fitting:
                known = sorted({value for value in values.values() if value})
                raise UserError(
                    f"Mixture.hold_out[{by!r}]: {pattern!r} fits no task of {config.name!r}."
                    f"{suggest(pattern, known) or f' Known: {_listed(known)}.'}"
                )
            out.update(fitting)
    out.intersection_update(tasks)
    if len(out) == len(tasks):
        raise UserError(f"Mixture.hold_out leaves no task of {config.name!r}: hold out fewer.")
    return out


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")


def _plain(config: MixtureConfig, parts: _Parts, out: set[str]) -> dict[str, Rate]:
    names = [name for name in parts.tasks[""] if name not in out]
    return task_rates(config, names, [*sorted(out), *parts.evaluation])


def _weighted(config: MixtureConfig, parts: _Parts, out: set[str]) -> dict[str, Rate]:
    """Rates as numbers; those of a part sum to its weight. A part held out as a whole is gone."""
    own = {
        part: rates_of(part)
        for part in parts.tasks
        if part in seqio.MixtureRegistry.names() and part not in seqio.TaskRegistry.names()
    }
    of_config = [name for part in parts.tasks if part not in own for name in parts.tasks[part]]
    others = [name for name in of_config if name not in out]
    known = [*(name for name in of_config if name in out), *parts.evaluation]
    by_config = task_rates(config, others, known) if others else {}
    rates: dict[str, Rate] = {}
    for part, names in parts.tasks.items():
        inside = {
            name: own[part][name] if part in own else number(by_config[name], name)
            for name in names
            if name not in out
        }
        total = sum(inside.values())
        if inside and not total > 0:
            raise UserError(f"Mixture.parts: the rates of all tasks of {part!r} are zero.")
        rates |= {name: config.parts[part] * rate / total for name, rate in inside.items()}
    return rates


def _register(field: str, name: str, rates: Mapping[str, Rate]) -> None:
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name in known:
        if name not in seqio.MixtureRegistry.names() or not _same(name, rates):
            raise UserError(f"{field}: {name!r} is already registered; choose another name.")
        return
    try:
        seqio.MixtureRegistry.add(name, list(rates.items()))
    except ValueError as error:
        raise UserError(f"Mixture {name!r}: {error}") from error


def _same(name: str, rates: Mapping[str, Any]) -> bool:
    registered = seqio.MixtureRegistry.get(name).rate_per_task_name
    return {n: repr(r) for n, r in registered.items()} == {n: repr(r) for n, r in rates.items()}

"""Which parameters come from a checkpoint, and from where in it: T5X's assignment map.

Plain values only: `checkpoint.py` reads, `build.py` puts together.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl_jax import patterns
from mtl_jax.errors import UserError, suggest

RestoreMap = Sequence[tuple[str, str | None]]
FIELD = "Run.restore_map"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of each parameter of a run.

    Attributes:
      restore_map: the pairs (pattern, source) that led here.
      sources: path in the checkpoint by path in the run, of all parameters that are restored.
      deciding: number of the pair that decided, by path in the run; without those of no pattern.
    """

    restore_map: RestoreMap
    sources: dict[str, str]
    deciding: dict[str, int]


def plan(restore_map: RestoreMap, paths: Iterable[str]) -> Plan:
    """Applies an assignment map to the parameters of a run.

    Args:
      restore_map: pairs (pattern, source), see `RunConfig.restore_map`.
      paths: of the run's parameters.

    Raises:
      UserError: a pattern that decides about nothing, or nothing is left to restore.
    """
    paths = list(paths)
    deciding = patterns.decide(FIELD, [pattern for pattern, _ in restore_map], paths)
    sources = {}
    for path in paths:
        if path not in deciding:
            sources[path] = path
            continue
        pattern, source = restore_map[deciding[path]]
        match = patterns.matches(pattern, path)
        if source and match:
            sources[path] = match.expand(source)
    if not sources:
        raise UserError(
            f"{FIELD} leaves every parameter fresh: remove it and Run.restore_from, or let it "
            "restore some."
        )
    return Plan(restore_map, sources, deciding)


def check(made: Plan, wanted: Mapping[str, Any], stored: Mapping[str, Any], place: str) -> None:
    """Compares what the plan wants with what the checkpoint holds, before anything is read.

    Args:
      made: the plan.
      wanted: the run's parameters by path, with shape and dtype.
      stored: the checkpoint's parameters by path, with shape and dtype.
      place: the checkpoint, for messages.

    Raises:
      UserError: a source is not there or has another shape.
    """
    for path, source in made.sources.items():
        why = _reason(made, path)
        if source not in stored:
            named = f"{source} (for {path}, {why})" if source != path else f"{source} ({why})"
            raise UserError(
                f"The checkpoint {place} lacks {named}.{suggest(source, stored)} Give its path in "
                f"{FIELD}, or '' to leave {path} fresh."
            )
        ours, theirs = _describe(wanted[path]), _describe(stored[source])
        if ours != theirs:
            raise UserError(
                f"Tensor {source} is {theirs} in the checkpoint {place}, but {path} is {ours} in "
                f"this run ({why}). Leave it fresh by the pair ({path!r}, '') in {FIELD}, or use "
                "a model of the same size."
            )


def summary(made: Plan, wanted: Iterable[str], stored: Iterable[str], place: str) -> str:
    """What is restored and what is not, in lines for whoever starts the run."""
    wanted, taken = list(wanted), set(made.sources.values())
    lines = [f"Restored {len(made.sources)} of {len(wanted)} parameters from {place}"]
    for number, (pattern, source) in enumerate(made.restore_map):
        count = sum(decided == number for decided in made.deciding.values())
        origin = f"from '{source}'" if source else "fresh"
        lines.append(f"  '{pattern}' {origin}: {count}")
    if made.restore_map:
        lines.append(f"  under their own paths: {len(wanted) - len(made.deciding)}")
    if fresh := [path for path in wanted if path not in made.sources]:
        lines.append(f"  fresh: {', '.join(fresh)}")
    if unused := sorted(set(stored) - taken):
        lines.append(f"  in the checkpoint, unused: {', '.join(unused)}")
    return "\n".join(lines)


def rounds(made: Plan) -> list[dict[str, str]]:
    """The restored paths by source, in as many parts as the most used source has users.

    A source with two users is read twice, once for each: the parameters must be arrays of their
    own, for the train step donates them, and their shardings may differ.
    """
    parts: list[dict[str, str]] = []
    for path, source in made.sources.items():
        part = next((part for part in parts if source not in part), None)
        if part is None:
            parts.append(part := {})
        part[source] = path
    return parts


def _reason(made: Plan, path: str) -> str:
    if path not in made.deciding:
        return f"no pattern of {FIELD} matches it"
    return f"by {made.restore_map[made.deciding[path]][0]!r}"


def _describe(leaf: Any) -> str:
    shape = "x".join(str(size) for size in leaf.shape) or "scalar"
    return f"{shape} {leaf.dtype}"

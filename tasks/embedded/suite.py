"""What a family of the embedded suite is, and how its rows are made and divided into splits.

Row `i` of a split is a pure function of (family, split, i): attempts are made with
`random.Random(f"{family}:{split}:{attempt}")` until one belongs to the split. To which split a row
belongs is decided by a hash of its identity (its content), so no row can be in two splits.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.tasks.prompts import Template, load_templates

PROMPTS = Path(__file__).with_name("prompts")  # a file for each family

# Rows of each family by split. This is the one place that sets the size of the suite.
SPLIT_SIZES = {"train": 8000, "validation": 200, "test": 200}

_BUCKETS = ("train",) * 8 + ("validation", "test")
_MAX_ATTEMPTS_PER_ROW = 400

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)  # equal by identity, so a key of caches
class Family:
    """A kind of task: a generator of rows. Its prompts are in `prompts/{name}.yaml`.

    Attributes:
        name: part of the task names `embedded_{name}_{prompt}`.
        make: makes a row with a given label index (always 0 where there is none) from a generator.
        identity: the content of a row; every prompt shows all of it, so two rows of different
            identity never render to the same text.
        num_labels: rows cycle through the labels, which balances them exactly; 1: no labels.
        held_out: names of the prompts that are never trained on.
        generated: the answer is generated and compared as text, not chosen from a list.
        summary: also scored with ROUGE-L.
        reading: scored as SQuAD is, by exact match and F1 of normal forms.
        trained: False: the whole family is never trained on, whatever `held_out` says.
    """

    name: str
    make: Callable[[random.Random, int], Row]
    identity: Callable[[Row], Sequence[Any]]
    held_out: Sequence[str] = ()
    num_labels: int = 1
    generated: bool = False
    summary: bool = False
    reading: bool = False
    trained: bool = True

    @functools.cached_property
    def templates(self) -> list[Template]:
        """All prompts, in the order of the file."""
        return load_templates(PROMPTS / f"{self.name}.yaml")

    @property
    def prompts(self) -> list[Template]:
        """The prompts that are trained on: none of a family that is not."""
        held_out = self.held_out_prompts
        return [template for template in self.templates if template not in held_out]

    @property
    def held_out_prompts(self) -> list[Template]:
        """The prompts that are never trained on."""
        return [t for t in self.templates if not self.trained or t.name in self.held_out]


def split_of(family: str, identity: Sequence[Any]) -> str:
    """The split a row belongs to: eight tenths train, a tenth each validation and test."""
    digest = hashlib.sha256(repr((family, tuple(identity))).encode()).digest()
    return _BUCKETS[int.from_bytes(digest[:8], "little") % len(_BUCKETS)]


@functools.cache
def make_rows(family: Family, split: str, size: int | None = None) -> tuple[Row, ...]:
    """Makes the rows of a split, all different, labels in turn.

    Args:
        family: the family.
        split: a key of SPLIT_SIZES.
        size: number of rows; None for the one in SPLIT_SIZES.

    Raises:
        RuntimeError: the grammar of the family has too few sentences for so many rows.
    """
    size = SPLIT_SIZES[split] if size is None else size
    rows: list[Row] = []
    seen: set[str] = set()
    attempt = 0
    while len(rows) < size:
        if attempt > _MAX_ATTEMPTS_PER_ROW * (len(rows) + 10):
            raise RuntimeError(f"Family {family.name!r} has only {len(rows)} rows for {split}.")
        rng = random.Random(f"{family.name}:{split}:{attempt}")
        attempt += 1
        row = family.make(rng, len(rows) % family.num_labels)
        identity = family.identity(row)
        if repr(identity) in seen or split_of(family.name, identity) != split:
            continue
        seen.add(repr(identity))
        rows.append(row)
    return tuple(rows)

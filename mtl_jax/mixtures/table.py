"""The tasks of a mixture with their examples, rates and shares."""

from dataclasses import dataclass

import seqio

from mtl_jax.mixtures.names import count_examples, rates_of
from mtl_jax.task_info import info


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

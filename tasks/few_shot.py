"""Examples with their answers in front of each input: the k-shot variant of any task.

    few_shot_task("super_glue_cb_can_we_infer", 2)   # -> 'super_glue_cb_can_we_infer_2shot'

Every input gets exemplars of its own, from the training split if the task has one, otherwise from
`dev` or `validation` (the split itself is the last resort), and never the example itself. They
depend on the seed, the data set, the split and the number of the row alone: prompts of one data set
get the same rows, and the exemplars of one shot are the first of those of two.
"""

import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax.errors import UserError
from mtl_jax.mixtures import provider
from mtl_jax.task_info import describe, info
from mtl_jax.tasks.prompts import SEPARATOR
from mtl_jax.tasks.rendered import Example, RenderedDataSource, Write
from mtl_jax.tasks.task_texts import TaskTexts

_log = logging.getLogger(__name__)

# Where exemplars are from, in this order, if the task lacks the split asked for. Not from `test`:
# its answers may be hidden, and it is what others are evaluated on.
_POOLS = ("train", "dev", "validation")


@dataclasses.dataclass(frozen=True)
class Shots:
    """How many exemplars stand in front of an input, which ones and how.

    Attributes:
        number: of exemplars; fewer where `max_tokens` leaves no room.
        pool_split: where they are from. Where the task has no such split: from `train`, `dev` or
            `validation`, the first that it has and that is not read itself; without any of these
            from the split itself, with a warning in the log.
        seed: of the draws.
        max_tokens: of the whole input, with an end of sequence. Exemplars that do not fit are left
            out from the last one on; the input behind them is never cut here. None: no limit.
        separator: between exemplars, and before the input.
        balanced: the exemplars' answers go through the answer choices in a drawn order.
        fixed: all rows get the same exemplars (but a row never gets itself).
    """

    number: int
    pool_split: str = "train"
    seed: int = 0
    max_tokens: int | None = None
    separator: str = "\n\n"
    balanced: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError(f"The number of shots must be at least 0, not {self.number}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens of shots must be at least 1, not {self.max_tokens}.")

    def suffix(self, usual: "Shots") -> str:
        """What tells these shots from others in the name of a task: all that is not usual."""
        parts = [f"{self.number}shot"]
        for name, part in _SUFFIXES.items():
            value = getattr(self, name)
            if value != getattr(usual, name):
                parts.append(part(value))
        return "_".join(parts)


def _digest(text: str, size: int = 16) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


_SUFFIXES: dict[str, Callable[[Any], str]] = {
    "pool_split": lambda value: f"of_{value}",
    "seed": lambda value: f"seed{value}",
    "max_tokens": lambda value: f"max{value}",
    "separator": lambda value: f"separator{_digest(value, 2):04x}",
    "balanced": lambda value: "balanced",
    "fixed": lambda value: "fixed",
}


def few_shot_task(
    name: str,
    shots: int,
    *,
    pool_split: str = "train",
    seed: int = 0,
    max_tokens: int | None = None,
    separator: str = "\n\n",
    balanced: bool = False,
    fixed: bool = False,
) -> str:
    """Registers the k-shot variant of a task, once, and returns its name.

    An exemplar is its input, a line break and its answer. The variant's examples have all fields of
    the task's and three more: `query`, the input alone; `demonstration`, the answer of the first
    exemplar (empty without one); `exemplars`, how many there are.

    `name` is a registered task with texts `inputs` and `targets`; 0 `shots` give the task itself.
    The other arguments are the fields of `Shots`; what differs from the defaults becomes part of
    the variant's name.

    Raises:
        UserError: no such task, a task that has shots already or no texts, or values that cannot be
            used. On reading: a pool too small.
    """
    how = Shots(shots, pool_split, seed, max_tokens, separator, balanced, fixed)
    if shots == 0:
        return name
    return add_variant(name, how.suffix(Shots(shots)), how, "few_shot_task")


def add_variant(name: str, suffix: str, how: Shots, caller: str, **writing: Any) -> str:
    """Registers a task with exemplars, once; returns `{name}_{suffix}`.

    Args:
        name: a registered task.
        suffix: of the variant's name.
        how: the exemplars.
        caller: named in errors.
        **writing: see `ExemplarDataSource`.
    """
    if isinstance(provider(name), seqio.Mixture):
        raise UserError(f"{caller}: {name!r} is a mixture; exemplars are added to single tasks.")
    new = f"{name}_{suffix}"
    if new in seqio.TaskRegistry.names():
        return new
    task = seqio.TaskRegistry.get(name)
    if isinstance(task.source, ExemplarDataSource):
        raise UserError(f"{caller}: task {name!r} has exemplars already; name the task itself.")
    about = info(name)
    source = ExemplarDataSource(task, about.dataset, how, **writing)
    facts = {field.name: getattr(about, field.name) for field in dataclasses.fields(about)}
    facts.pop("task")
    describe(new, **facts | {"shots": about.shots + how.number})
    trim = seqio.preprocessors.append_eos_after_trim
    eos = trim if trim in task.preprocessors else seqio.preprocessors.append_eos
    seqio.TaskRegistry.add(
        new,
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, eos],
        output_features=task.output_features,
        postprocess_fn=task.postprocessor,
        metric_fns=task.metric_fns,
        shuffle_buffer_size=None,
    )
    return new


def exemplars_used(name: str, split: str) -> dict[int, int]:
    """Returns number of exemplars -> inputs that have so many, over a whole split; reads it.

    Raises:
        UserError: no such task or split, or its examples do not say how many exemplars they have.
    """
    task = provider(name)
    if not isinstance(getattr(task, "source", None), RenderedDataSource):
        raise UserError(f"Task {name!r} has no exemplars to count.")
    counts: Counter[int] = Counter()
    for example in task.source.examples(split, shuffle=False):
        if "exemplars" not in example:
            raise UserError(f"Task {name!r} has no exemplars to count.")
        counts[example["exemplars"]] += 1
    return dict(sorted(counts.items()))


class ExemplarDataSource(RenderedDataSource):
    """The examples of a task with drawn exemplars in front of their inputs."""

    def __init__(
        self,
        task: seqio.Task,
        dataset: str,
        how: Shots,
        splits: Sequence[str] = (),
        anew: bool = False,
        channel: bool = False,
    ):
        """Opens nothing yet.

        Args:
            task: gives the examples and the exemplars.
            dataset: of the task; the draws depend on it.
            how: the exemplars.
            splits: offered ones; empty: all of the task.
            anew: draw other exemplars in each epoch of training.
            channel: inputs and answers change places.

        Raises:
            UserError: channel or balanced is asked of a task that cannot have it.
        """
        super().__init__(tuple(splits or task.splits))
        self._task, self._dataset, self._how = task, dataset, how
        self._texts = TaskTexts(task)
        self._anew, self._channel = anew, channel
        self._vocabulary = task.output_features["inputs"].vocabulary
        self._tokens = functools.lru_cache(maxsize=4096)(self._count_tokens)

    def __str__(self) -> str:
        return f"Task {self._task.name!r} with {self._how.number} exemplars"

    def num_input_examples(self, split: str) -> int | None:
        """Returns what the task itself says, without reading anything."""
        return self._task.num_input_examples(split)

    def open(self, split: str) -> tuple[int, Write]:
        """Opens the task's split and the pool; both are kept for as long as the source is."""
        pool = self.pool(split)
        if pool == split and self._how.pool_split != split:
            _log.warning(
                "Task %s has none of the splits %s beside %s: its exemplars are from the split %s "
                "itself, whose other examples each input thus shows with their answers.",
                self._task.name,
                ", ".join(dict.fromkeys((self._how.pool_split, *_POOLS))),
                split,
                pool,
            )

        def write(index: int, seed: int | None) -> Example | None:
            example = self._texts.get(split, index)
            return None if example is None else self._write(example, split, index, seed)

        return self._texts.count(split), write

    def pool(self, split: str) -> str:
        """Returns the split that gives the exemplars of the inputs of a split."""
        if self._how.pool_split in self._task.splits:
            return self._how.pool_split
        others = [name for name in _POOLS if name in self._task.splits and name != split]
        return others[0] if others else split

    def _write(self, example: Example, split: str, index: int, seed: int | None) -> Example:
        how = self._how
        query, answer = self._sides(example)
        exemplars = [
            self._sides(found)
            for found in self._drawn(example, split, index, seed if self._anew else None)
        ]
        pieces = ["\n".join(sides) for sides in exemplars]
        used = len(pieces) if how.max_tokens is None else self._fitting(pieces, query)
        new = {"query": example["inputs"]} | example
        new |= {"inputs": how.separator.join([*pieces[:used], query]), "targets": answer}
        if self._channel:
            new["answer_choices"] = ""
        new["demonstration"] = exemplars[0][1] if used else ""
        return new | {"exemplars": used}

    def _sides(self, example: Example) -> tuple[str, str]:
        sides = example["inputs"], example["targets"]
        return sides[::-1] if self._channel else sides

    def _drawn(
        self, example: Example, split: str, index: int, epoch: int | None
    ) -> Sequence[Example]:
        """The exemplars of a row: any but the row itself and those of the same input."""
        how, task = self._how, self._task
        pool = self.pool(split)
        row = "all" if how.fixed else index
        label = f"{how.seed}/{self._dataset}/{split}/{row}/{'' if epoch is None else epoch}"
        rng = np.random.Generator(np.random.Philox(_digest(label)))
        wanted = self._labels(example, rng) if how.balanced else [""] * how.number
        missing = Counter(wanted)
        found: dict[str, list[Example]] = {label: [] for label in missing}
        for other_index in permuted(rng, self._texts.count(pool)):
            if pool == split and other_index == index:
                continue
            other = self._texts.get(pool, other_index)
            if other is None or other["inputs"] == example["inputs"]:
                continue
            label = other["targets"] if how.balanced else ""
            if missing[label] > 0:
                missing[label] -= 1
                found[label].append(other)
                if not any(missing.values()):
                    break
        if lacking := next((label for label, count in missing.items() if count > 0), None):
            raise UserError(
                f"Task {task.name!r}, {split} row {index}: the split {pool!r} has too few other "
                f"examples with the answer {lacking!r} for {how.number} balanced exemplars."
            )
        if missing.total() > 0:
            raise UserError(
                f"Task {task.name!r}, {split} row {index}: the split {pool!r} has "
                f"{how.number - missing.total()} other examples, too few for {how.number} "
                "exemplars; take fewer shots or another pool_split."
            )
        return [found[label].pop(0) for label in wanted]

    def _labels(self, example: Example, rng: np.random.Generator) -> list[str]:
        """The answers of balanced exemplars: the choices again and again, in a drawn order."""
        joined = example.get("answer_choices") or ""
        choices = [choice.strip() for choice in joined.split(SEPARATOR) if choice.strip()]
        if not choices:
            raise UserError(
                f"Task {self._task.name!r} has no answer choices, so its exemplars cannot be "
                "balanced."
            )
        cycle = [choices[i] for i in rng.permutation(len(choices))]
        return [cycle[i % len(cycle)] for i in range(self._how.number)]

    def _count_tokens(self, text: str) -> int:
        return len(self._vocabulary.encode(text))

    def _fitting(self, pieces: Sequence[str], query: str) -> int:
        """The largest number of exemplars, from the first on, with which the input fits."""

        def fits(count: int) -> bool:
            text = self._how.separator.join([*pieces[:count], query])
            return self._count_tokens(text) + 1 <= (self._how.max_tokens or 0)

        # Token counts of pieces add up to nearly that of the whole: look there first.
        room = (self._how.max_tokens or 0) - 1 - self._tokens(query)
        sums = np.cumsum([self._tokens(piece) for piece in pieces])
        count = int(np.searchsorted(sums, room, side="right"))
        while count < len(pieces) and fits(count + 1):
            count += 1
        while count > 0 and not fits(count):
            count -= 1
        return count


def permuted(rng: np.random.Generator, count: int) -> Iterator[int]:
    """Yields 0 to count - 1 in a random order; costs only what is taken of it."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        chosen = int(rng.integers(last + 1))
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.get(last, last)

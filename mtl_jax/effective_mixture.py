"""What a mixture comes to: each task's share of the examples and tokens, and expected epochs.

Rates say little by themselves: packing puts several short examples into a row, long ones are cut,
and how often a task is repeated depends on all of it. So the first examples of each task are read
and measured, and batches of such lengths are packed as the training stream packs them.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import seqio

from mtl_jax.data_config import DataConfig
from mtl_jax.mixtures import check_split, mixture_table, training_rates
from mtl_jax.overlap import Exclusions, read_exclusions
from mtl_jax.packing import Example, Rows, Waiting, fill, rows_per_example
from mtl_jax.reading import Epoch, TaskReader
from mtl_jax.task_info import info

# Examples measured in all, and of each task at least and at most.
_MEASURED, _LEAST, _MOST = 4096, 8, 64
_SIMULATED = 4096  # examples packed to see how many go into a row
_SIMULATED_ROWS, _SIMULATED_BATCHES, _WARM_UP = 64, 256, 4


@dataclass(frozen=True)
class EffectiveRow:
    """A task of the mixture; None where something is not known.

    Attributes:
        task, dataset, prompt, family: see `TaskInfo`.
        examples: of the split, as the source states them.
        excluded: of them, by Data.exclude.
        rate: in the mixture.
        share: of the examples that are drawn.
        input_tokens, target_tokens: mean of an example, cut to the lengths of a row.
        token_share: of the tokens of both sides.
        epochs: how often each example is expected to be seen in the whole run.
    """

    task: str
    dataset: str
    prompt: str
    family: str
    examples: int | None
    excluded: int
    rate: float
    share: float
    input_tokens: float | None
    target_tokens: float | None
    token_share: float | None
    epochs: float | None


@dataclass(frozen=True)
class EffectiveMixture:
    """The rows by task name, and what holds for all of them.

    Attributes:
        rows: one for each task.
        steps: of the run.
        examples_per_step: expected; None where some lengths are not known.
        batch_size: rows of a step.
        unmeasured: tasks whose lengths are not known.
        empty: of them, those whose first examples were read and have no tokens to train on.
    """

    rows: tuple[EffectiveRow, ...]
    steps: int
    examples_per_step: float | None
    batch_size: int
    unmeasured: tuple[str, ...]
    empty: tuple[str, ...] = ()

    def as_json(self) -> list[dict[str, Any]]:
        """Returns the rows for mixture.json."""
        return [asdict(row) for row in self.rows]

    def text(self, held_out: Sequence[str] = ()) -> str:
        """Returns the table for mixture.txt, with remarks below it.

        Args:
            held_out: tasks that Mixture.hold_out took out, to be named there.
        """
        cut = any(row.excluded for row in self.rows)
        header = ["task", "examples", "rate", "share", "tokens", "token share", "epochs"]
        lines = [[*header, "excluded"] if cut else header]
        for row in self.rows:
            tokens = (
                None
                if row.input_tokens is None or row.target_tokens is None
                else row.input_tokens + row.target_tokens
            )
            cells = [
                row.task,
                _cell(row.examples, ",d"),
                f"{row.rate:,.4g}" if row.rate < 1 else f"{row.rate:,.2f}",
                f"{row.share:.2%}",
                _cell(tokens, ",.1f"),
                _cell(row.token_share, ".2%"),
                _cell(row.epochs, ",.3g"),
            ]
            lines.append([*cells, f"{row.excluded:,}"] if cut else cells)
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = [
            "  ".join(
                [line[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            )
            for line in lines
        ]
        return "\n".join([*table, "", *self._remarks(held_out)]) + "\n"

    def _remarks(self, held_out: Sequence[str]) -> Iterator[str]:
        late = [name for name in self.unmeasured if name not in self.empty]
        if late:
            yield (
                f"Lengths of {len(late)} tasks were not measured for want of time; "
                f"--dry_run measures all of them: {_listed(late)}"
            )
        if self.empty:
            yield (
                f"Lengths of {len(self.empty)} tasks are not known, as their first examples are "
                f"all excluded by Data.exclude or have an empty side: {_listed(self.empty)}"
            )
        if self.examples_per_step is not None:
            yield (
                f"Expected: {self.examples_per_step / self.batch_size:.3g} examples in a row, "
                f"{self.examples_per_step * self.steps:,.0f} in {self.steps:,} steps of "
                f"{self.batch_size:,} rows. Tokens: mean of an example as it is cut, both sides."
            )
        emptied = [row.task for row in self.rows if not row.share and row.excluded]
        if emptied:
            yield f"Left out, as Data.exclude has all of their examples: {_listed(emptied)}"
        if held_out:
            yield f"Held out by Mixture.hold_out: {_listed(held_out)}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} others" if len(names) > 20 else "")


def measure(
    config: DataConfig,
    steps: int,
    owners: Mapping[str, str] | None = None,
    prompt: Sequence[int] = (),
    seconds: float = 60.0,
    shards: int = 1,
) -> EffectiveMixture:
    """Measures the training mixture on the first examples of its tasks.

    Args:
        config: what is read; `config.mixture` is registered.
        steps: of the run, for the expected epochs.
        owners: of the tasks, where a block of rows is of one owner's tasks (as `TrainStream`).
        prompt: tokens in front of every input.
        seconds: when to stop measuring tasks that are read by TensorFlow, which takes a third of a
            second to open each. Others are all measured.
        shards: that the training stream reads the mixture in.

    Raises:
        UserError: a mixture that cannot be read.
    """
    excluded = read_exclusions(config.exclude)
    rates = training_rates(config, excluded)
    total = sum(rates.values())
    shares = {name: rate / total if total else 0.0 for name, rate in rates.items()}
    readers = [task_reader(name, config, excluded) for name, rate in rates.items() if rate]
    lengths, empty = _lengths(config, readers, prompt, seconds, shards)
    unmeasured = tuple(sorted(name for name, rate in rates.items() if rate and name not in lengths))
    per_step = None if unmeasured else _examples_per_step(config, shares, lengths, owners)
    means = {name: pairs.mean(axis=0) for name, pairs in lengths.items()}
    tokens = sum(shares[name] * float(mean.sum()) for name, mean in means.items())
    rows = []
    for known in mixture_table(config.mixture, config.split):
        mean, share = means.get(known.task), shares[known.task]
        cut = excluded.count(known.task, config.split)
        usable = _usable(known.task, config.split, known.examples, cut)
        seen = None if per_step is None else steps * per_step * share
        rows.append(
            EffectiveRow(
                task=known.task,
                dataset=known.dataset,
                prompt=known.prompt,
                family=info(known.task).family,
                examples=known.examples,
                excluded=cut,
                rate=known.rate,
                share=share,
                input_tokens=None if mean is None else float(mean[0]),
                target_tokens=None if mean is None else float(mean[1]),
                token_share=_token_share(share, mean, tokens, bool(unmeasured)),
                epochs=None if seen is None or not usable else seen / usable,
            )
        )
    return EffectiveMixture(tuple(rows), steps, per_step, config.batch_size, unmeasured, empty)


def _token_share(
    share: float, mean: np.ndarray | None, tokens: float, unknown: bool
) -> float | None:
    if not share:
        return 0.0
    return None if unknown or mean is None else share * float(mean.sum()) / tokens


def _usable(task: str, split: str, examples: int | None, excluded: int) -> int | None:
    """Examples that an epoch gives: without those that the source is known to leave out."""
    if examples is None:
        return None
    skipped = getattr(seqio.TaskRegistry.get(task).source, "skipped", lambda split: 0)(split)
    return examples - excluded - (skipped or 0)


def task_reader(name: str, config: DataConfig, excluded: Exclusions) -> TaskReader:
    """Returns what reads a task for training.

    Raises:
        UserError: the task lacks the split, or a side that an encoder-decoder needs.
    """
    task = seqio.TaskRegistry.get(name)
    check_split(task, config.split)
    lengths = {"inputs": config.inputs_length, "targets": config.targets_length}
    return TaskReader(
        task, lengths, config.use_cached, excluded.of(name, config.split), config.max_corrupt
    )


def first_examples(
    reader: TaskReader,
    config: DataConfig,
    count: int,
    prompt: Sequence[int] | np.ndarray = (),
    shards: int = 1,
) -> list[Example]:
    """Returns those of a task's first `count` examples that have tokens on both sides.

    They are cut to the lengths of a row and have the prompt in front; of task 0. Where shards are
    read apart they are those of the first of `shards`, if it has any, lest all rows be read.
    """
    room = config.inputs_length - len(prompt)
    before = np.asarray(prompt, np.int32)
    found: list[Example] = []
    for shard in dict.fromkeys((reader.first_apart(config.split, shards), None)):
        epoch = Epoch(config.split, config.shuffle, config.seed, shard)
        found = found or [
            Example(0, np.concatenate([before, inputs[:room]]), targets[: config.targets_length])
            for inputs, targets in filter(None, itertools.islice(reader.tokens(epoch), count))
            if len(inputs) and len(targets)
        ]
    return found


def _lengths(
    config: DataConfig,
    readers: Sequence[TaskReader],
    prompt: Sequence[int],
    seconds: float,
    shards: int,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Lengths [examples, 2] of inputs and targets, of the tasks that time sufficed for.

    And the names of those without tokens in the examples read.
    """
    count = min(_MOST, max(_LEAST, _MEASURED // max(1, len(readers))))
    found: dict[str, np.ndarray] = {}
    empty = []
    spent = 0.0
    for reader in readers:
        if spent >= seconds and not reader.without_tensorflow:
            continue
        start = time.monotonic()
        examples = first_examples(reader, config, count, prompt, shards)
        if examples:
            pairs = [(len(example.inputs), len(example.targets)) for example in examples]
            found[reader.task.name] = np.array(pairs)
        else:
            empty.append(reader.task.name)
        spent += 0.0 if reader.without_tensorflow else time.monotonic() - start
    return found, tuple(sorted(empty))


def _examples_per_step(
    config: DataConfig,
    shares: Mapping[str, float],
    lengths: Mapping[str, np.ndarray],
    owners: Mapping[str, str] | None,
) -> float:
    if not config.pack:
        return float(config.batch_size)
    limits = config.inputs_length, config.targets_length
    if not config.blocks:
        rows = max(1, config.batch_size // max(1, config.num_shards))
        drawn = _drawn(shares, lengths, config.seed)
        return config.batch_size * _examples_per_row(drawn, rows, config.lookahead, *limits)
    # Blocks go to owners so that their examples come by the rates: see packing.block_shares.
    of_owner: dict[str, dict[str, float]] = {}
    for name in lengths:
        of_owner.setdefault(owners[name] if owners else name, {})[name] = shares[name]
    rows_of_one = 0.0
    for within in of_owner.values():
        drawn = _drawn(within, lengths, config.seed)
        need = rows_per_example(list(itertools.islice(drawn, 4 * _MOST)), *limits)
        rows_of_one += sum(within.values()) * need
    return config.batch_size / rows_of_one


def _drawn(
    shares: Mapping[str, float], lengths: Mapping[str, np.ndarray], seed: int
) -> Iterator[Example]:
    """Endless examples of the measured lengths, by their shares."""
    generator = np.random.default_rng(seed)
    names = [name for name in lengths if shares.get(name)]
    weights = np.array([shares[name] for name in names])
    while True:
        for number in generator.choice(len(names), 1024, p=weights / weights.sum()):
            pairs = lengths[names[number]]
            inputs, targets = pairs[generator.integers(len(pairs))]
            yield Example(0, np.empty(inputs, np.int32), np.empty(targets, np.int32))


def _examples_per_row(
    drawn: Iterator[Example], rows: int, lookahead: int, inputs_length: int, targets_length: int
) -> float:
    """Packs batches as a shard of the stream does, and counts once the waiting ones are full."""
    rows = min(rows, _SIMULATED_ROWS)
    waiting: list[Waiting] = []
    placed = batches = 0
    for batch in range(_WARM_UP + _SIMULATED_BATCHES):
        packed = Rows(rows, inputs_length, targets_length, pack=True)
        waiting = fill(packed, waiting, lookahead * rows, drawn)
        if batch >= _WARM_UP:
            placed, batches = placed + packed.examples, batches + 1
        if placed >= _SIMULATED:
            break
    return placed / (batches * rows)

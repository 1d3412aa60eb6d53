"""One virtual shard of the training stream: its place in every task, its draws, its rows."""

import base64
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import seqio

from mtl_jax.data_config import DataConfig
from mtl_jax.errors import UserError
from mtl_jax.packing import (
    COUNTERS,
    Example,
    Rows,
    TaskDraws,
    Waiting,
    count,
    fill,
    interleave,
    trim,
)
from mtl_jax.reading import SIDES, Epoch, TaskReader

if TYPE_CHECKING:
    from mtl_jax.data import TrainStream


@dataclass(frozen=True)
class Snapshot:
    """A shard's position: cheap to take for every batch, as arrays are shared and never written."""

    origin: dict[str, Any]
    shard: int
    draw: int
    positions: dict[str, tuple[int, int, bool]]
    waiting: tuple[Waiting, ...]
    counters: np.ndarray
    owned_drawn: tuple[int, ...]
    names: Mapping[int, str]

    def as_json(self) -> dict[str, Any]:
        """Returns the position for JSON."""
        tasks = {}
        for name, (epoch, offset, whole) in self.positions.items():
            tasks[name] = {"epoch": epoch, "offset": offset} | ({"whole": True} if whole else {})
        counts = zip(self.origin["tasks"], self.counters.tolist(), strict=True)
        return {
            "draw": self.draw,
            "tasks": tasks,
            "waiting": _waiting_as_json(self.waiting, self.names),
            "owned_drawn": list(self.owned_drawn),
            "counters": {name: row for name, row in counts if any(row)},
        }


class _TaskCursor:
    """One shard's place in one task: reads epoch after epoch, each opened when it is needed."""

    def __init__(self, reader: TaskReader, config: DataConfig, shard: seqio.ShardInfo):
        self._reader, self._config = reader, config
        self.name = reader.task.name
        known = reader.task.num_input_examples(config.split)
        # A split of fewer examples than shards is read whole by every shard, in different orders.
        self._whole = known is not None and known < shard.num_shards
        self._shard = shard
        self.epoch = self.offset = 0
        self._usable = False
        self._stream: Iterator[tuple[np.ndarray, np.ndarray] | None] | None = None

    @property
    def position(self) -> tuple[int, int, bool]:
        """Epoch, offset in it, and whether this shard reads the whole split."""
        return self.epoch, self.offset, self._whole

    def move_to(self, epoch: int, offset: int, whole: bool) -> None:
        self.epoch, self.offset, self._whole = epoch, offset, self._whole or whole
        self._usable = offset > 0
        self._stream = None

    def next(self, counters_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next example with tokens on both sides and counts those without.

        Raises:
            UserError: the whole split has no such example.
        """
        while True:
            if self._stream is None:
                self._stream = self._open()
            for example in self._stream:
                self.offset += 1
                if example is None:
                    counters_C[COUNTERS.index("corrupt")] += 1
                    continue
                inputs, targets = example
                if len(inputs) and len(targets):
                    self._usable = True
                    return inputs, targets
                counters_C[COUNTERS.index("skipped")] += 1
            if not self._usable and not self._whole and self._shard.num_shards > 1:
                # The prompt left out all rows of this part: let it read what the others read.
                self._whole, self.offset, self._stream = True, 0, None
                continue
            if not self._usable:
                excluded = " or excluded by Data.exclude" if self._config.exclude else ""
                raise UserError(
                    f"Task {self.name!r} has no usable example in its split "
                    f"{self._config.split!r}{self._which()}: {self.offset} read, all with an empty "
                    f"side{excluded}. Mend its data or leave the task out of the mixture."
                )
            self.epoch, self.offset, self._usable, self._stream = self.epoch + 1, 0, False, None

    def _which(self) -> str:
        shards = self._shard.num_shards
        return f" (shard {self._shard.index} of {shards})" if shards > 1 else ""

    def _open(self) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
        # All shards shuffle alike, or together they would not read every example once.
        label = f"{self._config.seed}/{self.name}/{self.epoch}"
        if self._whole:
            label += f"/{self._shard.index}"
        seed = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=4).digest(), "big") >> 1
        epoch = Epoch(
            split=self._config.split,
            shuffle=self._config.shuffle,
            seed=seed,
            shard_info=None if self._whole or self._shard.num_shards == 1 else self._shard,
            start=self.offset,
        )
        return self._reader.tokens(epoch)


class Shard:
    """One virtual shard: its draws, its place in every task, and its rows of the batch."""

    def __init__(self, stream: "TrainStream", index: int):
        config = stream.config
        self._stream, self.index = stream, index
        self._info = seqio.ShardInfo(index, stream.num_shards)
        self._draws = TaskDraws(list(stream.rates.values()), config.seed, index)
        self._cursors: dict[int, _TaskCursor] = {}
        self._rows = config.batch_size // stream.num_shards
        self._waiting: list[Waiting] = []
        # Of an example; with blocks, of the tasks of a batch.
        self._draw = 0
        self._counters_NC = np.zeros((len(stream.tasks), len(COUNTERS)), np.int64)
        # With blocks of several tasks: the draws within an owner's, and how many were made.
        self._owned_draws: dict[int, TaskDraws] = {}
        self._owned_drawn = [0] * len(stream.owned)

    def _cursor(self, number: int) -> _TaskCursor:
        if number not in self._cursors:
            reader = self._stream.reader(number)
            self._cursors[number] = _TaskCursor(reader, self._stream.config, self._info)
        return self._cursors[number]

    def set_rates(self, rates: Sequence[float]) -> None:
        """Draws examples by other rates from here on."""
        self._draws = TaskDraws(rates, self._stream.config.seed, self.index)
        self._owned_draws.clear()

    def _drawn(self) -> Iterator[Example]:
        while True:
            number = self._draws[self._draw]
            example = self._next_of(number)
            self._draw += 1
            yield example

    def _drawn_of(self, number: int) -> Iterator[Example]:
        """Examples of the tasks of one owner, by their rates."""
        owned = self._stream.owned[number]
        if number not in self._owned_draws:
            of_all = list(self._stream.rates.values())
            rates = [of_all[task] for task in owned]
            # Another generator for each owner: these numbers are no shard's.
            key = self.index + (number + 1) * 2**32
            self._owned_draws[number] = TaskDraws(rates, self._stream.config.seed, key)
        while True:
            task = owned[self._owned_draws[number][self._owned_drawn[number]]]
            example = self._next_of(task)
            self._owned_drawn[number] += 1
            yield example

    def _next_of(self, number: int) -> Example:
        """The next example of a task, trimmed and counted."""
        stream = self._stream
        room = stream.config.inputs_length - len(stream.prompt)
        limits = room, stream.config.targets_length
        cursor = self._cursor(number)
        tokens = cursor.next(self._counters_NC[number])
        lengths = len(tokens[0]), len(tokens[1])
        count(self._counters_NC, number, lengths, limits)
        inputs, targets = (
            trim(side_tokens, limit, stream.reader(number).eos_after_trim(side))
            if len(side_tokens) > limit
            else side_tokens
            for side, side_tokens, limit in zip(SIDES, tokens, limits, strict=True)
        )
        if len(stream.prompt):
            inputs = np.concatenate([stream.prompt, inputs])
        return Example(stream.task_ids[cursor.name], inputs, targets)

    def next_rows(self) -> dict[str, np.ndarray]:
        """The shard's rows of the next batch."""
        if self._stream.config.blocks:
            return self._next_blocks()
        rows, self._waiting = self._filled(self._rows, self._waiting, self._drawn())
        return rows.arrays()

    def _next_blocks(self) -> dict[str, np.ndarray]:
        """Rows in blocks of one owner's tasks each; those of an owner are filled together."""
        numbers = self._stream.block_draws[self._draw]
        each = self._rows // len(numbers)
        blocks = []
        for number in dict.fromkeys(numbers):
            tasks = [self._stream.tasks[task] for task in self._stream.owned[number]]
            mine = {self._stream.task_ids[name] for name in tasks}
            waiting = [w for w in self._waiting if w.example.task_id in mine]
            others = [w for w in self._waiting if w.example.task_id not in mine]
            parts = numbers.count(number)
            rows, left = self._filled(each * parts, waiting, self._drawn_of(number))
            self._waiting = others + left
            arrays = rows.arrays()
            for part in range(parts):
                blocks.append({key: x[part::parts] for key, x in arrays.items()})
        self._draw += 1
        return interleave(blocks)

    def _filled(
        self, count: int, waiting: Sequence[Waiting], drawn: Iterator[Example]
    ) -> tuple[Rows, list[Waiting]]:
        config = self._stream.config
        rows = Rows(count, config.inputs_length, config.targets_length, config.pack)
        lookahead = config.lookahead * count if config.pack else 0
        return rows, fill(rows, waiting, lookahead, drawn)

    def snapshot(self) -> Snapshot:
        """Returns the position after the rows made so far."""
        return Snapshot(
            origin=self._stream.origin,
            shard=self.index,
            draw=self._draw,
            positions={c.name: c.position for _, c in sorted(self._cursors.items())},
            waiting=tuple(self._waiting),
            counters=self._counters_NC.copy(),
            owned_drawn=tuple(self._owned_drawn),
            names=self._stream.names_by_id,
        )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Moves to a position of `Snapshot.as_json`."""
        numbers = {name: number for number, name in enumerate(self._stream.tasks)}
        self._draw = int(saved["draw"])
        self._cursors.clear()
        for name, place in saved["tasks"].items():
            where = int(place["epoch"]), int(place["offset"]), bool(place.get("whole", False))
            self._cursor(numbers[name]).move_to(*where)
        self._waiting = _waiting_from_json(saved["waiting"], self._stream.task_ids)
        self._owned_drawn = list(saved.get("owned_drawn", self._owned_drawn))
        self._counters_NC[:] = 0
        for name, row in saved["counters"].items():
            self._counters_NC[numbers[name], : len(row)] = row  # older ones have fewer counters


def _waiting_as_json(waiting: Sequence[Waiting], names: Mapping[int, str]) -> dict[str, Any]:
    """The tokens of all examples as one compressed text: lists of numbers would be ten times it."""
    sides = [tokens for w in waiting for tokens in (w.example.inputs, w.example.targets)]
    tokens = np.concatenate([np.zeros(0, np.int32), *sides]).astype("<i4")
    return {
        "tasks": [names[w.example.task_id] for w in waiting],
        "batches": [w.batches for w in waiting],
        "lengths": [len(side) for side in sides],
        "tokens": base64.b64encode(zlib.compress(tokens.tobytes())).decode(),
    }


def _waiting_from_json(saved: Mapping[str, Any], task_ids: Mapping[str, int]) -> list[Waiting]:
    tokens = np.frombuffer(zlib.decompress(base64.b64decode(saved["tokens"])), "<i4")
    sides = np.split(tokens.astype(np.int32), np.cumsum(saved["lengths"])[:-1])
    each = zip(saved["tasks"], saved["batches"], sides[::2], sides[1::2], strict=False)
    return [Waiting(Example(task_ids[name], *pair), batches) for name, batches, *pair in each]

"""From a SeqIO mixture to batches of packed rows, with a position that restores exactly.

    mixture = "my_mixture"
    with TrainStream(DataConfig(mixture=mixture), {"a": 1, "b": 2}) as stream:
        for batch in stream:
            batch.arrays     # what the model takes, numpy
            batch.state      # after this batch: TrainStream(...).restore(state) gives the next one

SeqIO defines the tasks; the mixing is done here, because SeqIO's own cannot be continued where it
stopped and loses the task of a token in packing. The mixture is read as S virtual shards. Each
shard draws the task of its next example from a counter-based generator, reads the task's next
example from a stream of exactly one epoch, and packs its own rows of the batch. So the position is
a handful of numbers for each task, and the global batch depends on S, not on how many processes
share the shards.
"""

import base64
import dataclasses
import hashlib
import logging
import queue
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax.data_config import DataConfig, MixtureConfig
from mtl_jax.errors import UserError
from mtl_jax.eval_reading import load_eval_task
from mtl_jax.mixtures import (
    MixtureRow,
    build_mixture,
    check_split,
    expand,
    load_modules,
    mixture_table,
    rates_of,
    task_names,
    vocabulary,
)
from mtl_jax.packing import (
    COUNTERS,
    Example,
    Rows,
    TaskDraws,
    Waiting,
    add_counters,
    count,
    fill,
    trim,
)
from mtl_jax.reading import SIDES, Epoch, TaskReader

__all__ = [
    "Batch",
    "DataConfig",
    "MixtureConfig",
    "MixtureRow",
    "TrainStream",
    "build_mixture",
    "expand",
    "load_eval_task",
    "load_modules",
    "mixture_table",
    "rates_of",
    "task_names",
    "vocabulary",
]

_STATE_VERSION = 2
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of a process and the position in the data after it.

    Attributes:
        arrays: int32 [rows, length] (`decoder_loss_weights` float32); rows of this process.
        counters: int64 [tasks, len(COUNTERS)], since the start of training, in the order of
            `TrainStream.tasks`; of this process.
        snapshots: position of each shard; `state` makes JSON of it.
    """

    arrays: dict[str, np.ndarray]
    counters: np.ndarray
    snapshots: tuple["_Snapshot", ...]

    @property
    def state(self) -> dict[str, Any]:
        """The position after this batch, JSON-able; made on demand, as most are never saved."""
        shards = {str(snapshot.shard): snapshot.as_json() for snapshot in self.snapshots}
        return {"version": _STATE_VERSION, **self.snapshots[0].origin, "shards": shards}

    @property
    def padding(self) -> tuple[float, float]:
        """The shares of padding among the encoder's and the decoder's tokens."""
        encoder_RL, decoder_RT = (
            self.arrays[f"{side}_segment_ids"] for side in ("encoder", "decoder")
        )
        return float(np.mean(encoder_RL == 0)), float(np.mean(decoder_RT == 0))


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """A shard's position: cheap to take for every batch, as arrays are shared and never written."""

    origin: dict[str, Any]
    shard: int
    draw: int
    positions: dict[str, tuple[int, int]]
    waiting: tuple[Waiting, ...]
    counters: np.ndarray
    names: Mapping[int, str]

    def as_json(self) -> dict[str, Any]:
        tasks = {}
        for name, (epoch, offset) in self.positions.items():
            tasks[name] = {"epoch": epoch, "offset": offset}
        counts = zip(self.origin["tasks"], self.counters.tolist(), strict=True)
        return {
            "draw": self.draw,
            "tasks": tasks,
            "waiting": _waiting_as_json(self.waiting, self.names),
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
        self._stream: Iterator[tuple[np.ndarray, np.ndarray]] | None = None

    def move_to(self, epoch: int, offset: int) -> None:
        self.epoch, self.offset = epoch, offset
        self._usable = offset > 0
        self._stream = None

    def next(self, skipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next example with tokens on both sides and counts those without.

        Raises:
            UserError: a whole epoch has no such example.
        """
        while True:
            if self._stream is None:
                self._stream = self._open()
            for inputs, targets in self._stream:
                self.offset += 1
                if len(inputs) and len(targets):
                    self._usable = True
                    return inputs, targets
                skipped[COUNTERS.index("skipped")] += 1
            if not self._usable:
                raise UserError(
                    f"Task {self.name!r} has no usable example in its split "
                    f"{self._config.split!r}{self._which()}: {self.offset} read, all with an empty "
                    "side. Mend its data or leave the task out of the mixture."
                )
            self.epoch, self.offset, self._usable, self._stream = self.epoch + 1, 0, False, None

    def _which(self) -> str:
        shards = self._shard.num_shards
        return f" (shard {self._shard.index} of {shards})" if shards > 1 else ""

    def _open(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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


class _Shard:
    """One virtual shard: its draws, its place in every task, and its rows of the batch."""

    def __init__(self, stream: "TrainStream", index: int):
        config = stream.config
        self._stream, self.index = stream, index
        self._info = seqio.ShardInfo(index, stream.num_shards)
        self._draws = TaskDraws(list(stream.rates.values()), config.seed, index)
        self._cursors: dict[int, _TaskCursor] = {}
        self._rows = config.batch_size // stream.num_shards
        self._waiting: list[Waiting] = []
        self._draw = 0
        self._counters_NC = np.zeros((len(stream.tasks), len(COUNTERS)), np.int64)

    def _cursor(self, number: int) -> _TaskCursor:
        if number not in self._cursors:
            reader = self._stream.reader(number)
            self._cursors[number] = _TaskCursor(reader, self._stream.config, self._info)
        return self._cursors[number]

    def _drawn(self) -> Iterator[Example]:
        stream = self._stream
        limits = stream.config.inputs_length, stream.config.targets_length
        while True:
            number = self._draws[self._draw]
            cursor = self._cursor(number)
            tokens = cursor.next(self._counters_NC[number])
            self._draw += 1
            lengths = len(tokens[0]), len(tokens[1])
            count(self._counters_NC, number, lengths, limits)
            inputs, targets = (
                trim(side_tokens, limit, stream.reader(number).eos_after_trim(side))
                if len(side_tokens) > limit
                else side_tokens
                for side, side_tokens, limit in zip(SIDES, tokens, limits, strict=True)
            )
            yield Example(stream.task_ids[cursor.name], inputs, targets)

    def next_rows(self) -> dict[str, np.ndarray]:
        config = self._stream.config
        rows = Rows(self._rows, config.inputs_length, config.targets_length, config.pack)
        lookahead = config.lookahead * self._rows if config.pack else 0
        self._waiting = fill(rows, self._waiting, lookahead, self._drawn())
        return rows.arrays()

    def snapshot(self) -> _Snapshot:
        return _Snapshot(
            origin=self._stream.origin,
            shard=self.index,
            draw=self._draw,
            positions={c.name: (c.epoch, c.offset) for _, c in sorted(self._cursors.items())},
            waiting=tuple(self._waiting),
            counters=self._counters_NC.copy(),
            names=self._stream.names_by_id,
        )

    def restore(self, saved: Mapping[str, Any]) -> None:
        numbers = {name: number for number, name in enumerate(self._stream.tasks)}
        self._draw = int(saved["draw"])
        self._cursors.clear()
        for name, place in saved["tasks"].items():
            self._cursor(numbers[name]).move_to(int(place["epoch"]), int(place["offset"]))
        self._waiting = _waiting_from_json(saved["waiting"], self._stream.task_ids)
        self._counters_NC[:] = 0
        for name, row in saved["counters"].items():
            self._counters_NC[numbers[name]] = row


class TrainStream:
    """Endless iterator of `Batch`; a background thread keeps `config.prefetch` batches ready.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        config: DataConfig,
        task_ids: Mapping[str, int],
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Checks the mixture; opens no task yet.

        Args:
            config: what is read.
            task_ids: id of every task of the mixture, from 1 on.
            process_index: of this process; it reads the shards and rows that are its part.
            process_count: number of processes.

        Raises:
            UserError: a value that cannot be used, or a task without the split.
        """
        self.config = config
        self.num_shards = _checked_shards(config, process_count)
        rates = rates_of(config.mixture)
        # Sorted by name, and without those never drawn: they may lack data.
        self.rates = {name: rates[name] for name in sorted(rates) if rates[name] != 0}
        if not self.rates:
            raise UserError(f"Mixture {config.mixture!r}: all of its rates are zero.")
        self.tasks = tuple(self.rates)
        missing = [name for name in self.tasks if name not in task_ids]
        if missing:
            raise UserError(f"There is no task id for {', '.join(missing[:5])}.")
        if min(task_ids.values()) < 1:
            raise UserError("Task ids must be at least 1; 0 is padding.")
        self.task_ids = dict(task_ids)
        self.names_by_id = {number: name for name, number in task_ids.items()}
        lengths = {"inputs": config.inputs_length, "targets": config.targets_length}
        self._readers = []
        for name in self.tasks:
            task = seqio.TaskRegistry.get(name)
            check_split(task, config.split)
            self._readers.append(TaskReader(task, lengths, config.use_cached))
        # What a saved position depends on; a position of other data must not be taken for ours.
        self.origin = {
            "seed": config.seed,
            "split": config.split,
            "shuffle": config.shuffle,
            "num_shards": self.num_shards,
            # How the rows are laid out: examples that wait for a row were trimmed to its lengths.
            "pack": config.pack,
            "batch_size": config.batch_size,
            "lookahead": config.lookahead,
            "inputs_length": config.inputs_length,
            "targets_length": config.targets_length,
            "tasks": list(self.tasks),
        }
        per_process = self.num_shards // process_count
        first = process_index * per_process
        self._shards = [_Shard(self, first + i) for i in range(per_process)]
        self._producer: _Producer | None = None

    def reader(self, number: int) -> TaskReader:
        """Returns the reader of the task of a number, shared by the shards."""
        return self._readers[number]

    def _make_batch(self) -> Batch:
        parts = [shard.next_rows() for shard in self._shards]
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        snapshots = tuple(shard.snapshot() for shard in self._shards)
        return Batch(arrays, add_counters([s.counters for s in snapshots]), snapshots)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if self.config.prefetch <= 0:
            return self._make_batch()
        if self._producer is None:
            self._producer = _Producer(self._make_batch, self.config.prefetch)
        return self._producer.get()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to the position `state`: the next batch is the one that followed it.

        Raises:
            UserError: the position belongs to other data.
        """
        self.close()
        if state.get("version") != _STATE_VERSION:
            raise UserError(
                f"The saved position in the data has version {state.get('version')!r}; "
                f"this mtl_jax reads version {_STATE_VERSION}. Start a new run directory."
            )
        for key, ours in self.origin.items():
            if state[key] != ours:
                raise UserError(_mismatch(key, state[key], ours))
        started = time.monotonic()
        for shard in self._shards:
            if str(shard.index) not in state["shards"]:
                raise UserError(
                    f"The saved position in the data lacks shard {shard.index} of "
                    f"{self.num_shards}: it was saved by one of several processes."
                )
            shard.restore(state["shards"][str(shard.index)])
        _log.info("restored the position in the data in %.1f s", time.monotonic() - started)

    def counters_by_task(self, batch: Batch) -> dict[str, dict[str, int]]:
        """Returns the counters of `batch` by task and by name (see `packing.COUNTERS`)."""
        rows = zip(self.tasks, batch.counters.tolist(), strict=True)
        return {name: dict(zip(COUNTERS, row, strict=True)) for name, row in rows}

    def close(self) -> None:
        """Ends the background thread and drops the batches made ahead; `restore` to go on."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Producer:
    """A thread that makes batches ahead; what goes wrong in it is raised where they are taken."""

    def __init__(self, make: Any, ahead: int):
        self._make = make
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        # A daemon, so that a program that forgot to close can still end.
        self._thread = threading.Thread(target=self._run, name="mtl_jax input", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                made: Batch | BaseException = self._make()
            except BaseException as error:
                made = error
            while not self._stop.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return

    def get(self) -> Batch:
        made = self._ready.get()
        if isinstance(made, BaseException):
            # Also for the next call, which would otherwise wait for ever.
            self._ready.put(made)
            raise made
        return made

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


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


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the positions of all processes into one, which any number of processes can restore."""
    shards = {index: shard for state in states for index, shard in state["shards"].items()}
    return {**states[0], "shards": shards}


def _mismatch(key: str, saved: Any, ours: Any) -> str:
    if key == "tasks":
        changed = sorted(set(saved) ^ set(ours))
        saved, ours = f"{len(saved)} tasks", f"{len(ours)} tasks (different: {changed[:5]})"
    return (
        f"The saved position in the data has {key} = {saved}, this run has {ours}. Go on with the "
        "same values of Data, or start a new run directory."
    )


def _checked_shards(config: DataConfig, process_count: int) -> int:
    if not config.mixture:
        raise UserError("Data.mixture is empty: name a task or mixture to train on.")
    shards = config.num_shards or process_count
    if shards % process_count:
        raise UserError(
            f"Data.num_shards = {shards} must be a multiple of the {process_count} processes."
        )
    if config.batch_size % shards:
        raise UserError(
            f"Data.batch_size = {config.batch_size} must be a multiple of the {shards} shards."
        )
    return shards

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

import dataclasses
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax import processes
from mtl_jax.data_config import DataConfig, MixtureConfig
from mtl_jax.effective_mixture import first_examples, task_reader
from mtl_jax.errors import UserError
from mtl_jax.eval_reading import load_eval_task
from mtl_jax.mixtures import (
    MixtureRow,
    build_mixture,
    check_split,
    expand,
    held_out,
    load_modules,
    mixture_table,
    rates_of,
    task_names,
    training_rates,
    vocabulary,
)
from mtl_jax.overlap import read_exclusions
from mtl_jax.packing import (
    COUNTERS,
    BlockDraws,
    Example,
    add_counters,
    block_shares,
    rows_per_example,
)
from mtl_jax.reading import TaskReader
from mtl_jax.shards import Shard, Snapshot
from mtl_jax.sources import RowsDataSource

__all__ = [
    "Batch",
    "DataConfig",
    "MixtureConfig",
    "MixtureRow",
    "TrainStream",
    "build_mixture",
    "check_split",
    "examples_drawn",
    "expand",
    "held_out",
    "load_eval_task",
    "load_modules",
    "mixture_table",
    "rates_of",
    "task_names",
    "vocabulary",
    "whole_state",
]

_STATE_VERSION = 2
_MEASURED = 64  # examples of a task, at most, from which its need of rows is estimated
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of a process and the position in the data after it.

    Attributes:
        arrays: int32 [rows, length] (`decoder_loss_weights` float32); rows of this process.
        counters: int64 [tasks, len(COUNTERS)], since the start of training, in the order of
            `TrainStream.tasks`; of this process.
        snapshots: position of each shard; `state` makes JSON of it.
        rates: of the tasks, where `TrainStream.by_rates` has set them; else empty.
        needs: `TrainStream.needs`.
    """

    arrays: dict[str, np.ndarray]
    counters: np.ndarray
    snapshots: tuple[Snapshot, ...]
    rates: tuple[float, ...]
    needs: tuple[float, ...]

    @property
    def state(self) -> dict[str, Any]:
        """The position after this batch, JSON-able; made on demand, as most are never saved."""
        shards = {str(snapshot.shard): snapshot.as_json() for snapshot in self.snapshots}
        drawing = {"needs": list(self.needs)}
        drawing |= {"rates": list(self.rates)} if self.rates else {}
        return {"version": _STATE_VERSION, **self.snapshots[0].origin, **drawing, "shards": shards}

    @property
    def padding(self) -> tuple[float, float]:
        """The shares of padding among the encoder's and the decoder's tokens."""
        encoder_RL, decoder_RT = (
            self.arrays[f"{side}_segment_ids"] for side in ("encoder", "decoder")
        )
        return float(np.mean(encoder_RL == 0)), float(np.mean(decoder_RT == 0))


class TrainStream:
    """Endless iterator of `Batch`; a background thread keeps `config.prefetch` batches ready.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        config: DataConfig,
        task_ids: Mapping[str, int],
        reader: int = 0,
        readers: int = 1,
        owners: Mapping[str, str] | None = None,
        prompt: Sequence[int] = (),
    ):
        """Checks the mixture; opens no task yet.

        Args:
            config: what is read.
            task_ids: id of every task of the mixture, from 1 on.
            reader: of this process; it makes its part of the rows (`sharding.readers`). It reads
                its share of the shards, or takes its part of one that several readers read.
            readers: how many parts there are.
            owners: of the tasks, where a block of rows may hold several tasks of one owner.
            prompt: tokens in front of every input, which take room of `Data.inputs_length`.

        Raises:
            UserError: a value that cannot be used, or a task without the split.
        """
        self.config = config
        shards = _checked_shards(config, readers)
        excluded = read_exclusions(config.exclude)
        rates = training_rates(config, excluded)
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
        if len(prompt) >= config.inputs_length:
            raise UserError(
                f"Data.inputs_length = {config.inputs_length} has no room for inputs behind a "
                f"prompt of {len(prompt)} tokens (Prompt.length): make it larger."
            )
        self.prompt = np.array(prompt, np.int32)
        self.task_ids = dict(task_ids)
        by_owner: dict[str, list[int]] = {}
        for number, name in enumerate(self.tasks):
            by_owner.setdefault(owners[name] if owners else name, []).append(number)
        # Numbers of the tasks that may share a block.
        self.owned = tuple(by_owner.values())
        self.names_by_id = {number: name for name, number in task_ids.items()}
        self._readers = [task_reader(name, config, excluded) for name in self.tasks]
        # What a saved position depends on; a position of other data must not be taken for ours.
        self.origin: dict[str, Any] = {
            "seed": config.seed,
            "split": config.split,
            "shuffle": config.shuffle,
            "num_shards": shards,
            # How the rows are laid out: examples that wait for a row were trimmed to its lengths.
            "pack": config.pack,
            "batch_size": config.batch_size,
            "lookahead": config.lookahead,
            "inputs_length": config.inputs_length,
            "targets_length": config.targets_length,
            "blocks": config.blocks,
            "prompt_length": len(prompt),
            "owners": [owners[name] for name in self.tasks] if owners and config.blocks else 0,
            "tasks": list(self.tasks),
        }
        # With blocks: the rows that an example takes, for each of `owned`.
        self.needs: tuple[float, ...] = ()
        self._block_draws: BlockDraws | None = None
        self._set: tuple[float, ...] = ()
        self._reader, self._readers_count = reader, readers
        self._producer: _Producer | None = None
        self._open_shards(shards)

    @property
    def num_shards(self) -> int:
        """Virtual shards of the mixture."""
        return self.origin["num_shards"]

    def _open_shards(self, shards: int) -> None:
        self.origin["num_shards"] = shards
        each = max(1, shards // self._readers_count)
        first = self._reader * shards // self._readers_count
        self._shards = [Shard(self, first + i) for i in range(each)]
        # Of the rows of one shard that several readers read, each takes its part.
        self._parts = max(1, self._readers_count // shards)

    def reader(self, number: int) -> TaskReader:
        """Returns the reader of the task of a number, shared by the shards."""
        return self._readers[number]

    @property
    def block_draws(self) -> BlockDraws:
        """Which of `owned` the blocks of each batch are of; the same for all shards."""
        if self._block_draws is None:
            if not self.needs:
                # By the first process, as others have no part in the files of the first shard.
                found = self._measured_needs() if processes.primary() else ()
                self.needs = tuple(processes.from_primary(found))
            of_all = list(self.rates.values())
            rates = [sum(of_all[number] for number in numbers) for numbers in self.owned]
            shares = block_shares(rates, self.needs)
            self._block_draws = BlockDraws(shares, self.config.blocks, self.config.seed)
        return self._block_draws

    def _measured_needs(self) -> tuple[float, ...]:
        """From the first examples of each task."""
        if not self.config.pack:
            return (1.0,) * len(self.owned)
        rates = list(self.rates.values())
        needs = []
        for numbers in self.owned:
            most = max(rates[number] for number in numbers)
            # As they are drawn: short examples of one task fill the gaps that another's leave.
            found = [
                example
                for number in numbers
                for example in self._first(number, math.ceil(_MEASURED * rates[number] / most))
            ]
            lengths = self.config.inputs_length, self.config.targets_length
            needs.append(rows_per_example(found, *lengths) if found else 1.0)
        return tuple(needs)

    def _first(self, number: int, count: int) -> list[Example]:
        """The first examples of a task with tokens on both sides, trimmed; repeated if few."""
        reader = self.reader(number)
        found = first_examples(reader, self.config, count, self.prompt, self.num_shards)
        return list(itertools.islice(itertools.cycle(found), count))

    def by_rates(self, rates: Mapping[str, float], batch: Batch) -> Batch:
        """Draws by other rates from the position after `batch` on, and returns it with them.

        Batches made ahead are made again. The rates are part of the position from here on.

        Args:
            rates: of the tasks of the stream, at least 0; those not named keep theirs.
            batch: the last one that was used.
        """
        new = tuple(rates.get(task, rate) for task, rate in self.rates.items())
        batch = dataclasses.replace(batch, rates=new)
        self.restore(batch.state)
        return batch

    def _make_batch(self) -> Batch:
        parts = [shard.next_rows() for shard in self._shards]
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if self._parts > 1:
            part = self._reader % self._parts
            arrays = {key: np.split(rows, self._parts)[part] for key, rows in arrays.items()}
        snapshots = tuple(shard.snapshot() for shard in self._shards)
        counters = add_counters([s.counters for s in snapshots])
        return Batch(arrays, counters, snapshots, self._set, self.needs)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if self.config.blocks:
            _ = self.block_draws  # here, as the processes talk, and not in the thread
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
        if not self.config.num_shards and state.get("num_shards") != self.num_shards:
            # Another number of processes goes on with the shards that there were.
            self._open_shards(_fitting_shards(state["num_shards"], self._readers_count))
        # Positions from before there were blocks lack them.
        for key, ours in self.origin.items():
            if (saved := state.get(key, 0)) != ours:
                raise UserError(_mismatch(key, saved, ours))
        self.needs = tuple(state.get("needs", ()))
        self._block_draws = None
        # Only rates that were set on the way: those of the mixture may be changed for going on.
        self._set = tuple(state.get("rates", ()))
        if self._set:
            self.rates = dict(zip(self.tasks, self._set, strict=True))
            for shard in self._shards:
                shard.set_rates(self._set)
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
        """Returns the counters of `batch`, of all processes, by task and by name.

        Every process must ask. Names: `packing.COUNTERS`; "corrupt" only where records were left
        out (`Data.max_corrupt`).
        """
        rows = zip(self.tasks, whole_counters(batch).tolist(), strict=True)
        counters = {name: dict(zip(COUNTERS, row, strict=True)) for name, row in rows}
        for name, left_out in self._corrupt().items():
            counters[name]["corrupt"] += left_out
        for name in [name for name, row in counters.items() if not row["corrupt"]]:
            del counters[name]["corrupt"]
        return counters

    def _corrupt(self) -> dict[str, int]:
        """Rows of sources of ours that were left out, of all processes."""
        if not self.config.max_corrupt:
            return {}
        shards = [seqio.ShardInfo(shard.index, self.num_shards) for shard in self._shards]
        mine: dict[str, dict[str, int]] = {}
        for name, reader in zip(self.tasks, self._readers, strict=True):
            source = reader.task.source
            if isinstance(source, RowsDataSource) and not reader.cached:
                mine[name] = dict(source.corrupt(self.config.split, shards))
        # By file, as several processes may have read one.
        parts = processes.gather(mine)
        found = {name: {k: n for part in parts for k, n in part[name].items()} for name in mine}
        return {name: sum(of_files.values()) for name, of_files in found.items()}

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


def whole_state(batch: Batch) -> dict[str, Any]:
    """The position of all processes after a batch; each of them must ask for it."""
    return merge_states(processes.gather(batch.state))


def whole_counters(batch: Batch) -> np.ndarray:
    """As `Batch.counters`, of all processes; each of them must ask for it."""
    mine = {str(snapshot.shard): snapshot.counters.tolist() for snapshot in batch.snapshots}
    shards: dict[str, Any] = {}
    for of_process in processes.gather(mine):
        shards |= of_process  # several processes may read one shard
    return add_counters([np.array(counters, np.int64) for counters in shards.values()])


def examples_drawn(batch: Batch) -> dict[str, int]:
    """Examples of each task since the start of training, of all processes; each must ask."""
    drawn = whole_counters(batch)[:, COUNTERS.index("examples")].tolist()
    return dict(zip(batch.snapshots[0].origin["tasks"], drawn, strict=True))


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


def _fitting_shards(shards: int, readers: int) -> int:
    if shards % readers and readers % shards:
        raise UserError(
            f"Data.num_shards = {shards} must be a multiple or a divisor of the {readers} "
            "processes that read different rows."
        )
    return shards


def _checked_shards(config: DataConfig, readers: int) -> int:
    if not config.mixture:
        raise UserError("Data.mixture is empty: name a task or mixture to train on.")
    shards = _fitting_shards(config.num_shards or readers, readers)
    if config.blocks and config.batch_size % (shards * config.blocks):
        raise UserError(
            f"Data.batch_size = {config.batch_size} must be a multiple of Data.blocks = "
            f"{config.blocks} times the {shards} shards (Data.num_shards, or one a process)."
        )
    if config.batch_size % shards:
        raise UserError(
            f"Data.batch_size = {config.batch_size} must be a multiple of the {shards} shards."
        )
    return shards

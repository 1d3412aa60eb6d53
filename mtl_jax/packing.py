"""Examples into the rows of a batch: which task is drawn next, which row an example goes to.

Free of TensorFlow. Letters: R rows, L encoder and T decoder tokens of a row.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_jax.errors import UserError

COUNTERS = (
    "examples",
    "skipped",
    "input_tokens",
    "target_tokens",
    "truncated_inputs",
    "truncated_targets",
    "longest_input",
    "longest_target",
    "corrupt",
)
# The two longest are maxima, the others sums.
_MAXIMA = slice(6, 8)
_DRAWS_AT_ONCE = 1024
_SAME_ORDER = 16  # batches for which `BlockDraws` keeps an order
_GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio, as a part of 2**64
PATIENCE = 4  # batches an example may be passed over while longer ones are placed


@dataclass(frozen=True)
class Example:
    """The tokens of one example, each side not longer than a row and not empty."""

    task_id: int
    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Waiting:
    """An example that found no room, and in how many batches it was passed over before."""

    example: Example
    batches: int


class TaskDraws:
    """Task numbers drawn by rate; draw i of a shard is a function of (seed, shard, i) alone.

    Philox is a counter-based generator, so no earlier draw need be made again to continue.
    """

    def __init__(self, rates: Sequence[float], seed: int, shard: int):
        """Makes the draws of one shard.

        Args:
            rates: of the tasks; not negative, finite, not all zero. They need not sum to one.
            seed: of the whole stream.
            shard: number of the shard.

        Raises:
            UserError: rates that no draw can follow.
        """
        rates_N = np.asarray(rates, np.float64)
        if not np.all(np.isfinite(rates_N)) or np.any(rates_N < 0) or not np.any(rates_N > 0):
            raise UserError(
                f"The rates of the mixture must be numbers of at least 0, and one must be positive;"
                f" they are {[float(rate) for rate in rates]!r:.200}."
            )
        self._tasks_K = np.flatnonzero(rates_N)
        shares_K = rates_N[self._tasks_K] / rates_N.sum()
        # The last bound is left out: rounding could put it below a draw.
        self._bounds = np.cumsum(shares_K)[:-1]
        self._key = np.array([seed % 2**64, shard], np.uint64)
        self._block = -1
        self._drawn = np.zeros(0, np.int64)

    def __getitem__(self, index: int) -> int:
        """Returns the number of the task of draw `index`."""
        block, offset = divmod(index, _DRAWS_AT_ONCE)
        if block != self._block:
            # The block goes to the highest word of the counter, which a block never reaches.
            counter = np.array([0, 0, 0, block], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
            uniform = generator.random(_DRAWS_AT_ONCE)
            self._drawn = self._tasks_K[np.searchsorted(self._bounds, uniform, side="right")]
            self._block = block
        return int(self._drawn[offset])


class BlockDraws:
    """The tasks of each batch's blocks; those of batch i are a function of (seed, i) alone.

    Systematic sampling: with B blocks a task of share s has floor(B s) or ceil(B s) of them. Tasks
    of a share of at least 1 / B are in every batch, which methods that compare tasks want. The
    place where sampling starts moves on by the golden ratio from batch to batch, so that the
    blocks of n batches are as many as the share says up to a few, not up to the square root of n.
    Where some task is not in every batch, the order of the tasks is drawn anew every few batches,
    or tasks a certain way apart in it would never meet. All shards of a stream must agree, so
    nothing depends on the shard.
    """

    def __init__(self, shares: Sequence[float], blocks: int, seed: int):
        """Makes the draws of one stream.

        Args:
            shares: of the blocks that each task gets in the long run; they sum to one.
            blocks: in a batch.
            seed: of the whole stream.
        """
        self._shares = np.asarray(shares, np.float64)
        self._blocks = blocks
        self._seed = seed
        self._all_meet = bool(np.min(self._shares) * blocks >= 1.0)
        digest = hashlib.blake2b(f"{seed}/blocks".encode(), digest_size=8).digest()
        self._start = int.from_bytes(digest, "big")

    def __getitem__(self, batch: int) -> list[int]:
        """Returns the number of the task of each block of batch `batch`, in ascending order."""
        place = (self._start + batch * _GOLDEN) % 2**64 / 2**64
        points = (place + np.arange(self._blocks)) / self._blocks
        order = np.arange(len(self._shares))
        if not self._all_meet:
            # The shards' keys have the seed first: this one is none of theirs.
            key = np.array([2**64 - 1, self._seed % 2**64], np.uint64)
            counter = np.array([0, 0, 0, batch // _SAME_ORDER], np.uint64)
            np.random.Generator(np.random.Philox(key=key, counter=counter)).shuffle(order)
        bounds = np.cumsum(self._shares[order])[:-1]
        return sorted(order[np.searchsorted(bounds, points, side="right")].tolist())


def block_shares(rates: Sequence[float], needs: Sequence[float]) -> list[float]:
    """Shares of blocks that leave the examples of each task in proportion to its rate.

    Args:
        rates: of examples.
        needs: rows that an example of each task takes (`rows_per_example`): a task of long
            examples fills more rows with as many.
    """
    wanted = np.asarray(rates, np.float64) * np.asarray(needs, np.float64)
    return (wanted / wanted.sum()).tolist()


def interleave(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the rows of equal blocks in turn: row r is of block r modulo their number.

    So that `objective.split_microbatches` makes each block a microbatch again, whichever shard of
    the batch the rows are in.
    """
    return {
        name: np.stack([block[name] for block in blocks], axis=1).reshape(
            -1, *blocks[0][name].shape[1:]
        )
        for name in blocks[0]
    }


def trim(tokens: np.ndarray, length: int, eos_after_trim: int | None) -> np.ndarray:
    """Cuts tokens to a length; where the task appends EOS after trimming, the last one stays EOS.

    The same as SeqIO's `append_eos_after_trim` (eos id given) or its final trimming (None).
    """
    if len(tokens) <= length:
        return tokens
    tokens = tokens[:length].copy()
    if eos_after_trim is not None:
        tokens[-1] = eos_after_trim
    return tokens


class Rows:
    """The rows of one shard while they fill: R rows of L encoder and T decoder tokens."""

    def __init__(self, rows: int, inputs_length: int, targets_length: int, pack: bool):
        self._free_inputs_R = np.full(rows, inputs_length)
        self._free_targets_R = np.full(rows, targets_length)
        self._lengths = inputs_length, targets_length
        self._too_much = inputs_length + 1
        self._pack = pack
        self._placed: list[list[Example]] = [[] for _ in range(rows)]
        self.empty_rows = rows

    def need(self, example: Example) -> float:
        """Returns the part of a row that the example takes, of the side where it takes more."""
        inputs_length, targets_length = self._lengths
        return max(len(example.inputs) / inputs_length, len(example.targets) / targets_length)

    def place(self, example: Example) -> bool:
        """Puts the example into the row with the least room that suffices on both sides.

        Returns False where there is none. Rows of equal room are taken in order.
        """
        inputs, targets = len(example.inputs), len(example.targets)
        fits_R = (self._free_inputs_R >= inputs) & (self._free_targets_R >= targets)
        row = int(np.where(fits_R, self._free_inputs_R, self._too_much).argmin())
        if not fits_R[row]:
            return False
        self.empty_rows -= not self._placed[row]
        self._placed[row].append(example)
        if self._pack:
            self._free_inputs_R[row] -= inputs
            self._free_targets_R[row] -= targets
        else:
            self._free_inputs_R[row] = -1
        return True

    @property
    def examples(self) -> int:
        """How many examples are placed."""
        return sum(map(len, self._placed))

    @property
    def least_filled(self) -> float:
        """The filled part of the row in use that is filled least."""
        return min(sum(map(self.need, placed)) for placed in self._placed if placed)

    @property
    def full(self) -> bool:
        """Whether no example at all fits any more."""
        return not np.any((self._free_inputs_R > 0) & (self._free_targets_R > 0))

    def arrays(self) -> dict[str, np.ndarray]:
        """Lays the rows out: int32 [R, L] or [R, T], `decoder_loss_weights` float32 [R, T].

        Segments count from 1 within a row, 0 is padding. `decoder_input_tokens` are the targets
        moved right by one within each segment, with 0 (T5's start) first.
        """
        inputs_length, targets_length = self._lengths
        rows = len(self._placed)
        encoder_3RL = np.zeros((3, rows, inputs_length), np.int32)
        decoder_4RT = np.zeros((4, rows, targets_length), np.int32)
        for row, placed in enumerate(self._placed):
            if not placed:
                continue
            segments = np.arange(1, len(placed) + 1)
            task_ids = [example.task_id for example in placed]
            inputs = [example.inputs for example in placed]
            targets = [example.targets for example in placed]
            input_lengths = [len(tokens) for tokens in inputs]
            target_lengths = [len(tokens) for tokens in targets]
            end = sum(input_lengths)
            encoder_3RL[0, row, :end] = np.concatenate(inputs)
            encoder_3RL[1, row, :end] = np.repeat(segments, input_lengths)
            encoder_3RL[2, row, :end] = np.repeat(task_ids, input_lengths)
            end = sum(target_lengths)
            decoder_4RT[0, row, :end] = np.concatenate(targets)
            decoder_4RT[1, row, 1:end] = decoder_4RT[0, row, : end - 1]
            decoder_4RT[1, row, np.cumsum([0, *target_lengths[:-1]])] = 0
            decoder_4RT[2, row, :end] = np.repeat(segments, target_lengths)
            decoder_4RT[3, row, :end] = np.repeat(task_ids, target_lengths)
        return {
            "encoder_input_tokens": encoder_3RL[0],
            "encoder_segment_ids": encoder_3RL[1],
            "encoder_task_ids": encoder_3RL[2],
            "decoder_target_tokens": decoder_4RT[0],
            "decoder_input_tokens": decoder_4RT[1],
            "decoder_segment_ids": decoder_4RT[2],
            "decoder_task_ids": decoder_4RT[3],
            "decoder_loss_weights": (decoder_4RT[2] > 0).astype(np.float32),
        }


def rows_per_example(examples: Sequence[Example], inputs_length: int, targets_length: int) -> float:
    """How much of a row an example takes in the mean, with what packing leaves empty beside it.

    Found by packing the given examples, the longest first as `fill` does; of the row that is filled
    least, as the last one of few examples, only the part that is used counts.
    """
    rows = Rows(len(examples), inputs_length, targets_length, pack=True)
    for example in sorted(examples, key=rows.need, reverse=True):
        rows.place(example)
    used = len(examples) - rows.empty_rows
    return (used - 1 + rows.least_filled) / len(examples)


def fill(
    rows: Rows, waiting: Sequence[Waiting], lookahead: int, drawn: Iterator[Example]
) -> list[Waiting]:
    """Fills rows and returns those examples that wait for the next batch.

    The waiting examples are placed the longest first, so that short ones close the gaps; those
    that waited `PATIENCE` batches go before all others, so none waits for ever. Then new examples
    are drawn and placed until the rows are full or `lookahead` examples wait.
    """
    left = []
    impatient_first = sorted(waiting, key=lambda w: (w.batches < PATIENCE, -rows.need(w.example)))
    for waits in impatient_first:
        if not rows.place(waits.example):
            left.append(Waiting(waits.example, waits.batches + 1))
    while rows.empty_rows or (len(left) < lookahead and not rows.full):
        example = next(drawn)
        if not rows.place(example):
            left.append(Waiting(example, 0))
    return left


def count(
    counters_NC: np.ndarray, task: int, lengths: tuple[int, int], limits: tuple[int, int]
) -> None:
    """Adds one example, of `lengths` before trimming to `limits`, to the counters of its task."""
    inputs, targets = lengths
    row_C = counters_NC[task]
    row_C[0] += 1
    row_C[2] += min(inputs, limits[0])
    row_C[3] += min(targets, limits[1])
    row_C[4] += inputs > limits[0]
    row_C[5] += targets > limits[1]
    row_C[6] = max(row_C[6], inputs)
    row_C[7] = max(row_C[7], targets)


def add_counters(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Joins the counters [N, C] of several shards."""
    joined_NC = np.sum(parts, axis=0)
    joined_NC[:, _MAXIMA] = np.max(parts, axis=0)[:, _MAXIMA]
    return joined_NC

"""Few compiled shapes for many ragged rows: which rows of which tasks share a batch."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# A decoder token costs about as much as this many encoder tokens: it has cross-attention and, above
# all, a row of logits. Only the choice of shapes depends on it, no result does.
_DECODER_WEIGHT = 3
# Shapes are merged as long as this share of all the work is added, however few there are.
_CHEAP_SHARE = 0.01

Tokens = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """One row for the model.

    Attributes:
      key: whose row it is; carried along unread.
      inputs: encoder tokens.
      choices: the targets to score, as token lists; empty: generate.
      group: rows of different groups never share a batch, only shapes.
      max_length: tokens to generate at most; rows that differ in it never share a batch.
      eos_id: ends what is generated; -1: nothing ends it before `max_length`.
    """

    key: Any
    inputs: Tokens
    choices: Sequence[Tokens] = ()
    group: int = 0
    max_length: int = 0
    eos_id: int = 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Encoder tokens, and decoder tokens of all choices together."""
        return len(self.inputs), sum(len(choice) for choice in self.choices)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is compiled: rows of a batch, and the two lengths that they are padded to."""

    rows: int
    inputs_length: int
    targets_length: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that run together, padded to `rows` x `inputs_length` and `rows` x `targets_length`."""

    rows: int
    inputs_length: int
    targets_length: int
    requests: tuple[Request, ...]

    def encoder_arrays(self) -> dict[str, np.ndarray]:
        """The inputs, padded: encoder_inputs and encoder_segments (1: a token), int32 [rows, L]."""
        inputs = [request.inputs for request in self.requests]
        segments = [[1] * len(tokens) for tokens in inputs]
        return {
            "encoder_inputs": pad_rows(inputs, self.rows, self.inputs_length),
            "encoder_segments": pad_rows(segments, self.rows, self.inputs_length),
        }


@dataclasses.dataclass(frozen=True)
class _Group:
    inputs_length: int
    targets_length: int
    count: int  # of requests
    shapes: tuple[tuple[int, int], ...]  # of the requests, before anything was merged

    def union(self, other: "_Group") -> "_Group":
        return _Group(
            max(self.inputs_length, other.inputs_length),
            max(self.targets_length, other.targets_length),
            self.count + other.count,
            self.shapes + other.shapes,
        )


def pad_rows(rows: Sequence[Tokens], count: int, length: int) -> np.ndarray:
    """Token lists as int32 [count, length], padded with 0.

    Raises:
      ValueError: a row is longer than `length`, or there are more than `count`.
    """
    padded: np.ndarray = np.zeros((count, length), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def bucket(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `n`."""
    power = 1 << max(0, n - 1).bit_length()  # the power of two at or above n
    return power // 4 * 3 if power >= 4 and n <= power // 4 * 3 else power


def _rows(count: int, batch_size: int, row_multiple: int) -> int:
    """Rows of the batches that hold `count` requests."""
    wanted = min(batch_size, bucket(count))
    return -(-wanted // row_multiple) * row_multiple


class Shapes:
    """A few batch shapes for rows of many lengths, and which row runs in which.

    Lengths are first rounded up to `bucket`s; then, again and again, the two groups whose union
    adds the least padding become one. All depends on the lengths only: the same tasks give the same
    shapes at every evaluation, nothing is compiled twice, and a row runs in the same shape whatever
    rows are beside it.

    Attributes:
      all: the shapes, the shortest first.
    """

    def __init__(
        self,
        lengths: Mapping[tuple[int, int], int],
        batch_size: int,
        row_multiple: int = 1,
        max_shapes: int = 8,
    ):
        """Chooses the shapes.

        Args:
          lengths: how many rows have so many encoder and decoder tokens, either all to be scored or
            all to be generated.
          batch_size: rows of a batch at most, a multiple of `row_multiple`.
          row_multiple: batches have a multiple of so many rows (the data-parallel devices).
          max_shapes: how many shapes may be compiled.
        """
        members: Counter[tuple[int, int]] = Counter()
        for pair, count in lengths.items():
            members[_rounded(*pair)] += count
        groups = [_Group(*pair, members[pair], (pair,)) for pair in sorted(members)]
        sizes = np.array([_rows(n, batch_size, row_multiple) for n in range(batch_size + 1)])
        while len(groups) > 1:
            share, a, b = _cheapest_merge(groups, sizes)
            if len(groups) <= max_shapes and share > _CHEAP_SHARE:
                break
            union = groups[a].union(groups[b])
            groups = [group for i, group in enumerate(groups) if i not in (a, b)] + [union]
            groups.sort(key=lambda group: (group.inputs_length, group.targets_length))
        self.all: list[Shape] = []
        self._of: dict[tuple[int, int], Shape] = {}
        for group in groups:
            rows = _rows(group.count, batch_size, row_multiple)
            self.all.append(Shape(rows, group.inputs_length, group.targets_length))
            self._of.update(dict.fromkeys(group.shapes, self.all[-1]))

    def of(self, request: Request) -> Shape:
        """The shape that a row runs in; its lengths must have been among those counted."""
        return self._of[_rounded(*request.lengths)]


def plan(
    requests: Sequence[Request], batch_size: int, row_multiple: int = 1, max_shapes: int = 8
) -> list[Batch]:
    """Groups requests of similar lengths into batches of at most `max_shapes` different shapes.

    Args:
      requests: rows of any tasks, either all to be scored or all to be generated.
      batch_size: rows of a batch at most, a multiple of `row_multiple`.
      row_multiple: batches have a multiple of so many rows (the data-parallel devices).
      max_shapes: how many shapes may be compiled.

    Returns:
      Batches, the shortest first; each request is in exactly one of them, and each batch holds
      requests of one group.
    """
    lengths = Counter(request.lengths for request in requests)
    shapes = Shapes(lengths, batch_size, row_multiple, max_shapes)
    members: dict[Shape, list[Request]] = {shape: [] for shape in shapes.all}
    for request in requests:
        members[shapes.of(request)].append(request)
    return [batch for shape, mine in members.items() for batch in _cut(shape, mine)]


def stream(
    requests: Iterable[Request | None], shape_of: Callable[[Request], Shape], patience: int = 16
) -> Iterator[Batch]:
    """Batches of rows that come one after the other, each as soon as it is full.

    So rows of different tasks share batches, a task is answered soon after its last row has come,
    and no more rows are held than wait for company.

    Args:
      requests: rows; None: no more come for now, so that all that wait shall go.
      shape_of: the shape of a row.
      patience: how many batches may go while a row waits; then its batch goes as it is.

    Yields:
      Batches; each holds rows of one group and one `max_length`.
    """
    waiting: dict[tuple[Shape, int, int], list[Request]] = {}
    since: dict[tuple[Shape, int, int], int] = {}
    gone = 0

    def batch(key: tuple[Shape, int, int]) -> Batch:
        return _batch(key[0], waiting.pop(key))

    for request in requests:
        if request is None:
            yield from map(batch, list(waiting))
            continue
        key = shape_of(request), request.group, request.max_length
        if key not in waiting:
            since[key] = gone
        waiting.setdefault(key, []).append(request)
        if len(waiting[key]) == key[0].rows:
            yield batch(key)
            gone += 1
            for late in [other for other in waiting if gone - since[other] >= patience]:
                yield batch(late)
    yield from map(batch, list(waiting))


def plan_window(
    requests: Sequence[Request], batch_size: int, row_multiple: int = 1, rows: int = 0
) -> list[Batch]:
    """Batches for a part of a stream: of one row count, so that few shapes serve all parts.

    Rows are sorted by length, and lengths rounded up to `bucket`s from 16 on.

    Args:
      requests: rows, either all to be scored or all to be generated.
      batch_size: rows of a batch at most, a multiple of `row_multiple`.
      row_multiple: batches have a multiple of so many rows (the data-parallel devices).
      rows: of every batch; 0: as many as `requests` fill, at most `batch_size`.

    Returns:
      Batches, the shortest first; each request is in exactly one of them.
    """
    rows = rows or _rows(len(requests), batch_size, row_multiple)
    targets = [request.lengths[1] for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].inputs), targets[i], i))
    batches = []
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        inputs_length = bucket(max(16, *(len(requests[i].inputs) for i in part)))
        longest = max(targets[i] for i in part)
        targets_length = bucket(max(4, longest)) if longest else 0
        members = tuple(requests[i] for i in part)
        batches.append(Batch(rows, inputs_length, targets_length, members))
    return batches


def _cheapest_merge(groups: Sequence[_Group], rows_of_count: np.ndarray) -> tuple[float, int, int]:
    """The two groups whose union adds the least padding; of equals the first.

    Args:
      groups: G of them, at least two.
      rows_of_count: int [batch size + 1], rows of the batches that hold so many requests; more
        than the last fill batches of the last.

    Returns:
      What the union adds as a share of all the work, and the positions of the two groups.
    """

    def cost(inputs: np.ndarray, targets: np.ndarray, count: np.ndarray) -> np.ndarray:
        rows = rows_of_count[np.minimum(count, len(rows_of_count) - 1)]
        return -(-count // rows) * rows * (inputs + _DECODER_WEIGHT * targets)

    inputs_G = np.array([group.inputs_length for group in groups])
    targets_G = np.array([group.targets_length for group in groups])
    count_G = np.array([group.count for group in groups])
    cost_G = cost(inputs_G, targets_G, count_G)
    union_GG = cost(
        np.maximum.outer(inputs_G, inputs_G),
        np.maximum.outer(targets_G, targets_G),
        np.add.outer(count_G, count_G),
    )
    added_GG = union_GG - np.add.outer(cost_G, cost_G)
    added_GG[np.tril_indices(len(groups))] = np.iinfo(added_GG.dtype).max
    a, b = divmod(int(np.argmin(added_GG)), len(groups))
    return float(added_GG[a, b] / cost_G.sum()), a, b


def _rounded(inputs: int, targets: int) -> tuple[int, int]:
    return bucket(inputs), bucket(targets) if targets else 0


def _batch(shape: Shape, requests: Sequence[Request]) -> Batch:
    return Batch(shape.rows, shape.inputs_length, shape.targets_length, tuple(requests))


def _cut(shape: Shape, requests: Sequence[Request]) -> Iterator[Batch]:
    for kind in sorted({(request.group, request.max_length) for request in requests}):
        mine = [r for r in requests if (r.group, r.max_length) == kind]
        for start in range(0, len(mine), shape.rows):
            yield _batch(shape, mine[start : start + shape.rows])

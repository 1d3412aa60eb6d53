"""Few compiled shapes for many ragged rows: which rows of which tasks share a batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# A decoder token costs about as much as this many encoder tokens: it has cross-attention and, above
# all, a row of logits. Only the choice of shapes depends on it, no result does.
_DECODER_WEIGHT = 3
# Shapes are merged as long as this share of all the work is added, however few there are.
_CHEAP_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Request:
    """One row for the model.

    Attributes:
      key: whose row it is; carried along unread.
      inputs: encoder tokens.
      choices: the targets to score, as token lists; empty: generate.
      group: rows of different groups never share a batch, only shapes.
    """

    key: Any
    inputs: Sequence[int]
    choices: Sequence[Sequence[int]] = ()
    group: int = 0


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


def pad_rows(rows: Sequence[Sequence[int]], count: int, length: int) -> np.ndarray:
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


def plan(
    requests: Sequence[Request], batch_size: int, row_multiple: int = 1, max_shapes: int = 8
) -> list[Batch]:
    """Groups requests of similar lengths into batches of at most `max_shapes` different shapes.

    Lengths are first rounded up to `bucket`s; then, again and again, the two groups whose union
    adds the least padding become one. The plan depends on the lengths only, so that the same tasks
    give the same shapes at every evaluation and nothing is compiled twice.

    Args:
      requests: rows of any tasks, either all to be scored or all to be generated.
      batch_size: rows of a batch at most, a multiple of `row_multiple`.
      row_multiple: batches have a multiple of so many rows (the data-parallel devices).
      max_shapes: how many shapes may be compiled.

    Returns:
      Batches, the shortest first; each request is in exactly one of them, and each batch holds
      requests of one group.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for i, request in enumerate(requests):
        targets = sum(len(choice) for choice in request.choices)
        shape = (bucket(len(request.inputs)), bucket(targets) if targets else 0)
        members.setdefault(shape, []).append(i)
    groups = [_Group(*shape, len(members[shape]), (shape,)) for shape in sorted(members)]
    rows_of_count = np.array([_rows(n, batch_size, row_multiple) for n in range(batch_size + 1)])

    while len(groups) > 1:
        share, a, b = _cheapest_merge(groups, rows_of_count)
        if len(groups) <= max_shapes and share > _CHEAP_SHARE:
            break
        union = groups[a].union(groups[b])
        groups = [group for i, group in enumerate(groups) if i not in (a, b)] + [union]
        groups.sort(key=lambda group: (group.inputs_length, group.targets_length))
    return [
        batch
        for group in groups
        for batch in _cut(
            group,
            [requests[i] for i in sorted(i for shape in group.shapes for i in members[shape])],
            _rows(group.count, batch_size, row_multiple),
        )
    ]


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
    targets = [sum(len(choice) for choice in request.choices) for request in requests]
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


def _cut(group: _Group, requests: Sequence[Request], rows: int) -> Iterator[Batch]:
    for number in sorted({request.group for request in requests}):
        mine = [request for request in requests if request.group == number]
        for start in range(0, len(mine), rows):
            part = tuple(mine[start : start + rows])
            yield Batch(rows, group.inputs_length, group.targets_length, part)

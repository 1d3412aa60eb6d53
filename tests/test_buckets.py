"""Which rows share a batch: every request once, few shapes, little padding."""

import itertools
import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import buckets


def test_bucket_is_the_next_power_of_two_or_one_and_a_half():
    ladder = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for n in range(1, 65):
        assert buckets.bucket(n) == next(size for size in ladder if size >= n)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.lists(st.integers(1, 9), max_size=4))),
    batch_size=st.sampled_from([4, 8, 32]),
    row_multiple=st.sampled_from([1, 2, 4]),
    max_shapes=st.integers(1, 6),
)
def test_a_plan_holds_every_request_once_in_few_shapes(
    lengths, batch_size, row_multiple, max_shapes
):
    requests = [
        buckets.Request(i, [5] * inputs, [[6] * n for n in choices])
        for i, (inputs, choices) in enumerate(lengths)
    ]
    batches = buckets.plan(requests, batch_size, row_multiple, max_shapes)
    keys = [request.key for batch in batches for request in batch.requests]
    assert sorted(keys) == list(range(len(requests)))
    assert len({(b.rows, b.inputs_length, b.targets_length) for b in batches}) <= max_shapes
    for batch in batches:
        assert batch.rows % row_multiple == 0
        assert 0 < len(batch.requests) <= batch.rows <= batch_size
        for request in batch.requests:
            assert len(request.inputs) <= batch.inputs_length
            assert sum(map(len, request.choices)) <= batch.targets_length


def test_a_plan_does_not_run_half_empty_batches():
    # 47 prompts of few examples each: per-task batches of 64 would run 47 of them.
    rng = np.random.default_rng(0)
    requests = [
        buckets.Request((prompt, i), [5] * int(rng.integers(20, 60)), [[6, 1], [7, 1]])
        for prompt, i in itertools.product(range(47), range(56))
    ]
    batches = buckets.plan(requests, batch_size=64, max_shapes=4)
    used = sum(len(batch.requests) for batch in batches)
    assert used / sum(batch.rows for batch in batches) > 0.95


def _plan_by_trying_all(requests, batch_size, row_multiple, max_shapes):
    """Witness: (rows, inputs, targets, keys) of the batches; each round tries every pair anew."""
    groups: dict = {}
    for request in requests:
        targets = sum(map(len, request.choices))
        shape = buckets.bucket(len(request.inputs)), targets and buckets.bucket(targets)
        groups.setdefault(shape, []).append(request.key)
    groups = sorted((*shape, keys) for shape, keys in groups.items())

    def rows(keys):
        rows = min(batch_size, buckets.bucket(len(keys)))
        return math.ceil(rows / row_multiple) * row_multiple

    def cost(group):
        inputs, targets, keys = group
        return math.ceil(len(keys) / rows(keys)) * rows(keys) * (inputs + 3 * targets)

    def union(a, b):
        return max(a[0], b[0]), max(a[1], b[1]), a[2] + b[2]

    while len(groups) > 1:
        pairs = itertools.combinations(range(len(groups)), 2)
        costs = {
            (a, b): cost(union(groups[a], groups[b])) - cost(groups[a]) - cost(groups[b])
            for a, b in pairs
        }
        a, b = min(costs, key=costs.get)
        if len(groups) <= max_shapes and costs[a, b] > 0.01 * sum(map(cost, groups)):
            break
        rest = [group for i, group in enumerate(groups) if i not in (a, b)]
        groups = sorted([*rest, union(groups[a], groups[b])], key=lambda group: group[:2])
    return [
        (rows(keys), inputs, targets, sorted(keys)[start : start + rows(keys)])
        for inputs, targets, keys in groups
        for start in range(0, len(keys), rows(keys))
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), max_size=40),
    batch_size=st.sampled_from([4, 8, 32]),
    row_multiple=st.sampled_from([1, 2, 4]),
    max_shapes=st.integers(1, 6),
)
def test_a_plan_is_that_of_trying_all_pairs(lengths, batch_size, row_multiple, max_shapes):
    requests = [
        buckets.Request(i, [5] * inputs, [[6] * targets] if targets else [])
        for i, (inputs, targets) in enumerate(lengths)
    ]
    batches = buckets.plan(requests, batch_size, row_multiple, max_shapes)
    found = [
        (b.rows, b.inputs_length, b.targets_length, [request.key for request in b.requests])
        for b in batches
    ]
    assert found == _plan_by_trying_all(requests, batch_size, row_multiple, max_shapes)


def test_a_plan_for_twenty_thousand_requests():
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(1, 2000, 20_000), rng.integers(0, 500, 20_000)
    requests = [
        buckets.Request(i, range(inputs[i]), [range(targets[i])] if targets[i] else ())
        for i in range(20_000)
    ]
    batches = buckets.plan(requests, batch_size=64, max_shapes=8)
    keys = [request.key for batch in batches for request in batch.requests]
    assert sorted(keys) == list(range(20_000))
    assert len({(b.rows, b.inputs_length, b.targets_length) for b in batches}) <= 8
    # All in one shape, padded to the longest, would be 2048 + 3 x 512 for each request.
    work = sum(b.rows * (b.inputs_length + 3 * b.targets_length) for b in batches)
    assert work < 0.8 * 20_000 * (2048 + 3 * 512)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 1)), max_size=60
    ),
    batch_size=st.sampled_from([2, 4, 8]),
    max_shapes=st.integers(1, 4),
    patience=st.integers(1, 4),
    pause=st.integers(0, 60),
)
def test_a_stream_holds_every_request_once_and_lets_none_wait_too_long(
    lengths, batch_size, max_shapes, patience, pause
):
    requests = [
        buckets.Request(i, [5] * inputs, [[6] * targets] if targets else [], group)
        for i, (inputs, targets, group) in enumerate(lengths)
    ]
    counted = Counter(request.lengths for request in requests)
    shapes = buckets.Shapes(counted, batch_size, 1, max_shapes)
    taken: list = []

    def coming():
        for i, request in enumerate([*requests[:pause], None, *requests[pause:]]):
            if request is not None:
                taken.append(i)
            yield request

    went: dict = {}
    for number, batch in enumerate(buckets.stream(coming(), shapes.of, patience)):
        assert 0 < len(batch.requests) <= batch.rows <= batch_size
        assert len({request.group for request in batch.requests}) == 1
        for request in batch.requests:
            shape = shapes.of(request)
            assert shape == buckets.Shape(batch.rows, batch.inputs_length, batch.targets_length)
            assert request.key not in went
            went[request.key] = number, len(taken)
    assert sorted(went) == list(range(len(requests)))
    # A batch goes when it is full: no more rows wait than its shapes and groups have room for.
    rooms = 2 * sum(shape.rows for shape in shapes.all)
    assert all(came - key <= rooms * (patience + 1) for key, (_, came) in went.items())
    if 0 < pause < len(requests):
        assert all(went[i][1] <= pause for i in range(pause))

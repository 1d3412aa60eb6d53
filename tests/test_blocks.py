"""Batches in blocks of one task each: the layout, the rates, and exact continuation."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import objective
from mtl_jax.data import DataConfig, TrainStream, merge_states
from mtl_jax.errors import UserError
from mtl_jax.packing import COUNTERS, BlockDraws, block_shares
from mtl_jax.sources import RowsDataSource

VOCABULARY = seqio.ByteVocabulary(extra_ids=0)
FEATURES = {side: seqio.Feature(VOCABULARY, add_eos=True) for side in ("inputs", "targets")}
# Inputs of very different lengths: as many examples of one fill many more rows.
LENGTHS = {"short": 3, "middle": 11, "long": 29}
RATES = {"short": 2.0, "middle": 1.0, "long": 1.0}
IDS = {"short": 1, "middle": 2, "long": 3}
OWNERS = {"short": "x", "middle": "y", "long": "x"}


class Texts(RowsDataSource):
    def __init__(self, letter, length):
        super().__init__(("train",))
        self._letter, self._length = letter, length

    def rows(self, split):
        size = lambda i: self._length + i % 3  # noqa: E731
        return [{"inputs": self._letter * size(i), "targets": f"{i:02d}"} for i in range(40)]


@pytest.fixture(autouse=True)
def registry():
    tasks, mixtures = dict(seqio.TaskRegistry._REGISTRY), dict(seqio.MixtureRegistry._REGISTRY)
    for name, length in LENGTHS.items():
        seqio.TaskRegistry.add(
            name,
            source=Texts(name[0], length),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=FEATURES,
            metric_fns=[],
        )
    seqio.MixtureRegistry.add("all", list(RATES.items()))
    yield
    seqio.TaskRegistry._REGISTRY, seqio.MixtureRegistry._REGISTRY = tasks, mixtures


CONFIG = DataConfig(
    mixture="all", inputs_length=40, targets_length=16, batch_size=16, prefetch=0, blocks=8
)


def change(**values):
    return dataclasses.replace(CONFIG, **values)


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_same(ours, others):
    for one, other in zip(ours, others, strict=True):
        for key, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[key], err_msg=key)


@pytest.mark.parametrize("shards", [1, 2])
def test_every_microbatch_holds_one_task(shards):
    tasks = collections.Counter()
    for batch in take(TrainStream(change(num_shards=shards), IDS), 6):
        parts = objective.split_microbatches(batch.arrays, CONFIG.blocks)
        for part in parts["decoder_task_ids"]:
            assert len(set(part[part > 0].tolist())) == 1
            tasks[int(part.max())] += 1
        # Both sides of a segment are of the same task.
        for side in ("encoder", "decoder"):
            ids, segments = batch.arrays[f"{side}_task_ids"], batch.arrays[f"{side}_segment_ids"]
            np.testing.assert_array_equal(ids > 0, segments > 0)
        encoder, decoder = (
            batch.arrays[f"{side}_task_ids"].max(1) for side in ("encoder", "decoder")
        )
        np.testing.assert_array_equal(encoder, decoder)
    assert set(tasks) == {1, 2, 3}


@pytest.mark.parametrize("owners", [None, OWNERS])
def test_the_rates_are_those_of_examples(owners):
    """Long-run shares of examples are the mixture's, though a block of short ones holds more."""
    *_, last = take(TrainStream(CONFIG, IDS, owners=owners), 150)
    drawn = last.counters[:, COUNTERS.index("examples")]
    expected = np.array([RATES[name] for name in sorted(RATES)]) / 4
    # How many examples fill a row is an estimate, and which of an owner's tasks is drawn is chance.
    np.testing.assert_allclose(drawn / drawn.sum(), expected, rtol=0.03 if owners is None else 0.1)
    plain = expected * [
        np.mean([LENGTHS[name] + i % 3 + 1 for i in range(40)]) for name in sorted(RATES)
    ]
    tokens = last.counters[:, COUNTERS.index("input_tokens")]
    np.testing.assert_allclose(
        tokens / tokens.sum(), plain / plain.sum(), rtol=0.03 if owners is None else 0.1
    )


@given(
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9),
    blocks=st.integers(1, 24),
    batch=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_draws_give_each_task_its_share_up_to_one_block(shares, blocks, batch):
    shares = block_shares(shares, [1.0] * len(shares))
    draws = BlockDraws(shares, blocks, seed=5)
    found = draws[batch]
    assert found == draws[batch] == sorted(found)
    for number, share in enumerate(shares):
        assert abs(found.count(number) - share * blocks) < 1 + 1e-9


def test_draws_of_many_batches_keep_the_shares():
    """Up to 20 blocks of 16,000, by the orders that change; independent draws are off by 50."""
    shares = [0.07, 0.13, 0.8]
    draws = BlockDraws(shares, 4, seed=0)
    counts = np.bincount([n for batch in range(4000) for n in draws[batch]], minlength=3)
    assert (np.abs(counts - 16000 * np.array(shares)) < 20).all()
    starts = [BlockDraws([0.5, 0.5], 1, seed)[0][0] for seed in range(200)]
    assert 60 < sum(starts) < 140  # where a stream begins depends on its seed


@pytest.mark.parametrize("owners", [None, OWNERS])
def test_continuing_gives_the_very_same_batches(owners):
    def stream():
        return TrainStream(change(num_shards=2), IDS, owners=owners)

    whole = take(stream(), 7)
    state = json.loads(json.dumps(whole[2].state))
    again = stream()
    again.restore(state)
    assert_same(take(again, 4), whole[3:])


def test_two_processes_read_what_one_does():
    config = change(num_shards=2)
    whole = take(TrainStream(config, IDS), 4)
    parts = [TrainStream(config, IDS, process, 2) for process in range(2)]
    batches = [take(part, 4) for part in parts]
    for number, batch in enumerate(whole):
        for key, array in batch.arrays.items():
            joined = np.concatenate([of_process[number].arrays[key] for of_process in batches])
            np.testing.assert_array_equal(array, joined)
    merged = merge_states([of_process[1].state for of_process in batches])
    again = TrainStream(config, IDS)
    again.restore(merged)
    assert_same(take(again, 2), whole[2:])


def test_blocks_may_hold_all_tasks_of_an_owner():
    together = 0
    for batch in take(TrainStream(CONFIG, IDS, owners=OWNERS), 6):
        for part in objective.split_microbatches(batch.arrays, CONFIG.blocks)["decoder_task_ids"]:
            found = set(part[part > 0].tolist())
            assert found <= {1, 3} or found == {2}
            together += found == {1, 3}
    assert together > 3


@pytest.mark.parametrize("blocks", [0, 8])
def test_rates_can_be_set_on_the_way_and_are_part_of_the_position(blocks):
    stream = TrainStream(change(blocks=blocks, prefetch=2), IDS)
    batch = take(stream, 3)[-1]
    batch = stream.by_rates({"short": 0.0, "long": 5.0}, batch)
    after = take(stream, 40)
    stream.close()
    found = after[-1].counters - batch.counters
    # Examples of "short" that waited are still used; none is drawn.
    assert found[sorted(RATES).index("short"), 0] == 0
    assert found[sorted(RATES).index("long"), 0] > 3 * found[sorted(RATES).index("middle"), 0]
    again = TrainStream(change(blocks=blocks), IDS)
    again.restore(json.loads(json.dumps(batch.state)))
    assert_same(take(again, 5), after[:5])


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(
        UserError, match=r"Data.batch_size = 16 must be a multiple of Data.blocks = 3"
    ):
        TrainStream(change(blocks=3), IDS)


def test_a_position_of_another_layout_is_refused():
    state = take(TrainStream(CONFIG, IDS), 1)[-1].state
    with pytest.raises(UserError, match="has blocks = 8, this run has 4"):
        TrainStream(change(blocks=4), IDS).restore(state)

"""Drawing tasks by rate and packing examples into rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mtl_jax.errors import UserError
from mtl_jax.packing import PATIENCE, Example, Rows, TaskDraws, Waiting, add_counters, fill, trim


def example(inputs, targets, task_id=1, token=5):
    return Example(task_id, np.full(inputs, token, np.int32), np.full(targets, token, np.int32))


def test_draws_follow_the_rates():
    rates = np.array([1.0, 0.0, 3.0, 6.0, 0.5])
    draws = TaskDraws(rates, seed=7, shard=0)
    counts = np.bincount([draws[i] for i in range(100_000)], minlength=5)
    assert counts[1] == 0
    kept = rates > 0
    expected = 100_000 * rates[kept] / rates.sum()
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-3
    # The witness can see a wrong rate.
    wrong = 100_000 * np.array([1.1, 3, 6, 0.5]) / 10.6
    assert stats.chisquare(counts[kept], wrong).pvalue < 1e-6


def test_draws_depend_on_their_index_alone():
    forward = TaskDraws([1, 2, 3], 0, 0)
    expected = [forward[i] for i in range(3000)]
    assert [TaskDraws([1, 2, 3], 0, 0)[i] for i in (2999, 1024, 1023, 0)] == [
        expected[i] for i in (2999, 1024, 1023, 0)
    ]
    other_shard, other_seed = TaskDraws([1, 2, 3], 0, 1), TaskDraws([1, 2, 3], 1, 0)
    assert expected != [other_shard[i] for i in range(3000)]
    assert expected != [other_seed[i] for i in range(3000)]


@pytest.mark.parametrize("rates", [[0.0, 0.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0]])
def test_rates_that_cannot_be_drawn(rates):
    with pytest.raises(UserError, match="rates of the mixture"):
        TaskDraws(rates, 0, 0)


def test_layout_of_a_row():
    rows = Rows(1, 8, 6, pack=True)
    assert rows.place(Example(3, np.array([10, 11, 1], np.int32), np.array([20, 1], np.int32)))
    assert rows.place(Example(7, np.array([12, 1], np.int32), np.array([21, 22, 1], np.int32)))
    arrays = {key: array[0].tolist() for key, array in rows.arrays().items()}
    assert arrays == {
        "encoder_input_tokens": [10, 11, 1, 12, 1, 0, 0, 0],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0, 0, 0],
        "encoder_task_ids": [3, 3, 3, 7, 7, 0, 0, 0],
        "decoder_target_tokens": [20, 1, 21, 22, 1, 0],
        "decoder_input_tokens": [0, 20, 0, 21, 22, 0],
        "decoder_segment_ids": [1, 1, 2, 2, 2, 0],
        "decoder_task_ids": [3, 3, 7, 7, 7, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 0],
    }


def test_both_sides_must_fit_and_the_tightest_row_is_taken():
    rows = Rows(2, 10, 10, pack=True)
    rows.place(example(6, 9))
    rows.place(example(5, 2))  # the first row has no room for its targets
    assert rows.place(example(4, 1))
    segments_RL = rows.arrays()["encoder_segment_ids"]
    assert segments_RL[0].tolist() == [1] * 6 + [2] * 4
    assert not rows.place(example(6, 1))


def test_unpacked_rows_hold_one_example():
    rows = Rows(2, 10, 10, pack=False)
    assert rows.place(example(2, 2))
    assert rows.place(example(2, 2))
    assert not rows.place(example(1, 1))
    assert rows.arrays()["encoder_segment_ids"].max() == 1


@given(
    lengths=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 12)), min_size=1, max_size=60),
    rows=st.integers(1, 5),
    lookahead=st.integers(0, 12),
)
@settings(max_examples=60, deadline=None)
def test_every_example_is_packed_once_and_none_waits_for_ever(lengths, rows, lookahead):
    drawn = (
        Example(1, np.full(a, number + 2, np.int32), np.full(b, number + 2, np.int32))
        for number, (a, b) in enumerate(itertools.cycle(lengths))
    )
    consumed = []
    source = (consumed.append(e) or e for e in drawn)
    waiting, packed = [], []
    for _ in range(8):
        batch = Rows(rows, 16, 12, pack=True)
        waiting = fill(batch, waiting, lookahead, source)
        arrays = batch.arrays()
        for side, tokens in (("encoder", "encoder_input"), ("decoder", "decoder_target")):
            assert (arrays[f"{side}_segment_ids"] > 0).sum() == (
                arrays[f"{tokens}_tokens"] > 0
            ).sum()
        for row in range(rows):
            ids = arrays["encoder_input_tokens"][row]
            assert set(ids) - {0} == set(arrays["decoder_target_tokens"][row]) - {0}
            packed += sorted(set(ids.tolist()) - {0})
        assert len(waiting) <= max(lookahead, 0)
        assert all(w.batches <= PATIENCE + lookahead for w in waiting)
    held = [int(w.example.inputs[0]) for w in waiting]
    assert sorted(packed + held) == [int(e.inputs[0]) for e in consumed]


def test_impatient_examples_go_first():
    waiting = [Waiting(example(9, 1), 0), Waiting(example(2, 1, token=6), PATIENCE)]
    batch = Rows(1, 10, 10, pack=True)
    left = fill(batch, waiting, 1, iter([]))
    assert batch.arrays()["encoder_input_tokens"][0].tolist() == [6, 6] + [0] * 8
    assert [(w.example.inputs[0], w.batches) for w in left] == [(5, 1)]


def test_trim():
    tokens = np.array([4, 5, 6, 1])
    assert trim(tokens, 4, 1) is tokens
    assert trim(tokens, 3, None).tolist() == [4, 5, 6]
    assert trim(tokens, 3, 1).tolist() == [4, 5, 1]
    assert tokens.tolist() == [4, 5, 6, 1]


def test_counters_add_and_take_maxima():
    a, b = np.array([[1, 0, 5, 5, 1, 0, 9, 2]]), np.array([[2, 1, 7, 1, 0, 1, 3, 4]])
    assert add_counters([a, b]).tolist() == [[3, 1, 12, 6, 1, 1, 9, 4]]

"""What counts as a bad loss and what follows; with whole runs: test_reliability_runs.py."""

import json

import numpy as np
import pytest

from mtl_jax.errors import UserError
from mtl_jax.guard import Guard, RollBack
from mtl_jax.guard_config import GuardConfig
from mtl_jax.run_directory import RunDirectory


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(guard, losses, first=1):
    """Which of these losses are good."""
    return [
        guard.judge(step, {"loss": loss}, None, "" if np.isfinite(loss) else "not finite")
        for step, loss in enumerate(losses, first)
    ]


def make_guard(tmp_path, **values):
    return Guard(GuardConfig(**values), RunDirectory(tmp_path))


SPIKES = {"on_bad_loss": "skip", "spike_factor": 2.0, "spike_window": 4}


def test_a_spike_is_measured_by_the_median_of_the_window(tmp_path):
    guard = make_guard(tmp_path, **SPIKES)
    # Of the first four steps nothing is known, and step 5 cannot know that of step 4.
    assert judged(guard, [1.0, 9.0, 1.2, 1.4, 50.0]) == [True] * 5
    assert guard.limit(6) == np.float32(2 * 1.3)  # of 1, 9, 1.2, 1.4
    assert guard.limit(7) == np.float32(2 * 5.2)  # of 9, 1.2, 1.4, 50
    assert judged(guard, [2.59, 10.5, 1.0], 6) == [True, False, True]
    assert [row["step"] for row in lines(tmp_path / "events.jsonl")] == [7]
    assert guard.skips == 1


def test_a_guard_goes_on_where_it_was(tmp_path):
    """Saved at any step and restored, it judges the rest as the one that was never stopped."""
    draw = np.random.default_rng(3)
    losses = [float(x) for x in np.exp(0.7 * draw.standard_normal(40))]
    whole = make_guard(tmp_path, **SPIKES)
    expected = judged(whole, losses)
    assert 0 < expected.count(False) < 10
    for stop in range(1, 40, 7):
        first = make_guard(tmp_path, **SPIKES)
        judged(first, losses[:stop])
        second = make_guard(tmp_path, **SPIKES)
        second.restore(json.loads(json.dumps(first.as_json())))
        assert judged(second, losses[stop:], stop + 1) == expected[stop:]
        assert second.as_json() == whole.as_json()


def test_skips_in_a_row_are_bounded(tmp_path):
    guard = make_guard(tmp_path, on_bad_loss="skip", max_skips=2)
    assert judged(guard, [1.0, np.nan, np.nan, 1.0, np.nan, np.nan]) == [1, 0, 0, 1, 0, 0]
    with pytest.raises(UserError, match=r"2 updates in a row .* Guard.max_skips"):
        judged(guard, [np.inf])
    assert guard.skips == 4


def test_where_a_run_goes_back_to(tmp_path):
    guard = make_guard(tmp_path, on_bad_loss="roll_back", roll_back_steps=10)
    bad = RollBack(25, "", None)
    assert guard.target(bad, [5, 10, 15, 20]) == 15
    assert guard.target(bad, [20, 24]) == 20  # none is so old
    assert guard.target(bad, []) is None
    guard.roll_backs = 3
    with pytest.raises(UserError, match=r"3 times the run went back, .* Guard\.max_roll"):
        judged(guard, [np.nan])


def test_a_guard_that_watches_only_for_nan_saves_nothing(tmp_path):
    guard = make_guard(tmp_path)
    assert judged(guard, [1.0, 1e9]) == [True, True]
    assert guard.as_json() == {}
    with pytest.raises(UserError, match=r"not finite\. The run stops"):
        judged(guard, [np.nan])
    assert not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_bad_loss": "rollback"}, "'rollback'. Did you mean 'roll_back'"),
        ({"spike_factor": 0.5}, "Guard.spike_factor must be 0 or greater than 1"),
        ({"spike_factor": float("nan")}, "Guard.spike_factor"),
        ({"max_skips": 0, "on_bad_loss": "skip"}, "Guard.max_skips must be at least 1"),
        ({"max_skips": 3}, "Guard.max_skips is set, but it needs Guard.on_bad_loss = 'skip'"),
        ({"roll_back_steps": 3, "on_bad_loss": "skip"}, "needs Guard.on_bad_loss = 'roll_back'"),
        ({"spike_window": 9}, "needs Guard.spike_factor"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(UserError, match=message):
        GuardConfig(**values)

"""Intervals, tests and corrections of the sweep's report against closed forms and plain loops."""

import itertools
import math

import numpy as np
import pytest

from mtl_jax.sweep_report import bootstrap


def interval(scores_PN, seed=0, resamples=bootstrap.RESAMPLES):
    rng = np.random.default_rng(seed)
    return bootstrap.interval(bootstrap.mean_replicates([scores_PN], rng, resamples)[0])


def test_the_interval_is_the_normal_one_for_many_examples():
    scores = np.random.default_rng(1).gamma(2.0, 10.0, (1, 4000))
    low, high = interval(scores)
    error = scores.std(ddof=1) / math.sqrt(scores.size)
    # The 2.5 % quantile of 2,000 normal draws has a standard error of 0.06 of their own.
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)


def test_twelve_prompts_that_agree_tell_no_more_than_one():
    rng = np.random.default_rng(2)
    one = 100.0 * (rng.random((1, 300)) < 0.6)
    width = lambda scores: np.diff(interval(scores))[0]  # noqa: E731
    assert interval(np.repeat(one, 12, axis=0)) == pytest.approx(interval(one))
    apart = 100.0 * (rng.random((12, 300)) < 0.6)
    # Independent prompts do: a twelfth of the variance. The ends of both are random, as above.
    assert width(apart) == pytest.approx(width(one) / math.sqrt(12), rel=0.15)


def test_replicates_against_a_loop_with_missing_examples():
    rng = np.random.default_rng(3)
    whole = rng.normal(50, 10, (3, 40))
    holes = np.where(rng.random((3, 40)) < 0.3, np.nan, whole)
    found = bootstrap.mean_replicates([whole, holes], np.random.default_rng(4), 50)
    picks_BN = np.random.default_rng(4).integers(0, 40, (50, 40))
    for scores, means in zip((whole, holes), found, strict=True):
        expected = [np.nanmean(scores[:, picks], axis=1).mean() for picks in picks_BN]
        np.testing.assert_allclose(means, expected, rtol=1e-12)


def test_a_prompt_with_one_example_is_never_empty():
    scores = np.full((2, 30), np.nan)
    scores[0], scores[1, 7] = 40.0, 80.0
    replicates = bootstrap.mean_replicates([scores], np.random.default_rng(5), 200)
    np.testing.assert_allclose(replicates, 60.0)


def test_large_matrices_are_drawn_in_pieces(monkeypatch):
    scores = np.random.default_rng(6).normal(0, 1, (2, 50))
    draw = lambda: bootstrap.mean_replicates([scores], np.random.default_rng(7), 101)  # noqa: E731
    at_once = draw()
    monkeypatch.setattr(bootstrap, "_CHUNK", 120)
    np.testing.assert_allclose(draw(), at_once, rtol=1e-10)  # sums in another order


def test_the_sign_flip_test_against_all_flips():
    difference_PN = np.random.default_rng(8).normal(4.0, 10.0, (3, 11))
    difference_PN[1, 2] = np.nan
    added_N = bootstrap.contributions(difference_PN)
    mean = np.nanmean(difference_PN, axis=1).mean()
    assert added_N.sum() == pytest.approx(mean)
    all_signs = np.array(list(itertools.product((-1, 1), repeat=11)))
    exact = np.mean(np.abs(all_signs @ added_N) >= abs(mean) - 1e-9)
    found = bootstrap.p_value(
        mean, bootstrap.flipped(added_N[None], np.random.default_rng(9))[:, 0]
    )
    # A share of 9,999 draws: three standard errors are below 0.015.
    assert found == pytest.approx(exact, abs=0.015)
    assert 0.02 < exact < 0.9


def test_the_sign_flip_test_is_the_z_test_for_many_examples():
    difference = np.random.default_rng(10).normal(0.8, 20.0, (1, 3000))
    added = bootstrap.contributions(difference)
    z = added.sum() / math.sqrt((added**2).sum())
    normal = math.erfc(abs(z) / math.sqrt(2))
    flipped = bootstrap.flipped(added[None], np.random.default_rng(11))
    assert flipped.shape == (bootstrap.FLIPS, 1)
    assert bootstrap.p_value(added.sum(), flipped[:, 0]) == pytest.approx(normal, abs=0.015)


def test_no_difference_has_p_one_and_a_clear_one_the_smallest():
    rng = np.random.default_rng(12)
    zero, clear = np.zeros(20), np.full(40, 0.5)
    assert bootstrap.p_value(0.0, bootstrap.flipped(zero[None], rng)[:, 0]) == 1.0
    flipped = bootstrap.flipped(clear[None], rng)[:, 0]
    assert bootstrap.p_value(20.0, flipped) == 1 / (1 + bootstrap.FLIPS)


def test_holm_as_r_does_it():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") and p.adjust(c(0.5, 0.6), "holm")
    assert bootstrap.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bootstrap.holm([0.5, 0.6]) == [1.0, 1.0]
    assert bootstrap.holm([]) == []


def test_chance_depends_on_the_dataset_alone():
    draw = lambda seed, name: bootstrap.generator(seed, name).random()  # noqa: E731
    assert draw(0, "cb") == draw(0, "cb")
    assert len({draw(0, "cb"), draw(1, "cb"), draw(0, "rte")}) == 3


def drawn_scores(rng, prompts=8, examples=120, gain=0.0):
    """Right or wrong by an example's own ease, which all prompts share: mean 50 without gain."""
    ease_N = np.clip(0.5 + gain + 0.45 * rng.choice([-1, 1], examples), 0, 1)
    return 100.0 * (rng.random((prompts, examples)) < ease_N)


@pytest.mark.slow
def test_intervals_hold_the_truth_and_tests_err_as_often_as_they_say():
    """400 sweeps of which the truth is known; a rate of 5 % has a standard error of 1.1 %."""
    rng = np.random.default_rng(13)
    held = naive = rejected = 0
    for trial in range(400):
        first, second = drawn_scores(rng), drawn_scores(rng)
        low, high = interval(first, trial, 500)
        held += low <= 50 <= high
        # What resampling each score on its own would say.
        error = first.std() / math.sqrt(first.size)
        naive += abs(first.mean() - 50) <= 1.96 * error
        added = bootstrap.contributions(second - first)
        flipped = bootstrap.flipped(added[None], np.random.default_rng(trial), 999)[:, 0]
        rejected += bootstrap.p_value(added.sum(), flipped) <= 0.05
    assert 0.915 <= held / 400 <= 0.98
    assert naive / 400 < 0.75
    assert 0.02 <= rejected / 400 <= 0.085

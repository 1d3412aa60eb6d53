"""Metrics against figures of `rouge_score` and cases worked out by hand."""

import pytest

from mtl_jax import metrics


def test_accuracy_is_a_percentage_and_strict():
    assert metrics.accuracy(["yes", "no", "no", "a"], ["yes", "no", "No", "a "]) == {"accuracy": 50}


def test_exact_match_ignores_white_space_around_and_takes_any_reference():
    assert metrics.exact_match(["a b", ["x", "y"]], [" a b\n", "y"]) == {"exact_match": 100}
    assert metrics.exact_match(["a b", ["x", "y"]], ["a  b", "z"]) == {"exact_match": 0}


@pytest.mark.parametrize(
    ("target", "prediction", "em", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 100, 100),
        # normal forms "red house on hill" (4) and "house" (1): P = 1, R = 1/4, F1 = 2/5
        ("the red house on a hill", "house", 0, 40),
        # "cat cat dog" and "cat dog dog": two tokens in common of three on both sides
        ("cat cat dog", "cat dog dog", 0, 200 / 3),
        (["1990", "the year 1990"], "year 1990", 100, 100),
        ("theatre", "atre", 0, 0),  # articles are whole words
        ("", "", 100, 0),  # SQuAD 1.1 and T5: nothing in common
    ],
)
def test_squad_worked_by_hand(target, prediction, em, f1):
    result = metrics.squad([target], [prediction])
    assert result == pytest.approx({"em": em, "f1": f1})


def test_squad_is_the_mean_over_examples():
    result = metrics.squad(["a cat", "a dog", "x y"], ["cat", "cow", "x z"])
    assert result == pytest.approx({"em": 100 / 3, "f1": 50})


def test_rougeL_worked_by_hand():
    # longest common subsequence "the cat mat" of 5 and 4 tokens: P = 3/4, R = 3/5
    result = metrics.rougeL(["the cat on the mat"], ["the big cat mat"])
    assert result["rougeL"] == pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)
    # no stemming: "cats" is not "cat"
    assert metrics.rougeL([["dogs", "cats"]], ["cat"])["rougeL"] == 0


@pytest.mark.data
def test_rougeL_on_the_thousand_pairs_of_t5(data_folder):
    def lines(name):
        return (data_folder / "metrics" / name).read_text().splitlines()

    targets, predictions = lines("target_large.txt"), lines("prediction_large.txt")
    assert len(targets) == len(predictions) == 1000
    # Plain mean, computed with rouge_score directly.
    assert metrics.rougeL(targets, predictions)["rougeL"] == pytest.approx(38.32, abs=0.005)

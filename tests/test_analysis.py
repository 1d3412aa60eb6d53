"""Numbers about tasks: intervals, affinity and groups, fronts, transfer; known answers."""

import itertools

import numpy as np
import pytest
import scipy.cluster.hierarchy
import scipy.spatial.distance
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.analysis import affinity, intervals, ordering, pareto, transfer
from mtl_jax.errors import UserError

# Intervals


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 29, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_student_t_against_scipy(degrees, confidence):
    expected = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
    # Both are exact up to rounding; bisection ends at one unit in the last place of the angle.
    assert intervals.t_critical(degrees, confidence) == pytest.approx(expected, rel=1e-9)


def test_mean_interval_against_scipy_and_a_table():
    values = [71.2, 69.8, 72.9]
    found = intervals.mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert (found.low, found.high, found.n) == pytest.approx((low, high, 3))
    # 4.303 is the table's value for two degrees of freedom.
    assert found.half_width == pytest.approx(4.303 * np.std(values, ddof=1) / 3**0.5, rel=1e-3)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert intervals.mean_interval([3.0]) == intervals.Interval(3.0, None, None, 1)
    assert intervals.mean_interval([3.0]).half_width is None
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(UserError, match="needs finite values"):
            intervals.mean_interval(bad)


def test_pairs_take_out_what_the_seeds_share():
    first, second = [10.0, 20.0, 30.0], [9.0, 19.0, 28.0]
    found = intervals.paired_difference(first, second)
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(UserError, match="need pairs, got 2 and 1"):
        intervals.paired_difference([1.0, 2.0], [1.0])


# Affinity: l_t = |theta - a_t|^2 / 2 + b_t, g_t = theta - a_t


CENTRES = np.array([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.5]])
FLOORS = np.array([0.5, 1.0, 2.0])


def quadratic_losses(theta):
    return 0.5 * ((theta - CENTRES) ** 2).sum(axis=1) + FLOORS


def quadratic_gradient(theta, task):
    return theta - CENTRES[task]


def test_lookahead_affinity_of_quadratics_is_the_analytic_one():
    theta, eta = np.array([0.3, -0.2]), 0.1
    found = affinity.measure_affinity(quadratic_losses, quadratic_gradient, theta, eta)
    g = theta - CENTRES
    # l_j(theta - eta g_i) = l_j - eta g_i.g_j + eta^2 |g_i|^2 / 2, exactly.
    decrease = eta * g @ g.T - 0.5 * eta**2 * (g**2).sum(axis=1)[:, None]
    np.testing.assert_allclose(found, decrease / quadratic_losses(theta)[None, :], rtol=1e-12)
    assert not np.allclose(found, found.T), "affinity has a direction"


def test_the_gramian_form_is_the_limit_of_small_steps():
    theta = np.array([0.3, -0.2])
    g = theta - CENTRES
    losses = quadratic_losses(theta)
    errors = []
    for eta in (1e-2, 1e-3, 1e-4):
        measured = affinity.measure_affinity(quadratic_losses, quadratic_gradient, theta, eta)
        linear = affinity.gramian_affinity(g @ g.T, losses, eta)
        errors.append(np.abs(measured - linear).max() / eta)
    # The relative error is of first order: a tenth of the step, a tenth of the error.
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 10.0, rtol=1e-3)


def test_affinity_refuses_what_it_cannot_divide_by():
    with pytest.raises(UserError, match="must be positive"):
        affinity.lookahead_affinity(np.array([1.0, 0.0]), np.ones((2, 2)))
    with pytest.raises(UserError, match=r"needs losses \[N, N\], got \(2, 3\)"):
        affinity.lookahead_affinity(np.ones(2), np.ones((2, 3)))
    assert np.isnan(affinity.gramian_affinity(np.ones((2, 2)), [1.0, np.nan], 0.1)[:, 1]).all()


def planted(sizes, seed=0):
    """Affinity 1 within and -1 between clusters, with noise, in a random order of tasks."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    same = labels[:, None] == labels[None, :]
    return np.where(same, 1.0, -1.0) + generator.normal(0, 0.3, same.shape), labels


def adjusted_rand_index(a, b):
    """Hubert and Arabie 1985, from the contingency table."""
    table = np.array([[np.sum((a == i) & (b == j)) for j in set(b)] for i in set(a)])

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    together, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / (len(a) * (len(a) - 1) / 2)
    return (together - expected) / ((rows + columns) / 2 - expected)


@pytest.mark.parametrize("sizes", [(3, 2, 2), (4, 4, 4), (2, 1, 1), (5, 4, 6), (9, 8, 7, 6)])
def test_planted_groups_are_found(sizes):
    matrix, labels = planted(sizes)
    for found in (
        affinity.propose_groups(matrix, len(sizes)),
        affinity.best_grouping(matrix),
    ):
        groups = np.empty(len(labels), int)
        for number, group in enumerate(found.groups):
            groups[list(group)] = number
        assert adjusted_rand_index(groups, labels) == 1.0
        assert found.exact == (sum(sizes) <= 12)


def test_ari_of_these_tests():
    assert adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])) == 1.0
    crossed = adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert crossed == pytest.approx(-0.5), "worse than chance, which is 0"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.data())
def test_no_partition_beats_the_proposed_one(seed, tasks, data):
    matrix = np.random.default_rng(seed).normal(size=(tasks, tasks))
    count = data.draw(st.integers(1, tasks))
    found = affinity.propose_groups(matrix, count)
    assert sorted(task for group in found.groups for task in group) == list(range(tasks))
    # Every way to give each task a group, without the subsets and bits of the code.
    best = max(
        sum(
            np.mean([matrix[i, j] for i in range(tasks) if i != j and way[i] == way[j]] or [0.0])
            for j in range(tasks)
        )
        for way in itertools.product(range(count), repeat=tasks)
        if len(set(way)) == count
    )
    assert found.score == pytest.approx(best, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_no_partition_has_more_affinity_than_the_best_grouping(seed, tasks):
    matrix = np.random.default_rng(seed).normal(size=(tasks, tasks))
    best = max(
        sum(matrix[i, j] for i, j in itertools.permutations(range(tasks), 2) if way[i] == way[j])
        for way in itertools.product(range(tasks), repeat=tasks)
    )
    assert affinity.best_grouping(matrix).score == pytest.approx(best, abs=1e-9)


def test_groups_out_of_range_are_refused():
    for count in (0, 4):
        with pytest.raises(UserError, match=f"1 to 3 groups, not {count}"):
            affinity.propose_groups(np.zeros((3, 3)), count)
    alone = affinity.best_grouping(np.zeros((3, 3)))
    assert alone.groups == ((0, 1, 2),), "nothing known: the fewest groups"


def test_average_linkage_against_scipy():
    points = np.random.default_rng(3).normal(size=(15, 2))
    condensed = scipy.spatial.distance.pdist(points)
    order, merges = ordering.average_linkage(scipy.spatial.distance.squareform(condensed))
    expected = scipy.cluster.hierarchy.average(condensed)
    np.testing.assert_allclose([height for *_, height in merges], expected[:, 2], rtol=1e-12)
    assert sorted(order) == list(range(15))
    assert ordering.average_linkage(np.zeros((0, 0))) == ([], [])


def test_clusters_stand_side_by_side_and_gaps_count_as_far():
    distance = np.array([[0, 9, 1, 9], [9, 0, 9, np.nan], [1, 9, 0, 9], [9, np.nan, 9, 0.0]])
    order, _ = ordering.average_linkage(distance)
    assert abs(order.index(0) - order.index(2)) == 1


# Pareto


def test_front_and_position():
    points = np.array([[1, 3], [2, 2], [3, 1], [1, 1], [2, 2]], float)
    assert pareto.front(points).tolist() == [True, True, True, False, True]
    assert pareto.position([2.5, 2.5], points) == pareto.OVER
    assert pareto.position([3.0, 1.0], points) == pareto.ON
    assert pareto.position([3.0, 0.5], points) == pareto.BELOW
    with pytest.raises(UserError, match="finite numbers"):
        pareto.front(np.array([[1.0, np.nan]]))


def test_hypervolume_of_known_shapes():
    stairs = np.array([[1, 3], [2, 2], [3, 1]], float)
    assert pareto.hypervolume(stairs, [0, 0]) == 6.0, "3 + 2 + 1 squares"
    assert pareto.hypervolume(stairs, [1, 1]) == 1.0, "only (2, 2) is above in both"
    assert pareto.hypervolume(np.array([[2, 3, 4.0]]), [0, 0, 0]) == 24.0
    # Inclusion and exclusion of two boxes: 2*2*1 + 1*1*3 - 1*1*1.
    assert pareto.hypervolume(np.array([[2, 2, 1], [1, 1, 3.0]]), [0, 0, 0]) == 6.0
    assert pareto.hypervolume(np.zeros((0, 2)), [0, 0]) == 0.0
    with pytest.raises(UserError, match="has 1 numbers but the points have 2"):
        pareto.hypervolume(stairs, [0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_hypervolume_is_the_union_of_boxes(seed, count, measures):
    points = np.random.default_rng(seed).integers(1, 5, (count, measures)).astype(float)
    # Count unit cells: cell c is dominated by a point that is above it in every measure.
    cells = np.array(list(itertools.product(range(4), repeat=measures)))
    dominated = (cells[:, None, :] + 1 <= points[None]).all(axis=2).any(axis=1)
    assert pareto.hypervolume(points, [0.0] * measures) == pytest.approx(dominated.sum())


# Transfer


def test_delta_m_of_a_hand_calculation():
    baseline = {("qa", "em"): 50.0, ("qa", "f1"): 80.0, ("lm", "loss"): 2.0}
    scores = {("qa", "em"): 55.0, ("qa", "f1"): 76.0, ("lm", "loss"): 1.9}
    # qa: (+10 % - 5 %) / 2; lm: +5 %, for its loss went down.
    assert transfer.delta_m(scores, baseline) == pytest.approx((0.025 + 0.05) / 2)
    assert transfer.delta_m(baseline, baseline) == 0.0
    assert transfer.delta_m({**scores, ("new", "em"): 1.0}, baseline) is None
    assert transfer.delta_m(scores, {**baseline, ("qa", "em"): 0.0}) is None


def test_lower_is_better_turns_the_sign():
    assert [transfer.lower_is_better(m) for m in ("loss", "eval/word_error", "accuracy")] == [
        True, True, False,
    ]  # fmt: skip
    assert transfer.lower_is_better("surprise", ["surprise"])
    assert transfer.relative_delta(3.0, 2.0, False) == 0.5
    assert transfer.relative_delta(3.0, 2.0, True) == -0.5
    assert transfer.relative_delta(-3.0, -2.0, False) == -0.5, "lower, though the ratio is above 1"


def test_report_over_seeds_pairs_what_has_the_same_seed():
    baselines = {"a": {(0,): {("a", "em"): 50.0}, (1,): {("a", "em"): 100.0}},
                 "b": {(0,): {("b", "em"): 10.0}, (1,): {("b", "em"): 10.0}}}  # fmt: skip
    runs = {
        (0,): {("a", "em"): 55.0, ("b", "em"): 9.0},
        (1,): {("a", "em"): 110.0, ("b", "em"): 9.0},
    }
    found = transfer.negative_transfer(runs, baselines)
    assert found.paired
    assert found.by_task["a"].mean == pytest.approx(0.1)
    assert found.by_task["a"].high == pytest.approx(0.1), "each seed gains the same: no spread"
    assert found.delta.mean == pytest.approx(0.0)
    assert (found.worst, found.missing) == ("b", ())
    unpaired = transfer.negative_transfer({(7,): runs[0,], (8,): runs[1,]}, baselines)
    assert not unpaired.paired
    assert unpaired.by_task["a"].mean == pytest.approx(((55 + 110) / 2 - 75) / 75)
    assert unpaired.by_task["a"].high > 0.5, "against the mean, the seeds' spread remains"


def test_a_missing_baseline_leaves_no_number():
    runs = {(0,): {("a", "em"): 55.0, ("b", "em"): 9.0}}
    found = transfer.negative_transfer(runs, {"a": {(0,): {("a", "em"): 50.0}}})
    assert found.delta is None
    assert found.missing == ("b",)
    assert found.by_task["a"].mean == pytest.approx(0.1)
    plain = found.as_json()
    assert plain["delta_m"] is None
    assert plain["by_metric"]["b"]["em"] is None
    none = transfer.negative_transfer(runs, {})
    assert (none.delta, none.worst, none.missing) == (None, None, ("a", "b"))


def test_transfer_matrix():
    baselines = {
        "a": {(0,): {("a", "em"): 50.0, ("b", "em"): 5.0}},
        "b": {(0,): {("b", "em"): 10.0}},
    }
    matrix = transfer.transfer_matrix(baselines, ["a", "b"])
    assert matrix["a", "b"].mean == pytest.approx(-0.5)
    assert matrix["a", "a"].mean == 0.0
    assert matrix["b", "a"] is None, "b was not evaluated on a"

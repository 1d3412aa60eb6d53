"""All loss-side methods: absent tasks, resuming, what is refused; and weights set beforehand.

Weights are float32: a value that is computed in a few operations agrees to 1e-6.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balance_batches import KEY, NAMES, observe, one_step, random_batches, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.balance.adaptive import DWA, DifficultyWeights, UncertaintyWeights
from mtl_jax.balance.famo import FAMO
from mtl_jax.balance.group_dro import DoReMi, GroupDRO
from mtl_jax.balance.method import METHODS, REFERENCE
from mtl_jax.balance.per_task import by_name
from mtl_jax.balance.weighting import RandomWeights, StaticWeights, TaskMean, TransferObjective
from mtl_jax.errors import UserError

# One of each, set so that a few steps change its weights.
ALL = (
    StaticWeights({"nli_*": 2.0, "sum": 0.25}),
    StaticWeights({"nli_*": 2.0, "sum": 0.25}, normalise=True),
    TaskMean(),
    RandomWeights(),
    TransferObjective(["nli_*", "qa"], ["sum"], alpha=0.5, schedule="linear", steps=4),
    UncertaintyWeights(lr=0.1),
    DWA(window_steps=2),
    DifficultyWeights(decay=0.5),
    DifficultyWeights(metric="likelihood", gamma=0.0),
    FAMO(lower_bound={"sum": 0.1}),
    GroupDRO(eta=0.5),
    GroupDRO(eta=0.5, smoothing=0.01),
    DoReMi(reference="run", every_n_steps=1),
    DoReMi(reference="run", every_n_steps=2),
)
each_method = pytest.mark.parametrize("method", ALL, ids=repr)


# All methods.


def test_every_method_is_registered_and_tested():
    assert {type(method) for method in ALL} <= set(METHODS.values())
    modules = {f"mtl_jax.balance.{m}" for m in ("weighting", "adaptive", "famo", "group_dro")}
    mine = {kind for kind in METHODS.values() if kind.__module__ in modules}
    assert mine == {type(method) for method in ALL}
    for kind in mine:
        assert METHODS[kind.__name__] is kind
        kind()  # every field has a default


@each_method
def test_absent_tasks_get_no_weight_and_keep_their_state(method):
    if isinstance(method, DWA):  # longer windows end while a task that was in them is absent
        method = DWA(window_steps=1)
    batches = list(random_batches(12, 4, seed=1))
    assert any((seen.tokens == 0).any() for seen, _ in batches)
    state = method.init(4, 1)
    for seen, after_N in batches:
        weights_N, new, logs = one_step(method, state, seen, after_N)
        absent = np.asarray(seen.tokens) == 0
        assert weights_N.shape == (4,)
        assert weights_N.dtype == jnp.float32
        assert np.isfinite(weights_N).all()
        assert (np.asarray(weights_N)[absent] == 0).all()
        assert all(np.isfinite(value).all() for value in logs.values())
        if isinstance(method, DoReMi):  # moves absent tasks by what they did last
            pairs = [(state.excess, new.excess), (state.seen, new.seen)]
        else:
            pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True))
        for old, now in pairs:
            if now.shape == (4,):
                np.testing.assert_array_equal(np.asarray(now)[absent], np.asarray(old)[absent])
        state = new


@each_method
def test_a_task_that_is_never_there_might_as_well_not_exist(method):
    """Four tasks with one absent equal three; 1e-6: sums of four and three float32 numbers."""
    left = np.array([0, 1, 3])
    four = list(random_batches(12, 4, seed=2, absent=2))
    three = []
    for seen, after_N in four:
        fields = ("tokens", "shares", "losses", "correct", "excess")
        values = {name: getattr(seen, name)[left] for name in fields}
        names = tuple(NAMES[task] for task in left)
        three.append((dataclasses.replace(seen, names=names, **values), after_N[left]))
    weights, _ = run(method, four)
    expected, _ = run(method, three, tasks=3)
    np.testing.assert_allclose(weights[:, left], expected, rtol=1e-6, atol=1e-7)


@each_method
def test_a_state_that_went_through_a_file_goes_on_the_same(method, tmp_path):
    batches = list(random_batches(10, 4, seed=3))
    whole, _ = run(method, batches)
    _, state = run(method, batches[:5])
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "state.npz") as file:
        restored = jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])
    assert jax.tree.structure(restored) == jax.tree.structure(method.init(4, 1))
    again, _ = run(method, batches[5:], restored)
    np.testing.assert_array_equal(again, whole[5:])


@each_method
def test_a_batch_without_any_token_divides_nothing_by_zero(method):
    _, state = run(method, random_batches(3, 4, seed=4))
    empty = observe(np.zeros(4), step=3, excess=np.zeros(4))
    weights_N, new, _ = one_step(method, state, empty, jnp.zeros(4))
    np.testing.assert_array_equal(weights_N, np.zeros(4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


@each_method
def test_under_scan_and_eagerly_as_under_jit(method):
    """1e-6: the compiler fuses a loop's operations in another way."""
    batches = list(random_batches(6, 4, seed=5))
    expected, state = run(method, batches)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

    def body(state, batch):
        weights_N, state, _ = one_step.__wrapped__(method, state, *batch)
        return state, weights_N

    scanned_state, scanned = jax.lax.scan(body, method.init(4, 1), stacked)
    np.testing.assert_allclose(scanned, expected, rtol=1e-6, atol=1e-7)
    assert jax.tree.structure(scanned_state) == jax.tree.structure(state)
    eager = one_step.__wrapped__(method, method.init(4, 1), *batches[0])[0]
    np.testing.assert_allclose(eager, expected[0], rtol=1e-6, atol=1e-7)


def test_values_by_name():
    values = {"*": 1, "nli_b": 2, "nli_*": 3}
    assert by_name("F", values, NAMES) == {"qa": 1, "nli_a": 3, "nli_b": 2, "sum": 1}
    assert by_name("F", {"sum": 0}, NAMES) == {"sum": 0}
    assert by_name("F", {"a[1]": 0}, ["a[1]", "b"]) == {"a[1]": 0}  # a name first, then a glob
    with pytest.raises(UserError, match=r"F: 'nli' is none of the tasks\. Did you mean 'nli_"):
        by_name("F", {"nli": 1}, NAMES)


# Weights set beforehand.

TOKENS = np.array([3, 40, 0, 7], np.float32)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_factors_of_one_are_plain_training_bit_for_bit(tokens, normalise):
    seen = observe(tokens)
    weights_N = jax.jit(lambda seen: StaticWeights(normalise=normalise).weights((), seen)[0])(seen)
    np.testing.assert_array_equal(weights_N, jax.jit(lambda seen: seen.shares)(seen))


def test_factors_multiply_shares():
    seen = observe(TOKENS)
    factors = {"qa": 2.0, "nli_*": 0.5}
    weights_N, _, _ = StaticWeights(factors).weights((), seen)
    np.testing.assert_allclose(weights_N, [6 / 50, 20 / 50, 0, 7 / 50], rtol=1e-6)
    weights_N, _, _ = StaticWeights(factors, normalise=True).weights((), seen)
    np.testing.assert_allclose(weights_N, [6 / 33, 20 / 33, 0, 7 / 33], rtol=1e-6)
    tenfold = {name: 10 * factor for name, factor in {"*": 1.0, **factors}.items()}
    weights_N, _, _ = StaticWeights(tenfold, normalise=True).weights((), seen)
    np.testing.assert_allclose(weights_N, [6 / 33, 20 / 33, 0, 7 / 33], rtol=1e-6)
    only_absent = StaticWeights({"*": 0.0, "nli_b": 1.0}, normalise=True)
    np.testing.assert_array_equal(only_absent.weights((), seen)[0], np.zeros(4))


def test_task_mean():
    np.testing.assert_allclose(TaskMean().weights((), observe(TOKENS))[0], [1 / 3, 1 / 3, 0, 1 / 3])


def descend(method, names, tokens):
    """Gradient descent in float64 on two quadratics 1/2 (x - c)' H (x - c), one for each task."""
    hessians = np.array([[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]])
    centres = np.array([[1.0, -1.0], [-2.0, 0.5]])
    weights_N, _, _ = method.weights((), observe(tokens, names=names))
    weights = np.asarray(weights_N, np.float64)
    x = np.zeros(2)
    for _ in range(3000):
        gradients = np.einsum("tij,tj->ti", hessians, x - centres)
        x = x - 0.1 * weights @ gradients
    return x, hessians, centres


def weighted_optimum(hessians, centres, weights):
    matrix = np.einsum("t,tij->ij", weights, hessians)
    return np.linalg.solve(matrix, np.einsum("t,tij,tj->i", weights, hessians, centres))


def test_weighted_quadratics_have_their_closed_form():
    """(w H1 + (1 - w) H2)^-1 (w H1 a + (1 - w) H2 b); 1e-6: the weights are float32."""
    x, hessians, centres = descend(StaticWeights({"a": 3.0}), ("a", "b"), [10, 30])
    expected = weighted_optimum(hessians, centres, np.array([0.5, 0.5]))
    np.testing.assert_allclose(x, expected, atol=1e-6)
    x, hessians, centres = descend(StaticWeights(), ("a", "b"), [10, 30])
    expected = weighted_optimum(hessians, centres, np.array([0.25, 0.75]))
    np.testing.assert_allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_transfer_on_quadratics_has_its_closed_form(alpha):
    """The optimum of L_source + alpha L_target, whatever the numbers of tokens."""
    method = TransferObjective(["a"], ["b"], alpha=alpha)
    x, hessians, centres = descend(method, ("a", "b"), [10, 30])
    expected = weighted_optimum(hessians, centres, np.array([1.0, alpha]))
    np.testing.assert_allclose(x, expected, atol=1e-6)
    if alpha == 0.0:
        assert method.weights((), observe([10, 30], names=("a", "b")))[0][1] == 0.0


def test_transfer_groups_and_schedule():
    method = TransferObjective(
        ["*"], ["nli_*"], alpha=4.0, first_alpha=1.0, schedule="linear", steps=6
    )
    method.check(NAMES)
    tokens = [1, 10, 30, 3]
    for step, alpha in ((0, 1.0), (2, 2.0), (6, 4.0), (600, 4.0)):
        weights_N, _, logs = method.weights((), observe(tokens, step=step))
        expected = [0.25, 0.25 * alpha, 0.75 * alpha, 0.75]
        np.testing.assert_allclose(weights_N, expected, rtol=1e-6)
        assert logs["alpha"] == pytest.approx(alpha)
    # Without a task of the source in the batch, the target's part is what it is.
    weights_N, _, _ = method.weights((), observe([0, 10, 30, 0], step=6))
    np.testing.assert_allclose(weights_N, [0, 1, 3, 0], rtol=1e-6)


def test_random_weights_are_fair_and_repeatable():
    """Means of 4000 draws are 1/3 within 5 standard errors; the same key gives the same weights."""
    keys = jax.random.split(KEY, 4000)
    seen = observe([0, 5, 1, 2])

    def draw(key):
        return RandomWeights().weights((), dataclasses.replace(seen, rng=key))[0]

    weights_SN = np.asarray(jax.vmap(draw)(keys))
    np.testing.assert_allclose(weights_SN.sum(1), 1.0, rtol=1e-6)
    error = weights_SN[:, 1].std() / 4000**0.5
    np.testing.assert_allclose(weights_SN.mean(0), [0, 1 / 3, 1 / 3, 1 / 3], atol=5 * error)
    # Differences of independent logits, one in common: correlation 1/2, deviation sqrt 2.
    logits_S3 = np.log(weights_SN[:, 1:])
    first, second = logits_S3[:, 0] - logits_S3[:, 1], logits_S3[:, 2] - logits_S3[:, 1]
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.5, abs=0.06)
    assert first.std() == pytest.approx(2**0.5, rel=0.05)
    np.testing.assert_array_equal(draw(keys[3]), draw(keys[3]))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticWeights({"qa": -1.0}), r"StaticWeights\.factors\['qa'\] must be at least 0"),
        (lambda: StaticWeights({"qa": float("nan")}), r"StaticWeights\.factors"),
        (lambda: UncertaintyWeights(lr=0.0), r"UncertaintyWeights\.lr must be positive"),
        (lambda: UncertaintyWeights(s_min=1.0), r"s_min, s_init and s_max must be .* in order"),
        (lambda: UncertaintyWeights(beta2=1.0), r"UncertaintyWeights\.beta2 must be in"),
        (lambda: DWA(temperature=0.0), r"DWA\.temperature must be positive"),
        (lambda: DWA(window_steps=0), r"DWA\.window_steps must be at least 1, got 0"),
        (lambda: DifficultyWeights(metric="bleu"), r"metric must be accuracy or likelihood"),
        (lambda: DifficultyWeights(decay=1.0), r"DifficultyWeights\.decay must be in \[0, 1\)"),
        (lambda: DifficultyWeights(k_min=0.0), r"DifficultyWeights\.k_min must be in"),
        (lambda: FAMO(lr=-1.0), r"FAMO\.lr must be at least 0"),
        (lambda: FAMO(lower_bound=float("inf")), r"FAMO\.lower_bound must be finite"),
        (lambda: GroupDRO(eta=0.0), r"GroupDRO\.eta must be positive"),
        (lambda: DoReMi(smoothing=1.0), r"DoReMi\.smoothing must be in \[0, 1\)"),
        (lambda: TransferObjective("a", ["b"]), r"TransferObjective\.source must be a list"),
        (lambda: TransferObjective(alpha=-1.0), r"TransferObjective\.alpha must be at least 0"),
        (lambda: TransferObjective(schedule="cosine"), r"schedule must be 'constant' or 'linear'"),
        (lambda: TransferObjective(schedule="linear"), r"steps must be at least 1 with schedule"),
        (lambda: TransferObjective(steps=5), r"first_alpha and steps need .* 'linear'"),
    ],
)
def test_wrong_values_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (StaticWeights({"nli_c": 1.0}), r"StaticWeights\.factors: 'nli_c' .* mean 'nli_"),
        (StaticWeights({"*": 0.0}), r"StaticWeights\.factors: every task has weight 0"),
        (FAMO(lower_bound={"zzz": 1.0}), r"FAMO\.lower_bound: 'zzz' is none of the tasks"),
        (DoReMi(), r"DoReMi\.reference is empty"),
        (TransferObjective(["*"], ["nil_a"]), r"TransferObjective\.target: 'nil_a'.*'nli_a'"),
        (TransferObjective(["*"], ["*"]), r"both have '\*'"),
        (TransferObjective(["qa"], ["sum"]), r"nli_a, nli_b in neither source nor target"),
        (TransferObjective(["*"], []), r"TransferObjective\.target has no task"),
        (TransferObjective(["qa*"], ["*"]), r"TransferObjective\.source has no task"),
    ],
)
def test_options_that_do_not_fit_the_tasks(method, message):
    with pytest.raises(UserError, match=message):
        method.check(NAMES)


@each_method
def test_what_fits_is_not_refused(method):
    method.check(NAMES)
    assert isinstance(hash(method), int)  # static under jit
    assert (REFERENCE in method.needs) == isinstance(method, DoReMi)

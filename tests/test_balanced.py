"""The train step under methods: gradients of single tasks, and what weights do with them."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balanced_steps import (
    ADAMW,
    CFG,
    KEY,
    NAMES,
    PARAMS,
    SETTINGS,
    balancer,
    batch,
    initial,
    stepper,
)

from mtl_jax import loss, model, objective, patterns, step
from mtl_jax.balance import groups, task_gradients
from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import make_balancer
from mtl_jax.balance.famo import FAMO
from mtl_jax.balance.method import GRAM, METHODS, Method
from mtl_jax.balance.weighting import StaticWeights, TransferObjective
from mtl_jax.balanced import Problem
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError


def gradients_of(chosen, rows, settings=SETTINGS, state=None):
    """(gradients, sums, state, told) of the first step."""

    def compute(params, rows):
        problem = Problem(CFG, settings, chosen, {}, None)
        rows = problem.prepared(rows)
        seen = problem.observations(rows, jnp.int32(0), KEY)
        return problem.gradients(params, rows, state or chosen.init(), seen)

    return jax.jit(compute)(PARAMS, rows)


@functools.cache
def gradient_of_task(task, mixed):
    """By plain differentiation of the task's mean loss, as float64 numpy by path."""
    rows = batch(mixed=mixed)
    mine = (rows["decoder_task_ids"] == task).astype(np.float32)
    rows["decoder_loss_weights"] = rows["decoder_loss_weights"] * mine
    plain = objective.StepConfig(z_loss=1e-3)
    grads = jax.jit(functools.partial(objective.gradients, CFG, plain, 3))(PARAMS, rows, None)[0]
    return {p: np.asarray(g, np.float64) for p, g in patterns.by_path(grads).items()}


def expected_gram(mixed, inside=lambda path: True, cut=lambda path, grad: grad):
    rows = [gradient_of_task(task, mixed) for task in (1, 2, 3)]
    flat = np.stack(
        [np.concatenate([cut(p, g).ravel() for p, g in row.items() if inside(p)]) for row in rows]
    )
    return flat @ flat.T


def relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("how", "mixed"),
    [("microbatch", False), ("vmap", False), pytest.param("vmap", True, marks=pytest.mark.slow)],
)
def test_gradients_of_single_tasks_are_those_of_their_mean_losses(how, mixed):
    """Gramian and update against gradients of each task alone; float32 sums in another order."""
    chosen = balancer("MGDA", task_gradients=how)
    settings = SETTINGS if not mixed else objective.StepConfig(z_loss=1e-3, microbatches=2)
    grads, _, _, told = gradients_of(chosen, batch(mixed=mixed), settings)
    assert relative(told["gram"][0], expected_gram(mixed)) < 1e-5
    weights = np.asarray(told["balance_weight"][0], np.float64)
    for path, grad in patterns.by_path(grads).items():
        parts = [gradient_of_task(task, mixed)[path] for task in (1, 2, 3)]
        expected = np.einsum("n,n...->...", weights, np.stack(parts))
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5, err_msg=path)
    assert not told.get("mixed_microbatches", False)


@pytest.mark.slow
def test_groups_split_the_gramian():
    layered = gradients_of(balancer("MGDA", groups="layer"), batch())[3]["gram"]
    assert layered.shape == (4, 3, 3)  # one encoder layer, two decoder layers, the rest

    def of_layer(stack, number):
        return expected_gram(
            False, lambda p: p.startswith(f"{stack}/layers/"), lambda p, g: g[number]
        )

    for group, (stack, number) in enumerate([("encoder", 0), ("decoder", 0), ("decoder", 1)]):
        assert relative(layered[group], of_layer(stack, number)) < 1e-5
    rest = expected_gram(False, lambda p: "/layers/" not in p)
    assert relative(layered[3], rest) < 1e-5
    halves = gradients_of(balancer("MGDA", groups="enc_dec"), batch())[3]["gram"]
    for group, stack in enumerate(("encoder/", "decoder/", "token_embedder/")):
        part = expected_gram(False, lambda p, stack=stack: p.startswith(stack))
        assert relative(halves[group], part) < 1e-5
    last = gradients_of(balancer("GradNorm", groups="last_shared"), batch())[3]["gram"]
    assert relative(last[0], of_layer("decoder", 1)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PCGrad", "CAGrad"])
def test_each_group_has_weights_of_its_own(name):
    """By layer, the update is the whole model's method on each layer's Gramian alone."""
    chosen = balancer(name, groups="layer")
    grads, _, _, told = gradients_of(chosen, batch())
    weights = np.asarray(told["balance_weight"], np.float64)
    assert np.ptp(weights, axis=0).max() > 1e-3  # or the test would show nothing
    for path, grad in patterns.by_path(grads).items():
        parts = np.stack([gradient_of_task(task, False)[path] for task in (1, 2, 3)])
        where = chosen.grouping.place(path)
        if isinstance(where, int):
            expected = np.einsum("n,n...->...", weights[where], parts)
        else:
            expected = np.einsum("ln,nl...->l...", weights[list(where)], parts)
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_sketches_estimate_the_gramian_and_the_second_pass_is_exact():
    size = 4096
    chosen = balancer("MGDA", task_gradients="sketch", sketch_size=size)
    grads, sums, _, told = gradients_of(chosen, batch())
    exact = expected_gram(False)
    norms = np.sqrt(np.diag(exact))
    # The error of a CountSketch has a standard deviation of at most sqrt(2 / size) of the norms.
    assert (np.abs(told["gram"][0] - exact) <= 4 * np.sqrt(2 / size) * np.outer(norms, norms)).all()
    assert relative(told["gram"][0], exact) > 1e-5  # an estimate, not the Gramian itself
    weights = np.asarray(told["balance_weight"][0], np.float64)
    for path, grad in patterns.by_path(grads).items():
        parts = np.stack([gradient_of_task(task, False)[path] for task in (1, 2, 3)])
        expected = np.einsum("n,n...->...", weights, parts)
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5, err_msg=path)
    exactly = gradients_of(balancer("MGDA"), batch())[1]
    np.testing.assert_allclose(sums["task_loss_sum"], exactly["task_loss_sum"], rtol=1e-6)


def test_sketches_are_unbiased():
    """The mean over 200 seeds is within four standard errors."""
    x, y = np.random.RandomState(0).randn(2, 7, 30).astype(np.float32)
    grouping = groups.make_grouping("whole_model", CFG)
    sketch = lambda v, seed: task_gradients._sketch(grouping, 16, {"a": v}, seed)[0]  # noqa: E731
    products = jax.vmap(lambda seed: sketch(x, seed) @ sketch(y, seed))(
        jnp.arange(200, dtype=jnp.uint32)
    )
    error = np.abs(np.mean(products) - np.vdot(x, y))
    assert error < 4 * np.std(products) / np.sqrt(200)


def test_split_half_cosine_of_equal_and_of_opposite_parts():
    """Two equal microbatches of a task agree wholly; a task with one has no noise floor."""
    rows = batch(tasks=(1, 2, 1, 3))
    for name, x in rows.items():
        x[2::4] = x[0::4]  # the third microbatch repeats the first
        rows[name] = x
    told = gradients_of(balancer("MGDA"), rows)[3]
    np.testing.assert_allclose(told["split_half_cosine"][0, 0], 1.0, rtol=1e-5)
    assert np.isnan(told["split_half_cosine"][0, 1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_static_weights_of_one_are_plain_training_bit_for_bit(parts):
    settings = objective.StepConfig(microbatches=parts, z_loss=1e-3)
    rows = batch(mixed=True)
    chosen = balancer("StaticWeights")
    expected, state = initial(balancer()), initial(chosen)
    # As users compile: without optimisation (conftest.py) sums are joined in other orders.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        options["xla_cpu_use_fusion_emitters"] = True
    plain, weighted = (
        jax.jit(update).lower(start, rows, KEY).compile(compiler_options=options)
        for update, start in (
            (functools.partial(step.train_step, CFG, settings, ADAMW, 3), expected),
            (stepper(chosen, settings), state),
        )
    )
    for _ in range(2):
        expected, metrics = plain(expected, rows, KEY)
        state, found = weighted(state, rows, KEY)
        assert float(found["loss"]) == float(metrics["loss"])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_static_weights_weigh_tokens():
    """Factor 2 for a task is as if its tokens counted twice: against a batch so weighted."""
    chosen = balancer(METHODS["StaticWeights"](factors={"b": 2.0}))
    rows = batch(mixed=True)
    grads = gradients_of(chosen, rows)[0]
    doubled = dict(rows)
    doubled["decoder_loss_weights"] = rows["decoder_loss_weights"] * np.where(
        rows["decoder_task_ids"] == 2, 2.0, 1.0
    ).astype(np.float32)
    compute = jax.jit(functools.partial(objective.gradients, CFG, SETTINGS, 3))
    expected = compute(PARAMS, doubled, None)[0]
    ratio = doubled["decoder_loss_weights"].sum() / rows["decoder_loss_weights"].sum()
    for grad, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(grad, other * ratio, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        *(METHODS[name]() for name in sorted(METHODS)),
        # Fields that are mistakes where there is something to share.
        StaticWeights({"a": 0.0}),
        StaticWeights({"another": 2.0, "none_*": 3.0}),
        FAMO(lower_bound={"another": 1.0}),
        TransferObjective(source=["a"], target=["another"]),
        TransferObjective(source=["a"], target=["a"]),
    ],
    ids=repr,
)
def test_with_one_task_every_method_is_plain_training(method):
    """What a step is traced with is the same, so that nothing can differ by a bit."""
    options = {"follow_rates": True}
    if GRAM in method.needs:
        options |= {"groups": "layer", "task_gradients": "sketch", "every_n_steps": 3}
    name = type(method).__name__
    alone = make_balancer(BalanceConfig(method=name, **options), method, ("a",), CFG)
    assert alone == balancer(names=("a",))
    assert alone.method is None
    assert alone.init() == ()
    # Two tasks that count as one are nothing to share either.
    cfg = BalanceConfig(method=name, by="family")
    together = make_balancer(cfg, method, ("a", "a"), CFG)
    assert together == make_balancer(BalanceConfig(by="family"), None, ("a", "a"), CFG)


def test_with_two_tasks_the_same_fields_are_mistakes():
    for method in (TransferObjective(), StaticWeights({"*": 0.0}), StaticWeights({"none_*": 1.0})):
        with pytest.raises(UserError, match=type(method).__name__):
            balancer(method, names=("a", "b"))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["token_mean", "example_mean"])
def test_reductions(reduction):
    """The plain objective as a mean over tokens or over examples, by numpy on the token losses."""
    rows = batch(mixed=True)
    rows["decoder_segment_ids"] = rows["decoder_segment_ids"] * np.array([1, 1, 1, 2, 2, 3])
    chosen = balancer(reduction=reduction)

    def losses(params):
        hidden = objective.hidden_states(CFG, params, rows)
        weights = rows["decoder_loss_weights"]
        told = loss._of_tokens(
            *(CFG, model.output_params(CFG, params), hidden.astype(jnp.float32)),
            *(rows["decoder_target_tokens"], weights),
            **{"z_loss": 1e-3, "label_smoothing": 0.0},
        )[1]
        if reduction == "token_mean":
            return jnp.sum(told.loss * weights) / weights.sum()
        means = []
        for row, segments in enumerate(rows["decoder_segment_ids"]):
            for segment in set(segments[segments > 0].tolist()):
                means.append(jnp.mean(told.loss[row, segments == segment]))
        return jnp.mean(jnp.stack(means))

    expected = jax.grad(losses)(PARAMS)
    grads = gradients_of(chosen, rows)[0]
    for (path, grad), other in zip(
        patterns.by_path(grads).items(), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(grad, other, rtol=2e-4, atol=2e-6, err_msg=path)


def test_weights_hold_between_two_solutions(tmp_path):
    """And are part of a checkpoint: what goes on from one does so bit for bit."""
    chosen = balancer("MGDA", every_n_steps=2)
    update = jax.jit(stepper(chosen))
    state, first = update(initial(chosen), batch(), KEY)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, {}, {})
        checkpointer.wait()
        again = checkpointer.restore(1, jax.eval_shape(lambda: initial(chosen)))[0]
    held = np.asarray(first["balance_weight"][0])
    assert np.ptp(held) > 1e-2  # not what a fresh state has
    # Task 1 is absent now: its weight is kept for when it is back.
    later = (batch(tasks=(2, 2, 3, 3), seed=1), batch(seed=2))
    told = []
    for rows in later:
        state, metrics = update(state, rows, KEY)
        again, other = update(again, rows, KEY)
        jax.tree.map(np.testing.assert_array_equal, (again, other), (state, metrics))
        told.append(metrics)
    second, third = told
    assert bool(first["gradients_seen"])
    assert not bool(second["gradients_seen"])
    np.testing.assert_array_equal(second["balance_weight"][0], held * [0.0, 1.0, 1.0])
    assert bool(third["gradients_seen"])
    assert np.abs(third["balance_weight"][0] - held).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("groups_kind", ["whole_model", "layer"])
def test_a_step_between_solutions_applies_the_held_weights(groups_kind):
    chosen = balancer("CAGrad", every_n_steps=5, groups=groups_kind)
    first = gradients_of(chosen, batch())
    problem_state = first[2]

    def later(params, rows):
        problem = Problem(CFG, SETTINGS, chosen, {}, None)
        rows = problem.prepared(rows)
        seen = problem.observations(rows, jnp.int32(1), KEY)
        return problem.gradients(params, rows, problem_state, seen)

    again = jax.jit(later)(PARAMS, batch())
    assert not bool(again[3]["gradients_seen"])
    for a, b in zip(jax.tree.leaves(again[0]), jax.tree.leaves(first[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_looking_at_gradients_does_not_change_a_loss_side_method():
    looking, not_looking = balancer("TaskMean", monitor_every=1), balancer("TaskMean")
    grads, _, _, told = gradients_of(looking, batch())
    assert relative(told["gram"][0], expected_gram(False)) < 1e-5
    expected = gradients_of(not_looking, batch())
    assert "gram" not in expected[3]
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rescale", ["sum_to_one", "mean_norm"])
def test_rescaling(rescale):
    grads, _, _, told = gradients_of(balancer("PCGrad", rescale=rescale), batch())
    if rescale == "sum_to_one":
        np.testing.assert_allclose(np.sum(told["balance_weight"]), 1.0, rtol=1e-6)
        return
    plain = gradients_of(balancer(), batch())[0]
    norms = [np.sqrt(sum(np.vdot(x, x) for x in jax.tree.leaves(g))) for g in (grads, plain)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


@pytest.mark.slow
def test_tasks_of_one_dataset_are_one():
    """Tasks 1 and 3 count as one: the same as if the batch said so."""
    owned = make_balancer(
        BalanceConfig(method="PCGrad", by="dataset"), None, ("x", "y", "x"), CFG, None
    )
    assert owned.names == ("x", "y")
    grads, sums, _, told = gradients_of(owned, batch())
    renamed = batch()
    renamed["decoder_task_ids"] = np.where(
        renamed["decoder_task_ids"] == 3, 1, renamed["decoder_task_ids"]
    )
    single = make_balancer(BalanceConfig(method="PCGrad"), None, ("x", "y"), CFG, None)
    expected, _, _, other = gradients_of(single, renamed)
    np.testing.assert_array_equal(told["gram"], other["gram"])
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sums["task_tokens"].shape == (4,)  # what is logged is of each task still


def test_a_microbatch_of_two_tasks_is_told():
    told = gradients_of(balancer("MGDA"), batch(mixed=True))[3]
    assert bool(told["mixed_microbatches"])


class _Recorder(Method):
    """Keeps the losses that it is given, before and after."""

    needs = frozenset({"losses", "losses_after"})

    def init(self, num_tasks, num_groups):
        return jnp.zeros((2, num_tasks))

    def weights(self, state, seen):
        return seen.losses / jnp.maximum(jnp.sum(seen.losses), 1.0), state, {"seen": seen.losses}

    def observe(self, state, seen, losses_after):
        return jnp.stack([seen.losses, losses_after])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4], ids=["one pass", "a forward pass more"])
def test_losses_are_known_before_the_weights_and_after_the_update(parts):
    chosen = make_balancer(BalanceConfig(), _Recorder(), NAMES, CFG)
    settings = objective.StepConfig(microbatches=parts, z_loss=1e-3)
    rows = batch(mixed=True)
    state, metrics = jax.jit(stepper(chosen, settings))(initial(chosen), rows, KEY)

    def losses(params):
        plain = objective.StepConfig(z_loss=1e-3)
        sums = jax.jit(functools.partial(objective.loss_sum, CFG, plain, 3))(params, rows)[1]
        return sums["task_loss_sum"][1:] / sums["task_tokens"][1:]

    before, after = losses(PARAMS), losses(state.params)
    np.testing.assert_allclose(metrics["balance/seen"], before, rtol=1e-5)
    np.testing.assert_allclose(state.balance.method, np.stack([before, after]), rtol=1e-5)
    np.testing.assert_allclose(metrics["balance_weight"][0], before / np.sum(before), rtol=1e-5)


def test_an_absent_task_is_as_if_there_were_none():
    """In weights and in the update. Every method, over steps: test_balanced_absent.py."""
    rows = batch(tasks=(1, 2, 1, 2))
    found, expected = (
        gradients_of(balancer("DWA", names=names), rows) for names in (NAMES, NAMES[:2])
    )
    np.testing.assert_allclose(
        found[3]["balance_weight"][:, :2], expected[3]["balance_weight"], rtol=1e-5
    )
    np.testing.assert_array_equal(found[3]["balance_weight"][:, 2], 0.0)
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

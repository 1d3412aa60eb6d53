"""Schedules and AdamW against closed forms, Adafactor also against optax on single layers."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import optim, patterns
from mtl_jax.errors import UserError
from mtl_jax.objective import StepConfig
from mtl_jax.optim import OptimizerConfig
from mtl_jax.step import TrainState, train_step

T5X = {"schedule": "constant * rsqrt_decay", "warmup_steps": 10_000}
WARM = {
    "schedule": "constant * linear_warmup * rsqrt_decay",
    "learning_rate": 0.5,
    "warmup_steps": 1000,
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # From T5X.
        (T5X, {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}),
        (WARM, {1: 1.581e-5, 500: 0.00790569, 1000: 0.01581139, 4000: 0.00790569}),
        # Closed forms.
        ({"schedule": "constant", "learning_rate": 0.3}, {0: 0.3, 10**7: 0.3}),
        (
            {"schedule": "linear_warmup", "warmup_steps": 4},
            {0: 1e-8, 1: 0.25, 3: 0.75, 4: 1, 9: 1},
        ),
        (
            {"schedule": "linear_decay", "learning_rate": 2.0, "warmup_steps": 10}
            | {"decay_factor": 0.05},
            {0: 1e-8, 5: 1.0, 10: 2.0, 20: 1.0, 30: 1e-8, 99: 1e-8},
        ),
        (
            {"schedule": "rsqrt_normalized_decay", "warmup_steps": 16},
            {0: 1, 16: 1, 64: 0.5, 1600: 0.1},
        ),
        (
            {"schedule": "decay_every", "decay_factor": 0.5, "steps_per_decay": 10},
            {0: 1, 9: 1, 10: 0.5, 19: 0.5, 20: 0.25},
        ),
        (
            {"schedule": "cosine_decay", "warmup_steps": 10, "steps_per_cycle": 100},
            {0: 1, 10: 1, 35: 0.5 + 0.25 * 2**0.5, 60: 0.5, 109: 0.5 - 0.5 * np.cos(np.pi / 100)}
            | {110: 1},
        ),
        (
            {"schedule": "linear_warmup", "warmup_steps": 4, "step_offset": 100},
            {50: 1e-8, 100: 1e-8, 102: 0.5},
        ),
        (
            {"schedule": "linear_warmup", "warmup_steps": 4, "min_learning_rate": 0.3},
            {0: 0.3, 1: 0.3, 2: 0.5},
        ),
    ],
)
def test_schedules(values, expected):
    cfg = OptimizerConfig(**values)
    for step, rate in expected.items():
        found = optim.learning_rate(cfg, step)
        assert found.dtype == jnp.float32
        # The first two digits of 0.5 - 0.5 cos cancel in float32.
        np.testing.assert_allclose(found, rate, rtol=1e-4, atol=1e-7, err_msg=str(step))


def params_and_gradients(count=3):
    """A tree like a model's: a stack of two layers, an embedding, a norm and a bias table."""
    random = np.random.RandomState(0)
    shapes = {
        "encoder": {
            "layers": {
                "mlp": {"wo": {"kernel": (2, 12, 9)}, "wi": {"kernel": (2, 16, 24)}},
                "attention": {"out": {"kernel": (2, 16, 16)}},
                "norm": {"scale": (2, 9)},
                "small": {"kernel": (2, 3, 4)},
            },
            "relpos_bias": {"rel_embedding": (9, 10)},
        },
        "token_embedder": {"embedding": (20, 9)},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731

    def draw():
        return jax.tree.map(
            lambda s: jnp.asarray(random.randn(*s), jnp.float32), shapes, is_leaf=is_shape
        )

    return draw(), [draw() for _ in range(count)]


def run(optimizer, params, gradients):
    """Parameters after each of the updates."""

    @jax.jit
    def update(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, history = optimizer.init(params), []
    for gradient in gradients:
        params, state = update(gradient, state, params)
        history.append(params)
    return history


def test_adamw_in_numpy():
    values = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1}
    cfg = OptimizerConfig(name="adamw", schedule="constant", learning_rate=0.02, **values)
    start, gradients = params_and_gradients()
    found = run(optim.make_optimizer(cfg), start, gradients)[-1]
    for (path, leaf), p, *gs in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(start),
        *map(jax.tree.leaves, gradients),
        strict=True,
    ):
        decay = 0.1 if path[-1].key in ("kernel", "embedding") else 0.0
        p, m, v = np.asarray(p, np.float64), 0.0, 0.0
        for t, g in enumerate(gs, start=1):
            m, v = 0.9 * m + 0.1 * np.asarray(g), 0.95 * v + 0.05 * np.asarray(g) ** 2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
            p = p - 0.02 * (step + decay * p)
        np.testing.assert_allclose(leaf, p, rtol=1e-5, atol=1e-6, err_msg=str(path))


VARIANTS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay rate": {"decay_rate": 0.5},
    "absolute step": {"multiply_by_parameter_scale": False},
    "weight decay": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adafactor_on_stacked_layers_is_that_of_optax_on_each(variant):
    """Gradients grow threefold from step to step, so that updates are clipped."""
    options = {"min_dim_size_to_factor": 8} | VARIANTS[variant]
    cfg = OptimizerConfig(schedule="constant", learning_rate=0.05, **options)
    start, gradients = params_and_gradients()
    gradients = [jax.tree.map(lambda g: g * 3.0**n, tree) for n, tree in enumerate(gradients)]  # noqa: B023
    found = run(optim.make_optimizer(cfg), start, gradients)[-1]
    if "weight_decay" in options:
        options |= {"weight_decay_rate": options.pop("weight_decay")}
    single = optax.adafactor(0.05, weight_decay_mask=optim._decayed, **options)

    def layer(tree, number):
        return jax.tree.map(lambda leaf: leaf[number], tree["encoder"]["layers"])

    def rest(tree):
        return {"r": tree["encoder"]["relpos_bias"], "e": tree["token_embedder"]}

    for part in (rest, *(functools.partial(layer, number=number) for number in range(2))):
        alone = run(single, part(start), [part(gradient) for gradient in gradients])[-1]
        for (path, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(part(found)), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_adafactor_factors_the_big_matrices_of_each_layer():
    cfg = OptimizerConfig(schedule="constant", min_dim_size_to_factor=8)
    start, _ = params_and_gradients()
    state = jax.eval_shape(optim.make_optimizer(cfg).init, start)
    shapes = {
        "/".join(str(getattr(e, "key", getattr(e, "name", ""))) for e in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }

    def of(moment, name):
        (shape,) = [s for p, s in shapes.items() if f"/{moment}/" in p and p.endswith(name)]
        return shape

    assert {of("v_row", "wo/kernel"), of("v_col", "wo/kernel")} == {(2, 12), (2, 9)}
    assert of("v", "small/kernel") == (2, 3, 4)
    assert of("v", "norm/scale") == (2, 9)
    assert {of("v_row", "/embedding"), of("v_col", "/embedding")} == {(20,), (9,)}


def test_first_step_of_adafactor_in_closed_form():
    """Decay 1 - 1^-0.8 = 0: the moment is the square itself, the step the sign of the gradient.

    Its root mean square is 1, so nothing is clipped, and it is scaled by that of the parameter.
    """
    cfg = OptimizerConfig(schedule="constant", learning_rate=0.01)
    start = {"token_embedder": {"embedding": jnp.asarray([[3.0, -4.0], [0.5, 1.0]])}}
    gradient = jax.tree.map(lambda p: jnp.asarray([[2.0, -1.0], [0.1, 5.0]]), start)
    (after,) = run(optim.make_optimizer(cfg), start, [gradient])
    scale = np.sqrt(np.mean(np.array([3.0, -4.0, 0.5, 1.0]) ** 2))
    expected = np.array([[3.0, -4.0], [0.5, 1.0]]) - 0.01 * scale * np.array([[1, -1], [1, 1]])
    np.testing.assert_allclose(after["token_embedder"]["embedding"], expected, rtol=1e-5)


def test_clipping_scales_the_whole_gradient():
    values = {"name": "adamw", "schedule": "constant", "learning_rate": 1.0, "epsilon": 1e6}
    # With a huge epsilon AdamW's first step is the gradient times 1e-6.
    start, gradients = params_and_gradients(1)
    norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(gradients)))
    moved = {}
    for clip in (0.0, norm / 4, norm * 4):
        optimizer = optim.make_optimizer(OptimizerConfig(clip_norm=clip, **values))
        updates, _ = optimizer.update(gradients[0], optimizer.init(start), start)
        moved[clip] = updates["token_embedder"]["embedding"]
    gradient = gradients[0]["token_embedder"]["embedding"]
    np.testing.assert_allclose(moved[0.0], -1e-6 * gradient, rtol=1e-4)
    np.testing.assert_allclose(moved[norm * 4], moved[0.0], rtol=1e-6)
    np.testing.assert_allclose(moved[norm / 4], moved[0.0] / 4, rtol=1e-4)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_weight_decay_acts_on_matrices_only(name):
    start, _ = params_and_gradients(1)
    zero = [jax.tree.map(jnp.zeros_like, start)]
    cfg = OptimizerConfig(name=name, schedule="constant", learning_rate=0.5, weight_decay=0.1)
    (after,) = run(optim.make_optimizer(cfg), start, zero)
    for (path, leaf), before in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(start), strict=True
    ):
        if path[-1].key in ("kernel", "embedding"):
            assert np.all(np.abs(leaf) < np.abs(before)), path
            ratio = np.asarray(leaf / before)
            np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)
        else:
            np.testing.assert_array_equal(leaf, before, err_msg=str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"schedule": "constant * linear_warmpu"},
            "Optimizer.schedule: unknown factor 'linear_warmpu'. Did you mean 'linear_warmup'",
        ),
        ({"schedule": ""}, "Optimizer.schedule: unknown factor ''"),
        ({"name": "adamv"}, "Optimizer.name: unknown optimizer 'adamv'. Did you mean 'adamw'"),
        ({"warmup_steps": 0}, "Optimizer.warmup_steps must be at least 1"),
        ({"clip_norm": -1.0}, "Optimizer.clip_norm must not be negative"),
        (
            {"freeze": ["encoder/(.*"]},
            r"Optimizer.freeze: 'encoder/\(.\*' is no regular expression",
        ),
        ({"freeze": "encoder/.*"}, "Optimizer.freeze must be a list of patterns"),
        (
            {"learning_rate_scale": [("encoder/.*", 0.0)]},
            "the factor of 'encoder/.*' must be positive and finite, got 0.0. .*Optimizer.freeze",
        ),
        (
            {"learning_rate_scale": [("a", float("nan"))]},
            "'a' must be positive and finite, got nan",
        ),
    ],
)
def test_wrong_values_name_the_field(values, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**values)


# ---------------------------------------------------------------------------------------------
# Groups: freeze, learning_rate_scale
# ---------------------------------------------------------------------------------------------

RULES = {
    "adamw": {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.1},
    "adafactor": {"learning_rate": 0.05, "weight_decay": 0.1, "min_dim_size_to_factor": 8},
    "adafactor with momentum": {
        **{"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        "min_dim_size_to_factor": 8,
    },
}


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def configured(name, **changes):
    return OptimizerConfig(schedule="constant", **RULES[name] | changes)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_scaled_group_moves_as_with_an_optimizer_of_its_own(name, factor):
    start, gradients = params_and_gradients()
    groups = [("encoder/relpos_bias/.*", 1.0), ("encoder/.*", factor)]
    found = run(
        optim.make_optimizer(configured(name, learning_rate_scale=groups)), start, gradients
    )
    rate = RULES[name]["learning_rate"]
    pair = optax.partition(
        {
            True: optim.make_optimizer(configured(name, learning_rate=rate * factor)),
            False: optim.make_optimizer(configured(name)),
        },
        jax.tree_util.tree_map_with_path(lambda path, _: path[1].key == "layers", start),
    )
    plain = by_name(run(optim.make_optimizer(configured(name)), start, gradients)[-1])
    expected = by_name(run(pair, start, gradients)[-1])
    for path, leaf in by_name(found[-1]).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7, err_msg=path)
        moved = float(jnp.max(jnp.abs(leaf - plain[path])))
        assert moved > 1e-3 if path.startswith("encoder/layers") else moved == 0.0, path


@pytest.mark.parametrize("name", RULES)
def test_scaling_leaves_the_structure_of_the_state(name):
    """So that a run may be continued with other factors, or with none."""
    start, _ = params_and_gradients()
    plain = jax.eval_shape(optim.make_optimizer(configured(name)).init, start)
    scaled = configured(name, learning_rate_scale=[("encoder/.*", 0.5)])
    assert jax.eval_shape(optim.make_optimizer(scaled).init, start) == plain


@pytest.mark.parametrize("name", RULES)
def test_frozen_parameters_have_no_state_and_are_no_part_of_the_norm(name):
    """What is trained moves as if the frozen parameters did not exist."""
    start, gradients = params_and_gradients()
    cfg = configured(name, freeze=["encoder/.*"], clip_norm=0.5)
    optimizer = optim.make_optimizer(cfg)
    assert not [path for path in by_name(jax.eval_shape(optimizer.init, start)) if "enc" in path]
    split = [optim.split(cfg, tree) for tree in (start, *gradients)]
    trained, *trained_gradients = (trained for trained, _ in split)
    assert list(trained) == ["token_embedder"]
    assert by_name(optim.merge(*split[0])).keys() == by_name(start).keys()

    whole = optimizer.init(start)
    updates, _ = optimizer.update(trained_gradients[0], whole, trained)
    alone = optim.make_optimizer(dataclasses.replace(cfg, freeze=()))
    expected, _ = alone.update(trained_gradients[0], alone.init(trained), trained)
    np.testing.assert_array_equal(
        updates["token_embedder"]["embedding"], expected["token_embedder"]["embedding"]
    )


def trained(cfg):
    """Parameters before and after two train steps of three microbatches, metrics of the first."""
    model, start = golden.config("1.1"), golden.params(golden.config("1.1"))
    state = TrainState(jnp.int32(0), start, optim.make_optimizer(cfg).init(start))
    update = jax.jit(functools.partial(train_step, model, StepConfig(microbatches=3), cfg, 1))
    state, metrics = update(state, golden.batch(), jax.random.key(0))
    state, _ = update(state, golden.batch(), jax.random.key(0))
    return by_name(start), by_name(state.params), metrics


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "adafactor" else pytest.mark.slow) for name in RULES],
)
def test_frozen_parameters_stay_bit_by_bit(name):
    cfg = configured(name, freeze=["token_embedder/.*", "encoder/layers/.*", "decoder/.*_norm/.*"])
    before, after, metrics = trained(cfg)
    for path in before:
        kept = np.array_equal(before[path].view(np.uint32), np.asarray(after[path]).view(np.uint32))
        assert kept == any(patterns.matches(p, path) for p in cfg.freeze), path
    _, _, whole = trained(configured(name))
    assert 0 < float(metrics["grad_norm"]) < float(whole["grad_norm"])
    assert metrics["loss"] == whole["loss"]


def test_gradients_of_frozen_parameters_are_not_computed():
    """Each kernel of the encoder saves a product of as many FLOPs as it takes forward."""
    model = golden.config("1.1", scan_layers=False)  # a loop's body would be counted once

    def flops(**changes):
        cfg = configured("adafactor", **changes)
        params = jax.eval_shape(lambda: golden.params(model))
        state = jax.eval_shape(
            lambda p: TrainState(jnp.int32(0), p, optim.make_optimizer(cfg).init(p)), params
        )
        update = jax.jit(functools.partial(train_step, model, StepConfig(), cfg, 1))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return update.lower(state, golden.batch(), key).compile().cost_analysis()["flops"]

    kernels = [
        x for path, x in by_name(golden.params(model)["encoder"]).items() if "kernel" in path
    ]
    products = 2 * golden.ENCODER.size * sum(x.size for x in kernels)
    assert flops() - flops(freeze=["encoder/.*"]) >= products


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze": ["encoder"]}, "Optimizer.freeze: 'encoder' matches no parameter.*'encoder/.*'"),
        (
            {"freeze": ["encoder/layers/norm/scal"]},
            "freeze: .*/scal' matches no .* Did you mean 'encoder/layers/norm/scale'",
        ),
        ({"freeze": ["nothing"]}, "freeze: 'nothing' matches no .*Paths look like '"),
        ({"freeze": ["token.*", "encoder.*"]}, "Optimizer.freeze = .* freezes all parameters"),
        (
            {"learning_rate_scale": [("decoder/.*", 0.1)]},
            "Optimizer.learning_rate_scale: 'decoder/.*' matches no parameter",
        ),
        (
            {"learning_rate_scale": [(".*", 0.1), ("encoder/.*", 0.2)]},
            "scale: 'encoder/.*' changes nothing, for earlier patterns .*'.*'.*: the first match",
        ),
        (
            {"learning_rate_scale": [("encoder/.*", 0.1)], "freeze": ["encoder/.*"]},
            "learning_rate_scale: all that 'encoder/.*' matches is frozen",
        ),
    ],
)
def test_patterns_that_do_nothing_are_refused(values, message):
    start, _ = params_and_gradients(0)
    with pytest.raises(UserError, match=message):
        optim.check_groups(OptimizerConfig(**values), start)


def test_patterns_that_do_something_are_accepted():
    start, _ = params_and_gradients(0)
    optim.check_groups(OptimizerConfig(), start)
    groups = [("encoder/layers/mlp/.*", 0.1), (".*kernel", 0.5)]
    optim.check_groups(OptimizerConfig(freeze=["token.*"], learning_rate_scale=groups), start)

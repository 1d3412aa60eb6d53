"""The train step under methods on eight devices, and continued from a checkpoint."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from balanced_steps import (
    AXES,
    CFG,
    EVERY_METHOD,
    FROZEN,
    KEY,
    OF_GRADIENTS,
    SETTINGS,
    balancer,
    batch,
    initial,
    of_one,
    opposed,
    stepper,
    working,
)

from mtl_jax import config, model, objective, optim, patterns, sharding
from mtl_jax.balance.method import GRAM, METHODS
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.sharding import MeshConfig

# With an epsilon beyond all gradients AdamW's step is as good as linear in them.
LINEAR = optim.OptimizerConfig(
    name="adamw", schedule="constant", learning_rate=30.0, epsilon=1e3, beta1=0.0
)


def run(chosen, layout, steps=2, axes=AXES):
    """Weights, affinity, losses and final parameters of some steps in a layout."""
    mesh = sharding.make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    state = initial(chosen)
    shapes = jax.eval_shape(lambda: initial(chosen))
    places = sharding.state_shardings(mesh, model.param_axes(CFG), shapes)
    reference = FROZEN if chosen.needs("reference") else None
    found = []
    with sharding.on_mesh(mesh):
        everywhere = sharding.replicated(mesh)
        state = jax.device_put(state, places)
        key = jax.device_put(KEY, everywhere)
        reference = jax.device_put(reference, places.params) if reference else None
        update = jax.jit(stepper(chosen), out_shardings=(places, everywhere))
        for number in range(steps):
            arrays = sharding.put_batch(mesh, batch(seed=number, rows=32))
            state, metrics = update(state, arrays, key, reference)
            numbers = [metrics[n].ravel() for n in ("balance_weight", "affinity") if n in metrics]
            found.append(np.concatenate([*numbers, [metrics["loss"]]]))
    return np.array(found), jax.device_get(state)


@functools.cache
def on_one_device(name, values):
    return run(balancer(name, axes=AXES, **dict(values)), (1, 1, 1))


SHARDED, MIXED = (1, 8, 1), (2, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values", "layout"),
    [
        pytest.param("CAGrad", {"affinity_every": 1}, MIXED, id="affinity"),
        *(
            pytest.param(name, values | {"task_gradients": how}, layout, id=f"{how}-{layout}")
            for name, values, how in (
                ("PCGrad", {"groups": "layer"}, "sketch"),
                ("MGDA", {}, "vmap"),
            )
            for layout in (SHARDED, MIXED)
        ),
    ],
)
def test_every_layout_gives_the_numbers_of_one_device(name, values, layout):
    chosen = balancer(name, axes=AXES, **values)
    found, state = run(chosen, layout)
    expected, single = on_one_device(name, tuple(values.items()))
    # Weights are solutions of small problems in float32: their last digits are amplified.
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found[:, -1], expected[:, -1], rtol=1e-5)
    total, other = (
        sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(s.params))
        for s in (state, single)
    )
    np.testing.assert_allclose(total, other, rtol=1e-5)


PRESETS = ("dp", "fsdp", "tp", "fsdp_tp")


@functools.cache
def compiled(methods, preset):
    """On the mesh of a file of gin/mesh: a step of all methods in one, and what it starts from.

    Heads can be split over two devices, so those are all that "tp" has. No preset: one device.
    """
    count = {None: 1, "tp": CFG.num_heads}.get(preset, jax.device_count())
    values = config.load([f"gin/mesh/{preset}.gin"]).mesh if preset else MeshConfig()
    mesh = sharding.make_mesh(values, jax.devices()[:count])
    sharding.validate(mesh, CFG, 32, 4)
    chosen = of_one(methods, axes=AXES)
    # Methods of losses: in one pass, from whose losses their weights are made.
    settings = SETTINGS if methods is OF_GRADIENTS else objective.StepConfig(z_loss=1e-3)
    state = initial(chosen, opposed(), LINEAR)
    places = sharding.state_shardings(mesh, model.param_axes(CFG), jax.eval_shape(lambda: state))
    everywhere = sharding.replicated(mesh)
    given = jax.device_put((KEY, FROZEN), (everywhere, places.params))
    update = jax.jit(stepper(chosen, settings, LINEAR), out_shardings=(places, everywhere))
    return update, mesh, jax.device_put(state, places), given


@functools.cache
def updates(methods, name, preset):
    """What two steps under a method add to each parameter, by path, and its weights."""
    update, mesh, start, (key, reference) = compiled(methods, preset)
    state = dataclasses.replace(start, balance=working(start.balance, methods, name))
    weights = []
    with sharding.on_mesh(mesh):
        for number in range(2):
            rows = sharding.put_batch(mesh, batch(seed=number, rows=32, targets=(1, 2, 3, 2)))
            state, told = update(state, rows, key, reference)
            weights.append(np.asarray(told["balance_weight"]))
    found = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, start.params)
    return patterns.by_path(found), np.concatenate(weights)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("methods", "name"), EVERY_METHOD)
def test_every_update_is_that_of_one_device(methods, name, preset):
    """Parameter by parameter, under every preset.

    2e-4 of an update: it is the difference of parameters that are a hundred times larger.
    """
    found, weights = updates(methods, name, preset)
    expected, expected_weights = updates(methods, name, None)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-6)
    for path, update in found.items():
        difference = np.linalg.norm(update - expected[path])
        assert np.linalg.norm(expected[path]) > 0, path
        assert difference < 2e-4 * np.linalg.norm(expected[path]), path


def test_slots_lie_as_their_parameters():
    """No device holds a whole gradient of a sharded parameter."""
    chosen = balancer("CAGrad", axes=AXES)
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1), jax.devices())
    with sharding.on_mesh(mesh):
        shapes = jax.eval_shape(lambda: initial(chosen))
        places = sharding.state_shardings(mesh, model.param_axes(CFG), shapes)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
        )
        rows = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh))
            for name, x in batch(rows=32).items()
        }
        text = (
            jax.jit(stepper(chosen), out_shardings=(places, sharding.replicated(mesh)))
            .lower(state, rows, KEY)
            .compile()
            .as_text()
        )
    # The slots of wi_0, three tasks of [2 layers, 16, 32], are split over the embedding.
    assert "f32[3,2,2,32]" in text
    assert "f32[3,2,16,32]" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_resumes_exactly_and_runs_on_eight_devices(name, tmp_path):
    """Four steps at once equal two, a checkpoint and two more, bit by bit, for every method."""
    needs_gram = GRAM in METHODS[name].needs
    chosen = balancer(name, axes=AXES, **({"rescale": "mean_norm"} if needs_gram else {}))
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices())
    reference = FROZEN if chosen.needs("reference") else None
    with sharding.on_mesh(mesh):
        shapes = jax.eval_shape(lambda: initial(chosen))
        places = sharding.state_shardings(mesh, model.param_axes(CFG), shapes)
        everywhere = sharding.replicated(mesh)
        update = jax.jit(stepper(chosen), out_shardings=(places, everywhere))
        key = jax.device_put(KEY, everywhere)
        reference = jax.device_put(reference, places.params) if reference else None

        def advance(state, numbers):
            for number in numbers:
                arrays = sharding.put_batch(mesh, batch(seed=number, rows=32))
                state, metrics = update(state, arrays, key, reference)
                assert np.isfinite(metrics["loss"])
            return state

        half = advance(jax.device_put(initial(chosen), places), range(2))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half
        )
        with Checkpointer(tmp_path / "checkpoints") as checkpointer:
            checkpointer.save(2, half, {}, {})
            checkpointer.wait()
            restored = checkpointer.restore(2, abstract)[0]
        expected, found = (advance(s, range(2, 4)) for s in (half, restored))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)

"""The presets of gin/mesh on eight devices: one device's numbers, and what they communicate."""

import functools
import importlib.metadata
import json
import math
import re
from pathlib import Path

import golden
import jax
import numpy as np
import pytest
import test_evaluate
import test_sharding

from mtl_jax import (
    config,
    model,
    objective,
    patterns,
    placement,
    sharding,
    step,
    targets,
)
from mtl_jax.evaluate import EvalConfig, Evaluator

# Three layers of each, which no other dimension is; every dimension can be split by eight.
CFG = golden.config(
    "1.1", num_heads=8, head_dim=8, num_encoder_layers=3, num_decoder_layers=3, scan_layers=True
)
SETTINGS = objective.StepConfig()
PRESETS = ("dp", "fsdp", "tp", "fsdp_tp")
SHAPES = {"dp": (8, 1, 1), "fsdp": (1, 8, 1), "tp": (1, 1, 8), "fsdp_tp": (1, 4, 2)}
pytestmark = pytest.mark.slow


@functools.cache
def mesh_of(preset):
    """The mesh of the file; None: one device."""
    if preset is None:
        return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    mesh = sharding.make_mesh(config.load([f"gin/mesh/{preset}.gin"]).mesh)
    assert tuple(mesh.shape.values()) == SHAPES[preset]
    sharding.validate(mesh, CFG, 16)
    return mesh


def placed(mesh):
    places = sharding.params_shardings(mesh, model.param_axes(CFG))
    return jax.device_put(golden.params(CFG), places), places


@functools.cache
def gradients(preset):
    """Sums over the batch and the gradient of every parameter, by path."""
    mesh = mesh_of(preset)
    with sharding.on_mesh(mesh):
        params = placed(mesh)[0]
        batch = sharding.put_batch(mesh, next(iter(test_sharding.batches())))
        compute = jax.jit(
            functools.partial(objective.gradients, CFG, SETTINGS, 2), out_shardings=None
        )
        grads, sums = jax.device_get(compute(params, batch, None)[:2])
    return sums, jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_and_gradients_are_those_of_one_device(preset):
    sums, grads = gradients(preset)
    expected_sums, expected = gradients(None)
    np.testing.assert_allclose(
        sums["task_loss_sum"], expected_sums["task_loss_sum"], rtol=1e-5, atol=1e-6
    )
    for (path, grad), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        difference = np.linalg.norm(grad - other) / np.linalg.norm(other)
        assert difference < 1e-5, jax.tree_util.keystr(path)


@functools.cache
def evaluated(preset, folder):
    """The rows of results and of predictions: rank classification and generation."""
    tasks = [
        test_evaluate._ranked_task(count=19),
        test_evaluate._task(
            "generate_a",
            [
                test_evaluate._example(i, [int(t) for t in row if t], [10, 9])
                for i, row in enumerate([*golden.ENCODER, *golden.ENCODER[:, ::-1]])
            ],
            metric_fns=[test_evaluate.metrics.accuracy],
        ),
    ]
    mesh = mesh_of(preset)
    folder.mkdir()
    cfg = EvalConfig(batch_size=8, max_shapes=1, max_decode_length=6)
    results = Evaluator(CFG, placement.on_mesh(mesh), cfg).run(placed(mesh)[0], tasks, 1, folder)
    return results, [test_evaluate._read(folder / "predictions" / f"{t.name}.jsonl") for t in tasks]


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_and_generated_text_are_those_of_one_device(preset, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    results, (ranked, generated) = evaluated(preset, base / preset)
    expected, (expected_ranked, expected_generated) = evaluated(None, base / "one")
    assert results == expected
    assert generated == expected_generated
    assert len({row["prediction"] for row in generated}) > 1
    for row, other in zip(ranked, expected_ranked, strict=True):
        np.testing.assert_allclose(row["scores"], other["scores"], rtol=1e-5)
        assert row | {"scores": 0} == other | {"scores": 0}


@functools.cache
def collectives(preset):
    """Kind -> types of results in the compiled train step; what is in a loop counts once."""
    mesh, optimizer = mesh_of(preset), test_sharding.ADAFACTOR
    make = functools.partial(step.init_state, CFG, test_sharding.optim.make_optimizer(optimizer))
    shapes = jax.eval_shape(make, jax.random.key(0))
    places = sharding.state_shardings(mesh, model.param_axes(CFG), shapes)
    abstract = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    state = jax.tree.map(abstract, shapes, places)
    rows = sharding.batch_sharding(mesh)
    batch = {k: abstract(v, rows) for k, v in next(iter(test_sharding.batches())).items()}
    everywhere = sharding.replicated(mesh)
    rng = abstract(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    update = functools.partial(step.train_step, CFG, SETTINGS, optimizer, 2)
    with sharding.on_mesh(mesh):
        jitted = jax.jit(update, donate_argnums=0, out_shardings=(places, everywhere))
        hlo = jitted.lower(state, batch, rng).compile().as_text()
    return targets._collectives(hlo)


def shapes_of(result):
    """Of the arrays in a result's type, such as (f32[16,32], s32[])."""
    found = re.findall(r"[a-z]+\d+\[([\d,]*)\]", result)
    return [tuple(map(int, dims.split(","))) if dims else () for dims in found]


def elements(results):
    return sum(math.prod(shape) for result in results for shape in shapes_of(result))


def test_parameters_are_never_gathered_whole():
    """Each gather is of one parameter of one layer; they stand in the loop over the layers."""
    paths = patterns.by_path(model.abstract_params(CFG))
    layers = {leaf.shape[1:] for path, leaf in paths.items() if "layers" in path}
    others = {leaf.shape for path, leaf in paths.items() if "layers" not in path}
    for preset in ("fsdp", "fsdp_tp"):
        tensor = SHAPES[preset][2]
        gathered = {
            shape
            for result in collectives(preset)["all-gather"]
            for shape in shapes_of(result)
            if "f32" in result
        }
        assert gathered
        for shape in gathered:
            whole = [shape, (tensor * shape[0], *shape[1:]), (*shape[:-1], tensor * shape[-1])]
            assert (layers | others).intersection(whole), shape
            assert shape[0] != 3


def test_kinds_of_communication():
    """Copies sum gradients; split heads and MLPs sum activations; neither gathers anything."""
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params(CFG)))
    assert set(collectives("dp")) == set(collectives("tp")) == {"all-reduce"}
    # In the loop over three layers the gradients of one stand; embeddings, norms and a few sums.
    assert parameters / 3 < elements(collectives("dp")["all-reduce"]) < parameters / 2
    assert {"all-gather", "all-reduce"} <= set(collectives("fsdp"))


@pytest.mark.parametrize("preset", PRESETS)
def test_collectives_are_the_written_ones(preset):
    """Another version of the compiler may choose others: look at them, and write them anew."""
    version = importlib.metadata.version("jaxlib")
    written = json.loads((Path(__file__).parent / "golden_collectives.json").read_text())
    if version not in written:
        pytest.skip(f"golden_collectives.json has no values of jaxlib {version}")
    found = {kind: [len(rows), elements(rows)] for kind, rows in collectives(preset).items()}
    assert found == written[version][preset]

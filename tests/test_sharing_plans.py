"""What holds of every plan: packed rows, checkpoints and exports give a task the same model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharing_plans as plans
from golden import ENCODER, TARGETS

from mtl_jax import cli, interop, model, objective, optim, patterns, sharding
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.packing import Example, Rows
from mtl_jax.sharing import tree
from mtl_jax.sharing.embeddings import prompt_ids

pytestmark = pytest.mark.slow

EXAMPLES = [(x[x > 0], y[y > 0]) for x, y in zip(ENCODER, TARGETS, strict=True)]
EVERY = (*plans.ROOMS, "owned")
TASK = 2  # "b", of cluster "y"


def rows(plan, pack):
    """The golden examples in three rows of their own, or all in the first, behind the prompt."""
    laid_out = Rows(3, 32, 12, pack=pack)
    for inputs, targets in EXAMPLES:
        inputs = np.append(np.array(prompt_ids(plan), int), inputs)
        assert laid_out.place(Example(TASK, inputs, targets))
    return laid_out.arrays()


@functools.cache
def forward(cfg):
    """(parameters of a plain T5, batch) -> logits_BTV; compiled once for plans of one shape."""
    return jax.jit(functools.partial(objective.forward, cfg))


@functools.cache
def plain(plan, task=TASK):
    return jax.jit(functools.partial(tree.plain, plan))(plans.perturbed(plan), task)


@pytest.mark.parametrize("name", EVERY)
def test_packed_examples_have_the_logits_that_they_have_alone(name):
    """Rounding of float32; a prompt stands in front of each example, not of each row."""
    plan = plans.plan(name)
    apart, packed = rows(plan, pack=False), rows(plan, pack=True)
    assert packed["encoder_segment_ids"].max(1).tolist() == [3, 0, 0]
    compute = forward(plan.model_config)
    alone, together = (np.asarray(compute(plain(plan), batch)) for batch in (apart, packed))
    segments = packed["decoder_segment_ids"][0]
    for number in range(3):
        mine = apart["decoder_segment_ids"][number] > 0
        np.testing.assert_allclose(
            together[0][segments == number + 1], alone[number][mine], rtol=1e-4, atol=1e-5
        )
    # One example's states reach another's where both are of one segment.
    joined = {k: np.minimum(x, 1) if k.endswith("segment_ids") else x for k, x in packed.items()}
    mixed = np.asarray(compute(plain(plan), joined))
    assert np.abs(mixed[0] - together[0])[segments > 0].max() > 0.1


def test_packed_examples_have_the_gradient_that_they_have_alone():
    """Of prompts, task embedding, experts, adapters, LoRA and adversary; and the sums to log."""
    plan = plans.plan("everything")

    @jax.jit
    def gradients(params, batch):
        settings, shared = objective.StepConfig(), objective.Shared(plan, jnp.int32(5))
        return objective.gradients(
            plan.model_config, settings, 3, params, batch, None, shared=shared
        )

    params = plans.perturbed(plan)
    expected, expected_sums = gradients(params, rows(plan, pack=False))
    found, sums = gradients(params, rows(plan, pack=True))
    assert sums["adversary_examples"] == 3
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected_sums[name], rtol=1e-5, atol=1e-6, err_msg=name)
    found = patterns.by_path(found)
    for path, grad in patterns.by_path(expected).items():
        error = np.linalg.norm(np.asarray(found[path]) - np.asarray(grad))
        assert error <= 1e-5 * np.linalg.norm(grad), path


# ---------------------------------------------------------------------------------------------
# Checkpoints and exports
# ---------------------------------------------------------------------------------------------


ADAFACTOR = optim.OptimizerConfig(schedule="constant", min_dim_size_to_factor=4, momentum=0.9)


@functools.cache
def saved_state(name):
    """A state with Adafactor's moments, in two parts."""
    plan = plans.plan(name)
    state = plans.midway(plan, ADAFACTOR)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2), jax.devices()[:2])
    return jax.device_put(state, sharding.state_shardings(mesh, tree.axes(plan), state))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """name of a plan -> a run directory with a checkpoint of it, saved once."""

    @functools.cache
    def save(name):
        plan, folder = plans.plan(name), tmp_path_factory.mktemp(name)
        meta = {
            "model": dataclasses.asdict(plan.base),
            "task_ids": {task: number for number, task in enumerate(plan.names, start=1)},
            "sharing": plan.describe(),
        }
        with Checkpointer(folder / "checkpoints") as checkpointer:
            checkpointer.save(5, saved_state(name), {}, meta, wait=True)
        return folder

    return save


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_gives_every_bit_back_where_it_lay(name, run):
    """Parameters, moments and counts; what a compiled step takes is then the same."""
    state = saved_state(name)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(run(name) / "checkpoints", read_only=True) as checkpointer:
        restored, _, meta = checkpointer.restore(5, abstract)
    plans.plan(name).check_description(meta["sharing"], "RUN")
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert (new.dtype, new.sharding) == (old.dtype, old.sharding)
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


@pytest.mark.parametrize(
    ("name", "kind", "tasks"),
    [
        ("adapter", "mtl_jax", ("a", "c")),
        ("adapter_shared", "mtl_jax", (None,)),
        ("lora", "hf", ("a", "*")),
        ("lora_cluster", "hf", ("a", "y")),
        ("lora_shared", "hf", (None,)),
        ("owned", "hf", ("y",)),
        ("everything", "mtl_jax", ("b", "x")),
    ],
)
def test_an_exported_task_has_the_logits_of_the_whole_model(name, kind, tasks, run, tmp_path):
    """`mtl-jax convert`, read again. LoRA and mixtures are added in another program: rounding."""
    plan, found = plans.plan(name), []
    batch = rows(plan, pack=False)
    real = batch["decoder_segment_ids"] > 0
    for task in tasks:
        target = str(tmp_path / f"exported_{len(found)}")
        given = ["convert", str(run(name)), target, "--to", kind]
        assert not cli.main([*given, *(["--task", task] if task else [])])
        source = interop.open_source(target)
        assert source.config == plan.model_config
        params = interop.load_params(source, model.abstract_params(source.config))
        found.append(np.asarray(forward(source.config)(params, batch))[real])
        number = 0 if task is None else plan.task_id(task)
        expected = np.asarray(forward(plan.model_config)(plain(plan, number), batch))[real]
        np.testing.assert_allclose(found[-1], expected, rtol=1e-4, atol=1e-4)
        if kind == "mtl_jax":
            assert tuple(source.prompt) == prompt_ids(plan)
    for one, other in itertools.pairwise(found):
        assert np.abs(one - other).max() > 0.1

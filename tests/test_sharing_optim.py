"""Updates of parameters of tasks: absent tasks stay, entries are apart, no layout changes them."""

import functools

import jax
import numpy as np
import optax
import pytest
import sharing_plans as plans

from mtl_jax import config, optim, patterns, sharding
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.sharing import tree

pytestmark = pytest.mark.slow

by_path = patterns.by_path
KEY = jax.random.key(3)
ADAMW = optim.OptimizerConfig(
    name="adamw", schedule="constant", learning_rate=0.01, weight_decay=0.1
)
ADAFACTOR = optim.OptimizerConfig(
    schedule="constant",
    learning_rate=0.02,
    min_dim_size_to_factor=4,
    momentum=0.9,
    weight_decay=0.01,
)
OPTIMIZERS = {"adamw": ADAMW, "adafactor": ADAFACTOR}
# What there is of a parameter, with its moments.
MOMENTS = {"adamw": {"params", "mu", "nu"}, "adafactor": {"params", "v_row", "v_col", "v", "ema"}}


@functools.cache
def compiled_step(name, optimizer):
    """The train step with two microbatches, compiled once for the tests of this file."""
    return jax.jit(plans.train_step(plans.plan(name), OPTIMIZERS[optimizer], 2))


def midway(name, optimizer):
    state = plans.midway(plans.plan(name), OPTIMIZERS[optimizer])
    return jax.device_put(state, jax.devices()[0])  # where a checkpoint puts it, too


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["owned", "everything"])
def test_absent_tasks_stay_bit_by_bit(name, optimizer):
    """Parameters and moments, through the train step; those of tasks in the batch move."""
    plan = plans.plan(name)
    before = midway(name, optimizer)
    for tasks in ((2, 3), (1, 1)):  # each leaves a task and a cluster out
        batch = plans.task_batch(plan, tasks)
        after, told = compiled_step(name, optimizer)(before, batch, KEY)
        assert not told["mixed_sharing"]
        present = np.isin([1, 2, 3], tasks)
        np.testing.assert_array_equal(told["task_tokens"][1:] > 0, present)
        found = plans.moved_entries(plan, before, after)
        for (path, owner), moved in found.items():
            expected = present if owner == "task" else [present[0], present[1] or present[2]]
            np.testing.assert_array_equal(moved, expected, err_msg=path)
        keys = [set(path.split("/")) for path, _ in found]
        assert all(any(kind in x for x in keys) for kind in MOMENTS[optimizer])
        if name == "owned":
            assert any({"lora_a", "params"} <= x for x in keys)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["owned", "everything"])
def test_a_restored_state_goes_on_bit_by_bit(name, optimizer, tmp_path):
    """Three updates at once equal one, a checkpoint and two more: parameters, moments, metrics."""
    plan = plans.plan(name)
    update = compiled_step(name, optimizer)
    batches = [plans.task_batch(plan, x, seed=n) for n, x in enumerate([(2, 3), (1, 3), (1, 2)])]
    state, _ = update(midway(name, optimizer), batches[0], KEY)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, {}, {}, wait=True)
        again = checkpointer.restore(1, jax.eval_shape(lambda: state))[0]
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for batch in batches[1:]:
        state, told = update(state, batch, KEY)
        again, same = update(again, batch, KEY)
        for old, new in zip(
            jax.tree.leaves((state, told)), jax.tree.leaves((again, same)), strict=True
        ):
            np.testing.assert_array_equal(old, new)


def test_adafactor_treats_entries_as_separate_parameters():
    """Moments and parameter scale of a bank are those of its entries apart, bit by bit."""
    optimizer = optim.make_optimizer(ADAFACTOR)
    random = np.random.RandomState(0)
    bank = random.randn(3, 2, 8, 6).astype(np.float32) * np.array([1, 10, 0.1])[:, None, None, None]
    bank = bank.astype(np.float32)
    grads = [random.randn(*bank.shape).astype(np.float32) for _ in range(3)]
    leaf = lambda x: {"sharing": {"task": {"copies": {"decoder": {"layers": {"kernel": x}}}}}}  # noqa: E731
    single = lambda x: {"decoder": {"layers": {"kernel": x}}}  # noqa: E731

    def run(wrap, params, grads):
        params = wrap(params)
        state = optimizer.init(params)
        for grad in grads:
            updates, state = optimizer.update(wrap(grad), state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.leaves(params)[0]

    together = run(leaf, bank, grads)
    for entry in range(3):
        alone = run(single, bank[entry], [grad[entry] for grad in grads])
        # Means over other axes of larger arrays may round otherwise.
        np.testing.assert_allclose(together[entry], alone, rtol=1e-6)


PRESETS = {"dp": (8, 1, 1), "fsdp": (1, 8, 1), "tp": (1, 1, 8), "fsdp_tp": (1, 4, 2)}
BANK = "sharing/experts/copies/encoder/layers/mlp/wi_0/kernel"


def updated(optimizer, mesh):
    """(state before an update, state after it, metrics) of a whole train step on a mesh."""
    # All that a mesh splits can be split by eight.
    plan = plans.plan("everything", num_heads=8, head_dim=2)
    before = plans.midway(plan, OPTIMIZERS[optimizer])
    places = sharding.state_shardings(mesh, tree.axes(plan), before)
    everywhere = sharding.replicated(mesh)
    sharding.validate(mesh, plan.model_config, 32, 4)
    with sharding.on_mesh(mesh):
        # One task is in no microbatch.
        batch = sharding.put_batch(mesh, plans.task_batch(plan, (3, 1, 1, 3), rows=32))
        update = jax.jit(
            plans.train_step(plan, OPTIMIZERS[optimizer], 4), out_shardings=(places, everywhere)
        )
        state, key = jax.device_put(before, places), jax.device_put(KEY, everywhere)
        after, told = update(state, batch, key)
    return before, after, jax.device_get(told)


@functools.cache
def on_one_device(optimizer):
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    before, after, told = updated(optimizer, mesh)
    return jax.device_get(before), jax.device_get(after), told


@pytest.mark.parametrize(
    ("preset", "optimizer"),
    [("dp", "adamw"), ("fsdp", "adafactor"), ("tp", "adamw"), ("fsdp_tp", "adafactor")],
)
def test_the_presets_give_the_update_of_one_device(preset, optimizer):
    """Every leaf of the state, soft penalty, balance of experts and adversary among its reasons.

    Rounding of sums in another order: of a moment by its own size, of a parameter by its step's.
    """
    mesh = sharding.make_mesh(config.load([f"gin/mesh/{preset}.gin"]).mesh)
    assert tuple(mesh.shape.values()) == PRESETS[preset]
    before, expected, expected_told = on_one_device(optimizer)
    _, found, told = updated(optimizer, mesh)
    # [experts, layers, embed, mlp]
    shard = (3, 2, 16 // mesh.shape["fsdp"], 32 // mesh.shape["tensor"])
    assert by_path(found.params)[BANK].addressable_shards[0].data.shape == shard
    for metric in ("penalty", "adversary_loss", "adversary_strength"):
        assert told[f"sharing/{metric}"] > 0, metric
    assert told.keys() == expected_told.keys()
    for metric, value in told.items():
        np.testing.assert_allclose(value, expected_told[metric], rtol=1e-5, err_msg=metric)
    leaves = (jax.tree.leaves(x) for x in (before, jax.device_get(found)))
    for (keys, one), old, other in zip(
        jax.tree_util.tree_leaves_with_path(expected), *leaves, strict=True
    ):
        of_params = getattr(keys[0], "name", "") == "params"
        size = np.linalg.norm(one - old if of_params else one)
        assert np.linalg.norm(other - one) <= 1e-4 * size, jax.tree_util.keystr(keys)

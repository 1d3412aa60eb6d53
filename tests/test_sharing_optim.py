"""Optimizers on parameters of tasks: absent tasks stay, entries are apart, shards change none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharing_plans as plans

from mtl_jax import optim, patterns, sharding, step
from mtl_jax.sharing import tree

pytestmark = pytest.mark.slow

by_path = patterns.by_path
SLOW = pytest.mark.slow  # more compilations of axes that the other cases cover
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


@pytest.mark.parametrize("optimizer_cfg", [ADAMW, ADAFACTOR], ids=["adamw", "adafactor"])
@pytest.mark.parametrize("name", ["levels", "everything"])
def test_absent_tasks_stay_bit_by_bit(name, optimizer_cfg):
    """Parameters and moments, after steps in which they had a gradient; present ones move."""
    plan = plans.plan(name)
    optimizer = optim.make_optimizer(optimizer_cfg)
    params = plans.perturbed(plan)
    state = optimizer.init(params)

    @jax.jit
    def move(params, state, grads, present):
        updates, after = optimizer.update(grads, state, params)
        after = tree.keep_absent(plan, state, after, present)
        return tree.keep_absent(plan, params, optax.apply_updates(params, updates), present), after

    def update(params, state, task):
        grads = plans.gradient(plan, params, task)
        return move(params, state, grads, jnp.arange(3) == task - 1)

    for task in (1, 2, 3):  # so that all have momentum
        params, state = update(params, state, task)
    before = jax.device_get((params, state))
    after = jax.device_get(update(params, state, 2))
    checked = 0
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        keys = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        owner = keys[keys.index("sharing") + 1] if "sharing" in keys else ""
        if owner not in ("task", "cluster") or old.shape == (1,):
            continue
        mine = int(plan.index(owner, 2))
        np.testing.assert_array_equal(
            np.delete(new, mine, axis=0), np.delete(old, mine, axis=0), err_msg=str(keys)
        )
        assert np.any(new[mine] != old[mine]), keys
        checked += 1
    assert checked >= 4


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


@pytest.mark.parametrize(
    ("layout", "optimizer_cfg"),
    [
        pytest.param((2, 2, 2), ADAFACTOR, id="2x2x2 adafactor", marks=SLOW),
        pytest.param((2, 2, 2), ADAMW, id="2x2x2 adamw", marks=SLOW),
        pytest.param((1, 4, 2), ADAMW, id="1x4x2 adamw", marks=SLOW),
        pytest.param((1, 8, 1), ADAFACTOR, id="1x8x1 adafactor", marks=SLOW),
    ],
)
def test_sharded_equals_unsharded(layout, optimizer_cfg):
    """A whole update of a plan with every structure; rounding of sums in another order."""
    plan = plans.plan("everything")
    optimizer = optim.make_optimizer(dataclasses.replace(optimizer_cfg, momentum=0.0))
    params = plans.perturbed(plan)

    gradient = plans.gradient_function(plan, rows=8)

    def update(params, state, task):
        updates, state = optimizer.update(gradient(params, task), state, params)
        return optax.apply_updates(params, updates), state

    expected = jax.jit(update)(params, optimizer.init(params), 2)
    mesh = sharding.make_mesh(sharding.MeshConfig(*layout))
    state = step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    places = sharding.state_shardings(mesh, tree.axes(plan), state)
    with sharding.on_mesh(mesh):
        state = jax.device_put(state, places)
        jitted = jax.jit(update, out_shardings=(places.params, places.opt_state))
        found = jitted(state.params, state.opt_state, 2)
    leaf = by_path(found[0])["sharing/experts/copies/encoder/layers/mlp/wo/kernel"]
    # [experts, layers, mlp, embed]
    shard = (3, 2, 32 // layout[2], 16 // layout[1])
    assert leaf.addressable_shards[0].data.shape == shard
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        near = np.abs(one - other) <= 2e-5 + 1e-4 * np.abs(one)
        # The sign of a gradient that is zero but for rounding is AdamW's whole step.
        assert near.mean() > 0.995 if optimizer_cfg is ADAMW else near.all(), path

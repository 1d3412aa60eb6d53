"""LoRA, Polytropon, task embeddings, prompts, experts, adversary against their definitions."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharing_plans as plans

from mtl_jax import patterns
from mtl_jax.errors import UserError
from mtl_jax.layers import Mlp
from mtl_jax.sharing import adversary, embeddings, experts, lora, tree
from mtl_jax.sharing.plan import make_plan
from mtl_jax.sharing.sharing_config import (
    AdversaryConfig,
    ExpertsConfig,
    LoraConfig,
    PromptConfig,
    Rooms,
    SharingConfig,
)

pytestmark = pytest.mark.slow

CFG = golden.config("1.1")
KERNEL = "encoder/layers/attention/query/kernel"


def by_path(params):
    return patterns.by_path(params)


# ---------------------------------------------------------------------------------------------
# LoRA and Polytropon
# ---------------------------------------------------------------------------------------------


def test_lora_is_kernel_plus_scaled_product():
    """kernel + alpha/r A B in float64, in the patterns and nowhere else."""
    plan = make_plan(
        Rooms(lora=LoraConfig(rank=2, alpha=6.0, patterns=(KERNEL,))), plans.NAMES, CFG
    )
    params = plans.perturbed(plan)
    leaves = by_path(params)
    a, b = (
        np.asarray(leaves[f"sharing/task/lora_{x}/{KERNEL}"], np.float64)[1] for x in ("a", "b")
    )
    found = by_path(tree.plain(plan, params, 2))
    np.testing.assert_allclose(found[KERNEL], leaves[KERNEL] + 3.0 * (a @ b), rtol=1e-5, atol=1e-6)
    for path in found.keys() - {KERNEL}:
        np.testing.assert_array_equal(found[path], leaves[path])


def inventory(logits, number=3):
    """Parameters with an inventory whose A and B are random, and given logits of the mixtures."""
    rooms = Rooms(lora=LoraConfig(rank=2, patterns=(KERNEL,), owner="inventory", inventory=number))
    plan = make_plan(rooms, plans.NAMES, CFG)
    leaves = dict(by_path(plans.perturbed(plan)))
    path = "sharing/task/mixing/encoder/layers/attention/query/logits"
    leaves[path] = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), leaves[path].shape)
    return plan, leaves


def test_one_hot_mixtures_are_lora_of_each_task():
    """Task t takes pair t alone: the logits are so far apart that sigmoid is 0 and 1 in float32."""
    plan, leaves = inventory(np.where(np.eye(3)[:, None, :] > 0, 200.0, -200.0))
    single = make_plan(Rooms(lora=LoraConfig(rank=2, patterns=(KERNEL,))), plans.NAMES, CFG)
    own = {p.replace("/inventory/", "/task/"): x for p, x in leaves.items() if "mixing" not in p}
    for task in (1, 2, 3):
        found = by_path(tree.plain(plan, patterns.as_tree(leaves), task))[KERNEL]
        expected = by_path(tree.plain(single, patterns.as_tree(own), task))[KERNEL]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_uniform_mixtures_are_one_shared_lora():
    """Of the mean A and the mean B; and so is a task that is not known, whatever the logits."""
    plan, leaves = inventory(np.zeros(3))
    shared = make_plan(
        Rooms(lora=LoraConfig(rank=2, patterns=(KERNEL,), owner="shared")), plans.NAMES, CFG
    )
    own = {
        p.replace("/inventory/", "/shared/"): np.mean(x, axis=0) if "inventory" in p else x
        for p, x in leaves.items()
        if "mixing" not in p
    }
    expected = by_path(tree.plain(shared, patterns.as_tree(own), 1))[KERNEL]
    for task in (0, 1, 3):
        found = by_path(tree.plain(plan, patterns.as_tree(leaves), task))[KERNEL]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    other, leaves = inventory([3.0, -1.0, 0.5])
    found = by_path(tree.plain(other, patterns.as_tree(leaves), 0))[KERNEL]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_mixtures_are_sigmoids_over_their_sum():
    logits = np.random.RandomState(0).randn(3, 2, 3)
    plan, leaves = inventory(logits)
    sigmoid = 1 / (1 + np.exp(-logits))
    found = lora.mixture(plan, leaves, KERNEL, jnp.int32(2))
    np.testing.assert_allclose(found, (sigmoid / sigmoid.sum(-1, keepdims=True))[1], rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# Task embeddings and prompts
# ---------------------------------------------------------------------------------------------


def test_equal_task_embeddings_give_equal_outputs_and_others_do_not():
    plan = plans.plan("task_embedding")
    params = plans.perturbed(plan)
    bank = params["sharing"]["task"]["task_embedding"]["embedding"]
    twins = {"task": {"task_embedding": {"embedding": bank.at[2].set(bank[0])}}}
    params = params | {"sharing": twins}
    first, second, third = (plans.logits(plan, params, task) for task in (1, 2, 3))
    np.testing.assert_array_equal(first, third)
    assert np.abs(first - second).max() > 0.1
    table = by_path(tree.plain(plan, params, 2))["token_embedder/embedding"]
    np.testing.assert_allclose(table - params["token_embedder"]["embedding"],
                               np.tile(bank[1], (32, 1)), atol=1e-6)  # fmt: skip


def test_an_unknown_task_has_the_mean_embedding():
    plan = plans.plan("task_embedding")
    params = plans.perturbed(plan)
    bank = np.asarray(params["sharing"]["task"]["task_embedding"]["embedding"])
    table = by_path(tree.plain(plan, params, 0))["token_embedder/embedding"]
    difference = np.asarray(table) - np.asarray(params["token_embedder"]["embedding"])
    np.testing.assert_allclose(difference[0], bank.mean(0), atol=1e-6)


@pytest.mark.parametrize("combine", ["add", "concat"])
def test_prompts_are_the_last_rows_of_the_embedding(combine):
    rooms = Rooms(prompt=PromptConfig(length=2, owners=("shared", "task"), combine=combine))
    plan = make_plan(rooms, plans.NAMES, CFG)
    params = plans.perturbed(plan)
    leaves = by_path(params)
    shared = np.asarray(leaves["sharing/shared/prompt/embedding"])
    own = np.asarray(leaves["sharing/task/prompt/embedding"])[2]
    expected = shared + own if combine == "add" else np.concatenate([shared, own])
    table = np.asarray(by_path(tree.plain(plan, params, 3))["token_embedder/embedding"])
    assert embeddings.prompt_ids(plan) == tuple(range(32 - len(expected), 32))
    np.testing.assert_allclose(table[list(embeddings.prompt_ids(plan))], expected, rtol=1e-6)
    np.testing.assert_array_equal(table[: -len(expected)],
                                  leaves["token_embedder/embedding"][: -len(expected)])  # fmt: skip
    embeddings.check_vocabulary(plan, 32 - len(expected))
    with pytest.raises(UserError, match=f"set it to at least {33}"):
        embeddings.check_vocabulary(plan, 33 - len(expected))


def test_prompts_start_as_rows_of_the_vocabulary():
    plan = plans.plan("prompts")
    leaves = by_path(plans.start(plan))
    table = np.asarray(leaves["token_embedder/embedding"])[:28]
    for owner in ("shared", "task"):
        rows = np.asarray(leaves[f"sharing/{owner}/prompt/embedding"]).reshape(-1, 16)
        assert all(np.any(np.all(row[None] == table, axis=1)) for row in rows)


# ---------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------


def mixture_in_numpy(plan, leaves, stack, layer, task, x_RD):
    """sum_e g_e act(x wi_e) wo_e of the definition, over all experts, in float64."""
    cfg = plan.rooms.experts
    get = lambda path: np.asarray(leaves[path], np.float64)  # noqa: E731
    logits_X = (
        get("sharing/task/router/embedding")[task - 1]
        @ get(f"sharing/shared/router/{stack}/layers/kernel")[layer]
    )
    chosen = np.argsort(-logits_X)[: cfg.top_k]
    gates_X = np.zeros(cfg.number)
    gates_X[chosen] = np.exp(logits_X[chosen]) / np.exp(logits_X[chosen]).sum()
    total = 0.0
    for expert in range(cfg.number):
        wi_0, wi_1, wo = (
            get(f"sharing/experts/copies/{stack}/layers/mlp/{name}/kernel")[expert, layer]
            for name in ("wi_0", "wi_1", "wo")
        )
        h = x_RD @ wi_0
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        total = total + gates_X[expert] * ((h * (x_RD @ wi_1)) @ wo)
    return total


@pytest.mark.parametrize("task", [1, 2, 3])
def test_experts_are_the_dense_mixture(task):
    plan = plans.plan("experts")
    params = plans.perturbed(plan)
    plain = tree.plain(plan, params, task)
    x_RD = np.random.RandomState(0).randn(5, 16).astype(np.float32)
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            mlp = jax.tree.map(lambda x: x[layer], plain[stack]["layers"]["mlp"])  # noqa: B023
            module = Mlp(plan.model_config, deterministic=True)
            found = module.apply({"params": mlp}, x_RD[None])[0]
            expected = mixture_in_numpy(plan, by_path(params), stack, layer, task, x_RD)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_other_stack_is_padded_with_zeros():
    plan = plans.plan("experts_encoder")
    params = plans.perturbed(plan)
    mlp = tree.plain(plan, params, 1)["decoder"]["layers"]["mlp"]
    own = params["decoder"]["layers"]["mlp"]
    for name in ("wi_0", "wi_1"):
        np.testing.assert_array_equal(mlp[name]["kernel"][..., :32], own[name]["kernel"])
        np.testing.assert_array_equal(mlp[name]["kernel"][..., 32:], 0)
    np.testing.assert_array_equal(mlp["wo"]["kernel"][:, :32], own["wo"]["kernel"])
    np.testing.assert_array_equal(mlp["wo"]["kernel"][:, 32:], 0)


def test_the_balance_loss_in_numpy():
    rooms = Rooms(experts=ExpertsConfig(number=4, top_k=2, router_dim=8, balance_weight=0.5))
    plan = make_plan(rooms, plans.NAMES, CFG)
    params = plans.perturbed(plan)
    leaves = by_path(params)
    tasks = np.asarray(leaves["sharing/task/router/embedding"], np.float64)
    losses = []
    for stack in ("encoder", "decoder"):
        for kernel in np.asarray(leaves[f"sharing/shared/router/{stack}/layers/kernel"]):
            logits = tasks @ kernel
            share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            used = np.zeros(4)
            for row in logits:
                used[np.argsort(-row)[:2]] += 1 / (3 * 2)
            losses.append(4 * np.sum(used * share.mean(0)))
    found = tree.penalty(plan, params, jnp.ones(3, bool))
    np.testing.assert_allclose(found, 0.5 * np.mean(losses), rtol=1e-5)
    grads = jax.grad(functools.partial(tree.penalty, plan))(params, jnp.array([True, True, False]))
    vectors = np.asarray(grads["sharing"]["task"]["router"]["embedding"])
    np.testing.assert_array_equal(vectors[2], 0)
    assert np.all(np.any(vectors[:2], axis=1))


def test_the_router_gets_a_gradient_through_the_gates():
    plan = plans.plan("experts")
    params = plans.perturbed(plan)
    weights_NK, _ = experts.gates(plan, by_path(params), "encoder", jnp.int32(1))
    np.testing.assert_allclose(weights_NK.sum(-1), 1.0, rtol=1e-6)
    assert np.all(np.asarray(weights_NK) < 0.999)
    router = plans.gradient(plan, params, 1)["sharing"]["shared"]["router"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(router))


def test_options_that_exclude_each_other_are_refused():
    both = Rooms(
        SharingConfig(copies=(("encoder/layers/mlp/.*", "task"),)),
        experts=ExpertsConfig(number=2),
    )
    with pytest.raises(UserError, match=r"whose owner Experts\.stacks says"):
        make_plan(both, plans.NAMES, CFG)
    both = Rooms(
        SharingConfig(levels=(("encoder", "task", 0, 1),)), experts=ExpertsConfig(number=2)
    )
    with pytest.raises(UserError, match=r"Sharing\.levels and Experts\.stacks both"):
        make_plan(both, plans.NAMES, CFG)
    both = Rooms(lora=LoraConfig(rank=2, patterns=(".*/kernel",)), experts=ExpertsConfig(number=2))
    with pytest.raises(UserError, match=r"Lora\.patterns: '.*kernel' matches .*mlp"):
        make_plan(both, plans.NAMES, CFG)
    with pytest.raises(UserError, match=r"Experts\.top_k must be from 2"):
        ExpertsConfig(number=4, top_k=1)


# ---------------------------------------------------------------------------------------------
# Adversary
# ---------------------------------------------------------------------------------------------


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 3]], np.int32)
TASKS = np.array([[1, 1, 1, 1, 1, 0], [3, 3, 3, 3, 3, 3]], np.int32)


@pytest.mark.parametrize("exclude", [0, 1, 2])
def test_pooled_in_numpy(exclude):
    encoded = np.random.RandomState(0).randn(2, 6, 4).astype(np.float32)
    means, counts = adversary.pooled(encoded, SEGMENTS, exclude)
    for row in range(2):
        for segment in range(1, 7):
            mine = encoded[row][SEGMENTS[row] == segment][exclude:]
            assert counts[row, segment] == len(mine)
            expected = mine.mean(0) if len(mine) else np.zeros(4)
            np.testing.assert_allclose(means[row, segment], expected, rtol=1e-5, atol=1e-6)
        assert counts[row, 0] == 0


@pytest.mark.parametrize("hidden_dim", [0, 5])
def test_the_encoder_gets_minus_lambda_times_the_gradient(hidden_dim):
    """Against the same loss without the reversal: the classifier's gradient is its own."""
    cfg = AdversaryConfig(weight=0.3, hidden_dim=hidden_dim, exclude_prefix=1)
    plan = make_plan(Rooms(adversary=cfg), plans.NAMES, CFG)
    params = plans.perturbed(plan)["sharing"]["adversary"]
    encoded = np.random.RandomState(1).randn(2, 6, 16).astype(np.float32)

    def reversed_loss(params, encoded):
        return adversary.loss(cfg, params, encoded, SEGMENTS, TASKS, jnp.int32(0))[0]

    def honest_loss(params, encoded):
        means, _ = adversary.pooled(encoded, SEGMENTS, 1)
        found = jax.nn.log_softmax(adversary.classify(params, means))
        # Segments with a token behind the first: two of task 1 in row 0, one of task 3 in row 1.
        return -(found[0, 1, 0] + found[0, 2, 0] + found[1, 2, 2])

    value, grads = jax.value_and_grad(reversed_loss, (0, 1))(params, encoded)
    expected, honest = jax.value_and_grad(honest_loss, (0, 1))(params, encoded)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads[0], honest[0]
    )
    np.testing.assert_allclose(grads[1], -0.3 * honest[1], rtol=1e-5, atol=1e-7)
    assert np.any(grads[1])
    np.testing.assert_array_equal(grads[1][0, [0, 3, 5]], 0)  # first tokens and padding
    total, count, metrics = adversary.loss(cfg, params, encoded, SEGMENTS, TASKS, jnp.int32(0))
    assert count == 3
    assert 0 <= metrics["adversary_correct"] <= 3
    np.testing.assert_allclose(metrics["adversary_strength"], 0.3)
    np.testing.assert_allclose(total, value, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.0, 5: 1.0, 10: 2.0, 30: 2.0}),
        (
            "ganin",
            {0: 0.0, 5: 2 * (2 / (1 + np.exp(-5.0)) - 1), 20: 2 * (2 / (1 + np.exp(-10.0)) - 1)},
        ),
    ],
)
def test_schedules(schedule, expected):
    cfg = AdversaryConfig(weight=2.0, schedule=schedule, ramp_steps=10)
    for number, value in expected.items():
        np.testing.assert_allclose(adversary.strength(cfg, number), value, rtol=1e-5, atol=1e-7)

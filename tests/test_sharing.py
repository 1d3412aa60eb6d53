"""The parameters of a task: start, owners, gradients, soft sharing, adapters, names, errors."""

import dataclasses
import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharing_plans as plans
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import model, optim, patterns
from mtl_jax.errors import UserError
from mtl_jax.layers import Adapter
from mtl_jax.sharing import tree
from mtl_jax.sharing.plan import from_description, make_plan
from mtl_jax.sharing.sharing_config import (
    AdapterConfig,
    AdversaryConfig,
    LoraConfig,
    PromptConfig,
    Rooms,
    SharingConfig,
)


def by_path(params):
    return patterns.by_path(params)


@pytest.mark.parametrize("name", [n for n in plans.ROOMS if not plans.ROOMS[n].prompt.length])
def test_every_task_starts_as_the_plain_model(name):
    """Prompts change their input, all else is built to start as the given model.

    Experts add up in another order than one MLP, hence their tolerance: rounding of float32.
    """
    plan = plans.plan(name)
    params = plans.start(plan)
    expected = golden.logits("1.1")
    for task in range(4):
        found = plans.logits(plan, params, task)
        if plan.rooms.experts.number or plan.rooms.sharing.levels:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
        else:
            np.testing.assert_array_equal(found, expected)


def test_the_empty_plan_leaves_the_tree_alone():
    plan = make_plan(Rooms(), (), golden.config("1.1"))
    params = golden.params(plan.base)
    assert tree.init(plan, jax.random.key(0), params) is params
    assert tree.plain(plan, params, 0) is params
    assert plan.model_config == plan.base
    assert tree.axes(plan) == model.param_axes(plan.base)


@pytest.mark.parametrize("name", sorted(plans.ROOMS))
def test_axes_have_the_structure_of_the_tree(name):
    plan = plans.plan(name)
    axes, params = by_path(tree.axes(plan)), by_path(plans.start(plan))
    assert axes.keys() == params.keys()
    for path, leaf in params.items():
        assert len(axes[path]) == leaf.ndim, path
        keys = path.split("/")
        is_bank = keys[0] == "sharing" and keys[1] in optim.BANKS
        assert (axes[path][:1] == ("tasks",)) == is_bank, path
        stacked = sum(axis in ("tasks", "layers") for axis in axes[path])
        assert optim._stacked(tuple(map(jax.tree_util.DictKey, keys))) == stacked, path


@pytest.mark.parametrize("name", sorted(plans.ROOMS))
def test_plain_gives_the_parameters_of_the_models_shape(name):
    plan = plans.plan(name)
    found = jax.eval_shape(functools.partial(tree.plain, plan), plans.start(plan), 1)
    expected = model.abstract_params(plan.model_config)
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, expected)


SLOW = pytest.mark.slow  # more compilations of what the other cases cover
COVERING = ("levels", "lora", "everything")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COVERING else SLOW) for n in plans.ROOMS]
)
def test_gradients_reach_only_the_entries_of_the_task(name):
    """Exactly zero for the copies of other tasks and clusters; and no shared leaf is dead."""
    plan = plans.plan(name)
    params = plans.perturbed(plan)
    for task in (1, 2, 3):
        grads = by_path(plans.gradient(plan, params, task))
        for path, grad in grads.items():
            keys = path.split("/")
            if keys[:2] == ["sharing", "adversary"]:
                continue
            owner = keys[1] if keys[0] == "sharing" else None
            if owner in ("task", "cluster"):
                mine = int(plan.index(owner, task))
                others = np.delete(np.asarray(grad), mine, axis=0)
                np.testing.assert_array_equal(others, 0, err_msg=path)
                grad = grad[mine]
            if owner != "experts":  # those that the task does not use have none
                assert np.any(np.asarray(grad)), path


def test_all_tasks_in_one_cluster_is_hard_sharing():
    """The gradients of the plain model, up to float32's rounding in another program."""
    rooms = Rooms(SharingConfig(clusters={"*": 0}, copies=(("decoder/layers/.*", "cluster"),)))
    plan = make_plan(rooms, plans.NAMES, golden.config("1.1"))
    params = plans.start(plan)
    grads = by_path(plans.gradient(plan, params, 2))
    expected = by_path(plans.plain_gradient(plan.base, golden.params(plan.base)))
    for path, grad in expected.items():
        mine = grads.get(path)
        mine = grads[f"sharing/cluster/copies/{path}"][0] if mine is None else mine
        error = np.abs(np.asarray(mine) - np.asarray(grad)).max()
        assert error <= 3e-6 * np.abs(np.asarray(grad)).max(), path


def test_layers_are_owned_by_range():
    """Four layers: 0 and 2 shared, 1 of the cluster, 3 of the task; each where it belongs."""
    cfg = golden.config("1.1", num_decoder_layers=4)
    rooms = Rooms(
        SharingConfig(
            clusters={"a": "x", "b*": "y", "c": "x"},
            levels=(("decoder", "task", 3, 4), ("decoder", "cluster", 1, 2)),
        )
    )
    plan = make_plan(rooms, ("a", "b", "c"), cfg)
    params = plans.perturbed(plan)
    leaves = by_path(params)
    path = "decoder/layers/mlp/wo/kernel"
    assert leaves[path].shape[0] == 2
    cluster = leaves[f"sharing/cluster/layers_1_to_2/{path}"]
    task = leaves[f"sharing/task/layers_3_to_4/{path}"]
    assert cluster.shape[:2] == (2, 1)
    assert task.shape[:2] == (3, 1)
    for number, mine in enumerate((0, 1, 0)):
        found = by_path(tree.plain(plan, params, number + 1))[path]
        expected = [leaves[path][0], cluster[mine, 0], leaves[path][1], task[number, 0]]
        np.testing.assert_array_equal(found, np.stack(expected))
    unknown = by_path(tree.plain(plan, params, 0))[path]
    np.testing.assert_allclose(unknown[3], np.mean(task, axis=0)[0], rtol=1e-6)
    np.testing.assert_allclose(unknown[1], np.mean(cluster, axis=0)[0], rtol=1e-6)


@functools.cache
def six_layers():
    return golden.params(golden.config("1.1", num_encoder_layers=6))


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 6), unique=True, max_size=6).map(sorted),
    st.lists(st.sampled_from(["task", "cluster"]), min_size=3, max_size=3),
)
def test_any_ranges_keep_the_order_of_layers(borders, owners):
    """Layer n of the assembled stack is layer n of the model that everything started from."""
    ranges = list(zip(borders[::2], borders[1::2], strict=False))
    levels = tuple(("encoder", owner, *x) for x, owner in zip(ranges, owners, strict=False))
    clusters = {"*": "all"} if "cluster" in [x[1] for x in levels] else {}
    cfg = golden.config("1.1", num_encoder_layers=6)
    plan = make_plan(Rooms(SharingConfig(clusters=clusters, levels=levels)), ("a", "b"), cfg)
    plain = six_layers()
    params = tree.init(plan, jax.random.key(0), plain)
    found = tree.plain(plan, params, 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.all(a == b)), found, plain))
    total = sum(leaf.size for leaf in jax.tree.leaves(plain))
    own = sum(end - first for _, owner, first, end in levels if owner == "task")
    layer = sum(x.size for x in jax.tree.leaves(plain["encoder"]["layers"])) // 6
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total + own * layer


@pytest.mark.parametrize("lam", [0.0, 0.5, 10.0])
def test_soft_sharing_of_quadratics(lam):
    """1/2 |theta_t - a_t|^2 and the penalty: theta_t = abar + (a_t - abar) / (1 + lambda).

    300 steps of gradient descent leave rounding.
    """
    path = "decoder/decoder_norm/scale"
    rooms = Rooms(SharingConfig(copies=((path, "task"),), soft_penalty=lam))
    plan = make_plan(rooms, plans.NAMES, golden.config("1.1"))
    params = plans.start(plan)
    bank = params["sharing"]["task"]["copies"]["decoder"]["decoder_norm"]["scale"]
    goals = np.random.RandomState(0).randn(*bank.shape).astype(np.float32)
    present = jnp.ones(3, bool)

    def objective(bank):
        leaf = {"sharing": {"task": {"copies": {"decoder": {"decoder_norm": {"scale": bank}}}}}}
        return 0.5 * jnp.sum(jnp.square(bank - goals)) + tree.penalty(plan, leaf, present)

    # The copies' mean is drawn by the losses alone, at a rate of 1 - 1 / (1 + lambda): the slowest.
    descend = jax.jit(lambda bank: bank - 1 / (1 + lam) * jax.grad(objective)(bank))
    for _ in range(300):
        bank = descend(bank)
    mean = goals.mean(0, keepdims=True)
    np.testing.assert_allclose(bank, mean + (goals - mean) / (1 + lam), rtol=1e-5, atol=1e-6)


def test_absent_tasks_get_no_gradient_of_the_soft_penalty():
    path = "decoder/decoder_norm/scale"
    rooms = Rooms(SharingConfig(copies=((path, "task"),), soft_penalty=2.0))
    plan = make_plan(rooms, plans.NAMES, golden.config("1.1"))
    params = plans.perturbed(plan)
    present = jnp.array([True, False, True])
    grads = by_path(jax.grad(functools.partial(tree.penalty, plan))(params, present))
    name = f"sharing/task/copies/{path}"
    bank = np.asarray(by_path(params)[name])
    expected = 2.0 * (bank - bank.mean(0, keepdims=True))
    expected[1] = 0
    np.testing.assert_allclose(grads[name], expected, rtol=1e-5, atol=1e-6)
    value = tree.penalty(plan, params, present)
    np.testing.assert_allclose(value, np.sum((bank - bank.mean(0, keepdims=True)) ** 2), rtol=1e-5)


def test_the_soft_penalty_draws_the_copies_of_a_subtree():
    norms = ("encoder/encoder_norm/scale", "decoder/decoder_norm/scale")
    copies = tuple((path, "task") for path in norms)
    values = {"copies": copies, "soft_penalty": 2.0, "soft_pattern": "decoder/.*"}
    plan = make_plan(Rooms(SharingConfig(**values)), plans.NAMES, golden.config("1.1"))
    params, present = plans.perturbed(plan), jnp.ones(3, bool)
    grads = by_path(jax.grad(functools.partial(tree.penalty, plan))(params, present))
    left_out, drawn = (np.asarray(grads[f"sharing/task/copies/{path}"]) for path in norms)
    assert (left_out == 0).all()
    bank = np.asarray(by_path(params)[f"sharing/task/copies/{norms[1]}"])
    expected = 2.0 * (bank - bank.mean(0, keepdims=True))
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_cached_decoding_with_adapters_equals_the_parallel_forward(scan_layers):
    cfg = golden.config("1.1", adapter_dim=4, scan_layers=scan_layers)
    rooms = Rooms(adapter=AdapterConfig(dim=4))
    plan = make_plan(rooms, plans.NAMES, dataclasses.replace(cfg, adapter_dim=0))
    assert plan.model_config == cfg
    params = tree.plain(plan, plans.perturbed(plan), 2)
    plain = plans.logits(plan, plans.start(plan), 2)
    parallel, cached = plans.decoded_both_ways(cfg, params)
    # Rounding: the step joins products of one input.
    np.testing.assert_allclose(cached, parallel, rtol=1e-4, atol=1e-4)
    assert np.abs(parallel - plain).max() > 0.1  # the adapters do something


def test_adapters_in_numpy():
    """h + gelu(h down) up of the definition, in float64."""
    cfg = golden.config("1.1", adapter_dim=4)
    random = np.random.RandomState(0)
    h, down, up = random.randn(2, 3, 16), random.randn(16, 4), random.randn(4, 16)
    inner = h @ down
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    kernels = {"down": {"kernel": down}, "up": {"kernel": up}}
    kernels = jax.tree.map(lambda x: x.astype(np.float32), kernels)
    found = Adapter(cfg).apply({"params": kernels}, h.astype(np.float32))
    np.testing.assert_allclose(found, h + gelu @ up, rtol=1e-5, atol=1e-5)


def test_the_description_makes_the_plan_again(tmp_path):
    file = tmp_path / "groups.json"
    file.write_text('{"groups": [["a", "other"], ["b", "c"]]}')
    rooms = Rooms(
        SharingConfig(clusters_file=str(file), copies=(("decoder/.*", "cluster"),)),
        LoraConfig(rank=2, patterns=("encoder/.*kernel",)),
        prompt=PromptConfig(length=2, owners=("shared", "task")),
    )
    plan = make_plan(rooms, plans.NAMES, golden.config("1.1"))
    assert plan.cluster_of == (0, 1, 1)
    file.unlink()
    again = from_description(json.loads(json.dumps(plan.describe())), plan.base)
    assert again.cluster_of == plan.cluster_of
    assert by_path(tree.axes(again)) == by_path(tree.axes(plan))
    assert again.rooms.lora == plan.rooms.lora


def test_the_report_counts_parameters():
    plan = plans.plan("levels")
    params = plans.start(plan)
    text = tree.report(plan, params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"all: {total:,} parameters" in text
    own = sum(x.size for x in jax.tree.leaves(params["sharing"]["task"]))
    assert f"3 tasks: {own:,} parameters, {own // 3:,} each" in text
    assert "2 clusters: " in text


ERRORS = [
    (dict(sharing=SharingConfig(levels=(("encoder", "task", 1, 3),))), "layer 2 of the encoder"),
    (dict(sharing=SharingConfig(copies=(("decoder", "task"),))), "matches no parameter"),
    (dict(sharing=SharingConfig(clusters={"*": 1})), "nothing is owned by clusters"),
    (dict(sharing=SharingConfig(copies=(("decoder/.*", "cluster"),))), "say which task"),
    (
        dict(sharing=SharingConfig(clusters={"a": 1}, copies=(("decoder/.*", "cluster"),))),
        "no cluster for b, c: add it",
    ),
    (
        dict(sharing=SharingConfig(clusters={"x*": 1}, copies=(("decoder/.*", "cluster"),))),
        "'x\\*' matches no task",
    ),
    (dict(lora=LoraConfig(rank=2, patterns=("encoder/.*scale",))), "matches no parameter"),
    (dict(prompt=PromptConfig(length=32)), "Prompt.length takes 32 rows"),
]


@pytest.mark.parametrize(("rooms", "message"), ERRORS)
def test_plans_that_cannot_work_say_why(rooms, message):
    with pytest.raises(UserError, match=message):
        make_plan(Rooms(**rooms), plans.NAMES, golden.config("1.1"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharingConfig(levels=(("encoder", "task", 2, 2),)), "no range of layers"),
        (lambda: SharingConfig(levels=(("encoders", "task", 1, 2),)), "Did you mean 'encoder'"),
        (
            lambda: SharingConfig(levels=(("encoder", "task", 0, 2), ("encoder", "task", 1, 3))),
            "layer 1 of the encoder is owned twice",
        ),
        (lambda: SharingConfig(soft_penalty=1.0), "there are none"),
        (lambda: SharingConfig(soft_pattern="x"), "needs Sharing.soft_penalty"),
        (lambda: SharingConfig(task_embedding="tasks"), "Did you mean 'task'"),
        (lambda: LoraConfig(alpha=2.0), "needs Lora.rank, which is off"),
        (lambda: LoraConfig(rank=2, inventory=3), "needs Lora.owner = 'inventory'"),
        (lambda: LoraConfig(rank=2, owner="tasks"), "Did you mean 'task'"),
        (lambda: AdapterConfig(owner="cluster"), "needs Adapter.dim"),
        (lambda: PromptConfig(length=2, combine="concat"), "several Prompt.owners"),
        (lambda: PromptConfig(length=2, owners=("task", "task")), "name each owner once"),
        (lambda: AdversaryConfig(weight=1.0, ramp_steps=5), "another Adversary.schedule"),
        (lambda: AdversaryConfig(hidden_dim=5), "needs Adversary.weight"),
    ],
)
def test_wrong_values_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("field", ["task_embedding", "prompt"])
def test_tied_outputs_are_refused(field):
    rooms = (
        Rooms(SharingConfig(task_embedding="task"))
        if field == "task_embedding"
        else Rooms(prompt=PromptConfig(length=1))
    )
    with pytest.raises(UserError, match=r"T5\.logits_via_embedding"):
        make_plan(rooms, plans.NAMES, golden.config("1.0"))


def test_names_of_tasks_clusters_and_neither():
    plan = plans.plan("levels")
    assert [plan.task_id(name) for name in ("a", "c", "*", "x", "y")] == [1, 3, 0, 4, 5]
    with pytest.raises(UserError, match=r"Unknown task 'aa'.*or its cluster \(x, y\)"):
        plan.task_id("aa")
    with pytest.raises(UserError, match="the mean of all"):
        plans.plan("lora").task_id("x")


def test_tasks_that_are_not_known_get_the_mean_or_their_clusters_entry():
    clusters = {"a": "x", "b*": "y", "c": "x"}
    levels = (("encoder", "cluster", 0, 1), ("decoder", "task", 1, 2))
    rooms = Rooms(SharingConfig(clusters=clusters, levels=levels))
    plan = make_plan(rooms, ("a", "b1", "c"), golden.config("1.1"))
    assert [plan.evaluation_id(name) for name in ("a", "b1", "c", "b2", "d")] == [1, 2, 3, 5, 0]
    params = plans.perturbed(plan)
    encoder, decoder = "encoder/layers/mlp/wo/kernel", "decoder/layers/mlp/wo/kernel"
    found = by_path(tree.plain(plan, params, plan.evaluation_id("b2")))
    expected = by_path(tree.plain(plan, params, 2))
    unknown = by_path(tree.plain(plan, params, 0))
    np.testing.assert_array_equal(found[encoder], expected[encoder])
    np.testing.assert_array_equal(found[decoder], unknown[decoder])
    # Where all is of clusters, tasks of one are evaluated together, the unknown among them.
    rooms = Rooms(SharingConfig(clusters=clusters, levels=levels[:1]))
    plan = make_plan(rooms, ("a", "b1", "c"), golden.config("1.1"))
    assert [plan.evaluation_id(name) for name in ("a", "b1", "c", "b2", "d")] == [1, 2, 1, 2, 0]
    again = from_description(json.loads(json.dumps(plan.describe())), plan.base)
    assert [again.evaluation_id(name) for name in ("a", "b1", "c", "b2", "d")] == [1, 2, 1, 2, 0]
    again.check_description(plan.describe(), "RUN")
    moved = SharingConfig(clusters=clusters | {"c": "y"}, levels=levels[:1])
    other = make_plan(Rooms(moved), ("a", "b1", "c"), golden.config("1.1"))
    with pytest.raises(UserError, match=r"task 'c' in the cluster 'x', this run in 'y'"):
        other.check_description(plan.describe(), "RUN")

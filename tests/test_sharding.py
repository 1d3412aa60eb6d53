"""Every layout of the mesh gives the numbers of one device; mistakes name axis and dimension."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mtl_jax import model, objective, optim, sharding, step
from mtl_jax.errors import UserError
from mtl_jax.sharding import MeshConfig

CFG = golden.config("1.1", num_encoder_layers=1, num_decoder_layers=2)
ADAFACTOR = optim.OptimizerConfig(
    schedule="constant", learning_rate=0.02, min_dim_size_to_factor=8, clip_norm=1.0
)
ADAMW = optim.OptimizerConfig(
    name="adamw", schedule="constant", learning_rate=0.01, weight_decay=0.1
)
STEPS = 3


def batches():
    """Three batches of 16 rows of uneven lengths, two tasks."""
    random = np.random.RandomState(1)
    for _ in range(STEPS):
        real = (np.arange(6)[None] < random.randint(0, 7, (16, 1))).astype(np.int32)
        tokens = random.randint(1, 32, (16, 6)).astype(np.int32) * real
        yield {
            "encoder_input_tokens": random.randint(1, 32, (16, 7)).astype(np.int32),
            "encoder_segment_ids": np.ones((16, 7), np.int32),
            "decoder_input_tokens": np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": tokens,
            "decoder_segment_ids": real,
            "decoder_task_ids": real * random.randint(1, 3, (16, 1)).astype(np.int32),
            "decoder_loss_weights": real.astype(np.float32),
        }


def maker(optimizer):
    return functools.partial(step.init_state, CFG, optim.make_optimizer(optimizer))


@functools.cache
def initial(optimizer):
    """A fresh state made on one device, as numpy."""
    return jax.device_get(jax.jit(maker(optimizer))(jax.random.key(0)))


def shardings(mesh, optimizer):
    shapes = jax.eval_shape(maker(optimizer), jax.random.key(0))
    return sharding.state_shardings(mesh, model.param_axes(CFG), shapes)


def losses(layout, optimizer, microbatches):
    """Loss and losses of the tasks at each step, and the state at the end, in a layout."""
    count = int(np.prod(layout))
    mesh = sharding.make_mesh(MeshConfig(*layout), jax.devices()[:count])
    sharding.validate(mesh, CFG, 16, microbatches)
    places = shardings(mesh, optimizer)
    update = functools.partial(
        step.train_step, CFG, objective.StepConfig(microbatches=microbatches), optimizer, 2
    )
    replicated = sharding.replicated(mesh)
    found = []
    with sharding.on_mesh(mesh):
        rng = jax.device_put(jax.random.key(0), replicated)
        state = jax.device_put(initial(optimizer), places)
        jitted = jax.jit(update, donate_argnums=0, out_shardings=(places, replicated))
        for arrays in batches():
            state, metrics = jitted(state, sharding.put_batch(mesh, arrays), rng)
            found.append([float(metrics["loss"]), *metrics["task_loss_sum"].tolist()])
    return np.array(found), state


@functools.cache
def on_one_device(optimizer):
    return losses((1, 1, 1), optimizer, 1)


def assert_like_one_device(layout, optimizer, microbatches):
    found, state = losses(layout, optimizer, microbatches)
    expected, single = on_one_device(optimizer)
    assert expected[-1, 0] < expected[0, 0] - 0.01  # something has been learned
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    total, single_total = (
        sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(s.params))
        for s in (state, single)
    )
    np.testing.assert_allclose(total, single_total, rtol=1e-5)
    return state


@pytest.mark.parametrize(
    ("layout", "microbatches"),
    [pytest.param((1, 8, 1), 2, marks=pytest.mark.slow), ((1, 1, 2), 1), ((2, 2, 2), 2)],
    ids=str,
)
def test_adafactor_gives_the_same_losses_in_every_layout(layout, microbatches):
    state = assert_like_one_device(layout, ADAFACTOR, microbatches)
    kernel = state.params["encoder"]["layers"]["mlp"]["wo"]["kernel"]  # [layers, mlp, embed]
    shape = (1, 32 // layout[2], 16 // layout[1])
    assert kernel.addressable_shards[0].data.shape == shape


def test_adamw_gives_the_same_losses_on_all_three_axes():
    state = assert_like_one_device((2, 2, 2), ADAMW, 2)
    params = jax.tree.leaves(state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(params)
    for leaf, param in zip(moments, params * 2, strict=True):
        assert leaf.shape == param.shape
        assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)


@pytest.mark.slow  # eight more compilations of axes that the tests above cover
@pytest.mark.parametrize("optimizer", [ADAFACTOR, ADAMW], ids=["adafactor", "adamw"])
@pytest.mark.parametrize("layout", [(4, 2, 1), (2, 1, 2), (1, 4, 2), (8, 1, 1)], ids=str)
def test_more_layouts(layout, optimizer):
    assert_like_one_device(layout, optimizer, 2)


def test_a_state_made_in_place_has_the_numbers_of_one_device():
    """Random numbers do not depend on the layout."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    places = shardings(mesh, ADAFACTOR)
    with sharding.on_mesh(mesh):
        state = jax.jit(maker(ADAFACTOR), out_shardings=places)(jax.random.key(0))
    for made, expected in zip(
        jax.tree.leaves(state), jax.tree.leaves(initial(ADAFACTOR)), strict=True
    ):
        np.testing.assert_allclose(made, expected, rtol=1e-6)


def test_factored_moments_lie_where_their_parameter_lies():
    """v_row lacks the larger axis of its matrix, v_col the other; a stack keeps its layers."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    places = shardings(mesh, ADAFACTOR)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(places.opt_state):
        keys = [str(getattr(e, "key", getattr(e, "name", ""))) for e in path]
        moment = next((k for k in keys if k.startswith("v")), None)
        if moment:
            found["/".join([moment, *keys[keys.index(moment) + 1 :]])] = tuple(leaf.spec)
    # wo: [layers, mlp 32, embed 16] -> [None, tensor, fsdp]
    assert found["v_row/encoder/layers/mlp/wo/kernel"] == (None, "fsdp")
    assert found["v_col/encoder/layers/mlp/wo/kernel"] == (None, "tensor")
    # embedding: [vocab 32, embed 16] -> [tensor, fsdp]
    assert found["v_row/token_embedder/embedding"] == ("fsdp",)
    assert found["v_col/token_embedder/embedding"] == ("tensor",)
    # Not factored: where the scale itself lies.
    assert found["v/encoder/layers/pre_mlp_layer_norm/scale"] == (None, "fsdp")
    kernel = places.params["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert tuple(kernel.spec) == (None, "tensor", "fsdp")


def test_square_matrices_are_told_apart_as_optax_does():
    """With two axes of one size it is their order that says which one v_row lacks."""
    random = np.random.RandomState(0)
    gradient = jnp.asarray(random.randn(2, 16, 16), jnp.float32)
    params = {"encoder": {"layers": {"kernel": gradient}}}
    rule = optim.make_optimizer(ADAFACTOR)
    _, state = rule.update(params, rule.init(params), params)
    moments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = {str(getattr(e, "name", "")) for e in path}
        if leaf.shape == (2, 16):
            moments[next(iter(keys & {"v_row", "v_col"}))] = np.asarray(leaf)
    axes = {
        name: sharding._axes_of_state((2, 16), ("layers", "embed", "mlp"), (2, 16, 16), (name,))
        for name in ("v_row", "v_col")
    }
    clipped = np.asarray(gradient / jnp.linalg.norm(gradient))
    for name, own in axes.items():
        averaged = {("layers", "embed"): 2, ("layers", "mlp"): 1}[own]
        mean = np.square(clipped).mean(axis=averaged)
        np.testing.assert_allclose(moments[name], mean, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_no_array_uses_a_mesh_axis_twice(version):
    arrays = jax.tree.leaves(
        model.param_axes(golden.config(version)), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    activations = [
        ("batch", "length", "embed"),
        ("batch", "length", "mlp"),
        ("batch", "length", "vocab"),
        ("batch", "length", "heads", "kv"),
    ]
    for axes in [*arrays, *activations]:
        used = []
        for entry in sharding.spec(axes):
            used += entry if isinstance(entry, tuple) else [entry] if entry else []
        assert len(used) == len(set(used)), axes
    assert sharding.spec(("batch", "length", "embed"))[0] == ("data", "fsdp")


def test_every_shard_of_a_batch_has_its_rows():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    rows = np.arange(16, dtype=np.int32)[:, None] * np.ones((1, 3), np.int32)
    placed = sharding.put_batch(mesh, {"rows": rows})["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 3)}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2))],
)
def test_one_size_may_be_left_open(sizes, expected):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape[axis] for axis in sharding.AXES) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_says_what_would(sizes):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(MeshConfig(*sizes))
    message = str(caught.value)
    assert f"data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]}" in message
    assert "8 devices" in message
    assert "1, 2, 4, 8" in message


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_impossible_sizes_are_told_at_once(sizes):
    with pytest.raises(UserError, match=rf"Mesh.fsdp = {sizes[1]}"):
        MeshConfig(*sizes)


@pytest.mark.parametrize(
    ("sizes", "changes", "rows", "parts", "words"),
    [
        ((1, 1, 8), {"num_heads": 12}, 8, 1, "Mesh.tensor = 8 does not divide T5.num_heads = 12"),
        ((1, 8, 1), {"emb_dim": 20}, 8, 1, "Mesh.fsdp = 8 .* T5.emb_dim = 20; .* 1, 2, 4, 5, 10"),
        ((1, 1, 8), {"num_heads": 8, "mlp_dim": 36}, 8, 1, "Mesh.tensor = 8 .* T5.mlp_dim = 36"),
        ((1, 1, 8), {"num_heads": 8, "vocab_size": 33}, 8, 1, "T5.vocab_size = 33"),
        ((4, 2, 1), {}, 20, 1, "Data.batch_size = 20 must be a multiple of 8: Mesh.data 4 x"),
        ((8, 1, 1), {}, 8, 2, "multiple of 16: .* x Step.microbatches 2"),
    ],
)
def test_sizes_that_do_not_divide_are_told_before_compiling(sizes, changes, rows, parts, words):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    with pytest.raises(UserError, match=words):
        sharding.validate(mesh, golden.config("1.1", **changes), rows, parts)


class Chip:
    """A device of a slice, as far as meshes look at it."""

    platform, device_kind, process_index = "tpu", "a TPU of the tests", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


def test_data_is_split_over_slices_first(monkeypatch):
    made = []

    def make_mesh(shape, axes, *, axis_types, devices):
        made.append(shape)
        return Mesh(np.array(devices).reshape(shape), axes, axis_types=axis_types)

    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    chips = [Chip(number, number % 2) for number in range(16)]  # in turn, as they need not come
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), chips)
    assert made == [(2, 2, 2)] * 2
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    assert [{chip.slice_index for chip in copy.flat} for copy in mesh.devices] == [
        *({0}, {0}),
        *({1}, {1}),
    ]
    with pytest.raises(UserError, match=r"Mesh\.data = 1 cannot be split over 2 slices.*2, 4, 8"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=-1), chips)
    with pytest.raises(UserError, match=r"Mesh\.slices = 4, but the devices are of 2 slices"):
        sharding.make_mesh(MeshConfig(slices=4), chips)


def test_slices_can_be_told():
    mesh = sharding.make_mesh(MeshConfig(data=-1, tensor=4, slices=2))
    assert [[device.id for device in copy.flat] for copy in mesh.devices] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    with pytest.raises(UserError, match=r"Mesh\.slices = 3 does not divide 8 devices.*1, 2, 4, 8"):
        sharding.make_mesh(MeshConfig(slices=3))
    with pytest.raises(UserError, match=r"Mesh\.slices is positive"):
        MeshConfig(slices=0)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_embeddings_of_copies_of_the_model(sizes):
    """With more tokens in a batch than words each copy sums up its own; the same numbers."""
    table_VD = jnp.asarray(golden.params(CFG)["token_embedder"]["embedding"])
    random = np.random.RandomState(0)
    tokens_BL = random.randint(0, CFG.vocab_size, (16, 40)).astype(np.int32)
    towards_BLD = random.normal(size=(16, 40, CFG.emb_dim)).astype(np.float32)
    assert tokens_BL.size > CFG.vocab_size

    def both(table_VD, tokens_BL, towards_BLD):
        rows, back = jax.vjp(lambda table_VD: model._rows(table_VD, tokens_BL), table_VD)
        return rows, *back(towards_BLD)

    mesh = sharding.make_mesh(MeshConfig(*sizes))
    with sharding.on_mesh(mesh):
        place = lambda *axes: jax.NamedSharding(mesh, sharding.spec(axes))  # noqa: E731
        given = jax.device_put(
            (table_VD, tokens_BL, towards_BLD),
            (place("vocab", "embed"), *[place("batch", "length")] * 2),
        )
        rows_BLD, gradient_VD = jax.jit(both)(*given)
    np.testing.assert_array_equal(rows_BLD, table_VD[tokens_BL])
    expected_VD = np.zeros_like(table_VD)
    np.add.at(expected_VD, tokens_BL, towards_BLD)
    np.testing.assert_allclose(gradient_VD, expected_VD, rtol=1e-5, atol=1e-5)

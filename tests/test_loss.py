"""The chunked loss against the plain one: same numbers, less memory, nothing gathered."""

import dataclasses
import functools
import re

import golden
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import loss, model, objective, sharding
from mtl_jax.errors import UserError
from mtl_jax.sharding import MeshConfig

ROWS, LENGTH = 8, 7
SCALE = 4.0  # what the loss is divided by behind the head; a power of 2, which rounds nothing
HEADS = {"1.1": golden.config("1.1"), "1.0": golden.config("1.0")}  # untied, tied
OBJECTIVES = {
    "plain": {},
    "z-loss": {"z_loss": 0.01},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"z_loss": 0.01, "label_smoothing": 0.1},
}


def head_inputs(cfg, rows=ROWS, length=LENGTH):
    """Parameters, hidden states, targets and weights, some of them 0, one row all 0."""
    random = np.random.RandomState(3)
    weights_BT = random.randint(0, 3, (rows, length)).astype(np.float32)
    weights_BT[1] = 0.0
    return (
        golden.params(cfg),
        random.randn(rows, length, cfg.emb_dim).astype(np.float32),
        random.randint(0, cfg.vocab_size, (rows, length)).astype(np.int32),
        weights_BT,
    )


def head(cfg, chunk, z_loss=0.0, label_smoothing=0.0):
    """(loss, what is told of tokens), gradients to parameters, hidden states and weights."""

    def measure(*inputs):
        total, told = loss.weighted_loss(
            cfg, *inputs, z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk
        )
        return total / SCALE, told

    return jax.value_and_grad(measure, argnums=(0, 1, 3), has_aux=True)


def assert_same(found, expected, rtol=1e-5):
    """Every leaf to `rtol` of its largest entry."""
    paired = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in paired:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        most = float(np.max(np.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * most, err_msg=str(path))


@functools.cache
def plain_head(version, objective):
    cfg = HEADS[version]
    return jax.jit(head(cfg, 0, **OBJECTIVES[objective]))(*head_inputs(cfg))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("version", HEADS)
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(version, objective):
    """24 tokens are 3 of each row: the last slice is filled up."""
    cfg = HEADS[version]
    found = jax.jit(head(cfg, 24, **OBJECTIVES[objective]))(*head_inputs(cfg))
    expected = plain_head(version, objective)
    assert_same(found, expected)
    (total, _), (grads, hidden_grad, _) = expected
    assert total > 1.0
    assert np.abs(hidden_grad[1]).max() == 0.0 < np.abs(hidden_grad[0]).max()
    name = "token_embedder" if version == "1.0" else "decoder"
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads[name])) > 0.01


@pytest.mark.parametrize("chunk", [1, 8, 16, 55, 56, 10_000])
def test_any_size_of_chunk_will_do(chunk):
    """Fewer tokens than rows are one of each row; more than all are all."""
    cfg = HEADS["1.1"]
    found = jax.jit(head(cfg, chunk, **OBJECTIVES["both"]))(*head_inputs(cfg))
    assert_same(found, plain_head("1.1", "both"))


def test_slices_are_as_even_as_they_can_be():
    shapes = {
        chunk: loss._slices(np.zeros((2, 9, 3)), chunk).shape for chunk in (1, 4, 10, 16, 18, 99)
    }
    sizes = {1: (9, 1), 4: (5, 2), 10: (2, 5), 16: (2, 5), 18: (1, 9), 99: (1, 9)}
    assert shapes == {chunk: (count, 2, size, 3) for chunk, (count, size) in sizes.items()}


def test_without_a_gradient_the_loss_is_the_same():
    cfg = HEADS["1.1"]
    found = jax.jit(functools.partial(loss.weighted_loss, cfg, **OBJECTIVES["both"], chunk=24))(
        *head_inputs(cfg)
    )
    (total, told), _ = plain_head("1.1", "both")
    assert_same(found, (SCALE * total, told))


def batch():
    """Eight rows of 1 to 7 target tokens, two tasks, one row of padding only."""
    random = np.random.RandomState(5)
    real = (np.arange(LENGTH)[None] < np.array([7, 1, 4, 0, 2, 6, 3, 1])[:, None]).astype(np.int32)
    tokens = random.randint(1, 32, real.shape).astype(np.int32) * real
    return {
        "encoder_input_tokens": random.randint(1, 32, (ROWS, 5)).astype(np.int32),
        "encoder_segment_ids": np.ones((ROWS, 5), np.int32),
        "decoder_input_tokens": np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": tokens,
        "decoder_segment_ids": real,
        "decoder_task_ids": real * random.randint(1, 3, (ROWS, 1)).astype(np.int32),
        "decoder_loss_weights": real.astype(np.float32),
    }


def step_gradients(cfg, chunk, parts, arrays, params):
    settings = objective.StepConfig(
        microbatches=parts, loss_chunk=chunk, z_loss=1e-3, label_smoothing=0.1
    )
    compute = jax.jit(functools.partial(objective.gradients, cfg, settings, 2))
    return compute(params, arrays, None)


@functools.cache
def small(version):
    return golden.config(version, num_encoder_layers=1, num_decoder_layers=1)


@functools.cache
def plain_step(version):
    cfg = small(version)
    return step_gradients(cfg, 0, 1, batch(), golden.params(cfg))


@pytest.mark.parametrize(("version", "parts"), [("1.1", 1), ("1.1", 2), ("1.0", 2)])
def test_the_gradient_of_a_step_is_the_same_with_chunks(version, parts):
    cfg = small(version)
    found = step_gradients(cfg, 12, parts, batch(), golden.params(cfg))
    assert_same(found, plain_step(version))


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in ((8, 1, 1), (1, 8, 1))), (2, 2, 2)],
    ids=str,
)
def test_the_gradient_of_a_step_is_the_same_on_a_mesh(layout):
    cfg = small("1.1")
    mesh = sharding.make_mesh(MeshConfig(*layout))
    with sharding.on_mesh(mesh):
        params = jax.device_put(golden.params(cfg), places(mesh, cfg))
        found = step_gradients(cfg, 16, 1, sharding.put_batch(mesh, batch()), params)
    assert_same(jax.device_get(found), plain_step("1.1"))


def places(mesh, cfg):
    """Where the parameters live."""
    return jax.tree.map(
        lambda axes: jax.sharding.NamedSharding(mesh, sharding.spec(axes)),
        model.param_axes(cfg),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


@pytest.mark.parametrize("layout", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("version", HEADS)
def test_hidden_states_stay_on_their_device(version, layout):
    """All that is ever gathered is the output kernel, over fsdp; nothing is moved elsewhere."""
    cfg = golden.config(version, vocab_size=64, num_heads=8)
    mesh = sharding.make_mesh(MeshConfig(*layout))
    rows = sharding.batch_sharding(mesh)
    with sharding.on_mesh(mesh):
        inputs = jax.device_put(head_inputs(cfg, 16, 8), (places(mesh, cfg), rows, rows, rows))
        lowered = jax.jit(head(cfg, 32, **OBJECTIVES["both"])).lower(*inputs)
        program = lowered.compile()
    text = program.as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", text)
    assert len(gathered) == text.count(" all-gather(")
    kernel = sorted((cfg.emb_dim, cfg.vocab_size // layout[2]))
    assert all(sorted(map(int, shape.split(","))) == kernel for shape in gathered), gathered
    assert (len(gathered) > 0) == (layout[1] > 1)
    assert " all-to-all(" not in text
    expected = jax.jit(head(cfg, 0, **OBJECTIVES["both"]))(*head_inputs(cfg, 16, 8))
    assert_same(jax.device_get(program(*inputs)), jax.device_get(expected))


def test_temporary_memory_is_at_most_a_quarter():
    """At 4096 tokens and T5's vocabulary, gradients to hidden states and output kernel included."""
    cfg = golden.config("1.1", vocab_size=32128, emb_dim=512)
    params = model.output_params(cfg, model.abstract_params(cfg))
    shaped = functools.partial(jax.ShapeDtypeStruct, (8, 512))
    hidden_BTD = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
    inputs = params, hidden_BTD, shaped(jnp.int32), shaped(jnp.float32)
    plain, chunked = (
        jax.jit(head(cfg, chunk, z_loss=1e-4)).lower(*inputs).compile().memory_analysis()
        for chunk in (0, 512)
    )
    logits = 4096 * 32128 * 4
    assert plain.temp_size_in_bytes >= logits
    assert chunked.temp_size_in_bytes <= plain.temp_size_in_bytes / 4
    assert chunked.temp_size_in_bytes <= logits / 2


def products(jaxpr):
    """Types of (operands, result) of all matrix products in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("version", HEADS)
def test_bfloat16_enters_the_products_and_float32_leaves_them(version):
    cfg = dataclasses.replace(HEADS[version], logits_dtype="bfloat16")
    inputs = head_inputs(cfg)
    for chunk in (0, 24):
        jaxpr = jax.make_jaxpr(head(cfg, chunk))(*inputs)
        assert list(products(jaxpr.jaxpr)) == [("bfloat16", "bfloat16", "float32")] * 3
    found = jax.jit(head(cfg, 24, **OBJECTIVES["both"]))(*inputs)
    assert_same(found, jax.jit(head(cfg, 0, **OBJECTIVES["both"]))(*inputs))
    # bfloat16 has 8 bits: rounding errors of 0.4 % that average out in the sums.
    (total, told), grads = found
    (exact_total, exact), exact_grads = plain_head(version, "both")
    np.testing.assert_allclose(total, exact_total, rtol=2e-3)
    assert 0 < np.max(np.abs(told.loss - exact.loss)) < 0.1
    assert_same(grads, exact_grads, rtol=0.02)
    for leaf, sharp in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        assert np.linalg.norm(leaf - sharp) <= 0.005 * np.linalg.norm(sharp)


def test_a_bfloat16_model_keeps_its_float32_output():
    """Hidden states in bfloat16 are raised before the product, whose gradient they round once."""
    cfg = dataclasses.replace(HEADS["1.1"], dtype="bfloat16")
    params, hidden_BTD, *rest = head_inputs(cfg)
    inputs = params, jnp.asarray(hidden_BTD, jnp.bfloat16), *rest
    jaxpr = jax.make_jaxpr(head(cfg, 24))(*inputs)
    assert list(products(jaxpr.jaxpr)) == [("float32", "float32", "float32")] * 3
    found, expected = (jax.jit(head(cfg, chunk))(*inputs) for chunk in (24, 0))
    assert found[1][1].dtype == jnp.bfloat16
    # One unit of bfloat16 where float32 sums fall on different sides of a boundary.
    assert_same(found, expected, rtol=2.0**-8)
    assert_same(found[1][0], expected[1][0])


def test_wrong_values_name_the_field():
    with pytest.raises(UserError, match=r"Step.loss_chunk must not be negative, got -1; 0 turns"):
        objective.StepConfig(loss_chunk=-1)
    with pytest.raises(UserError, match=r"T5.logits_dtype must be .* got 'float16'"):
        model.T5Config(logits_dtype="float16")

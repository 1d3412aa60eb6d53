"""The model against T5X's golden numbers, zero gradients, and itself by other roads."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import incremental, model, objective, sharding
from mtl_jax.errors import UserError

VERSIONS = ("1.1", "1.0")
LOGITS = {  # version: logits[0, 0, :4], logits[1, 3, :4], sum of absolutes on weighted positions
    "1.1": (
        [-1.02816, 0.65576, 0.91289, -0.02182],
        [0.27818, -0.59158, -0.92258, 0.87301],
        302.614,
    ),
    "1.0": ([2.44418, -0.14661, 0.0045, 0.60594], [-0.99701, 0.23755, 0.72069, -1.23354], 314.776),
}
PACKED_LOSS = {"1.1": 25.83497, "1.0": 25.26467}
SIZES = {"1.1": (52, 13_632), "1.0": (47, 11_072)}
CFG = golden.config("1.1")
PARAMS = golden.params(CFG)
OBJECTIVE = objective.StepConfig()


@functools.cache
def loss_and_gradient(**changes):
    """The summed loss of the golden batch and its gradient, of a variant of CFG."""
    cfg = dataclasses.replace(CFG, **changes)
    measure = lambda params: objective.loss_sum(cfg, OBJECTIVE, 1, params, golden.batch())[0]  # noqa: E731
    return jax.jit(jax.value_and_grad(measure))(PARAMS)


def assert_trees_close(ours, others, rtol):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(others), strict=True
    ):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=str(path))


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_logits(version):
    first, later, total = LOGITS[version]
    logits_BTV = golden.logits(version)
    assert logits_BTV.dtype == np.float32
    np.testing.assert_allclose(logits_BTV[0, 0, :4], first, atol=1e-5)
    np.testing.assert_allclose(logits_BTV[1, 3, :4], later, atol=1e-5)
    weighted = np.abs(logits_BTV) * golden.batch()["decoder_loss_weights"][..., None]
    np.testing.assert_allclose(weighted.sum(), total, rtol=2e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_rows_equal_unpacked_rows(version):
    """Logits of the packed row, through loss and z-loss in numpy, give T5X's golden number."""
    cfg = golden.config(version)
    packed = golden.pack_last_two(golden.batch())
    assert packed["decoder_segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2]]
    assert packed["decoder_input_tokens"].tolist() == [[0, 29, 9, 22, 0, 27]]
    logits_1TV = np.asarray(
        jax.jit(functools.partial(objective.forward, cfg))(golden.params(cfg), packed), np.float64
    )
    targets = packed["decoder_target_tokens"][0]
    log_partition = np.log(np.exp(logits_1TV[0]).sum(-1))
    loss = log_partition - logits_1TV[0][np.arange(len(targets)), targets]
    loss = (loss + 1e-4 * log_partition**2).sum()
    np.testing.assert_allclose(loss, PACKED_LOSS[version], rtol=2e-6)
    unpacked = golden.logits(version)
    np.testing.assert_allclose(logits_1TV[0, :4], unpacked[1, :4], atol=1e-5)
    np.testing.assert_allclose(logits_1TV[0, 4:], unpacked[2, :2], atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_names_and_numbers_of_parameters_are_those_of_t5x(version):
    paths = golden.t5x_paths(golden.config(version))
    sizes = [int(np.prod(shape)) for _, _, shape in paths.values()]
    assert (len(paths), sum(sizes)) == SIZES[version]
    assert paths["decoder/relpos_bias/rel_embedding"][2] == (2, 32)
    assert paths["encoder/layers_1/pre_mlp_layer_norm/scale"][2] == (16,)
    assert paths["decoder/layers_0/self_attention/query/kernel"][2] == (16, 16)
    assert ("encoder/layers_1/mlp/wi_0/kernel" in paths) == (version == "1.1")
    assert ("encoder/layers_1/mlp/wi/kernel" in paths) == (version == "1.0")
    assert ("decoder/logits_dense/kernel" in paths) == (version == "1.1")


@pytest.mark.parametrize(
    ("published", "d_model", "d_ff", "heads", "layers"),
    [(76_961_152, 512, 1024, 6, 8), (247_577_856, 768, 2048, 12, 12)],
    ids=["small", "base"],
)
def test_published_sizes_of_t5_1_1(published, d_model, d_ff, heads, layers):
    cfg = model.T5Config(
        emb_dim=d_model,
        mlp_dim=d_ff,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
    )
    counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.abstract_params(cfg)))
    attention, mlp = 4 * d_model * heads * 64, 3 * d_model * d_ff
    encoder_layer, decoder_layer = attention + mlp + 2 * d_model, 2 * attention + mlp + 3 * d_model
    embeddings, biases, norms = 2 * 32128 * d_model, 2 * 32 * heads, 2 * d_model
    formula = layers * (encoder_layer + decoder_layer) + embeddings + biases + norms
    assert counted == formula == published


def test_initial_scales():
    """Mesh TensorFlow's: the query carries the 1/sqrt(K) that T5's logits lack."""
    cfg = dataclasses.replace(CFG, vocab_size=512, emb_dim=64, mlp_dim=256, num_heads=4)
    params = jax.jit(functools.partial(model.init, cfg))(jax.random.key(0))
    layers = params["encoder"]["layers"]
    expected = {
        1.0: params["token_embedder"]["embedding"],
        1 / np.sqrt(64 * 8): layers["attention"]["query"]["kernel"],
        1 / np.sqrt(64): layers["attention"]["value"]["kernel"],
        1 / np.sqrt(32): layers["attention"]["out"]["kernel"],
        1 / np.sqrt(256): layers["mlp"]["wo"]["kernel"],
    }
    for scale, leaf in expected.items():
        np.testing.assert_allclose(np.std(leaf), scale, rtol=0.05)
    np.testing.assert_array_equal(layers["pre_mlp_layer_norm"]["scale"], 1.0)
    # Every layer of a stack has its own values.
    assert not np.allclose(*layers["mlp"]["wo"]["kernel"])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_parameter_has_its_logical_axes(version):
    cfg = golden.config(version)
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    shapes, axes = model.abstract_params(cfg), model.param_axes(cfg)
    known = {name for name, _ in sharding.RULES}
    ranks = jax.tree.map(lambda leaf: leaf.ndim, shapes)
    assert ranks == jax.tree.map(len, axes, is_leaf=is_axes)
    for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes):
        assert set(names) <= known, path
        assert (names[0] == "layers") == any(entry.key == "layers" for entry in path), path
    assert axes["decoder"]["layers"]["mlp"]["wo"]["kernel"] == ("layers", "mlp", "embed")


def test_gradient_by_finite_differences():
    """Along a random direction: (loss(p + e d) - loss(p - e d)) / 2e = gradient . d."""
    value, gradient = loss_and_gradient()
    np.testing.assert_allclose(value, 50.8338, rtol=2e-6)
    random = np.random.RandomState(0)
    direction = jax.tree.map(lambda p: random.randn(*p.shape).astype(np.float32), PARAMS)
    measure = jax.jit(
        lambda params: objective.loss_sum(CFG, OBJECTIVE, 1, params, golden.batch())[0]
    )
    small = 1e-3
    ahead, behind = (
        measure(jax.tree.map(lambda p, d: p + sign * small * d, PARAMS, direction))  # noqa: B023
        for sign in (1, -1)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.vdot(g, d), gradient, direction)))
    np.testing.assert_allclose((ahead - behind) / (2 * small), slope, rtol=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"remat": "minimal"},
        {"remat": "full"},
        {"remat": "full", "scan_layers": False},
    ],
    ids=str,
)
def test_scan_and_remat_change_no_number(changes):
    value, gradient = loss_and_gradient(**changes)
    plain_value, plain_gradient = loss_and_gradient()
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    assert_trees_close(gradient, plain_gradient, rtol=2e-5)


def test_remat_recomputes():
    """The full policy keeps less for the backward pass: its gradient holds more matrix products."""

    def products(remat):
        cfg = dataclasses.replace(CFG, remat=remat)
        measure = lambda p: objective.loss_sum(cfg, OBJECTIVE, 1, p, golden.batch())[0]  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(measure))(PARAMS)).count("dot_general")

    assert products("none") <= products("minimal") < products("full")


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    logits_BTV = jax.jit(functools.partial(objective.forward, cfg))(PARAMS, golden.batch())
    assert logits_BTV.dtype == jnp.float32
    exact_BTV = golden.logits("1.1")
    weights = golden.batch()["decoder_loss_weights"] > 0
    error = np.abs(np.asarray(logits_BTV) - exact_BTV)[weights]
    # bfloat16 has 8 bits: 0.4 % for each rounding, and some tens of roundings on the way.
    assert 0 < error.max() < 0.1 * np.abs(exact_BTV[weights]).max()
    assert error.mean() < 0.02
    for tree in (
        model.abstract_params(cfg),
        jax.eval_shape(
            jax.grad(lambda p: objective.loss_sum(cfg, OBJECTIVE, 1, p, golden.batch())[0]), PARAMS
        ),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}


def test_dropout_is_off_by_default_and_drawn_from_the_rng():
    cfg = dataclasses.replace(CFG, dropout_rate=0.5)
    dropped = jax.jit(functools.partial(objective.forward, cfg))
    batch = golden.batch()
    np.testing.assert_array_equal(dropped(PARAMS, batch), golden.logits("1.1"))
    one, again, other = (dropped(PARAMS, batch, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - golden.logits("1.1")).max() > 0.1
    assert np.all(np.isfinite(one))


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        ("1.1", {"scan_layers": True}),
        ("1.1", {"scan_layers": False, "relpos_per_layer": True}),
        ("1.0", {"scan_layers": False}),
        ("1.0", {"scan_layers": True, "relpos_per_layer": True, "num_encoder_layers": 3}),
    ],
    ids=str,
)
def test_cached_decoding_equals_the_parallel_forward(version, changes):
    cfg, batch = golden.config(version, **changes), golden.batch()
    params = golden.params(cfg)
    inputs = jnp.asarray(batch["decoder_input_tokens"])

    @jax.jit
    def start(params):
        segments = batch["encoder_segment_ids"]
        encoded = model.encode(cfg, params, batch["encoder_input_tokens"], segments)
        weights = incremental.prepare(cfg, params)
        cache = incremental.start_cache(cfg, weights, encoded, segments, inputs.shape[1] + 2)
        return weights, cache

    @jax.jit
    def advance(weights, cache, tokens_B, position):
        logits_B1V, cache = incremental.decode_step(
            cfg, weights, cache, tokens_B[:, None], position
        )
        return logits_B1V[:, 0], cache

    (weights, cache), steps = start(params), []
    for position in range(inputs.shape[1]):
        logits_BV, cache = advance(weights, cache, inputs[:, position], jnp.int32(position))
        steps.append(logits_BV)
    weighted = batch["decoder_loss_weights"] > 0
    whole = jax.jit(functools.partial(objective.forward, cfg))(params, batch)
    np.testing.assert_allclose(np.stack(steps, axis=1)[weighted], whole[weighted], atol=2e-5)


def test_layers_apart_encode_the_same():
    for changes in ({}, {"relpos_per_layer": True}):
        cfg, batch = golden.config("1.1", **changes), golden.batch()
        params = golden.params(cfg)
        encode = jax.jit(functools.partial(model.encode, cfg))
        args = (batch["encoder_input_tokens"], batch["encoder_segment_ids"])
        apart = encode(model.unstack_encoder(cfg, params), *args)
        np.testing.assert_allclose(apart, encode(params, *args), atol=2e-6)


def test_a_bias_of_each_layer_is_its_own():
    """umT5: the same tables in all layers are T5's shared one; other tables are another model."""
    shared, batch = golden.params(CFG), golden.batch()
    cfg = dataclasses.replace(CFG, relpos_per_layer=True)
    params = jax.tree.map(lambda leaf: leaf, shared)
    for side in ("encoder", "decoder"):
        table = params[side].pop("relpos_bias")["rel_embedding"]
        params[side]["layers"]["relpos_bias"] = {"rel_embedding": np.stack([table, table])}
    forward = jax.jit(functools.partial(objective.forward, cfg))
    np.testing.assert_allclose(forward(params, batch), golden.logits("1.1"), atol=2e-5)
    for side in ("encoder", "decoder"):
        params[side]["layers"]["relpos_bias"]["rel_embedding"][1] += (
            np.float32([[1.0], [-1.0]]) * (np.arange(32, dtype=np.float32)[None])
        )
        changed = forward(params, batch)
        assert np.abs(changed - golden.logits("1.1")).max() > 0.1
    gradient = jax.jit(jax.grad(lambda p: objective.loss_sum(cfg, OBJECTIVE, 1, p, batch)[0]))(
        params
    )
    tables = gradient["decoder"]["layers"]["relpos_bias"]["rel_embedding"]
    assert np.all(np.any(tables != 0.0, axis=(1, 2)))


def test_rescaling_is_apart_from_tying():
    batch = golden.batch()
    for version in VERSIONS:
        scaled, plain = (golden.config(version, rescale_logits=on) for on in (True, False))
        params = golden.params(scaled)
        found = [
            jax.jit(functools.partial(objective.forward, c))(params, batch) for c in (scaled, plain)
        ]
        np.testing.assert_allclose(
            found[0] * np.sqrt(scaled.emb_dim), found[1], rtol=1e-5, atol=1e-5
        )
        assert golden.config(version).rescale_logits == golden.config(version).logits_via_embedding


ENCODER_SEGMENTS = np.array([1, 1, 1, 2, 2, 2, 0, 0], np.int32)
DECODER_SEGMENTS = np.array([1, 1, 1, 2, 2, 0, 0], np.int32)


@pytest.mark.parametrize(
    ("version", "changes"),
    [("1.1", {}), ("1.1", {"relpos_per_layer": True}), ("1.0", {"num_encoder_layers": 3})],
    ids=str,
)
def test_what_a_position_sees_by_exactly_zero_gradients(version, changes):
    """Every position has a token of its own, so a row of the embedding's gradient is a position."""
    cfg = golden.config(version, **changes)
    whole = golden.params(cfg)
    encoder_L = np.arange(len(ENCODER_SEGMENTS), dtype=np.int32) + 1
    decoder_T = np.arange(len(DECODER_SEGMENTS), dtype=np.int32) + 15
    direction_D = np.random.RandomState(0).randn(cfg.emb_dim).astype(np.float32)

    def outputs(embedding_VD):
        params = whole | {"token_embedder": {"embedding": embedding_VD}}
        encoded = model.encode(cfg, params, encoder_L[None], ENCODER_SEGMENTS[None])
        hidden = model.decode(
            cfg,
            params,
            encoded,
            decoder_T[None],
            segments_BT=DECODER_SEGMENTS[None],
            cross_segments_BT=DECODER_SEGMENTS[None],
            encoder_segments_BL=ENCODER_SEGMENTS[None],
        )
        return encoded[0] @ direction_D, hidden[0] @ direction_D

    by_encoder, by_decoder = jax.jit(jax.jacrev(outputs))(whole["token_embedder"]["embedding"])
    sees = [np.any(np.asarray(jacobian) != 0.0, axis=-1) for jacobian in (by_encoder, by_decoder)]

    def same_segment(queries, keys):
        return (queries[:, None] == keys[None]) & (keys[None] > 0)

    encoder_self = same_segment(ENCODER_SEGMENTS, ENCODER_SEGMENTS)
    # The residual stream: a position always sees itself.
    np.testing.assert_array_equal(sees[0][:, encoder_L], encoder_self | np.eye(8, dtype=bool))
    assert not sees[0][:, decoder_T].any()
    causal = np.tril(np.ones((7, 7), bool)) & same_segment(DECODER_SEGMENTS, DECODER_SEGMENTS)
    np.testing.assert_array_equal(sees[1][:, decoder_T], causal | np.eye(7, dtype=bool))
    np.testing.assert_array_equal(
        sees[1][:, encoder_L], same_segment(DECODER_SEGMENTS, ENCODER_SEGMENTS)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 0}, "T5.num_heads must be at least 1, got 0"),
        ({"vocab_size": -3}, "T5.vocab_size must be at least 1"),
        ({"mlp_activations": ("gelo", "linear")}, "T5.mlp_activations: .*Did you mean 'gelu'"),
        ({"mlp_activations": ()}, r"T5.mlp_activations must be .* got \(\)"),
        ({"mlp_activations": ("gelu",) * 3}, "T5.mlp_activations must be a list of one"),
        ({"mlp_activations": "relu"}, "T5.mlp_activations must be .* got 'relu'"),
        ({"relpos_buckets": 2}, "T5.relpos_buckets must be even and at least 4, got 2"),
        ({"relpos_buckets": 33}, "T5.relpos_buckets must be even and at least 4, got 33"),
        (
            {"relpos_max_distance": 16},
            r"T5.relpos_max_distance .* T5.relpos_buckets \(16\), got 16",
        ),
        ({"remat": "all"}, "T5.remat must be one of none, minimal, full, got 'all'"),
        ({"dtype": "float16"}, "T5.dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"dropout_rate": 1.0}, r"T5.dropout_rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_shapes_name_the_field(values, message):
    with pytest.raises(UserError, match=message):
        model.T5Config(**values)

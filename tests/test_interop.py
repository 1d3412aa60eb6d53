"""Reading checkpoints of Hugging Face and T5X: names, fields, formats, and the same numbers."""

import json
from pathlib import Path

import flax.serialization
import golden
import hf_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import t5x_files
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import interop, model, objective
from mtl_jax.errors import UserError
from mtl_jax.interop import convert, hf, hf_config
from mtl_jax.interop.source import by_path, pieces

PLACE = Path("config.json")


def params_of(source: interop.Source) -> model.Params:
    return interop.load_params(source, model.abstract_params(source.config))


def assert_same(params: model.Params, expected: model.Params) -> None:
    assert by_path(params).keys() == by_path(expected).keys()
    for path, x in by_path(params).items():
        np.testing.assert_array_equal(x, by_path(expected)[path], err_msg="/".join(path))


# ---------------------------------------------------------------------------------------------
# Hugging Face: fields and tying
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "scaled"),
    [
        ("t5", {}, True),
        ("t5", {"tie_word_embeddings": False}, False),
        ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ("t5", {"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
        ("mt5", {}, False),
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "4.30.0"}, True),
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.1.0"}, False),
        ("umt5", {}, True),
        ("umt5", {"tie_word_embeddings": False}, False),
    ],
)
def test_scaling_is_what_the_writing_version_meant(kind, fields, scaled):
    values = hf_folders.CONFIGS[{"t5": "t5", "mt5": "mt5", "umt5": "umt5"}[kind]] | fields
    if "tie_word_embeddings" not in fields:
        values.pop("tie_word_embeddings", None)
    for tied in (False, True):
        cfg = hf_config.to_ours(values, PLACE, tied=tied)
        assert cfg.rescale_logits is scaled
        assert cfg.logits_via_embedding is tied
        # What is written says the same when it is read again.
        again, _ = hf_config.from_ours(cfg, values, "float32")
        assert hf_config.to_ours(again, PLACE, tied=tied) == cfg
        fresh, _ = hf_config.from_ours(cfg, None, "float32")
        assert hf_config.to_ours(fresh, PLACE, tied=tied) == cfg


def test_notes_on_what_transformers_will_do():
    def notes(kind: str, **fields: bool) -> list[str]:
        values = hf_folders.CONFIGS[kind]
        tied = fields.pop("tied")
        return hf_config.from_ours(
            hf_config.to_ours(values | fields, PLACE, tied=tied), values, "float32"
        )[1]

    assert notes("t5", tied=True) == []
    assert notes("t5_1_1", tied=False) == []
    assert (
        "transformers 5 does so in every umT5"
        in notes("umt5", tied=False, tie_word_embeddings=False)[0]
    )
    assert "only transformers 5 can tell apart" in notes("t5", tied=False)[0]


def test_other_fields_of_the_original_stay_and_sizes_follow_the_model():
    original = hf_folders.CONFIGS["mt5"] | {"n_positions": 512, "vocab_size": 1, "num_layers": 9}
    cfg = hf_config.to_ours(hf_folders.CONFIGS["mt5"], PLACE, tied=False)
    values, _ = hf_config.from_ours(cfg, original, "float32")
    assert values["n_positions"] == 512
    assert (values["vocab_size"], values["num_layers"]) == (24, 2)
    assert values["architectures"] == ["MT5ForConditionalGeneration"]
    assert values["tie_word_embeddings"] is False


def test_a_missing_distance_and_depth_are_the_defaults_of_transformers():
    values = {
        name: value
        for name, value in hf_folders.CONFIGS["t5"].items()
        if name not in ("relative_attention_max_distance", "num_decoder_layers")
    }
    cfg = hf_config.to_ours(values, PLACE, tied=True)
    assert (cfg.relpos_max_distance, cfg.num_decoder_layers) == (128, 2)


def test_tying_is_decided_by_the_tensors(tmp_path):
    arrays = hf_folders.tensors("t5_1_1")
    config = hf_folders.CONFIGS["t5_1_1"] | {"tie_word_embeddings": True}
    untied = interop.open_source(hf_folders.write(tmp_path / "untied", config, arrays))
    assert not untied.config.logits_via_embedding
    assert "lm_head.weight differs from shared.weight" in untied.notes[0]
    config["transformers_version"] = "5.2.0"  # which writes `true` always
    assert not interop.open_source(hf_folders.write(tmp_path / "v5", config, arrays)).notes
    arrays["lm_head.weight"] = arrays["shared.weight"].copy()
    tied = interop.open_source(hf_folders.write(tmp_path / "tied", config, arrays))
    assert tied.config.logits_via_embedding
    convert.convert(tied, tmp_path / "out", "hf")
    assert "lm_head.weight" not in hf_folders.read(tmp_path / "out")


def test_tensors_that_say_nothing_new_are_dropped(tmp_path):
    arrays = hf_folders.tensors("t5")
    arrays["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones(
        (8, 2), np.float32
    )
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"].copy()
    arrays["decoder.embed_tokens.weight"] = arrays["shared.weight"].copy()
    expected = arrays["shared.weight"]
    for number in range(2):
        made = hf_folders.write(tmp_path / str(number), hf_folders.CONFIGS["t5"], arrays)
        source = interop.open_source(made)
        assert source.config.logits_via_embedding
        np.testing.assert_array_equal(source.read(("token_embedder", "embedding"), None), expected)
        arrays.pop("shared.weight", None)  # transformers keeps one name of several


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    arrays = {name: x.astype(dtype) for name, x in hf_folders.tensors("umt5").items()}
    source = interop.open_source(
        hf_folders.write(tmp_path / "made", hf_folders.CONFIGS["umt5"], arrays)
    )
    for path, layer, shape in pieces(source.config):
        x = source.read(path, layer)
        expected = arrays[hf.tensor_name(path, layer)].astype(np.float32)
        assert x.dtype == np.float32
        assert x.shape == shape
        np.testing.assert_array_equal(x, expected.T if hf.is_transposed(path) else expected)


def test_parameters_go_where_they_shall(tmp_path):
    source = interop.open_source(hf_folders.make(tmp_path / "made", "t5"))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*[None] * (len(leaf.shape) - 1), "b")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    abstract = jax.tree.map(place, model.abstract_params(source.config))
    params = interop.load_params(source, abstract)
    exact = params_of(source)
    for path, x in by_path(params).items():
        assert x.sharding == by_path(abstract)[path].sharding
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, by_path(exact)[path].astype(jnp.bfloat16))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(exact))


# ---------------------------------------------------------------------------------------------
# T5X
# ---------------------------------------------------------------------------------------------

PER_LAYER = {"relpos_per_layer": True, "rescale_logits": False}
MODELS = {
    "1.0": golden.config("1.0"),
    "1.1": golden.config("1.1", num_encoder_layers=3, num_decoder_layers=1),
    "umt5": golden.config("1.1", **PER_LAYER),
}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zarr", [True, False])
@pytest.mark.parametrize(
    ("stacked", "heads_apart"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize("version", MODELS)
def test_t5x_is_read_in_all_its_forms(tmp_path, version, stacked, heads_apart, zarr, wrapped):
    cfg, params = MODELS[version], golden.params(MODELS[version])
    target = t5x_files.target(cfg, params, stacked=stacked, heads_apart=heads_apart)
    source = interop.open_source(
        t5x_files.write(tmp_path / "made", target, zarr=zarr, wrapped=wrapped)
    )
    assert source.config == cfg
    assert source.step == 7
    assert_same(params_of(source), params)
    assert "T5.relpos_max_distance is taken as 128" in source.notes[0]


def test_t5x_of_large_arrays_and_bfloat16(tmp_path, monkeypatch):
    cfg, params = MODELS["1.1"], golden.params(MODELS["1.1"])
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 300)
    for stacked in (True, False):
        target = t5x_files.target(cfg, params, stacked=stacked)
        source = interop.open_source(t5x_files.write(tmp_path / f"chunks_{stacked}", target))
        assert_same(params_of(source), params)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    made = t5x_files.write(tmp_path / "rounded", t5x_files.target(cfg, rounded, stacked=True))
    expected = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    assert_same(params_of(interop.open_source(made)), expected)


def test_t5x_options_and_both_ways_out(tmp_path):
    cfg, params = MODELS["1.1"], golden.params(MODELS["1.1"])
    made = t5x_files.write(
        tmp_path / "made", t5x_files.target(cfg, params, stacked=True), zarr=True
    )
    options = {"relpos_max_distance": 64, "mlp_activations": ("silu", "linear")}
    source = interop.open_source(made, t5x_options=options)
    assert source.config.relpos_max_distance == 64
    assert source.config.mlp_activations == ("silu", "linear")
    for to in ("hf", "mtl_jax"):
        convert.convert(source, tmp_path / to, to)
        back = interop.open_source(tmp_path / to)
        assert back.config == source.config
        assert_same(params_of(back), params)


def _bad_t5x(tmp_path: Path, case: str) -> Path:
    cfg = MODELS["1.1"]
    target = t5x_files.target(cfg, golden.params(cfg), stacked=False)
    layer = target["encoder"]["layers_1"]
    if case == "shape":
        layer["mlp"]["wo"]["kernel"] = np.zeros((32, 15), np.float32)
    elif case == "missing":
        del layer["attention"]["key"]
    elif case == "unknown":
        layer["adapter"] = {"kernel": np.zeros((3, 4), np.float32)}
    elif case == "no T5":
        del target["encoder"]["relpos_bias"]
    elif case == "no array":
        layer["mlp"]["wo"]["kernel"] = "a text"
    made = t5x_files.write(tmp_path / "made", target, zarr=case in ("zarr", "chunk"))
    file = made / "checkpoint"
    if case == "cut off":
        file.write_bytes(file.read_bytes()[:9000])
    elif case == "damaged":
        file.write_bytes(file.read_bytes().replace(b"\xa7float32", b"\xa7floot32", 20))
    elif case == "zarr":
        name = made / "target.encoder.layers_1.mlp.wo.kernel"
        name.rename(tmp_path / "elsewhere")
    elif case == "chunk":
        (made / "target.encoder.layers_1.mlp.wo.kernel/1.1").unlink()
    return made


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shape", "tensor encoder/layers_1/mlp/wo/kernel is 32x15, .* it must be 32x16"),
        ("missing", r"tensor encoder/layers_1/attention/key/kernel \(16x16\) is missing"),
        ("unknown", r"tensor encoder/layers_1/adapter/kernel \(3x4\) is unknown"),
        ("no T5", "tensor encoder/relpos_bias/rel_embedding is missing"),
        ("no array", "tensor encoder/layers_1/mlp/wo/kernel is no array but 'a text'"),
        ("cut off", "is cut off after 9000 bytes, within tensor optimizer/target/.*kernel"),
        ("damaged", "is damaged, or no msgpack file of flax: .* at optimizer/target/"),
        ("zarr", "layers_1.mlp.wo.kernel is missing, where tensor encoder/layers_1/mlp/wo/kernel"),
        ("chunk", r"tensor encoder/layers_1/mlp/wo/kernel \(32x16\) cannot be read"),
    ],
)
def test_bad_t5x_is_told(tmp_path, case, message):
    made = _bad_t5x(tmp_path, case)
    with pytest.raises(UserError, match=message):
        convert.convert(interop.open_source(made), tmp_path / "out", "mtl_jax")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.data
@pytest.mark.parametrize("name", ["t5x_tiny_legacy/checkpoint_0", "t5x_tiny_zarr/checkpoint_3"])
def test_t5x_files_of_t5x_itself(data_folder, name):
    path = data_folder / "checkpoints" / name
    source = interop.open_source(path)
    assert source.step == int(name[-1])
    file = path / "checkpoint" if path.is_dir() else path
    tree = flax.serialization.msgpack_restore(file.read_bytes())["optimizer"]["target"]
    for piece_path, layer, shape in pieces(source.config):
        x = source.read(piece_path, layer)
        assert x.shape == shape
        expected = tree
        for key in source.name(piece_path, layer).split("/"):
            expected = expected[key]
        if isinstance(expected, dict):  # in a zarr directory
            assert tuple(expected["metadata"]["shape"]) == shape
            assert np.isfinite(x).all()
            assert x.std() > 0
        else:
            np.testing.assert_array_equal(x, expected)


# ---------------------------------------------------------------------------------------------
# Which format
# ---------------------------------------------------------------------------------------------


def test_detect(tmp_path):
    made = hf_folders.make(tmp_path / "made", "t5")
    assert interop.detect(made) == "hf"
    convert.convert(interop.open_source(made), tmp_path / "ours", "mtl_jax")
    for place in ("ours", "ours/checkpoints", "ours/checkpoints/0"):
        assert interop.detect(tmp_path / place) == "mtl_jax"
    cfg = MODELS["1.0"]
    t5x = t5x_files.write(
        tmp_path / "checkpoint_7", t5x_files.target(cfg, golden.params(cfg), stacked=False)
    )
    assert interop.detect(t5x) == "t5x"
    assert interop.detect(t5x / "checkpoint") == "t5x"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "a folder with nothing"),
        (("a.txt", "b.txt"), "a folder with a.txt, b.txt"),
        (("checkpoint", "model.ckpt-1000.index"), "is a checkpoint of TensorFlow"),
        (("weights.safetensors",), "holds weights.safetensors, but no config.json"),
        (("checkpoint_10", "checkpoint_9"), "name one, such as .*checkpoint_9"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("model_checkpoint_path: x")
    with pytest.raises(UserError, match=message):
        interop.detect(tmp_path)


def test_other_paths(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        interop.detect(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="a file of another kind"):
        interop.detect(tmp_path / "text")
    with pytest.raises(UserError, match="has no steps to choose from"):
        interop.open_source(hf_folders.make(tmp_path / "made", "t5"), step=3)


# ---------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("family", hf_folders.CONFIGS)
def test_the_numbers_of_transformers(family):
    """Logits, loss and every gradient, in padded rows and packed ones."""
    import hf_models
    import torch

    theirs = hf_models.tiny(family)
    cfg, params = hf_models.ours(theirs)
    assert sum(x.size for x in jax.tree.leaves(params)) == theirs.num_parameters()
    rows = golden.batch()
    packed = golden.pack_last_two(rows)
    for batch, chosen in ((rows, slice(0, 3)), (packed, slice(1, 3))):
        part = {name: x[chosen] for name, x in rows.items()}
        targets = torch.tensor(part["decoder_target_tokens"]).long()
        theirs.zero_grad()
        out = theirs(
            input_ids=torch.tensor(part["encoder_input_tokens"]),
            attention_mask=torch.tensor(part["encoder_segment_ids"]),
            decoder_input_ids=torch.tensor(part["decoder_input_tokens"]),
            labels=targets.masked_fill(targets == 0, -100),
        )
        out.loss.backward()
        expected = out.logits.detach().numpy()[part["decoder_segment_ids"] > 0]
        assert 5 < expected.std() < 50
        logits = objective.forward(cfg, params, batch)[batch["decoder_segment_ids"] > 0]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)

        grads, sums = objective.gradients(cfg, objective.StepConfig(), 1, params, batch, None)
        loss = sums["task_loss_sum"].sum() / sums["task_tokens"].sum()
        np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-4)
        named = dict(theirs.named_parameters())
        for path, layer, _ in pieces(cfg):
            mine = by_path(grads)[path]
            mine = np.asarray(mine if layer is None else mine[layer])
            other = named[hf.tensor_name(path, layer)].grad.numpy()
            other = other.T if hf.is_transposed(path) else other
            difference = np.linalg.norm(mine - other)
            assert difference <= 1e-4 * np.linalg.norm(other), (path, layer)


@pytest.mark.torch
@pytest.mark.parametrize("family", hf_folders.CONFIGS)
def test_transformers_reads_what_we_write(tmp_path, family):
    import hf_models
    import torch
    import transformers

    theirs = hf_models.tiny(family)
    theirs.save_pretrained(tmp_path / "made", max_shard_size="20KB")
    assert (tmp_path / "made" / hf.INDEX).is_file()
    convert.convert(interop.open_source(tmp_path / "made"), tmp_path / "ours", "mtl_jax")
    for name in ("original", "fresh"):
        source = interop.open_source(tmp_path / "ours")
        if name == "fresh":  # as of a training run, which has no config.json
            source.documents = {}
        convert.convert(source, tmp_path / name, "hf")
        back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == "float32"
        state = back.state_dict()
        for key, x in theirs.state_dict().items():
            assert torch.equal(state[key], x), key
        tokens = torch.tensor([[3, 9, 4, 1]])
        with torch.no_grad():
            assert torch.equal(
                back(input_ids=tokens, decoder_input_ids=tokens).logits,
                theirs(input_ids=tokens, decoder_input_ids=tokens).logits,
            )

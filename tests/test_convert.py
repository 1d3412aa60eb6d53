"""`mtl-jax convert`: round trips, runs, and mistakes that leave nothing behind."""

import json
import shutil
from pathlib import Path

import golden
import hf_folders
import jax
import numpy as np
import pytest

from mtl_jax import cli, config, interop, model, optim, step
from mtl_jax.checkpoint import Checkpointer
from mtl_jax.errors import UserError
from mtl_jax.interop import convert, hf
from mtl_jax.interop.source import pieces

TINY = model.T5Config(
    vocab_size=24, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=10, relpos_buckets=8,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


def run(*words: str | Path) -> int:
    return cli.main(["convert", *map(str, words)])


@pytest.mark.parametrize("family", hf_folders.CONFIGS)
def test_round_trip_is_exact(tmp_path, family):
    made = hf_folders.make(tmp_path / "made", family)
    assert run(made, tmp_path / "ours", "--to", "mtl_jax") == 0
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "hf") == 0
    before, after = hf_folders.read(made), hf_folders.read(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert after[name].dtype == np.float32
        assert after[name].tobytes() == x.tobytes(), name
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written.items() >= hf_folders.CONFIGS[family].items()
    for name in ("spiece.model", "tokenizer_config.json", "generation_config.json"):
        assert json_or_bytes(tmp_path / "back" / name) == json_or_bytes(made / name)
    assert {path.name for path in tmp_path.iterdir()} == {"made", "ours", "back"}


def json_or_bytes(path: Path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def test_a_run_reads_what_was_converted(tmp_path):
    made = hf_folders.make(tmp_path / "made", "t5_1_1")
    run(made, tmp_path / "ours", "--to", "mtl_jax")
    cfg = config.load([str(tmp_path / "ours/model.gin")]).model
    assert cfg == interop.open_source(tmp_path / "ours").config
    assert (cfg.vocab_size, cfg.head_dim, cfg.relpos_max_distance) == (24, 3, 20)
    assert not cfg.logits_via_embedding
    assert not cfg.rescale_logits
    with Checkpointer(tmp_path / "ours/checkpoints", read_only=True) as checkpointer:
        params, meta = checkpointer.restore_parameters(None, model.abstract_params(cfg))
    assert meta["task_ids"] == {}
    there = hf_folders.read(made)
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], there["shared.weight"])
    wo = params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    for layer in range(2):
        name = f"decoder.block.{layer}.layer.2.DenseReluDense.wo.weight"
        np.testing.assert_array_equal(wo[layer], there[name].T)
    key = params["encoder"]["layers"]["attention"]["key"]["kernel"]
    np.testing.assert_array_equal(key[1], there["encoder.block.1.layer.0.SelfAttention.k.weight"].T)


def test_shards_are_read_and_written(tmp_path):
    made = hf_folders.make(tmp_path / "made", "umt5", shards=3)
    run(made, tmp_path / "ours", "--to", "mtl_jax")
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "hf", "--max_shard_size", "2KB") == 0
    index = json.loads((tmp_path / "back" / hf.INDEX).read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    before, after = hf_folders.read(made), hf_folders.read(tmp_path / "back")
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in before.values())
    for path in files:
        data = sum(x.nbytes for x in hf_folders.read_file(path).values())
        assert data <= 2000 or len(hf_folders.read_file(path)) == 1
    for name, x in before.items():
        assert after[name].tobytes() == x.tobytes(), name


def test_bfloat16_is_rounded_to_nearest(tmp_path):
    import ml_dtypes

    made = hf_folders.make(tmp_path / "made", "t5")
    assert run(made, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16") == 0
    before, back = interop.open_source(made), interop.open_source(tmp_path / "half")
    for path, layer, _ in pieces(back.config):
        expected = before.read(path, layer).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(back.read(path, layer), expected)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = hf_folders.read(tmp_path / "half")
    assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}


def parameters(number: int) -> model.Params:
    return jax.tree.map(lambda x: x * np.float32(number), golden.params(TINY))


@pytest.fixture(scope="module")
def training_run(tmp_path_factory) -> Path:
    """A run directory with steps 3 and 5, of other parameters."""
    folder = tmp_path_factory.mktemp("run")
    optimizer = optim.make_optimizer(optim.OptimizerConfig(name="adamw"))
    with Checkpointer(folder / "checkpoints") as checkpointer:
        for number in (3, 5):
            params = jax.tree.map(jax.numpy.asarray, parameters(number))
            state = step.TrainState(jax.numpy.int32(number), params, optimizer.init(params))
            meta = {"model": json.loads(json.dumps(vars(TINY))), "task_ids": {"a": 1}}
            checkpointer.save(number, state, {}, meta)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(b"words")
    return folder


@pytest.mark.parametrize(
    ("words", "number"),
    [([""], 5), (["", "--step", "3"], 3), (["checkpoints/3"], 3), (["checkpoints"], 5)],
)
def test_a_step_of_a_run_becomes_hugging_face(tmp_path, training_run, words, number):
    assert run(training_run / words[0], tmp_path / "out", "--to", "hf", *words[1:]) == 0
    params = parameters(number)
    out = hf_folders.read(tmp_path / "out")
    expected = params["encoder"]["layers"]["mlp"]["wi_1"]["kernel"][1].T
    np.testing.assert_array_equal(
        out["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"], expected
    )
    np.testing.assert_array_equal(
        out["lm_head.weight"], params["decoder"]["logits_dense"]["kernel"].T
    )
    assert (tmp_path / "out/spiece.model").read_bytes() == b"words"
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "t5"
    assert written["num_decoder_layers"] == 1
    assert written["tie_word_embeddings"] is False
    assert written["scale_decoder_outputs"] is False


def test_wrong_step_of_a_run(tmp_path, training_run, capsys):
    assert run(training_run, tmp_path / "out", "--to", "hf", "--step", "4") == 1
    assert "step 4, but of 3, 5" in capsys.readouterr().err
    assert run(training_run / "checkpoints/3", tmp_path / "o", "--to", "hf", "--step", "5") == 1
    assert "is the checkpoint of step 3, not of step 5" in capsys.readouterr().err


def test_tokenizer_is_carried_along(tmp_path, training_run, capsys):
    words = tmp_path / "words"
    words.mkdir()
    out = tmp_path / "out"
    assert run(training_run, out, "--to", "hf", "--tokenizer", words) == 1
    assert "has no tokenizer files" in capsys.readouterr().err
    (words / "tokenizer.json").write_text("{}")
    assert run(training_run, out, "--to", "mtl_jax", "--tokenizer", words) == 0
    assert [path.name for path in (out / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert interop.open_source(out).tokenizer_files == [out / "tokenizer/tokenizer.json"]


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------


def _change(folder: Path, **fields) -> None:
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))


def _replace(folder: Path, name: str, x: np.ndarray | None) -> None:
    arrays = hf_folders.read(folder) | ({} if x is None else {name: x})
    if x is None:
        del arrays[name]
    hf_folders.write(folder, json.loads((folder / "config.json").read_text()), arrays)


def _cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


WI = "decoder.block.1.layer.2.DenseReluDense.wi_0.weight"
ZEROS = np.zeros((10, 9), np.float32)
BREAK = {
    "cut off": (
        lambda f: _cut(f / "model.safetensors", -20),
        "model.safetensors is cut off: tensor shared.weight (24x8) has 768 bytes, of which 748",
    ),
    "cut in the header": (lambda f: _cut(f / "model.safetensors", 100), "is cut off: its header"),
    "empty file": (lambda f: _cut(f / "model.safetensors", 0), "is no safetensors file"),
    "another kind": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"[" * 16),
        "its header is damaged",
    ),
    "Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com\n"),
        "is a pointer of Git LFS",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "missing tensor": (lambda f: _replace(f, WI, None), f"tensor {WI} (10x8) is missing"),
    "wrong shape": (
        lambda f: _replace(f, WI, ZEROS),
        f"tensor {WI} is 10x9, but by config.json it must be 10x8",
    ),
    "unknown tensor": (
        lambda f: _replace(f, "encoder.block.0.adapter.weight", ZEROS),
        "tensor encoder.block.0.adapter.weight (10x9) is unknown",
    ),
    "dtype": (
        lambda f: _replace(f, WI, np.zeros((10, 8), np.int8)),
        f"tensor {WI} (10x8) is of dtype I8",
    ),
    "second embedding": (
        lambda f: _replace(f, "encoder.embed_tokens.weight", np.zeros((24, 8), np.float32)),
        "tensor encoder.embed_tokens.weight differs from shared.weight",
    ),
    "other sizes": (lambda f: _change(f, d_ff=12), "is 10x8, but by config.json it must be 12x8"),
    "fewer layers": (lambda f: _change(f, num_layers=1), "encoder.block.1.layer.0"),
    "architecture": (lambda f: _change(f, model_type="longt5"), "model_type = 'longt5' is not"),
    "activation": (lambda f: _change(f, feed_forward_proj="gelu"), "feed_forward_proj = 'gelu'"),
    "act fn": (lambda f: _change(f, dense_act_fn="gelu"), "dense_act_fn = 'gelu' contradicts"),
    "epsilon": (lambda f: _change(f, layer_norm_epsilon=1e-5), "layer_norm_epsilon = 1e-05"),
    "shared stacks": (lambda f: _change(f, tie_encoder_decoder=True), "tie_encoder_decoder = True"),
    "padding": (lambda f: _change(f, pad_token_id=1), "pad_token_id = 1 is not supported"),
    "start": (lambda f: _change(f, decoder_start_token_id=2), "decoder_start_token_id = 2"),
    "no field": (lambda f: _change(f, d_kv=None), "d_kv must be a number, it is None"),
    "no JSON": (lambda f: _cut(f / "config.json", 30), "config.json is not JSON, or is cut off"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds model.safetensors, but no config"),
}


@pytest.mark.parametrize("case", BREAK)
def test_mistakes_are_told_and_leave_nothing(tmp_path, capsys, case):
    damage, message = BREAK[case]
    made = hf_folders.make(tmp_path / "made", "t5_1_1")
    damage(made)
    assert run(made, tmp_path / "out", "--to", "mtl_jax") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mtl-jax convert: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_encoder_alone_and_pytorch_files(tmp_path, capsys):
    arrays = hf_folders.tensors("t5")
    encoder = {name: x for name, x in arrays.items() if not name.startswith("decoder.")}
    hf_folders.write(tmp_path / "encoder", hf_folders.CONFIGS["t5"], encoder)
    assert run(tmp_path / "encoder", tmp_path / "out", "--to", "mtl_jax") == 1
    assert "an encoder alone (T5EncoderModel)" in capsys.readouterr().err
    (tmp_path / "encoder/model.safetensors").rename(tmp_path / "encoder/pytorch_model.bin")
    assert run(tmp_path / "encoder", tmp_path / "out", "--to", "mtl_jax") == 1
    assert "pytorch_model.bin" in (error := capsys.readouterr().err)
    assert "safetensors" in error


def test_incomplete_shards(tmp_path, capsys):
    made = hf_folders.make(tmp_path / "made", "t5", shards=2)
    index = made / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["extra"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(values))
    assert run(made, tmp_path / "out", "--to", "mtl_jax") == 1
    assert "lacks tensor extra" in capsys.readouterr().err
    (made / "model-00002-of-00002.safetensors").unlink()
    assert run(made, tmp_path / "out", "--to", "mtl_jax") == 1
    assert "model-00002-of-00002.safetensors is missing" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["hf", "mtl_jax"])
def test_what_is_there_stays(tmp_path, training_run, capsys, to):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert run(training_run, target, "--to", to) == 1
    assert f"{target} exists already" in capsys.readouterr().err
    assert (target / "mine.txt").read_text() == "mine"
    (target / "mine.txt").unlink()
    assert run(training_run, target, "--to", to) == 0  # an empty folder is none


@pytest.mark.parametrize("to", ["hf", "mtl_jax"])
def test_damage_found_while_writing_leaves_nothing(tmp_path, to):
    made = hf_folders.make(tmp_path / "made", "t5")
    source = interop.open_source(made)
    _cut(made / "model.safetensors", -5000)
    with pytest.raises(UserError, match="cannot be read: the file has become shorter"):
        convert.convert(source, tmp_path / "new/out", to)
    assert not list((tmp_path / "new").iterdir())


def test_damaged_checkpoint_of_ours(tmp_path, capsys):
    made = hf_folders.make(tmp_path / "made", "t5")
    run(made, tmp_path / "ours", "--to", "mtl_jax")
    state = tmp_path / "ours/checkpoints/0/state"
    chunk = state / "params.decoder.layers.mlp.wo.kernel/1.0.0"
    content = chunk.read_bytes()
    for damage in (lambda: chunk.unlink(), lambda: chunk.write_bytes(content[:-9])):
        damage()
        assert run(tmp_path / "ours", tmp_path / "back", "--to", "hf") == 1
        assert "decoder/layers/mlp/wo/kernel cannot be read" in capsys.readouterr().err
    shutil.rmtree(chunk.parent)
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "hf") == 1
    assert "decoder/layers/mlp/wo/kernel (2x10x8) cannot be opened" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"made", "ours"}


def test_options_are_checked(tmp_path, training_run, capsys):
    out = tmp_path / "out"
    for words, message in (
        (["--to", "hf", "--max_shard_size", "huge"], "must be a size such as 5GB"),
        (["--to", "mtl_jax", "--dtype", "bfloat16"], "is for --to hf"),
        (["--to", "hf", "--relpos_max_distance", "99"], "is for T5X checkpoints"),
        (["--to", "mtl_jax", "--optimizer", "keep"], "A run's state needs no conversion"),
    ):
        assert run(training_run, out, *words) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5 gb", 1500 * 10**6)]
)
def test_sizes(text, size):
    assert convert.parse_size(text) == size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """Eight times the layers, half a gigabyte: the peak stays, a stack (64 MiB) is never held."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import convert_memory

    shape = dict(vocab_size=128, emb_dim=512, num_heads=8, head_dim=64, mlp_dim=4096)
    peaks = []
    for layers in (1, 8):
        made, ours, back = (str(tmp_path / f"{name}_{layers}") for name in ("made", "ours", "back"))
        depth = dict(num_encoder_layers=layers, num_decoder_layers=layers)
        convert_memory.run("make", json.dumps(shape | depth), made)
        there = convert_memory.run("convert", made, ours, "--to", "mtl_jax")[1]
        peaks.append((there, convert_memory.run("convert", ours, back, "--to", "hf")[1]))
    assert (Path(made) / "model.safetensors").stat().st_size > 500 * 10**6
    for small, large in zip(*peaks, strict=True):
        assert large - small < 48 * 2**20

"""Every Gin file that ships: short, loadable, and the command in its header builds."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import cli, compare_config, config, model, model_config, sweep_config
from mtl_jax.errors import UserError

FOLDER = config.package_gin_folder()
RUNS = sorted(path.stem for path in (FOLDER / "runs").glob("*.gin"))
SWEEPS = {"zero_shot"}  # these train nothing
WITHOUT_DATA_FOLDER = {"methods", "quickstart"}
MOST_VALUES = 25

# Parameters as published (Hugging Face model hub: t5-*, google/t5-v1_1-*); XXL is called 11B.
PUBLISHED = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
}
SIZES = ("small", "base", "large", "xl", "xxl")
# What distinguishes each family from T5 1.1, apart from its sizes.
FAMILIES = {
    "t5": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "t5_1_1": {},
    "mt5": {"vocab_size": 250_112},
    "umt5": {"vocab_size": 256_384, "relpos_per_layer": True},
    "byt5": {"vocab_size": 384},
}
MODELS = [
    *(f"t5_{size}" for size in ("small", "base", "large", "3b", "11b")),
    *(f"{family}_{size}" for family in ("t5_1_1", "mt5", "byt5") for size in SIZES),
    *(f"umt5_{size}" for size in SIZES if size != "large"),
]


def gin_files() -> list[str]:
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.gin"))


def header_commands(name: str) -> list[list[str]]:
    """The commands in the comment at the top of a Gin file, each as its words."""
    header = []
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    text = "\n".join(header)
    commands = re.findall(r"^#   (mtl-jax .*(?:\n#     .*)*)", text, re.MULTILINE)
    return [shlex.split(command.replace("\n#", " ")) for command in commands]


def arguments(command: list[str], directory: Path):
    """A command's parsed flags, with the run directory elsewhere."""
    elsewhere = [f"--gin.Run.directory={directory / 'run'}"]
    if command[1] == "compare":
        # Made for one device: the eight of the tests need a row each in all of its 8 blocks.
        elsewhere.append("--gin.Data.batch_size=64")
    return cli.parse([*command[1:], "--dry_run", *elsewhere])


def loaded_of(args):
    """The configuration of a command; of a comparison or a sweep, all but its own room."""
    if args.command == "compare":
        return compare_config.load_args(args).base
    if args.command == "sweep":
        return sweep_config.load_args(args).base
    return config.load_args(args)


@pytest.fixture(autouse=True)
def _compile_cache_as_before():
    """`build` points the compile cache beside the run directory."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("name", gin_files())
def test_files_are_short_and_say_what_they_are(name):
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    values = [line for line in lines if line.strip() and not line.startswith(("#", "include"))]
    assert len(values) <= MOST_VALUES
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "name", [name for name in gin_files() if not name.startswith(("runs/", "arms/"))]
)
def test_models_and_mixtures_load_and_their_resolved_text_again(name, tmp_path):
    loaded = config.load([name])
    (tmp_path / "config.gin").write_text(loaded.text)
    assert config.load([str(tmp_path / "config.gin")]) == loaded


def shape(name):
    return config.load([f"models/{name}.gin"]).model


def count(name):
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(shape(name))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert count(name) == PUBLISHED[name]


def test_every_published_size_has_its_file():
    ours = {"t5_1_1_tiny", "t5_1_1_mini"}
    assert {path.stem for path in (FOLDER / "models").glob("*.gin")} == ours | set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_set_sizes_and_families_the_rest(name):
    cfg = shape(name)
    sizes = ("emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers")
    same = {field: getattr(cfg, field) for field in (*sizes, "num_decoder_layers")}
    family, _ = name.rsplit("_", 1)
    assert cfg == model_config.T5Config(**same, **FAMILIES[family])
    assert cfg.head_dim == (128 if name in ("t5_3b", "t5_11b") else 64)
    shallow = {12: 4, 18: 6, 36: 12}[cfg.num_encoder_layers] if family == "byt5" else None
    assert cfg.num_decoder_layers == (shallow or cfg.num_encoder_layers)


@pytest.mark.parametrize("name", MODELS)
def test_headers_tell_the_number_of_parameters(name):
    header = (FOLDER / "models" / f"{name}.gin").read_text().splitlines()[0]
    number, unit = re.fullmatch(r"# .*, ([\d.]+) (million|billion) parameters\.", header).groups()
    digits = len(number.partition(".")[2])
    scale = {"million": 1e6, "billion": 1e9}[unit]
    assert round(count(name) / scale, digits) == float(number)


@pytest.mark.torch
@pytest.mark.parametrize("name", MODELS)
def test_transformers_counts_as_many_parameters(name):
    """Of the same configuration, without memory for a single one."""
    import torch
    import transformers

    cfg = shape(name)
    family = {"mt5": "MT5", "umt5": "UMT5"}.get(name.rsplit("_", 1)[0], "T5")
    made = getattr(transformers, f"{family}Config")(
        vocab_size=cfg.vocab_size,
        d_model=cfg.emb_dim,
        d_kv=cfg.head_dim,
        d_ff=cfg.mlp_dim,
        num_layers=cfg.num_encoder_layers,
        num_decoder_layers=cfg.num_decoder_layers,
        num_heads=cfg.num_heads,
        relative_attention_num_buckets=cfg.relpos_buckets,
        feed_forward_proj="gated-gelu" if len(cfg.mlp_activations) == 2 else "relu",
        tie_word_embeddings=cfg.logits_via_embedding,
    )
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForConditionalGeneration")(made)
        if not cfg.logits_via_embedding:  # some versions tie it whatever the configuration says
            theirs.lm_head.weight = torch.nn.Parameter(torch.empty(cfg.vocab_size, cfg.emb_dim))
    assert sum(tensor.numel() for tensor in theirs.parameters()) == count(name)


@pytest.mark.parametrize("name", RUNS)
def test_commands_of_runs_load(name, tmp_path):
    commands = header_commands(f"runs/{name}.gin")
    assert commands, "the header shows the command"
    assert f"--gin_file=gin/runs/{name}.gin" in commands[0]
    for command in commands:
        loaded = loaded_of(arguments(command, tmp_path))
        assert loaded.data.mixture or loaded.mixture.name or name in SWEEPS
        assert loaded.data.task_modules


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in WITHOUT_DATA_FOLDER else [pytest.mark.data])
        for name in RUNS
        if name not in SWEEPS
    ],
)
def test_commands_of_runs_build(name, tmp_path):
    from mtl_jax import build

    for command in header_commands(f"runs/{name}.gin"):
        session = build.build(loaded_of(arguments(command, tmp_path)))
        assert session.num_parameters > 1_000_000
        assert "share" in build.mixture_text(session)
    assert not (tmp_path / "run").exists()


def test_pretraining_is_as_published(tmp_path):
    """T5X's examples/t5/t5_1_1 and Raffel et al. 2020, section 3.1: 2^19 steps of 128 rows."""
    cfg = config.load(["runs/pretrain.gin"])
    assert (cfg.data.inputs_length, cfg.data.targets_length) == (512, 114)
    assert (cfg.run.steps, cfg.data.batch_size) == (2**19, 128)
    assert (cfg.model.dropout_rate, cfg.step.z_loss) == (0.0, 1e-4)
    from mtl_jax.optim import learning_rate

    rates = [float(learning_rate(cfg.optimizer, step)) for step in (0, 10_000, 40_000)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.005], rtol=1e-6)


def test_fine_tuning_needs_a_checkpoint(tmp_path):
    command = header_commands("runs/finetune.gin")[0]
    without = [word for word in command if "restore_from" not in word]
    with pytest.raises(UserError, match=r"finetune\.gin:\d+: .*GIVEN_BY_GIN_RUN_RESTORE_FROM is"):
        config.load_args(arguments(without, tmp_path))

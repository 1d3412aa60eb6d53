"""Every Gin file that ships: short, loadable, and the command in its header builds."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import cli, config, model, model_config
from mtl_jax.errors import UserError

FOLDER = config.package_gin_folder()
RUNS = sorted(path.stem for path in (FOLDER / "runs").glob("*.gin"))
WITHOUT_DATA_FOLDER = {"quickstart"}
MOST_VALUES = 25

# Parameters of google/t5-v1_1-* as published (Hugging Face model hub; XXL is called 11B).
PUBLISHED = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
}


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
    return cli.parse([*command[1:], "--dry_run", f"--gin.Run.directory={directory / 'run'}"])


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


@pytest.mark.parametrize("name", [name for name in gin_files() if not name.startswith("runs/")])
def test_models_and_mixtures_load_and_their_resolved_text_again(name, tmp_path):
    loaded = config.load([name])
    (tmp_path / "config.gin").write_text(loaded.text)
    assert config.load([str(tmp_path / "config.gin")]) == loaded


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    cfg = config.load([f"models/t5_1_1_{size}.gin"]).model
    shapes = jax.tree.leaves(model.abstract_params(cfg))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes) == PUBLISHED[size]
    assert cfg == model_config.T5Config(
        emb_dim=cfg.emb_dim,
        num_heads=cfg.num_heads,
        mlp_dim=cfg.mlp_dim,
        num_encoder_layers=cfg.num_encoder_layers,
        num_decoder_layers=cfg.num_encoder_layers,
    ), "everything else is the default"


@pytest.mark.parametrize("name", RUNS)
def test_commands_of_runs_load(name, tmp_path):
    commands = header_commands(f"runs/{name}.gin")
    assert commands, "the header shows the command"
    assert f"--gin_file=gin/runs/{name}.gin" in commands[0]
    for command in commands:
        loaded = config.load_args(arguments(command, tmp_path))
        assert loaded.data.mixture
        assert loaded.data.task_modules


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in WITHOUT_DATA_FOLDER else [pytest.mark.data])
        for name in RUNS
    ],
)
def test_commands_of_runs_build(name, tmp_path):
    from mtl_jax import build

    for command in header_commands(f"runs/{name}.gin"):
        session = build.build(config.load_args(arguments(command, tmp_path)))
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

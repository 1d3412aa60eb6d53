"""The Gin files of gin/methods: each command builds, with the method that the file is named for."""

import dataclasses

import jax
import pytest
import test_gin_files

from mtl_jax import build, config
from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.method import GRAM, METHODS, REFERENCE

BalanceConfig()  # registers the methods
OWN = sorted(
    name for name, kind in METHODS.items() if kind.__module__.startswith("mtl_jax.balance.")
)
FILES = {
    path.stem: path for path in sorted((test_gin_files.FOLDER / "methods").glob("*.gin"))
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compile_cache_as_before():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def named(stem):
    """The method that a file is named for."""
    (name,) = (name for name in OWN if name.lower() == stem.replace("_", ""))
    return name


def test_every_method_has_its_file():
    assert sorted(map(named, FILES)) == OWN


@pytest.mark.parametrize("stem", FILES)
def test_commands_build_with_the_method_of_the_name(stem, tmp_path):
    (command,) = test_gin_files.header_commands(f"methods/{stem}.gin")
    assert command[2:4] == [
        "--gin_file=gin/runs/quickstart.gin", f"--gin_file=gin/methods/{stem}.gin"
    ]  # fmt: skip
    # Not the folder of the quickstart: there the command would go on with another run.
    assert f"--gin.Run.directory=runs/{stem}" in command
    name = named(stem)
    kind = METHODS[name]
    # Blocks of a batch are spread over the devices: eight here, where the file is made for one.
    command.append("--gin.Data.batch_size=128")
    cfg = config.load_args(test_gin_files.arguments(command, tmp_path))
    assert cfg.balance.method == name
    assert type(cfg.method) is kind
    session = build.build(cfg)
    balancer = session.balancer
    assert balancer.method == cfg.method
    rows_of_families = {"by": "family", "tasks": 9}
    found = {"by": cfg.balance.by, "tasks": len(balancer.names)}
    if REFERENCE in kind.needs:  # finds rates, which are those of tasks
        assert found == {"by": "task", "tasks": 56}
    else:
        assert found == rows_of_families
    if GRAM in kind.needs:
        assert session.config.data.blocks == 16  # the least that gives nine families one each
    else:
        assert session.config.data.blocks == 0


@pytest.mark.parametrize("stem", FILES)
def test_values_are_defaults_or_say_why(stem):
    """The method's own fields stand at their defaults, but for names of tasks."""
    method = config.load([f"methods/{stem}.gin"]).method
    changed = {
        field.name
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != getattr(type(method)(), field.name)
    }
    names = {"static_weights": {"factors"}, "transfer_objective": {"source", "target"}}
    assert changed == names.get(stem, set())
    assert len(FILES[stem].read_text().splitlines()) <= 25

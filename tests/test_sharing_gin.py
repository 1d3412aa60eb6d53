"""The Gin files of gin/sharing: the command in each header builds, and shares as the file says."""

import jax
import pytest
import test_gin_files

from mtl_jax import build, config

FILES = sorted(
    path.stem
    for path in (test_gin_files.FOLDER / "sharing").glob("*.gin")
    if path.stem != "clusters"
)
OWNERS = {  # what is below "sharing" in the tree, and how many families of tasks there are
    "hierarchy": {"cluster": 9},
    "soft": {"cluster": 9},
    "lora": {"task": 56},
    "polytropon": {"inventory": 8, "task": 56},
    "adapters": {"cluster": 9},
    "prompts": {"shared": None, "cluster": 9},
    "task_embedding": {"cluster": 9},
    "experts": {"experts": 4, "task": 56, "shared": None},
    "adversary": {"cluster": 9, "adversary": None},
}


@pytest.fixture(autouse=True)
def _compile_cache_as_before():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("name", FILES)
def test_commands_build_and_own_what_they_say(name, tmp_path):
    (command,) = test_gin_files.header_commands(f"sharing/{name}.gin")
    assert command[-1] == f"--gin_file=gin/sharing/{name}.gin"
    # Blocks of a batch are spread over the devices: eight here, where the file is made for one.
    command.append("--gin.Data.batch_size=64")
    session = build.build(config.load_args(test_gin_files.arguments(command, tmp_path)))
    assert session.config.data.blocks == session.config.step.microbatches == 8
    below = session.abstract_state.params["sharing"]
    assert below.keys() == OWNERS[name].keys()
    for owner, entries in OWNERS[name].items():
        if entries is not None:
            assert {leaf.shape[0] for leaf in jax.tree.leaves(below[owner])} == {entries}


def test_every_file_is_tested():
    assert set(FILES) == set(OWNERS)

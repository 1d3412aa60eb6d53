"""`mtl-jax precompile` as a user calls it, for TPUs that are not there. Marked `aot`.

The runs are small, but no program is simplified: it is what the command compiles of any run.
"""

import functools
import json
import os
import subprocess
import sys

import aot
import jax
import numpy as np
import pytest

from mtl_jax import config, model, optim, precompile, sharding
from mtl_jax.sharding import MeshConfig

pytestmark = pytest.mark.aot

SMALL = (
    *("--gin_file=gin/models/t5_1_1_tiny.gin", "--gin_file=gin/mixtures/embedded.gin"),
    *("--gin.T5.scan_layers=True", "--gin.T5.num_encoder_layers=2"),
    *("--gin.T5.num_decoder_layers=2", "--gin.T5.dtype='bfloat16'"),
    *("--gin.Data.batch_size=32", "--gin.Optimizer.name='adafactor'"),
    *("--gin.Mesh.data=1", "--gin.Mesh.fsdp=2", "--gin.Mesh.tensor=2"),
)


@functools.cache
def precompiled(folder, *flags, start=(sys.executable, "-m", "mtl_jax")):
    """Exit status, the JSON and what was printed."""
    if reason := aot.missing("v5e:2x2"):
        pytest.skip(reason)
    path = folder / "found.json"
    environment = {name: v for name, v in os.environ.items() if name not in aot.NOT_INHERITED}
    command = [
        *(*start, "precompile", "--topology=v5e:2x2", f"--json={path}"),
        *(f"--gin.Run.directory={folder / 'run'}", *flags),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, precompile.DOES_NOT_FIT), done.stderr
    assert not (folder / "run").exists()
    return done.returncode, json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return precompiled(tmp_path_factory.mktemp("small"), *SMALL)


def test_the_three_programs_of_a_run_are_compiled_and_fit(small):
    status, found, text = small
    assert status == 0
    assert found["fits"]
    assert [program["name"] for program in found["programs"]] == ["train", "eval", "decode"]
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert found["attention"] == "pallas_tpu"
    for program in found["programs"]:
        assert program["kernels"] > 0
        assert 0 < program["needed"] < 15.75 * 2**30
        assert program["uncounted"] == 0
        assert set(program["bounds"]) == {"compute", "memory", "network"}
        assert program["name"] in text


def test_parameters_and_optimizer_take_the_sum_of_their_shards(small):
    """Counted here leaf by leaf; and XLA's own figure of the arguments is that and a batch."""
    _, found, _ = small
    words = [word.removeprefix("--gin.") for word in SMALL if word.startswith("--gin.")]
    cfg = config.load(["models/t5_1_1_tiny.gin", "mixtures/embedded.gin"], words)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    shapes = model.abstract_params(cfg.model)
    places = sharding.params_shardings(mesh, model.param_axes(cfg.model))
    parameters = sum(
        int(np.prod(place.shard_shape(leaf.shape))) * 4
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
    )
    state = jax.eval_shape(optim.make_optimizer(cfg.optimizer).init, shapes)
    train, evaluation, _ = (program["memory"] for program in found["programs"])
    assert train["parameters"] == parameters
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert whole / 4 <= train["optimizer"] < whole
    assert evaluation["beside"] == train["optimizer"]
    # 8 arrays of 16 rows at most, 64 or 16 long; TPUs pad small arrays to tiles of 4 KiB.
    least = train["parameters"] + train["optimizer"]
    assert least < train["arguments"] < least + 8 * 16 * 128 * 4 + 4096 * 200


def test_layers_sum_over_the_axis_tensor(small):
    """What attention and MLP of a layer return is summed over the two devices of a row."""
    _, found, _ = small
    train = found["programs"][0]["collectives"]
    # Forward: two in each encoder layer, three in each decoder layer; some join others in backward.
    assert train["all-reduce"]["times"] >= 2 * 2 + 2 * 3


def test_slices_of_a_data_centre_network_sum_their_gradients(tmp_path, small):
    """Two slices hold a copy of the model each: once a step all gradients go between them."""
    flags = (*SMALL, "--slices=2", "--gin.Mesh.data=2", "--only=train")
    status, found, text = precompiled(tmp_path, *flags)
    (program,) = found["programs"]
    assert (status, found["slices"]) == (0, 2)
    assert "on 2 slices of v5e:2x2" in text
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    between = {k: row for k, row in program["collectives"].items() if "between slices" in k}
    parameters = program["memory"]["parameters"]
    # Every gradient once, shard by shard, in float32 or in part bfloat16.
    summed = between["between slices all-reduce"]["sent_bytes"]
    assert parameters / 2 <= summed <= 1.2 * parameters
    # Rows of one slice that others need; no parameter, which all slices have.
    assert sum(row["sent_bytes"] for row in between.values()) - summed < parameters / 2
    assert parameters == small[1]["programs"][0]["memory"]["parameters"]


def test_the_gpus_of_one_machine_are_a_target(tmp_path):
    if reason := aot.missing("h100"):
        pytest.skip(reason)
    status, found, _ = precompiled(tmp_path, *SMALL, "--topology=h100:4", "--only=train")
    (program,) = found["programs"]
    assert (status, found["attention"]) == (0, "pallas_gpu")
    assert program["kernels"] > 0
    assert program["collectives"]["all-gather"]["times"] > 0
    assert found["chip"]["usable"] == 60 * 2**30
    assert 0 < program["needed"] < 2**30


def test_a_run_whose_data_is_elsewhere_is_compiled_without_its_tasks(tmp_path, monkeypatch):
    monkeypatch.delenv("MTL_JAX_DATA", raising=False)
    flags = [flag for flag in SMALL if "mixtures" not in flag]
    flags += ["--gin_file=gin/mixtures/flan_v2.gin", "--without_tasks", "--only=eval"]
    status, found, text = precompiled(tmp_path, *flags)
    assert (status, found["mixture"]) == (0, "")
    assert [program["name"] for program in found["programs"]] == ["eval"]
    assert "Mixture: none" in text


def test_a_model_shared_among_tasks_is_evaluated_beside_its_own_parameters(tmp_path, small):
    """Each task's plain T5 is made on the device, where all parameters stay, too."""
    flags = ("--gin_file=gin/sharing/adapters.gin", "--only=eval")
    status, found, _ = precompiled(tmp_path, *SMALL, *flags)
    (program,) = found["programs"]
    assert status == 0
    memory = program["memory"]
    assert memory["beside"] == memory["optimizer"] + memory["parameters"]
    assert memory["parameters"] > small[1]["programs"][0]["memory"]["parameters"]


# A v5e of 60 MiB: a run that needs more compiles in a minute, one that needs more than 16 GiB does
# not. All the rest is as it is.
LITTLE_MEMORY = """
import dataclasses, sys
from mtl_jax import cli, targets
targets.TPU_CHIPS["v5e"] = dataclasses.replace(targets.TPU_CHIPS["v5e"], usable=60 * 2**20)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_what_does_not_fit_is_refused_with_values_that_do(tmp_path):
    """192 MiB of a step of 256 rows; what is proposed was compiled and needs less than there is."""
    status, found, text = precompiled(
        *(tmp_path, *SMALL, "--gin.Data.batch_size=256", "--only=train"),
        start=(sys.executable, "-c", LITTLE_MEMORY),
    )
    assert status == precompile.DOES_NOT_FIT
    assert not found["fits"]
    assert found["programs"][0]["needed"] > 60 * 2**20
    assert found["suggestion"], found["tried"]
    assert f"This does, compiled as well:\n  {found['suggestion']}" in text
    last = found["tried"][-1]
    assert (last["flags"], last["fits"]) == (found["suggestion"], True)
    assert last["needed"] <= 60 * 2**20 < found["programs"][0]["needed"]

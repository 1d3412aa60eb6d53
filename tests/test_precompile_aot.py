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

from mtl_jax import config, model, optim, precompile, sharding, targets
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
    # More tokens than words, in the decoder, too.
    rows = "--gin.Data.batch_size=128"
    flags = (*SMALL, "--slices=2", "--gin.Mesh.data=2", "--only=train", rows)
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
    # Neither a parameter, which all slices have, nor what the tokens of one slice are.
    assert "between slices all-gather" not in between
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


# ---------------------------------------------------------------------------------------------
# Other machines
# ---------------------------------------------------------------------------------------------

# Chips, memory and kind: Google Cloud TPU documentation of each kind, and its slice's torus.
LARGE = {
    "v4:4x4x8": (128, 32, "TPU v4"),
    "v5e:16x16": (256, 16, "TPU v5 lite"),
    "v5p:8x8x16": (1024, 95.74, "TPU v5"),
    "v6e:16x16": (256, 32, "TPU v6 lite"),
}
MESHES = """
import json, sys
import numpy as np
from mtl_jax import sharding, targets
from mtl_jax.errors import UserError
from mtl_jax.sharding import MeshConfig

found = {}
for name in sys.argv[1:]:
    devices = targets.devices(name)
    count = len(devices)
    row = found[name] = {"count": count, "kinds": sorted({d.device_kind for d in devices})}
    row["memory"] = round(targets.chip(name).memory / 2**30, 2)
    row["coordinates"] = len({tuple(d.coords) for d in devices})
    row["meshes"] = []
    side = int(name.partition(":")[2].split("x")[0])  # of the torus
    for cfg in (
        *(MeshConfig(), MeshConfig(fsdp=count), MeshConfig(fsdp=count // side, tensor=side)),
        *(MeshConfig(fsdp=3), MeshConfig(fsdp=count // 2, tensor=2)),
    ):
        try:
            mesh = sharding.make_mesh(cfg, devices)
        except UserError as error:
            row["meshes"].append(str(error))
        else:
            ids = {device.id for device in mesh.devices.flat}
            row["meshes"].append([list(mesh.shape.values()), len(ids)])
print(json.dumps(found))
"""


def test_large_slices_are_described_and_divided_into_meshes():
    """Nothing is compiled: what there is, and which meshes it can be."""
    if reason := aot.missing("v5e:2x2"):
        pytest.skip(reason)
    environment = {name: v for name, v in os.environ.items() if name not in aot.NOT_INHERITED}
    done = subprocess.run(
        [sys.executable, "-c", MESHES, *LARGE],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (count, memory, kind) in LARGE.items():
        row = found[name]
        assert (row["count"], row["kinds"], row["memory"]) == (count, [kind], memory)
        assert row["coordinates"] == count
        side = int(name.partition(":")[2].split("x")[0])
        *made, wrong, across = row["meshes"]
        shapes = [count, 1, 1], [1, count, 1], [1, count // side, side]
        assert made == [[shape, count] for shape in shapes]
        assert f"fsdp 3 x tensor 1 does not fit {count} devices" in wrong
        if kind == "TPU v5 lite":  # JAX takes its devices as they come
            assert across == [[1, count // 2, 2], count]
        else:
            assert "cannot be laid over this torus" in across


EACH_KIND = """
import sys
from mtl_jax import cli
*flags, topologies = sys.argv[1:]
for name in topologies.split(","):
    path = f"--json={sys.argv[1]}/{name.partition(':')[0]}.json"
    assert cli.main(["precompile", f"--topology={name}", path, *flags[1:]]) == 0, name
"""


def test_a_small_run_is_compiled_for_every_kind(tmp_path, small):
    """In one process, as what it loads costs as much as it compiles."""
    names = [name for name in aot.TPUS if not name.startswith("v5e")]
    environment = {name: v for name, v in os.environ.items() if name not in aot.NOT_INHERITED}
    flags = [*SMALL, "--only=train", f"--gin.Run.directory={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", EACH_KIND, str(tmp_path), *flags, ",".join(names)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    theirs = small[1]["programs"][0]["memory"]
    for name in names:
        found = json.loads((tmp_path / f"{name.partition(':')[0]}.json").read_text())
        (program,) = found["programs"]
        assert (found["topology"], found["attention"]) == (name, "pallas_tpu")
        assert found["fits"]
        assert found["chip"]["memory"] == targets.chip(name).memory
        assert program["kernels"] > 0
        for part in ("parameters", "optimizer"):
            assert program["memory"][part] == theirs[part]
        assert name in done.stdout

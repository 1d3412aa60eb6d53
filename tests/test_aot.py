"""Attention compiled for TPUs and NVIDIA GPUs that are not there: legality, memory, communication.

Marked `aot`, and skipped where the compilers are not installed. No test here can tell a speed.
"""

import collections
import itertools

import aot
import pytest

from mtl_jax import targets
from mtl_jax.errors import UserError

MB = 10**6
KERNELS = ("encoder", "decoder", "cross", "short")
# What the backend compiles of one attention; the bias gradient has a pass of its own on GPUs.
PASSES = {"t5_attention_forward": 1, "t5_attention_queries": 1, "t5_attention_keys": 1}
TABLE_PASS = {"t5_attention_table": 1}


def child(target, function, *arguments):
    """The result of a function of tests/aot.py in a child process, or skips the test."""
    if reason := aot.missing(target):
        pytest.skip(reason)
    return aot.in_child(function, *arguments)


def compiled(target, case):
    found = child(target, "one_device", target)[case]
    assert "error" not in found, found["error"]
    return found


# ---------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("v5", "unknown kind 'v5'.*Known: v4, v5e, v5p, v6e, h100, h200"),
        ("h10:8", "Did you mean 'h100'"),
        ("", "unknown kind ''"),
        ("v5e", "as in v5e:2x2"),
        ("v5e:4", "as in v5e:2x2"),
        ("v5e:2x2x1", "as in v5e:2x2"),
        ("v4:2x2", "as in v4:2x2x1"),
        ("v4:2x0x1", "as in v4:2x2x1"),
        ("v6e:2xb", "as in v6e:2x2"),
        ("h100:", "h100:8"),
        ("h100:0", "h100:8"),
        ("h200:2x2", "h200:8"),
    ],
)
def test_malformed_targets_are_user_errors(target, told):
    with pytest.raises(UserError, match=told):
        targets.devices(target)


@pytest.mark.parametrize("target", ["v5e:2x2", "h100"])
def test_without_the_compilers_the_user_is_told_what_to_install(target, monkeypatch):
    def nothing(name):
        raise targets.importlib.metadata.PackageNotFoundError(name)

    version = targets.importlib.metadata.version
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(targets, "_found", lambda module: None)
    monkeypatch.setattr(
        targets.importlib.metadata,
        "version",
        lambda name: version(name) if name == "jaxlib" else nothing(name),
    )
    with pytest.raises(UserError, match=r"pip install '/path/to/mtl_jax\[aot\]'"):
        targets.devices(target)


def test_a_cuda_plugin_of_another_version_is_told(monkeypatch):
    versions = collections.defaultdict(lambda: "1.2.3", jaxlib="1.2.4")
    monkeypatch.setattr(targets.importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(UserError, match=r"jax-cuda12-plugin 1\.2\.3 does not fit jaxlib 1\.2\.4"):
        targets.devices("h100")


def test_collectives_are_read_from_the_program():
    hlo = """
  %all-reduce = f32[2,8]{1,0:T(8,128)S(1)} all-reduce(%fusion.19), channel_id=1
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=2
  %done = f32[8]{0} all-gather-done(%start)
  %psum.7-start = ((f32[32,2]{0,1:T(2,128)}), f32[32,2]{1,0}) all-reduce-start(%a), channel_id=3
  ROOT %psum.7 = (f32[32,2]{0,1:T(2,128)}, f32[]) all-reduce-done(%psum.7-start)
  %fusion = f32[2] fusion(%all-reduce), metadata={op_name="all-reduce(x)"}
"""
    assert targets._collectives(hlo) == {
        "all-reduce": ["f32[2,8]", "(f32[32,2], f32[])"],
        "all-gather": ["f32[8]"],
    }


@pytest.mark.aot
def test_tpus_are_described_without_one():
    names = (*aot.TPUS, "v5e:1x1", "v5e:16x16", "v4:4x4x8")
    found = child("v5e:2x2", "describe", *names)
    assert found["environment kept"]
    assert found["devices"] == {
        "v4:2x2x1": [4, "tpu", "TPU v4"],
        "v5e:2x2": [4, "tpu", "TPU v5 lite"],
        "v5p:2x2x1": [4, "tpu", "TPU v5"],
        "v6e:2x2": [4, "tpu", "TPU v6 lite"],
        "v5e:1x1": [1, "tpu", "TPU v5 lite"],
        "v5e:16x16": [256, "tpu", "TPU v5 lite"],
        "v4:4x4x8": [128, "tpu", "TPU v4"],
    }


@pytest.mark.aot
def test_gpus_are_described_without_one():
    found = child("h100", "describe", "h100", "h100:8", "h200")
    assert found["environment kept"]
    assert found["devices"] == {
        "h100": [1, "gpu", "NVIDIA H100 80GB HBM3"],
        "h100:8": [8, "gpu", "NVIDIA H100 80GB HBM3"],
        "h200": [1, "gpu", "NVIDIA H200"],
    }


@pytest.mark.aot
def test_a_torus_that_no_slice_has_is_a_user_error():
    if reason := aot.missing("v5e:2x2"):
        pytest.skip(reason)
    with pytest.raises(AssertionError, match="UserError: Target 'v5e:3x5' is refused by libtpu"):
        aot.in_child("describe", "v5e:3x5")


# ---------------------------------------------------------------------------------------------
# One device
# ---------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_reference_compiles(target):
    found = compiled(target, "reference")
    shape = aot.CASES["reference"]
    queries = shape.rows * shape.queries * shape.heads * 64 * 2
    least = 3 * queries  # q, k and v in bfloat16; TPUs add padding
    assert least < found["argument_bytes"] < 2 * least + MB
    assert least < found["output_bytes"] < 3 * least
    assert found["peak_bytes"] >= found["argument_bytes"] + found["output_bytes"]
    assert found["collectives"] == {}
    assert found["custom_calls"] == {}
    assert bool(found["kernels"]) == (target == "h100")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "case"), [*itertools.product(aot.TPUS, KERNELS), ("v4:2x2x1", "float32")]
)
def test_kernels_compile_for_tpus(target, case):
    """At 8192 positions too, and within the 16 MB of VMEM of a v4: else this is an error."""
    assert compiled(target, case)["custom_calls"] == PASSES


@pytest.mark.aot
@pytest.mark.parametrize("case", [*KERNELS, "float32"])
def test_kernels_compile_for_hopper_with_its_tensor_cores_and_without_spills(case):
    """Tensor cores take no float32 without rounding it."""
    found = compiled("h100", case)
    own = {k["name"]: k for k in found["kernels"] if k["name"].startswith("t5_attention")}
    assert set(own) == set(PASSES | (TABLE_PASS if aot.CASES[case].biased else {}))
    for kernel in own.values():
        assert kernel["spill_bytes"] == 0, kernel
        assert bool(kernel["wgmma"]) == (case != "float32"), kernel
        assert 0 < kernel["registers"] <= 255, kernel


@pytest.mark.aot
@pytest.mark.parametrize("case", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize(("target", "most"), [("h100", 64 * MB), ("v5e:2x2", 300 * MB)])
def test_long_rows_need_little_memory(target, most, case):
    """The logits of this layer alone would be 1,610 MB in bfloat16."""
    assert compiled(target, case)["temp_bytes"] <= most


# ---------------------------------------------------------------------------------------------
# Four devices
# ---------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize("impl", ["pallas", "xla"])
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_on_a_mesh_only_the_bias_gradient_is_communicated(target, impl):
    found = child(target, "four_devices", target, impl)
    # 32 buckets and the half of four heads.
    assert found["collectives"] == {"all-reduce": ["f32[32,2]"]}


@pytest.mark.aot
def test_the_reference_sums_a_whole_square_over_the_mesh():
    """What the kernels avoid; and the count is no constant."""
    found = child("v5e:2x2", "four_devices", "v5e:2x2", "naive")
    assert found["collectives"] == {"all-reduce": ["f32[2,128,128]"]}


# ---------------------------------------------------------------------------------------------
# The reports can fail
# ---------------------------------------------------------------------------------------------


@pytest.mark.aot
def test_blocks_beyond_vmem_are_refused():
    found = child("v4:2x2x1", "too_large_blocks", "v4:2x2x1", 2048)
    assert "vmem" in found["error"]
    assert "RESOURCE_EXHAUSTED" in found["error"]


@pytest.mark.aot
def test_spills_are_seen():
    found = child("h100", "too_large_blocks", "h100", 128)
    assert max(kernel["spill_bytes"] for kernel in found["kernels"]) > 0

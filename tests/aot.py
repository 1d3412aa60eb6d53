"""Compiles for absent devices in a child process; what tests/test_aot.py asserts on.

A child, because the tests' own process has flags that spoil the code (tests/conftest.py), and
because libtpu and the CUDA plugin stay in a process for good. The child runs one function of this
file and prints what it returns as JSON.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mtl_jax import attention, sharding, targets

TPUS = tuple(targets.TPU_KINDS.values())
TARGETS = (*TPUS, "h100")
# What a child must not inherit: flags that change the code, a cache that hides the compiler's work.
NOT_INHERITED = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR")
# From JAX 0.11 on, said where a kernel is lowered, which no code of ours surrounds.
TOLERATED = "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
NEEDED = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
}


def missing(target: str) -> str:
    """Why one cannot compile for this target here, or ""."""
    needed = NEEDED["tpu" if target in TPUS else "cuda"]
    for name in needed:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"compiling for {target} needs {name}: pip install .[aot]"
    return ""


@functools.cache
def in_child(function: str, *arguments: Any) -> Any:
    """What a function of this file returns, given strings and numbers; computed once."""
    program = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import aot\n"
        f"print(json.dumps(aot.{function}(*json.loads(sys.argv[1]))))\n"
    )
    environment = {name: v for name, v in os.environ.items() if name not in NOT_INHERITED}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", TOLERATED, "-c", program, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# In the child
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's attention, forward and backward."""

    impl: str
    rows: int = 1
    queries: int = 8192
    keys: int = 8192
    heads: int = 12
    causal: bool = False
    biased: bool = True
    dtype: str = "bfloat16"


CASES = {
    "encoder": Case("pallas"),
    "decoder": Case("pallas", causal=True),
    "cross": Case("pallas", queries=1024, biased=False),
    "short": Case("pallas", rows=8, queries=114, keys=114, causal=True),
    "float32": Case("pallas", rows=2, queries=512, keys=512, dtype="float32"),
    "reference": Case("naive", rows=2, queries=128, keys=128, heads=2),
}
# To save time, on the TPU with the least VMEM alone.
FLOAT32_TARGETS = ("v4:2x2x1", "h100")


def abstract(case: Case, place: Any = lambda *names: None) -> tuple[Any, ...]:
    """The arguments of `gradients`: q, k, v, table, segments of queries and keys."""

    def array(shape: tuple[int, ...], dtype: str, *names: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place(*names))

    head = (case.heads, 64)
    q = array((case.rows, case.queries, *head), case.dtype, "batch", "length", "heads", "kv")
    k = array((case.rows, case.keys, *head), case.dtype, "batch", "length", "heads", "kv")
    table = array((32, case.heads), "float32", "relpos_buckets", "heads")
    q_segments = array((case.rows, case.queries), "int32", "batch", "length")
    kv_segments = array((case.rows, case.keys), "int32", "batch", "length")
    return q, k, k, table if case.biased else None, q_segments, kv_segments


def gradients(case: Case) -> Any:
    """A function of those arguments: the output, and the gradients of all that have one."""

    def loss(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        o = attention.attend(
            *arrays, causal=case.causal, bidirectional=not case.causal, impl=case.impl
        )
        # Of a weight per element: the gradient that arrives is then no constant.
        return jnp.sum(jnp.sin(o.astype(jnp.float32))), o

    return jax.grad(loss, argnums=(0, 1, 2, 3) if case.biased else (0, 1, 2), has_aux=True)


def summary(compiled: targets.Compiled) -> dict[str, Any]:
    values = dataclasses.asdict(compiled)
    hlo = values.pop("hlo")
    # JAX puts names of its transformations around that of a kernel.
    calls = re.findall(r"%\w*(t5_attention_[a-z]+)_*[.\d]* = .* custom-call\(", hlo)
    return {**values, "custom_calls": dict(collections.Counter(calls))}


def describe(*names: str) -> dict[str, Any]:
    """Target -> its devices, and whether the environment is as it was before."""
    before = dict(os.environ)
    found = {}
    for name in names:
        devices = targets.devices(name)
        found[name] = [len(devices), devices[0].platform, devices[0].device_kind]
    return {"devices": found, "environment kept": dict(os.environ) == before}


def one_device(target: str) -> dict[str, Any]:
    """Case -> what the compiler says of it, or its error."""
    device = targets.devices(target)[0]
    found = {}
    for name, case in CASES.items():
        if name == "float32" and target not in FLOAT32_TARGETS:
            continue
        try:
            result = targets.compiled(gradients(case), abstract(case), device, kernels=True)
            found[name] = summary(result)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    return found


def four_devices(target: str, impl: str) -> dict[str, Any]:
    """The gradients on a mesh of two shares of the rows and two of the heads."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), targets.devices(target))

    def place(*names: str) -> NamedSharding:
        return NamedSharding(mesh, sharding.spec(names))

    case = Case(impl, rows=4, queries=128, keys=128, heads=4)
    arguments = abstract(case, place)
    places = tuple(argument.sharding for argument in arguments)
    function = jax.jit(gradients(case), out_shardings=(places[:4], places[0]))
    with sharding.on_mesh(mesh):
        return summary(targets.compiled(function, arguments, mesh.devices.flat[0]))


def too_large_blocks(target: str, size: int) -> dict[str, Any]:
    """What is reported when the blocks of the kernels are chosen too large for the device."""
    from mtl_jax.kernels import flash

    device = targets.devices(target)[0]
    impl = "pallas_gpu" if device.platform == "gpu" else "pallas_tpu"
    call = flash.Call(
        causal=False, bidirectional=True, max_distance=128, impl=impl, blocks=(size, size)
    )
    function = functools.partial(flash.flash_attention, call)
    try:
        return summary(targets.compiled(function, abstract(Case("")), device, kernels=True))
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:2000]}

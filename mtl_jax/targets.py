"""Compiling for TPUs and NVIDIA GPUs that need not be present.

XLA's compilers run anywhere: libtpu describes a TPU topology and compiles for it without one, the
CUDA plugin does the same for a GPU described in words. What comes out tells whether a program is
legal on that machine, how much memory it needs and what it communicates, never how fast it is.
Everything here works beside any other backend of the process and needs no flags in `XLA_FLAGS`.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from mtl_jax import attention
from mtl_jax.errors import UserError, suggest

INSTALL = "install what compiles for absent devices: pip install '/path/to/mtl_jax[aot]'"

# Kind -> an example, which also tells the number of dimensions of its torus.
TPU_KINDS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has and moves.

    Attributes:
      memory: bytes.
      usable: bytes of it that a program can have.
      bandwidth: bytes per second to and from its memory.
      link: bytes per second that it can send to other devices, all links together.
    """

    memory: int
    usable: int
    bandwidth: float
    link: float


# Google Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": rows "HBM2
# capacity and bandwidth" and "Interchip Interconnect BW" per chip. Usable is what libtpu 0.0.42
# itself says of a program that is too large ("exceeds available HBM (15.75G)").
TPU_CHIPS = {
    "v4": Chip(32 * 2**30, int(30.75 * 2**30), 1_200e9, 300e9),
    "v5e": Chip(16 * 2**30, int(15.75 * 2**30), 819e9, 200e9),
    "v5p": Chip(int(95.74 * 2**30), int(95.74 * 2**30), 2_765e9, 600e9),
    "v6e": Chip(32 * 2**30, int(31.25 * 2**30), 1_640e9, 448e9),
}
_GPU_SHARE = 0.75  # of its memory JAX takes at the start (XLA_PYTHON_CLIENT_MEM_FRACTION)
_NVLINK = 450e9  # fourth generation, one direction, as in NVIDIA's data sheets

# Kind -> (name, bytes of memory, bytes per second), from NVIDIA's data sheets of the SXM modules.
GPU_KINDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 80 * 2**30, 3_350 * 10**9),
    "h200": ("NVIDIA H200", 141 * 10**9, 4_800 * 10**9),
}
# A stream_executor.GpuTargetConfigProto: the fields that XLA needs (openxla/xla, pull request
# 25919), with the limits of compute capability 9.0 from the CUDA C++ Programming Guide.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""

# The start of an asynchronous one is not counted: its end has the type of the result.
_COLLECTIVE = re.compile(
    r"= (\([^()]*\)|\S+) "
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-done)?\("
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A GPU kernel, as the assembler reports it.

    Attributes:
      name: of the entry point.
      registers: per thread.
      spill_bytes: stored and loaded again per thread for want of registers.
      wgmma: asynchronous tensor core instructions of a warp group in its code.
    """

    name: str
    registers: int
    spill_bytes: int
    wgmma: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for one device.

    Attributes:
      temp_bytes: scratch memory.
      argument_bytes: of the arguments.
      output_bytes: of the results, aliased ones included.
      alias_bytes: of results that take the place of arguments.
      code_bytes: of the program itself.
      peak_bytes: most memory in use at once, arguments and results included.
      collectives: kind, such as "all-reduce" -> the type of each one's result, such as
        "f32[32,12]"; what stands in a loop counts once.
      kernels: of a GPU program, where asked for.
      hlo: the optimised program as text.
    """

    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    code_bytes: int
    peak_bytes: int
    collectives: dict[str, list[str]]
    kernels: tuple[Kernel, ...]
    hlo: str


def chip(target: str) -> Chip:
    """What a device of a target that `devices` knows has and moves."""
    kind = target.partition(":")[0]
    if kind in TPU_CHIPS:
        return TPU_CHIPS[kind]
    _, memory, bandwidth = GPU_KINDS[kind]
    return Chip(memory, int(_GPU_SHARE * memory), bandwidth, _NVLINK)


def devices(target: str, slices: int = 1) -> list[Any]:
    """The devices of a machine that need not be present.

    Args:
      target: a TPU topology, such as "v5e:4x4", or a GPU kind and how many, such as "h100:8".
      slices: how many such TPU slices, joined by a data-centre network.

    Raises:
      UserError: as in `tpu_devices` and `cuda_devices`.
    """
    kind, colon, count = target.partition(":")
    if kind not in GPU_KINDS:
        return tpu_devices(target, slices)
    if slices != 1:
        raise UserError(f"Target {target!r}: only TPUs come in several slices, not {slices} of it.")
    if colon and not re.fullmatch(r"[1-9]\d*", count):
        raise UserError(f"Target {target!r}: a number of GPUs stands after the colon: {kind}:8.")
    return cuda_devices(kind, int(count or 1))


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU slice or of several, to compile for only; one per chip.

    Args:
      topology: kind and torus of chips, such as "v5e:2x2" or "v4:4x4x8".
      slices: how many slices of that topology.

    Raises:
      UserError: an unknown kind or torus, no slice, or no libtpu.
    """
    kind, _, torus = topology.partition(":")
    if kind not in TPU_KINDS:
        raise UserError(
            f"Target {topology!r}: unknown kind {kind!r}.{suggest(kind, [*TPU_KINDS, *GPU_KINDS])} "
            f"Known: {', '.join([*TPU_KINDS, *GPU_KINDS])}."
        )
    example = TPU_KINDS[kind]
    sizes = torus.split("x")
    if len(sizes) != len(example.split("x")) or not all(s.isdecimal() and int(s) for s in sizes):
        raise UserError(f"Target {topology!r}: write kind and torus of chips as in {example}.")
    if not (_found("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise UserError(f"Target {topology!r} needs libtpu; {INSTALL}")
    if slices < 1:
        raise UserError(f"Target {topology!r}: at least one slice, not {slices}.")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        # As Cloud TPU runs it: the two cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    if all(size == "1" for size in sizes):
        options["chips_per_host_bounds"] = (1, 1, 1)
    # libtpu would else ask a metadata server what machine this is, and complain.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        # Two such processes do not compete for hardware.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    try:
        with _environment(quiet):
            return topologies.get_topology_desc(topology, "tpu", **options).devices
    except RuntimeError as error:
        raise UserError(f"Target {topology!r} is refused by libtpu: {error}") from error


def cuda_devices(kind: str = "h100", count: int = 1) -> list[Any]:
    """NVIDIA GPUs of one machine, to compile for only.

    Args:
      kind: "h100" or "h200"; the compiler's target is sm_90a.
      count: how many.

    Raises:
      UserError: an unknown kind, no CUDA plugin of jaxlib's version, or a plugin that JAX has
        turned down already.
    """
    if kind not in GPU_KINDS:
        known = ", ".join(GPU_KINDS)
        raise UserError(f"Unknown GPU {kind!r}.{suggest(kind, GPU_KINDS)} Known: {known}.")
    _check_cuda_plugin(kind)
    name, memory, bandwidth = GPU_KINDS[kind]
    config = _HOPPER.format(name=name, memory=memory, bandwidth=bandwidth)
    try:
        # Compiling needs none of the libraries whose versions JAX would check.
        with _environment({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):
            # Slices x hosts x GPUs of a host.
            topology = {"target_config": config, "topology": f"1x1x{count}"}
            return topologies.get_topology_desc("", "cuda", **topology).devices
    except NotImplementedError as error:
        raise UserError(
            f"Target {kind!r}: JAX has started without its CUDA plugin, since there is no GPU; "
            "set the environment variable JAX_PLATFORMS=cpu."
        ) from error


def _check_cuda_plugin(kind: str) -> None:
    wanted = importlib.metadata.version("jaxlib")
    for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"Target {kind!r} needs {name}; {INSTALL}") from None
        if found != wanted:
            raise UserError(
                f"Target {kind!r}: {name} {found} does not fit jaxlib {wanted}; "
                f'pip install --no-deps "{name}=={wanted}"'
            )
    _cuda_folder()


def _cuda_folder() -> Path:
    """Where the packaged CUDA compiler lies: bin/ptxas and nvvm/libdevice."""
    spec = _found("nvidia.cuda_nvcc")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "bin" / "ptxas").is_file():
            return Path(folder)
    raise UserError(f"Compiling for NVIDIA GPUs needs nvidia-cuda-nvcc-cu12; {INSTALL}")


def _found(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that it would stand in
        return None


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block, where the user has set none."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def compiled(
    function: Any, arguments: Sequence[Any], device: Any, *, kernels: bool = False
) -> Compiled:
    """Compiles a function for a device of `devices`, or for a mesh of them.

    For a mesh, call it inside `sharding.on_mesh` and give the arguments their shardings.

    Args:
      function: to be jitted, or jitted.
      arguments: pytrees of `jax.ShapeDtypeStruct`; one without a sharding is put on `device`.
      device: what to compile for; any device of the mesh.
      kernels: report on the kernels of a GPU program; each is assembled once more for that.

    Raises:
      jax.errors.JaxRuntimeError: the compiler's, such as RESOURCE_EXHAUSTED.
    """
    on_device = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: x if x.sharding is not None else x.update(sharding=on_device), tuple(arguments)
    )
    lower = (function if hasattr(function, "lower") else jax.jit(function)).lower
    with contextlib.ExitStack() as stack:
        stack.enter_context(attention.platform(device.platform))
        if jax.sharding.get_abstract_mesh().empty:
            # Without a mesh, kernels would be lowered for the default device of JAX.
            mesh = Mesh(np.array([device]), ("device",))
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        lowered = lower(*arguments)
    return compile_lowered(lowered, device, kernels=kernels)


def compile_lowered(lowered: jax.stages.Lowered, device: Any, *, kernels: bool = False) -> Compiled:
    """As `compiled`, of a function that has been traced and lowered for that device or mesh."""
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_emitter_re": "ptx"}  # newer versions need both
        asked = kernels and device.platform == "gpu"
        made = executable(lowered, device, options if asked else {})
        ptx = sorted(Path(dump).glob("*.ptx"))
        reports = tuple(kernel for path in ptx for kernel in _assembled(path))
    memory, hlo = made.memory_analysis(), made.as_text()
    return Compiled(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        collectives=_collectives(hlo),
        kernels=reports,
        hlo=hlo,
    )


def executable(
    lowered: jax.stages.Lowered, device: Any, more: Mapping[str, Any] | None = None
) -> Any:
    """A lowered function, compiled for the device or mesh that it was lowered for.

    Args:
      lowered: as `jax.jit(function).lower` returns it.
      device: any device of the mesh.
      more: options of the compiler.

    Returns:
      A `jax.stages.Compiled`. Any: JAX says that a backend may have no reports; these have them.
    """
    options = dict(more or {})
    if device.platform == "gpu":
        # Tuning by measurement needs the device.
        options["xla_gpu_autotune_level"] = 0
        options["xla_gpu_cuda_data_dir"] = str(_cuda_folder())
    return lowered.compile(compiler_options=options)


def _collectives(hlo: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        # Without the layouts, {1,0:T(8,128)}.
        if match := _COLLECTIVE.search(re.sub(r"\{[^{}]*\}", "", line)):
            found.setdefault(match[2], []).append(match[1])
    return found


def _assembled(path: Path) -> Iterator[Kernel]:
    """Reports on the kernels in a file of PTX."""
    text = path.read_text()
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert target is not None, path
    ptxas = str(_cuda_folder() / "bin" / "ptxas")
    command = [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", text, re.DOTALL))
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        used = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert used is not None, part
        assert spills is not None, part
        yield Kernel(
            name=name,
            registers=int(used[1]),
            spill_bytes=int(spills[1]) + int(spills[2]),
            wgmma=code[name].count("wgmma.mma_async"),
        )

"""Whether a run fits a machine that is not here: `mtl-jax precompile`.

The programs of the run, and no others like them, are compiled for the devices of the target, from
shapes alone. What is told of memory and communication is the compiler's; times are bounds.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import (
    buckets,
    build,
    config,
    fitting,
    flops,
    hlo,
    patterns,
    precompile_config,
    precompile_report,
    sharding,
    targets,
    train,
)
from mtl_jax.errors import UserError
from mtl_jax.storage import first_line, replace_text, storage_errors

DOES_NOT_FIT = 3  # exit status; 2 is a command line that is wrong
CHOICES = 4  # of a row that is scored; more cost nothing but their tokens
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu, of a program as a whole and of one array of it.
_TOO_LARGE = re.compile(
    r"Used ([\d.]+)([BKMGT]) of [\d.]+[BKMGT] hbm|\(([\d.]+)([BKMGT])\) exceeds available HBM"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, for one device.

    Attributes:
      name: of `precompile_config.PROGRAMS`.
      seconds: that tracing and compiling took.
      cpu_seconds: of processors in that time; more than `seconds` where several worked.
      needed: bytes with all that lies beside it on the device, or None: the compiler does not tell.
      fits: whether the device has so much for programs.
      memory: bytes by what they hold; empty where it was refused.
      flops: the mathematics of all devices together.
      bounds: seconds that it takes at least, by what it must do; empty where it was refused.
      collectives: as `hlo.by_kind`.
      uncounted: collectives in loops of unknown length, which count as one round.
      kernels: hand-written kernels in its text.
      refusal: what the compiler said instead.
    """

    name: str
    seconds: float
    cpu_seconds: float
    needed: float | None
    fits: bool
    memory: dict[str, int | None] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, Any] = dataclasses.field(default_factory=dict)
    uncounted: int = 0
    kernels: int = 0
    refusal: str = ""


def main(args: argparse.Namespace) -> int:
    """Compiles the programs of a run for a machine and tells whether they fit.

    Returns:
      0 if all fit, else `DOES_NOT_FIT`.

    Raises:
      UserError: a mistake in the configuration, or a machine that one cannot compile for here.
    """
    # Nothing runs here; and a TPU or GPU that is here is left alone.
    jax.config.update("jax_platforms", "cpu")
    names = precompile_config.programs(args.only)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: there is no folder {Path(args.json).parent}.")
    cfg = config.load_args(args)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, compile_cache=False))
    if args.without_tasks:
        cfg = _without_tasks(cfg)
    session = build.build(cfg, devices=targets.devices(args.topology, args.slices))
    found = [_compiled(session, name, args.topology) for name in names]
    report = as_json(session, args.topology, args.slices, found)
    if not report["fits"]:
        report |= _search(session, args.topology, found, args.search)
    # First, for minutes went into it.
    print("\n".join([precompile_report.text(report), *_failures(report)]), flush=True)
    if args.json:
        with storage_errors("write --json", Path(args.json)):
            replace_text(Path(args.json), json.dumps(report, indent=1) + "\n")
    return 0 if report["fits"] else DOES_NOT_FIT


def _failures(report: dict[str, Any]) -> list[str]:
    """A line for each setting that was tried and that the compiler failed on."""
    return [
        f"Tried, but failed to compile: {row['flags']} ({row['program']}: {row['failure']})"
        for row in report.get("tried", ())
        if row.get("failure")
    ]


def _without_tasks(cfg: config.Config) -> config.Config:
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, mixture="", task_modules=()),
        mixture=type(cfg.mixture)(),
        eval=dataclasses.replace(cfg.eval, tasks=()),
        checkpoint=dataclasses.replace(cfg.checkpoint, best_metric="", keep_best=0),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# One program
# ---------------------------------------------------------------------------------------------


def lower(session: build.Session, name: str) -> jax.stages.Lowered:
    """A program of the run, traced for the session's mesh from shapes alone.

    Args:
      session: of a mesh of the target's devices.
      name: of `precompile_config.PROGRAMS`. "eval" and "decode" are a batch of `Eval.batch_size`
        rows at `Eval.inputs_length`; "eval" scores choices of `Eval.targets_length` tokens
        together, "decode" generates `Eval.max_decode_length`. Real batches are not longer, unless
        the choices of a row are.
    """
    if name == "train":
        return train.lower_step(session)
    cfg, evaluator = session.config.eval, session.evaluator()
    inputs, params = buckets.bucket(cfg.inputs_length), session.abstract_state.params
    if (plain := evaluator.engine.lowered_plain(params)) is not None:
        made = targets.executable(plain, session.mesh.devices.flat[0])
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            *(plain.out_info, made.output_shardings),
        )
    targets_length = buckets.bucket(cfg.targets_length)
    choices = [[1] * targets_length] if name == "eval" else []
    row = buckets.Request(None, [1] * inputs, choices, max_length=cfg.max_decode_length)
    batch = buckets.Batch(cfg.batch_size, inputs, targets_length, (row,))
    place = sharding.batch_sharding(session.mesh)
    return evaluator.engine.lowered(params, batch, CHOICES, place)


def _compiled(session: build.Session, name: str, topology: str) -> Program:
    """Compiles a program; one that the compiler refuses for its size does not fit."""
    _say(f"{name}: compiling for {topology} ...")
    start = time.perf_counter(), time.process_time()

    def taken() -> tuple[float, float]:
        return time.perf_counter() - start[0], time.process_time() - start[1]

    lowered = lower(session, name)
    try:
        made = targets.compile_lowered(lowered, session.mesh.devices.flat[0])
    except jax.errors.JaxRuntimeError as error:
        # Mostly of the device's memory; a kernel may also ask for too much of the chip's own.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).strip().splitlines()[0]
        _say(f"{name}: refused after {taken()[0]:.0f} s")
        return Program(name, *taken(), _told_bytes(str(error)), fits=False, refusal=refusal)
    found = _described(session, name, topology, made, taken())
    _say(f"{name}: {found.seconds:.0f} s")
    return found


def _told_bytes(message: str) -> float | None:
    """Bytes that a program would need, as libtpu says in refusing it."""
    sizes = [(a or c, b or d) for a, b, c, d in _TOO_LARGE.findall(message)]
    return max((float(size) * _UNITS[unit] for size, unit in sizes), default=None)


def _described(
    session: build.Session,
    name: str,
    topology: str,
    made: targets.Compiled,
    taken: tuple[float, float],
) -> Program:
    cfg, state, chip = session.config, session.abstract_state, targets.chip(topology)
    program = hlo.Program(made.hlo)
    # What decoding takes ends when all rows have ended, at the latest after so many tokens.
    trips = cfg.eval.max_decode_length if name == "decode" else None
    collectives = program.collectives(session.mesh.size, trips)
    parameters = sharding.bytes_per_device(state.params)
    optimizer = sharding.bytes_per_device((state.opt_state, state.balance))
    beside = 0
    if name != "train":  # training goes on afterwards
        beside = optimizer + (0 if session.sharing.empty else parameters)
    own = made.argument_bytes + made.output_bytes - made.alias_bytes + made.temp_bytes
    # The peak counts what the compiler sets aside for itself, but not always all of the rest.
    needed = max(own + made.code_bytes, made.peak_bytes) + beside
    kernels = sum(n for call, n in program.kernels().items() if call in hlo.KERNEL_CALLS)
    memory = {
        "parameters": parameters,
        "optimizer": optimizer,
        "arguments": made.argument_bytes,
        "results": made.output_bytes - made.alias_bytes,
        "activations": program.kept_activations(),
        "temporaries": made.temp_bytes,
        "code": made.code_bytes,
        "peak": made.peak_bytes,
        "beside": beside,
    }
    work = _flops(session, name)
    bounds: dict[str, float] = {}
    if (peak := flops.peak_flops(session.mesh.devices.flat[0].device_kind)) is not None:
        bounds["compute"] = work / session.mesh.size / peak
    bounds["memory"] = _least_traffic(session, name, made) / chip.bandwidth
    # What goes between slices has a network of its own, whose speed is nobody's to promise.
    links = (one for one in collectives if not one.between_slices)
    bounds["network"] = sum(one.sent_bytes for one in links) / chip.link
    return Program(
        name=name,
        seconds=taken[0],
        cpu_seconds=taken[1],
        needed=needed,
        fits=needed <= chip.usable,
        memory=memory,
        flops=work,
        bounds=bounds,
        collectives=hlo.by_kind(collectives),
        uncounted=sum(not one.counted for one in collectives),
        kernels=kernels,
    )


def _flops(session: build.Session, name: str) -> float:
    cfg, model = session.config, session.sharing.model_config
    if name == "train":
        data = cfg.data
        lengths = data.batch_size, data.inputs_length, data.targets_length
        return flops.flops_per_step(model, *lengths)
    targets_length = cfg.eval.targets_length if name == "eval" else cfg.eval.max_decode_length
    lengths = cfg.eval.batch_size, cfg.eval.inputs_length, targets_length
    return flops.flops_per_step(model, *lengths, training=False)


def _least_traffic(session: build.Session, name: str, made: targets.Compiled) -> float:
    """Bytes that one device reads and writes in its memory at least, by an estimate.

    Arguments and results once, and the weights of the layers, in the dtype of the computation and
    divided over the axis `tensor` alone, at each pass: forward, backward, and forward again with
    remat, for each microbatch; for each token in decoding. Activations are left out.
    """
    cfg = session.config
    item = 2 if cfg.model.dtype == "bfloat16" else 4
    sizes = {
        path: int(np.prod(leaf.shape)) * item / session.mesh.shape["tensor"]
        for path, leaf in patterns.by_path(session.abstract_state.params).items()
    }
    encoder = sum(size for path, size in sizes.items() if path.startswith("encoder/"))
    decoder = sum(size for path, size in sizes.items() if path.startswith("decoder/"))
    once = made.argument_bytes + made.output_bytes
    if name == "decode":
        return once + encoder + cfg.eval.max_decode_length * decoder
    if name == "eval":
        return once + encoder + decoder
    passes = (2 if cfg.model.remat == "none" else 3) * cfg.step.microbatches
    return once + passes * (encoder + decoder)


# ---------------------------------------------------------------------------------------------
# Something smaller
# ---------------------------------------------------------------------------------------------


def _search(
    session: build.Session, topology: str, found: list[Program], limit: int
) -> dict[str, Any]:
    """Compiles other values until one set fits: {"suggestion": flags or None, "tried": [...]}.

    A set that does not compile at all is one of those tried, with the reason as "failure".
    """
    usable, state = targets.chip(topology).usable, session.abstract_state
    params, whole = (
        float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
        for tree in (state.params, state)
    )
    sizes = params, whole - params
    known = session.config, dict(session.mesh.shape)
    bad = [program.name for program in found if not program.fits]
    good = [program.name for program in found if program.fits]

    def ratio(program: Program, estimate: float) -> float:
        # Where the compiler does not tell how much it would be, it is at least too much.
        return (program.needed or 1.1 * usable) / estimate

    scale = {
        program.name: ratio(program, fitting.estimate(*known, program.name, *sizes))
        for program in found
    }
    left, tried = fitting.choices(*known, bad, *sizes), list[dict[str, Any]]()
    while limit > 0:
        promising = (
            choice
            for choice in left
            if all(size * scale[name] <= usable for name, size in choice.estimates.items())
        )
        choice = next(promising, None)
        if choice is None:
            break
        left.remove(choice)
        try:
            other = build.build(choice.config, devices=list(session.mesh.devices.flat))
        except UserError as error:  # such as blocks of tasks that these values do not divide
            _say(f"not possible: {choice.flags}: {error}")
            continue
        limit -= 1
        _say(f"trying {choice.flags}")
        meshes = any(name.startswith("Mesh.") for name in choice.values)
        for name in bad + (good if meshes else []):
            try:
                program = _compiled(other, name, topology)
            except Exception as error:  # a defect of these values' alone: the report goes on
                failure = first_line(error)
                _say(f"{name}: failed: {failure}")
                row = {"flags": choice.flags, "program": name, "fits": False}
                tried.append(row | {"needed": None, "seconds": None, "failure": failure})
                break
            row = {"flags": choice.flags, "program": name, "fits": program.fits}
            tried.append(row | {"needed": program.needed, "seconds": program.seconds})
            if not program.fits:
                if name in bad:
                    scale[name] = max(scale[name], ratio(program, choice.estimates[name]))
                break
        else:
            return {"suggestion": choice.flags, "tried": tried}
    return {"suggestion": None, "tried": tried}


def as_json(
    session: build.Session, topology: str, slices: int, found: list[Program]
) -> dict[str, Any]:
    """All that is told, as values of JSON."""
    cfg, chip = session.config, targets.chip(topology)
    versions = {"jax": jax.__version__}
    for package in ("libtpu", "jax-cuda12-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "topology": topology,
        "slices": slices,
        "device": session.mesh.devices.flat[0].device_kind,
        "chip": dataclasses.asdict(chip),
        "versions": versions,
        "mesh": dict(session.mesh.shape),
        "parameters": session.num_parameters,
        "attention": session.attention,
        "mixture": cfg.data.mixture,
        "batch": {
            "rows": cfg.data.batch_size,
            "inputs_length": cfg.data.inputs_length,
            "targets_length": cfg.data.targets_length,
            "microbatches": cfg.step.microbatches,
        },
        "evaluation": {
            "rows": cfg.eval.batch_size,
            "inputs_length": cfg.eval.inputs_length,
            "targets_length": cfg.eval.targets_length,
            "max_decode_length": cfg.eval.max_decode_length,
        },
        "remat": cfg.model.remat,
        "dtype": cfg.model.dtype,
        "optimizer": cfg.optimizer.name,
        "programs": [dataclasses.asdict(program) for program in found],
        "fits": all(program.fits for program in found),
    }

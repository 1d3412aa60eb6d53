"""What a run would be, without running it: `mtl-jax train --dry_run`."""

from typing import Any

import jax

from mtl_jax import build, flops, sharding
from mtl_jax.run_directory import model_info
from mtl_jax.sharing import tree


def describe(session: build.Session, compiled: Any) -> str:
    """Returns parameters with their shardings, memory, FLOPs per step and the mixture, as text.

    Args:
      session: the configuration made concrete.
      compiled: its train step, compiled for the devices at hand from shapes alone.
    """
    cfg = session.config
    state = session.abstract_state
    info = model_info(state.params, session.axes, session.shardings.params)
    memory = compiled.memory_analysis()
    rows, inputs, targets = cfg.data.batch_size, cfg.data.inputs_length, cfg.data.targets_length
    step_flops = flops.flops_per_step(session.sharing.model_config, rows, inputs, targets)
    mesh = " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items())
    lines = [
        info.rstrip(),
        "",
        f"Mesh: {mesh} on {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"Attention: {session.attention}",
        f"Batch: {rows} rows of {inputs} + {targets} tokens, {cfg.step.microbatches} microbatches",
        "Memory per device:",
        f"  parameters       {_bytes(sharding.bytes_per_device(state.params))}",
        f"  optimizer state  {_bytes(sharding.bytes_per_device(state.opt_state))}",
    ]
    if session.config.balance.method or session.balancer.every:
        lines.insert(-3, f"Balance: {session.balance_cost}")
    if not session.sharing.empty:
        lines[-3:-3] = [
            f"Sharing: {line}" for line in tree.report(session.sharing, state.params).split("\n")
        ]
    if memory is not None:
        lines.append(f"  temporaries      {_bytes(memory.temp_size_in_bytes)}")
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    lines.append(f"Model FLOPs per step: {step_flops:.4g}")
    if peak is not None:
        seconds = step_flops / peak / jax.device_count()
        lines.append(f"Step at the peak of these devices: {seconds:.4g} s")
    lines += ["", build.mixture_text(session).rstrip()]
    return "\n".join(lines)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:8.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")

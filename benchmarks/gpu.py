"""Attention on one NVIDIA GPU: the kernel against plain XLA and against cuDNN.

    python benchmarks/gpu.py            # about 3 minutes; needs jax with CUDA

In bfloat16, forward and backward pass with the gradient of the bias table. Competitors run in
turn, round after round, in one process; tables show medians. First the numbers themselves are
compared with float32. Writes benchmarks/results/gpu.json. The whole train step is in gpu_step.py.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import time

import attention_cases as cases
import figures
import jax
import jax.numpy as jnp
from attention_cases import Case

CASES = (
    Case(32, 12, 512),
    Case(32, 12, 512, causal=True),
    Case(8, 12, 2048),
    Case(8, 12, 2048, causal=True),
    Case(32, 12, 512, segments=4),
    Case(8, 12, 2048, segments=8),
    Case(4, 12, 8192),
)
CHECKED = (Case(2, 4, 512, segments=4), Case(1, 3, 1000, causal=True, segments=3))
NAMES = ("o", "dq", "dk", "dv", "dtable")


def numbers(case: Case) -> dict:
    """Relative errors against float32 naive attention, and whether two runs give equal bits."""
    args = cases.inputs(case, jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args)
    run = {
        name: jax.jit(cases.with_gradients(cases.ours(name, case))) for name in ("naive", "pallas")
    }
    with jax.default_matmul_precision("highest"):
        reference = run["naive"](*wide)
    found = {"naive bf16": run["naive"](*args), "kernel bf16": run["pallas"](*args)}
    found["kernel f32"] = run["pallas"](*wide)
    again = run["pallas"](*args)
    pairs = zip(found["kernel bf16"], again, strict=True)
    equal = all(bool(jnp.all(a == b)) for a, b in pairs)
    errors = {name: cases.errors(out, reference) for name, out in found.items()}
    return {"case": case.name, "errors": errors, "two runs are equal": equal}


def compiled(case: Case, args: tuple) -> dict:
    """Name -> (program, arguments); what cannot run on this device is left out, with the reason."""
    forward = args[:5]
    kernel = cases.ours("pallas", case)
    wanted = {
        "naive": (cases.with_gradients(cases.ours("naive", case)), args),
        "cudnn": (cases.with_gradients(cases.cudnn(case)), args),
        "kernel": (cases.with_gradients(kernel), args),
        "kernel forward": (kernel, forward),
        "kernel, no table gradient": (cases.with_gradients(kernel, table=False), args),
    }
    ready = {}
    for name, (function, given) in wanted.items():
        try:
            program = jax.jit(function).lower(*given).compile()
            jax.block_until_ready(program(*given))
            ready[name] = program, given
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            print(f"{case.name} {name}: {str(error).splitlines()[0][:120]}")
    return ready


def measure(case: Case, rounds: int) -> dict:
    """Medians in milliseconds, temporary memory in MiB."""
    ready = compiled(case, cases.inputs(case, jnp.bfloat16))
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (program, args) in ready.items():
            jax.block_until_ready(program(*args))  # back to full speed after the one before
            calls, started = 5, time.perf_counter()
            outs = [program(*args) for _ in range(calls)]
            jax.block_until_ready(outs)
            times[name].append((time.perf_counter() - started) / calls * 1e3)
    median = {name: statistics.median(found) for name, found in times.items()}
    least = {name: min(found) for name, found in times.items()}
    memory = {
        name: program.memory_analysis().temp_size_in_bytes / 2**20
        for name, (program, _) in ready.items()
    }
    row = {"case": case.name, "ms": median, "least ms": least, "temp MiB": memory}
    kernel, bare = median["kernel"], median["kernel, no table gradient"]
    row["TFLOP/s"] = case.flops() / kernel / 1e9
    backward, bare_backward = kernel - median["kernel forward"], bare - median["kernel forward"]
    row["table surcharge"] = {"backward": backward / bare_backward, "step": kernel / bare}
    row["speed-up over"] = {
        name: median[name] / kernel for name in ("naive", "cudnn") if name in median
    }
    return row


def show(rows: list[dict]) -> None:
    figures.print_table(
        "forward + backward, milliseconds",
        [
            {"case": row["case"]}
            | {name: row["ms"].get(name, float("nan")) for name in ("naive", "cudnn", "kernel")}
            | {f"x {n}": row["speed-up over"].get(n, float("nan")) for n in ("naive", "cudnn")}
            | {"TFLOP/s": row["TFLOP/s"], "table": row["table surcharge"]["backward"]}
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, help="write here, not to results/gpu.json")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("benchmarks/gpu.py needs an NVIDIA GPU and jax with CUDA.")
    result = figures.machine("jax", "jaxlib", "numpy")
    result["device"] = jax.devices()[0].device_kind
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result["driver"] = subprocess.run(
        query, capture_output=True, text=True, check=True
    ).stdout.strip()
    print(result["device"], result["driver"], result["versions"])
    result["numbers"] = [numbers(case) for case in CHECKED]
    for checked in result["numbers"]:
        print(checked["case"], "two runs are equal:", checked["two runs are equal"])
        for name, errors in checked["errors"].items():
            pairs = zip(NAMES, errors, strict=True)
            print(f"  {name:12}", "  ".join(f"{out} {error:.1e}" for out, error in pairs))
    result["cases"] = []
    for case in CASES:
        result["cases"].append(measure(case, args.rounds))
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))
    show(result["cases"])
    if not args.out:
        figures.save("gpu", result)


if __name__ == "__main__":
    main()

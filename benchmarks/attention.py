"""Attention on a CPU: blocks in XLA loops against naive XLA.

    python benchmarks/attention.py            # about 5 minutes on 2 cores
    python benchmarks/attention.py --quick    # one short case, to see that it works

In float32, forward and backward pass with the gradient of the bias table, rows packed with three
examples and rows of one. Both run in turn, round after round; tables show medians. Then the
temporary memory of `xla` up to 8192 tokens, and the exponent with which it grows. Writes
benchmarks/results/attention.json.
"""

import argparse
import statistics
import time

import attention_cases as cases
import figures
import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import Case

CASES = tuple(
    Case(rows, 12, length, causal=causal, segments=segments)
    for rows, length in ((4, 128), (4, 256), (4, 512), (1, 2048))
    for causal in (False, True)
    for segments in (1, 3)
)
LENGTHS = (512, 1024, 2048, 4096, 8192)


def compiled(case: Case, impl: str):
    """The program from shapes alone."""
    args = jax.eval_shape(lambda: cases.inputs(case, jnp.float32))
    return jax.jit(cases.with_gradients(cases.ours(impl, case))).lower(*args).compile()


def measure(case: Case, rounds: int) -> dict:
    """Medians in milliseconds and temporary memory in MiB of both."""
    programs = {impl: compiled(case, impl) for impl in ("naive", "xla")}
    args = cases.inputs(case, jnp.float32)
    outs = {impl: program(*args) for impl, program in programs.items()}
    worst = max(cases.errors(outs["xla"], outs["naive"]))
    if worst > 1e-4:
        raise ArithmeticError(f"{case.name}: xla differs from naive by {worst:.1e}")
    times: dict[str, list[float]] = {impl: [] for impl in programs}
    for number in range(rounds):
        for impl in sorted(programs, reverse=bool(number % 2)):
            started = time.perf_counter()
            jax.block_until_ready(programs[impl](*args))
            times[impl].append((time.perf_counter() - started) * 1e3)
    median = {impl: statistics.median(found) for impl, found in times.items()}
    mib = {
        impl: program.memory_analysis().temp_size_in_bytes / 2**20
        for impl, program in programs.items()
    }
    return {
        "case": case.name,
        "naive ms": median["naive"],
        "xla ms": median["xla"],
        "speed-up": median["naive"] / median["xla"],
        "naive MiB": mib["naive"],
        "xla MiB": mib["xla"],
        "memory": mib["naive"] / mib["xla"],
        "error": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short case; writes no file")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    result = figures.machine("jax", "jaxlib", "numpy")
    print(result["machine"], result["versions"])
    result["cases"] = [measure(case, args.rounds) for case in (CASES[:1] if args.quick else CASES)]
    figures.print_table("forward + backward, (rows, heads, length)", result["cases"])
    if args.quick:
        return
    memory = {}
    for length in LENGTHS:
        report = compiled(Case(1, 12, length), "xla").memory_analysis()
        memory[length] = report.temp_size_in_bytes / 2**20
    exponent = float(np.polyfit(np.log(LENGTHS), np.log(list(memory.values())), 1)[0])
    result["temp MiB by length"], result["exponent"] = memory, exponent
    figures.print_table(
        "xla, one row of 12 heads", [{"length": k, "MiB": memory[k]} for k in memory]
    )
    print(f"memory grows as length ** {exponent:.2f}")
    figures.save("attention", result)


if __name__ == "__main__":
    main()

"""The train step of T5 1.1 in bfloat16 on one GPU: mtl_jax against Hugging Face in PyTorch.

    python benchmarks/gpu_step.py --minutes 8
    python benchmarks/gpu_step.py --models base --only mtl_jax --variants naive+scan,pallas+unroll
    python benchmarks/gpu_step.py --only mtl_jax --variants pallas+unroll --batches 64 --profile DIR
    python benchmarks/gpu_step.py --platform cpu --tiny --steps 2      # to see that it works

Every variant (`variants.py` explains the names) runs in a process of its own, which has the whole
memory of the device, and tries doubled batch sizes until they help no more. Ends within --minutes;
the results (benchmarks/results/gpu_step.json) are written after every variant. XLA_FLAGS and other
settings of the environment reach the processes as they are.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import figures
import variants

CHILD = pathlib.Path(__file__).with_name("gpu_step_child.py")
START = {"small": 128, "base": 64, "large": 32}  # rows that are tried first
# In order of importance.
DEFAULT = {
    "mtl_jax": (
        "pallas+unroll+logits16",
        "naive+unroll+logits16",
        "pallas+scan+logits16",
        "pallas+unroll",
        "pallas+unroll+logits16+chunk8192",
        "naive+scan",
        "pallas+unroll+logits16+adafactor",
        "pallas+unroll+logits16+minimal",
        "naive+unroll+logits16+minimal",
    ),
    "hf": (
        "sdpa+regional+autocast",
        "sdpa+regional+bfloat16",
        "sdpa+compile+autocast",
        "sdpa+compile+bfloat16",
        "flex+regional+bfloat16",
        "flex+regional+autocast",
        "eager+regional+bfloat16",
        "sdpa+autocast",
    ),
}
LEAST_SECONDS = 20  # no variant is started with less time left
MARGIN_SECONDS = 5  # to end a process and write
STOPPED = "stopped"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "triton", "transformers")


def job_of(args: argparse.Namespace, model: str, framework: str, variant: str) -> dict:
    """What the process of one variant is told."""
    return {
        "model": model,
        "framework": framework,
        "variant": variant,
        "lengths": args.lengths,
        "batches": args.batches,
        "start": 2 if args.tiny else START.get(model, 16),
        "steps": args.steps,
        "tiny": args.tiny,
        "oom_at": args.oom_at,
        "profile": args.profile if framework == "mtl_jax" else None,
    }


def jobs_of(args: argparse.Namespace) -> list[dict]:
    """All jobs, the most important of every model and framework first."""
    chosen = {
        framework: args.variants.get(framework, DEFAULT[framework]) for framework in args.only
    }
    jobs = []
    for names in itertools.zip_longest(*chosen.values()):
        for model in args.models:
            for framework, name in zip(chosen, names, strict=True):
                if name is not None:
                    jobs.append(job_of(args, model, framework, name))
    return jobs


def environment(framework: str, platform: str) -> dict[str, str]:
    """The environment of a process; what is already set stays."""
    found = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | dict(os.environ)
    # PyTorch's process loads JAX for the shapes, and must leave it no memory.
    found["JAX_PLATFORMS"] = "cuda" if (framework, platform) == ("mtl_jax", "gpu") else "cpu"
    if platform == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    root = str(CHILD.parent.parent)  # the package need not be installed
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return found


def run(job: dict, platform: str, seconds: float) -> dict:
    """Runs one job for at most so many seconds.

    Returns:
      {"model", "framework", "variant", "ended", "took s", "device", "parameters", "sizes": [...]}.
    """
    print(f"\n{job['model']} {job['framework']} {job['variant']} ({seconds:.0f} s)", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "findings.jsonl"
        told = json.dumps(job | {"seconds": seconds, "out": str(out)})
        process = subprocess.Popen(
            [sys.executable, str(CHILD), told],
            env=environment(job["framework"], platform),
            start_new_session=True,  # PyTorch compiles in processes of its own
        )
        try:
            ended = f"exit status {process.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            ended = "time limit"
        except KeyboardInterrupt:
            ended = STOPPED
        finally:
            end_group(process)
        findings = read_lines(out)
    found = {key: job[key] for key in ("model", "framework", "variant")} | {"ended": ended}
    found["took s"] = time.monotonic() - started
    for finding in findings:
        if "rows" in finding:
            found.setdefault("sizes", []).append(finding)
        else:
            found |= finding
    print(f"  {found['ended']} after {found['took s']:.0f} s", flush=True)
    return found


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_lines(path: pathlib.Path) -> list[dict]:
    """The whole lines of a file of JSON lines; the last may have been cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def best(found: dict) -> dict | None:
    """The fastest batch size of a run."""
    fitted = [row for row in found.get("sizes", []) if "seq/s" in row]
    return max(fitted, key=lambda row: row["seq/s"], default=None)


def fastest(runs: list[dict], model: str, framework: str, word: str = "") -> dict | None:
    """The fastest run with AdamW of a framework among those whose variant has the word."""
    own = []
    for run in runs:
        words = run["variant"].split("+")
        chosen = "adafactor" not in words and (not word or word in words)
        if chosen and best(run) and (run["model"], run["framework"]) == (model, framework):
            own.append(run)
    return max(own, key=lambda run: best(run)["seq/s"], default=None)


def ratios(runs: list[dict]) -> list[dict]:
    """mtl_jax's fastest over Hugging Face's: of all, and of those with float32 parameters."""
    found = []
    for model in dict.fromkeys(run["model"] for run in runs):
        ours = fastest(runs, model, "mtl_jax")
        for label, word in (("any", ""), ("float32 parameters", "autocast")):
            theirs = fastest(runs, model, "hf", word)
            if ours and theirs:
                mine, other = best(ours), best(theirs)
                found.append(
                    {
                        "model": model,
                        "mtl_jax": f"{ours['variant']} x {mine['rows']}",
                        "seq/s": mine["seq/s"],
                        "Hugging Face": f"{theirs['variant']} x {other['rows']}",
                        "their seq/s": other["seq/s"],
                        "of": label,
                        "ratio": mine["seq/s"] / other["seq/s"],
                        "same size": ours.get("parameters") == theirs.get("parameters"),
                    }
                )
    return found


def print_tables(result: dict) -> None:
    """Prints the best batch size of every run, and the ratios."""
    rows = []
    for found in result["runs"]:
        row = best(found)
        named = {"model": found["model"], "variant": f"{found['framework']} {found['variant']}"}
        numbers = ("rows", "ms", "seq/s", "tokens/s", "TFLOP/s", "MFU %", "peak GiB", "loss")
        if row is None:
            rows.append(named | dict.fromkeys(numbers, "-") | {"ended": found["ended"][:60]})
            continue
        cells = {name: row.get(name, "-") for name in numbers}
        cells |= {"ms": row["seconds"] * 1e3, "loss": row["losses"][0]}
        cells["MFU %"] = "-" if row["mfu"] is None else row["mfu"] * 100
        rows.append(named | cells | {"ended": found["ended"][:60]})
    if rows:
        lengths = result["lengths"]
        figures.print_table(f"best batch size, {lengths[0]} + {lengths[1]} tokens, bfloat16", rows)
    if result["ratios"]:
        figures.print_table("mtl_jax against Hugging Face", result["ratios"])


def describe() -> dict:
    """The machine, the versions that are installed, and what the environment tells XLA."""
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    settings = {name: value for name, value in os.environ.items() if name.startswith("XLA_")}
    return figures.machine(*installed) | {"environment": settings}


def write(path: pathlib.Path, result: dict) -> None:
    """Writes the results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"words of variants: {json.dumps({k: list(v) for k, v in variants.WORDS.items()})}",
    )
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(word) for word in text.replace("/", ",").split(",")]  # noqa: E731
    parser.add_argument("--minutes", type=float, default=8.0, help="for all together")
    parser.add_argument("--variant-minutes", type=float, default=2.5, help="for one variant")
    parser.add_argument("--models", type=names, default=["base", "large"])
    parser.add_argument("--only", type=names, default=["mtl_jax", "hf"], help="frameworks")
    parser.add_argument("--variants", type=names, default=[], help="of either framework")
    parser.add_argument("--batches", type=numbers, default=[], help="rows, instead of a search")
    parser.add_argument("--lengths", type=numbers, default=None, help="inputs/targets: 512/128")
    parser.add_argument("--steps", type=int, default=12, help="that are timed")
    parser.add_argument("--profile", metavar="DIR", help="trace each variant of mtl_jax there")
    parser.add_argument("--out", type=pathlib.Path, default=figures.RESULTS / "gpu_step.json")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    parser.add_argument("--oom-at", type=int, default=0, help="act as if so many rows did not fit")
    args = parser.parse_args(argv)
    args.lengths = args.lengths or ([32, 16] if args.tiny else [512, 128])
    if len(args.lengths) != 2 or not set(args.only) <= set(DEFAULT):
        parser.error(f"--lengths takes two numbers, --only some of {', '.join(DEFAULT)}")
    if args.tiny and args.out.parent == figures.RESULTS:
        args.out = pathlib.Path(tempfile.gettempdir()) / "gpu_step_tiny.json"
    try:
        args.variants = by_framework(args.variants)
    except ValueError as error:
        parser.error(str(error))
    if args.variants:
        args.only = [framework for framework in args.only if framework in args.variants]
    return args


def by_framework(names: list[str]) -> dict[str, list[str]]:
    """Sorts names of variants by the framework that knows all their words."""
    found: dict[str, list[str]] = {}
    for name in names:
        errors = []
        for framework in DEFAULT:
            try:
                variants.settings(framework, name)
                found.setdefault(framework, []).append(name)
                break
            except ValueError as error:
                errors.append(str(error))
        else:
            raise ValueError("; ".join(errors))
    return found


def main() -> None:
    args = parsed()
    deadline = time.monotonic() + args.minutes * 60 - MARGIN_SECONDS
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like control-C: ends in order
    result = describe() | {"device": "", "lengths": args.lengths, "runs": [], "ratios": []}
    print(result["machine"], result["versions"], result["environment"])
    write(args.out, result)
    for job in jobs_of(args):
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            named = {key: job[key] for key in ("model", "framework", "variant")}
            result["runs"].append(named | {"ended": "no time left"})
        else:
            limit = min(args.variant_minutes * 60, left)
            result["runs"].append(run(job, args.platform, limit))
            result["device"] = result["runs"][-1].get("device", result["device"])
        result["ratios"] = ratios(result["runs"])
        write(args.out, result)
        if result["runs"][-1]["ended"] == STOPPED:
            break
    print(f"\n{result['device']}, {result['machine']}")
    print_tables(result)
    print(f"\nwritten to {args.out.name}")


if __name__ == "__main__":
    main()

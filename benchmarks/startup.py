"""From the command to the first train step: cold, and with the compile cache; where the time goes.

    python benchmarks/startup.py               # within 3 minutes on 2 cores
    python benchmarks/startup.py --repeats 1

Every measurement is a fresh process. Prints tables and writes benchmarks/results/startup.json (not
with --repeats 1).
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import figures

RUN = ["train", "--gin_file=gin/runs/quickstart.gin", "--gin.Run.steps=2"]
RUN += ["--gin.Eval.tasks=()", "--gin.Run.evaluate_untrained=False"]
SMALL_COMMANDS = {
    "mtl-jax --help": ["-m", "mtl_jax", "--help"],
    "mtl-jax train --help": ["-m", "mtl_jax", "train", "--help"],
    "import mtl_jax.model": ["-c", "import mtl_jax.model"],
}
# Functions of the command and what their time is booked on; inner ones count for themselves alone.
SPANS = {
    ("mtl_jax.config", "load_args"): "config",
    ("mtl_jax.data", "load_modules"): "data",
    ("mtl_jax.data", "TrainStream"): "data",
    ("mtl_jax.train", "next_batch"): "data",
    ("mtl_jax.starting", "start_state"): "state",
    ("mtl_jax.train", "describe_run"): "files",
    ("mtl_jax.train", "compile_step"): "compile",
}


class FirstStepDone(BaseException):
    """Ends the command; no handler of ours takes it for a mistake."""


def child(command: list[str]) -> None:
    """Runs in a fresh process: the command up to its first step, with the time of its parts."""
    interpreter = time.time() - float(os.environ["BENCHMARK_STARTED"])
    started = time.perf_counter()
    from mtl_jax import cli

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    # In the command's own order: it reads the configuration before TensorFlow is loaded.
    for name in ("config", "quiet_tensorflow", "train"):
        module = importlib.import_module(f"mtl_jax.{name}")
        if name == "quiet_tensorflow":
            module.load()
    import jax

    from mtl_jax import report

    imports = time.perf_counter() - started
    ledger = report.Ledger()

    def booked(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            with ledger(name):
                return function(*args, **kwargs)

        return call

    for (module_name, name), span in SPANS.items():
        module = importlib.import_module(module_name)
        setattr(module, name, booked(getattr(module, name), span))
    train = importlib.import_module("mtl_jax.train")
    compiled = train.compile_step

    def compile_step(*args):
        update = compiled(*args)

        def first_step(*arguments):
            with ledger("first step"):
                jax.block_until_ready(update(*arguments))
            raise FirstStepDone

        return first_step

    train.compile_step = compile_step
    try:
        status = cli.main(command)
    except FirstStepDone:
        total = time.time() - float(os.environ["BENCHMARK_STARTED"])
        parts = {"interpreter": interpreter, "imports": imports, **ledger.seconds()}
        print(json.dumps({"total": total, **parts}))
        return
    sys.exit(f"the command ended before its first step, with status {status}")


def fresh(arguments: list[str], folder: str) -> tuple[float, str]:
    """Runs Python with these arguments; returns seconds and standard output."""
    environment = dict(os.environ, BENCHMARK_STARTED=repr(time.time()))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return seconds, done.stdout


def first_steps(repeats: int) -> dict[str, list[dict]]:
    """The parts of every start, cold (an empty compile cache) and warm (filled by the cold one)."""
    found: dict[str, list[dict]] = {"cold": [], "with the compile cache": []}
    script = str(pathlib.Path(__file__).resolve())
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind, parts in found.items():
                # A directory of its own, so that nothing is continued; the cache lies beside it.
                directory = f"--gin.Run.directory=runs/{kind.split()[0]}"
                _, output = fresh([script, "--child", *RUN, directory], folder)
                parts.append(json.loads(output.splitlines()[-1]))
            cached = any((pathlib.Path(folder) / "runs" / ".jax_cache").iterdir())
            assert cached, "the cold run left no compiled program"
    return found


def medians(rows: list[dict]) -> dict[str, float]:
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each kind")
    args = parser.parse_args()
    result = figures.machine("jax", "jaxlib", "flax", "optax", "seqio", "tensorflow")
    print(result["machine"], result["versions"])
    result["command"] = " ".join(["mtl-jax", *RUN])
    # Once for nothing: the files of the libraries come from the disk only the first time.
    fresh(["-c", "import mtl_jax.train"], ".")
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for name, arguments in SMALL_COMMANDS.items():
            times = [fresh(arguments, folder)[0] for _ in range(args.repeats)]
            commands.append({"command": name, "seconds": statistics.median(times)})
    figures.print_table("Fresh processes", commands)
    found = first_steps(args.repeats)
    rows = [{"start": kind, **medians(parts)} for kind, parts in found.items()]
    figures.print_table(f"{result['command']}: seconds to the end of the first step", rows)
    if args.repeats > 1:
        figures.save("startup", result | {"commands": commands, "first_step": rows, "all": found})


if __name__ == "__main__":
    main()

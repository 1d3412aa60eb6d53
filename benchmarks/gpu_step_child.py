"""One variant of a train step in a process of its own; `gpu_step.py` starts it.

The only argument is a job as JSON, see `gpu_step.job_of`. Every finding is one line of JSON in the
file `job["out"]`, written at once, so that nothing is lost when the time is up.
"""

import ast
import dataclasses
import importlib
import json
import pathlib
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import step_time
import trace_kernels

from mtl_jax import flops
from mtl_jax.model_config import T5Config

STARTED = time.monotonic()
MODELS = pathlib.Path(__file__).parent.parent / "gin" / "models"
MODULES = {"mtl_jax": "jax_step", "hf": "hugging_face"}
MEMORY_SIGNS = ("resource_exhausted", "out of memory", "status_alloc_failed")
WARM_UP = 3
PROFILED = 3
BETTER = 1.02  # a larger batch goes on being tried while it is this much faster


def sizes(name: str) -> dict[str, Any]:
    """The shape in gin/models/t5_1_1_NAME.gin; read without gin, which may be missing."""
    text = (MODELS / f"t5_1_1_{name}.gin").read_text()
    found = re.findall(r"^T5\.(\w+)\s*=\s*(.+)$", text, re.MULTILINE)
    return {field: ast.literal_eval(value) for field, value in found}


def does_not_fit(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, tells that the device's memory was too small."""
    while error is not None:
        text = str(error).lower()
        # A kernel that wants more shared memory than a block may have is another matter.
        if "shared memory" not in text and any(sign in text for sign in MEMORY_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


class Measurement:
    """Measures one trainer at one batch size after the other and writes down what it finds."""

    def __init__(self, job: dict, trainer: Any, cfg: T5Config, say: Callable[..., None]):
        self._job, self._trainer, self._cfg, self._say = job, trainer, cfg, say
        self.fitted: dict[int, float] = {}  # rows -> sequences per second

    def __call__(self, rows: int) -> float | None:
        """Sequences per second, or None if so many rows do not fit."""
        try:
            row = self._measured(rows)
        except Exception as error:
            if not does_not_fit(error):
                raise
            print(f"  {rows} rows: out of memory", flush=True)
            self._say(rows=rows, out_of_memory=True)
            return None
        print(
            f"  {rows} rows: {row['seconds'] * 1e3:.1f} ms, {row['seq/s']:.1f} seq/s, "
            f"MFU {row['mfu'] or 0:.1%}, peak {row['peak GiB']:.1f} GiB, "
            f"ready in {row['ready s']:.0f} s, loss {row['losses'][0]:.4f}",
            flush=True,
        )
        self._say(**row)
        self.fitted[rows] = row["seq/s"]
        return row["seq/s"]

    def _measured(self, rows: int) -> dict:
        job, trainer, started = self._job, self._trainer, time.perf_counter()
        if job["oom_at"] and rows >= job["oom_at"]:
            raise RuntimeError("RESOURCE_EXHAUSTED: asked for by --oom-at")
        trainer.prepare(rows)
        print(f"  {rows} rows: prepared in {time.perf_counter() - started:.0f} s", flush=True)
        losses = []
        for number in range(WARM_UP):
            trainer.step()
            losses.append(trainer.loss())
            if number == 0:
                ready = time.perf_counter() - started
        times = []
        for _ in range(job["steps"]):
            before = time.perf_counter()
            trainer.step()
            times.append(time.perf_counter() - before)
        work = flops.flops_per_step(self._cfg, rows, *job["lengths"])
        median = statistics.median(times)
        return {
            "rows": rows,
            "seconds": median,
            "least": min(times),
            "most": max(times),
            "steps": len(times),
            "seq/s": rows / median,
            "tokens/s": rows * sum(job["lengths"]) / median,
            "TFLOP/s": work / median / 1e12,
            "mfu": flops.utilisation(work, median, trainer.device_kind),
            "peak GiB": trainer.peak_bytes() / 2**30,
            "ready s": ready,
            "losses": losses,  # of the first steps, from the same start in every variant
        }


def searched(measure: Callable[[int], float | None], start: int) -> Iterator[int]:
    """Measures doubled batch sizes until one is hardly faster; yields each before.

    Where 2n does not fit and n did, 3n/2 ends the search; where the first does not fit, it is
    halved until it does.
    """
    rows, best, too_many, tried = start, 0.0, 0, set()
    while rows not in tried and rows > 0:
        tried.add(rows)
        yield rows
        rate = measure(rows)
        if rate is None:
            if best and too_many:
                return
            too_many = rows
        elif rate < best * BETTER:
            return
        else:
            best = rate
        if not too_many:
            rows *= 2
        else:
            rows = too_many * 3 // 4 if best else too_many // 2


def listed(measure: Callable[[int], float | None], batches: list[int]) -> Iterator[int]:
    """Measures the given batch sizes, up to the first that does not fit; yields each before."""
    for rows in batches:
        yield rows
        if measure(rows) is None:
            return


def run(job: dict, say: Callable[..., None]) -> str:
    """Does the job; returns how it ended."""
    cfg = step_time.TINY if job["tiny"] else T5Config(**sizes(job["model"]))
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    module = importlib.import_module(MODULES[job["framework"]])
    lengths = tuple(job["lengths"])
    trainer = module.Trainer(cfg, job["variant"], lengths)
    say(device=trainer.device_kind, parameters=trainer.num_parameters)
    measure = Measurement(job, trainer, cfg, say)
    plan = listed(measure, job["batches"]) if job["batches"] else searched(measure, job["start"])
    ended, before = "done", STARTED
    for rows in plan:
        now = time.monotonic()
        # A larger batch takes at least as long as the last one, compilation included.
        if measure.fitted and now - STARTED + 1.3 * (now - before) > job["seconds"]:
            ended = f"no time for {rows} rows"
            print(f"  {ended}", flush=True)
            break
        before = now
    if job["profile"] and measure.fitted and hasattr(trainer, "profile"):
        profile(job, trainer, max(measure.fitted, key=measure.fitted.get))
    return ended if measure.fitted else "does not fit"


def profile(job: dict, trainer: Any, rows: int) -> None:
    """Traces some steps, prints their kernels, and leaves trace and sums in `job["profile"]`."""
    target = pathlib.Path(job["profile"])
    target.mkdir(parents=True, exist_ok=True)
    name = f"{job['model']}-{job['variant'].replace('+', '-')}-{rows}"
    trainer.prepare(rows)
    trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        trainer.profile(folder, PROFILED)
        events = trace_kernels.of_device(trace_kernels.read(pathlib.Path(folder)))
        found = trace_kernels.summary(events, PROFILED)
        for path in pathlib.Path(folder).rglob("*.trace.json.gz"):
            shutil.copy(path, target / f"{name}.trace.json.gz")
    print(f"\nprofile of {PROFILED} steps of {rows} rows: {target.name}/{name}.*")
    trace_kernels.print_summary(found)
    sys.stdout.flush()
    (target / f"{name}.kernels.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    job = json.loads(sys.argv[1])
    with open(job["out"], "a", encoding="utf-8") as file:

        def say(**finding: Any) -> None:
            file.write(json.dumps(finding) + "\n")
            file.flush()

        try:
            say(ended=run(job, say))
        except Exception as error:  # whatever it is, it is told to the parent and ends this child
            traceback.print_exc()
            say(ended=f"error: {type(error).__name__}: {str(error)[:500]}")
            sys.exit(1)


if __name__ == "__main__":
    main()

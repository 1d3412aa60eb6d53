"""The train step of T5 1.1 small in float32 on a CPU: mtl_jax against Hugging Face in PyTorch.

    python benchmarks/step_vs_hf.py             # about 6 minutes on 2 cores; --compile adds 3
    python benchmarks/step_vs_hf.py --tiny      # a small model, to see that it works

All train the same parameters on the same batch with AdamW, each in a process of its own with as
many threads; they take turns step by step, so that a change of the machine's speed meets all. In
one process the thread pools of both frameworks slow each other down. The losses of the first steps
must agree: all compute the same function. Prints medians and their ratio to Hugging Face with sdpa,
and writes benchmarks/results/step_vs_hf.json (not with --tiny).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
import jax
import numpy as np
import step_time

from mtl_jax import flops
from mtl_jax.model_config import T5Config

PEER = "hf sdpa"
VARIANTS = ("mtl_jax unroll", PEER, "mtl_jax scan", "hf eager")
COMPILED = "hf sdpa+compile"
CHECKED = 3  # steps whose losses must agree
TOLERANCE = 1e-3
FEWEST_ROUNDS = 3
# Seconds before each turn: OpenMP's threads spin for a fifth of one after their work, on the cores
# that the next one needs.
PAUSE = 0.5
ANSWER = "answer "


class Child:
    """One variant in a process of its own, which makes a step when it is told to."""

    def __init__(self, variant: str, shape: tuple[int, int, int], params: Path, tiny: bool):
        command = [sys.executable, __file__, "--child", variant, "--params", str(params)]
        self._process = subprocess.Popen(
            [*command, "--shape", *map(str, shape), *["--tiny"] * tiny],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started = time.perf_counter()
        self.about = self._answer()  # compiled, and the first steps made
        self.warm_up = time.perf_counter() - started

    def step(self) -> float:
        """One step; returns its seconds."""
        print("go", file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise ChildProcessError(f"{self._process.args} ended with {self._process.wait()}")


def trainer_of(variant: str, cfg: T5Config, shape: tuple[int, int, int], params: Path) -> Any:
    """The trainer of a variant with the parameters of the file, which the first one writes."""
    from flax import traverse_util

    framework, words = variant.split()
    if framework == "mtl_jax":
        import jax_step

        trainer = jax_step.Trainer(cfg, words, shape[1:])
        trainer.prepare(shape[0])
        if not params.exists():
            flat = traverse_util.flatten_dict(trainer.params, sep="/")
            np.savez(params, **jax.device_get(flat))
        return trainer
    import hugging_face
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # XLA takes as many
    other = hugging_face.Trainer(cfg, words, shape[1:])
    other.prepare(shape[0])
    with np.load(params) as flat:
        hugging_face.load(other.model, traverse_util.unflatten_dict(dict(flat), sep="/"))
    return other


def serve(args: argparse.Namespace) -> None:
    """The child's side: a step for every line of standard input."""
    cfg = step_time.TINY if args.tiny else step_time.SMALL
    trainer = trainer_of(args.child, cfg, tuple(args.shape), args.params)
    losses = []
    for _ in range(CHECKED):
        trainer.step()
        losses.append(trainer.loss())
    about = {"losses": losses, "parameters": trainer.num_parameters}
    print(f"{ANSWER}{json.dumps(about)}", flush=True)
    for _ in sys.stdin:
        before = time.perf_counter()
        trainer.step()
        seconds = time.perf_counter() - before
        if not np.isfinite(trainer.loss()):
            raise ArithmeticError(f"{args.child}: the loss is {trainer.loss()}")
        print(f"{ANSWER}{json.dumps({'seconds': seconds})}", flush=True)


def check(children: dict[str, Child]) -> None:
    """Refuses to compare different models.

    Raises:
      ArithmeticError: the losses of the first steps or the numbers of parameters differ.
    """
    first = next(iter(children.values())).about
    for name, child in children.items():
        own = child.about
        print(f"{name}: losses {', '.join(f'{loss:.5f}' for loss in own['losses'])}")
        alike = np.allclose(own["losses"], first["losses"], rtol=TOLERANCE, atol=0.0)
        if not alike or own["parameters"] != first["parameters"]:
            raise ArithmeticError(f"{name}: {own}, but the first variant has {first}")


def measure(
    cfg: T5Config, shape: tuple[int, int, int], names: list[str], args: argparse.Namespace
) -> list[dict]:
    """Runs all variants in turn until `rounds` or `seconds` are reached; rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.npz"
        children = {name: Child(name, shape, params, args.tiny) for name in names}
        check(children)
        times: dict[str, list[float]] = {name: [] for name in names}
        started = time.perf_counter()
        for number in range(args.rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - started > args.seconds:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                time.sleep(PAUSE)
                times[name].append(children[name].step())
        for child in children.values():
            child.close()
    work = flops.flops_per_step(cfg, *shape)
    peer = times[PEER]
    return [
        {
            "variant": name,
            "seconds": statistics.median(own),
            "least": min(own),
            "most": max(own),
            "rounds": len(own),
            "speed, hf sdpa = 1": statistics.median(peer) / statistics.median(own),
            "by least": min(peer) / min(own),
            "by rounds": statistics.median(a / b for a, b in zip(peer, own, strict=True)),
            "GFLOP/s": work / statistics.median(own) / 1e9,
            "ready s": children[name].warm_up,
        }
        for name, own in times.items()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--compile", action="store_true", help="also Hugging Face compiled")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many steps of each")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="per shape: no new round after that"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--params", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        serve(args)
        return
    threads = len(os.sched_getaffinity(0))
    cfg = step_time.TINY if args.tiny else step_time.SMALL
    names = [*VARIANTS, *[COMPILED] * args.compile]
    result = figures.machine("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    result |= {"threads": threads, "load before": os.getloadavg(), "shapes": []}
    print(result["machine"], result["versions"], "load", result["load before"])
    for shape in step_time.TINY_SHAPES if args.tiny else step_time.SHAPES:
        rows, inputs, targets = shape
        found = measure(cfg, shape, names, args)
        figures.print_table(f"{rows} rows of {inputs} + {targets} tokens, float32", found)
        result["shapes"].append(
            {"rows": rows, "inputs_length": inputs, "targets_length": targets}
            | {"model_flops": flops.flops_per_step(cfg, *shape), "variants": found}
        )
    result["load after"] = os.getloadavg()
    # PyTorch's threads wait for each other, XLA's do not: beside other work it loses far more.
    result["void"] = max(result["load before"][0], result["load after"][0]) > threads + 1
    if result["void"]:
        print(f"\nVOID: other work was running, load {result['load after']}")
    if not args.tiny:
        figures.save("step_vs_hf", result)


if __name__ == "__main__":
    main()

"""The train step of T5 1.1 small in float32 on a CPU: mtl_jax against Hugging Face in PyTorch.

    python benchmarks/step_vs_hf.py             # about 7 minutes on 2 cores; --compile adds 3
    python benchmarks/step_vs_hf.py --tiny      # a small model, to see that it works

Both train the same parameters on the same batch with AdamW, in one process with as many threads
each; mtl_jax and Hugging Face take turns step by step, so that a change of the machine's speed
meets both. The losses of the first steps must agree: both compute the same function. Prints medians
and their ratio to Hugging Face with sdpa, and writes benchmarks/results/step_vs_hf.json (not with
--tiny).
"""

import argparse
import os
import statistics
import time

import figures
import hugging_face
import jax
import jax_step
import numpy as np
import step_time
import torch

from mtl_jax import flops
from mtl_jax.model_config import T5Config

# Neighbours take turns: no variant follows another of its own framework but for the last ones.
VARIANTS = (
    ("mtl_jax", "unroll"),
    ("hf", "sdpa"),
    ("mtl_jax", "scan"),
    ("hf", "eager"),
)
COMPILED = ("hf", "sdpa+compile")
PEER = ("hf", "sdpa")
TRAINERS = {"mtl_jax": jax_step.Trainer, "hf": hugging_face.Trainer}
CHECKED = 3  # steps whose losses must agree
TOLERANCE = 1e-3
FEWEST_ROUNDS = 3


def ready(cfg: T5Config, shape: tuple[int, int, int], names: list) -> tuple[dict, dict]:
    """Trainers of all variants with the same parameters, warm, and the seconds that took.

    Raises:
      ArithmeticError: the losses of the first steps differ.
      ValueError: the numbers of parameters differ.
    """
    trainers, seconds, losses, params = {}, {}, {}, None
    for framework, variant in names:
        started = time.perf_counter()
        trainer = TRAINERS[framework](cfg, variant, shape[1:])
        trainer.prepare(shape[0])
        if framework == "mtl_jax" and params is None:
            # A copy: the step consumes its own.
            params = jax.tree.map(np.array, trainer.params)
            num_parameters = trainer.num_parameters
        if framework == "hf":
            hugging_face.load(trainer.model, params)
        if trainer.num_parameters != num_parameters:
            raise ValueError(f"{trainer.num_parameters} parameters instead of {num_parameters}")
        key = framework, variant
        losses[key] = []
        for _ in range(CHECKED):
            trainer.step()
            losses[key].append(trainer.loss())
        trainers[key], seconds[key] = trainer, time.perf_counter() - started
    first = next(iter(losses.values()))
    for key, own in losses.items():
        print(f"{' '.join(key)}: losses {', '.join(f'{loss:.5f}' for loss in own)}")
        if not np.allclose(own, first, rtol=TOLERANCE, atol=0.0):
            raise ArithmeticError(f"{key}: losses {own}, but the first variant's are {first}")
    return trainers, seconds


def measure(
    cfg: T5Config, shape: tuple[int, int, int], names: list, rounds: int, seconds: float
) -> list[dict]:
    """Runs all variants in turn until `rounds` or `seconds` are reached; rows of the table."""
    trainers, warm_up = ready(cfg, shape, names)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
    started, order = time.perf_counter(), list(trainers)
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
            break
        # Turned by two: every round starts with mtl_jax, and frameworks go on alternating.
        turn = 2 * number % len(order)
        for key in order[turn:] + order[:turn]:
            before = time.perf_counter()
            trainers[key].step()
            times[key].append(time.perf_counter() - before)
    for key, trainer in trainers.items():
        if not np.isfinite(trainer.loss()):
            raise ArithmeticError(f"{key}: the loss is {trainer.loss()}")
    work = flops.flops_per_step(cfg, *shape)
    peer = times[PEER]
    return [
        {
            "variant": " ".join(key),
            "seconds": statistics.median(own),
            "least": min(own),
            "most": max(own),
            "rounds": len(own),
            "speed, hf sdpa = 1": statistics.median(peer) / statistics.median(own),
            "by least": min(peer) / min(own),
            "by rounds": statistics.median(a / b for a, b in zip(peer, own, strict=True)),
            "GFLOP/s": work / statistics.median(own) / 1e9,
            "ready s": warm_up[key],
        }
        for key, own in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--compile", action="store_true", help="also Hugging Face compiled")
    parser.add_argument("--rounds", type=int, default=12, help="at most so many steps of each")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="per shape: no new round after that"
    )
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)  # XLA takes as many
    cfg = step_time.TINY if args.tiny else step_time.SMALL
    names = list(VARIANTS) + [COMPILED] * args.compile
    result = figures.machine("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    result |= {"threads": threads, "load before": os.getloadavg(), "shapes": []}
    print(result["machine"], result["versions"], "load", result["load before"])
    for shape in step_time.TINY_SHAPES if args.tiny else step_time.SHAPES:
        rows, inputs, targets = shape
        found = measure(cfg, shape, names, args.rounds, args.seconds)
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

"""Time and memory of the loss head, all logits at once against a chunk of tokens at a time.

    python benchmarks/loss_head.py             # a minute on 2 cores
    python benchmarks/loss_head.py --tiny      # small, to see that it works

The head goes from hidden states to the loss, and back to the gradients of hidden states and
output kernel, of 4096 tokens and T5's vocabulary in float32. All variants are compiled first; then
they run in turn, round after round. Prints medians, their ratio to the first variant and what XLA
says of the memory, and writes benchmarks/results/loss_head.json (not with --tiny).
"""

import argparse
import functools
import statistics
import time

import figures
import jax
import numpy as np

from mtl_jax import loss
from mtl_jax.model_config import T5Config

ROWS, LENGTH = 8, 512
CHUNKS = (0, 256, 512, 1024)  # 0: plain; the others are compared with it


def inputs_of(cfg: T5Config, rows: int, length: int) -> tuple:
    """Random parameters of the head, hidden states, targets, and weights of 1."""
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((cfg.emb_dim, cfg.vocab_size), np.float32)
    return jax.device_put(
        (
            {"decoder": {"logits_dense": {"kernel": kernel / np.sqrt(np.float32(cfg.emb_dim))}}},
            generator.standard_normal((rows, length, cfg.emb_dim), np.float32),
            generator.integers(2, cfg.vocab_size, (rows, length), dtype=np.int32),
            np.ones((rows, length), np.float32),
        )
    )


def compiled(cfg: T5Config, chunk: int, inputs: tuple):
    """The head with its gradients, as a train step has it."""
    head = functools.partial(loss.weighted_loss, cfg, z_loss=1e-4, label_smoothing=0.0, chunk=chunk)
    gradients = jax.value_and_grad(head, argnums=(0, 1), has_aux=True)
    return jax.jit(gradients).lower(*inputs).compile()


def measure(cfg: T5Config, rows: int, length: int, rounds: int) -> list[dict]:
    """Compiles all variants, runs each once, then all in turn."""
    inputs = inputs_of(cfg, rows, length)
    chunks = [chunk * rows * length // (ROWS * LENGTH) for chunk in CHUNKS]
    programs = {chunk: compiled(cfg, chunk, inputs) for chunk in chunks}
    times: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for number in range(rounds + 1):  # round 0 warms up
        start = number % len(chunks)  # nobody always follows the same one
        for chunk in chunks[start:] + chunks[:start]:
            before = time.perf_counter()
            jax.block_until_ready(programs[chunk](*inputs))
            if number:
                times[chunk].append(time.perf_counter() - before)
    memory = {chunk: programs[chunk].memory_analysis().temp_size_in_bytes for chunk in chunks}
    base = statistics.median(times[0])
    return [
        {
            "variant": f"chunks of {chunk} tokens" if chunk else "plain",
            "seconds": statistics.median(times[chunk]),
            "least": min(times[chunk]),
            "most": max(times[chunk]),
            "of the first": statistics.median(times[chunk]) / base,
            "temporary MB": memory[chunk] / 1e6,
            "memory of the first": memory[chunk] / memory[0],
        }
        for chunk in chunks
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small head; writes no file")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each variant")
    args = parser.parse_args()
    cfg = T5Config(vocab_size=1024, emb_dim=64) if args.tiny else T5Config()
    rows, length = (4, 64) if args.tiny else (ROWS, LENGTH)
    result = figures.machine("jax", "jaxlib", "flax", "numpy")
    result["device"] = jax.devices()[0].device_kind
    print(result["machine"], result["device"], result["versions"])
    found = measure(cfg, rows, length, args.rounds)
    figures.print_table(f"{rows * length} tokens, {cfg.vocab_size} logits each", found)
    result |= {"tokens": rows * length, "vocabulary": cfg.vocab_size, "emb_dim": cfg.emb_dim}
    result |= {"rounds": args.rounds, "variants": found}
    if not args.tiny:
        figures.save("loss_head", result)


if __name__ == "__main__":
    main()

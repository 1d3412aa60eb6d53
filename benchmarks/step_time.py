"""Time of a train step of T5 1.1 small in float32, one change at a time.

    python benchmarks/step_time.py             # within 3 minutes on 2 cores
    python benchmarks/step_time.py --tiny      # a small model, to see that it works

Every variant is compiled first; then all are run in turn, round after round, so that a change of
the machine's speed meets all of them. Prints medians and their ratio to the first variant, and
writes benchmarks/results/step_time.json (not with --tiny).
"""

import argparse
import dataclasses
import functools
import statistics
import time

import figures
import jax
import numpy as np

from mtl_jax import flops, model, objective, optim, sharding, step
from mtl_jax.model_config import T5Config

SMALL = T5Config()  # the defaults are T5 1.1 small
TINY = T5Config(vocab_size=640, emb_dim=64, mlp_dim=128, num_encoder_layers=2, num_decoder_layers=2)
OPTIMIZERS = {
    "adamw": optim.OptimizerConfig(name="adamw", learning_rate=1e-4),
    "adafactor": optim.OptimizerConfig(name="adafactor", learning_rate=1e-4),
}
SHAPES = ((4, 256, 64), (2, 512, 128))  # rows, encoder tokens, decoder tokens
TINY_SHAPES = ((2, 32, 16),)
FEWEST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is measured; the first of `VARIANTS` is what the others are compared with."""

    name: str
    optimizer: str = "adamw"
    scan_layers: bool = True
    microbatches: int = 1
    segments: int = 1  # examples packed into a row


VARIANTS = (
    Variant("adamw, scanned"),
    Variant("adafactor", optimizer="adafactor"),
    Variant("unrolled", scan_layers=False),
    Variant("2 microbatches", microbatches=2),
    Variant("4 examples a row", segments=4),
)


def batch_of(cfg: T5Config, shape: tuple[int, int, int], segments: int) -> dict[str, np.ndarray]:
    """A full batch of random tokens: every row holds `segments` examples of equal length."""
    rows, inputs_length, targets_length = shape
    generator = np.random.default_rng(0)

    def side(length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = generator.integers(2, cfg.vocab_size, (rows, length), dtype=np.int32)
        ids = np.arange(length, dtype=np.int32) * segments // length + 1
        return tokens, np.broadcast_to(ids, (rows, length)).copy()

    (inputs, input_segments), (targets, target_segments) = side(inputs_length), side(targets_length)
    return {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": input_segments,
        "encoder_task_ids": np.ones_like(inputs),
        "decoder_input_tokens": np.roll(targets, 1, axis=1),
        "decoder_target_tokens": targets,
        "decoder_segment_ids": target_segments,
        "decoder_task_ids": np.ones_like(targets),
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


class States:
    """One train state for each optimizer; steps consume it and leave the next one, as in a run."""

    def __init__(self, cfg: T5Config):
        self._by_optimizer = {}
        params = jax.jit(functools.partial(model.init, cfg))(jax.random.key(0))
        for name, chosen in OPTIMIZERS.items():
            own = jax.tree.map(lambda x: x.copy(), params)
            opt_state = jax.jit(optim.make_optimizer(chosen).init)(own)
            self._by_optimizer[name] = step.TrainState(jax.numpy.int32(0), own, opt_state)

    def run(self, variant: Variant, update, batch, rng) -> float:
        """Runs one step and returns its seconds."""
        state = self._by_optimizer[variant.optimizer]
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(update(state, batch, rng))
        seconds = time.perf_counter() - started
        if not np.isfinite(metrics["loss"]):
            raise ArithmeticError(f"{variant.name}: the loss is {metrics['loss']}")
        self._by_optimizer[variant.optimizer] = state
        return seconds

    def compiled(self, cfg: T5Config, variant: Variant, batch, rng):
        """The train step as `mtl-jax train` compiles it, on one device."""
        cfg = dataclasses.replace(cfg, scan_layers=variant.scan_layers)
        settings = objective.StepConfig(microbatches=variant.microbatches)
        chosen = OPTIMIZERS[variant.optimizer]
        update = functools.partial(step.train_step, cfg, settings, chosen, 1)
        state = self._by_optimizer[variant.optimizer]
        return jax.jit(update, donate_argnums=0).lower(state, batch, rng).compile()


def measure(cfg: T5Config, shape: tuple[int, int, int], rounds: int, seconds: float) -> list[dict]:
    """Compiles all variants, then runs them in turn until `rounds` or `seconds` are reached."""
    started, rng, states = time.perf_counter(), jax.random.key(0), States(cfg)
    ready, compile_seconds, programs = {}, {}, {}
    for variant in VARIANTS:
        batch = jax.device_put(batch_of(cfg, shape, variant.segments))
        # Packing changes the numbers in the batch, not the program.
        key = dataclasses.replace(variant, name="", segments=1)
        before = time.perf_counter()
        if key not in programs:
            programs[key] = states.compiled(cfg, variant, batch, rng)
            compile_seconds[variant] = time.perf_counter() - before
        ready[variant] = programs[key], batch
        states.run(variant, *ready[variant], rng)  # warm up
    times: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
            break
        # Every round starts with another variant: nobody always follows the same one.
        for variant in (*VARIANTS[number % len(VARIANTS) :], *VARIANTS[: number % len(VARIANTS)]):
            times[variant].append(states.run(variant, *ready[variant], rng))
    work = flops.flops_per_step(cfg, *shape)
    base = statistics.median(times[VARIANTS[0]])
    rows = []
    for variant in VARIANTS:
        median = statistics.median(times[variant])
        rows.append(
            {
                "variant": variant.name,
                "seconds": median,
                "least": min(times[variant]),
                "most": max(times[variant]),
                "rounds": len(times[variant]),
                "of the first": median / base,
                "tokens/s": shape[0] * (shape[1] + shape[2]) / median,
                "GFLOP/s": work / median / 1e9,
                "compile s": compile_seconds.get(variant, "shared"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--rounds", type=int, default=9, help="at most so many steps of each")
    parser.add_argument(
        "--seconds", type=float, default=75.0, help="per shape: no new round after that"
    )
    args = parser.parse_args()
    sharding.configure_jax()
    sharding.make_mesh(sharding.MeshConfig())  # on a CPU also keeps memory, as in a run
    cfg = TINY if args.tiny else SMALL
    device = jax.devices()[0]
    result = figures.machine("jax", "jaxlib", "flax", "optax", "numpy")
    result["device"] = device.device_kind
    result["model"] = dataclasses.asdict(cfg)
    print(result["machine"], result["device"], result["versions"])
    result["shapes"] = []
    for shape in TINY_SHAPES if args.tiny else SHAPES:
        rows, inputs, targets = shape
        found = measure(cfg, shape, args.rounds, args.seconds)
        work = flops.flops_per_step(cfg, *shape)
        title = f"{rows} rows of {inputs} + {targets} tokens, {work / 1e9:,.1f} GFLOP a step"
        figures.print_table(title, found)
        result["shapes"].append(
            {"rows": rows, "inputs_length": inputs, "targets_length": targets}
            | {"model_flops": work, "variants": found}
        )
    if not args.tiny:
        figures.save("step_time", result)


if __name__ == "__main__":
    main()

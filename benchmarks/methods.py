"""What methods that share one update cost: the train step under each, with four tasks.

    python benchmarks/methods.py              # about 10 minutes on 2 cores
    python benchmarks/methods.py --tiny       # a small model, to see that it works

Every step is compiled first; then all are run in turn, round after round, so that a change of the
machine's speed meets all of them. Where a method looks at every n-th step only, its time is the
mean of n steps. Prints medians and their ratio to plain training, the memory of temporaries as
compiled, and the memory for the tasks' gradients that a run predicts at its start.
Writes benchmarks/results/methods.json (not with --tiny).
"""

import argparse
import dataclasses
import functools
import statistics
import time

import figures
import jax
import numpy as np

from mtl_jax import model, objective, optim, sharding, step
from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import Balancer, make_balancer
from mtl_jax.balance.method import GRAM, METHODS, REFERENCE
from mtl_jax.model_config import T5Config

TASKS = ("a", "b", "c", "d")
MODEL = T5Config(
    vocab_size=8192,
    emb_dim=256,
    num_heads=4,
    mlp_dim=512,
    num_encoder_layers=3,
    num_decoder_layers=3,
    scan_layers=False,
)
TINY = dataclasses.replace(MODEL, vocab_size=256, emb_dim=32, mlp_dim=64, num_heads=2)
SHAPE = (32, 64, 32)  # rows, encoder tokens, decoder tokens
BLOCKS = 4
OPTIMIZER = optim.OptimizerConfig(name="adamw", learning_rate=1e-4)
FEWEST_ROUNDS = 3
OPTIONS = {
    "DoReMi": {"reference": "(another model of the same size)"},
    "TransferObjective": {"source": ("a", "b"), "target": ("c", "d")},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One train step; the first of `variants` is what the others are compared with."""

    name: str
    method: str = ""
    blocks: int = 1
    values: tuple[tuple[str, object], ...] = ()
    options: tuple[tuple[str, object], ...] = ()

    def balancer(self, cfg: T5Config) -> Balancer:
        """The method at work on the four tasks."""
        options = OPTIONS.get(self.method, {}) | dict(self.options)
        made = METHODS[self.method](**options) if self.method else None
        values = BalanceConfig(method=self.method, **dict(self.values))
        return make_balancer(values, made, TASKS, cfg)


def variants() -> list[Variant]:
    """Plain training, every method as it is by default, and other ways to the same gradients."""
    BalanceConfig()  # imports the methods
    found = [Variant("plain"), Variant("plain, 4 microbatches", blocks=BLOCKS)]
    loss_side = [n for n, m in METHODS.items() if GRAM not in m.needs]
    gradient_side = [n for n, m in METHODS.items() if GRAM in m.needs]
    found += [Variant(name, name) for name in sorted(loss_side)]
    every = (("every_n_steps", 1),)
    found.append(Variant("DoReMi, every_n_steps = 1", "DoReMi", options=every))
    for name in sorted(gradient_side):
        values = (("groups", "last_shared"),) if name == "GradNorm" else ()
        found.append(Variant(name, name, BLOCKS, values))
    for values in (
        (("groups", "layer"),),
        (("every_n_steps", 4),),
        (("task_gradients", "sketch"),),
        (("task_gradients", "vmap"),),
        (("affinity_every", 1),),
    ):
        label = ", ".join(f"{field} = {value}" for field, value in values)
        blocks = 1 if ("task_gradients", "vmap") in values else BLOCKS
        found.append(Variant(f"CAGrad, {label}", "CAGrad", blocks, values))
    return found


def batch_of(cfg: T5Config) -> dict[str, np.ndarray]:
    """A full batch of random tokens; row r is of task r modulo 4, so a block holds one task."""
    rows, inputs_length, targets_length = SHAPE
    generator = np.random.default_rng(0)
    inputs = generator.integers(2, cfg.vocab_size, (rows, inputs_length), dtype=np.int32)
    targets = generator.integers(2, cfg.vocab_size, (rows, targets_length), dtype=np.int32)
    tasks = (np.arange(rows, dtype=np.int32) % len(TASKS) + 1)[:, None]
    return {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": np.ones_like(inputs),
        "encoder_task_ids": np.broadcast_to(tasks, inputs.shape).copy(),
        "decoder_input_tokens": np.roll(targets, 1, axis=1),
        "decoder_target_tokens": targets,
        "decoder_segment_ids": np.ones_like(targets),
        "decoder_task_ids": np.broadcast_to(tasks, targets.shape).copy(),
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


class Runner:
    """A compiled step and its state, which each step consumes."""

    def __init__(self, cfg: T5Config, variant: Variant, batch: dict, rng: jax.Array):
        balancer = variant.balancer(cfg)
        # What is done at every n-th step only counts with its share.
        self.period = max(balancer.every, 1)
        if balancer.method is not None and balancer.needs(REFERENCE):
            self.period = balancer.method.reference_every
        make = functools.partial(
            step.init_state, cfg, optim.make_optimizer(OPTIMIZER), balancer=balancer
        )
        self._state = jax.jit(make)(jax.random.key(0))
        settings = objective.StepConfig(microbatches=variant.blocks)
        fixed = cfg, settings, OPTIMIZER, len(TASKS)
        update = functools.partial(step.train_step, *fixed, balancer=balancer)
        # As large as the model and never donated: DoReMi compares with a frozen one.
        frozen = jax.jit(make)(jax.random.key(1)).params if balancer.needs(REFERENCE) else None
        self._fixed = batch, rng, frozen
        self._update = jax.jit(update, donate_argnums=0).lower(self._state, *self._fixed).compile()
        self.temporaries = self._update.memory_analysis().temp_size_in_bytes

    def step(self) -> float:
        """Runs the steps of one period and returns the mean of their seconds."""
        started = time.perf_counter()
        for _ in range(self.period):
            self._state, metrics = jax.block_until_ready(self._update(self._state, *self._fixed))
        seconds = (time.perf_counter() - started) / self.period
        if not np.isfinite(metrics["loss"]):
            raise ArithmeticError(f"the loss is {metrics['loss']}")
        return seconds


def measure(cfg: T5Config, rounds: int, seconds: float) -> list[dict]:
    """Compiles all variants, then runs them in turn until `rounds` or `seconds` are reached."""
    rng, batch = jax.random.key(0), jax.device_put(batch_of(cfg))
    ready = {variant: Runner(cfg, variant, batch, rng) for variant in variants()}
    order = list(ready)
    for runner in ready.values():
        runner.step()
    started = time.perf_counter()
    times: dict[Variant, list[float]] = {variant: [] for variant in order}
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
            break
        # Every round starts with another variant: nobody always follows the same one.
        for variant in (*order[number % len(order) :], *order[: number % len(order)]):
            times[variant].append(ready[variant].step())
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.abstract_params(cfg))) * 4
    plain = times[order[0]]
    rows = []
    for variant in order:
        own = times[variant]
        # Of the same round: what slows the machine down slows both.
        ratios = [one / other for one, other in zip(own, plain, strict=True)]
        slots = variant.balancer(cfg).slots_bytes(size) / 2**20
        rows.append(
            {
                "variant": variant.name,
                "seconds": statistics.median(own),
                "of plain": statistics.median(ratios),
                "least": min(own),
                "most": max(own),
                "rounds": len(own),
                "steps a round": ready[variant].period,
                "temporaries MiB": ready[variant].temporaries / 2**20,
                "predicted for gradients MiB": slots,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many steps of each")
    parser.add_argument("--seconds", type=float, default=240.0, help="no new round after that")
    args = parser.parse_args()
    sharding.configure_jax()
    sharding.make_mesh(sharding.MeshConfig())  # on a CPU also keeps memory, as in a run
    cfg = TINY if args.tiny else MODEL
    result = figures.machine("jax", "jaxlib", "flax", "optax", "numpy")
    result["device"] = jax.devices()[0].device_kind
    result["model"] = dataclasses.asdict(cfg)
    print(result["machine"], result["device"], result["versions"])
    result["rows"], result["inputs_length"], result["targets_length"] = SHAPE
    result["variants"] = measure(cfg, args.rounds, args.seconds)
    rows, inputs, targets = SHAPE
    title = f"{len(TASKS)} tasks, {rows} rows of {inputs} + {targets} tokens, AdamW"
    figures.print_table(title, result["variants"])
    if not args.tiny:
        figures.save("methods", result)


if __name__ == "__main__":
    main()

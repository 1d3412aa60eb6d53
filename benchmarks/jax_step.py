"""One train step of mtl_jax as the benchmarks of the whole step run it: one device, one batch."""

import dataclasses
import functools
import resource
from typing import Any

import jax
import numpy as np
import variants
from step_time import batch_of

from mtl_jax import model, objective, optim, sharding, step
from mtl_jax.model_config import T5Config

# As the other framework's: AdamW without decay, at a constant rate.
OPTIMIZER = optim.OptimizerConfig(name="adamw", schedule="constant", learning_rate=1e-4)


def replaced(config: Any, fields: dict[str, Any]) -> Any:
    """`dataclasses.replace`; raises ValueError for a field that this version lacks."""
    missing = fields.keys() - {field.name for field in dataclasses.fields(config)}
    if missing:
        raise ValueError(f"this mtl_jax has no {type(config).__name__}.{', '.join(missing)}")
    return dataclasses.replace(config, **fields)


class Trainer:
    """Compiles and runs the step of one variant on full rows of random tokens.

    Args:
      cfg: the model; the variant's words change it.
      variant: see `variants.py`.
      lengths: tokens of a row's (inputs, targets).
    """

    def __init__(self, cfg: T5Config, variant: str, lengths: tuple[int, int]):
        sharding.configure_jax()
        sharding.make_mesh(sharding.MeshConfig())  # on a CPU also keeps memory, as in a run
        chosen = variants.settings("mtl_jax", variant)
        self.cfg = replaced(cfg, chosen["model"])
        optimizer_cfg = replaced(OPTIMIZER, chosen["optimizer"])
        self._lengths = lengths
        self._device = jax.devices()[0]
        self._rng = jax.random.key(0)
        optimizer = optim.make_optimizer(optimizer_cfg)
        self._init = jax.jit(functools.partial(step.init_state, self.cfg, optimizer))
        settings = replaced(objective.StepConfig(), chosen["step"])
        update = functools.partial(step.train_step, self.cfg, settings, optimizer_cfg, 1)
        self._jitted = jax.jit(update, donate_argnums=0)
        self._programs: dict[int, Any] = {}
        self._state = self._batch = self._program = self._metrics = None

    @property
    def device_kind(self) -> str:
        """Name of the device, as `mtl_jax.flops` knows it."""
        return self._device.device_kind

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(self.cfg)))

    @property
    def params(self) -> Any:
        """The parameters before the next step."""
        return self._state.params

    def prepare(self, rows: int) -> None:
        """A fresh state, a batch of so many rows, and the compiled step for them."""
        self._state = self._batch = self._metrics = None  # first make room
        self._state = self._init(self._rng)
        self._batch = jax.device_put(batch_of(self.cfg, (rows, *self._lengths), 1))
        if rows not in self._programs:
            lowered = self._jitted.lower(self._state, self._batch, self._rng)
            self._programs[rows] = lowered.compile()
        self._program = self._programs[rows]

    def step(self) -> None:
        """One update, waited for."""
        self._state, self._metrics = self._program(self._state, self._batch, self._rng)
        jax.block_until_ready((self._state, self._metrics))

    def loss(self) -> float:
        """The loss of the last step."""
        return float(np.asarray(self._metrics["loss"]))

    def peak_bytes(self) -> int:
        """Most device memory so far; on a CPU that of the process."""
        stats = self._device.memory_stats()
        if stats is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return stats["peak_bytes_in_use"]

    def profile(self, folder: str, steps: int) -> None:
        """Runs steps under JAX's profiler, which writes below `folder`."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # kernels, not lines of Python
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                self.step()

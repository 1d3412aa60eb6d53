"""Optimizers and learning-rate schedules with T5X's meaning, built from optax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.errors import UserError, suggest

STACKED = ("encoder", "decoder")  # subtrees whose "layers" carry a leading axis
OPTIMIZERS = ("adafactor", "adamw")
ONLY_OF = dict.fromkeys(("beta1", "beta2", "epsilon"), "adamw") | dict.fromkeys(
    ("momentum", "decay_rate", "min_dim_size_to_factor", "multiply_by_parameter_scale"), "adafactor"
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule.

    Attributes:
      name: "adafactor" (T5's) or "adamw".
      schedule: T5X's factor string, factors joined by "*": constant, linear_warmup, linear_decay,
        rsqrt_decay, rsqrt_normalized_decay, decay_every, cosine_decay.
      learning_rate: the constant of the schedule.
      warmup_steps: steps of linear_warmup; before them rsqrt_decay is flat.
      decay_factor: of decay_every (per interval) and linear_decay (per step).
      steps_per_decay: interval of decay_every.
      steps_per_cycle: cycle of cosine_decay.
      step_offset: steps before this one count as step 0.
      min_learning_rate: the schedule never goes below.
      clip_norm: gradients with a larger global norm are scaled down to it; 0 turns this off.
      weight_decay: acts on matrices, not on norms and position biases. AdamW multiplies it by the
        learning rate; Adafactor takes this share of the weights off at every step, as optax's.
      beta1: AdamW's first moment.
      beta2: AdamW's second moment.
      epsilon: AdamW's.
      momentum: Adafactor's; 0 for none.
      decay_rate: Adafactor's exponent of the second-moment decay.
      min_dim_size_to_factor: Adafactor factors matrices whose two sides are at least this.
      multiply_by_parameter_scale: Adafactor's relative step size.
    """

    name: str = "adafactor"
    schedule: str = "constant * linear_warmup * rsqrt_decay"
    learning_rate: float = 1.0
    warmup_steps: int = 10000
    decay_factor: float = 0.5
    steps_per_decay: int = 20000
    steps_per_cycle: int = 100000
    step_offset: int = 0
    min_learning_rate: float = 1e-8
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0
    decay_rate: float = 0.8
    min_dim_size_to_factor: int = 128
    multiply_by_parameter_scale: bool = True

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(
                f"Optimizer.name: unknown optimizer {self.name!r}.{suggest(self.name, OPTIMIZERS)}"
                f" Known: {', '.join(OPTIMIZERS)}."
            )
        for field in ("warmup_steps", "steps_per_decay", "steps_per_cycle"):
            if getattr(self, field) < 1:
                raise UserError(f"Optimizer.{field} must be at least 1.")
        for field in ("learning_rate", "clip_norm", "weight_decay"):
            if getattr(self, field) < 0:
                raise UserError(f"Optimizer.{field} must not be negative.")
        for option in dataclasses.fields(self):
            owner = ONLY_OF.get(option.name, self.name)
            if owner != self.name and getattr(self, option.name) != option.default:
                raise UserError(
                    f"Optimizer.{option.name} belongs to {owner}, but Optimizer.name = "
                    f"{self.name!r}: remove one of the two."
                )
        for name in _factors(self):
            if name not in FACTORS:
                raise UserError(
                    f"Optimizer.schedule: unknown factor {name!r}.{suggest(name, FACTORS)}"
                    f" Known: {', '.join(FACTORS)}."
                )


def _factors(cfg: OptimizerConfig) -> list[str]:
    return [name.strip() for name in cfg.schedule.split("*")]


# Each factor of the schedule string as a function of (config, step); T5X's definitions.
FACTORS: dict[str, Callable[[OptimizerConfig, jax.Array], Any]] = {
    "constant": lambda c, step: c.learning_rate,
    "linear_warmup": lambda c, step: jnp.minimum(1.0, step / c.warmup_steps),
    "linear_decay": lambda c, step: (
        c.learning_rate
        * jnp.minimum(step / c.warmup_steps, 1.0 + c.decay_factor * (c.warmup_steps - step))
    ),
    "rsqrt_decay": lambda c, step: jax.lax.rsqrt(jnp.maximum(step, c.warmup_steps)),
    "rsqrt_normalized_decay": lambda c, step: jax.lax.rsqrt(
        jnp.maximum(step / c.warmup_steps, 1.0)
    ),
    "decay_every": lambda c, step: c.decay_factor ** jnp.floor(step / c.steps_per_decay),
    "cosine_decay": lambda c, step: (
        0.5
        * (
            1.0
            + jnp.cos(jnp.pi * (jnp.maximum(0.0, (step - c.warmup_steps) / c.steps_per_cycle) % 1))
        )
    ),
}


def learning_rate(cfg: OptimizerConfig, step: jax.Array | int) -> jax.Array:
    """The learning rate at a step (float32 scalar); the first update is step 0, as in T5X."""
    step = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - cfg.step_offset)
    rate = jnp.float32(1.0)
    for name in _factors(cfg):
        rate = rate * FACTORS[name](cfg, step)
    return jnp.maximum(rate, cfg.min_learning_rate).astype(jnp.float32)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """The optax chain: clip, then the update rule.

    Adafactor runs once for each layer of a stack, so that moments, clipping and parameter scale
    are those of the unstacked layer (T5X's logical factor rules, Shazeer and Stern 2018).
    """

    def schedule(step: jax.Array) -> jax.Array:
        return learning_rate(cfg, step)

    if cfg.name == "adamw":
        rule = optax.adamw(
            schedule,
            b1=cfg.beta1,
            b2=cfg.beta2,
            eps=cfg.epsilon,
            weight_decay=cfg.weight_decay,
            mask=_decayed,
        )
    else:
        rule = _layer_by_layer(
            optax.adafactor(
                schedule,
                min_dim_size_to_factor=cfg.min_dim_size_to_factor,
                decay_rate=cfg.decay_rate,
                multiply_by_parameter_scale=cfg.multiply_by_parameter_scale,
                momentum=cfg.momentum or None,
                weight_decay_rate=cfg.weight_decay or None,
                weight_decay_mask=_decayed,
            )
        )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), rule) if cfg.clip_norm else rule


def _decayed(params: Any) -> Any:
    """True at the leaves that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def _layer_by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `rule` to each layer of the stacks on its own, and to the rest as it is."""

    def labels(params: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            keys = [entry.key for entry in path]
            return keys[0] if len(keys) > 1 and keys[1] == "layers" else "rest"

        return jax.tree_util.tree_map_with_path(label, params)

    def init(params: Any) -> Any:
        # A tree without this stack: there is no layer to map over.
        return jax.vmap(rule.init)(params) if jax.tree.leaves(params) else ()

    def update(updates: Any, state: Any, params: Any) -> Any:
        if not jax.tree.leaves(updates):
            return updates, state
        return jax.vmap(rule.update)(updates, state, params)

    each_layer = optax.GradientTransformation(init, update)
    return optax.partition({"rest": rule} | dict.fromkeys(STACKED, each_layer), labels)

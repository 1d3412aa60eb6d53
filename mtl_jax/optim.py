"""Optimizers and learning-rate schedules with T5X's meaning, as optax transformations."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import patterns
from mtl_jax.errors import UserError, suggest

STACKED = ("encoder", "decoder")  # subtrees whose "layers" carry a leading axis
# Below "sharing": subtrees with a leading axis of entries (`sharing/bank.py`), before the layers'.
BANKS = ("task", "cluster", "inventory", "experts")
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
      freeze: patterns of parameters that stay as they are, such as 'encoder/.*' (`patterns.py`).
        They get no gradient, no update, no weight decay and no optimizer state, and do not count in
        the gradient's norm. The layers of a stack are one parameter: they freeze together.
      learning_rate_scale: pairs (pattern, factor): the learning rate of these parameters is
        `factor` times the schedule's (after `min_learning_rate`); the first pattern that matches
        decides. Weight decay follows in AdamW; in Adafactor, where it does not depend on the
        learning rate, it stays. Clipping is by the one norm of all gradients. May change when a run
        is continued; `freeze` may not, for the optimizer's state is another.
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
    freeze: Sequence[str] = ()
    learning_rate_scale: Sequence[tuple[str, float]] = ()

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
        self._check_groups()

    def _check_groups(self) -> None:
        patterns.check("Optimizer.freeze", self.freeze)
        object.__setattr__(self, "freeze", tuple(self.freeze))
        object.__setattr__(self, "learning_rate_scale", tuple(map(tuple, self.learning_rate_scale)))
        patterns.check("Optimizer.learning_rate_scale", [p for p, _ in self.learning_rate_scale])
        for pattern, factor in self.learning_rate_scale:
            if not 0.0 < factor < math.inf:
                hint = (
                    " To leave parameters as they are, use Optimizer.freeze." if not factor else ""
                )
                raise UserError(
                    f"Optimizer.learning_rate_scale: the factor of {pattern!r} must be positive "
                    f"and finite, got {factor}.{hint}"
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

    Adafactor treats each layer of a stack on its own: moments, clipping and parameter scale are
    those of the unstacked layer (T5X's logical factor rules).

    Returns:
      `init` takes all parameters and makes the state of those that are trained; `update` takes and
      gives trees of these alone (see `split`).
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
        # What AdamW gives is the learning rate times something that does not depend on it.
        rule = _scaled(cfg, rule) if cfg.learning_rate_scale else rule
    else:
        rules = [
            scale_by_adafactor(
                schedule,
                decay_rate=cfg.decay_rate,
                min_dim_size_to_factor=cfg.min_dim_size_to_factor,
                multiply_by_parameter_scale=cfg.multiply_by_parameter_scale,
                factor=functools.partial(rate_factor, cfg),
            )
        ]
        if cfg.momentum:
            rules.append(optax.ema(cfg.momentum, debias=False))
        if cfg.weight_decay:
            rules.append(optax.add_decayed_weights(cfg.weight_decay, mask=_decayed))
        rule = optax.chain(*rules, optax.scale(-1.0))
    rule = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), rule) if cfg.clip_norm else rule
    return optax.GradientTransformation(
        lambda params: rule.init(split(cfg, params)[0]), rule.update
    )


def _decayed(params: Any) -> Any:
    """True at the leaves that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


# ---------------------------------------------------------------------------------------------
# Groups of parameters
# ---------------------------------------------------------------------------------------------


def check_groups(cfg: OptimizerConfig, params: Any) -> None:
    """Refuses patterns of `freeze` and `learning_rate_scale` that do nothing to these parameters.

    Args:
      cfg: the update rule.
      params: tree of the model's parameters, or of their shapes.

    Raises:
      UserError: names the pattern and near paths; or nothing is left to train.
    """
    paths = list(patterns.by_path(params))
    for pattern in cfg.freeze:
        patterns.decide("Optimizer.freeze", [pattern], paths)
    trained = [path for path in paths if not _is_frozen(cfg, path)]
    if not trained:
        raise UserError(
            f"Optimizer.freeze = {cfg.freeze!r} freezes all parameters: leave some to train."
        )
    scaled = [pattern for pattern, _ in cfg.learning_rate_scale]
    for pattern in scaled:
        found = [path for path in paths if patterns.matches(pattern, path)]
        if found and not set(found) & set(trained):
            raise UserError(
                f"Optimizer.learning_rate_scale: all that {pattern!r} matches is frozen by "
                "Optimizer.freeze: remove one of the two."
            )
    patterns.decide("Optimizer.learning_rate_scale", scaled, trained)


def split(cfg: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """The parameters that are trained and those that are frozen, as two trees of distinct leaves.

    Frozen parameters are no part of what is differentiated or updated, rather than getting an
    update of zero: so there is neither gradient nor state of them, and they stay bit by bit.
    """
    if not cfg.freeze:
        return params, {}
    leaves = patterns.by_path(params)
    frozen = {path: leaf for path, leaf in leaves.items() if _is_frozen(cfg, path)}
    trained = {path: leaf for path, leaf in leaves.items() if path not in frozen}
    return patterns.as_tree(trained), patterns.as_tree(frozen)


def merge(trained: Any, frozen: Any) -> Any:
    """The whole tree again, of what `split` gives."""
    if not frozen:
        return trained
    return patterns.as_tree(patterns.by_path(trained) | patterns.by_path(frozen))


def rate_factor(cfg: OptimizerConfig, path: str) -> float:
    """What the learning rate of the parameter at `path` is multiplied by."""
    for pattern, factor in cfg.learning_rate_scale:
        if patterns.matches(pattern, path):
            return factor
    return 1.0


def _is_frozen(cfg: OptimizerConfig, path: str) -> bool:
    return any(patterns.matches(pattern, path) for pattern in cfg.freeze)


def _scaled(
    cfg: OptimizerConfig, rule: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Multiplies the updates by the factors of their groups.

    Not by `optax.partition`, whose state has another structure than that of `rule`: a run may be
    continued with other factors, or none.
    """

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = rule.update(grads, state, params)
        scaled = {x: u * rate_factor(cfg, x) for x, u in patterns.by_path(updates).items()}
        return patterns.as_tree(scaled), state

    return optax.GradientTransformation(rule.init, update)


# ---------------------------------------------------------------------------------------------
# Adafactor
# ---------------------------------------------------------------------------------------------


class AdafactorState(NamedTuple):
    """Second moments; leaves that do not apply to a parameter are `zeros(1)`.

    Attributes:
      step: int32 scalar, updates done so far.
      v_row: of factored matrices, without the larger of their axes (as in `optax.adafactor`).
      v_col: of factored matrices, without the smaller axis.
      v: of all other parameters, in their shape.
    """

    step: jax.Array
    v_row: Any
    v_col: Any
    v: Any


def scale_by_adafactor(
    schedule: Callable[[jax.Array], jax.Array],
    *,
    decay_rate: float,
    min_dim_size_to_factor: int,
    multiply_by_parameter_scale: bool,
    factor: Callable[[str], float] = lambda path: 1.0,
) -> optax.GradientTransformation:
    """Adafactor's step before its sign is turned (Shazeer and Stern 2018, algorithms 4 and 5).

    For a matrix X with gradient G, at step t = 1, 2, ..., with a = the schedule:

        b = 1 - t^-decay_rate                                        (section 7.2)
        R = b R + (1 - b) mean of (G^2 + 1e-30) over the larger axis (algorithm 4)
        C = b C + (1 - b) mean of (G^2 + 1e-30) over the smaller axis
        U = G / sqrt(R C / mean(R))
        U = U / max(1, RMS(U))                                       (section 6, d = 1)
        step = a max(1e-3, RMS(X)) U                                 (section 8)

    Vectors and small matrices keep V = b V + (1 - b) (G^2 + 1e-30) and take U = G / sqrt(V)
    (algorithm 5). Each layer of a stack, and each task's of a bank, is a matrix or vector of its
    own. The numbers are those of
    `optax.adafactor` on single layers; axes are explicit here, where a `vmap` of it over the layers
    made XLA's CPU backend move every matrix several times.

    Args:
      schedule: learning rate of an update, counted from 0.
      decay_rate: exponent of the decay.
      min_dim_size_to_factor: matrices are factored if both sides are at least this.
      multiply_by_parameter_scale: whether RMS(X) is in the step.
      factor: multiplies the learning rate of the parameter at a path.
    """

    def init(params: Any) -> AdafactorState:
        def moments(path: Any, param: jax.Array) -> Sequence[jax.Array]:
            factored = factored_axes(param.shape, _stacked(path), min_dim_size_to_factor)
            none, zeros = jnp.zeros(1), jnp.zeros_like(param)
            if factored is None:
                return none, none, zeros
            small, large = factored
            return jnp.sum(zeros, large), jnp.sum(zeros, small), none

        return AdafactorState(jnp.zeros((), jnp.int32), *_unzip(moments, params))

    def update(grads: Any, state: AdafactorState, params: Any) -> tuple[Any, AdafactorState]:
        decay = 1.0 - (state.step + 1).astype(jnp.float32) ** -decay_rate
        rate = schedule(state.step)

        def one(path: Any, param: jax.Array, grad: jax.Array, *moments: jax.Array) -> Any:
            stacked = _stacked(path)
            layer = range(stacked, param.ndim)
            factored = factored_axes(param.shape, stacked, min_dim_size_to_factor)
            new_moments, factors = _second_moment(grad, moments, decay, factored)
            clip = jnp.maximum(1.0, jnp.sqrt(_mean_square(math.prod(factors, start=grad), layer)))
            size = rate * factor("/".join(entry.key for entry in path)) / clip
            if multiply_by_parameter_scale:
                size = size * jnp.maximum(1e-3, jnp.sqrt(_mean_square(param, layer)))
            return math.prod(factors, start=grad * size), *new_moments

        steps, *moments = _unzip(one, params, grads, *state[1:])
        return steps, AdafactorState(state.step + 1, *moments)

    return optax.GradientTransformation(init, update)


def _unzip(function: Any, params: Any, *others: Any) -> list[Any]:
    """`function(path, leaf, *leaves)` gives a tuple for each leaf; returns a tuple of trees."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    columns = [jax.tree.leaves(other) for other in others]
    results = [
        function(path, leaf, *rest) for (path, leaf), *rest in zip(leaves, *columns, strict=True)
    ]
    return [jax.tree.unflatten(tree, column) for column in zip(*results, strict=True)]


def _stacked(path: Any) -> int:
    """How many leading axes of a parameter only stack: entries of a bank, then layers."""
    keys = [entry.key for entry in path]
    if keys[0] == "sharing":
        return int(keys[1] in BANKS) + int("layers" in keys)
    return int(len(keys) > 1 and keys[0] in STACKED and keys[1] == "layers")


def factored_axes(shape: Sequence[int], stacked: int, least: int) -> tuple[int, int] | None:
    """The axes (smaller, larger) of a layer's matrix, or None if it is not factored."""
    order = np.argsort(shape[stacked:])
    if len(order) < 2 or shape[stacked + order[-2]] < least:
        return None
    return stacked + int(order[-2]), stacked + int(order[-1])


def _second_moment(
    grad: jax.Array, moments: Sequence[jax.Array], decay: jax.Array, factored: Any
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """The new (v_row, v_col, v), and the factors of 1 / sqrt(V), to be broadcast."""
    v_row, v_col, v = moments
    if factored is None:
        v = decay * v + (1.0 - decay) * (jnp.square(grad) + 1e-30)
        return (v_row, v_col, v), (jax.lax.rsqrt(v),)

    def moved(old: jax.Array, axis: int) -> jax.Array:
        return decay * old + (1.0 - decay) * (_mean_square(grad, [axis]).squeeze(axis) + 1e-30)

    small, large = factored
    v_row, v_col = moved(v_row, large), moved(v_col, small)
    row, col = jnp.expand_dims(v_row, large), jnp.expand_dims(v_col, small)
    row = row / jnp.mean(row, small, keepdims=True)
    return (v_row, v_col, v), (jax.lax.rsqrt(row), jax.lax.rsqrt(col))


def _mean_square(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Over `axes`, which are kept with size 1."""
    return jnp.mean(jnp.square(x), tuple(axes), keepdims=True)

"""How tasks share one update: a method turns observations into weights, one for each task.

The update is `sum over tasks of weight x gradient of the task's mean loss`. So every method is a
pure function of small arrays, can be tested on a 2 x 3 matrix, and never sees a gradient.

Letters: N tasks, K groups of parameters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.struct
import jax

from mtl_jax.errors import UserError, suggest

# What a method may ask for, beside what is always there.
GRAM = "gram"  # inner products of the tasks' gradients
LOSSES = "losses"  # the losses of this very batch before its weights are set
LOSSES_AFTER = "losses_after"  # the losses of the same batch after the update
REFERENCE = "reference"  # by how much the losses are above those of a frozen model
NEEDS = frozenset({GRAM, LOSSES, LOSSES_AFTER, REFERENCE})

State = Any  # a pytree of small arrays; part of the train state


@flax.struct.dataclass
class Observations:
    """What is known of one global batch when weights are asked for; the same on every device.

    Attributes:
      step: int32 scalar, updates done so far.
      tokens: float32 [N], target tokens of each task in the batch (examples, where
        `Balance.reduction` is "example_mean": whatever the mean loss is a mean over).
      shares: float32 [N], each task's share of the tokens; as weights, T5's plain objective. The
        train step divides by these very numbers, so that weights equal to them change no bit.
      losses: float32 [N], mean loss of each task, 0 where it is absent. Before the update; those of
        this batch if the method needs GRAM or LOSSES, or is asked in `observe`.
      correct: float32 [N], share of tokens predicted rightly, 0 where absent; there with `losses`.
      gram: float32 [K, N, N], inner products of the gradients of the tasks' mean losses, for each
        group of parameters; rows and columns of absent tasks are 0. None unless needed.
      excess: float32 [N], mean of what the cross-entropy of each token is above that of the frozen
        reference, at least 0; 0 where absent. There with `losses`; None unless needed.
      rng: a PRNG key for this step; the same after a restart.
      names: the tasks' names; static.
    """

    step: jax.Array
    tokens: jax.Array
    shares: jax.Array
    losses: jax.Array
    correct: jax.Array
    gram: jax.Array | None
    excess: jax.Array | None
    rng: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @property
    def present(self) -> jax.Array:
        """Bool [N]: which tasks have a token in the batch."""
        return self.tokens > 0


class Method:
    """One way to share the update; subclasses are frozen dataclasses whose fields Gin sets.

    `weights` and `observe` are traced under jit. An absent task gets weight 0 and keeps its state,
    and the others are treated as if it did not exist.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[str] = ""  # beyond a plain step, in words

    @property
    def reference_every(self) -> int:
        """Steps between two looks at the reference, for a method that needs REFERENCE.

        In the steps between, `Observations.excess` is zeros.
        """
        return 1

    def check(self, names: Sequence[str]) -> None:
        """Refuses options that do not fit these tasks.

        Raises:
          UserError: names the field and what would fit.
        """

    def init(self, num_tasks: int, num_groups: int) -> State:
        """The state before the first step."""
        return ()

    def weights(self, state: State, seen: Observations) -> tuple[jax.Array, State, dict[str, Any]]:
        """The weights of this step.

        Args:
          state: of `init` or the step before.
          seen: `losses` and `correct` are those of this batch only if the method needs GRAM or
            LOSSES, and zeros otherwise; learn from them in `observe`.

        Returns:
          (float32 [N], or [K, N] from a method that needs GRAM; the state; scalars or vectors [N]
          to log, by name).
        """
        raise NotImplementedError

    def observe(self, state: State, seen: Observations, losses_after: jax.Array | None) -> State:
        """The state after the update.

        Args:
          state: as `weights` returned it.
          seen: with this batch's `losses` and `correct` for every method.
          losses_after: float32 [N], for a method that needs LOSSES_AFTER.
        """
        return state


METHODS: dict[str, type[Method]] = {}  # by Gin name, which is the name of the class


def register(kind: type[Method]) -> type[Method]:
    """Class decorator: the method can be chosen as `Balance.method = 'NAME'` and set as NAME.field.

    Raises:
      UserError: another method has this name, it is no frozen dataclass with a default for every
        field, or needs what there is not.
    """
    name = kind.__name__
    known = METHODS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (
        kind.__module__,
        kind.__qualname__,
    ):
        raise UserError(
            f"There are two methods {name!r}: in {known.__module__}, {kind.__module__}."
        )
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
        raise UserError(f"Method {name!r} must be a @dataclasses.dataclass(frozen=True).")
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"Method {name!r}: its field {field.name!r} needs a default.")
    for need in kind.needs - NEEDS:
        raise UserError(f"Method {name!r} needs {need!r}, but there is {sorted(NEEDS)}.")
    METHODS[name] = kind
    return kind


def find(name: str) -> type[Method]:
    """The method of a name.

    Raises:
      UserError: there is none; lists those there are.
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UserError(
            f"Balance.method: unknown method {name!r}.{suggest(name, METHODS)} Known: {known}. "
            "Name the module of your own in Balance.modules."
        )
    return METHODS[name]

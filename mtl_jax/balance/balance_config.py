"""The values that say how tasks share one update."""

import dataclasses
from collections.abc import Sequence

from mtl_jax import user_modules
from mtl_jax.balance.method import GRAM, METHODS, find
from mtl_jax.errors import UserError, suggest

GROUPS = {
    "whole_model": "one weight for a task",
    "enc_dec": "one for the encoder, one for the decoder, one for the rest (embeddings)",
    "layer": "one for each layer, one for the rest",
    "last_shared": "one, from the gradients of the decoder's last layer alone",
}
TASK_GRADIENTS = {
    "microbatch": "microbatches of one task each: about the cost of a plain step, N gradients",
    "vmap": "a backward pass for each task over any rows: N gradients and N times the activations",
    "sketch": "two passes over microbatches of one task each, and no gradients kept",
}
BY = {
    "task": "every SeqIO task, so every prompt of a dataset, is one",
    "dataset": "all tasks of a dataset are one",
    "family": "all tasks of a family are one",
}
REDUCTIONS = ("token_mean", "example_mean")
RESCALES = {
    "none": "as the method's paper has it",
    "sum_to_one": "the weights of the tasks that are present sum to one",
    "mean_norm": "the update has the norm of the plain one (needs gradients per task)",
}
PRE_NORMALIZE = {
    "none": "the gradients of the tasks' mean losses",
    "l2": "the method sees them at length one, in each group",
    "loss": "it sees those of the losses' logarithms: each over its loss",
}
_OF_GRADIENTS = ("groups", "task_gradients", "sketch_size")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """How tasks share one update.

    Attributes:
      method: name of a method, whose own fields are set as METHOD.field; empty: plain training.
      modules: Python modules imported for the methods that they register.
      by: what counts as one task, a name of `BY`; tasks say what they are of (`task_info.py`).
      reduction: what a task's loss is a mean over, and what the plain objective counts:
        "token_mean" (T5) or "example_mean", in which long targets weigh no more than short ones.
      groups: which parameters share one weight of a task, a name of `GROUPS`.
      task_gradients: how gradients of single tasks are made, a name of `TASK_GRADIENTS`.
      sketch_size: numbers kept of a gradient in each group, with task_gradients = "sketch".
      every_n_steps: steps between two solutions of a method that needs gradients per task; the
        weights hold until the next one, and a step in between costs what a plain one does.
      pre_normalize: what gradients a method that needs them sees, a name of `PRE_NORMALIZE`.
      rescale: of the weights, a name of `RESCALES`.
      monitor_every: steps between two looks at the gradients of single tasks under a method that
        does not need them, for the log; 0: none.
      affinity_every: steps between two measurements of how a step on one task alone would change
        the losses of all (`lookahead.py`), for the log; a multiple of the steps between two looks
        at the gradients; 0: none.
      follow_rates: the rates of the mixture follow the method's state (`Method.rates`) from one
        evaluation to the next.
    """

    method: str = ""
    modules: Sequence[str] = ()
    by: str = "task"
    reduction: str = "token_mean"
    groups: str = "whole_model"
    task_gradients: str = "microbatch"
    sketch_size: int = 4096
    every_n_steps: int = 1
    pre_normalize: str = "none"
    rescale: str = "none"
    monitor_every: int = 0
    affinity_every: int = 0
    follow_rates: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            raise UserError(f"Balance.modules must be a list of names: write [{self.modules!r}].")
        object.__setattr__(self, "modules", tuple(self.modules))
        for field, known in (
            ("by", BY),
            ("reduction", REDUCTIONS),
            ("groups", GROUPS),
            ("task_gradients", TASK_GRADIENTS),
            ("pre_normalize", PRE_NORMALIZE),
            ("rescale", RESCALES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise UserError(
                    f"Balance.{field} must be one of {', '.join(known)}, got {value!r}."
                    f"{suggest(value, known)}"
                )
        for field, least in (
            ("sketch_size", 16),
            ("every_n_steps", 1),
            ("monitor_every", 0),
            ("affinity_every", 0),
        ):
            if getattr(self, field) < least:
                raise UserError(
                    f"Balance.{field} must be at least {least}, got {getattr(self, field)}."
                )
        user_modules.load("Balance.modules", ("mtl_jax.balance.methods", *self.modules))
        self._check_options()

    @property
    def sees_gradients(self) -> bool:
        """Whether gradients of single tasks are made at some steps."""
        return self.monitor_every > 0 or (bool(self.method) and GRAM in METHODS[self.method].needs)

    def _check_options(self) -> None:
        """Refuses options that would do nothing."""
        if self.method:
            find(self.method)
        default = {field.name: field.default for field in dataclasses.fields(self)}
        idle = [f for f in _OF_GRADIENTS if getattr(self, f) != default[f]]
        if idle and not self.sees_gradients:
            raise UserError(
                f"Balance.{idle[0]} is for methods that look at the gradients of single tasks, and "
                f"Balance.method = {self.method!r} does not: choose one that does, set "
                f"Balance.monitor_every, or remove Balance.{idle[0]}."
            )
        if self.sketch_size != default["sketch_size"] and self.task_gradients != "sketch":
            raise UserError("Balance.sketch_size needs Balance.task_gradients = 'sketch'.")
        needs_gram = bool(self.method) and GRAM in METHODS[self.method].needs
        if self.monitor_every and needs_gram:
            raise UserError(
                f"Balance.monitor_every: {self.method} looks at the gradients anyway, every "
                "Balance.every_n_steps: remove monitor_every."
            )
        if self.every_n_steps > 1 and not needs_gram:
            raise UserError(
                f"Balance.every_n_steps is for methods that need gradients per task, and "
                f"{self.method or 'plain training'} does not: remove it."
            )
        if (
            self.every_n_steps > 1
            and self.task_gradients == "vmap"
            and self.groups in ("enc_dec", "layer")
        ):
            raise UserError(
                "Balance.every_n_steps with several groups needs microbatches of one task each: "
                "set Balance.task_gradients = 'microbatch'."
            )
        if self.pre_normalize != "none" and not needs_gram:
            raise UserError(
                "Balance.pre_normalize is for methods that need gradients per task, and "
                f"{self.method or 'plain training'} does not: remove it."
            )
        if self.rescale == "mean_norm" and not needs_gram:
            raise UserError(
                "Balance.rescale = 'mean_norm' is for methods that need gradients per task: use "
                "'sum_to_one'."
            )
        if self.rescale != "none" and not self.method:
            raise UserError("Balance.rescale needs a Balance.method.")
        if self.follow_rates and not self.method:
            raise UserError("Balance.follow_rates needs a Balance.method whose state has rates.")
        if self.affinity_every:
            self._check_affinity(self.every_n_steps if needs_gram else self.monitor_every)

    def _check_affinity(self, every: int) -> None:
        """Refuses to look ahead where there are no gradients to go along."""
        if not every:
            raise UserError(
                "Balance.affinity_every goes along the gradients of single tasks, and nothing "
                f"looks at them: set Balance.monitor_every = {self.affinity_every}, too."
            )
        if self.affinity_every % every:
            field = "monitor_every" if self.monitor_every else "every_n_steps"
            raise UserError(
                f"Balance.affinity_every = {self.affinity_every} must be a multiple of "
                f"Balance.{field} = {every}, the steps between two looks at the gradients."
            )
        if self.task_gradients == "sketch":
            raise UserError(
                "Balance.affinity_every needs the gradients themselves, which 'sketch' does not "
                "keep: set Balance.task_gradients = 'microbatch'."
            )

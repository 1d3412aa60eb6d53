"""The values that say what a sweep evaluates."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax import config, protocols
from mtl_jax.config_types import format_value
from mtl_jax.errors import UserError, suggest

HELD_OUT = ("error", "warn", "off")
PROMPTS = ("all", "original")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Checkpoints x tasks x prompts x shots, each of them a cell; the tasks are `Eval.tasks`.

    Attributes:
      checkpoints: paths or globs: a run directory (its newest checkpoint), `RUN@400`, `RUN@*` (all
        of its checkpoints), `RUN/checkpoints/400`, a converted checkpoint, a Hugging Face folder,
        a T5X checkpoint.
      splits: the split of a task or dataset, by name or glob, where it is not `Eval.split`: a later
        entry beats an earlier one.
      prompts: "all", "original" (those that ask for what the dataset was made for), or names or
        globs of prompts, as written or as in the tasks' names.
      shots: how many examples with their answers stand in front of each input; a cell for each.
      shots_split: where these are from; the split itself where a task has no such split.
      seed: of their drawing.
      protocols: names of presets (protocols.py); a task gets those that apply to it.
      held_out: what to do where a dataset is also in the checkpoint's training mixture: "error",
        "warn", or "off". The column `trained` tells it in any case. Of a checkpoint whose mixture
        is not known, as of one from elsewhere, it says nothing.
      stale_after: seconds after which a process that gives no sign of life has lost its cells.
    """

    checkpoints: Sequence[str] = ()
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompts: str | Sequence[str] = "all"
    shots: Sequence[int] = (0,)
    shots_split: str = "train"
    seed: int = 0
    protocols: Sequence[str] = ("t0", "mean_token", "mean_byte", "generate")
    held_out: str = "warn"
    stale_after: int = 120

    def __post_init__(self) -> None:
        for field in ("checkpoints", "shots", "protocols"):
            if isinstance(getattr(self, field), str):
                raise UserError(f"Sweep.{field} must be a list: write ({getattr(self, field)!r},).")
        if not self.checkpoints:
            raise UserError("Sweep.checkpoints is empty: name run directories or checkpoints.")
        if not self.protocols:
            raise UserError("Sweep.protocols is empty: name some, such as 't0' and 'generate'.")
        for name in self.protocols:
            protocols.get(name)
        if not self.shots or min(self.shots) < 0:
            raise UserError(f"Sweep.shots must be numbers from 0 on, got {self.shots!r}.")
        if isinstance(self.prompts, str) and self.prompts not in PROMPTS:
            raise UserError(
                f"Sweep.prompts must be 'all', 'original' or a list of names, got {self.prompts!r}."
                f"{suggest(self.prompts, PROMPTS)}"
            )
        if self.held_out not in HELD_OUT:
            raise UserError(
                f"Sweep.held_out must be one of {', '.join(map(repr, HELD_OUT))}, got "
                f"{self.held_out!r}.{suggest(self.held_out, HELD_OUT)}"
            )
        if self.stale_after < 1:
            raise UserError(f"Sweep.stale_after must be at least 1, got {self.stale_after}.")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A configuration of `mtl-jax sweep`.

    Attributes:
      plan: the room `Sweep`.
      base: all other rooms.
      model_fields: the fields of T5 that Gin names; the checkpoints must agree, or, where a field
        says only how a model is computed, are computed so.
      text: the Gin file that gives it again.
    """

    plan: SweepConfig
    base: config.Config
    model_fields: Mapping[str, Any]
    text: str


def load_args(args: argparse.Namespace) -> Sweep:
    """Returns the configuration of parsed command-line flags (`cli.add_config_flags`).

    Raises:
      UserError: any mistake in it.
    """
    given = config.read_bindings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    types = {"Sweep": SweepConfig}
    own = [b for b in given if b.name == "Sweep" or not b.field]
    plan = config.resolve(own, types, some=True)["Sweep"]
    base = config.from_bindings(given, also=types)
    if not base.run.directory:
        raise UserError("Run.directory is empty: say where the sweep goes.")
    if not base.eval.tasks:
        raise UserError("Eval.tasks is empty: name registered tasks, mixtures or globs.")
    fields = {
        binding.field: getattr(base.model, binding.field)
        for binding in given
        if binding.name == "T5"
    }
    rooms: dict[str, Any] = {"Sweep": plan, "Eval": base.eval, "Data": base.data, "Run": base.run}
    rooms |= {"Mesh": base.mesh} | ({"Mixture": base.mixture} if base.mixture.name else {})
    text = config.config_text(rooms)
    text += "".join(f"T5.{name} = {format_value(value)}\n" for name, value in fields.items())
    return Sweep(plan, base, fields, text)

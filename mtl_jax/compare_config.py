"""The values that say which runs are compared."""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence

from mtl_jax import config
from mtl_jax.errors import UserError

SINGLE = "single"  # the arms of one task alone are named SINGLE-TASK


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Arms times seeds, each a run in a folder of its own.

    Attributes:
      arms: the values that set each arm apart, as on the command line, by the arm's name:
        {'plain': [], 'pcgrad': ['Balance.method=PCGrad']}. All other values are shared.
      seeds: runs of each arm, which differ in Run.seed and Data.seed.
      first_seed: of the first; the others count on from there.
      single_tasks: also train on each task of the mixture alone, with plain training and as many
        steps: the baselines of negative transfer.
      tasks: the two tasks of the trade-off plot; empty: those whose gradients conflict most.
    """

    arms: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    first_seed: int = 0
    single_tasks: bool = True
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"Compare.seeds must be at least 1, got {self.seeds}.")
        if len(self.tasks) not in (0, 2):
            raise UserError(f"Compare.tasks must be two tasks or none, got {len(self.tasks)}.")
        if not self.arms:
            raise UserError("Compare.arms is empty: name the arms and the values of each.")
        for name, bindings in self.arms.items():
            if not re.fullmatch(r"[\w.+-]+", name) or name.startswith(SINGLE + "-"):
                raise UserError(
                    f"Compare.arms: {name!r} cannot name a folder: use letters, digits, '_', '.', "
                    f"'+' and '-', and begin with something else than '{SINGLE}-'."
                )
            if isinstance(bindings, str):
                raise UserError(f"Compare.arms: {name!r} must have a list: write [{bindings!r}].")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A configuration of `mtl-jax compare`.

    Attributes:
      plan: the room `Compare`.
      shared: the bindings of all runs.
      base: their configuration.
    """

    plan: CompareConfig
    shared: tuple[config.Binding, ...]
    base: config.Config


def load_args(args: argparse.Namespace) -> Comparison:
    """Returns the configuration of parsed command-line flags (`cli.add_config_flags`).

    Raises:
      UserError: any mistake in it, that of an arm included.
    """
    given = config.read_bindings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    own = [b for b in given if b.name == "Compare" or not b.field]
    plan = config.resolve(own, {"Compare": CompareConfig}, some=True)["Compare"]
    shared = tuple(b for b in given if b.name != "Compare")
    for values in plan.arms.values():
        config.from_bindings([*shared, *map(config.parse_binding, values)], some=True)
    base = config.from_bindings(given, also={"Compare": CompareConfig})
    if not base.run.directory:
        raise UserError("Run.directory is empty: say where the runs of the comparison go.")
    return Comparison(plan, shared, base)

"""The values that say which runs are compared."""

import argparse
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from mtl_jax import config
from mtl_jax.errors import UserError

SINGLE = "single"  # the arms of one task alone are named SINGLE-TASK
MIXING = "mixing"  # those of the mixing sweep are named MIXING-VALUE-VALUE...
TEMPERATURE = "temperature"  # of `Compare.mixing`: sets Mixture.temperature


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Arms times seeds, each a run in a folder of its own.

    Attributes:
      arms: the values that set each arm apart, as on the command line, by the arm's name:
        {'plain': [], 'pcgrad': ['Balance.method=PCGrad']}. All other values are shared.
      mixing: a sweep of ways to mix that are set before training, what the other arms have to beat:
        {'*qa*': (0.25, 1, 4), '*nli*': (0.25, 1, 4)} is nine arms, one for each pair of factors.
        A key is a task or glob (of datasets or families with `Balance.by`), whose tokens count
        that many times (`StaticWeights.factors`, the sum of weights held at 1; what no key matches
        has 1), or 'temperature', for values of `Mixture.temperature`. A point that is one of
        `arms` is not trained twice.
      seeds: runs of each arm, which differ in Run.seed and Data.seed.
      first_seed: of the first; the others count on from there.
      single_tasks: also train on each task of the mixture alone, with plain training and as many
        steps: the baselines of negative transfer.
      tasks: the two tasks of the trade-off plot; empty: those whose gradients conflict most.
    """

    arms: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    mixing: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    first_seed: int = 0
    single_tasks: bool = True
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"Compare.seeds must be at least 1, got {self.seeds}.")
        if len(self.tasks) not in (0, 2):
            raise UserError(f"Compare.tasks must be two tasks or none, got {len(self.tasks)}.")
        if not self.arms and not self.mixing:
            raise UserError(
                "Compare.arms is empty: name the arms and the values of each, or set "
                "Compare.mixing."
            )
        self._check_mixing()
        for name, bindings in self.arms.items():
            if not re.fullmatch(rf"(?!({SINGLE}|{MIXING})-)[\w.+-]+", name):
                raise UserError(
                    f"Compare.arms: {name!r} cannot name a folder: use letters, digits, '_', '.', "
                    f"'+' and '-', and begin with something else than '{SINGLE}-' or '{MIXING}-'."
                )
            if isinstance(bindings, str):
                raise UserError(f"Compare.arms: {name!r} must have a list: write [{bindings!r}].")

    def _check_mixing(self) -> None:
        for key, values in self.mixing.items():
            if not key or len(values) < 1 or len(set(values)) < len(values):
                raise UserError(
                    f"Compare.mixing: {key!r} needs a name and different values, got {values!r}."
                )
            for value in values:
                if not 0 < value < math.inf:
                    raise UserError(
                        f"Compare.mixing: values of {key!r} must be positive, got {value!r}."
                    )

    def mixing_arms(self, base: config.Config) -> dict[str, Sequence[str]]:
        """The arms of the mixing sweep; one that changes nothing has no values.

        Args:
          base: the shared configuration.

        Raises:
          UserError: temperatures of a mixture that Gin does not make.
        """
        mixture, named = base.mixture, base.data.mixture
        if TEMPERATURE in self.mixing and (not mixture.name or named not in ("", mixture.name)):
            raise UserError(
                "Compare.mixing: 'temperature' is of a mixture that Gin makes: set Mixture.name, "
                "Mixture.tasks and Mixture.rates = 'examples', and leave Data.mixture empty."
            )
        arms: dict[str, Sequence[str]] = {}
        for values in itertools.product(*self.mixing.values()) if self.mixing else ():
            given = dict(zip(self.mixing, map(float, values), strict=True))
            bindings: list[str] = []
            temperature = given.pop(TEMPERATURE, mixture.temperature)
            if temperature != mixture.temperature:
                # A name stands for one mixture, in all runs of a process.
                name = f"{mixture.name}_temperature_{temperature:g}"
                bindings += [f"Mixture.temperature={temperature!r}", f"Mixture.name={name}"]
                bindings += [f"Data.mixture={name}"] if named else []
            if any(factor != 1.0 for factor in given.values()):
                bindings += [
                    "Balance.method=StaticWeights",
                    f"StaticWeights.factors={given!r}",
                    "StaticWeights.normalise=True",
                ]
            arms["-".join([MIXING, *(f"{value:g}" for value in values)])] = bindings
        return arms


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A configuration of `mtl-jax compare`.

    Attributes:
      plan: the room `Compare`.
      arms: those of `Compare.arms`, and of the mixing sweep.
      shared: the bindings of all runs.
      base: their configuration.
    """

    plan: CompareConfig
    arms: Mapping[str, Sequence[str]]
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
    base = config.from_bindings(given, also={"Compare": CompareConfig})
    arms: dict[str, Sequence[str]] = {}
    made: set[str] = set()
    for name, values in (*plan.arms.items(), *plan.mixing_arms(base).items()):
        bindings = [*shared, *map(config.parse_binding, values)]
        text = config.from_bindings(bindings, some=True).text  # has all values
        if name in plan.arms or text not in made:
            arms[name] = values
            made.add(text)
    if not base.run.directory:
        raise UserError("Run.directory is empty: say where the runs of the comparison go.")
    return Comparison(plan, arms, shared, base)

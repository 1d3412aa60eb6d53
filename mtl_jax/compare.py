"""`mtl-jax compare`: methods times seeds, and each task alone, as a plan that can be continued."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mtl_jax import build, config, data, report, report_main, train
from mtl_jax.balance.method import METHODS
from mtl_jax.compare_config import SINGLE, TEMPERATURE, Comparison, load_args
from mtl_jax.config import Binding
from mtl_jax.errors import UserError
from mtl_jax.sharing.sharing_config import Rooms


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the plan.

    Attributes:
      arm: its name.
      seed: of parameters, dropout and data.
      bindings: of its configuration, in their order.
    """

    arm: str
    seed: int
    bindings: tuple[Binding, ...]

    @property
    def folder(self) -> str:
        """Below the plan's folder."""
        return f"{self.arm}-seed{self.seed}"


def main(args: argparse.Namespace) -> int:
    """Trains what is not trained yet, then writes comparison.html, .json and .md.

    `Run.directory` is the folder of all runs. A run that fails, as one whose loss is not finite, is
    told and left out; the others go on.

    Raises:
      UserError: a mistake in the configuration of any arm, before anything is trained; no run left.
    """
    given = load_args(args)
    root = Path(given.base.run.directory)
    cells = plan_cells(given, root)
    configs = [config.from_bindings(cell.bindings, some=True) for cell in cells]
    for cfg in configs:
        # Mistakes show before anything is trained, and this leaves nothing behind.
        build.build(dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, compile_cache=False)))
    print(f"{len(cells)} runs of {given.base.run.steps:,} steps below {root}", file=sys.stderr)
    if args.dry_run:
        for cell, cfg in zip(cells, configs, strict=True):
            print(f"{cell.folder}: {describe(cfg)}")
        return 0
    failed = []
    for number, (cell, cfg) in enumerate(zip(cells, configs, strict=True), start=1):
        print(f"==> {number} of {len(cells)}: {cell.folder}", file=sys.stderr, flush=True)
        try:
            run_cell(cfg)
        except (UserError, RuntimeError) as error:  # no memory left is a RuntimeError of JAX
            print(f"{cell.folder} failed: {error}", file=sys.stderr)
            failed.append(cell.folder)
    done = [root / cell.folder for cell in cells if cell.folder not in failed]
    if not done:
        raise UserError("Every run of the comparison failed; the messages are above.")
    report_main.write_comparison(done, output=root, tasks=given.plan.tasks)
    if failed:
        print(f"Not compared, because they failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def plan_cells(given: Comparison, root: Path) -> list[Cell]:
    """All runs, seed by seed, so that a plan that is cut short still has every arm.

    Raises:
      UserError: the shared configuration names no mixture, or a task is not evaluated.
    """
    plan, shared = given.plan, given.shared
    arms = {name: (shared, values) for name, values in given.arms.items()}
    if TEMPERATURE in plan.mixing:
        # Other mixtures, so what the shared one's name stands for is named one by one.
        named = (f"Eval.tasks={tuple(_evaluated(given.base))!r}",)
        arms |= {name: (shared, (*arms[name][1], *named)) for name in arms}
    if plan.single_tasks:
        tasks, evaluated = _tasks(given.base)
        alone = tuple(b for b in shared if not _is_of_several_tasks(b))
        arms |= {f"{SINGLE}-{task}": (alone, _alone(task, evaluated)) for task in tasks}
    cells = []
    for seed in range(plan.first_seed, plan.first_seed + plan.seeds):
        for arm, (common, values) in arms.items():
            folder = root / Cell(arm, seed, ()).folder
            of_cell = [f"Run.directory={folder}", f"Run.seed={seed}", f"Data.seed={seed}"]
            bindings = map(config.parse_binding, (*values, *of_cell))
            cells.append(Cell(arm, seed, (*common, *bindings)))
    return cells


def _tasks(base: config.Config) -> tuple[list[str], list[str]]:
    """The tasks of the shared mixture, and those that are evaluated."""
    evaluated = _evaluated(base)
    name = base.data.mixture or base.mixture.name
    if not name:
        raise UserError("Compare: set Data.mixture or Mixture.name, to say what is trained on.")
    tasks = data.task_names(name)
    for task in tasks:
        if task not in evaluated:
            raise UserError(
                f"Compare.single_tasks: {task!r} is trained on but not evaluated: add it to "
                "Eval.tasks, or set Compare.single_tasks = False."
            )
    return tasks, evaluated


def _evaluated(base: config.Config) -> list[str]:
    """The tasks that all runs are evaluated on."""
    data.load_modules(base.data)
    if base.mixture.name:
        data.build_mixture(base.mixture)
    tasks = [task for given in data.expand(base.eval.tasks) for task in data.task_names(given)]
    return list(dict.fromkeys(tasks))


def _is_of_several_tasks(binding: Binding) -> bool:
    """Whether a binding says how tasks are mixed, or share anything."""
    of_sharing = (field.name.capitalize() for field in dataclasses.fields(Rooms))
    return binding.name in ("Mixture", "Balance", *METHODS, *of_sharing)


def _alone(task: str, evaluated: Sequence[str]) -> tuple[str, ...]:
    # Whatever made the mixture is not for one task; so what it named is named one by one.
    return (f"Data.mixture={task}", f"Eval.tasks={tuple(evaluated)!r}")


def describe(cfg: config.Config) -> str:
    """The arm of a run in a line."""
    method = cfg.method if cfg.method is not None else "plain"
    return f"{method}, {cfg.data.mixture or cfg.mixture.name}, seed {cfg.run.seed}"


def run_cell(cfg: config.Config) -> None:
    """Trains one run, or continues it; a finished one is left as it is."""
    session: Any = build.build(cfg)
    # Enough to repeat this run alone.
    train.train(session, argv=["train", f"--gin_file={session.run.path / 'config.gin'}"])
    report.write_report(session.run.path)
    # Programs of another run are never used again.
    jax.clear_caches()

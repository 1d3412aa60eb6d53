"""`mtl-jax sweep`: checkpoints x tasks x prompts x shots, each cell once and for all on disk."""

import argparse
import contextlib
import fnmatch
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax import (
    data,
    placement,
    processes,
    protocols,
    report,
    results,
    sharding,
    sweep_files,
    tokenizer,
    vocabulary,
)
from mtl_jax.errors import UserError, suggest
from mtl_jax.run_directory import (
    RunDirectory,
    enable_compile_cache,
    seen_in_training,
    trained_on,
    versions,
)
from mtl_jax.sweep_config import Sweep, load_args
from mtl_jax.sweeps import checkpoints, estimate
from mtl_jax.sweeps.cells import Cell, Question
from mtl_jax.sweeps.checkpoints import Checkpoint, Models
from mtl_jax.sweeps.claims import Claims
from mtl_jax.sweeps.running import Runner, ShapePlan
from mtl_jax.tables import format_seconds
from mtl_jax.task_info import TaskInfo, info

_FAILURES_SHOWN = 5
_NAMES_SHOWN = 5
_CUT_WORTH_A_LINE = 0.01  # of the examples
_INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended


def main(args: argparse.Namespace) -> int:
    """Makes what is missing of a sweep, or lists it with `--dry_run`.

    Raises:
      UserError: a mistake in the configuration, a damaged checkpoint or cell, no space.
    """
    given = load_args(args)
    root = check_folder(Path(given.base.run.directory).expanduser())
    sharding.configure_jax()
    if not args.dry_run:  # which leaves nothing behind
        enable_compile_cache(root, enabled=given.base.run.compile_cache)
    data.load_modules(given.base.data)
    data.build_mixture(given.base.mixture)
    found = checkpoints.find(given.plan.checkpoints, given.model_fields)
    cells = plan(given, found, root)
    if args.dry_run:
        if processes.primary():
            print(estimate.table(cells), end="")
            guess = estimate.estimate(cells, root)
            print(f"About {format_seconds(guess.seconds)} by one process, from {guess.source}.")
        return 0
    RunDirectory(root, primary=processes.primary()).create()
    _check_job(cells)
    if processes.primary():
        describe(given, cells, root, args.argv)
    status = work(given, cells, root)
    if status == _INTERRUPTED and processes.several():
        processes.abort(status)  # an orderly end would wait for the others
    return status


def check_folder(root: Path) -> Path:
    """The sweep's folder, which must not be a run's.

    Raises:
      UserError: it is.
    """
    if (root / "checkpoints").is_dir() or (root / "metrics.jsonl").exists():
        raise UserError(f"Run.directory: {root} is the folder of a run; name another one.")
    return root


def say(line: str) -> None:
    """A line for whoever watches; results go to standard output, this does not."""
    print(line, file=processes.screen(), flush=True)


# ------------------------------------------------------------------------------- the plan


def plan(given: Sweep, found: Sequence[Checkpoint], root: Path) -> list[Cell]:
    """All cells, checkpoint by checkpoint, in the order of the configuration.

    Raises:
      UserError: an unknown task or prompt, a task that no protocol applies to or that a checkpoint
        cannot read, a dataset that is not held out.
    """
    names = chosen_tasks(given)
    known = {checkpoint.name: _trained(checkpoint, names) for checkpoint in found}
    _check_held_out(given, known)
    trained = {name: tasks or set() for name, tasks in known.items()}
    asked = list(questions(given, names))
    if not asked:
        raise UserError(
            f"No task can be answered: none of Sweep.protocols ({', '.join(given.plan.protocols)}) "
            "applies to the tasks chosen. 'generate' is for tasks without answer choices, all "
            "others but 'tk_instruct' for tasks with them."
        )
    for checkpoint in found:
        _check_vocabulary(checkpoint, asked)
    return [
        Cell(checkpoint, question, question.name in trained[checkpoint.name], root)
        for checkpoint in found
        for question in asked
    ]


def chosen_tasks(given: Sweep) -> list[str]:
    """Names of the tasks of `Eval.tasks` whose prompt `Sweep.prompts` takes.

    Raises:
      UserError: an unknown task, or a prompt that no task has.
    """
    expanded = data.expand(given.base.eval.tasks)
    names = list(dict.fromkeys(name for task in expanded for name in data.task_names(task)))
    wanted = given.plan.prompts
    if wanted == "all":
        return names
    if wanted == "original":
        found = [name for name in names if info(name).original]
        if not found:
            raise UserError("Sweep.prompts = 'original', but no prompt of Eval.tasks is original.")
        return found
    titles = {name: _titles(info(name)) for name in names}
    for pattern in wanted:
        if not any(fnmatch.filter(title, pattern) for title in titles.values()):
            known = sorted({text for title in titles.values() for text in title})
            raise UserError(
                f"Sweep.prompts: no prompt of Eval.tasks is {pattern!r}.{suggest(pattern, known)}"
            )
    return [n for n in names if any(fnmatch.filter(titles[n], pattern) for pattern in wanted)]


def _titles(about: TaskInfo) -> list[str]:
    """What a prompt may be called: its name, as a part of a task's name, the task."""
    # Only now, for this module of tasks imports TensorFlow.
    from mtl_jax.tasks.prompted import prompt_slug

    return [about.prompt, prompt_slug(about.prompt), about.task]


def questions(given: Sweep, names: Sequence[str]) -> Iterator[Question]:
    """Reads the tasks, with and without shots; tells those that cannot be answered or measured.

    Raises:
      UserError: an unknown split, a task that cannot have shots, bad data.
    """
    from mtl_jax.tasks.few_shot import few_shot_task

    cfg, sweep = given.base.eval, given.plan
    noted = _Notes()
    presets = [protocols.get(name) for name in sweep.protocols]
    splits = _splits(given, names)
    shots_of = list(dict.fromkeys(sweep.shots))
    progress = report.Progress(len(names) * len(shots_of), label="tasks read")
    with contextlib.closing(progress):
        for number, (name, shots) in enumerate((n, k) for n in names for k in shots_of):
            with_shots = few_shot_task(
                name,
                shots,
                pool_split=sweep.shots_split,
                seed=sweep.seed,
                max_tokens=cfg.inputs_length,
            )
            lengths = cfg.inputs_length, cfg.targets_length, cfg.limit, cfg.seed
            task = data.load_eval_task(
                with_shots, splits[name], *lengths, whole=True, use_cached=cfg.use_cached
            )
            ranked = task.ranked
            results.warn(task)
            mine = tuple(preset for preset in presets if preset.passes_for(ranked))
            if not mine:
                noted.not_applicable[name] = name
            elif not any(preset.metric_fns(task.metric_fns, ranked) for preset in mine):
                noted.without_metrics[name] = name
            else:
                question = Question(
                    name, info(name), shots, task, cfg, mine, sweep.shots_split, sweep.seed
                )
                noted.look_at(question)
                yield question
            progress.update(number + 1)
    noted.tell()


class _Notes:
    """What is worth a line about the tasks of a sweep, collected: there may be hundreds of them."""

    def __init__(self) -> None:
        self.not_applicable: dict[str, str] = {}
        self.without_metrics: dict[str, str] = {}
        self._cut: dict[str, str] = {}
        self._fewer_shots: dict[str, str] = {}
        self._score_metrics: dict[str, str] = {}

    def look_at(self, question: Question) -> None:
        """Notes if many examples are cut, or have fewer shots than asked for."""
        title = f"{question.name}, {question.shots} shots" if question.shots else question.name
        share = question.cut / len(question.task.examples)
        if share > _CUT_WORTH_A_LINE:
            self._cut[title] = f"{title} ({question.cut}, {share:.1%})"
        if question.exemplars is not None and question.exemplars < question.shots:
            self._fewer_shots[title] = f"{title} ({question.exemplars:.2f} on average)"
        if question.task.score_metric_fns:
            self._score_metrics[question.name] = question.name

    def tell(self) -> None:
        """Says it, a line for each kind."""
        for start, of_kind in (
            (
                "Left out, because no protocol of Sweep.protocols applies",
                self.not_applicable,
            ),
            (
                "Left out, because the task has no metrics; score metrics are not for sweeps",
                self.without_metrics,
            ),
            (
                "More than 1 % of the examples are cut to fit Eval.inputs_length or "
                "Eval.targets_length",
                self._cut,
            ),
            (
                "Fewer shots than asked for, because no more fit Eval.inputs_length",
                self._fewer_shots,
            ),
            (
                "Score metrics are not for sweeps (mtl-jax eval has them); only the others of",
                self._score_metrics,
            ),
        ):
            names = list(of_kind.values())
            if names:
                more = len(names) - _NAMES_SHOWN
                say(
                    f"{start}: {'; '.join(names[:_NAMES_SHOWN])}" + f" and {more} more" * (more > 0)
                )


def _splits(given: Sweep, names: Sequence[str]) -> dict[str, str]:
    """The split of each task: `Eval.split`, unless `Sweep.splits` names its own."""
    splits = dict.fromkeys(names, given.base.eval.split)
    known = {name: [name, info(name).dataset] for name in names}
    for pattern, split in given.plan.splits.items():
        fitting = [name for name in names if fnmatch.filter(known[name], pattern)]
        if not fitting:
            texts = sorted({text for pair in known.values() for text in pair})
            raise UserError(
                f"Sweep.splits: no task or dataset of Eval.tasks is {pattern!r}."
                f"{suggest(pattern, texts)}"
            )
        splits.update(dict.fromkeys(fitting, split))
    return splits


def _trained(checkpoint: Checkpoint, names: Sequence[str]) -> set[str] | None:
    """The tasks whose dataset is in a checkpoint's training mixture; None: it is not known."""
    rows = trained_on(checkpoint.path) if checkpoint.kind == "mtl_jax" else None
    return None if rows is None else set(seen_in_training(map(info, names), rows))


def _check_held_out(given: Sweep, trained: Mapping[str, set[str] | None]) -> None:
    if given.plan.held_out == "off":
        return
    for checkpoint, names in trained.items():
        if names is None:
            say(f"Nothing is known of what {checkpoint} was trained on")
            continue
        datasets = sorted({info(name).dataset for name in names})
        if not datasets:
            continue
        text = f"{checkpoint} was trained on examples of {', '.join(datasets)}"
        if given.plan.held_out == "error":
            raise UserError(
                f"{text}: its results there are not zero-shot. Leave these tasks out of "
                "Eval.tasks, or set Sweep.held_out = 'warn'."
            )
        say(f"Not zero-shot: {text}")


def _check_vocabulary(checkpoint: Checkpoint, asked: Sequence[Question]) -> None:
    """Refuses tasks with tokens that a model does not have; warns where files differ."""
    size = checkpoint.config.vocab_size
    for question in asked:
        if question.largest_token >= size:
            raise UserError(
                f"Task {question.name!r} has the token {question.largest_token}, but the model of "
                f"{checkpoint.name} has only {size}: the task's vocabulary is not the model's."
            )
    folder = checkpoint.path / tokenizer.FOLDER
    theirs = (folder if folder.is_dir() else checkpoint.path) / tokenizer.MODEL
    if not theirs.is_file():
        return
    seen = set()
    for question in asked:
        words = data.vocabulary([question.name])
        file = getattr(words, "sentencepiece_model_file", None)
        if file is None or file in seen:
            continue
        seen.add(file)
        if vocabulary.files(words)[tokenizer.MODEL] != theirs.read_bytes():
            say(f"{theirs} differs from the vocabulary of {question.name}: is it the right one?")


# ------------------------------------------------------------------------------- the work


def _check_job(cells: Sequence[Cell]) -> None:
    """Refuses a job whose processes have found different checkpoints, tasks or examples."""
    names = hashlib.sha256("\n".join(cell.key for cell in cells).encode())
    of_each = processes.gather([len(cells), names.hexdigest()])
    for number, of_process in enumerate(of_each):
        if of_process != of_each[0]:
            raise UserError(
                f"Process {number} has another plan ({of_process[0]} cells) than process 0 "
                f"({of_each[0][0]}): all must see the same files. Were checkpoints written or data "
                "changed meanwhile? Then run the same command again."
            )


def describe(given: Sweep, cells: Sequence[Cell], root: Path, argv: Sequence[str]) -> None:
    """Writes the files that tell what this sweep is."""
    folder = RunDirectory(root)
    planned = {cell.folder for cell in cells}
    if (root / sweep_files.PLAN).exists():
        finished = [x for x in sweep_files.cell_folders(root) if (x / sweep_files.RESULTS).exists()]
        dropped = sum(path not in planned for path in finished)
        if dropped:
            say(
                f"{dropped} finished cells are not in this plan and leave the table: list all "
                "checkpoints and tasks, or give each plan a folder of its own and combine them "
                "with mtl-jax report A B"
            )
    folder.write_text("config.gin", given.text)
    folder.write_command([sys.executable, "-m", "mtl_jax", *argv])
    folder.write_json("versions.json", versions())
    sweep_files.write_plan(root, [cell.folder for cell in cells])


def work(given: Sweep, cells: Sequence[Cell], root: Path) -> int:
    """Makes the cells that are missing, then the table and the report."""
    start = time.perf_counter()
    mesh = sharding.make_mesh(given.base.mesh)
    where = placement.on_mesh(mesh)
    models = Models(mesh, where)
    prompts = {len(models.engine(c).prompt) + len(c.prompt) for c in {x.checkpoint for x in cells}}
    shapes = ShapePlan(cells, given.base.eval, where.row_multiple, prompts)
    with Claims(root, given.plan.stale_after) as claims, contextlib.ExitStack() as closing:
        runner = Runner(cells, shapes, models, claims, say=say)
        say(
            f"{len(cells):,} cells, {runner.done():,} of them done; {runner.rows:,} rows of the "
            f"model to go, below {root}"
        )
        if runner.rows:
            bar = closing.enter_context(report.Progress(runner.rows, label="rows"))
            runner.progress = bar.update
        try:
            with _stopped_by_signal():
                runner.run()
        except KeyboardInterrupt:
            if not processes.primary():
                return _INTERRUPTED
            runner.write_table()
            closing.close()
            say(
                f"Stopped: {runner.done():,} of {len(cells):,} cells are done; run the same "
                "command again to go on."
            )
            return _INTERRUPTED
        closing.close()
        seconds = time.perf_counter() - start
        say(f"{runner.model_rows:,} rows of the model in {format_seconds(seconds)}")
        status = finish(runner, claims, root) if processes.primary() else None
        return int(processes.from_primary(status))


def finish(runner: Runner, claims: Claims, root: Path) -> int:
    """Prints the table; one process writes the report. Returns the exit status."""
    # Only now, for it draws pictures.
    from mtl_jax.sweep_report import SweepReport

    for failure in runner.failures[:_FAILURES_SHOWN]:
        say(f"{failure.cell.title}: {failure.error}")
    if next(sweep_files.cell_rows(root), None) is None:
        say("No cell has results; the messages above tell why.")
        return 1
    if not claims.take(root):
        say("Another process writes the report.")
    else:
        try:
            found = SweepReport([root])
            page = found.write(root)
        finally:
            claims.release(root)
        print(found.table(), end="")
        print(f"Results: {root / sweep_files.RESULTS}")
        print(f"Report: {page}")
    return int(bool(runner.failures))


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """Within it SIGTERM ends the work as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

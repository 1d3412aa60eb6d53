"""THE page: configuration, mesh, data, model, state, restore, loop, evaluation, save.

`mtl-jax train` is `main`, `mtl-jax eval` is `evaluate_main`.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mtl_jax import (
    build,
    config,
    data,
    dry_run,
    processes,
    report,
    sharding,
    starting,
    step,
    tokenizer,
)
from mtl_jax.checkpoint import Checkpointer, DamagedCheckpoint
from mtl_jax.errors import Stopped, UserError
from mtl_jax.evaluate import EvalTask, Evaluator
from mtl_jax.guard import Guard, RollBack
from mtl_jax.logbook import Logbook
from mtl_jax.preemption import Preemption
from mtl_jax.run_directory import model_info, versions
from mtl_jax.run_lock import RunLock
from mtl_jax.sharing import tree
from mtl_jax.sharing.embeddings import prompt_ids


def main(args: argparse.Namespace) -> int:
    """Trains; continues the run that is in the run directory.

    Raises:
      UserError: a mistake in the configuration or its files, or a loss that is not finite.
    """
    cfg = config.load_args(args)
    if args.dry_run:  # it leaves nothing behind, not even compiled programs
        cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, compile_cache=False))
    session = build.build(cfg)
    if not session.config.data.mixture:
        raise UserError("Data.mixture is empty: name a registered task or mixture to train on.")
    if args.dry_run:
        starting.check_reference(session)
        text = dry_run.describe(session, compile_step(session))
        if processes.primary():
            print(text)
        return 0
    train(session, argv=args.argv)
    if processes.primary():
        print_results(session)
        print(f"Run directory: {session.run.path}")
        print(f"Report: {report.write_report(session.run.path)}")
    return 0


def train(session: build.Session, argv: list[str]) -> None:
    """One run from start or last checkpoint to `Run.steps`."""
    starting.check_reference(session)
    cfg, run, mesh = session.config, session.run, session.mesh
    ledger = report.Ledger()
    with contextlib.ExitStack() as closing:
        # -------------------------------------------------------------- data
        run.create()
        closing.enter_context(RunLock(run.path, primary=processes.primary()))
        tasks = data.task_names(cfg.data.mixture)
        task_ids = run.task_ids(tasks)
        stream = closing.enter_context(open_stream(session, task_ids))
        with ledger("eval"):
            eval_tasks = session.eval_tasks()

        # -------------------------------------------------------------- state
        # A checkpoint of another architecture fails here, before any file is replaced.
        guard = Guard(cfg.guard, run)
        with ledger("checkpoint"):
            checkpointer = closing.enter_context(Checkpointer(run.checkpoints, cfg.checkpoint))
            restored = continued(session, checkpointer, stream, guard)
            meta = session.meta(task_ids, session.origin(checkpointer))
        with ledger("start"):
            state = starting.start_state(session) if restored is None else restored
        first = int(state.step)  # of a fresh run, too, where Run.restore_from gives its number
        if first >= cfg.run.steps > 0:
            say(f"Run.steps = {cfg.run.steps:,} are done: {run.path} is at step {first:,}.")
            return

        # -------------------------------------------------------------- run directory
        run.freeze_task_ids(tasks)
        describe_run(session, argv)
        evaluator, told = session.evaluator(), closing.enter_context(Preemption())

        # -------------------------------------------------------------- compile
        # Not the key of the parameters: dropout must not repeat what made them.
        rng = starting.replicated_key(mesh, cfg.run.seed, 1)
        with ledger("compile"):
            update, reference = compile_step(session), starting.reference_params(session)

        # -------------------------------------------------------------- steps
        parts = (session, stream, checkpointer, guard, ledger, told, evaluator, eval_tasks)
        training = Training(*parts, meta, update, rng, reference, state)
        del state, restored  # the steps give its memory to the next one
        while True:
            with Logbook(session, task_ids, ledger, first, guard) as book:
                try:
                    counters = training.run(book, first)
                    book.finish(counters, session.rates(training.state))
                    return
                except RollBack as bad:
                    reason = bad.with_traceback(None)  # its frames hold arrays
            first = training.go_back(reason)


@dataclasses.dataclass
class Training:
    """The loop and what it needs."""

    session: build.Session
    stream: data.TrainStream
    checkpointer: Checkpointer
    guard: Guard
    ledger: report.Ledger
    told: Preemption
    evaluator: Evaluator
    eval_tasks: list[EvalTask]
    meta: dict[str, Any]
    update: Any
    rng: jax.Array
    reference: Any
    state: Any  # a step.TrainState; None while another one is read

    def run(self, book: Logbook, first: int) -> Any:
        """The steps after `first`; the data's counters at the end.

        Raises:
          RollBack: a bad loss; `go_back`, and run again.
          Stopped: the run was told to stop, and has saved.
        """
        cfg, mesh, ledger, guard = self.session.config, self.session.mesh, self.ledger, self.guard
        fresh = not first and not guard.roll_backs
        if cfg.run.evaluate_untrained and fresh and self.eval_tasks:
            self.evaluate(0)
        with ledger("data"):
            ahead = next_batch(self.stream, mesh)
        for number in range(first + 1, cfg.run.steps + 1):
            arrays, batch = ahead
            limit = guard.argument(number, mesh)
            with ledger("step"), jax.transfer_guard("disallow"):
                self.state, metrics = self.update(
                    self.state, arrays, self.rng, self.reference, limit
                )
            book.add(number, metrics, batch)
            last = number == cfg.run.steps
            evaluated = bool(self.eval_tasks) and (last or due(number, cfg.eval.every))
            # After the evaluation, where one is due: the run that goes on would never make it up.
            stop = self.told.reached(number) and not last
            if not last:
                with ledger("data"):
                    ahead = next_batch(self.stream, mesh)
            scores = None
            if evaluated:
                book.flush()
                scores = book.write_results(number, self.evaluate(number))
                if cfg.balance.follow_rates and due(number, cfg.eval.every):
                    batch = self.stream.by_rates(self.session.rates(self.state), batch)
                    ahead = ahead if last else next_batch(self.stream, mesh)
            due_now = due(number, cfg.checkpoint.every) or self.checkpointer.lost()
            if last or stop or due_now:
                book.write()  # a bad loss must be met before it is saved
                with ledger("checkpoint"):
                    position = data.whole_state(batch) | guard.as_json()
                    self.checkpointer.save(
                        *(number, self.state, position, self.meta, scores), wait=last or stop
                    )
            if stop:
                raise Stopped(
                    f"told to stop: saved at step {number:,}; the same command continues."
                )
        return self.stream.counters_by_task(ahead[1])

    def evaluate(self, number: int) -> list[Any]:
        """Results of all tasks at a step."""
        progress, run = report.evaluation_progress(), self.session.run
        with self.ledger("eval"):
            params = self.state.params
            return self.evaluator.run(params, self.eval_tasks, number, run.path, progress)

    def go_back(self, bad: RollBack) -> int:
        """Takes an earlier state, and the data behind those of `bad`; returns the state's step."""
        checkpointer, guard = self.checkpointer, self.guard
        count = guard.roll_backs + 1
        self.state = None  # there need not be room for both
        with self.ledger("checkpoint"):
            checkpointer.wait()
            found = sound(self.session, checkpointer, lambda left: guard.target(bad, left))
            if found is None:
                self.state = starting.start_state(self.session)
                guard.restore({})
            else:
                self.state = found.state
                guard.restore(found.position)
                put_aside(found, checkpointer, guard)
                later = [step for step in checkpointer.steps() if step > found.number]
                checkpointer.set_aside(later)
        guard.roll_backs = count
        first = int(self.state.step)
        self.stream.restore(bad.batch.state)
        what = f"{bad.reason}: back to step {first:,}, without the data until here"
        guard.tell(bad.step, "roll_back", what, back_to=first, roll_backs=count)
        return first


def open_stream(session: build.Session, task_ids: Mapping[str, int]) -> data.TrainStream:
    """The training stream of this process."""
    cfg = session.config.data
    owners = {name: session.block_of(name) for name in data.task_names(cfg.mixture)}
    part = sharding.readers(session.mesh)
    return data.TrainStream(cfg, task_ids, *part, owners, prompt_ids(session.sharing))


def continued(
    session: build.Session, checkpointer: Checkpointer, stream: data.TrainStream, guard: Guard
) -> step.TrainState | None:
    """The state of the run's newest sound checkpoint, stream and guard as then; None: a fresh run.

    Damaged ones that are newer are set aside.

    Raises:
      UserError: as `sound`.
    """
    found = sound(session, checkpointer, lambda left: max(left, default=None))
    if found is None:
        return None
    stream.restore(found.position)
    guard.restore(found.position)
    put_aside(found, checkpointer, guard)
    say(f"Continuing from step {found.number:,} in {session.run.path}")
    return found.state


@dataclasses.dataclass
class Sound:
    """A sound checkpoint that was read, and the damaged ones that were tried before."""

    number: int
    state: step.TrainState
    position: Mapping[str, Any]
    damaged: list[tuple[int, DamagedCheckpoint]]


def sound(
    session: build.Session,
    checkpointer: Checkpointer,
    wanted: Callable[[list[int]], int | None],
) -> Sound | None:
    """Reads the checkpoint of the run that is wanted, or where it is damaged the next one.

    Args:
      session: of the run.
      checkpointer: of its checkpoints.
      wanted: of the steps that there are and were not tried, the one to try; None: there is none.

    Returns:
      None where there is no checkpoint. Nothing is moved: see `put_aside`.

    Raises:
      UserError: none is sound, for a run shall not begin anew unasked; or it is of another model,
        or the storage fails.
    """
    # One list for all: storage may not show every process the newest ones yet.
    left = processes.from_primary(checkpointer.steps())
    damaged: list[tuple[int, DamagedCheckpoint]] = []
    while (number := wanted(left)) is not None:
        try:
            checkpointer.verify(number)
            session.check_model(checkpointer.meta(number), session.run.checkpoints / str(number))
            state, position, _ = checkpointer.restore(number, session.abstract_state)
        except DamagedCheckpoint as error:
            damaged.append((number, error))
            left.remove(number)
            continue
        return Sound(number, state, position, damaged)
    if damaged:
        raise damaged[0][1]
    return None


def put_aside(found: Sound, checkpointer: Checkpointer, guard: Guard) -> None:
    """Moves the damaged checkpoints out of the way, and tells so."""
    if found.damaged:
        aside = checkpointer.set_aside([number for number, _ in found.damaged])
        for number, why in found.damaged:
            guard.tell(number, "damaged", f"{why} It was moved to {aside}.")


def due(number: int, every: int) -> bool:
    """Whether something happens at this step; 0 means never."""
    return every > 0 and number % every == 0


def next_batch(
    stream: data.TrainStream, mesh: jax.sharding.Mesh
) -> tuple[dict[str, jax.Array], data.Batch]:
    """The next batch on the devices, and as it came: it knows the position in the data after it."""
    batch = next(stream)
    return sharding.put_batch(mesh, batch.arrays), batch


def compile_step(session: build.Session) -> Any:
    """The train step, compiled once from shapes; other shapes are errors, not a second compile."""
    return lower_step(session).compile()


def lower_step(session: build.Session) -> jax.stages.Lowered:
    """The train step, traced for the session's mesh from shapes alone."""
    cfg, everywhere = session.config, sharding.replicated(session.mesh)
    tasks = len(session.balancer.of_task) - 1
    fixed = session.sharing.model_config, cfg.step, cfg.optimizer, tasks
    update = functools.partial(
        step.train_step, *fixed, balancer=session.balancer, plan=session.sharing
    )
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(session.shardings, everywhere))
    key = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    batch = session.abstract_batch()
    limit = None
    if cfg.guard.on_bad_loss == "skip":
        limit = jax.ShapeDtypeStruct((), np.float32, sharding=everywhere)
    with sharding.on_mesh(session.mesh):
        return jitted.lower(
            *(session.abstract_state, batch, rng, starting.abstract_reference(session), limit)
        )


def describe_run(session: build.Session, argv: list[str]) -> None:
    """Writes the files that tell what this run is."""
    run = session.run
    run.write_text("config.gin", session.config.text)
    # This interpreter by its path: it needs no activated environment.
    run.write_command([sys.executable, "-m", "mtl_jax", *argv])
    run.write_json("versions.json", versions())
    params, shardings = session.abstract_state.params, session.shardings.params
    run.write_text("model-info.txt", model_info(params, session.axes, shardings))
    if processes.primary():  # others have no part in the files that are read for it
        mixture = build.measured_mixture(session, seconds=2.0)
        run.write_text("mixture.txt", build.mixture_text(session, mixture))
        run.write_json("mixture.json", mixture.as_json())
    run.write_json("method.json", session.method_info())
    for name, content in build.tokenizer_files(session).items():
        run.write_bytes(f"{tokenizer.FOLDER}/{name}", content)
    cfg = session.config.data
    mesh = " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items())
    say(
        f"T5 with {session.num_parameters:,} parameters; {cfg.mixture}: "
        f"{len(data.task_names(cfg.mixture))} tasks, {cfg.batch_size} rows of "
        f"{cfg.inputs_length} + {cfg.targets_length} tokens; mesh {mesh}; "
        f"attention {session.attention}"
    )
    if session.config.balance.method or session.balancer.every:
        say(f"Balance: {session.balance_cost}")
    if not session.sharing.empty:
        for line in tree.report(session.sharing, params).split("\n"):
            say(f"Sharing: {line}")


def say(line: str) -> None:
    """A line for whoever watches; results go to standard output, this does not."""
    print(line, file=processes.screen(), flush=True)


def print_results(session: build.Session) -> None:
    """The table of the run's results, to standard output."""
    rows = report.read_jsonl(session.run.path / "results.jsonl")
    if rows:
        print(report.results_table(rows), end="")


def evaluate_main(args: argparse.Namespace) -> int:
    """Evaluates a checkpoint on `Eval.tasks`: of `--checkpoint`, or the newest of the run.

    Raises:
      UserError: no tasks, no checkpoint, or one of another model.
    """
    start = time.perf_counter()
    session = build.build(config.load_args(args), training=False)
    run = session.run
    if not session.config.eval.tasks:
        raise UserError("Eval.tasks is empty: name registered tasks, mixtures or globs.")
    path = args.checkpoint or session.config.run.directory
    params, number = build.load_params(session, path)
    tasks = session.eval_tasks()
    run.create()
    progress = report.evaluation_progress()
    rows = session.evaluator().run(params, tasks, number, run.path, progress)
    seconds = time.perf_counter() - start
    say(f"Evaluated {len(tasks)} tasks at step {number:,} of {path} in {seconds:.0f} s")
    if processes.primary():
        print(report.results_table(rows), end="")
        print(f"Report: {report.write_report(run.path)}")
    return 0

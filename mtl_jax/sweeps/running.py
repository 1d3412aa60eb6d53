"""Works through the cells of a sweep: what is not on disk yet, one checkpoint after the other.

The processes of one job (processes.py) work as one: the primary process looks at the disk, claims
cells and writes them; the others run the same batches. Sweeps that are started independently share
the cells by their claims.
"""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from mtl_jax import buckets, processes, sweep_files
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalConfig
from mtl_jax.evaluate import Answer
from mtl_jax.model import Params
from mtl_jax.sweep_files import RESULTS, CellFacts
from mtl_jax.sweeps import scoring
from mtl_jax.sweeps.cells import Asking, Cell
from mtl_jax.sweeps.checkpoints import Checkpoint, Models
from mtl_jax.sweeps.claims import Claims

_TABLE_EVERY = 60.0  # seconds between two writings of the whole table
_WAIT = 0.5  # seconds between two looks at what other processes do
# Batches between two decisions of the primary process of a job. The last ones of each portion are
# not full, so there should be many; but the job holds the claims of a whole portion.
_PORTION = 64


class ShapePlan:
    """The batch shapes of a whole sweep: the same for all checkpoints, so that little is compiled.

    They depend on the plan alone, not on what is on disk: a row runs in the same shape in a sweep
    that is continued, or shared by several processes, as in one that is not.
    """

    def __init__(
        self, cells: Sequence[Cell], cfg: EvalConfig, row_multiple: int, prompts: set[int]
    ):
        """Chooses the shapes.

        Args:
          cells: of the plan.
          cfg: batch size and the number of shapes.
          row_multiple: batches have a multiple of so many rows.
          prompts: numbers of tokens that checkpoints put in front of every input.

        Raises:
          UserError: the batch cannot be spread evenly over the devices.
        """
        if cfg.batch_size % row_multiple:
            raise UserError(
                f"Eval.batch_size = {cfg.batch_size} must be a multiple of the {row_multiple} "
                "devices that share the rows of a batch."
            )
        questions = {id(cell.question): cell.question for cell in cells}.values()
        ranked: Counter[tuple[int, int]] = Counter()
        generated: Counter[tuple[int, int]] = Counter()
        for question, prompt in itertools.product(questions, sorted(prompts)):
            amount = question.amount(question.passes)
            for (inputs, targets), count in amount.ranked.items():
                ranked[inputs + prompt, targets] += count
            for (inputs, _), count in amount.generated.items():
                generated[inputs + prompt, 0] += count
        self.batch_size = cfg.batch_size
        shape = cfg.batch_size, row_multiple, cfg.max_shapes
        self._ranked, self._generated = (buckets.Shapes(x, *shape) for x in (ranked, generated))
        self.num_choices = buckets.bucket(max((q.widest for q in questions), default=1))

    def of(self, request: buckets.Request) -> buckets.Shape:
        """The shape that a row runs in."""
        return (self._ranked if request.choices else self._generated).of(request)


@dataclasses.dataclass
class Failure:
    """A cell whose results could not be made, or not for all protocols."""

    cell: Cell
    error: str


class Runner:
    """One process, or one of a job, that works on a sweep.

    Attributes:
      progress: called with the rows of the model that are done, of all that were missing.
      failures: cells whose passes are on disk, but from which not all results could be made.
      model_rows: rows that this process has put to a model.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        shapes: ShapePlan,
        models: Models,
        claims: Claims,
        say: Callable[[str], None] = lambda line: None,
    ):
        """Touches nothing yet.

        Args:
          cells: of the plan, those of a checkpoint together.
          shapes: of their batches.
          models: loads the checkpoints.
          claims: which cells are this process's.
          say: called with a line for whoever watches.
        """
        self._cells, self._shapes, self._models = list(cells), shapes, models
        self._claims, self._say = claims, say
        self.progress: Callable[[int], None] | None = None
        self._written = time.monotonic()
        self._rows = {cell: cell.question.amount(tuple(cell.missing())).rows for cell in cells}
        self._done_rows: Counter[Cell] = Counter()
        self._finished: set[Cell] = set()
        self.failures: list[Failure] = []
        self.model_rows = 0

    @property
    def rows(self) -> int:
        """Rows of the model that were missing at the start."""
        return sum(self._rows.values())

    def done(self) -> int:
        """Cells whose results are on disk."""
        return sum(self._is_done(cell) and cell in self._finished for cell in self._cells)

    def run(self) -> None:
        """Makes all cells, or waits for those that others make; each process of a job must call it.

        Raises:
          UserError: a damaged checkpoint or cell, no memory, no space or no permission.
        """
        loaded: Checkpoint | None = None
        params: Params = {}
        portions = self._portions() if processes.primary() else self._told_portions()
        for checkpoint, asked in portions:
            if checkpoint is not loaded:
                params = {}  # frees the last one's memory first
                loaded, params = checkpoint, self._models.load(checkpoint)
            self._ask(checkpoint, params, asked)
        if processes.primary():
            self.write_table()

    def write_table(self) -> Path:
        """Writes results.jsonl of the sweep: the rows of the cells that are done."""
        self._written = time.monotonic()
        root = self._cells[0].root
        sweep_files.write_lines(root / RESULTS, sweep_files.cell_rows(root))
        return root / RESULTS

    # ---------------------------------------------------------------------------- portions

    def _portions(self) -> Iterator[tuple[Checkpoint, Iterable[Asking]]]:
        """What is asked next of which checkpoint, until all cells are done."""
        waiting = False
        while True:
            for _, of_checkpoint in itertools.groupby(self._cells, lambda c: id(c.checkpoint)):
                yield from self._portions_of(list(of_checkpoint))
            others = [cell for cell in self._cells if not self._is_done(cell)]
            if not others:
                break
            if not waiting:
                self._say(f"Waiting for {len(others)} cells that other processes work on")
                waiting = True
            while all(self._claims.is_held(cell.folder) for cell in others):
                self._tell([])  # the others of a job must not wait for long
                time.sleep(_WAIT)
                others = [cell for cell in others if not self._is_done(cell)]
                self._show()
                if not others:
                    break
        self._tell(None)

    def _portions_of(self, cells: Sequence[Cell]) -> Iterator[tuple[Checkpoint, Iterable[Asking]]]:
        """Those of one checkpoint: all at once, claimed on the way; in a job as it is told."""
        checkpoint: Checkpoint = cells[0].checkpoint
        claimed = self._claimed(cells)
        while (first := next(claimed, None)) is not None:
            asked = itertools.chain([first], claimed)
            if not processes.several():
                yield checkpoint, asked
                continue
            portion, rows = [], 0
            for asking in asked:
                portion.append(asking)
                rows += asking.rows
                if rows >= _PORTION * self._shapes.batch_size:
                    break
            self._tell(portion)
            yield checkpoint, portion

    def _tell(self, portion: Sequence[Asking] | None) -> None:
        """Tells the others of the job what is asked next; None: nothing more."""
        if processes.several():
            numbers = {cell: i for i, cell in enumerate(self._cells)}
            processes.from_primary(
                None if portion is None else [[numbers[x.cell], x.passes] for x in portion]
            )

    def _told_portions(self) -> Iterator[tuple[Checkpoint, Iterable[Asking]]]:
        """What the primary process tells."""
        while (told := processes.from_primary(None)) is not None:
            portion = [self._asking(self._cells[number], passes) for number, passes in told]
            if portion:
                yield portion[0].cell.checkpoint, portion

    # ------------------------------------------------------------------------------- cells

    def _is_done(self, cell: Cell) -> bool:
        if cell not in self._finished and not cell.missing() and scoring.is_scored(cell):
            self._finished.add(cell)
            self._done_rows[cell] = self._rows[cell]  # whoever has made it
        return cell in self._finished or any(f.cell is cell for f in self.failures)

    def _claimed(self, cells: Sequence[Cell]) -> Iterator[Asking]:
        """Claims cells, one after the other, for as long as there are any."""
        for cell in cells:
            if self._is_done(cell) or not self._claims.take(cell.folder):
                continue
            missing = cell.missing()
            if missing:
                yield self._asking(cell, missing)
            else:
                self._score(cell)

    def _asking(self, cell: Cell, passes: Sequence[str]) -> Asking:
        engine = self._models.engine(cell.checkpoint)
        prompt = [*engine.prompt, *cell.checkpoint.prompt]
        return Asking(cell, passes, engine.group(cell.question.name), prompt)

    def _ask(self, checkpoint: Checkpoint, params: Params, asked: Iterable[Asking]) -> None:
        """Puts the rows of cells to the model, and finishes the cells."""
        engine = self._models.engine(checkpoint)
        requests = itertools.chain.from_iterable(asking.requests() for asking in asked)
        batches = buckets.stream(requests, self._shapes.of)
        clock, compiled = time.perf_counter(), engine.compile_seconds
        try:
            for batch, answers in engine.answers(params, batches, self._shapes.num_choices):
                now = time.perf_counter()
                seconds = max(0.0, now - clock - (engine.compile_seconds - compiled))
                clock, compiled = now, engine.compile_seconds
                if not processes.primary():
                    continue
                for request, answer in zip(batch.requests, answers, strict=True):
                    self._take(request, answer, seconds / len(answers))
                self._show()
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"No memory left on the device for {checkpoint.name}: lower Eval.batch_size (now "
                f"{self._shapes.batch_size}) and run the same command again."
            ) from error

    def _take(self, request: buckets.Request, answer: Answer, seconds: float) -> None:
        asking, row = request.key
        self.model_rows += 1
        self._done_rows[asking.cell] += 1
        if asking.take(row, answer, seconds):
            self._finish(asking)

    def _show(self) -> None:
        if self.progress is not None:
            self.progress(sum(self._done_rows.values()))

    def _finish(self, asking: Asking) -> None:
        """Writes the passes of a cell, then what follows from them."""
        cell = asking.cell
        sweep_files.write_facts(cell.folder, _facts(cell, asking))
        for name in asking.passes:
            sweep_files.write_lines(cell.pass_path(name), asking.lines(name))
        self._score(cell)
        if time.monotonic() - self._written > _TABLE_EVERY:
            self.write_table()

    def _score(self, cell: Cell) -> None:
        try:
            facts = _facts(cell)
            sweep_files.write_facts(cell.folder, facts)
            problems = scoring.score(cell)
            if not problems:
                # Last, because a cell with this mark is done.
                marked = dataclasses.replace(facts, scoring=cell.scoring)
                sweep_files.write_facts(cell.folder, marked)
                self._finished.add(cell)
                self._done_rows[cell] = self._rows[cell]
        except UserError as error:
            problems = [str(error)]
        finally:
            self._claims.release(cell.folder)
        self.failures += [Failure(cell, problem) for problem in problems]


def _facts(cell: Cell, asking: Asking | None = None) -> CellFacts:
    """What a cell is, with the passes that were made before and those that are made now."""
    checkpoint, question, info = cell.checkpoint, cell.question, cell.question.info
    seconds, tokens, truncated = {}, {}, {}
    if (cell.folder / sweep_files.CELL_FACTS).exists():
        before = sweep_files.read_facts(cell.folder)
        seconds, tokens = dict(before.seconds), dict(before.tokens)
        truncated = dict(before.truncated)
    for name in asking.passes if asking is not None else ():
        assert asking is not None
        seconds[name], tokens[name] = round(asking.seconds[name], 4), asking.tokens[name]
        truncated[name] = question.truncated(name)
    return CellFacts(
        run=checkpoint.run,
        checkpoint=checkpoint.name,
        step=checkpoint.step,
        task=question.name,
        dataset=info.dataset,
        prompt=info.prompt,
        family=info.family,
        language=info.language,
        original=info.original,
        trained=cell.trained,
        split=question.task.split,
        shots=question.shots,
        key=cell.key,
        n=len(question.task.examples),
        skipped=question.task.skipped,
        truncated=truncated,
        seconds=seconds,
        tokens=tokens,
        exemplars=question.exemplars,
    )

"""What a run says while it goes on and when it is done.

metrics.jsonl and TensorBoard (`MetricsWriter`), the time ledger (`Ledger`), the progress bar
(`Progress`), the table of results (`results_table`) and the page (`write_report`).

Names of metrics: the loss over all tasks is `loss`, a value of one task is `loss/TASK`,
`accuracy/TASK` and so on (`task_metric`); the page draws one curve for each.
"""

import collections
import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from mtl_jax import processes
from mtl_jax.errors import UserError
from mtl_jax.run_directory import RunDirectory
from mtl_jax.storage import append_text, read_jsonl, storage_errors, truncate_jsonl
from mtl_jax.tables import format_seconds, results_table

__all__ = [
    "Ledger",
    "MetricsWriter",
    "Progress",
    "evaluation_progress",
    "require_run",
    "read_jsonl",
    "results_table",
    "task_metric",
    "truncate_jsonl",
    "write_report",
]


def task_metric(name: str, task: str) -> str:
    """Returns the name under which the metric `name` of one task is written: `loss/TASK`."""
    return f"{name}/{task}"


class MetricsWriter:
    """Writes metrics to metrics.jsonl, a line per step, and on wish to TensorBoard."""

    def __init__(
        self,
        run_directory: str | Path,
        tensorboard: bool = False,
        *,
        resume_step: int = 0,
        primary: bool = True,
    ):
        """Opens the files and drops what an earlier start wrote after `resume_step`.

        Args:
          run_directory: the run's folder.
          tensorboard: also write event files; needs the extra `tensorboard`.
          resume_step: the step of the restored checkpoint, 0 for a run from the start. No step
            appears twice in the files.
          primary: False in all but one process of a job; those write nothing.

        Raises:
          UserError: TensorBoard is wanted but not installed, or the files cannot be written.
        """
        self._open = primary
        self._events: Any = None
        self._path = Path(run_directory) / "metrics.jsonl"
        if not primary:
            return
        # First, so that a missing package is told before any file is touched.
        summary_writer = _tensorboard_writer() if tensorboard else None
        truncate_jsonl(self._path, resume_step)
        with storage_errors("write metrics.jsonl", self._path.parent):
            append_text(self._path, "")
            if summary_writer is not None:
                self._events = summary_writer(
                    str(self._path.parent / "tensorboard"), purge_step=resume_step + 1
                )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line: the step, the time and the values (null where not finite).

        Raises:
          UserError: no space left.
        """
        if not self._open:
            return
        row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        for name, value in values.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        with storage_errors("write metrics.jsonl", self._path.parent):
            # By its path, so that a run whose folder has vanished stops here.
            append_text(self._path, json.dumps(row, ensure_ascii=False) + "\n")
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, float(value), int(step))
                self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._open = False
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _tensorboard_writer() -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise UserError(
            "Run.tensorboard = True needs the package tensorboardX: install it with "
            "`pip install 'mtl_jax[tensorboard]'`, or set Run.tensorboard = False."
        ) from error
    return tensorboardX.SummaryWriter


class Ledger:
    """Where the time goes: seconds per activity that sum to the wall time.

    `with ledger("step"): ...` adds to "step"; inside another activity, that one stands still, so
    that no second counts twice. What no activity claims is "other". For the main thread only.
    """

    OTHER = "other"

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Starts the clock."""
        self._clock = clock
        self._start = self._mark = clock()
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._stack: list[str] = []
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._earlier: list[Any] | None = None

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Books the time of the `with` block on `activity`."""
        self._book()
        self._stack.append(activity)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        """Adds the time since the last change to the activity that was going on."""
        now = self._clock()
        self._seconds[self._stack[-1] if self._stack else self.OTHER] += now - self._mark
        self._mark = now

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of every activity so far, "other" last; they sum to `wall()`."""
        self._book()
        known = {name: value for name, value in self._seconds.items() if name != self.OTHER}
        return {**known, self.OTHER: self._seconds[self.OTHER]}

    def wall(self) -> float:
        """Returns the seconds since the ledger began, as of the last booking."""
        return self._mark - self._start

    def save(self, run: RunDirectory) -> None:
        """Writes ledger.json: one entry per start of the run, this one last."""
        if self._earlier is None:
            stored = run.read_json("ledger.json")
            self._earlier = stored if isinstance(stored, list) else []
        seconds = {name: round(value, 3) for name, value in self.seconds().items()}
        entry = {"started": self._started, "wall": round(self.wall(), 3), "seconds": seconds}
        run.write_json("ledger.json", [*self._earlier, entry])


class Progress:
    """Shows how far a run is: a bar on a terminal, otherwise a line about every ten seconds."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        label: str = "step",
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the bar.

        Args:
          total: the last step.
          start: the step that the run continues from.
          label: what is counted; another bar than that of the steps vanishes when it is full.
          stream: where to write; by default the standard error of the primary process.
          interval: seconds between two lines when `stream` is no terminal.
          clock: seconds; for tests.
        """
        self._stream = stream or processes.screen()
        self._total = total
        self._interval = interval
        self._clock = clock
        self._label = label
        self._first: tuple[int, float] | None = None
        self._printed = -math.inf
        self._bar: Any = None
        if self._stream.isatty():
            # Only needed on a terminal.
            import tqdm

            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                file=self._stream,
                unit=label,
                leave=label == "step",
                dynamic_ncols=True,
            )

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Shows that `step` steps are done, with the newest loss and speed where given."""
        facts = {}
        if loss is not None:
            facts["loss"] = f"{loss:.3f}"
        if tokens_per_second is not None:
            facts["tokens/s"] = f"{tokens_per_second:,.0f}"
        if self._bar is not None:
            if facts:
                self._bar.set_postfix(facts, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        # Compilation precedes the first update: the pace is taken from there on.
        self._first = self._first or (step, now)
        if now - self._printed < self._interval and step < self._total:
            return
        self._printed = now
        words = [f"{self._label} {step:,}/{self._total:,}", *(f"{k} {v}" for k, v in facts.items())]
        first_step, first_time = self._first
        if first_step < step < self._total:
            left = (self._total - step) * (now - first_time) / (step - first_step)
            words.append(f"time left {format_seconds(left)}")
        print("  ".join(words), file=self._stream, flush=True)

    def write(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def evaluation_progress() -> Callable[[int, int], None]:
    """Returns a callback `(rows done, rows in all)` that shows how far an evaluation is."""
    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(total, label="evaluated"))
        bars[0].update(done)
        if done == total:
            bars[0].close()

    return show


def require_run(path: str | Path) -> RunDirectory:
    """Returns the run directory at `path`.

    Raises:
      UserError: the folder holds no run.
    """
    run = RunDirectory(path)
    if not run.is_run():
        what = "holds no run" if run.path.is_dir() else "is not a folder"
        raise UserError(f"{run.path} {what}: name the folder that `mtl-jax train` wrote to.")
    return run


def write_report(run_directory: str | Path) -> Path:
    """Writes report.html of a run from its files, and the numbers of its pictures in `analysis/`.

    Returns:
      The path of the page.

    Raises:
      UserError: the folder holds no run, or one of its files is damaged.
    """
    from mtl_jax import report_html
    from mtl_jax.analysis import run_analysis

    run = require_run(run_directory)
    analysis = run_analysis.analyse(run.path)
    run_analysis.save(analysis, run.path)
    return run.write_text("report.html", report_html.render(run.path, analysis))

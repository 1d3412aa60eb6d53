"""`mtl-jax infer`: a JSONL file in, the same rows with predictions or scores out, in order.

The output grows by whole windows of rows. A window is the same rows in the same batches however
often the command was killed, so what a resumed run writes is what an unbroken one would have.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_jax import config, inference, report
from mtl_jax.errors import UserError
from mtl_jax.generate_config import GenerateConfig
from mtl_jax.infer_config import InferConfig
from mtl_jax.sharding import MeshConfig
from mtl_jax.storage import replace_text, storage_errors

ROOMS = {"Infer": InferConfig, "Generate": GenerateConfig, "Mesh": MeshConfig}


def main(args: argparse.Namespace) -> int:
    """Works through the input, from where the output ends.

    Raises:
      UserError: a mistake in the flags or the checkpoint, a bad line where those stop the run, or
        an output that is not this command's.
    """
    start = time.perf_counter()
    rooms = config.load_rooms(args.gin_file, args.gin_bindings, args.gin_search_paths, ROOMS)
    job = Job(args, rooms["Infer"], rooms["Generate"])
    total = job.count_lines()
    done = job.resume()
    if done:
        say(f"{args.output}: {done:,} rows are there already; continuing behind them")
    loaded = inference.load(
        args.checkpoint,
        step=None if job.cfg.step < 0 else job.cfg.step,
        dtype=job.cfg.dtype,
        mesh=rooms["Mesh"],
        tokenizer_folder=job.cfg.tokenizer or None,
        inputs_length=job.cfg.inputs_length,
        attention=job.cfg.attention,
        task=job.cfg.task or None,
    )
    for note in loaded.notes:
        say(f"note: {note}")
    written = job.run(loaded, done, total)
    seconds = time.perf_counter() - start
    say(f"{args.output}: {written:,} rows written in {seconds:.0f} s")
    if loaded.truncated:
        say(f"{loaded.truncated:,} inputs were cut to {job.cfg.inputs_length} tokens")
    if job.skipped:
        say(f"{job.skipped:,} bad lines are in {job.skipped_path}")
    return 0


def say(line: str) -> None:
    """A line for whoever watches."""
    print(line, file=sys.stderr, flush=True)


class BadLineError(UserError):
    """A line of the input that is no valid row."""


@dataclasses.dataclass(frozen=True)
class _Row:
    line: int
    fields: dict[str, Any]


class Job:
    """One input file, its output, and how far it is.

    Attributes:
      cfg: how the file is worked through.
      skipped: bad lines passed over so far, also before a kill.
      skipped_path: the file that they are in.
    """

    def __init__(self, args: argparse.Namespace, cfg: InferConfig, generate: GenerateConfig):
        """Checks what can be checked without a model.

        Raises:
          UserError: there is no such input, or generation is configured for a run that scores.
        """
        self.cfg, self._generate = cfg, generate
        self._mode, self._checkpoint = args.mode, args.checkpoint
        self._input, self._output = Path(args.input), Path(args.output)
        self.skipped, self.skipped_path = 0, self._beside("skipped.jsonl")
        self._begun_at: int | None = None
        if not self._input.is_file():
            raise UserError(f"--input: {self._input} is not a file.")
        if self._output.resolve() == self._input.resolve():
            raise UserError("--output must not be the --input file.")
        if self._output.is_dir() or not self._output.parent.is_dir():
            raise UserError(f"--output: {self._output} must be a file in a folder that exists.")
        if args.mode == "score" and (generate != GenerateConfig() or cfg.log_probs):
            raise UserError(
                "--mode score generates nothing: leave out the Generate values and Infer.log_probs."
            )

    def _beside(self, ending: str) -> Path:
        return self._output.with_name(f"{self._output.name}.{ending}")

    def count_lines(self) -> int:
        """Lines of the input that are not empty."""
        with self._input.open("rb") as file:
            return sum(1 for line in file if line.strip())

    # ------------------------------------------------------------------------------- resuming

    def _manifest(self) -> dict[str, Any]:
        values = {
            "mode": self._mode,
            "checkpoint": str(Path(self._checkpoint).resolve()),
            "input": str(self._input.resolve()),
        }
        for name, room in (("Infer", self.cfg), ("Generate", self._generate)):
            if name == "Infer" or self._mode == "generate":
                of_room = dataclasses.asdict(room)
                values |= {f"{name}.{field}": value for field, value in of_room.items()}
        # These may change on the way: a run that a bad line has stopped goes on and skips it, and
        # the newest step is named when there is a newer one. The step itself is compared apart.
        for name in ("Infer.on_bad_line", "Infer.step"):
            del values[name]
        return json.loads(json.dumps(values))

    def resume(self) -> int:
        """Rows that the output holds already, of this very job; a half-written one is cut off.

        Raises:
          UserError: the output is of another job, or of no job.
        """
        path, manifest = self._beside("job.json"), self._manifest()
        if not self._output.exists():
            return 0
        other = "Remove it, or name another --output."
        if not path.is_file():
            raise UserError(f"{self._output} exists and was not written by mtl-jax infer. {other}")
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged: remove it together with the output.") from error
        self._begun_at = before.pop("step", None)
        for name in sorted(manifest.keys() | before.keys()):
            if manifest.get(name) != before.get(name):
                raise UserError(
                    f"{self._output} was begun with {name} = {before.get(name)!r}, not "
                    f"{manifest.get(name)!r}. {other}"
                )
        for cut in (self._output, self.skipped_path):
            _cut_half_line(cut)
        with self._output.open("rb") as file:
            return sum(1 for _ in file)

    def _begin(self, step: int) -> None:
        """Makes the files of a new job; not before a model is there to fill them."""
        with storage_errors("start the output", self._output.parent):
            self.skipped_path.unlink(missing_ok=True)
            manifest = json.dumps(self._manifest() | {"step": step}, indent=2)
            replace_text(self._beside("job.json"), manifest + "\n")
            self._output.touch()

    # ------------------------------------------------------------------------------- rows

    def rows(self) -> Iterator[_Row]:
        """The rows of the input; bad lines are skipped into their file once, or stop the run.

        Raises:
          UserError: names the line and what is wrong with it.
        """
        known = _last_line_number(self.skipped_path)
        self.skipped = 0
        with self._input.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    yield _Row(number, self._parse(raw))
                    continue
                except ValueError as error:
                    reason = str(error)
                if self.cfg.on_bad_line == "stop":
                    raise BadLineError(
                        f"{self._input}, line {number}: {reason}. Mend it, or pass over such lines "
                        "with --gin.Infer.on_bad_line=skip; the rows before it are written."
                    )
                self.skipped += 1
                if number > known:
                    text = raw.decode("utf-8", errors="replace").rstrip("\n")
                    record = {"line": number, "error": reason, "text": text}
                    self._append(self.skipped_path, [record])

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            # Python reads NaN and halves of surrogate pairs, which are no JSON and no UTF-8.
            fields = json.loads(raw, parse_constant=_refuse_constant)
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        if not isinstance(fields.get("inputs"), str):
            raise ValueError('the field "inputs" must be a text')
        if not isinstance(fields.get("prefix", ""), str):
            raise ValueError('the field "prefix" must be a text')
        targets = fields.get("targets")
        if self._mode == "score" and not isinstance(targets, str):
            fits = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
            if not fits or not targets:
                raise ValueError('the field "targets" must be a text or a list of texts')
        if clash := [name for name in self._adds() if name in fields]:
            raise ValueError(f'the field "{clash[0]}" would be overwritten')
        return fields

    def _adds(self) -> tuple[str, ...]:
        if self._mode == "score":
            return ("score",)
        several = ("predictions", "scores") if self._generate.num_return > 1 else ("prediction",)
        return (*several, "log_probs") if self.cfg.log_probs else several

    # ------------------------------------------------------------------------------- running

    def run(self, loaded: inference.LoadedModel, done: int, total: int) -> int:
        """Writes the rows behind the `done` ones; returns how many it wrote.

        Raises:
          UserError: a bad line stops the run, or the rows written before are not the input's.
        """
        if not self._output.exists():
            self._begin(loaded.step)
        elif self._begun_at != loaded.step:
            # A run that is still training has a newer checkpoint by now.
            raise UserError(
                f"{self._output} was begun with the checkpoint of step {self._begun_at}, not "
                f"{loaded.step}: set --gin.Infer.step={self._begun_at}, or name another --output."
            )
        progress = report.Progress(total, label="rows")
        size = self.cfg.batch_size * self.cfg.window
        before, written, first = self._rows_written(done), 0, 0
        window: list[_Row] = []

        def flush() -> None:
            nonlocal written, first
            there = min(len(window), max(0, done - first))
            for row in window[:there]:
                self._check_same(row, next(before))
            if there < len(window):
                # A window that is partly written is computed whole: its batches stay the same.
                made = self._compute(loaded, window, first)[there:]
                self._append(self._output, made)
                written += len(made)
            first += len(window)
            window.clear()
            progress.update(min(total, first + self.skipped))

        try:
            for row in self.rows():
                window.append(row)
                if len(window) == size:
                    flush()
            flush()
        except BadLineError:
            flush()  # the rows before it are not lost
            raise
        finally:
            progress.close()
        if done > first:
            raise UserError(
                f"{self._output} holds {done:,} rows but {self._input} only {first:,}: it is not "
                "the file that the output was begun with. Remove the output, or name another."
            )
        return written

    def _rows_written(self, count: int) -> Iterator[dict[str, Any]]:
        with self._output.open("rb") as file:
            for _, raw in zip(range(count), file, strict=False):
                yield json.loads(raw)

    def _check_same(self, row: _Row, written: dict[str, Any]) -> None:
        if row.fields != {k: v for k, v in written.items() if k not in self._adds()}:
            raise UserError(
                f"{self._input}, line {row.line} is not the row that {self._output} answers there: "
                "the input has changed. Remove the output, or name another."
            )

    def _compute(
        self, loaded: inference.LoadedModel, window: list[_Row], first: int
    ) -> list[dict[str, Any]]:
        texts = [row.fields["inputs"] for row in window]
        size = self.cfg.batch_size
        if self._mode == "score":
            targets = [row.fields["targets"] for row in window]
            scores = loaded.score(texts, targets, batch_size=size)
            values = [{"score": score.tolist()} for score in scores]
        else:
            prefixes = [row.fields.get("prefix", "") for row in window]
            found = loaded.predict(
                texts, self._generate, prefixes=prefixes, batch_size=size, first_row=first
            )
            values = [self._values(predictions) for predictions in found]
        return [row.fields | value for row, value in zip(window, values, strict=True)]

    def _values(self, predictions: list[inference.Prediction]) -> dict[str, Any]:
        if self._generate.num_return == 1:
            values: dict[str, Any] = {"prediction": predictions[0].text}
            log_probs: Any = predictions[0].log_probs
        else:
            values = {
                "predictions": [p.text for p in predictions],
                "scores": [p.score for p in predictions],
            }
            log_probs = [p.log_probs for p in predictions]
        return values | ({"log_probs": log_probs} if self.cfg.log_probs else {})

    def _append(self, path: Path, records: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with storage_errors(f"write {path.name}", path.parent), path.open("ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in it")


def _cut_half_line(path: Path) -> None:
    """Cuts off what a kill left behind the last complete line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 2**16)
            file.seek(start)
            line_feed = file.read(position - start).rfind(b"\n")
            if line_feed >= 0:
                position = start + line_feed + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _last_line_number(path: Path) -> int:
    """The last line that is in the file of skipped lines."""
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["line"]) if lines else 0

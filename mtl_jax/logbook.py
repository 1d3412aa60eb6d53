"""Metrics of the training loop: fetched one step late, summed per task, written every few steps."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mtl_jax import config, data, flops, processes, report
from mtl_jax.balance.method import GRAM
from mtl_jax.balance_log import BalanceLog
from mtl_jax.errors import UserError
from mtl_jax.guard import Guard

if TYPE_CHECKING:
    from mtl_jax.build import Session


class Logbook:
    """Collects the metrics of every step without holding the device up.

    Step n is read after step n + 1 has been dispatched. Waiting for step n before dispatching
    n + 2 keeps the host at most one step ahead.
    """

    def __init__(
        self,
        session: "Session",
        task_ids: Mapping[str, int],
        ledger: report.Ledger,
        first: int,
        guard: Guard,
    ):
        """Opens the files.

        Args:
          session: of the run.
          task_ids: name -> index in the per-task vectors.
          ledger: waiting for the device is booked there as "step".
          first: the step that the run continues from.
          guard: judges the loss of every step.
        """
        cfg = session.config
        self._guard = guard
        self.step = first
        self._run, self._ledger, self._every = session.run, ledger, cfg.run.log_every
        self._names = {index: name for name, index in task_ids.items()}
        primary = processes.primary()
        self._writer = report.MetricsWriter(
            session.run.path, cfg.run.tensorboard, resume_step=first, primary=primary
        )
        if primary:
            report.truncate_jsonl(session.run.path / "results.jsonl", first)
        balancer = session.balancer
        self._balance_log = BalanceLog(
            *(session.run.path, balancer.names, balancer.of_task, balancer.grouping.names),
            *(balancer.method is not None, first),
            by_tokens=balancer.cfg.reduction == "token_mean",
            solves=balancer.needs(GRAM),
            primary=primary,
        )
        self._progress = report.Progress(cfg.run.steps, first)
        self._newest: tuple[int, dict[str, jax.Array], data.Batch] | None = None
        self._fetched: list[tuple[int, dict[str, Any]]] = []
        self._padding: list[tuple[float, float]] = []
        self._batch: data.Batch | None = None  # of the newest step that was read
        self._examples = session.examples()
        self._since = time.perf_counter()
        self._interrupted = self._interruptions()
        device = jax.devices()[0]
        self._step_flops = flops.flops_per_step(
            *(session.sharing.model_config, cfg.data.batch_size),
            *(cfg.data.inputs_length, cfg.data.targets_length),
        )
        self._device_kind, self._devices = device.device_kind, jax.device_count()
        self._encoder_positions = cfg.data.batch_size * cfg.data.inputs_length
        self._decoder_positions = cfg.data.batch_size * cfg.data.targets_length

    def add(self, number: int, metrics: dict[str, jax.Array], batch: data.Batch) -> None:
        """Takes the metrics of the step just dispatched, and reads those of the step before.

        Args:
          number: the step.
          metrics: of `step.train_step`, still on the device.
          batch: of that step.
        """
        previous, self._newest, self.step = self._newest, (number, metrics, batch), number
        if previous is not None:
            self._fetch(*previous)

    def flush(self) -> None:
        """Reads the newest step too; waits for the device.

        Raises:
          UserError: a bad loss, where the run shall stop.
          RollBack: a bad loss, where it shall go back.
        """
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._fetch(*newest)

    def write(self) -> None:
        """Reads the newest step too, and writes a line of what has none yet.

        Before each save, so that a run which goes on from there lacks no step. In a job, all
        processes do so at the same step.

        Raises:
          UserError, RollBack: as `flush`; or no space left.
        """
        self.flush()
        if self._fetched:
            self._write()

    def _fetch(self, number: int, metrics: dict[str, jax.Array], batch: data.Batch) -> None:
        with self._ledger("step"):
            values = jax.device_get(metrics)
        self._balance_log.check(number, values)
        if values.get("mixed_sharing", False):
            raise UserError(
                f"A microbatch of step {number} holds tasks with different parameters (Sharing, "
                "Lora, ...): leave Data.blocks and Step.microbatches to the run."
            )
        good = self._guard.judge(number, values, batch, self._not_finite(number, values))
        if not values.get("gradients_seen", True):  # zeros of the size of all pairs of tasks
            for name in ("gram", "split_half_cosine", "affinity"):
                values.pop(name, None)
        if not good:  # nothing was learned from it
            for name in ("task_loss_sum", "task_tokens", "task_correct"):
                values[name] = np.zeros_like(values[name])
        self._fetched.append((number, values))
        self._padding.append(batch.padding)
        self._batch = batch
        if number % self._every == 0:
            self._write()

    def _interruptions(self) -> float:
        """Seconds so far that were no training: evaluations and checkpoints."""
        seconds = self._ledger.seconds()
        return seconds.get("eval", 0.0) + seconds.get("checkpoint", 0.0)

    def _not_finite(self, number: int, values: Mapping[str, Any]) -> str:
        """What is not finite at a step; "": nothing."""
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            return ""
        bad = [
            self._names.get(int(i), "padding")
            for i in np.flatnonzero(~np.isfinite(values["task_loss_sum"]))
        ]
        what = f"The loss at step {number} is {values['loss']}"
        where = f", from task {', '.join(bad)}" if bad else ""
        if math.isfinite(values["loss"]):
            what = f"The gradient at step {number} is not finite (norm {values['grad_norm']})"
        return f"{what}{where}"

    def _write(self) -> None:
        """One line of metrics over the steps since the last one."""
        rows: Sequence[dict[str, Any]] = [values for _, values in self._fetched]
        number = self._fetched[-1][0]
        now = time.perf_counter()
        seconds = now - self._since - (self._interruptions() - self._interrupted)
        self._since, self._interrupted = now, self._interruptions()
        sums: dict[str, np.ndarray] = {
            name: np.stack([row[name] for row in rows]).sum(axis=0, dtype=np.float64)
            for name in ("task_loss_sum", "task_tokens", "task_correct")
        }
        tokens = max(float(sums["task_tokens"].sum()), 1.0)
        paddings = processes.gather(np.mean(self._padding, axis=0).tolist())
        encoder_padding, decoder_padding = np.mean(paddings, axis=0).tolist()
        real = self._encoder_positions * (1 - encoder_padding)
        real += self._decoder_positions * (1 - decoder_padding)
        speed = len(rows) * real / seconds
        used = [row for row in rows if not row.get("skipped", False)]
        line = {
            "loss": float(sums["task_loss_sum"].sum()) / tokens if used else math.nan,
            "accuracy": float(sums["task_correct"].sum()) / tokens if used else math.nan,
            "z_loss": float(np.mean([row["z_loss"] for row in used])) if used else math.nan,
            "grad_norm": float(rows[-1]["grad_norm"]),
            "learning_rate": float(rows[-1]["learning_rate"]),
            "target_tokens": tokens,
            "encoder_padding": encoder_padding,
            "decoder_padding": decoder_padding,
            "tokens_per_second": speed,
            "seconds_per_step": seconds / len(rows),
        }
        use = flops.utilisation(
            self._step_flops * len(rows), seconds, self._device_kind, self._devices
        )
        if use is not None:
            line["model_flops_utilisation"] = use
        for index in np.flatnonzero(sums["task_tokens"]):
            name, count = self._names[int(index)], sums["task_tokens"][index]
            line[report.task_metric("loss", name)] = sums["task_loss_sum"][index] / count
            line[report.task_metric("accuracy", name)] = sums["task_correct"][index] / count
            line[report.task_metric("tokens", name)] = count
        line |= {"skipped_updates": self._guard.skips} if self._guard.skips else {}
        line |= {
            name: float(np.mean([row[name] for row in rows]))
            for name in rows[-1]
            if name.startswith("sharing/")
        }
        line |= self._epochs() | self._balance_log.columns(number, rows)
        self._writer.write(number, line)
        self._progress.update(number, loss=line["loss"], tokens_per_second=speed)
        # Now rather than at the end: a run that is killed keeps its account of time.
        self._ledger.save(self._run)
        self._fetched, self._padding = [], []

    def _epochs(self) -> dict[str, float]:
        """Passes over each task's examples since the start of training."""
        assert self._batch is not None
        return {
            report.task_metric("epochs", name): drawn / examples
            for name, drawn in data.examples_drawn(self._batch).items()
            if (examples := self._examples.get(name))
        }

    def write_results(self, number: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Puts evaluation into metrics.jsonl as means over tasks, and returns them.

        Returns:
          "METRIC" and "METRIC/DATASET" -> mean over tasks; what `Checkpoint.best_metric` may name.
        """
        groups: dict[str, list[float]] = {}
        for row in rows:
            if row["metric"] not in ("chance", "majority"):
                groups.setdefault(row["metric"], []).append(row["value"])
                groups.setdefault(f"{row['metric']}/{row['dataset']}", []).append(row["value"])
        means = {name: float(np.mean(values)) for name, values in groups.items()}
        self._writer.write(number, {f"eval/{name}": value for name, value in means.items()})
        overall = "  ".join(f"{n} {v:.1f}" for n, v in means.items() if "/" not in n)
        self._progress.write(f"evaluation at step {number:,}: {overall}")
        return means

    def finish(self, counters: Mapping[str, Mapping[str, int]], rates: Mapping[str, float]) -> None:
        """Writes what is left: the last metrics, data.json with the data's counters, the ledger.

        Args:
          counters: per task, of `TrainStream.counters_by_task`.
          rates: that a method found for the mixture, for rates.json and rates.gin; empty: none.
        """
        self.write()
        self._run.write_json("data.json", counters)
        if rates:
            self._run.write_json("rates.json", rates)
            self._run.write_text("rates.gin", config.rates_text(rates))
        self._report_cuts(counters)
        self._ledger.save(self._run)

    def _report_cuts(self, counters: Mapping[str, Mapping[str, int]]) -> None:
        """One line on examples that did not fit their row; data.json has every task's numbers."""
        cuts = {
            name: of_task["truncated_inputs"] + of_task["truncated_targets"]
            for name, of_task in counters.items()
        }
        examples = sum(of_task["examples"] for of_task in counters.values())
        if sum(cuts.values()) <= 0.01 * examples:
            return
        worst = sorted(cuts, key=lambda name: -cuts[name])[:3]
        longest = max(of_task["longest_input"] for of_task in counters.values())
        self._progress.write(
            f"warning: {sum(cuts.values()):,} inputs or targets of {examples:,} examples were cut "
            f"to Data.inputs_length or Data.targets_length (longest input {longest:,} tokens); "
            f"most often {', '.join(f'{name} ({cuts[name]:,})' for name in worst)}; see data.json"
        )

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, error: object, *exception: object) -> None:
        # Also after an error: what was measured until then is kept. Not where other processes
        # would have to help, for they need not have failed.
        if self._fetched and (error is None or jax.process_count() == 1):
            self._write()
        self._progress.close()
        self._writer.close()

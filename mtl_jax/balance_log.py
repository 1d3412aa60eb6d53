"""What is written of the tasks' weights and gradients: columns of metrics.jsonl, gradients.jsonl.

Letters: N tasks without padding, K groups of parameters.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import report
from mtl_jax.errors import UserError
from mtl_jax.storage import append_text, storage_errors


class BalanceLog:
    """Sums up the steps between two lines of metrics.jsonl."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        of_task: Sequence[int],
        groups: Sequence[str],
        weighted: bool,
        first: int,
        *,
        by_tokens: bool = False,
        solves: bool = False,
        primary: bool = True,
    ):
        """Drops what an earlier start wrote after step `first`.

        Args:
          folder: the run directory.
          names: of the tasks.
          of_task: for each id of a SeqIO task, padding's first, its index in `names` plus one.
          groups: names of the groups of parameters.
          weighted: a method sets weights, so that they are worth a column.
          first: the step that the run continues from.
          by_tokens: without a method, a task's share of the update is that of its target tokens.
          solves: the method speaks at steps with gradients of single tasks alone.
          primary: False in all but one process of a job; those write nothing.
        """
        self._path = folder / "gradients.jsonl"
        self._names, self._groups, self._weighted = list(names), list(groups), weighted
        self._of_task = np.asarray(of_task)
        self._primary, self._solves = primary, solves
        self._by_tokens = by_tokens and not weighted and len(names) > 1
        if primary:
            report.truncate_jsonl(self._path, first)

    def check(self, number: int, values: Mapping[str, Any]) -> None:
        """Refuses what can only be a mistake in the layout of the batch.

        Raises:
          UserError: a microbatch that must hold one task held several.
        """
        if values.get("mixed_microbatches", False):
            raise UserError(
                f"A microbatch of step {number} holds several tasks, so gradients of single tasks "
                "cannot be told apart: leave Data.blocks and Step.microbatches to the run, or set "
                "Balance.task_gradients = 'vmap'."
            )

    def columns(self, number: int, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What metrics.jsonl gets of these steps; writes their line of gradients.jsonl.

        Args:
          number: the last of the steps.
          steps: metrics of `step.train_step`, on the host.
        """
        line: dict[str, float] = {}
        if self._weighted:
            line |= self._weights(steps)
        if self._by_tokens:
            line |= self._by_task("effective_share", self._token_shares(steps))
        logs: dict[str, list[np.ndarray]] = {}
        for values in steps:
            # Between two solutions of such a method there is nothing to tell.
            if self._solves and not values.get("gradients_seen", False):
                continue
            for name, value in values.items():
                if name.startswith("balance/"):
                    logs.setdefault(name.removeprefix("balance/"), []).append(np.asarray(value))
        for name, found in logs.items():
            mean = np.mean(found, axis=0)
            if mean.ndim == 0:
                line[name] = float(mean)
            else:
                line |= self._by_task(name, mean)
        looked = [values for values in steps if values.get("gradients_seen", False)]
        if looked:
            line |= self._gradients(number, looked)
        return line

    def _weights(self, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        weights_SN = np.array(
            [values["balance_weight"].mean(axis=0) for values in steps], np.float64
        )
        present_SN = np.array([values["balance_present"] for values in steps])
        total_S1 = np.abs(weights_SN).sum(axis=1, keepdims=True)
        shares_SN = weights_SN / np.where(total_S1 > 0, total_S1, 1.0)
        mean = _mean(weights_SN, present_SN)
        return self._by_task("weight", mean) | self._by_task("effective_share", shares_SN.mean(0))

    def _token_shares(self, steps: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Mean over steps of each task's share of the target tokens, [N]; NaN: it has none."""
        tokens_SN = np.array([self._per_task(values["task_tokens"]) for values in steps])
        total_S1 = tokens_SN.sum(axis=1, keepdims=True)
        shares_N = (tokens_SN / np.maximum(total_S1, 1.0)).mean(axis=0)
        return np.where(shares_N > 0, shares_N, np.nan)

    def _per_task(self, of_ids: np.ndarray) -> np.ndarray:
        """Sums by the id of a SeqIO task -> by what counts as a task, [N]."""
        return np.bincount(self._of_task, of_ids, len(self._names) + 1)[1:]

    def _gradients(self, number: int, looked: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        gram_SKNN = np.array([values["gram"] for values in looked], np.float64)
        halves_SKN = np.array([values["split_half_cosine"] for values in looked], np.float64)
        norms_SKN = np.sqrt(np.maximum(np.diagonal(gram_SKNN, axis1=2, axis2=3), 0.0))
        products = norms_SKN[..., :, None] * norms_SKN[..., None, :]
        both = products > 0
        cosines = np.where(both, gram_SKNN / np.where(both, products, 1.0), np.nan)
        row = {
            "step": number,
            "tasks": self._names,
            "groups": self._groups,
            "steps": len(looked),
            "gram": _plain(_mean(gram_SKNN, both)),
            "cosine": _plain(_mean(cosines, both)),
            "noise": _plain(_mean(halves_SKN, np.isfinite(halves_SKN))),
            "loss": _plain(self._losses(looked)),
        }
        ahead_SNN = np.array([v["affinity"] for v in looked if "affinity" in v], np.float64)
        known_SNN = np.isfinite(ahead_SNN)
        if known_SNN.any():
            row["lookaheads"] = int(known_SNN.any(axis=(1, 2)).sum())
            row["affinity"] = _plain(_mean(ahead_SNN, known_SNN))
        if self._primary:
            with storage_errors("write gradients.jsonl", self._path.parent):
                append_text(self._path, json.dumps(row, ensure_ascii=False) + "\n")
        whole_SNN = gram_SKNN.sum(axis=1)
        diagonal_SN = np.diagonal(whole_SNN, axis1=1, axis2=2)
        pairs_SNN = (diagonal_SN[:, :, None] > 0) & (diagonal_SN[:, None, :] > 0)
        pairs_SNN &= np.triu(np.ones(pairs_SNN.shape[1:], bool), 1)
        line = self._by_task("gradient_norm", _mean(np.sqrt(diagonal_SN), diagonal_SN > 0))
        if pairs_SNN.any():
            line["conflict_rate"] = float(np.mean(whole_SNN[pairs_SNN] < 0))
        return line

    def _losses(self, looked: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Mean over steps of each task's mean loss over its tokens, [N]."""
        losses, tokens = (
            np.array([self._per_task(values[name]) for values in looked])
            for name in ("task_loss_sum", "task_tokens")
        )
        return _mean(losses / np.maximum(tokens, 1.0), tokens > 0)

    def _by_task(self, metric: str, values_N: np.ndarray) -> dict[str, float]:
        pairs = zip(self._names, values_N, strict=True)
        return {report.task_metric(metric, n): float(v) for n, v in pairs if np.isfinite(v)}


def _mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is known; NaN where nothing is."""
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _plain(values: np.ndarray) -> Any:
    """Nested lists for JSON, null for NaN."""
    if values.ndim:
        return [_plain(part) for part in values]
    return float(f"{values:.5g}") if np.isfinite(values) else None

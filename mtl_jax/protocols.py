"""Scoring protocols: how an answer is read off what the model said, as presets.

The literature scores the same model in different ways, and the numbers differ. A `Protocol` names
the passes over the model that it needs (`PASSES`) and turns what they give into a value for each
answer choice: arithmetic over stored numbers, so any number of protocols costs one set of passes.
docs/protocols.md compares every preset with the code that it restates.

Everything is float64 in NumPy. C stands for the answer choices of one example.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mtl_jax import metrics
from mtl_jax.errors import UserError, suggest

__all__ = ["PASSES", "PROTOCOLS", "ChoiceScores", "PassForm", "Protocol", "get"]

MetricFn = Callable[..., Mapping[str, Any]]
Kind = Literal["rank", "generate"]
Length = Literal["none", "tokens", "characters", "bytes"]


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """What a ranking pass says about the choices of one example.

    Attributes:
      sums: float [C], log-probability of the choice's own tokens, the end of sequence left out.
      eos: float [C], log-probability of the end of sequence after them.
      n_tokens: int [C], how many tokens the choice has, the end of sequence left out.
    """

    sums: np.ndarray
    eos: np.ndarray
    n_tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class PassForm:
    """One way of asking the model.

    Attributes:
      kind: "rank" scores the choices, "generate" continues greedily.
      eos: whether the input ends with the end of sequence; None: as the task's features say.
      truncate: the end at which an input that is too long is cut.
      null: the input is empty: the end of sequence alone. So nothing depends on the example but
        its choices.
      max_decode_length: tokens to generate at most, whatever `Eval.max_decode_length` says; None:
        as it says.
    """

    kind: Kind
    eos: bool | None = None
    truncate: Literal["right", "left"] = "right"
    null: bool = False
    max_decode_length: int | None = None


PASSES: Mapping[str, PassForm] = {
    "rank": PassForm("rank"),
    "rank_eos": PassForm("rank", eos=True),
    "rank_eos_left": PassForm("rank", eos=True, truncate="left"),
    "rank_null": PassForm("rank", eos=True, null=True),
    "generate": PassForm("generate"),
    "generate_eos": PassForm("generate", eos=True),
    # Hugging Face's max_length of 128 counts the token that starts the decoder.
    "generate_eos_127": PassForm("generate", eos=True, max_decode_length=127),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How tasks are answered and what is reported of them.

    Attributes:
      name: of the preset.
      summary: one line about it.
      ranked: passes for tasks with answer choices; empty: the protocol leaves them out. With the
        null pass it is the second one.
      unranked: passes for tasks without answer choices; empty: the protocol leaves them out.
      counts_eos: whether the end of sequence is part of a choice.
      divide_by: the length of a choice by which its log-probability is divided. "tokens" counts
        the end of sequence where `counts_eos`; "characters" and "bytes" (UTF-8) are of the text.
      fixed_metrics: reported in place of the task's own; empty: the task's own.
    """

    name: str
    summary: str
    ranked: tuple[str, ...] = ()
    unranked: tuple[str, ...] = ()
    counts_eos: bool = True
    divide_by: Length = "none"
    fixed_metrics: tuple[MetricFn, ...] = ()

    @property
    def mode(self) -> Literal["rank", "generate", "both"]:
        """What it does with the tasks that it takes."""
        kinds = {PASSES[name].kind for name in (*self.ranked, *self.unranked)}
        if len(kinds) == 2:
            return "both"
        return "rank" if kinds == {"rank"} else "generate"

    @property
    def max_decode_length(self) -> int | None:
        """Tokens to generate at most; None: `Eval.max_decode_length` (or nothing is generated)."""
        lengths = [PASSES[name].max_decode_length for name in (*self.ranked, *self.unranked)]
        return next((length for length in lengths if length is not None), None)

    def passes_for(self, ranked: bool) -> tuple[str, ...]:
        """Names of the passes that a task needs; empty: the protocol does not apply to it.

        Args:
          ranked: whether the task has answer choices.
        """
        return self.ranked if ranked else self.unranked

    def ranks(self, ranked: bool) -> bool:
        """Whether the answer to such a task is the choice of largest value, or else generated."""
        return any(PASSES[name].kind == "rank" for name in self.passes_for(ranked))

    def values(self, passes: Mapping[str, ChoiceScores], choices: Sequence[str]) -> np.ndarray:
        """What the choices of an example are worth; the answer is the first of largest value.

        Args:
          passes: the scores in each pass of `passes_for(True)`.
          choices: the texts of the C choices.

        Returns:
          float64 [C], larger is better: nats, or nats per token, character or byte.

        Raises:
          UserError: a choice is empty where there is nothing to score or to divide by.
        """
        if not self.ranks(True):
            raise TypeError(f"Protocol {self.name!r} does not rank choices.")
        conditional, *null = [self._log_probabilities(passes[name]) for name in self.ranked]
        self._check(passes[self.ranked[0]], choices)
        value_C = conditional - null[0] if null else conditional
        return value_C / self._lengths(passes[self.ranked[0]], choices)

    def metric_fns(self, own: Sequence[MetricFn], ranked: bool) -> tuple[MetricFn, ...]:
        """The metrics to report: SeqIO's `fn(targets, predictions) -> {name: value}`.

        Args:
          own: the metrics of the task.
          ranked: whether the task has answer choices.

        Returns:
          `fixed_metrics` if there are any. Else the task's own, and where the answer is chosen also
          accuracy, last, if it is not among them.
        """
        if self.fixed_metrics:
            return self.fixed_metrics
        names = [getattr(fn, "__name__", "") for fn in own]
        if self.ranks(ranked) and metrics.accuracy.__name__ not in names:
            return (*own, metrics.accuracy)
        return tuple(own)

    def compared(
        self,
        targets: Sequence[Any],
        predictions: Sequence[Any],
        target_texts: Sequence[str],
        predicted_texts: Sequence[str],
    ) -> tuple[list[Any], list[Any]]:
        """What the metrics of `metric_fns` compare.

        Args:
          targets: what the task's postprocessor made of the right answers.
          predictions: what it made of the answers.
          target_texts: the right answers as they are.
          predicted_texts: the answers as they are.

        Returns:
          Targets and predictions. `fixed_metrics` are of texts, whatever the task's own metrics
          compare (numbers, groups): they get the texts as they are, and of the postprocessor only
          a list of several right texts.
        """
        if not self.fixed_metrics:
            return list(targets), list(predictions)

        def texts(target: Any, text: str) -> Any:
            several = isinstance(target, list | tuple) and all(isinstance(t, str) for t in target)
            return list(target) if several else text

        right = [texts(*pair) for pair in zip(targets, target_texts, strict=True)]
        return right, list(predicted_texts)

    def _log_probabilities(self, scores: ChoiceScores) -> np.ndarray:
        sums_C = np.asarray(scores.sums, np.float64)
        return sums_C + np.asarray(scores.eos, np.float64) if self.counts_eos else sums_C

    def _lengths(self, scores: ChoiceScores, choices: Sequence[str]) -> np.ndarray:
        if self.divide_by == "tokens":
            return np.asarray(scores.n_tokens, np.float64) + self.counts_eos
        if self.divide_by == "characters":
            return np.array([len(choice) for choice in choices], np.float64)
        if self.divide_by == "bytes":
            return np.array([len(choice.encode("utf-8")) for choice in choices], np.float64)
        return np.ones(len(choices))

    def _check(self, scores: ChoiceScores, choices: Sequence[str]) -> None:
        """An empty choice would win by having nothing that could be improbable."""
        by_text = self.divide_by in ("characters", "bytes")
        for c, (choice, tokens) in enumerate(zip(choices, scores.n_tokens, strict=True)):
            if (by_text and not choice) or (not self.counts_eos and tokens == 0):
                raise UserError(
                    f"Protocol {self.name!r} cannot rank answer choice {c + 1} of "
                    f"{list(choices)!r}: it is empty. Give it a text, or leave the protocol out "
                    "of Sweep.protocols ('t0' and 'mean_token' rank empty choices by their EOS)."
                )


_ALL = (
    Protocol(
        "t0",
        "T0's rank classification: summed log-probability, EOS included, no normalisation",
        ranked=("rank",),
    ),
    Protocol(
        "mean_token",
        "as t0, divided by the number of tokens, EOS included",
        ranked=("rank",),
        divide_by="tokens",
    ),
    Protocol(
        "mean_byte",
        "as t0, divided by the choice's length in bytes of UTF-8",
        ranked=("rank",),
        divide_by="bytes",
    ),
    Protocol(
        "pmi",
        "as t0, minus the same for an empty input: pointwise mutual information",
        ranked=("rank", "rank_null"),
    ),
    Protocol(
        "lm_eval",
        "lm-evaluation-harness' acc: input with EOS cut on the left, summed without EOS",
        ranked=("rank_eos_left",),
        counts_eos=False,
    ),
    Protocol(
        "lm_eval_norm",
        "lm-evaluation-harness' acc_norm: as lm_eval, per character of the choice",
        ranked=("rank_eos_left",),
        counts_eos=False,
        divide_by="characters",
    ),
    Protocol(
        "lm_eval_bytes",
        "lm-evaluation-harness' acc_bytes: as lm_eval, per byte of the choice",
        ranked=("rank_eos_left",),
        counts_eos=False,
        divide_by="bytes",
    ),
    Protocol(
        "lm_eval_pmi",
        "lm-evaluation-harness' acc_mutual_info: as lm_eval, minus the same for an empty input",
        ranked=("rank_eos_left", "rank_null"),
        counts_eos=False,
    ),
    Protocol(
        "metaicl",
        "MetaICL's direct method: mean log-probability of the choice's tokens, without EOS",
        ranked=("rank",),
        counts_eos=False,
        divide_by="tokens",
    ),
    Protocol(
        "flan",
        "FLAN: input with EOS; choices by summed log-probability with EOS, or greedy text",
        ranked=("rank_eos",),
        unranked=("generate_eos",),
    ),
    Protocol(
        "tk_instruct",
        "Tk-Instruct: always greedy text; exact match and ROUGE-L as Super-NaturalInstructions",
        ranked=("generate_eos_127",),
        unranked=("generate_eos_127",),
        fixed_metrics=(metrics.exact_match_sni, metrics.rougeL_stemmed),
    ),
    Protocol(
        "generate",
        "greedy text for tasks without choices, measured by their own metrics",
        unranked=("generate",),
    ),
)
PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def get(name: str) -> Protocol:
    """The preset of a name.

    Raises:
      UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(
            f"Unknown protocol {name!r}.{suggest(name, PROTOCOLS)} Known: {', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[name]

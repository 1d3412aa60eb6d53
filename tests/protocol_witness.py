"""Answers under each scoring protocol by another road: PyTorch, from the texts, choice by choice.

Nothing here is ours: the model is Hugging Face's, the tokens are SentencePiece's, each choice is
one call of the model with the input encoded anew, no batch, no padding, no cached keys. The
protocols are written as the code that they come from states them (docs/protocols.md), not as
`Protocol` does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

EOS = 1


class Witness:
    """Scores choices and generates texts with one model."""

    def __init__(self, hf_model: Any, vocabulary: Path, inputs_length: int, inputs_eos: bool):
        """Sets up a witness.

        Args:
          hf_model: a T5ForConditionalGeneration in evaluation mode.
          vocabulary: a SentencePiece model, T5's.
          inputs_length: tokens of an input at most.
          inputs_eos: whether the task's inputs end with EOS, where the protocol does not say.
        """
        self._model, self._length, self._inputs_eos = hf_model, inputs_length, inputs_eos
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}

    def values(self, protocol: str, text: str, choices: Sequence[str]) -> list[float]:
        """What the choices are worth; the first of largest value is the answer."""
        return [_VALUES[protocol](self, text, choice) for choice in choices]

    def chosen(self, protocol: str, text: str, choices: Sequence[str]) -> int:
        """The position of the answer."""
        return int(np.argmax(self.values(protocol, text, choices)))

    def generate(self, protocol: str, text: str, max_new_tokens: int) -> list[int]:
        """The tokens of the greedy answer, up to EOS.

        Args:
          protocol: "generate", "flan" or "tk_instruct".
          text: the input.
          max_new_tokens: not for "tk_instruct", which has a limit of its own.
        """
        tokens = self.tokens(text, self._inputs_eos if protocol == "generate" else True)
        limit = {"max_new_tokens": max_new_tokens}
        if protocol == "tk_instruct":
            # scripts/eval_tk_instruct.sh: --generation_max_length 128, given as max_length.
            limit = {"max_length": 128}
        with torch.no_grad():
            found = self._model.generate(
                input_ids=torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                num_beams=1,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=0,
                decoder_start_token_id=0,
                **limit,
            )[0].tolist()[1:]
        return found[: found.index(EOS)] if EOS in found else found

    def pieces(self, text: str) -> list[int]:
        """SentencePiece's tokens of a text."""
        return self._pieces.encode(text)

    def tokens(self, text: str, eos: bool) -> list[int]:
        """An input cut on the right, as Hugging Face's tokenizers do, so that EOS stays."""
        if eos:
            return [*self.pieces(text)[: self._length - 1], EOS]
        return self.pieces(text)[: self._length]

    def log_probabilities(self, inputs: Sequence[int], labels: Sequence[int]) -> np.ndarray:
        """Float64 [T] of the labels, each given the input and the labels before it."""
        asked = (tuple(inputs), tuple(labels))
        if asked not in self._known:
            with torch.no_grad():
                logits = self._model(
                    input_ids=torch.tensor([inputs]),
                    decoder_input_ids=torch.tensor([[0, *labels[:-1]]]),
                ).logits[0]
            log_probability = torch.log_softmax(logits.double(), dim=-1)
            chosen = log_probability[torch.arange(len(labels)), torch.tensor(labels)]
            self._known[asked] = chosen.numpy()
        return self._known[asked]

    def sum_with_eos(self, inputs: Sequence[int], choice: str) -> float:
        """Of the choice and the EOS after it."""
        return float(self.log_probabilities(inputs, [*self.pieces(choice), EOS]).sum())

    def t0(self, text: str, choice: str) -> float:
        """t0/model.py: masked log_softmax of labels with EOS, summed."""
        return self.sum_with_eos(self.tokens(text, self._inputs_eos), choice)

    def mean_token(self, text: str, choice: str) -> float:
        """The same, divided by the length of the labels."""
        return self.t0(text, choice) / len([*self.pieces(choice), EOS])

    def mean_byte(self, text: str, choice: str) -> float:
        """The same, divided by the length of the encoded text."""
        return self.t0(text, choice) / len(choice.encode())

    def pmi(self, text: str, choice: str) -> float:
        """log p(choice | text) - log p(choice), the latter given EOS alone."""
        return self.t0(text, choice) - self.sum_with_eos([EOS], choice)

    def _lm_eval_of(self, context: str, continuation: str) -> float:
        """loglikelihood, _encode_pair and _loglikelihood_tokens of the seq2seq backend."""
        if context == "":
            inputs = [EOS]
        else:
            spaces = len(context) - len(context.rstrip())
            if spaces:
                continuation = context[-spaces:] + continuation
                context = context[:-spaces]
            inputs = [*self.pieces(context), EOS][-self._length :]
        return float(self.log_probabilities(inputs, self.pieces(continuation)).sum())

    def lm_eval(self, text: str, choice: str) -> float:
        """Acc, with the default target_delimiter of one space."""
        return self._lm_eval_of(text, f" {choice}")

    def lm_eval_norm(self, text: str, choice: str) -> float:
        """acc_norm: len(choice), the delimiter not counted."""
        return self.lm_eval(text, choice) / float(len(choice))

    def lm_eval_bytes(self, text: str, choice: str) -> float:
        """acc_bytes."""
        return self.lm_eval(text, choice) / float(len(choice.encode("utf-8")))

    def lm_eval_pmi(self, text: str, choice: str) -> float:
        """acc_mutual_info: an empty context in the second request."""
        return self.lm_eval(text, choice) - self._lm_eval_of("", f" {choice}")

    def metaicl(self, text: str, choice: str) -> float:
        """run_model: cross-entropy summed over label tokens / their number; the least wins."""
        inputs = self.tokens(text, self._inputs_eos)
        losses = -self.log_probabilities(inputs, self.pieces(choice))
        return -float(losses.sum() / len(losses))

    def flan(self, text: str, choice: str) -> float:
        """seqio score_batch and t5's rank_classification: both features with EOS, summed."""
        return self.sum_with_eos(self.tokens(text, True), choice)


_VALUES: dict[str, Callable[[Witness, str, str], float]] = {
    "t0": Witness.t0,
    "mean_token": Witness.mean_token,
    "mean_byte": Witness.mean_byte,
    "pmi": Witness.pmi,
    "lm_eval": Witness.lm_eval,
    "lm_eval_norm": Witness.lm_eval_norm,
    "lm_eval_bytes": Witness.lm_eval_bytes,
    "lm_eval_pmi": Witness.lm_eval_pmi,
    "metaicl": Witness.metaicl,
    "flan": Witness.flan,
}
RANKING = tuple(_VALUES)


def assert_agrees(
    witness: Witness,
    protocol: str,
    examples: Sequence[tuple[str, Sequence[str]]],
    values: Sequence[Sequence[float]],
    tolerance: float,
) -> None:
    """Fails unless the witness gives the same values, and so the same answers.

    Args:
      witness: computes them anew.
      protocol: a name of `RANKING`.
      examples: input text and choices of each.
      values: what is to be checked, for each example the values of its choices.
      tolerance: of a value.
    """
    assert len(examples) == len(values)
    for (text, choices), found in zip(examples, values, strict=True):
        expected = witness.values(protocol, text, choices)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=protocol)
        assert int(np.argmax(found)) == witness.chosen(protocol, text, choices), (protocol, text)

"""Prompted tasks in memory, for sweeps: two ranked data sets, one of them ragged, and a generated.

`SWEEP_TASKS_PROMPTS` says how many prompts each data set has (3 by default).
"""

import os

import seqio

from mtl_jax import metrics
from mtl_jax.sources import RowsDataSource
from mtl_jax.task_info import describe

PROMPTS = int(os.environ.get("SWEEP_TASKS_PROMPTS", "3"))
WORDS = ("ab", "ba", "cab", "abc", "bb", "ca", "acb", "bc", "aab", "cc", "bcab")
FEATURES = {
    "inputs": seqio.Feature(seqio.ByteVocabulary(extra_ids=0), add_eos=False),
    "targets": seqio.Feature(seqio.ByteVocabulary(extra_ids=0), add_eos=True),
}


def nli(word):
    return "yes" if word[0] == "a" else "no", "yes ||| no"


def ragged(word):
    """As many choices as the word has letters, of several lengths."""
    choices = [letter * (i + 1) for i, letter in enumerate(word)]
    return choices[-1], " ||| ".join(choices)


def last(word):
    return word[-1], ""


class Prompted(RowsDataSource):
    """A rule under one wording."""

    def __init__(self, rule, prompt):
        super().__init__(("train", "validation"))
        self._rule, self._prompt = rule, prompt

    def rows(self, split):
        words = WORDS if split == "validation" else [w[::-1] + "x" for w in WORDS]
        rows = []
        for word in words:
            targets, choices = self._rule(word)
            text = "so " * self._prompt + word
            rows.append({"inputs": text, "targets": targets, "answer_choices": choices})
        return rows


RULES = {
    "nli": (nli, [metrics.accuracy]),
    "ragged": (ragged, [metrics.accuracy]),
    "last": (last, [metrics.exact_match, metrics.rouge]),
}
for dataset, (rule, metric_fns) in RULES.items():
    for number in range(PROMPTS):
        name = f"{dataset}_p{number}"
        seqio.TaskRegistry.add(
            name,
            source=Prompted(rule, number),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=FEATURES,
            metric_fns=metric_fns,
        )
        describe(
            name,
            dataset=dataset,
            prompt=f"P {number}",
            family="toy",
            trained=False,
            original=number != 1,
        )

"""Three tasks in memory, for tests: `Data.task_modules = ('tiny_tasks',)`."""

import seqio

from mtl_jax.sources import RowsDataSource
from mtl_jax.task_info import describe

WORDS = ("ab", "ba", "cab", "abc", "bb", "ca", "acb", "bc")


class Pairs(RowsDataSource):
    """Inputs and targets made by a rule."""

    def __init__(self, rule, choices=""):
        super().__init__(("train", "validation", "empty"))
        self._rule, self._choices = rule, choices

    def rows(self, split):
        count = {"train": 24, "validation": 5, "empty": 0}[split]
        texts = [WORDS[i % 8] + WORDS[i // 8] for i in range(count)]
        return [
            {"inputs": text, "targets": self._rule(text), "answer_choices": self._choices}
            for text in texts
        ]


def exact_match(targets, predictions):
    return {"exact_match": 100.0 * sum(map(str.__eq__, targets, predictions)) / len(targets)}


def accuracy(targets, predictions):
    return {"accuracy": exact_match(targets, predictions)["exact_match"]}


FEATURES = {
    "inputs": seqio.Feature(seqio.ByteVocabulary(extra_ids=0), add_eos=True),
    "targets": seqio.Feature(seqio.ByteVocabulary(extra_ids=0), add_eos=True),
}
RULES = {
    "tiny_copy": (lambda text: text[:2], "", exact_match),
    "tiny_reverse": (lambda text: text[:2][::-1], "", exact_match),
    "tiny_first": (lambda text: "yes" if text[0] == "a" else "no", "yes ||| no", accuracy),
}
for name, (rule, choices, metric) in RULES.items():
    seqio.TaskRegistry.add(
        name,
        source=Pairs(rule, choices),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=FEATURES,
        metric_fns=[metric],
    )
    describe(name, dataset=name.removeprefix("tiny_"))
seqio.MixtureRegistry.add("tiny", [("tiny_copy", 1.0), ("tiny_reverse", 2.0), ("tiny_first", 1.0)])

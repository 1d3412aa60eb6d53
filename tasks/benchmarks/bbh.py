"""BIG-Bench Hard (Suzgun et al. 2023): 27 tasks, each a data set of its own.

Where the input ends with options, or all rows share a few answers, the answers are ranked; else the
answer is written and compared exactly.
"""

import re
from collections.abc import Callable, Sequence

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Row, Shipped

_CITATION = "Suzgun et al. 2023, Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve"
_LETTER = re.compile(r"^\(([A-Z])\) ?(.*)$", re.MULTILINE)

_LETTERED = {
    "date_understanding": 250,
    "disambiguation_qa": 250,
    "geometric_shapes": 250,
    "hyperbaton": 250,
    "logical_deduction_five_objects": 250,
    "logical_deduction_seven_objects": 250,
    "logical_deduction_three_objects": 250,
    "movie_recommendation": 250,
    "penguins_in_a_table": 146,
    "reasoning_about_colored_objects": 250,
    "ruin_names": 250,
    "salient_translation_error_detection": 250,
    "snarks": 178,
    "temporal_sequences": 250,
    "tracking_shuffled_objects_five_objects": 250,
    "tracking_shuffled_objects_seven_objects": 250,
    "tracking_shuffled_objects_three_objects": 250,
}
_WORDS = {
    "boolean_expressions": (250, ("True", "False")),
    "causal_judgement": (187, ("Yes", "No")),
    "formal_fallacies": (250, ("valid", "invalid")),
    "navigate": (250, ("Yes", "No")),
    "sports_understanding": (250, ("yes", "no")),
    "web_of_lies": (250, ("Yes", "No")),
}
_FREE = {
    "dyck_languages": 250,
    "multistep_arithmetic_two": 250,
    "object_counting": 250,
    "word_sorting": 250,
}


def _question(text: str) -> str:
    return text.partition("\nOptions:")[0].strip()


def with_options(row: Row) -> Row:
    """Adds `question`, `letters`, `options` and `right`, the number of the right option.

    In a few published rows of ruin_names and movie_recommendation the commas of a name have been
    taken for ends of options, and the target is that name. `right` is None there: our own prompts
    leave these rows out, the published form keeps them, and no choice is right.
    """
    found = _LETTER.findall(row["input"])
    letters = [letter for letter, _ in found]
    target = row["target"].strip().strip("()")
    return {
        **row,
        "question": _question(row["input"]),
        "letters": letters,
        "options": [option.strip() for _, option in found],
        "right": letters.index(target) if target in letters else None,
    }


def _with_words(words: Sequence[str]) -> Callable[[Row], Row]:
    def prepare(row: Row) -> Row:
        return {**row, "question": _question(row["input"]), "words": list(words)}

    return prepare


def _dataset(
    name: str, rows: int, prompts: str, prepare: Callable[[Row], Row] | None = None
) -> Dataset:
    return Dataset(
        f"bbh_{name}",
        "bbh",
        Origin(
            f"bbh_{name}",
            {"input": str, "target": str},
            {"test": rows},
            shipped=Shipped(f"bbh/{name}"),
            huggingface=HuggingFace("lukaemon/bbh", name),
        ),
        family="bbh",
        metric_fns=(metrics.accuracy if prepare else metrics.exact_match,),
        prompts=prompts,
        trained=False,
        prepare=prepare,
        license="MIT",
        citation=_CITATION,
    )


DATASETS = (
    *(_dataset(name, rows, "bbh_letters", with_options) for name, rows in _LETTERED.items()),
    *(
        _dataset(name, rows, "bbh_words", _with_words(words))
        for name, (rows, words) in _WORDS.items()
    ),
    *(_dataset(name, rows, "bbh_free") for name, rows in _FREE.items()),
)

"""Chain of thought: the seven training sets of Flan 2022, where the answer comes after its reasons.

Importing this module reads `cot/*.jsonl.gz` of the data folder once and registers a task
`cot_<set>` for each, such as `cot_gsm8k`, and the mixture `cot_train` in proportion to their rows.
Targets are as in Flan: the rationale, then "So the answer is ...". Metrics compare what follows
these words.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from mtl_jax import metrics
from mtl_jax.errors import UserError
from mtl_jax.tasks.data_folder import data_file, read_json_lines
from mtl_jax.tasks.prompted import add_prompted_tasks
from mtl_jax.tasks.prompts import Template
from mtl_jax.tasks.t5_vocabulary import t5_vocabulary

MIXTURE = "cot_train"
FAMILIES = {
    "aqua": "arithmetic",
    "creak": "fact_checking",
    "ecqa": "qa_multiple_choice",
    "gsm8k": "arithmetic",
    "qasc": "qa_multiple_choice",
    "sensemaking": "commonsense",
    "strategyqa": "qa_yes_no",
}

_FIELDS = ("input", "answer", "rationale")
_TEMPLATE = Template(
    "reasons_then_answer",
    "{{input}}\n\nReason step by step, then give the answer. ||| "
    "{{rationale}} So the answer is {{answer}}.",
)
_ANSWER = re.compile(r".*\bthe answer is\b[:\s]*(.*)", re.IGNORECASE | re.DOTALL)
_CITATION = "Longpre et al. 2023, The Flan Collection; Chung et al. 2022"

Row = Mapping[str, Any]


def read_sets() -> dict[str, list[Row]]:
    """The rows (`input`, `rationale`, `answer`) of each set, in the order of the files.

    Raises:
        UserError: no data folder, nothing in it, or a malformed line.
    """
    folder = data_file("cot")
    found = {
        path.name.removesuffix(".jsonl.gz"): list(read_json_lines(path, _FIELDS))
        for path in sorted(folder.glob("*.jsonl.gz"))
    }
    if not found:
        raise UserError(f"{folder} holds no rows in *.jsonl.gz files.")
    return found


def final_answer(text: str, **of_example: Any) -> str:
    """What follows the last "the answer is", without the full stop; without these words: nothing.

    Takes the arguments of a SeqIO postprocessor.
    """
    del of_example
    found = _ANSWER.fullmatch(text.strip())
    return found[1].strip().removesuffix(".") if found else ""


def _rows_of(rows: Sequence[Row], split: str) -> Sequence[Row]:
    del split  # there is only one
    return rows


def register() -> list[str]:
    """Registers the tasks and the mixture; returns the tasks' names."""
    feature = seqio.Feature(t5_vocabulary(), add_eos=True)
    rates = []
    for name, rows in read_sets().items():
        (task,) = add_prompted_tasks(
            name,
            functools.partial(_rows_of, rows),
            [_TEMPLATE],
            {"inputs": feature, "targets": feature},
            {"train": len(rows)},
            [metrics.exact_match],
            family=FAMILIES.get(name, ""),
            name_format="cot_{dataset}",
            citation=_CITATION,
            postprocess=final_answer,
        )
        rates.append((task, float(len(rows))))
    seqio.MixtureRegistry.add(MIXTURE, rates)
    return [task for task, _ in rates]


register()

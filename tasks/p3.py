"""T0's training prompts, already rendered (P3): one SeqIO Task per prompt, mixture `p3_t0_train`.

Importing this module reads `p3_t0_train/*.jsonl.gz` of the data folder once and registers a task
`p3_<T0's name>`, such as `p3_glue_mrpc_equivalent`, for each prompt found there.
"""

import csv
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import seqio

from mtl_jax import metrics
from mtl_jax.errors import UserError
from mtl_jax.tasks.data_folder import data_file, read_json_lines
from mtl_jax.tasks.prompted import add_prompted_tasks
from mtl_jax.tasks.prompts import Template
from mtl_jax.tasks.t5_vocabulary import t0_features

MIXTURE = "p3_t0_train"
# T0 counts no dataset for more than this: a larger one shares it among its prompts.
LARGEST_DATASET = 500_000

_FIELDS = ("dataset", "task", "template", "input", "target")
_FAMILY = {"commonsense_qa": "qa_multiple_choice"}  # not in T0's list, which has its twin cos_e
_RENDERED = "{{input}} ||| {{target}}"
_CITATION = "Sanh et al. 2022, Multitask Prompted Training Enables Zero-Shot Task Generalization"

Prompt = tuple[str, str, str]  # dataset, template, task


def read_prompts() -> dict[Prompt, list[Mapping[str, str]]]:
    """The rows (`input`, `target`) of each prompt, in the order of the files.

    Raises:
        UserError: no data folder, nothing in it, or a malformed line.
    """
    folder = data_file("p3_t0_train")
    prompts: dict[Prompt, list[Mapping[str, str]]] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        for row in read_json_lines(path, _FIELDS):
            prompt = (row["dataset"], row["template"], row["task"])
            example = {"input": row["input"], "target": row["target"]}
            prompts.setdefault(prompt, []).append(example)
    if not prompts:
        raise UserError(f"{folder} holds no rows in *.jsonl.gz files.")
    return prompts


def families() -> dict[str, str]:
    """The kind of task of each dataset, from T0's own list (`promptsource/t0_datasets.csv`)."""
    found = dict(_FAMILY)
    with data_file("promptsource", "t0_datasets.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = "_".join(filter(None, (row["HF_name"], row["subset"])))
            found[re.sub(r"\W", "_", name)] = row["task_by_convention"].lower()
    return found


def t0_rate(rows: int, prompts: int) -> int:
    """Rate of one prompt of a dataset: its rows, but large datasets share 500,000 (T0)."""
    return rows if rows <= LARGEST_DATASET else LARGEST_DATASET // prompts


def _rows_of(rows: Sequence[Mapping[str, str]], split: str) -> Sequence[Mapping[str, str]]:
    del split  # there is only one
    return rows


def register() -> list[str]:
    """Registers the tasks and the mixture; returns the tasks' names."""
    prompts, family, features = read_prompts(), families(), t0_features()
    prompts_of_dataset = Counter(dataset for dataset, _, _ in prompts)
    rates = []
    for (dataset, template, task), rows in prompts.items():
        names = add_prompted_tasks(
            dataset,
            functools.partial(_rows_of, rows),
            [Template(template, _RENDERED)],
            features,
            {"train": len(rows)},
            [metrics.exact_match, metrics.rougeL],
            family=family.get(dataset, ""),
            name_format=f"p3_{task}",
            citation=_CITATION,
        )
        rates.append((names[0], float(t0_rate(len(rows), prompts_of_dataset[dataset]))))
    seqio.MixtureRegistry.add(MIXTURE, rates)
    return [name for name, _ in rates]


register()

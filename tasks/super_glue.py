"""T0's zero-shot evaluation on CB, RTE, COPA and WiC: mixture `super_glue_t0_eval`.

One task for each of T0's evaluation prompts over the complete validation set, such as
`super_glue_cb_can_we_infer`. Four prompts of COPA apply to one kind of question only and render
empty for the other rows: those rows are left out (`prompted.skipped_rows` counts them). There is
also a split train, up to 2,000 rows, for the exemplars of `few_shot_task`: T0 never trains on it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from mtl_jax import metrics
from mtl_jax.tasks.data_folder import data_file, read_json_lines
from mtl_jax.tasks.prompted import add_prompted_tasks
from mtl_jax.tasks.prompts import load_templates
from mtl_jax.tasks.t5_vocabulary import t0_features

MIXTURE = "super_glue_t0_eval"
FAMILIES = {
    "cb": "nli",
    "rte": "nli",
    "copa": "sentence_completion",
    "wic": "word_sense_disambiguation",
}

_CITATION = "Wang et al. 2019, SuperGLUE; prompts of Sanh et al. 2022"

Rows = Sequence[Mapping[str, Any]]


def read_rows(subset: str) -> dict[str, Rows]:
    """The rows of the complete validation set and of a part of the training set.

    Raises:
        UserError: the data folder or a file is missing, or a line is malformed.
    """
    rows: dict[str, Rows] = {}
    for split in ("train", "validation"):
        path = data_file("glue_superglue", f"super_glue.{subset}", f"{split}.jsonl.gz")
        rows[split] = list(read_json_lines(path, ("idx", "label")))
    return rows


def t0_prompts() -> dict[str, list[str]]:
    """T0's evaluation prompts by subset of SuperGLUE."""
    text = data_file("promptsource", "t0_eval_prompts.json").read_text(encoding="utf-8")
    return {
        entry["subset"]: entry["prompts"]
        for entry in json.loads(text)
        if entry["dataset"] == "super_glue"
    }


def _rows_of(rows: Mapping[str, Rows], split: str) -> Rows:
    return rows[split]


def register() -> list[str]:
    """Registers the tasks and the mixture; returns the tasks' names."""
    prompts, features = t0_prompts(), t0_features()
    names: list[str] = []
    for subset, family in FAMILIES.items():
        rows = read_rows(subset)
        names += add_prompted_tasks(
            f"super_glue_{subset}",
            functools.partial(_rows_of, rows),
            load_templates(
                data_file("promptsource", "templates.jsonl.gz"),
                "super_glue",
                subset,
                prompts[subset],
            ),
            features,
            {split: len(of_split) for split, of_split in rows.items()},
            [metrics.accuracy],
            family=family,
            trained=False,
            citation=_CITATION,
        )
    seqio.MixtureRegistry.add(MIXTURE, names, default_rate=1.0)
    return names


register()

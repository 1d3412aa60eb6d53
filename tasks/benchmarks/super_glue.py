"""SuperGLUE (Wang et al. 2019), with prompts of our own.

`mtl_jax.tasks.super_glue` has T0's prompts for CB, RTE, COPA and WiC.
"""

from collections.abc import Mapping
from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Row, Shipped, Tfds

_SUPER_GLUE = "Wang et al. 2019, SuperGLUE: A Stickier Benchmark"


def _origin(config: str, splits: dict[str, int], fields: dict[str, Any], labels: int = 2) -> Origin:
    return Origin(
        f"super_glue_{config.replace('.', '_')}",
        fields,
        splits,
        labels=labels,
        shipped=Shipped(f"glue_superglue/super_glue.{config}/{{split}}"),
        tfds=Tfds(f"super_glue/{config}:1.0.2"),
        huggingface=HuggingFace("aps/super_glue", config),
    )


def _question(row: Row) -> Mapping[str, Any]:
    """The answers to one question belong together (by its text: `idx` differs by place)."""
    return {"paragraph": row["paragraph"], "question": row["question"]}


def _gap(row: Row) -> Mapping[str, Any]:
    return {"passage": row["passage"], "query": row["query"], "references": list(row["answers"])}


DATASETS = (
    Dataset(
        "super_glue_boolq",
        "super_glue",
        _origin(
            "boolq",
            {"train": 9427, "validation": 3270},
            {"question": str, "passage": str, "label": int},
        ),
        family="qa_yes_no",
        metric_fns=(metrics.accuracy,),
        license="CC BY-SA 3.0",
        citation=f"Clark et al. 2019, BoolQ; {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_cb",
        "super_glue",
        _origin(
            "cb",
            {"train": 250, "validation": 56},
            {"premise": str, "hypothesis": str, "label": int},
            labels=3,
        ),
        family="nli",
        metric_fns=(metrics.accuracy, metrics.macro_f1),
        citation=f"De Marneffe et al. 2019, The CommitmentBank; {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_copa",
        "super_glue",
        _origin(
            "copa",
            {"train": 400, "validation": 100},
            {"premise": str, "choice1": str, "choice2": str, "question": str, "label": int},
        ),
        family="sentence_completion",
        metric_fns=(metrics.accuracy,),
        license="BSD 2-Clause",
        citation=f"Roemmele et al. 2011, Choice of Plausible Alternatives; {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_multirc",
        "super_glue",
        _origin(
            "multirc",
            {"train": 27243, "validation": 4848},
            {"paragraph": str, "question": str, "answer": str, "label": int},
        ),
        family="qa_multiple_choice",
        metric_fns=(metrics.multirc,),
        fields=_question,
        postprocess=metrics.grouped("paragraph", "question", value=metrics.choice_index),
        citation=f"Khashabi et al. 2018, Looking Beyond the Surface (MultiRC); {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_record",
        "super_glue",
        _origin(
            "record",
            {"train": 100730, "validation": 10000},
            {"passage": str, "query": str, "entities": [str], "answers": [str]},
            labels=0,
        ),
        family="qa_extractive",
        metric_fns=(metrics.record,),
        fields=_gap,
        postprocess=metrics.grouped("passage", "query", value=metrics.references_in("references")),
        citation=f"Zhang et al. 2018, ReCoRD; {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_rte",
        "super_glue",
        _origin(
            "rte",
            {"train": 2490, "validation": 277},
            {"premise": str, "hypothesis": str, "label": int},
        ),
        family="nli",
        metric_fns=(metrics.accuracy,),
        citation=f"Dagan et al. 2006 and later, Recognising Textual Entailment; {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_wic",
        "super_glue",
        _origin(
            "wic",
            {"train": 5428, "validation": 638},
            {"word": str, "sentence1": str, "sentence2": str, "label": int},
        ),
        family="word_sense_disambiguation",
        metric_fns=(metrics.accuracy,),
        license="CC BY-NC 4.0",
        citation=f"Pilehvar and Camacho-Collados 2019, WiC; {_SUPER_GLUE}",
    ),
    Dataset(
        "super_glue_wsc_fixed",
        "super_glue",
        _origin(
            "wsc.fixed",
            {"train": 554, "validation": 104},
            {"text": str, "span1_text": str, "span2_text": str, "label": int},
        ),
        family="coreference",
        metric_fns=(metrics.accuracy,),
        license="CC BY 4.0",
        citation=f"Levesque et al. 2012, The Winograd Schema Challenge; {_SUPER_GLUE}",
    ),
)

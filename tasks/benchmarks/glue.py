"""GLUE (Wang et al. 2019). WNLI is here for completeness; most reports leave it out."""

from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Shipped, Tfds

_GLUE = "Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform"
_PAIR = {"sentence1": str, "sentence2": str, "label": int}


def without_heading(field: str) -> Any:
    """Takes off the heading "Text: " that the rows of the data folder begin with."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return row | {field: row[field].removeprefix("Text: ").strip()}

    return convert


def _origin(config: str, splits: dict[str, int], fields: dict[str, Any], **more: Any) -> Origin:
    settings: dict[str, Any] = {
        "labels": 2,
        "shipped": Shipped(f"glue_superglue/glue.{config}/{{split}}"),
        "tfds": Tfds(f"glue/{config}:2.0.0"),
        "huggingface": HuggingFace("nyu-mll/glue", config),
    }
    return Origin(f"glue_{config}", fields, splits, **settings | more)


_MATCHED = {"validation": "validation_matched"}

DATASETS = (
    Dataset(
        "glue_cola",
        "glue",
        _origin("cola", {"train": 8551, "validation": 1043}, {"sentence": str, "label": int}),
        family="acceptability",
        metric_fns=(metrics.mcc, metrics.accuracy),
        citation=f"Warstadt et al. 2019, Neural Network Acceptability Judgments; {_GLUE}",
    ),
    Dataset(
        "glue_sst2",
        "glue",
        _origin(
            "sst2",
            {"train": 67349, "validation": 872},
            {"sentence": str, "label": int},
            shipped=Shipped("glue_superglue/glue.sst2/{split}", without_heading("sentence")),
        ),
        family="sentiment",
        metric_fns=(metrics.accuracy,),
        citation=f"Socher et al. 2013, Recursive Deep Models; {_GLUE}",
    ),
    Dataset(
        "glue_mrpc",
        "glue",
        _origin("mrpc", {"train": 3668, "validation": 408, "test": 1725}, _PAIR),
        family="paraphrase",
        metric_fns=(metrics.f1, metrics.accuracy),
        postprocess=metrics.choice_index,
        citation=f"Dolan and Brockett 2005, A Corpus of Sentential Paraphrases; {_GLUE}",
    ),
    Dataset(
        "glue_qqp",
        "glue",
        _origin(
            "qqp",
            {"train": 363846, "validation": 40430},
            {"question1": str, "question2": str, "label": int},
        ),
        family="paraphrase",
        metric_fns=(metrics.f1, metrics.accuracy),
        postprocess=metrics.choice_index,
        citation=f"Iyer et al. 2017, Quora Question Pairs; {_GLUE}",
    ),
    Dataset(
        "glue_stsb",
        "glue",
        _origin(
            "stsb",
            {"train": 5749, "validation": 1500},
            {"sentence1": str, "sentence2": str, "label": float},
            labels=0,
        ),
        family="similarity",
        metric_fns=(metrics.pearson_spearman,),
        citation=f"Cer et al. 2017, SemEval-2017 Task 1: Semantic Textual Similarity; {_GLUE}",
    ),
    Dataset(
        "glue_mnli",
        "glue",
        _origin(
            "mnli",
            {"train": 392702, "validation": 9815, "validation_mismatched": 9832},
            {"premise": str, "hypothesis": str, "label": int},
            labels=3,
            tfds=Tfds("glue/mnli:2.0.0", _MATCHED),
            huggingface=HuggingFace("nyu-mll/glue", "mnli", _MATCHED),
        ),
        family="nli",
        metric_fns=(metrics.accuracy,),
        prompts="nli",
        citation=f"Williams et al. 2018, A Broad-Coverage Challenge Corpus (MultiNLI); {_GLUE}",
    ),
    Dataset(
        "glue_qnli",
        "glue",
        _origin(
            "qnli",
            {"train": 104743, "validation": 5463},
            {"question": str, "sentence": str, "label": int},
        ),
        family="nli",
        metric_fns=(metrics.accuracy,),
        license="CC BY-SA 4.0",
        citation=f"Rajpurkar et al. 2016, SQuAD; {_GLUE}",
    ),
    Dataset(
        "glue_rte",
        "glue",
        _origin("rte", {"train": 2490, "validation": 277}, _PAIR),
        family="nli",
        metric_fns=(metrics.accuracy,),
        citation=f"Dagan et al. 2006 and later, Recognising Textual Entailment; {_GLUE}",
    ),
    Dataset(
        "glue_wnli",
        "glue",
        _origin("wnli", {"train": 635, "validation": 71}, _PAIR),
        family="coreference",
        metric_fns=(metrics.accuracy,),
        citation=f"Levesque et al. 2012, The Winograd Schema Challenge; {_GLUE}",
    ),
)

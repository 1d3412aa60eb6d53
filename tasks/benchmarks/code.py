"""Code: MBPP and three tasks of CodeXGLUE. Code is compared as text and never run."""

from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset, MetricFn
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin

_CODE_X_GLUE = "Lu et al. 2021, CodeXGLUE: A Benchmark for Code Understanding and Generation"


def _code_x_glue(
    name: str,
    config: str | None,
    fields: dict[str, Any],
    splits: dict[str, int],
    family: str,
    metric_fns: tuple[MetricFn, ...],
) -> Dataset:
    hub = HuggingFace(f"google/{name}", config)
    return Dataset(
        name,
        "code",
        Origin(name, fields, splits, huggingface=hub),
        family=family,
        metric_fns=metric_fns,
        license="C-UDA",
        citation=_CODE_X_GLUE,
    )


DATASETS = (
    Dataset(
        "mbpp",
        "code",
        Origin(
            "mbpp",
            {"text": str, "code": str, "test_list": [str]},
            {"train": 374, "validation": 90, "test": 500, "prompt": 10},
            huggingface=HuggingFace("google-research-datasets/mbpp", "full"),
        ),
        family="code_generation",
        metric_fns=(metrics.bleu, metrics.exact_match),
        license="CC BY 4.0",
        citation="Austin et al. 2021, Program Synthesis with Large Language Models",
    ),
    _code_x_glue(
        "code_x_glue_tc_text_to_code",
        None,
        {"nl": str, "code": str},
        {"train": 100000, "validation": 2000},
        "code_generation",
        (metrics.bleu, metrics.exact_match),
    ),
    _code_x_glue(
        "code_x_glue_ct_code_to_text",
        "python",
        {"code_tokens": [str], "docstring_tokens": [str]},
        {"train": 251820, "validation": 13914, "test": 14918},
        "code_summarization",
        (metrics.bleu,),
    ),
    _code_x_glue(
        "code_x_glue_cc_defect_detection",
        None,
        {"func": str, "target": bool},
        {"train": 21854, "validation": 2732, "test": 2732},
        "code_classification",
        (metrics.accuracy,),
    ),
)

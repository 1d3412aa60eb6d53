"""Reading comprehension: SQuAD 1.1 and 2.0."""

from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset, MetricFn
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Row, Tfds

UNANSWERABLE = "unanswerable"

_FIELDS = {"context": str, "question": str, "answers": {"text": [str]}}


def _with_references(row: Row) -> Row:
    """Adds the right answers, each once, in their order; SQuAD 2.0 has questions with none."""
    answers = list(dict.fromkeys(row["answers"]["text"]))
    return {**row, "references": answers or [UNANSWERABLE]}


def _references(row: Row) -> Mapping[str, Any]:
    return {"references": row["references"]}


def _empty_if_unanswerable(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | list[str]:
    """As `metrics.squad_v2` wants it: no answer is the empty text."""
    texts = metrics.references_in("references")(text, example=example, is_target=is_target)
    if is_target:
        return [one for one in texts if one != UNANSWERABLE]
    return "" if text.strip().strip(".").lower() == UNANSWERABLE else text


def _dataset(
    name: str,
    splits: dict[str, int],
    tfds: str,
    metric: MetricFn,
    postprocess: Callable[..., Any],
    citation: str,
) -> Dataset:
    return Dataset(
        name,
        "squad",
        Origin(
            name,
            _FIELDS,
            splits,
            tfds=Tfds(tfds),
            huggingface=HuggingFace(f"rajpurkar/{name}"),
        ),
        family="qa_extractive",
        metric_fns=(metric,),
        prepare=_with_references,
        fields=_references,
        postprocess=postprocess,
        license="CC BY-SA 4.0",
        citation=citation,
    )


DATASETS = (
    _dataset(
        "squad",
        {"train": 87599, "validation": 10570},
        "squad/v1.1:3.0.0",
        metrics.squad,
        metrics.references_in("references"),
        "Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text",
    ),
    _dataset(
        "squad_v2",
        {"train": 130319, "validation": 11873},
        "squad/v2.0:3.0.0",
        metrics.squad_v2,
        _empty_if_unanswerable,
        "Rajpurkar et al. 2018, Know What You Don't Know: Unanswerable Questions for SQuAD",
    ),
)

"""Natural language inference: ANLI, and XNLI in its fifteen languages."""

from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Tfds

_EUROPEAN = ("bg", "de", "el", "en", "es", "fr", "ru")
XNLI_LANGUAGES = tuple(sorted((*_EUROPEAN, "ar", "hi", "sw", "th", "tr", "ur", "vi", "zh")))

_FIELDS = {"premise": str, "hypothesis": str, "label": int}
_LICENSE = "CC BY-NC 4.0"


def _from_anli_of_tfds(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"premise": row["context"]}


def _anli(number: int, train: int, evaluation: int) -> Dataset:
    name = f"anli_r{number}"
    sizes = {"train": train, "validation": evaluation, "test": evaluation}
    hub = {"train": f"train_r{number}", "validation": f"dev_r{number}", "test": f"test_r{number}"}
    return Dataset(
        name,
        "anli",
        Origin(
            name,
            _FIELDS,
            sizes,
            labels=3,
            tfds=Tfds(f"anli/r{number}:0.1.0", convert=_from_anli_of_tfds),
            huggingface=HuggingFace("facebook/anli", None, hub),
        ),
        family="nli",
        metric_fns=(metrics.accuracy,),
        prompts="nli",
        license=_LICENSE,
        citation="Nie et al. 2020, Adversarial NLI: A New Benchmark",
    )


def _xnli(language: str) -> Dataset:
    def from_tfds(row: dict[str, Any]) -> dict[str, Any]:
        # One row holds all languages.
        hypotheses = row["hypothesis"]
        number = hypotheses["language"].index(language)
        return row | {
            "premise": row["premise"][language],
            "hypothesis": hypotheses["translation"][number],
        }

    name = f"xnli_{language}"
    return Dataset(
        name,
        "xnli",
        Origin(
            name,
            _FIELDS,
            {"train": 392702, "validation": 2490, "test": 5010},
            labels=3,
            tfds=Tfds("xnli:1.1.0", convert=from_tfds),
            huggingface=HuggingFace("facebook/xnli", language),
        ),
        family="nli",
        metric_fns=(metrics.accuracy,),
        prompts="nli",
        group="xnli",
        language=language,
        license=_LICENSE,
        citation="Conneau et al. 2018, XNLI: Evaluating Cross-lingual Sentence Representations",
    )


DATASETS = (_anli(1, 16946, 1000), _anli(2, 45460, 1000), _anli(3, 100459, 1200))
MULTILINGUAL = tuple(_xnli(language) for language in XNLI_LANGUAGES)

"""Summaries (CNN/DailyMail, XSum) and translation (T5's WMT pairs)."""

from collections.abc import Callable
from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Row, Tfds

_LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}


def _wmt_origin(name: str, pair: str, splits: dict[str, int], year: str) -> Origin:
    first, second = pair.split("-")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"translation": {first: row[first], second: row[second]}}

    return Origin(
        name,
        {"translation": {first: str, second: str}},
        splits,
        tfds=Tfds(f"{year}_translate/{pair}:1.0.0", convert=convert),
        huggingface=HuggingFace(f"wmt/{year}", pair),
    )


def _direction(source: str, target: str) -> Callable[[Row], Row]:
    def prepare(row: Row) -> Row:
        return {
            "source": row["translation"][source],
            "target": row["translation"][target],
            "source_language": _LANGUAGES[source],
            "target_language": _LANGUAGES[target],
        }

    return prepare


def _wmt(pair: str, splits: dict[str, int], year: str, citation: str) -> list[Dataset]:
    """Both directions of a pair, over the same rows; results are told apart by direction."""
    first, second = pair.split("-")
    origin = _wmt_origin(f"{year}_{first}_{second}", pair, splits, year)
    return [
        Dataset(
            f"{year}_{source}_{target}",
            "wmt",
            origin,
            family="translation",
            metric_fns=(metrics.bleu,),
            prompts="translation",
            language=source,
            prepare=_direction(source, target),
            citation=citation,
        )
        for source, target in ((first, second), (second, first))
    ]


_WMT14 = "Bojar et al. 2014, Findings of the Workshop on Statistical Machine Translation"
_WMT16 = "Bojar et al. 2016, Findings of the Conference on Machine Translation"

DATASETS = (
    Dataset(
        "cnn_dailymail_3_0_0",
        "summarization",
        Origin(
            "cnn_dailymail_3_0_0",
            {"article": str, "highlights": str},
            {"train": 287113, "validation": 13368, "test": 11490},
            tfds=Tfds("cnn_dailymail:3.4.0"),
            huggingface=HuggingFace("abisee/cnn_dailymail", "3.0.0"),
        ),
        family="summarization",
        metric_fns=(metrics.rouge,),
        prompts="cnn_dailymail",
        citation="See et al. 2017, Get To The Point; Hermann et al. 2015",
    ),
    Dataset(
        "xsum",
        "summarization",
        Origin(
            "xsum",
            {"document": str, "summary": str},
            {"train": 204045, "validation": 11332, "test": 11334},
            tfds=Tfds("xsum:1.1.0"),
            huggingface=HuggingFace("EdinburghNLP/xsum"),
        ),
        family="summarization",
        metric_fns=(metrics.rouge,),
        citation="Narayan et al. 2018, Don't Give Me the Details, Just the Summary!",
    ),
    *_wmt("de-en", {"train": 4508785, "validation": 3000, "test": 3003}, "wmt14", _WMT14),
    *_wmt("fr-en", {"train": 40836715, "validation": 3000, "test": 3003}, "wmt14", _WMT14),
    *_wmt("ro-en", {"train": 610320, "validation": 1999, "test": 1999}, "wmt16", _WMT16),
)

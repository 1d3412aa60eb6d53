"""Text classification: IMDB, Yelp, AG News, DBpedia."""

from collections.abc import Mapping
from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.glue import without_heading
from mtl_jax.tasks.benchmarks.origins import Convert, HuggingFace, Origin, Shipped, Tfds

_TEXT = {"text": str, "label": int}
_ZHANG = "Zhang et al. 2015, Character-level Convolutional Networks for Text Classification"


def _title_and_text(row: Mapping[str, Any]) -> tuple[str, str]:
    """Divides the `Title: ...`, `Text: ...` of the data folder."""
    title, _, text = row["text"].removeprefix("Title: ").partition("\nText: ")
    return title.strip(), text.strip()


def _ag_news_of_data_folder(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"text": " ".join(_title_and_text(row))}


def _ag_news_of_tfds(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{row['title']} {row['description']}", "label": row["label"]}


def _dbpedia_of_data_folder(row: dict[str, Any]) -> dict[str, Any]:
    title, content = _title_and_text(row)
    return {"title": title, "content": content, "label": row["label"]}


def _dataset(
    name: str,
    splits: dict[str, int],
    labels: int,
    family: str,
    hub: HuggingFace,
    citation: str = _ZHANG,
    *,
    fields: dict[str, Any] = _TEXT,
    shipped: Convert | None = None,
    tfds: Tfds | None = None,
) -> Dataset:
    places = Shipped(f"glue_superglue/{name}/{{split}}", shipped)
    return Dataset(
        name,
        "text_classification",
        Origin(name, fields, splits, labels, shipped=places, tfds=tfds, huggingface=hub),
        family=family,
        metric_fns=(metrics.accuracy,),
        citation=citation,
    )


DATASETS = (
    _dataset(
        "imdb",
        {"train": 25000, "test": 25000},
        2,
        "sentiment",
        HuggingFace("stanfordnlp/imdb"),
        "Maas et al. 2011, Learning Word Vectors for Sentiment Analysis",
        tfds=Tfds("imdb_reviews/plain_text:1.0.0"),
    ),
    _dataset(
        "yelp_polarity",
        {"train": 560000, "test": 38000},
        2,
        "sentiment",
        HuggingFace("fancyzhx/yelp_polarity"),
        tfds=Tfds("yelp_polarity_reviews:0.2.0"),
    ),
    _dataset(
        "yelp_review_full",
        {"train": 650000, "test": 50000},
        5,
        "sentiment",
        HuggingFace("Yelp/yelp_review_full"),
        shipped=without_heading("text"),
    ),
    _dataset(
        "ag_news",
        {"train": 120000, "test": 7600},
        4,
        "topic_classification",
        HuggingFace("fancyzhx/ag_news"),
        shipped=_ag_news_of_data_folder,
        tfds=Tfds("ag_news_subset:1.0.0", convert=_ag_news_of_tfds),
    ),
    _dataset(
        "dbpedia_14",
        {"train": 560000, "test": 70000},
        14,
        "topic_classification",
        HuggingFace("fancyzhx/dbpedia_14"),
        fields={"title": str, "content": str, "label": int},
        shipped=_dbpedia_of_data_folder,
    ),
)

"""Completion and coreference by common sense: HellaSwag, WinoGrande, StoryCloze."""

from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Row, Tfds

_SENTENCES = tuple(f"input_sentence_{number}" for number in (1, 2, 3, 4))


def _hellaswag_of_tfds(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"ctx": row["context"], "label": str(row["label"])}


def _winogrande_of_tfds(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"answer": str(row["label"] + 1)}


def _story_cloze_of_tfds(row: dict[str, Any]) -> dict[str, Any]:
    # The four sentences come joined there.
    story = dict.fromkeys(_SENTENCES, "") | {_SENTENCES[0]: row["context"]}
    endings = {"sentence_quiz1": row["endings"][0], "sentence_quiz2": row["endings"][1]}
    return {**story, **endings, "answer_right_ending": row["label"]}


def _with_story(row: Row) -> Row:
    story = " ".join(row[name].strip() for name in _SENTENCES if row[name])
    return {**row, "story": story}


DATASETS = (
    Dataset(
        "hellaswag",
        "commonsense",
        Origin(
            "hellaswag",
            {"activity_label": str, "ctx": str, "endings": [str], "label": str},
            {"train": 39905, "validation": 10042},
            tfds=Tfds("hellaswag:1.1.0", convert=_hellaswag_of_tfds),
            huggingface=HuggingFace("Rowan/hellaswag"),
        ),
        family="sentence_completion",
        metric_fns=(metrics.accuracy,),
        license="MIT",
        citation="Zellers et al. 2019, HellaSwag: Can a Machine Really Finish Your Sentence?",
    ),
    Dataset(
        "winogrande_winogrande_xl",
        "commonsense",
        Origin(
            "winogrande_winogrande_xl",
            {"sentence": str, "option1": str, "option2": str, "answer": str},
            {"train": 40398, "validation": 1267},
            tfds=Tfds("winogrande:1.2.0", {"train": "train_xl"}, _winogrande_of_tfds),
            huggingface=HuggingFace("allenai/winogrande", "winogrande_xl"),
        ),
        family="coreference",
        metric_fns=(metrics.accuracy,),
        prompts="winogrande",
        citation="Sakaguchi et al. 2020, WinoGrande: An Adversarial Winograd Schema Challenge",
    ),
    Dataset(
        "story_cloze_2016",
        "commonsense",
        Origin(
            "story_cloze_2016",
            {
                **dict.fromkeys((*_SENTENCES, "sentence_quiz1", "sentence_quiz2"), str),
                "answer_right_ending": int,
            },
            {"validation": 1871, "test": 1871},
            tfds=Tfds("story_cloze/2016:1.0.0", convert=_story_cloze_of_tfds),
            huggingface=HuggingFace("LSDSem/story_cloze", "2016"),
        ),
        family="sentence_completion",
        metric_fns=(metrics.accuracy,),
        prompts="story_cloze",
        trained=False,
        prepare=_with_story,
        license="on request from its authors",
        citation="Mostafazadeh et al. 2016, A Corpus and Cloze Evaluation (StoryCloze)",
    ),
)

"""Dialogue: SAMSum (summaries), DREAM (questions about a dialogue), DailyDialog (the next turn)."""

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Tfds

DATASETS = (
    Dataset(
        "samsum",
        "dialogue",
        Origin(
            "samsum",
            {"dialogue": str, "summary": str},
            {"train": 14732, "validation": 818, "test": 819},
            tfds=Tfds("samsum:1.0.0"),
            huggingface=HuggingFace("knkarthick/samsum"),
        ),
        family="summarization",
        metric_fns=(metrics.rouge,),
        license="CC BY-NC-ND 4.0",
        citation="Gliwa et al. 2019, SAMSum Corpus: A Human-annotated Dialogue Dataset",
    ),
    Dataset(
        "dream",
        "dialogue",
        Origin(
            "dream",
            {"dialogue": [str], "question": str, "choice": [str], "answer": str},
            {"train": 6116, "validation": 2040, "test": 2041},
            huggingface=HuggingFace("dataset-org/dream"),
        ),
        family="qa_multiple_choice",
        metric_fns=(metrics.accuracy,),
        citation="Sun et al. 2019, DREAM: A Challenge Data Set for Dialogue-Based Comprehension",
    ),
    Dataset(
        "daily_dialog",
        "dialogue",
        Origin(
            "daily_dialog",
            {"dialog": [str]},
            {"train": 11118, "validation": 1000, "test": 1000},
            huggingface=HuggingFace("li2017dailydialog/daily_dialog"),
        ),
        family="dialogue",
        metric_fns=(metrics.bleu, metrics.rougeL),
        license="CC BY-NC-SA 4.0",
        citation="Li et al. 2017, DailyDialog: A Manually Labelled Multi-turn Dialogue Dataset",
    ),
)

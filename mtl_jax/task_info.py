"""What a task is about: its dataset, prompt and family. Results are grouped by these names."""

import fnmatch
from dataclasses import dataclass

from mtl_jax.errors import UserError

# Datasets whose examples are the same, or are made of one another's, though their names differ: who
# trained on one has seen the others. Of Super-NaturalInstructions as their task names tell.
_SAME_EXAMPLES = (
    ("glue_rte", "super_glue_rte", "sni_task*_rte_*"),
    ("glue_wnli", "super_glue_wsc*", "sni_task*_wsc_*", "sni_task*_mwsc_*"),
    ("super_glue_copa", "sni_task*_superglue_copa_*", "sni_task*glecopa_*"),
    ("super_glue_multirc", "sni_task*_multirc_*"),
    ("super_glue_boolq", "sni_task*_boolq_*"),
    ("super_glue_wic", "sni_task*_xlwic_*", "sni_task*_wic_*"),
    ("super_glue_record", "sni_task*_record_*"),
    ("squad", "squad_v2", "glue_qnli", "sni_task*_squad*", "sni_task*_qnli_*"),
    ("glue_sst2", "sni_task*_sst2_*"),
    ("glue_mnli", "sni_task*_mnli_*"),
    ("mmlu", "mmlu_*", "sni_task*_mmmlu_*"),
    ("winogrande*", "sni_task*_winogrande_*"),
    ("story_cloze*", "sni_task*_storycloze_*", "sni_task*_story_cloze_*"),
    ("hellaswag", "sni_task*_hellaswag_*"),
    ("yelp_polarity", "yelp_review_full", "sni_task*_yelp_*"),
    ("imdb", "sni_task*_imdb_*"),
    ("xsum", "sni_task*_xsum_*"),
    ("cnn_dailymail*", "sni_task*_cnn_*"),
    ("cosmos_qa", "sni_task*_cosmosqa_*"),
    ("commonsense_qa", "ecqa", "sni_task*_commonsenseqa_*"),
    ("quoref", "sni_task*_quoref_*"),
    ("ropes", "sni_task*_ropes_*"),
    ("sciq", "sni_task*_sciq_*"),
    ("qasc", "sni_task*_qasc_*", "sni_task*_eqasc_*"),
    ("gigaword", "sni_task*_gigaword_*"),
    ("kilt_tasks_hotpotqa", "sni_task*_hotpotqa_*"),
)


@dataclass(frozen=True)
class TaskInfo:
    """Facts about a task that SeqIO has no place for.

    Attributes:
        task: the name under which the task is registered with SeqIO.
        dataset: the dataset behind it; results are summarised over all tasks of one dataset.
        prompt: the name of the prompt, empty where the task has only one form.
        family: the kind of task ("sentiment", "nli"), empty where unknown.
        trained: whether the task is meant for training (False: held out for evaluation).
        citation: where the data comes from.
        shots: examples with their answers that stand in front of each input.
        original: whether the prompt asks for what the dataset was made for (PromptSource).
        language: of the inputs, as a code ("en", "sw"); empty where it says nothing.
    """

    task: str
    dataset: str
    prompt: str = ""
    family: str = ""
    trained: bool = True
    citation: str = ""
    shots: int = 0
    original: bool = True
    language: str = ""


_INFOS: dict[str, TaskInfo] = {}


def describe(
    task: str,
    *,
    dataset: str,
    prompt: str = "",
    family: str = "",
    trained: bool = True,
    citation: str = "",
    shots: int = 0,
    original: bool = True,
    language: str = "",
) -> TaskInfo:
    """Records what a task is about and returns the record.

    Raises:
        UserError: the task is already described otherwise.
    """
    new = TaskInfo(task, dataset, prompt, family, trained, citation, shots, original, language)
    old = _INFOS.setdefault(task, new)
    if old != new:
        raise UserError(
            f"Task {task!r} is described twice, as {old} and as {new}: give one task another name."
        )
    return new


def info(task: str) -> TaskInfo:
    """Returns what is known of a task; a task nobody described is its own dataset."""
    return _INFOS.get(task) or TaskInfo(task=task, dataset=task)


def same_examples(dataset: str) -> frozenset[int | str]:
    """Returns what two names of datasets have in common if examples of one are in the other.

    Names known for it are in a table, the others are equal to themselves alone.
    """
    groups = enumerate(_SAME_EXAMPLES)
    found = {n for n, globs in groups if any(fnmatch.fnmatchcase(dataset, g) for g in globs)}
    return frozenset({dataset, *found})


def described() -> dict[str, TaskInfo]:
    """Returns all records by task name."""
    return dict(_INFOS)

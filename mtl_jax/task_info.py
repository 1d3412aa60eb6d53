"""What a task is about: its dataset, prompt and family. Results are grouped by these names."""

from dataclasses import dataclass

from mtl_jax.errors import UserError


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


def described() -> dict[str, TaskInfo]:
    """Returns all records by task name."""
    return dict(_INFOS)

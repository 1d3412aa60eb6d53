"""Super-NaturalInstructions: one SeqIO Task for each of its tasks, as Tk-Instruct reads them.

Importing this module reads `sni/*.jsonl.gz` of the data folder once and registers its tasks, such
as `sni_task033_winogrande_answer_generation`, and three mixtures of equal rates:

    sni_train    the training tasks, split `train`: 100 instances each, as Tk-Instruct
    sni_test     the official test tasks, split `test`; never trained on
    sni_extra    tasks on the official list of those that share sources with test tasks, split
                 `test`: there is nothing of them to train on

The model always generates. An instance has one right answer or several: training draws one in each
epoch, metrics take the best. Other encodings, say without examples:

    sni.register("sni_def", Encoding(examples=0))    # tasks sni_def_task033_..., sni_def_train, ...
"""

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from mtl_jax import metrics
from mtl_jax.errors import UserError
from mtl_jax.task_info import describe
from mtl_jax.tasks.data_folder import data_file, read_json_lines
from mtl_jax.tasks.instructions import Encoding, Instruction
from mtl_jax.tasks.prompts import prompt_slug
from mtl_jax.tasks.rendered import Example, RenderedDataSource, Write
from mtl_jax.tasks.t5_vocabulary import t5_vocabulary

INSTANCES = 100  # of each training task, as Tk-Instruct
PARTS = ("train", "test", "extra")

_FIELDS = ("task", "category", "definition", "positive_examples", "input", "outputs")
_CITATION = "Wang et al. 2022, Super-NaturalInstructions"

Row = Mapping[str, Any]


@functools.cache
def read_part(part: str) -> Mapping[str, Sequence[Row]]:
    """The rows of each task of `train`, `test` or `extra`, in the order of the file.

    Raises:
        UserError: no data folder, no such file, a malformed line, or a row without an answer.
    """
    path = data_file("sni", f"{part}.jsonl.gz")
    tasks: dict[str, list[Row]] = {}
    for number, row in enumerate(read_json_lines(path, _FIELDS), 1):
        if not row["outputs"]:
            raise UserError(f"{path}, line {number}: outputs is empty; give at least one answer.")
        tasks.setdefault(row["task"], []).append(row)
    return tasks


class SniDataSource(RenderedDataSource):
    """The instances of a task with its instruction in front of each.

    Texts `inputs` and `targets`, and `references` (all right answers), `query` (the input of the
    instance alone), `demonstration` (the output of the first example in front, or empty) and
    `exemplars` (how many there are).
    """

    def __init__(
        self,
        task: str,
        split: str,
        rows: Sequence[Row],
        encoding: Encoding,
        vocabulary: seqio.Vocabulary,
    ):
        """Writes nothing yet.

        Args:
            task: its name in the data.
            split: the only one.
            rows: its instances.
            encoding: what stands in front of an input.
            vocabulary: counts tokens.
        """
        super().__init__((split,))
        self._task, self._rows = task, rows
        self._encoding, self._vocabulary = encoding, vocabulary
        self._encoded: dict[int, tuple[str, int]] = {}

    def __str__(self) -> str:
        return f"Task {self._task!r} of Super-NaturalInstructions"

    def open(self, split: str) -> tuple[int, Write]:
        """Returns the number of instances and what encodes them."""
        rows = self._rows
        instruction = Instruction(rows[0]["definition"], rows[0]["positive_examples"])

        def write(index: int, seed: int | None) -> Example:
            if index not in self._encoded:
                self._encoded[index] = self._encoding.encode(
                    instruction, rows[index]["input"], self._count_tokens
                )
            return self._example(rows[index], index, instruction, seed)

        return len(rows), write

    def _count_tokens(self, text: str) -> int:
        return len(self._vocabulary.encode(text))

    def _example(self, row: Row, index: int, instruction: Instruction, seed: int | None) -> Example:
        inputs, exemplars = self._encoded[index]
        answers = row["outputs"]
        drawn = random.Random(f"{seed}/{self._task}/{index}")
        return {
            "inputs": inputs,
            "targets": answers[0] if seed is None else drawn.choice(answers),
            "references": list(answers),
            "query": row["input"],
            "demonstration": instruction.examples[0]["output"] if exemplars else "",
            "exemplars": exemplars,
        }


def features() -> dict[str, seqio.Feature]:
    """T5's vocabulary, with the end of sequence on both sides, as Tk-Instruct."""
    vocabulary = t5_vocabulary()
    return {side: seqio.Feature(vocabulary, add_eos=True) for side in ("inputs", "targets")}


def register(
    prefix: str = "sni",
    encoding: Encoding = Encoding(),  # noqa: B008 (frozen)
    instances: int | None = INSTANCES,
    output_features: Mapping[str, seqio.Feature] | None = None,
) -> dict[str, list[str]]:
    """Registers all tasks and the mixtures `{prefix}_train`, `{prefix}_test`, `{prefix}_extra`.

    Args:
        prefix: of the names of tasks and mixtures.
        encoding: what stands in front of the inputs.
        instances: of a training task, at most; None: all. Test tasks have all of theirs.
        output_features: `inputs` and `targets`; None: those of T5.

    Returns:
        The names of the tasks by part.

    Raises:
        UserError: no data folder, a file of it is missing or malformed, or `instances` below 1.
    """
    if instances is not None and instances < 1:
        raise UserError(f"sni.register: instances must be at least 1 or None, not {instances}.")
    output_features = output_features or features()
    vocabulary = output_features["inputs"].vocabulary
    names: dict[str, list[str]] = {part: [] for part in PARTS}
    for part, task, rows in ((p, t, rows) for p in PARTS for t, rows in read_part(p).items()):
        slug = prompt_slug(task)
        name = f"{prefix}_{slug}"
        describe(
            name,
            dataset=f"sni_{slug}",
            prompt=encoding.name,
            family=prompt_slug(rows[0]["category"]),
            trained=part == "train",
            citation=_CITATION,
            shots=encoding.examples,
            language="en",
        )
        split = "train" if part == "train" else "test"
        taken = rows[:instances] if part == "train" else rows
        seqio.TaskRegistry.add(
            name,
            source=SniDataSource(task, split, taken, encoding, vocabulary),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=dict(output_features),
            postprocess_fn=metrics.references_in("references"),
            metric_fns=[metrics.exact_match_sni, metrics.rougeL_stemmed],
            shuffle_buffer_size=None,
        )
        names[part].append(name)
    for part, of_part in names.items():
        seqio.MixtureRegistry.add(f"{prefix}_{part}", [(name, 1.0) for name in of_part])
    return names


register()

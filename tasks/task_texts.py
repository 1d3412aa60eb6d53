"""The examples of any registered task as texts, by their number: what exemplars are drawn from."""

from collections.abc import Sequence

import seqio

from mtl_jax import caching
from mtl_jax.errors import UserError
from mtl_jax.reading import SIDES, Epoch, TaskReader
from mtl_jax.sources import RowsDataSource
from mtl_jax.tasks.rendered import Example, RenderedDataSource, Write

# A split longer than this is not kept as texts: its examples are written again when asked for.
_KEPT = 20_000
_ANY_LENGTH = {"inputs": 1 << 20, "targets": 1 << 20}
_TOKENIZING = (
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
    seqio.preprocessors.append_eos_after_trim,
    seqio.preprocessors.tokenize_and_append_eos,
)


class TaskTexts:
    """Examples with texts `inputs` and `targets` and all other fields of the task.

    Where the source of a task holds its rows in memory and nothing stands before the tokenizer,
    single examples are read; of any other task the whole split is read at once.
    """

    def __init__(self, task: seqio.Task):
        self.task = task
        self._open: dict[str, tuple[int, Write]] = {}
        self._kept: dict[tuple[str, int], Example | None] = {}

    def count(self, split: str) -> int:
        """Returns the number of rows; some may give no example."""
        return self._opened(split)[0]

    def get(self, split: str, index: int) -> Example | None:
        """Returns the example of a row, None where the row gives none."""
        count, write = self._opened(split)
        if count > _KEPT:
            return write(index, None)
        key = split, index
        if key not in self._kept:
            self._kept[key] = write(index, None)
        return self._kept[key]

    def _opened(self, split: str) -> tuple[int, Write]:
        if split not in self._open:
            self._open[split] = self._opening(split)
        return self._open[split]

    def _opening(self, split: str) -> tuple[int, Write]:
        source = self.task.source
        plain = all(
            step in _TOKENIZING or caching.is_ours(step) for step in self.task.preprocessors
        )
        if plain and isinstance(source, RenderedDataSource):
            source.check_split(split)
            return source.open(split)
        rows = source.rows(split) if plain and isinstance(source, RowsDataSource) else None
        examples = self._read(split) if rows is None else rows
        if examples and not all(isinstance(examples[0].get(side), str) for side in SIDES):
            raise UserError(
                f"Task {self.task.name!r} has no texts inputs and targets, so its examples cannot "
                "stand in front of others."
            )
        return len(examples), lambda index, seed: examples[index]

    def _read(self, split: str) -> Sequence[Example]:
        """All examples, their sides as the texts that were tokenized."""
        reader = TaskReader(self.task, _ANY_LENGTH)
        found = []
        for example in reader.examples(Epoch(split, shuffle=False, seed=0)):
            texts = {side: example.pop(f"{side}_pretokenized", None) for side in SIDES}
            found.append(example | texts)
        return found

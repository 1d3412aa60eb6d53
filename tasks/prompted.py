"""The builder: rows of fields x prompt templates -> one SeqIO Task for each template.

The usual way from a data set to tasks:

    add_prompted_tasks(
        "super_glue_cb", rows, templates, output_features, {"validation": 56},
        metric_fns=[accuracy], family="nli", trained=False)

Every task yields `inputs`, `targets` (tokens, EOS where the feature says so), their
`*_pretokenized` texts, and `answer_choices`: the choices joined by `" ||| "`, or `""` for
generation.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax.errors import UserError, suggest
from mtl_jax.sources import RowsDataSource
from mtl_jax.task_info import describe
from mtl_jax.tasks.prompts import SEPARATOR, Template

Example = dict[str, str]
Rows = Callable[[str], Sequence[Mapping[str, Any]]]

_CHUNK = 32  # examples handed to TensorFlow at once: one call into Python costs more than a row
_FIELDS = ("inputs", "targets", "answer_choices")

_skipped: dict[tuple[str, str], int] = {}


def prompt_slug(name: str) -> str:
    """Turns a prompt's name into a part of a task's name: `"GPT-3 style"` -> `"gpt_3_style"`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_") or "prompt"


def skipped_rows(task: str, split: str) -> int | None:
    """How many rows of a split the task's prompt left out because it rendered empty for them.

    Known after one complete pass over the unsharded split, before that None.
    """
    return _skipped.get((task, split))


class PromptedDataSource(RowsDataSource):
    """Renders a template over rows, lazily and in any number of shards.

    SeqIO's own FunctionDataSource cannot be sharded: every shard would render every row. With
    `shuffle` the rows of the shard are permuted as a whole; which rows are in a shard does not
    depend on the seed.
    """

    def __init__(
        self, task: str, dataset: str, rows: Rows, template: Template, splits: Mapping[str, int]
    ):
        self._task, self._dataset, self._rows, self._template = task, dataset, rows, template
        self._counts = dict(splits)
        super().__init__(splits=tuple(splits))

    def __str__(self) -> str:
        return f"Prompt {self._template.name!r} of data set {self._dataset!r}"

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows, the ones that render empty included."""
        return self._counts[split]

    def skipped(self, split: str) -> int | None:
        """See `skipped_rows`."""
        return skipped_rows(self._task, split)

    def rows(self, split: str) -> Sequence[Example]:
        """Returns all examples of a split, rendered now, without the empty ones."""
        return list(self.examples(split, shuffle=False))

    def examples(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        start: int = 0,
    ) -> Iterator[Example]:
        """Yields texts `inputs, targets, answer_choices`, from the `start`-th non-empty one on."""
        if split not in self._counts:
            raise UserError(
                f"Task {self._task!r} has no split {split!r}.{suggest(split, self._counts)} "
                f"It has: {', '.join(self._counts)}."
            )
        rows = self._rows(split)
        shard, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        order_N = np.arange(shard, len(rows), shards)
        if shuffle:
            order_N = np.random.default_rng(seed).permutation(order_N)
        rendered = 0
        for example in self._render(rows, order_N, split):
            if rendered >= start:
                yield example
            rendered += 1
        if shards == 1:
            _skipped[self._task, split] = len(rows) - rendered

    def _render(
        self, rows: Sequence[Mapping[str, Any]], order: Iterable[int], split: str
    ) -> Iterator[Example]:
        template, name = self._template, f"{self._dataset} {split} row"
        for index in order:
            rendered = template.render(rows[index], f"{name} {index}")
            if rendered is None:
                continue
            if any(SEPARATOR in choice for choice in rendered.choices):
                raise UserError(
                    f"Template {template.name!r}, {name} {index}: a choice contains "
                    f"'{SEPARATOR}', which separates choices; change the text of the row."
                )
            yield {
                "inputs": rendered.inputs,
                "targets": rendered.targets,
                "answer_choices": f" {SEPARATOR} ".join(rendered.choices),
            }

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_by_rows: Any,
    ) -> tf.data.Dataset:
        """Returns the examples as a dataset of scalar strings, rendered while it is read."""
        seed = None if seed is None else int(seed)

        def chunks() -> Iterator[dict[str, list[str]]]:
            examples = self.examples(split, shuffle, seed, shard_info)
            while chunk := list(itertools.islice(examples, _CHUNK)):
                yield {name: [example[name] for example in chunk] for name in _FIELDS}

        strings = {name: tf.TensorSpec([None], tf.string) for name in _FIELDS}
        return tf.data.Dataset.from_generator(chunks, output_signature=strings).unbatch()


def _task_names(name_format: str, dataset: str, templates: Sequence[Template]) -> list[str]:
    """One name a template; prompts with the same slug are told apart by a number."""
    names: list[str] = []
    for template in templates:
        name = name_format.format(dataset=prompt_slug(dataset), prompt=prompt_slug(template.name))
        number = 2
        while name in names:
            name = f"{name.removesuffix(f'_{number - 1}') if number > 2 else name}_{number}"
            number += 1
        names.append(name)
    return names


def add_prompted_tasks(
    dataset: str,
    rows: Rows,
    templates: Sequence[Template],
    output_features: Mapping[str, seqio.Feature],
    splits: Mapping[str, int] | Sequence[str],
    metric_fns: Sequence[Callable[..., Any]],
    *,
    family: str = "",
    trained: bool = True,
    held_out_prompts: Collection[str] = (),
    name_format: str = "{dataset}_{prompt}",
    citation: str = "",
) -> list[str]:
    """Registers one SeqIO Task for each template and returns their names.

    Args:
        dataset: name of the data set; first part of the tasks' names.
        rows: gives the rows of a split; called when a task is read. Keep the rows cached there if
            they are expensive: every prompt asks again.
        templates: the prompts.
        output_features: `inputs` and `targets`. T0's evaluation has no EOS on its inputs:
            `seqio.Feature(vocabulary, add_eos=False)`.
        splits: split to number of rows (read by `seqio.mixing_rate_num_examples`); or split names,
            then all rows are counted now.
        metric_fns: SeqIO metric functions over (targets, predictions).
        family: the kind of task, for the tables of results.
        trained: False where the whole data set is held out.
        held_out_prompts: names of templates that are never trained on.
        name_format: of the tasks' names, with `{dataset}` and `{prompt}` as slugs.
        citation: where the data comes from.

    Raises:
        UserError: no templates, or `held_out_prompts` names one that is not there.
    """
    if not templates:
        raise UserError(f"Data set {dataset!r}: no templates, so there is no task to register.")
    known = [template.name for template in templates]
    for name in held_out_prompts:
        if name not in known:
            raise UserError(
                f"Data set {dataset!r}: the held-out prompt {name!r} is not among the templates."
                f"{suggest(name, known)}"
            )
    counts = dict(splits) if isinstance(splits, Mapping) else {s: len(rows(s)) for s in splits}
    names = _task_names(name_format, dataset, templates)
    for name, template in zip(names, templates, strict=True):
        describe(
            name,
            dataset=dataset,
            prompt=template.name,
            family=family,
            trained=trained and template.name not in held_out_prompts,
            citation=citation,
        )
        seqio.TaskRegistry.add(
            name,
            source=PromptedDataSource(name, dataset, rows, template, counts),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=dict(output_features),
            metric_fns=list(metric_fns),
            shuffle_buffer_size=None,  # the source permutes the whole split
        )
    return names

"""The builder: rows of fields x prompt templates -> one SeqIO Task for each template.

The usual way from a data set to tasks:

    add_prompted_tasks(
        "super_glue_cb", rows, templates, output_features, {"validation": 56},
        metric_fns=[accuracy], family="nli", trained=False)

Every task yields `inputs`, `targets` (tokens, EOS where the feature says so), their
`*_pretokenized` texts, and `answer_choices`: the choices joined by `" ||| "`, or `""` for
generation. `PromptedTask` has more: variants for training, generating and ranking, and choices
written into the input.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax import caching
from mtl_jax.errors import UserError, suggest
from mtl_jax.row_files import Share
from mtl_jax.task_info import describe
from mtl_jax.tasks.options import with_options
from mtl_jax.tasks.prompts import SEPARATOR, Template, prompt_slug
from mtl_jax.tasks.rendered import Example, RenderedDataSource, Write

Rows = Callable[[str], Sequence[Mapping[str, Any]]]

VARIANTS = ("plain", "train", "generate", "rank")
_WITH_CHOICES = ("plain", "rank")


def skipped_rows(task: str, split: str) -> int | None:
    """How many rows of a split the task's prompt left out because it rendered empty for them.

    Known after one complete pass over the unsharded split, before that None.
    """
    return seqio.TaskRegistry.get(task).source.skipped(split)


class PromptedDataSource(RenderedDataSource):
    """Renders a template over rows: texts `inputs, targets, answer_choices`, and more fields."""

    def __init__(
        self,
        task: str,
        about: "PromptedTask",
        template: Template,
        splits: Mapping[str, int],
        variant: str,
    ):
        self._task, self._template, self._variant = task, template, variant
        self._dataset, self._rows, self._fields = about.dataset, about.rows, about.fields
        self._counts, self._count = dict(splits), about.count
        self._share, self._corrupt = about.share, about.corrupt
        super().__init__(tuple(splits))

    def __str__(self) -> str:
        return f"Task {self._task!r}"

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows, the ones that render empty included."""
        return self._counts[split] if self._count is None else self._count(split)

    def corrupt(self, split: str, shards: Sequence[seqio.ShardInfo]) -> Mapping[str, int]:
        """Returns how many corrupt rows were left out of these shards, by file; reads them."""
        if self._corrupt is None:
            return {}
        return self._corrupt(split, [(shard.index, shard.num_shards) for shard in shards])

    def apart(self, split: str, shard_info: seqio.ShardInfo | None) -> bool:
        """Whether a shard is read without the rows of others."""
        return self._share is not None and shard_info is not None and shard_info.num_shards > 1

    def open(self, split: str) -> tuple[int, Write]:
        """Reads the rows of a split; each is rendered when it is asked for."""
        rows = self._rows(split)
        return len(rows), self._writer(split, rows)

    def open_shard(self, split: str, shard_info: seqio.ShardInfo) -> tuple[np.ndarray, Write]:
        """As `open`, reads the rows of a shard."""
        if self._share is None or not self.apart(split, shard_info):
            return super().open_shard(split, shard_info)
        rows, own_N = self._share(split, (shard_info.index, shard_info.num_shards))
        return own_N, self._writer(split, rows)

    def _writer(self, split: str, rows: Sequence[Mapping[str, Any]]) -> Write:
        def write(index: int, seed: int | None) -> Example | None:
            del seed  # a prompt says the same in every epoch
            return self._render(rows[index], f"{self._dataset} {split} row {index}")

        return write

    def _render(self, row: Mapping[str, Any], name: str) -> Example | None:
        rendered = self._template.render(row, name)
        if rendered is None:
            return None
        choices = rendered.choices if self._variant in _WITH_CHOICES else []
        where = f"Template {self._template.name!r}, {name}"
        if any(SEPARATOR in choice for choice in choices):
            raise UserError(
                f"{where}: a choice contains '{SEPARATOR}', which separates choices; change the "
                "text of the row."
            )
        if self._variant == "rank" and not choices:
            raise UserError(
                f"{where}: there are no answer choices to rank; let answer_choices give some for "
                "every row."
            )
        example: Example = {
            "inputs": rendered.inputs,
            "targets": rendered.targets,
            "answer_choices": f" {SEPARATOR} ".join(choices),
        }
        more = self._fields(row) if self._fields else {}
        if taken := example.keys() & more.keys():
            raise UserError(f"{where}: fields gives {min(taken)!r}, which the prompt gives.")
        return example | more


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


@dataclasses.dataclass(frozen=True)
class PromptedTask:
    """A data set and its prompts: one SeqIO Task for each template and variant.

    The variants:

    * `plain`: as rendered. It trains, and is ranked where the template has answer choices and
      generated where not. Most data sets need no other.
    * `train`: for training alone: no answer choices, no metrics, and only the split `train`.
    * `generate`: without its answer choices, so that the model generates and the metrics compare
      texts.
    * `rank`: every template must have answer choices, and so must every row.

    Attributes:
        dataset: name of the data set; first part of the tasks' names.
        rows: gives the rows of a split; called when a task is read. Keep the rows cached there if
            they are expensive: every prompt asks again.
        templates: the prompts.
        output_features: `inputs` and `targets`. T0's evaluation has no EOS on its inputs:
            `seqio.Feature(vocabulary, add_eos=False)`.
        splits: split to number of rows (read by `seqio.mixing_rate_num_examples`); or split names,
            then all rows are counted on registering.
        metric_fns: SeqIO metric functions over (targets, predictions).
        family: the kind of task, for the tables of results.
        trained: False where the whole data set is held out.
        held_out_prompts: names of templates that are never trained on.
        name_format: of the tasks' names, with `{dataset}` and `{prompt}` as slugs. Variants but the
            plain one add `_train`, `_generate` or `_rank`.
        citation: where the data comes from.
        options: how the choices are written into the input (`options.STYLES`); it becomes part of
            the prompts' names.
        shuffled_options: write them in an order drawn for each row.
        postprocess: SeqIO's `fn(text, example=fields, is_target=bool)`, applied to targets and
            predictions before the metrics.
        fields: further fields of an example, from its row, for `postprocess`: texts, numbers,
            booleans or lists of texts.
        group: the name under which results are summed up (`TaskInfo.dataset`); empty: `dataset`.
        count: gives the number of rows of a split when it is asked for, so that registering reads
            nothing; `splits` are then names alone.
        share: gives, of a split and of share (index, number of shares), rows and the positions in
            them [N] of the share; without it a share is every n-th of `rows`.
        corrupt: gives how many corrupt rows of shares of a split were left out, by file.
    """

    dataset: str
    rows: Rows
    templates: Sequence[Template]
    output_features: Mapping[str, seqio.Feature]
    splits: Mapping[str, int] | Sequence[str]
    metric_fns: Sequence[Callable[..., Any]]
    family: str = ""
    trained: bool = True
    held_out_prompts: Collection[str] = ()
    name_format: str = "{dataset}_{prompt}"
    citation: str = ""
    options: str = "none"
    shuffled_options: bool = False
    postprocess: Callable[..., Any] | None = None
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    group: str = ""
    count: Callable[[str], int] | None = None
    share: Callable[[str, Share], tuple[Sequence[Mapping[str, Any]], np.ndarray]] | None = None
    corrupt: Callable[[str, Sequence[Share]], Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        if not self.templates:
            raise UserError(
                f"Data set {self.dataset!r}: no templates, so there is no task to register."
            )
        known = [template.name for template in self.templates]
        for name in self.held_out_prompts:
            if name not in known:
                raise UserError(
                    f"Data set {self.dataset!r}: the held-out prompt {name!r} is not among the "
                    f"templates.{suggest(name, known)}"
                )

    def register(self, variants: Sequence[str] = ("plain",)) -> list[str]:
        """Registers the tasks and returns their names, variant after variant.

        Raises:
            UserError: an unknown variant; `rank` or `options` and a template without answer
                choices; `train` without a split of this name.
        """
        splits = self.splits
        if isinstance(splits, Mapping):
            counts = dict(splits)
        else:
            counts = {s: 0 if self.count else len(self.rows(s)) for s in splits}
        for variant in variants:
            self._check(variant, counts)
        templates = [
            with_options(template, self.options, self.shuffled_options)
            for template in self.templates
        ]
        names = []
        for variant in variants:
            suffix = "" if variant == "plain" else f"_{variant}"
            of_variant = {"train": counts["train"]} if variant == "train" else counts
            of_templates = _task_names(self.name_format + suffix, self.dataset, templates)
            for name, own, template in zip(of_templates, self.templates, templates, strict=True):
                trained = self.trained and own.name not in self.held_out_prompts
                self._add(name, template, variant, of_variant, trained)
            names += of_templates
        return names

    def _check(self, variant: str, counts: Collection[str]) -> None:
        if variant not in VARIANTS:
            raise UserError(
                f"Data set {self.dataset!r}: there is no variant {variant!r}."
                f"{suggest(variant, VARIANTS)} The variants are {', '.join(VARIANTS)}."
            )
        if variant == "train" and "train" not in counts:
            raise UserError(
                f"Data set {self.dataset!r}: the variant 'train' needs a split of this name; there "
                f"{'is' if len(counts) == 1 else 'are'} {', '.join(counts)}."
            )
        if variant != "rank":
            return
        for template in self.templates:
            if not template.answer_choices:
                raise UserError(
                    f"Data set {self.dataset!r}: template {template.name!r} has no answer_choices, "
                    "so there is nothing to rank; leave it out or take the variant 'generate'."
                )

    def _add(
        self, name: str, template: Template, variant: str, counts: Mapping[str, int], trained: bool
    ) -> None:
        describe(
            name,
            dataset=self.group or self.dataset,
            prompt=template.name,
            family=self.family,
            trained=trained,
            citation=self.citation,
            original=template.original_task,
            language=template.languages[0] if len(template.languages) == 1 else "",
        )
        seqio.TaskRegistry.add(
            name,
            source=PromptedDataSource(name, self, template, counts, variant),
            preprocessors=[
                *caching.HERE,
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos,
            ],
            output_features=dict(self.output_features),
            postprocess_fn=self.postprocess,
            metric_fns=[] if variant == "train" else list(self.metric_fns),
            shuffle_buffer_size=None,  # the source permutes the whole split
        )


def add_prompted_tasks(
    dataset: str,
    rows: Rows,
    templates: Sequence[Template],
    output_features: Mapping[str, seqio.Feature],
    splits: Mapping[str, int] | Sequence[str],
    metric_fns: Sequence[Callable[..., Any]],
    **more: Any,
) -> list[str]:
    """Registers one SeqIO Task for each template: the plain variant of a `PromptedTask`.

    All arguments are the fields of `PromptedTask`. Returns the tasks' names.

    Raises:
        UserError: no templates, or `held_out_prompts` names one that is not there.
    """
    task = PromptedTask(dataset, rows, templates, output_features, splits, metric_fns, **more)
    return task.register()

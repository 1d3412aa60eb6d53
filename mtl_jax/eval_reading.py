"""Registered tasks made ready for evaluation: all examples of a split as texts and tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalExample, EvalTask
from mtl_jax.mixtures import check_split, provider
from mtl_jax.packing import trim
from mtl_jax.reading import SIDES, Epoch, TaskReader, encode
from mtl_jax.sources import RowsDataSource
from mtl_jax.task_info import info

CHOICES_SEPARATOR = "|||"  # of PromptSource


def load_eval_task(
    name: str,
    split: str,
    inputs_length: int,
    targets_length: int,
    limit: int | None = None,
    seed: int = 0,
    *,
    whole: bool = False,
    use_cached: bool = False,
) -> EvalTask:
    """Reads a task for evaluation: all examples in order, or a drawn subset of `limit`.

    Longer inputs, targets and choices are cut and the examples counted in `truncated`; `seed`
    draws the subset, which stays in the order of the split.

    Args:
        name: of a registered task.
        split: one of its splits.
        inputs_length: encoder tokens of an example at most.
        targets_length: tokens of a target or a choice at most.
        limit: examples at most; None or 0: all.
        seed: of the subset.
        whole: cut nothing, for those who cut in ways of their own; tokens are then int32 arrays.
        use_cached: read SeqIO's offline cache, in the order of the split where the cache knows it.

    Raises:
        UserError: unknown task or split, a split without examples, or a task without its cache.
    """
    task = provider(name)
    if isinstance(task, seqio.Mixture):
        raise UserError(f"{name!r} is a mixture; evaluation takes its tasks one by one.")
    check_split(task, split)
    lengths = {"inputs": inputs_length, "targets": targets_length}
    reader = TaskReader(task, lengths, use_cached)
    read = list(reader.numbered(Epoch(split, shuffle=False, seed=seed)))
    if not read:
        raise UserError(f"Task {name!r}: its split {split!r} gives no examples.")
    found = _in_order(reader, split, read)
    if limit and limit < len(found):
        chosen = np.random.default_rng(seed).choice(len(found), limit, replace=False)
        found = [found[i] for i in sorted(chosen)]
    examples, truncated = [], 0
    for index, fields in found:
        example, cut = _eval_example(index, fields, reader, None if whole else lengths)
        examples.append(example)
        truncated += cut
    vocabulary = task.output_features["targets"].vocabulary
    of_inputs = task.output_features["inputs"].vocabulary.eos_id
    source = task.source
    return EvalTask(
        name=name,
        info=info(name),
        split=split,
        examples=examples,
        metric_fns=task.predict_metric_fns,
        score_metric_fns=task.score_metric_fns,
        postprocess=task.postprocessor,
        detokenize=lambda tokens: vocabulary.decode([int(token) for token in tokens]),
        truncated=truncated,
        eos_id=-1 if vocabulary.eos_id is None else int(vocabulary.eos_id),
        inputs_eos_id=-1 if of_inputs is None else int(of_inputs),
        eos_after_trim=reader.eos_after_trim("inputs") is not None,
        skipped=source.skipped(split) if isinstance(source, RowsDataSource) else None,
    )


def _in_order(
    reader: TaskReader, split: str, read: Sequence[tuple[int | None, dict[str, Any]]]
) -> list[tuple[int, dict[str, Any]]]:
    """The examples in the order of the split, each with its row's number where that is known."""
    examples = [example for _, example in read]
    if not reader.cached:
        numbers = _row_numbers(reader.task.source, split, len(read))
        return list(zip(numbers, examples, strict=True))
    known = {number: example for number, example in read if number is not None}
    # Numbers that come twice are of a preprocessor that makes several examples of a row.
    return sorted(known.items()) if len(known) == len(read) else list(enumerate(examples))


def _row_numbers(source: seqio.DataSource, split: str, count: int) -> Sequence[int]:
    """The row behind each example: the same under all prompts of a dataset, where that is known."""
    rows = source.kept(split) if isinstance(source, RowsDataSource) else None
    # A preprocessor that drops or adds examples leaves no way to tell.
    return rows if rows is not None and len(rows) == count else range(count)


def _eval_example(
    index: int, fields: dict[str, Any], reader: TaskReader, lengths: Mapping[str, int] | None
) -> tuple[EvalExample, bool]:
    features = reader.task.output_features
    targets_feature = features["targets"]
    joined = fields.get("answer_choices") or ""
    choices = [choice.strip() for choice in joined.split(CHOICES_SEPARATOR)] if joined else []
    # A choice gets what the targets of the task get: EOS if they end with it.
    eos = (
        bool(len(fields["targets"])) and fields["targets"][-1] == targets_feature.vocabulary.eos_id
    )
    sides = {side: np.asarray(fields.pop(side), np.int32) for side in SIDES}
    choice_tokens = [encode(choice, targets_feature, eos) for choice in choices]
    texts = {
        side: fields.pop(f"{side}_pretokenized", None)
        or features[side].vocabulary.decode([int(token) for token in tokens])
        for side, tokens in sides.items()
    }

    def example(sides: Mapping[str, Any], choice_tokens: list[Any]) -> EvalExample:
        return EvalExample(
            index=index,
            inputs=sides["inputs"],
            targets=sides["targets"],
            inputs_text=texts["inputs"],
            targets_text=texts["targets"],
            choices=choices,
            choice_tokens=choice_tokens,
            fields=fields,
        )

    if lengths is None:
        return example(sides, choice_tokens), False
    too_long = any(len(sides[side]) > lengths[side] for side in SIDES)
    too_long |= any(len(tokens) > lengths["targets"] for tokens in choice_tokens)
    cut = {
        side: trim(tokens, lengths[side], reader.eos_after_trim(side)).tolist()
        for side, tokens in sides.items()
    }
    end = reader.eos_after_trim("targets")
    cut_choices = [trim(tokens, lengths["targets"], end).tolist() for tokens in choice_tokens]
    return example(cut, cut_choices), too_long

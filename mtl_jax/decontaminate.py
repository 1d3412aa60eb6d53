"""`mtl-jax decontaminate`: evaluation inputs found in the training mixture, and their removal."""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_jax import overlap
    from mtl_jax.data_config import DataConfig

_AT_ONCE = 1024  # training examples held in memory
_SAMPLES = 3  # pairs shown of each training task
_SHOWN = 400  # characters of a text in a sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags besides those of the configuration."""
    parser.add_argument(
        "--mixture", default="", metavar="NAME", help="default: Data.mixture, or Mixture.name"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME",
        help="an evaluation task or mixture, or a glob; repeatable; default: Eval.tasks",
    )
    parser.add_argument("--split", default="", help="of the evaluation tasks; default: Eval.split")
    parser.add_argument(
        "--ngram",
        type=int,
        metavar="N",
        help="consecutive words that count as an overlap; default: 13, as GPT-3's",
    )
    parser.add_argument(
        "--shortest",
        type=int,
        metavar="N",
        help="words of an input, or a line of it, below N that counts as a whole; default: 8",
    )
    parser.add_argument(
        "--min_overlap",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="least share of an evaluation input's n-grams that a training example must have, up "
        "to 1; default: any of them",
    )
    parser.add_argument(
        "--output", default="", metavar="FILE", help="write all counts and samples as JSON"
    )
    parser.add_argument(
        "--remove",
        default="",
        metavar="FILE",
        help="write the training examples that overlap, and all of the same inputs, for "
        "Data.exclude",
    )


@dataclass
class TaskOverlap:
    """What was found of one training task.

    Attributes:
        task: its name.
        examples: that were read.
        contaminated: of them.
        by: how many overlap with each evaluation task.
        samples: the pairs that overlap most.
        rows: for `overlap.write_exclusions`: these, and all others of the same inputs.
    """

    task: str
    examples: int = 0
    contaminated: int = 0
    by: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def main(args: argparse.Namespace) -> int:
    """Reads the evaluation inputs and the whole training mixture, and tells what they share.

    Raises:
        UserError: an unknown task, a number out of range, or a file that cannot be written.
    """
    # Only now: the command's flags need no TensorFlow.
    import tqdm

    from mtl_jax import config, data, overlap
    from mtl_jax.errors import UserError

    if not 0 <= args.min_overlap <= 1:
        raise UserError(f"--min_overlap must be from 0 to 1, not {args.min_overlap}.")
    cfg = config.load_args(args)
    data.load_modules(cfg.data)
    made = data.build_mixture(cfg.mixture)
    mixture = args.mixture or cfg.data.mixture or made
    if not mixture:
        raise UserError("No mixture: give --mixture, Data.mixture or Mixture.name.")
    given = args.against or cfg.eval.tasks
    if not given:
        raise UserError("Nothing to compare with: give --against or Eval.tasks.")
    against = [task for name in data.expand(given) for task in data.task_names(name)]
    split = args.split or cfg.eval.split
    texts = {task: _inputs(task, split, cfg.data) for task in dict.fromkeys(against)}
    ngram = overlap.NGRAM if args.ngram is None else args.ngram
    shortest = overlap.SHORTEST if args.shortest is None else args.shortest
    index = overlap.OverlapIndex(texts, ngram, shortest)
    trained = [task for task, rate in data.rates_of(mixture).items() if rate]
    hit: set[int] = set()
    found = [
        _scan(index, task, cfg.data, args.min_overlap, hit)
        for task in tqdm.tqdm(trained, disable=None, unit="task")
    ]
    report = _report(index, found, hit) | {
        "mixture": mixture,
        "split": cfg.data.split,
        "evaluation_split": split,
        "ngram": ngram,
        "shortest": shortest,
        "min_overlap": args.min_overlap,
    }
    _print(report)
    _write(args, report, found)
    return 0


def _inputs(task: str, split: str, config: "DataConfig") -> Iterator[str]:
    for inputs, _, _ in _texts(task, split, config):
        yield inputs


def _texts(task: str, split: str, config: "DataConfig") -> Iterator[tuple[str, str, str]]:
    """Inputs, targets and the fingerprint of the inputs, of all examples in their order."""
    import seqio

    from mtl_jax.mixtures import check_split
    from mtl_jax.reading import Epoch, TaskReader

    found = seqio.TaskRegistry.get(task)
    check_split(found, split)
    lengths = {"inputs": config.inputs_length, "targets": config.targets_length}
    reader = TaskReader(found, lengths, config.use_cached)
    return reader.texts(Epoch(split, shuffle=False, seed=0))


def _scan(
    index: "overlap.OverlapIndex", task: str, config: "DataConfig", least: float, hit: set[int]
) -> TaskOverlap:
    """Compares all examples of a training task; adds the evaluation examples found to `hit`."""
    found = TaskOverlap(task)
    digits: list[str] = []  # of all inputs
    out: set[str] = set()
    examples = _texts(task, config.split, config)
    while batch := list(itertools.islice(examples, _AT_ONCE)):
        matches: dict[int, list[overlap.Match]] = {}
        # The answer may be what was leaked, too.
        joined = (f"{inputs}\n{targets}" for inputs, targets, _ in batch)
        for match in index.scan(joined, least):
            matches.setdefault(match.text, []).append(match)
        for number, of_one in sorted(matches.items()):
            inputs = batch[number][0]
            out.add(batch[number][2])
            row = found.examples + number
            hit.update(match.example for match in of_one)
            found.by.update({index.task_of[match.example] for match in of_one})
            best = max(of_one, key=lambda match: match.overlap)
            found.samples.append(_sample(index, best, row, inputs))
        # The greatest overlaps first; those of a tie in order.
        found.samples.sort(key=lambda sample: -sample["overlap"])
        del found.samples[_SAMPLES:]
        found.contaminated += len(matches)
        found.examples += len(batch)
        digits += [of_one for _, _, of_one in batch]
    # Training knows examples by their inputs, so those that share them with one found go, too:
    # where only the answer overlaps they are not found themselves.
    found.rows = [
        {"task": task, "split": config.split, "row": row, "inputs": of_one}
        for row, of_one in enumerate(digits)
        if of_one in out
    ]
    return found


def _sample(
    index: "overlap.OverlapIndex", match: "overlap.Match", row: int, inputs: str
) -> dict[str, Any]:
    return {
        "row": row,
        "inputs": _short(inputs),
        "evaluation_task": index.task_of[match.example],
        "evaluation_row": index.row_of[match.example],
        "evaluation_inputs": _short(index.texts[match.example]),
        "overlap": round(match.overlap, 4),
    }


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _report(
    index: "overlap.OverlapIndex", found: Sequence[TaskOverlap], hit: set[int]
) -> dict[str, Any]:
    """All counts, for JSON."""
    examples = Counter(index.task_of)
    contaminated = Counter(index.task_of[example] for example in hit)
    blind = Counter(
        task for task, size in zip(index.task_of, index.sizes.tolist(), strict=True) if not size
    )
    return {
        "training": [
            {
                "task": one.task,
                "examples": one.examples,
                "contaminated": one.contaminated,
                "share": one.contaminated / one.examples if one.examples else 0.0,
                "by": dict(one.by.most_common()),
                "samples": one.samples,
            }
            for one in found
        ],
        "evaluation": [
            {
                "task": task,
                "examples": count,
                "contaminated": contaminated[task],
                "share": contaminated[task] / count,
                "too_short": blind[task],
            }
            for task, count in examples.items()
        ],
    }


def _print(report: dict[str, Any]) -> None:
    """The tasks with an overlap, and one of the pairs."""
    training, evaluation = report["training"], report["evaluation"]
    found = sum(row["contaminated"] for row in training)
    whole = sum(row["examples"] for row in training)
    print(
        f"{found:,} of {whole:,} training examples in {report['mixture']} overlap with "
        f"{sum(row['contaminated'] for row in evaluation):,} of "
        f"{sum(row['examples'] for row in evaluation):,} evaluation examples."
    )
    blind = sum(row["too_short"] for row in evaluation)
    if blind:
        print(
            f"{blind:,} evaluation examples have too few words of their own to be found "
            f"(--shortest={report['shortest']})."
        )
    for title, rows in (("training task", training), ("evaluation task", evaluation)):
        cells = [
            [row["task"], f"{row['examples']:,}", f"{row['contaminated']:,}", f"{row['share']:.1%}"]
            for row in rows
            if row["contaminated"]
        ]
        if cells:
            print()
            _print_table([[title, "examples", "overlap", "share"], *cells])
    most = max(training, key=lambda row: row["contaminated"], default=None)
    if most and most["samples"]:
        sample = most["samples"][0]
        print(
            f"\n{most['task']}, row {sample['row']}:\n{sample['inputs']}\n\n"
            f"{sample['evaluation_task']}, row {sample['evaluation_row']}, "
            f"{sample['overlap']:.0%} of its n-grams:\n{sample['evaluation_inputs']}"
        )


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *numbers in lines:
        right = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *right]))


def _write(args: argparse.Namespace, report: dict[str, Any], found: Sequence[TaskOverlap]) -> None:
    import json

    from mtl_jax import overlap
    from mtl_jax.storage import replace_text, storage_errors

    if args.output:
        path = Path(args.output)
        with storage_errors(f"write {path.name}", path.parent):
            replace_text(path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        print(f"\nAll counts and samples: {path}")
    if args.remove:
        rows = [row for one in found for row in one.rows]
        overlap.write_exclusions(Path(args.remove), rows)
        print(f"\nNot to be trained on, {len(rows):,} examples: Data.exclude = {args.remove!r}")

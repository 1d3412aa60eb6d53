"""`mtl-jax tasks`: lists what is registered and shows examples as the model sees them."""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mtl_jax.reading import TaskReader

_TOKENS_SHOWN = 24

# What `mtl-jax tasks` knows without --module; the second group reads the data folder.
SHIPPED = ("mtl_jax.tasks.embedded",)
SHIPPED_WITH_DATA = ("mtl_jax.tasks.p3", "mtl_jax.tasks.super_glue", "mtl_jax.tasks.pretrain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `mtl-jax tasks` and `mtl-jax tasks show`."""
    actions = parser.add_subparsers(dest="action", metavar="list | show")
    listing = actions.add_parser("list", help="list tasks and mixtures (the default)")
    show = actions.add_parser("show", help="print examples of a task as text, tokens and lengths")
    for target in (parser, listing):
        target.add_argument(
            "--counts", action="store_true", help="also count the examples; may read data files"
        )
    listing.add_argument("filter", nargs="?", default="", help="only names that contain this")
    show.add_argument("name", help="a registered task")
    show.add_argument("-n", type=int, default=3, help="how many examples (default: 3)")
    show.add_argument("--split", default="", help="default: train, or the task's first split")
    show.add_argument("--inputs_length", type=int, default=512, help="marks longer inputs")
    show.add_argument("--targets_length", type=int, default=128, help="marks longer targets")
    for target in (parser, listing, show):
        # The default is left out below, or `tasks --module m show` would lose m again.
        target.add_argument(
            "--module",
            action="append",
            default=[] if target is parser else argparse.SUPPRESS,
            metavar="MODULE",
            help="list this Python module's registrations instead of the shipped ones (repeatable)",
        )
        target.add_argument(
            "--data_dir",
            default="" if target is parser else argparse.SUPPRESS,
            help="the data folder; default: the environment variable MTL_JAX_DATA",
        )


def main(args: argparse.Namespace) -> int:
    """Runs the command and returns the exit status.

    Raises:
        UserError: an unknown module, task or split; bad data.
    """
    # Only now, for TensorFlow takes seconds and `--help` needs none.
    from mtl_jax.data import DataConfig, load_modules

    has_data = args.data_dir or os.environ.get("MTL_JAX_DATA")
    shipped = SHIPPED + SHIPPED_WITH_DATA if has_data else SHIPPED
    load_modules(DataConfig(task_modules=args.module or shipped, data_dir=args.data_dir))
    if args.action == "show":
        _show(args, sys.stdout)
    else:
        _list(getattr(args, "filter", ""), args.counts, sys.stdout)
    return 0


def _list(part: str, counts: bool, out: TextIO) -> None:
    import seqio

    from mtl_jax.errors import suggest
    from mtl_jax.mixtures import count_examples
    from mtl_jax.task_info import info

    tasks = sorted(name for name in seqio.TaskRegistry.names() if part in name)
    mixtures = sorted(name for name in seqio.MixtureRegistry.names() if part in name)
    if not tasks and not mixtures:
        known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
        if not known:
            print(
                "Nothing is registered. Name the modules of your tasks: --module my_task", file=out
            )
        else:
            print(f"None of {len(known)} names contains {part!r}.{suggest(part, known)}", file=out)
        return
    rows = []
    for name in tasks:
        task, about = seqio.TaskRegistry.get(name), info(name)
        splits = list(task.splits)
        row = [name, about.dataset, about.prompt or "-", about.family or "-", ",".join(splits)]
        if counts:
            found = [count_examples(task, split) for split in splits]
            row.append(",".join("?" if count is None else str(count) for count in found))
        rows.append(row)
    if rows:
        header = ["task", "dataset", "prompt", "family", "splits", *["examples"] * counts]
        print_table(header, rows, out)
        print(f"{len(rows)} task{'s' * (len(rows) != 1)}", file=out)
    if mixtures:
        print(file=out)
        found_mixtures = [
            [name, str(len(seqio.MixtureRegistry.get(name).tasks))] for name in mixtures
        ]
        print_table(["mixture", "tasks"], found_mixtures, out)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> None:
    """Prints columns wide enough for their texts, underlined headers, no trailing blanks."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=out)


def _show(args: argparse.Namespace, out: TextIO) -> None:
    import itertools

    import seqio

    from mtl_jax.errors import UserError
    from mtl_jax.mixtures import check_split, provider
    from mtl_jax.reading import SIDES, Epoch, TaskReader
    from mtl_jax.task_info import info

    if args.n < 0:
        raise UserError(f"-n must be at least 0, not {args.n}.")
    task = provider(args.name)
    if isinstance(task, seqio.Mixture):
        names = ", ".join(each.name for each in task.tasks[:5])
        raise UserError(
            f"{args.name!r} is a mixture of {len(task.tasks)} tasks; show one of them, "
            f"such as {names}."
        )
    split = args.split or ("train" if "train" in task.splits else task.splits[0])
    check_split(task, split)
    lengths = {"inputs": args.inputs_length, "targets": args.targets_length}
    reader = TaskReader(task, lengths)
    about = info(task.name)
    facts = [("dataset", about.dataset), ("prompt", about.prompt), ("family", about.family)]
    facts += [("split", f"{split} (of {', '.join(task.splits)})"), ("source", about.citation)]
    print(task.name, file=out)
    for label, value in facts:
        if value:
            print(f"  {label:8} {value}", file=out)
    examples = reader.examples(Epoch(split, shuffle=False, seed=0))
    shown = 0
    for fields in itertools.islice(examples, args.n):
        print(f"\nexample {shown}", file=out)
        for side in SIDES:
            _print_side(side, fields, reader, lengths[side], out)
        if fields.get("answer_choices"):
            print(f"  choices  {fields['answer_choices']}", file=out)
        shown += 1
    if not shown and args.n:
        raise UserError(f"Task {task.name!r}: its split {split!r} gives no examples.")


def _print_side(
    side: str, fields: dict[str, Any], reader: "TaskReader", length: int, out: TextIO
) -> None:
    tokens = [int(token) for token in fields[side]]
    vocabulary = reader.task.output_features[side].vocabulary
    text = fields.get(f"{side}_pretokenized") or vocabulary.decode(tokens)
    width = max(40, shutil.get_terminal_size().columns)
    wrapped = [
        piece
        for line in text.splitlines() or [""]
        for piece in textwrap.wrap(line, width - 11, replace_whitespace=False) or [""]
    ]
    for number, line in enumerate(wrapped):
        print(f"  {side if not number else '':8} {line}".rstrip(), file=out)
    listed = " ".join(map(str, tokens[:_TOKENS_SHOWN]))
    more = f" ... ({len(tokens) - _TOKENS_SHOWN} more)" if len(tokens) > _TOKENS_SHOWN else ""
    for line in textwrap.wrap(f"{listed}{more}", width - 11):
        print(f"  {'':8} {line}", file=out)
    over = f", longer than {length}: will be cut" if len(tokens) > length else ""
    print(f"  {'':8} {len(tokens)} tokens, {len(text)} characters{over}", file=out)

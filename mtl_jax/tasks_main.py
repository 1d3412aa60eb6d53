"""`mtl-jax tasks`: lists what is registered and shows examples as the model sees them."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mtl_jax.errors import UserError, suggest

if TYPE_CHECKING:
    import seqio

    from mtl_jax.reading import TaskReader
    from mtl_jax.tasks.prompts import Template

_TOKENS_SHOWN = 24
_LENGTHS = {"inputs": 512, "targets": 128}

# What `mtl-jax tasks` knows without --module, as far as it can be loaded: most need parts of the
# data folder, the last two a vocabulary alone.
SHIPPED = (
    *("mtl_jax.tasks.embedded", "mtl_jax.tasks.p3", "mtl_jax.tasks.t0", "mtl_jax.tasks.super_glue"),
    *("mtl_jax.tasks.pretrain", "mtl_jax.tasks.sni", "mtl_jax.tasks.cot"),
    *("mtl_jax.tasks.library", "mtl_jax.tasks.multilingual"),
)


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
    show.add_argument(
        "name",
        nargs="?",
        default="",
        help="a registered task, or a dataset: then all its prompts, or the one of --prompt; with "
        "--template the dataset in that file, where it has several",
    )
    show.add_argument("--prompt", default="", help="the name of a prompt of the dataset")
    show.add_argument(
        "-n", type=int, help="how many examples (default: 3; 1 each where there are several tasks)"
    )
    show.add_argument("--split", default="", help="default: train, or the task's first split")
    show.add_argument(
        "--counts", action="store_true", help="also count the split's rows, and those skipped"
    )
    for side, length in _LENGTHS.items():
        show.add_argument(
            f"--{side}_length", type=int, help=f"marks longer {side} (default: {length})"
        )
    show.add_argument(
        "--template",
        default="",
        metavar="FILE",
        help="show templates that are not registered: a YAML or JSONL file, or a folder",
    )
    show.add_argument(
        "--rows", default="", metavar="FILE", help="the rows for --template: JSONL, TSV or Parquet"
    )
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
        UserError: an unknown module, task, prompt or split; bad data; a broken template.
    """
    if args.action == "show" and (args.template or args.rows):
        _show_templates(args, sys.stdout)
        return 0
    # Only now, for TensorFlow takes seconds and `--help` needs none.
    from mtl_jax.data import DataConfig, load_modules

    load_modules(DataConfig(task_modules=args.module, data_dir=args.data_dir))
    missing = [] if args.module else _load_shipped()
    if args.action != "show":
        _print_missing(missing)
        _list(getattr(args, "filter", ""), args.counts, sys.stdout)
        return 0
    try:
        _show(args, sys.stdout)
    except UserError:
        _print_missing(missing)  # one of these may have the task that was asked for
        raise
    return 0


def _load_shipped() -> list[tuple[str, UserError]]:
    """Imports the modules of SHIPPED; returns those that cannot be had here, with the reason."""
    from mtl_jax.data import DataConfig, load_modules

    missing = []
    for module in SHIPPED:
        try:
            load_modules(DataConfig(task_modules=[module]))
        except UserError as error:
            missing.append((module, error))
    return missing


def _print_missing(missing: Sequence[tuple[str, UserError]]) -> None:
    for module, error in missing:
        print(f"not listed: {module} ({error})", file=sys.stderr)


def _list(part: str, counts: bool, out: TextIO) -> None:
    import seqio

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
    names = _tasks_to_show(args.name, args.prompt)
    n = _number(args.n, len(names))
    for number, name in enumerate(names):
        if number:
            print(file=out)
        _show_task(name, n, args, out)


def _number(n: int | None, things: int) -> int:
    n = (3 if things == 1 else 1) if n is None else n
    if n < 0:
        raise UserError(f"-n must be at least 0, not {n}.")
    return n


def _tasks_to_show(name: str, prompt: str) -> list[str]:
    """The task of a name; or the tasks of a dataset, or the one of its prompt.

    Raises:
        UserError: there is no such task, dataset or prompt, or the prompt has several tasks.
    """
    import seqio

    from mtl_jax.mixtures import provider
    from mtl_jax.task_info import described, info
    from mtl_jax.tasks.prompts import prompt_slug

    if not name:
        raise UserError("Name a task or a dataset to show; `mtl-jax tasks` lists them.")
    registered = set(seqio.TaskRegistry.names())
    abouts = [about for about in described().values() if about.task in registered]
    if name in registered and not prompt:
        return [name]
    if name in seqio.MixtureRegistry.names():
        tasks = [task.name for task in seqio.MixtureRegistry.get(name).tasks]
        raise UserError(
            f"{name!r} is a mixture of {len(tasks)} tasks; show one of them, such as "
            f"{', '.join(tasks[:5])}."
        )
    dataset = prompt_slug(info(name).dataset if name in registered else name)
    found = [about for about in abouts if prompt_slug(about.dataset) == dataset]
    if not found:
        # Complains of an unknown name, and knows those of tasks and mixtures.
        near = suggest(name, {about.dataset for about in abouts})
        if near:
            raise UserError(f"No task or dataset {name!r} is registered.{near}")
        provider(name)
    if not prompt:
        return sorted(about.task for about in found)
    slug = prompt_slug(prompt)
    fitting = [about for about in found if slug in (prompt_slug(about.prompt), about.task)]
    exact = [about for about in fitting if about.prompt == prompt] or fitting
    plain = [about for about in exact if not about.shots] or exact
    if not plain:
        known = list(dict.fromkeys(about.prompt for about in found if about.prompt))
        raise UserError(
            f"Dataset {found[0].dataset!r} has no prompt {prompt!r}.{suggest(prompt, known)} "
            f"It has: {', '.join(known[:8])}{f' and {len(known) - 8} more' * (len(known) > 8)}."
        )
    if len(plain) > 1:
        tasks = sorted(about.task for about in plain)
        raise UserError(
            f"Prompt {plain[0].prompt!r} has {len(tasks)} tasks; show one: {', '.join(tasks)}."
        )
    return [plain[0].task]


def _show_task(name: str, n: int, args: argparse.Namespace, out: TextIO) -> None:
    import itertools

    import seqio

    from mtl_jax.mixtures import check_split
    from mtl_jax.reading import SIDES, Epoch, TaskReader
    from mtl_jax.task_info import info

    task = seqio.TaskRegistry.get(name)
    split = args.split or ("train" if "train" in task.splits else task.splits[0])
    check_split(task, split)
    given = {side: getattr(args, f"{side}_length") for side in SIDES}
    lengths = {side: _LENGTHS[side] if given[side] is None else given[side] for side in SIDES}
    reader = TaskReader(task, lengths)
    about = info(task.name)
    facts = [("dataset", about.dataset), ("prompt", about.prompt), ("family", about.family)]
    facts += [("split", f"{split} (of {', '.join(task.splits)})"), ("source", about.citation)]
    if args.counts:
        facts.append(("rows", _count(task, split)))
    _print_facts(task.name, facts, out)
    examples = reader.examples(Epoch(split, shuffle=False, seed=0))
    shown = 0
    for fields in itertools.islice(examples, n):
        print(f"\nexample {shown}", file=out)
        for side in SIDES:
            _print_side(side, fields, reader, lengths[side], out)
        if fields.get("answer_choices"):
            print(f"  choices  {fields['answer_choices']}", file=out)
        shown += 1
    if not shown and n:
        raise UserError(f"Task {task.name!r}: its split {split!r} gives no examples.")


def _count(task: "seqio.Task", split: str) -> str:
    """Reads a whole split of a source and says how many rows gave no example."""
    from mtl_jax.sources import RowsDataSource

    source = task.source
    if isinstance(source, RowsDataSource):
        examples = sum(1 for _ in source.examples(split, shuffle=False))
        skipped = source.skipped(split) or 0
        return f"{examples + skipped}, of which {skipped} skipped"
    return str(sum(1 for _ in source.get_dataset(split, shuffle=False)))


def _show_templates(args: argparse.Namespace, out: TextIO) -> None:
    """Renders every template of a file, or the one of --prompt, over the rows of another file.

    Raises:
        UserError: flags that do not go together, a file that cannot be read, or a broken template.
    """
    from mtl_jax.row_files import read_rows
    from mtl_jax.tasks.prompts import load_templates

    for flag, other in (("template", "rows"), ("rows", "template")):
        if not getattr(args, flag):
            raise UserError(f"--{other} needs --{flag} FILE too.")
    for flag in ("split", "inputs_length", "targets_length", "module", "data_dir"):
        if getattr(args, flag):
            raise UserError(f"--{flag} is for registered tasks; --template has none.")
    only = [args.prompt] if args.prompt else None
    templates = load_templates(args.template, args.name, names=only)
    n = _number(args.n, len(templates))
    rows = [(f"{args.rows}, {name}", row) for name, row in read_rows(args.rows)]
    broken = []
    for number, template in enumerate(templates):
        if number:
            print(file=out)
        try:
            _show_template(template, rows, n, out)
        except UserError as error:
            if len(templates) == 1:
                raise
            broken.append(template.name)
            print(f"{template.name}\n  broken   {error}", file=out)
    if broken:
        names = ", ".join(map(repr, broken))
        raise UserError(f"{len(broken)} of {len(templates)} templates are broken: {names}.")


def _show_template(
    template: "Template", rows: Sequence[tuple[str, dict[str, Any]]], n: int, out: TextIO
) -> None:
    from mtl_jax.tasks.preview import preview

    found = preview(template, rows, n)
    said = [name for name in ("original_task", "choices_in_prompt") if getattr(template, name)]
    facts = [("metadata", ", ".join([*said, *template.languages, *template.metrics]))]
    facts += [("source", template.reference)]
    facts += [("rows", f"{found.rows}, of which {found.skipped} skipped")]
    if found.unlisted:
        facts.append(("warning", f"the target is none of the choices: {found.unlisted}"))
    _print_facts(template.name, facts, out)
    for name, rendered in found.examples:
        print(f"\n{name}", file=out)
        for side in ("inputs", "targets"):
            _print_text(side, getattr(rendered, side), out)
        if rendered.choices:
            _print_text("choices", " ||| ".join(rendered.choices), out)


def _print_facts(name: str, facts: Sequence[tuple[str, str]], out: TextIO) -> None:
    print(name, file=out)
    for label, value in facts:
        if value:
            print(f"  {label:8} {value}", file=out)


def _print_side(
    side: str, fields: dict[str, Any], reader: "TaskReader", length: int, out: TextIO
) -> None:
    tokens = [int(token) for token in fields[side]]
    vocabulary = reader.task.output_features[side].vocabulary
    text = fields.get(f"{side}_pretokenized") or vocabulary.decode(tokens)
    _print_text(side, text, out)
    listed = " ".join(map(str, tokens[:_TOKENS_SHOWN]))
    more = f" ... ({len(tokens) - _TOKENS_SHOWN} more)" if len(tokens) > _TOKENS_SHOWN else ""
    for line in textwrap.wrap(f"{listed}{more}", _width()):
        print(f"  {'':8} {line}", file=out)
    over = f", longer than {length}: will be cut" if len(tokens) > length else ""
    print(f"  {'':8} {len(tokens)} tokens, {len(text)} characters{over}", file=out)


def _print_text(label: str, text: str, out: TextIO) -> None:
    wrapped = [
        piece
        for line in text.splitlines() or [""]
        for piece in textwrap.wrap(line, _width(), replace_whitespace=False) or [""]
    ]
    for number, line in enumerate(wrapped):
        print(f"  {'' if number else label:8} {line}".rstrip(), file=out)


def _width() -> int:
    return max(40, shutil.get_terminal_size().columns) - 11

"""The tables of docs/tasks.md; `python -m mtl_jax.tasks.benchmarks.tables` prints them."""

from collections.abc import Iterable, Sequence

from mtl_jax.tasks.benchmarks.catalogue import DATASETS, MULTILINGUAL
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.prompts import prompt_slug

# Data sets that differ in a part of their name alone share a line.
_PARTS = {"mmlu": "{subject}", "bbh": "{task}", "xnli": "{language}"}

Lines = dict[str, list[Dataset]]


def lines() -> Lines:
    """The data sets by what the line of a table calls them: `glue_cola`, `mmlu_{subject}`."""
    found: Lines = {}
    for dataset in (*DATASETS, *MULTILINGUAL):
        name = dataset.name
        if part := _PARTS.get(dataset.benchmark):
            name = f"{dataset.benchmark}_{part}"
        if dataset.benchmark == "bbh":  # three kinds of tasks have prompts of their own
            name += f", {dataset.prompts.removeprefix('bbh_')}"
        found.setdefault(name, []).append(dataset)
    return found


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in body)


def _sizes(datasets: Sequence[Dataset]) -> str:
    totals: dict[str, int] = {}
    for dataset in datasets:
        for split, size in (dataset.sizes or dataset.origin.splits).items():
            totals[split] = totals.get(split, 0) + size
    return ", ".join(f"{split} {size:,}" for split, size in totals.items())


def _name(name: str, datasets: Sequence[Dataset]) -> str:
    plain, _, kind = name.partition(", ")
    kind = f" ({kind})" if kind else ""
    return f"`{plain}`{kind}" + (f", {len(datasets)}" if len(datasets) > 1 else "")


def task_table() -> str:
    """What is registered: a line for each data set, or for those that share one."""
    rows = []
    for name, datasets in lines().items():
        first = datasets[0]
        metrics = [fn.__name__ for fn in first.metric_fns]
        if first.benchmark == "bbh":
            metrics = sorted({fn.__name__ for d in datasets for fn in d.metric_fns})
        prompts = [prompt_slug(template.name) for template in first.templates()]
        rows.append(
            [
                _name(name, datasets),
                f"`{first.benchmark}`",
                _code(prompts),
                _code(metrics),
                _sizes(datasets),
            ]
        )
    return _table(["data set", "mixture", "prompts", "metrics", "rows as published"], rows)


def source_table() -> str:
    """Where the rows come from: fields, places, licence, citation."""
    rows = []
    for name, datasets in lines().items():
        first = datasets[0]
        origin, hub = first.origin, first.origin.huggingface
        several = len(datasets) > 1 and len({d.origin for d in datasets}) > 1
        where = f"{hub.path} {hub.config or ''}".strip() if hub else ""
        if several and hub and hub.config:
            where = f"{hub.path} {name.split('_', 1)[1].partition(', ')[0]}"
        tfds = f"`{origin.tfds.name}`" if origin.tfds else "-"
        rows.append(
            [
                _name(name, datasets),
                origin.described(),
                tfds,
                f"`{where}`" if where else "-",
                first.license or "not stated",
                first.citation,
            ]
        )
    header = ["data set", "fields", "TFDS", "Hugging Face", "licence", "citation"]
    return _table(header, rows)


if __name__ == "__main__":
    print(task_table())
    print(source_table())

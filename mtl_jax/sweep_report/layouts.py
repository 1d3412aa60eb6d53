"""Tables of a report as plain values: lines side by side, T0's table, the worst prompts."""

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from mtl_jax import tables
from mtl_jax.sweep_report.gather import Checkpoint, Material, Result
from mtl_jax.sweep_report.lines import Line

# The evaluation of Sanh et al., Multitask Prompted Training Enables Zero-Shot Task Generalization,
# 2022: the datasets in the order of its figure; the rounds of ANLI count one by one.
T0_DATASETS = {
    "super_glue_rte": "RTE",
    "super_glue_cb": "CB",
    "anli_r1": "ANLI R1",
    "anli_r2": "ANLI R2",
    "anli_r3": "ANLI R3",
    "super_glue_wsc_fixed": "WSC",
    "winogrande_winogrande_xl": "WinoGrande",
    "super_glue_copa": "COPA",
    "hellaswag": "HellaSwag",
    "story_cloze_2016": "StoryCloze",
    "super_glue_wic": "WiC",
}
T0_PROTOCOL = "t0"
_WORST = 3  # prompts of a dataset


def digits(line: Line) -> int:
    """Decimals of a line's values."""
    return tables.digits([*(value for _, value in line.prompts), *line.baselines.values()])


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Lines that differ in one thing, in one row: `cells` has one (or None) for each column."""

    first: Line
    cells: tuple[Line | None, ...]

    @property
    def best(self) -> int | None:
        """The column with the highest mean; None: there is only one, or a tie."""
        means = [line.mean for line in self.cells if line is not None]
        top = max(means)
        places = [i for i, line in enumerate(self.cells) if line is not None and line.mean == top]
        return places[0] if len(places) == 1 and len(means) > 1 else None


def side_by_side(
    found: Sequence[Line], column: Callable[[Line], Hashable], columns: Sequence[Hashable]
) -> list[SideBySide]:
    """Lines under their first metric, those that agree in all but `column` in one row.

    Rows with a single cell are left out: there is nothing to compare.
    """
    rows: dict[Hashable, dict[Hashable, Line]] = {}
    for line in found:
        if line.main:
            facts = {
                "checkpoint": line.view.checkpoint,
                "shots": line.view.shots,
                "protocol": line.view.protocol,
            }
            rest = tuple(value for value in facts.values() if value != column(line))
            key = (rest, line.dataset, line.split, line.metric)
            rows.setdefault(key, {})[column(line)] = line
    return [
        SideBySide(next(iter(by_column.values())), tuple(by_column.get(c) for c in columns))
        for by_column in rows.values()
        if len(by_column) > 1
    ]


@dataclasses.dataclass(frozen=True)
class T0Row:
    """Mean and median over the original prompts of each of T0's datasets, and their averages."""

    checkpoint: Checkpoint
    cells: Mapping[str, tuple[float, float, int]]  # column -> mean, median, prompts

    @property
    def average(self) -> tuple[float, float]:
        """Over the datasets of the row: of the means and of the medians."""
        values = np.array([cell[:2] for cell in self.cells.values()])
        mean, median = values.mean(axis=0)
        return float(mean), float(median)


@dataclasses.dataclass(frozen=True)
class T0Table:
    """A row for each checkpoint; the columns are those datasets that some row has."""

    columns: tuple[str, ...]
    rows: tuple[T0Row, ...]


def t0_table(material: Material) -> T0Table:
    """T0's table: zero-shot accuracy of every checkpoint, ranked as there, original prompts alone.

    A dataset counts with one split for all checkpoints, as in the paper with that for validation;
    where that is not there, with the first, which the column's title then names.
    """
    found: dict[str, dict[tuple[str, str], dict[Checkpoint, list[float]]]] = {}
    for result in material.results:
        value = result.values.get((T0_PROTOCOL, "accuracy"))
        if value is not None and result.original and result.shots == 0:
            by_source = found.setdefault(_t0_name(result), {})
            by_checkpoint = by_source.setdefault((result.dataset, result.split), {})
            by_checkpoint.setdefault(result.checkpoint, []).append(value)
    columns: dict[str, dict[Checkpoint, list[float]]] = {}
    for name, title in T0_DATASETS.items():
        if name in found:
            # The sort keeps the order of those that are alike.
            source, *_ = sorted(found[name], key=lambda source: not _is_validation(source[1]))
            split = source[1]
            title = title if _is_validation(split) else f"{title} ({split})"
            columns[title] = found[name][source]
    rows = []
    for checkpoint in material.checkpoints:
        cells = {}
        for title, by_checkpoint in columns.items():
            if checkpoint in by_checkpoint:
                values = by_checkpoint[checkpoint]
                mean, median, _ = tables.over_prompts(values)
                cells[title] = (mean, median, len(values))
        if cells:
            rows.append(T0Row(checkpoint, cells))
    return T0Table(tuple(columns), tuple(rows))


def _t0_name(result: Result) -> str:
    """The dataset as the library of tasks names it; PromptSource has `super_glue_wsc.fixed`.

    There ANLI is one dataset, whose rounds are splits such as `dev_r1`.
    """
    name = re.sub(r"\W", "_", result.dataset)
    number = re.search(r"_r[123]$", result.split)
    return name + number[0] if name == "anli" and number else name


def _is_validation(split: str) -> bool:
    return split.startswith(("validation", "dev"))


@dataclasses.dataclass(frozen=True)
class WorstPrompt:
    """A prompt at the lower end of its dataset."""

    line: Line
    prompt: str
    value: float
    behind: float  # the best prompt
    text: str  # what the model was asked, for one example; empty: not known


def worst_prompts(found: Sequence[Line], checkpoint: Checkpoint) -> list[WorstPrompt]:
    """The lowest prompts of each dataset with at least two, those furthest behind first."""
    worst = []
    for line in found:
        if not (line.own and line.main) or line.view.checkpoint != checkpoint:
            continue
        ranked = sorted(zip(line.prompts, line.results, strict=True), key=lambda pair: pair[0][1])
        best = ranked[-1][0][1]
        for (prompt, value), result in ranked[: min(_WORST, len(ranked) - 1)]:
            text = next((str(s.row.get("inputs", "")) for s in result.samples), "")
            worst.append(WorstPrompt(line, prompt, value, best - value, text))
    return sorted(worst, key=lambda one: -one.behind)


def curves(found: Sequence[Line], shots: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Dataset -> run -> (step, mean) under the dataset's own protocol, for runs of several steps.

    The name "" is the average over the datasets that every step of every such run has.
    """
    steps: dict[str, set[int]] = {}
    for line in found:
        steps.setdefault(line.view.checkpoint.run, set()).add(line.view.checkpoint.step)
    runs = [run for run, known in steps.items() if len(known) > 1]
    by_dataset: dict[str, dict[str, dict[int, float]]] = {}
    for line in found:
        run, step = line.view.checkpoint.run, line.view.checkpoint.step
        if line.own and line.main and line.view.shots == shots and run in runs:
            by_dataset.setdefault(line.dataset, {}).setdefault(run, {})[step] = line.mean
    whole = [
        by_run
        for by_run in by_dataset.values()
        if all(by_run.get(run, {}).keys() == steps[run] for run in runs)
    ]
    if len(whole) > 1:
        average = {
            run: {
                step: float(np.mean([by_run[run][step] for by_run in whole])) for step in steps[run]
            }
            for run in runs
        }
        by_dataset = {"": average, **by_dataset}
    return {
        dataset: {run: sorted(points.items()) for run, points in by_run.items()}
        for dataset, by_run in by_dataset.items()
    }


def truncated(material: Material, share: float = 0.01) -> list[str]:
    """The tasks of which more than a share of the examples was cut."""
    return list(
        dict.fromkeys(
            result.task for result in material.results if result.truncated > share * result.n
        )
    )


def few_exemplars(material: Material) -> list[str]:
    """The tasks that had fewer solved examples in their inputs than asked for, and how many."""
    least: dict[tuple[str, int], float] = {}
    for result in material.results:
        if result.exemplars is not None and result.exemplars < result.shots:
            key = result.task, result.shots
            least[key] = min(result.exemplars, least.get(key, result.exemplars))
    # Rounded down: 1.999 of 2 shall not read as 2 of 2.
    return [
        f"{task} ({math.floor(100 * mean) / 100:g} of {shots})"
        for (task, shots), mean in least.items()
    ]

"""Tables of a report as plain values: lines side by side, T0's table, the worst prompts."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from mtl_jax import tables
from mtl_jax.sweep_report.gather import Checkpoint, Material
from mtl_jax.sweep_report.lines import Line, View, in_view

# The evaluation of Sanh et al., Multitask Prompted Training Enables Zero-Shot Task Generalization,
# 2022: the datasets in the order of its figure, by PromptSource's names.
T0_DATASETS = {
    "super_glue_rte": "RTE",
    "super_glue_cb": "CB",
    "anli": "ANLI",
    "super_glue_wsc.fixed": "WSC",
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


def t0_table(material: Material, found: Sequence[Line]) -> list[T0Row]:
    """T0's table of every checkpoint: zero-shot, ranked as T0 does, original prompts alone."""
    rows = []
    for checkpoint in material.checkpoints:
        cells = {}
        members = in_view(found, View(checkpoint, 0, T0_PROTOCOL))
        for dataset, column in T0_DATASETS.items():
            values = [
                result.values[line.view.protocol, line.metric]
                for line in members
                if line.dataset == dataset and line.metric == "accuracy"
                for result in line.results
                if result.original
            ]
            if values:
                mean, median, _ = tables.over_prompts(values)
                cells[column] = (mean, median, len(values))
        if cells:
            rows.append(T0Row(checkpoint, cells))
    return rows


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

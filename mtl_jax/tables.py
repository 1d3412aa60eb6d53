"""Results of evaluations summarised: per dataset the mean, median and spread over its prompts.

A result is one row of `results.jsonl`: task, dataset, prompt, split, step, metric, value, n; and
where known `chance` and `majority` (the baselines of the task), `family` and `trained`.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

# Evaluation may also give a baseline as a row of its own, beside the accuracy it belongs to.
_BASELINES = ("chance", "majority")
_ACCURACY = "accuracy"
UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """The newest value of one task under one metric."""

    task: str
    prompt: str
    step: int
    value: float
    n: int
    untrained: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """One metric of one dataset and split over all its prompts.

    `trained` tells whether its prompts were trained on; None where the rows do not say. Baselines
    are means over the prompts, None where unknown. `untrained` is the value at step 0.
    """

    dataset: str
    family: str
    split: str
    metric: str
    trained: bool | None
    prompts: tuple[PromptResult, ...]
    mean: float
    median: float
    quartiles: tuple[float, float]
    chance: float | None
    majority: float | None
    untrained: float | None

    @property
    def kind(self) -> str:
        """Says in words whether the prompts were trained on."""
        return {None: "", True: "trained", False: "held out"}[self.trained]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Groups results by dataset, split, metric and whether the prompts were trained on.

    For each task the newest step counts; where a step was evaluated twice, the later row. Quartiles
    interpolate linearly between prompts. Rows with a value that is not finite are left out.

    Returns:
      Summaries in order of appearance, those of trained prompts first.
    """
    by_task: dict[tuple[str, str, str], dict[int, Row]] = {}
    baselines: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.get("value") is None or not math.isfinite(row["value"]):
            continue
        task, split, metric = row["task"], row.get("split", ""), row["metric"]
        if metric in _BASELINES:
            baselines[task, split, metric] = float(row["value"])
        else:
            by_task.setdefault((task, split, metric), {})[int(row["step"])] = row

    groups: dict[tuple[Any, ...], list[tuple[Row, float | None]]] = {}
    for (task, split, metric), by_step in by_task.items():
        newest = max(by_step)
        row = dict(by_step[newest])
        for baseline in _BASELINES:
            known = baselines.get((task, split, baseline)) if metric == _ACCURACY else None
            row[baseline] = row.get(baseline) if row.get(baseline) is not None else known
        untrained = float(by_step[0]["value"]) if newest > 0 and 0 in by_step else None
        key = (row.get("dataset") or task, split, metric, row.get("trained"))
        groups.setdefault(key, []).append((row, untrained))
    summaries = [_summary(key, members) for key, members in groups.items()]
    return sorted(summaries, key=lambda summary: summary.trained is False)


def _summary(key: tuple[Any, ...], members: Sequence[tuple[Row, float | None]]) -> Summary:
    dataset, split, metric, trained = key
    prompts = tuple(
        PromptResult(
            task=row["task"],
            prompt=row.get("prompt") or "",
            step=int(row["step"]),
            value=float(row["value"]),
            n=int(row.get("n", 0)),
            untrained=untrained,
        )
        for row, untrained in members
    )
    mean, median, quartiles = over_prompts([prompt.value for prompt in prompts])
    return Summary(
        dataset=dataset,
        family=next((row["family"] for row, _ in members if row.get("family")), ""),
        split=split,
        metric=metric,
        trained=trained,
        prompts=prompts,
        mean=mean,
        median=median,
        quartiles=quartiles,
        chance=_mean(row["chance"] for row, _ in members),
        majority=_mean(row["majority"] for row, _ in members),
        untrained=_mean(untrained for _, untrained in members),
    )


def over_prompts(values: Sequence[float]) -> tuple[float, float, tuple[float, float]]:
    """Returns mean, median and quartiles; quartiles interpolate linearly between prompts."""
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return float(np.mean(values)), median, (low, high)


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean, or None unless every value is known: half a baseline would mislead."""
    known = list(values)
    return None if any(v is None for v in known) else float(np.mean(np.asarray(known, float)))


def format_value(value: float | None, decimals: int) -> str:
    """Returns a metric's value as text, or `-` where it is unknown."""
    return UNKNOWN if value is None else f"{value:.{decimals}f}"


def decimals(summary: Summary) -> int:
    """Returns 1 for a metric that counts in percent, 3 for one between 0 and 1."""
    baselines = (summary.chance, summary.majority, summary.untrained)
    return digits([*(prompt.value for prompt in summary.prompts), *(b for b in baselines if b)])


def digits(values: Sequence[float]) -> int:
    """Returns the decimals for one metric's values: 3 if all lie between -1 and 1, otherwise 1."""
    return 3 if max(abs(value) for value in values) <= 1 else 1


def cells(summary: Summary) -> dict[str, str]:
    """Returns one line of the results table by column; what is unknown is `-`."""
    places = decimals(summary)
    low, high = (format_value(value, places) for value in summary.quartiles)
    return {
        "dataset": summary.dataset,
        "prompts": summary.kind,
        "split": summary.split,
        "metric": summary.metric,
        "#": str(len(summary.prompts)),
        "mean": format_value(summary.mean, places),
        "median": format_value(summary.median, places),
        "quartiles": f"{low} to {high}" if len(summary.prompts) > 1 else UNKNOWN,
        "chance": format_value(summary.chance, places),
        "majority": format_value(summary.majority, places),
        "untrained": format_value(summary.untrained, places),
    }


_TEXT_COLUMNS = ("dataset", "prompts", "split", "metric")


def table_columns(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the columns that say something: a split only where there are several."""
    return [
        name
        for name in lines[0]
        if any(line[name] not in ("", UNKNOWN) for line in lines)
        and (name != "split" or len({line[name] for line in lines}) > 1)
    ]


def results_table(rows: Iterable[Row], *, markdown: bool = False) -> str:
    """Returns the results as a table for the terminal or, on wish, for Markdown.

    Per dataset: the number of prompts (#), mean, median and inter-quartile range over prompts, and
    the baselines chance, majority class and untrained model (step 0) where they are known.

    Args:
      rows: lines of `results.jsonl`.
      markdown: a GitHub table instead of aligned columns.
    """
    lines = [cells(summary) for summary in summarise(rows)]
    if not lines:
        return "No results yet.\n"
    form = markdown_table if markdown else aligned_table
    return form(lines, table_columns(lines), _TEXT_COLUMNS)


def markdown_table(
    lines: Sequence[Mapping[str, str]], columns: Sequence[str], texts: Collection[str]
) -> str:
    """Returns a GitHub table of the columns; those in `texts` are aligned to the left."""
    header = dict(zip(columns, columns, strict=True))
    rule = {name: ":---" if name in texts else "---:" for name in columns}
    return "".join(
        "| " + " | ".join(line[c].replace("|", "\\|") for c in columns) + " |\n"
        for line in (header, rule, *lines)
    )


def aligned_table(
    lines: Sequence[Mapping[str, str]], columns: Sequence[str], texts: Collection[str]
) -> str:
    """Returns a table for the terminal; see `markdown_table`."""
    header = dict(zip(columns, columns, strict=True))
    widths = {c: max(len(line[c]) for line in (header, *lines)) for c in columns}

    def text(line: Mapping[str, str]) -> str:
        padded = [
            line[c].ljust(widths[c]) if c in texts else line[c].rjust(widths[c]) for c in columns
        ]
        return "  ".join(padded).rstrip() + "\n"

    rule_line = "  ".join("-" * widths[c] for c in columns) + "\n"
    return text(header) + rule_line + "".join(text(line) for line in lines)


def format_seconds(seconds: float) -> str:
    """Returns a duration in words: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""The page of a run: report.html, made only from the files in its run directory."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from mtl_jax import charts, multitask_html, tables
from mtl_jax.analysis.run_analysis import RunAnalysis
from mtl_jax.storage import read_jsonl

# As many samples as a reader will look at.
_SAMPLED_TASKS = 12
_SAMPLES_PER_TASK = 2
_LONGEST_TEXT = 600
# Up to so many tasks the small charts stand open, beyond they wait behind a click.
_OPEN_CHARTS = 24
_NUMBERS = ("median", "mean", "chance", "majority", "untrained", "quartiles")
_BASELINES = ("chance", "majority", "untrained")
# Titles of the groups of results, by (the prompt was trained on, some prompt of the dataset was).
_GROUPS = {
    (None, False): "",
    (None, True): "",
    (True, True): "Trained prompts",
    (False, True): "Held-out prompts of trained datasets",
    (False, False): "Held-out datasets",
}


def render(run: Path, analysis: RunAnalysis) -> str:
    """Returns the whole page as HTML text, with all styles and drawings inside.

    Args:
      run: the run directory; a file that is missing leaves its part of the page out.
      analysis: of the same run, for the multi-task sections.

    Raises:
      UserError: a JSONL file is damaged.
    """
    metrics = read_jsonl(run / "metrics.jsonl")
    rows = read_jsonl(run / "results.jsonl")
    summaries = tables.summarise(rows)
    command = _text(run / "command.txt")
    versions = _json(run / "versions.json") or {}
    return template("report.html").render(
        name=run.absolute().name,
        command=command.splitlines()[0].split(" ") if command else [],
        facts=_facts(run, metrics, summaries, versions, analysis),
        versions=versions,
        results=_results(summaries),
        loss=_loss_charts(metrics),
        multitask=multitask_html.sections(analysis),
        ledger=_ledger(run),
        mixture=_table(_text(run / "mixture.txt")),
        samples=_samples(run, rows),
        config=_text(run / "config.gin"),
    )


def template(name: str) -> jinja2.Template:
    """Returns a template of the package; a value that is forgotten is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mtl_jax", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path) or "null")
    except ValueError:
        return None


def _facts(
    run: Path,
    metrics: Sequence[Mapping[str, Any]],
    summaries: Sequence[tables.Summary],
    versions: Mapping[str, Any],
    analysis: RunAnalysis,
) -> list[tuple[str, str]]:
    """Returns the figures at the top of the page as (name, value)."""
    facts = []
    if analysis.method.get("method"):
        facts.append(("method", str(analysis.method["method"])))
    parameters = re.search(r"^([\d,]+) parameters", _text(run / "model-info.txt"), re.MULTILINE)
    if parameters:
        facts.append(("parameters", _short(int(parameters[1].replace(",", "")))))
    if metrics:
        facts.append(("steps", f"{metrics[-1]['step']:,}"))
        losses = [row["loss"] for row in metrics if row.get("loss") is not None]
        if losses:
            facts.append(("loss", f"{losses[-1]:.3f}"))
        speeds = sorted(row["tokens_per_second"] for row in metrics if row.get("tokens_per_second"))
        if speeds:
            facts.append(("tokens/s", f"{speeds[len(speeds) // 2]:,.0f}"))
    starts = _json(run / "ledger.json") or []
    if starts:
        facts.append(("time", tables.format_seconds(sum(start["wall"] for start in starts))))
    if len(starts) > 1:
        facts.append(("starts", str(len(starts))))
    tasks = {prompt.task for summary in summaries for prompt in summary.prompts}
    if tasks:
        facts.append(("evaluated tasks", str(len(tasks))))
    if versions.get("device_kind"):
        count = versions.get("device_count", 1)
        facts.append(("device", f"{count} x {versions['device_kind']}"))
    return facts


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _results(summaries: Sequence[tables.Summary]) -> dict[str, Any] | None:
    """Returns the lines of the tables of results, in groups by what was trained on."""
    if not summaries:
        return None
    lines = [tables.cells(summary) for summary in summaries]
    shown = tables.table_columns(lines)
    groups: dict[str, list[dict[str, Any]]] = {title: [] for title in _GROUPS.values()}
    trained = {summary.dataset for summary in summaries if summary.trained}
    for summary, line in zip(summaries, lines, strict=True):
        known_dataset = bool(trained) and summary.dataset in trained
        groups[_GROUPS[summary.trained, known_dataset]].append(
            {
                "dataset": summary.dataset,
                "about": _about(summary),
                "cells": [(line[name], name == "median") for name in _NUMBERS if name in shown],
                "strip": markupsafe.Markup(_strip(summary)),
                "prompts": [
                    {
                        "name": prompt.prompt or prompt.task,
                        "value": tables.format_value(prompt.value, line_digits),
                        "untrained": tables.format_value(prompt.untrained, line_digits),
                        "n": f"{prompt.n:,}",
                    }
                    for line_digits in [tables.decimals(summary)]
                    for prompt in sorted(summary.prompts, key=lambda prompt: -prompt.value)
                ],
            }
        )
    return {
        "columns": [name for name in _NUMBERS if name in shown],
        "groups": [(title, members) for title, members in groups.items() if members],
        "baselines": [name for name in _BASELINES if name in shown],
        "splits": list(dict.fromkeys(s.split for s in summaries if s.split)),
        "steps": sorted({prompt.step for s in summaries for prompt in s.prompts}),
        "prompts": sum(len(summary.prompts) for summary in summaries),
    }


def _about(summary: tables.Summary) -> str:
    count = len(summary.prompts)
    return f"{summary.metric} · {count} prompt{'s' if count > 1 else ''}"


def _strip(summary: tables.Summary) -> str:
    """Returns the drawing of the spread over prompts, or "" for a metric without a fixed range."""
    high = 100.0 if tables.decimals(summary) == 1 else 1.0
    values = [prompt.value for prompt in summary.prompts]
    if min(values) < 0 or max(values) > high:
        return ""
    marks = [(name, value) for name in _BASELINES if (value := getattr(summary, name)) is not None]
    return charts.prompt_strip(values, 0.0, high, summary.median, marks)


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in metrics if row.get(name) is not None]


def _loss_charts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the chart of the loss over all tasks, wide and narrow, and one for each task."""
    total = _series(metrics, "loss")
    names = dict.fromkeys(key for row in metrics for key in row if key.startswith("loss/"))
    tasks = {name.removeprefix("loss/"): _series(metrics, name) for name in names}
    tasks = {task: points for task, points in tasks.items() if points}
    if not total and not tasks:
        return None
    window = max(1, len(total) // 25)
    lines = [charts.Line("each log step", total, "line-raw")]
    if window > 1:
        lines.append(charts.Line("smoothed", charts.smooth(total, window), "line-0"))
    title = "Training loss over all tasks"
    wide, narrow = (
        charts.line_chart(
            lines, title=title, x_label="step", y_label="loss", width=width, height=height
        )
        for width, height in ((1000, 320), (360, 260))
    )
    every = [point for points in tasks.values() for point in points] + total
    x_range = (min(x for x, _ in every), max(x for x, _ in every))
    # One scale for all small charts, so that tasks can be compared by eye.
    y_range = (min(0.0, *(y for _, y in every)), max(y for _, y in every))
    small = []
    for task, points in sorted(tasks.items()):
        drawing = charts.line_chart(
            [
                charts.Line("all tasks", charts.thin(total, 60), "line-raw"),
                charts.Line(task, charts.thin(points, 60), "line-1"),
            ],
            title=f"Training loss of {task}",
            x_label="step",
            y_label="",
            width=300,
            height=170,
            legend=False,
            x_range=x_range if x_range[0] < x_range[1] else None,
            y_range=y_range if y_range[0] < y_range[1] else None,
        )
        small.append(
            {"task": task, "last": f"{points[-1][1]:.3f}", "drawing": markupsafe.Markup(drawing)}
        )
    return {
        "wide": markupsafe.Markup(wide),
        "narrow": markupsafe.Markup(narrow),
        "tasks": small,
        "open": len(small) <= _OPEN_CHARTS,
    }


def _ledger(run: Path) -> dict[str, Any] | None:
    """Returns the seconds of every activity over all starts of the run, longest first."""
    starts = _json(run / "ledger.json")
    if not starts:
        return None
    seconds: dict[str, float] = {}
    for start in starts:
        for activity, value in start["seconds"].items():
            seconds[activity] = seconds.get(activity, 0.0) + value
    wall = sum(start["wall"] for start in starts)
    ordered = sorted(seconds.items(), key=lambda item: (item[0] == "other", -item[1]))
    return {
        "wall": tables.format_seconds(wall),
        "starts": len(starts),
        "entries": [
            {
                "activity": activity,
                "seconds": f"{value:,.1f}",
                "share": 100 * value / wall if wall else 0.0,
                "style": f"fill-{index % 8}",
            }
            for index, (activity, value) in enumerate(ordered)
        ],
    }


def _table(text: str) -> dict[str, Any] | None:
    """Returns an aligned text table as header and rows, or as plain text if it is not one.

    Columns are separated by two or more spaces; a rule below the header and lines after an empty
    line (remarks) are told apart.
    """
    if not text.strip():
        return None
    body, _, remarks = text.strip("\n").partition("\n\n")
    lines = [line for line in body.splitlines() if not re.fullmatch(r"[\s\-=]+", line)]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    if len(rows) < 2 or len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
        return {"text": text, "header": [], "rows": [], "remarks": ""}
    number = re.compile(r"-?[\d,.]+\s?%?|-")
    numeric = [all(number.fullmatch(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    return {
        "text": "",
        "header": list(zip(rows[0], numeric, strict=True)),
        "rows": [list(zip(row, numeric, strict=True)) for row in rows[1:]],
        "remarks": remarks.strip(),
    }


def _samples(run: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns for some tasks a few predictions, one wrong and one right where there are both.

    One task per dataset comes first, in the order of results.jsonl.
    """
    folder = run / "predictions"
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.jsonl"))
    }
    dataset_of = {str(row["task"]): row.get("dataset") or row["task"] for row in rows}
    order = [task for task in dict.fromkeys(dataset_of) if task in files]
    order = order or list(files)
    firsts = list({dataset_of.get(task, task): task for task in reversed(order)}.values())[::-1]
    chosen = [*firsts, *(task for task in order if task not in firsts)][:_SAMPLED_TASKS]
    samples = []
    for task in chosen:
        predictions = read_jsonl(files[task])
        newest = max((row.get("step", 0) for row in predictions), default=0)
        shown = [_sample(row) for row in predictions if row.get("step", 0) == newest]
        wrong = [row for row in shown if not row["right"]]
        right = [row for row in shown if row["right"]]
        picked = [*wrong[:1], *right[:1], *wrong[1:], *right[1:]][:_SAMPLES_PER_TASK]
        if picked:
            samples.append({"task": task, "rows": picked})
    return samples


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    def first(*names: str) -> str:
        value = next((row[name] for name in names if row.get(name) is not None), "")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"

    target = first("targets_text", "target", "targets")
    prediction = first("prediction", "predicted", "prediction_text")
    return {
        "inputs": first("inputs_text", "inputs", "input"),
        "target": target,
        "prediction": prediction,
        "right": bool(row.get("correct", target.strip() == prediction.strip())),
    }

"""The page of a comparison, comparison.html, and its table as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from mtl_jax import __version__, charts, heat_map, tables
from mtl_jax.analysis import pareto
from mtl_jax.analysis.comparison import Comparison, MethodResult
from mtl_jax.analysis.intervals import Interval
from mtl_jax.analysis.trade_offs import TradeOff
from mtl_jax.analysis.transfer import NegativeTransfer
from mtl_jax.report_html import template

_GAIN = "over static"
# With more points than this of methods with set weights, those below the stairs have no number.
_MOST_MARKS = 8
_WHERE = {
    pareto.OVER: "beyond them",
    pareto.ON: "on them",
    pareto.BELOW: "below: set weights do as well in both",
}


def render(comparison: Comparison) -> str:
    """Returns the whole page as HTML text, with all styles and drawings inside."""
    return template("comparison.html").render(
        title="Comparison of methods" if comparison.by_steps else "Comparison of single tasks",
        facts=_facts(comparison),
        by_steps=_table(comparison, comparison.by_steps, _steps_note(comparison)),
        by_time=_by_time(comparison),
        deltas=_deltas(comparison),
        trade_offs=[_plot(trade_off) for trade_off in comparison.trade_offs],
        transfer=_transfer(comparison),
        alignment=_alignment(comparison),
        runs=comparison.runs,
        version=__version__,
    )


def markdown(comparison: Comparison) -> str:
    """Returns the tables as Markdown: at equal steps, and at equal time where it is known."""
    text = ["# Comparison\n"]
    for title, table in (
        ("At equal steps", _table(comparison, comparison.by_steps, _steps_note(comparison))),
        ("At equal time", _by_time(comparison)),
    ):
        if table is None:
            continue
        text += [f"## {title}\n", table["note"] + "\n"]
        if not table["rows"]:
            continue
        lines = [table["columns"], [":---", *["---:"] * (len(table["columns"]) - 1)]]
        for row in table["rows"]:
            name = f"{row['name']} ({row['about']})"
            cells = [f"{c['mean']} {c['spread']}".strip() for c in row["cells"]]
            lines.append([name, *cells])
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        text += ["".join("| " + " | ".join(line) + " |\n" for line in escaped)]
    if matrix := _transfer_lines(comparison):
        text += ["## Transfer between tasks\n", matrix]
    return "\n".join(text)


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [
        ("runs", str(len(comparison.runs))),
        ("methods", str(len(comparison.by_steps))),
        ("tasks", str(len({task for task, _ in comparison.keys}) or len(comparison.baselines))),
        ("single-task runs", str(sum(comparison.baselines.values()))),
        ("steps", f"{comparison.steps:,}"),
    ]
    if comparison.seconds is not None:
        facts.append(("quickest method", _seconds(comparison.seconds)))
    return facts


def _steps_note(comparison: Comparison) -> str:
    note = "Means over seeds at the end of training, with half of the 95 % t-interval."
    if any(result.seeds == 1 for result in comparison.by_steps):
        note += " One seed has no interval."
    tasks = {task for task, _ in comparison.keys}
    if len(tasks) < len(comparison.keys):
        note += " The average and the worst task are of each task's first metric."
    if any(result.over_static is not None for result in comparison.by_steps):
        note += (
            " Over static: the gain in average over the best method with set weights, seed by seed."
        )
    if comparison.lower:
        note += f" Lower is better for {', '.join(sorted(comparison.lower))}."
    if comparison.left_out:
        names = ", ".join(f"{task} {metric}" for task, metric in comparison.left_out)
        note += f" Left out, for only some of the runs have it: {names}."
    return note


def _by_time(comparison: Comparison) -> dict[str, Any] | None:
    if comparison.seconds is None or not comparison.by_steps:
        return None
    note = (
        f"Each method after the training time of the quickest one, {_seconds(comparison.seconds)}; "
        "between two evaluations, values lie on the line between theirs. Evaluations, checkpoints "
        "and compiling do not count."
    )
    if comparison.baselines:
        note += " The single-task runs are those at the end of their training."
    if comparison.without_time:
        names = ", ".join(comparison.without_time)
        note += f" Not evaluated within that time: {names}; set Eval.every lower."
    table = _table(comparison, comparison.by_time, note, timed=True)
    return table or {"note": note, "columns": [], "rows": []}


def _table(
    comparison: Comparison, results: Sequence[MethodResult], note: str, timed: bool = False
) -> dict[str, Any] | None:
    """Returns columns and rows: each task and metric, the averages, the worst task, Delta_m."""
    if not results:
        return None
    tasks = {task for task, _ in comparison.keys}
    plain = len(tasks) == len(comparison.keys)
    columns: list[tuple[str, Callable[[MethodResult], Interval | None], bool]] = [
        ("average", lambda result: result.average, False),
        (_GAIN, lambda result: result.over_static, False),
        ("worst task", lambda result: result.worst, False),
        ("held out", lambda result: result.held_out, False),
    ]
    columns += [
        (
            task if plain else f"{task} {metric}",
            lambda result, key=(task, metric): result.values[key],  # type: ignore[misc]
            metric in comparison.lower,
        )
        for task, metric in comparison.keys
    ]
    shown = [column for column in columns if any(column[1](r) is not None for r in results)]
    cells = [
        _column([of(result) for result in results], lower, signed=name == _GAIN)
        for name, of, lower in shown
    ]
    names = [name for name, _, _ in shown]
    if comparison.baselines:
        names.insert(0, "Δm")
        found = [None if r.transfer is None else r.transfer.delta for r in results]
        cells.insert(
            0, _column([value and _percent(value) for value in found], False, " %", signed=True)
        )
    rows = [
        {
            "name": result.label,
            "about": _about(result, timed),
            "cells": [column[i] for column in cells],
        }
        for i, result in enumerate(results)
    ]
    return {"note": note, "columns": ["method", *names], "rows": rows}


def _about(result: MethodResult, timed: bool) -> str:
    words = [f"{result.seeds} seed{'s' if result.seeds > 1 else ''}"]
    if timed:
        words.append(f"step {result.step:,}")
    elif result.seconds is not None:
        words.append(_seconds(result.seconds))
    return " · ".join(words)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else tables.format_seconds(seconds)


def _percent(interval: Interval) -> Interval:
    low, high = (None if end is None else 100 * end for end in (interval.low, interval.high))
    return Interval(100 * interval.mean, low, high, interval.n)


def _column(
    values: Sequence[Interval | None], lower: bool, unit: str = "", *, signed: bool = False
) -> list[dict[str, Any]]:
    """Returns the cells of a column; the best mean is strong where there are several."""
    means = [value.mean for value in values if value is not None]
    digits = 3 if means and max(map(abs, means)) <= 1 and not unit else 1
    best = (min if lower else max)(means) if len(means) > 1 else None
    sign = "+" if signed else ""
    return [
        {
            "mean": tables.UNKNOWN if value is None else f"{value.mean:{sign}.{digits}f}{unit}",
            "spread": ""
            if value is None or value.half_width is None
            else f"± {value.half_width:.{digits}f}",
            "best": value is not None and value.mean == best,
        }
        for value in values
    ]


def _deltas(comparison: Comparison) -> dict[str, Any] | None:
    """Returns sorted bars of relative gains by task for each method."""
    found = [(r.label, r.transfer) for r in comparison.by_steps if r.transfer is not None]
    if not found:
        return None
    note = (
        "Relative gain over the model that was trained on the task alone for as many steps, in "
        "per cent, with 95 % intervals over seeds; Δm is the mean over the trained tasks. Below "
        "zero, training together has cost the task something."
    )
    if not all(transfer.paired for _, transfer in found):
        note += (
            " Where the seeds are not the same on both sides, the mean over the single-task runs "
            "is compared with, and the intervals leave their spread out."
        )
    # One scale for all methods, so that they can be compared by eye.
    known = [
        _percent_row(value)
        for _, transfer in found
        for value in (transfer.delta, *transfer.by_task.values())
        if value is not None
    ]
    limits = charts.interval_limits([(0.0, None), *known])
    figures = [_bars(label, transfer, limits) for label, transfer in found]
    return {"note": note, "figures": figures}


def _bars(label: str, transfer: NegativeTransfer, limits: tuple[float, float]) -> dict[str, Any]:
    known = [(task, _percent(value)) for task, value in transfer.by_task.items() if value]
    known.sort(key=lambda item: -item[1].mean)
    rows: list[tuple[str, float, tuple[float, float] | None]] = [
        (task, value.mean, _ends(value)) for task, value in known
    ]
    if transfer.delta is not None:
        rows.insert(0, ("Δm, all tasks", *_percent_row(transfer.delta)))
    title = f"Gain over single tasks, {label}"
    drawing = charts.interval_bars(rows, title=title, unit=" %", limits=limits)
    return {
        "label": label,
        "drawing": markupsafe.Markup(drawing),
        "missing": transfer.missing,
    }


def _percent_row(value: Interval) -> tuple[float, tuple[float, float] | None]:
    scaled = _percent(value)
    return scaled.mean, _ends(scaled)


def _ends(value: Interval) -> tuple[float, float] | None:
    return None if value.low is None or value.high is None else (value.low, value.high)


def _plot(trade_off: TradeOff) -> dict[str, Any]:
    spots, rows = [], []
    many = sum(point.static for point in trade_off.points) > _MOST_MARKS
    for number, point in enumerate(trade_off.points, start=1):
        marked = not (many and point.static) or point.label in trade_off.front
        spots.append(
            charts.Spot(
                mark=str(number) if marked else "",
                name=f"{point.label}: {point.x.mean:.3g}, {point.y.mean:.3g}",
                x=point.x.mean,
                y=point.y.mean,
                style="static" if point.static else "dynamic",
                round=point.static,
                x_ends=_ends(point.x),
                y_ends=_ends(point.y),
            )
        )
        where = _WHERE[point.where]
        if point.static:
            where = "part of them" if point.label in trade_off.front else "below"
        gain = "" if point.static else f"{point.volume_gain:.3g}"
        rows.append({"mark": number, "label": point.label, "where": where, "gain": gain})
    by_label = {point.label: point for point in trade_off.points}
    stairs = [(by_label[label].x.mean, by_label[label].y.mean) for label in trade_off.front]
    names = [
        f"{axis} (lower is better)" if lower else axis
        for axis, lower in zip((trade_off.x_axis, trade_off.y_axis), trade_off.lower, strict=True)
    ]
    drawing = charts.scatter(
        sorted(spots, key=lambda spot: not spot.round),
        title=f"{names[0]} against {names[1]}",
        x_label=names[0],
        y_label=names[1],
        stairs=stairs,
        lower=trade_off.lower,
        width=460,
        height=360,
    )
    return {"drawing": markupsafe.Markup(drawing), "rows": rows}


def _transfer(comparison: Comparison) -> dict[str, Any] | None:
    matrix = comparison.transfer
    if not any(value for (source, target), value in matrix.items() if source != target):
        return None
    tasks = list(comparison.baselines)
    values = np.full((len(tasks), len(tasks)), np.nan)
    grey = np.zeros(values.shape, bool)
    alone = False
    for i, source in enumerate(tasks):
        for j, target in enumerate(tasks):
            found = matrix[source, target]
            if found is None or source == target:
                continue
            values[i, j] = 100 * found.mean
            alone |= found.low is None
            grey[i, j] = found.low is not None and found.low <= 0 <= (found.high or 0.0)
    limit = max(float(np.abs(values[~np.isnan(values)]).max()), 1e-9)
    drawing = heat_map.heat_map(
        values, tasks, title="Transfer from row to column", limit=limit, grey=grey, digits=0
    )
    return {"drawing": markupsafe.Markup(drawing), "noisy": bool(grey.any()), "alone": alone}


def _transfer_lines(comparison: Comparison) -> str:
    if _transfer(comparison) is None:
        return ""
    tasks = list(comparison.baselines)

    def cell(value: Interval | None) -> str:
        return tables.UNKNOWN if value is None else f"{100 * value.mean:+.1f} %"

    lines = [["trained on \\ evaluated on", *tasks], [":---", *["---:"] * len(tasks)]]
    lines += [[a, *(cell(comparison.transfer[a, b]) for b in tasks)] for a in tasks]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _alignment(comparison: Comparison) -> dict[str, Any] | None:
    found: Mapping[str, Any] | None = comparison.alignment
    if not found:
        return None
    drawing = heat_map.heat_map(
        np.asarray(found["cka"], float),
        found["runs"],
        title="Linear CKA between runs",
        limit=1.0,
    )
    return {
        "drawing": markupsafe.Markup(drawing),
        "note": (
            f"Linear CKA of the pooled encoder states of {found['examples']:,} common inputs: 1 "
            "where two runs differ by a rotation alone. With examples shuffled, the mean is "
            f"{found['null_mean']:.2f}."
        ),
    }

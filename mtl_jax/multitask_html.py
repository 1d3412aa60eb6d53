"""The multi-task sections of a run's page: weights, conflicts, affinity, representations."""

from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from mtl_jax import charts, heat_map
from mtl_jax.analysis.gradients import Gradients, stages
from mtl_jax.analysis.run_analysis import Affinity, RunAnalysis, Series, agreement

# More curves than this cannot be told apart; the files have all.
_MOST_CURVES = 24
_COLOURS = 8
# Groups of parameters beyond these wait behind a click.
_OPEN_GROUPS = 6
# name of the trace -> (title, note, label of the axis, drawn as areas)
_CHARTS = {
    "weight": (
        "Weights of the tasks",
        "What each task's mean loss is multiplied by, as the mean over the steps of a log line.",
        "weight",
        False,
    ),
    "effective_share": (
        "Share of the update",
        "The weights as shares of their sum.",
        "share",
        True,
    ),
    "gradient_norm": (
        "Gradient norms",
        "Length of the gradient of each task's mean loss.",
        "norm",
        False,
    ),
    "epochs": (
        "Passes over the data",
        "How often each task's training examples have been gone through.",
        "epochs",
        False,
    ),
}
_SCALARS = {
    "conflict_rate": (
        "Conflicts",
        "Share of the pairs of tasks whose gradients point against each other (a cosine below 0).",
        "share of pairs",
    ),
    "solver_fallback": (
        "Solver fallbacks",
        "How often the method's weights could not be computed and equal ones were taken.",
        "fallbacks",
    ),
}
_UNITS = {0: "units of 1", 1: "thousandths", 2: "millionths"}
_MEASURES = {
    "probe_accuracy": "a linear probe names the task, share of held-out examples",
    "silhouette": "silhouette of the tasks (-1 to 1)",
    "between_share": "share of variance between the tasks",
}


def sections(analysis: RunAnalysis) -> dict[str, Any]:
    """Returns what the template multitask.html shows; a part without data is empty or None."""
    curves = {name: analysis.traces[name] for name in _CHARTS if name in analysis.traces}
    tasks = sorted({task for by_task in curves.values() for task in by_task})
    drawn = [_task_chart(name, by_task, tasks) for name, by_task in curves.items()]
    drawn += [
        _scalar_chart(name, analysis.scalars[name])
        for name in _SCALARS
        # A solver that never failed needs no chart.
        if any(value for _, value in analysis.scalars.get(name, []))
        or (name == "conflict_rate" and name in analysis.scalars)
    ]
    rates = sorted(analysis.rates.items(), key=lambda item: -item[1])
    return {
        "rates": [(task, f"{rate:.4f}") for task, rate in rates],
        "charts": drawn,
        "cosine": _cosine(analysis),
        "affinity": _affinity(analysis),
        "representations": _representations(analysis.representations),
    }


def _task_chart(name: str, by_task: Mapping[str, Series], tasks: Sequence[str]) -> dict[str, Any]:
    title, note, label, area = _CHARTS[name]
    largest = sorted(by_task, key=lambda task: -max(abs(y) for _, y in by_task[task]))
    shown = sorted(largest[:_MOST_CURVES])
    numbers = {task: tasks.index(task) for task in shown}
    legend = [
        {
            "task": task,
            "line": _line_style(numbers[task]),
            "area": _area_style(numbers[task]),
            "last": f"{by_task[task][-1][1]:.3g}",
        }
        for task in shown
    ]
    style = "area" if area else "line"
    lines = [charts.Line(e["task"], by_task[e["task"]], e[style]) for e in legend]
    return {
        "title": title,
        "note": note,
        "area": area,
        "legend": legend,
        "left_out": len(by_task) - len(shown),
        "files": [f"{name}.csv"],
        **_both_widths(lines, f"{title} by task", label, area),
    }


def _scalar_chart(name: str, series: Series) -> dict[str, Any]:
    title, note, label = _SCALARS[name]
    lines = [charts.Line(title, series, "line-0")]
    return {
        "title": title,
        "note": note,
        "area": False,
        "legend": [],
        "left_out": 0,
        "files": ["conflict.csv"],
        **_both_widths(lines, title, label, False),
    }


def _line_style(number: int) -> str:
    return f"thin task-{number % _COLOURS} dash-{number // _COLOURS % 3}"


def _area_style(number: int) -> str:
    return f"area-{number % _COLOURS} tint-{number // _COLOURS % 3}"


def _both_widths(
    lines: Sequence[charts.Line], title: str, label: str, area: bool
) -> dict[str, markupsafe.Markup]:
    """Returns the chart for wide and for narrow windows; the legend is the page's."""
    drawings = {}
    for name, (width, height) in (("wide", (1000, 280)), ("narrow", (360, 240))):
        common: dict[str, Any] = {
            "title": title,
            "x_label": "step",
            "y_label": label,
            "width": width,
            "height": height,
        }
        if area:
            drawing = charts.stacked_area(lines, **common)
        else:
            values = [y for line in lines for _, y in line.points]
            # Zero belongs to all of these measures, and its line keeps small changes small.
            top = max(*values, 0.0) or 1.0
            bottom = min(*values, 0.0)
            drawing = charts.line_chart(lines, **common, legend=False, y_range=(bottom, 1.05 * top))
        drawings[name] = markupsafe.Markup(drawing)
    return drawings


def _cosine(analysis: RunAnalysis) -> dict[str, Any] | None:
    if analysis.gradients is None or analysis.cosine is None:
        return None
    order = list(analysis.order)
    names = [analysis.gradients.tasks[i] for i in order]
    noise_known = not np.isnan(analysis.cosine.noise_KN).all()
    figures = []
    for k, group in enumerate(analysis.gradients.groups):
        values = analysis.cosine.cosine_KNN[k][np.ix_(order, order)].copy()
        grey = ~analysis.cosine.told_KNN[k][np.ix_(order, order)]
        np.fill_diagonal(values, analysis.cosine.noise_KN[k][order])
        np.fill_diagonal(grey, False)
        drawing = heat_map.heat_map(
            values, names, title=f"Cosines of gradients, {group}", limit=1.0, grey=grey
        )
        figures.append({"group": group, "drawing": markupsafe.Markup(drawing)})
    return {
        "figures": figures[:_OPEN_GROUPS],
        "more": figures[_OPEN_GROUPS:],
        "stages": _stages(analysis.gradients, order),
        "noise": noise_known,
    }


def _stages(found: Gradients, order: Sequence[int]) -> list[dict[str, Any]]:
    """Heat maps of the beginning, the middle and the end of training."""
    names = [found.tasks[i] for i in order]
    figures = []
    for first, last, cosine_NN in stages(found):
        values = cosine_NN[np.ix_(order, order)].copy()
        np.fill_diagonal(values, np.nan)  # always 1
        title = f"steps {first:,} to {last:,}"
        drawing = heat_map.heat_map(values, names, title=f"Cosines, {title}", limit=1.0)
        figures.append({"group": title, "drawing": markupsafe.Markup(drawing)})
    return figures


def _affinity(analysis: RunAnalysis) -> dict[str, Any] | None:
    """Both forms of affinity, and the groups that the measured one proposes, where there is one."""
    best = analysis.lookahead or analysis.first_order
    if analysis.gradients is None or best is None:
        return None
    tasks, groups = analysis.gradients.tasks, best.grouping.groups
    forms = (
        ("measured one step ahead", analysis.lookahead),
        ("to first order, from the Gramians", analysis.first_order),
    )
    how = "No other grouping has" if best.grouping.exact else "Greedy search:"
    other, agreed = "", agreement(analysis)
    if analysis.lookahead is not None and analysis.first_order is not None:
        same = analysis.first_order.grouping.groups == groups
        other = "The Gramians propose the same groups" if same else "The Gramians propose others"
        if agreed is not None:
            other += f"; over pairs of tasks both forms correlate at {agreed:.2f}"
        other += "."
    return {
        "figures": [
            _affinity_figure(name, form, tasks, groups) for name, form in forms if form is not None
        ],
        "groups": [", ".join(tasks[i] for i in group) for group in groups],
        "about": f"Proposed groups to train together. {how} more affinity within groups. {other}",
        "files": ["affinity.json"]
        + (["lookahead.json", "lookahead.csv"] if analysis.lookahead is not None else []),
        "lookaheads": 0 if analysis.lookahead is None else analysis.lookahead.lines,
    }


def _affinity_figure(
    name: str, form: Affinity, tasks: Sequence[str], groups: Sequence[Sequence[int]]
) -> dict[str, Any]:
    order = [i for group in groups for i in group]
    others = form.mean_NN[np.ix_(order, order)].copy()
    np.fill_diagonal(others, np.nan)  # a task's help to itself would drown the others
    known = np.abs(others[~np.isnan(others)])
    largest = float(known.max()) if known.size else 0.0
    # One power of a thousand for all cells: shares are small numbers.
    power = int(np.ceil(-np.log10(largest) / 3)) if 0 < largest < 1 else 0
    drawing = heat_map.heat_map(
        others * 1000.0**power,
        [tasks[i] for i in order],
        title=f"Affinity of the row's task onto the column's, {name}",
        limit=largest * 1000.0**power,
        rules=[int(n) for n in np.cumsum([len(group) for group in groups])[:-1]],
    )
    unit = _UNITS.get(power, f"units of 10^-{3 * power}")
    return {"caption": f"{name}, in {unit}", "drawing": markupsafe.Markup(drawing)}


def _representations(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    tasks = found["tasks"]
    spots = [
        charts.Spot("", tasks[label], x, y, f"{_area_style(label)}")
        for label, (x, y) in zip(found["labels"], found["pca"], strict=True)
    ]
    shares = [f"component {i + 1} ({share:.0%})" for i, share in enumerate(found["pca_shares"])]
    drawing = charts.scatter(
        spots,
        title="Encoder states by task",
        x_label=shares[0],
        y_label=shares[1],
        width=460,
        height=360,
    )
    rows = [
        {
            "name": text,
            **{key: f"{found[name][key]:.3f}" for key in ("value", "null_mean", "null_high")},
        }
        for name, text in _MEASURES.items()
        if found.get(name)
    ]
    return {
        "drawing": markupsafe.Markup(drawing),
        "rows": rows,
        "legend": [
            {"task": task, "style": f"spot {_area_style(i)}"} for i, task in enumerate(tasks)
        ],
        "note": (
            f"Means of the encoder's outputs over {len(spots):,} evaluation inputs at step "
            f"{found['step']:,}, in their two principal components. Beside each measure stands its "
            f"mean and largest value with shuffled tasks: what chance alone would give."
        ),
    }

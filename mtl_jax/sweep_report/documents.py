"""The table of results as Markdown, as LaTeX and for the terminal."""

from collections.abc import Mapping, Sequence

from mtl_jax import tables
from mtl_jax.sweep_files import BASELINES
from mtl_jax.sweep_report import layouts, lines
from mtl_jax.sweep_report.cells import ends_text, p_text
from mtl_jax.sweep_report.differences import Difference
from mtl_jax.sweep_report.gather import Material
from mtl_jax.sweep_report.lines import Average, Line, View

_TEXTS = ("checkpoint", "protocol", "dataset", "metric", "difference")
_ESCAPED = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}
Cells = dict[str, str]
_MOST_LINES = 60


def terminal(found: Sequence[Line]) -> str:
    """The lines under their first metrics, with averages over datasets, in aligned columns.

    What is too long to be looked at is cut down to each dataset's first protocol.
    """
    shown = [line for line in found if line.main]
    if not shown:  # baselines alone, where no metric of a model's answers has a value
        return "No cell has a value yet.\n"
    cut = len(shown) > _MOST_LINES
    if cut:
        shown = [line for line in shown if line.own]
    rows = [row for rows in _by_view(shown).values() for row in rows]
    more = "\nOnly each dataset's first protocol; all are in results.md.\n" if cut else ""
    alike = [n for n in ("checkpoint", "shots") if len({row[n] for row in rows}) == 1]
    return tables.aligned_table(rows, _columns(rows, [*alike, "examples"]), _TEXTS) + more


def markdown(material: Material, found: Sequence[Line], compared: Sequence[Difference]) -> str:
    """One table for each checkpoint and number of shots, T0's table, and the differences."""
    text = [f"# {material.name}\n", _NOTE]
    for (checkpoint, shots), rows in _by_view(found).items():
        text.append(f"## {checkpoint}, {shots} shots\n")
        text.append(tables.markdown_table(rows, _columns(rows, ("checkpoint", "shots")), _TEXTS))
    if rows := _t0(material):
        text.append("## T0's table\n\nMean (median) over the prompts of the original task.\n")
        text.append(tables.markdown_table(rows, list(rows[0]), _TEXTS))
    if rows := _differences(compared):
        text.append(f"## Differences between checkpoints\n\n{_DIFFERENCES}\n")
        text.append(tables.markdown_table(rows, list(rows[0]), _TEXTS))
    return "\n".join(text)


def latex(material: Material, found: Sequence[Line], compared: Sequence[Difference]) -> str:
    """The tables of `markdown` with booktabs, one `tabular` each, to be taken apart."""
    text = [r"% Needs \usepackage{booktabs}."]
    for (checkpoint, shots), rows in _by_view(found).items():
        text.append(_tabular(rows, _columns(rows, ("checkpoint", "shots")),
                             f"{checkpoint}, {shots} shots"))  # fmt: skip
    if rows := _t0(material):
        text.append(_tabular(rows, list(rows[0]), "T0's table: mean (median) over prompts"))
    if rows := _differences(compared):
        text.append(_tabular(rows, list(rows[0]), "Differences between checkpoints"))
    return "\n\n".join(text) + "\n"


_NOTE = (
    "Median, mean and quartiles over the prompts of each dataset; the 95 % interval is of the "
    "mean, by bootstrap over examples that are resampled under all prompts at once. Averages count "
    "every dataset the same. A dataset with * was trained on.\n"
)
_DIFFERENCES = (
    "Paired on task and example; p by exchanging the answers of both at random, example by example "
    "(two-sided), and after Holm's correction over the datasets of one pair, shots and protocol."
)


def _by_view(found: Sequence[Line]) -> Mapping[tuple[str, int], list[Cells]]:
    """The rows of each checkpoint and number of shots, its averages at the end."""
    rows: dict[tuple[str, int], list[Cells]] = {}
    for line in found:
        rows.setdefault((line.view.checkpoint.label, line.view.shots), []).append(_line(line))
    for average in lines.averages(found):
        key = average.view.checkpoint.label, average.view.shots
        rows[key].append(_average(average))
    return rows


def _line(line: Line) -> Cells:
    places = layouts.digits(line)
    several = len(line.prompts) > 1
    return {
        **_about(line.view),
        "dataset": line.dataset + ("*" if line.trained else ""),
        "metric": line.metric,
        "prompts": str(len(line.prompts)),
        "examples": str(line.n),
        "median": tables.format_value(line.median, places),
        "mean": tables.format_value(line.mean, places),
        "95 % interval": ends_text(line.interval, places),
        "quartiles": ends_text(line.quartiles if several else None, places),
        **{
            name.replace("_", " "): tables.format_value(line.baselines.get(name), places)
            for name in BASELINES
        },
    }


def _average(average: Average) -> Cells:
    return {
        **_about(average.view),
        "dataset": f"average of {len(average.lines)}",
        "metric": tables.UNKNOWN,
        "prompts": str(sum(len(line.prompts) for line in average.lines)),
        "examples": tables.UNKNOWN,
        "median": tables.format_value(average.median, 1),
        "mean": tables.format_value(average.mean, 1),
        "95 % interval": ends_text(average.interval, 1),
        "quartiles": tables.UNKNOWN,
        **{
            name.replace("_", " "): tables.format_value(average.baseline(name), 1)
            for name in BASELINES
        },
    }


def _about(view: View) -> Cells:
    return {
        "checkpoint": view.checkpoint.label,
        "shots": str(view.shots),
        "protocol": view.protocol or "first of each",
    }


def _columns(rows: Sequence[Cells], without: Sequence[str] = ()) -> list[str]:
    """The columns that say something."""
    return [
        name
        for name in rows[0]
        if name not in without and any(row[name] != tables.UNKNOWN for row in rows)
    ]


def _t0(material: Material) -> list[Cells]:
    table = layouts.t0_table(material)

    def both(mean: float, median: float) -> str:
        return f"{mean:.1f} ({median:.1f})"

    return [
        {
            "checkpoint": row.checkpoint.label,
            **{
                c: both(*row.cells[c][:2]) if c in row.cells else tables.UNKNOWN
                for c in table.columns
            },
            "average": both(*row.average),
        }
        for row in table.rows
    ]


def _differences(compared: Sequence[Difference]) -> list[Cells]:
    return [
        {
            "difference": f"{one.first.label} to {one.second.label}",
            "shots": str(one.shots),
            "protocol": one.protocol or "first of each",
            "dataset": one.dataset or "average",
            "metric": one.metric or tables.UNKNOWN,
            "mean": f"{one.mean:+.1f}",
            "95 % interval": f"{one.interval[0]:+.1f} to {one.interval[1]:+.1f}",
            "p": p_text(one.p),
            "p after Holm": tables.UNKNOWN if one.adjusted is None else p_text(one.adjusted),
        }
        for one in compared
    ]


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_ESCAPED.get(character, character) for character in text)


def _tabular(rows: Sequence[Cells], columns: Sequence[str], title: str) -> str:
    kinds = "".join("l" if column in _TEXTS else "r" for column in columns)
    body = [" & ".join(escape(row[column]) for column in columns) + r" \\" for row in rows]
    return "\n".join(
        [
            f"% {' '.join(title.split())}",
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            " & ".join(escape(column) for column in columns) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )

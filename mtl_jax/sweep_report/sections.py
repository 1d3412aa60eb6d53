"""The tables of the page."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import markupsafe

from mtl_jax import charts, tables
from mtl_jax.sweep_files import BASELINES
from mtl_jax.sweep_report import layouts, lines
from mtl_jax.sweep_report.cells import Cell, Row, Table, ends_text, name_cell, p_text
from mtl_jax.sweep_report.choosing import ALL, Choosing
from mtl_jax.sweep_report.differences import Difference, pairs
from mtl_jax.sweep_report.gather import Material
from mtl_jax.sweep_report.lines import OWN, Average, Language, Line

# The page stays below 5 MB however large the sweep is: what does not fit is in results.md and
# results.jsonl, and the page says how much that is.
_RESULTS_BYTES = 1_500_000
_MOST_ROWS = 1500
_CELL = 120  # bytes, about


class Sections:
    """Makes the tables of one sweep."""

    def __init__(self, material: Material, found: Sequence[Line], compared: Sequence[Difference]):
        """Takes the material, its lines, and its checkpoints compared."""
        self._material = material
        self._found = found
        self._compared = compared
        self._pairs = pairs(material.checkpoints)
        self.choosing = Choosing(material, found, self._pairs)

    def about(self, line: Line) -> str:
        """The small print below a dataset's name."""
        words = [line.view.protocol, line.metric, f"{line.n:,} examples"]
        if len(self._material.checkpoints) > 1:
            words.insert(0, line.view.checkpoint.label)
        if len(self._material.shots) > 1:
            words.insert(-1, f"{line.view.shots} shots")
        if len({other.split for other in self._found}) > 1:
            words.append(line.split)
        return " · ".join(words)

    def _row(self, tokens: Sequence[str], cells: Iterable[Cell], total: bool = False) -> Row:
        hidden = self.choosing.hidden(tokens)
        return Row(" ".join(tokens), hidden, tuple(cells), total)

    def results(self) -> Table:
        """The lines of all datasets under each choice, and their averages."""
        baselines = self.baselines()
        kept, left_out = self._within_budget(len(baselines))
        names = sum(len(line.prompts) for line in kept) < 3000
        columns = [
            *("prompts", "median, quartiles", "mean, 95\u00a0%\u00a0interval"),
            *(name.replace("_", " ") for name in baselines),
        ]
        rows = []
        for line in kept:
            places = layouts.digits(line)
            strip = markupsafe.Markup(_strip(line, names))
            cells = [
                name_cell(line.dataset + ("*" if line.trained else ""), self.about(line)),
                Cell("", style="left", drawing=strip),
                Cell(str(len(line.prompts))),
                Cell(
                    tables.format_value(line.median, places),
                    ends_text(line.quartiles, places) if len(line.prompts) > 1 else "",
                    "strong",
                ),
                Cell(tables.format_value(line.mean, places), ends_text(line.interval, places, "")),
                *(
                    Cell(tables.format_value(line.baselines.get(name), places))
                    for name in baselines
                ),
            ]
            rows.append(self._row(self.choosing.of_line(line), cells))
        for average in lines.averages(self._found):
            rows.append(self._average_row(average, baselines))
        return Table(
            (("dataset", True), ("every prompt", True), *((name, False) for name in columns)),
            tuple(rows),
            left_out,
        )

    def _average_row(self, average: Average, baselines: Sequence[str]) -> Row:
        view = average.view
        tokens = self.choosing.tokens(
            checkpoint=view.checkpoint,
            shots=view.shots,
            protocol=view.protocol,
            main=True,
            dataset=ALL,
        )
        about = [f"{len(average.lines)} datasets", view.protocol or "first protocols"]
        if len(self._material.checkpoints) > 1:
            about.insert(0, view.checkpoint.label)
        if len(self._material.shots) > 1:
            about.append(f"{view.shots} shots")
        cells = [
            name_cell("Average", " · ".join(about)),
            Cell("", style="left"),
            Cell(str(sum(len(line.prompts) for line in average.lines))),
            Cell(tables.format_value(average.median, 1), style="strong"),
            Cell(tables.format_value(average.mean, 1), ends_text(average.interval, 1, "")),
            *(Cell(tables.format_value(average.baseline(name), 1)) for name in baselines),
        ]
        return self._row(tokens, cells, total=True)

    def _within_budget(self, baselines: int) -> tuple[list[Line], int]:
        """The lines that the page has room for: first metrics and own protocols come first."""
        order = sorted(
            range(len(self._found)),
            key=lambda i: (
                not (self._found[i].own and self._found[i].main),
                not self._found[i].main,
                -self._material.checkpoints.index(self._found[i].view.checkpoint),
            ),
        )
        kept, size = set(), 0
        for place in order:
            line = self._found[place]
            size += 700 + _CELL * baselines // 2 + 85 * len(line.prompts)
            if size > _RESULTS_BYTES:
                break
            kept.add(place)
        return [self._found[place] for place in sorted(kept)], len(order) - len(kept)

    def t0(self) -> Table | None:
        """T0's table; None: none of its datasets is in the sweep."""
        table = layouts.t0_table(self._material)
        if not table.rows:
            return None
        made = []
        for row in table.rows:
            cells = [Cell(row.checkpoint.label, style="left wide")]
            for column in table.columns:
                known = row.cells.get(column)
                cells.append(
                    Cell(f"{known[0]:.1f}", f"median {known[1]:.1f}, {known[2]} prompts")
                    if known
                    else Cell(tables.UNKNOWN)
                )
            mean, median = row.average
            cells.append(Cell(f"{mean:.1f}", f"median {median:.1f}", "strong"))
            made.append(Row("", False, tuple(cells)))
        titles = (("checkpoint", True), *((c, False) for c in table.columns), ("average", False))
        return Table(titles, tuple(made))

    def side_by_side(self, kind: str) -> Table | None:
        """Checkpoints ("c"), protocols ("p") or numbers of shots ("s") in columns; None: only one.

        Raises:
          KeyError: another kind.
        """
        material, names = self._material, lines.protocols(self._found)
        every: dict[str, tuple[Sequence[Any], list[str], Callable[[Line], Any]]] = {
            "c": (
                material.checkpoints,
                [c.label for c in material.checkpoints],
                lambda line: line.view.checkpoint,
            ),
            "p": (names, names, lambda line: line.view.protocol),
            "s": (material.shots, [f"{n} shots" for n in material.shots], lambda x: x.view.shots),
        }
        columns, titles, column = every[kind]
        rows = layouts.side_by_side(self._found, column, columns)
        if not rows:
            return None
        made = []
        for row in rows[:_MOST_ROWS]:
            # The column's own kind does not bind the row, but a dataset's first protocol does.
            own = any(line.own for line in row.cells if line)
            tokens = self.choosing.of_line(row.first, kind)
            if own and kind != "p" and "p*" not in tokens:
                tokens.append("p*")
            places = max(layouts.digits(line) for line in row.cells if line)
            about = [row.first.metric]
            if kind != "p":
                about.insert(0, row.first.view.protocol)
            if kind != "c" and len(self._material.checkpoints) > 1:
                about.insert(0, row.first.view.checkpoint.label)
            if kind != "s" and len(self._material.shots) > 1:
                about.append(f"{row.first.view.shots} shots")
            cells = [name_cell(row.first.dataset, " · ".join(about))]
            for place, line in enumerate(row.cells):
                style = "strong" if place == row.best else ""
                cells.append(
                    Cell(
                        tables.format_value(line.mean, places),
                        ends_text(line.interval, places, ""),
                        style,
                    )
                    if line
                    else Cell(tables.UNKNOWN)
                )
            made.append(self._row(tokens, cells))
        left_out = len(rows) - len(made)
        return Table((("dataset", True), *((t, False) for t in titles)), tuple(made), left_out)

    def differences(self) -> dict[str, Any] | None:
        """Checkpoints against each other; None: there is one, or no example has a score."""
        found = self._compared
        if not found:
            return None
        rows = [self._difference_row(one) for one in found[:_MOST_ROWS]]
        titles = (
            *(("dataset", True), ("difference", False), ("95 % interval", False)),
            *(("p", False), ("p after Holm", False), ("examples", False), ("prompts", False)),
        )
        return {
            "table": Table(titles, tuple(rows), len(found) - len(rows)),
            "selector": self.choosing.pair_selector(),
            "pair": " → ".join(c.label for c in self._pairs[0]),
        }

    def _difference_row(self, one: Difference) -> Row:
        pair = one.first, one.second
        tokens = self.choosing.tokens(
            shots=one.shots, protocol=one.protocol, dataset=one.dataset or ALL, pair=pair
        )
        about = [one.metric or "all datasets"]
        if one.protocol != OWN:
            about.append(one.protocol)
        if len(self._pairs) > 1:
            about.append(f"{one.first.label} → {one.second.label}")
        if len(self._material.shots) > 1:
            about.append(f"{one.shots} shots")
        # The average is one test; a dataset is one of many.
        p = one.p if one.adjusted is None else one.adjusted
        style = ("right" if one.mean > 0 else "wrong") + " strong" if p < 0.05 else ""
        cells = [
            name_cell(one.dataset or "Average", " · ".join(about)),
            Cell(f"{one.mean:+.1f}", style=style),
            Cell(f"{one.interval[0]:+.1f} to {one.interval[1]:+.1f}"),
            Cell(p_text(one.p)),
            Cell(tables.UNKNOWN if one.adjusted is None else p_text(one.adjusted)),
            Cell(f"{one.n:,}"),
            Cell(str(one.prompts)),
        ]
        return self._row(tokens, cells, total=not one.dataset)

    def families(self) -> Table | None:
        """Averages over the datasets of each family; None: no task tells its family."""
        found = lines.families(self._found)
        if not found:
            return None
        rows = []
        for one in found[:_MOST_ROWS]:
            tokens = self.choosing.tokens(
                checkpoint=one.view.checkpoint, shots=one.view.shots, protocol=one.view.protocol
            )
            lowest = min(one.lines, key=lambda line: line.mean)
            about = [one.view.checkpoint.label, one.view.protocol or "first protocols"]
            if len(self._material.shots) > 1:
                about.append(f"{one.view.shots} shots")
            cells = [
                name_cell(one.name, " · ".join(about)),
                Cell(str(len(one.lines))),
                Cell(str(sum(len(line.prompts) for line in one.lines))),
                Cell(tables.format_value(one.median, 1), style="strong"),
                Cell(tables.format_value(one.mean, 1)),
                Cell(ends_text(one.interval, 1)),
                Cell(f"{lowest.dataset} {lowest.mean:.1f}", style="left"),
            ]
            rows.append(self._row(tokens, cells))
        titles = (
            *(("family", True), ("datasets", False), ("prompts", False), ("median", False)),
            *(("mean", False), ("95 % interval", False), ("lowest dataset", True)),
        )
        return Table(titles, tuple(rows), len(found) - len(rows))

    def languages(self) -> Table | None:
        """Each language with its gap to English; None: no dataset is in several."""
        found = lines.languages(self._found)
        if not found:
            return None
        rows = [self._language_row(one) for one in found[:_MOST_ROWS]]
        titles = (
            *(("language", True), ("prompts", False), ("mean", False), ("95 % interval", False)),
            *(("gap to English", False), ("95 % interval of the gap", False)),
        )
        return Table(titles, tuple(rows), len(found) - len(rows))

    def _language_row(self, one: Language) -> Row:
        tokens = self.choosing.tokens(
            checkpoint=one.view.checkpoint,
            shots=one.view.shots,
            protocol=one.view.protocol,
            own=one.own,
        )
        about = [one.dataset, one.view.checkpoint.label, one.view.protocol, one.metric]
        if len(self._material.shots) > 1:
            about.append(f"{one.view.shots} shots")
        clear = one.gap_interval is not None and one.gap_interval[1] < 0
        gap = tables.UNKNOWN if one.gap is None else f"{one.gap:+.1f}"
        ends = one.gap_interval
        cells = [
            name_cell(one.language, " · ".join(about)),
            Cell(str(one.prompts)),
            Cell(tables.format_value(one.mean, 1), style="strong"),
            Cell(ends_text(one.interval, 1)),
            Cell(gap, style="wrong" if clear else ""),
            Cell(f"{ends[0]:+.1f} to {ends[1]:+.1f}" if ends else tables.UNKNOWN),
        ]
        return self._row(tokens, cells)

    def prompts(self) -> Table:
        """Every prompt with its value under each protocol."""
        names = lines.protocols(self._found)
        rows: dict[tuple[Any, ...], dict[str, str]] = {}
        facts: dict[tuple[Any, ...], tuple[Line, Any]] = {}
        newest_first = sorted(
            (line for line in self._found if line.main),
            key=lambda line: -self._material.checkpoints.index(line.view.checkpoint),
        )
        for line in newest_first:
            for (_, value), result in zip(line.prompts, line.results, strict=True):
                known = rows.setdefault(result.about, {})
                known[line.view.protocol] = tables.format_value(value, layouts.digits(line))
                facts.setdefault(result.about, (line, result))
        made = []
        for about, known in list(rows.items())[:_MOST_ROWS]:
            line, result = facts[about]
            words = [line.dataset, line.view.checkpoint.label]
            if len(self._material.shots) > 1:
                words.append(f"{line.view.shots} shots")
            cells = [
                name_cell(result.prompt, " · ".join(words)),
                *(Cell(known.get(name, tables.UNKNOWN)) for name in names),
                Cell(f"{result.n:,}"),
                Cell(tables.UNKNOWN if result.skipped is None else f"{result.skipped:,}"),
                Cell(f"{result.truncated:,}"),
            ]
            made.append(self._row(self.choosing.of_line(line, "p", "m"), cells))
        titles = [*names, "examples", "skipped", "cut"]
        columns = (("prompt", True), *((title, False) for title in titles))
        return Table(columns, tuple(made), len(rows) - len(made))

    def baselines(self) -> list[str]:
        """Which answers without a model are known."""
        known = {name for line in self._found for name in line.baselines}
        return [name for name in BASELINES if name in known]


def _strip(line: Line, names: bool) -> str:
    """The drawing of the spread over prompts, or "" for a metric without a fixed range."""
    high = 100.0 if layouts.digits(line) == 1 else 1.0
    values = [value for _, value in line.prompts]
    if min(values) < 0 or max(values) > high:
        return ""
    return charts.prompt_strip(
        values,
        0.0,
        high,
        line.median,
        list(line.baselines.items()),
        quartiles=line.quartiles if len(values) > 1 else None,
        names=[
            f"{name}: {tables.format_value(v, layouts.digits(line))}" for name, v in line.prompts
        ]
        if names
        else (),
    )

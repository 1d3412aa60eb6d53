"""report.html of a sweep: one file that works offline, without JavaScript, on a phone, in print."""

from collections.abc import Sequence
from typing import Any

import markupsafe

from mtl_jax import __version__, charts, tables
from mtl_jax.report_html import template
from mtl_jax.sweep_report import layouts, lines, samples
from mtl_jax.sweep_report.differences import Difference
from mtl_jax.sweep_report.gather import Material
from mtl_jax.sweep_report.lines import Line
from mtl_jax.sweep_report.sections import Sections

_MOST_WORST = 300


def _first_few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Page:
    """Builds the parts of the page."""

    def __init__(self, material: Material, found: Sequence[Line], compared: Sequence[Difference]):
        """Takes the material, its lines, and its checkpoints compared."""
        self._material = material
        self._found = found
        self._sections = Sections(material, found, compared)
        self._choosing = self._sections.choosing

    def render(self) -> str:
        """Returns the page as HTML text."""
        material = self._material
        return template("sweep.html").render(
            name=material.name,
            command=material.command.split(" ") if material.command else [],
            facts=self._facts(),
            remarks=self._remarks(),
            choosing=self._choosing.selectors(),
            shown=self._choosing.shown,
            results=self._sections.results(),
            baselines=self._sections.baselines(),
            t0=self._sections.t0(),
            checkpoints=self._sections.side_by_side("c"),
            differences=self._sections.differences(),
            curves=self._curves(),
            protocols=self._sections.side_by_side("p"),
            shots=self._sections.side_by_side("s"),
            families=self._sections.families(),
            languages=self._sections.languages(),
            worst=self._worst(),
            prompts=self._sections.prompts(),
            samples=samples.cards(samples.choose(material), self._choosing),
            versions=material.versions,
            version=__version__,
        )

    def _facts(self) -> list[tuple[str, str]]:
        material = self._material
        results = material.results
        prompts = {(result.dataset, result.prompt) for result in results}
        facts = [
            ("checkpoints", str(len(material.checkpoints))),
            ("datasets", str(len({dataset for dataset, _ in prompts}))),
            ("prompts", str(len(prompts))),
            ("shots", ", ".join(map(str, material.shots))),
            ("protocols", str(len(lines.protocols(self._found)))),
            ("answers", f"{sum(result.n for result in results):,}"),
        ]
        if material.seconds:
            facts.append(("time", tables.format_seconds(material.seconds)))
            if material.tokens:
                facts.append(("tokens/s", f"{material.tokens / material.seconds:,.0f}"))
        if material.versions.get("device_kind"):
            count = material.versions.get("device_count", 1)
            facts.append(("device", f"{count} x {material.versions['device_kind']}"))
        return facts

    def _remarks(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        material, made = self._material, []
        trained = sorted({result.dataset for result in material.results if result.trained})
        if trained:
            made.append(f"Trained on, so not zero-shot: {', '.join(trained)} (marked *).")
        cut = layouts.truncated(material)
        if cut:
            made.append(f"More than 1 % of the examples were cut to fit: {_first_few(cut)}.")
        few = layouts.few_exemplars(material)
        if few:
            made.append(
                "The inputs had no room for all solved examples that were asked for (on average): "
                f"{_first_few(few)}."
            )
        skipped = sum(result.skipped or 0 for result in material.results)
        if skipped:
            made.append(f"{skipped:,} rows were skipped because a prompt renders nothing for them.")
        if material.older:
            made.append(
                f"{material.older} cells of earlier settings are in the folder; of each task the "
                "newest counts."
            )
        return made

    def _curves(self) -> list[dict[str, Any]]:
        made = []
        runs = list(dict.fromkeys(c.run for c in self._material.checkpoints))
        for shots in self._material.shots:
            tokens = self._choosing.tokens(shots=shots)
            for dataset, by_run in layouts.curves(self._found, shots).items():
                title = dataset or "Average"
                drawing = charts.line_chart(
                    [
                        charts.Line(run, points, f"task-{runs.index(run) % 8}")
                        for run, points in by_run.items()
                    ],
                    title=f"{title} over training",
                    x_label="step",
                    y_label="",
                    width=300,
                    height=170,
                    legend=False,
                )
                made.append(
                    {
                        "tokens": " ".join(tokens),
                        "hidden": self._choosing.hidden(tokens),
                        "title": title,
                        "shots": f"{shots} shots" if len(self._material.shots) > 1 else "",
                        "drawing": markupsafe.Markup(drawing),
                        "legend": [(f"task-{runs.index(run) % 8}", run) for run in by_run],
                    }
                )
        return made

    def _worst(self) -> list[dict[str, Any]]:
        made = []
        for checkpoint in self._material.checkpoints:
            for one in layouts.worst_prompts(self._found, checkpoint):
                tokens = self._choosing.of_line(one.line)
                made.append(
                    {
                        "tokens": " ".join(tokens),
                        "hidden": self._choosing.hidden(tokens),
                        "dataset": one.line.dataset,
                        "prompt": one.prompt,
                        "about": self._sections.about(one.line),
                        "value": tables.format_value(one.value, layouts.digits(one.line)),
                        "behind": tables.format_value(one.behind, layouts.digits(one.line)),
                        "text": samples.shorten(one.text, 600),
                    }
                )
        return made[-_MOST_WORST:]

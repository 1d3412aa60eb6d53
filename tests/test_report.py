"""Metrics, ledger, progress, the table of results and the page of a run."""

import html.parser
import io
import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mtl_jax import charts, cli, heat_map, report, storage, tables
from mtl_jax.errors import UserError
from mtl_jax.run_directory import RunDirectory


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


# Metrics


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_on_disk_at_once_and_not_finite_ones_are_null(tmp_path):
    with report.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5, report.task_metric("loss", "nli"): float("nan")})
        (row,) = lines_of(tmp_path / "metrics.jsonl")
        assert row.pop("time") > 1.7e9
        assert row == {"step": 1, "loss": 2.5, "loss/nli": None}


def test_after_a_kill_no_step_appears_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": step}) + "\n" for step in (10, 20, 30, 40)]
    path.write_text("".join(rows) + '{"step": 50, "lo', encoding="utf-8")
    with report.MetricsWriter(tmp_path, resume_step=20) as writer:
        assert path.read_text(encoding="utf-8") == "".join(rows[:2])
        writer.write(30, {"loss": 1.0})
    assert [row["step"] for row in lines_of(path)] == [10, 20, 30]
    with report.MetricsWriter(tmp_path):
        assert path.read_text(encoding="utf-8") == "", "a run from the start begins anew"


def test_an_untouched_file_is_not_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n', encoding="utf-8")
    monkeypatch.setattr(storage, "replace_text", lambda *_: pytest.fail("rewritten"))
    storage.truncate_jsonl(path, 10)


def test_a_damaged_line_is_told_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        report.MetricsWriter(tmp_path, resume_step=5)
    assert '{"step": 3}' in path.read_text(encoding="utf-8")
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        storage.read_jsonl(path)


def test_other_processes_write_no_metrics(tmp_path):
    with report.MetricsWriter(tmp_path, tensorboard=True, primary=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_and_their_absence(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    with report.MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(3, {"loss": 0.5, "loss/nli": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss/nli" in content
    assert len(content) > 100

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"needs the package tensorboardX.*mtl_jax\[tensorboard\]"):
        report.MetricsWriter(tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()


# Ledger


def test_the_ledger_sums_to_the_wall_time():
    clock = Clock()
    ledger = report.Ledger(clock)
    clock.now += 1
    with ledger("step"):
        clock.now += 5
        with ledger("data"):
            clock.now += 2
        clock.now += 4
    clock.now += 3
    with ledger("step"):
        clock.now += 10
    assert ledger.seconds() == {"step": 19.0, "data": 2.0, "other": 4.0}
    assert ledger.wall() == 25.0
    with ledger("eval"):
        clock.now += 7
        assert ledger.seconds()["eval"] == 7.0, "also while an activity goes on"
    assert sum(ledger.seconds().values()) == ledger.wall() == 32.0


def test_the_ledger_books_also_when_an_activity_fails(tmp_path):
    clock = Clock()
    ledger = report.Ledger(clock)

    def fail():
        with ledger("eval"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1
    assert ledger.seconds() == {"eval": 2.0, "other": 1.0}


def test_each_start_has_its_entry_in_the_ledger(tmp_path):
    run = RunDirectory(tmp_path).create()
    for _ in range(2):
        clock = Clock()
        ledger = report.Ledger(clock)
        with ledger("step"):
            clock.now += 3
        ledger.save(run)
        ledger.save(run)
    entries = run.read_json("ledger.json")
    assert [entry["seconds"] for entry in entries] == [{"step": 3.0, "other": 0.0}] * 2
    assert [entry["wall"] for entry in entries] == [3.0, 3.0]


# Progress


def test_progress_prints_a_line_every_interval_and_the_last():
    clock, stream = Clock(), io.StringIO()
    with report.Progress(100, 20, stream=stream, interval=10, clock=clock) as progress:
        for step in range(21, 101):
            progress.update(step, loss=2.0, tokens_per_second=12345.6)
            clock.now += 1
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        *(f"{step}/100" for step in range(21, 100, 10)),
        "100/100",
    ]
    # One second a step: at step 31 there are 69 left.
    assert lines[1] == "step 31/100  loss 2.000  tokens/s 12,346  time left 1 min 09 s"
    assert lines[-1] == "step 100/100  loss 2.000  tokens/s 12,346"


def test_progress_shows_a_bar_on_a_terminal():
    stream = Terminal()
    with report.Progress(10, 4, stream=stream) as progress:
        progress.update(5, loss=1.25, tokens_per_second=1000.0)
        progress.write("evaluating")
        progress.update(10, loss=1.0)
    shown = stream.getvalue()
    assert "40%" in shown, "a resumed run starts where it stopped"
    assert "10/10" in shown
    assert "loss=1.000" in shown
    assert "evaluating\n" in shown


def test_durations():
    assert [tables.format_seconds(s) for s in (7.6, 200, 7500)] == [
        "8 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


# Table


def result(task, value, step=10, metric="accuracy", dataset="rte", trained=False, **more):
    return {
        "task": task, "dataset": dataset, "prompt": task, "family": "nli", "trained": trained,
        "split": "validation", "step": step, "metric": metric, "value": value, "n": 277, **more,
    }  # fmt: skip


def test_summary_against_the_statistics_module():
    values = [52.7, 61.0, 47.3, 70.4, 55.2, 64.8, 58.1]
    rows = [result(f"p{i}", value) for i, value in enumerate(values)]
    (summary,) = tables.summarise(rows)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    assert summary.mean == pytest.approx(statistics.mean(values))
    assert summary.median == pytest.approx(median)
    assert summary.quartiles == pytest.approx((low, high))
    assert (summary.chance, summary.majority, summary.untrained) == (None, None, None)


def test_newest_step_counts_and_step_zero_is_the_untrained_model():
    rows = [result("p", value, step) for step, value in ((0, 50.0), (10, 90.0), (5, 60.0))]
    rows += [result("p", 80.0, 10)]  # evaluated again
    (summary,) = tables.summarise(rows)
    assert (summary.mean, summary.untrained) == (80.0, 50.0)
    (alone,) = tables.summarise(rows[:1])
    assert (alone.mean, alone.untrained) == (50.0, None)


@pytest.mark.parametrize("as_rows", [True, False])
def test_baselines_stand_beside_the_accuracy(as_rows):
    rows = [result("a", 60.0), result("b", 70.0), result("a", 0.5, metric="f1")]
    if as_rows:
        rows += [result(task, 50.0, metric="chance") for task in "ab"]
        rows += [result(task, value, metric="majority") for task, value in (("a", 52), ("b", 54))]
    else:
        rows = [
            {**row, "chance": 50.0, "majority": 52 if row["task"] == "a" else 54}
            if row["metric"] == "accuracy"
            else row
            for row in rows
        ]
    accuracy, f1 = tables.summarise(rows)
    assert (accuracy.metric, accuracy.chance, accuracy.majority) == ("accuracy", 50.0, 53.0)
    assert (f1.metric, f1.chance, f1.majority) == ("f1", None, None)


def test_half_a_baseline_is_none():
    rows = [result("a", 60.0), result("b", 70.0, chance=50.0)]
    assert tables.summarise(rows)[0].chance is None


def test_results_table_for_the_terminal_and_for_markdown():
    rows = [result(f"p{i}", 50.0 + 10 * i, chance=50.0) for i in range(3)]
    rows += [result("q", 0.25, dataset="co|pa", metric="rouge", trained=True), result("x", None)]
    assert report.results_table(rows).splitlines() == [
        "dataset  prompts   metric    #   mean  median     quartiles  chance",
        "-------  --------  --------  -  -----  ------  ------------  ------",
        "co|pa    trained   rouge     1  0.250   0.250             -       -",
        "rte      held out  accuracy  3   60.0    60.0  55.0 to 65.0    50.0",
    ]
    markdown = report.results_table(rows, markdown=True).splitlines()
    assert markdown[0] == (
        "| dataset | prompts | metric | # | mean | median | quartiles | chance |"
    )
    assert markdown[1] == "| :--- | :--- | :--- | ---: | ---: | ---: | ---: | ---: |"
    assert markdown[2].startswith("| co\\|pa | trained |")
    assert report.results_table([]) == "No results yet.\n"


# Charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 5.2, [1, 2, 3, 4, 5]),
        (10, 1500, [500, 1000, 1500]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert charts.ticks(low, high, 5) == expected


def test_a_chart_is_drawn_to_scale_and_escaped():
    line = charts.Line("a<b", [(0, 0.0), (50, 5.0), (100, 10.0)], "line-0")
    drawing = charts.line_chart([line], title="x & y", x_label="step", y_label="loss")
    svg = ElementTree.fromstring(drawing)
    (curve,) = svg.iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = (
        tuple(map(float, point.split(","))) for point in curve.get("points").split()
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y2 < y0, "larger is higher"
    texts = [element.text for element in svg.iter("text")]
    assert {"step", "loss", "a<b", "0", "10"} <= set(texts)
    assert charts.line_chart([], title="", x_label="", y_label="") == ""


def test_thinning_and_smoothing_keep_the_mean_and_a_straight_line():
    points = [(float(x), float(x % 7)) for x in range(1000)]
    thinned = charts.thin(points, 100)
    assert len(thinned) == 100
    assert statistics.mean(y for _, y in thinned) == pytest.approx(
        statistics.mean(y for _, y in points)
    )
    straight = [3.0 * x for x in range(20)]
    smoothed = charts.smooth(list(enumerate(straight)), 5)
    assert [y for _, y in smoothed] == pytest.approx(straight)


def test_areas_stand_on_each_other():
    lines = [
        charts.Line("a", [(0, 0.25), (10, 0.5)], "area-0"),
        charts.Line("b", [(0, 0.75), (5, 1.0), (10, 0.5)], "area-1"),
    ]
    drawing = charts.stacked_area(lines, title="t", x_label="step", y_label="share")
    first, second = (
        [tuple(map(float, point.split(","))) for point in area.get("points").split()]
        for area in ElementTree.fromstring(drawing).iter("polygon")
    )
    assert first[:3] == second[:-4:-1], "the roof of one is the floor of the next"
    (_, top), (_, middle), (_, end) = second[:3]
    assert top == middle == end, "0.25 + 0.75, 0 + 1.0 where `a` is missing, 0.5 + 0.5"
    bottom, roof = first[-1][1], first[0][1]
    assert (bottom - roof) / (bottom - top) == pytest.approx(0.25, abs=1e-3)
    assert charts.stacked_area([], title="", x_label="", y_label="") == ""


def test_a_scatter_plot_has_marks_intervals_and_stairs():
    spots = [
        charts.Spot("1", "plain", 1.0, 2.0, "static", x_ends=(0.5, 1.5)),
        charts.Spot("2", "a<b", 2.0, 1.0, "dynamic", round=False, y_ends=(0.0, 2.0)),
    ]
    texts = {"title": "t", "x_label": "x", "y_label": "y"}
    svg = ElementTree.fromstring(charts.scatter(spots, **texts, stairs=[(1.0, 2.0)]))
    (circle,) = svg.iter("circle")
    assert [title.text for title in svg.iter("title")] == ["t", "plain", "a<b"]
    errors = [line for line in svg.iter("line") if "error" in line.get("class")]
    x1, x2 = (float(errors[0].get(name)) for name in ("x1", "x2"))
    assert (x1 + x2) / 2 == pytest.approx(float(circle.get("cx")), abs=0.11)
    (stairs,) = svg.iter("polyline")
    (left, _), corner, (_, bottom) = (
        tuple(map(float, point.split(","))) for point in stairs.get("points").split()
    )
    assert left < corner[0]
    assert corner == pytest.approx((float(circle.get("cx")), float(circle.get("cy"))))
    assert bottom > corner[1]
    # Where lower is better, the stairs run to the other side.
    mirrored = charts.scatter(spots, **texts, stairs=[(1.0, 2.0)], lower=(True, True))
    (stairs,) = ElementTree.fromstring(mirrored).iter("polyline")
    start = float(stairs.get("points").split(",")[0])
    assert start > corner[0]
    assert charts.scatter([], **texts) == ""


def test_bars_start_at_zero_and_say_their_sign():
    drawing = charts.interval_bars(
        [("up", 2.0, (1.0, 3.0)), ("down", -1.0, None)], title="t", unit=" %"
    )
    svg = ElementTree.fromstring(drawing)
    up, down = svg.iter("rect")
    assert (up.get("class"), down.get("class")) == ("gain", "loss")
    assert float(up.get("width")) == pytest.approx(2 * float(down.get("width")), abs=0.2)
    zero = float(up.get("x"))
    assert float(down.get("x")) + float(down.get("width")) == pytest.approx(zero, abs=0.11)
    assert {"+2.0 % (+1.0 to +3.0)", "-1.0 %"} <= {text.text for text in svg.iter("text")}


def test_a_heat_map_greys_noise_and_leaves_unknown_cells_empty():
    values = np.array([[1.0, -0.5], [np.nan, 0.25]])
    grey = np.array([[False, False], [False, True]])
    drawing = heat_map.heat_map(values, ["a<b", "c"], title="t", limit=0.5, grey=grey)
    cells = list(ElementTree.fromstring(drawing).iter("rect"))
    assert [cell.get("class") for cell in cells] == ["cell", "cell", "grey"]
    strong, cold, noise = (cell.get("style") or "" for cell in cells)
    assert "var(--f0) calc(var(--heat) * 1.000)" in strong, "beyond the limit is the limit"
    assert "var(--f1) calc(var(--heat) * 1.000)" in cold
    assert noise == ""
    many = heat_map.heat_map(np.zeros((20, 20)), ["n"] * 20, title="t", limit=1.0)
    assert '"number"' not in many, "numbers would not fit"


# Page


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and gathers links and text."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.stack, self.addresses, self.words, self.tags = [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "my <run>").create()
    run.write_command(["mtl-jax", "train", "--gin_file=gin/runs/quickstart.gin"])
    run.write_json("versions.json", {"jax": "9.9.9", "device_kind": "cpu", "device_count": 2})
    run.write_text("config.gin", "T5.emb_dim = 64\n")
    run.write_text("model-info.txt", "parameter\n\n4,608,000 parameters in 1 tensors\n")
    run.write_text(
        "mixture.txt", "task  examples  share\n----  --------  -----\nnli      1,200  100 %\n"
    )
    with report.MetricsWriter(run.path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": 3.0 / step, "loss/nli": 2.0 / step})
    rows = [
        result("seen", 90.0, 30, trained=True, chance=33.3),
        result("unseen", 60.0, 30, chance=33.3),
        result("new", 40.0, 30, dataset="cb"),
        result("seen", 30.0, 0, trained=True, chance=33.3),
    ]
    (run.path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.predictions.mkdir()
    predictions = [
        {"step": 30, "inputs": "Is <script>alert(1)</script> so?", "targets": "yes",
         "prediction": answer, "correct": answer == "yes"}
        for answer in ("yes", "no")
    ]  # fmt: skip
    (run.predictions / "seen.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in predictions)
    )
    run.write_json(
        "ledger.json", [{"started": "", "wall": 200, "seconds": {"step": 150, "other": 50}}]
    )
    return run


def test_the_page_tells_the_whole_run_and_needs_nothing_else(run):
    path = report.write_report(run.path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for fact in (
        "my <run>", "4.61 M", "mtl-jax train --gin_file=gin/runs/quickstart.gin", "3 min 20 s",
        "2 x cpu", "Trained prompts", "Held-out prompts of trained datasets", "Held-out datasets",
        "T5.emb_dim = 64", "75.0 %", "1,200", "jax 9.9.9", "expected yes answered no",
    ):  # fmt: skip
        assert fact in page.text, fact
    assert page.addresses == [], "the page loads nothing"
    assert "url(" not in text
    assert "@import" not in text
    assert "script" not in page.tags, "text of a data set must not become markup"
    # The curve over all tasks for wide and narrow windows, and the one of the only task.
    assert page.tags.count("polyline") == 2 + 2


def test_a_page_of_an_empty_run_and_of_one_without_a_curve(tmp_path):
    run = RunDirectory(tmp_path).create()
    run.write_text("config.gin", "")
    Page(report.write_report(run.path).read_text(encoding="utf-8"))
    with report.MetricsWriter(run.path) as writer:
        writer.write(1, {"loss": float("nan")})
        writer.write(2, {"loss": 1.0})
    Page(report.write_report(run.path).read_text(encoding="utf-8"))


def test_a_mixture_that_is_no_table_is_shown_as_it_is(run):
    run.write_text("mixture.txt", "two words\nand  three  columns\n")
    page = Page(report.write_report(run.path).read_text(encoding="utf-8"))
    assert "two words and three columns" in page.text


def test_main_rebuilds_the_page_and_prints_the_table(run, capsys):
    assert cli.main(["report", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(report.results_table(storage.read_jsonl(run.path / "results.jsonl")))
    assert str(run.path / "report.html") in shown
    assert (run.path / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds no run"):
        report.write_report(tmp_path)
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

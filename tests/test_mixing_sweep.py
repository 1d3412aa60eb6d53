"""`Compare.mixing`: one line of Gin, its arms, and the front of them under the other methods."""

import argparse
import csv
import json
import re

import pytest
from synthetic_runs import write_run
from test_report import Page
from test_train import flags

from mtl_jax import cli, compare_config, comparison_html
from mtl_jax.analysis.comparison import compare
from mtl_jax.errors import UserError

MIXTURE = ("Mixture.name=two", "Mixture.tasks=('a', 'b')", "Mixture.rates=examples")


def load(*bindings):
    args = argparse.Namespace(
        gin_file=["models/t5_1_1_tiny.gin"],
        gin_bindings=[*bindings, "Run.directory=runs", "Run.steps=1"],
        gin_search_paths=[],
    )
    return compare_config.load_args(args)


def test_a_grid_of_factors_has_an_arm_for_every_point():
    found = load("Compare.mixing={'nli_*': (0.5, 1), '*qa*': (1, 2, 4)}").arms
    assert list(found) == [f"mixing-{a}-{b}" for a in ("0.5", "1") for b in ("1", "2", "4")]
    assert found["mixing-0.5-4"] == [
        "Balance.method=StaticWeights",
        "StaticWeights.factors={'nli_*': 0.5, '*qa*': 4.0}",
        "StaticWeights.normalise=True",
    ]
    assert found["mixing-1-1"] == [], "all count once: plain training"


def test_a_point_that_is_an_arm_already_is_not_trained_twice():
    arms = "Compare.arms={'plain': (), 'pcgrad': ('Balance.method=PCGrad',)}"
    assert list(load(arms, "Compare.mixing={'*qa*': (0.5, 1, 2)}").arms) == [
        *("plain", "pcgrad", "mixing-0.5", "mixing-2")
    ]


def test_temperatures_make_mixtures_of_their_own():
    given = load(*MIXTURE, "Compare.mixing={'temperature': (1, 3), '*qa*': (1, 2)}").arms
    assert given["mixing-1-1"] == []
    assert given["mixing-3-1"] == ["Mixture.temperature=3.0", "Mixture.name=two_temperature_3"]
    assert given["mixing-3-2"][:2] == given["mixing-3-1"]
    assert given["mixing-3-2"][2:] == given["mixing-1-2"]


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["Compare.mixing={'a': ()}"], "'a' needs a name and different values"),
        (["Compare.mixing={'a': (2, 2.0)}"], "'a' needs a name and different values"),
        (["Compare.mixing={'a': (0, 1)}"], "values of 'a' must be positive, got 0.0"),
        (["Compare.mixing={'a': 2}"], "must be a dict of str to list of float"),
        (["Compare.mixing={'temperature': (1, 3)}"], "of a mixture that Gin makes: set Mixture"),
        (
            ["Compare.arms={'mixing-1': ()}"],
            "begin with something else than 'single-' or 'mixing-'",
        ),
        ([], "Compare.arms is empty"),
        (
            [*MIXTURE[:2], "Mixture.rates=equal", "Compare.mixing={'temperature': (1, 3)}"],
            "Mixture.rates='examples'",
        ),
    ],
)
def test_mistakes_name_the_field(bindings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(*bindings)


# (factor of nli, of qa) -> their scores: a tilt gives to one what it takes from the other, and
# of each tilt one point is the best.
SCORES = {
    (0.25, 4): (30, 70),
    (0.25, 1): (40, 60), (1, 4): (40, 59),
    (0.25, 0.25): (48, 50), (1, 1): (50, 50), (4, 4): (50, 47),
    (1, 0.25): (60, 40), (4, 1): (60, 37),
    (4, 0.25): (70, 27),
}  # fmt: skip


def swept(tmp_path):
    """A sweep of 3 x 3 points, one method above its front and one below."""
    made = []
    for (nli, qa), (x, y) in SCORES.items():
        options = {"factors": {"nli": nli, "qa": qa}, "normalise": True}
        folder = tmp_path / f"mixing-{nli:g}-{qa:g}"
        made.append(a_run(folder, x, y, method="StaticWeights", options=options))
    made.append(a_run(tmp_path / "pcgrad", 55, 52, method="PCGrad"))
    made.append(a_run(tmp_path / "famo", 40, 45, method="FAMO"))
    return made


def a_run(folder, x, y, **values):
    return write_run(folder, {"nli": float(x), "qa": float(y)}, trained=("nli", "qa"), **values)


def test_the_front_of_the_sweep_lies_under_the_other_methods(tmp_path):
    made = swept(tmp_path)
    found = compare(made, tasks=("nli", "qa"))
    plot = found.trade_offs[1]
    points = {point.label: point for point in plot.points}
    assert len(points) == 11
    assert sum(point.static for point in plot.points) == 9
    front = [(points[label].x.mean, points[label].y.mean) for label in plot.front]
    assert front == [(30, 70), (40, 60), (50, 50), (60, 40), (70, 27)]
    assert (points["PCGrad"].where, points["FAMO"].where) == ("over", "below")
    # (55, 52) over the stairs: from 40 to 50 they are at 50, from 50 to 55 at 40.
    assert points["PCGrad"].volume_gain == pytest.approx(10 * 2 + 5 * 12)


def test_numbers_and_page_of_a_sweep(tmp_path):
    made = swept(tmp_path)
    words = [*map(str, made), "--output", str(tmp_path / "out"), "--tasks", "nli", "qa"]
    assert cli.main(["report", "--compare", *words]) == 0
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    plot = comparison["trade_offs"][1]
    with (tmp_path / "out" / "trade_offs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["x_axis"] == "nli (accuracy)"]
    assert [row["method"] for row in rows] == [point["label"] for point in plot["points"]]
    assert [row["method"] for row in rows if row["on_front"] == "1"] == sorted(
        plot["front"], key=[row["method"] for row in rows].index
    )
    for row, point in zip(rows, plot["points"], strict=True):
        assert (float(row["x"]), float(row["y"])) == (point["x"]["mean"], point["y"]["mean"])
        assert (row["static"], row["position"]) == (str(int(point["static"])), point["where"])
    html = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "points of a\nmixing sweep" in html
    assert "below: set weights do as well in both" in Page(html).text
    drawing = comparison_html._plot(compare(made, tasks=("nli", "qa")).trade_offs[1])["drawing"]
    # Nine circles, five of them on the stairs, and two methods: seven have a number.
    assert drawing.count("<circle") == 9
    assert len(re.findall(r'class="label"[^>]*>\d+</text>', drawing)) == 7


@pytest.mark.slow
def test_a_small_sweep_is_trained_and_drawn(tmp_path, capsys):
    """Three runs of four steps."""
    words = flags(tmp_path / "swept", Run__steps=4, Eval__tasks="('tiny',)")[1:]
    words += ["--gin.Compare.arms={'famo': ['Balance.method=FAMO']}", "--gin.Compare.seeds=1"]
    words += ["--gin.Compare.mixing={'tiny_copy': (1, 4)}", "--gin.Compare.single_tasks=False"]
    assert cli.main(["compare", *words]) == 0
    folder = tmp_path / "swept"
    assert {path.name for path in folder.iterdir() if path.is_dir()} - {".jax_cache"} == {
        *("famo-seed0", "mixing-1-seed0", "mixing-4-seed0")
    }
    plot = json.loads((folder / "comparison.json").read_text())["trade_offs"][0]
    static = {point["label"]: point["static"] for point in plot["points"]}
    assert static == {"FAMO": False, "plain": True, "StaticWeights": True}
    assert set(plot["front"]) <= {"plain", "StaticWeights"}
    assert plot["front"]
    assert (folder / "trade_offs.csv").exists()
    told = json.loads((folder / "mixing-4-seed0" / "method.json").read_text())
    assert told["options"] == {"factors": {"tiny_copy": 4.0}, "normalise": True}

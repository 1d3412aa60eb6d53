"""From the files of runs to numbers and pages."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import TASKS, add_gradients, write_lines, write_run
from test_report import Page

from mtl_jax import cli, comparison_html, config
from mtl_jax.analysis import gradients, run_analysis, runs, state_files
from mtl_jax.analysis.comparison import AVERAGE, WORST, compare
from mtl_jax.errors import UserError

SCORES = {"nli": 60.0, "qa": 40.0, "sentiment": 90.0, "topic": 75.0}
COSINES = np.array(
    [[1, 0.1, 0.5, 0.6], [0.1, 1, -0.4, -0.2], [0.5, -0.4, 1, 0.0], [0.6, -0.2, 0.0, 1]]
)


def with_scores(**changes: float) -> dict[str, float]:
    return SCORES | changes


# gradients.jsonl


def line(step=10, **changes):
    row = {
        "step": step, "tasks": ["a", "b"], "groups": ["all"], "steps": 2,
        "gram": [[[4.0, 1.0], [1.0, 1.0]]], "cosine": [[[1.0, 0.5], [0.5, 1.0]]],
        "noise": [[0.8, None]],
    }  # fmt: skip
    return row | changes


def test_gradients_of_a_run_that_got_another_task(tmp_path):
    path = tmp_path / "gradients.jsonl"
    other = line(20, tasks=["b", "c"], cosine=[[[1.0, None], [None, None]]])
    write_lines(path, [line(), other])
    found = gradients.read_gradients(path)
    assert found.tasks == ("a", "b", "c")
    assert found.cosine_LKNN.shape == (2, 1, 3, 3)
    assert found.cosine_LKNN[0, 0, 0, 1] == 0.5
    assert np.isnan(found.cosine_LKNN[1, 0, 0]).all(), "the second line does not know `a`"
    assert np.isnan(found.noise_LKN[0, 0, 1])
    assert gradients.read_gradients(tmp_path / "none.jsonl") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosine": [[[1.0]]]}, r"'cosine' must be numbers or null of the shape \(1, 2, 2\)"),
        ({"gram": "big"}, "'gram' must be numbers or null"),
        ({"noise": None}, r"'noise' must be numbers or null of the shape \(1, 2\)"),
        ({"tasks": ["a", "a"]}, "'tasks' must be different names"),
        ({"steps": "2"}, "'steps' must be of type int"),
        ({"loss": [1.0]}, r"'loss' must be numbers or null of the shape \(2,\)"),
        ({"affinity": [[0.0, 0.0]] * 2}, "'lookaheads' must be of type int"),
        (
            {"affinity": [0.0, 0.0], "lookaheads": 1},
            r"'affinity' must be numbers or null of the shape \(2, 2\)",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path, change, message):
    path = tmp_path / "gradients.jsonl"
    write_lines(path, [line(), line(20, **change)])
    with pytest.raises(UserError, match=rf"gradients\.jsonl, line 2: {message}"):
        gradients.read_gradients(path)


def made(cosine_L, noise=0.5, steps=None):
    """Gradients of two tasks with the given cosines over training."""
    count = len(cosine_L)
    cosine = np.ones((count, 1, 2, 2))
    cosine[:, 0, 0, 1] = cosine[:, 0, 1, 0] = cosine_L
    steps_L = np.ones(count) if steps is None else np.asarray(steps, float)
    return gradients.Gradients(
        ("a", "b"), ("all",), 10 * np.arange(count), steps_L, 4 * cosine, cosine,
        np.full((count, 1, 2), noise), np.full((count, 2), np.nan), np.full((count, 2, 2), np.nan),
        np.zeros(count),
    )  # fmt: skip


def test_mean_cosines_and_what_is_noise():
    assert gradients.mean_cosine(made([0.1, 0.4], steps=[2, 1])).cosine_KNN[0, 0, 1] == (
        pytest.approx(0.2)
    ), "each line counts by its steps"
    steady = gradients.mean_cosine(made([-0.10, -0.11, -0.09, -0.10]))
    assert steady.told_KNN[0, 0, 1], "small, but always on one side"
    shaky = gradients.mean_cosine(made([-0.9, 0.8, -0.7, 0.9]))
    assert not shaky.told_KNN[0, 0, 1], "large, but on both sides"
    # Halves of one batch that do not agree: nothing is known of such a gradient.
    noisy = gradients.mean_cosine(made([-0.10, -0.11, -0.09, -0.10], noise=-0.01))
    assert not noisy.told_KNN.any()
    unknown = gradients.mean_cosine(made([0.2, 0.3, 0.2], noise=np.nan))
    assert unknown.told_KNN[0, 0, 1]
    assert not gradients.mean_cosine(made([np.nan])).told_KNN[0, 0, 1]


def test_a_mean_weighs_lines_and_passes_over_gaps():
    lines = np.array([[1.0, np.nan], [4.0, np.nan], [np.nan, np.nan]])
    found = gradients.weighted_mean(lines, np.array([1.0, 2.0, 50.0]))
    assert found[0] == 3.0
    assert np.isnan(found[1])


def test_stages_of_training_and_their_groups():
    found = made([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], steps=[3, 1, 1, 1, 1, 1])
    first, second, third = gradients.stages(found)
    assert (first[:2], second[:2], third[:2]) == ((0, 10), (20, 30), (40, 50))
    means = [cosine[0, 1] for *_, cosine in (first, second, third)]
    assert means == pytest.approx([0.05, 0.5, 0.9]), "a line counts by its steps"
    assert gradients.stages(made([0.1] * 5)) == []


def test_affinity_over_training_from_gramian_rate_and_loss():
    found = made([0.5, 0.25])
    metrics = [
        {"step": 0, "learning_rate": 0.1, "loss/a": 2.0, "loss/b": 1.0},
        {"step": 10, "learning_rate": 0.2, "loss/a": 2.0},
        {"step": 10, "eval/accuracy": 3.0},
    ]
    z = gradients.weighted_mean(gradients.first_order(found, metrics), found.steps_L)
    # Onto b only the first line knows the loss: 0.1 * 4 * 0.5 / 1.
    assert z[0, 1] == pytest.approx(0.2)
    # Onto a: the mean of 0.1 * 4 * 0.5 / 2 and 0.2 * 4 * 0.25 / 2.
    assert z[1, 0] == pytest.approx(0.1)
    assert np.isnan(gradients.first_order(found, [])).all()
    # What a line says of its own losses counts before metrics.jsonl.
    own = dataclasses.replace(found, loss_LN=np.array([[np.nan, 4.0], [np.nan, np.nan]]))
    assert gradients.first_order(own, metrics)[0, 0, 1] == pytest.approx(0.05)


# One run


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", SCORES, method="PCGrad", options={"orders": 1})
    add_gradients(folder, COSINES, groups=("encoder", "decoder"))
    (folder / "rates.json").write_text('{"nli": 0.25, "qa": 0.75}')
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_lie_beside_the_pictures(run):
    assert cli.main(["report", str(run)]) == 0
    folder = run / "analysis"
    weights = rows_of(folder / "weight.csv")
    assert [row["step"] for row in weights] == [str(step) for step in range(10, 301, 10)]
    assert float(weights[0]["qa"]) == pytest.approx(1 + 0.6 * np.sin(np.pi / 15 + 1))
    losses = rows_of(folder / "loss.csv")
    assert [row["step"] for row in losses] == [row["step"] for row in weights]
    assert [float(losses[0][task]) for task in TASKS] == [2.0] * 4
    shares = [sum(float(row[t]) for t in TASKS) for row in rows_of(folder / "effective_share.csv")]
    assert shares == pytest.approx([1.0] * 30)
    assert float(rows_of(folder / "epochs.csv")[-1]["topic"]) == 12.0
    assert float(rows_of(folder / "conflict.csv")[14]["conflict_rate"]) == pytest.approx(0.3)
    pairs = rows_of(folder / "cosine.csv")
    assert len(pairs) == 30 * 2 * 10
    cosine = json.loads((folder / "cosine.json").read_text())
    assert set(cosine["groups"]) == {"encoder", "decoder"}
    assert sorted(cosine["order"]) == sorted(TASKS)
    affinity = json.loads((folder / "affinity.json").read_text())
    # Length 2 each, rate 0.01, loss 2: eta G / l = 0.02 x cosine, over noise of 0.05 / sqrt(30).
    np.testing.assert_allclose(affinity["affinity"], 0.02 * COSINES, atol=0.02 * 0.05)
    assert affinity["groups"] == [["nli", "sentiment", "topic"], ["qa"]]
    assert affinity["exact"]
    assert sorted(affinity["groups_by_count"]) == ["2", "3"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["report", str(run)]) == 0
    assert before == {path: path.read_bytes() for path in folder.iterdir()}, "the same again"


def test_the_page_shows_what_there_is(run):
    run_analysis.save(run_analysis.analyse(run), run)
    assert cli.main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    for fact in (
        "method PCGrad", "Mixing rates found", "Weights of the tasks", "Share of the update",
        "Gradient norms", "Passes over the data", "Conflicts", "Do gradients agree? ",
        "encoder", "decoder", "Over training", "steps 10 to 100", "Which tasks help which",
        "nli, sentiment, topic", "0.7500",
    ):  # fmt: skip
        assert fact in page.text, fact
    assert "Solver fallbacks" not in page.text, "there was none"
    assert "What the encoder makes" not in page.text
    assert page.addresses == []
    assert "script" not in page.tags


def test_a_plain_run_has_no_multi_task_sections(tmp_path):
    folder = write_run(tmp_path / "plain", SCORES)
    assert cli.main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for heading in ("Weights", "Share of the update", "gradients", "help", "Mixing rates"):
        assert heading not in page.text
    assert not (folder / "analysis").exists()


def test_more_tasks_than_can_be_told_apart(tmp_path):
    tasks = tuple(f"task {i}" for i in range(30))
    folder = write_run(tmp_path / "run", {t: 50.0 for t in tasks}, trained=tasks)
    add_gradients(folder, np.eye(30), tasks=tasks)
    assert cli.main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "Drawn are 24 tasks, those with the largest values; 6 more are in the file." in page.text
    assert len(rows_of(folder / "analysis" / "weight.csv")[0]) == 31


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rates.json", '{"nli": "much"}', "rate of 'nli' is no number"),
        ("rates.json", "[1]", "must hold one JSON object"),
        ("method.json", "{", "it is not JSON"),
        ("gradients.jsonl", "{}\n", "line 1: 'step' must be of type int"),
    ],
)
def test_a_damaged_file_is_one_line(run, capsys, name, text, message):
    (run / name).write_text(text)
    assert cli.main(["report", str(run)]) == 1
    error = capsys.readouterr().err
    assert name in error
    assert message in error
    assert error.count("\n") == 1


# Runs


def test_settings_are_those_of_the_configuration(tmp_path):
    cfg = config.load(["runs/quickstart.gin"])
    (tmp_path / "config.gin").write_text(cfg.text)
    found = runs.read_settings(tmp_path / "config.gin")
    assert found["Run.steps"] == cfg.run.steps
    assert tuple(found["Eval.tasks"]) == tuple(cfg.eval.tasks), "a value over several lines"
    assert found["Data.seed"] == cfg.data.seed
    assert len(found) == sum(" = " in text for text in cfg.text.splitlines())
    (tmp_path / "config.gin").write_text("Run.steps = 3\nRun.seed = 1 +\n\nData.seed = 2\n")
    with pytest.raises(UserError, match=r"config\.gin, line 2: the value of Run\.seed is damaged"):
        runs.read_settings(tmp_path / "config.gin")
    with pytest.raises(UserError, match="is missing"):
        runs.read_settings(tmp_path / "nowhere" / "config.gin")


def test_the_clock_leaves_compiling_out_and_reads_between_lines(tmp_path):
    run = runs.read_run(write_run(tmp_path / "run", SCORES, seconds_per_step=0.5))
    assert run.seconds == pytest.approx(150.0), "300 steps; the first line's 5 s are compiling"
    assert run.seconds_until(105) == pytest.approx(52.5)
    assert run.seconds_until(301) is None
    assert runs.training_clock([{"step": 4, "seconds_per_step": 2.0}]) == [(4, 8.0)]


def test_prompts_of_a_dataset_are_one_task_and_held_out_ones_another(tmp_path):
    folder = write_run(tmp_path / "run", {"nli_1": 50.0}, trained=("nli_1", "nli_2"))
    rows = [
        {"task": task, "dataset": "nli", "trained": trained, "split": "validation", "step": 300,
         "metric": metric, "value": value}
        for task, trained, metric, value in (
            ("nli_1", True, "accuracy", 50.0), ("nli_1", True, "accuracy", 60.0),
            ("nli_2", True, "accuracy", 70.0), ("nli_3", False, "accuracy", 20.0),
            ("nli_2", True, "chance", 33.3), ("nli_1", True, "f1", None),
        )
    ]  # fmt: skip
    rows.append(rows[0] | {"split": "test", "value": 99.0})
    write_lines(folder / "results.jsonl", rows)
    run = runs.read_run(folder)
    assert run.scores == {
        ("nli", "accuracy"): 65.0,  # the later 60 replaces the 50
        ("nli (held out)", "accuracy"): 20.0,
    }
    assert run.trained == ("nli",), "so it is a single-task run"


# Comparison


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three methods and four single tasks, two seeds each; seed 1 scores 2 more everywhere."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for seed in (0, 1):
        plus = 2.0 * seed

        def scores(plus=plus, **changes):
            return {task: value + plus for task, value in with_scores(**changes).items()}

        made += [
            write_run(root / f"plain{seed}", scores(qa=38.0), seed=seed),
            write_run(root / f"static{seed}", scores(nli=62.0, qa=36.0), seed=seed,
                      method="StaticWeights", options={"factors": {"nli": 4.0}}),
            write_run(root / f"pcgrad{seed}", scores(nli=63.0, qa=44.0), seed=seed,
                      method="PCGrad", seconds_per_step=0.16),
        ]  # fmt: skip
        for task in TASKS:
            others = {other: 20.0 + plus for other in TASKS if other != task}
            own = {task: SCORES[task] + plus}
            made.append(write_run(root / f"only_{task}{seed}", own | others, trained=(task,),
                                  seed=seed))  # fmt: skip
    add_gradients(root / "pcgrad0", COSINES)
    return made


def test_methods_at_equal_steps_and_at_equal_time(folders):
    found = compare(folders)
    by_label = {result.label: result for result in found.by_steps}
    assert list(by_label) == ["plain", "StaticWeights", "PCGrad"]
    pcgrad = by_label["PCGrad"]
    assert (pcgrad.seeds, pcgrad.static, by_label["plain"].static) == (2, False, True)
    value = pcgrad.values["qa", "accuracy"]
    # Seeds 44 and 46: t(0.975, 1) = 12.706 times sd / sqrt(2) = 1.
    assert (value.mean, value.high - value.mean) == pytest.approx((45.0, 12.706), rel=1e-4)
    assert pcgrad.average.mean == pytest.approx(np.mean([63, 44, 90, 75]) + 1)
    assert pcgrad.worst.mean == 45.0
    # Both seeds of plain have 65.75 on average, before the seed's own 2; PCGrad 68.
    assert pcgrad.over_static.mean == pytest.approx(68.0 - 65.75)
    assert pcgrad.over_static.half_width == pytest.approx(0.0, abs=1e-9), "seed by seed"
    assert by_label["plain"].over_static is None, "it is the best with set weights"
    assert by_label["StaticWeights"].over_static.mean == pytest.approx(0.0)
    assert pcgrad.held_out is None
    # nli +3/60 and +3/62, qa +4/40 and +4/42, the others 0.
    expected = np.mean([np.mean([3 / 60, 4 / 40, 0, 0]), np.mean([3 / 62, 4 / 42, 0, 0])])
    assert pcgrad.transfer.delta.mean == pytest.approx(expected)
    assert pcgrad.transfer.paired
    assert by_label["plain"].transfer.worst == "qa"
    # The quickest runs take 30 s, in which PCGrad comes to step 187.5: from 20 less to 10 less.
    assert found.seconds == pytest.approx(30.0)
    timed = {result.label: result for result in found.by_time}
    assert (timed["plain"].step, timed["PCGrad"].step) == (300, 187)
    assert timed["PCGrad"].average.mean == pytest.approx(pcgrad.average.mean - 11.25)
    assert found.without_time == ()


def test_seeds_of_a_method_are_timed_together(tmp_path):
    """A seed that was slower by chance counts with the others; a method loses what it is slower."""
    paces = {"": (0.1, 0.12), "FAMO": (0.112, 0.112), "PCGrad": (0.12, 0.12), "GradNorm": (9, 9)}
    made = [
        write_run(tmp_path / f"{method}{seed}", SCORES, method=method, seed=seed,
                  seconds_per_step=pace)
        for method, of_seeds in paces.items() for seed, pace in enumerate(of_seeds)
    ]  # fmt: skip
    found = compare(made)
    assert found.seconds == pytest.approx(33.0)
    # FAMO is 1.8 % slower and PCGrad 9 %.
    assert {r.label: r.step for r in found.by_time} == {"plain": 300, "FAMO": 295, "PCGrad": 275}
    timed = {r.label: r.average.mean for r in found.by_time}
    assert timed["plain"] - timed["PCGrad"] == pytest.approx(10 * 25 / 100)
    assert timed["plain"] - timed["FAMO"] == pytest.approx(10 * (1 - 0.11 / 0.112) * 300 / 100)
    assert found.without_time == ("GradNorm",)
    assert "Not evaluated within that time: GradNorm" in Page(comparison_html.render(found)).text
    (made[0] / "metrics.jsonl").unlink()
    untimed = compare(made)
    assert (untimed.seconds, untimed.by_time) == (None, ())
    assert "At equal time" not in Page(comparison_html.render(untimed)).text


def test_trade_offs_against_static_runs(folders):
    found = compare(folders)
    averages, pair = found.trade_offs
    assert (averages.x_axis, averages.y_axis) == (AVERAGE, WORST)
    # The least cosine of COSINES.
    assert (pair.x_axis, pair.y_axis) == ("qa (accuracy)", "sentiment (accuracy)")
    chosen = compare(folders, tasks=("qa", "nli")).trade_offs[1]
    assert chosen.front == ("StaticWeights", "plain"), "by ascending qa: 37 and 39"
    pcgrad = next(point for point in chosen.points if point.label == "PCGrad")
    assert (pcgrad.where, pcgrad.static) == ("over", False)
    assert pcgrad.volume_gain > 0
    with pytest.raises(UserError, match=r"'qaa' is not evaluated.*Did you mean 'qa'"):
        compare(folders, tasks=("qaa", "nli"))
    with pytest.raises(UserError, match="two different tasks"):
        compare(folders, tasks=("qa", "qa"))


def test_transfer_between_single_tasks(folders):
    matrix = compare(folders).transfer
    # 20 and 22 against 60 and 62.
    expected = np.mean([20 / 60, 22 / 62]) - 1
    assert matrix["qa", "nli"].mean == pytest.approx(expected)
    assert matrix["nli", "nli"].mean == 0.0
    only = [folder for folder in folders if "only" in folder.name]
    alone = compare(only)
    assert alone.by_steps == ()
    assert alone.transfer == matrix
    assert "Comparison of single tasks" in comparison_html.render(alone)


def test_pages_and_files_of_a_comparison(folders, tmp_path, capsys):
    words = ["report", "--compare", *map(str, folders), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    markdown = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert shown.startswith(markdown)
    # 3.75 % and 3.59 %: 12.706 times half of the difference is 1.0.
    assert "| PCGrad (2 seeds · 48 s) | +3.7 % ± 1.0 |" in markdown
    plain = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert plain["equal_steps"][2]["tasks"]["qa"]["accuracy"]["mean"] == 45.0
    assert plain["single_task_runs"] == {task: 2 for task in TASKS}
    page = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    for fact in ("At equal steps", "At equal time", "Against a model for each task", "Trade-offs",
                 "Transfer between tasks", "beyond them", "Δm, all tasks"):  # fmt: skip
        assert fact in page.text, fact
    assert page.addresses == []
    assert "Do the encoders agree?" not in page.text


def test_encoders_are_compared_where_all_have_states(tmp_path):
    made = []
    states = np.random.default_rng(0).normal(size=(20, 4)) + np.repeat(np.eye(4), 5, axis=0) * 4
    for seed in (0, 1):
        made.append(write_run(tmp_path / f"run{seed}", SCORES, seed=seed))
        labels, texts = np.repeat(np.arange(4), 5), [str(i) for i in range(20)]
        state_files.save_states(made[-1] / "analysis", states, labels, TASKS, texts, 300)
    found = compare(made)
    np.testing.assert_allclose(found.alignment["cka"], 1.0, atol=1e-6)
    assert "Do the encoders agree?" in comparison_html.render(found)


def test_without_baselines_there_is_no_delta(folders):
    multi = [folder for folder in folders if "only" not in folder.name]
    page = Page(comparison_html.render(compare(multi)))
    assert "Δm" not in page.text
    some = compare([*multi, *(folder for folder in folders if folder.name == "only_qa0")])
    assert some.by_steps[0].transfer.delta is None
    assert some.by_steps[0].transfer.missing == ("nli", "sentiment", "topic")
    text = Page(comparison_html.render(some)).text
    assert "No Δm: nli, sentiment, topic have no single-task run" in text


def test_settings_that_differ_are_part_of_the_name(tmp_path):
    made = [
        write_run(tmp_path / str(factor), SCORES, method="StaticWeights",
                  options={"factors": {"qa": factor}}, Data__prefetch=factor)
        for factor in (2, 3)
    ]  # fmt: skip
    labels = [result.label for result in compare(made).by_steps]
    assert labels == [f"StaticWeights (factors qa {factor})" for factor in (2, 3)]


def test_losses_have_no_average_and_a_front_on_the_other_side(tmp_path):
    made = [
        write_run(tmp_path / "a", {"nli": 1.0, "qa": 3.0}, metric="loss"),
        write_run(tmp_path / "b", {"nli": 2.0, "qa": 2.0}, metric="loss", method="StaticWeights"),
        write_run(tmp_path / "c", {"nli": 2.5, "qa": 3.5}, metric="loss", method="PCGrad"),
    ]
    found = compare(made, tasks=("nli", "qa"))
    assert found.by_steps[0].average is None
    (trade_off,) = found.trade_offs
    assert trade_off.front == ("StaticWeights", "plain"), "from the worst nli to the best"
    assert [point.where for point in trade_off.points] == ["over", "over", "below"]
    assert "nli (loss) (lower is better)" in Page(comparison_html.render(found)).text

"""What the report of a sweep says, against the rows and predictions it was made from."""

import json
import re
import shutil
import statistics
import sys

import numpy as np
import pytest
import synthetic_runs
import synthetic_sweeps
from synthetic_sweeps import Dataset

from mtl_jax import cli, sweep_files, sweep_report
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl
from mtl_jax.sweep_report import documents, layouts, lines
from mtl_jax.sweep_report.differences import compare_checkpoints
from mtl_jax.sweep_report.gather import Checkpoint, gather_results
from mtl_jax.sweep_report.lines import OWN, View

NEW, OLD = Checkpoint("p3@400", "p3", 400), Checkpoint("p3@200", "p3", 200)
SMALL = (
    Dataset("super_glue_cb", 5, 30, "nli", ("Yes", "No", "Maybe")),
    Dataset("super_glue_copa", 4, 24, "commonsense", ("rain", "sun"), trained=True),
    Dataset("news_summary", 2, 12, "summarisation"),
    Dataset("xnli_en", 2, 40, "nli", ("true", "false"), "en", base=1.0),
    Dataset("xnli_sw", 2, 40, "nli", ("kweli", "uongo"), "sw", base=-1.0),
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return synthetic_sweeps.write_sweep(tmp_path_factory.mktemp("sweeps") / "a", SMALL)


@pytest.fixture(scope="module")
def material(sweep):
    return gather_results([sweep])


@pytest.fixture(scope="module")
def found(material):
    return lines.dataset_lines(material)


def line_of(found, dataset, protocol="t0", checkpoint=NEW, shots=0, metric=None):
    (line,) = (
        line
        for line in found
        if line.dataset == dataset
        and line.view == View(checkpoint, shots, protocol)
        and (line.metric == metric if metric else line.main)
    )
    return line


def values_of(sweep, dataset, protocol, metric="accuracy", checkpoint=NEW.label, shots=0):
    return [
        row["value"]
        for row in read_jsonl(sweep / "results.jsonl")
        if (row["dataset"], row["protocol"], row["metric"]) == (dataset, protocol, metric)
        and (row["checkpoint"], row["shots"]) == (checkpoint, shots)
    ]


def test_a_line_is_the_rows_of_the_table_summarised(sweep, found):
    line = line_of(found, "super_glue_cb", "lm_eval", OLD, 2)
    values = values_of(sweep, "super_glue_cb", "lm_eval", checkpoint=OLD.label, shots=2)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    assert len(line.prompts) == 5
    assert line.mean == pytest.approx(statistics.mean(values))
    assert (line.median, *line.quartiles) == pytest.approx((median, low, high))
    # 30 examples, three choices in turn; there is a demonstration to be copied.
    known = {"random": 100 / 3, "majority": 100 / 3, "copy_demonstration": 30.0}
    assert line.baselines == pytest.approx(known)
    assert "copy_demonstration" not in line_of(found, "super_glue_cb").baselines
    assert (line.own, line_of(found, "super_glue_cb").own) == (False, True)


def test_intervals_only_where_the_metric_is_the_mean_of_scores(found):
    first = line_of(found, "news_summary", "generate", metric="rouge1")
    second = line_of(found, "news_summary", "generate", metric="rouge2")
    assert (first.main, second.main) == (True, False)
    assert first.interval[0] < first.mean < first.interval[1]
    assert second.interval is None


def test_numbers_of_a_dataset_do_not_depend_on_the_others(tmp_path, found):
    alone = synthetic_sweeps.write_sweep(tmp_path / "alone", SMALL[1:2])
    (line,) = (
        one
        for one in lines.dataset_lines(gather_results([alone]))
        if one.view == View(NEW, 0, "t0")
    )
    assert line.interval == line_of(found, "super_glue_copa").interval


def test_averages_count_every_dataset_the_same(found):
    (average,) = (a for a in lines.averages(found) if a.view == View(NEW, 0, OWN))
    names = [line.dataset for line in average.lines]
    assert sorted(names) == sorted(dataset.name for dataset in SMALL)
    own = {"news_summary": "generate"}
    means = [line_of(found, name, own.get(name, "t0")).mean for name in names]
    assert average.mean == pytest.approx(statistics.mean(means))
    assert average.interval[0] < average.mean < average.interval[1]
    assert average.baseline("random") is None, "the generated dataset has none"
    (ranked,) = (a for a in lines.averages(found) if a.view == View(NEW, 0, "t0"))
    assert ranked.baseline("random") == pytest.approx((100 / 3 + 3 * 50) / 4)
    families = {a.name: a for a in lines.families(found) if a.view == View(NEW, 0, "t0")}
    assert sorted(families) == ["commonsense", "nli"]
    assert len(families["nli"].lines) == 3


def test_the_gap_to_english(found):
    ours = [x for x in lines.languages(found) if x.view == View(NEW, 0, "t0")]
    assert [(x.dataset, x.language) for x in ours] == [("xnli", "en"), ("xnli", "sw")]
    english, swahili = ours
    assert english.gap is None
    assert english.mean == pytest.approx(line_of(found, "xnli_en").mean)
    assert swahili.gap == pytest.approx(swahili.mean - english.mean)
    low, high = swahili.gap_interval
    assert low < swahili.gap < high < 0
    # Against resampling the pairs of examples in a loop.
    scores = {
        x.language: np.stack([r.scores["t0"] for r in line_of(found, f"xnli_{x.language}").results])
        for x in ours
    }
    rng = np.random.default_rng(0)
    gaps = [
        scores["sw"][:, picks].mean() - scores["en"][:, picks].mean()
        for picks in rng.integers(0, 40, (2000, 40))
    ]
    # Ends of two independent bootstraps; their standard error is about 0.06 of the spread.
    error = np.std(gaps)
    np.testing.assert_allclose([low, high], np.percentile(gaps, [2.5, 97.5]), atol=0.3 * error)


@pytest.mark.parametrize(
    ("dataset", "language", "base"),
    [("xnli_sw", "sw", "xnli"), ("xnli", "sw", "xnli"), ("cb", "", "cb"), ("a_en", "fr", "a_en")],
)
def test_a_dataset_without_its_language(dataset, language, base):
    assert lines.base_dataset(dataset, language) == base


def test_checkpoints_are_compared_on_the_same_examples(material, found):
    compared = compare_checkpoints(found, material.checkpoints)
    ours = [d for d in compared if (d.shots, d.protocol) == (0, OWN)]
    assert ours[0].dataset == "", "the average comes first"
    assert ours[0].adjusted is None
    by_dataset = {d.dataset: d for d in ours[1:]}
    assert sorted(by_dataset) == sorted(dataset.name for dataset in SMALL)
    for name, d in by_dataset.items():
        protocol = "generate" if name == "news_summary" else "t0"
        before, after = (line_of(found, name, protocol, c).mean for c in (OLD, NEW))
        assert d.mean == pytest.approx(after - before, abs=0.01)
        assert d.interval[0] < d.mean < d.interval[1]
        assert d.p <= d.adjusted <= 1
    assert ours[0].mean == pytest.approx(np.mean([d.mean for d in by_dataset.values()]))
    assert ours[0].p < 0.001, "the later checkpoint is better by construction"
    # Holm is over the datasets of one table: the smallest p counts as often as there are datasets.
    least = min(by_dataset.values(), key=lambda d: d.p)
    assert least.adjusted == pytest.approx(min(1, len(by_dataset) * least.p))


def test_t0s_table(sweep, material):
    table = layouts.t0_table(material)
    old, new = table.rows
    assert table.columns == ("CB", "COPA")
    assert (old.checkpoint, new.checkpoint) == (OLD, NEW)
    assert set(new.cells) == {"CB", "COPA"}
    values = values_of(sweep, "super_glue_cb", "t0")
    assert new.cells["CB"] == pytest.approx((np.mean(values), np.median(values), 5))
    assert new.average[0] == pytest.approx((new.cells["CB"][0] + new.cells["COPA"][0]) / 2)


def test_t0s_table_pools_neither_splits_nor_rounds_nor_spellings(tmp_path):
    pair = ("a", "b")
    sets = (
        Dataset("super_glue_wic", 1, 4, "wsd", pair, split="test"),
        Dataset("super_glue_cb", 2, 6, "nli", pair, split="train"),
        Dataset("super_glue_cb", 3, 6, "nli", pair),
        Dataset("anli_r1", 1, 4, "nli", pair),
        Dataset("anli", 2, 4, "nli", pair, split="dev_r3"),
        Dataset("anli", 2, 4, "nli", pair, split="train_r3"),
        Dataset("super_glue_wsc.fixed", 2, 6, "coreference", pair),
        Dataset("super_glue_copa", 2, 6, "commonsense", pair, original=False),
        Dataset("hellaswag", 2, 6, "commonsense"),  # generated
    )
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", sets, {("p3", 1): 0.0}, shots=(0, 2))
    for cell in sweep_files.cell_folders(folder):
        # Another metric first, as CB has it.
        rows = read_jsonl(cell / "results.jsonl")
        first = [row | {"metric": "mean_3class_f1", "value": 1.0} for row in rows]
        sweep_files.write_lines(cell / "results.jsonl", [*first, *rows])
    material = gather_results([folder])
    table = layouts.t0_table(material)
    assert table.columns == ("CB", "ANLI R1", "ANLI R3", "WSC", "WiC (test)")
    (row,) = table.rows
    assert [row.cells[column][2] for column in table.columns] == [3, 1, 2, 2, 1]
    values = [
        row["value"]
        for row in read_jsonl(folder / "results.jsonl")
        if (row["dataset"], row["split"]) == ("super_glue_cb", "validation")
        and (row["protocol"], row["shots"]) == ("t0", 0)
    ]
    assert row.cells["CB"][:2] == pytest.approx((np.mean(values), np.median(values)))


def test_t0s_datasets_are_in_the_library_of_tasks():
    from mtl_jax.tasks.benchmarks import catalogue

    registered = {dataset.group or dataset.name for dataset in catalogue.DATASETS}
    assert layouts.T0_DATASETS.keys() <= registered


@pytest.mark.data
def test_t0s_table_has_a_column_for_every_dataset_that_t0_was_evaluated_on(data_folder):
    """By the list of T0's evaluation prompts; ANLI has three rounds there."""
    told = json.loads((data_folder / "promptsource" / "t0_eval_prompts.json").read_text())
    names = {"_".join(filter(None, (one["dataset"], one["subset"]))) for one in told}
    known = {re.sub(r"\W", "_", name) for name in names}
    rounds = {f"anli_r{number}" for number in (1, 2, 3)}
    assert layouts.T0_DATASETS.keys() == (known - {"anli"}) | rounds


def test_worst_prompts_come_with_their_text(found):
    worst = layouts.worst_prompts(found, NEW)
    assert [one.behind for one in worst] == sorted((one.behind for one in worst), reverse=True)
    ours = [
        one for one in worst if one.line.dataset == "super_glue_cb" and one.line.view.shots == 0
    ]
    line = line_of(found, "super_glue_cb")
    values = sorted(value for _, value in line.prompts)
    assert [one.value for one in sorted(ours, key=lambda one: one.value)] == values[:3]
    number = re.search(r"\d+$", ours[0].prompt)[0]
    assert ours[0].text.startswith(f"Prompt {number}, example ")


def test_curves_over_the_steps_of_a_run(found):
    curves = layouts.curves(found, 0)
    assert next(iter(curves)) == "", "the average comes first"
    expected = [(c.step, line_of(found, "super_glue_cb", "t0", c).mean) for c in (OLD, NEW)]
    assert curves["super_glue_cb"] == {"p3": expected}


# Folders


def test_a_cell_made_again_with_other_settings_counts_once(tmp_path):
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", SMALL[:1], shots=(0,))
    (before, *_) = sweep_files.cell_folders(folder)
    after = before.with_name("0shot-ffffffffff")
    shutil.copytree(before, after)
    facts = json.loads((after / "cell.json").read_text()) | {"key": "f" * 24, "skipped": 11}
    (after / "cell.json").write_text(json.dumps(facts))
    material = gather_results([folder])
    assert material.older == 1
    assert len(material.results) == 10
    assert 11 in {result.skipped for result in material.results}


def test_sweeps_are_put_side_by_side(tmp_path, sweep):
    # The same checkpoint with another task: one column. Another model of the same name: its own.
    more = synthetic_sweeps.write_sweep(
        tmp_path / "more", [Dataset("rte", 2, 20, "nli", ("a", "b"))]
    )
    other = synthetic_sweeps.write_sweep(tmp_path / "b", SMALL[:2], seed=1)
    joined = gather_results([sweep, more])
    assert [c.label for c in joined.checkpoints] == ["p3@200", "p3@400"]
    assert {result.dataset for result in joined.results} > {"rte", "super_glue_cb"}
    apart = gather_results([sweep, other, sweep])
    assert [c.label for c in apart.checkpoints] == [
        *("a/p3@200", "a/p3@400", "b/p3@200", "b/p3@400")
    ]
    compared = compare_checkpoints(lines.dataset_lines(apart), apart.checkpoints)
    assert {(d.first.label, d.second.label) for d in compared} >= {("a/p3@400", "b/p3@400")}


def test_runs_and_sweeps_in_one_report(tmp_path, sweep, capsys):
    run = synthetic_runs.write_run(tmp_path / "plain", {"super_glue_cb": 70.0, "qa": 40.0})
    assert cli.main(["report", str(sweep), str(run), "--output", str(tmp_path / "out")]) == 0
    assert "plain@300" in capsys.readouterr().out
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## plain@300, 0 shots" in text
    assert "## p3@400, 2 shots" in text
    assert not (sweep / "report.html").exists(), "nothing is written where it was not asked for"


def test_what_a_run_ranked_is_compared_with_what_a_sweep_ranked(tmp_path, sweep):
    """A run of the sweep's newest checkpoint with the same answers: all differences are 0."""
    run = tmp_path / "again"
    (run / "predictions").mkdir(parents=True)
    rows = []
    for folder in sweep_files.cell_folders(sweep):
        facts = sweep_files.read_facts(folder)
        if (facts.checkpoint, facts.shots) != (NEW.label, 0):
            continue
        protocol = "generate" if facts.dataset == "news_summary" else "t0"
        about = {"task": facts.task, "dataset": facts.dataset, "prompt": facts.prompt}
        about |= {"split": facts.split, "step": facts.step, "n": facts.n}
        names = {"random": "chance", "majority": "majority"}
        for row in read_jsonl(folder / "results.jsonl"):
            metric = names.get(row["protocol"], row["metric"])
            if row["protocol"] in (protocol, *names):
                rows.append(about | {"metric": metric, "value": row["value"]})
        lines_of_run = []
        for line in sweep_files.predictions(folder):
            told = line["by_protocol"][protocol]
            answer = {"index": line["index"], "step": facts.step, "inputs": line["inputs"]}
            answer |= {"targets": line["targets"], "prediction": told["prediction"]}
            if line["choices"]:
                answer |= {"choices": line["choices"], "scores": told["values"]}
                answer["correct"] = told["score"] == 100
            lines_of_run.append(answer)
        sweep_files.write_lines(run / "predictions" / f"{facts.task}.jsonl", lines_of_run)
    scored = {"task": "odds", "split": "validation", "step": 400, "metric": "loss", "value": 1.5}
    only_scored = {"index": 0, "step": 400, "inputs": "", "targets": "x", "target_score": -1.5}
    sweep_files.write_lines(run / "predictions" / "odds.jsonl", [only_scored])
    sweep_files.write_lines(run / "results.jsonl", [*rows, scored])
    joined = gather_results([sweep, run])
    ours = Checkpoint("again@400", "again", 400)
    protocols = {
        r.dataset: {p for p, _ in r.values} for r in joined.results if r.checkpoint == ours
    }
    ranked = {dataset.name: {"t0"} for dataset in SMALL if dataset.choices}
    assert protocols == ranked | {"news_summary": {"generate"}, "odds": {"target_score"}}
    found = lines.dataset_lines(joined)
    line = line_of(found, "super_glue_cb", checkpoint=ours)
    assert line.baselines == line_of(found, "super_glue_cb").baselines
    compared = [
        d
        for d in compare_checkpoints(found, joined.checkpoints)
        if {d.first, d.second} == {NEW, ours} and d.protocol == "t0"
    ]
    assert {d.dataset for d in compared} == {"", *ranked}
    assert {d.mean for d in compared} == {0.0}
    # Its rows do not say which prompts are for the original task.
    assert ours not in {row.checkpoint for row in layouts.t0_table(joined).rows}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{sweep}", "--compare"], "--compare is of runs, and .* is a sweep"),
        (["{sweep}", "--tasks", "a", "b"], "--tasks is of --compare"),
        (["{run}", "--tensorboard"], "--tensorboard is of sweeps"),
        (["{sweep}", "{empty}", "--output", "x"], "empty holds neither a sweep nor results"),
        (["{sweep}", "nowhere", "--output", "x"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, sweep, tmp_path, capsys):
    run = synthetic_runs.write_run(tmp_path / "run", {"qa": 1.0})
    (tmp_path / "empty").mkdir()
    places = {"sweep": sweep, "run": run, "empty": tmp_path / "empty"}
    assert cli.main(["report", *(word.format(**places) for word in words)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_a_sweep_without_results_and_a_damaged_one(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(UserError, match="has no results yet"):
        sweep_report.write(tmp_path)
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", SMALL[:1], shots=(0,))
    cell = sweep_files.cell_folders(folder)[0]
    (cell / "results.jsonl").write_text('{"protocol": "t0"}\n')
    with pytest.raises(UserError, match=r"is damaged.*Delete the cell's folder"):
        sweep_report.write(folder)
    # A cell that another process has not finished has no results yet.
    (cell / "results.jsonl").unlink()
    assert len(gather_results([folder]).results) == 9


def test_cells_of_which_only_the_baselines_have_a_value(tmp_path):
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", SMALL[:1], shots=(0,))
    for cell in sweep_files.cell_folders(folder):
        rows = read_jsonl(cell / "results.jsonl")
        kept = [row for row in rows if row["protocol"] in sweep_files.BASELINES]
        sweep_files.write_lines(cell / "results.jsonl", kept)
    report = sweep_report.SweepReport([folder])
    assert report.table() == "No cell has a value yet.\n"
    assert report.write(folder).exists()


# Markdown, LaTeX, terminal, TensorBoard


def test_markdown_latex_and_terminal_have_the_same_numbers(sweep, tmp_path, found):
    report = sweep_report.SweepReport([sweep])
    report.write(tmp_path)
    markdown, latex = ((tmp_path / f"results.{end}").read_text() for end in ("md", "tex"))
    line = line_of(found, "super_glue_cb")
    numbers = [f"{line.median:.1f}", f"{line.mean:.1f}"]
    row = next(
        row
        for row in markdown[markdown.index("## p3@400, 0 shots") :].splitlines()
        if row.startswith("| t0 | super_glue_cb | accuracy |")
    )
    assert [cell.strip() for cell in row.split("|")][6:8] == numbers
    assert r"t0 & super\_glue\_cb & accuracy & 5 & 30 & " + " & ".join(numbers) in latex
    text = report.table().splitlines()
    row = next(row for row in text if re.match(r"p3@400 +0 .* super_glue_cb ", row))
    assert row.split()[6:8] == numbers
    assert "super_glue_copa*" in markdown, "it was trained on"
    assert "## Differences between checkpoints" in markdown
    assert "## T0's table" in markdown


def test_latex_is_balanced_and_escaped(sweep, tmp_path):
    sweep_report.write_many([sweep], tmp_path)
    latex = (tmp_path / "results.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 6
    for table in latex.split(r"\begin{tabular}{")[1:]:
        columns = len(table[: table.index("}")])
        body = [row for row in table.splitlines() if row.endswith(r" \\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in body} == {columns - 1}
        assert not re.search(r"(?<!\\)[#$%_^~]", table.split("\n%")[0])
    assert documents.escape(r"a_b & 5% {x} \y <z> ~^") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \textless{}z\textgreater{} "
        r"\textasciitilde{}\textasciicircum{}"
    )


def test_tensorboard_scalars(sweep, tmp_path, monkeypatch, found):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    from tensorboardX.proto import event_pb2

    for _ in range(2):  # a second report replaces the first
        sweep_report.write_many([sweep], tmp_path, tensorboard=True)
    (file,) = (tmp_path / "tensorboard" / "p3_0shot_t0").iterdir()
    scalars = {}
    content = file.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        scalars |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    for checkpoint in (OLD, NEW):
        line = line_of(found, "super_glue_cb", "t0", checkpoint)
        expected = {
            "mean": line.mean,
            "median": line.median,
            "iqr": line.quartiles[1] - line.quartiles[0],
        }
        for kind, value in expected.items():
            assert scalars[f"zeroshot/super_glue_cb/{kind}", checkpoint.step] == pytest.approx(
                value
            )
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboardX.*mtl_jax\[tensorboard\]"):
        sweep_report.write_many([sweep], tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()

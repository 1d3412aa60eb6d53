"""What cannot be compared or reported is refused."""

import pytest
from synthetic_runs import write_run

from mtl_jax import cli
from mtl_jax.analysis.comparison import compare
from mtl_jax.errors import UserError

SCORES = {"nli": 60.0, "qa": 40.0, "sentiment": 90.0, "topic": 75.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"Data__batch_size": 64}, r"Data\.batch_size is 32 in .* but 64 in"),
        ({"Data__inputs_length": 128}, r"Data\.inputs_length is 64 in .* but 128 in"),
        ({"Run__steps": 200}, r"Run\.steps is 300 in .* but 200 in"),
        ({"Optimizer__learning_rate": 3.0}, r"_rate is 3\.0 in .* on one task, but 1\.0 in"),
        ({"T5__emb_dim": 64}, r"T5\.emb_dim is 64 in .* on one task, but 32 in"),
    ],
)
def test_other_budgets_are_refused(tmp_path, settings, message):
    alike = {"Optimizer__learning_rate": 1.0, "T5__emb_dim": 32}
    multi = write_run(tmp_path / "multi", SCORES, **alike)
    single = write_run(tmp_path / "single", SCORES, trained=("qa",), **(alike | settings))
    with pytest.raises(UserError, match=message):
        compare([multi, single])


def test_a_baseline_may_differ_in_what_changes_no_number(tmp_path):
    multi = write_run(tmp_path / "multi", SCORES, Optimizer__learning_rate=1.0)
    harmless = {"T5__attention": "xla", "Optimizer__freeze": ("encoder/.*",)}
    single = write_run(
        tmp_path / "single", SCORES, trained=("qa",), Optimizer__learning_rate=1.0, **harmless
    )
    assert compare([multi, single]).baselines == {"qa": 1}


def test_unfinished_doubled_and_strange_runs_are_refused(tmp_path, capsys):
    first = write_run(tmp_path / "first", SCORES)
    with pytest.raises(UserError, match="evaluated up to step 300 of 400"):
        compare([first, write_run(tmp_path / "long", SCORES, Run__steps=400)])
    with pytest.raises(UserError, match="would count as two draws"):
        compare([first, first])
    single = [write_run(tmp_path / n, SCORES, trained=("qa",)) for n in ("one", "two")]
    with pytest.raises(UserError, match="single-task runs of qa with the same settings and seeds"):
        compare(single)
    with pytest.raises(UserError, match="trained on 'mt' alone but does not evaluate it"):
        compare([first, write_run(tmp_path / "mt", SCORES, trained=("mt",))])
    with pytest.raises(UserError, match="no task and metric in common"):
        compare([first, write_run(tmp_path / "other", {"x": 1.0, "y": 2.0}, seed=1)])
    empty = write_run(tmp_path / "empty", SCORES, seed=2)
    (empty / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="has no results"):
        compare([first, empty])
    assert cli.main(["report", "--compare", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_flags_that_would_do_nothing_are_refused(tmp_path, capsys):
    folder = str(write_run(tmp_path / "run", SCORES))
    for words in (["--tasks", "a", "b"], ["--lower_is_better", "m"]):
        assert cli.main(["report", folder, *words]) == 1
        assert f"{words[0]} is of --compare" in capsys.readouterr().err
    assert cli.main(["report", folder, "--examples", "9"]) == 1
    assert "--examples is of --representations" in capsys.readouterr().err

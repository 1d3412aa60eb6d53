"""From stored passes to results, without a model: failures, stale results, baselines."""

import concurrent.futures
import dataclasses
import functools
import json
import types

import numpy as np
import pytest

from mtl_jax import metrics, protocols, results, sweep, sweep_files
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalConfig, EvalExample, EvalTask
from mtl_jax.storage import replace_text
from mtl_jax.sweeps import scoring
from mtl_jax.sweeps.cells import Cell, Question
from mtl_jax.sweeps.claims import Claims
from mtl_jax.sweeps.fingerprint import described
from mtl_jax.sweeps.running import Runner
from mtl_jax.task_info import TaskInfo

CHOICES = (["yes", "no"], ["a", "b", "c"], ["yes", "no"])


def make_cell(root, names=("t0", "metaicl"), choices=CHOICES, **changes):
    examples = [
        EvalExample(i, [5, 1], [6, 1], f"in {i}", (of[:1] or ["yes"])[0], of, [[6, 1]] * len(of))
        for i, of in enumerate(choices)
    ]
    info = TaskInfo("toy_task", "toy")
    given = {"metric_fns": [metrics.accuracy], "score_metric_fns": (), "postprocess": None}
    task = EvalTask("toy_task", info, "validation", examples, detokenize=str, **(given | changes))
    presets = tuple(protocols.get(name) for name in names)
    question = Question("toy_task", info, 0, task, EvalConfig(), presets, "train", 0)
    checkpoint = types.SimpleNamespace(name="m@1", run="m", step=1, identity="x", prompt=())
    return Cell(checkpoint, question, False, root)


def store(cell, first=-1.0):
    """Passes in which the first choice is the most probable, or `first`."""
    for name in cell.question.passes:
        lines = []
        for example in cell.question.task.examples:
            count = len(example.choices)
            sums = [first, *[-2.0] * (count - 1)][:count]
            line = {"sums": sums, "eos": [0.0] * count, "n_tokens": [1] * count}
            lines.append({"index": example.index} | (line if count else {"text": "yes"}))
        sweep_files.write_lines(cell.pass_path(name), lines)


def run(cell):
    """Works on a cell whose passes are there: there is no model to load."""
    engine = types.SimpleNamespace(prompt=())
    models = types.SimpleNamespace(engine=lambda checkpoint: engine)
    with Claims(cell.root, 60) as claims:
        runner = Runner([cell], None, models, claims)
        runner.run()
    return runner


def rows(cell):
    return [json.loads(line) for line in (cell.folder / "results.jsonl").read_text().splitlines()]


def failing(targets, predictions):
    raise RuntimeError("no luck")


@pytest.mark.parametrize("metric_fns", [[], [lambda targets, predictions: {"said": "a text"}]])
def test_a_cell_without_rows_is_done(tmp_path, metric_fns):
    cell = make_cell(tmp_path, ["generate"], [[], []], metric_fns=metric_fns)
    store(cell)
    runner = run(cell)
    assert (runner.done(), runner.failures, rows(cell)) == (1, [], [])


def test_a_metric_or_postprocessor_that_fails_is_a_failure_of_its_own(tmp_path):
    cell = make_cell(tmp_path, ["generate", "tk_instruct"], [[], []], metric_fns=[failing])
    store(cell)
    (failure,) = run(cell).failures
    assert "the metric failing fails on what the model said: RuntimeError: no luck" in failure.error
    assert {row["protocol"] for row in rows(cell)} >= {"tk_instruct"}
    assert not scoring.is_scored(cell)

    def broken(text, *, example, is_target, number):
        return int(text)

    post = functools.partial(broken, number=1)
    cell = make_cell(tmp_path / "other", metric_fns=[metrics.f1], postprocess=post)
    store(cell)
    (failure,) = run(cell).failures
    assert "Task 'toy_task': the postprocessor functools.partial(" in failure.error
    assert "fails on the target 'yes' of example 0: ValueError: invalid literal" in failure.error


def test_what_results_are_made_of_decides_whether_they_stand(tmp_path):
    cell = make_cell(tmp_path)
    store(cell)
    assert not scoring.is_scored(cell)
    assert not run(cell).failures
    assert scoring.is_scored(make_cell(tmp_path))
    changes = [
        {"metric_fns": [metrics.exact_match]},
        {"postprocess": metrics.references_in("a")},
        {"names": ["t0"]},
    ]
    for change in changes:
        assert not scoring.is_scored(make_cell(tmp_path, **change))
    assert not scoring.is_scored(dataclasses.replace(cell, trained=True))
    other = make_cell(tmp_path)
    other.question.task.examples[1].fields["references"] = np.array([b"a", b"b"], object)
    assert other.folder == cell.folder
    assert not scoring.is_scored(other)
    run(other)
    assert scoring.is_scored(other)
    assert not scoring.is_scored(cell)


def test_functions_are_told_apart_by_what_they_enclose():
    for make in (metrics.references_in, metrics.grouped):
        assert described(make("a")) == described(make("a")) != described(make("b"))
    inner = metrics.grouped("a", value=metrics.references_in("x"))
    assert described(inner) != described(metrics.grouped("a", value=metrics.references_in("y")))
    assert described(lambda x: x + 1) != described(lambda x: x + 2)
    assert described({"b": 1, "a": np.arange(3)}) == described({"a": np.arange(3), "b": 1})


def test_a_model_without_numbers_has_no_answers(tmp_path):
    cell = make_cell(tmp_path)
    store(cell, first=None)
    for _ in range(2):  # also when it is started again
        runner = run(cell)
        (failure,) = runner.failures
        assert "log-probabilities of example 0 are not finite" in failure.error
        assert "T5.dtype = 'float32'" in failure.error
    outcome = results.Outcome(scores=np.array([np.nan, -1.0]))
    task = dataclasses.replace(cell.question.task, examples=cell.question.task.examples[:1])
    with pytest.raises(UserError, match="are not finite"):
        results.predicted_texts(task, [outcome])


def test_nothing_to_show_is_told(tmp_path, capsys):
    assert sweep.finish(types.SimpleNamespace(failures=[]), None, tmp_path) == 1
    assert "No cell has results; the messages above tell why." in capsys.readouterr().err


def test_random_answers_are_measured_exactly(tmp_path):
    def counted(targets, predictions):
        calls.append(len(targets))
        return {"length": float(np.mean([len(text) for text in predictions]))}

    calls = []
    cell = make_cell(tmp_path, metric_fns=[metrics.squad, counted])
    store(cell)
    run(cell)
    first = len(calls)
    random = {row["metric"]: row["value"] for row in rows(cell) if row["protocol"] == "random"}
    # "a" as the second target is an article: its normal form is empty, with an F1 of 0.
    chance = (1 / 2 + 1 / 3 + 1 / 2) / 3
    assert random["accuracy"] == pytest.approx(100 * chance)
    assert random["em"] == pytest.approx(100 * chance)
    assert random["f1"] == pytest.approx(100 * (1 / 2 + 0 + 1 / 2) / 3)
    # "yes" or "no", one letter: drawn, so near 2 only.
    assert random["length"] == pytest.approx((2.5 + 1 + 2.5) / 3, abs=0.3)
    # Another checkpoint has the same baselines: only its own answers are measured.
    checkpoint = types.SimpleNamespace(name="n@1", run="n", step=1, identity="y", prompt=())
    again = dataclasses.replace(cell, checkpoint=checkpoint)
    store(again)
    run(again)
    assert len(calls) - first == 2  # protocols


def test_threads_may_write_the_same_file(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: replace_text(tmp_path / "x", str(i)), range(200)))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]

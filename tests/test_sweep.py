"""Sweeps through the command line: exact numbers, nothing asked twice, mistakes told early."""

import functools
import json
import sys
from pathlib import Path

import jax
import loadable
import numpy as np
import pytest
import seqio

from mtl_jax import cli, decode, metrics, sweep_files
from mtl_jax.sweeps import estimate, running
from mtl_jax.sweeps.checkpoints import Models

sys.path.insert(0, str(Path(__file__).parent))  # as the command line finds `sweep_tasks`

VALUES = {
    "Data.task_modules": "('sweep_tasks',)",
    "Eval.tasks": "('nli_*', 'ragged_*', 'last_*')",
    "Eval.inputs_length": 6,
    "Eval.targets_length": 8,
    "Eval.max_decode_length": 4,
    "Eval.batch_size": 16,
    "Eval.max_shapes": 2,
    "Sweep.prompts": "('P 0', 'p_1')",
    "Sweep.protocols": "('t0', 'pmi', 'lm_eval', 'generate')",
}


def flags(root, checkpoint, **changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    values = VALUES | {"Run.directory": root, "Sweep.checkpoints": f"('{checkpoint}',)"} | given
    return ["sweep", *(f"--gin.{name}={value}" for name, value in values.items())]


def rows(root):
    return [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run directory with a random model."""
    return loadable.save(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def finished(toy):
    """The folder of a sweep that was made in one go."""
    root = toy.parent / "finished"
    assert cli.main(flags(root, toy)) == 0
    return root


def test_the_sums_of_each_choice_are_those_of_scoring_it_alone(finished):
    import sweep_tasks

    score = jax.jit(functools.partial(decode.score, loadable.CFG))
    encode = sweep_tasks.FEATURES["targets"].vocabulary.encode
    forms = {
        "rank": lambda text: encode(text)[:6],
        "rank_eos_left": lambda text: [*encode(text)[-5:], 1],
        "rank_null": lambda text: [1],
    }
    compared = 0
    for folder in sweep_files.cell_folders(finished):
        facts = sweep_files.read_facts(folder)
        if facts.dataset == "last":
            continue
        questions = sweep_files.predictions(folder)
        for name, inputs_of in forms.items():
            for question, line in zip(questions[-4:], lines(folder, name)[-4:], strict=True):
                inputs = np.zeros((1, 6), np.int32)
                tokens = inputs_of(question["inputs"])
                inputs[0, : len(tokens)] = tokens
                for c, choice in enumerate(question["choices"]):
                    target = [*encode(choice), 1]
                    padded = np.zeros((1, 8), np.int32)
                    padded[0, : len(target)] = target
                    segments = (inputs > 0).astype(np.int32)
                    _, each = score(loadable.params(), inputs, segments, padded)
                    # Stored with six decimals; packing changes the last bits of float32 sums.
                    body, end = each[0, : len(target) - 1].sum(), each[0, len(target) - 1]
                    np.testing.assert_allclose(line["sums"][c], body, atol=1e-5)
                    np.testing.assert_allclose(line["eos"][c], end, atol=1e-5)
                    assert line["n_tokens"][c] == len(target) - 1
                    compared += 1
    assert compared > 100


def test_rows_predictions_and_baselines(finished):
    found = rows(finished)
    assert all(tuple(row) == sweep_files.RESULT_COLUMNS for row in found)
    values = {(r["task"], r["protocol"], r["metric"]): r["value"] for r in found}
    # Seven of eleven words do not begin with an a.
    assert values["nli_p0", "majority", "accuracy"] == pytest.approx(100 * 7 / 11)
    assert values["nli_p0", "random", "accuracy"] == pytest.approx(50)
    assert values["last_p0", "copy_input", "exact_match"] == 0
    assert {r["protocol"] for r in found if r["dataset"] == "last"} == {"generate", "copy_input"}
    for folder in sweep_files.cell_folders(finished):
        facts = sweep_files.read_facts(folder)
        read = sweep_files.predictions(folder)
        for protocol in read[0]["by_protocol"]:
            answers = [line["by_protocol"][protocol] for line in read]
            of_task = {
                row["metric"]: row["value"]
                for row in found
                if (row["task"], row["protocol"]) == (facts.task, protocol)
            }
            first = "accuracy" if "accuracy" in of_task else "exact_match"
            mean = np.mean([answer["score"] for answer in answers])
            assert mean == pytest.approx(of_task[first], abs=1e-3)
            for line, answer in zip(read, answers, strict=True):
                if "values" in answer:
                    best = int(np.argmax(answer["values"]))
                    assert answer["prediction"] == line["choices"][best]
    # P 1 says "so " in front: one word of four letters is cut, and with an EOS those of three, too.
    cut = {(r["task"], r["protocol"]): r["truncated"] for r in found if r["dataset"] != "last"}
    assert {protocol: cut["nli_p1", protocol] for protocol in ("t0", "pmi", "lm_eval")} == {
        "t0": 1,
        "pmi": 1,
        "lm_eval": 5,
    }
    assert {count for (task, _), count in cut.items() if task.endswith("p0")} == {0}


def test_a_batch_of_another_size_gives_the_same(finished, toy):
    root = toy.parent / "small"
    assert cli.main(flags(root, toy, Eval__batch_size=8, Eval__max_shapes=1)) == 0
    assert rows(root) == rows(finished)
    pairs = zip(sweep_files.cell_folders(root), sweep_files.cell_folders(finished), strict=True)
    for ours, theirs in pairs:
        assert ours.relative_to(root) == theirs.relative_to(finished)
        for name in sweep_files.read_facts(ours).seconds:
            for a, b in zip(lines(ours, name), lines(theirs, name), strict=True):
                assert a.get("text") == b.get("text")
                for key in ("sums", "eos"):
                    # Sums near 30 of float32 terms; matrices of another shape add in another order.
                    np.testing.assert_allclose(a.get(key, 0), b.get(key, 0), rtol=3e-6, atol=1e-5)


def test_only_what_is_new_is_asked(finished, toy, monkeypatch, capsys):
    loads = []
    load = Models.load
    monkeypatch.setattr(Models, "load", lambda self, c: loads.append(c) or load(self, c))
    asked = []

    class Watched(running.Asking):
        def __init__(self, cell, passes, *rest):
            asked.append((cell.question.name, tuple(passes)))
            super().__init__(cell, passes, *rest)

    monkeypatch.setattr(running, "Asking", Watched)
    before = rows(finished)
    more = "('t0', 'pmi', 'lm_eval', 'generate', 'mean_byte', 'metaicl')"
    assert cli.main(flags(finished, toy, Sweep__protocols=more)) == 0
    assert not loads
    assert {row["protocol"] for row in rows(finished)} >= {"mean_byte", "metaicl"}

    assert cli.main(flags(finished, toy, Sweep__prompts="all")) == 0
    assert sorted(name for name, _ in asked) == ["last_p2", "nli_p2", "ragged_p2"]

    asked.clear()
    flan = "('t0', 'pmi', 'lm_eval', 'generate', 'flan')"
    assert cli.main(flags(finished, toy, Sweep__protocols=flan)) == 0
    assert {passes for _, passes in asked} == {("rank_eos",), ("generate_eos",)}

    # The plan decides what is in the table; what else is on disk stays there.
    asked.clear()
    assert cli.main(flags(finished, toy)) == 0
    assert not asked
    assert rows(finished) == before
    said = capsys.readouterr().err
    assert "0 rows of the model to go" in said
    # Those of the third prompt, when it was no longer asked for.
    assert "3 finished cells are not in this plan and leave the table" in said


def test_dry_run_counts_and_writes_nothing(toy, capsys):
    root = toy.parent / "dry"
    assert cli.main([*flags(root, toy, Sweep__shots="(0, 2)"), "--dry_run"]) == 0
    out, err = capsys.readouterr()
    nli = next(line.split() for line in out.splitlines() if " nli " in line)
    # 2 prompts of 11 rows: rank, and rank_eos_left with other tokens; 1 row of null choices each.
    assert nli[:4] == ["toy@7", "nli", "2", "0"]
    assert nli[5:7] == ["0", str(2 * (11 + 11 + 1))]
    assert nli[-1] == "5"  # are cut under the second prompt
    assert "nli_p1 (5, 45.5%)" in err
    assert "Fewer shots than asked for, because no more fit" in err
    assert "nli_p0, 2 shots (0.00 on average)" in err
    assert "by one process, from the FLOPs" in out
    assert not root.exists()


def test_shots_stand_in_front(toy):
    root = toy.parent / "shots"
    given = {"Eval__tasks": "('nli_p0',)", "Sweep__prompts": "all", "Sweep__shots": "(1,)"}
    protocols = {"Sweep__protocols": "('t0',)", "Eval__inputs_length": 32}
    assert cli.main(flags(root, toy, **given, **protocols)) == 0
    (folder,) = sweep_files.cell_folders(root)
    for line in sweep_files.predictions(folder):
        first, answer = line["inputs"].split("\n\n")[0].split("\n")
        assert answer == ("yes" if first.startswith("a") else "no")
        assert first.endswith("x")  # of the training split
    by_protocol = {(row["protocol"], row["shots"]) for row in rows(root)}
    assert by_protocol == {(name, 1) for name in ("t0", "random", "majority", "copy_demonstration")}


def test_a_trained_dataset_is_no_zero_shot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "estimate", lambda *args: estimate.Estimate(0.0, "nothing"))
    run = loadable.save(tmp_path / "toy")
    refusing = {"Sweep__held_out": "error", "Eval__tasks": "('nli_*',)"}
    assert cli.main([*flags(tmp_path / "out", run, **refusing), "--dry_run"]) == 0
    assert "Nothing is known of what toy@7 was trained on" in capsys.readouterr().err
    (run / "tasks.json").write_text('{"other": 1}')
    mixture = [{"task": "other", "dataset": "nli", "family": "toy", "share": 1.0}]
    (run / "mixture.json").write_text(json.dumps(mixture))
    root, dry = tmp_path / "out", "--dry_run"
    assert cli.main([*flags(root, run, Sweep__held_out="error"), dry]) == 1
    assert "toy@7 was trained on examples of nli" in capsys.readouterr().err
    assert cli.main([*flags(root, run), dry]) == 0
    assert "Not zero-shot: toy@7 was trained on examples of nli" in capsys.readouterr().err
    assert cli.main([*flags(root, run, Sweep__held_out="off"), dry]) == 0
    assert "Not zero-shot" not in capsys.readouterr().err


def test_score_metrics_that_a_sweep_leaves_out_are_named(toy, tmp_path, capsys):
    import sweep_tasks

    def spread(targets, scores):
        return {"spread": float(np.ptp(scores))}

    source = sweep_tasks.Prompted(sweep_tasks.last, 0)
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    kinds = {"metric_fns": [metrics.exact_match, spread]}
    seqio.TaskRegistry.add("scored_too", source, sweep_tasks.FEATURES, steps, **kinds)
    try:
        given = {"Eval__tasks": "('scored_too',)", "Sweep__prompts": "all"}
        assert cli.main([*flags(tmp_path / "out", toy, **given), "--dry_run"]) == 0
    finally:
        seqio.TaskRegistry.remove("scored_too")
    told = "Score metrics are not for sweeps (mtl-jax eval has them); only the others of"
    assert f"{told}: scored_too" in capsys.readouterr().err


def test_a_task_without_metrics_is_left_out(toy, tmp_path, capsys):
    import sweep_tasks

    source = sweep_tasks.Prompted(sweep_tasks.last, 0)
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    seqio.TaskRegistry.add("unmeasured", source, sweep_tasks.FEATURES, steps)
    try:
        given = {"Eval__tasks": "('unmeasured',)", "Sweep__prompts": "all"}
        assert cli.main([*flags(tmp_path / "out", toy, **given), "--dry_run"]) == 1
    finally:
        seqio.TaskRegistry.remove("unmeasured")
    assert "has no metrics; score metrics are not for sweeps: unmeasured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Sweep__protocols": "('t00',)"}, "Unknown protocol 't00'. Did you mean 't0'"),
        ({"Sweep__prompts": "('P 9',)"}, "no prompt of Eval.tasks is 'P 9'. Did you mean"),
        ({"Sweep__prompts": "some"}, "must be 'all', 'original' or a list"),
        ({"Sweep__shots": "(-1,)"}, "Sweep.shots must be numbers from 0 on"),
        ({"Sweep__splits": "{'nil_*': 'train'}"}, "no task or dataset of Eval.tasks is 'nil_*'"),
        ({"Eval__tasks": "('nli_p7',)"}, "No task or mixture 'nli_p7' is registered"),
        ({"Eval__split": "test"}, "'test'"),
        ({"Sweep__protocols": "('generate',)", "Eval__tasks": "('nli_*',)"}, "No task can be"),
        ({"T5__emb_dim": 32}, "T5.emb_dim = 32, but that of the checkpoint"),
    ],
)
def test_mistakes_are_told(toy, tmp_path, capsys, changes, message):
    assert cli.main([*flags(tmp_path / "out", toy, **changes), "--dry_run"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("x", "Did you mean 'toy'"),
        ("@8", "holds no checkpoint of step 8, but of 7"),
        ("@best", "must end with @STEP"),
    ],
)
def test_wrong_checkpoints_are_told(toy, tmp_path, capsys, ending, message):
    assert cli.main([*flags(tmp_path / "out", f"{toy}{ending}"), "--dry_run"]) == 1
    assert message in capsys.readouterr().err


def test_the_folder_of_a_run_is_refused(toy, capsys):
    assert cli.main(flags(toy, toy)) == 1
    assert "is the folder of a run" in capsys.readouterr().err

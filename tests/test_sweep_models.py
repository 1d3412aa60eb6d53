"""Sweeps over models of every origin: runs whose tasks own parameters, Hugging Face, converted."""

import json

import hf_folders
import numpy as np
import pytest
from test_sharing_runs import SHARING, as_flags
from test_sharing_runs import flags as train_flags
from test_sweep import flags, rows

from mtl_jax import cli, sweep_files

pytestmark = pytest.mark.slow


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_that_own_parameters_are_asked_as_in_training(tmp_path, capsys):
    run, root = tmp_path / "run", tmp_path / "sweep"
    assert cli.main(train_flags(run, **as_flags(SHARING))) == 0
    same = {"Eval__inputs_length": 16, "Eval__batch_size": 8}
    given = {
        "Data__task_modules": "('tiny_tasks',)",
        "Eval__tasks": "('tiny_copy', 'tiny_first')",
        "Sweep__prompts": "all",
        "Sweep__protocols": "('t0', 'generate')",
    }
    assert cli.main(flags(root, run, **given, **same)) == 0
    # The datasets are those of the mixture.
    assert "Not zero-shot: run@6 was trained on examples of copy, first" in capsys.readouterr().err
    assert all(row["trained"] for row in rows(root))
    values = {(r["task"], r["metric"]): r["value"] for r in rows(root) if r["protocol"] != "random"}
    last = [row for row in read(run / "results.jsonl") if row["step"] == 6]
    by_task = {(row["task"], row["metric"]): row["value"] for row in last}
    for key in (("tiny_copy", "exact_match"), ("tiny_first", "accuracy")):
        assert values[key] == pytest.approx(by_task[key])
    for folder in sweep_files.cell_folders(root):
        facts = sweep_files.read_facts(folder)
        trained = read(run / "predictions" / f"{facts.task}.jsonl")
        for ours, theirs in zip(sweep_files.predictions(folder), trained, strict=True):
            (said,) = [v for v in ours["by_protocol"].values()]
            assert said["prediction"] == theirs["prediction"]
            if "values" in said:
                np.testing.assert_allclose(said["values"], theirs["scores"], atol=1e-4)


def test_a_foreign_checkpoint_and_its_conversion_give_the_same(tmp_path):
    foreign = hf_folders.make(tmp_path / "foreign", "byt5", vocab_size=264)
    converted = tmp_path / "converted"
    assert cli.main(["convert", str(foreign), str(converted), "--to", "mtl_jax"]) == 0
    root = tmp_path / "sweep"
    assert cli.main(flags(root, foreign, Sweep__checkpoints=f"('{foreign}', '{converted}')")) == 0
    found = rows(root)
    assert {row["checkpoint"] for row in found} == {"foreign@0", "converted@0"}
    own = ("run", "checkpoint")
    by_checkpoint = {
        name: [
            {key: value for key, value in row.items() if key not in own}
            for row in found
            if row["run"] == name
        ]
        for name in ("foreign", "converted")
    }
    assert by_checkpoint["foreign"] == by_checkpoint["converted"]
    assert cli.main([*flags(root, f"{foreign}@3"), "--dry_run"]) == 1

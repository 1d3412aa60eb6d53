"""Data.exclude: its file lists all that training leaves out; the table says why lengths lack."""

import json

import pytest
import seqio
from test_data import add_task

from mtl_jax import cli, effective_mixture, task_info
from mtl_jax.data import DataConfig
from mtl_jax.mixtures import training_rates
from mtl_jax.overlap import fingerprint, read_exclusions, write_exclusions

LEAKED = "in which year did the old town hall of the small city burn down"


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})
    monkeypatch.setattr(task_info, "_INFOS", {})


def test_rows_that_share_the_inputs_of_a_leak_are_listed(tmp_path, capsys):
    """Only the answer of the first row overlaps; all three have the same inputs and go with it."""
    answers = (f"They asked: {LEAKED}?", "no idea", "silence")
    add_task("quiz", [{"inputs": "What was said?", "targets": answer} for answer in answers])
    add_task("exam", [{"inputs": f"{LEAKED}\nAnswer:", "targets": "1871"}])
    file = tmp_path / "leaks.jsonl"
    cli.main(
        ["decontaminate", "--mixture=quiz", "--against=exam", "--split=train", f"--remove={file}"]
    )
    printed = capsys.readouterr().out
    assert "1 of 3 training examples in quiz overlap" in printed
    assert "Not to be trained on, 3 examples" in printed
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [0, 1, 2]
    config = DataConfig(mixture="quiz", exclude=str(file))
    assert training_rates(config, read_exclusions(str(file))) == {"quiz": 0.0}


def test_a_task_whose_first_examples_are_excluded_is_not_said_to_lack_time(tmp_path):
    rows = [{"inputs": f"question {number}", "targets": "yes"} for number in range(100)]
    add_task("quiz", rows)
    add_task("other", rows)
    seqio.MixtureRegistry.add("both", ["quiz", "other"], default_rate=1.0)
    lines = [
        {"task": "quiz", "split": "train", "row": n, "inputs": fingerprint(row["inputs"])}
        for n, row in enumerate(rows[:99])
    ]
    write_exclusions(tmp_path / "leaks.jsonl", lines)
    config = DataConfig(mixture="both", exclude=str(tmp_path / "leaks.jsonl"), shuffle=False)
    found = effective_mixture.measure(config, 10)
    assert found.unmeasured == found.empty == ("quiz",)
    assert "first examples are all excluded by Data.exclude" in found.text()
    assert "want of time" not in found.text()

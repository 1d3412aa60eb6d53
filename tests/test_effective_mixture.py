"""What a mixture comes to, compared with what the training stream then gives."""

import dataclasses
import itertools

import numpy as np
import pytest
import seqio
from test_data import AFTER_TRIM, add_task, upper

from mtl_jax import effective_mixture, task_info
from mtl_jax.data import DataConfig, TrainStream
from mtl_jax.overlap import fingerprint, write_exclusions
from mtl_jax.task_info import describe

SIZES = {"short": 300, "long": 200, "answers": 150}
IDS = {"short": 1, "long": 2, "answers": 3}
CONFIG = DataConfig(
    mixture="all", inputs_length=64, targets_length=32, batch_size=16, prefetch=0, seed=3
)
ROWS = {
    "short": [{"inputs": "a" * (3 + i % 9), "targets": "b"} for i in range(300)],
    "long": [{"inputs": f"{i:3}" + "a" * (20 + i % 70), "targets": "no"} for i in range(200)],
    "answers": [{"inputs": "q" * (1 + i % 5), "targets": "t" * (8 + i % 16)} for i in range(150)],
}


@pytest.fixture(autouse=True)
def mixture(monkeypatch):
    """Short examples, long ones that are cut, and long targets, at rates 3, 1 and 2."""
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})
    monkeypatch.setattr(task_info, "_INFOS", {})
    for name, rows in ROWS.items():
        add_task(name, rows)
        describe(name, dataset=f"set_{name}", family="any")
    add_task("by_tensorflow", ROWS["short"], (upper, *AFTER_TRIM))
    seqio.MixtureRegistry.add("all", [("short", 3.0), ("long", 1.0), ("answers", 2.0)])
    seqio.MixtureRegistry.add("with_tensorflow", [("short", 1.0), ("by_tensorflow", 1.0)])


def streamed(config, steps, owners=None, prompt=()):
    """Per task: examples, tokens; and the examples that still wait for a row."""
    with TrainStream(config, IDS, owners=owners, prompt=prompt) as stream:
        *_, last = itertools.islice(stream, steps)
        counters = stream.counters_by_task(last)
    waiting = sum(len(snapshot.waiting) for snapshot in last.snapshots)
    examples = {name: row["examples"] for name, row in counters.items()}
    front = len(prompt)
    tokens = {
        name: row["input_tokens"] + row["target_tokens"] + front * row["examples"]
        for name, row in counters.items()
    }
    return examples, tokens, waiting


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        ({}, 0.03),
        ({"pack": False}, 0.03),
        ({"num_shards": 4, "lookahead": 0}, 0.03),
        ({"prompt": (7,) * 10}, 0.03),
        ({"blocks": 4}, 0.06),
    ],
    ids=lambda value: str(value),
)
def test_expected_is_what_the_stream_gives(values, tolerance):
    """Within 3 per cent: 64 measured lengths of each task, and 3,000 examples drawn.

    With blocks 6 per cent, for a block's rows are taken as filled like many rows together.
    """
    values = dict(values)
    prompt = values.pop("prompt", ())
    config = dataclasses.replace(CONFIG, **values)
    owners = {name: name for name in IDS} if config.blocks else None
    steps = 120 if config.pack else 240
    found = effective_mixture.measure(config, steps, owners, prompt)
    rows = {row.task: row for row in found.rows}
    examples, tokens, waiting = streamed(config, steps, owners, prompt)
    drawn = sum(examples.values())
    assert found.examples_per_step * steps == pytest.approx(drawn - waiting, rel=tolerance)
    for name, row in rows.items():
        # Five standard deviations of the drawing of tasks, and of the sample of lengths.
        by_chance = 5 * np.sqrt(row.share * (1 - row.share) / drawn)
        assert row.share == pytest.approx(examples[name] / drawn, abs=by_chance)
        assert row.token_share == pytest.approx(tokens[name] / sum(tokens.values()), abs=0.03)
        mean = tokens[name] / examples[name]
        assert row.input_tokens + row.target_tokens == pytest.approx(mean, rel=0.12)
        seen = (examples[name] - waiting * row.share) / SIZES[name]
        assert row.epochs == pytest.approx(seen, rel=0.12)
    assert sum(row.token_share for row in found.rows) == pytest.approx(1.0, rel=1e-12)


def test_golden_without_packing(tmp_path):
    """By hand: 10 steps of 16 rows, a third of them of `answers`, 53.3 examples of 150 rows."""
    config = dataclasses.replace(CONFIG, pack=False)
    excluded = [{"inputs": fingerprint(row["inputs"])} for row in ROWS["answers"][:1]]
    # Every fifth row has these very inputs: 30 of 150.
    lines = [{"task": "answers", "split": "train", "row": 5 * i, **excluded[0]} for i in range(30)]
    write_exclusions(tmp_path / "leak.jsonl", lines)
    config = dataclasses.replace(config, exclude=str(tmp_path / "leak.jsonl"))
    found = effective_mixture.measure(config, 10)
    rows = {row["task"]: row for row in found.as_json()}
    assert list(rows) == ["answers", "long", "short"]
    answers = rows["answers"]
    assert (answers["dataset"], answers["family"]) == ("set_answers", "any")
    assert (answers["examples"], answers["excluded"], answers["rate"]) == (150, 30, 2.0)
    assert answers["share"] == pytest.approx(1 / 3)
    assert answers["epochs"] == pytest.approx(160 / 3 / 120)
    assert rows["short"]["epochs"] == pytest.approx(80 / 300)
    # Inputs of 3 to 11 letters, targets of one, an end each.
    assert rows["short"]["target_tokens"] == 2
    assert rows["short"]["input_tokens"] == pytest.approx(8, rel=0.12)
    text = found.text(held_out=["other"])
    assert "Held out by Mixture.hold_out: other" in text
    assert [line.split()[-1] for line in text.splitlines()[:4]] == ["excluded", "30", "0", "0"]


def test_a_task_of_tensorflow_may_be_left_unmeasured():
    config = dataclasses.replace(CONFIG, mixture="with_tensorflow")
    found = effective_mixture.measure(config, 10, seconds=0.0)
    assert found.unmeasured == ("by_tensorflow",)
    by_name = {row.task: row for row in found.rows}
    assert by_name["short"].input_tokens is not None
    assert by_name["short"].epochs is by_name["short"].token_share is None
    assert "1 tasks were not measured" in found.text()
    whole = effective_mixture.measure(config, 10)
    assert not whole.unmeasured
    tokens = [row.input_tokens for row in whole.rows]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.15)

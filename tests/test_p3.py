"""Tasks over the data folder: where it is sought, what is registered, and the majority classes."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from mtl_jax.data import DataConfig, load_modules
from mtl_jax.errors import UserError
from mtl_jax.tasks import data_folder as folder_of_tasks

ZERO_SHOT = {"super_glue_cb": 15, "super_glue_rte": 10, "super_glue_copa": 12, "super_glue_wic": 10}


def test_no_folder_named(monkeypatch):
    monkeypatch.delenv("MTL_JAX_DATA", raising=False)
    with pytest.raises(UserError, match=r"none is named\. Set the environment variable MTL_JAX_D"):
        folder_of_tasks.data_folder()


def test_a_folder_that_does_not_exist_names_its_source(monkeypatch, tmp_path):
    wrong = str(tmp_path / "wrong")
    monkeypatch.setenv("MTL_JAX_DATA", wrong)
    with pytest.raises(UserError, match=f"'{wrong}', given by the environment variable MTL_JAX_D"):
        folder_of_tasks.data_folder()


def test_the_configuration_goes_before_the_environment(monkeypatch, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path / "a"))
    assert folder_of_tasks.data_folder() == tmp_path / "a"
    load_modules(DataConfig(data_dir=str(tmp_path / "b")))
    assert folder_of_tasks.data_folder() == tmp_path / "b"


def test_a_folder_without_the_file_names_the_nearest(monkeypatch, tmp_path):
    (tmp_path / "p3_t0_trian").mkdir()
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"has no p3_t0_train\. Did you mean 'p3_t0_trian'\?"):
        folder_of_tasks.data_file("p3_t0_train")


def test_malformed_lines_are_named(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    good = json.dumps({"input": "a", "target": "b"})
    for bad, reason in [('{"input": ', "JSONDecodeError"), ('{"input": "a"}', "KeyError")]:
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(f"{good}\n{bad}\n")
        rows = folder_of_tasks.read_json_lines(path, ("input", "target"))
        assert next(rows) == json.loads(good)
        with pytest.raises(UserError, match=rf"x\.jsonl\.gz, line 2: .*{reason}"):
            next(rows)
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: cannot be read after line 0"):
        list(folder_of_tasks.read_json_lines(path, ()))


@pytest.fixture(scope="module")
def p3(data_folder):
    del data_folder  # only asked for so that the test is skipped without it
    from mtl_jax.tasks import p3

    return p3


@pytest.fixture(scope="module")
def super_glue(data_folder):
    del data_folder
    from mtl_jax.tasks import super_glue

    return super_glue


@pytest.mark.data
def test_every_training_prompt_is_a_task_with_its_rows(p3, data_folder):
    import seqio

    mixture = seqio.MixtureRegistry.get("p3_t0_train")
    assert len(mixture.tasks) == 251
    rows = sum(mixture.get_rate(task) for task in mixture.tasks)
    lines = 0
    for path in (data_folder / "p3_t0_train").glob("*.jsonl.gz"):
        with gzip.open(path, "rt") as file:
            lines += sum(1 for _ in file)
    assert rows == lines == 48008
    assert sum(t.num_input_examples("train") for t in mixture.tasks) == lines


@pytest.mark.data
def test_a_training_task_gives_the_stored_text_and_t0s_tokens(p3, data_folder):
    import seqio

    from mtl_jax.task_info import info

    name = "p3_glue_mrpc_equivalent"
    assert info(name).dataset == "glue_mrpc"
    assert (info(name).prompt, info(name).family) == ("equivalent", "paraphrase")
    task = seqio.TaskRegistry.get(name)
    examples = list(
        task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator()
    )
    with gzip.open(data_folder / "p3_t0_train" / "glue_mrpc.jsonl.gz", "rt") as file:
        rows = [row for row in map(json.loads, file) if row["template"] == "equivalent"]
    assert len(examples) == len(rows)
    for example, row in zip(examples, rows, strict=True):
        assert example["inputs_pretokenized"].decode() == row["input"]
        assert example["targets_pretokenized"].decode() == row["target"]
    vocabulary = task.output_features["inputs"].vocabulary
    # T0: no end of sequence on the inputs, one on the targets.
    assert examples[0]["inputs"].tolist() == vocabulary.encode(rows[0]["input"])
    assert examples[0]["inputs"][-1] != 1
    assert examples[0]["targets"].tolist() == [*vocabulary.encode(rows[0]["target"]), 1]
    # The data folder's own check of its vocabulary.
    text = "Hello world, translate English to German: That is good."
    expected = [8774, 296, 6, 13959, 1566, 12, 2968, 10, 466, 19, 207, 5]
    assert vocabulary.encode(text) == expected
    assert vocabulary.vocab_size == 32100


@pytest.mark.data
def test_rates_follow_t0s_cap(p3):
    assert p3.t0_rate(500_000, 9) == 500_000
    assert p3.t0_rate(3_600_000, 9) == 55_555


@pytest.mark.data
def test_zero_shot_tasks_are_t0s_prompts_over_whole_validation_sets(super_glue):
    """Majority classes as published for the official validation sets; targets among choices."""
    import seqio

    from mtl_jax import data
    from mtl_jax.results import baselines
    from mtl_jax.task_info import info
    from mtl_jax.tasks.prompted import skipped_rows

    names = [task.name for task in seqio.MixtureRegistry.get("super_glue_t0_eval").tasks]
    assert len(names) == 47
    counts = {dataset: [info(n).dataset for n in names].count(dataset) for dataset in ZERO_SHOT}
    assert counts == ZERO_SHOT
    expected = {
        "super_glue_cb_guaranteed_possible_impossible": (56, 0, 50.0),
        "super_glue_rte_should_assume": (277, 0, 52.7),
        "super_glue_copa_best_option": (100, 0, 55.0),
        "super_glue_copa_why_c1_or_c2": (52, 48, 53.8),  # questions for causes only
        "super_glue_wic_same_sense": (638, 0, 50.0),
    }
    for name, (count, skipped, majority) in expected.items():
        task = data.load_eval_task(name, "validation", 512, 128)
        assert (len(task.examples), skipped_rows(name, "validation")) == (count, skipped)
        assert task.truncated == 0
        assert not info(name).trained
        assert all(e.targets_text in e.choices for e in task.examples)
        assert all(tokens[-1] == 1 for e in task.examples for tokens in e.choice_tokens)
        assert all(e.inputs[-1] != 1 for e in task.examples)
        values = baselines(task.examples)
        assert round(values["majority"], 1) == majority
        classes = 3 if "_cb_" in name else 2
        assert values["chance"] == pytest.approx(100 / classes)


@pytest.mark.data
def test_evaluation_plan_over_all_zero_shot_tasks_is_full_and_small(super_glue):
    """The union of 47 prompts runs in at most eight shapes with little padding."""
    from mtl_jax import buckets, data

    names = [f"super_glue_{x}" for x in ("cb_can_we_infer", "rte_must_be_true", "copa_exercise")]
    tasks = [data.load_eval_task(name, "validation", 512, 128) for name in names]
    requests = [
        buckets.Request((task.name, e.index), e.inputs, e.choice_tokens)
        for task in tasks
        for e in task.examples
    ]
    batches = buckets.plan(requests, 32, max_shapes=8)
    assert len({(b.rows, b.inputs_length, b.targets_length) for b in batches}) <= 8
    real = sum(len(request.inputs) for request in requests)
    assert real / sum(b.rows * b.inputs_length for b in batches) > 0.6
    assert np.isclose(sum(len(b.requests) for b in batches), len(requests))


def test_gin_files_of_the_run_resolve():
    from mtl_jax import config

    root = pathlib.Path(__file__).parent.parent
    cfg = config.load([str(root / "gin" / "runs" / "p3_zero_shot.gin")], [], [])
    assert cfg.data.mixture == "p3_t0_train"
    assert list(cfg.eval.tasks) == ["super_glue_t0_eval"]
    assert cfg.model.vocab_size == 32128
    for path in (root / "gin").rglob("p3*.gin"):
        assert len(path.read_text().splitlines()) <= 25

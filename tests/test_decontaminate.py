"""What training must not have seen: the command that finds it, its removal, and the guard."""

import dataclasses
import json

import pytest
import seqio
from test_data import AFTER_TRIM, PLAIN, add_task, assert_same, decoded, take, upper

from mtl_jax import cli, task_info
from mtl_jax.data import DataConfig, TrainStream
from mtl_jax.errors import UserError
from mtl_jax.overlap import fingerprint, write_exclusions
from mtl_jax.run_directory import seen_in_training, trained_on
from mtl_jax.task_info import TaskInfo

LEAKED = "in which year did the old town hall of the small city burn down"
OTHER = "how many people live today in the largest of all the northern islands"
SENTENCE = "the {} fox ran over the {} hill and then into the {} wood before the night came"


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})
    monkeypatch.setattr(task_info, "_INFOS", {})


def pairs(*inputs):
    return [{"inputs": text, "targets": f"answer {i}"} for i, text in enumerate(inputs)]


NAMES = ("red", "old", "sly", "big")
CLEAN = [SENTENCE.format(a, b, c) for a in NAMES for b in NAMES for c in NAMES]


@pytest.fixture
def tasks():
    """Two training tasks with one leaked question each, one in the answer, and a clean one."""
    add_task("quiz", pairs(f"Question: {LEAKED}?", CLEAN[1], f"Q: {LEAKED} -- say!"))
    stories = pairs(*CLEAN[2:5])
    stories[1]["targets"] = f"They asked: {OTHER.upper()}!"
    add_task("stories", stories, (upper, *PLAIN), shuffle_buffer_size=4)
    add_task("clean", pairs(*CLEAN[5:9]))
    seqio.MixtureRegistry.add("train", ["quiz", "stories", "clean"], default_rate=1.0)
    add_task("exam", pairs(f"{LEAKED}\nAnswer:", f"{OTHER}\nAnswer:", "why\nAnswer:"))
    add_task("oral", pairs("what does the speaker of the house say to his guests in the end"))


def run(*words):
    return cli.main(["decontaminate", "--mixture=train", "--split=train", *words])


def test_the_command_finds_what_was_leaked(tasks, tmp_path, capsys):
    output, remove = tmp_path / "overlap.json", tmp_path / "leaks.jsonl"
    assert not run("--against=exam", "--against=ora*", f"--output={output}", f"--remove={remove}")
    printed = capsys.readouterr().out
    assert "3 of 10 training examples in train overlap with 2 of 4 evaluation examples." in printed
    assert "1 evaluation examples have too few words" in printed
    assert LEAKED in printed
    report = json.loads(output.read_text())
    found = {row["task"]: (row["examples"], row["contaminated"]) for row in report["training"]}
    assert found == {"quiz": (3, 2), "stories": (3, 1), "clean": (4, 0)}
    assert [row["by"] for row in report["training"]] == [{}, {"exam": 2}, {"exam": 1}]
    (sample,) = report["training"][2]["samples"]
    assert (sample["row"], sample["evaluation_task"], sample["evaluation_row"]) == (1, "exam", 1)
    assert sample["evaluation_inputs"] == f"{OTHER}\nAnswer:"
    by_task = {row["task"]: row for row in report["evaluation"]}
    assert by_task["exam"] == {
        "task": "exam", "examples": 3, "contaminated": 2, "share": 2 / 3, "too_short": 1,
    }  # fmt: skip
    assert by_task["oral"]["contaminated"] == 0
    rows = [json.loads(line) for line in remove.read_text().splitlines()]
    assert {(row["task"], row["row"]) for row in rows} == {("quiz", 0), ("quiz", 2), ("stories", 1)}
    # What the command found is not drawn any more.
    ids = {"quiz": 1, "stories": 2, "clean": 3}
    config = DataConfig(
        mixture="train", inputs_length=120, targets_length=99, batch_size=4, prefetch=0,
        exclude=str(remove),
    )  # fmt: skip
    seen = {text for _, text, _ in decoded(take(TrainStream(config, ids), 20))}
    assert seen == {CLEAN[1], CLEAN[2].upper(), CLEAN[4].upper(), *CLEAN[5:9]}


def test_flags_of_the_command(tasks, tmp_path, capsys):
    assert not run("--against=exam", "--min_overlap=0.9", "--ngram=5", "--shortest=1")
    # "answer" is a line of its own, but it is in every input.
    assert "0 of 10 training examples" not in capsys.readouterr().out
    assert not run("--against=exam", "--ngram=20", "--shortest=20")
    assert "0 of 10 training examples in train overlap with 0 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to compare with: give --against or Eval.tasks."),
        (["--against=exm"], "No task or mixture 'exm' is registered. Did you mean 'exam'?"),
        (["--against=exam", "--split=test"], "Task 'exam' has no split 'test'; it has train."),
        (["--against=exam", "--min_overlap=2"], "--min_overlap must be from 0 to 1, not 2.0."),
        (["--against=exam", "--mixture=tran"], "No task or mixture 'tran' is registered."),
    ],
)
def test_mistakes_are_one_line(tasks, words, message, capsys):
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


TEXTS = [f"number {i} " + "x" * (i % 5) for i in range(24)]
IDS = {"plain": 1, "mapped": 2}
CONFIG = DataConfig(
    mixture="both", inputs_length=32, targets_length=16, batch_size=4, prefetch=0, num_shards=2
)


@pytest.fixture
def both(tmp_path):
    """A task read in Python and one read by TensorFlow; of each every third example excluded."""
    add_task("plain", pairs(*TEXTS))
    add_task("mapped", pairs(*TEXTS), (upper, *AFTER_TRIM), shuffle_buffer_size=8)
    seqio.MixtureRegistry.add("both", [("plain", 1.0), ("mapped", 1.0)])
    path = tmp_path / "leaks.jsonl"
    rows = [(name, row, text) for name in IDS for row, text in enumerate(TEXTS) if row % 3 == 0]
    write_exclusions(
        path,
        [
            {
                "task": name,
                "split": "train",
                "row": row,
                "inputs": fingerprint(text if name == "plain" else text.upper()),
            }
            for name, row, text in rows
        ],
    )
    return path


def test_excluded_examples_are_never_drawn_and_positions_restore(both):
    config = dataclasses.replace(CONFIG, exclude=str(both))
    batches = take(TrainStream(config, IDS), 30)
    kept = {text for row, text in enumerate(TEXTS) if row % 3}
    seen = {name: {text for i, text, _ in decoded(batches) if i == number}
            for name, number in IDS.items()}  # fmt: skip
    assert seen == {"plain": kept, "mapped": {text.upper() for text in kept}}
    # Without the file all of them are.
    whole = {text for _, text, _ in decoded(take(TrainStream(CONFIG, IDS), 30))}
    assert whole == {*TEXTS, *(text.upper() for text in TEXTS)}
    for position in (0, 7, 19):
        stream = TrainStream(config, IDS)
        stream.restore(json.loads(json.dumps(batches[position].state)))
        assert_same(take(stream, 2), batches[position + 1 : position + 3])


def test_a_task_without_an_example_left_is_left_out(both, tmp_path):
    rows = [
        {"task": "plain", "split": "train", "row": row, "inputs": fingerprint(text)}
        for row, text in enumerate(TEXTS)
    ]
    write_exclusions(tmp_path / "all.jsonl", rows)
    config = dataclasses.replace(CONFIG, exclude=str(tmp_path / "all.jsonl"))
    assert TrainStream(config, IDS).tasks == ("mapped",)
    config = dataclasses.replace(config, split="validation")
    with pytest.raises(UserError, match=r"names no example of the split 'validation' of 'both'"):
        TrainStream(config, IDS)


def mixture_row(task, dataset, family="", share=1.0):
    return {"task": task, "dataset": dataset, "family": family, "share": share}


def test_the_guard_knows_what_a_run_and_its_ancestors_were_trained_on(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second / "checkpoints" / "40"):
        folder.mkdir(parents=True)
    (first / "tasks.json").write_text('{"old_qqp": 1}')
    (second / "tasks.json").write_text('{"nli_a": 1, "never": 2}')
    rows = [mixture_row("nli_a", "rte", "nli"), mixture_row("never", "cb", "nli", share=0.0)]
    (second / "mixture.json").write_text(json.dumps(rows))
    evaluated = [
        TaskInfo("rte_b", "rte", family="nli"),
        TaskInfo("cb_b", "cb", family="nli"),
        TaskInfo("qqp", "old_qqp"),
        TaskInfo("nameless", "none"),
    ]
    for place in (second, second / "checkpoints", second / "checkpoints" / "40"):
        assert seen_in_training(evaluated, trained_on(place)) == {"rte_b": ["nli_a"]}
    assert seen_in_training(evaluated, rows, by="family") == {
        "rte_b": ["nli_a", "never"], "cb_b": ["nli_a", "never"],
    }  # fmt: skip
    # It started from the first one, which has no mixture.json yet.
    (second / "config.gin").write_text(f"Run.restore_from = '{first}'\n")
    seen = seen_in_training(evaluated, trained_on(second))
    assert seen == {"rte_b": ["nli_a"], "qqp": ["old_qqp"]}
    assert trained_on(tmp_path / "nothing") is None


def test_the_guard_knows_a_dataset_by_its_other_names():
    trained = [
        mixture_row("a", "glue_rte"),
        mixture_row("b", "sni_task664_mmmlu_answer_generation_abstract_algebra"),
        mixture_row("c", "glue_qnli"),
        mixture_row("d", "glue_mnli"),
    ]
    names = ("super_glue_rte", "mmlu", "squad_v2", "super_glue_cb", "anli_r1", "bbh_navigate")
    evaluated = [TaskInfo(f"{name}_eval", name) for name in names]
    assert seen_in_training(evaluated, trained) == {
        "super_glue_rte_eval": ["a"], "mmlu_eval": ["b"], "squad_v2_eval": ["c"],
    }  # fmt: skip

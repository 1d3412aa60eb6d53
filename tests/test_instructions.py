"""Tk-Instruct's encoding and the tasks of Super-NaturalInstructions.

The expected texts were written down by the rule of Tk-Instruct's `ni_collator.py`, by hand; that
program itself gives the same text for rows of all tasks that fit its length.
"""

import gzip
import json
from collections import Counter

import pytest
import seqio

from mtl_jax.errors import UserError
from mtl_jax.tasks.instructions import Encoding, Instruction

CAPITALS = Instruction(
    "In this task, you are given a country name and you need to return the capital city of the "
    "given country",
    [
        {
            "input": "United States",
            "output": "Washington",
            "explanation": "Washington is the capital city of United States.",
        },
        {
            "input": "India",
            "output": "New Delhi",
            "explanation": "New Delhi is the capital city of India.",
        },
    ],
)
DEFINITION = (
    "Definition: In this task, you are given a country name and you need to return the capital "
    "city of the given country.\n\n"
)
FIRST = " Positive Example 1 -\nInput: United States.\n Output: Washington.\n"
SECOND = " Positive Example 2 -\nInput: India.\n Output: New Delhi.\n"
QUERY = "Now complete the following example -\nInput: Barbados.\nOutput: "
OF_WINOGRANDE = """\
Definition: You need to answer a given question containing a blank (_). Your answer must be one of \
the two objects mentioned in the question, for example "trophy" and "suitcase". Your answer must \
not contain a word that is not present in the question. Please don't use articles (e.g., the, a) \
before the answer.

 Positive Example 1 -
Input: The trophy doesn't fit into the brown suitcase because _ is too large.
 Output: trophy.

 Positive Example 2 -
Input: Grace was happy to trade me her sweater for my jacket. She thinks _ looks dowdy on her.
 Output: sweater.

Now complete the following example -
Input: The actor ended up fine after falling off the unicycle onto the mat since the _ was wobbly.
Output: """


@pytest.mark.parametrize(
    ("encoding", "expected", "name"),
    [
        (Encoding(), f"{DEFINITION}{FIRST}\n{SECOND}\n{QUERY}", "definition, 2 examples"),
        (Encoding(examples=1), f"{DEFINITION}{FIRST}\n{QUERY}", "definition, 1 example"),
        (Encoding(examples=0), DEFINITION + QUERY, "definition"),
        (Encoding(definition=False), f"{FIRST}\n{SECOND}\n{QUERY}", "2 examples"),
        (Encoding(definition=False, examples=0), QUERY, "input alone"),
        (
            Encoding(examples=1, explanations=True),
            f"{DEFINITION}{FIRST} Explanation: Washington is the capital city of United States.\n\n"
            + QUERY,
            "definition, 1 example, explained",
        ),
    ],
)
def test_encodings(encoding, expected, name):
    text, used = encoding.encode(CAPITALS, " Barbados\n", len)
    assert text == expected
    assert used == text.count("Positive Example")
    assert encoding.name == name


@pytest.mark.parametrize("end", ["", ".", "?", '"', ")", "…", "!  \n"])
def test_full_stops_are_added_where_no_ascii_punctuation_is(end):
    text, _ = Encoding(examples=0).encode(Instruction("Do" + end), "it" + end, len)
    stop = "" if end.strip() and end.strip() != "…" else "."
    written = end.strip() + stop
    assert text == (
        f"Definition: Do{written}\n\nNow complete the following example -\n"
        f"Input: it{written}\nOutput: "
    )


def test_examples_are_added_while_they_fit_with_an_end_of_sequence():
    """The second, too long, ends it, though a third would fit: the count of characters decides."""
    examples = [{"input": "a", "output": text} for text in ("b", "c" * 200, "d")]
    instruction = Instruction("Do it.", examples)
    for most in range(60, 400, 7):
        text, used = Encoding(examples=3, max_tokens=most).encode(instruction, "x", len)
        full = [Encoding(examples=n).encode(instruction, "x", lambda _: 0)[0] for n in range(4)]
        # Tk-Instruct counts a blank between two examples that it does not write.
        fitting = [n for n in range(1, 4) if len(full[n]) + max(n - 2, 0) + 1 <= most]
        assert used == max((n for n in fitting if fitting[:n] == list(range(1, n + 1))), default=0)
        assert text == full[used]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"examples": -1}, "Encoding.examples must be at least 0"),
        ({"max_tokens": 0}, "Encoding.max_tokens must be at least 1"),
        ({"examples": 0, "explanations": True}, "needs examples to explain"),
    ],
)
def test_mistakes_in_an_encoding(fields, message):
    with pytest.raises(UserError, match=message):
        Encoding(**fields)


# ---------------------------------------------------------------------------------------------
# The data folder
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sni(data_folder):
    del data_folder
    from mtl_jax.tasks import sni

    return sni


def raw_rows(data_folder, part):
    with gzip.open(data_folder / "sni" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.data
def test_real_rows_are_written_as_tk_instruct_writes_them(sni):
    of_test = seqio.TaskRegistry.get("sni_task033_winogrande_answer_generation").source
    first = next(of_test.examples("test", shuffle=False))
    assert first["inputs"] == OF_WINOGRANDE
    assert (first["targets"], first["references"]) == ("unicycle", ["unicycle"])
    assert (first["demonstration"], first["exemplars"]) == ("trophy", 2)
    assert first["query"].startswith("The actor ended up fine")
    of_train = seqio.TaskRegistry.get("sni_task1146_country_capital").source
    by_query = {e["query"]: e for e in of_train.examples("train", shuffle=False)}
    assert by_query["Barbados"]["inputs"] == f"{DEFINITION}{FIRST}\n{SECOND}\n{QUERY}"
    assert by_query["Barbados"]["targets"] == "Bridgetown"


@pytest.mark.data
def test_mixtures_have_the_official_tasks_and_no_other(sni, data_folder):
    """Train and test are of the official lists; nothing of the excluded list can be trained on."""
    from mtl_jax.task_info import info
    from mtl_jax.tasks.prompts import prompt_slug

    listed = {}
    for part in ("train", "test", "excluded"):
        path = data_folder / "sni" / "splits" / "default" / f"{part}_tasks.txt"
        listed[part] = {f"sni_{prompt_slug(name)}" for name in path.read_text().split()}
    tasks = {part: seqio.MixtureRegistry.get(f"sni_{part}").tasks for part in sni.PARTS}
    names = {part: {task.name for task in of_part} for part, of_part in tasks.items()}
    assert {part: len(found) for part, found in names.items()} == {
        "train": 236, "test": 18, "extra": 42,
    }  # fmt: skip
    assert names["train"] <= listed["train"]
    assert names["test"] <= listed["test"]
    assert names["extra"] <= listed["excluded"]
    for part, of_part in tasks.items():
        split = "train" if part == "train" else "test"
        rows = Counter(f"sni_{prompt_slug(r['task'])}" for r in raw_rows(data_folder, part))
        for task in of_part:
            assert list(task.splits) == [split]
            assert info(task.name).trained == (part == "train")
            expected = min(rows[task.name], 100) if part == "train" else rows[task.name]
            assert task.num_input_examples(split) == expected
    about = info("sni_task033_winogrande_answer_generation")
    assert (about.family, about.shots) == ("coreference_resolution", 2)


@pytest.mark.data
def test_all_right_answers_count_and_training_draws_one(sni, data_folder):
    from mtl_jax.eval_reading import load_eval_task

    several = [r for r in raw_rows(data_folder, "test") if len(r["outputs"]) > 1]
    row = several[0]
    name = f"sni_{row['task']}"
    loaded = load_eval_task(name, "test", 1024, 128)
    [example] = [e for e in loaded.examples if e.fields["query"] == row["input"]]
    assert example.inputs[-1] == 1  # Tk-Instruct's inputs end with EOS
    target = loaded.postprocess(example.targets_text, example=example.fields, is_target=True)
    assert target == row["outputs"]
    right = loaded.postprocess(row["outputs"][-1], example=example.fields, is_target=False)
    scores = {k: v for fn in loaded.metric_fns for k, v in fn([target], [right]).items()}
    assert len(scores) == 2
    assert all(value == pytest.approx(100) for value in scores.values())
    # Training: each of the answers comes up in some epoch, and the same one for the same seed.
    row = next(r for r in raw_rows(data_folder, "train") if len(set(r["outputs"])) == 3)
    source = seqio.TaskRegistry.get(f"sni_{row['task']}").source
    drawn = [
        {e["query"]: (e["targets"], e["references"]) for e in source.examples("train", True, seed)}
        for seed in (*range(20), 0)
    ]
    assert drawn[0] == drawn[-1]
    for query, (_, answers) in drawn[0].items():
        found = {epoch[query][0] for epoch in drawn}
        assert found <= set(answers)
        assert len(found) > 1 or len(set(answers)) == 1


@pytest.mark.data
def test_other_encodings_are_registered_beside(sni):
    from mtl_jax.task_info import info

    names = sni.register("sni_bare", Encoding(examples=0), instances=7)
    assert len(names["train"]) == len(seqio.MixtureRegistry.get("sni_bare_train").tasks) == 236
    name = "sni_bare_task1146_country_capital"
    assert [e["exemplars"] for e in seqio.TaskRegistry.get(name).source.rows("train")] == [0] * 7
    about = info(name)
    assert (about.dataset, about.shots) == ("sni_task1146_country_capital", 0)
    assert about.prompt == "definition"
    with pytest.raises(UserError, match="instances must be at least 1"):
        sni.register("sni_none", instances=0)

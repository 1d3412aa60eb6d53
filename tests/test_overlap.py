"""Overlapping n-grams: against a restatement with sets, and the leak that the data folder has."""

import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.errors import UserError
from mtl_jax.overlap import (
    OverlapIndex,
    fingerprint,
    read_exclusions,
    words,
    write_exclusions,
)


def found(index, texts, least=0.0):
    return {(m.text, m.example): m.overlap for m in index.scan(texts, least)}


def test_golden():
    """By hand: 4 words in a row; the second input is short, the third a line of a long one."""
    inputs = [
        "The quick brown fox -- jumps!",  # 2 runs of 4 words
        "Who won?",
        "Read this long text with care, please:\nWho is it?\nAnswer:",
    ]
    index = OverlapIndex({"a": inputs[:1], "b": inputs[1:]}, ngram=4, shortest=2)
    assert index.task_of == ["a", "b", "b"]
    assert index.row_of == [0, 0, 1]
    # Eight runs of 4 words among 11, and the line of three words; "Answer" has only one.
    assert index.sizes.tolist() == [2, 1, 9]
    texts = [
        "A quick, BROWN fox jumps over",
        "I ask who won? Nobody.",
        "the quick brown\tfox jumps",
        "so who is it then",
        "nothing",
        "the quick brown",
    ]
    assert found(index, texts) == {(0, 0): 0.5, (1, 1): 1.0, (2, 0): 1.0, (3, 2): 1 / 9}
    assert found(index, texts, least=0.6) == {(1, 1): 1.0, (2, 0): 1.0}


def test_words_are_of_any_script():
    assert words("Été, naïve_C++ 3.5%  ПРИВЕТ") == ["été", "naïve", "c", "3", "5", "привет"]


def test_an_ngram_never_crosses_texts():
    """Neither in the evaluation inputs nor in the texts that are scanned."""
    index = OverlapIndex({"a": ["one two", "three four"]}, ngram=4, shortest=2)
    assert index.sizes.tolist() == [1, 1]
    index = OverlapIndex({"a": ["one two three four"]}, ngram=4, shortest=2)
    assert found(index, ["one two", "three four"]) == {}


def test_the_wording_of_a_prompt_is_no_overlap():
    """It stands in every input; a passage that two inputs of forty share does count."""
    prompt = "is the review below good or bad"
    passage = "a warm and funny film about cats"
    inputs = [f"{prompt} number{i}" for i in range(38)] + [f"{prompt} {passage} {i}" for i in "ab"]
    index = OverlapIndex({"a": inputs}, ngram=5, shortest=5)
    assert found(index, [prompt]) == {}
    assert {example for _, example in found(index, [passage])} == {38, 39}
    few = OverlapIndex({"a": inputs[:2]}, ngram=5, shortest=5)
    assert len(found(few, [prompt])) == 2  # of two inputs nothing can be told


def restated(inputs, texts, ngram, shortest):
    """The overlap of all pairs by sets of tuples, one pair at a time."""

    def runs(of, length):
        return {tuple(of[i : i + length]) for i in range(len(of) - length + 1)}

    pairs = {}
    for e, given_input in enumerate(inputs):
        of_input = given_input.lower().split()
        short = [line.lower().split() for line in given_input.split("\n")]
        if len(of_input) < ngram:
            short = [of_input]
        units = runs(of_input, ngram)
        units |= {tuple(line) for line in short if shortest <= len(line) < ngram}
        for t, text in enumerate(texts):
            of_text = text.lower().split()
            shared = sum(unit in runs(of_text, len(unit)) for unit in units)
            if shared:
                pairs[t, e] = shared / len(units)
    return pairs


# Few letters, so that much is shared; two inputs are too few for a common wording.
TEXTS = st.lists(st.text("ab \n", max_size=20), max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    inputs=st.lists(st.text("ab \n", max_size=20), max_size=2),
    texts=TEXTS,
    ngram=st.integers(1, 4),
    shortest=st.integers(1, 4),
)
def test_as_restated_with_sets(inputs, texts, ngram, shortest):
    shortest = min(shortest, ngram)
    index = OverlapIndex({"a": inputs}, ngram=ngram, shortest=shortest)
    ours = found(index, texts)
    assert ours == pytest.approx(restated(inputs, texts, ngram, shortest), rel=1e-12)


def test_long_scans_are_cut_into_chunks(monkeypatch):
    from mtl_jax import overlap

    texts = [f"x{i} y{i} z{i} end" for i in range(50)]
    index = OverlapIndex({"a": texts[::7]}, ngram=3, shortest=3)
    whole = found(index, texts)
    monkeypatch.setattr(overlap, "_WORDS_AT_ONCE", 10)
    assert found(index, texts) == whole
    assert {text for text, _ in whole} == set(range(0, 50, 7))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"ngram": 0}, "ngram must be at least 1"), ({"shortest": 14}, "from 1 to ngram = 13")],
)
def test_numbers_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        OverlapIndex({}, **values)


def test_exclusions_come_back(tmp_path):
    path = tmp_path / "leaks.jsonl"
    tokens = np.array([5, 6], np.int64)
    assert fingerprint(tokens) == fingerprint(tokens.astype(np.int32)) != fingerprint("56")
    assert fingerprint("é") == fingerprint("é".encode())
    rows = [
        {"task": "a", "split": "train", "row": row, "inputs": fingerprint(text)}
        for row, text in enumerate(("same", "other", "same"))
    ]
    write_exclusions(path, rows)
    read = read_exclusions(str(path))
    assert read.of("a", "train") == {fingerprint("same"), fingerprint("other")}
    assert (read.count("a", "train"), read.count("a", "test")) == (3, 0)
    assert not read_exclusions("").counts
    path.write_text(path.read_text() + '{"task": "b"}\n')
    with pytest.raises(UserError, match=r"leaks\.jsonl, line 4: not a JSON object with task, "):
        read_exclusions(str(path))
    with pytest.raises(UserError, match=r"Data\.exclude: nowhere cannot be read"):
        read_exclusions("nowhere")


def rows_of(folder, *parts):
    with gzip.open(folder.joinpath(*parts), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.data
@pytest.mark.slow
def test_the_leak_of_the_data_folder(data_folder):
    """README of the data: 7,343 of 9,006 training rows have exactly the question of an MMLU item.

    "Exactly" by letters and digits, up to the options. All of them are found. So are 84 rows more
    which contain the whole of a short question, such as "Which of the following is true?".
    """
    questions = [row["question"] for row in rows_of(data_folder, "mmlu", "test.jsonl.gz")]
    inputs = [
        row["input"]
        for row in rows_of(data_folder, "sni", "train.jsonl.gz")
        if "_mmmlu_" in row["task"]
    ]
    letters = lambda text: re.sub("[^a-z0-9]", "", text.lower())  # noqa: E731
    items = set(map(letters, questions))
    leaked = {i for i, x in enumerate(inputs) if letters(x.rsplit("\n(A)", 1)[0]) in items}
    assert (len(inputs), len(leaked)) == (9006, 7343)
    index = OverlapIndex({"mmlu": questions}, shortest=1, common=1.0)
    rows = {match.text for match in index.scan(inputs, min_overlap=1.0)}
    assert leaked <= rows
    extra = rows - leaked
    assert len(extra) == 84
    assert all(any(item in text for item in items) for text in (letters(inputs[i]) for i in extra))


@pytest.mark.data
def test_no_leak_where_there_is_none(data_folder):
    questions = [row["question"] for row in rows_of(data_folder, "gsm8k", "test.jsonl.gz")]
    inputs = [row["input"] for row in rows_of(data_folder, "cot", "gsm8k.jsonl.gz")]
    index = OverlapIndex({"gsm8k": questions})
    assert found(index, inputs, least=1.0) == {}
    # Single runs of 13 words are shared, as those problems are written to a pattern.
    assert len({text for text, _ in found(index, inputs)}) == 4
    assert len(found(index, questions, least=1.0)) >= len(questions)  # the test can fail

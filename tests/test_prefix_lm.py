"""Prefix LM: the parts join to the text, all places are equally likely, shards, epochs, scores."""

import uuid

import numpy as np
import pytest
import seqio

from mtl_jax.data import load_eval_task
from mtl_jax.errors import UserError
from mtl_jax.tasks.prefix_lm import PrefixLMSource, add_prefix_lm_task

VOCABULARY = seqio.ByteVocabulary()
TEXT = "".join(f"line {number}: the quick brown fox.\n" for number in range(40))
LENGTH = 16


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return {"train": [tmp_path / "a.txt"], "validation": [tmp_path / "a.txt"]}


def read(source, **options):
    options = {"split": "train", "shuffle": False, "seed": 0} | options
    return [(e["inputs"].tolist(), e["targets"].tolist()) for e in source.examples(**options)]


def test_the_parts_of_all_chunks_are_the_text_and_fit(files):
    parts = read(PrefixLMSource(files, VOCABULARY, LENGTH))
    assert all(inputs[-1] == targets[-1] == 1 for inputs, targets in parts)
    joined = [token for inputs, targets in parts for token in inputs[:-1] + targets[:-1]]
    assert VOCABULARY.decode(joined) == TEXT
    assert all(2 <= len(side) <= LENGTH for sides in parts for side in sides)


def test_every_place_is_equally_likely():
    source = PrefixLMSource({}, VOCABULARY, LENGTH)
    tokens, draws = np.arange(LENGTH, dtype=np.int32), 6000
    sides = [source.sides(tokens, np.random.default_rng([7, i])) for i in range(draws)]
    assert {side.dtype for pair in sides for side in pair} == {np.dtype(np.int32)}
    counts = np.bincount([len(first) - 1 for first, _ in sides], minlength=LENGTH)
    assert counts[0] == 0
    # Binomial(6000, 1/15): five standard deviations of 19.3.
    np.testing.assert_allclose(counts[1:], draws / (LENGTH - 1), atol=97)


def test_epochs_divide_anew_and_shards_take_turns(files):
    source = PrefixLMSource(files, VOCABULARY, LENGTH)
    whole = read(source, seed=3)
    assert whole == read(source, seed=3) != read(source, seed=4)
    for index in range(3):
        assert read(source, seed=3, shard_info=seqio.ShardInfo(index, 3)) == whole[index::3]


def test_registered_it_is_scored(files):
    name = f"prefix_{uuid.uuid4().hex[:8]}"
    source = add_prefix_lm_task(name, files, VOCABULARY, LENGTH)
    task = load_eval_task(name, "validation", LENGTH, LENGTH)
    assert not task.truncated
    assert [(e.inputs, e.targets) for e in task.examples] == read(source, split="validation")
    assert [fn.__name__ for fn in task.score_metric_fns] == ["log_likelihood"]


def test_a_chunk_of_one_token_is_refused(files):
    with pytest.raises(UserError, match="at least 2 tokens, got 1"):
        PrefixLMSource(files, VOCABULARY, 1)

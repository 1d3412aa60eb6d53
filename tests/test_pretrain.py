"""Span corruption: published lengths, a case by hand, exact reconstruction, shards and seeds."""

import gzip
import itertools
import uuid

import numpy as np
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.data import DataConfig, TrainStream, load_eval_task
from mtl_jax.errors import UserError
from mtl_jax.tasks.span_corruption import (
    Noise,
    SpanCorruptionSource,
    add_span_corruption_task,
    corrupt,
)

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)  # 3 special ids, 256 bytes, 100 sentinels
FIRST_SENTINEL = 358
TEXT = "".join(f"line {number}: the quick brown fox, naïve and all.\n" for number in range(60))


@pytest.fixture
def files(tmp_path):
    half = TEXT.index("line 30")
    (tmp_path / "a.txt").write_text(TEXT[:half], encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXT[half:])
    return {
        "train": [tmp_path / "a.txt", tmp_path / "b.txt.gz"],
        "validation": [tmp_path / "a.txt"],
    }


def read(source, seed=0, **options):
    options = {"split": "train", "shuffle": False} | options
    examples = source.get_dataset(seed=seed, **options).as_numpy_iterator()
    return [(example["inputs"].tolist(), example["targets"].tolist()) for example in examples]


def restored(inputs, targets):
    """Puts the spans of the targets back in the place of their sentinels in the inputs."""
    assert inputs[-1] == targets[-1] == 1
    spans, span = {}, []
    for token in targets[:-1]:
        if token > 258:
            spans[token] = span = []
        else:
            span.append(token)
    out = []
    for token in inputs[:-1]:
        out += spans.pop(token) if token > 258 else [token]
    assert not spans, "a span of the targets has no sentinel in the inputs"
    return out


def test_published_lengths():
    """T5's random_spans_helper: 512 inputs are made of 568 tokens and leave 114 targets."""
    noise = Noise(0.15, 3.0)
    assert noise.chunk_length(512) == 568
    assert noise.lengths(568) == (512, 114)
    # 85.2 tokens drop out, in 28.33 spans.
    assert noise.counts(568) == (85, 28)


def test_by_hand():
    tokens = np.array([10, 11, 12, 13, 14, 15, 16, 17], np.int32)
    noise = np.array([0, 0, 1, 1, 0, 1, 0, 1], bool)
    inputs, targets = corrupt(tokens, noise, first_sentinel=99, eos_id=1)
    assert inputs.tolist() == [10, 11, 99, 14, 98, 16, 97, 1]
    assert targets.tolist() == [99, 12, 13, 98, 15, 97, 17, 1]
    assert inputs.dtype == targets.dtype == np.int32


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(2, 700),
    density=st.floats(0.02, 0.95),
    mean=st.floats(1.0, 12.0),
    seed=st.integers(0, 2**32),
)
def test_mask_has_the_counts_of_the_formula(length, density, mean, seed):
    noise = Noise(density, mean)
    mask = noise.mask(length, np.random.default_rng(seed))
    assert mask.shape == (length,)
    expected = min(max(round(length * density), 1), length - 1)
    assert mask.sum() == expected
    runs = [key for key, _ in itertools.groupby(mask)]
    assert not runs[0], "T5's inputs begin with a token that stays"
    assert sum(runs) == min(max(round(expected / mean), 1), length - expected)
    inputs, targets = corrupt(np.arange(length), mask, first_sentinel=10_000, eos_id=1)
    assert (len(inputs), len(targets)) == noise.lengths(length)


@pytest.mark.parametrize("inputs_length", [3, 16, 114, 511, 1024])
def test_a_chunk_fills_the_inputs_and_one_more_token_would_not_fit(inputs_length):
    noise = Noise()
    length = noise.chunk_length(inputs_length)
    assert noise.lengths(length)[0] <= inputs_length < noise.lengths(length + 1)[0]


def test_spans_are_cut_everywhere_alike():
    """All C(4, 1)^2 ways to cut 5 + 5 tokens into two spans each come, about equally often."""
    noise, generator = Noise(0.5, 2.5), np.random.default_rng(0)
    masks, counts = np.unique(
        [noise.mask(10, generator) for _ in range(3200)], axis=0, return_counts=True
    )
    assert len(masks) == 16
    # The standard deviation of a count of 200 is 13.7.
    assert counts.min() > 140
    assert counts.max() < 260


def test_inputs_and_targets_restore_the_text(files):
    source = SpanCorruptionSource(files, VOCABULARY, inputs_length=128)
    examples = read(source)
    tokens = [token for sides in examples for token in restored(*sides)]
    assert tokens == [byte + 3 for byte in TEXT.encode()]
    lengths = [(len(inputs), len(targets)) for inputs, targets in examples]
    assert set(lengths[:-1]) == {(128, source.targets_length)}
    assert 3 <= lengths[-1][0] <= 128
    for inputs, targets in examples:
        sentinels = [token for token in inputs if token > 258]
        assert sentinels == [FIRST_SENTINEL - i for i in range(len(sentinels))]
        assert sentinels == [token for token in targets if token > 258]


def test_noise_depends_on_seed_and_chunk_alone(files):
    source = SpanCorruptionSource(files, VOCABULARY, inputs_length=64)
    examples = read(source, seed=7)
    again = SpanCorruptionSource(files, VOCABULARY, inputs_length=64)
    assert read(again, seed=7) == examples
    other = read(source, seed=8)
    assert sum(a == b for a, b in zip(examples, other, strict=True)) < len(examples) / 10
    assert read(source, seed=None) == read(source, seed=0)

    shuffled = read(source, seed=7, shuffle=True)
    assert shuffled != examples
    assert sorted(shuffled) == sorted(examples)
    for index in range(3):
        shard = seqio.ShardInfo(index, 3)
        assert read(source, seed=7, shard_info=shard) == examples[index::3]
    (late,) = itertools.islice(source.examples("train", False, 7, start=5), 1)
    assert (late["inputs"].tolist(), late["targets"].tolist()) == examples[5]


def test_registered_task_through_stream_evaluation_and_seqio(files):
    name = f"corruption_{uuid.uuid4().hex[:8]}"
    source = add_span_corruption_task(name, files, VOCABULARY, inputs_length=64)
    lengths = {"inputs_length": source.inputs_length, "targets_length": source.targets_length}
    config = DataConfig(mixture=name, batch_size=4, shuffle=False, prefetch=0, **lengths)
    stream = TrainStream(config, {name: 1})
    first, second = next(stream), next(stream)
    assert first.padding == (0.0, 0.0), "a chunk fills a row exactly"
    rows = zip(
        first.arrays["encoder_input_tokens"].tolist(),
        first.arrays["decoder_target_tokens"].tolist(),
        strict=True,
    )
    for inputs, targets in rows:
        assert bytes(token - 3 for token in restored(inputs, targets)) in TEXT.encode()
    stream.restore(first.state)
    np.testing.assert_equal(next(stream).arrays, second.arrays)

    evaluated = load_eval_task(name, "validation", 64, source.targets_length, seed=3)
    by_source = read(source, seed=3, split="validation")
    assert [(e.inputs, e.targets) for e in evaluated.examples] == by_source
    assert evaluated.truncated == 0
    assert evaluated.score_metric_fns[0](None, [-2.0, -4.0]) == {"log_likelihood": -3.0}

    seqio_lengths = {"inputs": 64, "targets": source.targets_length}
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        seqio_lengths, split="validation", shuffle=False, seed=3
    )
    assert [example["inputs"].tolist() for example in dataset.as_numpy_iterator()] == [
        inputs for inputs, _ in by_source
    ]


def test_mistakes_are_named(files, tmp_path):
    def source(vocabulary=VOCABULARY, length=64, files=files, **options):
        return SpanCorruptionSource(files, vocabulary, length, **options)

    with pytest.raises(UserError, match="needs 28 sentinels, but the vocabulary has 10 extra"):
        source(seqio.ByteVocabulary(extra_ids=10), 512)
    with pytest.raises(UserError, match=r"inputs_length = 2 is too short .* at least 3"):
        source(length=2)
    with pytest.raises(UserError, match="noise_density must be between 0 and 1"):
        source(noise_density=1.0)
    with pytest.raises(UserError, match="mean_noise_span_length must be at least 1"):
        source(mean_noise_span_length=0.5)
    with pytest.raises(UserError, match=r"no split 'valid'.*Did you mean 'validation'"):
        read(source(), split="valid")
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        read(source(files={"train": [tmp_path / "none.txt"]}))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt, line 1: not UTF-8"):
        read(source(files={"train": [tmp_path / "latin.txt"]}))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="split 'train' has no text"):
        read(source(files={"train": [tmp_path / "empty.txt"]}))


@pytest.mark.data
def test_the_corpus(data_folder):
    from mtl_jax.tasks.pretrain import TASK

    task = seqio.TaskRegistry.get(TASK)
    assert set(task.splits) == {"train", "validation", "test"}
    source = task.source
    assert (source.inputs_length, source.targets_length) == (512, 114)
    example = next(source.examples("validation", shuffle=False, seed=0))
    assert (len(example["inputs"]), len(example["targets"])) == (512, 114)
    sentinels = [token for token in example["targets"].tolist() if token >= 32000]
    assert sentinels == list(range(32099, 32099 - 28, -1))
    vocabulary = task.output_features["inputs"].vocabulary
    assert "Homarus gammarus" in vocabulary.decode(source.rows("validation")[0]["tokens"].tolist())

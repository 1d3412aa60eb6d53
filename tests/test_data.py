"""The training stream: exact resumption, shards, rates, counters, and reading as SeqIO does."""

import collections
import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
import seqio
import tensorflow as tf
from scipy import stats

from mtl_jax.data import (
    DataConfig,
    MixtureConfig,
    TrainStream,
    build_mixture,
    expand,
    load_eval_task,
    merge_states,
    mixture_table,
    task_names,
    vocabulary,
)
from mtl_jax.errors import UserError
from mtl_jax.reading import Epoch, TaskReader
from mtl_jax.sources import RowsDataSource

VOCABULARY = seqio.ByteVocabulary()
FEATURES = {
    "inputs": seqio.Feature(VOCABULARY, add_eos=True),
    "targets": seqio.Feature(VOCABULARY, add_eos=True),
}
PLAIN = (seqio.preprocessors.tokenize, seqio.preprocessors.append_eos)
AFTER_TRIM = (seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim)


class ListSource(RowsDataSource):
    def __init__(self, rows, splits=("train",)):
        super().__init__(splits)
        self._listed = rows

    def rows(self, split):
        return self._listed


def upper(dataset):
    """A TensorFlow preprocessor, so that reading takes the way through tf.data."""
    return dataset.map(lambda e: {**e, "inputs": tf.strings.upper(e["inputs"])})


@seqio.map_over_dataset(num_seeds=1)
def stamp(example, seed):
    """A preprocessor with randomness."""
    number = tf.random.stateless_uniform([], seed, 0, 10, tf.int32)
    return {**example, "inputs": tf.strings.join([example["inputs"], tf.strings.as_string(number)])}


def texts(name, count):
    return [
        {"inputs": f"{name}{i} " + "x" * (i % 7), "targets": f"{name}{i}"} for i in range(count)
    ]


def add_task(name, rows, preprocessors=PLAIN, features=FEATURES, source=None, **arguments):
    return seqio.TaskRegistry.add(
        name,
        source=source or ListSource(rows),
        preprocessors=list(preprocessors),
        output_features=features,
        metric_fns=[],
        **arguments,
    )


@pytest.fixture(autouse=True)
def registry():
    """Four tasks, three ways of reading, in a nested mixture; SeqIO's registries are put back."""
    tasks, mixtures = dict(seqio.TaskRegistry._REGISTRY), dict(seqio.MixtureRegistry._REGISTRY)
    add_task("a", texts("a", 7))
    add_task("b", texts("b", 12), (upper, *PLAIN), shuffle_buffer_size=4)
    add_task("c", texts("c", 30), (stamp, *AFTER_TRIM), shuffle_buffer_size=8)
    add_task("unused", [])
    seqio.MixtureRegistry.add("inner", [("a", 1.0), ("b", 3.0)])
    seqio.MixtureRegistry.add("outer", [("inner", 2.0), ("c", lambda task: 1.0), ("unused", 0.0)])
    yield
    seqio.TaskRegistry._REGISTRY, seqio.MixtureRegistry._REGISTRY = tasks, mixtures


IDS = {"a": 1, "b": 2, "c": 5, "unused": 9}
CONFIG = DataConfig(mixture="outer", inputs_length=40, targets_length=16, batch_size=4, prefetch=0)


def change(**values):
    return dataclasses.replace(CONFIG, **values)


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_same(ours, others):
    for one, other in zip(ours, others, strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        for key, array in one.arrays.items():
            assert array.dtype == other.arrays[key].dtype
            np.testing.assert_array_equal(array, other.arrays[key], err_msg=key)


def decoded(batches):
    """Counts `(task id, inputs, targets)` over all segments."""
    found = collections.Counter()
    for batch in batches:
        x = batch.arrays
        for row in range(len(x["encoder_segment_ids"])):
            for segment in range(1, x["encoder_segment_ids"][row].max() + 1):
                encoder_L = x["encoder_segment_ids"][row] == segment
                decoder_T = x["decoder_segment_ids"][row] == segment
                ids = {
                    *x["encoder_task_ids"][row][encoder_L].tolist(),
                    *x["decoder_task_ids"][row][decoder_T].tolist(),
                }
                assert len(ids) == 1
                inputs = VOCABULARY.decode(x["encoder_input_tokens"][row][encoder_L].tolist())
                targets = VOCABULARY.decode(x["decoder_target_tokens"][row][decoder_T].tolist())
                found[ids.pop(), inputs, targets] += 1
    return found


@pytest.mark.parametrize(("shards", "pack"), [(1, True), (2, True), (4, True), (2, False)])
def test_every_position_restores_bit_identically(shards, pack):
    config = change(num_shards=shards, pack=pack)
    batches = take(TrainStream(config, IDS), 8)
    state = batches[-1].state
    assert max(task["epoch"] for s in state["shards"].values() for task in s["tasks"].values()) > 0
    for position in range(len(batches) - 1):
        saved = json.loads(json.dumps(batches[position].state))
        resumed = TrainStream(config, IDS)
        resumed.restore(saved)
        rest = take(resumed, 1)
        assert_same(rest, batches[position + 1 : position + 2])
        assert rest[0].state == batches[position + 1].state
        np.testing.assert_array_equal(rest[0].counters, batches[position + 1].counters)


def test_restoring_is_needed():
    """The comparison above can fail: a fresh stream does not give the later batches."""
    first, second = take(TrainStream(CONFIG, IDS), 2)
    with pytest.raises(AssertionError):
        assert_same([first], [second])


def test_background_thread_changes_nothing():
    expected = take(TrainStream(CONFIG, IDS), 6)
    with TrainStream(change(prefetch=2), IDS) as stream:
        batches = take(stream, 4)
        assert_same(batches, expected[:4])
        stream.restore(batches[1].state)
        assert_same(take(stream, 4), expected[2:6])
    assert not [t for t in threading.enumerate() if t.name == "mtl_jax input"]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_global_batch_does_not_depend_on_the_number_of_processes(processes):
    config = change(num_shards=4, batch_size=8)  # two of eight processes share a shard
    whole = take(TrainStream(config, IDS), 3)
    parts = [take(TrainStream(config, IDS, index, processes), 3) for index in range(processes)]
    for step, batch in enumerate(whole):
        for key, array in batch.arrays.items():
            joined = np.concatenate([part[step].arrays[key] for part in parts])
            np.testing.assert_array_equal(joined, array)
    merged = merge_states([part[1].state for part in parts])
    assert merged == whole[1].state
    stream = TrainStream(config, IDS)
    stream.restore(merged)
    assert_same(take(stream, 1), whole[2:])


def test_a_shard_whose_rows_all_drop_out_reads_the_whole_split():
    # Of 16 rows only the even ones have targets, so the odd ones of 4 shards have nothing.
    rows = [{"inputs": f"row {i}", "targets": "" if i % 2 else "yes"} for i in range(16)]
    name = add_task("half_empty", rows).name
    config = change(mixture=name, num_shards=4, batch_size=4, pack=False)
    stream = TrainStream(config, {name: 1})
    batches = take(stream, 12)
    assert all((batch.arrays["decoder_segment_ids"][:, 0] > 0).all() for batch in batches)
    stream.restore(json.loads(json.dumps(batches[3].state)))
    assert_same(take(stream, 8), batches[4:])


def test_another_number_of_processes_goes_on_with_the_shards_that_there_were():
    before = take(TrainStream(change(num_shards=2, batch_size=4), IDS), 2)
    for readers in (1, 4):
        parts = []
        for reader in range(readers):
            stream = TrainStream(change(batch_size=4), IDS, reader, readers)
            stream.restore(before[0].state)
            parts.append(next(stream).arrays["encoder_input_tokens"])
        joined = np.concatenate(parts)
        np.testing.assert_array_equal(joined, before[1].arrays["encoder_input_tokens"])
    with pytest.raises(UserError, match=r"num_shards = 2 must be a multiple or a divisor of the 3"):
        TrainStream(change(batch_size=6), IDS, 0, 3).restore(before[0].state)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("task", ["a", "b"])
def test_every_example_once_in_each_epoch(task, shards):
    rows = [example["inputs"] for example in texts(task, {"a": 7, "b": 12}[task])]
    expected = {row.upper() if task == "b" else row for row in rows}
    config = change(mixture=task, batch_size=shards, num_shards=shards, pack=False)
    seen = [[] for _ in range(shards)]
    for batch in take(TrainStream(config, IDS), 24):
        for shard, tokens_L in enumerate(batch.arrays["encoder_input_tokens"]):
            seen[shard].append(VOCABULARY.decode(tokens_L[tokens_L > 0].tolist()))
    parts = [sorted(expected & set(shard)) for shard in seen]
    assert sorted(itertools.chain(*parts)) == sorted(expected)  # disjoint and complete
    for shard, part in zip(seen, parts, strict=True):
        epochs = [shard[i : i + len(part)] for i in range(0, 24 - len(part) + 1, len(part))]
        assert all(sorted(epoch) == part for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # each in another order


def test_without_shuffling_the_order_is_that_of_the_data():
    config = change(mixture="a", pack=False, batch_size=7, shuffle=False)
    (batch,) = take(TrainStream(config, IDS), 1)
    tokens = batch.arrays["encoder_input_tokens"]
    found = [VOCABULARY.decode(row[row > 0].tolist()) for row in tokens]
    assert found == [example["inputs"] for example in texts("a", 7)]


def test_task_ids_stay_with_their_tokens():
    found = decoded(take(TrainStream(CONFIG, IDS), 20))
    for number, inputs, targets in found:
        assert {"a": 1, "b": 2, "c": 5}[targets[0]] == number
        assert inputs.lower().startswith(targets)


def test_realised_rates_follow_the_nested_mixture():
    for name in "pqr":  # like a, b, c, but without TensorFlow
        add_task(name, texts(name, 20))
    seqio.MixtureRegistry.add("pq", [("p", 1.0), ("q", 3.0)])
    seqio.MixtureRegistry.add("pqr", [("pq", 2.0), ("r", lambda task: 1.0)])
    config = change(mixture="pqr", batch_size=16, inputs_length=200, targets_length=100)
    counters = take(TrainStream(config, {"p": 1, "q": 2, "r": 3}), 25)[-1].counters[:, 0]
    expected = counters.sum() * np.array([2 / 3 * 1 / 4, 2 / 3 * 3 / 4, 1 / 3])
    assert counters.sum() > 3000
    assert stats.chisquare(counters, expected).pvalue > 1e-3


def test_truncated_and_empty_examples_are_counted():
    rows = [
        {"inputs": "long " * 9, "targets": "y"},
        {"inputs": "", "targets": "no inputs"},
        {"inputs": "short", "targets": "z" * 20},
    ]
    bare = {k: dataclasses.replace(f, add_eos=k == "targets") for k, f in FEATURES.items()}
    add_task("odd", rows, PLAIN, features=bare)
    config = change(mixture="odd", pack=False, batch_size=4)
    stream = TrainStream(config, {"odd": 1})
    batch = next(stream)
    assert stream.counters_by_task(batch)["odd"] == {
        "examples": 4,
        "skipped": batch.counters[0, 1],
        "input_tokens": 40 * 2 + 5 * 2,
        "target_tokens": 2 * 2 + 16 * 2,
        "truncated_inputs": 2,
        "truncated_targets": 2,
        "longest_input": 45,
        "longest_target": 21,
    }
    assert 1 <= batch.counters[0, 1] <= 2
    lengths = sorted((batch.arrays["encoder_segment_ids"] > 0).sum(1).tolist())
    assert lengths == [5, 5, 40, 40]


@pytest.mark.parametrize("steps", [PLAIN, AFTER_TRIM, (upper, *PLAIN), (upper, *AFTER_TRIM)])
def test_tokens_are_those_of_seqio(steps):
    lengths = {"inputs": 9, "targets": 3}
    task = add_task("same", texts("häß", 11), steps)
    config = DataConfig(
        mixture="same",
        inputs_length=9,
        targets_length=3,
        batch_size=11,
        pack=False,
        shuffle=False,
        prefetch=0,
    )
    batch = next(TrainStream(config, {"same": 1}))
    witness = task.get_dataset(lengths, "train", shuffle=False).as_numpy_iterator()
    for row, example in enumerate(witness):
        for key, side in (("encoder_input", "inputs"), ("decoder_target", "targets")):
            tokens = batch.arrays[f"{key}_tokens"][row]
            assert tokens[tokens > 0].tolist() == example[side].tolist()


def test_random_preprocessors_differ_by_epoch_and_repeat_by_seed():
    reader = TaskReader(seqio.TaskRegistry.get("c"), {"inputs": 40, "targets": 16})

    def read(seed):
        return [inputs.tolist() for inputs, _ in reader.tokens(Epoch("train", False, seed))]

    assert read(1) == read(1)
    assert read(1) != read(2)


def test_sharded_by_example_where_the_source_cannot():
    def numbers(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        data = {"inputs": [f"in{i}" for i in range(10)], "targets": ["t"] * 10}
        return tf.data.Dataset.from_tensor_slices(data)

    source = seqio.FunctionDataSource(numbers, ["train"], num_input_examples={"train": 10})
    add_task("function", [], source=source)
    config = change(mixture="function", num_shards=2, batch_size=2, pack=False, shuffle=False)
    found = decoded(take(TrainStream(config, {"function": 3}), 5))
    assert found == {(3, f"in{i}", "t"): 1 for i in range(10)}


def test_splits_that_cannot_be_read():
    with pytest.raises(UserError, match="'unused': its split 'train' is empty"):
        TrainStream(change(mixture="unused"), IDS)
    with pytest.raises(UserError, match=r"no split 'trian'.*Did you mean 'train'"):
        TrainStream(change(split="trian"), IDS)
    add_task(
        "hollow",
        [{"inputs": "", "targets": "x"}] * 3,
        features={
            key: dataclasses.replace(feature, add_eos=False) for key, feature in FEATURES.items()
        },
    )
    for prefetch in (0, 2):
        with TrainStream(change(mixture="hollow", prefetch=prefetch), {"hollow": 1}) as stream:
            for _ in range(2):
                with pytest.raises(UserError, match="'hollow' has no usable example"):
                    next(stream)


def test_fewer_examples_than_shards_are_read_by_all():
    add_task("tiny", texts("t", 2))
    config = change(mixture="tiny", num_shards=4, pack=False)
    assert len(decoded(take(TrainStream(config, {"tiny": 1}), 4))) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": ""}, r"Data\.mixture is empty"),
        ({"mixture": "oter"}, r"No task or mixture 'oter'.*Did you mean 'outer'"),
        ({"batch_size": 3, "num_shards": 2}, r"batch_size = 3 must be a multiple of the 2 shards"),
        ({"inputs_length": 0}, r"Data\.inputs_length must be at least 1, not 0"),
        ({"targets_length": 0}, r"Data\.targets_length must be at least 1"),
        ({"batch_size": -8}, r"Data\.batch_size must be at least 1"),
        ({"num_shards": -1}, r"Data\.num_shards must be at least 0"),
        ({"prefetch": -1}, r"Data\.prefetch must be at least 0"),
        ({"lookahead": -1}, r"Data\.lookahead must be at least 0"),
        ({"task_modules": "mine"}, r"Data\.task_modules .* write \['mine'\]"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UserError, match=message):
        TrainStream(change(**values), IDS)


def test_positions_of_other_data_are_refused():
    state = next(TrainStream(CONFIG, IDS)).state
    with pytest.raises(UserError, match="has seed = 0, this run has 1"):
        TrainStream(change(seed=1), IDS).restore(state)
    with pytest.raises(UserError, match=r"3 tasks, this run has 1 tasks \(different: \['b', 'c'\]"):
        TrainStream(change(mixture="a"), IDS).restore(state)
    part = next(TrainStream(change(num_shards=2), IDS, 0, 2)).state
    with pytest.raises(UserError, match="lacks shard 1 of 2"):
        TrainStream(change(num_shards=2), IDS).restore(part)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("pack", not CONFIG.pack),
        ("batch_size", CONFIG.batch_size * 2),
        ("lookahead", CONFIG.lookahead + 1),
        ("inputs_length", CONFIG.inputs_length - 1),
        ("targets_length", CONFIG.targets_length - 1),
    ],
)
def test_positions_of_other_rows_are_refused(field, other):
    """Examples that wait were trimmed to the lengths of then: they might never fit a row again."""
    state = json.loads(json.dumps(next(TrainStream(CONFIG, IDS)).state))
    with pytest.raises(
        UserError, match=f"has {field} = {getattr(CONFIG, field)}, this run has {other}"
    ):
        TrainStream(change(**{field: other}), IDS).restore(state)


def test_positions_of_another_version_are_refused():
    state = {**next(TrainStream(CONFIG, IDS)).state, "version": 1}
    with pytest.raises(UserError, match=r"has version 1; .* Start a new run directory"):
        TrainStream(CONFIG, IDS).restore(state)


def test_a_task_without_its_sides():
    add_task("lm", [], features={"targets": FEATURES["targets"]}, source=ListSource(texts("l", 2)))
    with pytest.raises(UserError, match="'lm' has no output feature 'inputs'"):
        TrainStream(change(mixture="lm"), {"lm": 1})


def sized(name, count):
    return add_task(name, texts("z", count))


def test_mixture_from_examples_is_seqios_cap_then_temperature():
    for name, count in (("n10", 10), ("n40", 40), ("n90", 90)):
        sized(name, count)
    build_mixture(MixtureConfig("mixed", ["n*"], maximum=64, temperature=2.0))
    rates = {row.task: row.rate for row in mixture_table("mixed")}
    expected = {"n10": 10**0.5, "n40": 40**0.5, "n90": 64**0.5}
    assert rates == pytest.approx(expected, rel=1e-12)
    shares = [row.share for row in mixture_table("mixed")]
    assert sum(shares) == pytest.approx(1)
    assert [row.examples for row in mixture_table("mixed")] == [10, 40, 90]
    build_mixture(MixtureConfig("mixed", ["n*"], maximum=64, temperature=2.0))  # the same again
    with pytest.raises(UserError, match="'mixed' is already registered"):
        build_mixture(MixtureConfig("mixed", ["n*"]))


def test_mixtures_with_explicit_and_equal_rates():
    build_mixture(MixtureConfig("explicit", ["outer", "a"], rates={"*": 1, "b": 4, "unused": 0}))
    rates = {row.task: row.rate for row in mixture_table("explicit")}
    assert rates == {"a": 1, "b": 4, "c": 1, "unused": 0}
    build_mixture(MixtureConfig("equal", ["inner"], rates="equal"))
    assert [row.share for row in mixture_table("equal")] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["a"], "name": ""}, r"Mixture\.name is not"),
        ({"tasks": []}, r"Mixture\.tasks is empty"),
        ({"tasks": ["zzz*"]}, r"'zzz\*'"),
        ({"rates": "exmples"}, "Did you mean 'examples'"),
        ({"rates": {"a": -1}}, r"rates\['a'\] must be a number >= 0"),
        ({"rates": {"a": 1, "d": 1}}, "'d' is none of"),
        ({"rates": {"a": 1}}, "no rate for b"),
        ({"rates": "equal", "maximum": 5.0}, "need Mixture.rates='examples'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"maximum": 0.0}, "maximum must be positive or None"),
        ({"tasks": "a"}, r"Mixture\.tasks .* write \['a'\]"),
        ({"name": "a"}, "'a' is already registered"),
    ],
)
def test_bad_mixtures(values, message):
    with pytest.raises(UserError, match=message):
        build_mixture(MixtureConfig(**{"name": "new", "tasks": ["a", "b"], **values}))


def test_names_globs_and_vocabularies():
    assert expand(["b", "?", "inn*"]) == ["b", "a", "c", "inner"]
    assert task_names("outer") == ["a", "b", "c", "unused"]
    assert vocabulary(["a", "b"]) == VOCABULARY
    more = seqio.Feature(seqio.ByteVocabulary(extra_ids=7), add_eos=True)
    add_task("other", [], features={"inputs": more, "targets": more})
    with pytest.raises(UserError, match="different vocabularies"):
        vocabulary(["a", "other"])


def test_evaluation_task():
    rows = [
        {"inputs": f"q{i}", "targets": "yes", "answer_choices": "yes ||| no way", "idx": i}
        for i in range(5)
    ]
    add_task("ranked", rows, postprocess_fn=str.strip)
    task = load_eval_task("ranked", "train", 40, 4)
    assert [example.index for example in task.examples] == [0, 1, 2, 3, 4]
    first = task.examples[0]
    eos = VOCABULARY.eos_id
    assert first.inputs == [*VOCABULARY.encode("q0"), eos]
    assert first.choices == ["yes", "no way"]
    assert first.choice_tokens == [[*VOCABULARY.encode("yes"), eos], VOCABULARY.encode("no w")]
    assert (first.inputs_text, first.targets_text, first.fields["idx"]) == ("q0", "yes", 0)
    assert task.truncated == 5
    assert task.detokenize(VOCABULARY.encode("yes")) == "yes"
    some = [example.index for example in load_eval_task("ranked", "train", 9, 9, 3).examples]
    assert len(some) == 3
    assert some == sorted(some)
    generated = load_eval_task("b", "train", 40, 40)
    assert generated.examples[0].choices == []
    assert generated.examples[0].inputs_text.startswith("B0")
    with pytest.raises(UserError, match="'unused': its split 'train' is empty"):
        load_eval_task("unused", "train", 9, 9)

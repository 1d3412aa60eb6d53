"""Records that cannot be read: named, counted, fatal or left out up to `Data.max_corrupt`."""

import gzip
import json
import logging
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import seqio
import tensorflow as tf

from mtl_jax import reading, row_files
from mtl_jax.data import DataConfig, TrainStream
from mtl_jax.errors import UserError
from mtl_jax.reading import Epoch, TaskReader
from mtl_jax.sources import JsonlDataSource, ParquetDataSource
from mtl_jax.tasks.benchmarks.origins import Origin
from mtl_jax.tasks.prompted import PromptedTask
from mtl_jax.tasks.prompts import Template
from mtl_jax.tasks.span_corruption import SpanCorruptionSource

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
FEATURES = {side: seqio.Feature(VOCABULARY) for side in ("inputs", "targets")}
TOKENIZE = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
SIZES = {"inputs_length": 32, "targets_length": 16, "batch_size": 2, "prefetch": 0}
LENGTHS = {"inputs": 32, "targets": 16}
SHARD = [seqio.ShardInfo(0, 1)]


@pytest.fixture
def task():
    """Registers tasks and forgets them again."""
    added = []

    def add(name, source, preprocessors=TOKENIZE):
        added.append(name)
        return seqio.TaskRegistry.add(
            name, source=source, preprocessors=preprocessors, output_features=FEATURES
        )

    yield add
    for name in added:
        seqio.TaskRegistry.remove(name)


def test_what_is_behind_the_end_of_a_damaged_gzip_file_counts_as_one(tmp_path, caplog):
    path = tmp_path / "cut.jsonl.gz"
    letters = random.Random(0).choices(
        "abcdefghij", k=9000
    )  # so that it is not all compressed away
    lines = [json.dumps({"a": "".join(letters[i : i + 90])}) for i in range(0, 9000, 90)]
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-2000])
    source = JsonlDataSource({"train": path})
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz cannot be read from line \d+ on: "):
        source.rows("train")
    row_files.tolerate("train", 1)
    kept = source.rows("train")
    assert 0 < len(kept) < 100
    assert kept == [json.loads(line) for line in lines[: len(kept)]]
    assert source.corrupt("train", SHARD) == {str(path): 1}
    assert f"cut.jsonl.gz cannot be read from line {len(kept) + 1} on" in caplog.text
    with pytest.raises(UserError, match="from line"):  # how many there are cannot be told
        row_files.count_rows(path)
    assert row_files.count_rows(path, most_corrupt=1) == len(kept) + 1


def test_a_failing_disk_is_no_corrupt_record(tmp_path, monkeypatch):
    """Or else a run that meets one would go on with less data."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    row_files.tolerate("train", 9)

    def fail(*given, **named):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(row_files, "open", fail, raising=False)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: .*Input/output error"):
        JsonlDataSource({"train": path}).rows("train")


def test_the_rows_of_a_damaged_row_group_are_counted(tmp_path, caplog):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"row {number} " + "x" * 50} for number in range(9)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=3, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    damaged = bytearray(path.read_bytes())
    start = column.data_page_offset  # the header of the page
    damaged[start : start + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    source = ParquetDataSource({"train": path})
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: row group 1: "):
        source.rows("train")
    row_files.tolerate("train", 2)
    with pytest.raises(UserError, match=r"row group 1: .* 2 rows before it are corrupt"):
        source.rows("train")
    row_files.tolerate("train", 3)
    assert source.rows("train") == rows[:3] + rows[6:]
    assert source.corrupt("train", SHARD) == {str(path): 3}


def test_a_line_of_text_that_is_no_utf8(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one line of text\n" + "naïve\n".encode("latin-1") + b"and another one\n")
    source = SpanCorruptionSource({"train": [path]}, VOCABULARY, 12)
    with pytest.raises(UserError, match=r"a\.txt, line 2: not UTF-8"):
        source.rows("train")
    row_files.tolerate("train", 1)
    tokens = np.concatenate([chunk["tokens"] for chunk in source.rows("train")]).tolist()
    assert VOCABULARY.decode(tokens) == "one line of text\nand another one\n"
    assert source.corrupt("train", SHARD) == {str(path): 1}
    assert "a.txt, line 2" in caplog.text


def test_rows_of_the_task_library(tmp_path, monkeypatch, caplog):
    """A line that is no JSON, a missing field, a label that there is not."""
    folder = tmp_path / "corrupt_library"
    folder.mkdir()
    good = [{"text": f"text {n}", "label": n % 2} for n in range(6)]
    bad = ['{"text": "ha', '{"text": "no label"}', '{"text": "x", "label": 7}']
    lines = [*map(json.dumps, good[:3]), *bad, *map(json.dumps, good[3:])]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    origin = Origin("corrupt_library", {"text": str, "label": int}, {"train": 6}, labels=2)
    prompt = Template("plain", "{{ text }} ||| {{ label }}")
    (name,) = PromptedTask(
        "corrupt_library", origin.rows, [prompt], FEATURES, ["train"], (), count=origin.count,
        corrupt=origin.corrupt,
    ).register()  # fmt: skip
    with pytest.raises(UserError, match=r"train\.jsonl, line 4: not valid JSON"):
        origin.rows("train")
    row_files.tolerate("train", 2)
    with pytest.raises(UserError, match=r"line 6: label is 7.* 2 rows before it are corrupt"):
        origin.rows("train")
    row_files.tolerate("train", 3)
    assert origin.rows("train") == good
    for place in ("line 4: not valid JSON", "line 5: ", "line 6: label is 7"):
        assert place in caplog.text
    config = DataConfig(mixture=name, max_corrupt=3, **SIZES)
    with TrainStream(config, {name: 1}) as stream:
        assert stream.counters_by_task(next(stream))[name]["corrupt"] == 3
    seqio.TaskRegistry.remove(name)


RECORDS, PART = 40, 20


@pytest.fixture
def records(tmp_path):
    """Two TFRecord files; the sixth record of the second has a byte that is wrong."""
    paths = []
    for file in range(2):
        paths.append(str(tmp_path / f"{file}.tfrecord"))
        with tf.io.TFRecordWriter(paths[-1]) as writer:
            for number in range(file * PART, (file + 1) * PART):
                text = tf.train.BytesList(value=[f"number {number}".encode()])
                feature = {side: tf.train.Feature(bytes_list=text) for side in FEATURES}
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())
    damaged = bytearray((tmp_path / "1.tfrecord").read_bytes())
    damaged[damaged.index(b"number 25")] ^= 1
    (tmp_path / "1.tfrecord").write_bytes(damaged)
    texts = {side: tf.io.FixedLenFeature([], tf.string) for side in FEATURES}
    return seqio.TFExampleDataSource({"train": paths}, texts)


def inputs(reader, start=0, shuffle=False):
    found = reader.tokens(Epoch("train", shuffle, seed=0, start=start))
    return [None if pair is None else VOCABULARY.decode(pair[0].tolist()) for pair in found]


def test_a_damaged_record_of_tensorflow(task, records, caplog):
    """It takes what follows in its file with it, as the file's reader cannot find the next."""
    found = task("corrupt_records", records)
    strict = TaskReader(found, LENGTHS)
    with pytest.raises(UserError, match=r"'corrupt_records': damaged .* in [^,]*1\.tfrecord \("):
        inputs(strict)
    reader = TaskReader(found, LENGTHS, most_corrupt=1)
    for shuffle in (False, True):
        caplog.clear()
        texts = inputs(reader, shuffle=shuffle)
        assert texts.count(None) == 1
        assert sorted(filter(None, texts)) == sorted(f"number {n}" for n in range(25))
        assert "left out corrupt record 1 (at most 1)" in caplog.text
        assert "1.tfrecord" in caplog.text
        assert "0.tfrecord" not in caplog.text
        for start in (1, 10, 20, 26):  # also behind the damaged one
            assert inputs(reader, start, shuffle) == texts[start:]


def fail_at(*numbers):
    """A preprocessor of TensorFlow that fails on these numbers."""

    def check(example):
        bad = tf.reduce_any([tf.equal(example["inputs"], f"number {n}") for n in numbers])
        tf.debugging.assert_equal(bad, False, message="this number is not wanted")
        return example

    return lambda dataset: dataset.map(check, num_parallel_calls=4)


def numbers_source(tmp_path):
    path = tmp_path / "numbers.jsonl"
    rows = [{"inputs": f"number {n}", "targets": f"{n}"} for n in range(RECORDS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlDataSource({"train": path})


def test_a_preprocessor_that_fails_on_records(task, tmp_path, caplog):
    found = task("corrupt_steps", numbers_source(tmp_path), [fail_at(3, 11), *TOKENIZE])
    with pytest.raises(tf.errors.InvalidArgumentError, match="not wanted") as caught:
        inputs(TaskReader(found, LENGTHS))
    assert any("corrupt_steps" in note for note in caught.value.__notes__)
    with pytest.raises(
        UserError, match=r"'corrupt_steps': .*not wanted.* 1 records before it .*Data\.max_corrupt"
    ):
        inputs(TaskReader(found, LENGTHS, most_corrupt=1))
    caplog.clear()
    texts = inputs(TaskReader(found, LENGTHS, most_corrupt=2))
    assert texts == [None if n in (3, 11) else f"number {n}" for n in range(RECORDS)]
    assert "left out corrupt record 2 (at most 2)" in caplog.text
    assert "this number is not wanted" in caplog.text


@pytest.mark.parametrize("most_corrupt", [0, 9])
def test_storage_that_fails_is_no_corrupt_record_of_tensorflow(task, tmp_path, most_corrupt):
    texts = {side: tf.io.FixedLenFeature([], tf.string) for side in FEATURES}
    source = seqio.TFExampleDataSource({"train": [str(tmp_path / "gone.tfrecord")]}, texts)
    reader = TaskReader(task("corrupt_gone", source), LENGTHS, most_corrupt=most_corrupt)
    with pytest.raises(tf.errors.NotFoundError):
        inputs(reader)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (tf.errors.DataLossError(None, None, "corrupted record at 12"), True),
        (
            tf.errors.UnknownError(None, None, "KeyError: 3\nTraceback (most recent call last):"),
            True,
        ),
        (tf.errors.UnknownError(None, None, "a.tfrecord; Input/output error"), False),
        (
            tf.errors.UnknownError(None, None, "UserError: x\nTraceback (most recent call last):"),
            False,
        ),
        (tf.errors.UnavailableError(None, None, "try again"), False),
    ],
)
def test_what_is_of_a_record_and_what_of_the_system(error, is_one):
    assert reading._of_a_record(error) == is_one


def test_a_function_of_python_that_fails_on_a_record(task, tmp_path):
    def check(text):
        if text.numpy() == b"number 3":
            raise KeyError("three")
        return text

    def step(dataset):
        def call(example):
            text = tf.py_function(check, [example["inputs"]], tf.string)
            return example | {"inputs": tf.ensure_shape(text, [])}

        return dataset.map(call)

    found = task("corrupt_python", numbers_source(tmp_path), [step, *TOKENIZE])
    texts = inputs(TaskReader(found, LENGTHS, most_corrupt=1))
    assert texts == [None if n == 3 else f"number {n}" for n in range(RECORDS)]


def test_the_stream_counts_them_and_goes_on_from_any_position(task, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    task("corrupt_stream", numbers_source(tmp_path), [fail_at(3, 11, 12), *TOKENIZE])
    config = DataConfig(mixture="corrupt_stream", max_corrupt=3, **SIZES)
    ids = {"corrupt_stream": 1}
    with TrainStream(config, ids) as stream:
        batches = [next(stream) for _ in range(60)]
        counted = stream.counters_by_task(batches[-1])["corrupt_stream"]
        early = stream.counters_by_task(batches[0])["corrupt_stream"]
    whole, rest = divmod(counted["examples"], RECORDS - 3)
    assert whole >= 2
    assert 3 * whole <= counted["corrupt"] <= 3 * whole + min(rest, 3)
    assert "corrupt" not in early or early["corrupt"] <= 3
    for number in (0, 7, 20, 41):
        with TrainStream(config, ids) as again:
            again.restore(json.loads(json.dumps(batches[number].state)))
            following = next(again)
        assert following.state == batches[number + 1].state
        for name, array in following.arrays.items():
            np.testing.assert_array_equal(array, batches[number + 1].arrays[name])


def test_positions_from_before_corrupt_records_were_counted(task, tmp_path):
    task("corrupt_old", numbers_source(tmp_path))
    config = DataConfig(mixture="corrupt_old", **SIZES)
    with TrainStream(config, {"corrupt_old": 1}) as stream:
        first, second = next(stream), next(stream)
        state = first.state
        for shard in state["shards"].values():
            shard["counters"] = {name: row[:8] for name, row in shard["counters"].items()}
        stream.restore(state)
        assert next(stream).state == second.state

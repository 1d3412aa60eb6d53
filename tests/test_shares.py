"""Of a split of many files a process reads its own alone, and all together read each row once."""

import collections
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import seqio
import shared_files
import test_processes
import test_train

from mtl_jax import effective_mixture, processes, row_files
from mtl_jax.data import DataConfig, TrainStream
from mtl_jax.errors import UserError
from mtl_jax.sources import JsonlDataSource, ParquetDataSource, TsvDataSource
from mtl_jax.tasks.span_corruption import SpanCorruptionSource

SPLIT = "train"
SHARDS = 2
COUNTS = {SPLIT: shared_files.FILES * shared_files.ROWS}


@pytest.fixture
def several(monkeypatch):
    """As in a job of several processes."""
    monkeypatch.setattr(processes, "several", lambda: True)


def own_files(index, shards=SHARDS):
    return range(index, shared_files.FILES, shards)


def rows_of(folder, counts=COUNTS):
    paths = [folder / f"{number}.jsonl" for number in range(shared_files.FILES)]
    return JsonlDataSource({SPLIT: paths}, num_input_examples=counts)


def text_of(folder):
    paths = [folder / f"{number}.txt" for number in range(shared_files.FILES)]
    return SpanCorruptionSource({SPLIT: paths}, shared_files.VOCABULARY, 12)


def read(source, index=0, shards=SHARDS, shuffle=False, seed=3):
    """The examples of a shard in Python and, the same, in TensorFlow."""
    arguments = {"shuffle": shuffle, "seed": seed, "shard_info": seqio.ShardInfo(index, shards)}
    found = [row["inputs"] for row in source.examples(SPLIT, **arguments)]
    dataset = source.get_dataset(SPLIT, **arguments).as_numpy_iterator()
    for ours, theirs in zip(found, (row["inputs"] for row in dataset), strict=True):
        assert ours == theirs.decode() if isinstance(ours, str) else (ours == theirs).all()
    return [text if isinstance(text, str) else tuple(text) for text in found]


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_a_shard_of_rows_needs_its_own_files_alone(tmp_path, shards):
    shared_files.write(tmp_path / "all", range(shared_files.FILES))
    whole = rows_of(tmp_path / "all")
    together = []
    for index in range(shards):
        own = own_files(index, shards)
        shared_files.write(tmp_path / str(index), own)
        source = rows_of(tmp_path / str(index))
        assert source.num_input_examples(SPLIT) == COUNTS[SPLIT]  # without reading
        plain = read(source, index, shards)
        expected = [f"{n}{row}" * 3 for n in own for row in range(shared_files.ROWS)]
        assert plain == expected == read(whole, index, shards)
        shuffled = read(source, index, shards, shuffle=True)
        assert shuffled != plain
        assert sorted(shuffled) == sorted(plain)
        with pytest.raises(UserError, match=r"No such file"):
            source.rows(SPLIT)
        together += plain
    assert sorted(together) == sorted(row["inputs"] for row in whole.rows(SPLIT))
    assert len(set(together)) == COUNTS[SPLIT]


def test_without_a_count_all_rows_are_read_and_shared(tmp_path):
    shared_files.write(tmp_path / "all", range(shared_files.FILES))
    source = rows_of(tmp_path / "all", None)
    assert source.num_input_examples(SPLIT) == COUNTS[SPLIT]
    rows = [row["inputs"] for row in source.rows(SPLIT)]
    for shards in (2, 5):
        assert not source.apart(SPLIT, seqio.ShardInfo(0, shards))
        for index in range(shards):
            assert read(source, index, shards) == rows[index::shards]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "tsv"])
def test_of_fewer_files_than_shards_the_lines_of_others_stay_unread(tmp_path, several, ending):
    """They are not even of the format."""
    tsv = ending == "tsv"
    kind, shards = (TsvDataSource if tsv else JsonlDataSource), 3
    together = []
    for index in range(shards):
        lines = ["inputs\ttargets"] if tsv else []
        for number in range(len(lines) + 1, 12):
            if number % shards != index:
                lines.append("no row of ours")
            else:
                row = {"inputs": f"line {number}", "targets": "x"}
                lines.append("\t".join(row.values()) if tsv else json.dumps(row))
        path = tmp_path / f"{index}.{ending}"
        opened = gzip.open if ending.endswith("gz") else open
        with opened(path, "wt") as file:
            file.write("\n".join(lines) + "\n")
        source = kind({SPLIT: path}, num_input_examples={SPLIT: 11})
        together += read(source, index, shards)
        with pytest.raises(UserError, match=r"not valid JSON|1 columns instead of 2"):
            read(source, (index + 1) % shards, shards)
    first = 2 if tsv else 1
    assert sorted(together) == sorted(f"line {number}" for number in range(first, 12))


@pytest.mark.parametrize("alone", [True, False])
def test_of_fewer_files_than_shards_rows_of_parquet(tmp_path, monkeypatch, alone):
    """A process that is alone reads them once, and finds the same in each shard."""
    monkeypatch.setattr(processes, "several", lambda: not alone)
    rows = [{"inputs": f"row {number}", "targets": "x"} for number in range(1, 12)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    source = ParquetDataSource({SPLIT: path}, num_input_examples={SPLIT: 11})
    for index in range(3):
        expected = [f"row {number}" for number in range(1, 12) if number % 3 == index]
        assert read(source, index, 3) == expected
    assert len(source._reads) == (1 if alone else 3)
    assert [row["inputs"] for row in source.rows(SPLIT)] == [row["inputs"] for row in rows]


def test_what_a_share_gives_does_not_depend_on_the_process(tmp_path, monkeypatch):
    """Nor on which row is its first: texts that are null, numbers with and without a point."""
    rows = [{"inputs": "a", "number": 1}, {"inputs": None, "number": 2}]
    rows += [{"inputs": "c", "number": 2.5}, {"inputs": "d", "number": 4}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for alone in (True, False):
        monkeypatch.setattr(processes, "several", lambda alone=alone: not alone)
        source = JsonlDataSource({SPLIT: path}, num_input_examples={SPLIT: 4})
        shares = [
            source.get_dataset(SPLIT, shuffle=False, shard_info=seqio.ShardInfo(index, 2))
            for index in range(2)
        ]
        found.append([list(share.as_numpy_iterator()) for share in shares])
    assert found[0] == found[1]
    assert [[row["inputs"] for row in share] for share in found[0]] == [[b"", b"d"], [b"a", b"c"]]
    assert [share[0]["number"].dtype.kind for share in found[0]] == ["i", "f"]


def test_corrupt_lines_are_of_the_process_that_reads_them(tmp_path, several):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n[4]\n{"a": 5}\n{\n')
    source = JsonlDataSource({SPLIT: path}, num_input_examples={SPLIT: 6})
    row_files.tolerate(SPLIT, 3)
    counts = [source.corrupt(SPLIT, [seqio.ShardInfo(index, 2)]) for index in range(2)]
    assert list(counts[0].values()) == [3]
    assert not counts[1]
    assert not {*counts[0]} & {*source.corrupt(SPLIT, [seqio.ShardInfo(0, 3)])}


@pytest.mark.parametrize("shards", [2, 4])
def test_a_shard_of_text_needs_its_own_files_alone(tmp_path, shards):
    """Every file is joined with the others of its share; noise is that of the share's chunk."""
    shared_files.write(tmp_path / "all", range(shared_files.FILES))
    for index in range(shards):
        shared_files.write(tmp_path / str(index), own_files(index, shards))
        source = text_of(tmp_path / str(index))
        mine = read(source, index, shards)
        assert mine == read(text_of(tmp_path / "all"), index, shards)
        assert sorted(mine) == sorted(read(source, index, shards, shuffle=True))
        with pytest.raises(UserError, match="there is no such file"):
            source.rows(SPLIT)
        tokens = [
            chunk["tokens"] for chunk in source.share(SPLIT, seqio.ShardInfo(index, shards))[0]
        ]
        texts = [(tmp_path / str(index) / f"{n}.txt").read_text() for n in own_files(index, shards)]
        joined = shared_files.VOCABULARY.encode("".join(texts))
        assert np.concatenate(tokens).tolist() == joined[: sum(map(len, tokens))]
        assert len(joined) - sum(map(len, tokens)) <= 1


def test_workers_of_the_caching_job_write_file_by_file(tmp_path):
    shared_files.write(tmp_path / "all", range(shared_files.FILES))
    source = rows_of(tmp_path / "all")
    names = source.list_shards(SPLIT)
    assert [name[-7:] for name in names] == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    assert read(source, 2, len(names)) == [f"2{row}" * 3 for row in range(shared_files.ROWS)]
    assert len(rows_of(tmp_path / "all", None).list_shards(SPLIT)) == 1


@pytest.mark.parametrize("counts", [{"train": 0}, {"trian": 5}, {"train": "5"}])
def test_a_count_that_cannot_be_is_named(tmp_path, counts):
    for kind in (JsonlDataSource, TsvDataSource):
        with pytest.raises(
            UserError, match=r"num_input_examples\['tr.*positive whole number .* train"
        ):
            kind({SPLIT: tmp_path / "a"}, num_input_examples=counts)


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The tasks, over a folder in which no file is yet."""
    monkeypatch.setenv("SHARED_FILES", str(tmp_path / "own"))
    shared_files.register()
    yield tmp_path / "own"
    for name in ("shared_rows", "shared_text"):
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("shared")


def test_a_stream_of_one_of_two_readers_opens_no_file_of_the_other(registered):
    config = DataConfig(
        mixture="shared", inputs_length=32, targets_length=16, batch_size=8, prefetch=0
    )
    shared_files.write(registered, own_files(1))
    with TrainStream(config, {"shared_rows": 1, "shared_text": 2}, 1, SHARDS) as stream:
        batches = [next(stream) for _ in range(20)]
        counters = stream.counters_by_task(batches[-1])
    assert all(counters[name]["examples"] > 40 for name in counters)
    vocabulary, seen = shared_files.VOCABULARY, collections.Counter()
    for batch in batches:
        of_rows = batch.arrays["decoder_task_ids"] == 1
        tokens = batch.arrays["decoder_target_tokens"][of_rows]
        seen.update(vocabulary.decode(tokens.tolist()).replace("\0", " "))
    assert seen["1"] > 0
    assert seen["3"] > 0


def test_what_the_first_shard_lacks_is_measured_on_the_whole(tmp_path):
    """One row of one file, which is in the second shard of three."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"inputs": "abc", "targets": "d"}\n')
    features = {side: seqio.Feature(shared_files.VOCABULARY) for side in ("inputs", "targets")}
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    source = JsonlDataSource({SPLIT: path}, num_input_examples={SPLIT: 1})
    seqio.TaskRegistry.add(
        "shared_one", source=source, preprocessors=steps, output_features=features
    )
    config = DataConfig(mixture="shared_one", inputs_length=8, targets_length=8, batch_size=3)
    measured = effective_mixture.measure(config, 1, shards=3)
    seqio.TaskRegistry.remove("shared_one")
    assert not measured.empty
    assert (measured.rows[0].input_tokens, measured.rows[0].target_tokens) == (4, 2)


class _OwnFolder:
    """Environment of each process: a folder with its own files only."""

    def __init__(self, folder, corrupt=False):
        self.folders = [folder / f"process{index}" for index in range(SHARDS)]
        for index, own in enumerate(self.folders):
            shared_files.write(own, own_files(index))
        self.whole = folder / "whole"
        shared_files.write(self.whole, range(shared_files.FILES))
        if corrupt:
            for path in (self.whole / "3.jsonl", self.folders[1] / "3.jsonl"):
                path.write_text(path.read_text() + '{"inputs": "ha\n')

    def __call__(self, index, count):
        return {"SHARED_FILES": str(self.whole if count == 1 else self.folders[index])}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 2])
def test_two_processes_with_their_own_files_train_as_one_with_all(tmp_path, blocks):
    """Also what is measured for `Data.blocks`, and one corrupt row of one process."""
    values = {
        "Data__task_modules": "('shared_files',)",
        "Data__mixture": "'shared'",
        "Data__inputs_length": 32,
        "Data__targets_length": 16,
        "Data__blocks": blocks,
        "Data__max_corrupt": 1,
        "T5__vocab_size": 384,
        "Eval__tasks": "()",
    }
    own = _OwnFolder(tmp_path, corrupt=True)
    test_processes.run(tmp_path / "two", 2, own=own, **values)
    test_processes.run(tmp_path / "one", 1, own=own, **values)
    test_processes.assert_the_same_losses(tmp_path / "two", tmp_path / "one")
    told = json.loads((tmp_path / "two" / "data.json").read_text())
    assert told == json.loads((tmp_path / "one" / "data.json").read_text())
    assert test_train.lines(tmp_path / "two" / "metrics.jsonl")[-1]["step"] == test_processes.STEPS
    assert "corrupt" in json.dumps(told)

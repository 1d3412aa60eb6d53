"""Of the library's rows each process of a job reads its own share, wherever they come from."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import seqio
import tensorflow_datasets as tfds

from mtl_jax import metrics, processes, row_files
from mtl_jax.data import DataConfig, TrainStream
from mtl_jax.errors import UserError
from mtl_jax.tasks.benchmarks import origins
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Tfds
from mtl_jax.tasks.benchmarks.registering import add_tasks
from mtl_jax.tasks.prompts import Template

FIELDS = {"text": str, "label": int, "kind": str}
ROWS = [{"text": f"row {n}", "label": n % 2, "kind": "abc"[n // 5]} for n in range(11)]
ENDINGS = ("jsonl", "jsonl.gz", "tsv", "tsv.gz", "parquet")
VOCABULARY = seqio.ByteVocabulary(extra_ids=0)


@pytest.fixture(params=[False, True], ids=["alone", "several"])
def several(request, monkeypatch):
    """Whether the process is one of several."""
    monkeypatch.setattr(processes, "several", lambda: request.param)
    return request.param


def origin(**places):
    return Origin("shared_library", FIELDS, {"train": len(ROWS)}, labels=2, **places)


def texts(found):
    rows, own_N = found
    return [rows[i]["text"] for i in own_N]


def write(folder, ending, rows=ROWS, garbage=None):
    """Rows of a file; `garbage` says of which line numbers there is something else."""
    path = folder / "shared_library" / f"train.{ending}"
    path.parent.mkdir(exist_ok=True)
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
        return
    tsv = ending.startswith("tsv")
    lines = ["\t".join(FIELDS)] if tsv else []
    for row in rows:
        line = "\t".join(map(str, row.values())) if tsv else json.dumps(row)
        lines.append("garbage" if garbage and garbage(len(lines) + 1) else line)
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("MTL_JAX_SOURCES", "local")
    return tmp_path


@pytest.mark.parametrize("shares", [1, 2, 3, 11, 20])
@pytest.mark.parametrize("ending", ENDINGS)
def test_shares_of_a_local_file_are_its_lines_by_number(folder, several, ending, shares):
    write(folder, ending)
    of_file, first = origin(), 2 if ending.startswith("tsv") else 1
    for index in range(shares):
        found = of_file.share("train", (index, shares))
        expected = [r["text"] for n, r in enumerate(ROWS, first) if n % shares == index]
        assert texts(found) == expected
        assert len(found[0]) == (len(expected) if several else len(ROWS))
    assert [row["text"] for row in of_file.rows("train")] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "tsv", "tsv.gz"])
def test_the_lines_of_others_are_not_even_parsed(folder, monkeypatch, ending):
    write(folder, ending, garbage=lambda number: number % 3 != 2)
    monkeypatch.setattr(processes, "several", lambda: True)
    of_file, first = origin(), 2 if ending.startswith("tsv") else 1
    expected = [row["text"] for n, row in enumerate(ROWS, first) if n % 3 == 2]
    assert texts(of_file.share("train", (2, 3))) == expected
    for index in (0, 1):
        with pytest.raises(UserError, match=r"not valid JSON|1 columns instead of 3"):
            of_file.share("train", (index, 3))


def test_corrupt_rows_of_shares_add_up_to_those_of_the_whole(folder, several):
    write(folder, "jsonl", garbage=lambda number: number in (2, 4, 7))
    row_files.tolerate("train", 3)
    shares = [(index, 2) for index in range(2)]
    of_file = origin()
    found = [name for share in shares for name in texts(of_file.share("train", share))]
    assert sorted(found) == sorted(ROWS[n - 1]["text"] for n in range(1, 12) if n not in (2, 4, 7))
    counts = [of_file.corrupt("train", [share]) for share in shares]
    assert sum((counts[0] | counts[1]).values()) == 3
    assert [sum(count.values()) for count in counts] == ([2, 1] if several else [3, 3])


class _Touched:
    """As `datasets` gives rows, which are read from disk when they are asked for."""

    def __init__(self):
        self.numbers = set()

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, number):
        self.numbers.add(number)
        return ROWS[number]


@pytest.mark.parametrize("shares", [2, 3])
def test_of_hugging_face_a_process_touches_its_own_rows(monkeypatch, several, shares):
    monkeypatch.setenv("MTL_JAX_SOURCES", "huggingface")
    touched = _Touched()
    monkeypatch.setattr(
        origins, "_read_hub", lambda origin, split: origins.Converted(touched, None)
    )
    of_hub = origin(huggingface=HuggingFace("nowhere"))
    data_set = Dataset("shared", "shared", of_hub, "qa", [], "", only=("kind", "b"))
    for index in range(shares):
        touched.numbers.clear()
        own = list(range(index, len(ROWS), shares))
        assert texts(of_hub.share("train", (index, shares))) == [ROWS[n]["text"] for n in own]
        rows, positions = data_set.share("train", (index, shares))
        kept = [ROWS[n]["text"] for n in own if ROWS[n]["kind"] == "b"]
        assert texts((rows, positions)) == kept
        if several:
            assert touched.numbers <= {*own, 0}  # the first is checked
        else:  # positions are those that a cache keeps and an evaluation has
            assert rows is data_set.rows("train")
            assert len(rows) == 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of TFDS in four files."""

    class SharedLibrary(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            fields = {"text": text, "label": np.int64, "kind": text}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": enumerate(ROWS)}

        def _generate_examples(self):
            raise NotImplementedError

    folder = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=4)
    SharedLibrary(data_dir=folder).download_and_prepare(download_config=config)
    assert len(list(folder.rglob("*.tfrecord-*"))) == 4
    return folder


@pytest.mark.parametrize("shares", [1, 2, 3, 11])
def test_shares_of_tfds_are_parts_of_the_split(prepared, monkeypatch, several, shares):
    monkeypatch.setenv("MTL_JAX_SOURCES", "tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    of_tfds = origin(tfds=Tfds("shared_library:1.0.0"))
    whole = [row["text"] for row in of_tfds.rows("train")]
    assert sorted(whole) == sorted(row["text"] for row in ROWS)
    expected = [part.tolist() for part in np.array_split(whole, shares)]
    for index in range(shares):
        found = of_tfds.share("train", (index, shares))
        assert texts(found) == expected[index]
        assert len(found[0]) == (len(expected[index]) if several else len(whole))


def test_two_readers_draw_what_one_with_both_shares_draws(folder, monkeypatch):
    """And each of them parses its own lines alone."""
    write(folder, "jsonl")
    features = {side: seqio.Feature(VOCABULARY) for side in ("inputs", "targets")}
    prompts = [
        Template("ask", "{{ text }} ||| {{ label }}"),
        Template("b", "{{ kind }} ||| {{ text }}"),
    ]
    config = DataConfig(
        mixture="shared", inputs_length=16, targets_length=8, batch_size=4, num_shards=2, prefetch=0
    )

    def batches(name, reader, readers, several):
        monkeypatch.setattr(processes, "several", lambda: several)
        data_set = Dataset("shared", "shared", origin(), "qa", [metrics.accuracy], "")
        names = add_tasks(data_set, features, templates=prompts)
        seqio.MixtureRegistry.add("shared", names, default_rate=1.0)
        ids = {name: number for number, name in enumerate(sorted(names), 1)}
        with TrainStream(config, ids, reader, readers) as stream:
            found = [next(stream).arrays for _ in range(12)]
        for name in names:
            seqio.TaskRegistry.remove(name)
        seqio.MixtureRegistry.remove("shared")
        return found

    whole = batches("whole", 0, 1, several=False)
    for reader in range(2):
        write(folder, "jsonl", garbage=lambda number, reader=reader: number % 2 != reader)
        for ours, both in zip(batches("part", reader, 2, several=True), whole, strict=True):
            for key, array in ours.items():
                np.testing.assert_array_equal(array, both[key][2 * reader : 2 * reader + 2])

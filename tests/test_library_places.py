"""Where rows come from: local files in every form, TFDS, Hugging Face datasets, and no place."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from mtl_jax.errors import UserError
from mtl_jax.tasks.benchmarks import generation, nli
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Shipped, Tfds, chosen_sources

FIELDS = {"text": str, "label": int, "score": float, "choices": [str], "answers": {"text": [str]}}
ROWS = [
    {
        "text": f"é {number}",
        "label": number % 2,
        "score": number / 2,
        "choices": ["u", "v"],
        "answers": {"text": ["x", "y"][:number]},
    }
    for number in range(3)
]


def origin(**places):
    return Origin("tiny", FIELDS, {"train": 3, "test": 2}, labels=2, **places)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("MTL_JAX_SOURCES", "local")
    (tmp_path / "tiny").mkdir()
    return tmp_path


def as_tsv(rows):
    lines = ["text\tlabel\tscore\tchoices\tanswers.text"]
    for row in rows:
        lists = json.dumps(row["choices"]), json.dumps(row["answers"]["text"])
        lines.append("\t".join([row["text"], str(row["label"]), str(row["score"]), *lists]))
    return "\n".join(lines) + "\n"


def as_json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    text = as_tsv(rows) if ".tsv" in path.name else as_json_lines(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "tsv", "tsv.gz", "parquet"])
def test_every_form_of_local_file_gives_the_same_rows(folder, ending):
    write(folder / "tiny" / f"train.{ending}", ROWS)
    tiny = origin()
    assert tiny.count("train") == 3
    read = [{name: row[name] for name in FIELDS} for row in tiny.rows("train")]
    assert read == ROWS
    assert tiny.rows("train") is tiny.rows("train"), "kept"


def test_counts_and_splits_are_those_of_the_files(folder):
    write(folder / "tiny" / "train.jsonl", ROWS[:1])
    write(folder / "tiny" / "validation.jsonl", ROWS[:2])
    tiny = origin()
    assert tiny.split_names() == ("train", "test", "validation")
    assert [tiny.count(split) for split in tiny.split_names()] == [1, 2, 2]


def test_the_second_place_has_fields_of_its_own(folder):
    (folder / "shipped").mkdir()
    rows = [{"text": row["text"].upper(), "label": row["label"]} for row in ROWS]
    write(folder / "shipped" / "test.jsonl", rows)
    tiny = Origin(
        "tiny",
        {"text": str, "label": int},
        {"test": 3},
        shipped=Shipped("shipped/{split}", lambda row: row | {"text": row["text"].lower()}),
    )
    assert [row["text"] for row in tiny.rows("test")] == [row["text"] for row in ROWS]
    write(folder / "shipped" / "test.jsonl", [{"txt": "x", "label": 0}])
    fresh = Origin("tiny", {"text": str}, {"test": 1}, shipped=tiny.shipped)
    with pytest.raises(UserError, match=r"jsonl, line 1: cannot be brought.*KeyError: 'text'"):
        fresh.rows("test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, r"line 2: label is 2, which is not between 0 and 1"),
        ({"label": -1}, r"line 2: label is -1"),
        ({"label": True}, r"line 2: field 'label' should be whole number, but is True"),
        ({"text": None}, r"line 2: field 'text' should be text, but is None"),
        ({"choices": "u"}, r"line 2: field 'choices' should be list of text, but is 'u'"),
        ({"answers": {}}, r"field 'answers' should be mapping of text \(list of text\)"),
    ],
)
def test_rows_that_do_not_fit_are_named(folder, change, message):
    write(folder / "tiny" / "train.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(UserError, match=message):
        origin().rows("train")


def test_a_missing_field_and_a_bad_number_are_named(folder):
    rows = [{("txt" if name == "text" else name): value for name, value in ROWS[0].items()}]
    write(folder / "tiny" / "train.jsonl", rows)
    with pytest.raises(UserError, match=r"line 1: there is no field 'text'.*Did you mean 'txt'"):
        origin().rows("train")
    text = as_tsv(ROWS).replace("\t1\t0.5", "\tone\t0.5")
    (folder / "tiny" / "test.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"line 3: field 'label' should be whole number.*'one'"):
        origin().rows("test")
    (folder / "tiny" / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl has no rows"):
        origin().rows("train")


def test_no_place_is_one_message_that_says_what_to_supply(folder, monkeypatch):
    monkeypatch.setenv("MTL_JAX_SOURCES", "local, tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
    with pytest.raises(UserError) as caught:
        origin(tfds=Tfds("no_such_benchmark:1.0.0")).rows("train")
    message = str(caught.value)
    for part in (
        "Data set 'tiny': its split 'train' cannot be had",
        f"local files: there is no tiny/train.* in {folder}",
        "tfds (no_such_benchmark:1.0.0): DatasetNotFoundError",
        "put the file tiny/train.jsonl (or another of .jsonl, .jsonl.gz, .tsv,",
        "MTL_JAX_DATA or Data.data_dir",
        "text (text), label (whole number, 0 to 1), score (number), choices (list of text), "
        "answers (mapping of text (list of text)).",
    ):
        assert part in message
    assert "\n" not in message
    monkeypatch.delenv("MTL_JAX_DATA")
    with pytest.raises(UserError, match=r"local files: These tasks read a data folder and none is"):
        origin().rows("train")
    # Later, when the file is there, it is read.
    monkeypatch.setenv("MTL_JAX_DATA", str(folder))
    write(folder / "tiny" / "train.jsonl", ROWS)
    assert len(origin().rows("train")) == 3


def test_the_variable_of_sources_is_checked(monkeypatch):
    monkeypatch.setenv("MTL_JAX_SOURCES", "huggingface,local")
    assert chosen_sources() == ("huggingface", "local")
    monkeypatch.setenv("MTL_JAX_SOURCES", "huggingfase")
    with pytest.raises(UserError, match=r"names 'huggingfase'.*Did you mean 'huggingface'"):
        chosen_sources()


def test_tfds_rows_are_python_values_with_our_fields(tmp_path, monkeypatch):
    class TinyBenchmark(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            answers = tfds.features.Sequence({"text": text, "answer_start": np.int32})
            fields = {
                "sentence": text,
                "label": tfds.features.ClassLabel(names=["a", "b"]),
                "score": np.float32,
                "choices": tfds.features.Sequence(text),
                "answers": answers,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train_xl": self._generate_examples()}

        def _generate_examples(self):
            for number, row in enumerate(ROWS):
                texts = row["answers"]["text"]
                answers = {"text": texts, "answer_start": list(range(len(texts)))}
                sentence = {"sentence": row["text"], "answers": answers}
                yield number, {k: row[k] for k in ("label", "score", "choices")} | sentence

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("MTL_JAX_SOURCES", "tfds")
    tiny = origin(
        tfds=Tfds(
            "tiny_benchmark:1.0.0",
            {"train": "train_xl"},
            lambda row: row | {"text": row["sentence"]},
        )
    )
    rows = [{name: row[name] for name in FIELDS} for row in tiny.rows("train")]
    for number, row in enumerate(sorted(rows, key=lambda row: row["text"])):
        assert row["answers"].pop("answer_start") == list(range(min(number, 2)))
    assert sorted(rows, key=lambda row: row["text"]) == ROWS  # TFDS shuffles when it prepares


@pytest.mark.torch
def test_hugging_face_rows_are_read_lazily(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("MTL_JAX_SOURCES", "huggingface")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hub = tmp_path / "hub"
    hub.mkdir()
    write(hub / "train.parquet", [row | {"number": 1} for row in ROWS])
    place = HuggingFace(str(hub), None, {"test": "train"}, lambda row: row | {"label": 1})
    tiny = origin(huggingface=place)
    assert [row["label"] for row in tiny.rows("test")] == [1, 1, 1]
    assert [{name: row[name] for name in FIELDS} for row in tiny.rows("test")] == [
        row | {"label": 1} for row in ROWS
    ]
    missing = origin(huggingface=HuggingFace(str(tmp_path / "nothing")))
    with pytest.raises(UserError, match=r"Tried: huggingface \(.*nothing\): \w+Error"):
        missing.rows("train")


def test_rows_of_tfds_are_brought_to_the_fields_of_hugging_face():
    swahili = next(d for d in nli.MULTILINGUAL if d.language == "sw").origin
    row = {
        "premise": {"en": "a", "sw": "b"},
        "hypothesis": {"language": ["en", "sw"], "translation": ["c", "d"]},
        "label": 2,
    }
    assert swahili.tfds.convert(row) | {} == {"premise": "b", "hypothesis": "d", "label": 2}
    directions = [d for d in generation.DATASETS if d.name.startswith("wmt16")]
    (romanian,) = {d.origin for d in directions}
    converted = romanian.tfds.convert({"ro": "salut", "en": "hello"})
    assert converted == {"translation": {"ro": "salut", "en": "hello"}}
    prompts = [d.templates()[0].render(d.made([converted])[0]) for d in directions]
    assert [(one.inputs, one.targets) for one in prompts] == [
        ("Translate from Romanian to English: salut", "hello"),
        ("Translate from English to Romanian: hello", "salut"),
    ]

"""JSONL and TSV sources: rows, shards, shuffling, and what is said about bad files."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import seqio

from mtl_jax import row_files
from mtl_jax.errors import UserError
from mtl_jax.row_files import count_rows, read_rows
from mtl_jax.sources import (
    JsonlDataSource,
    ParquetDataSource,
    TsvDataSource,
)


def write(path, text):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.fixture
def letters(tmp_path):
    rows = [{"inputs": letter, "number": i} for i, letter in enumerate("abcdefghij")]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    return JsonlDataSource({"train": write(tmp_path / "a.jsonl.gz", text)})


def read(source, **arguments):
    dataset = source.get_dataset("train", **arguments)
    return [example["inputs"].decode() for example in dataset.as_numpy_iterator()]


def test_rows_and_types(letters):
    assert letters.num_input_examples("train") == 10
    assert read(letters, shuffle=False) == list("abcdefghij")
    example = next(letters.get_dataset("train", shuffle=False).as_numpy_iterator())
    assert example["number"].dtype.name == "int64"


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_are_every_nth_line_and_shuffling_keeps_them(letters, shards):
    for index in range(shards):
        arguments = {"shard_info": seqio.ShardInfo(index, shards)}
        plain = read(letters, shuffle=False, **arguments)
        assert plain == list("abcdefghij")[index::shards]
        shuffled = read(letters, shuffle=True, seed=3, **arguments)
        assert sorted(shuffled) == plain
        assert shuffled == read(letters, shuffle=True, seed=3, **arguments)


def test_seed_decides_the_order(letters):
    assert read(letters, shuffle=True, seed=1) != read(letters, shuffle=True, seed=2)


def test_python_examples_are_those_of_tensorflow(letters):
    arguments = {"shuffle": True, "seed": 5, "shard_info": seqio.ShardInfo(1, 2)}
    python = [row["inputs"] for row in letters.examples("train", **arguments)]
    assert python == read(letters, **arguments)
    continued = letters.examples("train", **arguments, start=3)
    assert [row["inputs"] for row in continued] == python[3:]


def test_example_function_makes_and_drops_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"q": 1}\n{"q": 2}\n{"q": 3}\n')
    source = JsonlDataSource(
        {"train": path}, lambda row: {"inputs": f"is {row['q']}"} if row["q"] != 2 else None
    )
    assert read(source, shuffle=False) == ["is 1", "is 3"]
    assert source.num_input_examples("train") == 2


def test_lists_and_mixed_numbers(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"words": ["x", "y"], "score": 1}\n{"words": [], "score": 0.5}\n'
    )
    examples = list(JsonlDataSource({"train": path}).get_dataset(shuffle=False).as_numpy_iterator())
    assert [example["words"].tolist() for example in examples] == [[b"x", b"y"], []]
    assert [float(example["score"]) for example in examples] == [1.0, 0.5]


def test_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", "inputs\tlabel\nhello\t1\nyou \t2\n")
    assert TsvDataSource({"train": path}).rows("train") == [
        {"inputs": "hello", "label": "1"},
        {"inputs": "you ", "label": "2"},
    ]
    named = TsvDataSource({"train": path}, columns=["x", "y"])
    assert named.rows("train")[0] == {"x": "inputs", "y": "label"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"bad\.jsonl, line 2: not valid JSON"),
        ('{"a": 1}\n[1]\n', r"bad\.jsonl, line 2: a JSON object is needed"),
        ('{"a": 1}\n\n{"b": 1}\n', r"bad\.jsonl, line 3: the fields differ.*a, b"),
        ('{"a": 1}\n{"a": "x"}\n', r"line 2: field 'a' is str, but int in the first row"),
        ('{"a": {"b": 1}}\n', r"line 1: field 'a' holds"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, text, message):
    source = JsonlDataSource({"train": write(tmp_path / "bad.jsonl", text)})
    with pytest.raises(UserError, match=message):
        source.num_input_examples("train")


def test_other_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"bad\.tsv, line 3: 1 columns instead of 2 \(a, b\)"):
        TsvDataSource({"train": write(tmp_path / "bad.tsv", "a\tb\n1\t2\n3\n")}).rows("train")
    with pytest.raises(UserError, match=r"bda\.tsv: No such file.*'bad\.tsv'"):
        TsvDataSource({"train": tmp_path / "bda.tsv"}).rows("train")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-12])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz cannot be read"):
        JsonlDataSource({"train": tmp_path / "cut.jsonl.gz"}).rows("train")
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 1: not UTF-8"):
        JsonlDataSource({"train": tmp_path / "latin.jsonl"}).rows("train")


def test_a_failing_example_function_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"label": "1"}\n{"label": "one"}\n')
    source = JsonlDataSource({"train": path}, lambda row: {"inputs": int(row["label"])})
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 2: .*ValueError: invalid literal"
    ) as caught:
        source.rows("train")
    assert isinstance(caught.value.__cause__, ValueError)

    def refuse(row):
        raise UserError("no such label")

    with pytest.raises(UserError, match=r"a\.jsonl, line 1: no such label$"):
        JsonlDataSource({"train": path}, refuse).rows("train")


def test_missing_field_and_split(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "x"}\n')
    source = JsonlDataSource({"train": path}, lambda row: {"inputs": row["questoin"]})
    with pytest.raises(UserError, match=r"line 1: there is no field 'questoin'.*'question'"):
        source.rows("train")
    with pytest.raises(UserError, match=r"no split 'trian'.*Did you mean 'train'"):
        source.rows("trian")


ROWS = [
    {"text": "one\ttab", "label": 0, "choices": ["a", "b"], "answers": {"text": ["é"]}},
    {"text": " two ", "label": 1, "choices": [], "answers": {"text": []}},
]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [row for _, row in read_rows(path)] == ROWS
    assert count_rows(path) == 2
    source = ParquetDataSource(
        {"train": path}, lambda row: {"inputs": row["text"], "first": row["answers"]["text"]}
    )
    assert read(source, shuffle=False) == ["one\ttab", " two "]
    with pytest.raises(UserError, match=r"a\.parquet, row 1: field 'answers' holds"):
        ParquetDataSource({"train": path}).rows("train")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: "):
        ParquetDataSource({"train": path}).rows("train")
    # Called text, but it is not UTF-8.
    raw = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).buffers()
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, raw)
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: row group 0: 'utf-8'"):
        read_rows(path)


def test_files_are_read_and_counted_by_their_ending(tmp_path):
    lines = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write(tmp_path / name, lines)
        assert read_rows(path) == [("line 1", ROWS[0]), ("line 2", ROWS[1])]
        assert count_rows(path) == 2
    for name in ("a.tsv", "a.tsv.gz"):
        path = write(tmp_path / name, "x\ty\n1\t\n \t \n\n")
        expected = [("line 2", {"x": "1", "y": ""}), ("line 3", {"x": " ", "y": " "})]
        assert read_rows(path) == expected
        assert count_rows(path) == 2
    read_rows(tmp_path / "a.jsonl")[0][1]["text"] = "changed"
    assert read_rows(tmp_path / "a.jsonl")[0][1] == ROWS[0]
    with pytest.raises(UserError, match=r"a\.csv: its name must end with \.jsonl, .*\.parquet"):
        read_rows(write(tmp_path / "a.csv", "x"))


# Each line is corrupt in another way; what a stranger may write must not end in a traceback.
CORRUPT = (
    b'{"a": "half',
    b'["a"]',
    b'{"a": "\xe9"}',
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a": ' + b"1" * 5_000 + b"}",
    b'{"a": "\\ud800"}',
    b'{"b": "another field"}',
    b'{"a": 1}',
)


def test_corrupt_rows_are_named_and_left_out_up_to_a_bound(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    good = [b'{"a": "one"}', b'{"a": "two"}']
    path.write_bytes(b"\n".join([good[0], *CORRUPT, good[1]]) + b"\n")
    source = JsonlDataSource({"train": path, "validation": path})
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not valid JSON"):
        source.rows("train")
    row_files.tolerate("train", len(CORRUPT) - 1)
    with pytest.raises(UserError, match=r"line 9: .* 7 rows before it .* Data\.max_corrupt"):
        source.rows("train")
    caplog.clear()
    row_files.tolerate("train", len(CORRUPT))
    assert list(source.rows("train")) == [{"a": "one"}, {"a": "two"}]
    assert source.corrupt("train", [seqio.ShardInfo(0, 1)]) == {str(path): len(CORRUPT)}
    for number in range(2, 2 + len(CORRUPT)):
        assert f"a.jsonl, line {number}: " in caplog.text
    with pytest.raises(UserError, match="line 2"):  # what is evaluated is never shortened
        source.rows("validation")


@pytest.mark.parametrize("line", CORRUPT, ids=range(len(CORRUPT)))
def test_each_corrupt_row_is_one_message(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "one"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        JsonlDataSource({"train": path}).rows("train")


def test_corrupt_rows_of_a_function_and_of_a_table(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("n\n1\nx\n3\n4\t4\n")
    source = TsvDataSource({"train": path}, example=lambda row: {"n": int(row["n"])})
    with pytest.raises(UserError, match=r"line 3: the function `example` fails"):
        source.rows("train")
    row_files.tolerate("train", 2)
    assert [row["n"] for row in source.rows("train")] == [1, 3]
    assert source.corrupt("train", [seqio.ShardInfo(0, 1)]) == {str(path): 2}

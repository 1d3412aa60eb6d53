"""Tokenizers without TensorFlow: SeqIO and Hugging Face as witnesses."""

import json
import shutil

import pytest

from mtl_jax import tokenizer
from mtl_jax.errors import UserError

TEXTS = [
    "Hello world, translate English to German: That is good.",
    "a <extra_id_0> b <extra_id_1>",
    "  two  spaces\nnew line ",
    "héllo 日本 <extra_id_99>",
    "x<extra_id_1>y",
    "<extra_id_100> is no sentinel",
    "",
]


def embedded_vocabulary():
    from mtl_jax.tasks.embedded import VOCABULARY_FILE

    return VOCABULARY_FILE


@pytest.fixture(scope="session")
def t5(data_folder):
    return tokenizer.SentencePieceTokenizer(data_folder / "vocab/spiece.model")


@pytest.mark.data
def test_the_published_example(t5):
    expected = [8774, 296, 6, 13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]
    assert t5.encode(TEXTS[0]) == expected
    assert t5.decode([*expected, 8774, 0]) == TEXTS[0]
    assert (t5.vocab_size, t5.eos_id) == (32_100, 1)


@pytest.mark.data
def test_it_is_seqios_vocabulary(t5, data_folder):
    import seqio

    theirs = seqio.SentencePieceVocabulary(str(data_folder / "vocab/spiece.model"), extra_ids=100)
    assert t5.vocab_size == theirs.vocab_size
    for text in (text for text in TEXTS if "<extra" not in text):
        assert t5.encode(text, add_eos=False) == theirs.encode(text)
    assert t5.decode([2, 32_127, 5]) == theirs.decode([2, 32_127, 5])
    # SeqIO puts a space before a sentinel, Hugging Face none.
    tokens = [8774, 32_099, 296, 3, 32_000]
    assert t5.decode(tokens) == "Hello<extra_id_0> world <extra_id_99>"
    assert t5.decode(tokens).replace(" ", "") == theirs.decode(tokens).replace(" ", "")


@pytest.mark.data
@pytest.mark.torch
def test_it_is_hugging_faces_tokenizer_from_either_file(t5, data_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copy(data_folder / "vocab/spiece.model", tmp_path)
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    from_json = tokenizer.load(tmp_path / "saved")
    assert isinstance(from_json, tokenizer.JsonTokenizer)
    assert from_json.pieces == t5.pieces
    assert (from_json.vocab_size, from_json.eos_id) == (t5.vocab_size, t5.eos_id)
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert t5.encode(text) == expected
        assert from_json.encode(text) == expected
        assert from_json.decode(expected).split() == t5.decode(expected).split()


@pytest.mark.torch
def test_bytes_are_hugging_faces():
    transformers = pytest.importorskip("transformers")
    ours, theirs = tokenizer.ByteTokenizer(), transformers.ByT5Tokenizer()
    for text in [*TEXTS, "<extra_id_124><extra_id_125>"]:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.data
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["T5Tokenizer", "ByT5Tokenizer"])
def test_hugging_face_reads_what_a_run_directory_keeps(kind, data_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    extra_ids = 100 if kind == "T5Tokenizer" else 125
    if kind == "T5Tokenizer":
        shutil.copy(data_folder / "vocab/spiece.model", tmp_path)
    (tmp_path / tokenizer.CONFIG).write_text(tokenizer.config_text(kind, extra_ids))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer.load(tmp_path)
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text)


def test_bytes_round_trip_and_stop_at_the_end():
    bytewise = tokenizer.ByteTokenizer(extra_ids=2)
    assert bytewise.vocab_size == 261
    tokens = bytewise.encode("é<extra_id_1>!")
    assert tokens == [3 + 0xC3, 3 + 0xA9, 260, 3 + ord("!"), 1]
    assert bytewise.decode([*tokens, 50]) == "é<extra_id_1>!"
    assert bytewise.decode([3 + 0xC3]) == ""  # half a character
    assert bytewise.pieces[3 + 0xC3] == "\xc3"
    assert bytewise.pieces[:3] == ["", "", ""]


def test_embedded_vocabulary_and_its_pieces():
    words = tokenizer.SentencePieceTokenizer(embedded_vocabulary(), extra_ids=0)
    text = "question : what is it ?"
    tokens = words.encode(text)
    assert tokens[-1] == words.eos_id
    assert words.decode(tokens) == text
    joined = "".join(words.pieces[token] for token in tokens)
    assert joined.encode("latin-1").decode() == f" {text}"


def test_a_run_directorys_files_make_the_vocabulary_again(tmp_path):
    import seqio

    from mtl_jax import vocabulary

    for theirs in (
        seqio.SentencePieceVocabulary(str(embedded_vocabulary()), extra_ids=3),
        seqio.ByteVocabulary(extra_ids=4),
    ):
        folder = tmp_path / type(theirs).__name__
        folder.mkdir()
        for name, content in vocabulary.files(theirs).items():
            (folder / name).write_bytes(content)
        ours = tokenizer.load(folder)
        assert ours.vocab_size == theirs.vocab_size
        assert ours.encode("what is it", add_eos=False) == theirs.encode("what is it")
        again = vocabulary.of_checkpoint(folder)
        assert type(again) is type(theirs)
        assert (again.vocab_size, again.encode("it")) == (theirs.vocab_size, theirs.encode("it"))
    with pytest.raises(UserError, match="no tokenizer file for a vocabulary like"):
        vocabulary.files(seqio.PassThroughVocabulary(10))


def test_a_tokenizer_json_is_a_vocabulary_for_tasks(tmp_path):
    import seqio
    import tensorflow as tf
    import tokenizers

    from mtl_jax import vocabulary

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(folder / "tokenizer.json"))
    found = vocabulary.of_checkpoint(tmp_path)
    assert (found.vocab_size, found.eos_id, found.unk_id, found.pad_id) == (5, 1, 2, 0)
    assert found.encode("b a c") == [4, 3, 2]
    assert found.decode([4, 3, 1, 3]) == "b a"
    assert found == vocabulary.TokenizerVocabulary(folder)
    assert list(vocabulary.files(found)) == ["tokenizer.json"]
    assert found.encode_tf(tf.constant("b a")).numpy().tolist() == [4, 3]
    assert found.decode_tf(tf.constant([3, 4])).numpy() == b"a b"
    feature = seqio.Feature(found, add_eos=True)
    rows = tf.data.Dataset.from_tensors({"inputs": "a b", "targets": "b"})
    (row,) = seqio.preprocessors.tokenize(rows, {"inputs": feature, "targets": feature})
    assert row["inputs"].numpy().tolist() == [3, 4]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no tokenizer \(spiece\.model, tokenizer\.json or a ByT5's"),
        ({"spiece.model": "nonsense"}, r"spiece\.model is no .*SentencePiece model"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json cannot be read as a tokenizer"),
        ({tokenizer.CONFIG: "{"}, rf"{tokenizer.CONFIG} cannot be read as JSON"),
        ({tokenizer.CONFIG: "[]"}, "is not a JSON object"),
        ({tokenizer.CONFIG: '{"extra_ids": "x"}'}, "extra_ids must be a number, got 'x'"),
    ],
)
def test_damaged_folders_are_named(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="has no token </s>"):
        tokenizer.load(tmp_path)


def test_the_configuration_is_json():
    values = json.loads(tokenizer.config_text("ByT5Tokenizer", 2))
    assert values["additional_special_tokens"] == ["<extra_id_0>", "<extra_id_1>"]

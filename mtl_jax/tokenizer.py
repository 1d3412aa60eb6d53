"""Texts to tokens and back without TensorFlow, from the files that a checkpoint carries along.

The numbers are SeqIO's and Hugging Face's: 0 padding, 1 end of sequence, 2 unknown; the sentinels
`<extra_id_0>`, `<extra_id_1>`, ... stand at the end, for SentencePiece counted down from the last.
"""

import abc
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError

FOLDER = "tokenizer"  # in a run directory and in a converted checkpoint
CONFIG = "tokenizer_config.json"
MODEL = "spiece.model"
_SENTENCE_PIECE = (MODEL, "sentencepiece.model", "sentencepiece.bpe.model")
_JSON = "tokenizer.json"
_JSON_FILES = (_JSON, CONFIG, "special_tokens_map.json", "added_tokens.json")
_UNKNOWN = " \u2047 "  # SentencePiece's text for it
_SPACE = "\u2581"  # SentencePiece's mark of a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SENTINEL = re.compile(r"(<extra_id_\d+>)")


class Tokenizer(abc.ABC):
    """A vocabulary.

    Attributes:
      eos_id: the end of sequence.
      vocab_size: ids in all, sentinels included; a model's embedding may have more rows.
      strips_first_space: the space in front of the first piece is not part of a decoded text.
    """

    eos_id: int = 1
    vocab_size: int
    strips_first_space: bool = True

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The tokens of a text, without the end of sequence."""

    @abc.abstractmethod
    def _decode(self, tokens: list[int]) -> str:
        """The text of tokens that are all in the vocabulary, padding and end left out."""

    @abc.abstractmethod
    def _piece(self, token: int) -> bytes:
        """What a token adds to the text, in UTF-8; nothing for padding, end and unknown."""

    def encode(self, text: str, *, add_eos: bool = True) -> list[int]:
        """The tokens of a text, by default with the end of sequence behind them."""
        return self._encode(text) + [self.eos_id] * add_eos

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to the first end of sequence.

        Padding is left out, sentinels are written out as `<extra_id_0>`, and ids beyond the
        vocabulary, for which a model's embedding may have rows, read as unknown.
        """
        kept = [int(token) for token in tokens]
        kept = kept[: kept.index(self.eos_id)] if self.eos_id in kept else kept
        kept = [token if token < self.vocab_size else 2 for token in kept if token != 0]
        return self._decode(kept)

    @functools.cached_property
    def pieces(self) -> list[str]:
        """For each id its bytes in UTF-8, one character each (latin-1), as `stop_strings` wants."""
        return [self._piece(token).decode("latin-1") for token in range(self.vocab_size)]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with sentinels behind its own pieces, as SeqIO's and T5's."""

    def __init__(self, path: str | Path, extra_ids: int = 100):
        """Reads `path`.

        Raises:
          UserError: the file cannot be read, or is no SentencePiece model with T5's special ids.
        """
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        protocol: Any = sentencepiece_model_pb2  # generated, without types
        model = protocol.ModelProto()
        try:
            model.ParseFromString(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"Could not read the vocabulary {path}: {error.strerror}.") from error
        except Exception as error:  # protobuf's DecodeError; its module is no public name
            raise UserError(f"{path} is no SentencePiece model, or is cut off.") from error
        for number in reversed(range(extra_ids)):
            model.pieces.add(
                piece=f"<extra_id_{number}>",
                score=0.0,
                type=protocol.ModelProto.SentencePiece.USER_DEFINED,
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
        except RuntimeError as error:
            raise UserError(f"{path} is no usable SentencePiece model: {error}.") from error
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        self.path, self.extra_ids = Path(path), extra_ids
        self._sentinels = {
            self._model.id_to_piece(token): token
            for token in range(self.vocab_size)
            if _SENTINEL.fullmatch(self._model.id_to_piece(token))
        }
        if self._model.pad_id() != 0 or self.eos_id < 1:
            raise UserError(
                f"{path}: a T5 needs padding with id 0 and an end of sequence, this vocabulary has "
                f"padding {self._model.pad_id()} and end {self.eos_id}."
            )

    def _encode(self, text: str) -> list[int]:
        # Between sentinels each part is a text of its own, as Hugging Face reads it: SentencePiece
        # alone would put a space token before a sentinel, which span corruption never does.
        tokens: list[int] = []
        for part in _SENTINEL.split(text):
            token = self._sentinels.get(part)
            tokens += self._model.encode(part) if token is None else [token]
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)

    def _piece(self, token: int) -> bytes:
        if self._model.is_control(token) or self._model.is_unknown(token):
            return b""
        return _text_of_piece(self._model.id_to_piece(token))


class JsonTokenizer(Tokenizer):
    """Hugging Face's `tokenizer.json`, read by its own library (extra `hf`)."""

    def __init__(self, path: str | Path):
        """Reads `path`.

        Raises:
          UserError: the library is missing, or the file is damaged or has no end of sequence.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"Reading {path} needs the package tokenizers: pip install 'mtl_jax[hf]', or put "
                f"the vocabulary's spiece.model into {Path(path).parent}."
            ) from error
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # what the library raises has no class of its own
            raise UserError(f"{path} cannot be read as a tokenizer: {error}.") from error
        self.vocab_size = self._model.get_vocab_size()
        eos_id = self._model.token_to_id("</s>")
        if eos_id is None:
            raise UserError(f"{path} has no token </s>, the end of sequence of a T5.")
        self.eos_id = eos_id

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, tokens: list[int]) -> str:
        # Sentinels are special tokens, too, and are to be seen.
        return self._model.decode(tokens, skip_special_tokens=False).replace("<unk>", _UNKNOWN)

    def _piece(self, token: int) -> bytes:
        piece = self._model.id_to_token(token)
        return b"" if piece in (None, "<pad>", "</s>", "<unk>") else _text_of_piece(piece)


class ByteTokenizer(Tokenizer):
    """ByT5's: the bytes of UTF-8 from id 3 on, then sentinels (Xue et al. 2022, section 3.1)."""

    strips_first_space = False
    _FIRST = 3

    def __init__(self, extra_ids: int = 125):
        """Makes a vocabulary of 3 + 256 + `extra_ids` tokens."""
        self.vocab_size = self._FIRST + 256 + extra_ids
        self.extra_ids = extra_ids
        self._sentinels = {
            f"<extra_id_{number}>": self._FIRST + 256 + number for number in range(extra_ids)
        }

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part in _SENTINEL.split(text):
            token = self._sentinels.get(part)
            plain = [self._FIRST + byte for byte in part.encode("utf-8")]
            tokens += plain if token is None else [token]
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        return b"".join(map(self._piece, tokens)).decode("utf-8", errors="ignore")

    def _piece(self, token: int) -> bytes:
        value = token - self._FIRST
        if value < 0:
            return b""
        return bytes([value]) if value < 256 else f"<extra_id_{value - 256}>".encode()


def _text_of_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode("utf-8")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer whose files are in a folder.

    A SentencePiece model comes first, since T5's tasks were tokenised with it; then Hugging Face's
    `tokenizer.json`; a ByT5 has no file but its configuration.

    Args:
      folder: a Hugging Face directory, or the folder `tokenizer` of a run or converted checkpoint.

    Raises:
      UserError: there is none, or its files are damaged.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    kind = str(config.get("tokenizer_class", ""))
    extra_ids = config.get("extra_ids")
    if extra_ids is not None and (not isinstance(extra_ids, int) or extra_ids < 0):
        raise UserError(f"{folder / CONFIG}: extra_ids must be a number, got {extra_ids!r}.")
    if kind.startswith("ByT5"):
        return ByteTokenizer(125 if extra_ids is None else extra_ids)
    for name in _SENTENCE_PIECE:
        if (folder / name).is_file():
            return SentencePieceTokenizer(folder / name, 100 if extra_ids is None else extra_ids)
    if (folder / _JSON).is_file():
        return JsonTokenizer(folder / _JSON)
    raise UserError(
        f"{folder} holds no tokenizer ({', '.join(_SENTENCE_PIECE[:1])}, {_JSON} or a ByT5's "
        f"{CONFIG}): copy the model's vocabulary there."
    )


def files(folder: Path) -> list[Path]:
    """The files in a folder that tokenizers consist of."""
    return [folder / name for name in (*_SENTENCE_PIECE, *_JSON_FILES) if (folder / name).is_file()]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object.")
    return config


def config_text(tokenizer_class: str, extra_ids: int) -> str:
    """A `tokenizer_config.json` that `load` and Hugging Face's AutoTokenizer understand."""
    values = {
        "tokenizer_class": tokenizer_class,
        "extra_ids": extra_ids,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(extra_ids)],
    }
    return json.dumps(values, indent=2) + "\n"

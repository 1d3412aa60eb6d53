"""SeqIO vocabularies from the files that a checkpoint carries along, and back."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from mtl_jax import tokenizer
from mtl_jax.errors import UserError


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer as SeqIO wants it, for those that SeqIO has no class for (tokenizer.json)."""

    def __init__(self, folder: str | Path):
        """Reads the tokenizer in `folder`; raises UserError if there is none."""
        self.folder = Path(folder)
        self._tokenizer = tokenizer.load(folder)
        super().__init__(extra_ids=0)

    @property
    def eos_id(self) -> int:
        """End of sequence."""
        return self._tokenizer.eos_id

    @property
    def unk_id(self) -> int:
        """Unknown."""
        return 2

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_eos=False)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def _encode_tf(self, text: tf.Tensor) -> tf.Tensor:
        def encode(value: Any) -> Any:
            return tf.constant(self._encode(value.numpy().decode("utf-8")), tf.int32)

        tokens = tf.py_function(encode, [text], tf.int32)
        tokens.set_shape([None])
        return tokens

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda value: self._decode(value.numpy().tolist()), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.folder.samefile(other.folder)

    def __hash__(self) -> int:
        return hash(str(self.folder.resolve()))


def of_checkpoint(path: str | Path) -> seqio.Vocabulary:
    """The vocabulary of a checkpoint, for tasks that fine-tune it.

    Args:
      path: a run directory or converted checkpoint, or a folder with the tokenizer's own files,
        such as a Hugging Face directory.

    Raises:
      UserError: there are no such files, or they are damaged.
    """
    inner = Path(path).expanduser() / tokenizer.FOLDER
    folder = inner if inner.is_dir() else inner.parent
    words = tokenizer.load(folder)
    if isinstance(words, tokenizer.SentencePieceTokenizer):
        return seqio.SentencePieceVocabulary(str(words.path), extra_ids=words.extra_ids)
    if isinstance(words, tokenizer.ByteTokenizer):
        return seqio.ByteVocabulary(extra_ids=words.extra_ids)
    return TokenizerVocabulary(folder)


def files(vocabulary: seqio.Vocabulary) -> dict[str, bytes]:
    """The files, by name, from which `tokenizer.load` makes a vocabulary again.

    Raises:
      UserError: a kind of vocabulary that `tokenizer.load` does not know, or its file is gone.
    """
    if isinstance(vocabulary, TokenizerVocabulary):
        return {path.name: path.read_bytes() for path in tokenizer.files(vocabulary.folder)}
    if isinstance(vocabulary, seqio.ByteVocabulary):
        config = tokenizer.config_text("ByT5Tokenizer", vocabulary.extra_ids)
        return {tokenizer.CONFIG: config.encode()}
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        raise UserError(f"There is no tokenizer file for a vocabulary like {vocabulary}.")
    config = tokenizer.config_text("T5Tokenizer", vocabulary.extra_ids)
    with tf.io.gfile.GFile(vocabulary.sentencepiece_model_file, "rb") as file:  # as SeqIO does
        return {"spiece.model": file.read(), tokenizer.CONFIG: config.encode()}

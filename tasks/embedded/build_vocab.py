"""Builds `vocab.model`, the SentencePiece vocabulary of the embedded suite.

    python -m mtl_jax.tasks.embedded.build_vocab [FILE]

The text of the suite is a closed list of words, found by rendering rows of all families under all
prompts. So there is nothing to estimate: the unigram model is written down with every word as one
piece and every printable ASCII character as another, for text from elsewhere. The same grammars
give the same file, byte for byte, with any version of SentencePiece.
"""

import math
import re
import string
import sys
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mtl_jax.tasks.embedded import VOCABULARY_FILE
from mtl_jax.tasks.embedded.families import FAMILIES
from mtl_jax.tasks.embedded.suite import make_rows

_SPACE = "\u2581"  # SentencePiece's mark of a space before a piece
_protocol: Any = sentencepiece_model_pb2  # its classes are made at run time: unknown to checkers
_Piece = _protocol.ModelProto.SentencePiece
_ROWS = 1000  # of each family: enough to meet every word of its grammar
_FEW_ROWS = 30


def suite_words() -> list[str]:
    """All words and punctuation marks of the rendered suite, sorted."""
    words: set[str] = set()
    for family in FAMILIES:
        rows = make_rows(family, "train", _ROWS)
        for number, template in enumerate(family.templates):
            # Prompts differ in their wording only: one needs all rows, the others a few.
            for row in rows if number == 0 else rows[:_FEW_ROWS]:
                rendered = template.render(row)
                if rendered is not None:
                    for text in (rendered.inputs, rendered.targets, *rendered.choices):
                        words.update(re.findall(r"\w+|[^\w\s]", text))
    return sorted(words)


def build() -> bytes:
    """Returns the serialised model: pad 0, EOS 1, unknown 2, then words, then characters."""
    words = suite_words()
    characters = [_SPACE, "\n", *sorted(set(string.printable.strip()))]
    log_count = math.log(len(words))
    pieces = [("<pad>", 0.0, _Piece.CONTROL), ("</s>", 0.0, _Piece.CONTROL)]
    pieces += [("<unk>", 0.0, _Piece.UNKNOWN)]
    pieces += [(_SPACE + word, -log_count, _Piece.NORMAL) for word in words]
    # A word always beats its spelling: every character costs more than a whole word.
    pieces += [(character, -2 * log_count, _Piece.NORMAL) for character in characters]
    model = _protocol.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def main(arguments: list[str]) -> None:
    """Writes the model to the given file, or to its place in the package."""
    path = arguments[0] if arguments else VOCABULARY_FILE
    with open(path, "wb") as file:
        file.write(build())
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])

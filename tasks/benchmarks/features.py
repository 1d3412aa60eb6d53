"""The vocabulary of the library's tasks: T5's, mT5's, bytes, or a SentencePiece file.

The environment variable MTL_JAX_VOCABULARY chooses; all tasks of one run must share a vocabulary.

    t5      vocab/spiece.model of the data folder, 100 extra ids: 32,100 ids (32,128 in models)
    mt5     vocab/mt5.model of the data folder, 100 extra ids in it: 250,100 ids (250,112 in models)
    bytes   ByT5's, needs no file: 3 special ids, 256 bytes, 125 extra ids
    FILE    a SentencePiece model; 100 extra ids are added unless it has them

Inputs of T5 end without EOS, as T0 was trained and evaluated, those of the others with it, as mT5
and ByT5 were trained. MTL_JAX_INPUTS_EOS=0 or 1 decides otherwise.
"""

import functools
import os
from pathlib import Path

import seqio

from mtl_jax.errors import UserError, suggest
from mtl_jax.tasks.data_folder import VARIABLE as FOLDER_VARIABLE
from mtl_jax.tasks.data_folder import data_folder
from mtl_jax.tasks.t5_vocabulary import t5_vocabulary

VARIABLE = "MTL_JAX_VOCABULARY"
EOS_VARIABLE = "MTL_JAX_INPUTS_EOS"
NAMES = ("t5", "mt5", "bytes")
MT5_FILE = "vocab/mt5.model"

_EXTRA_IDS = 100
_BYTE_EXTRA_IDS = 125  # ByT5: 384 ids in all
_EOS = {"": None, "0": False, "1": True}


@functools.cache
def _sentence_piece(path: str, extra_ids: int | None) -> seqio.SentencePieceVocabulary:
    if extra_ids is None:
        plain = seqio.SentencePieceVocabulary(path, extra_ids=0)
        has = any("<extra_id_0>" in plain.tokenizer.IdToPiece(i) for i in range(plain.vocab_size))
        extra_ids = 0 if has else _EXTRA_IDS
    return seqio.SentencePieceVocabulary(path, extra_ids=extra_ids)


def _mt5_vocabulary() -> seqio.SentencePieceVocabulary:
    how = (
        "mT5's vocabulary is the file sentencepiece.model of 'mc4.250000.100extra' (spiece.model "
        f"in copies of mT5's checkpoints). Put it into the data folder as {MT5_FILE}, or let "
        f"{VARIABLE} name it; {VARIABLE}=bytes needs no file (ByT5)."
    )
    try:
        path = data_folder() / MT5_FILE
    except UserError as error:
        raise UserError(f"{error} {how}") from error
    if not path.is_file():
        raise UserError(f"There is no {path}, which {FOLDER_VARIABLE} leads to. {how}")
    return _sentence_piece(str(path), 0)


def vocabulary(name: str) -> seqio.Vocabulary:
    """The vocabulary of a name or file; see above.

    Raises:
        UserError: an unknown name, or the file is missing.
    """
    if name == "t5":
        return t5_vocabulary()
    if name == "mt5":
        return _mt5_vocabulary()
    if name == "bytes":
        return seqio.ByteVocabulary(extra_ids=_BYTE_EXTRA_IDS)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"The environment variable {VARIABLE} is {name!r}, which is no file and none of "
            f"{', '.join(NAMES)}.{suggest(name, NAMES)}"
        )
    return _sentence_piece(str(path), None)


def chosen_features(default: str = "t5") -> dict[str, seqio.Feature]:
    """`inputs` and `targets` in the vocabulary that MTL_JAX_VOCABULARY names, else `default`.

    Raises:
        UserError: a variable that cannot be understood, or a missing file.
    """
    name = os.environ.get(VARIABLE, "") or default
    eos = os.environ.get(EOS_VARIABLE, "")
    if eos not in _EOS:
        raise UserError(f"The environment variable {EOS_VARIABLE} must be 0 or 1, not {eos!r}.")
    found = vocabulary(name)
    inputs_eos = _EOS[eos]
    if inputs_eos is None:
        inputs_eos = name != "t5"
    return {
        "inputs": seqio.Feature(found, add_eos=inputs_eos),
        "targets": seqio.Feature(found, add_eos=True),
    }

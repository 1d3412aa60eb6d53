"""Which texts share long runs of words with evaluation inputs; and lists of what is not trained on.

Texts are compared as words: lower case, letters and digits only. Two texts overlap where they share
n consecutive words, 13 as in Brown et al. 2020 (GPT-3, appendix C) and lm-eval. An evaluation text
of fewer words, or a line of it, is found where all of its words stand in a row; those of fewer than
8 words (GPT-3's least n) are too common to tell anything. What many inputs of one task share is the
wording of its prompt, not its data, and does not count.

Free of TensorFlow. Letters: N words, K keys (n-grams) of an index, P pairs of a key and an example.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.storage import replace_text, storage_errors

NGRAM, SHORTEST = 13, 8
COMMON = 0.1  # of the inputs of a task; an n-gram in more of them is the prompt's wording
_COMMON_AT_LEAST = 3  # inputs
_WORDS_AT_ONCE = 1 << 17
_WORD = re.compile(r"[^\W_]+")
# Odd, so that multiplying loses nothing modulo 2**64: of different words only chance makes equal
# keys, once in 2**64.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_LENGTH = np.uint64(0xD6E8FEB86659FD93)


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case: runs of letters and digits of any script."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Match:
    """A text and an evaluation example that share words.

    Attributes:
        text: number of the scanned text, from 0 on.
        example: number of the example in `OverlapIndex.texts`.
        overlap: share of the example's n-grams that the text has, above 0 and up to 1.
    """

    text: int
    example: int
    overlap: float


class OverlapIndex:
    """The n-grams of evaluation inputs. About 24 bytes for each word of them.

    Attributes:
        texts: all inputs, task after task.
        task_of, row_of: of each, its task and its number there.
        sizes: int64, n-grams of each; an input without any cannot be found.
    """

    def __init__(
        self,
        texts: Mapping[str, Iterable[str]],
        ngram: int = NGRAM,
        shortest: int = SHORTEST,
        common: float = COMMON,
    ):
        """Reads the texts.

        Args:
            texts: evaluation inputs by task.
            ngram: consecutive words that count as an overlap.
            shortest: words of a shorter text or line that counts as a whole.
            common: n-grams in more than this share of a task's inputs (and in 3) do not count.

        Raises:
            UserError: a number out of range.
        """
        if ngram < 1:
            raise UserError(f"ngram must be at least 1, not {ngram}.")
        if not 1 <= shortest <= ngram:
            raise UserError(f"shortest must be from 1 to ngram = {ngram}, not {shortest}.")
        self._ngram, self._shortest = ngram, shortest
        self._hashes = _WordHashes()
        self.texts: list[str] = []
        self.task_of: list[str] = []
        self.row_of: list[int] = []
        keys: list[np.ndarray] = []
        lengths: set[int] = set()
        for task, of_task in texts.items():
            found = [self._units(text, lengths) for text in self._added(task, of_task)]
            keys += _without_common(found, common)
        self.sizes = np.array([len(of_one) for of_one in keys], np.int64)
        self._lengths = sorted(lengths)
        examples_P = np.repeat(np.arange(len(keys)), self.sizes)
        keys_P = np.concatenate([np.zeros(0, np.uint64), *keys])
        order_P = np.argsort(keys_P, kind="stable")
        self._keys_K, self._starts_K = np.unique(keys_P[order_P], return_index=True)
        self._examples_P = examples_P[order_P]
        self._ends_K = np.append(self._starts_K[1:], len(keys_P))

    def _added(self, task: str, texts: Iterable[str]) -> Iterator[str]:
        for row, text in enumerate(texts):
            self.texts.append(text)
            self.task_of.append(task)
            self.row_of.append(row)
            yield text

    def _units(self, text: str, lengths: set[int]) -> np.ndarray:
        """The keys of a text's n-grams, of its short lines, or of itself if it is short."""
        hashes_N = self._hashes.of(words(text))
        parts = [hashes_N] if len(hashes_N) < self._ngram else []
        if not parts:
            lines = [self._hashes.of(words(line)) for line in text.splitlines()]
            parts = [line for line in lines if len(line) < self._ngram]
        found = [np.zeros(0, np.uint64)]
        if len(hashes_N) >= self._ngram:
            lengths.add(self._ngram)
            found += _windows(hashes_N, [self._ngram])
        for part in parts:
            if len(part) >= self._shortest:
                lengths.add(len(part))
                found += _windows(part, [len(part)])
        return np.unique(np.concatenate(found))

    def scan(self, texts: Iterable[str], min_overlap: float = 0.0) -> Iterator[Match]:
        """Yields all pairs of a text and an example that share an n-gram, text by text.

        Args:
            texts: training texts.
            min_overlap: least share of the example's n-grams in the text; 1: all of them.
        """
        first, chunk, count = 0, list[np.ndarray](), 0
        for text in texts:
            chunk.append(self._hashes.of(words(text)))
            count += len(chunk[-1])
            if count > _WORDS_AT_ONCE:
                yield from self._found(chunk, first, min_overlap)
                first, chunk, count = first + len(chunk), [], 0
        yield from self._found(chunk, first, min_overlap)

    def _found(
        self, chunk: Sequence[np.ndarray], first: int, min_overlap: float
    ) -> Iterator[Match]:
        if not len(self._keys_K) or not chunk:
            return
        # A word that is in no text ends each of them, so that no n-gram goes beyond.
        ended = [part for words_N in chunk for part in (words_N, self._hashes.end)]
        text_N = np.repeat(np.arange(len(chunk)), [len(words_N) + 1 for words_N in chunk])
        hits = [np.zeros(0, np.int64)]
        for keys_N in _windows(np.concatenate(ended), self._lengths):
            places_N = np.minimum(np.searchsorted(self._keys_K, keys_N), len(self._keys_K) - 1)
            hit = np.flatnonzero(self._keys_K[places_N] == keys_N)
            hits.append(text_N[hit] * len(self._keys_K) + places_N[hit])
        pairs = np.unique(np.concatenate(hits))
        text_of, key_of = np.divmod(pairs, len(self._keys_K))
        counts = self._ends_K[key_of] - self._starts_K[key_of]
        # The examples of each key, one after the other.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        examples = self._examples_P[np.repeat(self._starts_K[key_of], counts) + within]
        joined, shared = np.unique(
            np.repeat(text_of, counts) * len(self.texts) + examples, return_counts=True
        )
        texts, examples = np.divmod(joined, len(self.texts))
        overlaps = shared / self.sizes[examples]
        for text, example, overlap in zip(texts, examples, overlaps, strict=True):
            if overlap >= min_overlap:
                yield Match(first + int(text), int(example), float(overlap))


class _WordHashes(dict[str, int]):
    """64 random bits for every word, the same in every process."""

    end = np.array([0x5851F42D4C957F2D], np.uint64)

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        self[word] = number = int.from_bytes(digest, "little")
        return number

    def of(self, found: Sequence[str]) -> np.ndarray:
        """Returns uint64 [N]."""
        return np.fromiter((self[word] for word in found), np.uint64, len(found))


def _windows(hashes_N: np.ndarray, lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields for each length the keys of all runs of so many words, uint64 [N - length + 1]."""
    keys = hashes_N
    for length in range(1, max(lengths, default=0) + 1):
        if length > len(hashes_N):
            return
        if length > 1:
            keys = keys[:-1] * _BASE + hashes_N[length - 1 :]
        if length in lengths:
            # Or a run would equal a longer one that begins with words of hash zero.
            yield keys + np.full(1, length, np.uint64) * _LENGTH


def _without_common(units: Sequence[np.ndarray], common: float) -> list[np.ndarray]:
    """Drops what more than the share `common` of a task's inputs have."""
    keys, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *units]), return_counts=True)
    often = keys[counts > max(_COMMON_AT_LEAST - 1, common * len(units))]
    if not len(often):
        return list(units)
    return [of_one[~np.isin(of_one, often)] for of_one in units]


def fingerprint(inputs: Any) -> str:
    """Returns 16 hexadecimal digits that tell inputs apart: of a text, or of int tokens."""
    if isinstance(inputs, str):
        content = inputs.encode()
    elif isinstance(inputs, bytes):
        content = inputs
    else:
        content = np.asarray(inputs).astype("<i4").tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Exclusions:
    """Examples that are not trained on, by (task, split): fingerprints of their inputs.

    `counts` has the number of examples, which may be more: several may have the same inputs.
    """

    inputs: Mapping[tuple[str, str], frozenset[str]]
    counts: Mapping[tuple[str, str], int]

    def of(self, task: str, split: str) -> frozenset[str]:
        """Returns the fingerprints of a task's excluded inputs."""
        return self.inputs.get((task, split), frozenset())

    def count(self, task: str, split: str) -> int:
        """Returns how many examples of a task are excluded."""
        return self.counts.get((task, split), 0)


_EXCLUDED_FIELDS = ("task", "split", "row", "inputs")


def write_exclusions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file for `Data.exclude`: a JSON line {task, split, row, inputs} for each example.

    `inputs` is the fingerprint by which training knows the example; `row` is for people.

    Raises:
        UserError: no permission or no space.
    """
    with storage_errors(f"write {path.name}", path.parent):
        replace_text(path, "".join(json.dumps(dict(row)) + "\n" for row in rows))


def read_exclusions(path: str) -> Exclusions:
    """Reads a file for `Data.exclude`; of "" nothing is excluded.

    Raises:
        UserError: there is no such file, or a line is not what `write_exclusions` writes.
    """
    inputs: dict[tuple[str, str], set[str]] = {}
    counts: dict[tuple[str, str], int] = {}
    if path:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Data.exclude: {path} cannot be read: {error}.") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                task, split, _, digits = (row[field] for field in _EXCLUDED_FIELDS)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"Data.exclude: {path}, line {number}: not a JSON object with "
                    f"{', '.join(_EXCLUDED_FIELDS)}. Write the file with `mtl-jax decontaminate "
                    "--remove`."
                ) from error
            inputs.setdefault((task, split), set()).add(digits)
            counts[task, split] = counts.get((task, split), 0) + 1
    return Exclusions({key: frozenset(found) for key, found in inputs.items()}, counts)

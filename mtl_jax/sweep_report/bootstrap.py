"""What chance could do to a score: bootstrap intervals, sign-flip tests and Holm's correction.

Scores are a matrix prompts x examples. The prompts of a dataset are fixed: we report on these
prompts, not on those that someone might still write, so they are not resampled (their spread is
told by the quartiles). The examples are a sample, and each stands under all prompts: an example
that is hard is hard under most of them. So examples are resampled as a whole, a column at a time.
Resampling every score on its own would treat twelve prompts of 50 examples like 600 examples and
give intervals that are several times too narrow.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentile interval, chapter 13;
permutation tests, chapter 15); Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
FLIPS = 9999
_CHUNK = 2_000_000  # numbers drawn at a time, whatever the number of examples


def generator(seed: int, name: str) -> np.random.Generator:
    """The source of chance for one dataset: the same numbers whatever else is in the sweep."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _chunks(total: int, width: int) -> Iterator[int]:
    """Splits `total` rows of `width` numbers."""
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, total, size):
        yield min(size, total - start)


def prompt_means(scores_PN: np.ndarray) -> np.ndarray:
    """The mean of each prompt over the examples it has (NaN: has not), [P]."""
    there_PN = np.isfinite(scores_PN)
    return np.where(there_PN, scores_PN, 0.0).sum(axis=1) / there_PN.sum(axis=1)


def mean_replicates(
    matrices: Sequence[np.ndarray],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """The mean over prompts of the mean over examples, under resampled examples.

    Args:
      matrices: K matrices [P_k, N] of the same N examples, NaN where a prompt lacks an example.
        All meet the same resamples, so that their differences are paired.
      rng: the source of chance.
      resamples: how many, B.

    Returns:
      [K, B], float64.
    """
    count = matrices[0].shape[1]
    whole = [bool(np.isfinite(matrix).all()) for matrix in matrices]
    drawn = []
    for rows in _chunks(resamples, count):
        picks_BN = rng.integers(0, count, (rows, count))
        picks_BN += count * np.arange(rows)[:, None]
        counts_BN = np.bincount(picks_BN.ravel(), minlength=rows * count).reshape(rows, count)
        counts_BN = counts_BN.astype(np.float64)
        drawn.append([_mean(m, counts_BN, full) for m, full in zip(matrices, whole, strict=True)])
    return np.concatenate(drawn, axis=1)


def _mean(scores_PN: np.ndarray, counts_BN: np.ndarray, whole: bool) -> np.ndarray:
    if whole:
        return counts_BN @ scores_PN.mean(axis=0) / scores_PN.shape[1]
    there_PN = np.isfinite(scores_PN)
    sums_BP = counts_BN @ np.where(there_PN, scores_PN, 0.0).T
    seen_BP = counts_BN @ there_PN.T.astype(np.float64)
    # A prompt of very few examples may have none in a resample: then its own mean stands in.
    means_BP = np.where(
        seen_BP > 0, sums_BP / np.maximum(seen_BP, 1), prompt_means(scores_PN)[None, :]
    )
    return means_BP.mean(axis=1)


def interval(replicates_B: np.ndarray) -> tuple[float, float]:
    """The ends of the percentile interval."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(replicates_B, [tail, 100 - tail])
    return float(low), float(high)


def contributions(difference_PN: np.ndarray) -> np.ndarray:
    """What each example adds to the mean over prompts of the mean difference, [N].

    Args:
      difference_PN: B minus A of each example under each prompt; NaN where one of them is missing.
    """
    there_PN = np.isfinite(difference_PN)
    shares_PN = np.where(there_PN, difference_PN, 0.0) / there_PN.sum(axis=1, keepdims=True)
    return shares_PN.mean(axis=0)


def flipped(
    contributions_KN: np.ndarray, rng: np.random.Generator, flips: int = FLIPS
) -> np.ndarray:
    """The mean differences if A and B were exchanged at random, example by example.

    If both are equally good, an exchange under one example changes nothing but chance. An example
    is exchanged under all prompts at once, for the reason that the module tells.

    Args:
      contributions_KN: of K comparisons over the same N examples.
      rng: the source of chance.
      flips: how many random exchanges, F.

    Returns:
      [F, K].
    """
    count = contributions_KN.shape[1]
    drawn = []
    for rows in _chunks(flips, count):
        signs_FN = rng.integers(0, 2, (rows, count), dtype=np.int8) * 2.0 - 1.0
        drawn.append(signs_FN @ contributions_KN.T)
    return np.concatenate(drawn)


def p_value(observed: float, under_null_F: np.ndarray) -> float:
    """Two-sided p-value; the observation counts as one of the draws, so it is never 0."""
    slack = 1e-9 * max(1.0, abs(observed))
    extreme = int(np.count_nonzero(np.abs(under_null_F) >= abs(observed) - slack))
    return (1 + extreme) / (1 + len(under_null_F))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several tests: rejecting those below a rejects a false one at rate <= a.

    Returns:
      In the order given; each at most 1 and at least its own p-value.
    """
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, place in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted

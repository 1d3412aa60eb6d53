"""Stop strings as a table over tokens, so that a compiled loop sees a text end where it does.

A stop string may begin and end in the middle of tokens. The Aho-Corasick automaton reads a text
character by character and knows whether any of several strings has been in it; its transitions are
followed through the text of every token, which gives transitions over tokens.

Letters: S states, V vocabulary, A characters of the stop strings, and one for all others.
"""

import collections
from collections.abc import Sequence

import numpy as np

from mtl_jax.errors import UserError


def table(
    pieces: Sequence[str],
    stop: Sequence[str],
    *,
    strip_first_space: bool = False,
) -> np.ndarray:
    """Transitions of the automaton that accepts texts with a stop string in them.

    State 0 is that of the empty text, the last state that of all texts with a stop string.

    Args:
      pieces: the text that each token adds, "" for those that add none. Tokens that hold parts of
        characters need both sides in bytes: `text.encode().decode("latin-1")`.
      stop: texts to stop at.
      strip_first_space: the first token that adds text loses a space in front, as SentencePiece
        decodes.

    Returns:
      int32 [S, V]: the state after a token's text.

    Raises:
      UserError: there is no stop string, or an empty one.
    """
    if isinstance(stop, str) or not stop or not all(stop):
        raise UserError(f"Generate.stop must be a list of texts, none of them empty, got {stop!r}.")
    characters = np.unique(_code_points("".join(stop)))
    moves_SA = _automaton([np.searchsorted(characters, _code_points(s)) for s in stop])
    states_S = np.arange(len(moves_SA), dtype=np.int32)
    after_VS = _after(pieces, characters, moves_SA, states_S)
    if not strip_first_space:
        return np.ascontiguousarray(after_VS.T)
    # One more state in front: the empty text, which tokens without text do not leave.
    stripped = [piece.removeprefix(" ") for piece in pieces]
    first_V = _after(stripped, characters, moves_SA, states_S[:1])[:, 0] + 1
    first_V[[not piece for piece in pieces]] = 0
    return np.concatenate([first_V[None], after_VS.T + 1])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _automaton(strings: Sequence[np.ndarray]) -> np.ndarray:
    """Transitions int32 [S, A] of Aho and Corasick (1975), accepting states merged into the last.

    Args:
      strings: as numbers of characters; the last column is for characters in none of them.
    """
    others = 1 + max(int(string.max()) for string in strings)
    children: list[dict[int, int]] = [{}]
    accepting = [False]
    for string in strings:
        node = 0
        for character in string.tolist():
            if character not in children[node]:
                children[node][character] = len(children)
                children.append({})
                accepting.append(False)
            node = children[node][character]
        accepting[node] = True

    # Where a node has no child, it moves as the longest suffix of its text that is a node does.
    moves: np.ndarray = np.zeros((len(children), others + 1), np.int32)
    waiting = collections.deque([(0, 0)])
    while waiting:
        node, suffix = waiting.popleft()
        moves[node] = moves[suffix]
        accepting[node] = accepting[node] or accepting[suffix]
        for character, child in children[node].items():
            waiting.append((child, int(moves[suffix, character]) if node else 0))
            moves[node, character] = child

    final = np.array(accepting)
    number = np.where(final, np.count_nonzero(~final), np.cumsum(~final) - 1).astype(np.int32)
    last_A: np.ndarray = np.full((1, others + 1), number.max(), np.int32)
    return np.concatenate([number[moves[~final]], last_A])


def _after(
    texts: Sequence[str], characters: np.ndarray, moves_SA: np.ndarray, states_S: np.ndarray
) -> np.ndarray:
    """The state after each text, from each of the states: int32 [V, S]."""
    codes = _code_points("".join(texts))
    found = np.searchsorted(characters, codes)
    known = characters[np.minimum(found, len(characters) - 1)] == codes
    codes = np.where(known, found, len(characters))

    lengths_V = np.fromiter(map(len, texts), np.int64, len(texts))
    starts_V = np.cumsum(lengths_V) - lengths_V
    longest_first_V = np.argsort(-lengths_V, kind="stable")
    after_VS: np.ndarray = np.repeat(states_S[None], len(texts), axis=0)
    for i in range(int(lengths_V.max(initial=0))):
        # Of texts longer than i, the character i.
        long_N = longest_first_V[: np.count_nonzero(lengths_V > i)]
        after_VS[long_N] = moves_SA[after_VS[long_N], codes[starts_V[long_N] + i][:, None]]
    return after_VS

"""The table of stop strings against Python's `in`, on random texts cut into random tokens."""

import numpy as np
import pytest

from mtl_jax import stop_strings
from mtl_jax.errors import UserError


def _accepts(table, tokens):
    """The number of tokens after which the table accepts, or None."""
    state = 0
    for i, token in enumerate(tokens):
        state = table[state, token]
        if state == len(table) - 1:
            return i + 1
    return None


def _expected(pieces, tokens, stop, strip_first_space=False):
    text = ""
    for i, token in enumerate(tokens):
        piece = pieces[token]
        if strip_first_space and not any(pieces[t] for t in tokens[:i]):
            piece = piece.removeprefix(" ")
        text += piece
        if any(s in text for s in stop):
            return i + 1
    return None


@pytest.mark.parametrize("strip_first_space", [False, True])
def test_the_table_agrees_with_searching_the_text(strip_first_space):
    random = np.random.RandomState(0)
    found = []
    for _ in range(60):
        word = lambda low, high: "".join(random.choice([*" abß"], random.randint(low, high)))  # noqa: E731
        pieces = ["", *(word(1, 5) for _ in range(8)), " ", ""]
        stop = [word(1, 6) for _ in range(random.randint(1, 4))]
        table = stop_strings.table(pieces, stop, strip_first_space=strip_first_space)
        for _ in range(20):
            tokens = random.randint(0, len(pieces), 8)
            expected = _expected(pieces, tokens, stop, strip_first_space)
            assert _accepts(table, tokens) == expected, (pieces, stop, tokens)
            found.append(expected)
    # Some at every place, and some never: the test has seen what it is about.
    assert set(found) == {None, *range(1, 9)}


def test_the_state_of_a_found_string_is_kept():
    table = stop_strings.table(["x", "a", "b"], ["ab"])
    assert table.dtype == np.int32
    assert table.tolist() == [[0, 1, 0], [0, 1, 2], [2, 2, 2]]


def test_a_string_within_another_is_found_first():
    pieces = ["a", "b", "c"]
    table = stop_strings.table(pieces, ["abcc", "bc"])
    assert _accepts(table, [0, 1, 2]) == 3
    # A shorter one at the end of a longer one that has not been completed.
    assert _accepts(stop_strings.table(pieces, ["aabb", "ab"]), [0, 0, 1]) == 3


def test_characters_cut_in_two_are_found_as_bytes():
    as_bytes = lambda text: text.encode().decode("latin-1")  # noqa: E731
    pieces = [chr(byte) for byte in range(256)]
    table = stop_strings.table(pieces, [as_bytes("ß…")])
    assert _accepts(table, list("aß…b".encode())) == 6
    assert _accepts(table, list("aß.…b".encode())) is None


def test_a_space_in_front_of_the_text_is_none():
    table = stop_strings.table(["", " ", " a", "a"], [" a"], strip_first_space=True)
    assert _accepts(table, [0, 2]) is None
    assert _accepts(table, [2, 0, 2]) == 3
    assert _accepts(table, [1, 3]) is None  # the space is dropped, not kept for later
    assert _accepts(table, [1, 2]) == 2


@pytest.mark.parametrize("stop", [[], ["a", ""], "ab"])
def test_stop_strings_must_be_texts(stop):
    with pytest.raises(UserError, match=r"Generate\.stop must be a list of texts"):
        stop_strings.table(["a"], stop)

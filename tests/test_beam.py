"""Beam search over a model made of a table, against plain Python and against all sequences."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import beam, decode, model, stop_strings
from mtl_jax.decode import GenerateConfig

V, MEMORY, ROWS, EOS = 5, 11, 6, 1
CFG = model.T5Config(vocab_size=V)


@functools.cache
def _table(sharpness):
    """Logits [row, position, memory, V] of the toy, as spread as they are sharp."""
    return np.float32(np.random.RandomState(3).randn(ROWS, 8, MEMORY, V) * sharpness)


def _memory(memory, token):
    return (memory * 3 + token + 1) % MEMORY  # of everything said so far


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    """A model whose cache is the memory of each beam, so that a wrong order would show."""

    def step(cfg, params, cache, tokens, position):
        memory = jnp.where(position == 0, 0, _memory(cache, tokens))
        rows = jnp.arange(memory.shape[0])[:, None]
        return params[rows, position, memory], memory

    pick = lambda x, source: jnp.take_along_axis(x, source, axis=1)  # noqa: E731
    start = lambda cfg, params, rows, segments, length, decodes: jnp.zeros(  # noqa: E731
        (rows.shape[0], decodes), jnp.int32
    )
    monkeypatch.setattr(decode.model, "encode", lambda cfg, params, inputs, segments: inputs)
    monkeypatch.setattr(decode.incremental, "start_cache", start)
    monkeypatch.setattr(decode.incremental, "prepare", lambda cfg, params: params)
    monkeypatch.setattr(decode.incremental, "decode_step", step)
    monkeypatch.setattr(
        decode.incremental, "reorder_cache", lambda cfg, cache, source: pick(cache, source)
    )


PIECES = ("a", "", "b", "aa", "ba")  # of the toy's tokens


def _search(sharpness=1.0, eos_id=EOS, **changes):
    cfg = GenerateConfig(**(dict(method="beam", max_length=4) | changes))
    ones = jnp.ones((ROWS, 1), jnp.int32)
    table = stop_strings.table(PIECES, cfg.stop) if cfg.stop else None
    run = jax.jit(functools.partial(decode.generate, CFG, cfg, eos_id=eos_id, stop_table=table))
    found = jax.device_get(run(_table(sharpness), ones, ones))
    return [
        [
            (float(score), tuple(tokens[:length].tolist()))
            for tokens, length, score in zip(*row, strict=True)
            if score > -np.inf
        ]
        for row in zip(found.tokens, found.lengths, found.scores, strict=True)
    ]


def _log_probs(sharpness, row, tokens):
    memory = functools.reduce(_memory, tokens, 0)
    logits = np.float64(_table(sharpness)[row, len(tokens), memory])
    return logits - np.log(np.exp(logits).sum())


def _penalty(kind, alpha, length):
    return ((5 + length) / 6) ** alpha if kind == "t5x" else length**alpha


def _plain(row, *, width, length, kind, alpha, early="heuristic", least=0, sharpness=1.0, stop=()):
    """Beam search with lists, in float64."""

    def ended(tokens):
        text = "".join(PIECES[token] for token in tokens)
        return tokens[-1] == EOS or any(s in text for s in stop)

    live, done = [(0.0, ())], []
    for n in range(1, length + 1):
        candidates = []
        for score, tokens in live:
            for v, log_p in enumerate(_log_probs(sharpness, row, tokens)):
                if v != EOS or n > least:
                    candidates.append((score + log_p, (*tokens, v)))
        candidates = sorted(candidates, reverse=True)[: 2 * width]
        finishing = [c for c in candidates if ended(c[1])]
        if kind == "hugging_face":
            finishing = [c for c in candidates[:width] if ended(c[1]) or n == length]
        done += [(score / _penalty(kind, alpha, n), tokens) for score, tokens in finishing]
        done = sorted(done, reverse=True)[:width]
        live = [c for c in candidates if not ended(c[1])][:width]
        if not live:
            break
        full, at = len(done) == width, n
        if kind == "t5x" or (early == "never" and alpha > 0):
            at = length
        if full and (early == "when_full" or live[0][0] / _penalty(kind, alpha, at) <= done[-1][0]):
            break
    return live if kind == "t5x" and not done else done


def _assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [tokens for _, tokens in ours] == [tokens for _, tokens in theirs]
        np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs], rtol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "alpha", "early"),
    [
        ("t5x", 0.6, "heuristic"),
        ("t5x", 0.0, "heuristic"),
        ("hugging_face", 1.0, "heuristic"),
        ("hugging_face", 1.0, "when_full"),
        ("hugging_face", 1.0, "never"),
        ("hugging_face", -2.0, "never"),
    ],
)
def test_the_beams_are_those_of_plain_python(kind, alpha, early, sharpness, width):
    found = _search(
        sharpness,
        num_beams=width,
        num_return=width,
        max_length=8,
        length_penalty=kind,
        length_alpha=alpha,
        early_stopping=early,
    )
    expected = [
        _plain(
            row,
            width=width,
            length=8,
            kind=kind,
            alpha=alpha,
            early=early,
            sharpness=sharpness,
        )
        for row in range(ROWS)
    ]
    _assert_same(found, expected)


def test_the_kinds_and_their_stopping_differ_here():
    # Else the test above could not tell them apart.
    common = dict(num_beams=3, num_return=3, max_length=8)
    kinds = [
        _search(3.0, length_penalty="t5x", length_alpha=1.0, **common),
        *(
            _search(3.0, length_penalty="hugging_face", early_stopping=early, **common)
            for early in ("heuristic", "when_full", "never")
        ),
    ]
    tokens = [[[t for _, t in row] for row in found] for found in kinds]
    assert all(a != b for a, b in itertools.combinations(tokens, 2))


@pytest.mark.parametrize("kind", ["t5x", "hugging_face"])
def test_wide_enough_beams_find_the_best_of_all_sequences(kind):
    length, alpha = 4, 0.8
    found = _search(
        num_beams=128, num_return=20, length_penalty=kind, length_alpha=alpha, max_length=length
    )
    for row in range(ROWS):
        every = []
        for n in range(1, length + 1):
            for tokens in itertools.product(range(V), repeat=n):
                ends = tokens[-1] == EOS or (kind == "hugging_face" and n == length)
                if ends and EOS not in tokens[:-1]:
                    total = sum(_log_probs(1.0, row, tokens[:i])[t] for i, t in enumerate(tokens))
                    every.append((total / _penalty(kind, alpha, n), tokens))
        _assert_same([found[row]], [sorted(every, reverse=True)[:20]])


@pytest.mark.parametrize("kind", ["t5x", "hugging_face"])
def test_no_beam_ends_before_the_shortest_length(kind):
    options = dict(num_beams=3, num_return=3, max_length=8, length_penalty=kind)
    found = _search(3.0, min_length=4, **options)
    assert min(len(tokens) for row in found for _, tokens in row) == 5  # four, then the end
    alpha = GenerateConfig(method="beam", length_penalty=kind).alpha
    plain = functools.partial(_plain, width=3, length=8, kind=kind, alpha=alpha, sharpness=3.0)
    _assert_same(found, [plain(row, least=4) for row in range(ROWS)])


@pytest.mark.parametrize("kind", ["t5x", "hugging_face"])
def test_a_beam_with_a_stop_string_has_ended(kind):
    # Strings that take several tokens, so that each beam must keep the state of its own text.
    stop = ("aabab", "bbb", "abbaa")
    common = dict(num_beams=3, num_return=3, max_length=8, length_penalty=kind)
    found = _search(stop=stop, **common)
    alpha = GenerateConfig(method="beam", length_penalty=kind).alpha
    plain = functools.partial(_plain, width=3, length=8, kind=kind, alpha=alpha)
    _assert_same(found, [plain(row, stop=stop) for row in range(ROWS)])
    assert found != _search(**common)


def test_t5x_returns_live_beams_only_where_none_has_finished():
    # Rows 0 and 1 never end, the others do.
    eos = jnp.where(jnp.arange(ROWS) < 2, -1, EOS)
    found = _search(0.5, eos_id=eos, num_beams=2, num_return=2, max_length=3)
    for row, beams in enumerate(found):
        for score, tokens in beams:
            total = sum(_log_probs(0.5, row, tokens[:i])[t] for i, t in enumerate(tokens))
            expected = total if row < 2 else total / _penalty("t5x", 0.6, len(tokens))
            assert (len(tokens) == 3) if row < 2 else (tokens[-1] == EOS)
            assert math.isclose(score, expected, rel_tol=1e-5)
        assert len(beams) == 2 or row >= 2


def test_length_penalties():
    # The notes on T5X, section 4b.
    t5x = GenerateConfig(method="beam", length_alpha=0.6)
    lengths = jnp.array([1, 5, 10, 100])
    np.testing.assert_allclose(
        beam.length_penalty(t5x, lengths), [1, 1.358655, 1.732862, 5.569585], rtol=1e-6
    )
    other = GenerateConfig(method="beam", length_penalty="hugging_face", length_alpha=-0.5)
    np.testing.assert_allclose(
        beam.length_penalty(other, lengths), [1, 5**-0.5, 10**-0.5, 0.1], rtol=1e-6
    )

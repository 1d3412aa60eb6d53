"""Drawing tokens: what is left to draw from, how often each is drawn, and on what that depends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import sampling
from mtl_jax.decode import GenerateConfig

V = 7
LOGITS = np.float32([0.3, 2.0, -1.0, 1.1, -30.0, 0.9, 1.4])


def _plain(logits, temperature, top_k, top_p):
    """The distribution, by sorting in float64."""
    p = np.exp(np.float64(logits) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or None]
    share = p[order] / p[order].sum()
    count = 1 + int(np.sum(np.cumsum(share)[:-1] < top_p))  # up to the one that reaches top_p
    out = np.zeros(len(logits))
    out[order[:count]] = share[:count] / share[:count].sum()
    return out


SETTINGS = [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 0, 0.6), (1.8, 4, 0.75), (1.0, 99, 0.9), (1, 1, 1)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p):
    cfg = GenerateConfig(
        method="sample", temperature=temperature, top_k=top_k, top_p=top_p, num_return=8
    )
    rows = 2000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(rows))
    logits = jnp.broadcast_to(LOGITS, (rows, 8, V))
    draw = jax.jit(sampling.draw, static_argnums=0)
    drawn = np.asarray(draw(cfg, keys, jnp.zeros(rows, jnp.int32), logits))
    expected = _plain(LOGITS, temperature, top_k, top_p) * drawn.size
    counts = np.bincount(drawn.ravel(), minlength=V)
    assert counts[expected < 1e-3].sum() == 0
    likely = expected > 1e-3
    chi_square = np.sum((counts[likely] - expected[likely]) ** 2 / expected[likely])
    assert chi_square < 22.5  # one in a thousand at six degrees of freedom
    # Neighbours among rows and among continuations are independent: they agree as chance has it.
    chance, tolerance = np.sum((expected / drawn.size) ** 2), 4 * 0.5 / np.sqrt(rows)
    assert abs(np.mean(drawn[1:] == drawn[:-1]) - chance) < tolerance
    assert abs(np.mean(drawn[:, 1:] == drawn[:, :-1]) - chance) < tolerance


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_what_is_left_to_draw_from(temperature, top_k, top_p):
    logits = np.random.RandomState(1).randn(4, 2, 40).astype(np.float32)
    cfg = GenerateConfig(method="sample", temperature=temperature, top_k=top_k, top_p=top_p)
    kept, tokens = sampling.likely(cfg, logits)
    shares = np.asarray(jax.nn.softmax(kept, axis=-1))
    found = np.zeros_like(logits)
    places = np.broadcast_to(np.arange(40), (4, 2, 40)) if tokens is None else np.asarray(tokens)
    np.put_along_axis(found, places, shares, axis=-1)
    for index in np.ndindex(4, 2):
        expected = _plain(logits[index], temperature, top_k, top_p)
        np.testing.assert_allclose(found[index], expected, atol=1e-6)


def test_a_forbidden_token_is_never_left():
    logits = np.float32([[0.0, -np.inf, 1.0, -np.inf]])
    for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.999), (3, 0.5)):
        cfg = GenerateConfig(method="sample", top_k=top_k, top_p=top_p)
        kept, tokens = sampling.likely(cfg, logits)
        tokens = np.arange(4)[None] if tokens is None else np.asarray(tokens)
        assert set(tokens[np.isfinite(kept)].tolist()) <= {0, 2}


def test_the_nucleus_of_equal_tokens_is_all_of_them():
    kept = sampling.nucleus(jnp.zeros((2, 5)), 0.3)
    assert np.isfinite(kept).all()
    assert np.isfinite(sampling.nucleus(jnp.float32([[3.0, 0.0]]), 1e-9)).tolist() == [
        [True, False]
    ]


def test_a_draw_depends_on_row_step_and_continuation():
    cfg = GenerateConfig(method="sample", num_return=3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(5))
    logits = jnp.zeros((5, 3, 1000))
    draw = jax.jit(sampling.draw, static_argnums=0)
    made = jnp.array([0, 1, 2, 3, 4], jnp.int32)
    drawn = np.asarray(draw(cfg, keys, made, logits))
    assert len(set(drawn.ravel().tolist())) >= 13  # of fifteen: all of them differ
    np.testing.assert_array_equal(draw(cfg, keys[::-1], made[::-1], logits), drawn[::-1])
    assert not (np.asarray(draw(cfg, keys, made + 1, logits)) == drawn).any()

"""Attention against a naive float64 reference, T5X's buckets, and zero gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import attention

# Bucket of key - query with 32 buckets and maximal distance 128, from T5X.
BIDIRECTIONAL = {
    **dict.fromkeys((-200, -150, -100), 15),
    **{-64: 14, -33: 12, -32: 12, -17: 10, -16: 10, -15: 9, -8: 8, -1: 1, 0: 0},
    **{1: 17, 8: 24, 15: 25, 16: 26, 32: 28, 64: 30, 100: 31, 500: 31},
}
CAUSAL = {-127: 31, -100: 30, -64: 26, -32: 21, -16: 16, -15: 15, -1: 1, 0: 0, 1: 0, 90: 0}

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (40, 23)]


@pytest.mark.parametrize(("bidirectional", "expected"), [(True, BIDIRECTIONAL), (False, CAUSAL)])
def test_buckets_are_those_of_t5x(bidirectional, expected):
    buckets = attention.relative_position_bucket(
        np.array(list(expected), np.int32),
        bidirectional=bidirectional,
        num_buckets=32,
        max_distance=128,
    )
    assert buckets.tolist() == list(expected.values())


def bucket_matrix(queries, keys, bidirectional):
    """Buckets_TS of all pairs, one by one."""
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    return np.asarray(
        attention.relative_position_bucket(
            distance, bidirectional=bidirectional, num_buckets=32, max_distance=128
        )
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_toeplitz_bias_equals_a_gather_and_its_gradient_a_scatter(queries, keys, bidirectional):
    random = np.random.RandomState(queries * 100 + keys)
    table_NH = random.randn(32, 2).astype(np.float32)
    weight_HTS = random.randn(2, queries, keys).astype(np.float32)
    buckets_TS = bucket_matrix(queries, keys, bidirectional)

    def bias(table):
        return attention.relative_bias(
            table, queries, keys, bidirectional=bidirectional, max_distance=128
        )

    found_HTS, backward = jax.vjp(jax.jit(bias), jnp.asarray(table_NH))
    np.testing.assert_array_equal(found_HTS, table_NH[buckets_TS].transpose(2, 0, 1))
    scattered_NH = np.zeros((32, 2))
    np.add.at(scattered_NH, buckets_TS, weight_HTS.transpose(1, 2, 0))
    np.testing.assert_allclose(backward(weight_HTS)[0], scattered_NH, rtol=1e-4, atol=1e-4)


def arrays(queries, keys, seed=0):
    random = np.random.RandomState(seed)
    q, k, v = (random.randn(2, n, 3, 4).astype(np.float32) for n in (queries, keys, keys))
    return q, k, v, random.randn(32, 3).astype(np.float32)


def naive(q_BTHK, k_BSHK, v_BSHK, table_NH, q_segments, kv_segments, causal):
    """One query after another, in float64, over a list of the keys that it sees."""
    batch, queries, heads, _ = q_BTHK.shape
    buckets_TS = bucket_matrix(queries, k_BSHK.shape[1], not causal)
    out = np.zeros(q_BTHK.shape)
    for b, t, h in np.ndindex(batch, queries, heads):
        segment = q_segments[b, t]
        seen = [
            s
            for s in range(k_BSHK.shape[1])
            if segment > 0 and kv_segments[b, s] == segment and not (causal and s > t)
        ]
        if not seen:
            continue
        logits = k_BSHK[b, seen, h].astype(np.float64) @ q_BTHK[b, t, h]
        if table_NH is not None:
            logits = logits + table_NH[buckets_TS[t, seen], h]
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ v_BSHK[b, seen, h]
    return out


PACKED_5 = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], np.int32)
PACKED_7 = np.array([[1, 2, 2, 2, 3, 3, 0], [0, 0, 0, 0, 0, 0, 0]], np.int32)


@pytest.mark.parametrize(
    ("q_segments", "kv_segments", "causal", "biased"),
    [
        (PACKED_7, PACKED_7, False, True),
        (PACKED_5, PACKED_5, True, True),
        (PACKED_5, PACKED_7, False, False),
        (PACKED_7, PACKED_5, False, True),
    ],
    ids=["encoder", "decoder", "cross", "cross with a bias"],
)
def test_attend_equals_a_naive_loop(q_segments, kv_segments, causal, biased):
    q, k, v, table = arrays(q_segments.shape[1], kv_segments.shape[1])
    table = table if biased else None
    attend = functools.partial(attention.attend, causal=causal, bidirectional=not causal)
    found = jax.jit(attend)(q, k, v, table, q_segments, kv_segments)
    expected = naive(q, k, v, table, q_segments, kv_segments, causal)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_without_a_key_are_zero_and_have_finite_zero_gradients():
    q, k, v, table = arrays(7, 7)

    def total(q, k, v, table):
        out = attention.attend(q, k, v, table, PACKED_7, PACKED_7)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, table)
    assert not np.any(out[1])
    assert not np.any(out[0, 6])
    assert np.any(out[0, 5])
    for gradient in gradients[:3]:
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[1])  # a row of padding only
        assert not np.any(gradient[0, 6])
    # The key of a segment of one token has weight 1 whatever it is.
    assert np.any(gradients[2][0, 0])
    np.testing.assert_allclose(gradients[1][0, 0], 0.0, atol=1e-7)
    assert np.all(np.isfinite(gradients[3]))


def test_one_cached_step_equals_the_row_of_the_whole():
    q, k, v, table = arrays(6, 6)
    segments = np.ones((2, 6), np.int32)
    whole = jax.jit(functools.partial(attention.attend, causal=True, bidirectional=False))(
        q, k, v, table, segments, segments
    )
    step = jax.jit(attention.step_over_past)
    one = lambda x, position: x[:, position : position + 1]  # noqa: E731
    for position in range(6):
        # What lies at and behind the position in the cache must not matter.
        later = np.arange(6)[None, :, None, None] >= position
        found = step(
            one(q, position),
            np.where(later, np.float32(1e9), k).transpose(0, 2, 3, 1)[:, None],
            np.where(later, np.float32(-1e9), v).transpose(0, 2, 3, 1)[:, None],
            one(k, position),
            one(v, position),
            table,
            jnp.int32(position),
        )
        np.testing.assert_allclose(found[:, 0], whole[:, position], atol=1e-5)


def test_a_step_over_the_inputs_sees_every_real_key_with_every_continuation():
    q, k, v, _ = arrays(3, 5)
    real = (PACKED_5 > 0).astype(np.int32)
    last = (0, 2, 3, 1)  # positions
    found = jax.jit(attention.step_over_inputs)(q, k.transpose(last), v.transpose(last), real)
    expected = naive(q, k, v, None, np.ones((2, 3), np.int32), real, causal=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dropout_is_shared_by_queries_and_keeps_the_mean():
    """With values = unit vectors the output is the weights themselves."""
    length, rate = 64, 0.25
    zeros = np.zeros((1, length, 1, length), np.float32)
    v = np.eye(length, dtype=np.float32)[None, :, None]
    ones = np.ones((1, length), np.int32)
    attend = functools.partial(attention.attend, dropout_rate=rate, dropout_rng=jax.random.key(3))
    weights_TS = np.asarray(jax.jit(attend)(zeros, zeros, v, None, ones, ones))[0, :, 0]
    np.testing.assert_array_equal(weights_TS, np.broadcast_to(weights_TS[:1], weights_TS.shape))
    kept = weights_TS[0] > 0
    np.testing.assert_allclose(weights_TS[0, kept], 1 / length / (1 - rate), rtol=1e-5)
    deviation = np.sqrt(length * rate * (1 - rate))
    assert abs(kept.sum() - length * (1 - rate)) < 4 * deviation
    off = attention.attend(zeros, zeros, v, None, ones, ones, dropout_rate=rate)
    np.testing.assert_allclose(off, 1 / length, rtol=1e-5)


def test_bfloat16_values_give_bfloat16_from_float32_statistics():
    q, k, v, table = (jnp.asarray(x, jnp.bfloat16) for x in arrays(7, 7))
    found = jax.jit(attention.attend)(q, k, v, table, PACKED_7, PACKED_7)
    assert found.dtype == jnp.bfloat16
    rounded = [np.asarray(x, np.float32) for x in (q, k, v, table)]
    expected = naive(*rounded, PACKED_7, PACKED_7, causal=False)
    # Only the weights and the result are rounded, to 8 bits.
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.03)

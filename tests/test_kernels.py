"""The linear-memory implementations of attention against the naive one, by autodiff.

Kernels run in Pallas' interpreter. Errors are norms relative to the norm of what is expected; the
tolerances are those the project promises, about a hundred times what was seen in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mtl_jax import attention, sharding
from mtl_jax.errors import UserError
from mtl_jax.kernels import bias, blocks
from mtl_jax.kernels.flash import IMPLEMENTATIONS, Call, flash_attention

HEADS, DIM = 2, 16
NAMES = ("o", "dq", "dk", "dv", "dtable")


def packed(rows, length, cuts, seed=0):
    """Segments of random lengths in order, and padding behind them: int32 [rows, length]."""
    random = np.random.RandomState(seed)
    out = np.zeros((rows, length), np.int32)
    for row in out:
        ends = np.sort(random.choice(np.arange(1, length + 1), min(cuts, length), replace=False))
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            row[start:end] = number
    return out


def inputs(queries, keys, *, rows=2, heads=HEADS, dim=DIM, buckets=32, seed=0):
    random = np.random.RandomState(seed)
    lengths = (queries, keys, keys, queries)
    q, k, v, do = (random.randn(rows, n, heads, dim).astype(np.float32) for n in lengths)
    return q / 2, k, v, random.randn(buckets, heads).astype(np.float32), do


def outputs(attend, q, k, v, table, do):
    """(o, dq, dk, dv and, with a bias, dtable) in one program."""

    def run(q, k, v, table, do):
        given = (q, k, v) if table is None else (q, k, v, table)
        o, backward = jax.vjp(
            lambda *x: attend(*x) if table is not None else attend(*x, None), *given
        )
        return o, *backward(do)

    return jax.jit(run)(q, k, v, table, do)


def flash(impl, q_segments, kv_segments, *, max_distance=128, size=None, **static):
    call = Call(
        max_distance=max_distance, impl=impl, interpret=impl != "xla", blocks=size, **static
    )
    return lambda q, k, v, table: flash_attention(call, q, k, v, table, q_segments, kv_segments)


def naive(q_segments, kv_segments, **static):
    return lambda q, k, v, table: attention.attend(
        q, k, v, table, q_segments, kv_segments, impl="naive", **static
    )


def error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    # Inputs are of order 1. Where there is one key to see, gradients are 0 up to rounding.
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 0.1)


def check(found, expected, tolerance):
    for name, a, b in zip(NAMES, found, expected, strict=False):
        assert error(a, b) <= tolerance, name
    assert len(found) == len(expected)


CASES = {
    "encoder": ((150, 150), {"causal": False, "bidirectional": True}, True, (64, 64)),
    "decoder": ((150, 150), {"causal": True, "bidirectional": False}, True, (64, 64)),
    "cross": ((70, 150), {"causal": False, "bidirectional": True}, False, (64, 64)),
    "own blocks": ((300, 300), {"causal": False, "bidirectional": True}, True, None),
    "causal, both directions": (
        (150, 150),
        {"causal": True, "bidirectional": True},
        True,
        (32, 32),
    ),
    "one direction, not causal": (
        (90, 90),
        {"causal": False, "bidirectional": False},
        True,
        (32, 64),
    ),
    "causal without a bias": ((90, 90), {"causal": True, "bidirectional": False}, False, (64, 32)),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_naive_autodiff(case, impl):
    (queries, keys), static, biased, size = CASES[case]
    *arrays, table, do = inputs(queries, keys)
    args = (*arrays, table if biased else None, do)
    kv_segments = packed(2, keys, 4)
    q_segments = kv_segments if queries == keys else packed(2, queries, 4, seed=1)
    expected = outputs(naive(q_segments, kv_segments, **static), *args)
    found = outputs(flash(impl, q_segments, kv_segments, size=size, **static), *args)
    check(found, expected, 1e-4)
    # Queries without a key: zeros, and no gradient.
    alone = q_segments == 0
    assert alone.any()
    assert not np.any(np.asarray(found[0])[alone])
    assert not np.any(np.asarray(found[1])[alone])
    if impl != "xla":
        plain = flash("xla", q_segments, kv_segments, size=size, **static)
        check(found, outputs(plain, *args), 1e-5)
    if biased:
        # A constant added to all logits of a query changes nothing, so rows of ds sum to 0.
        total = np.abs(np.asarray(found[4]).sum(axis=0)).max()
        assert total <= 1e-5 * np.abs(found[4]).sum()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_errs_no_more_than_naive(impl):
    static = {"causal": False, "bidirectional": True}
    *arrays, table, do = inputs(192, 192, dim=32)
    q, k, v, do = (jnp.asarray(x, jnp.bfloat16) for x in (*arrays, do))
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    segments = packed(2, 192, 3)
    reference = naive(segments, segments, **static)
    expected = outputs(reference, *wide, table, do.astype(jnp.float32))
    usual = outputs(reference, q, k, v, table, do)
    found = outputs(flash(impl, segments, segments, size=(64, 64), **static), q, k, v, table, do)
    for name, ours, theirs, exact in zip(NAMES, found, usual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, exact) <= 1.5 * error(theirs, exact), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_packed_row_equals_its_segments_alone(impl):
    static = {"causal": True, "bidirectional": False}
    q, k, v, table, do = inputs(192, 192, rows=1)
    segments = np.repeat([[1, 2, 3]], [50, 100, 42], axis=1).astype(np.int32)
    whole = outputs(flash(impl, segments, segments, size=(64, 64), **static), q, k, v, table, do)
    dtable = 0.0
    for number in (1, 2, 3):
        part = segments[0] == number
        ones = np.ones((1, part.sum()), np.int32)
        alone = flash(impl, ones, ones, size=(64, 64), **static)
        *found, own = outputs(alone, q[:, part], k[:, part], v[:, part], table, do[:, part])
        check([np.asarray(x)[:, part] for x in whole[:4]], found, 1e-6)
        dtable = dtable + np.asarray(own)
    check([whole[4]], [dtable], 2e-6)


@pytest.mark.slow
# Shrinking would compile for minutes; the same examples every time.
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_random_shapes_segments_and_buckets(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    queries, heads, dim = draw(1, 70), draw(1, 3), draw(1, 20)
    causal = data.draw(st.booleans())
    keys = queries if causal else draw(1, 70)
    buckets = 2 * draw(2, 20)
    static = {"causal": causal, "bidirectional": data.draw(st.booleans())}
    static["max_distance"] = buckets // 2 + draw(1, 60)
    shape = {"rows": draw(1, 2), "heads": heads, "dim": dim, "buckets": buckets}
    args = inputs(queries, keys, seed=draw(0, 99), **shape)
    size = data.draw(st.sampled_from([(16, 16), (16, 32), (32, 16)]))
    # Segments in any order, padding between them.
    seed = draw(0, 99)
    segments = [
        np.random.RandomState(seed + i).randint(0, 4, (shape["rows"], n)).astype(np.int32)
        for i, n in enumerate((queries, keys))
    ]
    segments[0] = segments[1] if queries == keys else segments[0]
    expected = outputs(naive(*segments, **static), *args)
    for impl in ("xla", "pallas_gpu"):
        check(outputs(flash(impl, *segments, size=size, **static), *args), expected, 1e-4)


@pytest.mark.slow
def test_two_runs_give_equal_bits():
    static = {"causal": False, "bidirectional": True}
    *args, do = inputs(100, 100)
    segments = packed(2, 100, 3)
    for impl in IMPLEMENTATIONS:
        run = flash(impl, segments, segments, size=(64, 64), **static)
        first, again = outputs(run, *args, do), outputs(run, *args, do)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("q", "k"), [(64, 64), (128, 64), (64, 128), (16, 16), (32, 128)])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_near_blocks_are_those_whose_bias_is_not_one_constant(q, k, bidirectional, causal):
    near = blocks.Near(q, k, causal, bidirectional, max_distance=128)
    length = 512
    bucket = bias.relative_position_bucket(
        np.arange(length)[None, :] - np.arange(length)[:, None],
        bidirectional=bidirectional,
        num_buckets=32,
        max_distance=128,
    )
    for i in range(length // q):
        start, stop = (int(x) for x in near.keys_of(jnp.int32(i)))
        for j in range(length // k):
            tile = np.asarray(bucket[i * q : (i + 1) * q, j * k : (j + 1) * k])
            index = int(near.index(jnp.int32(i), jnp.int32(j)))
            inside = 0 <= index < near.count
            assert inside == (start <= j < stop)
            first, last = (int(x) for x in near.queries_of(jnp.int32(j)))
            assert inside == (first <= i < last)
            seen = tile if not causal else tile[np.tril(np.ones((q, k), bool), i * q - j * k)]
            if not inside and seen.size:
                assert np.all(seen == seen.flat[0]), (i, j)


def test_dropout_drops_the_same_in_every_implementation():
    q, k, v, table, do = inputs(150, 150)
    segments = packed(2, 150, 3)
    rng = jax.random.key(3)

    def attend(impl, *args):
        return attention.attend(
            *args, segments, segments, dropout_rate=0.5, dropout_rng=rng, impl=impl
        )

    found = {
        impl: outputs(functools.partial(attend, impl), q, k, v, table, do)
        for impl in ("naive", "xla")
    }
    check(found["xla"], found["naive"], 1e-5)
    kept = np.asarray(found["naive"][3]) != 0  # dv of a dropped key is 0
    real = np.broadcast_to((segments > 0)[:, :, None, None], kept.shape)
    assert 0.4 < kept[real].mean() < 0.6
    plain = attention.attend(q, k, v, table, segments, segments, impl="xla")
    assert error(found["xla"][0], plain) > 0.1


@pytest.mark.parametrize("impl", ["xla", "auto"])
def test_shards_give_the_numbers_of_one_device(impl, monkeypatch):
    monkeypatch.setattr(attention, "NAIVE_PAIRS", 0)  # "auto" takes the loops, short as rows are
    q, k, v, table, do = inputs(40, 40, rows=4, heads=2)
    segments = packed(4, 40, 3)

    def attend(*args):
        return attention.attend(*args, segments, segments, impl=impl)

    expected = outputs(attend, q, k, v, table, do)
    for sizes in ((4, 1, 2), (2, 2, 2), (8, 1, 1)):  # 4 rows do not divide by 8: whole everywhere
        mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
        with sharding.on_mesh(mesh):
            check(outputs(attend, q, k, v, table, do), expected, 1e-5)


def test_memory_grows_linearly():
    def temp(length, impl):
        shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        table = jax.ShapeDtypeStruct((32, 4), jnp.float32)
        segments = jnp.ones((1, length), jnp.int32)

        def run(q, k, v, table, do):
            attend = functools.partial(attention.attend, impl=impl)
            o, backward = jax.vjp(lambda *x: attend(*x, segments, segments), q, k, v, table)
            return o, *backward(do)

        program = jax.jit(run).lower(shape, shape, shape, table, shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    lengths = np.array([1024, 2048, 4096, 8192])
    used = [temp(int(length), "xla") for length in lengths]
    exponent = np.polyfit(np.log(lengths), np.log(used), 1)[0]
    assert exponent <= 1.15
    assert temp(1024, "naive") >= 4 * used[0]


def test_what_is_chosen_and_wrong_names():
    chosen = attention.chosen
    assert chosen("auto", 64, 64) == "naive"
    assert chosen("auto", 2048, 2048) == "xla"
    assert chosen("xla", 1, 1) == "xla"
    with attention.platform("tpu"):
        assert chosen("auto", 64, 64) == chosen("pallas", 64, 64) == "pallas_tpu"
    with attention.platform("gpu"):
        assert chosen("auto", 64, 64) == "pallas_gpu"
        assert chosen("naive", 64, 64) == "naive"
    with pytest.raises(UserError, match=r'"pallas" has no kernel for "cpu"'):
        chosen("pallas", 64, 64)
    with pytest.raises(UserError, match="must be one of auto, naive"):
        chosen("palas", 64, 64)

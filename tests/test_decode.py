"""Decoding against golden numbers (T5X) and against teacher forcing one target at a time."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import buckets, decode, model

SEGMENTS = (golden.ENCODER > 0).astype(np.int32)
INPUTS = golden.ENCODER.astype(np.int32)
# notes on T5X, section 4b: score_batch and greedy decoding of the golden rows.
SCORES = {"1.1": [-25.00817, -16.36047, -9.46516], "1.0": [-23.92179, -18.36723, -6.88765]}
GREEDY = {
    "1.1": [[10, 9, 1, 0, 0, 0, 0, 0], [2, 20, 9, 26, 6, 9, 26, 6], [8, 9, 26, 14, 20, 9, 26, 9]],
    "1.0": [[0] * 8, [13] * 8, [24] * 8],
}


@pytest.fixture(autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def _model(version):
    cfg = golden.config(version)
    return cfg, golden.params(cfg)


@functools.partial(jax.jit, static_argnums=0)
def _teacher_forced(cfg, params, inputs, shifted):
    ones, ones_input = jnp.ones_like(shifted), jnp.ones_like(inputs)
    encoded = model.encode(cfg, params, inputs, ones_input)
    hidden = model.decode(
        cfg,
        params,
        encoded,
        shifted,
        segments_BT=ones,
        cross_segments_BT=ones,
        encoder_segments_BL=ones_input,
    )
    return model.logits(cfg, params, hidden)


def _alone(cfg, params, inputs, target):
    """Witness: one input, one target, teacher forced, log-softmax written out in float64."""
    inputs = jnp.asarray([inputs], jnp.int32)
    # Zeros behind the target change nothing before them and spare a compilation for each length.
    shifted = jnp.asarray([[0, *target[:-1], *[0] * (6 - len(target))]], jnp.int32)
    logits = np.asarray(_teacher_forced(cfg, params, inputs, shifted)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[t, token] for t, token in enumerate(target))


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_one_choice_gets_the_golden_log_likelihood(version):
    cfg, params = _model(version)
    targets = [[row[row > 0].tolist()] for row in golden.TARGETS]
    packed = decode.pack_choices(targets, *golden.TARGETS.shape)
    score = jax.jit(functools.partial(decode.score_choices, cfg, num_choices=1))
    scores, tokens, _ = score(params, INPUTS, SEGMENTS, *packed)
    np.testing.assert_allclose(scores[:, 0], SCORES[version], atol=2e-5)
    assert tokens.tolist() == [[6], [4], [2]]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_greedy_gives_the_golden_tokens(version):
    cfg, params = _model(version)
    run = jax.jit(functools.partial(decode.greedy, cfg, max_length=8))
    assert run(params, INPUTS, SEGMENTS).tolist() == GREEDY[version]


def test_greedy_stops_when_all_rows_have_ended(monkeypatch):
    cfg, params = _model("1.1")
    steps, plain = [], decode.incremental.decode_step

    def counted(cfg, params, cache, tokens_B, index):
        jax.debug.callback(lambda i: steps.append(int(i)), index)
        return plain(cfg, params, cache, tokens_B, index)

    monkeypatch.setattr(decode.incremental, "decode_step", counted)
    # Row 1 ends after three tokens; an empty row beside it must not keep the loop running.
    inputs = np.concatenate([INPUTS[:1], np.zeros_like(INPUTS[:1])])
    run = jax.jit(lambda *args: decode.greedy(cfg, *args, max_length=8))
    tokens = run(params, inputs, (inputs > 0).astype(np.int32))
    jax.effects_barrier()
    assert tokens.tolist() == [[10, 9, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert sorted(steps) == [0, 1, 2]


CHOICES = [
    [[19, 10, 15, 1], [29, 1], [27, 9, 22, 14, 3, 1]],
    [[4, 1]],
    [[5, 6, 1], [5, 6, 7, 1]],
]


def _score_function():
    cfg, _ = _model("1.1")
    return jax.jit(lambda *args: decode.score_choices(cfg, *args, num_choices=4))


_shared_score_function = functools.cache(_score_function)


def _packed_scores(choices, score=None):
    packed = decode.pack_choices(choices, 4, 16)
    inputs = buckets.pad_rows([row[row > 0] for row in INPUTS], 4, 9)
    score = score or _shared_score_function()
    return score(_model("1.1")[1], inputs, (inputs > 0).astype(np.int32), *packed)


def test_packed_choices_score_as_if_each_were_alone():
    scores, tokens, last = _packed_scores(CHOICES)
    cfg, params = _model("1.1")
    expected, lengths, before = np.zeros((4, 4)), np.zeros((4, 4), int), np.zeros((4, 4))
    for i, row in enumerate(CHOICES):
        for c, target in enumerate(row):
            expected[i, c] = _alone(cfg, params, INPUTS[i][SEGMENTS[i] > 0], target)
            before[i, c] = _alone(cfg, params, INPUTS[i][SEGMENTS[i] > 0], target[:-1])
            lengths[i, c] = len(target)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    # Teacher forced, so the sum up to a token is that of the target without those behind it.
    np.testing.assert_allclose(last, expected - before, atol=1e-5)
    np.testing.assert_array_equal(tokens, lengths)


def test_scores_do_not_depend_on_the_order_of_packing():
    straight, *_ = _packed_scores(CHOICES)
    backward, *_ = _packed_scores([row[::-1] for row in CHOICES])
    for i, row in enumerate(CHOICES):
        n = len(row)
        np.testing.assert_allclose(backward[i, :n][::-1], straight[i, :n], atol=1e-5)


def test_slices_of_the_logits_change_nothing(monkeypatch):
    whole, *_ = _packed_scores(CHOICES)
    cfg, _ = _model("1.1")
    largest, plain = [], model.logits

    def watched(cfg, params, hidden_BTD):
        largest.append(hidden_BTD.shape[1])
        return plain(cfg, params, hidden_BTD)

    monkeypatch.setattr(decode.model, "logits", watched)
    monkeypatch.setattr(decode, "_LOGITS_BYTES", 4 * 4 * cfg.vocab_size * 5)  # 5 positions fit
    sliced, *_ = _packed_scores(CHOICES, _score_function())
    assert max(largest) == 4  # the largest divisor of 16 that fits
    np.testing.assert_allclose(sliced, whole, atol=1e-6)


def test_pack_choices_layout():
    inputs, targets, segments = decode.pack_choices([[[5, 1], [6, 7, 1]]], count=2, length=6)
    assert inputs.tolist() == [[0, 5, 0, 6, 7, 0], [0] * 6]
    assert targets.tolist() == [[5, 1, 6, 7, 1, 0], [0] * 6]
    assert segments.tolist() == [[1, 1, 2, 2, 2, 0], [0] * 6]

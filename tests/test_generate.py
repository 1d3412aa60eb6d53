"""Generation with the whole model: golden numbers, and what greedy, samples and beams share."""

import dataclasses
import functools

import golden
import jax
import numpy as np
import pytest

from mtl_jax import decode, model, sharding, stop_strings
from mtl_jax.decode import GenerateConfig
from mtl_jax.errors import UserError
from mtl_jax.sharding import MeshConfig

INPUTS = golden.ENCODER.astype(np.int32)
SEGMENTS = (INPUTS > 0).astype(np.int32)
# notes on T5X, section 4b: beam 3, alpha 0.6, 8 steps.
BEAMS = {
    "1.1": [
        ([10, 9, 1], -5.36869),
        ([23, 20, 9, 26, 6, 9, 26, 6], -12.58589),
        ([8, 9, 1], -4.77249),
    ],
    "1.0": [([10] * 8, -10.85322), ([21] * 8, -4.93681), ([30] + [18] * 7, -11.53623)],
}
GREEDY = GenerateConfig(max_length=8)
SAMPLE = GenerateConfig(method="sample", max_length=8, num_return=3, top_k=12, top_p=0.9, seed=5)
BEAM = GenerateConfig(
    method="beam",
    max_length=8,
    num_beams=3,
    num_return=3,
    length_penalty="hugging_face",
    length_alpha=0.0,
)
# Greedy decoding and sampling share all but the choice of a token.
BOTH = pytest.mark.parametrize("method", [SAMPLE, BEAM], ids=lambda c: c.method)
METHODS = pytest.mark.parametrize("method", [GREEDY, SAMPLE, BEAM], ids=lambda c: c.method)

_jitted = jax.jit(decode.generate, static_argnums=(0, 1))


@pytest.fixture(autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def _params(cfg):
    return golden.params(cfg)


def _generate(config, inputs=INPUTS, version="1.1", model_changes=(), **arguments):
    cfg = golden.config(version, **dict(model_changes))
    segments = (inputs > 0).astype(np.int32)
    return jax.device_get(_jitted(cfg, config, _params(cfg), inputs, segments, **arguments))


def _made(found):
    """Tokens of each continuation of each row, without padding."""
    return [
        [tokens[:length].tolist() for tokens, length in zip(*row, strict=True)]
        for row in zip(found.tokens, found.lengths, strict=True)
    ]


_jitted_score = jax.jit(decode.score, static_argnums=0)


def _scored(tokens, lengths=None):
    """Log-probabilities of continuations of the golden inputs, teacher forced."""
    cfg = golden.config("1.1")
    return jax.device_get(_jitted_score(cfg, _params(cfg), INPUTS, SEGMENTS, tokens, lengths))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_beam_search_gives_the_golden_tokens_and_scores(version, scan_layers):
    config = GenerateConfig(method="beam", num_beams=3, max_length=8)
    found = _generate(config, version=version, model_changes=(("scan_layers", scan_layers),))
    assert _made(found) == [[tokens] for tokens, _ in BEAMS[version]]
    np.testing.assert_allclose(found.scores[:, 0], [s for _, s in BEAMS[version]], atol=2e-5)


@METHODS
def test_log_probabilities_are_those_of_teacher_forcing(method):
    found = _generate(method)
    for r in range(method.num_return):
        sums, log_probs = _scored(found.tokens[:, r], found.lengths[:, r])
        np.testing.assert_allclose(found.log_probs[:, r], log_probs, atol=2e-5)
        np.testing.assert_allclose(found.scores[:, r], sums, atol=2e-5)


def test_score_gives_the_golden_log_likelihoods():
    sums, log_probs = _scored(golden.TARGETS.astype(np.int32))
    np.testing.assert_allclose(sums, [-25.00817, -16.36047, -9.46516], atol=2e-5)
    np.testing.assert_allclose(log_probs.sum(-1), sums, rtol=1e-6)
    assert (log_probs[golden.TARGETS == 0] == 0).all()


@METHODS
def test_the_best_comes_first_and_padding_follows_the_end(method):
    found = _generate(method)
    assert (np.diff(found.scores, axis=-1) <= 0).all()
    real = np.arange(8) < found.lengths[..., None]
    assert (found.tokens[~real] == 0).all()
    assert (found.log_probs[~real] == 0).all()
    assert (found.log_probs[real] < 0).all()
    for row in _made(found):
        assert all(len(tokens) == 8 or tokens[-1] == 1 for tokens in row)


@BOTH
def test_a_row_does_not_depend_on_its_batch(method):
    together = _generate(method)
    # Alone, wider, behind an empty row, and at another place, but with its own number.
    wide = np.zeros((3, 9), np.int32)
    wide[1, :7] = INPUTS[2]
    alone = _generate(method, wide, rows_B=np.array([7, 2, 9], np.int32))
    assert _made(alone)[1] == _made(together)[2]
    np.testing.assert_allclose(alone.scores[1], together.scores[2], atol=1e-5)
    for empty in (0, 2):
        assert _made(alone)[empty] == [[]] * method.num_return
        assert (alone.scores[empty] == -np.inf).all()
        assert not alone.tokens[empty].any()


def test_samples_depend_on_seed_and_row_number():
    found = _made(_generate(SAMPLE))
    assert found == _made(_generate(SAMPLE))
    same = np.repeat(INPUTS[:1], 3, axis=0)
    rows = _made(_generate(SAMPLE, same))
    assert rows[0] == found[0]
    assert len({str(row) for row in rows}) == 3
    other = dataclasses.replace(SAMPLE, seed=6)
    assert _made(_generate(other)) != found
    assert _made(_generate(SAMPLE, seed=np.uint32(6))) == _made(_generate(other))


def test_sampling_among_the_best_one_is_greedy():
    one = dataclasses.replace(SAMPLE, num_return=1, top_k=1, top_p=1.0)
    assert _made(_generate(one)) == _made(_generate(GREEDY))
    nucleus = dataclasses.replace(one, top_k=0, top_p=1e-6)
    assert _made(_generate(nucleus)) == _made(_generate(GREEDY))


def test_one_beam_of_hugging_faces_is_greedy():
    one = dataclasses.replace(BEAM, num_beams=1, num_return=1)
    assert _made(_generate(one)) == _made(_generate(GREEDY))


@BOTH
def test_the_end_of_sequence_waits_for_the_shortest_length(method):
    assert _generate(method).lengths.min() < 5
    found = _generate(dataclasses.replace(method, min_length=5))
    assert found.lengths.min() >= 6  # five, then the end
    assert all(1 not in tokens[:5] for row in _made(found) for tokens in row)


@BOTH
def test_a_prefix_is_continued(method):
    # Ragged: none, one token, three.
    prefix = np.array([[0, 0, 0], [9, 0, 0], [4, 0, 22]], np.int32)
    found = _generate(method, prefix_BP=prefix)
    lengths = np.array([0, 1, 3])
    for r in range(method.num_return):
        whole = np.zeros((3, 11), np.int32)
        for i, n in enumerate(lengths):
            whole[i, :n] = prefix[i, :n]
            whole[i, n : n + 8] = found.tokens[i, r]
        _, log_probs = _scored(whole, lengths + found.lengths[:, r])
        # The prefix is not scored.
        np.testing.assert_allclose(found.scores[:, r], found.log_probs[:, r].sum(-1), atol=2e-5)
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(found.log_probs[i, r], log_probs[i, n : n + 8], atol=2e-5)
    assert found.lengths[1:].max() == 8  # the prefix is not counted
    # A row is continued as if it were alone, and one without a prefix as if no row had one.
    assert _made(found)[0] == _made(_generate(method))[0]
    for i in (1, 2):
        row = slice(i, i + 1)
        number = np.array([i], np.int32)
        alone = _generate(method, INPUTS[row], prefix_BP=prefix[row], rows_B=number)
        assert _made(alone)[0] == _made(found)[i]
        assert _made(found)[i] != _made(_generate(method))[i]


# Token v adds the letters of v in base 3, and nothing below 3; one column less than the embedding.
PIECES = ["", "", "", *(np.base_repr(v, 3) for v in range(3, 31))]


def _text(tokens):
    return "".join(PIECES[token] if token < len(PIECES) else "" for token in tokens)


@METHODS
def test_a_stop_string_ends_a_continuation(method):
    stop = ("02", "1110", "22")
    config = dataclasses.replace(method, stop=stop, max_length=16)
    found = _generate(config, stop_table=stop_strings.table(PIECES, stop))
    ends = {"stop": 0, "eos": 0, "length": 0}
    for row in _made(found):
        for tokens in row:
            assert not any(s in _text(tokens[:-1]) for s in stop)
            stopped = any(s in _text(tokens) for s in stop)
            ends["stop" if stopped else "eos" if tokens[-1] == 1 else "length"] += 1
            assert stopped or tokens[-1] == 1 or len(tokens) == 16
    assert ends["stop"] >= 2
    if method.method == "greedy":  # the same tokens, only fewer
        free = _made(_generate(dataclasses.replace(method, max_length=16)))
        for ours, whole in zip(_made(found), free, strict=True):
            assert ours[0] == whole[0][: len(ours[0])]


def test_stop_strings_and_their_table_go_together():
    with pytest.raises(UserError, match=r"Generate\.stop and stop_table go together"):
        _generate(dataclasses.replace(GREEDY, stop=["a"]))
    with pytest.raises(UserError, match=r"Generate\.stop and stop_table go together"):
        _generate(GREEDY, stop_table=stop_strings.table(PIECES, ["1"]))


@BOTH
def test_each_row_may_have_its_own_end_of_sequence(method):
    free = _made(_generate(method, eos_id=np.full(3, -1, np.int32)))
    assert all(len(tokens) == 8 for row in free for tokens in row)
    mixed = _generate(method, eos_id=np.array([1, -1, 9], np.int32))
    assert _made(mixed)[0] == _made(_generate(method))[0]
    assert _made(mixed)[1] == free[1]
    assert all(tokens[-1] == 9 or len(tokens) == 8 for tokens in _made(mixed)[2])
    assert all(9 not in tokens[:-1] for tokens in _made(mixed)[2])


def test_bfloat16():
    found = _generate(BEAM, model_changes=(("dtype", "bfloat16"),))
    assert found.scores.dtype == found.log_probs.dtype == np.float32
    for r in range(BEAM.num_return):
        _, log_probs = _scored(found.tokens[:, r], found.lengths[:, r])  # in float32
        np.testing.assert_allclose(found.log_probs[:, r], log_probs, atol=0.15)


@pytest.mark.parametrize(
    ("method", "scan_layers"), [(SAMPLE, True), (BEAM, False)], ids=["sample-scan", "beam-unrolled"]
)
def test_a_mesh_changes_nothing_and_shards_the_cache(method, scan_layers, monkeypatch):
    inputs = np.concatenate([INPUTS, INPUTS[::-1], INPUTS[:2]])
    expected = _generate(method, inputs)
    cfg = golden.config("1.1", scan_layers=scan_layers)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(_params(cfg), sharding.params_shardings(mesh, model.param_axes(cfg)))
    parts, plain = [], decode.incremental.decode_step

    def inspected(cfg, params, cache, tokens_BR, position):
        for leaf in jax.tree.leaves(cache):
            if leaf.dtype == np.float32:
                jax.debug.inspect_array_sharding(
                    leaf,
                    callback=lambda s, leaf=leaf: parts.append(
                        leaf.size // int(np.prod(s.shard_shape(leaf.shape)))
                    ),
                )
        return plain(cfg, params, cache, tokens_BR, position)

    monkeypatch.setattr(decode.incremental, "decode_step", inspected)
    with sharding.on_mesh(mesh):
        batch = sharding.put_batch(
            mesh, {"inputs": inputs, "segments": (inputs > 0).astype(np.int32)}
        )
        run = jax.jit(functools.partial(decode.generate, cfg, method))
        found = jax.device_get(run(params, batch["inputs"], batch["segments"]))
    assert _made(found) == _made(expected)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    # Keys and values of inputs and of what is generated: rows over four, heads over two devices.
    assert parts
    assert set(parts) == {8}

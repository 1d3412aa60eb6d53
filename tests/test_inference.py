"""`mtl_jax.load`: the same as the functions below it, whatever the batch and the mesh."""

import functools

import jax
import jax.numpy as jnp
import loadable
import numpy as np
import pytest

import mtl_jax
from mtl_jax import decode, model, sharding
from mtl_jax.errors import UserError
from mtl_jax.generate_config import GenerateConfig

TEXTS = ["hello", "a rather longer input than the others", "b", "what is it?", "", "hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return loadable.save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loaded(folder):
    return mtl_jax.load(folder, mesh=sharding.MeshConfig(data=8))


@functools.cache
def alone(text, **options):
    """Witness: one text in one row, without padding, by `decode.generate`."""
    cfg = GenerateConfig(**options)
    tokens = jnp.asarray([[byte + 3 for byte in text.encode()] + [1]], jnp.int32)
    run = jax.jit(functools.partial(decode.generate, loadable.CFG, cfg))
    return run(loadable.params(), tokens, jnp.ones_like(tokens))


def text_of(tokens):
    kept = [t for t in np.asarray(tokens).tolist() if t]
    kept = kept[: kept.index(1)] if 1 in kept else kept
    return bytes(t - 3 for t in kept if 3 <= t < 259).decode(errors="ignore")


def test_greedy_texts_are_those_of_single_rows(loaded):
    found = loaded.generate(TEXTS, max_length=12, batch_size=4)
    assert found == [text_of(alone(text, max_length=12).tokens[0, 0]) for text in TEXTS]
    assert len(set(found)) > 2
    assert loaded.step == 7


def test_beams_come_best_first_with_their_scores(loaded):
    options = {"method": "beam", "num_beams": 3, "num_return": 2, "max_length": 8}
    found = loaded.predict(TEXTS[:2], GenerateConfig(**options))
    for text, predictions in zip(TEXTS, found, strict=False):
        witness = alone(text, **options)
        np.testing.assert_allclose([p.score for p in predictions], witness.scores[0], rtol=1e-4)
        assert [p.text for p in predictions] == [text_of(tokens) for tokens in witness.tokens[0]]
        for p, length in zip(predictions, witness.lengths[0], strict=True):
            assert len(p.tokens) == len(p.log_probs) == length
    assert loaded.generate(TEXTS[:2], **options) == [[p.text for p in row] for row in found]


def test_samples_depend_on_seed_and_number_alone(loaded):
    config = GenerateConfig(method="sample", max_length=8, num_return=2, seed=3)
    whole = loaded.predict(TEXTS, config)
    parts = loaded.predict(TEXTS[:2], config) + loaded.predict(TEXTS[2:], config, first_row=2)
    texts = lambda rows: [[p.text for p in row] for row in rows]  # noqa: E731
    assert texts(whole) == texts(parts)
    assert whole[0][0].text != whole[5][0].text  # the same input, another number
    other = loaded.generate(TEXTS, method="sample", max_length=8, num_return=2, seed=4)
    assert other != texts(whole)


def test_scores_are_sums_over_the_tokens_of_the_target(loaded):
    targets = ["yes", "no", "perhaps", "", "é", "yes"]
    scores = loaded.score(TEXTS, targets, batch_size=8)
    several = loaded.score(TEXTS, [[t, "another"] for t in targets])
    np.testing.assert_allclose(scores, [row[0] for row in several], rtol=1e-5)
    run = jax.jit(functools.partial(decode.score, loadable.CFG))
    for i in (1, 4):
        rows = [
            jnp.asarray([[byte + 3 for byte in text.encode()] + [1]], jnp.int32)
            for text in (TEXTS[i], targets[i])
        ]
        total, _ = run(loadable.params(), rows[0], jnp.ones_like(rows[0]), rows[1])
        np.testing.assert_allclose(scores[i], total[0], rtol=1e-4)


def test_what_is_generated_scores_its_own_log_probability(loaded):
    (prediction,) = loaded.predict(["hello"], GenerateConfig(max_length=64))[0]
    assert prediction.tokens[-1] == 1, "this witness needs an end of sequence"
    score = loaded.score(["hello"], [prediction.text])
    np.testing.assert_allclose(prediction.score, score[0], rtol=1e-4)
    np.testing.assert_allclose(sum(prediction.log_probs), score[0], rtol=1e-4)


def test_embeddings_are_means_over_real_tokens(loaded):
    vectors = loaded.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), loadable.CFG.emb_dim)
    np.testing.assert_allclose(vectors[0], vectors[5], rtol=1e-5)
    tokens = jnp.asarray([[b + 3 for b in b"hello"] + [1]], jnp.int32)
    encoded = model.encode(loadable.CFG, loadable.params(), tokens, jnp.ones_like(tokens))
    np.testing.assert_allclose(vectors[0], encoded[0].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_a_text_ends_before_its_stop_string(loaded):
    wholes = loaded.generate(TEXTS, max_length=12)
    whole = max(wholes, key=len)
    stop = whole[2:4]
    assert len(stop) == 2, "this witness needs four letters"
    (found,) = loaded.predict([TEXTS[wholes.index(whole)]], GenerateConfig(stop=[stop]))[0]
    assert found.text == whole[: whole.index(stop)]
    assert len(found.tokens) == whole.index(stop) + 2


def test_a_row_without_a_hypothesis_is_an_empty_text(loaded):
    none = decode.Generated(
        tokens=np.zeros((1, 3), np.int32),
        lengths=np.zeros(1, np.int32),
        scores=np.full(1, -np.inf, np.float32),
        log_probs=np.zeros((1, 3), np.float32),
    )
    (prediction,) = loaded._predictions(none, GenerateConfig(method="beam"))
    assert (prediction.text, prediction.tokens, prediction.score) == ("", [], -np.inf)
    assert loaded._predictions(none, GenerateConfig(method="beam", num_return=2)) == []


def test_outputs_continue_their_prefixes(loaded):
    """Forced onto its own beginning, the model goes on as it did."""
    whole = loaded.predict(TEXTS[:2], GenerateConfig(max_length=10))
    prefixes = [row[0].text[:3] for row in whole]
    rest = loaded.generate(TEXTS[:2], prefixes=prefixes, max_length=7)
    assert [p + r for p, r in zip(prefixes, rest, strict=True)] == [row[0].text for row in whole]


@pytest.mark.parametrize(
    "mesh", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
def test_sharded_models_say_the_same(folder, loaded, mesh):
    sharded = mtl_jax.load(folder, mesh=sharding.MeshConfig(*mesh))
    kernel = sharded.params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (mesh[1] * mesh[2])
    beam = {"method": "beam", "num_beams": 2, "max_length": 6}
    assert sharded.generate(TEXTS, **beam) == loaded.generate(TEXTS, **beam)
    np.testing.assert_allclose(
        sharded.score(TEXTS, TEXTS), loaded.score(TEXTS, TEXTS), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_and_scanned_layers(folder, loaded):
    halved = mtl_jax.load(folder, dtype="bfloat16", scan_layers=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(halved.params)} == {jnp.dtype("bfloat16")}
    assert all(isinstance(text, str) for text in halved.generate(TEXTS, max_length=4))
    close, exact = halved.score(TEXTS, TEXTS), loaded.score(TEXTS, TEXTS)
    np.testing.assert_allclose(close, exact, rtol=0.1, atol=0.5)  # 8 bits


def test_few_shapes_are_compiled(folder, monkeypatch):
    fresh, traced, plain = mtl_jax.load(folder), [], model.encode

    def counted(cfg, params, tokens, segments):
        traced.append(tokens.shape)  # once for every shape that is compiled
        return plain(cfg, params, tokens, segments)

    monkeypatch.setattr(model, "encode", counted)
    fresh.embed(["x" * n for n in range(100)], batch_size=8)
    fresh.embed(["x" * n for n in range(0, 100, 3)], batch_size=8)
    lengths = (16, 24, 32, 48, 64, 96, 128)
    assert sorted(traced) == [(8, length) for length in lengths]


def test_long_inputs_are_cut_and_counted(folder):
    short = mtl_jax.load(folder, inputs_length=4)
    vectors = short.embed(["abcdef", "abcxyz", "ab"])
    assert short.truncated == 2
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=1e-6)


def test_mistakes_are_told(folder, loaded, tmp_path):
    with pytest.raises(UserError, match="There are 1 texts but 2 targets"):
        loaded.score(["a"], ["b", "c"])
    with pytest.raises(UserError, match="must be a list of texts, not one text"):
        loaded.score("a", ["b"])
    with pytest.raises(UserError, match="must be a list of texts, not one text"):
        loaded.generate("a")
    with pytest.raises(UserError, match="Input 1 has no targets"):
        loaded.score(["a", "b"], [["c"], []])
    with pytest.raises(UserError, match=r"no field 'beams'.*Did you mean 'num_beams'"):
        loaded.generate(["a"], beams=2)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        loaded.embed(["a"], batch_size=0)
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        mtl_jax.load(folder, tokenizer_folder=tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint of step 3"):
        mtl_jax.load(folder, step=3)
    large = tmp_path / "large"
    large.mkdir()
    (large / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}'
    )
    with pytest.raises(UserError, match="has 384 ids but the model only 264"):
        mtl_jax.load(folder, tokenizer_folder=large)


def test_nothing_in_gives_nothing_out(loaded):
    assert loaded.generate([]) == []
    assert loaded.embed([]).shape == (0, loadable.CFG.emb_dim)
    assert loaded.score([], []).shape == (0,)

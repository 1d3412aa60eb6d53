"""Generation against Hugging Face's, token by token, for each family of T5."""

import functools

import hf_models
import jax
import numpy as np
import pytest

from mtl_jax import decode, sampling
from mtl_jax.decode import GenerateConfig

pytestmark = pytest.mark.torch
ROWS, LENGTH, MAX_LENGTH = 8, 6, 10

_jitted = jax.jit(decode.generate, static_argnums=(0, 1))


@pytest.fixture(autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def _models(family):
    hf_model = hf_models.tiny(family)
    return hf_model, *hf_models.ours(hf_model)


def _inputs():
    random = np.random.RandomState(0)
    tokens = random.randint(2, 60, (ROWS, LENGTH)).astype(np.int32)
    lengths = random.randint(2, LENGTH + 1, (ROWS, 1))
    return np.where(np.arange(LENGTH)[None] < lengths, tokens, 0)


def _theirs(family, eos_id, prefix=None, **options):
    """Tokens [rows, returned] as lists up to their end, and scores."""
    import torch

    hf_model, inputs = _models(family)[0], _inputs()
    prefix = np.zeros((ROWS, 0), np.int32) if prefix is None else prefix
    start = np.pad(prefix, ((0, 0), (1, 0)))
    found = hf_model.generate(
        input_ids=torch.tensor(inputs, dtype=torch.long),
        attention_mask=torch.tensor(inputs > 0, dtype=torch.long),
        decoder_input_ids=torch.tensor(start, dtype=torch.long),
        max_new_tokens=MAX_LENGTH,
        eos_token_id=eos_id,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    made = [_ended(row, eos_id) for row in found.sequences[:, start.shape[1] :].tolist()]
    count = len(made) // ROWS
    tokens = [made[i * count : (i + 1) * count] for i in range(ROWS)]
    if options["num_beams"] == 1:
        log_probs = hf_model.compute_transition_scores(
            found.sequences, found.scores, normalize_logits=True
        ).numpy()
        scores = np.array(
            [[row[: len(t[0])].sum()] for row, t in zip(log_probs, tokens, strict=True)]
        )
    else:
        scores = found.sequences_scores.numpy().reshape(ROWS, count)
    return tokens, scores


def _ended(tokens, eos_id):
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


def _ours(family, eos_id, config, prefix=None):
    _, cfg, params = _models(family)
    inputs = _inputs()
    found = jax.device_get(
        _jitted(
            cfg,
            config,
            params,
            inputs,
            (inputs > 0).astype(np.int32),
            eos_id=np.full(ROWS, eos_id, np.int32),
            prefix_BP=prefix,
        )
    )
    tokens = [
        [made[:length].tolist() for made, length in zip(*row, strict=True)]
        for row in zip(found.tokens, found.lengths, strict=True)
    ]
    return tokens, found.scores


@functools.cache
def _eos_ids(family):
    """Tokens that these models often make, so that many continuations end with them."""
    config = GenerateConfig(method="beam", max_length=MAX_LENGTH, num_return=4)
    tokens, _ = _ours(family, -1, config)
    made = np.array([t for row in tokens for t in row]).ravel()
    counts = np.bincount(made)
    counts[0] = 0  # padding
    return np.argsort(-counts, kind="stable")[:3].tolist()


def _compare(family, eos_id, config, prefix=None, **options):
    ours, our_scores = _ours(family, eos_id, config, prefix)
    theirs, their_scores = _theirs(family, eos_id, prefix, **options)
    width = MAX_LENGTH
    padded = [[(t + [-1] * width)[:width] for t in row] for row in theirs]
    assert [[(t + [-1] * width)[:width] for t in row] for row in ours] == padded
    # 1e-4 of a log probability, which a penalty below 0 multiplies by a power of the length.
    times = MAX_LENGTH ** max(0.0, -options.get("length_penalty", 0.0))
    np.testing.assert_allclose(our_scores, their_scores, atol=1e-4 * times)
    return ours


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_greedy_is_identical(family):
    eos_id = _eos_ids(family)[0]
    config = GenerateConfig(max_length=MAX_LENGTH)
    _compare(family, eos_id, config, num_beams=1, do_sample=False)


def _beams(alpha, early, **changes):
    options = dict(method="beam", length_penalty="hugging_face", max_length=MAX_LENGTH)
    stopping = dict(length_alpha=alpha, early_stopping=early)
    return GenerateConfig(**options, num_return=4, **stopping, **changes)


EARLY = {"heuristic": False, "when_full": True, "never": "never"}


@pytest.mark.parametrize("family", hf_models.FAMILIES)
@pytest.mark.parametrize("early", EARLY)
def test_four_beams_are_identical(family, early):
    lengths = set()
    for eos_id in _eos_ids(family):
        found = _compare(
            family,
            eos_id,
            _beams(1.0, early),
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            length_penalty=1.0,
            early_stopping=EARLY[early],
        )
        lengths |= {len(tokens) for row in found for tokens in row}
    assert len(lengths) > 2  # some have ended early


@pytest.mark.parametrize(
    ("alpha", "early"),
    [(0.0, "heuristic"), (2.0, "heuristic"), (2.0, "never"), (-0.5, "never"), (0.5, "when_full")],
)
def test_length_penalties_are_identical(alpha, early):
    for eos_id in _eos_ids("t5_1_1"):
        _compare(
            "t5_1_1",
            eos_id,
            _beams(alpha, early),
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            length_penalty=alpha,
            early_stopping=EARLY[early],
        )


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_beams_behind_a_prefix_are_identical(family):
    prefix = np.random.RandomState(1).randint(2, 60, (ROWS, 3)).astype(np.int32)
    for eos_id in _eos_ids(family):
        _compare(
            family,
            eos_id,
            _beams(1.0, "heuristic", min_length=3),
            prefix,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            length_penalty=1.0,
            early_stopping=False,
            min_new_tokens=3,
        )


@pytest.mark.parametrize("family", ["t5_1_1", "byt5"])
def test_greedy_behind_a_prefix_is_identical(family):
    prefix = np.random.RandomState(1).randint(2, 60, (ROWS, 3)).astype(np.int32)
    eos_id = _eos_ids(family)[0]
    config = GenerateConfig(max_length=MAX_LENGTH)
    _compare(family, eos_id, config, prefix, num_beams=1, do_sample=False)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.5, 0, 0.8), (0.5, 10, 0.9), (2.0, 3, 0.5), (1.0, 100, 0.05)],
)
def test_tokens_are_drawn_from_the_same_distribution(temperature, top_k, top_p):
    import torch
    from transformers.generation import logits_process

    logits = np.random.RandomState(2).randn(6, 50).astype(np.float32) * 2
    processors = [logits_process.TemperatureLogitsWarper(temperature)]
    if top_k:
        processors.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(logits_process.TopPLogitsWarper(top_p))
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(None, scores)
    expected = torch.softmax(scores, -1).numpy()

    cfg = GenerateConfig(method="sample", temperature=temperature, top_k=top_k, top_p=top_p)
    kept, tokens = sampling.likely(cfg, logits)
    shares = np.asarray(jax.nn.softmax(kept, axis=-1))
    found = np.zeros_like(expected)
    places = np.tile(np.arange(50), (6, 1)) if tokens is None else np.asarray(tokens)
    np.put_along_axis(found, places, shares, axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ((found > 0) == (expected > 0)).all()

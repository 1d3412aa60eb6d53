"""From parameters to texts and scores: greedy decoding, and log-likelihoods of given targets.

Letters: B batch, L encoder length, T decoder length, D embedding, V vocabulary, C choices of a row.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import model

# Log-probabilities are made for as many positions at a time as keep [positions, V] below this.
_LOGITS_BYTES = 2**27


def greedy(
    cfg: model.T5Config,
    params: model.Params,
    inputs_BL: jax.Array,
    segments_BL: jax.Array,
    max_length: int,
    eos_id: int | jax.Array = 1,
) -> jax.Array:
    """The most likely token at each step, until every row has ended or `max_length` is reached.

    The whole loop is one compiled `while_loop`, so call it under `jax.jit`.

    Args:
      cfg: shape of the model.
      params: its parameters.
      inputs_BL: int32 encoder tokens, one example a row.
      segments_BL: int32, 1 where `inputs_BL` holds a token, 0 where it is padding. A row of zeros
        only is an empty row: it is answered with padding and never keeps the loop running.
      max_length: tokens to make at most, the end of sequence among them.
      eos_id: end of sequence, one for all rows or int32 [B]; -1: a row does not end.

    Returns:
      int32 [B, max_length]: tokens up to and including the end of sequence, then 0.
    """
    encoded_BLD = model.encode(cfg, params, inputs_BL, segments_BL)
    cache = model.start_cache(cfg, params, encoded_BLD, segments_BL, max_length)
    params = model.unstack_decoder(cfg, params)
    rows = inputs_BL.shape[0]

    def unfinished(state: tuple) -> jax.Array:
        index, _, _, finished_B, _ = state
        return (index < max_length) & ~jnp.all(finished_B)

    def step(state: tuple) -> tuple:
        index, tokens_BT, previous_B, finished_B, cache = state
        hidden_B1D, cache = model.decode_step(cfg, params, cache, previous_B[:, None], index)
        logits_BV = model.logits(cfg, params, hidden_B1D)[:, 0, :]
        next_B = jnp.where(finished_B, 0, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))
        tokens_BT = jax.lax.dynamic_update_slice_in_dim(tokens_BT, next_B[:, None], index, axis=1)
        return index + 1, tokens_BT, next_B, finished_B | (next_B == eos_id), cache

    start = (
        jnp.int32(0),
        jnp.zeros((rows, max_length), jnp.int32),
        jnp.zeros((rows,), jnp.int32),  # 0 also starts the decoder
        ~jnp.any(segments_BL > 0, axis=-1),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, start)[1]


def log_probabilities(
    cfg: model.T5Config, params: model.Params, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    """Log-probability of each target token, in float32.

    Only a slice of the positions has its [., V] logits in memory at any moment.

    Args:
      cfg: shape of the model.
      params: its parameters.
      hidden_BTD: output of the decoder.
      targets_BT: int32.

    Returns:
      float32 [B, T].
    """
    rows, length = targets_BT.shape

    def of_slice(slice_: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BSD, targets_BS = slice_
        logits_BSV = model.logits(cfg, params, hidden_BSD).astype(jnp.float32)
        target_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
        return target_BS - jax.nn.logsumexp(logits_BSV, axis=-1)

    fitting = max(1, _LOGITS_BYTES // (4 * rows * cfg.vocab_size))
    size = max(n for n in range(1, length + 1) if length % n == 0 and n <= fitting)
    if size == length:
        return of_slice((hidden_BTD, targets_BT))
    slices = (
        jnp.moveaxis(hidden_BTD.reshape(rows, length // size, size, -1), 1, 0),
        jnp.moveaxis(targets_BT.reshape(rows, length // size, size), 1, 0),
    )
    return jnp.moveaxis(jax.lax.map(of_slice, slices), 0, 1).reshape(rows, length)


def score_choices(
    cfg: model.T5Config,
    params: model.Params,
    inputs_BL: jax.Array,
    encoder_segments_BL: jax.Array,
    decoder_inputs_BT: jax.Array,
    decoder_targets_BT: jax.Array,
    decoder_segments_BT: jax.Array,
    num_choices: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood of every choice of every row, reading each input once.

    The choices of a row lie behind one another in one decoder row (`pack_choices`): each sees
    itself and the input, not the other choices. This equals scoring each choice on its own
    (T0's rank classification: the sum over tokens, end of sequence included, no normalisation).

    Args:
      cfg: shape of the model.
      params: its parameters.
      inputs_BL: int32 encoder tokens, one example a row.
      encoder_segments_BL: int32, 1 for tokens, 0 for padding.
      decoder_inputs_BT: int32, the choices shifted right within each segment.
      decoder_targets_BT: int32, the choices.
      decoder_segments_BT: int32, c + 1 for the tokens of choice c, 0 for padding.
      num_choices: C, the largest number of choices of a row.

    Returns:
      float32 [B, C] sums of log-probabilities, and int32 [B, C] numbers of tokens; both 0 where a
      row has fewer choices.
    """
    encoded_BLD = model.encode(cfg, params, inputs_BL, encoder_segments_BL)
    hidden_BTD = model.decode(
        cfg,
        params,
        encoded_BLD,
        decoder_inputs_BT,
        segments_BT=decoder_segments_BT,
        cross_segments_BT=(decoder_segments_BT > 0).astype(jnp.int32),
        encoder_segments_BL=encoder_segments_BL,
    )
    log_probability_BT = log_probabilities(cfg, params, hidden_BTD, decoder_targets_BT)
    choice_C = jnp.arange(1, num_choices + 1, dtype=jnp.int32)
    belongs_BTC = decoder_segments_BT[:, :, None] == choice_C[None, None, :]
    scores_BC = jnp.sum(jnp.where(belongs_BTC, log_probability_BT[:, :, None], 0.0), axis=1)
    return scores_BC, jnp.sum(belongs_BTC, axis=1, dtype=jnp.int32)


def pad_rows(rows: Sequence[Sequence[int]], count: int, length: int) -> np.ndarray:
    """Token lists as int32 [count, length], padded with 0.

    Raises:
      ValueError: a row is longer than `length`, or there are more than `count`.
    """
    padded: np.ndarray = np.zeros((count, length), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def pack_choices(
    choices: Sequence[Sequence[Sequence[int]]], count: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays the choices of each row behind one another.

    Args:
      choices: for each row, its choices as token lists.
      count: B; rows beyond those given stay empty.
      length: T, at least the total length of any row's choices.

    Returns:
      decoder inputs (shifted right within each choice), targets and segments, int32 [B, T].
    """
    packed: np.ndarray = np.zeros((3, count, length), np.int32)
    inputs, targets, segments = packed
    for i, row in enumerate(choices):
        start = 0
        for c, tokens in enumerate(row):
            end = start + len(tokens)
            inputs[i, start + 1 : end] = tokens[:-1]
            targets[i, start:end] = tokens
            segments[i, start:end] = c + 1
            start = end
    return inputs, targets, segments

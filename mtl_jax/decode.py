"""From parameters to texts and scores: generation, and log-likelihoods of given targets.

Letters: B batch, L encoder length, T decoder length, P prefix length, R continuations of a row,
D embedding, V vocabulary, S states, C choices of a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import incremental, model
from mtl_jax.beam import BeamSearch
from mtl_jax.errors import UserError
from mtl_jax.generate_config import GenerateConfig
from mtl_jax.hypotheses import Ends, Generated
from mtl_jax.sampling import Sampling

__all__ = [
    "GenerateConfig",
    "Generated",
    "generate",
    "greedy",
    "log_probabilities",
    "pack_choices",
    "score",
    "score_choices",
]

# Log-probabilities are made for as many positions at a time as keep [positions, V] below this.
_LOGITS_BYTES = 2**27


def generate(
    cfg: model.T5Config,
    generate_cfg: GenerateConfig,
    params: model.Params,
    inputs_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    rows_B: jax.Array | None = None,
    seed: int | jax.Array | None = None,
    eos_id: int | jax.Array = 1,
    prefix_BP: jax.Array | None = None,
    stop_table: jax.Array | np.ndarray | None = None,
    weights: incremental.Weights | None = None,
) -> Generated:
    """Continuations of the inputs: greedy, sampled or by beam search.

    The inputs are encoded once, their keys and values made once and shared by the R continuations
    of a row. The whole loop is one compiled `while_loop`, which ends when every row has ended, so
    call it under `jax.jit` with `cfg` and `generate_cfg` static.

    Scores: the summed log-probabilities, by which samples are sorted; in beam search that sum
    divided by the length penalty. T5X's search returns finished hypotheses only, unless a row has
    none: then its live ones, with plain sums. A row with fewer hypotheses than asked for has scores
    of -inf. Log-probabilities are always the model's own: temperature, top_k, top_p and min_length
    choose tokens, they do not change what a token is worth.

    Args:
      cfg: shape of the model.
      generate_cfg: how to generate.
      params: parameters of the model.
      inputs_BL: int32 encoder tokens, one example a row.
      segments_BL: int32, 1 where `inputs_BL` holds a token, 0 where it is padding. A row of zeros
        only is an empty row: it has no continuation and never keeps the loop running.
      rows_B: int32, numbers of the rows for random numbers; a sample depends on the seed, this
        number and the row, not on the batch it is in. By default 0, 1, ...
      seed: instead of `generate_cfg.seed`; an array needs no other program for another seed.
      eos_id: end of sequence, one for all rows or int32 [B]; -1: rows do not end.
      prefix_BP: int32, tokens the decoder is given first, padded with zeros on the right. They are
        neither returned nor scored, and do not count in lengths, penalties and stop strings.
      stop_table: int32 of `stop_strings.table`, needed for `generate_cfg.stop`. The token that
        completes a stop string is the last one returned; cutting the text there is the caller's.
      weights: of `incremental.prepare`, made once for many calls; None: made in this one.

    Returns:
      `Generated` with R = `generate_cfg.num_return` and T = `generate_cfg.max_length`.

    Raises:
      UserError: stop strings without a table, or a table without stop strings.
    """
    rows = inputs_BL.shape[0]
    if prefix_BP is None:
        prefix_BP = jnp.zeros((rows, 0), jnp.int32)
    eos_B = jnp.broadcast_to(jnp.asarray(eos_id, jnp.int32), (rows,))
    ends = Ends(generate_cfg, eos_B, _padded(stop_table, generate_cfg, cfg.vocab_size))
    search = _search(generate_cfg, ends, seed, rows_B)
    encoded_BLD = model.encode(cfg, params, inputs_BL, segments_BL)
    weights = incremental.prepare(cfg, params) if weights is None else weights
    longest, width = prefix_BP.shape[1] + generate_cfg.max_length, generate_cfg.width
    cache = incremental.start_cache(cfg, weights, encoded_BLD, segments_BL, longest, width)

    advance = functools.partial(incremental.decode_step, cfg, weights)
    reorder = functools.partial(incremental.reorder_cache, cfg)
    filled_B = jnp.any(segments_BL > 0, axis=-1)
    return _loop(search, advance, reorder, cache, prefix_BP, filled_B)


def _loop(
    search: BeamSearch | Sampling,
    advance: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
    reorder: Callable[[Any, jax.Array], Any],
    cache: Any,
    prefix_BP: jax.Array,
    filled_B: jax.Array,
) -> Generated:
    """Steps of the model and the search in turn, until no row is open.

    Args:
      search: chooses tokens.
      advance: the model: `(cache, tokens_BR, position) -> (logits_BRV, cache)`.
      reorder: `(cache, source_BR) -> cache` of the continuations `source_BR`.
      cache: at the start.
      prefix_BP: int32, tokens that are given.
      filled_B: rows that are not empty.
    """
    prefix_lengths_B = jnp.sum(_up_to_last_token(prefix_BP), axis=-1, dtype=jnp.int32)
    width = search.cfg.width

    def unfinished(carry: tuple) -> jax.Array:
        return jnp.any(search.open_rows(carry[1]))

    def step(carry: tuple) -> tuple:
        position, state, previous_BR, cache = carry
        logits_BRV, cache = advance(cache, previous_BR, position)
        made_B = position - prefix_lengths_B  # below 0 where the next token is the prefix's
        new, tokens_BR, source_BR = search.advance(state, logits_BRV, made_B)
        moves_B = search.open_rows(state) & (made_B >= 0)
        state = jax.tree.map(lambda *x: _where_rows(moves_B, *x), new, state)
        if prefix_BP.shape[1]:
            given_B = jnp.take(prefix_BP, position, axis=1, mode="clip")
            tokens_BR = jnp.where((made_B >= 0)[:, None], tokens_BR, given_B[:, None])
        if source_BR is not None:
            source_BR = jnp.where(moves_B[:, None], source_BR, jnp.arange(width)[None])
            cache = reorder(cache, source_BR)
        return position + 1, state, tokens_BR, cache

    state: Any = search.start(filled_B)
    start_BR = jnp.zeros((filled_B.shape[0], width), jnp.int32)  # 0 starts the decoder
    carry = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, start_BR, cache))
    return search.result(carry[1])


def _search(
    cfg: GenerateConfig, ends: Ends, seed: int | jax.Array | None, rows_B: jax.Array | None
) -> BeamSearch | Sampling:
    if cfg.method == "beam":
        return BeamSearch(cfg, ends)
    key = jax.random.key(cfg.seed if seed is None else seed)
    rows_B = jnp.arange(ends.eos_B.shape[0]) if rows_B is None else rows_B
    return Sampling(cfg, ends, jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B))


def _where_rows(condition_B: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(condition_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _up_to_last_token(tokens_BT: jax.Array) -> jax.Array:
    """Bool [B, T]: False for the zeros at the end of each row."""
    return jnp.cumsum(tokens_BT[:, ::-1] != 0, axis=-1)[:, ::-1] > 0


def _padded(table: Any, generate_cfg: GenerateConfig, vocab_size: int) -> jax.Array | None:
    """The stop table with a column for each row of the embedding; None without stop strings."""
    if (table is None) != (not generate_cfg.stop):
        raise UserError(
            "Generate.stop and stop_table go together, but only one of them is given: make the "
            "table of the stop strings with stop_strings.table."
        )
    if table is None:
        return None
    # Tokens beyond the vocabulary, for which an embedding may have rows, have no text.
    missing = max(0, vocab_size - table.shape[1])
    stay_S1 = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    stay = jnp.broadcast_to(stay_S1, (table.shape[0], missing))
    return jnp.concatenate([jnp.asarray(table), stay], axis=1)


def greedy(
    cfg: model.T5Config,
    params: model.Params,
    inputs_BL: jax.Array,
    segments_BL: jax.Array,
    max_length: int,
    eos_id: int | jax.Array = 1,
) -> jax.Array:
    """`generate` with the most likely token at each step: int32 [B, max_length], tokens alone."""
    found = generate(
        cfg, GenerateConfig(max_length=max_length), params, inputs_BL, segments_BL, eos_id=eos_id
    )
    return found.tokens[:, 0]


def score(
    cfg: model.T5Config,
    params: model.Params,
    inputs_BL: jax.Array,
    segments_BL: jax.Array,
    targets_BT: jax.Array,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood of one given target for each input, all positions at once.

    Args:
      cfg: shape of the model.
      params: its parameters.
      inputs_BL: int32 encoder tokens, one example a row.
      segments_BL: int32, 1 for tokens, 0 for padding.
      targets_BT: int32, padded with zeros on the right; an end of sequence counts like any token.
      lengths_B: int32, tokens of each target; by default up to the last one that is not 0.

    Returns:
      float32 [B] sums, and float32 [B, T] log-probabilities of the tokens, 0 for padding.
    """
    if lengths_B is None:
        real_BT = _up_to_last_token(targets_BT)
    else:
        real_BT = jnp.arange(targets_BT.shape[1])[None] < lengths_B[:, None]
    log_probs_BT = _target_log_probabilities(
        cfg,
        params,
        inputs_BL,
        segments_BL,
        jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0))),
        targets_BT,
        real_BT.astype(jnp.int32),
    )
    log_probs_BT = jnp.where(real_BT, log_probs_BT, 0.0)
    return jnp.sum(log_probs_BT, axis=-1), log_probs_BT


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
      float32 [B, C] sums of log-probabilities, int32 [B, C] numbers of tokens, and float32 [B, C]
      the part of the last token in each sum (of the end of sequence, where choices end with it);
      all 0 where a row has fewer choices.
    """
    log_probability_BT = _target_log_probabilities(
        cfg,
        params,
        inputs_BL,
        encoder_segments_BL,
        decoder_inputs_BT,
        decoder_targets_BT,
        decoder_segments_BT,
    )
    choice_C = jnp.arange(1, num_choices + 1, dtype=jnp.int32)
    belongs_BTC = decoder_segments_BT[:, :, None] == choice_C[None, None, :]
    # The next position is of another choice, or of none.
    next_BT = jnp.pad(decoder_segments_BT[:, 1:], ((0, 0), (0, 1)))
    ends_BTC = belongs_BTC & (next_BT != decoder_segments_BT)[:, :, None]

    def sums_BC(chosen_BTC: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen_BTC, log_probability_BT[:, :, None], 0.0), axis=1)

    lengths_BC = jnp.sum(belongs_BTC, axis=1, dtype=jnp.int32)
    return sums_BC(belongs_BTC), lengths_BC, sums_BC(ends_BTC)


def _target_log_probabilities(
    cfg: model.T5Config,
    params: model.Params,
    inputs_BL: jax.Array,
    encoder_segments_BL: jax.Array,
    decoder_inputs_BT: jax.Array,
    decoder_targets_BT: jax.Array,
    decoder_segments_BT: jax.Array,
) -> jax.Array:
    """Float32 [B, T], teacher forced; each segment of the decoder sees all of its row's input."""
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
    return log_probabilities(cfg, params, hidden_BTD, decoder_targets_BT)


def pack_choices(
    choices: Sequence[Sequence[Sequence[int] | np.ndarray]], count: int, length: int
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

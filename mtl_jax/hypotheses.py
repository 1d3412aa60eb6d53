"""Continuations of the rows of a batch as arrays, and when they end; for sampling and beams alike.

Letters: B batch, R continuations of a row, C candidates for them, T tokens, V vocabulary, S states.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.generate_config import GenerateConfig


class Generated(NamedTuple):
    """Continuations of each row, best first.

    Attributes:
      tokens: int32 [B, R, T], up to and including the end of sequence, or the token that completed
        a stop string; then 0.
      lengths: int32 [B, R], how many of them there are.
      scores: float32 [B, R], what they are ranked by; -inf (and length 0) where there is none.
      log_probs: float32 [B, R, T], of each token under the model's own distribution; then 0.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    log_probs: jax.Array


def empty(rows: int, count: int, length: int) -> Generated:
    """No tokens, and scores of 0."""
    return Generated(
        tokens=jnp.zeros((rows, count, length), jnp.int32),
        lengths=jnp.zeros((rows, count), jnp.int32),
        scores=jnp.zeros((rows, count), jnp.float32),
        log_probs=jnp.zeros((rows, count, length), jnp.float32),
    )


def pick(x_BR: jax.Array, source_BC: jax.Array) -> jax.Array:
    """x[b, source[b, c]] for [B, R, ...]: [B, C, ...]."""
    index = source_BC.reshape(*source_BC.shape, *(1,) * (x_BR.ndim - 2))
    return jnp.take_along_axis(x_BR, index, axis=1)


def select(old: Generated, source_BC: jax.Array) -> Generated:
    """The continuations `source_BC` of each row."""
    return jax.tree.map(lambda x: pick(x, source_BC), old)


def extend(
    old: Generated, made_B: jax.Array, tokens_BR: jax.Array, log_probs_BR: jax.Array
) -> Generated:
    """One more token for each continuation, behind `made_B` earlier ones."""
    here_BRT = jnp.arange(old.tokens.shape[-1])[None, None] == made_B[:, None, None]
    return Generated(
        tokens=jnp.where(here_BRT, tokens_BR[..., None], old.tokens),
        lengths=jnp.broadcast_to(made_B[:, None] + 1, old.lengths.shape),
        scores=old.scores + log_probs_BR,
        log_probs=jnp.where(here_BRT, log_probs_BR[..., None], old.log_probs),
    )


def drop_unmade(found: Generated) -> Generated:
    """Zeros for tokens, lengths and log-probabilities where the score is -inf."""
    made_BR = found.scores > -jnp.inf
    return Generated(
        tokens=jnp.where(made_BR[..., None], found.tokens, 0),
        lengths=jnp.where(made_BR, found.lengths, 0),
        scores=found.scores,
        log_probs=jnp.where(made_BR[..., None], found.log_probs, 0.0),
    )


@dataclasses.dataclass(frozen=True)
class Ends:
    """When a continuation ends.

    Attributes:
      cfg: for its lengths.
      eos_B: int32, end of sequence of each row; -1: it has none.
      stop_table: int32 [S, V] of `stop_strings.table`, or None.
    """

    cfg: GenerateConfig
    eos_B: jax.Array
    stop_table: jax.Array | None

    def forbid(self, logits_BRV: jax.Array, made_B: jax.Array) -> jax.Array:
        """The logits, with -inf for an end of sequence that comes too early."""
        if self.cfg.min_length == 0:
            return logits_BRV
        is_eos_BV = jnp.arange(logits_BRV.shape[-1])[None] == self.eos_B[:, None]
        early_BV = is_eos_BV & (made_B < self.cfg.min_length)[:, None]
        return jnp.where(early_BV[:, None], -jnp.inf, logits_BRV)

    def reached(self, tokens_BC: jax.Array, stop_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether these tokens end their continuations, and the new states of the stop strings.

        The end by `max_length` is left to the caller, since searches differ in it.
        """
        ended_BC = tokens_BC == self.eos_B[:, None]
        if self.stop_table is None:
            return ended_BC, stop_BC
        stop_BC = self.stop_table[stop_BC, tokens_BC]
        return ended_BC | (stop_BC == self.stop_table.shape[0] - 1), stop_BC

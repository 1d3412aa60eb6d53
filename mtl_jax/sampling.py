"""Greedy decoding and sampling: every continuation goes its own way.

Letters: B batch, R continuations of a row, V vocabulary, K the most likely tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import hypotheses
from mtl_jax.generate_config import GenerateConfig
from mtl_jax.hypotheses import Ends, Generated


class State(NamedTuple):
    """What a step leaves to the next."""

    made: Generated
    stop_BR: jax.Array
    ended_BR: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Chooses the next token of each continuation, the most likely one or at random.

    Attributes:
      cfg: the method "greedy" or "sample".
      ends: when a continuation ends.
      keys_B: a random key for each row.
    """

    cfg: GenerateConfig
    ends: Ends
    keys_B: jax.Array

    def start(self, filled_B: jax.Array) -> State:
        """Nothing made; rows that are not `filled_B` have ended."""
        rows, width = filled_B.shape[0], self.cfg.width
        return State(
            made=hypotheses.empty(rows, width, self.cfg.max_length),
            stop_BR=jnp.zeros((rows, width), jnp.int32),
            ended_BR=jnp.broadcast_to(~filled_B[:, None], (rows, width)),
        )

    def open_rows(self, state: State) -> jax.Array:
        """Bool [B]: rows with a continuation that has not ended."""
        return ~jnp.all(state.ended_BR, axis=-1)

    def advance(
        self, state: State, logits_BRV: jax.Array, made_B: jax.Array
    ) -> tuple[State, jax.Array, None]:
        """One more token for each continuation: (state, tokens [B, R], None: all stay in place)."""
        allowed_BRV = self.ends.forbid(logits_BRV, made_B)
        if self.cfg.method == "greedy":
            tokens_BR = jnp.argmax(allowed_BRV, axis=-1).astype(jnp.int32)
        else:
            tokens_BR = draw(self.cfg, self.keys_B, made_B, allowed_BRV)
        chosen_BR = jnp.take_along_axis(logits_BRV, tokens_BR[..., None], axis=-1)[..., 0]
        log_probs_BR = chosen_BR - jax.nn.logsumexp(logits_BRV, axis=-1)

        made = hypotheses.extend(state.made, made_B, tokens_BR, log_probs_BR)
        ended_BR, stop_BR = self.ends.reached(tokens_BR, state.stop_BR)
        ended_BR |= (made_B + 1 >= self.cfg.max_length)[:, None]
        new = State(made, stop_BR, ended_BR)

        def keep(old: jax.Array, new: jax.Array) -> jax.Array:
            ended = state.ended_BR.reshape(*state.ended_BR.shape, *(1,) * (old.ndim - 2))
            return jnp.where(ended, old, new)

        return jax.tree.map(keep, state, new), tokens_BR, None

    def result(self, state: State) -> Generated:
        """The continuations, the likeliest first."""
        begun_BR = state.made.lengths > 0
        scores_BR = jnp.where(begun_BR, state.made.scores, -jnp.inf)
        order_BR = jnp.argsort(scores_BR, axis=-1, descending=True, stable=True)
        return hypotheses.select(state.made._replace(scores=scores_BR), order_BR)


def draw(
    cfg: GenerateConfig, keys_B: jax.Array, made_B: jax.Array, logits_BRV: jax.Array
) -> jax.Array:
    """A random token for each continuation, int32 [B, R].

    It depends on the key of the row, how many tokens its continuations have, the number of the
    continuation and its logits, and on nothing else in the batch.

    Args:
      cfg: temperature, top_k, top_p.
      keys_B: random keys.
      made_B: int32, tokens made so far.
      logits_BRV: float32; -inf is never drawn.
    """
    width = logits_BRV.shape[1]

    def keys_of_row(key: jax.Array, made: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, made)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(width))

    keys_BR = jax.vmap(keys_of_row)(keys_B, made_B)
    logits_BRK, tokens_BRK = likely(cfg, logits_BRV)
    drawn_BR = jax.vmap(jax.vmap(jax.random.categorical))(keys_BR, logits_BRK)
    if tokens_BRK is None:
        return drawn_BR.astype(jnp.int32)
    return jnp.take_along_axis(tokens_BRK, drawn_BR[..., None], axis=-1)[..., 0]


def likely(cfg: GenerateConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The tokens to draw from: the `top_k` most likely, then the nucleus of what they leave.

    Args:
      cfg: temperature, top_k, top_p.
      logits: float32 [..., V].

    Returns:
      (logits [..., K], -inf for what is left out; their tokens, int32 [..., K], or None: all of the
      vocabulary, in its order).
    """
    tokens = None
    if cfg.top_k:
        logits, tokens = jax.lax.top_k(logits, min(cfg.top_k, logits.shape[-1]))
    logits = logits / cfg.temperature
    return (nucleus(logits, cfg.top_p) if cfg.top_p < 1.0 else logits), tokens


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The logits, -inf outside of the nucleus (Holtzman et al., 2020).

    That is the smallest set of the most likely tokens that hold `top_p` of the probability; the one
    that reaches it is in, and so are tokens as likely as the least likely one inside.

    Sorting a vocabulary would take longer on a CPU than the model's step, so the least probability
    inside is sought by halving. Floats that are not negative are in the order of their bits, which
    makes the search exact after as many halvings as there are bits.

    Args:
      logits: float32 [..., V].
      top_p: in (0, 1).
    """
    share = jax.nn.softmax(logits, axis=-1)

    def as_float(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        mass = jnp.sum(jnp.where(share >= as_float(middle), share, 0.0), axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    zero = jnp.zeros(logits.shape[:-1], jnp.int32)
    one = jnp.full_like(zero, np.float32(1.0).view(np.int32))
    least, _ = jax.lax.fori_loop(0, 30, halve, (zero, one))
    return jnp.where(share >= as_float(least), logits, -jnp.inf)

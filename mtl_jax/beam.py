"""Beam search, as T5X's and as Hugging Face's: the bookkeeping between two steps of the model.

Both follow the best `num_beams` live hypotheses, look at twice as many candidates at each step, and
keep the best finished ones by a score with a length penalty. They differ in three points:

- which candidates may finish: all (T5X), or those among the first `num_beams` (Hugging Face);
- at `max_length`: T5X drops hypotheses that have not ended, unless a row has no other; to Hugging
  Face they are finished;
- when a row is closed: `BeamSearch._hopeless`.

Letters: B batch, R beams, C candidates (2 R), V vocabulary, K tokens of a beam that may count.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import hypotheses
from mtl_jax.generate_config import GenerateConfig
from mtl_jax.hypotheses import Ends, Generated


class State(NamedTuple):
    """What a step leaves to the next; scores of -inf: no hypothesis.

    Attributes:
      live: hypotheses to be continued, best first; their scores are summed log-probabilities.
      stop_BR: states of their stop strings.
      done: finished ones, best first; their scores have the length penalty in them.
      closed_B: rows that are not continued.
    """

    live: Generated
    stop_BR: jax.Array
    done: Generated
    closed_B: jax.Array


def length_penalty(cfg: GenerateConfig, length: jax.Array | int) -> jax.Array:
    """What summed log-probabilities are divided by; float32, in the shape of `length`."""
    length = jnp.asarray(length, jnp.float32)
    return ((5.0 + length) / 6.0 if cfg.length_penalty == "t5x" else length) ** cfg.alpha


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Continues the beams of each row.

    Attributes:
      cfg: the method "beam".
      ends: when a hypothesis ends.
    """

    cfg: GenerateConfig
    ends: Ends

    def start(self, filled_B: jax.Array) -> State:
        """One live hypothesis of no tokens; rows that are not `filled_B` are closed."""
        rows, width = filled_B.shape[0], self.cfg.num_beams
        none = hypotheses.empty(rows, width, self.cfg.max_length)
        first_BR = filled_B[:, None] & (jnp.arange(width) == 0)[None]
        return State(
            live=none._replace(scores=jnp.where(first_BR, 0.0, -jnp.inf)),
            stop_BR=jnp.zeros((rows, width), jnp.int32),
            done=none._replace(scores=jnp.full((rows, width), -jnp.inf)),
            closed_B=~filled_B,
        )

    def open_rows(self, state: State) -> jax.Array:
        """Bool [B]: rows that are continued."""
        return ~state.closed_B

    def advance(
        self, state: State, logits_BRV: jax.Array, made_B: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        """One more token for the beams: (state, tokens [B, R], the beams [B, R] they continue)."""
        width, hugging_face = self.cfg.num_beams, self.cfg.length_penalty == "hugging_face"
        source_BC, tokens_BC, log_probs_BC = self._candidates(state.live, logits_BRV, made_B)
        seen = hypotheses.extend(
            hypotheses.select(state.live, source_BC), made_B, tokens_BC, log_probs_BC
        )
        ended_BC, stop_BC = self.ends.reached(tokens_BC, hypotheses.pick(state.stop_BR, source_BC))
        last_B = made_B + 1 >= self.cfg.max_length

        finishing_BC = ended_BC
        if hugging_face:
            finishing_BC = (ended_BC | last_B[:, None]) & (jnp.arange(ended_BC.shape[-1]) < width)[
                None
            ]
        penalty_B1 = length_penalty(self.cfg, made_B[:, None] + 1)
        finished = seen._replace(scores=jnp.where(finishing_BC, seen.scores / penalty_B1, -jnp.inf))
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.done, finished)
        done = hypotheses.select(both, jax.lax.top_k(both.scores, width)[1])

        going_BC = jnp.where(ended_BC, -jnp.inf, seen.scores)
        scores_BR, place_BR = jax.lax.top_k(going_BC, width)
        live = hypotheses.select(seen, place_BR)._replace(scores=scores_BR)
        closed_B = last_B | self._hopeless(scores_BR[:, 0], done.scores[:, -1], made_B + 1)
        new = State(live, hypotheses.pick(stop_BC, place_BR), done, closed_B)
        return new, hypotheses.pick(tokens_BC, place_BR), hypotheses.pick(source_BC, place_BR)

    def _candidates(
        self, live: Generated, logits_BRV: jax.Array, made_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The best 2 R continuations of each row: their beams, tokens and log-probabilities."""
        rows, width, vocab_size = logits_BRV.shape
        allowed_BRV = self.ends.forbid(logits_BRV, made_B)
        # First within each beam, then among beams: no array of V holds anything but logits.
        best_BRK, tokens_BRK = jax.lax.top_k(allowed_BRV, min(2 * width, vocab_size))
        log_probs_BRK = best_BRK - jax.nn.logsumexp(logits_BRV, axis=-1, keepdims=True)
        flat = lambda x_BRK: x_BRK.reshape(rows, -1)  # noqa: E731
        scores_BN = flat(live.scores[..., None] + log_probs_BRK)
        _, place_BC = jax.lax.top_k(scores_BN, min(2 * width, scores_BN.shape[-1]))
        pick = hypotheses.pick
        return (
            place_BC // best_BRK.shape[-1],
            pick(flat(tokens_BRK), place_BC),
            pick(flat(log_probs_BRK), place_BC),
        )

    def _hopeless(
        self, live_score_B: jax.Array, worst_done_B: jax.Array, length_B: jax.Array
    ) -> jax.Array:
        """Whether going on is of no use: the best live hypothesis, the worst finished one.

        The worst finished one is at -inf until `num_beams` have finished.
        """
        cfg = self.cfg
        none_live_B = live_score_B == -jnp.inf
        full_B = worst_done_B > -jnp.inf
        if cfg.early_stopping == "when_full":
            return none_live_B | full_B
        # The best score it could still get. T5X takes the penalty of the longest hypothesis;
        # Hugging Face does so only for "never": else it takes today's, and may stop too early.
        if cfg.length_penalty == "t5x" or (cfg.early_stopping == "never" and cfg.alpha > 0.0):
            length_B = jnp.full_like(length_B, cfg.max_length)
        hoped_B = live_score_B / length_penalty(cfg, length_B)
        return none_live_B | (full_B & (hoped_B <= worst_done_B))

    def result(self, state: State) -> Generated:
        """The best `num_return` hypotheses."""
        found = state.done
        if self.cfg.length_penalty == "t5x":
            # As in T5X, live ones are ranked without a penalty.
            any_done_B1 = found.scores[:, :1] > -jnp.inf

            def choose(done: jax.Array, live: jax.Array) -> jax.Array:
                any_done = any_done_B1.reshape(-1, *(1,) * (done.ndim - 1))
                return jnp.where(any_done, done, live)

            found = jax.tree.map(choose, found, state.live)
        found = jax.tree.map(lambda x: x[:, : self.cfg.num_return], found)
        return hypotheses.drop_unmade(found)

"""What the methods share that see the tasks' gradients only through their inner products.

A method solves one group of parameters; here the groups are mapped over, absent tasks are taken
out, scales are divided out, and a group that cannot be solved falls back on the mean.
"""

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from mtl_jax.balance.method import GRAM, Method, Observations, State

# Below this sum of squared norms a group has no gradients to weigh (norms of 1e-15).
_LEAST_TRACE = 1e-30
# A gradient whose square is below this share of the mean square counts as zero: its cosines would
# be made of numbers that float32 no longer holds in full.
_LEAST_SHARE = 1e-30


@flax.struct.dataclass
class Geometry:
    """The gradients of one group of parameters, up to a rotation.

    Norms and cosines instead of inner products, because float32 holds cosines well however much the
    norms differ: `gram_NN = scale**2 * norms_N[:, None] * cosine_NN * norms_N[None, :]`.

    Attributes:
      present_N: bool, the tasks in the batch.
      valid_N: bool, those of them whose gradient is not zero.
      norms_N: float32, norms of the gradients; the mean of their squares over the present tasks
        is 1. Zero where not valid.
      inverse_N: float32, `1 / norms_N`; zero where not valid.
      cosine_NN: float32, exactly 1 on the diagonal; rows and columns of tasks that are not valid
        are zero, diagonal included.
      scale: float32 scalar, what all norms were divided by.
    """

    present_N: jax.Array
    valid_N: jax.Array
    norms_N: jax.Array
    inverse_N: jax.Array
    cosine_NN: jax.Array
    scale: jax.Array

    @property
    def mean_N(self) -> jax.Array:
        """Weights of the mean of the present tasks' gradients."""
        return mean_weights(self.present_N)

    @property
    def relative_inverse_N(self) -> jax.Array:
        """Float32 [N]: the smallest norm of a valid task / each norm, in (0, 1]; 0 elsewhere."""
        return self.inverse_N / jnp.maximum(jnp.max(self.inverse_N), 1e-38)

    @property
    def gram_NN(self) -> jax.Array:
        """Inner products in units of the mean squared norm."""
        return self.norms_N[:, None] * self.cosine_NN * self.norms_N[None, :]


def mean_weights(chosen_N: jax.Array) -> jax.Array:
    """Float32 [N]: 1 / number of chosen tasks for each of them, 0 for the others."""
    chosen_N = chosen_N.astype(jnp.float32)
    return chosen_N / jnp.maximum(jnp.sum(chosen_N), 1.0)


def geometry(gram_NN: jax.Array, present_N: jax.Array) -> Geometry:
    """Norms and cosines of one group; finite only if `gram_NN` is and its trace is not 0.

    Args:
      gram_NN: float32, inner products; rows and columns of absent tasks are not looked at.
      present_N: bool.
    """
    present_NN = present_N[:, None] & present_N[None, :]
    gram_NN = jnp.where(present_NN, gram_NN, 0.0)
    mean_square = jnp.trace(gram_NN) / jnp.maximum(jnp.sum(present_N), 1)
    gram_NN = gram_NN / mean_square
    square_N = jnp.diagonal(gram_NN)
    valid_N = square_N > _LEAST_SHARE
    norms_N = jnp.sqrt(jnp.where(valid_N, square_N, 0.0))
    inverse_N = jnp.where(valid_N, 1.0 / jnp.where(valid_N, norms_N, 1.0), 0.0)
    cosine_NN = inverse_N[:, None] * (gram_NN + gram_NN.T) / 2 * inverse_N[None, :]
    cosine_NN = jnp.clip(cosine_NN, -1.0, 1.0)
    eye_NN = jnp.eye(valid_N.size, dtype=bool)
    cosine_NN = jnp.where(eye_NN, valid_N.astype(jnp.float32)[:, None], cosine_NN)
    return Geometry(present_N, valid_N, norms_N, inverse_N, cosine_NN, jnp.sqrt(mean_square))


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


class GradientMethod(Method):
    """A method that is a function of the inner products of the tasks' gradients, group by group.

    A subclass implements `solve` for one group and, if it keeps a state, `init` with a first axis
    of groups in every leaf. The update is `sum of weights x gradients` with the scale of the
    method's paper. Common to all:

    * An absent task gets weight 0, and the others get what they would without it.
    * A task alone in the batch gets weight 1: the update is the plain one.
    * If a group has no gradients (a trace below 1e-30), or anything of it or of its solution is not
      finite, its weights are those of the mean and its state stays. The log `solver_fallback`
      counts these groups.
    """

    needs: ClassVar[frozenset[str]] = frozenset({GRAM})

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """The weights of one group with at least two present tasks, and its state.

        Args:
          state: one group's part of the state.
          group: its gradients.
          rng: a PRNG key of this step and group.
          seen: all that is known of the batch.

        Returns:
          (float32 [N], anything where a task is absent; the state, unchanged for absent tasks).
        """
        raise NotImplementedError

    def weights(self, state: State, seen: Observations) -> tuple[jax.Array, State, dict[str, Any]]:
        """See `Method.weights`; [K, N], and the number of groups that fell back."""
        assert seen.gram is not None, "the train step gives what a method needs"
        present_N = seen.present
        count = jnp.sum(present_N)

        def one(
            state: State, gram_NN: jax.Array, number: jax.Array
        ) -> tuple[jax.Array, State, jax.Array]:
            group = geometry(gram_NN, present_N)
            rng = jax.random.fold_in(seen.rng, number)
            weights_N, new_state = self.solve(state, group, rng, seen)
            weights_N = jnp.where(present_N, weights_N, 0.0)
            trace = jnp.sum(jnp.where(present_N, jnp.diagonal(gram_NN), 0.0))
            solved = (trace >= _LEAST_TRACE) & _all_finite((group, weights_N, new_state))
            plain = mean_weights(present_N)
            weights_N = jnp.where(solved & (count > 1), weights_N, plain)
            new_state = jax.tree.map(lambda a, b: jnp.where(solved, a, b), new_state, state)
            return weights_N, new_state, ~solved & (count > 1)

        numbers_K = jnp.arange(seen.gram.shape[0])
        weights_KN, state, fallen_K = jax.vmap(one)(state, seen.gram, numbers_K)
        return weights_KN, state, {"solver_fallback": jnp.sum(fallen_K.astype(jnp.float32))}

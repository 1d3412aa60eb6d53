"""One direction that is good for all tasks, as an optimum of something: no random numbers or state.

Every problem is written for the unit vectors `g_t / |g_t|` (see `Geometry`), so that gradients
whose norms differ by many orders of magnitude lose nothing in float32.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.balance import per_task
from mtl_jax.balance.gradient_method import Geometry, GradientMethod, mean_weights
from mtl_jax.balance.method import Observations, State, register
from mtl_jax.balance.solvers import nash_bargain, nonnegative_qp, pseudo_inverse

_EPS = float(jnp.finfo(jnp.float32).eps)
# CAGrad looks for its one multiplier on a grid, around the best point again, and so on: 37^3 parts
# of the whole range, and the path between two points is a straight line almost everywhere.
_GRID = 36
_GRIDS = 3


@register
@dataclasses.dataclass(frozen=True)
class MGDA(GradientMethod):
    """The shortest vector in the convex hull of the gradients.

    `min |sum w_t g_t|^2` over w >= 0, sum w = 1. It is zero where no direction helps all tasks
    (Pareto stationarity) and never increases a task's loss for small steps. Desideri 2012; Sener
    and Koltun 2018, "Multi-task learning as multi-objective optimization".

    When to use: no task may get worse; mind that the task with the smallest gradient dominates.
    """

    cost: ClassVar[str] = "gradients of every task held apart; no state"

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`.

        With y = w |g| and a = 1 / |g|, the minimiser of `y'(C + aa')y / 2 - a'y` over y >= 0 has
        `Cy >= (1 - a'y) a`, with equality where y > 0: up to its length that is the optimality of
        y'Cy on a'y = 1, and it is bounded even where y'Cy reaches 0.
        """
        a_N = group.relative_inverse_N
        y_N = nonnegative_qp(group.cosine_NN + a_N[:, None] * a_N[None, :], -a_N, group.valid_N)
        weights_N = y_N * a_N / jnp.sum(y_N * a_N)
        # A zero gradient is in the hull: it is the shortest vector.
        zero_N = group.present_N & ~group.valid_N
        return jnp.where(jnp.any(zero_N), mean_weights(zero_N), weights_N), state


@register
@dataclasses.dataclass(frozen=True)
class UPGrad(GradientMethod):
    """The mean of the gradients, each projected on the directions that hurt no task.

    The cone is `{d: g_t.d >= 0 for all t}`; g_i / N projected on it is `sum v_t g_t` with
    v = argmin v'Gv over v >= e_i / N; the weights are the sum of these v. Quinton and Rey 2024,
    "Jacobian descent for multi-objective optimization".

    When to use: conflicts without PCGrad's dependence on the order; the update never conflicts with
    a task, and a gradient twice as long counts twice.
    """

    cost: ClassVar[str] = "gradients of every task held apart, as many small problems as tasks"

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`; v = (e_i + y) / N, for unit vectors, with y >= 0."""
        y_NN = jax.vmap(lambda linear_N: nonnegative_qp(group.cosine_NN, linear_N, group.valid_N))(
            group.cosine_NN
        )
        added_N = jnp.sum(group.norms_N[:, None] * y_NN, axis=0) * group.inverse_N
        return group.mean_N * (1.0 + added_N), state


@register
@dataclasses.dataclass(frozen=True)
class CAGrad(GradientMethod):
    """The direction near the mean gradient that helps the worst task most.

    `max_d min_t g_t.d` with `|d - g_0| <= c |g_0|`, g_0 the mean gradient; the solution is
    `d = g_0 + c |g_0| g_w / |g_w|` for w minimising `g_w.g_0 + c |g_0| |g_w|` on the simplex. Liu
    et al. 2021, "Conflict-averse gradient descent for multi-task learning", algorithm 1.

    When to use: the mean loss is the aim; unlike MGDA, PCGrad and UPGrad it converges to the
    minimum of the mean loss for any c < 1.

    Attributes:
      c: radius around the mean gradient, in its norms; 0 is the mean itself.
      rescale: divide by 1 + c^2, as the authors' code does by default.
    """

    c: float = 0.5
    rescale: bool = False

    cost: ClassVar[str] = "gradients of every task held apart; a search of about 50 small steps"

    def check(self, names: Sequence[str]) -> None:
        """See `Method.check`."""
        per_task.require(
            0 <= self.c < math.inf,
            "CAGrad.c",
            "finite and not negative (below 1 it converges to the minimum of the mean loss)",
            self.c,
        )

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`."""
        if self.c == 0:
            return group.mean_N, state
        y_N, mean_norm = self._towards_the_worst(group)
        length = jnp.sqrt(jnp.maximum(y_N @ group.cosine_NN @ y_N, 0.0))
        # Shorter than c only where any longer step costs some task more than it gains for another.
        far = mean_norm * jnp.minimum(1.0, self.c / jnp.maximum(length, 1e-30))
        weights_N = group.mean_N + far * y_N * group.inverse_N
        return (weights_N / (1.0 + self.c**2) if self.rescale else weights_N), state

    def _towards_the_worst(self, group: Geometry) -> tuple[jax.Array, jax.Array]:
        """Coefficients of the unit vectors in a multiple of g_w, and the mean gradient's norm.

        With u_t = g_t / |g_t|, b_t = u_t.g_0 / |g_0| and a = 1 / |g|, y(kappa) minimises
        `|sum y u|^2 / 2 + b'y - kappa a'y + (a'y)^2 / 2` over y >= 0. Then `Cy + b >= s a` for
        s = kappa - a'y, with equality where y > 0: the step `sum y u` is the shortest from
        g_0 / |g_0| after which every g_t.d is at least s. The one that is c long is sought; steps
        get longer as kappa grows. The last term keeps y finite where no step reaches s.
        """
        a_N = group.relative_inverse_N
        mean_y_N = group.mean_N * group.norms_N
        onto_N = group.cosine_NN @ mean_y_N
        mean_norm = jnp.sqrt(jnp.maximum(mean_y_N @ onto_N, 0.0))
        onto_N = jnp.clip(onto_N / jnp.maximum(mean_norm, 1e-30), -1.0, 1.0)
        # A zero gradient gains nothing: the worst gain s is never above 0. Then every s sought can
        # be reached (by d = 0), the last term is not needed, and kappa is s itself.
        idle = jnp.any(group.present_N & ~group.valid_N)
        hessian_NN = group.cosine_NN + jnp.where(idle, 0.0, a_N[:, None] * a_N[None, :])
        # From no step at all (kappa a <= b) to the shortest vector of the hull, as far as float32
        # tells it from zero; on a scale that is logarithmic to both sides of the smallest kappa.
        ratio = jnp.max(jnp.where(group.valid_N, 1.0 / jnp.maximum(a_N, 1e-30), 1.0))
        unit = 0.1 * self.c / ratio
        top = jnp.where(idle, 0.0, jnp.arcsinh(1e4 * ratio))
        bracket = (-jnp.arcsinh(ratio / unit), top)

        def solve(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            # A task that allows itself to lose more than any step near c costs it takes no part;
            # to write that as 1e9 would take the digits from the others.
            linear_N = jnp.minimum(onto_N - unit * jnp.sinh(x) * a_N, 4.0 * (1.0 + self.c))
            y_N = nonnegative_qp(hessian_NN, linear_N, group.valid_N)
            return y_N, jnp.sqrt(jnp.maximum(y_N @ group.cosine_NN @ y_N, 0.0))

        def refine(
            _: jax.Array, bracket: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            low, high = bracket
            inner = low + (high - low) * jnp.arange(1, _GRID + 1) / (_GRID + 1)
            length = jax.vmap(solve)(inner)[1]
            # The first point beyond; far beyond, lengths may be differences of large numbers.
            beyond = jnp.concatenate([length >= self.c, jnp.ones(1, bool)])
            points = jnp.concatenate([low[None], inner, high[None]])
            first = jnp.argmax(beyond)
            return points[first], points[first + 1]

        bracket = jax.lax.fori_loop(0, _GRIDS, refine, bracket)
        (y_low_N, length_low), (y_high_N, length_high) = solve(bracket[0]), solve(bracket[1])
        share = (self.c - length_low) / jnp.maximum(length_high - length_low, 1e-30)
        return y_low_N + jnp.clip(share, 0.0, 1.0) * (y_high_N - y_low_N), mean_norm


@register
@dataclasses.dataclass(frozen=True)
class NashMTL(GradientMethod):
    """The bargain in which no task can gain in proportion without another losing more.

    Weights a > 0 with `(Ga)_t = 1 / a_t`: the direction that maximises the product of the tasks'
    gains `g_t.d`. Navon et al. 2022, "Multi-task learning as a bargaining game". The
    update's norm is sqrt(number of tasks) whatever the gradients' norms are, so it does not shrink
    towards a minimum: choose `Balance.rescale` or an optimizer that ignores scale.

    When to use: losses of very different scales; the result does not depend on them.
    """

    cost: ClassVar[str] = "gradients of every task held apart; no state"

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`; a task without a gradient has nothing to bargain for."""
        y_N = nash_bargain(group.cosine_NN, group.valid_N)
        return y_N * group.inverse_N / group.scale, state


@register
@dataclasses.dataclass(frozen=True)
class IMTLG(GradientMethod):
    """The update whose projections on all tasks' gradients are equally long.

    Weights, summing to 1 and possibly negative, with `g_t.d / |g_t|` the same for all t. Liu et al.
    2021, "Towards impartial multi-task learning", here with a pseudo-inverse of the
    cosines for gradients that depend on each other. Where the sum of the unscaled weights is
    negative, the common projection is too and every task's loss grows: that is the method's.

    When to use: no task, however large its gradient, should matter more than another.
    """

    cost: ClassVar[str] = "gradients of every task held apart; no state"

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`."""
        y_N = jnp.sum(pseudo_inverse(group.cosine_NN, 10 * _EPS), axis=1)
        weights_N = y_N * group.relative_inverse_N
        return weights_N / jnp.sum(weights_N), state


@register
@dataclasses.dataclass(frozen=True)
class AlignedMTL(GradientMethod):
    """The mean of the gradients after their principal components were made equally long.

    `w = B 1/N` with `B = sqrt(smallest eigenvalue) G^(-1/2)` on the eigenvectors that count.
    Senushkin et al. 2023, "Independent component alignment for multi-task learning", algorithm 1.
    Directions with less than 1e-6 x tasks of the largest eigenvalue are left out: that is what
    float32 inner products hold, so gradients 1000 times smaller than the largest count as none.

    When to use: gradients that nearly cancel or dominate; mind that the update is as short as the
    weakest component.
    """

    cost: ClassVar[str] = "gradients of every task held apart; no state"

    def solve(
        self, state: State, group: Geometry, rng: jax.Array, seen: Observations
    ) -> tuple[jax.Array, State]:
        """See `GradientMethod.solve`."""
        values_N, vectors_NN = jnp.linalg.eigh(group.gram_NN)
        count = jnp.sum(group.present_N)
        kept_N = values_N > 10 * _EPS * count * values_N[-1]
        smallest = jnp.min(jnp.where(kept_N, values_N, jnp.inf))
        factor_N = jnp.where(kept_N, jnp.sqrt(smallest / jnp.where(kept_N, values_N, 1.0)), 0.0)
        return vectors_NN @ (factor_N * (vectors_NN.T @ group.mean_N)), state

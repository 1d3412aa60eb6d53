"""Small convex problems solved inside jit, in float32, in a fixed number of iterations.

No solver library: the matrices are tasks x tasks, and the host is never asked. Every function takes
a matrix of order one (cosines of gradients), so that one tolerance fits all scales; the caller
undoes the scaling. The fixed counts keep a step's time constant and its result reproducible.
"""

import jax
import jax.numpy as jnp

# The interior-point method gains about a digit an iteration; 16 reach float32's end from any start
# (tests/test_balance_gradient.py asks for 1e-3 of the mean gradient in the worst of the cases).
_QP_ITERATIONS = 16
_NASH_ITERATIONS = 40
# Added to the diagonal of what is factorised, never to the problem: Newton's matrix stays positive
# definite in float32 where gradients are parallel, and the solution is that of the problem given.
_RIDGE = 1e-6
_TO_THE_WALL = 0.99  # the share of the way to the nearest constraint that one step may take


def _keep_if_finite(new: tuple[jax.Array, ...], old: tuple[jax.Array, ...]) -> tuple:
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in new]))
    return tuple(jnp.where(finite, a, b) for a, b in zip(new, old, strict=True))


def nonnegative_qp(hessian_NN: jax.Array, linear_N: jax.Array, valid_N: jax.Array) -> jax.Array:
    """The minimiser of `y'Hy / 2 + q'y` over y >= 0.

    Mehrotra's predictor-corrector method (1992) for the conditions Hy + q = z, y, z >= 0, yz = 0.
    Of several minimisers it finds the one in the middle, which does not depend on the tasks' order.

    Args:
      hessian_NN: H, float32, positive semidefinite with a diagonal of order one.
      linear_N: q, float32, of any scale.
      valid_N: bool; the other variables are 0 and their rows are not looked at.

    Returns:
      float32 [N]; variables at their bound are exactly 0.
    """
    valid_NN = valid_N[:, None] & valid_N[None, :]
    eye_NN = jnp.eye(valid_N.size, dtype=jnp.float32)
    hessian_NN = jnp.where(valid_NN, hessian_NN, eye_NN)
    size = jnp.max(jnp.abs(jnp.where(valid_N, linear_N, 0.0)))
    size = jnp.where(size > 0, size, 1.0)
    linear_N = jnp.where(valid_N, linear_N / size, 1.0)

    def step(_: jax.Array, point: tuple[jax.Array, ...]) -> tuple:
        y_N, z_N = point
        residual_N = hessian_NN @ y_N + linear_N - z_N
        matrix_NN = hessian_NN + jnp.diag(z_N / y_N + _RIDGE)
        factor = jax.scipy.linalg.cho_factor(matrix_NN)

        def direction(product_N: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Towards y z = product."""
            gap_N = product_N / y_N - z_N
            dy_N = jax.scipy.linalg.cho_solve(factor, gap_N - residual_N)
            return dy_N, gap_N - z_N / y_N * dy_N

        def longest(dy_N: jax.Array, dz_N: jax.Array) -> jax.Array:
            """The step, at most 1, after which y and z are still not negative."""
            return 1.0 / jnp.maximum(1.0, jnp.max(jnp.maximum(-dy_N / y_N, -dz_N / z_N)))

        gap = jnp.mean(y_N * z_N)
        dy_N, dz_N = direction(jnp.zeros_like(y_N))
        far = longest(dy_N, dz_N)
        gap_after = jnp.mean((y_N + far * dy_N) * (z_N + far * dz_N))
        centre = gap * jnp.clip(gap_after / gap, 0.0, 1.0) ** 3
        dy_N, dz_N = direction(centre - dy_N * dz_N)
        far = jnp.minimum(1.0, _TO_THE_WALL * longest(dy_N, dz_N))
        return _keep_if_finite((y_N + far * dy_N, z_N + far * dz_N), point)

    ones_N = jnp.ones_like(linear_N)
    y_N, z_N = jax.lax.fori_loop(0, _QP_ITERATIONS, step, (ones_N, ones_N))
    return jnp.where(valid_N & (y_N > z_N), y_N * size, 0.0)


def nash_bargain(cosine_NN: jax.Array, valid_N: jax.Array) -> jax.Array:
    """The y > 0 with `(Cy) y = 1`, by damped Newton steps on `y'Cy / 2 - sum log y`.

    The function is strictly convex and self-concordant, so that steps shortened to 1 / (1 + the
    Newton decrement) converge from anywhere (Boyd and Vandenberghe 2004, section 9.6).

    Args:
      cosine_NN: C, float32, positive semidefinite with a diagonal of one.
      valid_N: bool; the other variables are left out.

    Returns:
      float32 [N], 0 where not valid.
    """
    valid_NN = valid_N[:, None] & valid_N[None, :]
    cosine_NN = jnp.where(valid_NN, cosine_NN, jnp.eye(valid_N.size, dtype=jnp.float32))

    def step(_: jax.Array, point: tuple[jax.Array, ...]) -> tuple:
        (y_N,) = point
        downhill_N = 1.0 / y_N - cosine_NN @ y_N
        matrix_NN = cosine_NN + jnp.diag(1.0 / y_N**2 + _RIDGE)
        move_N = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix_NN), downhill_N)
        decrement = jnp.sqrt(jnp.maximum(jnp.sum(downhill_N * move_N), 0.0))
        far = jnp.where(decrement > 0.25, 1.0 / (1.0 + decrement), 1.0)
        return _keep_if_finite((y_N + far * move_N,), point)

    # The best of all equal y: parallel gradients start at the end.
    equal = jnp.sqrt(valid_N.size / jnp.maximum(jnp.sum(cosine_NN), _RIDGE))
    (y_N,) = jax.lax.fori_loop(
        0, _NASH_ITERATIONS, step, (jnp.full(valid_N.size, equal, jnp.float32),)
    )
    return jnp.where(valid_N, y_N, 0.0)


def pseudo_inverse(matrix_NN: jax.Array, tolerance: float) -> jax.Array:
    """Moore-Penrose inverse of a symmetric matrix without eigenvalues below tolerance x largest."""
    values_N, vectors_NN = jnp.linalg.eigh(matrix_NN)
    kept_N = values_N > tolerance * values_N[-1]
    inverse_N = jnp.where(kept_N, 1.0 / jnp.where(kept_N, values_N, 1.0), 0.0)
    return (vectors_NN * inverse_N[None, :]) @ vectors_NN.T

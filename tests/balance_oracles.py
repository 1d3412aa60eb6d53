"""Gradient-side methods in NumPy, float64, from the papers and on the gradients themselves.

`mtl_jax.balance` sees only inner products in float32; these work on the matrix of gradients J_TP
(a row for each task), by other algorithms, and return the combined gradient d_P unless said
otherwise.
"""

import numpy as np
import scipy.optimize


def pcgrad(jacobian_TP, order_TT):
    """Yu et al. 2020, algorithm 1, word for word; `order_TT[i]` lists the tasks i visits."""
    total = np.zeros(jacobian_TP.shape[1])
    for i, g_i in enumerate(jacobian_TP):
        g = g_i.copy()
        for j in order_TT[i]:
            g_j = jacobian_TP[j]
            if j != i and g @ g_j < 0:
                g = g - (g @ g_j) / (g_j @ g_j) * g_j
        total += g
    return total


def gradvac(jacobian_TP, phi_TT, order_TT, beta):
    """Wang et al. 2021, algorithm 1; returns (d, the new phi)."""
    total, phi_TT = np.zeros(jacobian_TP.shape[1]), phi_TT.copy()
    for i, g_i in enumerate(jacobian_TP):
        g = g_i.copy()
        for j in order_TT[i]:
            if j == i:
                continue
            g_j, target = jacobian_TP[j], phi_TT[i, j]
            phi = g @ g_j / (np.linalg.norm(g) * np.linalg.norm(g_j))
            if phi < target:
                above = target * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - target**2)
                below = np.linalg.norm(g_j) * np.sqrt(1 - target**2)
                g = g + np.linalg.norm(g) * above / below * g_j
            phi_TT[i, j] = (1 - beta) * target + beta * phi
        total += g
    return total, phi_TT


def mgda(jacobian_TP):
    """Desideri 2012: the shortest vector of the hull, by Lawson and Hanson's active sets.

    Where the weights sum to s it is s times as long, so the y >= 0 that makes `|y|^2 + (1 - s)^2`
    smallest points to it. Found for unit vectors, as norms may differ by orders of magnitude.
    """
    norms = np.linalg.norm(jacobian_TP, axis=1)
    units, inverse = jacobian_TP / norms[:, None], norms.min() / norms
    system = np.vstack([units.T, inverse])
    y = scipy.optimize.nnls(system, np.eye(len(system))[-1])[0]
    return y @ units * norms.min() / (y @ inverse)


def upgrad(jacobian_TP):
    """Quinton and Rey 2024: projections on the dual cone by Lawson and Hanson's active sets.

    Projecting g on {d: J d >= 0} is g + J'y with the y >= 0 that makes it shortest.
    """
    norms = np.linalg.norm(jacobian_TP, axis=1, keepdims=True)
    units = jacobian_TP / norms
    projected = [u + scipy.optimize.nnls(units.T, -u)[0] @ units for u in units]
    return np.mean(norms * np.stack(projected), axis=0)


def cagrad_gap(jacobian_TP, weights_T, c):
    """How far weights are from optimal for CAGrad: (duality gap, radius, both relative).

    The paper's problem and its dual: `max min_t g_t.d` over the ball, and
    `min g_w.g_0 + c |g_0| |g_w|` over the simplex. The latter is never below the former, so that
    equal values prove both optimal. w is what the weights have beyond the mean.
    """
    count = len(jacobian_TP)
    g_0 = jacobian_TP.mean(axis=0)
    radius = c * np.linalg.norm(g_0)
    d = weights_T @ jacobian_TP
    w = np.maximum(weights_T - 1 / count, 0)
    g_w = w / w.sum() @ jacobian_TP
    primal = np.min(jacobian_TP @ d)
    dual = g_w @ g_0 + radius * np.linalg.norm(g_w)
    size = np.linalg.norm(g_w) * np.linalg.norm(g_0)
    return (dual - primal) / size, np.linalg.norm(d - g_0) / radius


def cagrad(jacobian_TP, c):
    """Liu et al. 2021: by Lawson and Hanson's active sets and a root finder, for any scales.

    For each kappa the shortest step from g_0 after which no g_t.d is below some s (least distance
    programming); the kappa is sought whose step has the radius of the ball.
    """
    norms = np.linalg.norm(jacobian_TP, axis=1)
    units, inverse = jacobian_TP / norms[:, None], norms.min() / norms
    g_0 = jacobian_TP.mean(axis=0)
    size = np.linalg.norm(g_0)

    def step(x):
        system = np.vstack([units.T, inverse])
        right = np.append(-g_0 / size, inverse.min() * c * np.sinh(x))
        return scipy.optimize.nnls(system, right)[0] @ units

    def excess(x):
        return np.linalg.norm(step(x)) - c

    low, high = -np.arcsinh(2 / inverse.min() ** 2 / c), np.arcsinh(1e7 / inverse.min())
    root = high if excess(high) < 0 else scipy.optimize.brentq(excess, low, high, xtol=1e-13)
    return g_0 + size * step(root)


def imtlg(jacobian_TP):
    """Liu et al. 2021: linear equations for weights that sum to 1 and make projections equal."""
    units = jacobian_TP / np.linalg.norm(jacobian_TP, axis=1, keepdims=True)
    equal = (units[:1] - units[1:]) @ jacobian_TP.T
    system = np.vstack([equal, np.ones(len(jacobian_TP))])
    w = np.linalg.solve(system, np.eye(len(jacobian_TP))[-1])
    return w @ jacobian_TP


def aligned_mtl(jacobian_TP):
    """Senushkin et al. 2023, algorithm 1: all singular values become the smallest."""
    left, singular, right = np.linalg.svd(jacobian_TP, full_matrices=False)
    return singular.min() * (left @ right).mean(axis=0)


def nash(jacobian_TP):
    """Navon et al. 2022: the root of `a (JJ'a) = 1`, by a root finder in log a."""
    norms = np.linalg.norm(jacobian_TP, axis=1)
    units = jacobian_TP / norms[:, None]
    cosines = units @ units.T

    def excess(x):
        return x + np.log(np.maximum(cosines @ np.exp(x), 1e-12))

    # From the convex problem's own minimum, roughly; the root finder makes it exact.
    def potential(x):
        return np.exp(x) @ cosines @ np.exp(x) / 2 - x.sum()

    rough = scipy.optimize.minimize(potential, np.zeros(len(norms)), method="BFGS").x
    root = scipy.optimize.root(excess, rough, tol=1e-14).x
    return (np.exp(root) / norms) @ jacobian_TP


def gradnorm_trajectory(norms_ST, losses_ST, present_ST, alpha, lr, floor):
    """Chen et al. 2018, equations 1 and 2 step by step, with Adam (Kingma and Ba 2015).

    The derivative is taken by differences of the paper's loss, its target held constant.

    Returns:
      Weights [S, T], used at each step.
    """
    steps, tasks = norms_ST.shape
    v, first = np.zeros(tasks), np.full(tasks, np.nan)
    count, mean, square = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)
    used = []
    for number in range(steps):
        here = np.flatnonzero(present_ST[number])
        norms, losses = norms_ST[number, here], losses_ST[number, here]

        def weights(v_here):
            return len(v_here) * np.exp(v_here) / np.exp(v_here).sum()

        new = np.isnan(first[here])
        first[here[new]] = np.maximum(losses[new], floor)
        used.append(np.zeros(tasks))
        used[-1][here] = weights(v[here])
        if len(here) == 1:
            continue
        pace = losses / first[here] / np.mean(losses / first[here])
        target = np.mean(weights(v[here]) * norms) * pace**alpha

        def loss(v_here, norms=norms, target=target):
            return np.abs(weights(v_here) * norms - target).sum()

        grad = np.array(
            [(loss(v[here] + e) - loss(v[here] - e)) / 2e-6 for e in 1e-6 * np.eye(len(here))]
        )
        count[here] += 1
        mean[here] = 0.9 * mean[here] + 0.1 * grad
        square[here] = 0.999 * square[here] + 0.001 * grad**2
        unbiased = mean[here] / (1 - 0.9 ** count[here])
        unbiased_square = square[here] / (1 - 0.999 ** count[here])
        v[here] -= lr * unbiased / (np.sqrt(unbiased_square) + 1e-8)
    return np.stack(used)

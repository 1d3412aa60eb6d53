"""What pooled encoder states know of their task: PCA, CKA, silhouette and probes, each with a null.

Letters: N examples, D features, T tasks, K components.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtl_jax.errors import UserError


def pca(states_ND: np.ndarray, components: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Principal components by singular values of the centred states.

    Returns:
      (coordinates [N, K], share of the variance [K]). A component points to where its largest
      entry is positive, so that the picture does not flip between runs.

    Raises:
      UserError: more components than the states have.
    """
    states = _states(states_ND)
    centred = states - states.mean(axis=0)
    if not 1 <= components <= min(states.shape):
        raise UserError(
            f"{states.shape[0]} states of {states.shape[1]} features have no {components} "
            "principal components."
        )
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    total = max(float((s**2).sum()), 1e-300)
    return (u * s * signs)[:, :components], (s**2 / total)[:components]


def linear_cka(x_ND: np.ndarray, y_NE: np.ndarray) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019) of two models on the same examples.

    1 for states that differ by rotation, shift and scale alone; 0 for uncorrelated ones.

    Raises:
      UserError: the rows are not of the same examples, or states do not vary.
    """
    x, y = _states(x_ND), _states(y_NE)
    if len(x) != len(y):
        raise UserError(f"CKA compares the same examples, got {len(x)} and {len(y)} of them.")
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    # |X'Y|^2 = <XX', YY'>: the smaller of both ways.
    if min(x.shape[1], y.shape[1]) < len(x):
        cross, own_x, own_y = (np.linalg.norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y)))
        cross = cross**2
    else:
        kernel_x, kernel_y = x @ x.T, y @ y.T
        cross = (kernel_x * kernel_y).sum()
        own_x, own_y = np.linalg.norm(kernel_x), np.linalg.norm(kernel_y)
    if own_x * own_y == 0:
        raise UserError("CKA of states that are all the same is not defined.")
    return float(cross / (own_x * own_y))


def silhouette(states_ND: np.ndarray, labels_N: Sequence[int]) -> float:
    """Mean silhouette (Rousseeuw 1987) of the tasks as clusters, by Euclidean distance, in [-1, 1].

    Raises:
      UserError: fewer than two tasks.
    """
    states, labels, tasks = _labelled(states_ND, labels_N)
    squares = (states**2).sum(axis=1)
    squared_NN = squares[:, None] + squares[None, :] - 2 * states @ states.T
    distance_NN = np.sqrt(np.maximum(squared_NN, 0.0))
    np.fill_diagonal(distance_NN, 0.0)
    onehot_NT = labels[:, None] == tasks[None, :]
    counts_T = onehot_NT.sum(axis=0)
    sums_NT = distance_NN @ onehot_NT
    own_N = onehot_NT.argmax(axis=1)
    rows = np.arange(len(states))
    # Among its own, an example is not its own neighbour.
    inside_N = sums_NT[rows, own_N] / np.maximum(counts_T[own_N] - 1, 1)
    means_NT = sums_NT / counts_T[None, :]
    means_NT[rows, own_N] = np.inf
    outside_N = means_NT.min(axis=1)
    largest_N = np.maximum(np.maximum(inside_N, outside_N), 1e-300)
    return float(np.where(counts_T[own_N] > 1, (outside_N - inside_N) / largest_N, 0.0).mean())


def between_share(states_ND: np.ndarray, labels_N: Sequence[int]) -> float:
    """Share of the variance that lies between the means of the tasks (eta squared), in [0, 1]."""
    states, labels, tasks = _labelled(states_ND, labels_N)
    centred = states - states.mean(axis=0)
    between = sum(
        (labels == task).sum() * (centred[labels == task].mean(axis=0) ** 2).sum() for task in tasks
    )
    return float(between / max(float((centred**2).sum()), 1e-300))


def fit_probe(
    states_ND: np.ndarray, labels_N: np.ndarray, tasks: int, penalty: float = 1e-3
) -> np.ndarray:
    """Weights [D + 1, T] of multinomial logistic regression, the last row the bias.

    Minimises mean cross-entropy + penalty / 2 * |weights|^2 (the bias is free) by Nesterov's
    accelerated gradient with the step 1 / Lipschitz constant, started anew when it overshoots.

    Args:
      states_ND: best of unit variance.
      labels_N: int, 0 to tasks - 1.
      tasks: T.
      penalty: of the squared weights; above 0, so that there is one minimum.
    """
    inputs = np.concatenate([states_ND, np.ones((len(states_ND), 1))], axis=1)
    target = np.eye(tasks)[labels_N]
    ridge = np.full((inputs.shape[1], 1), penalty)
    ridge[-1] = 0.0
    # The Hessian of softmax cross-entropy is at most half of the inputs' second moment.
    step = 1.0 / (0.5 * np.linalg.norm(inputs, 2) ** 2 / len(inputs) + penalty)
    weights = ahead = np.zeros((inputs.shape[1], tasks))
    momentum = 1.0
    for _ in range(1000):
        gradient = inputs.T @ (softmax(inputs @ ahead) - target) / len(inputs) + ridge * ahead
        new = ahead - step * gradient
        if (gradient * (new - weights)).sum() > 0:
            momentum, ahead = 1.0, new
        else:
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / following * (new - weights)
            momentum = following
        weights = new
        if np.abs(gradient).max() < 1e-7:
            break
    return weights


def softmax(logits_NT: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    powers = np.exp(logits_NT - logits_NT.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def probe_accuracy(
    states_ND: np.ndarray, labels_N: Sequence[int], *, folds: int = 5, seed: int = 0
) -> float:
    """Share of examples whose task a linear probe tells that was fitted without them.

    Args:
      states_ND: pooled states.
      labels_N: the task of each.
      folds: of the cross-validation; every task is spread over all of them.
      seed: of the folds.

    Raises:
      UserError: fewer than two tasks, or a task with fewer examples than folds.
    """
    states, labels, tasks = _labelled(states_ND, labels_N)
    numbers = np.searchsorted(tasks, labels)
    if (fewest := int(np.bincount(numbers).min())) < folds:
        raise UserError(
            f"A probe with {folds} folds needs as many examples of every task, one has {fewest}."
        )
    generator = np.random.default_rng(seed)
    fold_N = np.zeros(len(states), int)
    for task in range(len(tasks)):
        (of_task,) = np.nonzero(numbers == task)
        fold_N[generator.permutation(of_task)] = np.arange(len(of_task)) % folds
    right = 0
    for fold in range(folds):
        train = fold_N != fold
        mean, spread = states[train].mean(axis=0), states[train].std(axis=0)
        scaled = (states - mean) / np.where(spread > 0, spread, 1.0)
        weights = fit_probe(scaled[train], numbers[train], len(tasks))
        guesses = (scaled[~train] @ weights[:-1] + weights[-1]).argmax(axis=1)
        right += int((guesses == numbers[~train]).sum())
    return right / len(states)


@dataclasses.dataclass(frozen=True)
class Tested:
    """A statistic beside its values for shuffled tasks.

    Attributes:
      value: of the real tasks.
      null_mean: mean over shuffles.
      null_high: largest over shuffles; what the value must exceed to say something.
      shuffles: how many.
    """

    value: float
    null_mean: float
    null_high: float
    shuffles: int


def with_null(
    statistic: Callable[[np.ndarray, Any], float],
    states_ND: np.ndarray,
    labels_N: Sequence[int] | np.ndarray,
    *,
    shuffles: int = 19,
    seed: int = 0,
) -> Tested:
    """A statistic of states and tasks with its null: the same with the tasks shuffled.

    With 19 shuffles a value above all of them has a probability of 1/20 by chance.
    """
    generator = np.random.default_rng(seed)
    labels = np.asarray(labels_N)
    null = [statistic(states_ND, generator.permutation(labels)) for _ in range(shuffles)]
    value = statistic(states_ND, labels)
    return Tested(value, float(np.mean(null)), float(np.max(null)), shuffles)


def _states(states: np.ndarray) -> np.ndarray:
    array = np.asarray(states, np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise UserError(f"States must be finite numbers [examples, features], not {array.shape}.")
    return array


def _labelled(
    states_ND: np.ndarray, labels_N: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    states, labels = _states(states_ND), np.asarray(labels_N)
    if labels.shape != states.shape[:1]:
        raise UserError(f"{len(states)} states need as many tasks, got {labels.shape}.")
    tasks = np.unique(labels)
    if len(tasks) < 2:
        raise UserError("To tell tasks apart, states of at least two tasks are needed.")
    return states, labels, tasks

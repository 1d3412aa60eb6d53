"""Hierarchical clustering by average linkage: the order that puts alike tasks side by side."""

import numpy as np


def average_linkage(distance_NN: np.ndarray) -> tuple[list[int], list[tuple[int, int, float]]]:
    """Clusters by average linkage (UPGMA, Sokal and Michener 1958).

    Args:
      distance_NN: symmetric distances; NaN where unknown counts as the largest known one.

    Returns:
      (order of the leaves, merges). A merge is (cluster, cluster, distance); leaf i is cluster i
      and merge m makes cluster N + m.
    """
    distance = np.array(distance_NN, np.float64)
    count = len(distance)
    known = distance[~np.isnan(distance)]
    distance[np.isnan(distance)] = known.max() if known.size else 1.0
    original = distance.copy()
    np.fill_diagonal(distance, np.inf)
    members = {i: [i] for i in range(count)}
    cluster = list(range(count))  # of each row; rows of clusters that are gone hold inf
    merges = []
    for number in range(count - 1):
        a, b = sorted(divmod(int(distance.argmin()), count))
        merges.append((cluster[a], cluster[b], float(distance[a, b])))
        left, right = members.pop(cluster[a]), members.pop(cluster[b])
        # Lance and Williams: the mean over the pairs of members.
        row = (len(left) * distance[a] + len(right) * distance[b]) / (len(left) + len(right))
        row[[a, b]] = np.inf
        distance[a], distance[:, a] = row, row
        distance[b], distance[:, b] = np.inf, np.inf
        cluster[a] = count + number
        members[count + number] = _joined(left, right, original)
    order = next(iter(members.values())) if members else []
    return order, merges


def _joined(left: list[int], right: list[int], distance: np.ndarray) -> list[int]:
    """Joins two ordered clusters so that the leaves that meet are the closest of the four ways."""
    ways = [(a, b) for a in (left, left[::-1]) for b in (right, right[::-1])]
    a, b = min(ways, key=lambda way: distance[way[0][-1], way[1][0]])
    return [*a, *b]

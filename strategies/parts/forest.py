# SPDX-License-Identifier: Apache-2.0
"""Choose which pairs of columns make the tree: those after which all other pairs fit best.

Works on denoised tables of all pairs, so it is post-processing. The classical choice is the
maximum spanning tree of how far each pair is from independence; that is the start here. A tree
also says something about the pairs that are not its edges, so edges are then swapped as long as
the mean error over all pairs falls.
"""

import numpy as np
from numpy.typing import NDArray

Edge = tuple[int, int]

_TRIED = 16  # worst pairs tried in one pass
_WORK = 1e8  # numbers computed at most, so that wide schemas end in seconds


def spanning_forest(scores: NDArray[np.float64]) -> list[Edge]:
    """Maximum spanning forest of the pairs with a score above 0, heaviest first.

    Args:
      scores: `(num_columns, num_columns)`, symmetric; its diagonal is not read.
    """
    first, second = np.triu_indices(len(scores), 1)
    part = list(range(len(scores)))
    edges: list[Edge] = []
    for i in np.argsort(-scores[first, second], kind="stable"):
        a, b = int(first[i]), int(second[i])
        if scores[a, b] > 0 and part[a] != part[b]:
            edges.append((a, b))
            part = [part[a] if p == part[b] else p for p in part]
    return edges


def best_forest(
    columns: NDArray[np.float64], pairs: NDArray[np.float64], linked: NDArray[np.bool_]
) -> list[Edge]:
    """Edges of the tree, or forest, that fits all pairs with the least mean error.

    Args:
      columns: Probabilities of each column, padded with zeros, `(num_columns, cells)`.
      pairs: Joint probabilities of each pair, `(num_columns, num_columns, cells, cells)`, with
        `pairs[b, a]` the transpose of `pairs[a, b]`.
      linked: Pairs that may become edges, `(num_columns, num_columns)`, symmetric.

    Returns:
      Edges `(a, b)` with a < b.
    """
    independent = np.einsum("ai,bj->abij", columns, columns)
    scores = np.where(linked, np.abs(pairs - independent).sum(axis=(2, 3)), 0.0)
    edges = spanning_forest(scores)
    conditionals = pairs / np.maximum(pairs.sum(axis=3, keepdims=True), 1e-300)
    gaps = _gaps(edges, columns, conditionals, pairs)
    left = _WORK / pairs.size
    while left > 0:
        best, best_gaps = edges, gaps
        for candidate in _swaps(edges, np.where(linked, gaps, 0.0)):
            left -= 1
            found = _gaps(candidate, columns, conditionals, pairs)
            if found.sum() < best_gaps.sum() * (1 - 1e-6):
                best, best_gaps = candidate, found
        if best is edges:
            break
        edges, gaps = best, best_gaps
    return sorted(edges)


def _swaps(edges: list[Edge], gaps: NDArray[np.float64]) -> list[list[Edge]]:
    """Forests with one of the worst pairs as an edge, in place of one between its ends."""
    first, second = np.triu_indices(len(gaps), 1)
    worst = np.argsort(-gaps[first, second], kind="stable")[:_TRIED]
    found = []
    for a, b in zip(first[worst].tolist(), second[worst].tolist(), strict=True):
        if gaps[a, b] > 0 and (a, b) not in edges:
            between: list[Edge] | None = path(edges, a, b)
            kept = [edges] if between is None else [[e for e in edges if e != x] for x in between]
            found += [[*others, (a, b)] for others in kept]
    return found


def path(edges: list[Edge], start: int, end: int) -> list[Edge] | None:
    """Edges on the way from one column to another; `None` if there is no way."""
    for column, _, way in walk(edges, start):
        if column == end:
            return way
    return None


def walk(edges: list[Edge], start: int) -> list[tuple[int, int, list[Edge]]]:
    """Columns of the tree that holds `start`, each after its parent: column, parent, way there.

    The start's parent is -1.
    """
    order: list[tuple[int, int, list[Edge]]] = [(start, -1, [])]
    for column, parent, way in order:  # grows while it is walked
        for a, b in edges:
            if column in (a, b):
                other = b if column == a else a
                if other != parent:
                    order.append((other, column, [*way, (a, b)]))
    return order


def _gaps(
    edges: list[Edge],
    columns: NDArray[np.float64],
    conditionals: NDArray[np.float64],
    pairs: NDArray[np.float64],
) -> NDArray[np.float64]:
    """L1 distance of each pair's table from what a forest makes of it, `(columns, columns)`."""
    num_columns, cells = columns.shape
    model = np.zeros((num_columns, num_columns, cells, cells))
    seen: list[int] = []
    for root in range(num_columns):
        if root in seen:
            continue
        for column, parent, _ in walk(edges, root):
            if seen:
                joint = (
                    np.einsum("ai,j->aij", columns[seen], columns[column])
                    if parent < 0
                    else model[seen, parent] @ conditionals[parent, column]
                )
                model[seen, column] = joint
                model[column, seen] = joint.transpose(0, 2, 1)
            model[column, column] = np.diag(columns[column])
            seen.append(column)
    gaps = np.abs(model - pairs).sum(axis=(2, 3))
    np.fill_diagonal(gaps, 0.0)
    return np.asarray(gaps)

# SPDX-License-Identifier: Apache-2.0
"""Sets of columns that are measured together, and the junction tree that holds them all.

Exact inference in a graphical model works on the cliques of a triangulated graph, arranged in a
tree in which each column's cliques are connected. Its cost is the number of cells of those
cliques, so a method asks `tree_cells` before it adds a clique to a model.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Clique = tuple[int, ...]


@dataclass(frozen=True)
class JunctionTree:
    """Maximal cliques in a tree; what two neighbors share separates them.

    Attributes:
      cliques: Sorted column positions of each; together they hold every column.
      parents: Position of each clique's parent, which comes before it; -1 for the first. A clique
        that shares nothing with its parent begins an independent part.
    """

    cliques: tuple[Clique, ...]
    parents: tuple[int, ...]

    def separator(self, clique: int) -> Clique:
        """Columns that a clique shares with its parent."""
        parent = self.parents[clique]
        if parent < 0:
            return ()
        return tuple(sorted(set(self.cliques[clique]) & set(self.cliques[parent])))

    def holding(self, columns: Iterable[int], shape: Sequence[int]) -> int:
        """The smallest clique that holds all of `columns`; -1 if none does."""
        wanted = set(columns)
        found = [i for i, clique in enumerate(self.cliques) if wanted <= set(clique)]
        return min(found, key=lambda i: table_cells(self.cliques[i], shape), default=-1)


def table_cells(clique: Iterable[int], shape: Sequence[int]) -> int:
    """Cells of a table over some columns."""
    return math.prod(shape[column] for column in clique)


def tree_cells(cliques: Iterable[Clique], shape: Sequence[int]) -> int:
    """Cells of all maximal cliques of the junction tree of `cliques`; a cell takes 8 bytes."""
    return sum(table_cells(clique, shape) for clique in _maximal(cliques, shape))


def junction_tree(cliques: Iterable[Clique], shape: Sequence[int]) -> JunctionTree:
    """The junction tree of the graph in which the columns of each clique are joined.

    The graph is triangulated by eliminating, time and again, the column whose neighbors span the
    fewest cells, or the one that needs the fewest new edges, whichever ends with fewer cells.

    Args:
      cliques: Sets of columns that some clique of the tree must hold.
      shape: Cells of each column.

    Reference:
      Koller, Friedman (2009), "Probabilistic Graphical Models", sections 9.4.3 and 10.4.
    """
    maximal = sorted(_maximal(cliques, shape))
    order, parents = [0], [-1]
    best = {i: (_shared(maximal[i], maximal[0]), 0) for i in range(1, len(maximal))}
    while best:  # Prim's algorithm on the number of shared columns gives the running intersection
        chosen = max(best, key=lambda i: (best[i][0], -i))
        parents.append(order.index(best.pop(chosen)[1]))
        order.append(chosen)
        for i, (shared, _) in best.items():
            more = _shared(maximal[i], maximal[chosen])
            if more > shared:
                best[i] = (more, chosen)
    return JunctionTree(tuple(maximal[i] for i in order), tuple(parents))


def _shared(one: Clique, other: Clique) -> int:
    """Number of columns in both."""
    return len(set(one) & set(other))


def _maximal(cliques: Iterable[Clique], shape: Sequence[int]) -> list[Clique]:
    """Maximal cliques of the cheaper of two triangulations."""
    neighbors: list[set[int]] = [set() for _ in shape]
    for clique in cliques:
        for column in clique:
            neighbors[column].update(clique)
    for column, others in enumerate(neighbors):
        others.discard(column)
    logs = [math.log(cells) for cells in shape]
    found = [_eliminated(neighbors, logs, by_fill=by_fill) for by_fill in (False, True)]
    return min(found, key=lambda cliques: sum(table_cells(c, shape) for c in cliques))


def _eliminated(
    neighbors: Sequence[set[int]], logs: Sequence[float], *, by_fill: bool
) -> list[Clique]:
    """Maximal cliques that a greedy elimination of all columns leaves.

    Args:
      neighbors: Of each column; not changed.
      logs: Logarithm of each column's cells.
      by_fill: Next is the column with the fewest missing edges, not the one with the fewest cells.
    """
    near = [set(others) for others in neighbors]

    def cost(column: int) -> float:
        others = near[column]
        if not by_fill:
            return sum(logs[other] for other in others) + logs[column]
        missing = sum(len(others - near[other]) - 1 for other in others)
        return missing + 1e-3 * sum(logs[other] for other in others)

    costs = {column: cost(column) for column in range(len(near))}
    cliques: list[set[int]] = []
    while costs:
        column = min(costs, key=lambda c: (costs[c], c))
        del costs[column]
        others = near[column]
        clique = others | {column}
        if not any(clique <= known for known in cliques):
            cliques.append(clique)
        stale = set(others)
        for other in others:
            added = others - near[other] - {other}
            near[other] |= added
            near[other].discard(column)
            if added and by_fill:
                stale |= near[other]
        for other in stale:
            costs[other] = cost(other)
    return [tuple(sorted(clique)) for clique in cliques]

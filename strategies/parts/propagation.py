# SPDX-License-Identifier: Apache-2.0
"""Belief propagation in log space: from log potentials on a junction tree to calibrated beliefs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .cliques import Clique, JunctionTree, cells_of
from .graph_model import GraphModel, Table, ratio, sums_onto

Potentials = Mapping[Clique, Table]  # logarithms, one axis a column of the sorted clique


@dataclass(frozen=True, eq=False)
class Propagation:
    """What does not change while a model's potentials do: the tree and the order of the work.

    Attributes:
      shape: Cells of each column.
      tree: Junction tree that holds every scope.
      scopes: Sorted columns of each potential.
    """

    shape: tuple[int, ...]
    tree: JunctionTree
    scopes: tuple[Clique, ...]

    def calibrated(self, potentials: Potentials) -> tuple[GraphModel, float]:
        """The model whose log probability is the sum of the potentials, up to a constant.

        Args:
          potentials: One for each scope; -inf makes a combination impossible.

        Returns:
          The model, and the logarithm of its normalizing constant.

        Raises:
          ValueError: The potentials make every combination impossible.

        Reference:
          Koller, Friedman (2009), "Probabilistic Graphical Models", algorithm 10.3.
        """
        cliques, parents = self.tree.cliques, self.tree.parents
        messages: list[list[tuple[Clique, Table]]] = [[] for _ in cliques]
        beliefs: list[Table] = [np.zeros(0)] * len(cliques)
        upward: list[Table] = [np.zeros(0)] * len(cliques)
        log_total = 0.0
        with np.errstate(divide="ignore"):
            for i in reversed(range(len(cliques))):
                terms = [(scope, potentials[scope]) for scope in self._assigned[i]]
                belief = _combined([*terms, *messages[i]], cliques[i], self.shape)
                peak = float(belief.max())
                if not np.isfinite(peak):
                    raise ValueError("the constraints leave no combination of values possible")
                belief -= peak
                beliefs[i] = np.exp(belief, out=belief)
                if parents[i] >= 0:
                    shared = self.tree.separator(i)
                    upward[i] = sums_onto(belief, cliques[i], [shared])[shared]
                    messages[parents[i]].append((shared, np.log(upward[i])))
                    log_total += peak
                else:
                    mass = float(belief.sum())
                    belief /= mass
                    log_total += peak + float(np.log(mass))
        for i, parent in enumerate(parents):
            if parent >= 0:
                shared = self.tree.separator(i)
                above = sums_onto(beliefs[parent], cliques[parent], [shared])[shared]
                beliefs[i] *= _lifted(ratio(above, upward[i]), shared, cliques[i])
        return GraphModel(self.shape, self.tree, tuple(beliefs), dict(potentials)), log_total

    def sums(self, model: GraphModel) -> dict[Clique, Table]:
        """The model's marginal on every scope."""
        found: dict[Clique, Table] = {}
        for clique, belief, scopes in zip(
            self.tree.cliques, model.beliefs, self._assigned, strict=True
        ):
            known = sums_onto(belief, clique, scopes)
            found |= {scope: known[scope] for scope in scopes}
        return found

    @cached_property
    def _assigned(self) -> list[list[Clique]]:
        """Scopes of each clique; every scope stands at one."""
        assigned: list[list[Clique]] = [[] for _ in self.tree.cliques]
        for scope in self.scopes:
            assigned[self.tree.holding(scope, self.shape)].append(scope)
        return assigned


def _combined(terms: Sequence[tuple[Clique, Table]], clique: Clique, shape: Sequence[int]) -> Table:
    """Sum of tables over parts of a clique, as a new table over all of it.

    Small tables are added to each other first, so that few additions are as long as the clique.
    """
    pool = list(terms)
    while len(pool) > 1:
        pairs = [(i, j) for i in range(len(pool)) for j in range(i)]
        i, j = min(pairs, key=lambda p: cells_of({*pool[p[0]][0], *pool[p[1]][0]}, shape))
        (one, left), (other, right) = pool[i], pool[j]
        both = tuple(sorted({*one, *other}))
        pool = [term for k, term in enumerate(pool) if k not in (i, j)]
        pool.append((both, _lifted(left, one, both) + _lifted(right, other, both)))
    if not pool:
        return np.zeros([shape[c] for c in clique])
    scope, table = pool[0]
    if scope == clique and len(terms) > 1:
        return table
    full = np.empty([shape[c] for c in clique])
    full[...] = _lifted(table, scope, clique)
    return full


def _lifted(table: Table, scope: Clique, clique: Iterable[int]) -> Table:
    """A table over a part of a clique, with an axis of one for each other column."""
    sizes = dict(zip(scope, table.shape, strict=True))
    return table.reshape([sizes.get(column, 1) for column in clique])


def expanded(table: Table, groups: Sequence[NDArray[np.int64] | None]) -> Table:
    """A table over groups of cells as one over cells; `None` for an axis that is not grouped."""
    for axis, group in enumerate(groups):
        if group is not None:
            table = np.take(table, group, axis=axis)
    return table


def merged(table: Table, groups: Sequence[NDArray[np.int64] | None]) -> Table:
    """A table over cells as sums over groups; `None` for an axis that is not grouped."""
    for axis, group in enumerate(groups):
        if group is not None:
            into = np.zeros((len(group), int(group.max()) + 1))
            into[np.arange(len(group)), group] = 1.0
            table = np.moveaxis(np.tensordot(table, into, axes=(axis, 0)), -1, axis)
    return table

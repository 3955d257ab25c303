# SPDX-License-Identifier: Apache-2.0
"""Belief propagation in log space: from log potentials on a junction tree to calibrated beliefs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from .cliques import Clique, JunctionTree
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
                    shared = self._separators[i]
                    upward[i] = sums_onto(belief, cliques[i], [shared])[shared]
                    messages[parents[i]].append((shared, np.log(upward[i])))
                    log_total += peak
                else:
                    mass = float(belief.sum())
                    belief /= mass
                    log_total += peak + float(np.log(mass))
        for i, parent in enumerate(parents):
            if parent >= 0:
                shared = self._separators[i]
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
    def _separators(self) -> list[Clique]:
        """What each clique shares with its parent."""
        return [self.tree.separator(i) for i in range(len(self.tree.cliques))]

    @cached_property
    def _assigned(self) -> list[list[Clique]]:
        """Scopes of each clique; every scope stands at one."""
        assigned: list[list[Clique]] = [[] for _ in self.tree.cliques]
        for scope in self.scopes:
            assigned[self.tree.holding(scope, self.shape)].append(scope)
        return assigned


def _combined(terms: Sequence[tuple[Clique, Table]], clique: Clique, shape: Sequence[int]) -> Table:
    """Sum of tables over parts of a clique, as a new table over all of it."""
    sizes = tuple(shape[c] for c in clique)
    pool = [table for _, table in terms]
    names = [scope for scope, _ in terms]
    for i, j in _join_plan(tuple(names), clique, sizes):
        both = tuple(sorted({*names[i], *names[j]}))
        pool.append(_lifted(pool[i], names[i], both) + _lifted(pool[j], names[j], both))
        names.append(both)
    if not pool:
        return np.zeros(sizes)
    if names[-1] == clique and len(terms) > 1:
        return pool[-1]
    full = np.empty(sizes)
    full[...] = _lifted(pool[-1], names[-1], clique)
    return full


@lru_cache(maxsize=4096)
def _join_plan(
    scopes: tuple[Clique, ...], clique: Clique, sizes: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Which two tables to add next, by position; each sum is appended.

    Small tables are added to each other first, so that few additions are as long as the clique.
    """
    cells = dict(zip(clique, sizes, strict=True))
    names = list(scopes)
    costs = {
        (i, j): math.prod(cells[c] for c in {*names[i], *names[j]})
        for i in range(len(names))
        for j in range(i)
    }
    plan = []
    while costs:
        i, j = min(costs, key=lambda pair: costs[pair])
        plan.append((i, j))
        costs = {pair: cost for pair, cost in costs.items() if not {i, j} & set(pair)}
        names.append(tuple(sorted({*names[i], *names[j]})))
        left = set(range(len(names) - 1)) - {k for pair in plan for k in pair}
        for k in left:
            costs[len(names) - 1, k] = math.prod(cells[c] for c in {*names[-1], *names[k]})
    return tuple(plan)


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

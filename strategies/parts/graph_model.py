# SPDX-License-Identifier: Apache-2.0
"""A graphical model over columns: beliefs on a junction tree, exact marginals, and records.

The model is a product of tables over small sets of columns. On its junction tree two passes of
messages give every clique's exact joint distribution, its belief; all else is read from those.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from .cliques import Clique, JunctionTree
from .rounding import spread

Table = NDArray[np.float64]

_LEAST = 1e-280  # of a sum; below it a quotient may overflow


@dataclass(frozen=True, eq=False)
class GraphModel:
    """A distribution over columns that factorizes along a junction tree.

    Attributes:
      shape: Cells of each column.
      tree: Its cliques.
      beliefs: Joint probabilities of each clique's columns, one axis each; neighbors agree on
        what they share.
      potentials: Logarithms of the tables whose product the model is, by their columns, where
        a fit made it; only a further fit needs them.
    """

    shape: tuple[int, ...]
    tree: JunctionTree
    beliefs: tuple[Table, ...]
    potentials: Mapping[Clique, Table] = field(default_factory=dict)

    def marginal(self, columns: Sequence[int]) -> Table:
        """Exact joint probabilities of any columns, one axis each, in the order given.

        Columns of one clique are summed out of its belief. Others are found by passing tables
        to the first clique; memory grows with the product of the columns' cells.
        """
        (table,) = self.marginals([tuple(columns)])
        return table

    def marginals(self, cliques: Iterable[Sequence[int]]) -> list[Table]:
        """`marginal` of each; pairs and cliques of the model share their work."""
        asked = [tuple(columns) for columns in cliques]
        for columns in asked:
            if len(set(columns)) < len(columns) or not set(columns) <= set(range(len(self.shape))):
                raise ValueError(f"a marginal is over different columns, not {list(columns)}")
        inside: dict[int, list[Clique]] = {}
        found: dict[Clique, Table] = {}
        for clique in {tuple(sorted(columns)) for columns in asked}:
            holder = self.tree.holding(clique, self.shape)
            if holder >= 0:
                inside.setdefault(holder, []).append(clique)
            elif len(clique) == 2:
                found[clique] = self._pair(*clique)
            else:
                found[clique] = self._joint(clique)
        for holder, wanted in inside.items():
            found.update(sums_onto(self.beliefs[holder], self.tree.cliques[holder], wanted))
        tables = []
        for columns in asked:
            ordered = tuple(sorted(columns))
            tables.append(found[ordered].transpose([ordered.index(c) for c in columns]))
        return tables

    def sample(self, num_records: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Codes of records that follow the model as closely as whole counts can.

        Walks the tree from its first clique. The records that agree on what a clique shares with
        its parent receive its other columns in numbers that are the expected ones, rounded up or
        down without bias, in random order, so that columns which are independent given what
        they share stay so.

        Returns:
          `(num_records, num_columns)`.
        """
        codes = np.zeros((num_records, len(self.shape)), dtype=np.int32)
        for i, (clique, belief) in enumerate(zip(self.tree.cliques, self.beliefs, strict=True)):
            shared = self.tree.separator(i)
            new = tuple(c for c in clique if c not in shared)
            groups = np.zeros(num_records, dtype=np.int64)
            for column in shared:
                groups *= self.shape[column]
                groups += codes[:, column]
            order = [clique.index(column) for column in (*shared, *new)]
            cells = [self.shape[column] for column in new]
            probs = belief.transpose(order).reshape(-1, math.prod(cells))
            drawn = spread(groups, probs, rng)
            for column, size in zip(reversed(new), reversed(cells), strict=True):
                drawn, codes[:, column] = np.divmod(drawn, size)
        return codes

    @cached_property
    def _home(self) -> list[int]:
        """The first clique on the walk from the root that holds each column."""
        home = [-1] * len(self.shape)
        for i, clique in enumerate(self.tree.cliques):
            for column in clique:
                home[column] = i if home[column] < 0 else home[column]
        return home

    @cached_property
    def _neighbors(self) -> list[list[int]]:
        """Cliques beside each clique in the tree."""
        beside: list[list[int]] = [[] for _ in self.tree.cliques]
        for child, parent in enumerate(self.tree.parents):
            if parent >= 0:
                beside[child].append(parent)
                beside[parent].append(child)
        return beside

    def _shared(self, one: int, other: int) -> Clique:
        """Columns on both sides of an edge of the tree."""
        return tuple(c for c in self.tree.cliques[one] if c in self.tree.cliques[other])

    @cached_property
    def _steps(self) -> dict[tuple[int, Clique, Clique], Table]:
        """Conditionals that `_step` has formed."""
        return {}

    def _step(self, clique: int, given: Clique, wanted: Clique) -> Table:
        """Probabilities of `wanted` given `given`, both in a clique; axes given, then new ones."""
        key = (clique, given, wanted)
        if key not in self._steps:
            new = tuple(c for c in wanted if c not in given)
            both = tuple(sorted({*given, *new}))
            columns = self.tree.cliques[clique]
            sums = sums_onto(self.beliefs[clique], columns, [both, given])
            joint = sums[both].transpose([both.index(c) for c in (*given, *new)])
            below = sums[given].reshape(sums[given].shape + (1,) * len(new))
            self._steps[key] = ratio(joint, np.broadcast_to(below, joint.shape))
        return self._steps[key]

    @cached_property
    def _reached(self) -> dict[int, dict[int, Table]]:
        """What `_pair` has formed: for a column, its joint with every other."""
        return {}

    def _pair(self, first: int, second: int) -> Table:
        """Joint of two columns that no clique holds together."""
        if first not in self._reached:
            self._reached[first] = self._from(first)
        return self._reached[first][second]

    def _from(self, column: int) -> dict[int, Table]:
        """Joint of a column with each later column that shares no clique with it.

        Carries the joint of the column and an edge's shared columns along the tree.
        """
        home = self._home[column]
        joints: dict[int, Table] = {}
        start = self.tree.cliques[home]
        walk: list[tuple[int, int, Clique, Table]] = [
            (home, -1, start, np.zeros(0))  # inside its own cliques nothing is carried
        ]
        while walk:
            clique, origin, given, carried = walk.pop()
            columns = self.tree.cliques[clique]
            inside = column in columns
            if not inside:
                for other in columns:
                    if other > column and other not in joints and other not in given:
                        step = self._step(clique, given, (other,))
                        joints[other] = np.tensordot(carried, step, axes=len(given))
            for following in self._neighbors[clique]:
                if following == origin:
                    continue
                shared = self._shared(clique, following)
                if column in self.tree.cliques[following]:
                    walk.append((following, clique, shared, np.zeros(0)))
                    continue
                if inside:
                    both = tuple(sorted({column, *shared}))
                    table = sums_onto(self.beliefs[clique], columns, [both])[both]
                    passed = np.moveaxis(table, both.index(column), 0)
                else:
                    passed = self._carry(clique, given, shared, carried)
                walk.append((following, clique, shared, passed))
        return joints

    def _carry(self, clique: int, given: Clique, shared: Clique, carried: Table) -> Table:
        """A joint with `given` turned into a joint with `shared`; the first axis stays."""
        step = self._step(clique, given, shared)
        new = tuple(c for c in shared if c not in given)
        letters = {c: chr(98 + i) for i, c in enumerate((*given, *new))}
        left = "a" + "".join(letters[c] for c in given)
        right = "".join(letters[c] for c in (*given, *new))
        kept = "".join(letters[c] for c in shared)
        passed: Table = np.einsum(f"{left},{right}->a{kept}", carried, step, optimize=True)
        return passed

    def _joint(self, wanted: Clique) -> Table:
        """Joint of any sorted columns, by passing tables from the leaves to the first clique."""
        children: list[list[int]] = [[] for _ in self.tree.cliques]
        for child, parent in enumerate(self.tree.parents):
            if parent >= 0:
                children[parent].append(child)
        needed = [any(self._home[c] == i for c in wanted) for i in range(len(children))]
        for child in range(len(children) - 1, 0, -1):
            needed[self.tree.parents[child]] |= needed[child]

        def below(clique: int) -> tuple[Clique, Table]:
            """Joint of the parent's share and all wanted columns at and under a clique."""
            columns, table = self.tree.cliques[clique], self.beliefs[clique]
            above = self.tree.separator(clique)
            under = [child for child in children[clique] if needed[child]]
            keep = {c for c in columns if c in wanted or c in above}
            for child in under:
                keep |= set(self.tree.separator(child))
            axes = tuple(c for c in columns if c in keep)
            table = sums_onto(table, columns, [axes])[axes]
            for child in under:
                shared = self.tree.separator(child)
                names, part = below(child)
                sums = part.sum(axis=tuple(i for i, c in enumerate(names) if c not in shared))
                lifted = sums.reshape([self.shape[c] if c in shared else 1 for c in names])
                axes, table = _product(
                    axes, table, names, ratio(part, lifted + np.zeros_like(part))
                )
            drop = tuple(i for i, c in enumerate(axes) if c not in wanted and c not in above)
            return tuple(c for c in axes if c in wanted or c in above), table.sum(axis=drop)

        first = next(i for i, need in enumerate(needed) if need)
        axes, table = below(first)
        return table.transpose([axes.index(c) for c in wanted])


def _product(first: Clique, left: Table, second: Clique, right: Table) -> tuple[Clique, Table]:
    """Two tables multiplied on the columns that they share."""
    names = first + tuple(c for c in second if c not in first)
    letters = {c: chr(97 + i) for i, c in enumerate(names)}
    one, other, out = ("".join(letters[c] for c in t) for t in (first, second, names))
    return names, np.einsum(f"{one},{other}->{out}", left, right)


def ratio(over: Table, under: Table) -> Table:
    """`over / under`, zero where `under` is none or so little that it is rounding."""
    found: Table = np.divide(over, under, out=np.zeros_like(over), where=under > _LEAST)
    return found


def sums_onto(table: Table, columns: Clique, wanted: Iterable[Clique]) -> Mapping[Clique, Table]:
    """Sums of a table onto each of some subsets of its columns, each from the smallest at hand.

    Args:
      table: One axis a column.
      columns: Sorted.
      wanted: Sorted subsets.
    """
    known: dict[Clique, Table] = {columns: table}
    for source, axis, result in _sum_plan(columns, table.shape, tuple(wanted)):
        known[result] = sum_out(known[source], axis)
    return known


@lru_cache(maxsize=4096)
def _sum_plan(
    columns: Clique, sizes: tuple[int, ...], wanted: tuple[Clique, ...]
) -> tuple[tuple[Clique, int, Clique], ...]:
    """Steps that sum out one column each: from which table, which axis, and what is left."""
    cells = dict(zip(columns, sizes, strict=True))
    known = {columns: math.prod(sizes)}
    rest = sorted({w for w in wanted if w != columns}, key=len, reverse=True)
    plan: list[tuple[Clique, int, Clique]] = []
    for subset in rest:
        target = set(subset)
        axes = min((k for k in known if target <= set(k)), key=lambda k: known[k])
        while len(axes) > len(subset):
            # first the column whose absence serves most of the others still wanted
            spare = [c for c in axes if c not in target]
            use = {c: sum(c not in w and set(w) <= set(axes) for w in rest) for c in spare}
            drop = max(spare, key=lambda c: (use[c], cells[c]))
            result = tuple(c for c in axes if c != drop)
            if result not in known:
                known[result] = known[axes] // cells[drop]
                plan.append((axes, axes.index(drop), result))
            axes = result
    return tuple(plan)


def sum_out(table: Table, axis: int) -> Table:
    """Sum over one axis, by a product with ones where that is the fastest way."""
    before, size = math.prod(table.shape[:axis]), table.shape[axis]
    after = math.prod(table.shape[axis + 1 :])
    rest = table.shape[:axis] + table.shape[axis + 1 :]
    ones = np.ones(size)
    if after == 1:
        return (table.reshape(before, size) @ ones).reshape(rest)
    if before == 1:
        return (ones @ table.reshape(size, after)).reshape(rest)
    sums: Table = np.matmul(ones, table.reshape(before, size, after)).reshape(rest)
    return sums

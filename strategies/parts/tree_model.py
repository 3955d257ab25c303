# SPDX-License-Identifier: Apache-2.0
"""A distribution over columns that is a tree of pairs: fit to noisy tables, marginals, records.

Each edge holds a table over groups of its two columns' cells. Inside a group a cell's share is
that of the column alone, whatever the other column is. With tables that agree on their common
columns the model is a product of conditionals, so marginals are exact and need no iteration.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .denoise import shrink, smooth
from .forest import walk
from .histograms import Grid, Measured, total_of
from .rounding import spread
from .simplex import to_simplex

_NEWTON_STEPS = 100
_CLOSE = 1e-10  # largest gap of a table's margins, as a share of its total
_DAMPING = 1e-3  # of Newton's steps, times the gap: none close to the solution
_FAR = 1e3  # how much less a guess counts than the least certain measurement


@dataclass(frozen=True, eq=False)
class Link:
    """An edge of the tree.

    Attributes:
      left: Groups of the one column.
      right: Groups of the other.
      table: Joint probabilities of the groups, `(left.size, right.size)`; its margins are those
        of the columns.
    """

    left: Grid
    right: Grid
    table: NDArray[np.float64]

    def turned(self) -> "Link":
        """The same edge, seen from its other end."""
        return Link(self.right, self.left, self.table.T)


@dataclass(frozen=True, eq=False)
class TreeModel:
    """A tree-structured distribution; a forest counts as one.

    Attributes:
      columns: Probabilities of each column's cells.
      links: The edges; no two make a loop.
    """

    columns: tuple[NDArray[np.float64], ...]
    links: tuple[Link, ...]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Pairs of columns that are linked."""
        return [(link.left.column, link.right.column) for link in self.links]

    def marginal(self, columns: Sequence[int]) -> NDArray[np.float64]:
        """Exact joint probabilities of any columns, one axis each, in the order given.

        Works by passing tables from the leaves of the tree to a root. Memory grows with the
        product of the columns' cells, times those of the widest column on their ways.
        """
        if len(set(columns)) < len(columns):
            raise ValueError(f"columns of a marginal must differ, not {list(columns)}")
        joint = np.ones(())
        axes: list[int] = []
        done: set[int] = set()
        for column in columns:
            if column not in done:
                kept, part = self._upward(column, -1, columns)
                joint = np.multiply.outer(joint, part)
                axes += kept
                done |= {c for c, _, _ in walk(self.edges, column)}
        return np.asarray(joint.transpose([axes.index(c) for c in columns]))

    def _upward(
        self, column: int, parent: int, wanted: Collection[int]
    ) -> tuple[list[int], NDArray[np.float64]]:
        """Joint of the wanted columns at and below a root `column`, given `parent` if any.

        With a parent its groups come as the first axis, and are not listed.
        """
        kept: list[int] = []
        cells = len(self.columns[column])
        below = np.ones(cells)
        for link in self._links_from(column):
            child = link.right.column
            if child != parent and set(wanted) & {
                c for c, p, _ in walk(self._without(column, child), child)
            }:
                names, part = self._upward(child, column, wanted)
                part = part[link.left.groups]
                lifted = below.reshape(below.shape + (1,) * len(names))
                below = lifted * part.reshape((cells,) + (1,) * len(kept) + part.shape[1:])
                kept += names
        if parent < 0:
            weights = self.columns[column][None, :]
        else:
            (link,) = [e for e in self._links_from(parent) if e.right.column == column]
            weights = self._conditional(link)
        if column in wanted:
            shape = (-1, cells) + (1,) * (below.ndim - 1)
            result = weights.reshape(shape) * below[None]
            kept = [column, *kept]
        else:
            result = np.tensordot(weights, below, axes=1)
        return kept, result[0] if parent < 0 else result

    def _without(self, a: int, b: int) -> list[tuple[int, int]]:
        """The edges but the one between two columns."""
        return [edge for edge in self.edges if set(edge) != {a, b}]

    def _links_from(self, column: int) -> list[Link]:
        """Edges at a column, each with the column on its left."""
        return [
            link if link.left.column == column else link.turned()
            for link in self.links
            if column in (link.left.column, link.right.column)
        ]

    def _conditional(self, link: Link) -> NDArray[np.float64]:
        """Probabilities of the right column's cells given the left's group, one row a group."""
        alone = self.columns[link.right.column]
        groups = link.right.merge(alone)
        inside = alone / np.where(groups > 0, groups, 1.0)[link.right.groups]
        rows = link.table.sum(axis=1, keepdims=True)
        # a group that never occurs: the right column as it is everywhere
        given = np.where(rows > 0, link.table / np.where(rows > 0, rows, 1.0), groups)
        cells = given[:, link.right.groups] * inside
        return np.asarray(cells / cells.sum(axis=1, keepdims=True))

    def sample(self, num_records: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Codes of records that follow the model as closely as whole counts can.

        Walks each tree from a root. The records that share a group of the parent column receive
        the child's cells in numbers that are the expected ones, rounded up or down without bias,
        and in random order. That order is drawn anew for each column, so that columns
        which are independent given the parent stay so.

        Returns:
          `(num_records, num_columns)`.
        """
        codes = np.zeros((num_records, len(self.columns)), dtype=np.int32)
        done: set[int] = set()
        for root in range(len(self.columns)):
            if root in done:
                continue
            for column, parent, _ in walk(self.edges, root):
                done.add(column)
                if parent < 0:
                    groups = np.zeros(num_records, dtype=np.int64)
                    probs = self.columns[column][None, :]
                else:
                    (link,) = [e for e in self._links_from(parent) if e.right.column == column]
                    groups = link.left.groups[codes[:, parent]]
                    probs = self._conditional(link)
                codes[:, column] = spread(groups, probs, rng)
        return codes


def fit(
    shape: Sequence[int],
    measured: Sequence[Measured],
    edges: Sequence[tuple[int, int]],
    *,
    total: float | None = None,
    bins: Mapping[int, int] | None = None,
    denoise: bool = True,
) -> TreeModel:
    """The tree model closest to noisy tables, each weighted by its noise.

    First every column is estimated from all tables it stands in: the least-squares solution.
    Then each edge's table is the one closest to the measured one among those with the
    columns' margins and nothing below zero. On a tree the two steps together are the weighted
    least squares fit of all tables at once, but that columns are brought to the simplex first.

    Args:
      shape: Cells of each column.
      measured: Noisy tables of one or two columns each.
      edges: Pairs of columns; each needs a table. Must not make a loop.
      total: Number of records if it is public; `None`: estimated.
      bins: Columns that are numbers, and how many of their first cells are neighboring bins,
        to be smoothed.
      denoise: Take out of an edge's table what noise explains (see `denoise.shrink`).

    Returns:
      A model; without any table, uniform independent columns.
    """
    total = total_of(measured) if total is None else total
    counts = columns_of(shape, measured, total, bins if denoise else None)
    links = [
        link_of(_finest(measured, edge), counts, denoise=denoise)
        for edge in (edges if total > 0 else ())
    ]
    return TreeModel(tuple(c / c.sum() for c in counts), tuple(links))


def columns_of(
    shape: Sequence[int],
    measured: Sequence[Measured],
    total: float,
    bins: Mapping[int, int] | None = None,
) -> list[NDArray[np.float64]]:
    """Counts of each column's cells from all tables that it stands in, none below zero.

    Args:
      shape: Cells of each column.
      measured: Noisy tables.
      total: What each column adds up to; 0.0 gives equal probabilities, adding up to one.
      bins: As for `fit`.
    """
    views = [_Views() for _ in shape]
    for table in measured:
        for axis, grid in enumerate(table.grids):
            others = table.counts.size / grid.size
            counts = table.counts if len(table.grids) == 1 else table.counts.sum(axis=1 - axis)
            views[grid.column].add(grid, counts, others * table.stddev**2)
    found = []
    for column, (cells, view) in enumerate(zip(shape, views, strict=True)):
        if total > 0 and view.of:
            found.append(to_simplex(view.solve(cells, total, (bins or {}).get(column, 0)), total))
        else:
            found.append(np.full(cells, max(total, 1.0) / cells))
    return found


class _Views:
    """Noisy sums of one column's cells, pooled by grid."""

    def __init__(self) -> None:
        self.of: dict[int, tuple[Grid, NDArray[np.float64], float]] = {}

    def add(self, grid: Grid, counts: NDArray[np.float64], variance: float) -> None:
        """Pool one more noisy view; finest grids share one key."""
        key = -1 if grid.size == len(grid.groups) else id(grid)
        _, sums, precision = self.of.get(key, (grid, np.zeros(grid.size), 0.0))
        self.of[key] = (grid, sums + counts / variance, precision + 1 / variance)

    def solve(self, cells: int, total: float, num_bins: int) -> NDArray[np.float64]:
        """Least squares estimate of the cells' counts, weighted by inverse variance.

        x = f + v G' (v G G' + D)^-1 (y - G f) with f the finest view and v its variance, y the
        sums over groups, G the groups, D their variances: as many equations as groups, not cells.
        """
        merged = [(grid, s / p, 1 / p) for key, (grid, s, p) in self.of.items() if key >= 0]
        if -1 in self.of:
            _, sums, precision = self.of[-1]
            fine, variance = sums / precision, 1 / precision
            if num_bins:
                fine[:num_bins] = smooth(fine[:num_bins], math.sqrt(variance))
        else:  # within a group nothing is known
            fine = np.full(cells, total / cells)
            variance = _FAR**2 * max(v for _, _, v in merged)
        if not merged:
            return fine
        ends = np.cumsum([0] + [grid.size for grid, _, _ in merged])
        system = np.zeros((ends[-1], ends[-1]))
        for i, (one, _, _) in enumerate(merged):
            for j, (other, _, _) in enumerate(merged):
                both = np.bincount(
                    one.groups * other.size + other.groups, minlength=one.size * other.size
                )
                block = system[ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
                block += variance * both.reshape(one.size, other.size)
        system[np.diag_indices_from(system)] += np.repeat([v for _, _, v in merged], np.diff(ends))
        gaps = np.concatenate([counts - grid.merge(fine) for grid, counts, _ in merged])
        pulls = np.linalg.solve(system, gaps)
        result = fine.copy()
        for (grid, _, _), (start, end) in zip(merged, pairwise(ends.tolist()), strict=True):
            result += variance * pulls[start:end][grid.groups]
        return result


def _finest(measured: Sequence[Measured], edge: tuple[int, int]) -> Measured:
    """The most exact table of a pair of columns."""
    tables = [m for m in measured if {g.column for g in m.grids} == set(edge) and len(m.grids) == 2]
    if not tables:
        raise ValueError(f"no table was measured for the edge {edge}")
    return min(tables, key=lambda table: table.stddev)


def link_of(
    measured: Measured, columns: Sequence[NDArray[np.float64]], *, denoise: bool = True
) -> Link:
    """An edge from its noisy table and the columns' counts.

    Args:
      measured: A table of two columns.
      columns: Estimated counts of each column's cells, adding up to the same above 0.
      denoise: Take out what noise explains (see `denoise.shrink`).
    """
    left, right = measured.grids
    rows, cols = left.merge(columns[left.column]), right.merge(columns[right.column])
    independent = np.outer(rows, cols) / rows.sum()
    residual = measured.counts - independent
    if denoise:
        sizes = np.array([[left.size, right.size]])
        residual = shrink(residual[None], np.array([measured.stddev]), sizes)[0]
    table = with_margins(independent + residual, rows, cols)
    return Link(left, right, table / table.sum())


def with_margins(
    table: NDArray[np.float64], rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The closest non-negative table with the given margins, in Euclidean distance.

    It is max(0, table + u + v) for some u of each row and v of each column; Newton's method on
    the dual finds them.

    Args:
      table: Any numbers, `(num_rows, num_columns)`.
      rows: Sum of each row, >= 0.
      columns: Sum of each column, >= 0; adding up to what the rows do.
    """
    num_rows = len(rows)
    scale = float(rows.sum())
    wanted = np.concatenate([rows, columns]) / scale
    table = table / scale

    def table_at(shift: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.maximum(table + shift[:num_rows, None] + shift[num_rows:], 0.0))

    def dual(shift: NDArray[np.float64]) -> float:
        return float(0.5 * np.square(table_at(shift)).sum() - shift @ wanted)

    shift = np.zeros(len(wanted))
    for _ in range(_NEWTON_STEPS):
        found = table_at(shift)
        gap = wanted - np.concatenate([found.sum(axis=1), found.sum(axis=0)])
        if np.abs(gap).max() < _CLOSE:
            break
        active = (found > 0).astype(np.float64)
        curvature = np.zeros((len(wanted), len(wanted)))
        curvature[:num_rows, num_rows:] = active
        curvature += curvature.T
        curvature[np.diag_indices_from(curvature)] = (
            np.concatenate([active.sum(axis=1), active.sum(axis=0)]) + _DAMPING * np.abs(gap).max()
        )
        step = np.linalg.solve(curvature, gap)
        length, before, slope = 1.0, dual(shift), float(gap @ step)
        while length > 1e-6 and dual(shift + length * step) > before - 1e-4 * length * slope:
            length /= 2
        shift = shift + length * step
    return _rounded(table_at(shift), wanted[:num_rows], wanted[num_rows:]) * scale


def _rounded(
    table: NDArray[np.float64], rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A table whose margins nearly hold, moved by no more than twice their gap so that they do.

    Reference:
      Altschuler, Weed, Rigollet (2017), "Near-linear time approximation algorithms for optimal
      transport via Sinkhorn iteration", algorithm 2, https://arxiv.org/abs/1705.09634.
    """
    table = table * np.minimum(_ratio(rows, table.sum(axis=1)), 1.0)[:, None]
    table = table * np.minimum(_ratio(columns, table.sum(axis=0)), 1.0)
    row_gaps = np.maximum(rows - table.sum(axis=1), 0.0)
    column_gaps = np.maximum(columns - table.sum(axis=0), 0.0)
    gap = float(row_gaps.sum())
    return table + np.outer(row_gaps, column_gaps) / gap if gap > 0 else table


def scaled(
    tables: NDArray[np.float64], rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One step of proportional fitting: scale to the margins of rows, then to those of columns.

    Args:
      tables: Non-negative, `(num_tables, num_rows, num_columns)`.
      rows: Sums wanted, `(num_tables, num_rows)`.
      columns: Sums wanted, `(num_tables, num_columns)`.
    """
    tables = tables * _ratio(rows, tables.sum(axis=2))[:, :, None]
    return tables * _ratio(columns, tables.sum(axis=1))[:, None, :]


def _ratio(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """`wanted / found`, zero where nothing was found."""
    return np.divide(wanted, found, out=np.zeros_like(found), where=found > 0)

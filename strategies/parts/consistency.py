# SPDX-License-Identifier: Apache-2.0
"""Make noisy tables agree on what they share, and turn them into tables that could be."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .histograms import Measured
from .simplex import to_simplex

_FITTINGS = 20  # proportional fittings of a table to its columns
_FLOOR = 1e-3  # share of independent columns that is mixed in, so that no row lacks a cell


def agreed(
    tables: Sequence[Measured], columns: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Noisy counts of tables, corrected so that they agree with the columns and each other.

    What several tables say of the same columns is averaged, each weighted by the inverse of its
    variance, and every one of them is moved to the average with all cells of a kind moved alike:
    the least-squares correction. Small sets of columns come first; what is corrected for larger
    ones adds up to zero over theirs, so that nothing is undone.

    Args:
      tables: Noisy tables. Those that share two columns or more must cut them by the same grids.
      columns: Estimated counts of each column, which are taken as they are.

    Reference:
      Qardaji, Yang, Li (2014), "PriView: Practical Differentially Private Release of Marginal
      Contingency Tables", section 4.2, https://doi.org/10.1145/2588555.2588575.
    """
    counts = [table.counts for table in tables]
    for i, table in enumerate(tables):
        for axis, grid in enumerate(table.grids):
            counts[i] = _moved(counts[i], (axis,), grid.merge(columns[grid.column]))
    for shared in _shared_sets(tables):
        axes = {
            i: tuple([g.column for g in table.grids].index(column) for column in shared)
            for i, table in enumerate(tables)
            if set(shared) <= {g.column for g in table.grids}
        }
        parts = [_summed(counts[i], kept) for i, kept in axes.items()]
        # of a sum: as many cells were added up as the table has for each one of the part
        weights = [
            part.size / (counts[i].size * tables[i].stddev ** 2)
            for i, part in zip(axes, parts, strict=True)
        ]
        average = np.average(parts, axis=0, weights=weights)
        for i, kept in axes.items():
            counts[i] = _moved(counts[i], kept, average)
    return counts


def plausible(
    counts: NDArray[np.float64], margins: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The table nearest to `counts` with nothing below zero, then fitted to its margins.

    Args:
      counts: Any numbers, one axis a column.
      margins: Counts of each axis, none below zero, all with one total above zero.
    """
    total = float(margins[0].sum())
    table = to_simplex(counts.ravel(), total).reshape(counts.shape)
    spread = np.ones(counts.shape)
    for axis, margin in enumerate(margins):
        spread = spread * _along(margin / total, axis, counts.ndim)
    table = table + _FLOOR * total * spread
    for _ in range(_FITTINGS):
        for axis, margin in enumerate(margins):
            found = _summed(table, (axis,))
            ratio = np.divide(margin, found, out=np.zeros_like(found), where=found > 0)
            table = table * _along(ratio, axis, counts.ndim)
    return np.asarray(table * (total / table.sum()))


def _shared_sets(tables: Sequence[Measured]) -> list[tuple[int, ...]]:
    """Sets of two and more columns that tables share, the smallest first."""
    columns = [frozenset(g.column for g in table.grids) for table in tables]
    shared = {one & other for one, other in combinations(columns, 2)}
    while True:
        more = shared | {one & other for one, other in combinations(shared, 2)}
        if len(more) == len(shared):
            break
        shared = more
    return sorted((tuple(sorted(s)) for s in shared if len(s) > 1), key=lambda s: (len(s), s))


def _summed(table: NDArray[np.float64], kept: tuple[int, ...]) -> NDArray[np.float64]:
    """Sums over all axes but those in `kept`, whose order the result has."""
    others = tuple(a for a in range(table.ndim) if a not in kept)
    left = sorted(kept)
    return np.asarray(table.sum(axis=others).transpose([left.index(axis) for axis in kept]))


def _moved(
    table: NDArray[np.float64], kept: tuple[int, ...], wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`table` with the sums `wanted` over the axes `kept`, all cells of a sum moved alike."""
    found = _summed(table, kept)
    gap = (wanted - found) * (found.size / table.size)
    left = sorted(kept)
    gap = gap.transpose([kept.index(axis) for axis in left])
    shape = [table.shape[a] if a in kept else 1 for a in range(table.ndim)]
    return np.asarray(table + gap.reshape(shape))


def _along(margin: NDArray[np.float64], axis: int, ndim: int) -> NDArray[np.float64]:
    """A margin shaped to multiply a table along one axis."""
    return margin.reshape([-1 if a == axis else 1 for a in range(ndim)])

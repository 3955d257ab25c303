# SPDX-License-Identifier: Apache-2.0
"""Noisy tables of many pairs of columns: denoised together, and pooled with finer ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .denoise import shrink
from .histograms import Grid, Measured
from .tree_model import scaled, with_margins

_FITTINGS = 8  # proportional fittings of a table to its columns


@dataclass(frozen=True, eq=False)
class Pairs:
    """Tables of pairs as shares of all records; arrays are padded with zeros to one size.

    Attributes:
      ends: The two columns of each, `(num_pairs, 2)`.
      sizes: Rows and columns of each, `(num_pairs, 2)`.
      columns: Shares of each column's groups, `(num_columns, width)`.
      tables: Joint shares, with the columns' shares as margins, `(num_pairs, width, width)`.
      linked: Whether a table stands out from what noise makes of independence, `(num_pairs,)`.
    """

    ends: NDArray[np.int64]
    sizes: NDArray[np.int64]
    columns: NDArray[np.float64]
    tables: NDArray[np.float64]
    linked: NDArray[np.bool_]

    def table(self, pair: int) -> NDArray[np.float64]:
        """Joint shares of one pair."""
        rows, columns = self.sizes[pair].tolist()
        return self.tables[pair, :rows, :columns]


def denoised_pairs(
    counts: Sequence[NDArray[np.float64]],
    measured: Sequence[Measured],
    total: float,
    *,
    sure: float,
) -> Pairs:
    """What noisy tables say of pairs once noise is taken out and their columns are known.

    Args:
      counts: Estimated counts of each column's cells.
      measured: Noisy tables of two columns each; at least one.
      total: Number of records; > 0.
      sure: How far above the noise a table must stand to count as more than independent, where
        1 is the largest singular value that noise alone gives.
    """
    sizes = np.array([[grid.size for grid in table.grids] for table in measured])
    ends = np.array([[grid.column for grid in table.grids] for table in measured])
    width = int(sizes.max())
    columns = np.zeros((len(counts), width))
    tables = np.zeros((len(measured), width, width))
    for table, padded in zip(measured, tables, strict=True):
        rows, cols = table.counts.shape
        padded[:rows, :cols] = table.counts / total
        for grid in table.grids:
            columns[grid.column, : grid.size] = grid.merge(counts[grid.column]) / total
    first, second = columns[ends[:, 0]], columns[ends[:, 1]]
    independent = first[:, :, None] * second[:, None, :]
    stddevs = sure / total * np.array([table.stddev for table in measured])
    residuals = shrink(tables - independent, stddevs, sizes)
    tables = np.maximum(independent + residuals, 1e-9 * independent)
    for _ in range(_FITTINGS):
        tables = scaled(tables, first, second)
    return Pairs(ends, sizes, columns, tables, np.abs(residuals).sum(axis=(1, 2)) > 0)


def within(coarse: Grid, fine: Grid) -> Grid:
    """A grid over a finer one's groups; each of those lies in one group of the coarse."""
    groups = np.zeros(fine.size, dtype=np.int64)
    groups[fine.groups] = coarse.groups
    return Grid(coarse.column, groups)


def pooled(fine: Measured, coarse: Measured) -> Measured:
    """A fine table moved towards the sums that a coarse table of the same columns has.

    The least squares estimate of the fine counts from both, each weighted by its noise.

    Args:
      fine: Its grids lie within those of `coarse`, in the same order.
      coarse: Merges the groups of `fine`.
    """
    left, right = (within(c, f) for c, f in zip(coarse.grids, fine.grids, strict=True))
    into = np.zeros((left.size, len(left.groups)))
    into[left.groups, np.arange(len(left.groups))] = 1.0
    across = np.zeros((len(right.groups), right.size))
    across[np.arange(len(right.groups)), right.groups] = 1.0
    cells = np.outer(into.sum(axis=1), across.sum(axis=0))
    gap = coarse.counts - into @ fine.counts @ across
    pull = gap * fine.stddev**2 / (coarse.stddev**2 + fine.stddev**2 * cells)
    return Measured(fine.grids, fine.counts + into.T @ pull @ across.T, fine.stddev)


def mended(
    tables: Sequence[NDArray[np.float64]],
    measured: Sequence[Measured],
    total: float,
    *,
    sure: float,
) -> list[NDArray[np.float64] | None]:
    """A model's tables of pairs, moved to noisy ones by as much as noise does not explain.

    Args:
      tables: The model's joint shares over the grids of each measured table.
      measured: Noisy tables of two columns each.
      total: Number of records; > 0.
      sure: As in `denoised_pairs`, of the gap between model and measurement.

    Returns:
      Joint shares with the model's margins; `None` where the gap may well be noise.
    """
    found: list[NDArray[np.float64] | None] = []
    for table, noisy in zip(tables, measured, strict=True):
        gap = noisy.counts / total - table
        noise = np.array([sure * noisy.stddev / total])
        kept = shrink(gap[None], noise, np.array([table.shape]))[0]
        if kept.any():
            moved = with_margins(table + kept, table.sum(axis=1), table.sum(axis=0))
            found.append(moved / moved.sum())
        else:
            found.append(None)
    return found

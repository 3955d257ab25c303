# SPDX-License-Identifier: Apache-2.0
"""Find a number's bounds and equally heavy bins from noisy histogram trees over public cells."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...core.open_codes import single

BRANCHING = 8
TAIL = 4.0  # noise deviations of a node's count that the values beyond a bound may weigh
_CLEAR = 5.0  # deviations that the number of users must stand above zero to say anything
_EVEN = 0.25  # share of a finer grid's cells that is dealt out whatever the coarse one found
_LOWEST, _STEPS = -20, 8  # the coarse grid: its least power of two, and cells between two powers
_HIGHEST, _HIGHEST_WHOLE = 126, 52  # its last: as single precision and whole doubles allow


@dataclass(frozen=True)
class CountTree:
    """Counts of cells in a row, of runs of them, of runs of runs, and so on up to a few.

    Each record lights one node a level; `num_levels` levels of equal height h make its norm
    h * sqrt(num_levels). A flat histogram of m cells has an error of order sqrt(m) in the rank of
    a value, a tree one of order sqrt(branching) * log(m).

    Attributes:
      num_cells: Cells in the row; >= 1.

    Reference:
      Hay, Rastogi, Miklau, Suciu (2010), "Boosting the Accuracy of Differentially Private
      Histograms Through Consistency", section 4, https://arxiv.org/abs/0904.0942; branching as in
      Qardaji, Yang, Li (2013), "Understanding Hierarchical Methods for Differentially Private
      Histograms", section 3, https://doi.org/10.14778/2556549.2556576.
    """

    num_cells: int

    @cached_property
    def sizes(self) -> list[int]:
        """Nodes of each level, from the top (at most `BRANCHING` of them) to the cells."""
        sizes = [self.num_cells]
        while sizes[0] > BRANCHING:
            sizes.insert(0, -(-sizes[0] // BRANCHING))
        return sizes

    @property
    def num_levels(self) -> int:
        """Levels, which are the nodes that a record lights."""
        return len(self.sizes)

    @property
    def num_nodes(self) -> int:
        """Nodes of all levels."""
        return sum(self.sizes)

    def nodes(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Node of each cell at each level, all levels laid end to end, `(len(cells), num_levels)`.

        Example:
          >>> CountTree(64).nodes(np.array([0, 63])).tolist()
          [[0, 8], [7, 71]]
        """
        found = np.empty((len(cells), self.num_levels), dtype=np.int64)
        first = 0
        for level, size in enumerate(self.sizes):
            found[:, level] = cells // BRANCHING ** (self.num_levels - 1 - level) + first
            first += size
        return found

    def counts(self, noisy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Counts of the cells that fit all levels best and are not negative, `(num_cells,)`.

        From the cells up, a node's own count and the sum of its children's are averaged by their
        variances; from the top down, a node's count is dealt out to its children by the closest
        non-negative numbers that add up to it.

        Args:
          noisy: Counts of all nodes with noise of one size, `(num_nodes,)`.
        """
        levels = np.split(noisy, np.cumsum(self.sizes)[:-1])
        variance = np.ones(self.num_cells)
        best = [levels[-1]]
        for own in levels[-2::-1]:
            parents = np.arange(len(variance)) // BRANCHING
            below = np.bincount(parents, weights=variance)
            children = np.bincount(parents, weights=best[0])
            best.insert(0, (own * below + children) / (1 + below))
            variance = below / (1 + below)
        total = np.array([max(float(best[0].sum()), 0.0)])
        for level in best:
            total = _dealt(level, total)
        return total


def coarse_edges(*, whole: bool) -> NDArray[np.float64]:
    """Edges of the coarse public grid that any number falls on, the two outer ones included.

    Eight cells between each power of two and the next, of both signs, from about a millionth to
    1.6e38 (whole numbers: to 8.4e15), and one at either side of zero. A bound found on it is right
    to an eighth; a number beyond it counts in its last cell.

    Args:
      whole: For whole numbers: edges at halves, and none between two of them.
    """
    powers = np.arange(0, _HIGHEST_WHOLE + 1) if whole else np.arange(_LOWEST, _HIGHEST + 1)
    sizes = np.outer(2.0**powers, 1 + np.arange(_STEPS) / _STEPS).ravel()
    if whole:
        sizes = np.unique(np.floor(sizes)) - 0.5
        return np.unique(single(np.concatenate([-sizes, sizes])))
    return np.concatenate([-sizes[::-1], [0.0], sizes])


def finer_edges(
    edges: NDArray[np.float64],
    counts: NDArray[np.float64],
    stddev: float,
    *,
    num_cells: int,
    whole: bool,
) -> NDArray[np.float64]:
    """Edges of a grid whose cells are small where the counts on another grid are large.

    Args:
      edges: Edges of the other grid, the two outer ones included, `(cells + 1,)`.
      counts: Of its cells, by `CountTree.counts`.
      stddev: Standard deviation of the noise of a node of its tree; infinite: nothing is known.
      num_cells: About how many cells; there are more only where the other grid has more.
      whole: For whole numbers: edges at halves, and none between two of them.
    """
    first, last = _within(counts, stddev)
    weights = _weights(counts, stddev)[first : last + 1]
    share = _EVEN / len(weights) + (1 - _EVEN) * weights / weights.sum()
    parts = np.maximum(1, np.floor(share * num_cells)).astype(np.int64)
    lows, highs = edges[first : last + 1], edges[first + 1 : last + 2]
    if whole:
        parts = np.minimum(parts, np.maximum(1, np.floor(highs - lows))).astype(np.int64)
    cell = np.repeat(np.arange(len(parts)), parts)
    step = np.arange(len(cell)) - np.repeat(np.cumsum(parts) - parts, parts)
    fine = np.append(lows[cell] + (highs - lows)[cell] * step / parts[cell], highs[-1])
    return np.unique(single(np.floor(fine) + 0.5 if whole else fine))


def bin_edges(
    edges: NDArray[np.float64],
    counts: NDArray[np.float64],
    stddev: float,
    *,
    num_bins: int,
) -> NDArray[np.float64]:
    """Edges of at most `num_bins` bins that hold about equally many; the outer two are bounds.

    Only edges of the cells are taken. A cell that weighs more than a bin becomes one bin, and the
    others share out the rest.

    Args:
      edges: Edges of the cells, the two outer ones included, `(cells + 1,)`.
      counts: Of the cells, by `CountTree.counts`.
      stddev: Standard deviation of the noise of a node of its tree; infinite: nothing is known,
        and every cell counts alike.
      num_bins: Most bins.
    """
    first, last = _within(counts, stddev)
    weights = _weights(counts, stddev)[first : last + 1]
    ends = np.cumsum(np.append(0.0, np.minimum(weights, _bin_weight(weights, num_bins))))
    wanted = ends[-1] * np.arange(num_bins + 1) / num_bins
    nearest = np.searchsorted((ends[1:] + ends[:-1]) / 2, wanted)
    return np.asarray(edges[first + np.unique(nearest)])


def _bin_weight(weights: NDArray[np.float64], num_bins: int) -> float:
    """Weight of a bin when cells that are heavier have one bin each."""
    falling = np.sort(weights[weights > 0])[::-1]
    rest = np.append(np.cumsum(falling[::-1])[::-1], 0.0)
    for alone in range(min(num_bins, len(falling))):
        share = rest[alone] / (num_bins - alone)
        if falling[alone] <= share:
            return float(share)
    return float(falling[-1])


def _is_clear(counts: NDArray[np.float64], stddev: float) -> bool:
    """Whether the counts add up to more than noise."""
    return float(counts.sum()) > _CLEAR * stddev * math.sqrt(BRANCHING)


def _weights(counts: NDArray[np.float64], stddev: float) -> NDArray[np.float64]:
    """The counts, or ones where they say nothing."""
    return counts if _is_clear(counts, stddev) else np.ones(len(counts))


def _within(counts: NDArray[np.float64], stddev: float) -> tuple[int, int]:
    """First and last cell between the bounds: what lies beyond weighs no more than noise."""
    if not _is_clear(counts, stddev):
        return 0, len(counts) - 1
    heights = np.cumsum(counts)
    beyond = min(TAIL * stddev, heights[-1] / 4)
    first = int(np.searchsorted(heights, beyond, side="right"))
    last = int(np.searchsorted(heights, heights[-1] - beyond, side="left"))
    return first, max(first, last)


def _dealt(values: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values in runs of `BRANCHING`, each run brought to its total and above zero."""
    rows = np.full((len(totals), BRANCHING), -np.inf)
    rows.ravel()[: len(values)] = values
    falling = -np.sort(-rows, axis=1)
    known = np.isfinite(falling)
    excess = (np.cumsum(np.where(known, falling, 0.0), axis=1) - totals[:, None]) / np.arange(
        1, BRANCHING + 1
    )
    kept = np.maximum((known & (falling > excess)).sum(axis=1) - 1, 0)
    lowered = np.maximum(rows - excess[np.arange(len(rows)), kept][:, None], 0.0)
    return np.where(totals[:, None] > 0, lowered, 0.0).ravel()[: len(values)]

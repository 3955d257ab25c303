# SPDX-License-Identifier: Apache-2.0
"""Merge a column's cells into few groups: heavy cells alone, light ones in runs of equal weight."""

import math

import numpy as np
from numpy.typing import NDArray

_STEPS = 40  # halvings of the search for a threshold; far below any share that matters


def coarsen(shares: NDArray[np.float64], max_groups: int) -> NDArray[np.int64]:
    """Group of each cell, with at most `max_groups` groups, numbered from 0 without a gap.

    A cell heavier than a threshold stays alone; the others are merged with their neighbors
    in runs of about the threshold's weight. The threshold is the lowest that gives few enough
    groups. Runs of neighbors suit the bins of a number; for a category the order is that of the
    schema, which is public too.

    Args:
      shares: Weight of each cell, `(num_cells,)`; >= 0 with a sum above 0.
      max_groups: Most groups; >= 1.

    Example:
      >>> coarsen(np.array([0.1, 0.1, 0.5, 0.1, 0.1, 0.1]), 3).tolist()
      [0, 0, 1, 2, 2, 2]
    """
    if len(shares) <= max_groups:
        return np.arange(len(shares), dtype=np.int64)
    shares = shares / shares.sum()
    low, high = 1e-9, 2.0
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        if runs(shares, middle)[-1] < max_groups:
            high = middle
        else:
            low = middle
    return runs(shares, high)


def clear_cells(total: float, stddev: float, *, fewest: int, most: int) -> int:
    """Cells of a column such that the mean cell of a table of two columns clears its noise.

    Args:
      total: Number of records; >= 0.
      stddev: What the mean cell is to reach, in records: some deviations of the noise.
      fewest: Least cells, however much noise there is.
      most: Most cells, however little.
    """
    clear = math.isqrt(int(min(total / stddev, most**2)))
    return min(max(clear, fewest), most)


def runs(shares: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Groups of neighboring cells in which none but a cell alone weighs much more than `threshold`.

    Args:
      shares: Weight of each cell, `(num_cells,)`; >= 0.
      threshold: A cell this heavy stays alone; lighter neighbors make runs of about this weight.
    """
    heavy = shares >= threshold
    light = np.where(heavy, 0.0, shares)
    run = np.floor((np.cumsum(light) - light / 2) / threshold)
    starts = np.ones(len(shares), dtype=np.bool_)
    starts[1:] = heavy[1:] | heavy[:-1] | (run[1:] != run[:-1])
    return np.asarray(np.cumsum(starts) - 1, dtype=np.int64)

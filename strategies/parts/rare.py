# SPDX-License-Identifier: Apache-2.0
"""Merge a column's rare cells, those whose measured count does not stand clear of its noise."""

import math

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from .coarsen import runs

CLEAR = 3.0  # standard deviations of noise from which a cell counts as more than noise


def compress(
    counts: NDArray[np.float64],
    stddev: float,
    *,
    clear: float = CLEAR,
    ordered: bool = False,
) -> NDArray[np.int64]:
    """Group of each cell: one for each clear cell, and what is rare is merged.

    A cell below `clear` standard deviations of its noise says next to nothing in a table with
    other columns, and costs as much noise there as any. Groups are for such tables; the column's
    own histogram tells the cells of a group apart again when records are sampled.

    Args:
      counts: Measured counts, noisy or denoised, `(num_cells,)`; at least one.
      stddev: Standard deviation of the noise in each; >= 0, infinite if nothing was measured.
      clear: Standard deviations that a cell must reach to stay alone; > 0.
      ordered: Cells have an order, as the bins of a number do: rare neighbors are merged, in runs
        that each weigh about `clear * stddev`. Otherwise all rare cells make one group.

    Returns:
      `(num_cells,)`, numbered from 0 without a gap, in the order of the groups' first cells.

    Raises:
      ConfigError: `stddev` is below zero or `clear` is not above it.

    Example:
      >>> compress(np.array([90.0, 1.0, 70.0, -2.0, 4.0]), 2.0).tolist()
      [0, 1, 2, 1, 1]
      >>> compress(np.array([90.0, 1.0, 70.0, -2.0, 4.0]), 2.0, ordered=True).tolist()
      [0, 1, 2, 3, 3]

    Privacy:
      Post-processing of measured counts.

    Reference:
      McKenna, Miklau, Sheldon (2021), "Winning the NIST Contest", section 4.2 (domain
      compression), https://arxiv.org/abs/2108.04978.
    """
    if not (stddev >= 0 and clear > 0):
        raise ConfigError(f"stddev must be 0 or more and clear above 0, not {stddev}, {clear}")
    if not len(counts):
        raise ConfigError("a column without cells has nothing to merge")
    threshold = max(clear * stddev, np.finfo(np.float64).tiny)
    if math.isinf(threshold):
        return np.zeros(len(counts), dtype=np.int64)
    if ordered:
        return runs(np.maximum(counts, 0.0), threshold)
    rare = counts < threshold
    first = np.where(rare, np.argmax(rare), np.arange(len(counts)))
    return np.asarray(np.unique(first, return_inverse=True)[1], dtype=np.int64).reshape(-1)

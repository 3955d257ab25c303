# SPDX-License-Identifier: Apache-2.0
"""Turn noisy counts into counts that could be: none below zero, and of one total."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

CLEAR = 3.0  # standard deviations from which a total is more than noise


def to_simplex(noisy: NDArray[np.float64], total: float = 1.0) -> NDArray[np.float64]:
    """The closest non-negative vector with sum `total`, in Euclidean distance.

    Each value is lowered by one common amount and what falls below zero becomes zero, so that
    small values, which are mostly noise, vanish first.

    Args:
      noisy: Any numbers, `(num_cells,)`; at least one.
      total: Sum of the result; > 0.

    Returns:
      `(num_cells,)`, summing to `total`. Equal shares where `noisy` or `total` is not finite or
      `total` is not above 0: nothing is known then.

    Example:
      >>> to_simplex(np.array([0.75, 0.5, -0.5]), 1.0).tolist()
      [0.625, 0.375, 0.0]

    Reference:
      Duchi, Shalev-Shwartz, Singer, Chandra (2008), "Efficient Projections onto the l1-Ball",
      figure 1, https://doi.org/10.1145/1390156.1390191.
    """
    if not (math.isfinite(total) and total > 0):
        return np.full(len(noisy), 1.0 / len(noisy))
    if not np.isfinite(noisy).all():
        return np.full(len(noisy), total / len(noisy))
    falling = np.sort(noisy)[::-1]
    excess = np.cumsum(falling) - total
    ranks = np.arange(1, len(noisy) + 1)
    kept = int(np.flatnonzero(falling * ranks > excess)[-1]) if len(noisy) else 0
    result = np.maximum(noisy - excess[kept] / (kept + 1), 0.0)
    return np.asarray(result * (total / result.sum()), dtype=np.float64)


def pooled_total(histograms: Iterable[tuple[NDArray[np.float64], float]]) -> float:
    """The number of records that several noisy histograms of all records agree on.

    Each histogram's own sum is weighted by the inverse of its variance: its number of cells
    times the variance of one.

    Args:
      histograms: Noisy counts of any shape, each with the standard deviation of one count;
        infinite ones are left out.

    Returns:
      The weighted mean of the sums; 0.0 if it cannot be told from noise (below three of its
      standard deviations) or there is no histogram: nothing is known then.
    """
    weight = weighted = 0.0
    for counts, stddev in histograms:
        if math.isfinite(stddev):
            precision = 1.0 / (counts.size * stddev**2)
            weight += precision
            weighted += precision * float(counts.sum())
    if weight == 0 or weighted < CLEAR * math.sqrt(weight):
        return 0.0
    return weighted / weight

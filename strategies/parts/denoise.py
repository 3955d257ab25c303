# SPDX-License-Identifier: Apache-2.0
"""Take noise of known size out of noisy counts: by wavelets along a column, by rank in a pair."""

import math

import numpy as np
from numpy.typing import NDArray

_THRESHOLD = 2.0  # standard deviations that a wavelet coefficient must stand out by


def smooth(counts: NDArray[np.float64], stddev: float) -> NDArray[np.float64]:
    """A number's noisy histogram without the steps that are too small to be told from noise.

    Haar coefficients below two standard deviations are dropped, averaged over all shifts of the
    histogram, whose ends are mirrored. Spikes and gaps stay; plains become flat.

    Args:
      counts: Counts of neighboring bins, `(num_bins,)`.
      stddev: Standard deviation of each count's noise, independent of each other; > 0.

    Reference:
      Coifman, Donoho (1995), "Translation-Invariant De-Noising", section 3,
      https://doi.org/10.1007/978-1-4612-2544-7_9.
    """
    level = np.concatenate([counts, counts[::-1]])
    details = []
    for scale in range(int(math.log2(len(counts)))):
        following = np.roll(level, -(1 << scale))
        detail = (level - following) / 2
        noise = stddev / math.sqrt(2 << scale)  # of a detail: half a difference of two means
        details.append(np.where(np.abs(detail) > _THRESHOLD * noise, detail, 0.0))
        level = (level + following) / 2
    for scale, detail in reversed(list(enumerate(details))):
        level = (level + detail + np.roll(level - detail, 1 << scale)) / 2
    return level[: len(counts)]


def shrink(
    residuals: NDArray[np.float64],
    stddevs: NDArray[np.float64],
    sizes: NDArray[np.int64],
) -> NDArray[np.float64]:
    """What noisy pair tables differ from independence by, without what noise explains.

    The rows and columns of a table are centered, and each of its singular values is replaced by
    the one that is best under white noise of the given size. A table whose largest singular
    value is below what noise alone gives becomes zeros: its columns count as independent.

    Args:
      residuals: Counts less those of independent columns, `(num_pairs, rows, columns)`; tables
        smaller than the array are padded with zeros.
      stddevs: Of the noise of each count, `(num_pairs,)`; > 0.
      sizes: Rows and columns of each table, `(num_pairs, 2)`.

    Returns:
      As `residuals`; every row and column adds up to zero.

    Reference:
      Gavish, Donoho (2017), "Optimal Shrinkage of Singular Values", equation 7 (Frobenius
      loss), https://doi.org/10.1109/TIT.2017.2653801.
    """
    rows, columns = sizes[:, 0], sizes[:, 1]
    inside = (
        _inside(rows, residuals.shape[1])[:, :, None]
        & _inside(columns, residuals.shape[2])[:, None, :]
    )
    kept = np.where(inside, residuals, 0.0)
    kept -= kept.sum(axis=2, keepdims=True) / columns[:, None, None]
    kept = np.where(inside, kept, 0.0)
    kept -= kept.sum(axis=1, keepdims=True) / rows[:, None, None]
    kept = np.where(inside, kept, 0.0)
    left, values, right = np.linalg.svd(kept, full_matrices=False)
    # centering leaves noise in (rows - 1) x (columns - 1) dimensions
    long = np.maximum(np.maximum(rows, columns) - 1, 1)
    ratio = np.maximum(np.minimum(rows, columns) - 1, 1) / long
    scale = (stddevs * np.sqrt(long))[:, None]
    relative = values / scale
    above = relative > 1 + np.sqrt(ratio)[:, None]
    ratio = ratio[:, None]
    square = np.square(np.square(relative) - ratio - 1) - 4 * ratio
    best = np.sqrt(np.maximum(square, 0.0)) / np.maximum(relative, 1.0)
    return np.asarray((left * (np.where(above, best, 0.0) * scale)[:, None, :]) @ right)


def _inside(sizes: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Positions below each size, `(len(sizes), width)`."""
    return np.arange(width) < sizes[:, None]

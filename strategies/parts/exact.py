# SPDX-License-Identifier: Apache-2.0
"""Sums over pixels that no rounding touches, so that they are the same in any order and batch.

What a pixel's 255 steps weigh lies on a grid of whole multiples of 2^-30. A float64 holds a sum of
them exactly while it stays below 2^53 of these; beyond, it would hang on the order of its terms,
and so a user's row on how many others stand beside.
"""

import numpy as np
from numpy.typing import NDArray

GRID = 2.0**30


def sums_exactly(weights: NDArray[np.floating], height: float) -> bool:
    """Whether a sum over any image is exact.

    Args:
      weights: Of each pixel, `(num_pixels, num_sums)`; finite.
      height: What a full pixel's weight is multiplied by.
    """
    steepest = float(np.abs(weights).max(initial=0.0))
    return steepest * height * len(weights) < 2.0**53 / GRID / 2

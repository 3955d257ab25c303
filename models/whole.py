# SPDX-License-Identifier: Apache-2.0
"""Networks in whole numbers: their sums are exact, so they say the same in any batch, anywhere."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

VALUE_STEPS, WEIGHT_STEPS = 1 << 8, 1 << 12  # of one, as values and weights are kept


def through(
    values: NDArray[Any], weights: Mapping[str, NDArray[np.float64]], name: str = ""
) -> NDArray[np.float64]:
    """What a network makes of values, in steps of 1 / 256, cut off below zero between layers.

    Args:
      values: Whole numbers of steps, `(num_values, num_inputs)`.
      weights: `weight0`, `bias0` and so on, in whole numbers that float64 holds.
      name: What stands before each of those names.
    """
    last = sum(key.startswith(f"{name}weight") for key in weights) - 1
    values = values.astype(np.float64)
    for layer in range(last + 1):
        # whole numbers below 2^53: exact, however the product is summed
        sums = values @ weights[f"{name}weight{layer}"] + weights[f"{name}bias{layer}"]
        values = np.rint(sums / WEIGHT_STEPS)
        if layer < last:
            values = np.maximum(values, 0.0)
    return values

# SPDX-License-Identifier: Apache-2.0
"""Turn chances into whole numbers of records, with as little chance left as can be."""

import numpy as np
from numpy.typing import NDArray


def rounded_cells(
    probs: NDArray[np.float64], num_records: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Cells in rising order, each as often as expected, rounded up or down without bias."""
    ends = np.cumsum(probs)
    ends *= num_records / ends[-1]
    ends[-1] = num_records
    counts = np.diff(np.floor(ends + rng.random()), prepend=0.0)
    return np.repeat(np.arange(len(probs)), counts.astype(np.int64))

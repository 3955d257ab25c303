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


def spread(
    groups: NDArray[np.int64], probs: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """A cell for each record, drawn by its group's probabilities with the least variance.

    Args:
      groups: Group of each record, `(num_records,)`.
      probs: Relative chances of the cells in each group, `(num_groups, num_cells)`; a row of
        zeros counts as equal chances.
      rng: Source of the rounding and of the order.
    """
    num_groups, num_cells = probs.shape
    sizes = np.bincount(groups, minlength=num_groups)
    some = np.flatnonzero(sizes)
    ends = np.cumsum(probs[some], axis=1)
    ends[ends[:, -1] <= 0] = np.arange(1, num_cells + 1)
    ends *= (sizes[some] / ends[:, -1])[:, None]
    ends[:, -1] = sizes[some]
    counts = np.diff(np.floor(ends + rng.random((len(some), 1))), axis=1, prepend=0.0)
    filled = np.flatnonzero(counts)
    drawn = np.repeat(filled % num_cells, counts.ravel()[filled].astype(np.int64))
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    result = np.empty(len(groups), dtype=np.int64)
    result[order] = drawn
    return result

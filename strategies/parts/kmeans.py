# SPDX-License-Identifier: Apache-2.0
"""Centers of public embeddings, in whole steps: the same topics on every machine."""

import numpy as np
from numpy.typing import NDArray

_SWEEPS = 25  # over all embeddings, at most


def centers_of(
    places: NDArray[np.int16], num_centers: int, rng: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Centers of embeddings, and the nearest center of each.

    Distances are sums of whole numbers and centers are rounded to whole steps, so both are exact.

    Args:
      places: Embeddings in whole steps, `(num_records, dim)`; at least one.
      num_centers: How many; fewer come out where there are not so many different embeddings.
      rng: Public randomness of the first centers.

    Returns:
      Centers, `(num_centers, dim)`, none without a record, and positions, `(num_records,)`.

    Reference:
      Arthur and Vassilvitskii (2007), "k-means++: The Advantages of Careful Seeding".
    """
    points = places.astype(np.float64)
    centers = points[_spread(points, num_centers, rng)]
    nearest = _nearest(points, centers)
    for _ in range(_SWEEPS):
        counts = np.bincount(nearest, minlength=len(centers))
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, points)
        centers = np.rint(sums[counts > 0] / counts[counts > 0, None])
        before, nearest = nearest, _nearest(points, centers)
        if (counts > 0).all() and (nearest == before).all():
            break
    held, nearest = np.unique(nearest, return_inverse=True)
    return centers[held].astype(np.int16), nearest.astype(np.int64)


def _spread(points: NDArray[np.float64], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of first centers, each drawn by its squared distance from those before it."""
    chosen = [int(rng.integers(len(points)))]
    squared = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < num and squared.any():
        ends = np.cumsum(squared.astype(np.int64))
        chosen.append(int(np.searchsorted(ends, rng.integers(ends[-1]), side="right")))
        squared = np.minimum(squared, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return np.array(chosen, dtype=np.int64)


def _nearest(points: NDArray[np.float64], centers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Position of the nearest center of each point, the first of equally near ones."""
    distance = points @ (-2 * centers.T) + (centers**2).sum(axis=1)
    return np.asarray(distance.argmin(axis=1), dtype=np.int64)

# SPDX-License-Identifier: Apache-2.0
"""The nearest candidates of each record, in exact whole numbers: the same vote on every machine.

Features are whole numbers so small that every distance is exact in the floating-point type it is
computed in. So a vote depends neither on the linear algebra library nor on which records happen
to be looked at together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.embedding import STEPS
from ...models.pixels import pooled

_LEVELS = 255  # steps of a feature
_COARSEST = 63  # with fewer steps than this in float32, float64 is taken, exact up to 2^53
_EXACT32 = 1 << 24  # whole numbers up to here are exact in float32
_CHUNK = 1 << 22  # features or distances held at a time
_LONGEST = 2.0  # more than the square of an embedding's length, however coarsely it is rounded


@dataclass(frozen=True, eq=False)
class TableMetric:
    """Which differences between codes count, and how much.

    Attributes:
      num_cells: Cells of each column, `(num_columns,)`.
      num_bins: Bins of each number; 0 for a category. Cells past the bins (missing) are
        categories of their own, beside the lowest bin.
      ignored: Column that does not count, or -1.
      category_weight: Distance of two categories, where the full range of a number is 1.
    """

    num_cells: NDArray[np.int64]
    num_bins: NDArray[np.int64]
    ignored: int
    category_weight: float


class Finder:
    """Finds the nearest of a set of candidates.

    The squared distance is that of the columns, plus the sum of squared differences of the
    images' pooled pixels, where white is 1, or that of embeddings of length one where there are
    any. Among equally near ones the first counts.

    Args:
      codes: The candidates' codes, `(num_candidates, num_columns)`.
      images: The candidates' images, `(num_candidates, height, width, channels)`, or `None`.
      places: The candidates' embeddings in whole steps, `(num_candidates, dim)`, each of about
        one unit at most, or `None`. Images do not count beside them.
      groups: A record is compared with the candidates of its own group only,
        `(num_candidates,)`.
      metric: How codes differ.

    Attributes:
      features: The candidates', whole numbers, `(num_candidates, num_features)`.
    """

    def __init__(
        self,
        codes: NDArray[np.int32],
        images: NDArray[np.uint8] | None,
        groups: NDArray[np.int64],
        *,
        metric: TableMetric,
        places: NDArray[np.int16] | None = None,
    ) -> None:
        self._metric = metric
        codes = np.clip(codes, 0, metric.num_cells - 1)
        self._seen = {
            j: _lookup(codes[:, j], int(metric.num_bins[j]), int(metric.num_cells[j]))
            for j in range(codes.shape[1])
            if j != metric.ignored
        }
        heaviest = max(1.0, metric.category_weight**2 / 2) * len(self._seen)
        most = _LEVELS
        if places is not None:
            heaviest, most = heaviest + _LONGEST, STEPS
        elif images is not None:
            heaviest += pooled(images[:1])[0].size
        # a distance adds up terms of at most `3 * heaviest * levels**2`
        fitting = int(np.sqrt(_EXACT32 / max(1.0, 3 * heaviest)))
        self._dtype = np.float32 if fitting >= _COARSEST else np.float64
        self._levels = min(most, fitting) if fitting >= _COARSEST else most
        features = self._features(codes, images, places)
        self.features = features
        self._chunk = max(1, _CHUNK // max(features.shape[1], len(codes), 1))
        self._groups = {
            int(group): (members := np.flatnonzero(groups == group), features[members].T)
            for group in np.unique(groups)
        }

    def nearest(
        self,
        codes: NDArray[np.int32],
        images: NDArray[np.uint8] | None,
        groups: NDArray[np.int64],
        num_nearest: int = 1,
        places: NDArray[np.int16] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The nearest candidates of each record, and how far the very nearest is.

        Args:
          codes: The records' codes, `(num_records, num_columns)`; one out of range counts as
            the nearest one in range.
          images: The records' images, of the candidates' shape, or `None`.
          groups: Group of each record, `(num_records,)`.
          num_nearest: How many candidates; >= 1.
          places: The records' embeddings, of the candidates' length, or `None`.

        Returns:
          Positions in rising order, `(num_records, num_nearest)`, and squared distances,
          `(num_records,)`. Where a group has fewer candidates than that, and of a record whose
          embedding is zeros: -1 and infinity.
        """
        found = np.full((len(codes), num_nearest), -1, dtype=np.int64)
        squared = np.full(len(codes), np.inf)
        for start in range(0, len(codes), self._chunk):
            part = slice(start, start + self._chunk)
            features = self._features(
                np.clip(codes[part], 0, self._metric.num_cells - 1),
                None if images is None else images[part],
                None if places is None else places[part],
            )
            for group, (members, candidates) in self._groups.items():
                rows = np.flatnonzero(groups[part] == group)
                if not len(rows) or len(members) < num_nearest:
                    continue
                own = features[rows]
                # |x - c|^2 - |x|^2
                distance = own @ (-2 * candidates)
                distance += (candidates**2).sum(axis=0)
                best = np.empty((len(rows), num_nearest), dtype=np.int64)
                for k in range(num_nearest):
                    best[:, k] = distance.argmin(axis=1)
                    least = np.take_along_axis(distance, best[:, k : k + 1], axis=1)[:, 0]
                    if k == 0:
                        squared[start + rows] = (least + (own**2).sum(axis=1)) / self._levels**2
                    np.put_along_axis(distance, best[:, k : k + 1], np.inf, axis=1)
                found[start + rows] = np.sort(members[best], axis=1)
        if places is not None:
            nowhere = ~places.any(axis=1)
            found[nowhere], squared[nowhere] = -1, np.inf
        return found, squared

    def _features(
        self,
        codes: NDArray[np.int32],
        images: NDArray[np.uint8] | None,
        places: NDArray[np.int16] | None,
    ) -> NDArray[np.floating]:
        """Whole numbers whose squared distance is that of the records, `(num_records, dim)`."""
        parts = [np.zeros((len(codes), 0), dtype=self._dtype)]
        height = round(self._levels * self._metric.category_weight / np.sqrt(2))
        for j, seen in self._seen.items():
            num_bins, code = int(self._metric.num_bins[j]), codes[:, j]
            if num_bins > 1:
                place = np.rint(code * (self._levels / (num_bins - 1)))
                parts.append(np.where(code < num_bins, place, 0)[:, None].astype(self._dtype))
            lit = seen[code]
            block = np.zeros((len(codes), int(seen.max()) + 1), dtype=self._dtype)
            rows = np.flatnonzero(lit >= 0)
            block[rows, lit[rows]] = height
            parts.append(block)
        if places is not None:
            parts.append(np.rint(places * (self._levels / STEPS)).astype(self._dtype))
        elif images is not None:
            sums, white = pooled(images)
            levels = (sums * self._levels + white // 2) // white
            parts.append(levels.reshape(len(images), -1).astype(self._dtype))
        return np.concatenate(parts, axis=1)


def _lookup(codes: NDArray[np.int32], num_bins: int, num_cells: int) -> NDArray[np.int64]:
    """A feature for each category that some candidate has, -1 for all other cells."""
    features = np.full(num_cells, -1, dtype=np.int64)
    categories = np.unique(codes[codes >= num_bins])
    features[categories] = np.arange(len(categories))
    return features

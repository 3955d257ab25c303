# SPDX-License-Identifier: Apache-2.0
"""Count votes by candidate and by cluster of candidates, and read shares from the noisy counts."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ...core.query import NoisySum
from .simplex import pooled_total, to_simplex

_DRIFT = 0.5  # by which part of itself a family's votes may have changed since the last round


@dataclass(frozen=True)
class Estimate:
    """Votes of each candidate, as far as they are known.

    Attributes:
      votes: Unbiased, `(num_candidates,)`.
      variance: Of each, `(num_candidates,)`.
    """

    votes: NDArray[np.float64]
    variance: NDArray[np.float64]

    def agreeing(
        self,
        groups: NDArray[np.int64],
        totals: NDArray[np.float64],
        variance: NDArray[np.float64],
    ) -> Self:
        """The estimate once sums over groups of candidates are known from elsewhere too.

        Both are weighted by the inverse of their variances, and each group's votes are moved alike,
        which is what least squares does.

        Args:
          groups: Group of each candidate, `(num_candidates,)`.
          totals: What is known of each group's sum, `(num_groups,)`.
          variance: Of that, `(num_groups,)`; infinite where nothing is known.
        """
        size = np.bincount(groups, minlength=len(totals)).astype(np.float64)
        own = np.bincount(groups, weights=self.votes, minlength=len(totals))
        spread = np.bincount(groups, weights=self.variance, minlength=len(totals))
        trust = spread / (spread + variance)  # in the other figure
        moved = np.where(np.isfinite(variance), trust * (totals - own), 0.0) / np.maximum(size, 1)
        lower = 1 - np.where(np.isfinite(variance), trust, 0.0) / np.maximum(size, 1)
        return type(self)(self.votes + moved[groups], self.variance * lower[groups])

    def of_offspring(self, parents: NDArray[np.int64], shares: NDArray[np.float64]) -> "Estimate":
        """What the last round says of the sum of each family's votes in the next.

        Parents were chosen by these very votes, whose noise thus leans upwards. So the votes are
        taken as they were read, once what the noise explains was taken off.

        Args:
          parents: Parent of each new candidate, `(num_candidates,)`.
          shares: Of the votes, as they were read, `(num_parents,)`.
        """
        votes = shares * max(float(self.votes.sum()), 0.0)
        known = np.bincount(parents, minlength=len(votes)) > 0
        variance = self.variance + (_DRIFT * votes) ** 2
        return Estimate(votes, np.where(known, variance, math.inf))


@dataclass(frozen=True)
class Tally:
    """What a vote is counted in.

    Attributes:
      num_candidates: Cells of their own, one each.
      clusters: Cluster of each candidate, `(num_candidates,)`, from 0; `None`: no clusters. A vote
        for a candidate counts in its cluster's cell too.
      share: Of a vote's squared norm, what the cluster's cell has.
    """

    num_candidates: int
    clusters: NDArray[np.int64] | None = None
    share: float = 0.0

    @property
    def num_clusters(self) -> int:
        """Cells of clusters."""
        return 0 if self.clusters is None else int(self.clusters.max()) + 1

    @property
    def dim(self) -> int:
        """Cells of a user's vector."""
        return self.num_candidates + self.num_clusters

    def heights(self, num_votes: int) -> NDArray[np.float64]:
        """Height of each cell that a record lights, `(num_cells,)`: candidates, then clusters."""
        fine, coarse = self._heights
        return np.repeat([fine, coarse], [num_votes, num_votes if self.num_clusters else 0])

    def longest(self, num_votes: int) -> float:
        """Norm of a record's votes where all of them fall into one cluster."""
        fine, coarse = self._heights
        return math.hypot(fine * math.sqrt(num_votes), coarse * num_votes)

    def cells(self, votes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cells that votes for candidates, `(num_records, num_votes)`, light."""
        if self.clusters is None:
            return votes
        return np.hstack([votes, self.num_candidates + self.clusters[votes]])

    def read(
        self, noisy: NoisySum, earlier: Estimate | None, families: NDArray[np.int64]
    ) -> Estimate:
        """Votes of each candidate, by all that is known.

        Args:
          noisy: The round's sum.
          earlier: What the last round says of families, or `None`.
          families: Family of each candidate, `(num_candidates,)`.
        """
        fine, coarse = self._heights
        num = self.num_candidates
        found = Estimate(noisy.vector[:num] / fine, np.full(num, (noisy.stddev / fine) ** 2))
        if self.clusters is not None:
            variance = np.full(self.num_clusters, (noisy.stddev / coarse) ** 2)
            found = found.agreeing(self.clusters, noisy.vector[num:] / coarse, variance)
        if earlier is not None:
            found = found.agreeing(families, earlier.votes, earlier.variance)
        return found

    def shares(self, noisy: NoisySum, found: Estimate) -> NDArray[np.float64] | None:
        """Each candidate's share of the votes, by projection; `None` where all is noise."""
        fine, coarse = self._heights
        num = self.num_candidates
        sums = [(noisy.vector[:num] / fine, noisy.stddev / fine)]
        if self.clusters is not None:
            sums.append((noisy.vector[num:] / coarse, noisy.stddev / coarse))
        total = pooled_total(sums)
        if not total > 0:
            return None
        if self.clusters is None:
            return to_simplex(found.votes, total) / total
        by_cluster = np.zeros(self.num_clusters)
        np.add.at(by_cluster, self.clusters, found.votes)
        shares = np.zeros(num)
        for cluster, votes in enumerate(to_simplex(by_cluster, total)):
            members = np.flatnonzero(self.clusters == cluster)
            if votes > 0:
                shares[members] = to_simplex(found.votes[members], float(votes))
        return np.asarray(shares / shares.sum())

    @property
    def _heights(self) -> tuple[float, float]:
        """Height of a candidate's cell, and of a cluster's."""
        return math.sqrt(1 - self.share), math.sqrt(self.share)


def clusters_of(
    features: NDArray[np.floating], groups: NDArray[np.int64], num_clusters: int
) -> NDArray[np.int64]:
    """Cluster of each candidate: that of the nearest of some candidates that lie far apart.

    Centers are taken one by one, each the candidate that is furthest from those before it, in
    each group as many as its size calls for. Features are whole numbers, so distances are exact
    and the clusters the same on every machine.

    Args:
      features: `(num_candidates, dim)`.
      groups: Candidates of different groups share no cluster, `(num_candidates,)`.
      num_clusters: About how many; every group has one at least.

    Reference:
      Gonzalez (1985), "Clustering to Minimize the Maximum Intercluster Distance".
    """
    clusters = np.zeros(len(features), dtype=np.int64)
    first = 0
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        own = features[members].astype(np.float64)
        wanted = max(1, round(num_clusters * len(members) / len(features)))
        nearest = np.full(len(members), math.inf)
        center, found = 0, 0
        while found < wanted:
            squared = ((own - own[center]) ** 2).sum(axis=1)
            closer = squared < nearest
            clusters[members[closer]] = first + found
            nearest = np.minimum(nearest, squared)
            center, found = int(nearest.argmax()), found + 1
            if nearest[center] == 0:
                break
        first += found
    return clusters

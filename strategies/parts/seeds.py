# SPDX-License-Identifier: Apache-2.0
"""Survivors of all rounds of votes as one weighted set, each with the seed it was varied from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...core.candidates import Candidates


@dataclass(frozen=True, eq=False)
class Voted:
    """A pool, and what one round of votes said of it.

    Attributes:
      pool: The candidates.
      shares: Of the votes, `(num_candidates,)`; those above 0 survive.
      trust: Weight of the round beside others: the inverse of the variance of its shares.
      parents: Position of whom each candidate was varied from, or is, in the pool of the round
        before, `(num_candidates,)`; empty for a first round.
    """

    pool: Candidates
    shares: NDArray[np.float64]
    trust: float
    parents: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Seeds:
    """Different candidates, weighted.

    Attributes:
      candidates: Each stands here once, in whatever rounds it survived.
      weights: Adding up to 1, `(num_seeds,)`.
      parents: Position of the seed that each was varied from; -1: one of the first pool's.
      rounds: The first round that each survived, from 1; 0: no votes were heard at all.
    """

    candidates: Candidates
    weights: NDArray[np.float64]
    parents: NDArray[np.int64]
    rounds: NDArray[np.int64]

    @staticmethod
    def unheard(pool: Candidates) -> "Seeds":
        """A pool of which nothing was learned, all alike."""
        num = len(pool)
        nobody = np.full(num, -1, dtype=np.int64)
        return Seeds(pool, np.full(num, 1 / num), nobody, np.zeros(num, dtype=np.int64))

    @staticmethod
    def of(rounds: Sequence[Voted]) -> "Seeds":
        """The survivors of some rounds, one at least.

        A seed's weight is its share of the votes in each round, the rounds weighted by how little
        noise is in them: of all averages of rounds that one has the least noise.

        Args:
          rounds: In order.
        """
        found = _Found()
        before: list[int] = []
        for number, voted in enumerate(rounds, start=1):
            now = [-1] * len(voted.pool)
            for i, share in enumerate(voted.shares.tolist()):
                parent = before[voted.parents[i]] if len(voted.parents) else -1
                now[i] = found.seed(voted.pool, i, parent, number, voted.trust * share)
            before = now
        weights = np.array(found.weights)
        return Seeds(
            Candidates.joined(found.parts),
            weights / weights.sum(),
            np.array(found.parents, dtype=np.int64),
            np.array(found.rounds, dtype=np.int64),
        )


@dataclass
class _Found:
    """Seeds found so far."""

    places: dict[tuple[bytes, str], int] = field(default_factory=dict)
    parts: list[Candidates] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def seed(self, pool: Candidates, i: int, parent: int, number: int, weight: float) -> int:
        """Where a candidate stands among the seeds; where its parent does, if it is none."""
        key = (pool.codes[i].tobytes(), "" if pool.texts is None else str(pool.texts[i]))
        place = self.places.get(key)
        if weight > 0 and place is None:
            place = self.places[key] = len(self.parts)
            self.parts.append(pool.take(slice(i, i + 1)))
            self.weights.append(weight)
            self.parents.append(parent)
            self.rounds.append(number)
        elif weight > 0 and place is not None:
            self.weights[place] += weight
        return parent if place is None else place

# SPDX-License-Identifier: Apache-2.0
"""What votes on a pool can be told from noise, known before anybody is asked.

All from public facts: the declared number of users, the settings, and the noise that the budget
calls for. Users are taken to hold one record each, which is the least they can; of several records
of a user more is heard, unless they are clipped away.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from ...core.errors import ConfigError
from .simplex import CLEAR

USABLE = 1.0  # noise deviations that a candidate of average votes should have


@dataclass(frozen=True)
class Signal:
    """Votes of users beside the noise of their sum.

    Attributes:
      num_users: Users who vote.
      num_candidates: Candidates voted on.
      num_votes: Votes of a user of one record.
      stddev: Of the noise of a candidate's count, in votes.
      num_clusters: Clusters counted too; 0: none.
      cluster_stddev: Of the noise of a cluster's count, in votes.
    """

    num_users: float
    num_candidates: int
    num_votes: int
    stddev: float
    num_clusters: int = 0
    cluster_stddev: float = math.inf

    @property
    def each(self) -> float:
        """A candidate's votes beside their noise, if votes are spread evenly."""
        return self.num_users * self.num_votes / self.num_candidates / self.stddev

    @property
    def of_clusters(self) -> float:
        """A cluster's votes beside their noise, if votes are spread evenly; 0 without clusters."""
        if not self.num_clusters:
            return 0.0
        return self.num_users * self.num_votes / self.num_clusters / self.cluster_stddev

    @property
    def total(self) -> float:
        """All votes beside the noise of their number, by all counts together.

        Below three, a round is most likely taken for noise as a whole, and changes nothing.
        """
        precision = 1 / (self.num_candidates * self.stddev**2)
        if self.num_clusters:
            precision += 1 / (self.num_clusters * self.cluster_stddev**2)
        return self.num_users * self.num_votes * math.sqrt(precision)

    @property
    def usable_candidates(self) -> int:
        """The largest pool, at this noise, of which single candidates are usable; 0 for none."""
        return int(self.num_users * self.num_votes / (USABLE * self.stddev))

    def in_rounds(self, num_rounds: int, instead_of: int) -> Self:
        """The same with the budget spread over another number of rounds."""
        factor = math.sqrt(num_rounds / instead_of)
        return replace(
            self, stddev=self.stddev * factor, cluster_stddev=self.cluster_stddev * factor
        )

    def proposal(self, num_rounds: int, fewest: int) -> str:
        """Settings under which votes can be heard, in words.

        Args:
          num_rounds: Rounds of the run as it stands.
          fewest: Candidates below which a pool cannot go.
        """
        for rounds in (num_rounds, *(r for r in (6, 4, 3, 2, 1) if r < num_rounds)):
            size = self.in_rounds(rounds, num_rounds).usable_candidates
            if size >= max(fewest, 10):
                also = "" if rounds == num_rounds else f" and num_rounds = {rounds}"
                return f"set num_candidates = {_round(size)}{also}"
        return "more users or a larger epsilon are needed; no pool and no number of rounds will do"

    def check(self, num_rounds: int, fewest: int) -> None:
        """Refuse a run of which nothing can be learned.

        Raises:
          ConfigError: All votes together are expected to drown in the noise.
        """
        if self.total < CLEAR:
            raise ConfigError(
                f"{self.num_users:,.0f} users voting on {self.num_candidates:,} candidates, with"
                f" noise of {self.stddev:,.3g} votes on each, would not be heard: all votes are"
                f" {self.total:.2g} times their noise, and {CLEAR:g} are needed. Nothing was"
                f" asked or spent; {self.proposal(num_rounds, fewest)}"
            )


def _round(size: int) -> int:
    """A number of at most two leading digits, not above `size`."""
    unit = int(10 ** max(0, len(str(size)) - 2))
    return size // unit * unit

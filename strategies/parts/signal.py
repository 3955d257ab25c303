# SPDX-License-Identifier: Apache-2.0
"""What votes on a pool can be told from noise, known before anybody is asked.

All from public facts: what is declared of the users (`core/electorate.py`), the settings, and the
noise that the budget calls for.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from ...core.electorate import Electorate
from ...core.errors import ConfigError
from ...core.query import Strategy
from ...core.schema import Schema
from .simplex import CLEAR

USABLE = 1.0  # noise deviations that a candidate of average votes should have
_ADEQUATE = 5.0  # from so many on, a larger pool is worth its noise
_BETTER = 1.25  # times as much that another rule must hear to be proposed
_FEWEST = 10  # candidates below which no pool is proposed
_ROUNDS = (6, 4, 3, 2, 1)  # that are proposed instead of more


@dataclass(frozen=True)
class Prospect:
    """What a plan shows of votes to come.

    Attributes:
      query: Name of the question that it is about.
      expect: A candidate's votes beside their noise, in words.
      ratio: The same as a number.
      proposal: Settings that would hear more; empty if there are none to speak of.
    """

    query: str
    expect: str
    ratio: float
    proposal: str


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
        for rounds in (num_rounds, *(r for r in _ROUNDS if r < num_rounds)):
            size = self.in_rounds(rounds, num_rounds).usable_candidates
            if size >= max(fewest, _FEWEST):
                also = "" if rounds == num_rounds else f" and num_rounds = {rounds}"
                return f"set num_candidates = {_round(size)}{also}"
        return "more users or a larger epsilon are needed; no pool and no number of rounds will do"

    def prospect(
        self, query: str, num_rounds: int, fewest: int, *, louder: Self, rule: str
    ) -> Prospect:
        """What to expect, and what would be better by a margin.

        Args:
          query: Name of the question.
          num_rounds: Rounds of the run as it stands.
          fewest: Candidates below which a pool cannot go.
          louder: The signal under the rule of voting that hears most.
          rule: The settings that call for it.
        """
        expect = (
            f"each of {self.num_candidates:,} candidates has {self.each:,.3g} times its noise of"
            " votes if they are spread evenly"
        )
        if self.num_clusters:
            expect += f", each of {self.num_clusters:,} clusters {self.of_clusters:,.3g} times"
        told, heard = [], self
        if louder.each >= _BETTER * self.each:
            heard = louder
            told.append(f"{rule} would hear {heard.each / self.each:,.3g} times as much")
        if max(heard.each, heard.of_clusters) < USABLE:
            told.append(heard.proposal(num_rounds, fewest))
        elif heard.each >= _ADEQUATE:
            size = _round(heard.usable_candidates)
            told.append(f"pools up to num_candidates = {size} would be usable")
        return Prospect(query, expect, max(self.each, self.of_clusters), "; ".join(told))

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


def prospect_of(
    strategy: Strategy, schema: Schema, noise_multiplier: float, users: Electorate
) -> Prospect | None:
    """What a strategy expects to hear of users; `None` for one that does not say."""
    found = getattr(strategy, "prospect", None)
    return None if found is None else found(schema, noise_multiplier, users)


def _round(size: int) -> int:
    """A number of at most two leading digits, not above `size`."""
    unit = int(10 ** max(0, len(str(size)) - 2))
    return size // unit * unit

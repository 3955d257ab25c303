# SPDX-License-Identifier: Apache-2.0
"""What users' updates can be told from noise, and which settings would let more of it be told.

All from public facts: the declared number of users, the model's size, the settings, and the noise
that the budget calls for.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from ...core.errors import ConfigError
from .signal import USABLE, Prospect

COMMON = 0.4  # of a clip that clips most, what users have in common: benchmarks/sensitivity.py
HOPELESS = 1.0  # a run's pull beside its noise, if all users' updates were the same
_ENOUGH = 0.9  # of what everybody in every round would pull, to be had with a smaller cohort
_WORTH = 1.25  # times as much that another cohort must pull to be proposed
_WALK = 0.3  # a server's step times the square root of its rounds, as was best in that benchmark
_LEAST_WALK, _MOST_WALK = 0.1, 1.0  # beyond which it was worse


@dataclass(frozen=True)
class Pull:
    """Where clipped updates pull the weights in common, beside the noise of their sums.

    Both are lengths of vectors. A round's pull is the users who join, times the clip, times the
    share of a clipped update that they have in common; its noise is as long as a Gaussian vector
    of `num_weights`. Over a run the one grows by its rounds and the other by their square root, if
    all rounds pull the same way, which is the most that there can be.

    Attributes:
      num_users: Users who may join.
      num_weights: Length of an update.
      num_rounds: Rounds.
      sampling_prob: Probability that a user joins a round.
      noise_multiplier: Of each sum.
      common: Share of a clipped update that users have in common, in (0, 1]; assumed.
    """

    num_users: float
    num_weights: int
    num_rounds: int
    sampling_prob: float
    noise_multiplier: float
    common: float = COMMON

    @property
    def of_round(self) -> float:
        """A round's pull beside its noise."""
        joined = self.sampling_prob * self.num_users
        return self.common * joined / (self.noise_multiplier * math.sqrt(self.num_weights))

    @property
    def of_run(self) -> float:
        """The whole run's pull beside its noise, if all rounds pull the same way."""
        return self.of_round * math.sqrt(self.num_rounds)

    @property
    def of_everybody(self) -> float:
        """The same for the same budget if everybody joined every round: the most there is."""
        return self.common * self.num_users * self._mu / math.sqrt(self.num_weights)

    @property
    def enough(self) -> float:
        """The smallest cohort that has nine tenths of what everybody would have.

        With x = (mu / q)^2 / T a cohort of q has sqrt(ln(1 + x) / x) of it.
        """
        low, high = 1e-9, 10.0
        while high / low > 1 + 1e-6:
            middle = math.sqrt(low * high)
            share = math.sqrt(math.log1p(middle) / middle)
            low, high = (middle, high) if share >= _ENOUGH else (low, middle)
        return min(1.0, self._mu / math.sqrt(low * self.num_rounds))

    def with_cohort(self, sampling_prob: float) -> Self:
        """The same budget spent on other cohorts, by the same limit theorem."""
        mu, rounds = self._mu, self.num_rounds
        noise = (
            math.sqrt(rounds) / mu
            if sampling_prob >= 1
            else math.log1p((mu / sampling_prob) ** 2 / rounds) ** -0.5
        )
        return replace(self, sampling_prob=sampling_prob, noise_multiplier=noise)

    def prospect(
        self, query: str, *, step: float | None = None, clip: float | None = None
    ) -> Prospect:
        """What to expect, and what would be better.

        Args:
          query: Name of the question.
          step: The server's step, if its optimizer moves each weight by about that much whatever
            the length of an update; `None`: it does not.
          clip: The clip, if it is fixed; `None`: it follows the updates.
        """
        joined = self.sampling_prob * self.num_users
        expect = (
            f"{joined:,.3g} users a round, if {self.common:g} of a clipped update is common to"
            f" all, pull {self.of_round:,.3g} times the noise of {self.num_weights:,} weights, and"
            f" {self.of_run:,.3g} times over the run if all rounds pull the same way"
        )
        told = self._cohorts()
        if self.of_run < USABLE:
            weights = (self.with_cohort(self.enough).of_run / USABLE) ** 2 * self.num_weights
            told.append(f"a model of at most {_rounded_down(weights):,} weights would be heard")
        if step is not None:
            told += self._steps(step)
        if step is not None and clip is not None:
            told.append(
                f"clip = {clip:g} should be shorter than most updates, whose length no public fact"
                " tells: with this optimizer too short a clip costs little, too long a one much"
            )
        return Prospect(query, expect, self.of_run, "; ".join(told))

    def check(self) -> None:
        """Refuse a run of which nothing can be learned.

        Raises:
          ConfigError: Its noise would be larger than all updates together, were they all the same.
        """
        most = replace(self, common=1.0)
        if most.of_run < HOPELESS:
            weights = (most.of_everybody / HOPELESS) ** 2 * self.num_weights
            raise ConfigError(
                f"{self.num_users:,.0f} users training {self.num_weights:,} weights over"
                f" {self.num_rounds} rounds with noise multiplier {self.noise_multiplier:.3g}"
                f" would not be heard: even if all their updates were the same, the run would move"
                f" the weights by {most.of_run:.2g} times its noise, and {HOPELESS:g} is needed."
                f" Nothing was asked or spent; take a model of at most {weights:,.0f} weights,"
                " more users or a larger epsilon, or dp_merf, which asks once"
            )

    @property
    def _mu(self) -> float:
        """The run's budget as a Gaussian's mu, by the central limit theorem of sampled Gaussians.

        Reference:
          Bu, Dong, Long, Su (2020), "Deep Learning with Gaussian Differential Privacy", arXiv
          1911.11607, corollary 4.
        """
        if self.sampling_prob >= 1:
            return math.sqrt(self.num_rounds) / self.noise_multiplier
        odd = math.expm1(min(700.0, self.noise_multiplier**-2))
        return self.sampling_prob * math.sqrt(self.num_rounds * odd)

    def _cohorts(self) -> list[str]:
        """A cohort that would pull more, or as much with less work, in words."""
        told = []
        cohort = _rounded_up(self.enough)
        if cohort != self.sampling_prob:
            more = self.with_cohort(cohort).of_run / self.of_run
            if more >= _WORTH:
                told.append(f"sampling_prob = {cohort:g} would pull {more:,.2g} times as much")
            elif cohort <= self.sampling_prob / _WORTH and more > _ENOUGH:
                work = self.sampling_prob / cohort
                told.append(
                    f"sampling_prob = {cohort:g} would pull as much with 1/{work:,.2g} of the work"
                )
        return told

    def _steps(self, step: float) -> list[str]:
        """Rounds and steps that go together, in words."""
        walk = step * math.sqrt(self.num_rounds)
        if _LEAST_WALK <= walk <= _MOST_WALK:
            return []
        best = float(f"{_WALK / math.sqrt(self.num_rounds):.1g}")
        rounds = max(1, round((_WALK / step) ** 2))
        return [
            f"server_lr = {best:g}, or num_rounds = {rounds:,}, as steps that noise leads astray"
            " add up by the square root of the rounds"
        ]


def _rounded_down(number: float) -> int:
    """A number of two digits, not above `number`."""
    unit = int(10 ** max(0, math.floor(math.log10(max(1.0, number))) - 1))
    return int(number // unit) * unit


def _rounded_up(prob: float) -> float:
    """A probability of two digits, not below `prob`."""
    unit = 10.0 ** (math.floor(math.log10(prob)) - 1)
    return min(1.0, float(f"{math.ceil(prob / unit - 1e-9) * unit:.2g}"))

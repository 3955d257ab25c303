# SPDX-License-Identifier: Apache-2.0
"""Correlated noise without keeping noise: sums that carry echoes of the rounds before.

In a series of T rounds each client sends, instead of its exact sum X[t], the encoded sum

    c[0] X[t] + c[1] X[t-1] + ... + c[t] X[0]

with noise that is independent from round to round. The server takes the echoes off again, which
turns the noise into that of the matrix mechanism: X + C^-1 Z, with C the lower triangular Toeplitz
matrix of c. No noise is ever kept, no exact sum leaves a client but as it always did, and a crash
loses nothing: a client keeps its own sums beside its odometer.

Users take turns. A user answers the rounds t with t = turn (mod separation), the turn drawn from
its id, which the client sees to; so it takes part at most ceil(T / separation) times.

What one user moves: its vectors D[s] of the rounds s it took part in, each within the clip, add
c[t-s] D[s] to round t. Coefficients are not negative, so the squares of all rounds' movements add
up to at most clip^2 times

    max over turns of  sum over t of (sum over s = turn, turn + separation, ... <= t of c[t-s])^2

(expand the square: each inner product of two D is at most clip^2, and its factor is not negative).
Coefficients whose value of this is at most 1 make the whole series, however adaptively its
questions were chosen, as dear as one Gaussian sum with the noise of one round: Gaussian mechanisms
whose squared movements add up to at most a constant compose fully adaptively to that.

Reference:
  Denisov, McMahan, Rush, Smith, Thakurta (2022), "Improved Differential Privacy for SGD via Optimal
  Private Linear Operators on Adaptive Streams", arXiv 2202.08312, Theorem 2.1; Choquette-Choo et
  al. (2023), "(Amplified) Banded Matrix Factorization", arXiv 2306.08153; Smith and Thakurta
  (2022), arXiv 2210.17520, for the composition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError

ONE = 1 << 12
"""Coefficients are whole multiples of 1 / ONE, so that encoded sums stay on an integer lattice."""

MAX_ROUNDS = 100_000


@dataclass(frozen=True)
class Series:
    """What clients need to know of a series before its first round.

    Attributes:
      coefficients: c[0], c[1], ... in units of 1 / `ONE`; from the first one left out on they are
        zero. c[0] > 0, none negative.
      num_rounds: T.
      separation: Rounds from one turn of a user to the next.

    Raises:
      ConfigError: The numbers are impossible, or one user could move more than one clip.
    """

    coefficients: tuple[int, ...]
    num_rounds: int
    separation: int

    def __post_init__(self) -> None:
        """Refuse what has no price."""
        if not (1 <= self.num_rounds <= MAX_ROUNDS and 1 <= self.separation <= MAX_ROUNDS):
            raise ConfigError(
                f"a series has 1 to {MAX_ROUNDS:,} rounds and as many from turn to turn, not"
                f" {self.num_rounds} and {self.separation}"
            )
        known = self.coefficients
        if not (
            1 <= len(known) <= self.num_rounds
            and known[0] >= 1
            and all(type(c) is int and 0 <= c <= ONE for c in known)
        ):
            raise ConfigError(
                f"the coefficients of a series are 1 to {self.num_rounds} whole numbers in"
                f" [0, {ONE}], the first above 0"
            )
        moved = self.moved_steps
        if moved > ONE**2:
            raise ConfigError(
                "with the coefficients of this series one user could move it by"
                f" {math.sqrt(moved) / ONE:.6g} clips, where 1 is what it is priced for"
            )

    @property
    def moved_steps(self) -> int:
        """The most that one user's squared movements add up to, in (clip / `ONE`)^2; exact."""
        return moved_steps(self.coefficients, self.num_rounds, self.separation)


def moved_steps(coefficients: Sequence[int], num_rounds: int, separation: int) -> int:
    """What the squares of one user's movements add up to in (clip / `ONE`)^2; exact.

    That is with the same vector of one clip in every turn, and turns from the first round on: no
    coefficient is negative, and the rows of a user who begins later are these, cut off.
    """
    row = np.zeros(-(-num_rounds // separation) * separation, dtype=np.int64)
    known = coefficients[:num_rounds]
    row[: len(known)] = known
    row = row.reshape(-1, separation).cumsum(axis=0).ravel()[:num_rounds]
    return int((row.astype(object) ** 2).sum())


@dataclass(frozen=True)
class Turn:
    """One round of a series.

    Attributes:
      series: The series.
      position: Which of its rounds, from 0.
    """

    series: Series
    position: int

    def __post_init__(self) -> None:
        """Refuse a round beyond the series."""
        if not 0 <= self.position < self.series.num_rounds:
            raise ConfigError(
                f"a series of {self.series.num_rounds} rounds has no round {self.position}"
            )

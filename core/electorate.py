# SPDX-License-Identifier: Apache-2.0
"""What is publicly said of users, by which a plan reckons what their votes will tell."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

ALIKE = 0.1  # as measured of encounters and lines of invoices; digits and messages: 0.03, 0.05
_POOL = 100  # candidates for which `alike` is declared
_UNEVEN = 1.5  # times as often as in an even pool two records of anybody agree, as measured
_MOST = 10_000  # typical users that can be declared


@dataclass(frozen=True)
class Electorate:
    """Users as they are declared; nothing in it is read from records.

    Attributes:
      num_users: How many, at least.
      records: Of typical users, each of whom stands for as many: their numbers of records.
      alike: Of all pairs of records that belong to one user, the share that has the same nearest
        candidate of a hundred.
    """

    num_users: float
    records: tuple[int, ...] = (1,)
    alike: float = ALIKE

    def __post_init__(self) -> None:
        if not (self.records and len(self.records) <= _MOST and min(self.records) >= 1):
            raise ConfigError(
                f"typical_records must be 1 to {_MOST} numbers of 1 or more, not {self.records!r}"
            )
        if not 0 <= self.alike <= 1:
            raise ConfigError(f"alike must lie in [0, 1], not {self.alike!r}")

    @staticmethod
    def of(
        num_users: float, records: float | Sequence[int], alike: float, *, max_records: int
    ) -> "Electorate":
        """Users as a run file declares them, of whose records at most so many are used."""
        typical = [records] if isinstance(records, int | float) else records
        return Electorate(num_users, tuple(min(int(r), max_records) for r in typical), alike)

    def spread(self, num_candidates: float) -> NDArray[np.float64]:
        """Candidates that each typical user's votes are spread over, as if evenly.

        A user with r records casts votes v with |v|_1 = r. Each of r (r - 1) ordered pairs of
        them agrees with probability c, so |v|_2^2 is r (1 + (r - 1) c) on average, and r^2 over
        that is what it is spread over. In a pool of n candidates any two records agree by chance
        with probability 1.5 / n, and a user's own that much more often than `alike` says for a
        hundred, times (100 / n)^(1/4): so it was, within what the votes of a user then vary by,
        in four populations and from 25 to 1,000 candidates (`benchmarks/votes.py`).

        Args:
          num_candidates: Of the pool, for one vote a record; with k votes a record agrees with
            another as often as with one vote in a pool of one k-th the size.
        """
        smaller = _POOL / max(num_candidates, 1.0)
        chance = _UNEVEN / _POOL
        more = max(0.0, self.alike - chance)
        agree = min(1.0, chance * smaller + more * smaller**0.25)
        held = np.array(self.records, dtype=np.float64)
        return np.asarray(held / (1 + (held - 1) * agree))

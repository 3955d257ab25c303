# SPDX-License-Identifier: Apache-2.0
"""What one noisy sum costs, in the four numbers that its price hangs on."""

from collections import Counter
from typing import NamedTuple


class Leaf(NamedTuple):
    """What one noisy sum, or one series of them, costs a user.

    Attributes:
      noise_multiplier: Standard deviation of the noise / what one vector can move.
      sampling_prob: Probability with which each vector joins, by a coin of its own.
      records: Most vectors that a user has in the sum: one, or one for each of so many records.
      rounds: Rounds that share this one price; see `core.series`.
    """

    noise_multiplier: float
    sampling_prob: float = 1.0
    records: int = 1
    rounds: int = 1

    @property
    def is_sampled(self) -> bool:
        """Whether coins decide who joins."""
        return self.sampling_prob < 1


Leaves = Counter[Leaf]
"""How often each kind of sum stands in an event."""


def num_rounds_of(found: Leaves) -> int:
    """Rounds that sums are asked in."""
    return sum(leaf.rounds * count for leaf, count in found.items())

# SPDX-License-Identifier: Apache-2.0
"""The best of a random, secret number of tries: what it costs, and how the number is drawn.

Settings may be tried on private records and the best try alone be published, for less than all
tries cost. That holds only if the number of tries is drawn at random and kept secret, each try
takes a setting drawn afresh, what chooses among tries is part of what each of them is charged for,
and nothing of the others is ever shown. `simulation/private_sweep.py` sees to that.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from dp_accounting.dp_event import DpEvent
from numpy.typing import NDArray

from .errors import ConfigError
from .leaf import Leaf, Leaves
from .randomness import KeyStream

MOST_TRIES = 1e6  # on average

Sums = tuple[tuple[Leaf, int], ...]
"""The sums of one try, sorted, and how many there are of each."""


class Tries(IntEnum):
    """Law of the number of tries, which is one or more; the value is its shape, eta."""

    LOGARITHMIC = 0
    GEOMETRIC = 1


@dataclass(frozen=True, order=True)
class SelectDpEvent(DpEvent):  # type: ignore[misc]
    """The best of a random, secret number of tries; made by `accounting.select`.

    It is no sum: two of them cost less than twice one, and none may be merged with another.

    Attributes:
      tries: What one try may be, sorted; what chooses among tries is one of its sums.
      mean: Mean number of tries; above 1.
      law: Its law.
    """

    tries: tuple[Sums, ...]
    mean: float
    law: Tries

    def __post_init__(self) -> None:
        """Refuse what has no price."""
        if not self.tries or not 1 < self.mean <= MOST_TRIES:
            raise ConfigError(
                "a selection has settings and more than one try on average, at most"
                f" {MOST_TRIES:,.0f}, not {len(self.tries)} settings and {self.mean} tries"
            )

    def holds(self, found: Leaves) -> bool:
        """Whether one of the tries is made of exactly these sums."""
        return tuple(sorted(found.items())) in self.tries


def selected_rdp(
    orders: NDArray[np.float64], rdp: NDArray[np.float64], *, mean: float, law: Tries
) -> NDArray[np.float64]:
    """Rényi divergences of the best of the tries, from those of any one of them.

    At order l it is that of one try, and log(E[K]) / (l - 1), and (1 + eta) times the least over
    orders m of (1 - 1/m) rdp(m) + log(1/gamma) / m.

    Args:
      orders: Above 1.
      rdp: Of one try, at each order.
      mean: Mean number of tries, E[K].
      law: Its law, with shape eta.

    Reference:
      Papernot, Steinke (2022), "Hyperparameter Tuning with Renyi Differential Privacy", arXiv
      2110.03620, theorem 2.
    """
    gamma = stopping_prob(mean, law)
    extra = (1 + law) * np.min((1 - 1 / orders) * rdp - math.log(gamma) / orders)
    found: NDArray[np.float64] = rdp + math.log(mean) / (orders - 1) + extra
    # divergences rise with the order, so a lower one has no more than any above it
    return np.minimum.accumulate(found[::-1])[::-1]


def stopping_prob(mean: float, law: Tries) -> float:
    """The parameter gamma of a law with that mean, not above the exact one: the safe side.

    The logarithmic law gives k tries with probability (1 - gamma)^k / (k log(1/gamma)).
    """
    if law is Tries.GEOMETRIC:
        return 1 / mean
    low, high = 1e-300, 1.0
    for _ in range(2000):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        # its mean, (1/gamma - 1) / log(1/gamma), falls as gamma rises
        low, high = (middle, high) if (1 / middle - 1) / -math.log(middle) > mean else (low, middle)
    return low


def drawn_settings(
    num_settings: int, *, mean: float, law: Tries, stream: KeyStream
) -> tuple[int, ...]:
    """The setting of each try: as many as there are tries, each drawn afresh, by its position.

    Args:
      num_settings: How many there are to draw from.
      mean: Mean number of tries.
      law: Its law.
      stream: Secret randomness.

    Privacy:
      How many are drawn must never be shown, and never be drawn again once it was.
    """
    num_tries = drawn_number(mean=mean, law=law, stream=stream)
    return tuple(_below(num_settings, stream) for _ in range(num_tries))


def drawn_number(*, mean: float, law: Tries, stream: KeyStream) -> int:
    """A number of tries, exactly by its law.

    Coins with probability gamma, an exact fraction, give a geometric number. It is logarithmic if
    k is kept with probability 1 / k, and drawn again otherwise.
    """
    heads, odds = stopping_prob(mean, law).as_integer_ratio()
    while True:
        number = 1
        while _below(odds, stream) >= heads:
            number += 1
        if law is Tries.GEOMETRIC or _below(number, stream) == 0:
            return number


def _below(end: int, stream: KeyStream) -> int:
    """A whole number in `[0, end)`, each as likely as any other."""
    bits = (end - 1).bit_length()
    while True:
        value = int.from_bytes(stream.read((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if value < end:
            return value

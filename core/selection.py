# SPDX-License-Identifier: Apache-2.0
"""What it costs to try settings on private records and to publish the best try alone.

Holds only if the number of tries is drawn at random and kept secret, each try takes a setting drawn
afresh, what chooses among tries is part of what each of them is charged for, and nothing of the
others is ever shown. Nothing here conducts such a sweep; it says what one would cost.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import accounting
from .errors import ConfigError

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


class Tries(IntEnum):
    """Law of the number of tries, which is one or more; the value is its shape, eta."""

    LOGARITHMIC = 0
    GEOMETRIC = 1


def selection_epsilon(
    tries: Sequence["DpEvent"], *, mean: float, law: Tries, delta: float
) -> float:
    """Epsilon of the best of a random, secret number of tries.

    Args:
      tries: What one try may cost, an event for each setting.
      mean: Mean number of tries; above 1.
      law: Its law.
      delta: At which it is priced.

    Raises:
      ConfigError: There are no settings, or the mean is not above 1.

    Example:
      >>> from dp_accounting.dp_event import GaussianDpEvent
      >>> once = [GaussianDpEvent(2.0)]
      >>> selection_epsilon(once, mean=10, law=Tries.LOGARITHMIC, delta=1e-5).__round__(3)
      3.639
    """
    if not tries or not 1 < mean < math.inf:
        raise ConfigError(
            f"a selection has settings and more than one try on average, not {len(tries)} settings"
            f" and {mean} tries"
        )
    curves = [accounting.rdp_of(event) for event in tries]
    orders = curves[0][0]
    worst = np.max([rdp for _, rdp in curves], axis=0)
    chosen = selected_rdp(np.array(orders), worst, mean=mean, law=law)
    return accounting.rdp_to_epsilon(orders, chosen, delta)


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

# SPDX-License-Identifier: Apache-2.0
"""An aggregator of your own: no client weighs more than a number of users, whatever it sends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from fedsynth.core.aggregator import Aggregator
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import Query
from numpy.typing import NDArray

_STEPS = 2.0**23  # a query's clip is 2^22 to 2^23 lattice steps, `Lattice.bound`
_FLOAT = 2.0**-52  # relative error of one float64 operation, and to spare


@dataclass(frozen=True)
class BoundedClients(Aggregator):
    """Pulls each client's sum back to a bounded L2 norm, then adds.

    A hostile client, or a broken one, moves a plain sum as far as it likes. Here it moves it no
    further than twice `max_users` users could. An honest client with at most `max_users` users is
    never touched. Under `local` noise the sums hold noise already; leave room for it.

    Attributes:
      max_users: Most users that a client counts for; >= 1.

    Privacy:
      One user moves one client's sum s by at most b lattice steps in L2. What is added to the
      total is p(s), rounded towards zero: the point of a ball of radius R = max_users * 2^23
      that is nearest to s. Projecting onto a ball brings no two points further apart, so p(s)
      moves by at most b. Rounding moves a coordinate by less than one step, always towards
      zero, so it changes the difference of two results by less than one step a coordinate:
      sqrt(dim) steps. In float64 the norm of s, and so the scale, is off by a relative
      (dim + 8) * 2^-52 at most, which moves a result by that much of R; twice that for two.
    """

    max_users: int = 10_000
    name: ClassVar[str] = "bounded_clients"
    needs_single_sums: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a bound of nobody, or one with which 100,000 clients could overflow 64 bits."""
        if not 1 <= self.max_users <= 1 << 22:
            raise ConfigError(f"max_users must be 1 to 2^22, not {self.max_users}")

    def sensitivity(self, query: Query, lattice: Lattice) -> float:
        """The clip, and what rounding adds to it."""
        float_error = 2 * self.max_users * _STEPS * (query.dim + 8) * _FLOAT
        return lattice.unit * (lattice.bound + math.sqrt(query.dim) + float_error)

    def combine(self, sums: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The sum of all clients, each inside its ball."""
        total = np.zeros_like(sums[0])
        for one in sums:
            total += self._pulled_back(one)
        return total

    def _pulled_back(self, one: NDArray[np.int64]) -> NDArray[np.int64]:
        """The nearest point of the ball, rounded towards zero."""
        steps = one.astype(np.float64)
        norm, radius = math.sqrt(float(steps @ steps)), self.max_users * _STEPS
        if norm <= radius:
            return one
        return np.trunc(steps * (radius / norm)).astype(np.int64)

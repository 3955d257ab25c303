# SPDX-License-Identifier: Apache-2.0
"""How clients' integer sums become one vector, and how far one user can move it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .mechanism import Lattice
from .query import Query


class Aggregator(ABC):
    """One way to combine: a frozen dataclass whose fields are its settings.

    Attributes:
      needs_single_sums: It looks at one client's sum at a time, so it cannot stand behind a
        secure sum, and `distributed` noise is refused with it.
    """

    name: ClassVar[str]
    needs_single_sums: ClassVar[bool]

    @abstractmethod
    def sensitivity(self, query: Query, lattice: Lattice) -> float:
        """L2 change of the combined vector that one user can cause at one client.

        In the vectors' own unit. Under `central` noise the server's noise is scaled to it, times
        the most clients that hold one user's records.

        Args:
          query: Whose `clip` bounds the change of that client's sum.
          lattice: The grid that sums lie on; an aggregator that rounds adds what rounding can do.
        """

    @abstractmethod
    def combine(self, sums: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """One vector of whole lattice steps, `(dim,)`, from the clients' sums.

        Args:
          sums: One `(dim,)` a client, at least one; in an order that carries no meaning.
        """


@dataclass(frozen=True)
class Sum(Aggregator):
    """The exact sum of all clients; what a secure sum computes."""

    name: ClassVar[str] = "sum"
    needs_single_sums: ClassVar[bool] = False

    def sensitivity(self, query: Query, lattice: Lattice) -> float:
        """One user moves one client's sum, and so the whole, by at most the clip."""
        return query.clip

    def combine(self, sums: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Their sum; exact and the same in any order."""
        total = np.zeros_like(sums[0])
        for part in sums:
            total += part
        return total

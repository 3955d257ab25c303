# SPDX-License-Identifier: Apache-2.0
"""What a compiled constraint can be asked, and the two that speak of sets of cells."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = Mapping[int, NDArray[Any]]
"""Cells by column position; the arrays broadcast against each other."""

Sets = Sequence[tuple[int, NDArray[np.bool_]]]
"""Columns and which of their cells belong to a set."""


class Rule(ABC):
    """A compiled constraint: which combinations of cells can be.

    Attributes:
      columns: Positions of the columns it speaks of, rising.
    """

    columns: tuple[int, ...]

    @property
    def simple(self) -> Sequence["Rule"]:
        """Rules of fewer columns that say the same together; itself if there are none."""
        return (self,)

    @abstractmethod
    def holds(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether it holds, for each record; codes of at least its columns."""


@dataclass(frozen=True, eq=False)
class Conditional(Rule):
    """What follows from a combination.

    Attributes:
      columns: Positions of its columns, rising.
      given: Columns and which of their cells make it speak, all of them together.
      then: Columns and their possible cells then; `None`: what is given never is.
    """

    columns: tuple[int, ...]
    given: tuple[tuple[int, NDArray[np.bool_]], ...]
    then: tuple[tuple[int, NDArray[np.bool_]], ...] | None

    @staticmethod
    def of(given: Sets, then: Sets | None) -> "Conditional":
        """The rule for sets of cells."""
        columns = {column for column, _ in (*given, *(then or ()))}
        kept = None if then is None else tuple(then)
        return Conditional(tuple(sorted(columns)), tuple(given), kept)

    @property
    def simple(self) -> Sequence[Rule]:
        """One rule for each column of what follows."""
        return [Conditional.of(self.given, [one]) for one in self.then or ()] or [self]

    def holds(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether the combination is not there, or what follows is."""
        applies = _all_in(self.given, codes)
        return ~applies if self.then is None else ~applies | _all_in(self.then, codes)


@dataclass(frozen=True, eq=False)
class Lookup(Rule):
    """One column's cell by another's.

    Attributes:
      source: Position of the column that determines.
      target: Position of the one that is determined.
      of_cell: Cell of the target for each cell of the source; -1 where any will do.
      missing: Cell of the target that always will do; -1 for none.
    """

    source: int
    target: int
    of_cell: NDArray[np.int64]
    missing: int

    @property
    def columns(self) -> tuple[int, ...]:  # type: ignore[override]
        """Positions of both columns, rising."""
        return tuple(sorted((self.source, self.target)))

    def holds(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether the target is what the source says."""
        wanted, found = self.of_cell[codes[self.source]], codes[self.target]
        return np.asarray((wanted < 0) | (found == wanted) | (found == self.missing))


def _all_in(sets: Sequence[tuple[int, NDArray[np.bool_]]], codes: Codes) -> NDArray[np.bool_]:
    """Whether the cells are in all of the sets."""
    inside = np.ones((), dtype=np.bool_)
    for column, mask in sets:
        inside = inside & mask[codes[column]]
    return inside

# SPDX-License-Identifier: Apache-2.0
"""Orderings of columns: which cells can be in order, and values inside them that are.

Each column stands for a range of values, by its cell. The lowest values are pushed up along the
orderings; the cells can be in order if no range becomes empty, which for orderings is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .column import Column
from .dates import SECONDS
from .errors import SchemaError
from .rules import Codes, Rule

_REDRAWS = 16  # times that values out of order are drawn again


@dataclass(frozen=True, eq=False)
class Order(Rule):
    """Orderings that share columns, judged together.

    Attributes:
      columns: Positions of the columns, rising.
      sequence: The same, each after all columns that must not be above it.
      pairs: (low, high, strict) of each ordering.
      least: Least value of each cell by column, in a unit that all share; -inf for missing.
      greatest: Greatest value.
      steps: By column, how far apart its values are; 0.0 for a real number.
    """

    columns: tuple[int, ...]
    sequence: tuple[int, ...]
    pairs: tuple[tuple[int, int, bool], ...]
    least: Mapping[int, NDArray[np.float64]]
    greatest: Mapping[int, NDArray[np.float64]]
    steps: Mapping[int, float]

    @staticmethod
    def of(columns: Sequence[Column], pairs: Sequence[tuple[int, int, bool]]) -> "Order":
        """The rule of some orderings of a schema's columns.

        Args:
          columns: All of the schema's.
          pairs: Positions of the lower and the higher column, and whether they always differ.

        Raises:
          SchemaError: They go in a circle.
        """
        members = tuple(sorted({c for low, high, _ in pairs for c in (low, high)}))
        sequence: list[int] = []
        while waiting := [c for c in members if c not in sequence]:
            above = {high for low, high, _ in pairs if low in waiting}
            if above >= set(waiting):
                names = ", ".join(columns[c].name for c in waiting)
                raise SchemaError(f"the orderings of {names} go in a circle")
            sequence += [c for c in waiting if c not in above]
        ends = {c: _ends(columns[c]) for c in members}
        return Order(
            members,
            tuple(sequence),
            tuple(pairs),
            {c: low for c, (low, _) in ends.items()},
            {c: high for c, (_, high) in ends.items()},
            {c: step_of(columns[c]) for c in members},
        )

    def holds(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether values of the cells can be in order, for each record."""
        least = self._pushed_up(codes)
        possible = np.ones((), dtype=np.bool_)
        for column in self.columns:
            possible = possible & (least[column] <= self.greatest[column][codes[column]])
        return possible

    def settled(
        self,
        codes: NDArray[np.int32],
        values: Mapping[int, NDArray[np.float64]],
        rng: np.random.Generator,
    ) -> dict[int, NDArray[np.float64]]:
        """Values in order: those given where they are, else drawn anew within their cells.

        Out of order, the values of a record are drawn again, all at once, which gives the uniform
        distribution under the orderings; what then still is not in order is drawn column by
        column. A record whose cells cannot be in order keeps its values.

        Args:
          codes: Cells of the records, `(num_records, num_schema_columns)`.
          values: By column, in the column's own unit.
          rng: Where in its cell a value lies.
        """
        found = {c: values[c] * max(self.steps[c], 1.0) for c in self.columns}
        waiting = np.flatnonzero(self.holds(dict(enumerate(codes.T))) & ~self._kept(codes, found))
        for _ in range(_REDRAWS):
            if not len(waiting):
                break
            cells = codes[waiting]
            for c in self.columns:
                low, high = self.least[c][cells[:, c]], self.greatest[c][cells[:, c]]
                found[c][waiting] = _drawn(low, high, self.steps[c], rng)
            again = self._kept(cells, {c: found[c][waiting] for c in self.columns})
            waiting = waiting[~again]
        self._settle_in_turn(codes, found, waiting, rng)
        return {c: found[c] / max(self.steps[c], 1.0) for c in self.columns}

    def _settle_in_turn(
        self,
        codes: NDArray[np.int32],
        found: dict[int, NDArray[np.float64]],
        rows: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> None:
        """Draw some records' values, each column after those that must not be above it."""
        cells = dict(enumerate(codes[rows].T))
        most = {c: self.greatest[c][cells[c]] for c in self.columns}
        for column in reversed(self.sequence):
            for low, high, strict in self.pairs:
                if low == column:
                    top = np.where(np.isinf(self.least[high][cells[high]]), np.inf, most[high])
                    most[low] = np.minimum(most[low], _down(top, self.steps[low], strict))
        for column in self.sequence:
            start = self.least[column][cells[column]]
            for low, high, strict in self.pairs:
                if high == column:
                    absent = np.isinf(self.least[low][cells[low]])
                    floor = np.where(absent, -np.inf, found[low][rows])
                    start = np.maximum(start, _up(floor, self.steps[high], strict))
            found[column][rows] = _drawn(start, most[column], self.steps[column], rng)

    def _pushed_up(self, codes: Codes) -> dict[int, NDArray[np.float64]]:
        """Least value of each column that the columns below leave; -inf where it is missing."""
        least = {c: self.least[c][codes[c]] for c in self.columns}
        for column in self.sequence:
            start = least[column]
            for low, high, strict in self.pairs:
                if high == column:
                    start = np.maximum(start, _up(least[low], self.steps[high], strict))
            absent = np.isinf(self.least[column][codes[column]])
            least[column] = np.where(absent, -np.inf, start)
        return least

    def _kept(
        self, codes: NDArray[np.int32], values: Mapping[int, NDArray[np.float64]]
    ) -> NDArray[np.bool_]:
        """Whether the values of each record are in order."""
        kept = np.ones(len(codes), dtype=np.bool_)
        for low, high, strict in self.pairs:
            inside = values[low] < values[high] if strict else values[low] <= values[high]
            absent = np.isinf(self.least[low][codes[:, low]])
            absent |= np.isinf(self.least[high][codes[:, high]])
            kept &= inside | absent
        return kept


def step_of(column: Column) -> float:
    """How far apart a column's values are, in a unit that comparable columns share."""
    if column.kind == "real":
        return 0.0
    return float(SECONDS[column.resolution]) if column.kind == "date" else 1.0


def _ends(column: Column) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest value of each cell in the common unit; infinite for missing."""
    unit = step_of(column) or 1.0
    least, greatest = column.ends
    absent = [np.inf] if column.missing else []
    return np.append(least * unit, np.negative(absent)), np.append(greatest * unit, absent)


def _up(values: NDArray[np.float64], step: float, strict: bool) -> NDArray[np.float64]:
    """The least value of a column that is not below (or, strictly, that is above) others."""
    if not step:
        above = np.where(np.isinf(values), values, np.nextafter(values, np.inf))
        return above if strict else values
    return np.asarray((np.floor(values / step) + 1 if strict else np.ceil(values / step)) * step)


def _down(values: NDArray[np.float64], step: float, strict: bool) -> NDArray[np.float64]:
    """The greatest value of a column that is not above (or, strictly, that is below) others."""
    return -_up(-values, step, strict)


def _drawn(
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    step: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """A uniform value between two others of one column; 0 where there is no end."""
    absent = np.isinf(low) | np.isinf(high)
    low, high = np.where(absent, 0.0, low), np.where(absent, 0.0, high)
    share = rng.random(len(low))
    if not step:
        return np.asarray(np.clip(low + share * (high - low), low, high))
    return np.asarray(np.minimum(low + step * np.floor(share * ((high - low) / step + 1)), high))

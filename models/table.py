# SPDX-License-Identifier: Apache-2.0
"""Draw and mutate the columns of a table."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.generation import Subject
from .variation import Capabilities, VariationModel


@dataclass(frozen=True)
class TableMutator(VariationModel):
    """Draws and mutates table columns.

    A category is drawn anew with probability `degree`. A number moves by up to `degree` of its
    range; missing, like any cell past a number's bins, is a category of its own.

    The label keeps its code.

    Attributes:
      shares: From which each column is drawn, `(num_cells,)` each: public, or noisy sums made
        into probabilities. Empty: all cells alike.
    """

    shares: tuple[tuple[float, ...], ...] = ()
    name: ClassVar[str] = "table"

    def capabilities(self) -> Capabilities:
        """Columns of a table, in this process."""
        return Capabilities("table")

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """Codes drawn by the columns' shares."""
        codes = blank.codes.copy()
        for j in range(codes.shape[1]):
            if j != subject.label:
                codes[:, j] = self._drawn(j, subject.schema.shape[j], len(codes), rng)
        return replace(blank, codes=codes)

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """Codes drawn anew or moved."""
        schema = subject.schema
        codes = candidates.codes.copy()
        for j in range(codes.shape[1]):
            if j == subject.label:
                continue
            num, old = len(codes), codes[:, j]
            num_cells, num_bins = schema.shape[j], schema.columns[j].num_ordered_cells
            drawn = np.where(rng.random(num) < degree, self._drawn(j, num_cells, num, rng), old)
            if not num_bins:
                codes[:, j] = drawn
                continue
            moved = np.rint(old + rng.uniform(-degree, degree, num) * num_bins)
            inside = np.clip(moved, 0, num_bins - 1).astype(np.int32)
            # a number walks; it becomes or ceases to be missing by being drawn anew
            leaps = (old >= num_bins) | (drawn >= num_bins)
            codes[:, j] = np.where(leaps, drawn, inside)
        return replace(candidates, codes=codes)

    def _drawn(
        self, column: int, size: int, num: int, rng: np.random.Generator
    ) -> NDArray[np.int32]:
        """Cells of one column of some size, drawn by its shares."""
        if not self.shares:
            return rng.integers(size, size=num, dtype=np.int32)
        return rng.choice(size, size=num, p=self.shares[column]).astype(np.int32)

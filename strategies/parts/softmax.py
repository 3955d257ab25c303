# SPDX-License-Identifier: Apache-2.0
"""A linear classifier of cells: one weight for each group of a column's cells and each contrast.

Multinomial logistic regression. The logits of C classes always add up to zero, so they have
C - 1 coordinates, their contrasts; a record's gradient is its residual in those coordinates, once
for every group that the record lies in, and once for the intercept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .histograms import Grid

_REACH = 6.0  # groups over which the weights of a number's neighboring groups go together
_BALANCING, _DAMPING = 20, 1e-6  # Newton's steps, none longer than one, and what keeps them finite
_BLOCK = 1 << 22  # numbers in a block of logits


@dataclass(frozen=True, eq=False)
class Lookup:
    """Which weights a record's codes call for.

    Attributes:
      columns: Positions of the columns that predict, `(num_columns,)`.
      starts: First entry of each in `rows`, and the end, `(num_columns + 1,)`.
      rows: Row of the weights that each cell of each column has, laid end to end.
      num_rows: Rows of the weights; the last is the intercept's.
    """

    columns: NDArray[np.int64]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    num_rows: int

    @staticmethod
    def of(grids: Sequence[Grid]) -> "Lookup":
        """One row for each group of each grid, and one for the intercept."""
        ends = np.cumsum([0] + [grid.size for grid in grids])
        rows = [grid.groups + end for grid, end in zip(grids, ends.tolist(), strict=False)]
        return Lookup(
            np.array([grid.column for grid in grids], dtype=np.int64),
            np.cumsum([0] + [len(grid.groups) for grid in grids]).astype(np.int64),
            np.concatenate(rows).astype(np.int64),
            int(ends[-1]) + 1,
        )

    def of_codes(self, codes: NDArray[np.int32]) -> NDArray[np.int64]:
        """Rows of the weights that each record calls for, `(num_records, num_columns + 1)`.

        A code that a column does not know counts as the nearest one it knows.
        """
        found = np.full((len(codes), len(self.columns) + 1), self.num_rows - 1, dtype=np.int64)
        for i, column in enumerate(self.columns.tolist()):
            rows = self.rows[self.starts[i] : self.starts[i + 1]]
            found[:, i] = np.take(rows, codes[:, column], mode="clip")
        return found

    @property
    def row_norm(self) -> float:
        """L2 norm of a record's design row: every column lights one cell, and the intercept."""
        return math.sqrt(len(self.columns) + 1)

    def gram(self, codes: NDArray[np.int32]) -> NDArray[np.float64]:
        """Mean outer product of the records' design rows, `(num_rows, num_rows)`."""
        from scipy.sparse import csr_matrix

        rows = self.of_codes(codes)
        ones = np.ones(rows.size)
        ends = np.arange(0, rows.size + 1, rows.shape[1])
        design = csr_matrix((ones, rows.ravel(), ends), shape=(len(rows), self.num_rows))
        return np.asarray((design.T @ design).todense()) / max(len(rows), 1)


@dataclass(frozen=True, eq=False)
class Softmax:
    """The probabilities of a record's class, given its other columns.

    Attributes:
      lookup: Which weights a record calls for.
      weights: `(num_rows, num_classes - 1)`, in the coordinates of `contrasts`.
    """

    lookup: Lookup
    weights: NDArray[np.float64]

    @property
    def num_classes(self) -> int:
        """Classes, one more than contrasts."""
        return int(self.weights.shape[1]) + 1

    @cached_property
    def class_weights(self) -> NDArray[np.float64]:
        """What each row adds to each class's logit, `(num_rows, num_classes)`."""
        return self.weights @ contrasts(self.num_classes).T

    def logits(self, codes: NDArray[np.int32]) -> NDArray[np.float64]:
        """Logit of each class, `(num_records, num_classes)`; each row adds up to zero."""
        found = np.zeros((len(codes), self.num_classes))
        step = max(1, _BLOCK // self.num_classes)
        for start in range(0, len(codes), step):
            rows = self.lookup.of_codes(codes[start : start + step])
            for column in rows.T:
                found[start : start + step] += self.class_weights[column]
        return found

    def probabilities(self, codes: NDArray[np.int32]) -> NDArray[np.float64]:
        """Probability of each class, `(num_records, num_classes)`."""
        found = self.logits(codes)
        found -= found.max(axis=1, keepdims=True)
        np.exp(found, out=found)
        found /= found.sum(axis=1, keepdims=True)
        return found

    def balanced(self, codes: NDArray[np.int32], shares: NDArray[np.float64]) -> "Softmax":
        """The same but for its intercept, by which the records' classes have given shares.

        Args:
          codes: Records; at least one.
          shares: Of each class, `(num_classes,)`; > 0, adding up to one.
        """
        logits = self.logits(codes)
        basis = contrasts(self.num_classes)
        shift = np.zeros(self.num_classes - 1)
        for _ in range(_BALANCING):
            probs = logits + basis @ shift
            probs = np.exp(probs - probs.max(axis=1, keepdims=True))
            probs /= probs.sum(axis=1, keepdims=True)
            gap = (shares - probs.mean(axis=0)) @ basis
            curvature = basis.T @ (np.diag(probs.mean(axis=0)) - probs.T @ probs / len(probs))
            curvature = curvature @ basis + _DAMPING * np.eye(len(shift))
            step = np.linalg.solve(curvature, gap)
            shift += step / max(1.0, float(np.abs(step).max()))
        weights = self.weights.copy()
        weights[-1] += shift
        return Softmax(self.lookup, weights)

    def residuals(
        self, codes: NDArray[np.int32], classes: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        """What each record's class has above its probability, in contrasts, `(num_records, C - 1)`.

        No longer than the square root of 2.
        """
        basis = contrasts(self.num_classes)
        found = basis[np.clip(classes, 0, self.num_classes - 1)]
        for probs, contrast in zip(self.probabilities(codes).T, basis, strict=True):
            found -= probs[:, None] * contrast  # one class after the other, whatever the batch
        return found


def contrasts(num_classes: int) -> NDArray[np.float64]:
    """An orthonormal basis of logits that add up to zero, `(num_classes, num_classes - 1)`.

    Example:
      >>> contrasts(2).round(3).tolist()
      [[0.707], [-0.707]]
    """
    basis = np.zeros((num_classes, num_classes - 1))
    for k in range(num_classes - 1):
        basis[: k + 1, k] = 1.0 / math.sqrt((k + 1) * (k + 2))
        basis[k + 1, k] = -math.sqrt((k + 1) / (k + 2))
    return basis


def roughness(grids: Sequence[Grid], ordered: Sequence[int]) -> NDArray[np.float64]:
    """A penalty on weights by which groups next to each other in a number weigh about the same.

    The inverse covariance of weights that are independent from column to column, of variance one,
    and within the ordered cells of a column correlated by `exp(-distance / reach)`. The
    intercept is left alone.

    Args:
      grids: Groups of each column's cells, in the order of the rows.
      ordered: How many of each column's first cells are in order; 0 for a category.

    Returns:
      `(num_rows, num_rows)`, symmetric, zero in the intercept's row and column.
    """
    size = sum(grid.size for grid in grids) + 1
    found = np.zeros((size, size))
    start = 0
    for grid, cells in zip(grids, ordered, strict=True):
        place = np.arange(grid.size, dtype=np.float64)
        apart = np.abs(place[:, None] - place) / _REACH
        num_inner = len(set(grid.groups[:cells].tolist()) - set(grid.groups[cells:].tolist()))
        apart[num_inner:] = apart[:, num_inner:] = np.inf
        apart[np.diag_indices(grid.size)] = 0.0
        part = slice(start, start + grid.size)
        found[part, part] = np.linalg.inv(np.exp(-apart))
        start += grid.size
    return found


@dataclass(frozen=True, eq=False)
class Newton:
    """Steps from noisy gradients that never overshoot, whatever the weights are.

    The curvature of the mean log-likelihood is at most half the design's mean outer product, in
    every direction and at all weights. So the step that this bound gives ascends surely, and the
    bound does not change, nor does it need private records: any public model of the columns
    that predict will do, if it knows which of them go together.

    Attributes:
      inverse: Of the bound and the penalty, `(num_rows, num_rows)`.
      penalty: Quadratic form that the weights are held back by, `(num_rows, num_rows)`.

    Reference:
      Böhning, Lindsay (1988), "Monotonicity of quadratic-approximation algorithms", section 4,
      https://doi.org/10.1007/BF00049423.
    """

    inverse: NDArray[np.float64]
    penalty: NDArray[np.float64]

    @staticmethod
    def of(gram: NDArray[np.float64], penalty: NDArray[np.float64]) -> "Newton":
        """The steps for a design's mean outer product and a positive definite penalty."""
        return Newton(np.asarray(np.linalg.inv(gram / 2 + penalty), dtype=np.float64), penalty)

    def step(
        self, weights: NDArray[np.float64], gradient: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """How far to go from `weights`, given the mean gradient there."""
        return np.asarray(self.inverse @ (gradient - self.penalty @ weights))

# SPDX-License-Identifier: Apache-2.0
"""Histograms of columns, pairs and larger sets as one query: what is asked, and its answer.

A record lights one cell of each histogram. All that a client needs travels in `Query.inputs`:
groups of codes (`grids`), and which grids make each histogram.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.query import Contribution, NoisySum, Query
from ...core.records import BoundedShard
from .simplex import pooled_total

_HEIGHT_STEPS = 1024  # heights are whole multiples of 1 / 1024: exact on every query's lattice


@dataclass(frozen=True, eq=False)
class Grid:
    """A column's cells, merged into groups.

    Attributes:
      column: Position of the column.
      groups: Group of each of its cells, `(num_cells,)`, from 0 without a gap.
    """

    column: int
    groups: NDArray[np.int64]

    @staticmethod
    def whole(column: int, num_cells: int) -> "Grid":
        """Every cell on its own."""
        return Grid(column, np.arange(num_cells, dtype=np.int64))

    @staticmethod
    def each(shape: Sequence[int]) -> "list[Grid]":
        """Every cell of every column on its own."""
        return [Grid.whole(column, num_cells) for column, num_cells in enumerate(shape)]

    @cached_property
    def size(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1

    @cached_property
    def is_whole(self) -> bool:
        """Whether every cell stands on its own, in order."""
        return bool((self.groups == np.arange(len(self.groups))).all())

    def merge(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums by group, `(size,)`, of numbers by cell."""
        sums = np.bincount(self.groups, weights=cells, minlength=self.size)
        return sums.astype(np.float64, copy=False)


@dataclass(frozen=True, eq=False)
class Measured:
    """A noisy histogram of all records, in counts.

    Attributes:
      grids: One grid a column.
      counts: One axis a grid, in their order.
      stddev: Standard deviation of the noise in each count; finite.
    """

    grids: tuple[Grid, ...]
    counts: NDArray[np.float64]
    stddev: float


@dataclass(frozen=True, eq=False)
class Histograms:
    """Histograms that are measured together.

    Attributes:
      members: The grids of each, one a column.
      heights: How high a record's cell stands in each, `(num_histograms,)`: the higher, the
        less noise, at the others' expense. Their squares add up to at most their number.
    """

    members: tuple[tuple[Grid, ...], ...]
    heights: NDArray[np.float64]

    @staticmethod
    def balanced(
        members: Sequence[tuple[Grid, ...]], weights: Sequence[float] | None = None
    ) -> "Histograms":
        """Histograms with heights that make their summed L1 error least.

        A histogram of m cells at height h has an error of order m / h; under a bound on the sum
        of h^2 the sum of errors, each w times, is least at h ~ (w m)^(1/3).

        Args:
          members: The grids of each, one a column.
          weights: How much the error of each counts; `None`: all the same.
        """
        cells = np.array([math.prod(g.size for g in grids) for grids in members], dtype=np.float64)
        heights = np.cbrt(cells if weights is None else cells * np.asarray(weights))
        heights *= math.sqrt(len(members) / float(heights @ heights))
        heights = np.maximum(np.floor(heights * _HEIGHT_STEPS), 1.0) / _HEIGHT_STEPS
        return Histograms(tuple(members), heights)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of cells of each histogram."""
        return [math.prod(g.size for g in grids) for grids in self.members]

    def query(self, name: str, *, noise_multiplier: float, max_norm: float) -> Query:
        """The query that measures them all.

        Args:
          name: The query's name.
          noise_multiplier: The query's.
          max_norm: L2 bound of a user, in units of one record's norm.
        """
        grids = list({id(g): g for member in self.members for g in member}.values())
        place = {id(g): i for i, g in enumerate(grids)}
        ways = max(map(len, self.members))
        members = [[place[id(g)] for g in m] + [-1] * (ways - len(m)) for m in self.members]
        return Query(
            name,
            dim=sum(self.sizes),
            clip=norm_clip(self.heights, max_norm),
            noise_multiplier=noise_multiplier,
            inputs={
                "grid_columns": np.array([g.column for g in grids], dtype=np.int32),
                "grid_starts": np.cumsum([0] + [len(g.groups) for g in grids]).astype(np.int64),
                "grid_sizes": np.array([g.size for g in grids], dtype=np.int32),
                "grid_groups": np.concatenate([g.groups for g in grids]).astype(np.int32),
                "members": np.array(members, dtype=np.int32),
                "heights": self.heights,
            },
            cells=True,
        )

    def measured(self, noisy: NoisySum) -> list[Measured]:
        """The histograms in the query's answer, in counts; none if the round was void."""
        if noisy.is_void:
            return []
        parts = np.split(noisy.vector, np.cumsum(self.sizes)[:-1])
        return [
            Measured(grids, part.reshape([g.size for g in grids]) / height, noisy.stddev / height)
            for grids, part, height in zip(self.members, parts, self.heights.tolist(), strict=True)
        ]


def total_of(measured: Sequence[Measured]) -> float:
    """The number of records that the tables agree on; 0.0 if it is lost in noise."""
    return pooled_total((m.counts, m.stddev) for m in measured)


def margins_of(tables: Sequence[Measured]) -> list[Measured]:
    """What tables say of each of their columns, as histograms of one column."""
    found = []
    for table in tables:
        for axis, grid in enumerate(table.grids):
            others = tuple(a for a in range(len(table.grids)) if a != axis)
            added = math.sqrt(table.counts.size / grid.size)
            found.append(Measured((grid,), table.counts.sum(axis=others), table.stddev * added))
    return found


def norm_clip(heights: NDArray[np.float64], max_norm: float) -> float:
    """Clip of a query that counts cells: `max_norm` times the norm of one record.

    A hair (2^-40) above it, so that rounding never makes a record that just fits look too long.
    """
    return max_norm * math.sqrt(float(heights @ heights)) * (1 + 2.0**-40)


def cells_of(query: Query, shard: BoundedShard) -> Contribution:
    """Cells that each record lights in the histograms of a query made by `Histograms.query`.

    Raises:
      ConfigError: The query's arrays contradict each other or the number of columns. Whether
        they do does not depend on any record: a code that a grid does not know counts as the
        nearest one it knows.

    Privacy:
      A record's cells depend on that record and the query alone.
    """
    codes = shard.records.codes
    columns, starts, sizes, groups, members, heights = _checked(query, codes.shape[1])
    grouped = np.empty((len(codes), len(columns)), dtype=np.int64)
    for i, column in enumerate(columns.tolist()):
        cells = groups[starts[i] : starts[i + 1]]
        grouped[:, i] = np.take(cells, codes[:, column], mode="clip")
    widths = np.where(members >= 0, sizes[members], 1)
    ends = np.cumsum(widths.prod(axis=1))
    indices = grouped[:, members[:, 0]]
    for axis in range(1, members.shape[1]):
        used = np.flatnonzero(members[:, axis] >= 0)
        if len(used) == len(members):
            indices *= widths[:, axis]
            indices += grouped[:, members[:, axis]]
        else:
            indices[:, used] *= widths[used, axis]
            indices[:, used] += grouped[:, members[used, axis]]
    indices += np.concatenate([[0], ends[:-1]])
    return Contribution.cells(indices, shard.user_index, num_users=shard.num_users, weights=heights)


def _checked(query: Query, num_columns: int) -> tuple[NDArray[Any], ...]:
    """The query's arrays, after checks that look at no record."""
    names = ("grid_columns", "grid_starts", "grid_sizes", "grid_groups", "members", "heights")
    if set(query.inputs) != set(names):
        raise ConfigError(f"query {query.name!r} comes with other arrays than {', '.join(names)}")
    columns, starts, sizes, groups, members, heights = (query.inputs[name] for name in names)
    whole = (columns, starts, sizes, groups, members)
    if not (
        all(a.dtype.kind == "i" for a in whole)
        and heights.dtype == np.float64
        and columns.ndim == starts.ndim == sizes.ndim == groups.ndim == heights.ndim == 1
        and members.ndim == 2
        and members.shape[1] > 0
        and query.dim >= len(members) == len(heights) > 0
        and len(columns) == len(sizes) == len(starts) - 1
        and starts[0] == 0
        and starts[-1] == len(groups)
        and (np.diff(starts) > 0).all()
        and ((groups >= 0) & (groups < np.repeat(sizes, np.diff(starts)))).all()
        and ((columns >= 0) & (columns < num_columns)).all()
        and ((sizes > 0) & (sizes <= query.dim)).all()
        and ((members >= -1) & (members < len(columns))).all()
        and (members[:, 0] >= 0).all()
        and _cells_in(members, sizes) <= query.dim
    ):
        raise ConfigError(f"query {query.name!r} comes with arrays that contradict each other")
    return columns, starts, sizes.astype(np.int64), groups.astype(np.int64), members, heights


def _cells_in(members: NDArray[Any], sizes: NDArray[Any]) -> float:
    """Cells of all histograms together; in floating point, so that nothing overflows."""
    return float(np.where(members >= 0, sizes[members], 1).prod(axis=1, dtype=np.float64).sum())

# SPDX-License-Identifier: Apache-2.0
"""Users with their records as one wide relation: a user's columns, how many records, two of them.

A user of several records has a row for each ordered pair of them, so that the two slots are alike:
what is counted of the first holds for the second. Rows are averaged over the user, who so weighs
as much as one row, whatever the number of records.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.query import Contribution, Query
from ...core.records import BoundedShard, Records
from .histograms import Histograms, cells_of

_SHIFTS = 4  # records that each record is paired with: all of them for up to five records a user


@dataclass(frozen=True)
class Layout:
    """Where the wide relation's columns stand.

    First the user's columns, then the number of records, then the records' columns twice.

    Attributes:
      parent: Positions in the schema of the columns that belong to the user.
      child: Positions of those that belong to a record; at least one.
      most_records: Cells of the number of records; whoever has more counts as having so many.
    """

    parent: tuple[int, ...]
    child: tuple[int, ...]
    most_records: int

    @property
    def size(self) -> int:
        """Position of the number of records; cell 0 stands for one record."""
        return len(self.parent)

    @property
    def first(self) -> tuple[int, ...]:
        """Positions of the first record's columns."""
        start = self.size + 1
        return tuple(range(start, start + len(self.child)))

    @property
    def second(self) -> tuple[int, ...]:
        """Positions of the second record's columns."""
        start = self.size + 1 + len(self.child)
        return tuple(range(start, start + len(self.child)))

    @property
    def own(self) -> tuple[int, ...]:
        """Positions of the user's columns and of the first record's."""
        return (*range(self.size), *self.first)

    def shape(self, cells: Sequence[int], size_cells: int) -> tuple[int, ...]:
        """Cells of the wide relation's columns, from those of the schema's."""
        child = [cells[c] for c in self.child]
        return (*(cells[c] for c in self.parent), size_cells, *child, *child)

    def twin(self, column: int) -> int:
        """The same column of the other record; a column of the user is its own twin."""
        width = len(self.child)
        if column in self.first:
            return column + width
        return column - width if column in self.second else column


def relation_query(
    tables: Histograms, layout: Layout, name: str, *, noise_multiplier: float
) -> Query:
    """The query for tables over the wide relation's columns; each user's norm is at most a row's.

    Args:
      tables: Their grids stand on the wide relation's columns.
      layout: Which column is which.
      name: The query's name.
      noise_multiplier: The query's.
    """
    query = tables.query(name, noise_multiplier=noise_multiplier, max_norm=1.0)
    extra = {
        "parent": np.array(layout.parent, dtype=np.int32),
        "child": np.array(layout.child, dtype=np.int32),
        "most_records": np.array([layout.most_records], dtype=np.int32),
    }
    return replace(query, inputs={**query.inputs, **extra})


def relation_cells(query: Query, shard: BoundedShard) -> Contribution:
    """Cells that each user's rows light, as the mean over the user's rows.

    A table that holds a column of the second record counts users of several records only.

    Raises:
      ConfigError: The query's arrays contradict each other or the number of columns.

    Privacy:
      A user's rows depend on that user's records and the query alone. Their scales add up to one,
      so the user's vector is no longer than the longest row.
    """
    layout = _layout(query, shard.records.codes.shape[1])
    own = ("parent", "child", "most_records")
    inputs = {name: array for name, array in query.inputs.items() if name not in own}
    first, second, rows_of = paired(shard)
    codes = shard.records.codes
    one, other = codes[first], codes[second]
    counts = np.bincount(shard.user_index, minlength=shard.num_users)
    size = np.minimum(counts, layout.most_records)[rows_of] - 1
    wide = np.column_stack(
        [one[:, layout.parent], size, one[:, layout.child], other[:, layout.child]]
    )
    flat = BoundedShard(
        Records(wide.astype(np.int32)), rows_of, shard.num_users, max(1, len(rows_of))
    )
    counted = cells_of(replace(query, inputs=inputs), flat).user_means()
    if counted.scales is None or counted.indices is None:
        return counted
    columns = np.concatenate([query.inputs["grid_columns"], [-1]])
    needs_second = (columns[query.inputs["members"]] >= layout.second[0]).any(axis=1)
    scales = np.repeat(counted.scales[:, None], len(needs_second), axis=1)
    scales[np.ix_(counts[rows_of] == 1, needs_second)] = 0.0
    return replace(counted, scales=scales)


def paired(
    shard: BoundedShard,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Positions of both records of each row, and its user, `(num_rows,)` each, users in order.

    Each record is paired with the up to four that follow it, around the circle of its user's
    records. With more than five records those are fewer than all pairs, and as many of each
    record. A user's only record is paired with itself.
    """
    starts = shard.starts
    counts = np.diff(starts)
    place = np.arange(len(shard.records)) - starts[:-1][shard.user_index]
    firsts, seconds = [], []
    for shift in range(_SHIFTS + 1):
        chosen = counts > shift if shift else counts == 1
        record = np.flatnonzero(chosen[shard.user_index])
        user = shard.user_index[record]
        firsts.append(record)
        seconds.append(starts[:-1][user] + (place[record] + shift) % np.maximum(counts[user], 1))
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    order = np.argsort(first, kind="stable")
    return first[order], second[order], shard.user_index[first[order]]


def _layout(query: Query, num_columns: int) -> Layout:
    """The query's layout, after checks that look at no record."""
    arrays = [query.inputs.get(name, np.zeros(())) for name in ("parent", "child", "most_records")]
    parent, child, most = arrays
    if not (
        all(a.dtype.kind == "i" and a.ndim == 1 for a in arrays)
        and len(child) > 0
        and np.array_equal(np.sort(np.concatenate([parent, child])), np.arange(num_columns))
        and len(most) == 1
        and 2 <= most[0] <= query.dim
        and set(query.inputs) >= {"grid_columns", "members"}
        and query.inputs["members"].dtype.kind == query.inputs["grid_columns"].dtype.kind == "i"
        and (np.abs(query.inputs["members"]) <= len(query.inputs["grid_columns"])).all()
    ):
        raise ConfigError(f"query {query.name!r} comes with arrays that contradict each other")
    return Layout(tuple(parent.tolist()), tuple(child.tolist()), int(most[0]))

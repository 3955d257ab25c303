# SPDX-License-Identifier: Apache-2.0
"""Count the values of a shard that are there but have no cell, and so count as missing.

For whoever holds the records: exact facts of private values, which no message ever carries.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..core.column import Column
from ..core.errors import SchemaError
from ..core.open_codes import MISSING_NUMBER
from .coding import Coder


@dataclass(frozen=True)
class Unread:
    """How much of one column is not what its schema says.

    Attributes:
      column: Public column of the schema.
      num_values: Values that are there: neither null, nor NaN, nor an empty text.
      num_unread: Those that do not parse or are not listed.
    """

    column: Column
    num_values: int
    num_unread: int

    def __add__(self, other: "Unread") -> "Unread":
        """The same of two batches of records."""
        return Unread(
            self.column,
            self.num_values + other.num_values,
            self.num_unread + other.num_unread,
        )

    @property
    def share(self) -> float:
        """Share of the values that are there; 0 where there are none."""
        return self.num_unread / self.num_values if self.num_values else 0.0

    @property
    def is_whole(self) -> bool:
        """Whether there are values, and none of them was read."""
        return 0 < self.num_values == self.num_unread

    def __str__(self) -> str:
        share = "less than 0.01%" if self.share < 1e-4 else f"{self.share:.2%}"
        some = f"{share} of the values count"
        said = "every value counts" if self.is_whole else some
        return f"column {self.column.name!r}: {said} as missing, being not {_expected(self.column)}"


def unread_in(coder: Coder, values: pa.ChunkedArray, codes: NDArray[np.int32]) -> Unread:
    """What of a column's values was not read.

    Args:
      coder: What read them.
      values: The column.
      codes: What `coder.codes` made of it, `(num_records,)`; not of an open category, all of
        whose values are read.
    """
    column = coder.column
    if not column.missing:  # what has no cell was refused
        return Unread(column, len(codes), 0)
    rows = np.flatnonzero(codes == (MISSING_NUMBER if column.is_open else column.num_cells - 1))
    num_empty = coder.num_empty(values, rows) if len(rows) else 0
    return Unread(column, len(codes) - num_empty, len(rows) - num_empty)


def check_read(columns: Iterable[Unread]) -> None:
    """Refuse a population one of whose columns would be lost entirely.

    Raises:
      SchemaError: No value of a column is what the schema says.
    """
    for unread in columns:
        if unread.is_whole:
            raise SchemaError(
                f"column {unread.column.name!r}: not one of its values is"
                f" {_expected(unread.column)}, so that all would count as missing and the column"
                " would be lost. Nothing was asked or spent. Write the values so in the file, or"
                " correct the column in the schema"
            )


def _expected(column: Column) -> str:
    """What a value of a column looks like."""
    if column.kind == "date":
        return "a date like 2024-12-31 or 2024-12-31T08:30"
    if column.kind == "boolean":
        return "true, false, 1 or 0"
    if column.is_categorical:
        return f"one of its categories, such as {column.categories[0]!r}"
    return "a number"

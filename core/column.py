# SPDX-License-Identifier: Apache-2.0
"""The public columns of a population, each cut into cells, and what a constraint sees of them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from .dates import RESOLUTIONS, Resolution, iso_of
from .errors import SchemaError

Kind = Literal["category", "ordinal", "boolean", "integer", "real", "date"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CATEGORICAL = ("category", "ordinal", "boolean")
TRUTH = ("false", "true")
ORIGINS = ("public", "policy", "measured")
MAX_CELLS = 1 << 20
OPEN = "private"
"""What a schema file says in place of categories or bounds that a run has to find."""

OPEN_KINDS: tuple[Kind, ...] = ("category", "integer", "real")
MAX_OPEN_BINS, MAX_OPEN_BYTES = 256, 64
MAX_TEXT_BYTES = 1 << 20
_INT64 = 2.0**63
_MOST_EXACT = 2.0**53  # above it not every whole number is a float


@dataclass(frozen=True)
class Column:
    """One table column, cut into public cells.

    Attributes:
      name: Column name in the data.
      kind: `category`, `ordinal` (categories that have an order), `boolean`, `integer`, `real` or
        `date`.
      origin: Where its categories or bounds came from: `public`, `policy` or `measured`, then
        what is known of it, as in `"public: ICD-10 chapters"`.
      categories: Values of a category or an ordinal, as strings, one cell each, an ordinal's in
        their order. A boolean's are `false` and `true`, whatever is given.
      bounds: Lowest and highest value of a number or a date; what lies outside is clamped. A
        date's are whole units of its resolution since 1970-01-01, see `core.dates.units_of`.
      num_bins: Cells a number or a date is cut into; of an open number, the most of them.
      missing: One cell more, the last, for a missing value and for an unlisted category.
      resolution: Of a date: what its values are rounded down to.
      cuts: Inner bin edges, `(num_bins - 1,)`; without them bins are of equal width.
      other: The category that every unlisted value counts as; empty: it counts as missing.
      is_open: Its categories or bounds are not public: a run finds them, under its own budget.
      max_bytes: How much of a category's value, in UTF-8, tells it from others; 0: all of it. An
        open category has a limit.
    """

    name: str
    kind: Kind
    origin: str
    categories: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    num_bins: int = 0
    missing: bool = False
    resolution: Resolution = "day"
    cuts: tuple[float, ...] = ()
    other: str = ""
    is_open: bool = False
    max_bytes: int = 0

    def __post_init__(self) -> None:
        _check_origin(self.name, self.origin)
        if self.kind not in KINDS:
            raise SchemaError(
                f"column {self.name!r}: type must be {', '.join(KINDS[:-1])} or {KINDS[-1]} (or"
                f" image, text, or id), not {self.kind!r}"
            )
        if self.other and self.other not in self.categories:
            raise SchemaError(
                f"column {self.name!r}: other = {self.other!r} must be one of its categories"
            )
        if self.is_open:
            _check_open(self)
        elif self.kind == "boolean":
            if self.categories not in ((), TRUTH):
                raise SchemaError(
                    f"column {self.name!r}: a boolean's categories are false and true; leave them"
                    " out, or declare a category"
                )
            object.__setattr__(self, "categories", TRUTH)
        elif self.is_categorical:
            if not self.categories:
                raise SchemaError(
                    f"column {self.name!r}: type {self.kind} needs its categories listed"
                )
            if len(set(self.categories)) < len(self.categories):
                raise SchemaError(f"column {self.name!r}: categories must differ from each other")
        else:
            self._check_bins()
        if self.num_cells > MAX_CELLS:
            raise SchemaError(f"column {self.name!r}: more than {MAX_CELLS:,} cells")

    def _check_bins(self) -> None:
        """Refuse bounds and bins that do not cut a line into cells."""
        what = "a date" if self.kind == "date" else "a number"
        if self.bounds is None or not all(math.isfinite(b) for b in self.bounds):
            raise SchemaError(
                f"column {self.name!r}: {what} needs finite bounds = [lowest, highest]"
            )
        low, high = self.bounds
        if not low < high:
            shown = "{} to {}".format(*(self.spelled(b) for b in self.bounds))
            raise SchemaError(
                f"column {self.name!r}: bounds must rise, not {shown}; what has one value only is"
                " a category"
            )
        if self.kind == "integer":
            self._check_whole(low, high)
        if self.num_bins < 1:
            raise SchemaError(f"column {self.name!r}: num_bins must be 1 or more")
        if self.num_cells > MAX_CELLS:
            raise SchemaError(f"column {self.name!r}: more than {MAX_CELLS:,} cells")
        if self.cuts and len(self.cuts) != self.num_bins - 1:
            raise SchemaError(f"column {self.name!r}: num_bins bins have num_bins - 1 cuts between")
        if not math.isfinite(high - low) or not (np.diff(self.edges) > 0).all():
            raise SchemaError(
                f"column {self.name!r}: bounds {low:g} to {high:g} cannot be cut into"
                f" {self.num_bins} bins; move the bounds or lower num_bins"
            )
        if self.kind == "date":
            if self.resolution not in RESOLUTIONS:
                raise SchemaError(
                    f"column {self.name!r}: resolution must be one of {', '.join(RESOLUTIONS)},"
                    f" not {self.resolution!r}"
                )
            if not all(b == math.floor(b) for b in self.bounds):
                raise SchemaError(f"column {self.name!r}: bounds of a date are whole units")

    def _check_whole(self, low: float, high: float) -> None:
        """Refuse bounds between which no whole number lies, or none that a float holds exactly."""
        if math.ceil(low) > math.floor(high):
            raise SchemaError(
                f"column {self.name!r}: no whole number lies in bounds {low!r} to {high!r}; move"
                " them, or declare a real"
            )
        if max(abs(low), abs(high)) > _MOST_EXACT:
            raise SchemaError(
                f"column {self.name!r}: bounds of an integer must lie within ± 2**53"
                f" ({_MOST_EXACT:.0f}), not {low:.17g} to {high:.17g}; move them, or declare a real"
            )

    @property
    def num_cells(self) -> int:
        """Cells of the column, the one for missing values included; of an open one, a guess."""
        if self.is_categorical:
            return (1 if self.is_open else len(self.categories)) + self.missing
        return self.num_bins + self.missing

    @property
    def num_words(self) -> int:
        """Words of text that a record holds for an open category, beside its code."""
        return -(-self.max_bytes // 4) if self.is_open else 0

    @property
    def is_categorical(self) -> bool:
        """Whether its cells are listed values: a category, an ordinal or a boolean."""
        return self.kind in CATEGORICAL

    @property
    def is_ordered(self) -> bool:
        """Whether neighboring cells are alike: bins of a number or a date, and an ordinal."""
        return self.kind not in ("category", "boolean")

    @property
    def num_ordered_cells(self) -> int:
        """How many of the first cells have an order; 0 for a category or a boolean.

        The cell after them, if there is one, is that of missing values.
        """
        return self.num_cells - self.missing if self.is_ordered else 0

    @cached_property
    def edges(self) -> NDArray[np.float64]:
        """Bin edges of a number or a date, `(num_bins + 1,)`."""
        if self.bounds is None:
            raise SchemaError(f"column {self.name!r} is a {self.kind} and has no bin edges")
        if self.cuts:
            return np.array([self.bounds[0], *self.cuts, self.bounds[1]])
        return np.linspace(self.bounds[0], self.bounds[1], self.num_bins + 1)

    @cached_property
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least and greatest value that stand for each ordered cell, `(num_ordered_cells,)` both.

        Integers and dates are whole; a bin that holds none stands for the nearest one. An
        ordinal's values are its cells.
        """
        if self.is_categorical:
            places = np.arange(self.num_ordered_cells, dtype=np.float64)
            return places, places
        edges = self.edges
        if self.kind == "real":
            return edges[:-1], np.maximum(np.nextafter(edges[1:], edges[:-1]), edges[:-1])
        edges = np.clip(edges, -_INT64, np.nextafter(_INT64, 0))
        first = np.ceil(edges[:-1])
        last = np.ceil(edges[1:]) - 1
        last[-1] = np.floor(edges[-1])  # the top edge belongs to the last bin
        empty = last < first
        middle = np.clip(np.rint((edges[:-1] + edges[1:]) / 2), np.ceil(edges[0]), edges[-1])
        return np.where(empty, middle, first), np.where(empty, middle, last)

    def spelled(self, value: float) -> str:
        """A bound as a schema spells it."""
        if self.kind != "date":
            return f"{value:g}"
        return iso_of(int(value), self.resolution)


@dataclass(frozen=True)
class IdColumn:
    """A column that tells people or records apart: never read for synthesis, never in the codes.

    Attributes:
      name: Column name in the data; may be the one of user ids.
      synthesize: `none`: a release has no such column. `serial`: it has, with the numbers 1, 2, 3
        and so on, which have nothing to do with real ids.
    """

    name: str
    synthesize: Literal["none", "serial"] = "none"

    def __post_init__(self) -> None:
        if self.synthesize not in ("none", "serial"):
            raise SchemaError(
                f"id column {self.name!r}: synthesize must be none or serial,"
                f" not {self.synthesize!r}"
            )


@dataclass(frozen=True)
class ImageColumn:
    """The one image column that a schema may have: uint8 pixels of a fixed public shape.

    Attributes:
      name: Array name in the data.
      shape: `(height, width, channels)`.
      origin: As for a table column.
    """

    name: str
    shape: tuple[int, int, int]
    origin: str
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        _check_origin(self.name, self.origin)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise SchemaError(
                f"image column {self.name!r}: shape must be [height, width, channels],"
                f" not {list(self.shape)}"
            )

    @property
    def num_pixels(self) -> int:
        """Values in one image."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TextColumn:
    """The one column of free text that a schema may have: synthesized whole, never cut into cells.

    Attributes:
      name: Column name in the data.
      max_bytes: How much of a text counts, in UTF-8; the rest is cut off, between characters.
    """

    name: str
    max_bytes: int = 1000
    kind: ClassVar[str] = "text"
    origin: ClassVar[str] = "policy: declared in the schema"

    def __post_init__(self) -> None:
        if not 1 <= self.max_bytes <= MAX_TEXT_BYTES:
            raise SchemaError(
                f"text column {self.name!r}: max_bytes must be 1 to {MAX_TEXT_BYTES:,}, not"
                f" {self.max_bytes!r}"
            )


class Table(Protocol):
    """What a constraint needs to know of a schema."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Table columns, in the order of the codes."""

    @property
    def ids(self) -> tuple[IdColumn, ...]:
        """Columns that are never synthesized."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the table columns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of each table column."""

    def index(self, name: str) -> int:
        """Position of a table column."""


def _check_open(column: Column) -> None:
    """An open column leaves its whole domain to be found, and says how finely."""
    where = f"column {column.name!r}"
    if column.kind not in OPEN_KINDS:
        raise SchemaError(
            f"{where}: only a category, an integer or a real can be {OPEN!r}, not {column.kind!r}"
        )
    if column.categories or column.bounds or column.cuts or column.other:
        raise SchemaError(f"{where}: {OPEN!r} leaves the whole domain to the run; give no part")
    if column.kind == "category" and not 1 <= column.max_bytes <= MAX_OPEN_BYTES:
        raise SchemaError(
            f"{where}: max_bytes must be 1 to {MAX_OPEN_BYTES}, not {column.max_bytes}"
        )
    if column.kind != "category" and not 1 <= column.num_bins <= MAX_OPEN_BINS:
        raise SchemaError(f"{where}: num_bins must be 1 to {MAX_OPEN_BINS}, not {column.num_bins}")


def _check_origin(name: str, origin: str) -> None:
    """An origin names one of the three sources."""
    if origin.split(":")[0].strip() not in ORIGINS:
        raise SchemaError(
            f"column {name!r}: origin must begin with one of {', '.join(ORIGINS)},"
            f" as in 'public: census codebook', not {origin!r}"
        )

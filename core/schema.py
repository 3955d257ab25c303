# SPDX-License-Identifier: Apache-2.0
"""The public schema of a population: columns, their cells, and where each bound came from."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .constraints import Constraint, constraint_from_json
from .dates import RESOLUTIONS, Resolution, iso_of, resolution_of, units_of
from .errors import SchemaError
from .ruleset import Rules

Kind = Literal["category", "ordinal", "boolean", "integer", "real", "date"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CATEGORICAL = ("category", "ordinal", "boolean")
TRUTH = ("false", "true")
ORIGINS = ("public", "policy", "measured")
MAX_CELLS = 1 << 20
OPEN = "private"
"""What a schema file says in place of categories or bounds that a run has to find."""

OPEN_BINS, MAX_OPEN_BINS = 32, 256
OPEN_BYTES, MAX_OPEN_BYTES = 32, 64
_KEYS = {
    *("type", "origin", "categories", "bounds", "num_bins", "missing", "resolution"),
    *("cuts", "other", "max_bytes"),
}
_INT64 = 2.0**63


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
                f" image, or id), not {self.kind!r}"
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
class Schema:
    """Everything public about the records: no value in it may have been read from them for free.

    Attributes:
      columns: Table columns, in the order of the codes.
      image: The image column, if the records hold one.
      target: The column a reader of the synthetic data wants to predict, if any.
      ids: Columns that are never synthesized.
      constraints: What every synthetic record keeps.
    """

    columns: tuple[Column, ...]
    image: ImageColumn | None = None
    target: str | None = None
    ids: tuple[IdColumn, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        names = list(self.names) + ([self.image.name] if self.image else [])
        if not names:
            raise SchemaError("a schema needs at least one column that is not an id")
        names += [column.name for column in self.ids]
        if len(set(names)) < len(names):
            raise SchemaError("column names must differ from each other")
        if self.target is not None and self.target not in self.names:
            raise SchemaError(
                f"target = {self.target!r} is not a table column; there are {', '.join(self.names)}"
            )
        _ = self.rules

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the table columns."""
        return tuple(c.name for c in self.columns)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Cells of each table column."""
        return tuple(c.num_cells for c in self.columns)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First cell of each column when all columns' cells are laid end to end, and the end."""
        return np.concatenate([[0], np.cumsum(self.shape)]).astype(np.int64)

    @cached_property
    def is_open(self) -> bool:
        """Whether a run has to find the domain of some column under its own budget."""
        return any(c.is_open for c in self.columns)

    def allows(self, found: "Schema") -> bool:
        """Whether `found` is this schema with nothing changed but its open columns' domains."""
        if len(found.columns) != len(self.columns):
            return False
        pairs = zip(self.columns, found.columns, strict=True)
        return found == replace(self, columns=found.columns) and all(
            (b.name, b.kind, b.missing, b.max_bytes, b.is_open)
            == (a.name, a.kind, a.missing, a.max_bytes, False)
            if a.is_open
            else a == b
            for a, b in pairs
        )

    @property
    def num_codes(self) -> int:
        """Numbers that a record is held as: one a table column, then the open columns' words."""
        return len(self.columns) + sum(c.num_words for c in self.columns)

    @property
    def num_cells(self) -> int:
        """Cells of all table columns together."""
        return int(sum(self.shape))

    @cached_property
    def rules(self) -> Rules:
        """The constraints over cells; without any, every record is valid."""
        return Rules.of(self)

    def index(self, name: str) -> int:
        """Position of a table column."""
        if name not in self.names:
            raise SchemaError(f"no column {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        columns: dict[str, Any] = {}
        for c in self.columns:
            entry: dict[str, Any] = {"type": c.kind, "origin": c.origin}
            if c.is_categorical and c.kind != "boolean":
                entry["categories"] = OPEN if c.is_open else list(c.categories)
            elif c.is_open:
                entry |= {"bounds": OPEN, "num_bins": c.num_bins}
            elif c.bounds is not None:
                dated = c.kind == "date"
                entry["bounds"] = [c.spelled(b) if dated else float(b) for b in c.bounds]
                entry |= {"num_bins": c.num_bins} | ({"resolution": c.resolution} if dated else {})
            if c.cuts:
                entry["cuts"] = [float(cut) for cut in c.cuts]
            if c.other:
                entry["other"] = c.other
            if c.max_bytes:
                entry["max_bytes"] = c.max_bytes
            if c.missing:
                entry["missing"] = True
            columns[c.name] = entry
        if self.image:
            columns[self.image.name] = {
                "type": "image",
                "shape": list(self.image.shape),
                "origin": self.image.origin,
            }
        for id_column in self.ids:
            columns[id_column.name] = {"type": "id", "synthesize": id_column.synthesize}
        data = {"columns": columns} | ({"target": self.target} if self.target else {})
        constraints = [constraint.to_json() for constraint in self.constraints]
        return data | ({"constraints": constraints} if constraints else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Schema":
        """The schema that plain data describes.

        Raises:
          SchemaError: A key is unknown or missing, or a value cannot be.
        """
        _known(data, {"columns", "target", "constraints"}, "schema")
        columns: list[Column] = []
        image: ImageColumn | None = None
        ids: list[IdColumn] = []
        entries = data.get("columns")
        if not isinstance(entries, Mapping) or not entries:
            raise SchemaError("a schema needs a table [columns.NAME] for each column")
        for name, entry in entries.items():
            if not isinstance(entry, Mapping):
                raise SchemaError(f"column {name!r}: expected a table of settings")
            if entry.get("type") == "image":
                if image is not None:
                    raise SchemaError("a schema may have one image column")
                image = _image(name, entry)
            elif entry.get("type") == "id":
                _known(entry, {"type", "synthesize"}, f"id column {name!r}")
                ids.append(IdColumn(name, entry.get("synthesize", "none")))
            else:
                columns.append(_column(name, entry))
        constraints = data.get("constraints", [])
        if not isinstance(constraints, list | tuple):
            raise SchemaError("constraints must be tables [[constraints]]")
        return Schema(
            tuple(columns),
            image,
            data.get("target"),
            tuple(ids),
            tuple(constraint_from_json(entry, i) for i, entry in enumerate(constraints, 1)),
        )

    @staticmethod
    def read(path: Path) -> "Schema":
        """The schema in a TOML (or, by its ending, JSON) file."""
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise SchemaError(f"cannot read the schema {path}: {error.strerror}") from error
        except ValueError as error:
            raise SchemaError(f"the schema {path} does not parse: {error}") from error
        return Schema.from_json(data)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the schema's content, by which clients and server know they agree."""
        canonical = json.dumps(self.to_json(), sort_keys=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _column(name: str, entry: Mapping[str, Any]) -> Column:
    """A table column from its entry in a schema file."""
    where, kind = f"column {name!r}", entry.get("type", "")
    if OPEN in (entry.get("categories"), entry.get("bounds")):
        return _open_column(name, entry)
    _known(entry, _KEYS, where)
    if "origin" not in entry and kind != "boolean":
        raise SchemaError(
            f"{where} does not say where its categories or bounds came from:"
            ' add origin = "public: ..." (or policy, measured)'
        )
    categories, missing = entry.get("categories", ()), entry.get("missing", False)
    if not isinstance(categories, list | tuple):
        raise SchemaError(f"{where}: categories must be a list, not {categories!r}")
    if not isinstance(missing, bool):
        raise SchemaError(f"{where}: missing must be true or false, not {missing!r}")
    resolution: Resolution = "day"
    bounds = entry.get("bounds")
    if bounds is not None and (not isinstance(bounds, list | tuple) or len(bounds) != 2):
        raise SchemaError(f"{where}: bounds must be [low, high], not {bounds!r}")
    if kind == "date" and bounds is not None:
        resolution, bounds = _date_bounds(bounds, entry.get("resolution"), where)
    elif bounds is not None and not all(
        isinstance(b, int | float) and not isinstance(b, bool) for b in bounds
    ):
        raise SchemaError(f"{where}: bounds must be [low, high], two numbers, not {bounds!r}")
    if "resolution" in entry and kind != "date":
        raise SchemaError(f"{where}: only a date has a resolution")
    cuts, max_bytes = entry.get("cuts", ()), entry.get("max_bytes", 0)
    if not isinstance(cuts, list | tuple) or not all(isinstance(c, int | float) for c in cuts):
        raise SchemaError(f"{where}: cuts must be a list of numbers, not {cuts!r}")
    if not isinstance(max_bytes, int):
        raise SchemaError(f"{where}: max_bytes must be a whole number, not {max_bytes!r}")
    return Column(
        name=name,
        kind=kind,
        origin=str(entry.get("origin", "public: a truth value")),
        categories=tuple(str(c) for c in categories),
        bounds=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        num_bins=_num_bins(entry.get("num_bins"), bounds, kind == "real", where),
        missing=missing,
        resolution=resolution,
        cuts=tuple(map(float, cuts)),
        other=str(entry.get("other", "")),
        max_bytes=max_bytes,
    )


def _open_column(name: str, entry: Mapping[str, Any]) -> Column:
    """A table column whose domain a run finds, from its entry in a schema file."""
    category = entry.get("type") == "category"
    domain, size, usual = (
        ("categories", "max_bytes", OPEN_BYTES) if category else ("bounds", "num_bins", OPEN_BINS)
    )
    where = f"open column {name!r}"
    _known(entry, {"type", "origin", "missing", domain, size}, where)
    given, missing = entry.get(size, usual), entry.get("missing", False)
    if not isinstance(given, int) or isinstance(given, bool) or not isinstance(missing, bool):
        raise SchemaError(f"{where}: {size} must be a whole number, missing true or false")
    return Column(
        name=name,
        kind=entry.get("type", ""),
        origin=str(entry.get("origin", "measured: found by the run, under its budget")),
        num_bins=0 if category else given,
        missing=missing,
        is_open=True,
        max_bytes=given if category else 0,
    )


def _check_open(column: Column) -> None:
    """An open column leaves its whole domain to be found, and says how finely."""
    where = f"column {column.name!r}"
    if column.kind not in ("category", "integer", "real"):
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


def _num_bins(given: Any, bounds: Sequence[float] | None, is_real: bool, where: str) -> int:
    """How many cells a number or a date is cut into: up to 32 unless the schema says it."""
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool):
            raise SchemaError(f"{where}: num_bins must be a whole number, not {given!r}")
        return given
    if bounds is None:
        return 0
    width = float(bounds[1]) - float(bounds[0])
    return 32 if is_real or not width < 31 else max(1, int(width + 1))


def _date_bounds(
    bounds: Sequence[Any], resolution: Any, where: str
) -> tuple[Resolution, tuple[int, int]]:
    """Resolution and bounds of a date, in units of it since 1970."""
    # TOML has dates of its own, which know how they are spelled
    texts = [b if isinstance(b, str) else getattr(b, "isoformat", b.__str__)() for b in bounds]
    try:
        chosen = resolution_of(*texts) if resolution is None else resolution
        if chosen not in RESOLUTIONS:
            raise SchemaError(
                f"{where}: resolution must be one of {', '.join(RESOLUTIONS)}, not {chosen!r}"
            )
        low, high = (units_of(text, chosen) for text in texts)
    except ValueError as error:
        raise SchemaError(
            f'{where}: bounds of a date are ISO dates, as in ["2015-01-01", "2024-12-31"], not'
            f" {texts!r}: {error}"
        ) from error
    return chosen, (low, high)


def _image(name: str, entry: Mapping[str, Any]) -> ImageColumn:
    """The image column from its entry in a schema file."""
    _known(entry, {"type", "origin", "shape"}, f"image column {name!r}")
    shape = entry.get("shape")
    if not isinstance(shape, list | tuple) or not all(isinstance(s, int) for s in shape):
        raise SchemaError(f"image column {name!r}: shape must be [height, width, channels]")
    if len(shape) == 2:
        shape = [*shape, 1]
    if len(shape) != 3:
        raise SchemaError(f"image column {name!r}: shape must be [height, width, channels]")
    return ImageColumn(name, (shape[0], shape[1], shape[2]), str(entry.get("origin", "")))


def _check_origin(name: str, origin: str) -> None:
    """An origin names one of the three sources."""
    if origin.split(":")[0].strip() not in ORIGINS:
        raise SchemaError(
            f"column {name!r}: origin must begin with one of {', '.join(ORIGINS)},"
            f" as in 'public: census codebook', not {origin!r}"
        )


def _known(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse keys that nobody reads."""
    unknown = sorted(set(entry) - known)
    if unknown:
        raise SchemaError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )

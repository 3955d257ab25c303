# SPDX-License-Identifier: Apache-2.0
"""The public schema of a population: columns, their cells, and where each bound came from."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import SchemaError

Kind = Literal["category", "integer", "real"]
ORIGINS = ("public", "policy", "measured")
MAX_CELLS = 1 << 20


@dataclass(frozen=True)
class Column:
    """One table column, cut into public cells.

    Attributes:
      name: Column name in the data.
      kind: `category`, `integer` or `real`.
      origin: Where its categories or bounds came from: `public`, `policy` or `measured`, then
        what is known of it, as in `"public: ICD-10 chapters"`.
      categories: Values of a category, as strings, one cell each.
      bounds: Lowest and highest value of a number; what lies outside is clamped.
      num_bins: Cells a number is cut into, of equal width.
      missing: One cell more, the last, for a missing value and for an unlisted category.
    """

    name: str
    kind: Kind
    origin: str
    categories: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    num_bins: int = 0
    missing: bool = False

    def __post_init__(self) -> None:
        _check_origin(self.name, self.origin)
        if self.kind == "category":
            if not self.categories:
                raise SchemaError(f"column {self.name!r}: a category needs its categories listed")
            if len(set(self.categories)) < len(self.categories):
                raise SchemaError(f"column {self.name!r}: categories must differ from each other")
        elif self.kind in ("integer", "real"):
            if self.bounds is None or not all(math.isfinite(b) for b in self.bounds):
                raise SchemaError(
                    f"column {self.name!r}: a number needs finite bounds = [low, high]"
                )
            low, high = self.bounds
            if not low < high:
                raise SchemaError(
                    f"column {self.name!r}: bounds must rise, not {low:g} to {high:g}"
                )
            if self.num_bins < 1:
                raise SchemaError(f"column {self.name!r}: num_bins must be 1 or more")
        else:
            raise SchemaError(
                f"column {self.name!r}: type must be category, integer or real, not {self.kind!r}"
            )
        if self.num_cells > MAX_CELLS:
            raise SchemaError(f"column {self.name!r}: more than {MAX_CELLS:,} cells")

    @property
    def num_cells(self) -> int:
        """Cells of the column, the one for missing values included."""
        listed = len(self.categories) if self.kind == "category" else self.num_bins
        return listed + self.missing

    @cached_property
    def edges(self) -> NDArray[np.float64]:
        """Bin edges of a number, `(num_bins + 1,)`."""
        if self.bounds is None:
            raise SchemaError(f"column {self.name!r} is a category and has no bin edges")
        return np.linspace(self.bounds[0], self.bounds[1], self.num_bins + 1)


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
    """

    columns: tuple[Column, ...]
    image: ImageColumn | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        names = list(self.names) + ([self.image.name] if self.image else [])
        if not names:
            raise SchemaError("a schema needs at least one column")
        if len(set(names)) < len(names):
            raise SchemaError("column names must differ from each other")
        if self.target is not None and self.target not in self.names:
            raise SchemaError(
                f"target = {self.target!r} is not a table column; there are {', '.join(self.names)}"
            )

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

    @property
    def num_cells(self) -> int:
        """Cells of all table columns together."""
        return int(sum(self.shape))

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
            if c.kind == "category":
                entry["categories"] = list(c.categories)
            elif c.bounds is not None:
                entry["bounds"] = [float(c.bounds[0]), float(c.bounds[1])]
                entry["num_bins"] = c.num_bins
            if c.missing:
                entry["missing"] = True
            columns[c.name] = entry
        if self.image:
            columns[self.image.name] = {
                "type": "image",
                "shape": list(self.image.shape),
                "origin": self.image.origin,
            }
        return {"columns": columns} | ({"target": self.target} if self.target else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Schema":
        """The schema that plain data describes.

        Raises:
          SchemaError: A key is unknown or missing, or a value cannot be.
        """
        _known(data, {"columns", "target"}, "schema")
        columns: list[Column] = []
        image: ImageColumn | None = None
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
            else:
                columns.append(_column(name, entry))
        return Schema(tuple(columns), image, data.get("target"))

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
    _known(
        entry,
        {"type", "origin", "categories", "bounds", "num_bins", "missing"},
        f"column {name!r}",
    )
    if "origin" not in entry:
        raise SchemaError(
            f"column {name!r} does not say where its categories or bounds came from:"
            ' add origin = "public: ..." (or policy, measured)'
        )
    bounds = entry.get("bounds")
    if bounds is not None and (
        not isinstance(bounds, list | tuple)
        or len(bounds) != 2
        or not all(isinstance(b, int | float) and not isinstance(b, bool) for b in bounds)
    ):
        raise SchemaError(f"column {name!r}: bounds must be [low, high], not {bounds!r}")
    num_bins = entry.get("num_bins")
    if num_bins is None and bounds is not None:
        width = bounds[1] - bounds[0]
        num_bins = int(min(32, width + 1)) if entry.get("type") == "integer" else 32
    return Column(
        name=name,
        kind=entry.get("type", ""),
        origin=str(entry["origin"]),
        categories=tuple(str(c) for c in entry.get("categories", ())),
        bounds=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        num_bins=int(num_bins or 0),
        missing=bool(entry.get("missing", False)),
    )


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

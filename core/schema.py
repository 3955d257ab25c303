# SPDX-License-Identifier: Apache-2.0
"""The public schema of a population: columns, their cells, and where each bound came from."""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .column import CATEGORICAL as CATEGORICAL
from .column import KINDS as KINDS
from .column import MAX_CELLS as MAX_CELLS
from .column import MAX_OPEN_BINS as MAX_OPEN_BINS
from .column import MAX_OPEN_BYTES as MAX_OPEN_BYTES
from .column import OPEN as OPEN
from .column import OPEN_KINDS as OPEN_KINDS
from .column import ORIGINS as ORIGINS
from .column import TRUTH as TRUTH
from .column import Column as Column
from .column import IdColumn as IdColumn
from .column import ImageColumn as ImageColumn
from .column import Kind as Kind
from .column import TextColumn as TextColumn
from .constraints import Constraint, constraint_from_json
from .dates import RESOLUTIONS, Resolution, resolution_of, units_of
from .errors import SchemaError
from .ruleset import Rules

OPEN_BINS, OPEN_BYTES = 32, 32
_SHARED_KEYS = {"type", "origin", "missing"}
_KEYS: dict[str, set[str]] = {
    "category": {"categories", "other", "max_bytes"},
    "ordinal": {"categories", "other"},
    "boolean": {"categories"},
    "integer": {"bounds", "num_bins", "cuts"},
    "real": {"bounds", "num_bins", "cuts"},
    "date": {"bounds", "num_bins", "cuts", "resolution"},
}


@dataclass(frozen=True)
class Schema:
    """Everything public about the records: no value in it may have been read from them for free.

    Attributes:
      columns: Table columns, in the order of the codes.
      image: The image column, if the records hold one.
      target: The column a reader of the synthetic data wants to predict, if any.
      ids: Columns that are never synthesized.
      constraints: What every synthetic record keeps.
      text: The column of free text, if the records hold one; there is no image column then.
    """

    columns: tuple[Column, ...]
    image: ImageColumn | None = None
    target: str | None = None
    ids: tuple[IdColumn, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    text: TextColumn | None = None

    def __post_init__(self) -> None:
        if self.image is not None and self.text is not None:
            raise SchemaError("a schema may have an image column or a text column, not both")
        names = [*self.names, *(c.name for c in (self.image, self.text) if c is not None)]
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

    @cached_property
    def ordered_cells(self) -> dict[int, int]:
        """Columns whose first cells have an order, and how many of them have."""
        return {i: c.num_ordered_cells for i, c in enumerate(self.columns) if c.is_ordered}

    @property
    def num_cells(self) -> int:
        """Cells of all table columns together."""
        return int(sum(self.shape))

    @cached_property
    def rules(self) -> Rules:
        """The constraints over cells; without any, every record is valid."""
        return Rules.of(self, self.constraints)

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
        if self.text:
            columns[self.text.name] = {"type": "text", "max_bytes": self.text.max_bytes}
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
        text: TextColumn | None = None
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
            elif entry.get("type") == "text":
                if text is not None:
                    raise SchemaError("a schema may have one text column")
                text = _text(name, entry)
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
            text,
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
    _check_keys(entry, where)
    if OPEN in (entry.get("categories"), entry.get("bounds")):
        return _open_column(name, entry)
    categories, bounds = entry.get("categories", ()), entry.get("bounds")
    either = f", or {OPEN!r}," if kind in OPEN_KINDS else ","
    if not isinstance(categories, list | tuple):
        raise SchemaError(f"{where}: categories must be a list{either} not {categories!r}")
    if bounds is not None and (not isinstance(bounds, list | tuple) or len(bounds) != 2):
        raise SchemaError(f"{where}: bounds must be [low, high]{either} not {bounds!r}")
    if "origin" not in entry and kind != "boolean":
        raise SchemaError(
            f"{where} does not say where its categories or bounds came from:"
            ' add origin = "public: ..." (or policy, measured)'
        )
    missing = entry.get("missing", False)
    if not isinstance(missing, bool):
        raise SchemaError(f"{where}: missing must be true or false, not {missing!r}")
    resolution: Resolution = "day"
    if kind == "date" and bounds is not None:
        resolution, bounds = _date_bounds(bounds, entry.get("resolution"), where)
    elif bounds is not None and not all(
        isinstance(b, int | float) and not isinstance(b, bool) for b in bounds
    ):
        raise SchemaError(f"{where}: bounds must be [low, high], two numbers, not {bounds!r}")
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
    if entry.get("type") not in OPEN_KINDS:
        raise SchemaError(
            f"{where}: only a category, an integer or a real can be {OPEN!r}, not"
            f" {entry.get('type')!r}"
        )
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


def _text(name: str, entry: Mapping[str, Any]) -> TextColumn:
    """The text column from its entry in a schema file."""
    _known(entry, {"type", "max_bytes"}, f"text column {name!r}")
    max_bytes = entry.get("max_bytes", TextColumn.max_bytes)
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
        raise SchemaError(
            f"text column {name!r}: max_bytes must be a whole number, not {max_bytes!r}"
        )
    return TextColumn(name, max_bytes)


def _check_keys(entry: Mapping[str, Any], where: str) -> None:
    """Refuse keys that no table column has, and those of other types than this column's."""
    _known(entry, _SHARED_KEYS.union(*_KEYS.values()), where)
    of_kind = str(entry.get("type"))
    if foreign := sorted(set(entry) - _SHARED_KEYS - _KEYS.get(of_kind, set(entry))):
        kinds = [kind for kind, keys in _KEYS.items() if foreign[0] in keys]
        raise SchemaError(
            f"{where}: only {_either(kinds)} has {foreign[0]!r}, not {_either([of_kind])}; take it"
            " out, or change the type"
        )


def _either(kinds: Sequence[str]) -> str:
    """Types as a sentence names them."""
    said = [f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds]
    return " or ".join([", ".join(said[:-1]), said[-1]] if said[:-1] else said)


def _known(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse keys that nobody reads."""
    unknown = sorted(set(entry) - known)
    if unknown:
        raise SchemaError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )

# SPDX-License-Identifier: Apache-2.0
"""Public facts that every synthetic record keeps: combinations, implications, orderings, tables.

A constraint is declared in the schema and never learnt from records. A real record that breaks
one counts as it is; only what is synthesized keeps it. Each is compiled to a rule over cells
(`core.rules`), handed to an estimator as impossible cells, and enforced in every sample
(`core.enforce`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .column import Column, Table
from .dates import units_of
from .errors import SchemaError
from .orders import Order, step_of
from .rules import Conditional, Lookup, Rule

_MOST_EXACT = 2.0**53  # above it not every whole number is a float


@dataclass(frozen=True)
class Values:
    """A set of one column's values, as a schema writes it.

    A list, a range, or everything; what is missing belongs to it only where that is said.

    Attributes:
      listed: Values by name; of a number or a date, those that have a cell of their own.
      others: The set is every value but the listed ones.
      least: Lowest value of a range, inside it; `None`: no such end.
      most: Highest value of a range, inside it.
      below: Where a range ends, outside it.
      missing: Whether a missing value belongs to the set.
    """

    listed: tuple[str, ...] = ()
    others: bool = False
    least: str | float | None = None
    most: str | float | None = None
    below: str | float | None = None
    missing: bool = False

    @property
    def is_range(self) -> bool:
        """Whether it is given by its ends."""
        return any(end is not None for end in (self.least, self.most, self.below))

    @staticmethod
    def from_json(data: Any, where: str) -> "Values":
        """The set that plain data describes.

        A value, a list of values, `"*"` for everything, or a table with `in`, `not`, or `from`,
        `to` and `below`, and `missing`.
        """
        if isinstance(data, str) and data == "*":
            return Values(others=True, missing=True)
        if not isinstance(data, Mapping):
            return Values(listed=_texts(data, where))
        known = {"in", "not", "from", "to", "below", "missing"}
        if unknown := sorted(set(data) - known):
            raise SchemaError(
                f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
            )
        ways = [bool({"from", "to", "below"} & set(data)), "in" in data, "not" in data]
        missing = data.get("missing", False)
        if sum(ways) > 1 or not isinstance(missing, bool) or not (any(ways) or missing):
            raise SchemaError(
                f"{where}: give one of in = [...], not = [...] or a range (from, to, below), and"
                " missing = true if what is missing belongs to it"
            )
        if "to" in data and "below" in data:
            raise SchemaError(f"{where}: a range ends at `to` or before `below`, not both")
        listed = _texts(data.get("in", data.get("not", [])), where)
        least, most, below = (_end(data.get(key), where) for key in ("from", "to", "below"))
        return Values(listed, "not" in data, least, most, below, missing)

    def to_json(self) -> Any:
        """Plain data that `from_json` reads back."""
        if self == Values(others=True, missing=True):
            return "*"
        if self.listed and not self.others and not self.missing:
            return list(self.listed)
        ends = (("from", self.least), ("to", self.most), ("below", self.below))
        data: dict[str, Any] = {key: end for key, end in ends if end is not None}
        if self.others:
            data["not"] = list(self.listed)
        elif self.listed:
            data["in"] = list(self.listed)
        return data | ({"missing": True} if self.missing else {})

    def __str__(self) -> str:
        ends = (("from", self.least), ("to", self.most), ("below", self.below))
        said = [f"{word} {end}" for word, end in ends if end is not None]
        listed = ", ".join(self.listed[:4]) + (", ..." if len(self.listed) > 4 else "")
        if self.others:
            said.append(f"other than {listed}" if listed else "anything")
        elif listed:
            said.append(listed)
        text = " ".join(said)
        if not self.missing or not (self.listed or self.is_range):
            return text or "missing"
        return f"{text} or missing"

    def cells(self, column: Column, where: str) -> NDArray[np.bool_]:
        """Whether each cell of a column belongs to the set, `(num_cells,)`.

        Raises:
          SchemaError: A value has no cell of its own, or an end of the range divides a bin.
        """
        if self.missing and not column.missing and not self.others:
            raise _never_missing(column, where)
        mask = np.zeros(column.num_cells, dtype=np.bool_)
        present = mask[: column.num_cells - column.missing]
        if self.is_range:
            present[:] = self._inside(column, where)
        else:
            present[[cell_of(column, text, where) for text in self.listed]] = True
            present ^= self.others
        if column.missing:
            mask[-1] = self.missing
        return mask

    def _inside(self, column: Column, where: str) -> NDArray[np.bool_]:
        """Whether each ordered cell lies in the range."""
        if not column.is_ordered:
            raise SchemaError(f"{where}: a {column.kind} has no order, so list its values")
        least, greatest = column.ends
        inside = np.ones(len(least), dtype=np.bool_)
        touched = inside.copy()
        if self.least is not None:
            start = _snapped(column, _number(column, self.least, where))
            inside &= least >= start
            touched &= greatest >= start
        for end, limit in ((self.most, np.less_equal), (self.below, np.less)):
            if end is not None:
                stop = _snapped(column, _number(column, end, where))
                inside &= limit(greatest, stop)
                touched &= limit(least, stop)
        if divided := np.flatnonzero(inside != touched).tolist():
            low, high = (column.spelled(e) for e in column.edges[divided[0] : divided[0] + 2])
            raise SchemaError(
                f"{where}: an end of the range {self} divides the bin from {low} to {high}; put it"
                " at an edge of the bins, or choose bounds and num_bins so that an edge falls on it"
            )
        if not inside.any():
            ends = column.bounds or (least[0], greatest[-1])
            low, high = (
                column.categories[int(end)] if column.is_categorical else column.spelled(end)
                for end in ends
            )
            raise SchemaError(
                f"{where}: no value of {column.name!r} lies there; its"
                f" {'categories' if column.is_categorical else 'bounds'} are {low} to {high}"
            )
        return inside


Conditions = tuple[tuple[str, Values], ...]
"""Columns and sets of their values, all of which must hold."""


class Constraint(ABC):
    """A public fact about every record."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain data that `constraint_from_json` reads back."""

    @abstractmethod
    def compiled(self, schema: Table) -> Rule:
        """The rule over a schema's cells.

        Raises:
          SchemaError: A column or value is none of the schema's.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The fact in words, for the card."""


@dataclass(frozen=True)
class Forbidden(Constraint):
    """A combination that no record has: a structural zero.

    Attributes:
      where: The combination; a column that is not named may be anything.
    """

    where: Conditions

    def to_json(self) -> dict[str, Any]:
        """The plain data."""
        return {"forbid": _conditions_json(self.where)}

    def compiled(self, schema: Table) -> Rule:
        """The rule over cells."""
        return Conditional.of(_masks(schema, self.where, str(self)), None)

    def __str__(self) -> str:
        return f"never {_said(self.where)}"


@dataclass(frozen=True)
class Implication(Constraint):
    """What follows: a record with all that is `given` has all of `then`.

    Attributes:
      given: When it speaks. A missing value is in no set that does not say so.
      then: What holds then.
    """

    given: Conditions
    then: Conditions

    def to_json(self) -> dict[str, Any]:
        """The plain data."""
        return {"if": _conditions_json(self.given), "then": _conditions_json(self.then)}

    def compiled(self, schema: Table) -> Rule:
        """The rule over cells."""
        given, then = (_masks(schema, part, str(self)) for part in (self.given, self.then))
        return Conditional.of(given, then)

    def __str__(self) -> str:
        return f"if {_said(self.given)}, then {_said(self.then)}"


@dataclass(frozen=True)
class Ordering(Constraint):
    """One column is never above another; where either is missing, nothing is said.

    It holds for the values that are released, also for two in one bin.

    Attributes:
      low: A number, a date or an ordinal.
      high: Another of the same sort: number with number, date with date, ordinals with the same
        categories.
      strict: Never equal either.
    """

    low: str
    high: str
    strict: bool = False

    def to_json(self) -> dict[str, Any]:
        """The plain data."""
        return {"order": [self.low, "<" if self.strict else "<=", self.high]}

    def compiled(self, schema: Table) -> Rule:
        """The rule over cells."""
        where = f"constraint {str(self)!r}"
        low, high = (_position(schema, name, where) for name in (self.low, self.high))
        _check_comparable(schema.columns[low], schema.columns[high], where)
        return Order.of(schema.columns, [(low, high, self.strict)])

    def __str__(self) -> str:
        return f"{self.low} {'<' if self.strict else '<='} {self.high}"


@dataclass(frozen=True)
class Dependency(Constraint):
    """One column follows from another by a public table.

    A value of the source that the table does not list, or a missing one, says nothing.

    Attributes:
      source: The column that determines.
      target: The column that is determined.
      table: A value of the target for each listed value of the source.
      missing: Whether the target may also be missing.
    """

    source: str
    target: str
    table: tuple[tuple[str, str], ...]
    missing: bool = False

    def to_json(self) -> dict[str, Any]:
        """The plain data."""
        data = {"from": self.source, "to": self.target, "table": dict(self.table)}
        return data | ({"missing": True} if self.missing else {})

    def compiled(self, schema: Table) -> Rule:
        """The rule over cells."""
        where = f"constraint {str(self)!r}"
        source, target = (_position(schema, name, where) for name in (self.source, self.target))
        if source == target:
            raise SchemaError(f"{where}: a column cannot determine itself")
        left, right = schema.columns[source], schema.columns[target]
        if self.missing and not right.missing:
            raise _never_missing(right, where)
        of_cell = np.full(left.num_cells, -1)
        cells = cells_by_text(left, [key for key, _ in self.table], where)
        of_cell[cells] = cells_by_text(right, [value for _, value in self.table], where)
        return Lookup(source, target, of_cell, right.num_cells - 1 if self.missing else -1)

    def __str__(self) -> str:
        return f"{self.source} determines {self.target}, by a table of {len(self.table)} values"


def constraint_from_json(data: Any, number: int) -> Constraint:
    """The constraint that plain data describes; `number` counts from 1 in messages.

    Raises:
      SchemaError: It is none of the four.
    """
    where = f"constraint {number}"
    if not isinstance(data, Mapping):
        raise SchemaError(f"{where}: expected a table [[constraints]]")
    keys = frozenset(data)
    if keys == {"forbid"}:
        return Forbidden(_conditions(data["forbid"], where))
    if keys == {"if", "then"}:
        return Implication(_conditions(data["if"], where), _conditions(data["then"], where))
    if keys == {"order"}:
        match data["order"]:
            case [str(low), "<" | "<=" as sign, str(high)]:
                return Ordering(low, high, sign == "<")
        raise SchemaError(f'{where}: order must be ["COLUMN", "<=", "COLUMN"], or with "<"')
    if {"from", "to", "table"} <= keys <= {"from", "to", "table", "missing"}:
        table, missing = data["table"], data.get("missing", False)
        if not isinstance(table, Mapping) or not table or not isinstance(missing, bool):
            raise SchemaError(
                f"{where}: table must give a value of {data['to']!r} for each value of"
                f" {data['from']!r}, and missing be true or false"
            )
        pairs = [(str(key), _texts(value, where)) for key, value in table.items()]
        if any(len(values) != 1 for _, values in pairs):
            raise SchemaError(f"{where}: table must give one value for each")
        found = tuple((key, values[0]) for key, values in pairs)
        return Dependency(str(data["from"]), str(data["to"]), found, missing)
    raise SchemaError(
        f"{where}: expected the keys forbid; or if and then; or order; or from, to and table;"
        f" found {', '.join(sorted(map(str, keys))) or 'none'}"
    )


# --- from the schema's words to cells ---------------------------------------------------------


def cell_of(column: Column, text: str, where: str) -> int:
    """The cell that stands for one value and no other.

    Raises:
      SchemaError: There is none.
    """
    return cells_by_text(column, [text], where)[0]


def cells_by_text(column: Column, texts: Sequence[str], where: str) -> list[int]:
    """The cell of each value, each of which has one to itself.

    Raises:
      SchemaError: A value has none.
    """
    if column.is_categorical:
        known = {category: cell for cell, category in enumerate(column.categories)}
        for text in texts:
            if text not in known:
                raise SchemaError(f"{where}: column {column.name!r} has no category {text!r}")
        return [known[text] for text in texts]
    numbers = np.array([_number(column, text, where) for text in texts])
    least, greatest = column.ends
    cells = np.clip(np.searchsorted(least, numbers, side="right") - 1, 0, len(least) - 1)
    alone = (least[cells] == numbers) & (greatest[cells] == numbers)
    if not alone.all():
        text = texts[int(np.flatnonzero(~alone)[0])]
        raise SchemaError(
            f"{where}: column {column.name!r} has no bin for {text} alone; give a range, or more"
            " bins"
        )
    return [int(cell) for cell in cells]


def _number(column: Column, value: str | float, where: str) -> float:
    """A value of an ordered column in the unit of its `ends`."""
    try:
        if column.kind == "date":
            return float(units_of(str(value), column.resolution))
        if column.kind == "ordinal":
            return float(column.categories.index(str(value)))
        return float(value)
    except ValueError as error:
        raise SchemaError(
            f"{where}: column {column.name!r} is of type {column.kind}, which has no {value!r}"
        ) from error


def _snapped(column: Column, value: float) -> float:
    """A limit that means an edge of the bins of a real number, exactly at the edge."""
    if column.kind != "real":
        return value
    near = float(column.edges[np.abs(column.edges - value).argmin()])
    width = float(np.diff(column.edges).min())
    return near if abs(near - value) < 1e-9 * width else value


def _never_missing(column: Column, where: str) -> SchemaError:
    """The refusal of a constraint on missing values of a column that has none."""
    return SchemaError(
        f"{where}: column {column.name!r} has no missing = true; take missing out of the"
        " constraint or add it to the column"
    )


def _texts(data: Any, where: str) -> tuple[str, ...]:
    """Values of a schema file as text, as categories are."""
    values = data if isinstance(data, list | tuple) else [data]
    found = []
    for value in values:
        if isinstance(value, bool):
            found.append("true" if value else "false")
        elif isinstance(value, str | int | float):
            found.append(str(value))
        elif hasattr(value, "isoformat"):  # TOML has dates of its own
            found.append(str(value.isoformat()))
        else:
            raise SchemaError(f"{where}: expected values of a column, not {value!r}")
    return tuple(found)


def _end(value: Any, where: str) -> str | float | None:
    """An end of a range, as a number if it is one."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return _texts(value, where)[0]


def _conditions(data: Any, where: str) -> Conditions:
    """Columns and sets of values from plain data."""
    if not isinstance(data, Mapping) or not data:
        raise SchemaError(f"{where}: expected a table of columns and values, not {data!r}")
    return tuple(
        (str(name), Values.from_json(values, f"{where}, column {name!r}"))
        for name, values in data.items()
    )


def _conditions_json(conditions: Conditions) -> dict[str, Any]:
    """Plain data of columns and sets of values."""
    return {name: values.to_json() for name, values in conditions}


def _said(conditions: Conditions) -> str:
    """Columns and sets of values in words."""
    return " and ".join(f"{name} is {values}" for name, values in conditions)


def _masks(schema: Table, conditions: Conditions, said: str) -> list[tuple[int, NDArray[np.bool_]]]:
    """Positions of the named columns, and which of their cells belong to the set."""
    masks = []
    for name, values in conditions:
        position = _position(schema, name, f"constraint {said!r}")
        where = f"constraint {said!r}, column {name!r}"
        masks.append((position, values.cells(schema.columns[position], where)))
    return masks


def _position(schema: Table, name: str, where: str) -> int:
    """Position of a column that a constraint names."""
    if name not in schema.names:
        ids = [column.name for column in schema.ids]
        why = "is an id, which is never synthesized" if name in ids else "is no column"
        raise SchemaError(f"{where}: {name!r} {why}; there are {', '.join(schema.names)}")
    position = schema.index(name)
    if schema.columns[position].is_open:
        raise SchemaError(
            f"{where}: the values of {name!r} are private, so nothing is known of them; declare"
            " them, or drop the constraint"
        )
    return position


def _check_comparable(low: Column, high: Column, where: str) -> None:
    """Refuse an ordering of two columns that have no common line."""
    sorts = {"integer": "number", "real": "number", "date": "date", "ordinal": "ordinal"}
    found = [sorts.get(column.kind, column.kind) for column in (low, high)]
    if low.name == high.name or found[0] != found[1] or not (low.is_ordered and high.is_ordered):
        raise SchemaError(
            f"{where}: only two numbers, two dates or two ordinals can be ordered, not"
            f" {low.name!r} of type {low.kind} and {high.name!r} of type {high.kind}"
        )
    if found[0] == "ordinal" and low.categories != high.categories:
        raise SchemaError(f"{where}: two ordinals must have the same categories to be ordered")
    for column in (low, high):
        if column.bounds and max(map(abs, column.bounds)) * step_of(column) > _MOST_EXACT:
            raise SchemaError(f"{where}: bounds of {column.name!r} are too large to be ordered")

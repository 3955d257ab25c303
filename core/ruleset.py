# SPDX-License-Identifier: Apache-2.0
"""All constraints of a schema over its cells: valid records, impossible cells, a proof of one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .column import Column, Table
from .constraints import Constraint
from .errors import SchemaError
from .orders import Order
from .rules import Codes, Lookup, Rule

_ZEROS_CELLS = 1 << 20  # most cells of a mask for an estimator
_SEARCH_ROWS = 1 << 20  # records looked at in one step of the search for a possible one
_SEARCH_CELLS = 1 << 12  # of one column in that search


@dataclass(frozen=True, eq=False)
class Part:
    """Constraints that share columns with each other and with no others.

    Attributes:
      columns: Positions of their columns, rising.
      rules: All that hold.
      witness: Cells of those columns that keep all of them.
    """

    columns: tuple[int, ...]
    rules: tuple[Rule, ...]
    witness: NDArray[np.int32]

    def holds(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether all hold, for each record."""
        kept = np.ones((), dtype=np.bool_)
        for rule in self.rules:
            kept = kept & rule.holds(codes)
        return kept


@dataclass(frozen=True, eq=False)
class Rules:
    """All constraints of a schema, compiled.

    Attributes:
      single: One rule for each constraint.
      parts: The same in groups that share no columns; orderings that do are judged together.
      shape: Cells of each column of the schema.
    """

    single: tuple[Rule, ...]
    parts: tuple[Part, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(schema: Table, constraints: Sequence[Constraint]) -> "Rules":
        """Constraints compiled over a schema's cells.

        Raises:
          SchemaError: A constraint does not fit the schema, or no record can keep all of them.
        """
        single = tuple(constraint.compiled(schema) for constraint in constraints)
        _check_tables(schema, constraints, single)
        orders = [rule for rule in single if isinstance(rule, Order)]
        rules = [rule for rule in single if not isinstance(rule, Order)]
        for together in _together([order.columns for order in orders]):
            pairs = [pair for i in together for pair in orders[i].pairs]
            rules.append(Order.of(schema.columns, pairs))
        parts = []
        for together in _together([rule.columns for rule in rules]):
            chosen = tuple(rules[i] for i in together)
            columns = tuple(sorted({c for rule in chosen for c in rule.columns}))
            said = [
                str(constraint)
                for constraint, rule in zip(constraints, single, strict=True)
                if set(rule.columns) <= set(columns)
            ]
            witness = _witness(schema, columns, chosen, said)
            parts.append(Part(columns, chosen, witness))
        return Rules(single, tuple(parts), schema.shape)

    @property
    def orders(self) -> list[Order]:
        """Groups of orderings that share columns."""
        return [rule for part in self.parts for rule in part.rules if isinstance(rule, Order)]

    def valid(self, codes: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each record keeps every constraint, `(num_records,)`.

        Args:
          codes: Cells, `(num_records, num_columns)`.
        """
        by_column = dict(enumerate(codes.T))
        kept = np.ones(len(codes), dtype=np.bool_)
        for part in self.parts:
            kept &= part.holds(by_column)
        return kept

    def zeros(
        self, max_cells: int = _ZEROS_CELLS
    ) -> list[tuple[tuple[int, ...], NDArray[np.bool_]]]:
        """Cliques of columns and which of their cells are possible, for an estimator.

        Each mask has the axes of its clique, in the clique's order. Together they are necessary:
        a record they allow may still be refused by `valid`, where several orderings meet or a
        clique has more than `max_cells` cells and so no mask.
        """
        found: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        for rule in (simple for whole in self.single for simple in whole.simple):
            sides = [self.shape[c] for c in rule.columns]
            if math.prod(sides) > max_cells:
                continue
            mask = np.broadcast_to(rule.holds(_open_grid(rule.columns, sides)), sides)
            found[rule.columns] = found.get(rule.columns, np.True_) & mask
        return [(clique, mask) for clique, mask in found.items() if not mask.all()]


def _open_grid(columns: Sequence[int], sides: Sequence[int]) -> dict[int, NDArray[np.int64]]:
    """All cells of each column, each along an axis of its own."""
    grids = np.meshgrid(*map(np.arange, sides), indexing="ij", sparse=True)
    return dict(zip(columns, grids, strict=True))


def _together(groups: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Positions of the groups that share members, directly or by others between them."""
    found: list[tuple[set[Any], list[int]]] = []
    for position, members in enumerate(groups):
        touching = [entry for entry in found if entry[0] & set(members)]
        found = [entry for entry in found if entry not in touching]
        joined = {*members}.union(*(entry[0] for entry in touching))
        places = sorted([position, *(p for entry in touching for p in entry[1])])
        found.append((joined, places))
    return [places for _, places in found]


def _check_tables(schema: Table, constraints: Sequence[Constraint], rules: Sequence[Rule]) -> None:
    """Refuse two tables that give one value of a column two values of another.

    No record could have that value, which whoever wrote the tables did not say.

    Raises:
      SchemaError: There are two such tables.
    """
    known: dict[tuple[int, int], list[Lookup]] = {}
    for constraint, rule in zip(constraints, rules, strict=True):
        if not isinstance(rule, Lookup):
            continue
        for other in known.setdefault((rule.source, rule.target), []):
            both = (rule.of_cell >= 0) & (other.of_cell >= 0)
            if len(cells := np.flatnonzero(both & (rule.of_cell != other.of_cell))):
                source, target = schema.columns[rule.source], schema.columns[rule.target]
                value = _value_of(source, int(cells[0]))
                one, two = (
                    _value_of(target, int(table.of_cell[cells[0]])) for table in (other, rule)
                )
                raise SchemaError(
                    f"constraint {str(constraint)!r}: another table gives {source.name!r} ="
                    f" {value} the {target.name!r} {one}, this one {two}, so that no record could"
                    " have it; correct one of the two, or leave the value out of it"
                )
        known[rule.source, rule.target].append(rule)


def _value_of(column: Column, cell: int) -> str:
    """The one value of a cell that stands for no other, as a message shows it."""
    if column.is_categorical:
        return repr(column.categories[cell])
    return column.spelled(float(column.ends[0][cell]))


def _witness(
    schema: Table, columns: tuple[int, ...], rules: Sequence[Rule], said: Sequence[str]
) -> NDArray[np.int32]:
    """Cells of some columns that keep all rules, found column by column.

    Args:
      schema: Says how many cells each column has.
      columns: Positions of the columns.
      rules: What must hold of them.
      said: The constraints that the rules came from, in words.

    Raises:
      SchemaError: There are none, or none was found among those that could be looked at.
    """
    rng = np.random.default_rng(0)
    order = sorted(columns, key=lambda c: schema.shape[c])
    rows = np.zeros((1, 0), dtype=np.int32)
    whole = True
    for depth, column in enumerate(order, start=1):
        cells = np.arange(schema.shape[column], dtype=np.int32)
        if len(cells) > _SEARCH_CELLS:
            cells, whole = cells[:: len(cells) // _SEARCH_CELLS + 1], False
        most = max(1, _SEARCH_ROWS // len(cells))
        if len(rows) > most:
            rows, whole = rows[rng.permutation(len(rows))[:most]], False
        rows = np.column_stack(
            [np.repeat(rows, len(cells), axis=0), np.tile(cells, len(rows))]
        ).astype(np.int32)
        known = {c: rows[:, i] for i, c in enumerate(order[:depth])}
        for rule in rules:
            if column in rule.columns and known.keys() >= set(rule.columns):
                rows = rows[np.broadcast_to(rule.holds(known), len(rows))]
                known = {c: rows[:, i] for i, c in enumerate(order[:depth])}
        if not len(rows):
            names = ", ".join(schema.names[c] for c in columns)
            why = "no record can keep" if whole else "no record was found that keeps"
            facts = "; ".join(map(repr, said))
            if len(said) == 1:
                raise SchemaError(
                    f"{why} the constraint {facts}; it leaves no combination of {names} possible"
                )
            raise SchemaError(
                f"{why} all constraints on {names}; they contradict each other: {facts}"
            )
    return np.array(rows[0, np.argsort(order)], dtype=np.int32)

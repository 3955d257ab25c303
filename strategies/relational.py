# SPDX-License-Identifier: Apache-2.0
"""Users with their records: a parent and a child table, learnt from users who weigh one each."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.constraints import Ordering
from ..core.errors import ConfigError
from ..core.query import Contribution, Query, Rounds, Strategy
from ..core.records import BoundedShard, Family, Records
from ..core.schema import Column, Schema
from ..core.synthesizer import Synthesizer
from .parts.cliques import Clique, table_cells, tree_cells
from .parts.coarsen import coarsen
from .parts.denoise import shrink, smooth
from .parts.descent import fit
from .parts.graph import Graph
from .parts.histograms import Grid, Histograms, Measured, total_of
from .parts.measuring import tables_only
from .parts.relation import Layout, relation_cells, relation_query
from .parts.rounding import rounded_cells, spread
from .parts.settings import check_cells, check_model, check_shares
from .parts.simplex import to_simplex

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_CLEAR = 4.0  # noise deviations that the mean cell of a coarse table stands above zero
_FEWEST_CELLS = 3  # of a column in a coarse table, however much noise there is
_SURE = 1.3  # how far above the noise a pair must stand to be linked
_GROWTH = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)  # shares of the cells, from a small model to all
_TALL = 2.0  # how much higher columns by themselves stand than their share: all else leans on them
_BYTES = 8  # of a model's cell
_MOST_RECORDS = 1000
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True)
class Relational(Strategy):
    """Two graphical models over a user's columns, the number of records, and two of the records.

    Users are flattened to rows of: the user's columns, how many records, one record, another
    record of the same user; every user weighs one. Three rounds of sums:

    1. ``columns``: the number of records, and every column by it (one, two, three or four, more).
    2. ``pairs``: tables of every pair of columns of the user and a record, for users of one and of
       several records apart, and of every pair of columns of two records of one user, all merged
       to a few cells. What stands out from the noise becomes a link of the models, the strongest
       first, as long as the models stay small.
    3. ``links``: the tables of the links, at a finer grain.

    Users of one record are drawn from one model, users of several from the other, with two of
    their records; each further record is drawn given the user's first.

    PrivPetal's idea, rebuilt on sums: its permutation relation becomes ordered pairs of a user's
    records, its normalized weights the mean over them. Selection, estimate and the drawing of
    further records are not PrivPetal's.

    Attributes:
      parent: Names of the columns that belong to the user; the others belong to a record. Where
        they differ between a user's records, each record's value counts in proportion.
      most_records: Most records of a synthetic user; whoever has more counts as having so many.
      column_share: Share of the budget (of mu^2) for the first round.
      select_share: Share for the second; the third has the rest.
      select_cells: Most cells of a column in the second round.
      pair_cells: Most cells of a column in the third.
      max_model_mb: Most memory that the larger model may take.
      parent_table: Name of the released table of users.
      child_table: Name of the released table of records.
      key: Name of the column by which both are joined: 1, 2, 3 and so on.
      weight: Whom the tables count; it cannot be anything but ``"user"``, and stands on the card.

    Privacy:
      Each user's vector is a mean of rows, so its norm is at most a row's, however many records
      the user has; nothing is clipped.

    Reference:
      Cai, Xiao, Cormode (2025), "PrivPetal: Relational Data Synthesis via Permutation Relations",
      https://arxiv.org/abs/2503.22970.
    """

    parent: tuple[str, ...] = ()
    most_records: int = 10
    column_share: float = 0.25
    select_share: float = 0.35
    select_cells: int = 8
    pair_cells: int = 24
    max_model_mb: float = 8.0
    parent_table: str = "users"
    child_table: str = "records"
    key: str = "user"
    weight: Literal["user"] = "user"
    name: ClassVar[str] = "relational"

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_shares("links", column_share=self.column_share, select_share=self.select_share)
        if not 2 <= self.most_records <= _MOST_RECORDS:
            raise ConfigError(
                f"most_records must be 2 to {_MOST_RECORDS}, not {self.most_records!r}; where users"
                " have one record there is no relation: take another strategy"
            )
        check_cells(select_cells=self.select_cells, pair_cells=self.pair_cells)
        check_model(self.max_model_mb)
        if len(set(self.parent)) < len(self.parent):
            raise ConfigError(f"parent names a column twice: {', '.join(self.parent)}")
        _check_names(self.parent_table, self.child_table, self.key)

    @property
    def caution(self) -> str:
        """That no column is a user's, where none is declared to be."""
        if self.parent:
            return ""
        return (
            f"No column belongs to a user, so the table {self.parent_table!r} holds nothing but the"
            " key. If some do, name them by the strategy's setting 'parent', as in"
            " parent = ['ward', 'sex']."
        )

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """Three Gaussian sums."""
        from ..core.accounting import compose, single_event

        self._layout(schema)
        return compose(single_event(noise) for noise in self._noise(noise_multiplier))

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Measure columns, choose links, measure links; fit both models."""
        layout = self._layout(schema)
        noise = self._noise(noise_multiplier)
        bands = _bands(self.most_records)
        shape = layout.shape(schema.shape, int(bands[-1]))  # of users of several records

        by_size = Grid(layout.size, bands)
        own = [Grid.whole(column, shape[column]) for column in layout.own]
        sizes = (Grid.whole(layout.size, self.most_records),)
        alone = Histograms.balanced(
            [sizes, *((grid,) for grid in own), *((by_size, grid) for grid in own)]
        )
        tall = np.arange(len(alone.members)) <= len(own)  # all but the tables by band
        heights = alone.heights * np.where(tall, _TALL, 1.0)
        alone = Histograms(alone.members, heights)
        noisy = yield relation_query(alone, layout, "columns", noise_multiplier=noise[0])
        ordered = [schema.columns[i].num_ordered_cells for i in (*layout.parent, *layout.child)]
        first = alone.measured(noisy)
        known = _Known.of(layout, shape, first, self.most_records, ordered)

        tables = Histograms.balanced(self._coarse(known, noise[1]))
        noisy = yield relation_query(tables, layout, "pairs", noise_multiplier=noise[1])
        coarse = tables.measured(noisy)

        most_cells = int(self.max_model_mb * 1e6 / _BYTES)
        links = _fitting(_links(known, coarse, _SEVERAL), known, most_cells)
        alone_links = _fitting_alone(_links(known, coarse, _ONE), known, most_cells)
        asked = [link for link in (*links, *alone_links) if layout.size not in link]
        grids = [Grid(c, coarsen(known.shares(c), self.pair_cells)) for c in range(len(shape))]
        chosen = [_table_of(link, known, grids) for link in dict.fromkeys(asked)]
        chosen += [(grid,) for grid in own]
        fine = Histograms.balanced(chosen)
        noisy = yield relation_query(fine, layout, "links", noise_multiplier=noise[2])
        found = fine.measured(noisy)
        measured = [*coarse, *found[: -len(own)]]
        if first and found:
            again = zip(first[1 : 1 + len(own)], found[-len(own) :], strict=True)
            first[1 : 1 + len(own)] = [_pooled(one, other) for one, other in again]
            known = _Known.of(layout, shape, first, self.most_records, ordered)

        family = Family(self.parent, self.parent_table, self.child_table, self.key)
        return _learned(schema, family, known, alone_links, links, measured)

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cells of each user's rows, averaged over the user."""
        return relation_cells(query, shard)

    def _noise(self, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each round."""
        from ..core.accounting import split

        rest = 1 - self.column_share - self.select_share
        return split(noise_multiplier, (self.column_share, self.select_share, rest))

    def _layout(self, schema: Schema) -> Layout:
        """Which columns belong to the user and which to a record."""
        tables_only(schema, self.name)
        if self.key in (*schema.names, *(column.name for column in schema.ids)):
            raise ConfigError(
                f"key = {self.key!r} is a column of the schema; give the key another name"
            )
        unknown = [name for name in self.parent if name not in schema.names]
        if unknown:
            raise ConfigError(
                f"parent names {unknown[0]!r}, which is no table column; there are"
                f" {', '.join(schema.names)}"
            )
        for constraint in schema.constraints:
            if isinstance(constraint, Ordering) and (
                (constraint.low in self.parent) != (constraint.high in self.parent)
            ):
                raise ConfigError(
                    f"strategy 'relational' cannot keep {str(constraint)!r}: a user's value is"
                    " drawn once, and apart from those of the records; drop the constraint"
                )
        return _layout_of(schema, self.parent, self.most_records)

    def _coarse(self, known: "_Known", noise_multiplier: float) -> list[tuple[Grid, ...]]:
        """Tables of the second round: of all pairs, so coarse that a mean cell is clear."""
        layout = known.layout
        pairs = [*combinations(layout.own, 2)]
        pairs += [(a, layout.twin(b)) for a, b in combinations_with_replacement(layout.first, 2)]
        clear = known.total * known.several / (_CLEAR * noise_multiplier * len(pairs) ** 0.5)
        cells = min(max(int(clear**0.5), _FEWEST_CELLS), self.select_cells)
        grids = [Grid(c, coarsen(known.shares(c), cells)) for c in range(len(known.shape))]
        return [_table_of(pair, known, grids) for pair in pairs if layout.size not in pair]


def _pooled(one: Measured, other: Measured) -> Measured:
    """Two measurements of the same table as one, each weighing by its precision."""
    share = other.stddev**2 / (one.stddev**2 + other.stddev**2)
    counts = share * one.counts + (1 - share) * other.counts
    return Measured(one.grids, counts, share**0.5 * one.stddev)


def _denoised(table: Measured, independent: NDArray[np.float64]) -> Measured:
    """A noisy table without what noise explains: beside independence, only what stands out."""
    shape = np.array([independent.shape])
    kept = shrink((table.counts - independent)[None], np.array([_SURE * table.stddev]), shape)
    return Measured(table.grids, independent + kept[0], table.stddev)


@dataclass(frozen=True, eq=False)
class _Known:
    """What the first round found, by wide column.

    Attributes:
      layout: Which column is which.
      shape: Cells of the wide columns among users of several records: of their number, the bands.
      total: Users; 0.0 if that is lost in noise, and nothing is known.
      sizes: Share of users by number of records, `(most_records,)`.
      by_size: Of each column of `layout.own`, its table by band of the number of records.
      stddev: Of the noise of the count of users by number of records.
    """

    layout: Layout
    shape: tuple[int, ...]
    total: float
    sizes: NDArray[np.float64]
    by_size: Mapping[int, Measured]
    stddev: float

    @staticmethod
    def of(
        layout: Layout,
        shape: tuple[int, ...],
        found: Sequence[Measured],
        most_records: int,
        ordered: Sequence[int],
    ) -> "_Known":
        """Read the first round's tables.

        Args:
          layout: Which column is which.
          shape: As the attribute.
          found: The number of records, then each column alone, then each by band of the number.
          most_records: Cells of the number of records.
          ordered: How many of the first cells have an order, of each of `layout.own`.
        """
        total = total_of(found)
        if total <= 0:
            return _Known(layout, shape, 0.0, np.full(most_records, 1.0 / most_records), {}, 0.0)
        sizes = to_simplex(smooth(found[0].counts, found[0].stddev) / total)
        bands = np.bincount(_bands(most_records), weights=sizes)
        by_size = {}
        half = len(layout.own)
        tables = zip(found[1 : 1 + half], found[1 + half :], ordered, strict=True)
        for single, banded, num_ordered in tables:
            stddev = banded.stddev * len(banded.counts) ** 0.5
            summed = Measured(single.grids, banded.counts.sum(axis=0), stddev)
            column = _pooled(single, summed)
            counts = column.counts.copy()
            if num_ordered > 1:
                counts[:num_ordered] = smooth(counts[:num_ordered], column.stddev)
            independent = total * np.outer(bands, to_simplex(counts / total))
            by_size[single.grids[0].column] = _denoised(banded, independent)
        return _Known(layout, shape, total, sizes, by_size, found[0].stddev)

    @property
    def several(self) -> float:
        """Share of users with several records."""
        return float(self.sizes[1:].sum())

    def users(self, bands: slice) -> float:
        """Users of one record, or of several."""
        return self.total * (self.several if bands is _SEVERAL else float(self.sizes[0]))

    def independent(self, grids: Sequence[Grid], bands: slice) -> NDArray[np.float64]:
        """Counts of a table of two columns if they knew nothing of each other."""
        left, right = (grid.merge(self.shares(grid.column, bands)) for grid in grids)
        return self.users(bands) * np.outer(left, right)

    def shares(self, column: int, bands: slice = slice(None)) -> NDArray[np.float64]:
        """Probabilities of a column's cells among users in some bands; the twin's are the same."""
        if column == self.layout.size:
            counts = np.bincount(_bands(len(self.sizes)), weights=self.sizes)[1:]
            return counts / counts.sum() if counts.sum() > 0 else np.full(len(counts), 1.0)
        table = self.by_size.get(min(column, self.layout.twin(column)))
        if table is None:
            return np.full(self.shape[column], 1.0 / self.shape[column])
        counts = table.counts[bands].sum(axis=0)
        return to_simplex(counts / counts.sum()) if counts.sum() > 0 else to_simplex(0 * counts)


_ONE, _SEVERAL = slice(0, 1), slice(1, None)  # bands of the number of records


def _bands(most_records: int) -> NDArray[np.int64]:
    """Band of each number of records from one on: one, two, three or four, more."""
    return np.searchsorted([2, 3, 5], np.arange(1, most_records + 1), side="right")


def _layout_of(schema: Schema, parent: Sequence[str], most_records: int) -> Layout:
    """Which columns of a schema are the user's, and which a record's."""
    child = tuple(i for i, name in enumerate(schema.names) if name not in parent)
    if not child:
        raise ConfigError("parent names every column; at least one must belong to a record")
    return Layout(tuple(schema.index(name) for name in parent), child, most_records)


def _check_names(*names: str) -> None:
    """Refuse names of tables and of the key that could not be a file's or a column's."""
    if len(set(names)) < len(names) or not all(_NAME.fullmatch(name) for name in names):
        raise ConfigError(
            "parent_table, child_table and key must be three different names of letters, digits"
            f" and underscores, not {', '.join(map(repr, names))}"
        )


def _table_of(link: Clique, known: _Known, grids: Sequence[Grid]) -> tuple[Grid, ...]:
    """The table that is asked for a pair: of one record, by whether the user has several."""
    pair = tuple(grids[column] for column in link)
    if link[1] in known.layout.second:
        return pair
    apart = Grid(known.layout.size, np.minimum(np.arange(len(known.sizes)), 1))
    return (apart, *pair)


def _link_of(grids: Sequence[Grid], layout: Layout) -> Clique:
    """The pair of columns that a table is of."""
    return tuple(grid.column for grid in grids if grid.column != layout.size)


def _slices(table: Measured) -> tuple[Measured | None, Measured]:
    """A pair's table for users of one record, if it tells of them, and of several."""
    if len(table.grids) == 2:
        return None, table
    one, several = (Measured(table.grids[1:], t, table.stddev) for t in table.counts)
    return one, several


def _links(known: _Known, coarse: Sequence[Measured], bands: slice) -> list[Clique]:
    """Pairs that stand out from the noise among some users, those first that say the most."""
    layout = known.layout
    users = known.users(bands)
    tables: dict[Clique, Measured] = {}
    for table in coarse:
        one, several = _slices(table)
        part = several if bands is _SEVERAL else one
        if part is not None:
            tables[_link_of(table.grids, layout)] = part
    if bands is _SEVERAL:
        for column, table in known.by_size.items():
            ends = (Grid.whole(layout.size, known.shape[layout.size]), table.grids[1])
            sized = Measured(ends, table.counts[1:], table.stddev)
            tables[_link(layout.size, column)] = sized
    if not tables or users <= 0:
        return []
    alike: dict[tuple[int, ...], list[Clique]] = {}  # one size at a time: some are very long
    for link, table in tables.items():
        alike.setdefault(table.counts.shape, []).append(link)
    gains: dict[Clique, float] = {}
    for shape, group in alike.items():
        residuals = np.empty((len(group), *shape))
        for link, residual in zip(group, residuals, strict=True):
            table = tables[link]
            left, right = (grid.merge(known.shares(grid.column, bands)) for grid in table.grids)
            residual[:] = table.counts - users * np.outer(left, right)
        stddevs = _SURE * np.array([tables[link].stddev for link in group])
        standing = np.abs(shrink(residuals, stddevs, np.array([shape] * len(group))))
        gains |= dict(zip(group, standing.sum(axis=(1, 2)).tolist(), strict=True))
    return sorted((link for link in gains if gains[link] > 0), key=lambda e: (-gains[e], e))


def _link(one: int, other: int) -> Clique:
    """A pair of columns, in order."""
    return (min(one, other), max(one, other))


def _fitting(links: Sequence[Clique], known: _Known, most_cells: int) -> list[Clique]:
    """As many of the links, in order, as a model of so many cells holds.

    Small models come first, and grow: a link that needs little is never lost to a stronger one
    that needs much.
    """
    kept: list[Clique] = []
    for share in _GROWTH:
        for link in links:
            if link in kept:
                continue
            edges = _edges([*kept, link], known.layout)
            steps = _steps(edges, known.layout, known.shape)
            cliques = [*edges, *(tuple(sorted((b, *near))) for b, near in steps)]
            if tree_cells(cliques, known.shape) <= share * most_cells:
                kept.append(link)
    return kept


def _fitting_alone(links: Sequence[Clique], known: _Known, most_cells: int) -> list[Clique]:
    """The same for users of one record, whose model has the user's and a record's columns."""
    kept: list[Clique] = []
    for share in _GROWTH:
        for link in links:
            if link not in kept and tree_cells([*kept, link], known.shape) <= share * most_cells:
                kept.append(link)
    return kept


def _edges(links: Iterable[Clique], layout: Layout) -> list[Clique]:
    """Links of the model of users of several records: what holds of one record holds of both."""
    edges = set()
    for a, b in links:
        edges |= {(a, b), _link(layout.twin(a), layout.twin(b))}
    return sorted(edges)


Step = tuple[int, tuple[int, ...]]


def _steps(edges: Iterable[Clique], layout: Layout, shape: Sequence[int]) -> list[Step]:
    """In which order the second record's columns are drawn, and given which others each.

    The columns are eliminated one by one, those with the smallest neighborhoods first. A column
    depends on all that are left by its neighbors at its turn, so in reverse order they can be
    drawn one after the other, exactly by the model.
    """
    near: dict[int, set[int]] = {column: set() for column in layout.second}
    for a, b in edges:
        for one, other in ((a, b), (b, a)):
            if one in near:
                near[one].add(other)
    steps: list[Step] = []
    left = set(layout.second)
    while left:
        column = min(left, key=lambda c: (table_cells(near[c], shape), c))
        left.remove(column)
        others = near[column]
        steps.append((column, tuple(sorted(others))))
        for other in others & left:
            near[other] |= others - {other}
            near[other].discard(column)
    return steps[::-1]


def _learned(
    schema: Schema,
    family: Family,
    known: _Known,
    alone_links: Sequence[Clique],
    links: Sequence[Clique],
    measured: Sequence[Measured],
) -> "Household":
    """Both models, each fit to the tables of all its columns and of its links."""
    layout, size = known.layout, known.layout.size
    one: list[Measured] = []
    several: list[Measured] = []
    for column, table in known.by_size.items():
        grid, counts = table.grids[1], table.counts
        one.append(Measured((grid,), counts[0], table.stddev))
        if _link(size, column) in links:
            bands = Grid.whole(size, known.shape[size])
            several.append(Measured((bands, grid), counts[1:], table.stddev))
        else:
            stddev = table.stddev * (len(counts) - 1) ** 0.5
            several.append(Measured((grid,), counts[1:].sum(axis=0), stddev))
    for table in measured:
        alone, both = _slices(table)
        if alone is not None and _link_of(table.grids, layout) in alone_links:
            one.append(_denoised(alone, known.independent(alone.grids, _ONE)))
        if _link_of(table.grids, layout) in links:
            several.append(_denoised(both, known.independent(both.grids, _SEVERAL)))
    one = [_renumbered(table, lambda c: c - (c > size)) for table in one]
    several += [_renumbered(table, layout.twin) for table in several]
    if known.by_size:
        counts = known.shares(size) * known.several * known.total
        several.append(Measured((Grid.whole(size, len(counts)),), counts, known.stddev))
    edges = _edges(links, layout)
    steps = _steps(edges, layout, known.shape)
    users = known.total * float(known.sizes[0]), known.total * known.several
    single = fit([known.shape[c] for c in layout.own], one if users[0] > 0 else [], total=users[0])
    pair = fit(
        known.shape,
        several if users[1] > 0 else [],
        cliques=[*edges, *(tuple(sorted((b, *near))) for b, near in steps)],
        total=users[1],
    )
    flat = [
        Graph.whole(*each)
        for each in zip(_flat_schemas(schema, layout), (single, pair), strict=True)
    ]
    return Household(schema, family, known.sizes, flat[0], flat[1], tuple(steps))


def _renumbered(table: Measured, place: Callable[[int], int]) -> Measured:
    """The same table of other columns."""
    grids = tuple(Grid(place(grid.column), grid.groups) for grid in table.grids)
    return Measured(grids, table.counts, table.stddev)


def _flat_schemas(schema: Schema, layout: Layout) -> tuple[Schema, Schema]:
    """Schemas of users of one record, and of users of several with two of them."""

    def named(columns: Iterable[int], prefix: str) -> list[Column]:
        """Columns of the schema, for what a model holds of them: their number of cells."""
        return [
            Column(
                f"{prefix} {schema.names[c]}",
                "category",
                "public: cells of the schema",
                tuple(map(str, range(schema.shape[c]))),
            )
            for c in columns
        ]

    user, first, second = (
        named(layout.parent, "user"),
        named(layout.child, "first"),
        named(layout.child, "second"),
    )
    bands = tuple(str(band) for band in range(int(_bands(layout.most_records)[-1])))
    size = Column("size", "category", "public: bands of the number of records", bands)
    return Schema((*user, *first)), Schema((*user, size, *first, *second))


@dataclass(frozen=True)
class Household(Synthesizer):
    """Users with their records.

    Attributes:
      schema: Schema of the records, the user's columns among theirs.
      family: Names of the two tables, their key and the user's columns.
      sizes: Share of users by number of records, from one on.
      single: Users of one record: the user's columns, the record's.
      several: Users of more: the user's columns, the band of their number, two records.
      steps: In which order a further record's columns are drawn, and given which others.
    """

    schema: Schema
    family: Family = field()  # has no default, though `Synthesizer` has one
    sizes: NDArray[np.float64]
    single: Graph
    several: Graph
    steps: tuple[Step, ...]
    kind: ClassVar[str] = "household"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Users with all their records, so many records in all; the last user may lose some."""
        layout = self._layout
        mean = float(self.sizes @ np.arange(1, len(self.sizes) + 1))
        num_users = int(1.05 * num_records / mean) + 16
        counts, single, wide = self._users(num_users, rng)
        while counts.sum() < num_records:
            num_users *= 2
            counts, single, wide = self._users(num_users, rng)
        place = rng.permutation(len(counts))  # where each user stands
        shuffled = np.empty_like(counts)
        shuffled[place] = counts
        last = int(np.searchsorted(np.cumsum(shuffled), num_records)) if num_records else -1
        shuffled = shuffled[: last + 1]
        starts = (np.cumsum(shuffled) - shuffled).astype(np.int64)
        codes = np.empty((int(shuffled.sum()), len(self.schema.columns)), dtype=np.int32)

        kept = place[: len(single)] <= last
        rows = starts[place[: len(single)][kept]]
        codes[rows[:, None], np.array([*layout.parent, *layout.child])] = single[kept]
        kept = place[len(single) :] <= last
        rows, counts = starts[place[len(single) :][kept]], counts[len(single) :][kept]
        self._fill(codes, rows, counts, wide[kept], rng)
        owners = np.repeat(np.arange(len(shuffled)), shuffled)
        return Records(codes[:num_records], None, owners[:num_records])

    def settings(self) -> dict[str, Any]:
        """Names of the tables and of the user's columns, how records are drawn, both models."""
        return {
            "parent": list(self.family.columns),
            "tables": [self.family.parent, self.family.child, self.family.key],
            "steps": [[column, list(near)] for column, near in self.steps],
            "single": self.single.settings(),
            "several": self.several.settings(),
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Shares of users by number of records, and both models' arrays."""
        arrays = {"sizes": self.sizes}
        for name, graph in (("single", self.single), ("several", self.several)):
            arrays |= {f"{name}_{key}": array for key, array in graph.tensors().items()}
        return arrays

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: What was saved is not a `Household` of this schema.
        """
        if set(settings) != {"parent", "tables", "steps", "single", "several"}:
            raise ConfigError("a saved household holds parent, tables, steps, single and several")
        parent, names = tuple(settings["parent"]), settings["tables"]
        sizes = tensors.get("sizes", np.zeros(0)).astype(np.float64)
        if (
            sizes.ndim != 1
            or not 2 <= len(sizes) <= _MOST_RECORDS
            or not (sizes >= 0).all()
            or abs(sizes.sum() - 1) > 1e-6
            or not set(parent) <= set(schema.names)
            or len(names) != 3
        ):
            raise ConfigError("a saved household that does not fit the schema")
        _check_names(*names)
        layout = _layout_of(schema, parent, len(sizes))
        graphs = [
            Graph.restore(
                flat,
                settings[name],
                {
                    key.removeprefix(f"{name}_"): array
                    for key, array in tensors.items()
                    if key.startswith(f"{name}_")
                },
            )
            for name, flat in zip(("single", "several"), _flat_schemas(schema, layout), strict=True)
        ]
        family = Family(parent, *names)
        steps = _checked_steps(settings["steps"], layout)
        return cls(schema, family, sizes, graphs[0], graphs[1], steps)

    @cached_property
    def _layout(self) -> Layout:
        """Which column is which."""
        return _layout_of(self.schema, self.family.columns, len(self.sizes))

    def _users(
        self, num_users: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """So many users: how many records each, those of one record before the others.

        Returns:
          Number of records, `(num_users,)`; the users of one record; the others with two records.
        """
        alone = float(self.sizes[0])
        kinds = rounded_cells(np.array([alone, 1 - alone]), num_users, rng)
        single = self.single.sample(int((kinds == 0).sum()), rng).codes
        wide = self.several.sample(int((kinds == 1).sum()), rng).codes
        bands = _bands(len(self.sizes))
        chances = np.where(bands[1:] == np.arange(1, bands[-1] + 1)[:, None], self.sizes[1:], 0.0)
        unseen = chances.sum(axis=1) <= 0
        chances[unseen] = bands[1:] == np.flatnonzero(unseen)[:, None] + 1
        more = spread(wide[:, self._layout.size].astype(np.int64), chances, rng) + 2
        return np.concatenate([np.ones(len(single), dtype=np.int64), more]), single, wide

    def _fill(
        self,
        codes: NDArray[np.int32],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        wide: NDArray[np.int32],
        rng: np.random.Generator,
    ) -> None:
        """Write the records of users who have several, further ones drawn one after the other."""
        layout, wide = self._layout, wide.copy()
        parent, child = np.array(layout.parent, dtype=np.int64), np.array(layout.child)
        first, second = np.array(layout.first), np.array(layout.second)
        for record in range(int(counts.max(initial=0))):
            more = counts > record
            starts, counts, wide = starts[more], counts[more], wide[more]
            if record > 1:  # given the first, which keeps records closest to each other
                self._redraw(wide, rng)
            rows = (starts + record)[:, None]
            codes[rows, parent] = wide[:, : layout.size]
            codes[rows, child] = wide[:, second if record else first]

    def _redraw(self, wide: NDArray[np.int32], rng: np.random.Generator) -> None:
        """Draw the second record's columns anew, given all others."""
        model, shape = self.several.model, self.several.model.shape
        for column, near in self.steps:
            groups = np.zeros(len(wide), dtype=np.int64)
            for other in near:
                groups *= shape[other]
                groups += wide[:, other]
            table = model.marginal((*near, column)).reshape(-1, shape[column])
            empty = table.sum(axis=1) <= 0
            table[empty] = model.marginal((column,))
            wide[:, column] = spread(groups, table, rng)


def _checked_steps(steps: Any, layout: Layout) -> tuple[Step, ...]:
    """Saved steps, each of the second record's columns once, given columns that are known then."""
    known, checked = {*range(layout.second[0])}, []
    for column, near in steps:
        if column not in layout.second or column in known or not set(near) <= known:
            raise ConfigError("a saved household whose records cannot be drawn in its order")
        known.add(column)
        checked.append((int(column), tuple(int(c) for c in near)))
    if len(checked) != len(layout.second):
        raise ConfigError("a saved household that leaves out a column of its records")
    return tuple(checked)

# SPDX-License-Identifier: Apache-2.0
"""PrivMRF by sums: a dense graph of columns under a size limit, its cliques measured again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Rounds
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.cliques import Clique, junction_tree, table_cells, tree_cells
from .parts.coarsen import clear_cells, coarsen
from .parts.denoise import shrink
from .parts.descent import fit
from .parts.graph import Graph
from .parts.graph_model import GraphModel
from .parts.histograms import Grid, Histograms, Measured, cells_of, margins_of, total_of
from .parts.measuring import MarginalStrategy
from .parts.possible import Possible, possible_groups, that_fit
from .parts.propagation import merged
from .parts.rare import compress
from .parts.settings import check_cells, check_model, check_range, check_shares
from .parts.tree_model import columns_of

Pair = tuple[int, int]

_CLEAR = 4.0  # noise deviations that the mean cell of a coarse table stands above zero
_FEWEST_CELLS = 4  # of a column in a table, however much noise there is
_SURE = 1.3  # how far above the noise a table must stand to differ from the model
_DENOISED = 0.6  # share of a table's noise that is left once all tables are fitted together
_THRIFT = 0.25  # power of a table's cells that its score is divided by: small tables link more
_FIT_STEPS = 30  # of a fit that the next round begins from; the last one goes to the end
_LAST_STEPS = 300
_CELL_BYTES = 8
_LEAST = 1e-9  # weight of a group that was measured as empty


@dataclass(frozen=True)
class PrivMrf(MarginalStrategy):
    """A Markov random field with as many dependences as fit its size and stand out of the noise.

    1. ``columns``: the histogram of every column. Cells that do not stand clear of the noise are
       merged into groups, from which all tables are made.
    2. ``pairs``: the table of every pair of columns, coarse. A pair's R-score is how far its table
       is from the model of independent columns, in L1, without what noise explains.
    3. ``cliques``: the attribute graph grows by the pair of the highest score for its size, while
       the junction tree fits `max_model_mb` and a pair explains more than its noise adds. Chosen
       pairs inside one clique of the tree are measured as one larger table where that is
       theta-useful and has no more cells than they have together. Noise is shared out so that
       summed errors are least: of the budget, a table of m cells gets a share of m^(2/3).
    4. ``refine``: scores are taken anew, against the model fitted so far; the worst pairs, new
       ones among them, are measured (again), and the model is fitted to everything.

    A table is theta-useful if its mean cell stands `theta` deviations above zero. PrivMRF measures
    none that is not; here a pair's columns are merged to fewer groups until it is.

    This is PrivMRF's linear form. The published one measures each R-score, and each error of a
    clique, as a number of its own, which no sum over users gives, and takes the number of records
    as public. Here all that touches records is a clipped, noised sum; scores are post-processing
    of the sums of step 2, and of all that followed.

    Attributes:
      column_share: Share of the budget (of mu^2) for the first round.
      graph_share: Share for the second.
      refine_share: Share of all refinements together; the third round has the rest.
      num_refinements: Rounds of refinement.
      select_cells: Most groups of a column in the second round.
      max_groups: Most groups of a column in the model.
      clique_size: Most columns of a table.
      theta: Deviations that the mean cell of a table stands above zero; the paper's is 6, for
        tables that are used as they are, without a fit to many.
      max_model_mb: Size of the model's tables on its junction tree, in megabytes of eight-byte
        cells. A pair that would pass it is not linked.

    Privacy:
      In each query a record lights one cell in each table, at a height that the query sets. A
      user's records are summed and clipped at `max_norm` times the norm of one record.

    Reference:
      Cai, Lei, Wei, Xiao (2021), "Data Synthesis via Differentially Private Markov Random
      Fields", sections 4 and 5, https://doi.org/10.14778/3476249.3476272.
    """

    column_share: float = 0.15
    graph_share: float = 0.1
    refine_share: float = 0.2
    num_refinements: int = 1
    select_cells: int = 12
    max_groups: int = 64
    clique_size: int = 3
    theta: float = 1.0
    max_model_mb: float = 4.0
    name: ClassVar[str] = "privmrf"

    def check(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_shares(
            "cliques",
            column_share=self.column_share,
            graph_share=self.graph_share,
            refine_share=self.refine_share,
        )
        check_range(0, 100, num_refinements=self.num_refinements)
        check_cells(
            select_cells=self.select_cells,
            max_groups=self.max_groups,
            clique_size=self.clique_size,
        )
        if not 0 < self.theta < math.inf:
            raise ConfigError(f"theta must be a number above 0, not {self.theta!r}")
        check_model(self.max_model_mb)

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure columns and coarse pairs; then choose, measure and fit, and once more."""
        noise = self.noise(schema, noise_multiplier)
        whole = Grid.each(schema.shape)
        alone = Histograms.balanced([(grid,) for grid in whole])
        noisy = yield alone.query("columns", noise_multiplier=noise[0], max_norm=max_norm)
        known = self._known(schema, alone.measured(noisy))
        if len(schema.columns) == 1:
            return known.synthesizer(known.fitted(None, max_steps=_LAST_STEPS))

        spread = noise[1] * max_norm * math.sqrt(math.comb(len(whole), 2))
        cells = clear_cells(
            known.total, _CLEAR * spread, fewest=_FEWEST_CELLS, most=self.select_cells
        )
        grids = [Grid(i, coarsen(weights, cells)) for i, weights in enumerate(known.weights)]
        pairs = _Tables.of(list(combinations(grids, 2)), known.base)
        noisy = yield pairs.asked.query("pairs", noise_multiplier=noise[1], max_norm=max_norm)
        known = known.having(pairs, noisy)
        model = known.fitted(None, max_steps=_FIT_STEPS)
        for number, noise_of_round in enumerate(noise[2:]):
            stddev = noise_of_round * max_norm
            chosen = self._chosen(known, known.scores(model), stddev)
            if not chosen:  # nothing stands out: measure once more what there is
                chosen = list(known.cliques) or [(grid.column,) for grid in whole]
            useful = self._useful(known.total, stddev * math.sqrt(len(chosen)))
            tables = _Tables.of([known.cut(clique, useful) for clique in chosen], known.base)
            name = "refine" if number else "cliques"
            noisy = yield tables.asked.query(
                name, noise_multiplier=noise_of_round, max_norm=max_norm
            )
            known = known.linking(chosen).having(tables, noisy)
            is_last = number == self.num_refinements
            model = known.fitted(model, max_steps=_LAST_STEPS if is_last else _FIT_STEPS)
        return known.synthesizer(model)

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each table asked for."""
        return cells_of(query, shard)

    def noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each round."""
        from ..core.accounting import split

        if len(schema.columns) == 1:
            return (noise_multiplier,)
        times = self.num_refinements
        refine = [self.refine_share / times] * times if times else []
        first = 1 - self.column_share - self.graph_share - sum(refine)
        return split(noise_multiplier, (self.column_share, self.graph_share, first, *refine))

    def _known(self, schema: Schema, columns: Sequence[Measured]) -> "_Known":
        """What the first round found, and the groups that it calls for."""
        total = total_of(columns)
        stddev = max((table.stddev for table in columns), default=math.inf)
        base = []
        for i, counts in enumerate(_counts(schema, columns, total)):
            groups = np.arange(len(counts))
            if math.isfinite(stddev):
                groups = compress(counts, stddev, ordered=schema.columns[i].is_ordered)
            if groups.max() >= self.max_groups:
                groups = coarsen(counts, self.max_groups)
            base.append(Grid(i, groups))
        return _Known(schema, tuple(base), tuple(columns)).within(self._max_cells)

    @property
    def _max_cells(self) -> float:
        """Most cells of a model."""
        return self.max_model_mb * 1e6 / _CELL_BYTES

    def _useful(self, total: float, stddev: float) -> float:
        """Most cells of a table whose mean cell stands `theta` deviations above zero."""
        return max(total / (self.theta * stddev), _FEWEST_CELLS**2)

    def _chosen(self, known: "_Known", scores: Mapping[Pair, float], stddev: float) -> list[Clique]:
        """Sets of columns to measure: together they hold the pairs that are worth their noise.

        Args:
          known: What was measured.
          scores: R-score of each pair, in records.
          stddev: Of the noise of a count if one table had the whole round.
        """
        sizes = known.sizes
        useful = self._useful(known.total, stddev * math.sqrt(len(sizes)))
        cells = {pair: min(table_cells(pair, sizes), useful) for pair in scores}
        unit = _DENOISED * math.sqrt(2 / math.pi) * stddev
        edges, taken, spent = known.scopes, [], 0.0
        for pair in sorted(scores, key=lambda p: (-scores[p] / cells[p] ** _THRIFT, p)):
            cost = cells[pair] ** (2 / 3)
            worth = scores[pair] > unit * ((spent + cost) ** 1.5 - spent**1.5)
            if worth and tree_cells([*edges, pair], sizes) <= self._max_cells:
                edges.append(pair)
                taken.append(pair)
                spent += cost
        useful = self._useful(known.total, stddev * math.sqrt(max(len(taken), 1)))
        return self._joined(taken, scores, cells, sizes, edges, useful)

    def _joined(
        self,
        taken: Sequence[Pair],
        scores: Mapping[Pair, float],
        cells: Mapping[Pair, float],
        sizes: Sequence[int],
        edges: Sequence[Clique],
        useful: float,
    ) -> list[Clique]:
        """The pairs, those joined that one clique holds and one table tells at no more cells."""
        tree = junction_tree(edges, sizes)
        free, found = set(taken), set()
        for pair in taken:
            clique: Clique = pair
            while pair in free and len(clique) < self.clique_size:
                grown = []
                for column in set(range(len(sizes))) - set(clique):
                    bigger = tuple(sorted((*clique, column)))
                    inside = [p for p in combinations(bigger, 2) if p in free]
                    new = [p for p in inside if column in p]
                    most = min(useful, sum(cells[p] for p in inside))
                    if (
                        new
                        and table_cells(bigger, sizes) <= most
                        and tree.holding(bigger, sizes) >= 0
                    ):
                        grown.append((sum(scores[p] for p in new), bigger))
                if not grown:
                    break
                clique = max(grown)[1]
            if pair in free:
                found.add(clique)
                free -= set(combinations(clique, 2))
        return sorted(found)


@dataclass(frozen=True, eq=False)
class _Tables:
    """Tables that are measured together, over groups of groups.

    Attributes:
      members: Grids over the groups of the model, for each table.
      asked: The same over the columns' cells.
    """

    members: Sequence[tuple[Grid, ...]]
    asked: Histograms

    @staticmethod
    def of(members: Sequence[tuple[Grid, ...]], base: Sequence[Grid]) -> "_Tables":
        """Tables given by their grids over the model's groups."""
        lifted = {
            id(g): Grid(g.column, g.groups[base[g.column].groups]) for m in members for g in m
        }
        asked = Histograms.balanced([tuple(lifted[id(g)] for g in m) for m in members])
        return _Tables(members, asked)


@dataclass(frozen=True, eq=False)
class _Known:
    """What was measured, and the groups of cells that a model is made of.

    Attributes:
      schema: Public schema.
      base: Groups of each column's cells.
      margins: What was measured of single columns, over their cells.
      tables: What was measured of several columns, over groups.
      cliques: Sets of columns that the model holds, as they were chosen.
      zeros: What is possible over some columns' groups, by the schema's constraints.
    """

    schema: Schema
    base: tuple[Grid, ...]
    margins: tuple[Measured, ...]
    tables: tuple[Measured, ...] = ()
    cliques: tuple[Clique, ...] = ()
    zeros: tuple[Possible, ...] = ()

    def within(self, max_cells: float) -> "_Known":
        """The same with those constraints that a model of so many cells can hold."""
        possible = possible_groups(self.schema, self.base)
        return replace(self, zeros=tuple(that_fit(possible, self.sizes, max_cells)))

    def linking(self, cliques: Sequence[Clique]) -> "_Known":
        """The same with a model that holds some cliques too."""
        more = {clique for clique in cliques if len(clique) > 1}
        return replace(self, cliques=tuple(sorted({*self.cliques, *more})))

    def having(self, tables: _Tables, noisy: NoisySum) -> "_Known":
        """The same with the tables of one more round; nothing more if it was void."""
        found = tables.asked.measured(noisy)
        more = [
            Measured(grids, table.counts, table.stddev)
            for grids, table in zip(tables.members, found, strict=False)
            if len(grids) > 1
        ]
        margins = (*self.margins, *margins_of(found))
        return replace(self, margins=margins, tables=(*self.tables, *more))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Groups of each column."""
        return tuple(grid.size for grid in self.base)

    @cached_property
    def total(self) -> float:
        """Estimated number of records; 0.0 if it is lost in noise."""
        return total_of(self.margins)

    @cached_property
    def counts(self) -> list[NDArray[np.float64]]:
        """Estimated counts of each column's cells."""
        return _counts(self.schema, self.margins, self.total)

    @cached_property
    def weights(self) -> list[NDArray[np.float64]]:
        """Estimated counts of each column's groups; all above zero."""
        merged_counts = (g.merge(c) for g, c in zip(self.base, self.counts, strict=True))
        return [np.maximum(counts, _LEAST) for counts in merged_counts]

    @property
    def scopes(self) -> list[Clique]:
        """All sets of columns that the model must hold."""
        return [*self.cliques, *(clique for clique, _ in self.zeros)]

    def cut(self, clique: Clique, most: float) -> tuple[Grid, ...]:
        """Grids for a table of at most so many cells, each column's groups merged evenly."""
        sizes = [self.sizes[column] for column in clique]
        while math.prod(sizes) > most and max(sizes) > _FEWEST_CELLS:
            sizes[sizes.index(max(sizes))] -= 1
        return tuple(
            Grid(column, coarsen(self.weights[column], size))
            for column, size in zip(clique, sizes, strict=True)
        )

    def fitted(self, start: GraphModel | None, *, max_steps: int) -> GraphModel:
        """A model of all that was measured of its cliques and columns."""
        tree = junction_tree(self.scopes, self.sizes)
        held = [t for t in self.tables if tree.holding(_scope(t), self.sizes) >= 0]
        return fit(
            self.sizes,
            [*self._columns(), *held],
            total=self.total,
            start=start,
            zeros=self.zeros if start is None else (),
            max_steps=max_steps,
        )

    def _columns(self) -> list[Measured]:
        """Columns' groups as estimated from everything, with the least noise of one measurement."""
        found = []
        for i, grid in enumerate(self.base):
            fine = [
                table.stddev
                for table in self.margins
                if table.grids[0].column == i and table.grids[0].size >= grid.size
            ]
            if fine:
                whole = Grid.whole(i, grid.size)
                found.append(Measured((whole,), grid.merge(self.counts[i]), min(fine)))
        return found

    def scores(self, model: GraphModel) -> dict[Pair, float]:
        """How far each pair measured is from a model, in records, without what noise explains."""
        tables = [table for table in self.tables if len(table.grids) == 2]
        if not tables or self.total <= 0:
            return {}
        sizes = np.array([[grid.size for grid in table.grids] for table in tables])
        width = int(sizes.max())
        residuals = np.zeros((len(tables), width, width))
        expected = model.marginals([_scope(table) for table in tables])
        for residual, table, probs in zip(residuals, tables, expected, strict=True):
            counts = self.total * merged(probs, [grid.groups for grid in table.grids])
            residual[: len(counts), : counts.shape[1]] = table.counts - counts
        stddevs = _SURE * np.array([table.stddev for table in tables])
        found: dict[Pair, float] = {}
        for table, residual in zip(tables, shrink(residuals, stddevs, sizes), strict=True):
            first, second = _scope(table)
            found[first, second] = max(
                found.get((first, second), 0.0), float(np.abs(residual).sum())
            )
        return {pair: score for pair, score in found.items() if score > 0}

    def synthesizer(self, model: GraphModel) -> Graph:
        """The model with the shares of cells inside their groups."""
        shares = tuple(np.maximum(c, _LEAST) / np.maximum(c, _LEAST).sum() for c in self.counts)
        return Graph(self.schema, model, self.base, shares)


def _counts(schema: Schema, margins: Sequence[Measured], total: float) -> list[NDArray[np.float64]]:
    """Counts of each column's cells from all that was measured of it."""
    bins = schema.ordered_cells
    return columns_of(schema.shape, margins, total, bins)


def _scope(table: Measured) -> Clique:
    """Columns of a table; they rise, as cliques do."""
    return tuple(grid.column for grid in table.grids)

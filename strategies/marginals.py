# SPDX-License-Identifier: Apache-2.0
"""The default for tables, in three sums: columns, coarse pairs, then the pairs worth measuring."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.query import Contribution, Query, Rounds
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.cliques import Clique
from .parts.coarsen import clear_cells, coarsen
from .parts.descent import fit
from .parts.graph import MAX_REFINEMENTS, Graph
from .parts.graph_model import GraphModel
from .parts.gum import Target
from .parts.histograms import Grid, Histograms, Measured, cells_of, total_of
from .parts.measuring import MarginalStrategy
from .parts.pairs import denoised_pairs, mended, pooled, within
from .parts.possible import Possible, possible_groups, that_fit
from .parts.propagation import merged
from .parts.rare import compress
from .parts.settings import check_cells, check_model, check_range, check_shares
from .parts.tree_model import columns_of, link_of
from .parts.worthwhile import worthwhile

_CLEAR_PAIR = 2.5  # noise deviations of the mean cell of a pair in the second round
_CLEAR_TABLE = 2.0  # and in the third
_FEWEST, _FEWEST_FINE = 3, 4  # cells of a column in either, however much noise there is
_SURE = 1.1  # how far above the noise a pair must stand to count as linked
_LEFT = 0.12  # error of a cell, in noise deviations, that denoising and the fit leave
_PAIR_WEIGHT = 2.0  # a pair's table also speaks of pairs that are linked through it
_TRUST = 0.5  # noise of a column's final estimate beside that of its best histogram


@dataclass(frozen=True)
class Marginals(MarginalStrategy):
    """A graphical model of the pairs that are worth their noise, by three noisy sums.

    1. ``columns``: the histogram of every column. Cells too rare to say anything together with
       other columns are merged in all that follows.
    2. ``pairs``: the table of every pair of columns, merged to a few cells each, as many as the
       noise allows; where even a pair of which one column determines the other would drown in it,
       the columns again. The tables are denoised. Then pairs are chosen one after another, each the
       one that a model of those chosen so far explains worst, while that gap outweighs the noise
       that measuring it adds to all others: post-processing. Under heavy noise none is.
    3. ``tables``: the chosen pairs at a finer grain, and once more every column.

    A graphical model is fit to the chosen tables, denoised. Pairs it has no room for, or that were
    not worth a second look, are fit by moving sampled records (`refine.refined`). Nothing but
    clipped, noised sums touches records, so the method needs no trusted selector and is priced as
    one Gaussian. Its error does not depend on how users are spread over clients.

    Attributes:
      column_share: Share of the budget (of mu^2) for the first round.
      pair_share: Share for the second; the third has the rest.
      pair_cells: Most cells of a column in the second round.
      table_cells: Most cells of a column in the third; rarer cells are merged, and told apart
        again by the column's own histogram.
      max_model_mb: Most memory of the model's tables, in MiB; more lets it hold more pairs.
      refinements: Passes by which sampled records are moved to fit pairs that the model has no
        room for, where these differ from it by more than noise; 0: none.

    Privacy:
      In each query a record lights one cell in each histogram, at a height that the query sets.
      A user's vector is clipped as `MarginalStrategy` says.

    Reference:
      The frame is that of McKenna, Miklau, Sheldon (2021), https://arxiv.org/abs/2108.04978; the
      selection by sums, the denoising and the stopping rule are this package's own.
    """

    column_share: float = 0.1
    pair_share: float = 0.1
    pair_cells: int = 12
    table_cells: int = 32
    max_model_mb: float = 4.0
    refinements: int = 8
    name: ClassVar[str] = "marginals"

    def check(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_shares("tables", column_share=self.column_share, pair_share=self.pair_share)
        check_cells(pair_cells=self.pair_cells, table_cells=self.table_cells)
        check_range(0, MAX_REFINEMENTS, refinements=self.refinements)
        check_model(self.max_model_mb)

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure columns, coarse pairs, and what is worth it; fit the model."""
        noise = self.noise(schema, noise_multiplier)
        shape = schema.shape
        bins = schema.ordered_cells

        whole = Grid.each(shape)
        alone = Histograms.balanced([(grid,) for grid in whole])
        noisy = yield alone.query("columns", noise_multiplier=noise[0], max_norm=max_norm)
        columns = alone.measured(noisy)
        counts = columns_of(shape, columns, total_of(columns), bins)
        if len(shape) == 1:
            return self._fitted(schema, whole, counts, [], [], [])

        total = total_of(columns)
        fine = self._fine_grids(counts, total, noise[2] * max_norm, bins)
        coarse = self._coarse_grids(fine, counts, total, noise[1] * max_norm)
        pairs = Histograms.balanced(list(combinations(coarse, 2)))
        seen: list[Measured] = []
        if _can_be_seen(pairs, total, noise[1] * max_norm):
            noisy = yield pairs.query("pairs", noise_multiplier=noise[1], max_norm=max_norm)
            seen = pairs.measured(noisy)
        else:
            noisy = yield alone.query("columns", noise_multiplier=noise[1], max_norm=max_norm)
            columns = [*columns, *alone.measured(noisy)]

        total = total_of([*columns, *seen])
        counts = columns_of(shape, [*columns, *seen], total, bins)
        edges, more = self._edges(schema, counts, seen, total, fine, noise[2] * max_norm)
        asked = [*edges, *more]
        weight = float(len(shape) - 1)  # a column's histogram matters to all its pairs
        third = Histograms.balanced(
            [*((fine[a], fine[b]) for a, b in asked), *((grid,) for grid in whole)],
            [_PAIR_WEIGHT] * len(asked) + [weight] * len(shape),
        )
        noisy = yield third.query("tables", noise_multiplier=noise[2], max_norm=max_norm)
        last = third.measured(noisy)

        total = total_of([*columns, *seen, *last])
        if total <= 0:
            return self._fitted(schema, whole, counts, [], [], [])
        counts = columns_of(shape, [*columns, *seen, *last], total, bins)
        alike = {_ends(table): table for table in seen}
        tables = dict(alike)
        for ends, table in zip(asked, last, strict=False):  # the columns follow the pairs
            tables[ends] = pooled(table, alike[ends])
        finest = [tables.pop(ends) for ends in edges]
        histograms = [*columns, *last[len(asked) :]]
        left = list(tables.values())
        return self._fitted(schema, fine, counts, finest, histograms, left)

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each histogram asked for."""
        return cells_of(query, shard)

    def noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each round."""
        from ..core.accounting import split

        if len(schema.columns) == 1:
            return (noise_multiplier,)
        rest = 1 - self.column_share - self.pair_share
        return split(noise_multiplier, (self.column_share, self.pair_share, rest))

    def _fine_grids(
        self,
        counts: Sequence[NDArray[np.float64]],
        total: float,
        stddev: float,
        bins: dict[int, int],
    ) -> list[Grid]:
        """Cells of each column in the third round: rare ones merged, and no more than are clear.

        Args:
          counts: Of each column's cells.
          total: Number of records.
          stddev: Noise of one histogram if it alone were measured.
          bins: Columns whose first cells have an order.
        """
        spread = stddev * math.sqrt(2 * len(counts))  # if about as many tables as columns follow
        most = clear_cells(total, _CLEAR_TABLE * spread, fewest=_FEWEST_FINE, most=self.table_cells)
        grids = []
        for i, column in enumerate(counts):
            groups = compress(column, spread, clear=1.0, ordered=i in bins)
            merged = np.bincount(groups, weights=column)
            grids.append(Grid(i, coarsen(np.maximum(merged, 1e-9), most)[groups]))
        return grids

    def _coarse_grids(
        self,
        fine: Sequence[Grid],
        counts: Sequence[NDArray[np.float64]],
        total: float,
        stddev: float,
    ) -> list[Grid]:
        """Cells of each column in the second round, each made of whole fine ones."""
        spread = stddev * math.sqrt(math.comb(len(fine), 2))
        most = clear_cells(total, _CLEAR_PAIR * spread, fewest=_FEWEST, most=self.pair_cells)
        return [
            Grid(i, coarsen(np.maximum(grid.merge(column), 1e-9), most)[grid.groups])
            for i, (grid, column) in enumerate(zip(fine, counts, strict=True))
        ]

    def _edges(
        self,
        schema: Schema,
        counts: Sequence[NDArray[np.float64]],
        seen: Sequence[Measured],
        total: float,
        fine: Sequence[Grid],
        stddev: float,
    ) -> tuple[list[Clique], list[Clique]]:
        """Pairs worth measuring, inside the model and beside it; none after a void round."""
        if not seen or total <= 0:
            return [], []
        weight = float(len(counts) - 1)
        inside, beside = worthwhile(
            denoised_pairs(counts, seen, total, sure=_SURE),
            [grid.size for grid in fine],
            noise=_LEFT * stddev / total,
            others=sum((weight * cells) ** (2 / 3) for cells in schema.shape),
            weight=_PAIR_WEIGHT,
            max_cells=self._max_cells,
            held=[clique for clique, _ in self._possible(schema, fine)],
        )
        return inside, beside if self.refinements else []

    @property
    def _max_cells(self) -> float:
        """Most cells of the model."""
        return self.max_model_mb * 2**20 / 8

    def _possible(self, schema: Schema, grids: Sequence[Grid]) -> list[Possible]:
        """Constraints that the model holds, in at most half of its size."""
        shape = [grid.size for grid in grids]
        return that_fit(possible_groups(schema, grids), shape, self._max_cells / 2)

    def _fitted(
        self,
        schema: Schema,
        grids: Sequence[Grid],
        counts: Sequence[NDArray[np.float64]],
        tables: Sequence[Measured],
        histograms: Sequence[Measured],
        left: Sequence[Measured],
    ) -> Graph:
        """The graphical model of denoised tables and columns, and what it misses of others.

        Args:
          schema: Schema of the records.
          grids: Cells of each column that the model tells apart.
          counts: Estimated counts of each column's cells.
          tables: Noisy tables of pairs; their grids merge those of the model or are the same.
          histograms: Noisy histograms of single columns, for how much to trust `counts`.
          left: Noisy tables of pairs that the model is not fit to.
        """
        total = float(counts[0].sum())
        precision = dict.fromkeys(range(len(grids)), 0.0)
        for histogram in histograms:
            precision[histogram.grids[0].column] += histogram.stddev**-2
        measured = [
            Measured(
                (Grid.whole(i, grid.size),),
                grid.merge(column),
                _TRUST / math.sqrt(precision[i]) if precision[i] > 0 else 1.0,
            )
            for i, (grid, column) in enumerate(zip(grids, counts, strict=True))
        ]
        for table in tables:
            link = link_of(table, counts)
            ends = tuple(within(g, grids[g.column]) for g in (link.left, link.right))
            measured.append(Measured(ends, link.table * total, table.stddev))
        zeros = self._possible(schema, grids)
        model = fit([grid.size for grid in grids], measured, total=total, zeros=zeros)
        targets = _missed(model, grids, left, total) if self.refinements else []
        if targets:  # records that are moved to fit these must still fit what the model knows
            own = [tuple(grids[c] for c in _ends(table)) for table in tables]
            joint = model.marginals([_ends(table) for table in tables])
            targets += [Target(g, t / t.sum()) for g, t in zip(own, joint, strict=True)]
            whole = [Grid.whole(i, len(c)) for i, c in enumerate(counts)]
            targets += [Target((g,), c / c.sum()) for g, c in zip(whole, counts, strict=True)]
        columns = tuple(np.maximum(c, 1e-9) for c in counts)
        return Graph(schema, model, tuple(grids), columns, tuple(targets), self.refinements)


def _missed(
    model: GraphModel, grids: Sequence[Grid], left: Sequence[Measured], total: float
) -> list[Target]:
    """Tables of pairs that differ from the model's by more than noise, mended."""
    tables = [
        merged(joint, [within(g, grids[g.column]).groups for g in table.grids])
        for table, joint in zip(left, model.marginals(map(_ends, left)), strict=True)
    ]
    found = mended(tables, left, total, sure=_SURE)
    return [Target(t.grids, m) for t, m in zip(left, found, strict=True) if m is not None]


def _can_be_seen(pairs: Histograms, total: float, noise_multiplier: float) -> bool:
    """Whether a pair of which one column determines the other would stand out from the noise.

    Its table less independence has singular values of a column's mean cell; those of noise reach
    about the sum of the square roots of the table's sides (see `denoise.shrink`).
    """
    length = math.sqrt(float(pairs.heights @ pairs.heights))
    for (one, other), height in zip(pairs.members, pairs.heights.tolist(), strict=True):
        sides = math.sqrt(one.size - 1) + math.sqrt(other.size - 1)
        noise = noise_multiplier * length / height
        if (
            min(one.size, other.size) > 1
            and total / max(one.size, other.size) > _SURE * sides * noise
        ):
            return True
    return False


def _ends(table: Measured) -> Clique:
    """The columns of a table."""
    return tuple(grid.column for grid in table.grids)

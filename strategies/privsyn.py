# SPDX-License-Identifier: Apache-2.0
"""PrivSyn in three sums: columns, coarse tables of all pairs, then a dense choice of marginals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, Query, Rounds
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from .independent import Columns, split_probs
from .parts.coarsen import clear_cells, coarsen
from .parts.consistency import agreed, plausible
from .parts.denoise import shrink
from .parts.gum import Target, gum
from .parts.histograms import Grid, Histograms, Measured, cells_of, margins_of, total_of
from .parts.measuring import MarginalStrategy
from .parts.refine import refined
from .parts.settings import check_cells, check_range, check_shares
from .parts.targets import ARRAYS, arrays_of, targets_of
from .parts.tree_model import columns_of

Pair = tuple[int, int]
Clique = tuple[int, ...]

_CLEAR = 4.0  # noise deviations that the mean cell of a coarse table stands above zero
_FEWEST_CELLS = 4  # of a column in a coarse table, however much noise there is
_SURE = 1.3  # how far above the noise a pair must stand to be depended on; more noise, fewer pairs
_DENOISED = 0.5  # part of a table's noise that is left once it is denoised, for choosing tables


@dataclass(frozen=True)
class Privsyn(MarginalStrategy):
    """Many small marginals, chosen without a graph, and records edited until they fit them all.

    1. ``columns``: the histogram of every column.
    2. ``pairs``: the table of every pair of columns, each merged to a few cells that are about
       equally heavy. A pair's dependence (InDif) is how far its table, with the noise taken out,
       is from that of independent columns, in L1. Then, as post-processing, pairs are chosen
       greedily (DenseMarg): one more as long as what it explains is more than what its noise adds
       to all chosen, each at its best share of the budget (in proportion to cells^(2/3)).
       Overlapping pairs become one marginal where that has no more cells than they have together.
    3. ``marginals``: those, with the budget shared out in that way, and once more the columns that
       are in none.

    All tables are then made to agree on what they share, and nothing in them is below zero. A
    pair that was not chosen keeps its coarse table, if that stands out from the noise. Records
    are sampled by editing a table of independent columns until it fits: a value at a time, towards
    all tables at once (`refined`), or as published (`gum`: `passes = 30`, `refinements = 0`).
    The copies that `gum` makes fit no better, and link columns that no table links.

    This is PrivSyn's linear form. The published one measures InDif itself, a number that no sum
    over users gives, with N taken as public; here all that touches records is a clipped, noised
    sum, and N is estimated. The share of the second round is higher, since its tables are used.

    Attributes:
      column_share: Share of the budget (of mu^2) for the first round.
      select_share: Share for the second; the third has the rest.
      select_cells: Most cells of a column in the second round.
      pair_cells: Most cells of a column in the third; rarer cells are merged, and told apart
        again by the column's own histogram.
      clique_cells: Most cells of a marginal of three columns or more.
      passes: Passes of `gum` whenever records are sampled; 0: none.
      refinements: Passes of `refined` after it; 0: none.

    Privacy:
      In each query a record lights one cell in each histogram, at a height that the query sets.
      A user's records are summed and clipped at `max_norm` times the norm of one record.

    Reference:
      Zhang et al. (2021), "PrivSyn: Differentially Private Data Synthesis",
      https://arxiv.org/abs/2012.15128.
    """

    column_share: float = 0.25
    select_share: float = 0.25
    select_cells: int = 12
    pair_cells: int = 32
    clique_cells: int = 5000
    passes: int = 0
    refinements: int = 12
    name: ClassVar[str] = "privsyn"

    def check(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_shares("marginals", column_share=self.column_share, select_share=self.select_share)
        check_cells(
            select_cells=self.select_cells,
            pair_cells=self.pair_cells,
            clique_cells=self.clique_cells,
        )
        check_range(0, 10_000, passes=self.passes, refinements=self.refinements)

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure columns, choose marginals, measure marginals, make all agree."""
        noise = self.noise(schema, noise_multiplier)
        shape = schema.shape
        bins = schema.ordered_cells

        whole = Grid.each(shape)
        alone = Histograms.balanced([(grid,) for grid in whole])
        noisy = yield alone.query("columns", noise_multiplier=noise[0], max_norm=max_norm)
        measured = alone.measured(noisy)
        total = total_of(measured)
        counts = columns_of(shape, measured, total, bins)
        if len(shape) == 1:
            return self._edited(schema, counts, ())

        spread = noise[1] * max_norm * math.sqrt(math.comb(len(shape), 2))
        cells = clear_cells(total, _CLEAR * spread, fewest=_FEWEST_CELLS, most=self.select_cells)
        grids = [Grid(i, coarsen(column, cells)) for i, column in enumerate(counts)]
        pairs = Histograms.balanced(list(combinations(grids, 2)))
        noisy = yield pairs.query("pairs", noise_multiplier=noise[1], max_norm=max_norm)
        coarse = pairs.measured(noisy)

        measured += margins_of(coarse)
        counts = columns_of(shape, measured, total_of(measured), bins)
        grids = [Grid(i, coarsen(column, self.pair_cells)) for i, column in enumerate(counts)]
        cliques = chosen_marginals(
            dependences(coarse, counts),
            [grid.size for grid in grids],
            stddev=noise[2] * max_norm,
            max_cells=self.clique_cells,
        )
        linked = {column for clique in cliques for column in clique}
        asked = Histograms.balanced(
            [tuple(grids[i] for i in clique) for clique in cliques]
            + [(grid,) for grid in whole if grid.column not in linked]
        )
        noisy = yield asked.query("marginals", noise_multiplier=noise[2], max_norm=max_norm)
        fine = asked.measured(noisy)

        measured += margins_of(fine)
        total = total_of(measured)
        counts = columns_of(shape, measured, total, bins)
        return self._edited(schema, counts, _targets(fine, coarse, counts) if total > 0 else ())

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each histogram asked for."""
        return cells_of(query, shard)

    def _edited(
        self, schema: Schema, counts: Sequence[NDArray[np.float64]], targets: Sequence[Target]
    ) -> "Edited":
        """What is learned, from counts of columns and tables that agree with them."""
        probs = tuple(column / column.sum() for column in counts)
        return Edited(schema, probs, tuple(targets), self.passes, self.refinements)

    def noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each round."""
        from ..core.accounting import split

        if len(schema.columns) == 1:
            return (noise_multiplier,)
        rest = 1 - self.column_share - self.select_share
        return split(noise_multiplier, (self.column_share, self.select_share, rest))


@dataclass(frozen=True, eq=False)
class Edited(Synthesizer):
    """Independent columns, edited until they fit tables.

    Sampling costs time in proportion to records x tables: seconds for 50,000 x 100.

    Attributes:
      schema: Schema of the records.
      probs: Probability of each cell, one array a column: what the edits start from and keep to.
      targets: Tables of two columns or more, that agree with the columns.
      passes: Passes of `gum`.
      refinements: Passes of `refined`.
    """

    schema: Schema
    probs: tuple[NDArray[np.float64], ...]
    targets: tuple[Target, ...]
    passes: int
    refinements: int
    kind: ClassVar[str] = "edited"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Independent columns, edited."""
        start = Columns(self.schema, self.probs).sample(num_records, rng)
        if not self.targets:
            return start
        alone = [Target((Grid.whole(i, len(p)),), p) for i, p in enumerate(self.probs)]
        targets = [*self.targets, *alone]
        codes = gum(start.codes, targets, rng, passes=self.passes)
        allowed = self.schema.rules.zeros()
        return Records(refined(codes, targets, rng, allowed=allowed, passes=self.refinements))

    def settings(self) -> dict[str, Any]:
        """How much is edited."""
        return {"passes": self.passes, "refinements": self.refinements}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The columns' probabilities; the grids, what each table is made of, and the tables."""
        return {"probs": np.concatenate(self.probs), **arrays_of(self.targets)}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: The arrays or settings are not those of an `Edited` of this schema.
        """
        if set(tensors) != {"probs", *ARRAYS}:
            raise ConfigError("a saved synthesizer with other arrays than it should have")
        numbers = [settings.get(key) for key in ("passes", "refinements")]
        if not all(isinstance(n, int) and 0 <= n <= 10_000 for n in numbers):
            raise ConfigError("a saved synthesizer whose passes are not whole numbers")
        probs = split_probs(schema, tensors["probs"])
        targets = targets_of(schema, tensors)
        return cls(schema, probs, targets, settings["passes"], settings["refinements"])


def dependences(
    coarse: Sequence[Measured], counts: Sequence[NDArray[np.float64]]
) -> dict[Pair, float]:
    """How far each pair of columns is from independence, in records, without what noise explains.

    The L1 norm of what the table differs from independent columns by, after shrinkage: 0 for a
    pair that cannot be told from independent.

    Args:
      coarse: Noisy tables of pairs; empty if their round was void.
      counts: Estimated counts of each column.
    """
    residuals = _residuals(coarse, counts, _SURE)
    return {
        (table.grids[0].column, table.grids[1].column): float(np.abs(residual).sum())
        for table, residual in zip(coarse, residuals, strict=True)
    }


def chosen_marginals(
    found: Mapping[Pair, float], sizes: Sequence[int], *, stddev: float, max_cells: int
) -> list[Clique]:
    """DenseMarg: the marginals that leave the least error, of noise and of what is not measured.

    Under shares of the budget in proportion to c^(2/3), the best there are, tables of c_i cells
    have a summed L1 noise of stddev x sqrt(2/pi) x (sum of c_i^(2/3))^(3/2).

    Args:
      found: Dependence of each pair, in records.
      sizes: Cells of each column in a table.
      stddev: Of the noise of a count if one table had the whole budget, in records.
      max_cells: Of a marginal of three columns or more.

    Returns:
      Sorted columns of each marginal, two or more; every chosen pair is in exactly one.

    Reference:
      Zhang et al. (2021), algorithms 1 and 2. Here pairs are combined only into a marginal that
      has no more cells than all of them together, since a larger one would tell less of each.
    """
    pairs = sorted(pair for pair, dependence in found.items() if dependence > 0)
    gain = np.array([found[pair] for pair in pairs])
    cost = np.array([(sizes[a] * sizes[b]) ** (2 / 3) for a, b in pairs])
    unit = _DENOISED * math.sqrt(2 / math.pi) * stddev
    spent, taken = 0.0, np.zeros(len(pairs), dtype=np.bool_)
    while not taken.all():
        profit = np.where(taken, -np.inf, gain - unit * ((spent + cost) ** 1.5 - spent**1.5))
        best = int(profit.argmax())
        if not profit[best] > 0:
            break
        taken[best] = True
        spent += cost[best]
    chosen = {pair: found[pair] for pair, is_taken in zip(pairs, taken, strict=True) if is_taken}
    return _combined(chosen, sizes, max_cells)


def _combined(chosen: dict[Pair, float], sizes: Sequence[int], max_cells: int) -> list[Clique]:
    """Chosen pairs, some of them merged to marginals that are no larger than they are together."""

    def num_cells(clique: Clique) -> int:
        return math.prod(sizes[i] for i in clique)

    def fits(clique: Clique) -> bool:
        pairs = list(combinations(clique, 2))
        return num_cells(clique) <= min(max_cells, sum(map(num_cells, pairs)))

    free, cliques = dict(chosen), []
    for pair in sorted(chosen, key=lambda p: (-chosen[p], p)):
        if pair not in free:
            continue
        clique: Clique = pair
        while True:
            grown = []
            for i in {column for p in free for column in p} - set(clique):
                new = [(min(i, j), max(i, j)) for j in clique]
                bigger = tuple(sorted((*clique, i)))
                if all(p in free for p in new) and fits(bigger):
                    grown.append((sum(free[p] for p in new), bigger))
            if not grown:
                break
            clique = max(grown)[1]
        cliques.append(clique)
        for own_pair in combinations(clique, 2):
            del free[own_pair]
    return sorted(cliques)


def _residuals(
    tables: Sequence[Measured], counts: Sequence[NDArray[np.float64]], sure: float = 1.0
) -> NDArray[np.float64]:
    """What each pair's table differs from independence by, denoised and padded with zeros."""
    sizes = np.array([[g.size for g in table.grids] for table in tables]).reshape(-1, 2)
    width = int(sizes.max(initial=1))
    residuals = np.zeros((len(tables), width, width))
    if not len(tables):
        return residuals
    for table, residual in zip(tables, residuals, strict=True):
        rows, columns = (grid.merge(counts[grid.column]) for grid in table.grids)
        independent = np.outer(rows, columns) / rows.sum()
        residual[: len(rows), : len(columns)] = table.counts - independent
    return shrink(residuals, sure * np.array([table.stddev for table in tables]), sizes)


def _targets(
    fine: Sequence[Measured],
    coarse: Sequence[Measured],
    counts: Sequence[NDArray[np.float64]],
) -> list[Target]:
    """Tables that agree with the columns and each other, of all that stands out from the noise."""
    cut = {grid.column: grid.groups for table in fine for grid in table.grids}
    again = [  # a coarse table that is cut just as the fine ones counts as a second measurement
        table
        for table in coarse
        if all(np.array_equal(cut.get(g.column, ()), g.groups) for g in table.grids)
    ]
    tables = [
        Measured(table.grids, corrected, table.stddev)
        for table, corrected in zip(fine, agreed([*fine, *again], counts), strict=False)
        if len(table.grids) > 1
    ]
    covered = {
        pair for table in tables for pair in combinations([g.column for g in table.grids], 2)
    }
    pairs = [table for table in tables if len(table.grids) == 2]
    left = [
        table for table in coarse if (table.grids[0].column, table.grids[1].column) not in covered
    ]
    residuals = [*_residuals(pairs, counts), *_residuals(left, counts, _SURE)]
    targets = []
    for table, residual in zip([*pairs, *left], residuals, strict=True):
        rows, columns = (grid.merge(counts[grid.column]) for grid in table.grids)
        if residual.any():
            independent = np.outer(rows, columns) / rows.sum()
            denoised = independent + residual[: len(rows), : len(columns)]
            targets.append(_target(table.grids, denoised, [rows, columns]))
    for table in tables:
        if len(table.grids) > 2:
            margins = [grid.merge(counts[grid.column]) for grid in table.grids]
            targets.append(_target(table.grids, table.counts, margins))
    return targets


def _target(
    grids: tuple[Grid, ...],
    counts: NDArray[np.float64],
    margins: Sequence[NDArray[np.float64]],
) -> Target:
    """A table as probabilities."""
    table = plausible(counts, margins)
    return Target(grids, table / table.sum())

# SPDX-License-Identifier: Apache-2.0
"""MST in three sums: columns, coarse tables of all pairs, then the tables of the best tree."""

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
from .independent import split_probs
from .parts.coarsen import clear_cells, coarsen
from .parts.forest import best_forest
from .parts.histograms import Grid, Histograms, Measured, cells_of, total_of
from .parts.measuring import MarginalStrategy
from .parts.pairs import denoised_pairs
from .parts.settings import check_cells, check_shares
from .parts.tree_model import Link, TreeModel, columns_of, fit

_CLEAR = 4.0  # noise deviations that the mean cell of a coarse table stands above zero
_FEWEST_CELLS = 4  # of a column in a coarse table, however much noise there is
_SURE = 1.3  # how far above the noise a pair must stand to be linked; more noise, fewer links


@dataclass(frozen=True)
class Mst(MarginalStrategy):
    """A tree of pairs, found and measured in three rounds of sums.

    1. ``columns``: the histogram of every column.
    2. ``pairs``: the table of every pair of columns, each merged to a few cells that the first
       round found to be about equally heavy. The tables are denoised, and the tree that fits all
       of them best is chosen: post-processing. A pair that does not stand out from the noise is
       never linked, so that under heavy noise the tree falls apart into independent columns.
    3. ``tree``: the tables of the tree's pairs, at a finer grain, and once more the columns that
       are linked to none.

    The classical MST picks its edges by the exponential mechanism, which is no sum. Here all
    that touches records is a clipped, noised sum, so it needs no trusted selector.

    Attributes:
      column_share: Share of the budget (of mu^2) for the first round.
      select_share: Share for the second; the third has the rest.
      select_cells: Most cells of a column in the second round.
      pair_cells: Most cells of a column in the third; rarer cells are merged, and told apart
        again by the column's own histogram.

    Privacy:
      In each query a record lights one cell in each histogram, at a height that the query sets.
      A user's records are summed and clipped at `max_norm` times the norm of one record.

    Reference:
      McKenna, Miklau, Sheldon (2021), "Winning the NIST Contest", section 4,
      https://arxiv.org/abs/2108.04978.
    """

    column_share: float = 0.4
    select_share: float = 0.2
    select_cells: int = 12
    pair_cells: int = 32
    name: ClassVar[str] = "mst"

    def check(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_shares("tree", column_share=self.column_share, select_share=self.select_share)
        check_cells(select_cells=self.select_cells, pair_cells=self.pair_cells)

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure columns, choose the tree, measure the tree."""
        noise = self.noise(schema, noise_multiplier)
        shape = schema.shape
        bins = schema.ordered_cells

        whole = Grid.each(shape)
        alone = Histograms.balanced([(grid,) for grid in whole])
        noisy = yield alone.query("columns", noise_multiplier=noise[0], max_norm=max_norm)
        measured = alone.measured(noisy)
        if len(shape) == 1:
            return Tree(schema, fit(shape, measured, (), bins=bins))

        counts = columns_of(shape, measured, total_of(measured), bins)
        spread = noise[1] * max_norm * math.sqrt(math.comb(len(shape), 2))
        cells = clear_cells(
            total_of(measured), _CLEAR * spread, fewest=_FEWEST_CELLS, most=self.select_cells
        )
        grids = [Grid(i, coarsen(column, cells)) for i, column in enumerate(counts)]
        pairs = Histograms.balanced(list(combinations(grids, 2)))
        noisy = yield pairs.query("pairs", noise_multiplier=noise[1], max_norm=max_norm)
        coarse = pairs.measured(noisy)

        total = total_of([*measured, *coarse])
        counts = columns_of(shape, [*measured, *coarse], total, bins)
        edges = _best_edges(counts, coarse, total)
        grids = [Grid(i, coarsen(column, self.pair_cells)) for i, column in enumerate(counts)]
        linked = {column for edge in edges for column in edge}
        tree = Histograms.balanced(
            [*((grids[a], grids[b]) for a, b in edges)]
            + [(grid,) for grid in whole if grid.column not in linked]
        )
        noisy = yield tree.query("tree", noise_multiplier=noise[2], max_norm=max_norm)
        measured = [*measured, *coarse, *tree.measured(noisy)]
        return Tree(schema, fit(shape, measured, edges, bins=bins))

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each histogram asked for."""
        return cells_of(query, shard)

    def noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each round."""
        from ..core.accounting import split

        if len(schema.columns) == 1:
            return (noise_multiplier,)
        tree_share = 1 - self.column_share - self.select_share
        return split(noise_multiplier, (self.column_share, self.select_share, tree_share))


@dataclass(frozen=True)
class Tree(Synthesizer):
    """Columns linked in a tree.

    Attributes:
      schema: Schema of the records.
      model: The distribution; it also gives exact marginals.
    """

    schema: Schema
    model: TreeModel
    kind: ClassVar[str] = "tree"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records by ancestral sampling, with the least variance in each link."""
        return Records(self.model.sample(num_records, rng))

    def settings(self) -> dict[str, Any]:
        """Nothing: all it knows are arrays."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Columns' probabilities, and the ends, groups and table of each link, laid end to end."""
        links = self.model.links
        sides = [grid.groups for link in links for grid in (link.left, link.right)]
        return {
            "probs": np.concatenate(self.model.columns),
            "edges": np.array(self.model.edges, dtype=np.int32).reshape(-1, 2),
            "groups": np.concatenate([*sides, np.zeros(0)]).astype(np.int32),
            "tables": np.concatenate([*(link.table.ravel() for link in links), np.zeros(0)]),
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: The arrays are not those of a `Tree` of this schema.
        """
        if set(tensors) != {"probs", "edges", "groups", "tables"}:
            raise ConfigError("a saved tree holds exactly probs, edges, groups and tables")
        probs = split_probs(schema, tensors["probs"])
        edges = tensors["edges"].astype(np.int64)
        groups = tensors["groups"].astype(np.int64)
        tables = tensors["tables"].astype(np.float64)
        part = list(range(len(probs)))
        links = []
        for a, b in edges.tolist() if edges.ndim == 2 and edges.shape[1] == 2 else [(-1, -1)]:
            if not (0 <= a < len(part) and 0 <= b < len(part) and part[a] != part[b]):
                raise ConfigError("a saved tree whose edges make a loop or leave the schema")
            part = [part[a] if p == part[b] else p for p in part]
            left, groups = _taken_grid(a, len(probs[a]), groups)
            right, groups = _taken_grid(b, len(probs[b]), groups)
            table, tables = np.split(tables, [left.size * right.size])
            links.append(_checked_link(left, right, table, probs))
        if groups.size or tables.size:
            raise ConfigError("a saved tree with more numbers than its edges need")
        return cls(schema, TreeModel(probs, tuple(links)))


def _best_edges(
    counts: Sequence[NDArray[np.float64]], coarse: Sequence[Measured], total: float
) -> list[tuple[int, int]]:
    """The tree that fits the denoised tables of all pairs best.

    Args:
      counts: Estimated counts of each column.
      coarse: Noisy tables of all pairs; empty if the round was void.
      total: Number of records; 0.0 if it is not known.
    """
    if not coarse or total <= 0:
        return []
    found = denoised_pairs(counts, coarse, total, sure=_SURE)
    width, (first, second) = found.columns.shape[1], found.ends.T
    pairs = np.zeros((len(counts), len(counts), width, width))
    pairs[first, second] = found.tables
    pairs[second, first] = found.tables.transpose(0, 2, 1)
    linked = np.zeros((len(counts), len(counts)), dtype=np.bool_)
    linked[first, second] = found.linked
    return best_forest(found.columns, pairs, linked | linked.T)


def _taken_grid(
    column: int, num_cells: int, groups: NDArray[np.int64]
) -> tuple[Grid, NDArray[np.int64]]:
    """The first grid in saved groups, and the groups after it."""
    own, rest = np.split(groups, [num_cells])
    present = np.unique(own)
    if len(own) != num_cells or not np.array_equal(present, np.arange(len(present))):
        raise ConfigError("a saved tree whose groups do not fit the schema")
    return Grid(column, own), rest


def _checked_link(
    left: Grid, right: Grid, table: NDArray[np.float64], probs: Sequence[NDArray[np.float64]]
) -> Link:
    """A saved link whose table agrees with its columns."""
    if len(table) != left.size * right.size or not (table >= 0).all():
        raise ConfigError("a saved tree with a table of another size, or numbers below zero")
    table = table.reshape(left.size, right.size)
    for grid, sums in ((left, table.sum(axis=1)), (right, table.sum(axis=0))):
        if not np.abs(sums - grid.merge(probs[grid.column])).max() < 1e-6:
            raise ConfigError("a saved tree with a table that contradicts its columns")
    return Link(left, right, table)

# SPDX-License-Identifier: Apache-2.0
"""How wrong a model is about each pair of columns, told from noisy tables alone."""

import math
from collections.abc import Generator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ...core.query import NoisySum, Query
from .cliques import Clique, table_cells
from .coarsen import clear_cells, coarsen
from .denoise import shrink
from .graph_model import GraphModel
from .histograms import Grid, Histograms, Measured
from .propagation import merged
from .search import Chooser, Found, scope_of
from .simplex import to_simplex
from .worst import expected_error

_CLEAR = 4.0  # noise deviations that the mean cell of a coarse table stands above zero
_FEWEST_CELLS = 4  # of a column in a coarse table, however much noise there is


def coarse_pairs(
    shape: Sequence[int],
    columns: Sequence[Measured],
    *,
    total: float,
    noise_multiplier: float,
    most_cells: int,
) -> Histograms:
    """Tables of all pairs, each column merged to a few cells that are about equally heavy.

    Args:
      shape: Cells of each column.
      columns: Noisy histograms of the columns; empty if the round was void.
      total: Number of records; 0 if it is not known.
      noise_multiplier: Of the sum that measures the tables.
      most_cells: Most cells of a column in them.
    """
    stddev = noise_multiplier * math.sqrt(math.comb(len(shape), 2))
    cells = clear_cells(total, _CLEAR * stddev, fewest=_FEWEST_CELLS, most=most_cells)
    shares = {table.grids[0].column: to_simplex(table.counts, total) for table in columns}
    even = [np.full(num_cells, 1.0 / num_cells) for num_cells in shape]
    grids = [Grid(i, coarsen(shares.get(i, even[i]), cells)) for i in range(len(shape))]
    return Histograms.balanced(list(combinations(grids, 2)))


def by_hints(pairs: Sequence[Measured]) -> Chooser:
    """A chooser that takes the pairs whose noisy tables the model fits worst; asks nothing.

    A table that was measured before is taken to be wrong by its noise at least.

    Args:
      pairs: Noisy tables of all pairs; empty if the round was void, and nothing is chosen.
    """

    def choose(found: Found) -> Generator[Query, NoisySum, list[Clique]]:
        yield from ()
        if not pairs:
            return []
        contest, shape = found.contest, found.model.shape
        gaps = _errors(pairs, found.model, found.total)
        seen = dict(zip(map(scope_of, pairs), gaps.tolist(), strict=True))
        cells = np.array([table_cells(clique, shape) for clique in contest.cliques])
        stddevs = np.array([found.stddevs.get(clique, 0.0) for clique in contest.cliques])
        errors = np.array([seen.get(clique, 0.0) for clique in contest.cliques])
        errors = np.maximum(errors, expected_error(cells, stddevs))
        scores = contest.weights * (errors - contest.penalties)
        order = np.argsort(-scores, kind="stable")[: found.step.count]
        return [contest.cliques[i] for i in order.tolist()]

    return choose


def _errors(pairs: Sequence[Measured], model: GraphModel, total: float) -> NDArray[np.float64]:
    """L1 distance of each pair's table from the model, in counts, with the noise taken out."""
    if not pairs:
        return np.zeros(0)
    sizes = np.array([table.counts.shape for table in pairs])
    gaps = np.zeros((len(pairs), sizes[:, 0].max(), sizes[:, 1].max()))
    for gap, table, known in zip(gaps, pairs, model.marginals(map(_axes, pairs)), strict=True):
        guess = merged(known, [grid.groups for grid in table.grids])
        gap[: len(guess), : guess.shape[1]] = table.counts - total * guess
    stddevs = np.array([table.stddev for table in pairs])
    errors: NDArray[np.float64] = np.abs(shrink(gaps, stddevs, sizes)).sum(axis=(1, 2))
    return errors


def _axes(table: Measured) -> Clique:
    """Columns of a table, in the order of its axes."""
    return tuple(grid.column for grid in table.grids)

# SPDX-License-Identifier: Apache-2.0
"""Choose which pairs to measure: each explains more than the noise that it costs all others.

Works on denoised tables of pairs, so it is post-processing. A model is fit to the pairs chosen so
far; a pair that it explains badly comes next, the sooner the fewer cells it adds, until none is
worth its noise. A pair for which the model has no room is worth measuring too: records can be moved
to fit it (see `refine`).
"""

from collections.abc import Sequence

import numpy as np

from .cliques import Clique, table_cells, tree_cells
from .descent import fit
from .graph_model import GraphModel
from .histograms import Grid, Measured
from .pairs import Pairs

_GROWTH = 0.2  # share of new pairs between two fits
_STEPS = 40  # of a fit, which begins where the last one ended
_TRIED = 12  # worst explained pairs among which the next one is
_THRIFT = 0.25  # power of the cells that a pair adds to the model, by which its gap is divided


def worthwhile(
    pairs: Pairs,
    shape: Sequence[int],
    *,
    noise: float,
    others: float,
    weight: float,
    max_cells: float,
    held: Sequence[Clique] = (),
) -> tuple[list[Clique], list[Clique]]:
    """The pairs whose gap to the model outweighs the noise that measuring them adds.

    Tables share one clip, so a table more leaves less for the rest. With heights that make the
    summed error least (`Histograms.balanced`), tables of m cells that count w times err by
    ``noise * (sum of (w m)^(2/3))^(3/2)`` together, and a pair is worth asking when `weight` times
    its gap exceeds what it adds to that.

    Args:
      pairs: Denoised tables of all pairs that may be chosen.
      shape: Cells of each column in the tables and the model to come.
      noise: Error in total variation of a cell, in shares of all records, at height one.
      others: Sum of (w m)^(2/3) over the tables that are measured anyway.
      weight: How often the error of a pair's table counts.
      max_cells: Most cells of the model's junction tree over `shape`.
      held: Cliques that the model holds besides, as those of constraints.

    Returns:
      Pairs of columns, first below second: those that the model holds, in the order they were
      chosen, and those that are worth measuring though it has no room for them.

    Reference:
      The cost is that of McKenna et al.'s SWIFT (github.com/google/dpsynth), with gaps taken
      from sums and from the model so far.
    """
    sizes = [1] * len(shape)
    for (a, b), (rows, columns) in zip(pairs.ends.tolist(), pairs.sizes.tolist(), strict=True):
        sizes[a], sizes[b] = rows, columns
    alone = [
        Measured((Grid.whole(i, cells),), pairs.columns[i, :cells], 1.0)
        for i, cells in enumerate(sizes)
    ]
    cliques: list[Clique] = [(min(ends), max(ends)) for ends in pairs.ends.tolist()]
    costs = {i: (weight * table_cells(cliques[i], shape)) ** (2 / 3) for i in range(len(cliques))}
    waiting = [i for i in range(len(cliques)) if pairs.linked[i]]
    chosen: list[int] = []
    outside: list[int] = []

    def is_worth(gap: float, pair: int) -> bool:
        cost: float = noise * ((others + costs[pair]) ** 1.5 - others**1.5)
        return weight * gap > cost

    def fitted(start: GraphModel | None) -> GraphModel:
        tables = [_measured(pairs, i) for i in chosen]
        return fit(sizes, [*alone, *tables], total=1.0, start=start, max_steps=_STEPS)

    model: GraphModel | None = None
    while waiting:
        model = fitted(model)
        gaps = _gaps(model, pairs, waiting)
        added = 0
        while added < max(1.0, _GROWTH * len(chosen)):
            worth = [i for i in waiting if is_worth(gaps[i], i)]
            cells = tree_cells([*held, *(cliques[i] for i in chosen)], shape)
            merits: dict[int, float] = {}
            for i in sorted(worth, key=lambda i: -gaps[i])[:_TRIED]:
                now = tree_cells([*held, *(cliques[j] for j in (*chosen, i))], shape)
                if now > max_cells:
                    waiting.remove(i)  # it will not fit later either
                    outside.append(i)
                else:
                    merits[i] = gaps[i] / max(now - cells, 1) ** _THRIFT
            if merits:
                best = max(merits, key=lambda i: merits[i])
                chosen.append(best)
                waiting.remove(best)
                others += costs[best]
                added += 1
            elif len(worth) <= _TRIED:
                break
        if not added:
            break
    more: list[int] = []
    gaps = _gaps(fitted(model), pairs, outside) if outside else {}
    for i in sorted(outside, key=lambda i: -gaps[i]):
        if is_worth(gaps[i], i):
            more.append(i)
            others += costs[i]
    return [cliques[i] for i in chosen], [cliques[i] for i in more]


def _measured(pairs: Pairs, pair: int) -> Measured:
    """A pair's denoised table, as if it had been measured."""
    ends, sizes = pairs.ends[pair].tolist(), pairs.sizes[pair].tolist()
    grids = tuple(Grid.whole(c, cells) for c, cells in zip(ends, sizes, strict=True))
    return Measured(grids, pairs.table(pair), 1.0)


def _gaps(model: GraphModel, pairs: Pairs, waiting: Sequence[int]) -> dict[int, float]:
    """Total variation between the model and each waiting pair's table."""
    found = model.marginals([tuple(pairs.ends[i].tolist()) for i in waiting])
    return {
        i: float(np.abs(table - pairs.table(i)).sum()) / 2
        for i, table in zip(waiting, found, strict=True)
    }

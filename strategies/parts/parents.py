# SPDX-License-Identifier: Apache-2.0
"""Choose which candidates of a pool live on, and which are varied."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .rounding import rounded_cells

Selection = Literal["sample", "rank"]


@dataclass(frozen=True)
class Choosing:
    """How parents are chosen.

    Attributes:
      selection: `sample`: by their share of the votes. `rank`: the best, with as many offspring
        each.
      num_variations: Offspring of each parent under `rank`.
      keep_parents: A parent stays in the pool and makes one variation less.
      max_lineage: The most of a label's offspring that descend from one candidate of the first
        pool, as a share; 1: no limit. Where there are too few others, the limit gives way.
    """

    selection: Selection
    num_variations: int
    keep_parents: bool
    max_lineage: float = 1.0

    def parents(
        self,
        fitness: NDArray[np.float64],
        groups: NDArray[np.int64],
        origins: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Candidates that stay, and candidates to vary, one entry for each variation.

        A label keeps its number of candidates; one that got no votes keeps its candidates.

        Args:
          fitness: Share of the votes of each candidate, `(num_candidates,)`.
          groups: Label of each.
          origins: Ancestor of each in the first pool.
          rng: Public randomness.
        """
        kept, varied = [], []
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            fit, room = fitness[members], len(members)
            if not fit.sum() > 0:
                kept.append(members)
                continue
            fit = limited(fit / fit.sum(), origins[members], self.max_lineage)
            if self.selection == "rank":
                num_parents = max(1, room // (self.num_variations + self.keep_parents))
                best = np.argsort(-fit, kind="stable")[:num_parents]
                parents = np.resize(members[best[fit[best] > 0]], room)
            else:
                parents = members[rounded_cells(fit, room, rng)]
            _, first = np.unique(parents, return_index=True)
            stays = np.zeros(room, dtype=np.bool_)
            stays[first] = self.keep_parents
            kept.append(parents[stays])
            varied.append(parents[~stays])
        nobody = np.zeros(0, dtype=np.int64)
        return np.concatenate([nobody, *kept]), np.concatenate([nobody, *varied])


def limited(
    shares: NDArray[np.float64], lineages: NDArray[np.int64], most: float
) -> NDArray[np.float64]:
    """Shares in which no lineage has more than a limit, what is over going to the others.

    Args:
      shares: Of each candidate, `(num_candidates,)`, adding up to 1.
      lineages: Lineage of each.
      most: The limit. Where as many lineages as have any share cannot keep it, they share alike.
    """
    _, of = np.unique(lineages, return_inverse=True)
    totals = np.bincount(of, weights=shares)
    some = totals > 0
    most = max(most, 1.0 / int(some.sum()))
    wanted, full = totals.copy(), np.zeros(len(totals), dtype=np.bool_)
    while (over := some & ~full & (wanted > most * (1 + 1e-12))).any():
        full |= over
        wanted[full] = most
        rest = some & ~full
        if not rest.any():
            break
        wanted[rest] = totals[rest] * (1 - most * int(full.sum())) / totals[rest].sum()
    factor = np.divide(wanted, totals, out=np.zeros_like(totals), where=some)
    return np.asarray(shares * factor[of] / (shares * factor[of]).sum())

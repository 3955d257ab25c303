# SPDX-License-Identifier: Apache-2.0
"""Ask which tables of a workload a model gets most wrong, by a private choice."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...core.query import Choice, NoisySum, Query
from .cliques import Clique, junction_tree, table_cells, tree_cells
from .graph_model import GraphModel
from .histograms import Grid, Histograms, norm_clip


@dataclass(frozen=True)
class Workload:
    """Tables that a synthesizer shall get right, and what may be measured for their sake.

    Attributes:
      shape: Cells of each column.
      cliques: Columns of each table that may be measured: those asked for, and their parts.
      weights: How much of the tables asked for each one overlaps, `(num_cliques,)`.

    Reference:
      McKenna, Mullins, Sheldon, Miklau (2022), "AIM", section 4.1: the downward closure, and
      weights that add up the columns shared with each table asked for.
    """

    shape: tuple[int, ...]
    cliques: tuple[Clique, ...]
    weights: NDArray[np.float64]

    @staticmethod
    def all_ways(shape: Sequence[int], ways: int) -> "Workload":
        """All tables of `ways` columns, or of all columns if there are fewer."""
        num_columns, ways = len(shape), min(ways, len(shape))
        cliques = [c for k in range(1, ways + 1) for c in combinations(range(num_columns), k)]
        # a set of k columns shares j with C(k, j) C(n - k, ways - j) of all sets of `ways`
        by_size = [
            sum(
                j * math.comb(k, j) * math.comb(num_columns - k, ways - j)
                for j in range(1, min(k, ways) + 1)
                if ways - j <= num_columns - k
            )
            for k in range(ways + 1)
        ]
        weights = np.array([by_size[len(clique)] for clique in cliques], dtype=np.float64)
        return Workload(tuple(shape), tuple(cliques), weights / weights.max())

    def alike(self) -> "Workload":
        """The same tables, all worth the same."""
        return replace(self, weights=np.ones(len(self.cliques)))

    def of_many_columns(self) -> "Workload":
        """Without the tables of single columns, where there are others."""
        many = [number for number, clique in enumerate(self.cliques) if len(clique) > 1]
        kept = many or list(range(len(self.cliques)))
        return Workload(self.shape, tuple(self.cliques[i] for i in kept), self.weights[kept])

    def within(self, measured: Iterable[Clique], max_cells: float) -> list[int]:
        """Tables with which the model of those measured stays within a number of cells.

        Those that a clique of the model holds already always are among them.
        """
        known = list(measured)
        tree = junction_tree(known, self.shape)
        now = sum(table_cells(clique, self.shape) for clique in tree.cliques)
        found = []
        for number, clique in enumerate(self.cliques):
            if tree.holding(clique, self.shape) >= 0:
                found.append(number)
            elif table_cells(clique, self.shape) <= max_cells:
                more = tree_cells([*known, clique], self.shape)
                if more <= max(max_cells, now):
                    found.append(number)
        return found


@dataclass(frozen=True, eq=False)
class Contest:
    """Tables among which the worst are chosen.

    Attributes:
      grids: Of every column, by its position.
      cliques: Columns of each table.
      weights: What one count of error in each is worth, `(num_tables,)`.
      penalties: Error that measuring would bring anyway, in counts, `(num_tables,)`.
    """

    grids: Sequence[Grid]
    cliques: Sequence[Clique]
    weights: NDArray[np.float64]
    penalties: NDArray[np.float64]

    def at_share(self, share: float) -> "Contest":
        """The contest among tables of a share of all records."""
        return replace(self, penalties=self.penalties * share)

    def query(
        self,
        name: str,
        model: GraphModel,
        total: float,
        *,
        noise_multiplier: float,
        max_norm: float,
        count: int = 1,
        where: Literal["server", "client"] = "server",
        beside: Sequence[Clique] = (),
        against: NDArray[np.int64] | None = None,
    ) -> Query:
        """The query that has the worst tables chosen.

        Args:
          name: The query's name.
          model: What is thought of the records so far.
          total: Number of records that each sum is compared with the model at.
          noise_multiplier: Of the sum that the choice costs as much as.
          max_norm: L1 bound of a user's part in each table, in records.
          count: How many tables.
          where: Who chooses.
          beside: Further tables that take no part, but may be held against those that do.
          against: As `Choice.against`; tables of `beside` are numbered after all others.
        """
        asked = [*self.cliques, *beside]
        members = [tuple(self.grids[column] for column in clique) for clique in asked]
        tables = Histograms(tuple(members), np.ones(len(members)))
        query = tables.query(name, noise_multiplier=noise_multiplier, max_norm=max_norm)
        estimates = [total * table.ravel() for table in model.marginals(asked)]
        choice = Choice.among(
            tables.sizes,
            np.concatenate(estimates),
            penalties=self.penalties,
            weights=self.weights,
            against=against,
            count=min(count, len(self.cliques)),
            where=where,
        )
        return replace(query, clip=norm_clip(np.ones(1), max_norm), choice=choice)

    def chosen(self, noisy: NoisySum) -> list[Clique]:
        """What was chosen, the table that most chose first; nothing in a void round."""
        order = np.argsort(-noisy.vector, kind="stable")
        return [self.cliques[i] for i in order.tolist() if noisy.vector[i] > 0]


def expected_error(
    cells: NDArray[np.int64], stddev: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean L1 norm of the noise in each table, in counts."""
    return np.asarray(math.sqrt(2 / math.pi) * stddev * cells, dtype=np.float64)

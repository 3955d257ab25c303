# SPDX-License-Identifier: Apache-2.0
"""FLAIM, simplified: each client chooses by its own records alone; for comparison, not for use."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..core.query import Contribution, NoisySum, Query, Rounds
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.cliques import Clique
from .parts.histograms import Grid, cells_of
from .parts.measuring import MarginalStrategy
from .parts.search import (
    Chooser,
    Found,
    Step,
    check_settings,
    growing_steps,
    measuring,
    search,
)
from .parts.worst import Workload


@dataclass(frozen=True)
class Flaim(MarginalStrategy):
    """AIM whose choices are made at the clients: each draws a table by its own records.

    A comparison. A client sees its own records only, so what it finds the model to get wrong is
    mostly how it differs from the others, or, with few records, the noise of its own choice.

    1. ``columns``: the histogram of every column.
    2. In each step ``worst``: every client runs the exponential mechanism on its own exact sum and
       tells one table. ``table``: the `batch` tables that most clients told are measured.

    Simplified from the published method: every client takes part in every step; what is
    measured is the sum over all clients, not over those that told the table; a client's records
    are compared with the model at an equal share of all records, for how many it holds is
    private; budgets grow by a fixed factor instead of annealing; unit and clip are those of this
    package. The correction of AugFLAIM (`augmented`) takes off a table's distance the mean
    distance of its columns, by which the client differs anyway, computed at the client inside its
    score (which doubles its sensitivity) rather than from noisy columns of each client, since no
    single client's sum is ever seen here; and all columns are measured again in every step.

    Attributes:
      ways: Columns of each table of the workload.
      num_steps: Rounds of choosing and measuring.
      batch: Tables measured in each.
      augmented: Correct for how clients differ.
      growth: Budget of a step over that of the step before.
      column_share: Share of the budget (of mu^2) for the columns.
      choice_share: Share of each step's budget for choosing.
      max_model_mb: Most memory of the model's tables at the end, in megabytes.

    Privacy:
      A client's choice is private by itself, so it needs no trusted server and no noise beside. A
      user's part in each table is clipped in L1 for it, at `max_norm` records.

    Reference:
      Maddock, Cormode, Maple (2024), "FLAIM: AIM-based Synthetic Data Generation in the Federated
      Setting", algorithm 1 and section 4, arXiv 2310.03447.
    """

    ways: int = 2
    num_steps: int = 10
    batch: int = 3
    augmented: bool = False
    growth: float = 1.4
    column_share: float = 0.1
    choice_share: float = 0.15
    max_model_mb: float = 1.6
    name: ClassVar[str] = "flaim"

    def check(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_settings(
            ways=self.ways,
            num_steps=self.num_steps,
            max_model_mb=self.max_model_mb,
            growth=self.growth,
            batch=self.batch,
            shares={"column_share": self.column_share, "choice_share": self.choice_share},
        )

    def noise(self, schema: Schema, noise_multiplier: float) -> list[float]:
        """A sum of columns, and a choice and a sum a step; one sum for a single column."""
        if len(schema.columns) == 1:
            return [noise_multiplier]
        first, steps = self._plan(noise_multiplier)
        return [first, *(z for step in steps for z in (step.choice_noise, step.table_noise))]

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure the columns, then what most clients find worst."""
        alone = len(schema.columns) == 1
        first, steps = (noise_multiplier, []) if alone else self._plan(noise_multiplier)
        shape = schema.shape
        grids = Grid.each(shape)
        each = [(i,) for i in range(len(shape))]
        columns = measuring(grids, each)
        noisy = yield columns.query("columns", noise_multiplier=first, max_norm=max_norm)
        return (
            yield from search(
                schema,
                columns.measured(noisy),
                steps,
                self._at_clients(max(1, noisy.num_clients), each, max_norm),
                workload=Workload.all_ways(shape, self.ways).of_many_columns(),
                max_norm=max_norm,
                always=each if self.augmented else (),
            )
        )

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each table asked for."""
        return cells_of(query, shard)

    def _at_clients(self, num_clients: int, columns: Sequence[Clique], max_norm: float) -> Chooser:
        """A chooser that takes the tables told by most clients."""

        def choose(found: Found) -> Generator[Query, NoisySum, list[Clique]]:
            local = found.contest.at_share(1 / num_clients)
            beside = columns if self.augmented else []
            places = [
                [len(local.cliques) + c for c in clique] + [-1] * (self.ways - len(clique))
                for clique in local.cliques
            ]
            noisy = yield local.query(
                "worst",
                found.model,
                found.total / num_clients,
                noise_multiplier=found.step.choice_noise,
                max_norm=max_norm,
                where="client",
                beside=beside,
                against=np.array(places, dtype=np.int64) if beside else None,
            )
            return local.chosen(noisy)[: self.batch]

        return choose

    def _plan(self, noise_multiplier: float) -> tuple[float, list[Step]]:
        """Noise multiplier of the first round, and the steps."""
        steps = growing_steps(
            noise_multiplier,
            num_steps=self.num_steps,
            growth=self.growth,
            spent=self.column_share,
            choice_share=self.choice_share,
            max_model_mb=self.max_model_mb,
            count=self.batch,
        )
        return noise_multiplier / math.sqrt(self.column_share), steps

# SPDX-License-Identifier: Apache-2.0
"""ABSyn, a reconstruction: the worst tables chosen and measured in batches, in a few rounds."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..core.query import Contribution, Query, Rounds
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.histograms import Grid, cells_of
from .parts.measuring import MarginalStrategy
from .parts.search import (
    Step,
    by_exponential_mechanism,
    check_settings,
    growing_steps,
    measuring,
    search,
)
from .parts.worst import Workload


@dataclass(frozen=True)
class Absyn(MarginalStrategy):
    """AIM by batches: in each of a few rounds the worst tables are chosen together.

    A RECONSTRUCTION. All that was to be had of the published method (Adaptive Batch Synthesis) is
    that it selects adaptively and in batches; what follows is this package's reading of that,
    and no figure of it is a figure of the published method.

    1. ``columns``: the histogram of every column.
    2. In each batch ``worst``: the exponential mechanism chooses `batch` different tables one after
       another by the same scores, those of AIM; ``table``: one query measures them together, and
       the model is fitted once. Of tables that the model cannot hold together, the first are kept.

    A batch saves rounds and fits; its tables are chosen without knowing each other's outcome.

    Attributes:
      ways: Columns of each table of the workload.
      num_steps: Batches.
      batch: Tables in each.
      growth: Budget of a batch over that of the batch before.
      column_share: Share of the budget (of mu^2) for the columns.
      choice_share: Share of each batch's budget for choosing.
      max_model_mb: Most memory of the model's tables at the end, in megabytes.

    Privacy:
      In a sum of tables a user's whole vector is clipped in L2, at `max_norm` times the norm of
      one record. In a choice a user's part in each table is clipped in L1, at `max_norm` records;
      each of the `batch` draws has its share of the choice's budget.
    """

    ways: int = 2
    num_steps: int = 8
    batch: int = 4
    growth: float = 1.5
    column_share: float = 0.1
    choice_share: float = 0.15
    max_model_mb: float = 1.6
    name: ClassVar[str] = "absyn"
    trusts_server: ClassVar[bool] = True

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
        """A sum of columns, and a choice and a sum a batch."""
        first, steps = self._plan(noise_multiplier)
        return [first, *(z for step in steps for z in (step.choice_noise, step.table_noise))]

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure the columns, then the worst tables, batch by batch."""
        first, steps = self._plan(noise_multiplier)
        grids = Grid.each(schema.shape)
        columns = measuring(grids, [(i,) for i in range(len(grids))])
        noisy = yield columns.query("columns", noise_multiplier=first, max_norm=max_norm)
        return (
            yield from search(
                schema,
                columns.measured(noisy),
                steps,
                by_exponential_mechanism(max_norm),
                workload=Workload.all_ways(schema.shape, self.ways),
                max_norm=max_norm,
            )
        )

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each table asked for."""
        return cells_of(query, shard)

    def _plan(self, noise_multiplier: float) -> tuple[float, list[Step]]:
        """Noise multiplier of the first round, and the batches."""
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

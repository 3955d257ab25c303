# SPDX-License-Identifier: Apache-2.0
"""MWEM with a graphical model: a few equal steps, half of each for choosing, half for measuring."""

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
    max_cells_of,
    measuring,
    search,
)
from .parts.worst import Workload


@dataclass(frozen=True)
class Mwem(MarginalStrategy):
    """Tables of a workload, the one that the model gets most wrong in each of a few equal steps.

    1. ``total``: the histogram of the column with the fewest cells, at a small share of the
       budget, for the number of records. (The published method takes that as public.)
    2. In each step ``worst`` chooses a table by the exponential mechanism on the clipped sum of
       all clients, by its L1 distance alone; ``table`` measures it; the model is fitted again.

    The published method multiplies weights over the full domain. A graphical model fitted to the
    same tables has the greatest entropy too, and is no larger than it has to be; this is what its
    successors call MWEM+PGM. Steps have equal budgets, and nothing is learnt of columns that
    are in no table chosen.

    Attributes:
      ways: Columns of each table of the workload.
      num_steps: Tables that are measured; `None`: as many as there are columns.
      choice_share: Share of each step's budget (of mu^2) for choosing.
      total_share: Share of the whole budget for the number of records.
      max_model_mb: Most memory of the model's tables, in megabytes.

    Privacy:
      In a sum of tables a user's whole vector is clipped in L2, at `max_norm` times the norm of
      one record. In a choice a user's part in each table is clipped in L1, at `max_norm` records.

    Reference:
      Hardt, Ligett, McSherry (2012), "A Simple and Practical Algorithm for Differentially Private
      Data Release", figure 1, arXiv 1012.4763; McKenna, Sheldon, Miklau (2019), section 5, arXiv
      1901.09136.
    """

    ways: int = 2
    num_steps: int | None = None
    choice_share: float = 0.5
    total_share: float = 0.02
    max_model_mb: float = 1.6
    name: ClassVar[str] = "mwem"
    trusts_server: ClassVar[bool] = True

    def check(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_settings(
            ways=self.ways,
            num_steps=1 if self.num_steps is None else self.num_steps,
            max_model_mb=self.max_model_mb,
            shares={"choice_share": self.choice_share, "total_share": self.total_share},
        )

    def noise(self, schema: Schema, noise_multiplier: float) -> list[float]:
        """A sum, and a choice and a sum a step."""
        first, step, num_steps = self._plan(schema, noise_multiplier)
        return [first, *[step.choice_noise, step.table_noise] * num_steps]

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure the number of records, then whatever is worst."""
        first, step, num_steps = self._plan(schema, noise_multiplier)
        shape = schema.shape
        grids = Grid.each(shape)
        smallest = measuring(grids, [(int(np.argmin(shape)),)])
        noisy = yield smallest.query("total", noise_multiplier=first, max_norm=max_norm)
        return (
            yield from search(
                schema,
                smallest.measured(noisy),
                [step] * num_steps,
                by_exponential_mechanism(max_norm),
                workload=Workload.all_ways(shape, self.ways).alike(),
                max_norm=max_norm,
                is_penalized=False,
            )
        )

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each table asked for."""
        return cells_of(query, shard)

    def _plan(self, schema: Schema, noise_multiplier: float) -> tuple[float, Step, int]:
        """Noise multiplier of the first round, the step, and how often it is done."""
        num_steps = len(schema.columns) if self.num_steps is None else self.num_steps
        share = (1 - self.total_share) / num_steps
        step = Step(
            choice_noise=noise_multiplier / math.sqrt(share * self.choice_share),
            table_noise=noise_multiplier / math.sqrt(share * (1 - self.choice_share)),
            max_cells=max_cells_of(self.max_model_mb),
        )
        return noise_multiplier / math.sqrt(self.total_share), step, num_steps

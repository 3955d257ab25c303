# SPDX-License-Identifier: Apache-2.0
"""What a person wants to know when a run is done: quality, promise, and where the release lies.

In a simulation the real records are at hand, so the release is compared with them exactly. Those
figures are for whoever owns the records; nothing of them goes into the release.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..client.unread import Unread
from ..core.accounting import largest_odds
from ..core.card import Card
from ..core.config import RunConfig
from ..core.seeds import sample_rng
from ..server.ledger import Ledger, Population
from ..server.release import Release
from .plan import TRUST, worst_odds
from .quality import Quality, column_variation, quality_of
from .run import population_of


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
      folder: Its release.
      card: Its card.
      population: How much of the population's budget is spent.
      quality: Exact distance to the real records, where they are at hand; site only.
      by_column: Total variation distance of each column, the largest first; site only.
      unread: What of a column's real values has no cell, where some have none; site only. The
        distances take such values for missing ones.
      num_users: Users in the real records, where they are at hand; site only.
      num_declared: Users that the run's file declares at least.
    """

    folder: Path
    card: Card
    population: Population
    quality: Quality | None
    by_column: dict[str, float]
    unread: tuple[Unread, ...] = ()
    num_users: int | None = None
    num_declared: int = 1

    @property
    def too_few(self) -> str:
        """That there are fewer users than declared, if so; site only."""
        if self.num_users is None or self.num_users >= self.num_declared:
            return ""
        return (
            f"fewer users than declared: {self.num_users:,}, and population.num_users ="
            f" {self.num_declared:,} is to be a lower bound. The plan expected"
            f" {self.num_declared / max(1, self.num_users):,.3g} times the signal that there was"
        )

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The promise and the release as labelled lines."""
        card, spent = self.card, self.population
        unit = "each record" if card.unit.column is None else f"each user of {card.unit.column}"
        what = "record" if card.unit.column is None else "user"
        lines = [
            (
                "Promise",
                f"(epsilon {card.epsilon:.4g}, delta {card.delta:g}) for {unit},"
                f" {card.unit.relation.value}",
            ),
            (
                "In words",
                f"someone who thinks it 50 % likely that a {what} is in the data could at the very"
                f" worst move to {worst_odds(largest_odds(card.epsilon))}",
            ),
            ("Trust", TRUST[card.placement]),
            (
                "Spent",
                f"{spent.epsilon:.2f} of {spent.cap.epsilon:.2f} on {spent.name},"
                f" {max(0.0, spent.cap.epsilon - spent.epsilon):.2f} left",
            ),
            ("Release", f"{self.folder}  ({card.num_records:,} synthetic records in data/)"),
        ]
        if not card.noise_is_secret:
            lines.insert(0, ("NOT PRIVATE", "the noise came from a test stream"))
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data for other programs."""
        return {
            "release": str(self.folder),
            "run": self.card.run,
            "epsilon": self.card.epsilon,
            "delta": self.card.delta,
            "unit": asdict(self.card.unit),
            "placement": self.card.placement.value,
            "num_records": self.card.num_records,
            "noise_is_secret": self.card.noise_is_secret,
            "population": {
                "name": self.population.name,
                "spent": self.population.epsilon,
                "cap": self.population.cap.epsilon,
                "delta": self.population.cap.delta,
            },
            "site_only": None
            if self.quality is None
            else {
                "total_variation": self.quality.total_variation,
                "total_variation_by_column": self.by_column,
                "unread_by_column": {u.column.name: u.share for u in self.unread},
                "num_users": self.num_users,
                "num_users_declared": self.num_declared,
            },
        }


def finished(folder: Path, config: RunConfig) -> Finished:
    """What there is to say of a run whose release lies in `folder`.

    Privacy:
      Where the engine is a simulation, `quality`, `by_column`, `unread` and `num_users` are exact
      functions of private records. They stay with whoever runs the simulation and so holds those
      records.
    """
    release = Release.open(folder)
    with Ledger(config.path(config.ledger)) as ledger:
        name = config.population.name
        population = next(p for p in ledger.populations() if p.name == name)
    quality, by_column = None, {}
    unread: tuple[Unread, ...] = ()
    num_users: int | None = None
    schema = release.synthesizer.schema
    if config.engine.kind != "superlink" and config.data.path is not None:
        shard = population_of(config, schema)
        real, num_users = shard.records, len(np.unique(shard.user_ids))
        unread = tuple(column for column in shard.unread if column.num_unread)
        if len(real) and schema.columns:
            synthetic = release.synthesizer.sample(
                release.card.num_records, sample_rng(release.card.seed)
            )
            quality = quality_of(real, synthetic, schema, orders=(1, 2))
            by_column = column_variation(real, synthetic, schema)
    return Finished(
        folder,
        release.card,
        population,
        quality,
        by_column,
        unread,
        num_users=num_users,
        num_declared=config.population.num_users,
    )

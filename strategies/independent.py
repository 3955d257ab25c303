# SPDX-License-Identifier: Apache-2.0
"""Independent columns: measure every column's histogram once, sample each column by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, Query, Rounds
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from .parts.histograms import norm_clip
from .parts.measuring import MarginalStrategy
from .parts.rounding import rounded_cells
from .parts.simplex import pooled_total, to_simplex


@dataclass(frozen=True)
class Independent(MarginalStrategy):
    """One query: the histograms of all columns, laid end to end.

    Privacy:
      A record lights one cell in each of K columns, so it has the norm sqrt(K). A user's records
      are summed and clipped at `max_norm * sqrt(K)`.
    """

    name: ClassVar[str] = "independent"
    norm_ways: ClassVar[int] = 1

    def check(self) -> None:
        """There is nothing else to set."""

    def noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """That of the one sum."""
        return (noise_multiplier,)

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Ask once, bring each histogram to the simplex."""
        noisy = yield Query(
            "histograms",
            dim=schema.num_cells,
            clip=norm_clip(np.ones(len(schema.columns)), max_norm),
            noise_multiplier=noise_multiplier,
            inputs={"offsets": schema.offsets[:-1]},
            cells=True,
        )
        histograms = np.split(noisy.vector, schema.offsets[1:-1])
        total = pooled_total((counts, noisy.stddev) for counts in histograms)
        probs = [to_simplex(counts, total) for counts in histograms]
        return Columns(schema, tuple(p / p.sum() for p in probs))

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each column."""
        cells = shard.records.codes + query.inputs["offsets"]
        return Contribution.cells(cells, shard.user_index, num_users=shard.num_users)


@dataclass(frozen=True)
class Columns(Synthesizer):
    """Columns that know nothing of each other.

    Attributes:
      schema: Schema of the records.
      probs: Probability of each cell, one array a column.
    """

    schema: Schema
    probs: tuple[NDArray[np.float64], ...]
    kind: ClassVar[str] = "columns"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records whose columns hold each cell as often as expected, give or take one."""
        codes = np.empty((num_records, len(self.probs)), dtype=np.int32)
        for column, probs in enumerate(self.probs):
            codes[:, column] = rng.permutation(rounded_cells(probs, num_records, rng))
        return Records(codes)

    def settings(self) -> dict[str, Any]:
        """Nothing: all it knows are arrays."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All probabilities, laid end to end."""
        return {"probs": np.concatenate(self.probs)}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: The arrays are not those of a `Columns` of this schema.
        """
        return cls(schema, split_probs(schema, tensors.get("probs", np.zeros(0))))


def split_probs(schema: Schema, flat: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
    """Saved probabilities by column, after checks.

    Raises:
      ConfigError: They are not one distribution for each column.
    """
    probs = np.asarray(flat, dtype=np.float64)
    if probs.shape != (schema.num_cells,) or not (probs >= 0).all():
        raise ConfigError("a saved synthesizer whose probabilities do not fit the schema")
    parts = tuple(np.split(probs, schema.offsets[1:-1]))
    if not all(abs(part.sum() - 1) < 1e-6 for part in parts):
        raise ConfigError("a saved synthesizer with probabilities that do not add up to one")
    return parts

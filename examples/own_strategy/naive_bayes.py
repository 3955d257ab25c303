# SPDX-License-Identifier: Apache-2.0
"""A strategy of your own: each column's histogram within each class, sampled class by class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from dp_accounting.dp_event import DpEvent, GaussianDpEvent
from fedsynth.core.errors import ConfigError
from fedsynth.core.query import Contribution, Query, Rounds, Strategy
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema
from fedsynth.core.synthesizer import Synthesizer
from numpy.typing import NDArray


@dataclass(frozen=True)
class NaiveBayes(Strategy):
    """One query: for every class, the histogram of every column.

    What a classifier needs and no more: how each column goes with the class, and nothing of how
    columns go with each other.

    Attributes:
      max_norm: L2 bound of a user, in units of one record's norm.
    """

    max_norm: float = 1.0
    name: ClassVar[str] = "naive_bayes"

    def event(self, schema: Schema, noise_multiplier: float) -> DpEvent:
        """One Gaussian sum."""
        if schema.target is None or schema.image is not None:
            raise ConfigError("naive_bayes learns tables, and needs the schema to name a target")
        return GaussianDpEvent(noise_multiplier)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Ask for all histograms at once; what is below zero is noise."""
        self.event(schema, noise_multiplier)
        target = schema.index(schema.target or "")
        num_classes = schema.shape[target]
        noisy = yield Query(
            "histograms",
            dim=num_classes * schema.num_cells,
            # a record lights one cell a column; a hair more, for rounding
            clip=self.max_norm * len(schema.columns) ** 0.5 * (1 + 2**-40),
            noise_multiplier=noise_multiplier,
            inputs={"offsets": schema.offsets, "target": np.array([target])},
            cells=True,
        )
        counts = np.maximum(noisy.vector, 0).reshape(num_classes, schema.num_cells)
        return Classes(schema, counts + 1e-3)  # never empty, so a void round gives equal shares

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record's class and code, in each column."""
        offsets, target = query.inputs["offsets"], int(query.inputs["target"][0])
        classes = shard.records.codes[:, target].astype(np.int64)
        cells = classes[:, None] * offsets[-1] + offsets[:-1] + shard.records.codes
        return Contribution.cells(cells, shard.user_index, num_users=shard.num_users)


@dataclass(frozen=True)
class Classes(Synthesizer):
    """Columns that are independent within each class of the target."""

    schema: Schema
    counts: NDArray[np.float64]  # (num_classes, num_cells), > 0
    kind: ClassVar[str] = "classes"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Draw a class, then every other column from that class's histogram."""
        target = self.schema.index(self.schema.target or "")
        by_column = np.split(self.counts, self.schema.offsets[1:-1], axis=1)
        sizes = by_column[target].diagonal()
        classes = rng.choice(len(sizes), size=num_records, p=sizes / sizes.sum())
        codes = np.empty((num_records, len(by_column)), dtype=np.int32)
        for c in range(len(sizes)):
            rows = np.flatnonzero(classes == c)
            for column, counts in enumerate(by_column):
                probs = counts[c] / counts[c].sum()
                codes[rows, column] = rng.choice(len(probs), size=len(rows), p=probs)
        codes[:, target] = classes
        return Records(codes)

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All it knows."""
        return {"counts": self.counts}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """From a release folder."""
        return cls(schema, tensors["counts"])

# SPDX-License-Identifier: Apache-2.0
"""What a whole run asks of a public model, known before it is asked anything."""

from dataclasses import dataclass

from ..core.generation import Subject
from ..core.query import Strategy
from ..core.schema import Schema
from .variation import Estimate, VariationModel


@dataclass(frozen=True)
class Workload:
    """Candidates that a run has a model propose and vary.

    Attributes:
      model: The model.
      subject: What they are of.
      num_candidates: How many at most, each time that one is made anew counted.
    """

    model: VariationModel
    subject: Subject
    num_candidates: int

    @property
    def estimate(self) -> Estimate:
        """About what that takes."""
        return self.model.estimate(self.num_candidates, self.subject)


def workload_of(strategy: Strategy, schema: Schema) -> Workload | None:
    """What a strategy asks of a public model; `None` for one that asks none."""
    found = getattr(strategy, "workload", None)
    return None if found is None else found(schema)

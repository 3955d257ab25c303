# SPDX-License-Identifier: Apache-2.0
"""Seeds that users voted for, and what a public model wrote after them, to sample from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.candidates import Candidates
from ...core.errors import ConfigError, DataError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .rounding import rounded_cells


@dataclass(frozen=True, eq=False)
class Expanded(Synthesizer):
    """Weighted seeds and expansions, with whom each came from.

    Attributes:
      schema: Schema of the records.
      candidates: The seeds, then the expansions.
      weights: Probability of each, `(num_candidates,)`.
      rounds: Of a seed: the round of votes that it was the first to survive, from 1, or 0 where no
        votes were heard at all. Of an expansion: -1. `(num_candidates,)`, int32.
      sources: Of a seed: the seed that it was varied from, in the first place. Of an expansion: the
        seeds that the model was shown. Positions, or -1 for none; `(num_candidates, any)`, int32.
      model: What made the texts.
      model_settings: Its settings.
    """

    schema: Schema
    candidates: Candidates
    weights: NDArray[np.float64]
    rounds: NDArray[np.int32]
    sources: NDArray[np.int32]
    model: str
    model_settings: dict[str, Any]
    kind: ClassVar[str] = "expanded"

    @property
    def num_seeds(self) -> int:
        """How many of the candidates are seeds."""
        return int((self.rounds >= 0).sum())

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Candidates, each as often as its weight says, give or take one."""
        chosen = self.candidates.take(
            rng.permutation(rounded_cells(self.weights, num_records, rng))
        )
        return Records(chosen.codes, texts=chosen.texts)

    def settings(self) -> dict[str, Any]:
        """What made the texts."""
        return {"model": self.model, "model_settings": self.model_settings}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The candidates, their weights and whom they came from."""
        return {
            **self.candidates.tensors(),
            "weights": self.weights,
            "rounds": self.rounds,
            "sources": self.sources,
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """What was saved.

        Raises:
          ConfigError: The arrays are not those of seeds and expansions of this schema.
        """
        model, given = settings.get("model"), settings.get("model_settings")
        try:
            candidates = Candidates.restore(schema, tensors)
            weights, rounds, sources = (tensors[k] for k in ("weights", "rounds", "sources"))
        except (DataError, KeyError) as error:
            raise ConfigError(f"saved seeds that do not fit the schema: {error}") from error
        num = len(candidates)
        if not (
            num
            and weights.shape == rounds.shape == (num,)
            and weights.dtype == np.float64
            and (weights >= 0).all()
            and abs(float(weights.sum()) - 1) < 1e-6
            and rounds.dtype == sources.dtype == np.int32
            and (rounds >= -1).all()
            and (np.diff((rounds >= 0).astype(np.int8)) <= 0).all()  # seeds come first
            and sources.ndim == 2
            and len(sources) == num
            and ((sources >= -1) & (sources < max(1, int((rounds >= 0).sum())))).all()
            and isinstance(model, str)
            and isinstance(given, dict)
        ):
            raise ConfigError("saved seeds whose arrays or settings do not fit the schema")
        return cls(
            schema=schema,
            candidates=candidates,
            weights=weights,
            rounds=rounds,
            sources=sources,
            model=model,
            model_settings=given,
        )

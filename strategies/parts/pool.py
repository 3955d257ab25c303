# SPDX-License-Identifier: Apache-2.0
"""A pool of weighted candidates, to sample from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.candidates import Candidates
from ...core.errors import ConfigError, DataError
from ...core.generation import Subject
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from ...models.registry import build_model
from .distances import Curve
from .rounding import rounded_cells

_DISTANCES = "distances"
_SAMPLED_AT_ONCE = 4096  # images drawn at a time


@dataclass(frozen=True, eq=False)
class Pool(Synthesizer):
    """Weighted candidates.

    Attributes:
      schema: Schema of the records.
      candidates: The last round's pool.
      weights: Probability of each candidate, `(num_candidates,)`.
      lineage: Whom each candidate came from: `lineage[t, i]` is the position, in the pool of
        round t, of the parent of candidate i of round t + 1, `(num_rounds - 1, num_candidates)`.
      label: Column whose category a candidate was made for, or -1.
      model: What made the images or texts.
      model_settings: Its settings.
      sample_degree: How far an image is varied when it is sampled.
      curve: How near the pools came to users who judged; `None`: nobody did.
    """

    schema: Schema
    candidates: Candidates
    weights: NDArray[np.float64]
    lineage: NDArray[np.int32]
    label: int
    model: str
    model_settings: dict[str, Any]
    sample_degree: float
    curve: Curve | None = None
    kind: ClassVar[str] = "pool"

    @property
    def origins(self) -> NDArray[np.int64]:
        """Position in the first pool of each candidate's ancestor, `(num_candidates,)`."""
        origin = np.arange(len(self.candidates))
        for parents in self.lineage[::-1]:
            origin = parents[origin]
        return origin.astype(np.int64)

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Candidates, each as often as its weight says, give or take one; images vary.

        Raises:
          ConfigError: Images are to vary by a model that takes them from a file or elsewhere. No
            run leaves it so; a saved pool that does would have its reader's files read.
        """
        drawn = rng.permutation(rounded_cells(self.weights, num_records, rng))
        if self.candidates.images is None or not self.sample_degree:
            chosen = self.candidates.take(drawn)
            return Records(chosen.codes, chosen.images, texts=chosen.texts)
        model = build_model(self.model, self.model_settings)
        if not model.capabilities().is_exact:
            raise ConfigError(
                f"a pool whose images are to vary by model {self.model!r}, which is not asked again"
                " once a run is over; nothing was sampled"
            )
        subject = Subject(self.schema, self.label)
        images = np.empty((num_records, *self.candidates.images.shape[1:]), dtype=np.uint8)
        for start in range(0, num_records, _SAMPLED_AT_ONCE):
            part = self.candidates.take(drawn[start : start + _SAMPLED_AT_ONCE])
            varied = model.vary(part, self.sample_degree, subject, rng).images
            if varied is not None:
                images[start : start + _SAMPLED_AT_ONCE] = varied
        return Records(self.candidates.codes[drawn], images)

    @property
    def findings(self) -> tuple[str, ...]:
        """How near the pools came to users, where some judged."""
        return () if self.curve is None else self.curve.told

    def settings(self) -> dict[str, Any]:
        """What made the candidates, and how far they vary."""
        return {
            "label": self.label,
            "model": self.model,
            "model_settings": self.model_settings,
            "sample_degree": self.sample_degree,
            **({} if self.curve is None else {"curve": self.curve.settings()}),
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The candidates, their weights and their lineage."""
        return {
            **self.candidates.tensors(),
            "weights": self.weights,
            "lineage": self.lineage,
            **({} if self.curve is None else {_DISTANCES: self.curve.readings}),
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The pool that was saved.

        Raises:
          ConfigError: The arrays are not those of a pool of this schema.
        """
        model, degree, label = (settings.get(k) for k in ("model", "sample_degree", "label"))
        given, curve = settings.get("model_settings"), settings.get("curve")
        try:
            candidates = Candidates.restore(schema, tensors)
            weights, lineage = tensors["weights"], tensors["lineage"]
        except (DataError, KeyError) as error:
            raise ConfigError(f"a saved pool that does not fit the schema: {error}") from error
        num = len(candidates)
        if not (
            num
            and weights.shape == (num,)
            and weights.dtype == np.float64
            and lineage.shape == (len(lineage), num)
            and lineage.dtype == np.int32
            and (weights >= 0).all()
            and abs(float(weights.sum()) - 1) < 1e-6
            and ((lineage >= 0) & (lineage < num)).all()
            and isinstance(degree, int | float)
            and 0 <= degree <= 1
            and isinstance(model, str)
            and ":" not in model  # never import a module because a file names it
            and isinstance(given, dict)
            and isinstance(curve, dict | None)
            and isinstance(label, int)
            and -1 <= label < len(schema.columns)
        ):
            raise ConfigError("a saved pool whose arrays or settings do not fit the schema")
        return cls(
            schema=schema,
            candidates=candidates,
            weights=weights,
            lineage=lineage,
            label=label,
            model=model,
            model_settings=given,
            sample_degree=float(degree),
            curve=None if curve is None else Curve.restore(curve, tensors.get(_DISTANCES)),
        )

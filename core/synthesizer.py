# SPDX-License-Identifier: Apache-2.0
"""What a run learns: something to sample from, saved as JSON and plain arrays."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from .enforce import keeping
from .records import Family, Records
from .schema import Schema


class Synthesizer(ABC):
    """A learned generator of records. Sampling is post-processing: it costs no privacy.

    Whoever writes one need not think of the schema's constraints: `sample` is wrapped so that
    every record keeps them, see `core.enforce`.

    Attributes:
      kind: Name under which it is saved and found again.
      schema: Public schema of the records it makes.
      family: How its records are laid out as two tables, for one that makes users with their
        records (`Records.owners`); `None`: they are one table.
    """

    kind: ClassVar[str]
    schema: Schema
    family: Family | None = None

    @property
    def findings(self) -> tuple[str, ...]:
        """What the run found out about these records under its own budget, for the card to say.

        Plain sentences, post-processing of noisy sums alone; none for most.
        """
        return ()

    def __init_subclass__(cls, **settings: Any) -> None:
        """Have the constraints kept by the `sample` that a class brings."""
        super().__init_subclass__(**settings)
        if "sample" in cls.__dict__:
            cls.sample = keeping(cls.__dict__["sample"])  # type: ignore[method-assign,assignment]

    @abstractmethod
    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """`num_records` synthetic records; the same `rng` gives the same records."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything but the schema and the arrays, as plain JSON data."""

    @abstractmethod
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays, saved as safetensors."""

    @classmethod
    @abstractmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that `settings` and `tensors` were saved from."""

# SPDX-License-Identifier: Apache-2.0
"""Public embeddings of single records, in whole numbers: what nearness is measured by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

STEPS = 1 << 11
"""Steps of an embedding's unit: products of two of length one are exact in float32."""


class Embedder(ABC):
    """A public model that places a record in a space where near means alike.

    A frozen dataclass whose fields are its settings. All clients of a run and its server must have
    the same one: another rounding of the same weights already moves one vote in ten.

    Attributes:
      name: Under which it is found.
      modality: What it places.
    """

    name: ClassVar[str]
    modality: ClassVar[Literal["text", "image"]]

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of an embedding."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of all that the embeddings depend on."""

    @abstractmethod
    def embed(self, records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of length one, `(num_records, dim)`; zeros for a record that has none.

        Args:
          records: Texts, or images `(num_records, height, width, channels)`.

        Privacy:
          A record's embedding must not depend, to the last bit, on which others are embedded with
          it: one at a time, never padded in a batch.
        """


def whole(embeddings: NDArray[np.float32]) -> NDArray[np.int16]:
    """Embeddings in whole steps, `(num_records, dim)`; what is not finite becomes zeros."""
    fine = np.isfinite(embeddings).all(axis=1, keepdims=True)
    steps = np.rint(np.where(fine, embeddings, 0.0) * STEPS)
    whole_steps: NDArray[np.int16] = np.clip(steps, -STEPS, STEPS).astype(np.int16)
    return whole_steps

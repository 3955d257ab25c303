# SPDX-License-Identifier: Apache-2.0
"""Public embeddings of single records, in whole numbers: what nearness is measured by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

EMBEDDER = "embedder"
"""Input of a query that needs records placed: the fingerprint of what placed the candidates."""

STEPS = 1 << 11
"""Steps of an embedding's unit: products of two of length one are exact in float32."""

MOST_SQUARED = round(1.04 * STEPS**2)
"""No embedding in whole steps has a larger squared length: one unit, and what rounding adds."""


class Embedder(ABC):
    """A public model that places a record in a space where near means alike.

    A frozen dataclass whose fields are its settings. All clients of a run and its server must have
    the same one: a copy with weights of eight bits already moves one vote in ten.

    Attributes:
      name: Under which it is found.
      modality: What it places.
      paths: Settings that name files of this machine; a client takes none of them from a server.
    """

    name: ClassVar[str]
    modality: ClassVar[Literal["text", "image"]]
    paths: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of an embedding."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of all that the embeddings depend on."""

    @abstractmethod
    def embed(self, records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of length one at most, `(num_records, dim)`; near means alike.

        Zeros stand for a record that has none, as an empty text; it takes no part in votes.

        Args:
          records: Texts, or images `(num_records, height, width, channels)`.

        Privacy:
          A record's embedding must not depend, to the last bit, on which others are embedded with
          it: one at a time, never padded in a batch.
        """


def whole(embeddings: NDArray[np.floating]) -> NDArray[np.int16]:
    """Embeddings in whole steps, `(num_records, dim)`, each no longer than about one unit.

    A longer one is scaled down; what is not finite becomes zeros.
    """
    fine = np.isfinite(embeddings).all(axis=1, keepdims=True)
    plain = np.where(fine, embeddings, 0.0).astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", plain, plain))[:, None]
    steps = np.rint(plain / np.maximum(lengths, 1.0) * STEPS)
    whole_steps: NDArray[np.int16] = np.clip(steps, -STEPS, STEPS).astype(np.int16)
    return whole_steps

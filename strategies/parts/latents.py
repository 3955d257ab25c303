# SPDX-License-Identifier: Apache-2.0
"""Images that a public decoder makes of latent numbers, with labels in their shares."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .codec import Codec, Start, codec_for
from .rounding import rounded_cells


@dataclass(frozen=True)
class Latents(Synthesizer):
    """Latent numbers of each label, by its mean and a root of its covariance.

    Attributes:
      schema: Schema of the records: an image and at most one category.
      label: Position of the label column, or -1.
      start: Which code the latent numbers are of.
      shares: Share of each label, `(num_labels,)`.
      means: Of each label, `(num_labels, num_latents)`.
      roots: What makes a label's variation of noise, `(num_labels, num_latents, num_latents)`.
    """

    schema: Schema
    label: int
    start: Start
    shares: NDArray[np.float64]
    means: NDArray[np.float32]
    roots: NDArray[np.float32]
    at_once: ClassVar[int]  # records sampled at a time

    @abstractmethod
    def drawn(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """Latent numbers of records with these labels, `(num_records, num_latents)`."""

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records, drawn some thousands at a time."""
        image = self.schema.image
        codec = _codec(self.start, self.schema)
        labels = rng.permutation(rounded_cells(self.shares, num_records, rng)).astype(np.int64)
        images = np.zeros((num_records, *(image.shape if image else ())), dtype=np.uint8)
        for first in range(0, num_records, self.at_once):
            part = slice(first, min(first + self.at_once, num_records))
            images[part] = codec.decoded(self.drawn(labels[part], rng))
        codes = np.zeros((num_records, len(self.schema.columns)), dtype=np.int32)
        if self.label >= 0:
            codes[:, self.label] = labels
        return Records(codes, images)

    def settings(self) -> dict[str, Any]:
        """The label's position and the code."""
        return {"label": self.label, "start": self.start}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Shares, means and roots."""
        return {"shares": self.shares, "means": self.means, "roots": self.roots}


def saved_code(schema: Schema, settings: Mapping[str, Any]) -> tuple[int, Start, Codec]:
    """Position of the label column, and the code, of saved `Latents`.

    Raises:
      ConfigError: The settings are none of theirs.
    """
    label, start = settings.get("label"), settings.get("start")
    if (
        not isinstance(label, int)
        or not -1 <= label < len(schema.columns)
        or (start != "handwriting" and start != "scratch")
    ):
        raise ConfigError("a saved generator of latent numbers whose settings are none of its own")
    return label, start, _codec(start, schema)


def saved_moments(
    schema: Schema,
    label: int,
    codec: Codec,
    tensors: Mapping[str, NDArray[Any]],
    *,
    beside: Mapping[str, tuple[int, ...]],
    largest: float,
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Shares, means and roots of saved `Latents`.

    Args:
      schema: Schema of the records.
      label: Position of the label column, or -1.
      codec: The code of the latent numbers.
      tensors: What was saved.
      beside: Shapes of the other arrays.
      largest: Of all numbers, by size.

    Raises:
      ConfigError: The arrays do not fit the schema, or each other.
    """
    num_labels, size = schema.shape[label] if label >= 0 else 1, codec.num_latents
    expected = {
        "shares": (num_labels,),
        "means": (num_labels, size),
        "roots": (num_labels, size, size),
        **beside,
    }
    found = {name: array.shape for name, array in tensors.items()}
    if found != expected or not all((np.abs(a) <= largest).all() for a in tensors.values()):
        raise ConfigError("a saved generator of latent numbers whose arrays do not fit the schema")
    shares = np.asarray(tensors["shares"], dtype=np.float64)
    if not ((shares >= 0).all() and abs(shares.sum() - 1) < 1e-6):
        raise ConfigError("a saved generator of latent numbers whose shares do not add up to one")
    means, roots = (np.asarray(tensors[key], dtype=np.float32) for key in ("means", "roots"))
    return shares, means, roots


def _codec(start: Start, schema: Schema) -> Codec:
    """The code that a schema's images are seen by."""
    return codec_for(start, schema.image.shape if schema.image else None)

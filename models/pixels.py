# SPDX-License-Identifier: Apache-2.0
"""Pooled pixels as an embedding of images: exact on every machine, without any weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.embedding import STEPS, Embedder
from ..core.errors import ConfigError

_VERSION = "1"  # of what this file computes; a change of any embedding needs another
_SIDE = 14  # images are averaged down to at most this many pixels a side


@dataclass(frozen=True)
class Pixels(Embedder):
    """Images blurred by 1-2-1 both ways and averaged over blocks, to at most 14 pixels a side.

    Small shifts of a line cost little. Black is below zero and white as far above it, so that no
    image has zeros. The squared distance of two embeddings is the mean squared difference of
    their pooled pixels, up to a constant; of length one are only pictures in black and white, all
    others are shorter. In whole steps nothing is rounded: equal images have equal embeddings
    everywhere.

    For lines and letters this is better than the features of a network that was trained on
    photographs; for photographs it is much worse.

    Attributes:
      shape: `(height, width, channels)` of the images.
    """

    shape: tuple[int, int, int]
    name: ClassVar[str] = "pixels"
    modality: ClassVar[Literal["text", "image"]] = "image"

    def __post_init__(self) -> None:
        """Refuse shapes that no image has."""
        sizes = tuple(self.shape)
        if len(sizes) != 3 or not all(isinstance(n, int) and n >= 1 for n in sizes):
            raise ConfigError(f"shape must be (height, width, channels), not {self.shape!r}")
        object.__setattr__(self, "shape", sizes)  # a run file has lists only
        if self._levels < 1:
            raise ConfigError(f"pixels takes images of at most 21,000 channels, not {sizes[2]:,}")

    @property
    def dim(self) -> int:
        """Pooled pixels times channels."""
        height, width, channels = self.shape
        rows, columns = -(-height // _SIDE), -(-width // _SIDE)
        return -(-height // rows) * -(-width // columns) * channels

    def fingerprint(self) -> str:
        """SHA-256 of the shape and this file's version."""
        whole = {"code": f"{self.name} {_VERSION}", "shape": self.shape}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def embed(self, records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings in whole steps, of length one or less, `(num_images, dim)`.

        Args:
          records: Images, `(num_images, height, width, channels)`, of the declared shape.

        Raises:
          ConfigError: They are not.
        """
        if not isinstance(records, np.ndarray) or records.dtype != np.uint8:
            raise ConfigError("pixels embeds uint8 images; take an embedder of texts for texts")
        if records.shape[1:] != self.shape:
            raise ConfigError(
                f"pixels was set up for images of shape {self.shape}, not {records.shape[1:]}"
            )
        sums, white = pooled(records)
        levels = (sums * self._levels + white // 2) // white
        return ((2 * levels - self._levels) / STEPS).astype(np.float32).reshape(len(records), -1)

    @property
    def _levels(self) -> int:
        """Steps from black to white, two apart: an odd number, so that none lies at zero."""
        return (isqrt(STEPS**2 // self.dim) + 1) // 2 * 2 - 1


def pooled(images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int]:
    """Images blurred by 1-2-1 both ways and summed over blocks; and what white sums to.

    A fixed public embedding, `(num_images, rows, columns, channels)` with at most 14 rows and
    columns: small shifts of a line cost little.
    """
    num, height, width, channels = images.shape
    rows, columns = -(-height // _SIDE), -(-width // _SIDE)
    bordered = np.pad(
        images.astype(np.int32),
        ((0, 0), (1, 1 + -height % rows), (1, 1 + -width % columns), (0, 0)),
    )
    down = bordered[:, :-2] + 2 * bordered[:, 1:-1] + bordered[:, 2:]
    blurred = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    blocks = blurred.reshape(
        num, blurred.shape[1] // rows, rows, blurred.shape[2] // columns, columns, channels
    )
    return blocks.sum(axis=(2, 4), dtype=np.int64), 16 * 255 * rows * columns

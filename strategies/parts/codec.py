# SPDX-License-Identifier: Apache-2.0
"""Images as a few numbers and back, by what is public alone: a learned code, or cosines."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...models import handwriting

Start = Literal["handwriting", "scratch"]
STEPS = 1 << 8  # of one, in which latent numbers are whole
FARTHEST = 16  # a latent number further out counts as this
_BASIS_STEPS = 1 << 12
_SPREAD = 0.3  # of a pixel around middle gray, and
_REACH = 3.0  # how many pixels it is alike over, in images that nothing is known of
_MOST_SIDE = 8  # frequencies along a side


class Codec(ABC):
    """Latent numbers of images, each image's from that image alone, to the last bit."""

    @property
    @abstractmethod
    def num_latents(self) -> int:
        """Numbers that say an image."""

    @abstractmethod
    def encoded(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """In steps of 1 / 256, `(num_images, num_latents)`; records of a class vary by about 1."""

    @abstractmethod
    def decoded(self, latent: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Images, `(num_images, height, width, channels)`."""

    @abstractmethod
    def covariance(self) -> NDArray[np.float64]:
        """What is publicly thought of records of any class, `(num_latents, num_latents)`."""

    @abstractmethod
    def denoiser(self) -> Mapping[str, NDArray[np.float32]] | None:
        """Weights of a denoiser that public data taught; `None`: there is none."""

    @abstractmethod
    def digest(self) -> NDArray[np.uint8]:
        """What tells this code from another, `(32,)`."""


def codec_for(start: Start, image: tuple[int, int, int] | None) -> Codec:
    """The code of a kind for images of a shape.

    Raises:
      ConfigError: There is none.
    """
    if image is None:
        raise ConfigError(
            "dp_diffusion makes images, and the schema has no image column; for tables take"
            " marginals, dp_merf or dp_fedavg"
        )
    if start == "scratch":
        return Cosines(image)
    shape = (handwriting.SIDE, handwriting.SIDE, 1)
    if image != shape:
        raise ConfigError(
            f"start = 'handwriting' was learned on images of shape {shape}, and the schema's are"
            f" {image}; scale them to that size, or take start = 'scratch'"
        )
    return Handwriting()


@dataclass(frozen=True)
class Handwriting(Codec):
    """The autoencoder of public scripts, and the denoiser that learned from them.

    Attributes:
      contrast: By how much the edges of lines are harder than the decoder has them.
    """

    contrast: float = 2.5

    @property
    def num_latents(self) -> int:
        """As many as the autoencoder uses."""
        return handwriting.num_latents()

    def encoded(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The encoder's numbers."""
        return handwriting.encoded(images)

    def decoded(self, latent: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The decoder's images."""
        return handwriting.decoded(latent, self.contrast)

    def covariance(self) -> NDArray[np.float64]:
        """Of all characters: that within one, and that between them."""
        return np.eye(self.num_latents) + handwriting.between()

    def denoiser(self) -> Mapping[str, NDArray[np.float32]]:
        """The denoiser of public scripts."""
        return handwriting.denoiser()

    def digest(self) -> NDArray[np.uint8]:
        """Of the file of weights."""
        return np.frombuffer(handwriting.digest(), dtype=np.uint8)


@dataclass(frozen=True)
class Cosines(Codec):
    """The lowest frequencies of an image: a code that nothing was learned for.

    Attributes:
      image: `(height, width, channels)`.
    """

    image: tuple[int, int, int]

    @property
    def num_latents(self) -> int:
        """At most eight frequencies along each side, in each channel."""
        height, width, channels = self.image
        return min(height, _MOST_SIDE) * min(width, _MOST_SIDE) * channels

    def encoded(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Each frequency, divided by what is expected of it."""
        basis, scales = _cosines(self.image)
        shades = (
            2.0 * images.reshape(len(images), math.prod(self.image)) - 255
        )  # whole numbers: sums are exact
        found = np.rint(shades @ basis * (STEPS / (510 * _BASIS_STEPS)) / scales)
        return np.clip(found, -FARTHEST * STEPS, FARTHEST * STEPS).astype(np.int64)

    def decoded(self, latent: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The frequencies added up."""
        basis, scales = _cosines(self.image)
        shades = 0.5 + (latent * scales) @ basis.T / _BASIS_STEPS
        return np.rint(255 * np.clip(shades, 0, 1)).astype(np.uint8).reshape(-1, *self.image)

    def covariance(self) -> NDArray[np.float64]:
        """One: the scales are what is expected."""
        return np.eye(self.num_latents)

    def denoiser(self) -> None:
        """Nothing was learned."""
        return

    def digest(self) -> NDArray[np.uint8]:
        """The shape says it all."""
        return np.zeros(32, dtype=np.uint8)


@lru_cache(maxsize=4)
def _cosines(
    image: tuple[int, int, int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An orthonormal basis in whole steps, `(num_pixels, num_latents)`, and expected sizes."""
    height, width, channels = image
    sides = [_waves(side) for side in (height, width)]
    planes = np.einsum("yi,xj->yxij", *sides)
    basis = np.einsum("yxij,cd->yxcijd", planes, np.eye(channels))
    falls = [
        1 / (1 + (math.pi * np.arange(min(side, _MOST_SIDE)) * _REACH / side) ** 2)
        for side in (height, width)
    ]
    expected = np.repeat(np.sqrt(np.outer(*falls)).ravel(), channels)
    scales = _SPREAD * 2 * _REACH * expected
    flat = basis.reshape(math.prod(image), -1)
    return np.rint(flat * _BASIS_STEPS), scales


def _waves(side: int) -> NDArray[np.float64]:
    """The lowest cosines over some pixels, each of norm one, `(side, num_waves)`."""
    at = (np.arange(side)[:, None] + 0.5) * math.pi / side
    waves = np.cos(at * np.arange(min(side, _MOST_SIDE)))
    return np.asarray(waves / np.linalg.norm(waves, axis=0))

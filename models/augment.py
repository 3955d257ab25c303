# SPDX-License-Identifier: Apache-2.0
"""Draw blobs of color, and augment images pixel by pixel."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.generation import Subject
from .variation import Capabilities, VariationModel, image_shape


@dataclass(frozen=True)
class ImageAugmenter(VariationModel):
    """Draws smooth blobs of color, and warps, mixes and brightens images pixel by pixel.

    Knows nothing of what the images show.
    """

    name: ClassVar[str] = "blobs"

    def capabilities(self) -> Capabilities:
        """Images, in this process."""
        return Capabilities("image")

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """Random blobs."""
        return replace(blank, images=_blobs(len(blank), image_shape(subject.schema), rng))

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """The images warped, mixed with blobs and brightened."""
        if candidates.images is None:
            raise ValueError("these candidates have no images")
        num, shape = len(candidates), image_shape(subject.schema)
        images = _warped(candidates.images.astype(np.float32), degree, rng)
        mixed = (degree * 0.5 * rng.random((num, 1, 1, 1))).astype(np.float32)
        images += mixed * (_blobs(num, shape, rng) - images)
        contrast = np.exp(degree * 0.4 * rng.normal(size=(num, 1, 1, 1)))
        brightness = degree * 30 * rng.normal(size=(num, 1, 1, shape[2]))
        grain = degree * 10 * rng.normal(size=images.shape)
        middle = images.mean(axis=(1, 2), keepdims=True)
        images = middle + (images - middle) * contrast + brightness + grain
        return replace(candidates, images=np.rint(np.clip(images, 0, 255)).astype(np.uint8))


def _blobs(num: int, shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random smooth images of every brightness, coarse and fine."""
    height, width, channels = shape
    field = np.zeros((num, height, width, channels), dtype=np.float32)
    for cells in (2, 3, 5):
        knots = rng.normal(size=(num, cells, cells, channels)).astype(np.float32)
        down = _hats(height, cells)
        across = _hats(width, cells)
        field += np.einsum("hi,nijc,wj->nhwc", down, knots, across, optimize=True) / cells**0.5
    middle = rng.uniform(-1, 1, (num, 1, 1, channels))
    return np.rint(255 / (1 + np.exp(-2.5 * (field + middle)))).astype(np.uint8)


def _warped(
    images: NDArray[np.float32], degree: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Images turned, scaled, moved and bent by a smooth field, with bilinear interpolation."""
    num, height, width, _ = images.shape
    turn = degree * 0.3 * rng.normal(size=num)
    scale = np.exp(degree * 0.2 * rng.normal(size=(num, 2)))
    shift = degree * 0.1 * rng.normal(size=(num, 2)) * (height, width)
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    cos, sin = (f(turn)[:, None, None] for f in (np.cos, np.sin))
    bend = degree * 0.05 * rng.normal(size=(num, 3, 3, 2)).astype(np.float32)
    field = np.einsum("hi,nijc,wj->nhwc", _hats(height, 3), bend, _hats(width, 3), optimize=True)
    at_y = (cos * y - sin * x) * scale[:, :1, None] + shift[:, :1, None] + field[..., 0] * height
    at_x = (sin * y + cos * x) * scale[:, 1:, None] + shift[:, 1:, None] + field[..., 1] * width
    at_y = np.clip(at_y + (height - 1) / 2, 0, height - 1)
    at_x = np.clip(at_x + (width - 1) / 2, 0, width - 1)
    top, left = np.floor(at_y).astype(np.int64), np.floor(at_x).astype(np.int64)
    low, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    dy, dx = (at_y - top)[..., None], (at_x - left)[..., None]
    n = np.arange(num)[:, None, None]
    warped = (1 - dy) * ((1 - dx) * images[n, top, left] + dx * images[n, top, right]) + dy * (
        (1 - dx) * images[n, low, left] + dx * images[n, low, right]
    )
    return np.asarray(warped, dtype=np.float32)


def _hats(size: int, cells: int) -> NDArray[np.float32]:
    """Weights that interpolate `cells` knots to `size` places, smoothly, `(size, cells)`."""
    at = np.linspace(0, cells - 1, size)
    near = np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, 1)
    smooth = near**2 * (3 - 2 * near)
    return np.asarray(smooth / smooth.sum(axis=1, keepdims=True), dtype=np.float32)

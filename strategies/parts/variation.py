# SPDX-License-Identifier: Apache-2.0
"""Models that propose and vary candidates: they see public and released values, never a shard."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...core.schema import Schema
from .sketch import Sketches, bent, digit_sketches, random_sketches, rendered


@dataclass(frozen=True)
class Candidates:
    """Synthetic records that may go anywhere, as they come from public randomness and noisy sums.

    A type of its own, so that private records cannot be handed to a variation model by mistake:
    a model may be remote, and what it is shown is given away.

    Attributes:
      codes: Cell of each table column, `(num_candidates, num_columns)`, int32.
      images: `(num_candidates, height, width, channels)`, uint8, or `None`.
      sketches: The drawings that the images are renderings of, or `None`.
    """

    codes: NDArray[np.int32]
    images: NDArray[np.uint8] | None = None
    sketches: Sketches | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, index: NDArray[np.int64]) -> "Candidates":
        """The candidates at `index`."""
        return Candidates(
            self.codes[index],
            None if self.images is None else self.images[index],
            None if self.sketches is None else self.sketches.take(index),
        )

    def joined(self, others: "Candidates") -> "Candidates":
        """These candidates and, behind them, others of the same kind."""
        images, sketches = None, None
        if self.images is not None and others.images is not None:
            images = np.concatenate([self.images, others.images])
        if self.sketches is not None and others.sketches is not None:
            sketches = self.sketches.joined(others.sketches)
        return Candidates(np.concatenate([self.codes, others.codes]), images, sketches)


class VariationModel(ABC):
    """A public model: proposes one part of records from nothing, and varies it."""

    @abstractmethod
    def propose(self, blank: Candidates, rng: np.random.Generator) -> Candidates:
        """`blank` with this model's part filled in at random; labels in `blank` are kept."""

    @abstractmethod
    def vary(self, candidates: Candidates, degree: float, rng: np.random.Generator) -> Candidates:
        """Each candidate changed in this model's part.

        Args:
          candidates: What to start from.
          degree: How far, from 0 (not at all) to 1 (as far as it goes).
          rng: Public randomness.
        """


@dataclass(frozen=True)
class TableMutator(VariationModel):
    """Draws and mutates table columns.

    A category is drawn anew with probability `degree`. A number moves by up to `degree` of its
    range; missing, like any cell past a number's bins, is a category of its own.

    Attributes:
      num_cells: Cells of each column, `(num_columns,)`.
      num_bins: Ordered cells of each column, 0 for a category, `(num_columns,)`.
      fixed: Column that keeps its code (the label), or -1.
      shares: From which each column is drawn, `(num_cells,)` each: public, or noisy sums made
        into probabilities. `None`: all cells alike.
    """

    num_cells: NDArray[np.int64]
    num_bins: NDArray[np.int64]
    fixed: int = -1
    shares: Sequence[NDArray[np.float64]] | None = None

    def propose(self, blank: Candidates, rng: np.random.Generator) -> Candidates:
        """Codes drawn by the columns' shares."""
        codes = blank.codes.copy()
        for j in range(codes.shape[1]):
            if j != self.fixed:
                codes[:, j] = self._drawn(j, len(codes), rng)
        return replace(blank, codes=codes)

    def vary(self, candidates: Candidates, degree: float, rng: np.random.Generator) -> Candidates:
        """Codes drawn anew or moved."""
        codes = candidates.codes.copy()
        for j in range(codes.shape[1]):
            if j == self.fixed:
                continue
            num, num_bins, old = len(codes), int(self.num_bins[j]), codes[:, j]
            drawn = np.where(rng.random(num) < degree, self._drawn(j, num, rng), old)
            if not num_bins:
                codes[:, j] = drawn
                continue
            moved = np.rint(old + rng.uniform(-degree, degree, num) * num_bins)
            inside = np.clip(moved, 0, num_bins - 1).astype(np.int32)
            # a number walks; it becomes or ceases to be missing by being drawn anew
            leaps = (old >= num_bins) | (drawn >= num_bins)
            codes[:, j] = np.where(leaps, drawn, inside)
        return replace(candidates, codes=codes)

    def _drawn(self, column: int, num: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Cells of one column, drawn by its shares."""
        size = int(self.num_cells[column])
        if self.shares is None:
            return rng.integers(size, size=num, dtype=np.int32)
        return rng.choice(size, size=num, p=self.shares[column]).astype(np.int32)


@dataclass(frozen=True)
class SketchArtist(VariationModel):
    """Draws lines with a pen and bends them: a simulator for images of handwriting.

    Attributes:
      shape: `(height, width, channels)` of the images.
      digits: The digit that each label stands for, `(num_labels,)`; `None`: random curves.
      label: Column of the label; -1 without `digits`.
    """

    shape: tuple[int, int, int]
    digits: NDArray[np.int64] | None = None
    label: int = -1

    def propose(self, blank: Candidates, rng: np.random.Generator) -> Candidates:
        """A drawing each, rendered."""
        if self.digits is None:
            sketches = random_sketches(len(blank), rng)
        else:
            sketches = digit_sketches(self.digits[blank.codes[:, self.label]], rng)
        return replace(blank, images=rendered(sketches, self.shape), sketches=sketches)

    def vary(self, candidates: Candidates, degree: float, rng: np.random.Generator) -> Candidates:
        """The drawings bent and rendered again."""
        if candidates.sketches is None:
            raise ValueError("these candidates were not drawn by SketchArtist")
        sketches = bent(candidates.sketches, degree, rng)
        return replace(candidates, images=rendered(sketches, self.shape), sketches=sketches)


@dataclass(frozen=True)
class ImageAugmenter(VariationModel):
    """Draws smooth blobs of color, and warps, mixes and brightens images pixel by pixel.

    Knows nothing of what the images show.

    Attributes:
      shape: `(height, width, channels)` of the images.
    """

    shape: tuple[int, int, int]

    def propose(self, blank: Candidates, rng: np.random.Generator) -> Candidates:
        """Random blobs."""
        return replace(blank, images=self._blobs(len(blank), rng))

    def vary(self, candidates: Candidates, degree: float, rng: np.random.Generator) -> Candidates:
        """The images warped, mixed with blobs and brightened."""
        if candidates.images is None:
            raise ValueError("these candidates have no images")
        num = len(candidates)
        images = _warped(candidates.images.astype(np.float32), degree, rng)
        mixed = (degree * 0.5 * rng.random((num, 1, 1, 1))).astype(np.float32)
        images += mixed * (self._blobs(num, rng) - images)
        contrast = np.exp(degree * 0.4 * rng.normal(size=(num, 1, 1, 1)))
        brightness = degree * 30 * rng.normal(size=(num, 1, 1, self.shape[2]))
        grain = degree * 10 * rng.normal(size=images.shape)
        middle = images.mean(axis=(1, 2), keepdims=True)
        images = middle + (images - middle) * contrast + brightness + grain
        return replace(candidates, images=np.rint(np.clip(images, 0, 255)).astype(np.uint8))

    def _blobs(self, num: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Random smooth images of every brightness, coarse and fine."""
        height, width, channels = self.shape
        field = np.zeros((num, height, width, channels), dtype=np.float32)
        for cells in (2, 3, 5):
            knots = rng.normal(size=(num, cells, cells, channels)).astype(np.float32)
            down = _hats(height, cells)
            across = _hats(width, cells)
            field += np.einsum("hi,nijc,wj->nhwc", down, knots, across, optimize=True) / cells**0.5
        middle = rng.uniform(-1, 1, (num, 1, 1, channels))
        return np.rint(255 / (1 + np.exp(-2.5 * (field + middle)))).astype(np.uint8)


@dataclass(frozen=True)
class Variations(VariationModel):
    """Several models, each for its part of a record.

    Attributes:
      models: In the order they are applied.
    """

    models: tuple[VariationModel, ...]

    def propose(self, blank: Candidates, rng: np.random.Generator) -> Candidates:
        """Every model's part, one after the other."""
        for model in self.models:
            blank = model.propose(blank, rng)
        return blank

    def vary(self, candidates: Candidates, degree: float, rng: np.random.Generator) -> Candidates:
        """Every model's part varied."""
        for model in self.models:
            candidates = model.vary(candidates, degree, rng)
        return candidates


def columns_of(schema: Schema) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells of each column, and how many of them have an order."""
    cells = np.array(schema.shape, dtype=np.int64)
    bins = np.array([c.num_ordered_cells for c in schema.columns])
    return cells, bins.astype(np.int64)


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

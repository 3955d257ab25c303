# SPDX-License-Identifier: Apache-2.0
"""Random Fourier features of records, and of what a generator makes before it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from .exact import GRID, sums_exactly

_CELL_SHARE = 0.8  # of a record's squared norm, spent on its cells one by one
_NUMBER_SPREAD = 3.0  # a number's range, against the distance of one between two categories


@dataclass(frozen=True)
class Features:
    """A public map of records to vectors of norm one, whose inner products are a kernel.

    A record turns each of `num_frequencies` wheels by an angle: the sum of an angle for each
    pixel, in proportion to its value, and of an angle for each table column's cell. Its features
    are the cosines and sines of the wheels, which see columns and pixels together, and a one for
    each cell that it lights, which see each column clearly by itself.

    An image may be seen by latent numbers of a public code instead of its pixels: the kernel is
    then one of public features.

    Attributes:
      pixels: Angle of each wheel for one step of each pixel's 255, or of each latent number,
        `(num_pixels, num_frequencies)`.
      cells: Angle of each wheel for each cell, one array `(num_cells, num_frequencies)` a table
        column; without rows for a column that is left out.

    Reference:
      Rahimi, Recht (2007), "Random Features for Large-Scale Kernel Machines", algorithm 1.
    """

    pixels: NDArray[np.float64]
    cells: tuple[NDArray[np.float32], ...]

    @staticmethod
    def draw(
        *,
        seed: int,
        num_frequencies: int,
        bandwidths: Sequence[float],
        num_pixels: int,
        num_cells: Sequence[int],
        num_bins: Sequence[int],
        steps: int = 255,
        farthest: int = 255,
    ) -> "Features":
        """The features of a seed: the same at every client and at the server.

        Args:
          seed: Public.
          num_frequencies: Wheels; half the number of their features.
          bandwidths: Scales of the kernel, dealt to the wheels in turn. 1 is the distance of two
            records that differ in every pixel by its whole range, or in every column.
          num_pixels: Pixels of an image times channels; 0 without images.
          num_cells: Cells of each table column; 0 leaves a column out.
          num_bins: How many of a column's first cells are the bins of a number, which turn a
            wheel in proportion to their place; 0 for a category.
          steps: Whole steps of what counts as one in a pixel, or in a latent number.
          farthest: Steps that it has at most, up or down.

        Raises:
          ConfigError: A bandwidth is so small that sums of angles are not exact.
        """
        columns = sum(cells > 0 for cells in num_cells)
        scale = 1.0 / np.resize(np.asarray(bandwidths, dtype=np.float64), num_frequencies)
        source = np.random.PCG64(seed)
        pixels = _normals(source, num_pixels, num_frequencies)
        pixels *= scale / (steps * max(1, num_pixels) ** 0.5)
        cells = []
        for count, bins in zip(num_cells, num_bins, strict=True):
            # two categories are at distance one: each gets half of the variance
            angles = _normals(source, count, num_frequencies) * 0.5**0.5
            if count and bins:
                places = (np.arange(bins) + 0.5) / bins
                angles[:bins] = np.outer(places, angles[0]) * (_NUMBER_SPREAD * 2**0.5)
            cells.append((angles * (scale / max(1, columns) ** 0.5)).astype(np.float32))
        pixels = np.rint(pixels * GRID) / GRID
        if not sums_exactly(pixels, farthest):
            raise ConfigError(
                f"bandwidths {min(bandwidths):g} and above make angles of {num_pixels} pixels too"
                " large to be added exactly; raise the least of them"
            )
        return Features(pixels, tuple(cells))

    @property
    def num_features(self) -> int:
        """Length of a record's vector: two numbers a wheel, then one a cell."""
        return 2 * int(self.pixels.shape[1]) + sum(len(cells) for cells in self.cells)

    @property
    def wheel_height(self) -> np.float32:
        """Factor of a cosine or sine, so that all of them together have their share of norm."""
        share = 1 - _CELL_SHARE if any(len(cells) for cells in self.cells) else 1.0
        return np.float32((share / self.pixels.shape[1]) ** 0.5)

    @property
    def cell_height(self) -> np.float32:
        """Height of the one that stands for a cell."""
        return np.float32((_CELL_SHARE / max(1, sum(len(c) > 0 for c in self.cells))) ** 0.5)

    def of(self, records: Records, latent: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Features of each record, `(num_records, num_features)`, each row of norm one.

        A record's row is the same to the bit whatever other records stand beside it. Where a
        code is no cell of its column, the record's row is not finite.

        Args:
          records: The records.
          latent: Latent numbers of their images in whole steps, `(num_records, num_pixels)`;
            `None`: images are seen by their pixels.
        """
        num_records, num_frequencies = len(records), self.pixels.shape[1]
        features = np.zeros((num_records, self.num_features), dtype=np.float32)
        angles = np.zeros((num_records, num_frequencies), dtype=np.float32)
        seen = records.images if latent is None else latent
        if seen is not None and len(self.pixels):
            # whole numbers on a grid, in float64: no rounding, so no dependence on the batch
            angles += seen.reshape(num_records, -1).astype(np.float64) @ self.pixels
        first = 2 * num_frequencies
        for codes, cells in zip(records.codes.T, self.cells, strict=True):
            if len(cells):
                known = (codes >= 0) & (codes < len(cells))
                places = np.where(known, codes, 0)
                angles += cells[places]
                angles[~known] = np.nan
                features[np.arange(num_records), first + places] = self.cell_height
                first += len(cells)
        height = self.wheel_height
        np.multiply(np.cos(angles), height, out=features[:, :num_frequencies])
        np.multiply(np.sin(angles), height, out=features[:, num_frequencies : 2 * num_frequencies])
        return features

    def wheel(self, column: int) -> NDArray[np.complex64]:
        """Point on the circle for each cell of a table column and each frequency."""
        points: NDArray[np.complex64] = np.exp(1j * self.cells[column]).astype(np.complex64)
        return points


def _normals(source: np.random.PCG64, rows: int, columns: int) -> NDArray[np.float64]:
    """Standard normal numbers by Box and Muller, from raw words: numpy never changes those."""
    half = rows * columns
    words = source.random_raw(2 * half).reshape(2, half) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((words[0] + np.uint64(1)) * 2.0**-53))
    normals = radius * np.cos(words[1] * (2.0 * np.pi * 2.0**-53))
    return np.asarray(normals.reshape(rows, columns), dtype=np.float64)

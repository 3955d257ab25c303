# SPDX-License-Identifier: Apache-2.0
"""Sample images by a denoiser of latent numbers: noise that is taken away step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .codec import Start, codec_for
from .denoiser import Layout, guessed
from .rounding import rounded_cells

_AT_ONCE = 2048  # records sampled at a time
_LOUDEST, _QUIETEST, _BEND = 20.0, 0.02, 7.0  # levels of noise, and how they lie between
_MOST_STEPS = 1000


@dataclass(frozen=True)
class Diffusion(Synthesizer):
    """Images of each class, drawn by a denoiser; labels come in the shares of their own.

    Sampling needs no torch. It is deterministic given `rng`, on one machine.

    Attributes:
      schema: Schema of the records.
      label: Position of the label column, or -1.
      start: Which code the latent numbers are of.
      num_steps: Steps from noise to a record; each asks the denoiser twice.
      shares: Share of each class, `(num_classes,)`.
      means: Of each class, `(num_classes, num_latents)`.
      roots: Of each class' covariance.
      weights: Of the denoiser.

    Reference:
      Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models",
      arXiv 2206.00364, algorithm 1.
    """

    kind: ClassVar[str] = "diffusion"
    schema: Schema
    label: int
    start: Start
    num_steps: int
    shares: NDArray[np.float64]
    means: NDArray[np.float32]
    roots: NDArray[np.float32]
    weights: Mapping[str, NDArray[np.float32]]

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records, drawn some thousands at a time."""
        image = self.schema.image
        codec = codec_for(self.start, image.shape if image else None)
        labels = rng.permutation(rounded_cells(self.shares, num_records, rng)).astype(np.int64)
        images = np.zeros((num_records, *(image.shape if image else ())), dtype=np.uint8)
        for first in range(0, num_records, _AT_ONCE):
            part = slice(first, min(first + _AT_ONCE, num_records))
            images[part] = codec.decoded(self._drawn(labels[part], rng))
        codes = np.zeros((num_records, len(self.schema.columns)), dtype=np.int32)
        if self.label >= 0:
            codes[:, self.label] = labels
        return Records(codes, images)

    def _drawn(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """Latent numbers of records of some classes, by Heun's method."""
        order = np.argsort(labels, kind="stable")
        sorted_labels = labels[order]
        levels = _levels(self.num_steps)
        size = (len(labels), self.means.shape[1])
        widest = np.float32((1 + levels[0] ** 2) ** 0.5)
        now: NDArray[Any] = rng.standard_normal(size, dtype=np.float32) * widest
        for level, lower in pairwise(levels):
            slope: NDArray[Any] = self._slope(now, level, sorted_labels)
            ahead: NDArray[Any] = now + np.float32(lower - level) * slope
            if lower > 0:
                slope = (slope + self._slope(ahead, lower, sorted_labels)) / 2
                ahead = now + np.float32(lower - level) * slope
            now = ahead
        drawn = np.empty_like(now)
        ends = np.searchsorted(sorted_labels, np.arange(len(self.means) + 1))
        for mean, root, first, last in zip(
            self.means, self.roots, ends[:-1], ends[1:], strict=True
        ):
            drawn[order[first:last]] = mean + now[first:last] @ root
        return drawn

    def _slope(
        self, now: NDArray[np.float32], level: float, labels: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Where noise leads, at a level of it."""
        guess = guessed(self.weights, now, level, labels, self.means, self.roots)
        return (now - guess) / np.float32(level)

    def settings(self) -> dict[str, Any]:
        """The label's position, the code, and the steps."""
        return {"label": self.label, "start": self.start, "num_steps": self.num_steps}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Moments of the classes and all weights."""
        kept: dict[str, NDArray[Any]] = {
            "shares": self.shares,
            "means": self.means,
            "roots": self.roots,
        }
        return kept | {f"denoiser.{name}": part for name, part in self.weights.items()}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The diffusion that was saved.

        Raises:
          ConfigError: The arrays are not those of one for this schema.
        """
        label, start, steps = (settings.get(key) for key in ("label", "start", "num_steps"))
        if (
            not isinstance(label, int)
            or not -1 <= label < len(schema.columns)
            or start not in ("handwriting", "scratch")
            or not isinstance(steps, int)
            or not 2 <= steps <= _MOST_STEPS
        ):
            raise ConfigError("a saved diffusion whose settings are not one's")
        codec = codec_for(start, schema.image.shape if schema.image else None)
        num_classes = schema.shape[label] if label >= 0 else 1
        width = tensors["denoiser.enter.b"].shape if "denoiser.enter.b" in tensors else ()
        if len(width) != 1:
            raise ConfigError("a saved diffusion without its weights")
        layout = Layout(codec.num_latents, num_classes, width[0])
        size = codec.num_latents
        expected: dict[str, tuple[int, ...]] = {
            "shares": (num_classes,),
            "means": (num_classes, size),
            "roots": (num_classes, size, size),
            **{f"denoiser.{name}": shape for name, shape in layout.shapes.items()},
        }
        found = {name: array.shape for name, array in tensors.items()}
        if found != expected or not all(np.isfinite(array).all() for array in tensors.values()):
            raise ConfigError("a saved diffusion whose arrays do not fit the schema")
        shares = np.asarray(tensors["shares"], dtype=np.float64)
        if not ((shares >= 0).all() and abs(shares.sum() - 1) < 1e-6):
            raise ConfigError("a saved diffusion whose shares do not add up to one")
        weights = {
            name: np.asarray(tensors[f"denoiser.{name}"], dtype=np.float32)
            for name in layout.shapes
        }
        means, roots = (np.asarray(tensors[k], dtype=np.float32) for k in ("means", "roots"))
        return cls(schema, label, start, steps, shares, means, roots, weights)


def _levels(num_steps: int) -> list[float]:
    """Levels of noise from the loudest to none, `num_steps + 1` of them."""
    loud, quiet = _LOUDEST ** (1 / _BEND), _QUIETEST ** (1 / _BEND)
    return [
        *((loud + step / (num_steps - 1) * (quiet - loud)) ** _BEND for step in range(num_steps)),
        0.0,
    ]

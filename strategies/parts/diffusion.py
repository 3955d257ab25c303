# SPDX-License-Identifier: Apache-2.0
"""Sample images by a denoiser of latent numbers: noise that is taken away step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.schema import Schema
from .denoiser import Layout, guessed
from .latents import Latents, saved_code, saved_moments

_PREFIX = "denoiser."
_LOUDEST, _QUIETEST, _BEND = 20.0, 0.02, 7.0  # levels of noise, and how they lie between
_MOST_STEPS = 1000


@dataclass(frozen=True)
class Diffusion(Latents):
    """Images of each class, drawn by a denoiser; labels come in the shares of their own.

    Sampling needs no torch. It is deterministic given `rng`, on one machine.

    Attributes:
      num_steps: Steps from noise to a record; each asks the denoiser twice.
      weights: Of the denoiser.

    Reference:
      Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models",
      arXiv 2206.00364, algorithm 1.
    """

    kind: ClassVar[str] = "diffusion"
    at_once: ClassVar[int] = 2048
    num_steps: int
    weights: Mapping[str, NDArray[np.float32]]

    def drawn(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
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
        return {**super().settings(), "num_steps": self.num_steps}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Moments of the classes and all weights."""
        return {
            **super().tensors(),
            **{f"{_PREFIX}{name}": part for name, part in self.weights.items()},
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The diffusion that was saved.

        Raises:
          ConfigError: The arrays are not those of one for this schema.
        """
        label, start, codec = saved_code(schema, settings)
        steps, width = settings.get("num_steps"), tensors.get(f"{_PREFIX}enter.b", np.zeros(()))
        if not isinstance(steps, int) or not 2 <= steps <= _MOST_STEPS or width.ndim != 1:
            raise ConfigError("a saved diffusion without its steps or its weights")
        num_classes = schema.shape[label] if label >= 0 else 1
        layout = Layout(codec.num_latents, num_classes, len(width))
        beside = {f"{_PREFIX}{name}": shape for name, shape in layout.shapes.items()}
        largest = float(np.finfo(np.float32).max)
        moments = saved_moments(schema, label, codec, tensors, beside=beside, largest=largest)
        weights = {
            name: np.asarray(tensors[f"{_PREFIX}{name}"], dtype=np.float32)
            for name in layout.shapes
        }
        return cls(schema, label, start, *moments, steps, weights)


def _levels(num_steps: int) -> list[float]:
    """Levels of noise from the loudest to none, `num_steps + 1` of them."""
    loud, quiet = _LOUDEST ** (1 / _BEND), _QUIETEST ** (1 / _BEND)
    return [
        *((loud + step / (num_steps - 1) * (quiet - loud)) ** _BEND for step in range(num_steps)),
        0.0,
    ]

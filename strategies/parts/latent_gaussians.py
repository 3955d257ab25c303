# SPDX-License-Identifier: Apache-2.0
"""One Gaussian a label in the latent numbers of a public code, fitted to a noisy mean of features.

The mean of a random Fourier feature over a Gaussian has a closed form, so nothing is drawn while
fitting: the same sum gives the same Gaussians, whatever the randomness.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.schema import Schema
from .codec import STEPS, Codec, Start
from .features import Features
from .generator import Adam, Target
from .latents import Latents, saved_code, saved_moments

_RATE = 0.03  # of Adam, at the start
_COMMON, _APART = 0.1, 0.12  # how far a root is thought to be from one: of all labels, of one
_LEVEL = 0.05  # variance of a label's mean that is thought possible in any direction
_EXACT = 1e-7  # variance of a feature of height one below which noise is no longer told apart
_LARGEST = 100.0  # of a saved mean or root, in units of the variation within a label


@dataclass(frozen=True)
class LatentGaussians(Latents):
    """Images that a public decoder makes of Gaussian numbers, with labels in their shares."""

    kind: ClassVar[str] = "latent_gaussians"
    at_once: ClassVar[int] = 4096

    def drawn(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """Gaussian numbers of each label."""
        noise = rng.standard_normal((len(labels), self.means.shape[1]), dtype=np.float32)
        latent = self.means[labels]
        for number, root in enumerate(self.roots):
            mine = labels == number
            latent[mine] += noise[mine] @ root
        return latent

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The Gaussians that were saved.

        Raises:
          ConfigError: The arrays are not those of Gaussians for this schema.
        """
        label, start, codec = saved_code(schema, settings)
        moments = saved_moments(schema, label, codec, tensors, beside={}, largest=_LARGEST)
        return cls(schema, label, start, *moments)


def unmeasured(schema: Schema, label: int, start: Start, codec: Codec) -> LatentGaussians:
    """What is thought before anybody was asked: any label, any public character."""
    num_labels = schema.shape[label] if label >= 0 else 1
    values, vectors = np.linalg.eigh(codec.covariance())
    root = ((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T).astype(np.float32)
    return LatentGaussians(
        schema,
        label,
        start,
        np.full(num_labels, 1 / num_labels),
        np.zeros((num_labels, len(root)), dtype=np.float32),
        np.repeat(root[None], num_labels, axis=0),
    )


def fitted_gaussians(
    schema: Schema,
    label: int,
    start: Start,
    codec: Codec,
    features: Features,
    target: Target,
    num_steps: int,
) -> LatentGaussians:
    """The Gaussians that a noisy mean and what is publicly known make the likeliest.

    Minimizes the squared distance of their exact mean features to the target in units of the
    noise, which is the log-likelihood, plus a Gaussian prior: a label's mean lies about where
    public characters lie, and records vary within a label by about one, in any direction. Where
    noise hides what users say, the prior stays.

    Args:
      schema: Schema of the records.
      label: Position of the label column, or -1.
      start: Which code the latent numbers are of.
      codec: That code.
      features: The features of latent numbers whose mean was measured.
      target: Their noisy mean.
      num_steps: Gradient steps.

    Reference:
      Harder, Jalali, Sutherland, Park (2023), "Pre-trained Perceptual Features Improve
      Differentially Private Image Generation", TMLR, for public features; random Fourier features
      of them, Gaussians in place of a network and the prior are ours.
    """
    size = codec.num_latents
    beyond = codec.covariance() - np.eye(size)
    gaussians = Gaussians(
        angles=(STEPS * features.pixels).astype(np.float32),
        aim=(target.means / features.wheel_height).astype(np.float32),
        shares=target.label_probs.astype(np.float32),
        variance=np.float32(max(target.variance / float(features.wheel_height) ** 2, _EXACT)),
        precision=np.linalg.inv(beyond + _LEVEL * np.eye(size)).astype(np.float32),
    )
    num_labels = len(target.label_probs)
    parts = [np.zeros(s, np.float32) for s in ((num_labels, size), (size, size))]
    parts.append(np.zeros((num_labels, size, size), np.float32))
    adam = Adam(parts, kept_square=0.99)
    for step in range(num_steps):
        falling = 0.5 * (1 + np.cos(np.pi * step / num_steps))
        adam.step(parts, gaussians.gradient(parts), _RATE * falling)
    means, roots = parts[0], gaussians.roots(parts)
    return LatentGaussians(schema, label, start, target.label_probs, means, roots)


@dataclass(frozen=True)
class Gaussians:
    """What Gaussians are fitted to; their weights are means, a common root, and each one's own.

    Attributes:
      angles: Angle of each wheel for one of each latent number, `(num_latents, num_frequencies)`.
      aim: Share of each label times its mean cosines and sines, `(num_labels, num_features)`.
      shares: Of the labels.
      variance: Of the noise in each number of `aim`.
      precision: Inverse of the covariance that labels' means are thought to have.
    """

    angles: NDArray[np.float32]
    aim: NDArray[np.float32]
    shares: NDArray[np.float32]
    variance: np.float32
    precision: NDArray[np.float32]

    def roots(self, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Root of each label, `(num_labels, num_latents, num_latents)`."""
        return np.eye(len(self.angles), dtype=np.float32) + parts[1] + parts[2]

    def loss(self, parts: list[NDArray[np.float32]]) -> float:
        """Half of what is minimized: squared gaps by their variance, and the prior."""
        _, cosines, sines = self._made(parts)
        gaps = np.concatenate([cosines, sines], axis=1) - self.aim
        means, common, apart = parts
        prior = ((means @ self.precision) * means).sum()
        prior += (common**2).sum() / _COMMON**2 + (apart**2).sum() / _APART**2
        return float((gaps**2).sum(dtype=np.float64) / self.variance + prior) / 2

    def gradient(self, parts: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Of `loss`, by each part."""
        spun, cosines, sines = self._made(parts)
        half = self.angles.shape[1]
        gap_cosines, gap_sines = cosines - self.aim[:, :half], sines - self.aim[:, half:]
        turn = (gap_sines * cosines - gap_cosines * sines) / self.variance
        fall = (gap_cosines * cosines + gap_sines * sines) / self.variance
        means, common, apart = parts
        by_root = -((spun * fall[:, None]) @ self.angles.T)
        return [
            turn @ self.angles.T + means @ self.precision,
            by_root.sum(axis=0) + common / np.float32(_COMMON**2),
            by_root + apart / np.float32(_APART**2),
        ]

    def _made(self, parts: list[NDArray[np.float32]]) -> tuple[NDArray[np.float32], ...]:
        """What roots make of the angles; mean cosines and sines, times shares.

        The mean of `exp(i w z)` over a Gaussian of mean m and covariance R'R is
        `exp(i w m - |R w|^2 / 2)`.
        """
        spun = self.roots(parts) @ self.angles
        height = self.shares[:, None] * np.exp(-0.5 * (spun * spun).sum(axis=1))
        at = parts[0] @ self.angles
        return spun, height * np.cos(at), height * np.sin(at)

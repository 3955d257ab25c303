# SPDX-License-Identifier: Apache-2.0
"""A small denoiser of latent numbers by class: what classes have beyond their Gaussians.

A record is seen less its class' mean and by its class' root covariance, so that a Gaussian class
needs no network at all: the best guess at a record under noise of level s is then 1 / (1 + s^2) of
what is seen. The network adds to that guess. Untrained it adds nothing, and what is sampled is one
Gaussian a class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .class_moments import ClassMoments, seen_by_class
from .codec import STEPS, Codec
from .trainable import Trainable

Scope = Literal["head", "all"]
_WAVES = 8  # of the noise level, each as a sine and a cosine
_CENTER, _SPREAD = -0.4, 1.2  # of the logarithm of levels that are trained on
_OWN = ("enter.class", "inner.class")  # what each class adds to the hidden layers
_SIMULATED = 6000  # records by which directions of the head are scaled
_DAMPING = 0.3  # of directions in which hidden units hardly vary


@dataclass(frozen=True)
class Layout:
    """Sizes of a denoiser.

    Attributes:
      num_latents: Latent numbers of a record.
      num_classes: Classes.
      width: Units of its two hidden layers.
    """

    num_latents: int
    num_classes: int
    width: int

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight."""
        size, width = self.num_latents, self.width
        return {
            "enter.w": (2 * size + 2 * _WAVES, width),
            "enter.b": (width,),
            "inner.w": (width, width),
            "inner.b": (width,),
            "leave.w": (width, size),
            "leave.b": (size,),
            "enter.class": (self.num_classes, width),
            "inner.class": (self.num_classes, width),
        }

    def initial(
        self, learned: Mapping[str, NDArray[np.float32]] | None, rng: np.random.Generator
    ) -> dict[str, NDArray[np.float32]]:
        """Weights that public data taught, or random ones that add nothing yet."""
        weights = {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}
        if learned is not None:
            return weights | dict(learned)
        for name in ("enter.w", "inner.w"):
            shape = self.shapes[name]
            weights[name] = rng.normal(0, 1 / math.sqrt(shape[0]), shape).astype(np.float32)
        return weights


@dataclass(frozen=True, eq=False)
class Denoiser(Trainable):
    """The denoiser as users train it.

    The loss of a record is averaged over `multiplicity` draws of a noise level and of noise before
    anything is clipped: the gradient varies less, and a user's part stays bounded as it was.

    With `scope = "head"` the last layer alone is trained, as a small matrix in few directions of
    the hidden units, scaled so that in each of them records vary alike: one step down the gradient
    is then nearly all the way, and noise is alike in all of them. The directions are found by
    records that are simulated from the classes' Gaussians, which costs no privacy.

    Attributes:
      layout: Its sizes.
      scope: `all` weights are trained, or the `head`.
      multiplicity: Draws a record and step.
      label: Position of the label column, or -1.
      codec: Makes latent numbers of images.
      means: Of each class, in whole steps, as `ClassMoments.inputs` has them.
      backs: Inverse roots of covariances, likewise.
      roots: Roots of covariances, `(num_classes, num_latents, num_latents)`.
      start: All weights, where training starts.
      directions: For the head: `(width + 1, rank)`, of the hidden units and a one; else empty.

    Reference:
      Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models",
      arXiv 2206.00364, table 1; Dockhorn et al. (2023), "Differentially Private Diffusion Models",
      arXiv 2210.09929, for the multiplicity.
    """

    layout: Layout
    scope: Scope
    multiplicity: int
    label: int
    codec: Codec
    means: NDArray[np.int32]
    backs: NDArray[np.int32]
    roots: NDArray[np.float32]
    start: Mapping[str, NDArray[np.float32]]
    directions: NDArray[np.float32]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the weights that are trained."""
        if self.scope == "head":
            return {"head": (self.directions.shape[1], self.layout.num_latents)}
        return self.layout.shapes

    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Where training starts: a head that changes nothing, or all weights."""
        if self.scope == "head":
            return np.zeros(self.num_weights, dtype=np.float32)
        return np.concatenate([self.start[name].ravel() for name in self.shapes])

    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """Records as their class has them, and the class."""
        labels = labels_of(records, self.label)
        if records.images is None:
            raise ConfigError("records without images")
        codes = self.codec.encoded(records.images)
        unit = seen_by_class(codes, labels, self.means, self.backs)
        return torch.from_numpy(unit), torch.from_numpy(labels)

    def chance(self, rng: np.random.Generator, num_records: int) -> tuple[NDArray[Any], ...]:
        """Levels of noise, `(num_records, multiplicity)`, and noise in each latent number.

        The levels of a record are spread evenly over their distribution.
        """
        from scipy.special import ndtri

        levels, noises = rng.spawn(2)
        even = np.arange(self.multiplicity) + levels.random((num_records, self.multiplicity))
        level = np.exp(_CENTER + _SPREAD * ndtri(np.clip(even / self.multiplicity, 1e-6, 1 - 1e-6)))
        shape = (num_records, self.multiplicity, self.layout.num_latents)
        noise = noises.standard_normal(shape, dtype=np.float32)
        return level.astype(np.float32), noise

    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Half the squared distance to what the network should add, in the mean over draws."""
        (unit, labels), (level, noise) = seen, chance
        level = level[:, :, None]
        noisy = unit[:, None, :] + level * noise
        keep = 1 / (1 + level**2)
        known = self._constants(torch, unit.device)
        place = known.means[labels][:, None, :] + torch.bmm(keep * noisy, known.roots[labels])
        angle = torch.log(level) * known.waves
        entered = torch.cat([noisy * keep.sqrt(), place, torch.sin(angle), torch.cos(angle)], dim=2)
        w = known.start if self.scope == "head" else weights
        silu = torch.nn.functional.silu
        own = [w[name][labels][:, None, :] for name in _OWN]
        hidden = silu(entered @ w["enter.w"] + w["enter.b"] + own[0])
        hidden = hidden + silu(hidden @ w["inner.w"] + w["inner.b"] + own[1])
        guess = hidden @ w["leave.w"] + w["leave.b"]
        if self.scope == "head":
            scaled = hidden @ known.directions[:-1] + known.directions[-1]
            guess = guess + scaled @ weights["head"]
        aim = (unit[:, None, :] - keep * noisy) / (level * keep.sqrt())
        return (guess - aim).square().sum(dim=2).mean(dim=1) / 2

    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> Synthesizer:
        """The strategy makes it: it knows more than the weights."""
        raise ConfigError("a denoiser alone samples nothing; its strategy makes the synthesizer")

    def whole(self, weights: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """All weights, of which some were trained."""
        parts = self.split(weights)
        if self.scope == "all":
            return dict(parts)
        added = self.directions @ parts["head"]
        w = dict(self.start)
        return w | {"leave.w": w["leave.w"] + added[:-1], "leave.b": w["leave.b"] + added[-1]}

    def _constants(self, torch: Any, device: Any) -> "_Constants":
        """What does not change while training does, where it is computed; made once for each."""
        known: dict[str, _Constants] = self.__dict__.setdefault("_made", {})
        if str(device) not in known:
            known[str(device)] = _Constants(
                torch.tensor(self.roots, device=device),
                torch.tensor(self.means.astype(np.float32) / STEPS, device=device),
                torch.tensor(waves(), device=device),
                torch.tensor(self.directions, device=device),
                {name: torch.tensor(part, device=device) for name, part in self.start.items()},
            )
        return known[str(device)]


@dataclass(frozen=True)
class _Constants:
    """Constants of a denoiser, as tensors."""

    roots: Any
    means: Any
    waves: Any
    directions: Any
    start: Mapping[str, Any]


def labels_of(records: Records, label: int) -> NDArray[np.int64]:
    """Class of each record; all one without a label column."""
    if label < 0:
        return np.zeros(len(records), dtype=np.int64)
    return records.codes[:, label].astype(np.int64)


def waves() -> NDArray[np.float32]:
    """Frequencies of the level's logarithm, `(8,)`."""
    return (math.pi / 8 * np.arange(1, _WAVES + 1)).astype(np.float32)


def guessed(
    w: Mapping[str, NDArray[np.float32]],
    noisy: NDArray[np.float32],
    level: float,
    labels: NDArray[np.int64],
    means: NDArray[np.float32],
    roots: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The best guess at records under noise of a level, `(num_records, num_latents)`; no torch.

    Args:
      w: All weights.
      noisy: Records with noise, as their class has them, sorted by class.
      level: Standard deviation of that noise.
      labels: Class of each record, not falling.
      means: Of each class.
      roots: Of each class' covariance.
    """
    keep = np.float32(1 / (1 + level**2))
    hidden = hidden_of(w, noisy, np.full((len(noisy), 1), level, np.float32), labels, means, roots)
    added = hidden @ w["leave.w"] + w["leave.b"]
    guess: NDArray[np.float32] = keep * noisy + np.float32(level) * np.sqrt(keep) * added
    return guess


def hidden_of(
    w: Mapping[str, NDArray[np.float32]],
    noisy: NDArray[np.float32],
    level: NDArray[np.float32],
    labels: NDArray[np.int64],
    means: NDArray[np.float32],
    roots: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Hidden units under the last layer, `(num_records, width)`; `level` is `(num_records, 1)`."""
    keep = 1 / (1 + level**2)
    kept = keep * noisy
    place = np.empty_like(noisy)
    ends = np.searchsorted(labels, np.arange(len(means) + 1))
    for mean, root, first, last in zip(means, roots, ends[:-1], ends[1:], strict=True):
        place[first:last] = mean + kept[first:last] @ root
    angle = np.log(level) * waves()
    entered = np.concatenate([noisy * np.sqrt(keep), place, np.sin(angle), np.cos(angle)], axis=1)
    hidden = _silu(entered @ w["enter.w"] + w["enter.b"] + w["enter.class"][labels])
    hidden = hidden + _silu(hidden @ w["inner.w"] + w["inner.b"] + w["inner.class"][labels])
    return np.asarray(hidden, dtype=np.float32)


def directions_of(
    w: Mapping[str, NDArray[np.float32]],
    moments: ClassMoments,
    rank: int,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Directions in which a head is trained, `(width + 1, rank)`, by simulated records alone.

    Args:
      w: All weights.
      moments: Of the classes that records are simulated from.
      rank: How many: those in which hidden units vary most.
      rng: Source of the simulation.
    """
    labels = np.sort(rng.choice(len(moments.shares), _SIMULATED, p=moments.shares))
    level = np.exp(_CENTER + _SPREAD * rng.standard_normal((_SIMULATED, 1))).astype(np.float32)
    size = (_SIMULATED, moments.means.shape[1])
    noisy = rng.standard_normal(size, dtype=np.float32) * np.sqrt(1 + level**2)
    means, roots = moments.means.astype(np.float32), moments.roots()
    hidden = hidden_of(w, noisy, level, labels, means, roots).astype(np.float64)
    seen = np.concatenate([hidden, np.ones((_SIMULATED, 1))], axis=1)
    values, vectors = np.linalg.eigh(seen.T @ seen / _SIMULATED)
    kept = slice(None, -rank - 1, -1)
    scaled = vectors[:, kept] / np.sqrt(np.maximum(values[kept], 0) + _DAMPING)
    return np.asarray(scaled, dtype=np.float32)


def _silu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each value times its logistic function."""
    return np.asarray(values / (1 + np.exp(-np.clip(values, -60, 60))))

# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of each class, by two noisy sums, as far as noise lets them be seen."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...core.query import NoisySum
from ...core.records import BoundedShard
from .codec import FARTHEST, STEPS, Codec
from .simplex import CLEAR, to_simplex

_ROOT_STEPS = 1 << 12  # of one, in which clients are told how to scale
_LEAST, _MOST = 0.15, 20.0  # variances along any direction
_NARROW, _WIDE, _EVEN = 0.2, 0.6, 60.0  # weight of products, under much noise and under little
_CUT = 0.8  # of a typical user's norm


@dataclass(frozen=True)
class ClassMoments:
    """What is known of the records of each class, in a codec's latent numbers.

    Attributes:
      shares: Of all records, `(num_classes,)`.
      means: `(num_classes, num_latents)`.
      covariances: `(num_classes, num_latents, num_latents)`.
      doubts: Variance of the noise in each number of a class' mean, `(num_classes,)`.
    """

    shares: NDArray[np.float64]
    means: NDArray[np.float64]
    covariances: NDArray[np.float64]
    doubts: NDArray[np.float64]

    @classmethod
    def unknown(cls, codec: Codec, num_classes: int) -> "ClassMoments":
        """What is thought before anybody was asked: any class, any public character."""
        covariance = codec.covariance()
        return cls(
            np.full(num_classes, 1 / num_classes),
            np.zeros((num_classes, len(covariance))),
            np.repeat(covariance[None], num_classes, axis=0),
            np.zeros(num_classes),
        )

    def centers(self) -> NDArray[np.int32]:
        """The means in whole steps, as clients are told them."""
        return np.rint(self.means * STEPS).astype(np.int32)

    def roots(self) -> NDArray[np.float32]:
        """Symmetric square roots of the covariances."""
        return _powers(self.covariances, 0.5).astype(np.float32)

    def inputs(self) -> dict[str, NDArray[np.int32]]:
        """What clients need to see records as their class has them, in whole steps."""
        backs = np.rint(_powers(self.covariances, -0.5) * _ROOT_STEPS)
        return {"means": self.centers(), "backs": backs.astype(np.int32)}


def seen_by_class(
    codes: NDArray[np.int64],
    labels: NDArray[np.int64],
    means: NDArray[np.int32],
    backs: NDArray[np.int32],
) -> NDArray[np.float32]:
    """Records less their class' mean and by its root covariance, `(num_records, num_latents)`.

    Args:
      codes: Latent numbers in whole steps, `(num_records, num_latents)`.
      labels: Class of each record, `(num_records,)`.
      means: As `ClassMoments.inputs` has them.
      backs: As `ClassMoments.inputs` has them.
    """
    off = (codes - means[labels]).astype(np.float64)
    for label in np.unique(labels):
        mine = labels == label
        off[mine] = off[mine] @ backs[label].astype(np.float64)  # whole numbers: exact
    return (off / (STEPS * _ROOT_STEPS)).astype(np.float32)


@dataclass(frozen=True)
class Measuring:
    """How moments are asked for: first the means, then, around them, the covariances.

    A user's vector is the mean over the user's records of a one, of the latent numbers less their
    class' center and, for covariances, of the products of these, each with a weight, in the place
    of the record's class. Around a mean that is known, products are less than half as long as
    around zero, and so is the noise. A vector is cut to a norm that most users exceed: all that a
    user says is then scaled alike, which no ratio of sums feels.

    Attributes:
      num_classes: Classes.
      num_latents: Latent numbers.
      second_weight: Of the products, beside means of weight one; 0: there are none.
    """

    num_classes: int
    num_latents: int
    second_weight: float = 0.0

    @classmethod
    def around(
        cls, num_classes: int, num_latents: int, *, num_users: int, noise_multiplier: float
    ) -> "Measuring":
        """For covariances; under much noise, what means still lack comes first."""
        signal = math.sqrt(num_users / noise_multiplier)
        return cls(num_classes, num_latents, min(max(signal / _EVEN, _NARROW), _WIDE))

    @property
    def width(self) -> int:
        """Numbers of one class."""
        products = self.num_latents * (self.num_latents + 1) // 2 if self.second_weight else 0
        return 1 + self.num_latents + products

    @property
    def dim(self) -> int:
        """Length of a user's vector."""
        return self.num_classes * self.width

    @property
    def clip(self) -> float:
        """Somewhat less than the norm of a user of many records, evenly of all classes."""
        size = self.num_latents
        squared = self._mass**2 + (0.7 if self.second_weight else 2) * size
        squared += 0.8 * (size * self.second_weight) ** 2
        return _CUT * math.sqrt(squared / self.num_classes)

    def rows(
        self,
        shard: BoundedShard,
        codes: NDArray[np.int64],
        labels: NDArray[np.int64],
        centers: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Each user's vector, `(num_users, dim)`.

        Args:
          shard: The users.
          codes: Latent numbers of their records in whole steps, `(num_records, num_latents)`.
          labels: Class of each record.
          centers: Of each class, in whole steps, `(num_classes, num_latents)`.
        """
        rows = np.zeros((shard.num_users, self.num_classes, self.width), dtype=np.float32)
        upper = np.triu_indices(self.num_latents)
        weights = self._weights()
        starts = shard.starts
        off = (codes - centers[labels]).astype(np.float64)
        for row, start, stop in zip(rows, starts[:-1], starts[1:], strict=True):
            part, kind = off[start:stop], labels[start:stop]
            for label in np.unique(kind):
                mine = part[kind == label]  # sums of whole numbers: exact
                row[label, 0] = len(mine) * self._mass
                row[label, 1 : 1 + self.num_latents] = mine.sum(axis=0) / STEPS
                if self.second_weight:
                    products = (mine.T @ mine)[upper] / STEPS**2 - len(mine) * (
                        upper[0] == upper[1]
                    )
                    row[label, 1 + self.num_latents :] = products * weights
            row /= np.float32(stop - start)
        return rows.reshape(shard.num_users, self.dim)

    def means(self, noisy: NoisySum, prior: ClassMoments) -> ClassMoments:
        """Shares and means by a sum around zero; where it is but noise, what was thought before."""
        sums, masses, stddev = self._read(noisy)
        total = float(masses.sum())
        if noisy.is_void or total < CLEAR * stddev * math.sqrt(self.num_classes):
            return prior
        held = np.maximum(masses, max(stddev, 0.01 * total / self.num_classes))
        noise = (noisy.stddev / held) ** 2
        means = sums[:, 1:] / held[:, None]
        share = kept(noise * self.num_latents, (means**2).sum(axis=1))
        means = np.clip(means * share[:, None], -FARTHEST, FARTHEST)
        means = np.rint(means * STEPS) / STEPS  # as clients are told them
        return replace(prior, shares=to_simplex(masses / total), means=means, doubts=noise * share)

    def covariances(self, noisy: NoisySum, known: ClassMoments) -> ClassMoments:
        """Covariances by a sum around known means, and what these lacked."""
        size = self.num_latents
        sums, masses, stddev = self._read(noisy)
        total = float(masses.sum())
        if noisy.is_void or total < CLEAR * stddev * math.sqrt(self.num_classes):
            return known
        held = np.maximum(masses, max(stddev, 0.01 * total / self.num_classes))
        noise = noisy.stddev / held  # of a mean of weight one
        lacked = sums[:, 1 : 1 + size] / held[:, None]
        lacked *= (known.doubts / np.maximum(known.doubts + noise**2, 1e-300))[:, None]
        beyond = np.zeros((self.num_classes, size, size))
        upper = np.triu_indices(size)
        beyond[:, upper[0], upper[1]] = sums[:, 1 + size :] / self._weights() / held[:, None]
        beyond[:, upper[1], upper[0]] = beyond[:, upper[0], upper[1]]
        beyond -= np.einsum("ki,kj->kij", lacked, lacked)
        energy = (noise / self.second_weight) ** 2 * size * (size + 1) / 2
        weights = (1 / energy) / (1 / energy).sum()
        common = np.einsum("k,kij->ij", weights, beyond)
        level = np.trace(common) / size * np.eye(size)  # hardly noisy, so it is kept as it is
        common = level + (common - level) * kept(
            1 / (1 / energy).sum(), ((common - level) ** 2).sum()
        )
        off = beyond - common
        off *= kept(energy, (off**2).sum(axis=(1, 2)))[:, None, None]
        found = np.eye(size) + common + off
        return replace(known, means=known.means + lacked, covariances=_powers(found, 1.0))

    def _read(self, noisy: NoisySum) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Sums of each class, how many users' worth each class has, and the noise in that."""
        sums = noisy.vector.reshape(self.num_classes, self.width)
        return sums, sums[:, 0] / self._mass, noisy.stddev / self._mass

    @property
    def _mass(self) -> float:
        """Weight of the ones; known nearly, when covariances are asked for."""
        return math.sqrt(self.num_latents) / (2 if self.second_weight else 1)

    def _weights(self) -> NDArray[np.float64]:
        """Of each product; one off the diagonal stands for two."""
        upper = np.triu_indices(self.num_latents)
        return self.second_weight * np.where(upper[0] == upper[1], 1.0, math.sqrt(2))


def kept(noise: NDArray[np.float64] | float, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of noisy vectors to keep, by their own squared norms and that of noise in them.

    Reference:
      James and Stein (1961), "Estimation with Quadratic Loss", the positive part.
    """
    return np.maximum(0.0, 1 - noise / np.maximum(seen, 1e-300))


def _powers(matrices: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Symmetric powers of matrices, whose eigenvalues are held within bounds first."""
    values, vectors = np.linalg.eigh(matrices)
    bounded = np.clip(values, _LEAST, _MOST) ** power
    return np.asarray(np.einsum("kij,kj,klj->kil", vectors, bounded, vectors))

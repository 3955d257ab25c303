# SPDX-License-Identifier: Apache-2.0
"""DP-MERF: one noisy mean of random features, and a small network fitted to it for ever after."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Rounds, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.features import Features
from .parts.generator import Fitting, Target, fitted, label_column, untrained
from .parts.simplex import pooled_total, to_simplex
from .parts.width import MOST_NUMBERS, refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_INSIDE = 1 - 1e-6  # a user's vector stays within the clip in spite of float32 rounding
_RECORDS = 2048  # records whose features are held at a time, unless one user has more
_FOR_IMAGES, _FOR_TABLES = 2000, 500  # random features

_drawn = lru_cache(maxsize=1)(Features.draw)  # a client's blocks ask for the same, one by one


@dataclass(frozen=True)
class DpMerf(Strategy):
    """One round; a user sends the mean features of its own records, for each label.

    Every user weighs the same, however many records it has, and has norm one at most: nothing
    is ever cut off. The server fits a network to the noisy mean, which costs no privacy.

    Attributes:
      label: Column that records are told apart by; `None`: the schema's target if that is a
        category; `""`: none.
      num_features: Random features; even. The more, the finer; a user sends this many numbers
        for each label, beside one for each cell. `None`: 2000 for images, 500 for tables alone.
      bandwidths: Scales of the kernel, an equal part of the features each; see `Features.draw`.
      label_weight: How much of a user's unit norm is spent on the number of records of each
        label, in (0, 1).
      feature_seed: Public seed of the features.
      num_codes: Gaussian numbers that a synthetic record is made from.
      num_hidden: Width of the network's hidden layers.
      num_steps: Gradient steps of the fit.
      batch_size: Records made in a step.
      learning_rate: Of the fit.
      shrinkage: Pull towards a network that knows nothing, in units of the noise's variance.
      smoothing: Radius over which neighboring pixels move together, in pixels.
      pixel_noise: Noise on a synthetic pixel, as a fraction of its range.

    Privacy:
      The vector of a user is a mean over its records of `sqrt(1 - w^2)` times features of norm
      one, in the place of the record's label, and `w` times a one in that label's place. Each
      term has norm one, so the mean has norm one at most: user-level without clipping.

    Reference:
      Harder, Adamczewski, Park (2021), "DP-MERF: Differentially Private Mean Embeddings with
      Random Features for Practical Privacy-Preserving Data Generation", AISTATS.
    """

    label: str | None = None
    num_features: int | None = None
    bandwidths: tuple[float, ...] = (0.15, 0.2)
    label_weight: float = 0.3
    feature_seed: int = 0
    num_codes: int = 10
    num_hidden: int = 128
    num_steps: int = 500
    batch_size: int = 200
    learning_rate: float = 0.01
    shrinkage: float = 7.0
    smoothing: float = 0.8
    pixel_noise: float = 0.2
    name: ClassVar[str] = "dp_merf"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.num_features is not None and (self.num_features < 2 or self.num_features % 2):
            raise ConfigError(f"num_features must be even and above 0, not {self.num_features}")
        if not self.bandwidths or not all(0 < b < 1e6 for b in self.bandwidths):
            raise ConfigError(f"bandwidths must be numbers above 0, not {self.bandwidths!r}")
        if not 0 < self.label_weight < 1:
            raise ConfigError(f"label_weight must lie between 0 and 1, not {self.label_weight!r}")
        if self.feature_seed < 0:
            raise ConfigError(f"feature_seed must be 0 or more, not {self.feature_seed}")
        for key in ("num_codes", "num_hidden", "num_steps", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, not {getattr(self, key)}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate must lie between 0 and 1, not {self.learning_rate!r}")
        for key, most in (("shrinkage", 1e6), ("smoothing", 100.0), ("pixel_noise", 1.0)):
            if not 0 <= getattr(self, key) <= most:
                raise ConfigError(f"{key} must lie in [0, {most:g}], not {getattr(self, key)!r}")

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum."""
        from ..core.accounting import single_event

        label = label_column(schema, self.label)
        num_pixels = 0 if schema.image is None else schema.image.num_pixels
        width, cells = self._width(num_pixels), int(_columns(schema, label)[0].sum())
        num_labels = schema.shape[label] if label >= 0 else 1
        largest = max((num_pixels + cells) * width, num_labels * (width + cells + 1))
        refuse_wide(schema, self.name, largest)
        return single_event(noise_multiplier)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Ask once, fit a network; where the sum is but noise, one that knows nothing."""
        label = label_column(schema, self.label)
        cells, bins = _columns(schema, label)
        num_labels = schema.shape[label] if label >= 0 else 1
        num_pixels = 0 if schema.image is None else schema.image.num_pixels
        noisy = yield Query(
            "mean_features",
            dim=num_labels * (self._width(num_pixels) + int(cells.sum()) + 1),
            clip=1.0,
            noise_multiplier=noise_multiplier,
            inputs={
                "label": np.array([label], dtype=np.int64),
                "num_pixels": np.array([num_pixels], dtype=np.int64),
                "num_cells": cells,
                "num_bins": bins,
            },
        )
        fitting = Fitting(
            num_codes=self.num_codes,
            num_hidden=self.num_hidden,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            shrinkage=self.shrinkage,
            smoothing=self.smoothing,
            pixel_noise=self.pixel_noise,
        )
        target = None if noisy.is_void else self._target(noisy, num_labels)
        if target is None:
            return untrained(schema, label, fitting, rng)
        features = self._features(num_pixels, cells, bins)
        return fitted(schema, label, features, target, fitting, rng)

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The mean over each user's records of features in the place of the record's label."""
        label = int(query.inputs["label"][0])
        cells, bins = query.inputs["num_cells"], query.inputs["num_bins"]
        num_pixels = int(query.inputs["num_pixels"][0])
        rows = np.zeros((shard.num_users, query.dim), dtype=np.float32)
        if shard.num_users:
            features = self._features(num_pixels, cells, bins)
            num_labels = query.dim // (features.num_features + 1)
            for first, users in _in_blocks(shard, max(1, _RECORDS // shard.max_records)):
                part = rows[first : first + users.num_users]
                self._fill(part, users, features, label, num_labels)
        return Contribution.rows(rows)

    def _fill(
        self,
        rows: NDArray[np.float32],
        users: BoundedShard,
        features: Features,
        label: int,
        num_labels: int,
    ) -> None:
        """The vectors of some users, `(num_users, dim)`, into zeros."""
        codes, user = users.records.codes, users.user_index
        labels = codes[:, label].astype(np.int64) if label >= 0 else np.zeros_like(user)
        known = (labels >= 0) & (labels < num_labels)
        labels = np.where(known, labels, 0)
        counts = np.bincount(user, minlength=users.num_users).astype(np.float32)
        shares = (np.float32(_INSIDE) / counts)[user]
        shares[~known] = np.nan
        made = features.of(users.records) * shares[:, None]
        order = np.lexsort((labels, user))
        key = (user * num_labels + labels)[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        # records of one user and label are added in the order in which the user holds them
        means = np.add.reduceat(made[order], starts, axis=0)
        where = np.divmod(key[starts], num_labels)
        means_end = num_labels * made.shape[1]
        by_label = rows[:, :means_end].reshape(users.num_users, num_labels, made.shape[1])
        by_label[where] = means * np.float32((1 - self.label_weight**2) ** 0.5)
        weights = np.add.reduceat(shares[order], starts)
        rows[:, means_end:][where] = weights * np.float32(self.label_weight)

    def _target(self, noisy: NoisySum, num_labels: int) -> Target | None:
        """Shares of the labels and their mean features; `None` if the sum is but noise."""
        sums, masses = np.split(noisy.vector / _INSIDE, [-num_labels])
        masses = masses / self.label_weight
        total = pooled_total([(masses, noisy.stddev / self.label_weight)])
        if total == 0:
            return None
        scale = (1 - self.label_weight**2) ** 0.5 * total
        return Target(
            means=sums.reshape(num_labels, -1) / scale,
            label_probs=to_simplex(masses / total),
            variance=(noisy.stddev / scale) ** 2,
        )

    def _features(
        self, num_pixels: int, cells: NDArray[np.int64], bins: NDArray[np.int64]
    ) -> Features:
        """The public features, drawn from their seed at each place that needs them.

        Raises:
          ConfigError: The sizes, which came over a network, are impossible.
        """
        counts = cells.tolist(), bins.tolist()
        rows = num_pixels + sum(counts[0])
        if (
            num_pixels < 0
            or cells.shape != bins.shape
            or min([0, *counts[0], *counts[1]]) < 0
            or any(b > c > 0 for c, b in zip(*counts, strict=True))
            or rows * self._width(num_pixels) > MOST_NUMBERS
        ):
            raise ConfigError("the sizes of a record's columns are impossible")
        return _drawn(
            seed=self.feature_seed,
            num_frequencies=self._width(num_pixels) // 2,
            bandwidths=tuple(self.bandwidths),
            num_pixels=num_pixels,
            num_cells=tuple(counts[0]),
            num_bins=tuple(counts[1]),
        )

    def _width(self, num_pixels: int) -> int:
        """Number of random features."""
        if self.num_features is not None:
            return self.num_features
        return _FOR_IMAGES if num_pixels else _FOR_TABLES


def _columns(schema: Schema, label: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells of each column and how many of them have an order; the label has none."""
    cells = np.array(schema.shape, dtype=np.int64)
    bins = np.array([column.num_ordered_cells for column in schema.columns], dtype=np.int64)
    if label >= 0:
        cells[label] = bins[label] = 0
    return cells, bins


def _in_blocks(shard: BoundedShard, num_users: int) -> Iterator[tuple[int, BoundedShard]]:
    """Some users at a time, and the number of those before."""
    first = 0
    for users in shard.blocks(num_users):
        yield first, users
        first += users.num_users

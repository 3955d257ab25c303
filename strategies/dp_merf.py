# SPDX-License-Identifier: Apache-2.0
"""DP-MERF: one noisy mean of random features, and a small generator fitted to it for ever after."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Rounds, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from ..models import handwriting
from .parts.codec import FARTHEST, STEPS, Codec, Handwriting
from .parts.features import Features
from .parts.generator import Fitting, Target, fitted, label_column, others, untrained
from .parts.latent_gaussians import fitted_gaussians, unmeasured
from .parts.simplex import pooled_total, to_simplex
from .parts.width import MOST_NUMBERS, refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_INSIDE = 1 - 1e-6  # a user's vector stays within the clip in spite of float32 rounding
_RECORDS = 2048  # records whose features are held at a time, unless one user has more
_NUMBERS = 1 << 25  # of their features
_FOR_IMAGES, _FOR_TABLES = 2000, 500  # random features
_PIXEL_BANDS, _LATENT_BANDS = (0.15, 0.2), (1.0, 1.2)
_EVEN = 0.6  # norm of a user of many images, all of one label; of many, it falls as their root
_START: Literal["handwriting"] = "handwriting"
_LEAST_SMOOTH = 0.8  # pixels
_LARGE_SIDE, _NOISE_SMALL, _NOISE_LARGE = 16, 0.2, 0.5  # noise on pixels, by an image's side
_SHAPE = (handwriting.SIDE, handwriting.SIDE, 1)

_drawn = lru_cache(maxsize=1)(Features.draw)  # a client's blocks ask for the same, one by one


@dataclass(frozen=True)
class DpMerf(Strategy):
    """One round; a user sends the mean features of its own records, for each label.

    The server fits a generator to the noisy mean, which costs no privacy. A user's vector has norm
    one at most, and a user of one record fills it. The mean of many records is far shorter: where
    there are images, all users are cut to the length of such a mean, so that noise is less by the
    same factor. Users of one record each lose nothing by it, and among users of many kinds those of
    few records weigh less; in tables alone nobody is cut.

    With `features = "public"` an image is seen by the latent numbers of an encoder that learned
    from public scripts. The features are those of a kernel between these, and the generator is one
    Gaussian a label of them, with the public decoder behind it. With `"random"` it is seen by its
    pixels, and the generator is a network.

    Attributes:
      label: Column that records are told apart by; `None`: the schema's target if that is a
        category; `""`: none.
      features: `public`: of what an encoder of public scripts sees, for gray images of 28 x 28 with
        one label at most, bright strokes on dark ground; `random`: of pixels and cells; `auto`:
        public for records of that form, random for all others. Say `random` for images of that
        form that are no writing.
      num_features: Random features; even. The more, the finer; a user sends this many numbers
        for each label, beside one for each cell. `None`: 2000 for images, 500 for tables alone.
      bandwidths: Scales of the kernel, an equal part of the features each; see `Features.draw`.
        `None`: 0.15 and 0.2; 1.0 and 1.2 between latent numbers.
      clip: Norm that users are cut to, in (0, 1]. `None`: 1 for tables alone; for images 0.6 by
        the root of the number of labels.
      label_weight: How much of a user's unit norm is spent on the number of records of each
        label, in (0, 1).
      feature_seed: Public seed of the features.
      num_steps: Gradient steps of the fit.
      num_codes: Of a network: Gaussian numbers that a synthetic record is made from.
      num_hidden: Of a network: width of its hidden layers.
      batch_size: Of a network: records made in a step.
      learning_rate: Of a network: at the start.
      shrinkage: Of a network: pull towards one that knows nothing, in units of the noise's
        variance.
      smoothing: Of a network: radius over which neighboring pixels move together, in pixels.
        `None`: a fourteenth of the image's shorter side, and 0.8 at least.
      pixel_noise: Of a network: noise on a synthetic pixel, as a fraction of its range. `None`:
        0.2; 0.5 for images of 16 pixels a side and more.

    Privacy:
      The vector of a user is a mean over its records of `sqrt(1 - w^2)` times features of norm
      one, in the place of the record's label, and `w` times a one in that label's place. Each
      term has norm one, so the mean has norm one at most; it is cut to `clip` with all others.

    Reference:
      Harder, Adamczewski, Park (2021), "DP-MERF: Differentially Private Mean Embeddings with
      Random Features for Practical Privacy-Preserving Data Generation", AISTATS;
      Harder, Jalali, Sutherland, Park (2023), "Pre-trained Perceptual Features Improve
      Differentially Private Image Generation", TMLR, for public features.
    """

    label: str | None = None
    features: Literal["auto", "public", "random"] = "auto"
    num_features: int | None = None
    bandwidths: tuple[float, ...] | None = None
    clip: float | None = None
    label_weight: float = 0.3
    feature_seed: int = 0
    num_steps: int = 500
    num_codes: int = 10
    num_hidden: int = 128
    batch_size: int = 200
    learning_rate: float = 0.01
    shrinkage: float = 7.0
    smoothing: float | None = None
    pixel_noise: float | None = None
    name: ClassVar[str] = "dp_merf"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.num_features is not None and (self.num_features < 2 or self.num_features % 2):
            raise ConfigError(f"num_features must be even and above 0, not {self.num_features}")
        if self.features not in ("auto", "public", "random"):
            raise ConfigError(
                f"features must be 'auto', 'public' or 'random', not {self.features!r}"
            )
        bands = self.bandwidths
        if bands is not None and (not bands or not all(0 < band < 1e6 for band in bands)):
            raise ConfigError(f"bandwidths must be numbers above 0, not {bands!r}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ConfigError(f"clip must lie above 0 and at most at 1, not {self.clip!r}")
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
            value = getattr(self, key)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{key} must lie in [0, {most:g}], not {value!r}")

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum."""
        from ..core.accounting import single_event

        label = label_column(schema, self.label)
        codec = self._codec(schema, label)
        num_pixels = _num_seen(schema, codec)
        width, cells = self._width(num_pixels), int(_columns(schema, label)[0].sum())
        num_labels = schema.shape[label] if label >= 0 else 1
        seen = num_pixels + cells if codec is None else num_pixels * num_labels
        refuse_wide(schema, self.name, max(seen * width, num_labels * (width + cells + 1)))
        return single_event(noise_multiplier)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Ask once, fit a generator; where the sum is but noise, one that knows nothing."""
        label = label_column(schema, self.label)
        cells, bins = _columns(schema, label)
        num_labels = schema.shape[label] if label >= 0 else 1
        codec = self._codec(schema, label)
        num_pixels = _num_seen(schema, codec)
        noisy = yield Query(
            "mean_features",
            dim=num_labels * (self._width(num_pixels) + int(cells.sum()) + 1),
            clip=self._clip(schema, num_labels),
            noise_multiplier=noise_multiplier,
            inputs={
                "label": np.array([label], dtype=np.int64),
                "num_pixels": np.array([num_pixels], dtype=np.int64),
                "num_cells": cells,
                "num_bins": bins,
                "digest": _digest(codec),
            },
        )
        target = None if noisy.is_void else self._target(noisy, num_labels)
        features = self._features(num_pixels, cells, bins, codec)
        if codec is None:
            return self._network(schema, label, features, target, rng)
        if target is None:
            return unmeasured(schema, label, _START, codec)
        return fitted_gaussians(schema, label, _START, codec, features, target, self.num_steps)

    def _network(
        self,
        schema: Schema,
        label: int,
        features: Features,
        target: Target | None,
        rng: np.random.Generator,
    ) -> Synthesizer:
        """A network fitted to the target; without one, one that knows nothing."""
        side = 0 if schema.image is None else min(schema.image.shape[:2])
        usual = _NOISE_SMALL if side < _LARGE_SIDE else _NOISE_LARGE
        fitting = Fitting(
            num_codes=self.num_codes,
            num_hidden=self.num_hidden,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            shrinkage=self.shrinkage,
            smoothing=max(_LEAST_SMOOTH, side / 14) if self.smoothing is None else self.smoothing,
            pixel_noise=usual if self.pixel_noise is None else self.pixel_noise,
        )
        if target is None:
            return untrained(schema, label, fitting, rng)
        return fitted(schema, label, features, target, fitting, rng)

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The mean over each user's records of features in the place of the record's label."""
        label = int(query.inputs["label"][0])
        cells, bins = query.inputs["num_cells"], query.inputs["num_bins"]
        num_pixels = int(query.inputs["num_pixels"][0])
        codec = _told(query, shard)
        rows = np.zeros((shard.num_users, query.dim), dtype=np.float32)
        if shard.num_users:
            features = self._features(num_pixels, cells, bins, codec)
            num_labels = query.dim // (features.num_features + 1)
            if num_labels < 1:
                raise ConfigError("the sizes of a record's columns are impossible")
            at_once = min(_RECORDS, _NUMBERS // features.num_features)
            for first, users in _in_blocks(shard, max(1, at_once // shard.max_records)):
                part = rows[first : first + users.num_users]
                self._fill(part, users, features, codec, label, num_labels)
        return Contribution.rows(rows)

    def _fill(
        self,
        rows: NDArray[np.float32],
        users: BoundedShard,
        features: Features,
        codec: Codec | None,
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
        images = users.records.images
        latent = None if codec is None or images is None else codec.encoded(images)
        made = features.of(users.records, latent) * shares[:, None]
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
        self,
        num_pixels: int,
        cells: NDArray[np.int64],
        bins: NDArray[np.int64],
        codec: Codec | None,
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
            or max(1, rows) * self._width(num_pixels) > MOST_NUMBERS
        ):
            raise ConfigError("the sizes of a record's columns are impossible")
        usual = _PIXEL_BANDS if codec is None else _LATENT_BANDS
        scale = {} if codec is None else {"steps": STEPS, "farthest": FARTHEST * STEPS}
        return _drawn(
            **scale,
            seed=self.feature_seed,
            num_frequencies=self._width(num_pixels) // 2,
            bandwidths=usual if self.bandwidths is None else tuple(self.bandwidths),
            num_pixels=num_pixels,
            num_cells=tuple(counts[0]),
            num_bins=tuple(counts[1]),
        )

    def _width(self, num_pixels: int) -> int:
        """Number of random features."""
        if self.num_features is not None:
            return self.num_features
        return _FOR_IMAGES if num_pixels else _FOR_TABLES

    def _clip(self, schema: Schema, num_labels: int) -> float:
        """Norm that users are cut to."""
        if self.clip is not None:
            return self.clip
        return 1.0 if schema.image is None else _EVEN / math.sqrt(num_labels)

    def _codec(self, schema: Schema, label: int) -> Codec | None:
        """The code that images are seen by; `None`: their pixels.

        Raises:
          ConfigError: Public features are asked for, and there are none for such records.
        """
        image = None if schema.image is None else schema.image.shape
        fits = image == _SHAPE and not others(schema, label)
        if self.features == "random" or (self.features == "auto" and not fits):
            return None
        if not fits:
            beside = ", ".join(schema.names[column] for column in others(schema, label))
            raise ConfigError(
                f"features = 'public' are of images of shape {_SHAPE} with one label at most, and"
                f" the schema's are of shape {image}{' beside ' if beside else ''}{beside}; scale"
                " images to that size and leave other columns out, or take features = 'random'"
            )
        return Handwriting()


def _num_seen(schema: Schema, codec: Codec | None) -> int:
    """Numbers that an image is seen by; 0 without images."""
    if codec is not None:
        return codec.num_latents
    return 0 if schema.image is None else schema.image.num_pixels


def _digest(codec: Codec | None) -> NDArray[np.uint8]:
    """What tells a code from another; nothing where images are seen by their pixels."""
    return np.zeros(0, dtype=np.uint8) if codec is None else codec.digest()


def _told(query: Query, shard: BoundedShard) -> Codec | None:
    """The code that a request wants images to be seen by; `None`: their pixels.

    Raises:
      ConfigError: This client has another code, or records that it does not fit.
    """
    if not len(query.inputs["digest"]):
        return None
    codec, images = Handwriting(), shard.records.images
    if not np.array_equal(query.inputs["digest"], codec.digest()):
        raise ConfigError(
            "the server's public weights are not those of this client; install the same"
            " version of fedsynth at both"
        )
    if images is None or images.shape[1:] != _SHAPE:
        raise ConfigError(f"the request is for images of shape {_SHAPE}, and the records' are not")
    if query.inputs["num_pixels"][0] != codec.num_latents:
        raise ConfigError("the sizes of a record's columns are impossible")
    return codec


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

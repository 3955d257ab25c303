# SPDX-License-Identifier: Apache-2.0
"""A critic of images: it scores real ones against synthetic ones, and learns at the users.

The training half (torch) gives users' updates; the numpy half tells the server how its own images
would have moved the same weights, and how an image should change to be scored higher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .trainable import RecordShape, Trainable

_ENTER = 3.0  # first weights of a hidden unit: their spread, times the root of their number
_LEAVE = 0.25  # spread of the first weights by which hidden units are read
_LEAST_SIDE = 12  # of an image whose pixels are pooled
_MOST_FAKES = 1 << 22  # numbers in the synthetic images of a request


@dataclass(frozen=True)
class ImageCritic(Trainable):
    """Scores an image by hidden units, which all labels read in part alike, and by a template.

    The score of image x with label y is `tanh(x w + b) (v + u[y]) + x t[y]`, x being pooled pixels
    around zero. Every record moves v, so what all labels have in common, such as a bug, is told
    through far less noise than by the u of each. The template t starts at zero: what it learns is
    by how much real images of a label are brighter than synthetic ones, place by place. A record's
    loss is the mean score of the synthetic images of its label, less its own score (Wasserstein).
    So what a user sends is near zero where synthetic images are like the user's, and a small clip
    does not cut it.

    Attributes:
      image: `(height, width, channels)`.
      num_labels: Labels of a record; 1 for records without one.
      label: Whether records have a label, as their only column.
      hidden: Units.
      fakes: Public synthetic images of each label as the critic sees them, in [0, 1],
        `(num_fakes, num_labels, num_seen)`; none for the server.
    """

    image: tuple[int, int, int]
    num_labels: int
    label: bool
    hidden: int
    fakes: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls, shape: RecordShape, hidden: int, fakes: NDArray[np.float32] | None = None
    ) -> "ImageCritic":
        """The critic for a shape of records.

        Raises:
          ConfigError: They have no image, or columns beside a label, or synthetic images do not
            fit.
        """
        if shape.image is None or len(shape.cells) > 1:
            raise ConfigError(
                "this strategy learns images with at most one column, their label; leave out other"
                " columns, or take dp_wgan or a method of marginals for tables"
            )
        critic = cls(shape.image, (shape.cells or (1,))[0], bool(shape.cells), hidden, fakes)
        if fakes is not None and (
            fakes.dtype != np.float32
            or fakes.ndim != 3
            or not len(fakes)
            or fakes.shape[1:] != (critic.num_labels, critic.num_seen)
            or fakes.size > _MOST_FAKES
            or not np.isfinite(fakes).all()
        ):
            raise ConfigError("the request's synthetic images do not fit its schema or settings")
        return critic

    @cached_property
    def pool(self) -> int:
        """Side of the squares of pixels that are seen as one."""
        sides, pool = self.image[:2], 1
        while all(s % (2 * pool) == 0 and s // (2 * pool) >= _LEAST_SIDE for s in sides):
            pool *= 2
        return pool

    @cached_property
    def seen_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what is seen."""
        return self.image[0] // self.pool, self.image[1] // self.pool, self.image[2]

    @property
    def num_seen(self) -> int:
        """Numbers of one image as it is seen."""
        return math.prod(self.seen_shape)

    @property
    def side_by_side(self) -> bool:
        """Never: it saves a third of a short step, and first tries every number of records."""
        return False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight, in the order of the flat vector."""
        return {
            "enter.w": (self.num_seen, self.hidden),
            "enter.b": (self.hidden,),
            "leave.w": (self.num_labels, self.hidden),
            "common.w": (self.hidden,),
            "template": (self.num_labels, self.num_seen),
        }

    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Hidden units that look at images at random; templates of zeros.

        Without biases of their own, units would take dark and bright images, half of each, for gray
        ones: a hyperbolic tangent is odd.
        """
        parts = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        spread = _ENTER / math.sqrt(self.num_seen)
        parts["enter.w"] = rng.normal(0, spread, parts["enter.w"].shape)
        parts["enter.b"] = rng.normal(0, 1, parts["enter.b"].shape)
        for name in ("leave.w", "common.w"):
            parts[name] = rng.normal(0, _LEAVE, parts[name].shape)
        return np.concatenate([part.ravel() for part in parts.values()]).astype(np.float32)

    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """Pooled pixels around zero, `(num_records, num_seen)`; labels."""
        if records.images is None:
            raise ConfigError("records without the images that the request describes")
        labels = np.zeros(len(records), dtype=np.int64)
        if self.label:
            labels = records.codes[:, 0].astype(np.int64)
        return torch.from_numpy(self.seen(records.images) - np.float32(0.5)), torch.from_numpy(
            labels
        )

    def seen(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images as the critic sees them: pooled, flat, in [0, 1], `(num_images, num_seen)`."""
        height, width, channels = self.seen_shape
        squares = images.reshape(len(images), height, self.pool, width, self.pool, channels)
        # whole numbers: no rounding, so no dependence on the block
        totals = squares.sum(axis=(2, 4), dtype=np.int64).reshape(len(images), self.num_seen)
        return np.asarray(totals / (255.0 * self.pool**2), dtype=np.float32)

    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Mean score of the synthetic images of a record's label, less the record's own."""
        if self.fakes is None:
            raise ConfigError("a critic without synthetic images to compare records with")
        images, labels = seen
        sent = np.array(self.fakes).reshape(-1, self.num_seen)  # what came by wire is read-only
        given = torch.from_numpy(sent).to(images) - 0.5
        every = torch.arange(self.num_labels, device=images.device).repeat(len(self.fakes))
        fakes = _scores(torch, weights, given, every).reshape(-1, self.num_labels).mean(0)
        return fakes[labels] - _scores(torch, weights, images, labels)

    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> Synthesizer:
        """A critic draws nothing.

        Raises:
          ConfigError: Always.
        """
        raise ConfigError("a critic is no synthesizer: its strategy's network is")

    def gradient(
        self,
        weights: NDArray[np.float32],
        fakes: NDArray[np.float32],
        labels: NDArray[np.int64],
        heights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Gradient of images' scores by the weights, each times its height, summed.

        Args:
          weights: Flat.
          fakes: Images as `seen` gives them, `(num_images, num_seen)`.
          labels: Theirs.
          heights: One an image.

        Returns:
          `(num_weights,)`.
        """
        w, x = self.split(weights), fakes - np.float32(0.5)
        hidden = np.tanh(x @ w["enter.w"] + w["enter.b"])
        slopes = (1 - hidden * hidden) * _read(w, labels) * heights[:, None]
        lit = np.zeros((len(x), self.num_labels), dtype=np.float32)
        lit[np.arange(len(x)), labels] = 1
        lit *= heights[:, None]
        each = lit.T @ hidden
        parts = (x.T @ slopes, slopes.sum(axis=0), each, each.sum(axis=0), lit.T @ x)
        return np.concatenate([part.ravel() for part in parts])

    def uphill(
        self,
        weights: NDArray[np.float32],
        fakes: NDArray[np.float32],
        labels: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Gradient of each image's score by what is seen of it, `(num_images, num_seen)`."""
        w, x = self.split(weights), fakes - np.float32(0.5)
        hidden = np.tanh(x @ w["enter.w"] + w["enter.b"])
        slopes = (1 - hidden * hidden) * _read(w, labels)
        up: NDArray[np.float32] = slopes @ w["enter.w"].T + w["template"][labels]
        return up


def _scores(torch: Any, w: Mapping[str, Any], images: Any, labels: Any) -> Any:
    """Scores of images around zero."""
    hidden = torch.tanh(images @ w["enter.w"] + w["enter.b"])
    return (hidden * _read(w, labels)).sum(1) + (images * w["template"][labels]).sum(1)


def _read(w: Mapping[str, Any], labels: Any) -> Any:
    """By which weights the units of each image are read, `(num_images, hidden)`."""
    return w["leave.w"][labels] + w["common.w"]

# SPDX-License-Identifier: Apache-2.0
"""A model as training sees it: one flat vector of weights goes in, the loss of each record out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from ...core.texts import as_texts

_MOST_SIDE = 1 << 14  # of an image, in pixels or channels
_MOST_CELLS = 1 << 31  # of a column
_MOST_BESIDE = 1 << 20  # weights
_LETTERS = "abcdefgh "


@dataclass(frozen=True)
class RecordShape:
    """What is publicly known of records: all that a client needs to build the model again.

    Attributes:
      cells: Cells of each table column.
      image: `(height, width, channels)`, or `None` without an image column.
      text: Most bytes of a text; 0 without a text column.
    """

    cells: tuple[int, ...]
    image: tuple[int, int, int] | None
    text: int = 0

    @classmethod
    def of(cls, schema: Schema) -> Self:
        """The shape of a schema's records."""
        return cls(
            schema.shape,
            schema.image.shape if schema.image else None,
            schema.text.max_bytes if schema.text else 0,
        )

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, NDArray[Any]]) -> Self:
        """The shape that a query's inputs describe.

        Raises:
          ConfigError: They describe none.
        """
        cells, image = inputs.get("cells"), inputs.get("image")
        text = inputs.get("text", np.zeros(1, dtype=np.int64))
        if (
            cells is None
            or image is None
            or cells.ndim != 1
            or image.shape not in ((0,), (3,))
            or cells.dtype.kind not in "iu"
            or image.dtype.kind not in "iu"
            or text.shape != (1,)
            or text.dtype.kind not in "iu"
            or not 0 <= int(text[0]) < _MOST_CELLS
            or not ((cells >= 1) & (cells < _MOST_CELLS)).all()
            or not ((image >= 1) & (image <= _MOST_SIDE)).all()
        ):
            raise ConfigError("the request does not describe records of any schema")
        sides = tuple(int(side) for side in image)
        return cls(
            tuple(int(size) for size in cells),
            (sides[0], sides[1], sides[2]) if sides else None,
            int(text[0]),
        )

    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """As a query's inputs."""
        told = {
            "cells": np.array(self.cells, dtype=np.int64),
            "image": np.array(self.image or (), dtype=np.int64),
        }
        return told | ({"text": np.array([self.text])} if self.text else {})

    def check(self, records: Records) -> None:
        """Refuse records of another shape.

        Raises:
          ConfigError: A record has other columns, a cell out of range or an image of another size.
        """
        codes, images = records.codes, records.images
        if codes.shape[1:] != (len(self.cells),):
            raise ConfigError("records with other columns than the request describes")
        if ((codes < 0) | (codes >= np.array(self.cells, dtype=np.int64))).any():
            raise ConfigError("a record outside the schema")
        if self.image is not None and (images is None or images.shape[1:] != self.image):
            raise ConfigError("images of another size than the request describes")
        if self.text and records.texts is None:
            raise ConfigError("records without the texts that the request describes")

    def made_up(self, rng: np.random.Generator, num_records: int) -> Records:
        """Random records of this shape."""
        columns = [rng.integers(0, size, num_records) for size in self.cells]
        codes = np.stack(columns, axis=1) if columns else np.zeros((num_records, 0))
        images = texts = None
        if self.image is not None:
            images = rng.integers(0, 256, (num_records, *self.image), dtype=np.uint8)
        if self.text:
            texts = as_texts("".join(rng.choice(list(_LETTERS), 8)) for _ in range(num_records))
        return Records(codes.astype(np.int32), images, texts=texts)


@dataclass(frozen=True)
class Made:
    """All that a model was made of.

    Attributes:
      shape: Of the records that it is for.
      settings: Everything else, in full, as a strategy's class and its settings: verdicts on the
        model are kept under it in this process. `None`: none is kept.
    """

    shape: RecordShape
    settings: Hashable = None


class Trainable(ABC):
    """A model that users can train by gradient steps of their own.

    Weights are one float32 vector, in the order of `shapes`. It holds every parameter and every
    floating-point buffer that training changes, so that what is clipped is all that is released.

    Privacy:
      A record's loss may depend on that record alone, its `chance` and the weights: on no other
      record, of the same user or of another. Layers that mix records, as batch normalization
      does, are not allowed.
    """

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each weight by its name, in the order of the flat vector."""

    @abstractmethod
    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Where training starts, `(num_weights,)`: random, or learned from public data."""

    @abstractmethod
    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """Records as tensors, their leading axis being records; each from that record alone."""

    @abstractmethod
    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Loss of each record, `(num_records,)`.

        Runs under autograd and, where that is faster, under `torch.func`: no branch on values, no
        change of a tensor in place that others hold, no `.item()`.

        Args:
          torch: The library.
          weights: A tensor for each of `shapes`.
          seen: What `read` gave, for some records.
          chance: What `chance` gave, for the same records.
        """

    @abstractmethod
    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> Synthesizer:
        """What samples records by trained weights, `(num_weights,)`."""

    def chance(self, rng: np.random.Generator, num_records: int) -> tuple[NDArray[Any], ...]:
        """Randomness of one step's losses, by the place of a record among its user's own.

        The same for every user. What stands at a place may not depend on `num_records`: an array
        that is drawn place after place does not, and of several each but the last needs a
        generator of its own (`rng.spawn`).

        Args:
          rng: Public randomness of this step.
          num_records: Places.

        Returns:
          Arrays whose leading axis is places; none for losses without randomness.
        """
        return ()

    @property
    def has_slopes(self) -> bool:
        """Whether `slopes` is there, by which a single step of many users is faster."""
        return False

    def slopes(self, torch: Any, weights: Any, seen: tuple[Any, ...]) -> NDArray[np.float32]:
        """The slope of each record's loss, `(num_records, num_weights)`, where there is no chance.

        Each row must hang on that record and the weights alone, to the last bit, whoever the other
        records are of.

        Args:
          torch: The library.
          weights: The flat vector, `(num_weights,)`.
          seen: What `read` gave, for records of any users.
        """
        raise NotImplementedError("a model that has_slopes must give them")

    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """Public arrays by which a client sees that its model is the server's; none for most.

        They go with every query, beside the weights and the shape of records.
        """
        return {}

    def check_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Refuse a query whose arrays are not those of `inputs` here.

        Raises:
          ConfigError: They are another model's.
        """
        for name, own in self.inputs().items():
            told = inputs.get(name)
            if told is None or told.dtype != own.dtype or not np.array_equal(told, own):
                raise ConfigError(
                    f"the request is for another model than the one here: {name!r} differs"
                )

    @property
    def side_by_side(self) -> bool:
        """Whether several users' steps at once, by `torch.func`, are faster than one by one.

        By measurement they are for models of up to a million weights, but for convolutions whose
        channels are laid out next to each other: `benchmarks/throughput.py`.
        """
        return self.num_weights <= _MOST_BESIDE and not self.channels_last

    @property
    def channels_last(self) -> bool:
        """Whether images and kernels shall lie in memory with their channels next to each other.

        Convolutions and pooling are faster so. `losses` must then take tensors of four axes whose
        memory is not in their order: `.reshape`, never `.view`.
        """
        return False

    @property
    def num_weights(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def split(self, flat: Any) -> dict[str, Any]:
        """The flat vector as named views; a numpy array or a torch tensor."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            views[name] = flat[start : start + size].reshape(shape)
            start += size
        return views

    def check_fit(self, weights: NDArray[Any]) -> None:
        """Refuse weights of another model.

        Raises:
          ConfigError: They have another shape, or are not float32.
        """
        if weights.shape != (self.num_weights,) or weights.dtype != np.float32:
            raise ConfigError(
                f"the weights do not fit the model: expected {self.num_weights:,} of float32,"
                f" not {weights.dtype} of shape {weights.shape}. Give those of a model with the"
                " same settings and schema"
            )

# SPDX-License-Identifier: Apache-2.0
"""A small variational autoencoder over table cells and pixels, as one flat vector of weights.

The training half (torch, loaded when first used) gives users' updates; the sampling half of the
dense form is plain numpy, so that a release can be sampled without torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .trainable import Trainable

Form = Literal["mlp", "cnn"]
_CONV = (16, 32)  # channels of the two convolutions


@dataclass(frozen=True)
class Net(Trainable):
    """The shape of an autoencoder; its weights are one float32 vector of `num_weights`.

    Attributes:
      form: `mlp`: dense layers. `cnn`: two strided convolutions each way around dense layers;
        needs images whose sides are multiples of four.
      cells: Cells of each table column.
      image: `(height, width, channels)`, or `None`.
      hidden: Units of the hidden layers.
      latent: Units of the code.
      kl_weight: Weight of the code's divergence from the standard normal; of training alone.
    """

    form: Form
    cells: tuple[int, ...]
    image: tuple[int, int, int] | None
    hidden: int
    latent: int
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.hidden, self.latent) < 1:
            raise ConfigError("hidden and latent must be 1 or more")
        if self.form == "cnn":
            if self.image is None:
                raise ConfigError("model = 'cnn' needs an image column; use 'mlp' for tables")
            if self.image[0] % 4 or self.image[1] % 4:
                raise ConfigError("model = 'cnn' needs image sides that are multiples of 4")

    @property
    def num_pixels(self) -> int:
        """Values of one image; 0 without."""
        return math.prod(self.image) if self.image else 0

    @property
    def num_cells(self) -> int:
        """Cells of all columns."""
        return sum(self.cells)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight, in the order of the flat vector."""
        h, z, cells = self.hidden, self.latent, self.num_cells
        if self.form == "mlp" or self.image is None:
            width = self.num_pixels + cells
            return {
                **_dense("enter", width, h),
                **_dense("code", h, 2 * z),
                **_dense("open", z, h),
                **_dense("leave", h, width),
            }
        height, width, channels = self.image
        flat = (height // 4) * (width // 4) * _CONV[1]
        return {
            "conv1.w": (_CONV[0], channels, 3, 3),
            "conv1.b": (_CONV[0],),
            "conv2.w": (_CONV[1], _CONV[0], 3, 3),
            "conv2.b": (_CONV[1],),
            **_dense("enter", flat + cells, h),
            **_dense("code", h, 2 * z),
            **_dense("open", z, h),
            **_dense("columns", h, cells),
            **_dense("spread", h, flat),
            "up1.w": (_CONV[1], _CONV[0], 4, 4),
            "up1.b": (_CONV[0],),
            "up2.w": (_CONV[0], channels, 4, 4),
            "up2.b": (channels,),
        }

    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Fresh weights: Gaussian, scaled by the square root of a unit's inputs; biases zero."""
        parts = []
        for name, shape in self.shapes.items():
            if name.endswith(".b"):
                parts.append(np.zeros(math.prod(shape)))
                continue
            fan_in = math.prod(shape[1:]) if name.startswith("conv") else shape[0]
            parts.append(rng.normal(0.0, 1 / math.sqrt(fan_in), math.prod(shape)))
        return np.concatenate(parts).astype(np.float32)

    def decoded(
        self, weights: NDArray[np.float32], codes: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixel means in [0, 1], `(n, num_pixels)`, and cell logits, `(n, num_cells)`."""
        w = self.split(weights.astype(np.float64))
        opened = np.maximum(codes @ w["open.w"] + w["open.b"], 0)
        if self.form == "mlp":
            out = opened @ w["leave.w"] + w["leave.b"]
            pixels, logits = out[:, : self.num_pixels], out[:, self.num_pixels :]
        else:
            logits = opened @ w["columns.w"] + w["columns.b"]
            pixels = self._drawn(w, opened)
        return 1 / (1 + np.exp(-np.clip(pixels, -60, 60))), logits

    def _drawn(self, w: Mapping[str, Any], opened: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixel logits of the convolutional form."""
        height, width, _ = self.image or (0, 0, 0)
        spread = np.maximum(opened @ w["spread.w"] + w["spread.b"], 0)
        grid = spread.reshape(len(opened), _CONV[1], height // 4, width // 4)
        grid = np.maximum(_up(grid, w["up1.w"], w["up1.b"]), 0)
        pixels = _up(grid, w["up2.w"], w["up2.b"])
        return np.moveaxis(pixels, 1, 3).reshape(len(opened), -1)

    def sampled(
        self, weights: NDArray[np.float32], num_records: int, rng: np.random.Generator
    ) -> Records:
        """Records decoded from standard normal codes; cells drawn, pixels set to their mean."""
        codes = rng.standard_normal((num_records, self.latent)).astype(np.float32)
        pixels, logits = self.decoded(weights, codes)
        columns = np.empty((num_records, len(self.cells)), dtype=np.int32)
        start = 0
        for number, size in enumerate(self.cells):
            gumbel = rng.gumbel(size=(num_records, size))
            columns[:, number] = (logits[:, start : start + size] + gumbel).argmax(axis=1)
            start += size
        images = None
        if self.image is not None:
            images = np.rint(255 * pixels).astype(np.uint8).reshape(num_records, *self.image)
        return Records(columns, images)

    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """Pixels in [0, 1], `(num_records, num_pixels)`; cells, as numbers and as ones."""
        cells = torch.from_numpy(records.codes.astype(np.int64))
        firsts = torch.tensor([0, *np.cumsum(self.cells)[:-1].tolist()][: len(self.cells)])
        lit = torch.zeros((len(cells), self.num_cells)).scatter_(1, cells + firsts, 1.0)
        if records.images is None or not self.num_pixels:
            return torch.zeros((len(cells), self.num_pixels)), cells, lit
        images = torch.from_numpy(np.array(records.images))
        return images.reshape(len(cells), -1).to(torch.float32).div_(255), cells, lit

    def chance(self, rng: np.random.Generator, num_records: int) -> tuple[NDArray[Any], ...]:
        """Noise of the code."""
        return (rng.standard_normal((num_records, self.latent)).astype(np.float32),)

    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Negative evidence lower bound of each record.

        Reference:
          Kingma and Welling (2014), "Auto-Encoding Variational Bayes", arXiv 1312.6114, equation
          10.
        """
        fn, w = torch.nn.functional, weights
        (pixels, cells, lit), (noise,) = seen, chance
        if self.form == "mlp":
            shown = torch.cat([pixels, lit], dim=1)
        else:
            height, width, channels = self.image or (0, 0, 0)
            grid = pixels.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
            grid = torch.relu(fn.conv2d(grid, w["conv1.w"], w["conv1.b"], stride=2, padding=1))
            grid = torch.relu(fn.conv2d(grid, w["conv2.w"], w["conv2.b"], stride=2, padding=1))
            shown = torch.cat([grid.flatten(1), lit], dim=1)
        code = torch.relu(torch.addmm(w["enter.b"], shown, w["enter.w"]))
        code = torch.addmm(w["code.b"], code, w["code.w"])
        mean, log_var = code[:, : self.latent], code[:, self.latent :].clamp(-8, 8)
        opened = mean + torch.exp(0.5 * log_var) * noise
        opened = torch.relu(torch.addmm(w["open.b"], opened, w["open.w"]))
        if self.form == "mlp":
            out = torch.addmm(w["leave.b"], opened, w["leave.w"])
            drawn, logits = out[:, : self.num_pixels], out[:, self.num_pixels :]
        else:
            logits = torch.addmm(w["columns.b"], opened, w["columns.w"])
            spread = torch.relu(torch.addmm(w["spread.b"], opened, w["spread.w"]))
            height, width, channels = self.image or (0, 0, 0)
            grid = spread.reshape(-1, _CONV[1], height // 4, width // 4)
            up1, up2 = (w["up1.w"], w["up1.b"]), (w["up2.w"], w["up2.b"])
            grid = torch.relu(fn.conv_transpose2d(grid, *up1, stride=2, padding=1))
            grid = fn.conv_transpose2d(grid, *up2, stride=2, padding=1)
            drawn = grid.permute(0, 2, 3, 1).flatten(1)
        lost = -0.5 * self.kl_weight * (1 + log_var - mean.square() - log_var.exp()).sum(1)
        if self.num_pixels:
            apart = fn.binary_cross_entropy_with_logits(drawn, pixels, reduction="none")
            lost = lost + apart.sum(1)
        start = 0
        for column, size in enumerate(self.cells):
            part = logits[:, start : start + size]
            lost = lost + fn.cross_entropy(part, cells[:, column], reduction="none")
            start += size
        return lost

    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> "Autoencoder":
        """Decodes records from standard normal codes."""
        return Autoencoder(schema, self, weights)


@dataclass(frozen=True)
class Autoencoder(Synthesizer):
    """A variational autoencoder; records are decoded from standard normal codes."""

    kind: ClassVar[str] = "autoencoder"
    schema: Schema
    net: Net
    weights: NDArray[np.float32]

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """`num_records` decoded records."""
        return self.net.sampled(self.weights, num_records, rng)

    def settings(self) -> dict[str, Any]:
        """The model's shape."""
        return net_data(self.net)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights, as one flat vector."""
        return {"weights": self.weights}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The autoencoder that was saved."""
        net = parse_net(settings)
        weights = np.asarray(tensors["weights"], dtype=np.float32)
        if weights.shape != (net.num_weights,) or net.cells != schema.shape:
            raise ConfigError("the saved weights do not fit the saved model or the schema")
        return cls(schema, net, weights)


def _up(
    grid: NDArray[np.float64], kernel: NDArray[np.float64], bias: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Transposed convolution by 4 x 4 kernels, stride 2, padding 1: sides are doubled."""
    n, _, height, width = grid.shape
    wide = np.zeros((n, kernel.shape[1], 2 * height + 2, 2 * width + 2))
    for row in range(4):
        for column in range(4):
            part = np.einsum("nchw,cd->ndhw", grid, kernel[:, :, row, column], optimize=True)
            wide[:, :, row : row + 2 * height : 2, column : column + 2 * width : 2] += part
    return wide[:, :, 1:-1, 1:-1] + bias[:, None, None]


def _dense(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a dense layer."""
    return {f"{name}.w": (inputs, outputs), f"{name}.b": (outputs,)}


def parse_net(data: Mapping[str, Any]) -> Net:
    """A net from plain data, as `net_data` gives it."""
    image: Sequence[int] | None = data["image"]
    return Net(
        data["form"],
        tuple(data["cells"]),
        None if image is None else (image[0], image[1], image[2]),
        data["hidden"],
        data["latent"],
    )


def net_data(net: Net) -> dict[str, Any]:
    """A net as plain data."""
    return {
        "form": net.form,
        "cells": list(net.cells),
        "image": None if net.image is None else list(net.image),
        "hidden": net.hidden,
        "latent": net.latent,
    }

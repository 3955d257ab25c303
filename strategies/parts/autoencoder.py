# SPDX-License-Identifier: Apache-2.0
"""A small variational autoencoder over table cells and pixels, as one flat vector of weights.

The training half (torch, loaded when first used) gives users' updates; the sampling half of the
dense form is plain numpy, so that a release can be sampled without torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import BoundedShard, Records

Form = Literal["mlp", "cnn"]
_CONV = (16, 32)  # channels of the two convolutions


@dataclass(frozen=True)
class Net:
    """The shape of an autoencoder; its weights are one float32 vector of `num_weights`.

    Attributes:
      form: `mlp`: dense layers. `cnn`: two strided convolutions each way around dense layers;
        needs images whose sides are multiples of four.
      cells: Cells of each table column.
      image: `(height, width, channels)`, or `None`.
      hidden: Units of the hidden layers.
      latent: Units of the code.
    """

    form: Form
    cells: tuple[int, ...]
    image: tuple[int, int, int] | None
    hidden: int
    latent: int

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

    @cached_property
    def num_weights(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

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

    def split(self, weights: Any) -> dict[str, Any]:
        """The flat vector as named views; works on numpy arrays and on torch tensors."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            views[name] = weights[start : start + size].reshape(shape)
            start += size
        return views

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


@dataclass(frozen=True)
class LocalTraining:
    """What each user does with the weights: gradient steps on all their records at once.

    Attributes:
      steps: Gradient steps; one is federated SGD.
      lr: Their size.
      kl_weight: Weight of the divergence from the standard normal code.
    """

    steps: int
    lr: float
    kl_weight: float


def updates(
    net: Net,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    training: LocalTraining,
    *,
    seed: int,
) -> NDArray[np.float32]:
    """Each user's change of the weights, `(num_users, num_weights)`, float32.

    A user's row depends on the user's own records alone, to the last bit. The noise of the code is
    drawn by the position of a record among its user's, and is the same for every user. Users are
    taken one by one: a batched product rounds a user's rows by their place in the batch, which
    other users decide, and for models of this size it is no faster.

    Args:
      net: The model.
      weights: Where every user starts.
      shard: The users.
      training: What each does.
      seed: Of the code's noise; public.

    Raises:
      ConfigError: A record lies outside the schema that the request describes.
    """
    torch = _torch()  # for nobody, too: a client that lacks it says so before it is asked for users
    rows = np.zeros((shard.num_users, net.num_weights), dtype=np.float32)
    if not shard.num_users:
        return rows
    codes = shard.records.codes
    if ((codes < 0) | (codes >= np.array(net.cells, dtype=np.int64))).any():
        raise ConfigError("a record outside the schema")
    starts = shard.starts
    most = int(np.diff(starts).max())
    with _one_thread(torch):
        noise = _code_noise(torch, most, net.latent, training.steps, seed)
        first = {
            name: part.clone().requires_grad_()  # a copy is aligned in memory, a view need not be
            for name, part in net.split(torch.from_numpy(np.array(weights, np.float32))).items()
        }
        for row, start, stop in zip(rows, starts[:-1], starts[1:], strict=True):
            change = {name: torch.from_numpy(part) for name, part in net.split(row).items()}
            seen = _seen(torch, net, shard.records, slice(int(start), int(stop)))
            for step in range(training.steps):
                now = first if step == 0 else _moved(first, change)
                loss = _elbo(
                    torch, net, now, *seen, noise[step, : stop - start], training.kl_weight
                )
                slopes = torch.autograd.grad(
                    loss, list(now.values()), allow_unused=True, materialize_grads=True
                )
                for name, slope in zip(now, slopes, strict=True):
                    change[name].sub_(slope, alpha=training.lr)
    return rows


def _moved(weights: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Weights after a change, ready to be differentiated by."""
    return {name: (part.detach() + change[name]).requires_grad_() for name, part in weights.items()}


def _seen(torch: Any, net: Net, records: Records, part: slice) -> tuple[Any, Any]:
    """Pixels in [0, 1] and cells of one user's records."""
    cells = torch.from_numpy(records.codes[part].astype(np.int64))
    if records.images is None or not net.num_pixels:
        return torch.zeros((len(cells), net.num_pixels)), cells
    images = torch.from_numpy(np.array(records.images[part]))
    return images.reshape(len(cells), -1).to(torch.float32).div_(255), cells


def _elbo(
    torch: Any,
    net: Net,
    w: Mapping[str, Any],
    pixels: Any,
    cells: Any,
    noise: Any,
    kl_weight: float,
) -> Any:
    """Negative evidence lower bound, averaged over a user's records.

    Reference:
      Kingma and Welling (2014), "Auto-Encoding Variational Bayes", arXiv 1312.6114, equation 10.
    """
    fn = torch.nn.functional
    onehot = _onehot(torch, net, cells)
    if net.form == "mlp":
        seen = torch.cat([pixels, onehot], dim=1)
    else:
        height, width, channels = net.image or (0, 0, 0)
        grid = pixels.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        grid = torch.relu(fn.conv2d(grid, w["conv1.w"], w["conv1.b"], stride=2, padding=1))
        grid = torch.relu(fn.conv2d(grid, w["conv2.w"], w["conv2.b"], stride=2, padding=1))
        seen = torch.cat([grid.flatten(1), onehot], dim=1)
    code = torch.relu(torch.addmm(w["enter.b"], seen, w["enter.w"]))
    code = torch.addmm(w["code.b"], code, w["code.w"])
    mean, log_var = code[:, : net.latent], code[:, net.latent :].clamp(-8, 8)
    opened = mean + torch.exp(0.5 * log_var) * noise
    opened = torch.relu(torch.addmm(w["open.b"], opened, w["open.w"]))
    if net.form == "mlp":
        out = torch.addmm(w["leave.b"], opened, w["leave.w"])
        drawn, logits = out[:, : net.num_pixels], out[:, net.num_pixels :]
    else:
        logits = torch.addmm(w["columns.b"], opened, w["columns.w"])
        spread = torch.relu(torch.addmm(w["spread.b"], opened, w["spread.w"]))
        height, width, channels = net.image or (0, 0, 0)
        grid = spread.reshape(-1, _CONV[1], height // 4, width // 4)
        grid = torch.relu(fn.conv_transpose2d(grid, w["up1.w"], w["up1.b"], stride=2, padding=1))
        grid = fn.conv_transpose2d(grid, w["up2.w"], w["up2.b"], stride=2, padding=1)
        drawn = grid.permute(0, 2, 3, 1).flatten(1)
    lost = -0.5 * kl_weight * (1 + log_var - mean.square() - log_var.exp()).sum()
    if net.num_pixels:
        lost = lost + fn.binary_cross_entropy_with_logits(drawn, pixels, reduction="sum")
    start = 0
    for column, size in enumerate(net.cells):
        part = logits[:, start : start + size]
        lost = lost + fn.cross_entropy(part, cells[:, column], reduction="sum")
        start += size
    return lost / len(cells)


def _onehot(torch: Any, net: Net, cells: Any) -> Any:
    """Cells of a user's records as zeros and ones, `(num_records, num_cells)`."""
    firsts = torch.tensor([0, *np.cumsum(net.cells)[:-1].tolist()][: len(net.cells)])
    return torch.zeros((len(cells), net.num_cells)).scatter_(1, cells + firsts, 1.0)


def _code_noise(torch: Any, most: int, latent: int, steps: int, seed: int) -> Any:
    """Noise of the code by step and place of a record; a record's does not depend on `most`."""
    drawn = [
        np.random.default_rng([seed, place]).standard_normal((steps, latent))
        for place in range(most)
    ]
    return torch.from_numpy(np.stack(drawn, axis=1).astype(np.float32))


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


def _torch() -> Any:
    """Torch, loaded when it is first needed."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            "dp_fedavg needs torch at the clients: pip install 'fedsynth[train]'"
        ) from error
    return torch


@contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """One torch thread within the block: on small models more of them only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

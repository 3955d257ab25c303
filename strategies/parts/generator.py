# SPDX-License-Identifier: Apache-2.0
"""A small network that turns noise into records, fitted to a noisy mean of features.

Plain numpy on both ends: the network samples without torch, and its gradient is short enough
to write out.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .features import Features
from .rounding import rounded_cells

_MOST_LABELS = 256
_AT_ONCE = 4096  # records sampled at a time
_MOST_PULL = 0.02  # above it, a network says the same of every label
_FAINT = 1e-12  # share of a pixel that another one cannot be seen to take
_LEAK = 0.02  # gradient that passes a pixel which is full or empty, so that it can come back

Weights = list[NDArray[np.float32]]
"""Matrices `(inputs, outputs)` of the layers, then their biases."""


@dataclass(frozen=True)
class Network(Synthesizer):
    """A network of two hidden layers: a label and Gaussian noise in, pixels and cells out.

    Labels come in the shares of their own distribution. Pixels get Gaussian noise and are cut to
    their range; each column's cell is drawn from the probabilities that the network gives it.

    Attributes:
      schema: Schema of the records.
      label: Position of the label column, or -1: the network knows of none.
      label_probs: Probability of each label, `(num_labels,)`; one number 1.0 without a label.
      weights: Matrices of the layers, then their biases; `(num_codes + num_labels, num_hidden)`
        for the first. The outputs are the pixels, then the cells of all columns but the label.
      pixel_noise: Standard deviation of the noise on a pixel, as a fraction of its range.
    """

    schema: Schema
    label: int
    label_probs: NDArray[np.float64]
    weights: tuple[NDArray[np.float32], ...]
    pixel_noise: float
    kind: ClassVar[str] = "network"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records, drawn some thousands at a time."""
        codes = np.zeros((num_records, len(self.schema.columns)), dtype=np.int32)
        image = self.schema.image
        images = None if image is None else np.zeros((num_records, *image.shape), dtype=np.uint8)
        num_labels = len(self.label_probs)
        num_pixels = 0 if image is None else image.num_pixels
        every_label = rng.permutation(rounded_cells(self.label_probs, num_records, rng))
        for start in range(0, num_records, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, num_records))
            size = part.stop - part.start
            labels = every_label[part]
            outputs = layers(self.weights, inputs_of(labels, num_labels, self.weights, rng))[-1]
            if self.label >= 0:
                codes[part, self.label] = labels
            if images is not None:
                noise = rng.standard_normal((size, num_pixels), dtype=np.float32)
                shade = outputs[:, :num_pixels] + 0.5 + np.float32(self.pixel_noise) * noise
                pixels = np.rint(255 * np.clip(shade, 0, 1)).astype(np.uint8)
                images[part] = pixels.reshape(images[part].shape)
            first = num_pixels
            for column in others(self.schema, self.label):
                last = first + self.schema.shape[column]
                codes[part, column] = drawn(outputs[:, first:last], rng)
                first = last
        return Records(codes, images)

    def settings(self) -> dict[str, Any]:
        """The label's position and the noise on pixels."""
        return {"label": self.label, "pixel_noise": self.pixel_noise}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Every layer's matrix and bias, and the labels' probabilities."""
        names = [f"{kind}{layer}" for kind in ("matrix", "bias") for layer in range(3)]
        return dict(zip(names, self.weights, strict=True)) | {"label_probs": self.label_probs}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The network that was saved.

        Raises:
          ConfigError: The arrays are not those of a network for this schema.
        """
        label, noise = settings.get("label"), settings.get("pixel_noise")
        names = [f"{kind}{layer}" for kind in ("matrix", "bias") for layer in range(3)]
        if (
            not isinstance(label, int)
            or not -1 <= label < len(schema.columns)
            or not isinstance(noise, int | float)
            or not 0 <= noise <= 1
            or set(tensors) != {*names, "label_probs"}
        ):
            raise ConfigError("a saved network whose settings or arrays are not a network's")
        weights = tuple(np.asarray(tensors[name], dtype=np.float32) for name in names)
        probs = np.asarray(tensors["label_probs"], dtype=np.float64)
        num_labels = schema.shape[label] if label >= 0 else 1
        widths = [w.shape[0] for w in weights[:3] if w.ndim == 2] + [num_outputs(schema, label)]
        fits = (
            len(widths) == 4
            and widths[0] > num_labels
            and all(
                w.shape == pair
                for w, pair in zip(weights[:3], itertools.pairwise(widths), strict=True)
            )
            and all(w.shape == (b,) for w, b in zip(weights[3:], widths[1:], strict=True))
            and probs.shape == (num_labels,)
            and (probs >= 0).all()
            and abs(probs.sum() - 1) < 1e-6
        )
        if not fits or not all(np.isfinite(w).all() for w in weights):
            raise ConfigError("a saved network whose arrays do not fit the schema")
        return cls(schema, label, probs, weights, float(noise))


@dataclass(frozen=True)
class Target:
    """What a network is fitted to, for each label.

    Attributes:
      means: Share of the label times the mean features of its records, with noise,
        `(num_labels, num_features)`.
      label_probs: Share of each label, `(num_labels,)`, summing to one.
      variance: Of the noise in each number of `means`.
    """

    means: NDArray[np.float64]
    label_probs: NDArray[np.float64]
    variance: float


@dataclass(frozen=True)
class Fitting:
    """How a network is fitted.

    Attributes:
      num_codes: Gaussian numbers that a record is made from.
      num_hidden: Width of the two hidden layers.
      num_steps: Gradient steps.
      batch_size: Records made in a step; every label gets as many as any other.
      learning_rate: Of Adam, at the start; falls to zero along half a cosine.
      shrinkage: Pull of the weights towards zero, in units of the noise's variance: the prior
        that keeps noise from being learned.
      smoothing: Images: radius over which neighboring pixels move together, in pixels.
      pixel_noise: Images: standard deviation of noise on a pixel.
    """

    num_codes: int = 10
    num_hidden: int = 128
    num_steps: int = 500
    batch_size: int = 200
    learning_rate: float = 1e-2
    shrinkage: float = 7.0
    smoothing: float = 0.8
    pixel_noise: float = 0.2


def untrained(schema: Schema, label: int, fitting: Fitting, rng: np.random.Generator) -> Network:
    """A network that knows nothing: every label and cell as likely as any other, gray images."""
    num_labels = schema.shape[label] if label >= 0 else 1
    weights = _first_weights(schema, label, num_labels, fitting, rng)
    weights[2][:] = 0
    return Network(
        schema,
        label,
        np.full(num_labels, 1 / num_labels),
        tuple(weights),
        fitting.pixel_noise if schema.image else 0.0,
    )


def fitted(
    schema: Schema,
    label: int,
    features: Features,
    target: Target,
    fitting: Fitting,
    rng: np.random.Generator,
) -> Network:
    """A network whose records have the target's mean features, as far as noise lets that be seen.

    Minimizes the squared distance to the target over all labels, which under Gaussian noise is
    the log-likelihood, plus a Gaussian prior on the weights. A column's cell is never drawn in
    training: given the codes, columns are independent, so the mean features over draws are a
    product over columns and are matched exactly.

    Args:
      schema: Schema of the records.
      label: Position of the label column, or -1.
      features: The features whose mean was measured.
      target: Their noisy mean.
      fitting: How to go about it.
      rng: Public randomness.

    Reference:
      Harder, Adamczewski, Park (2021), "DP-MERF: Differentially Private Mean Embeddings with
      Random Features for Practical Privacy-Preserving Data Generation", section 4. The exact
      mean over drawn cells and the prior are additions.
    """
    num_labels = len(target.label_probs)
    shares = (target.label_probs * num_labels).astype(np.float32)
    pull = np.float32(min(_MOST_PULL, fitting.shrinkage * target.variance * num_labels**2))
    maker = _Maker.of(schema, label, features, fitting)
    weights = _first_weights(schema, label, num_labels, fitting, rng)
    adam = Adam(weights)
    each = max(2, -(-fitting.batch_size // num_labels))
    labels = np.repeat(np.arange(num_labels), each)
    share = np.repeat(shares, each)[:, None]
    aim = np.repeat((target.means * num_labels).astype(np.float32), each, axis=0)
    for step in range(fitting.num_steps):
        hidden = layers(weights, inputs_of(labels, num_labels, weights, rng))
        made = maker.make(hidden[-1], rng)
        # a record's gradient sees the mean of the others, so that no variance is paid for
        total = made.features.reshape(num_labels, each, -1).sum(axis=1)
        beside = (np.repeat(total, each, axis=0) - made.features) / np.float32(each - 1)
        gap = (share * (share * beside - aim) * np.float32(2 / each)).astype(np.float32)
        gradient = backward(weights, hidden, maker.slope(made, gap))
        for slope, weight in zip(gradient, weights, strict=True):
            slope += pull * weight
        falling = 0.5 * (1 + np.cos(np.pi * step / fitting.num_steps))
        adam.step(weights, gradient, fitting.learning_rate * falling)
    maker.fold(weights)
    noise = fitting.pixel_noise if schema.image else 0.0
    return Network(schema, label, target.label_probs, tuple(weights), noise)


def label_column(schema: Schema, name: str | None) -> int:
    """Position of the column that a network is told of, or -1 for none.

    Args:
      schema: Schema of the records.
      name: The column; `None`: the schema's target if that is a category; `""`: none.

    Raises:
      ConfigError: The schema has no such column, or nothing but it, or it has too many cells.
    """
    if name is None and schema.target is not None:
        target = schema.index(schema.target)
        name = schema.target if schema.columns[target].is_categorical else ""
    if name and name not in schema.names:
        raise ConfigError(f"label = {name!r} is no column; there are {', '.join(schema.names)}")
    label = schema.index(name) if name else -1
    if label >= 0 and schema.shape[label] > _MOST_LABELS:
        raise ConfigError(
            f"label {name!r} has {schema.shape[label]} cells, above {_MOST_LABELS}; name a"
            ' coarser column as label, or label = ""'
        )
    if schema.image is None and len(schema.columns) == (label >= 0):
        raise ConfigError(f"the schema holds nothing but the label {name!r}")
    return label


def others(schema: Schema, label: int) -> list[int]:
    """Positions of the table columns that are not the label."""
    return [column for column in range(len(schema.columns)) if column != label]


def num_outputs(schema: Schema, label: int) -> int:
    """Width of the last layer."""
    pixels = 0 if schema.image is None else schema.image.num_pixels
    return pixels + sum(schema.shape[column] for column in others(schema, label))


def inputs_of(
    labels: NDArray[np.int64],
    num_labels: int,
    weights: Sequence[NDArray[np.float32]],
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Fresh codes beside a one in the label's place, `(num_records, num_codes + num_labels)`."""
    width = len(weights[0])
    inputs = np.zeros((len(labels), width), dtype=np.float32)
    inputs[:, : width - num_labels] = rng.standard_normal(
        (len(labels), width - num_labels), dtype=np.float32
    )
    inputs[np.arange(len(labels)), width - num_labels + labels] = 1
    return inputs


def layers(
    weights: Sequence[NDArray[np.float32]], inputs: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """The input and what each layer makes of it; rectified but for the last."""
    values = [inputs]
    for number in range(3):
        out = values[-1] @ weights[number] + weights[3 + number]
        values.append(out if number == 2 else np.maximum(out, 0))
    return values


def drawn(logits: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """One cell for each row of unnormalized log-probabilities, `(num_records,)`."""
    ends = np.cumsum(_softmax(logits), axis=1)
    at = rng.random((len(logits), 1), dtype=np.float32) * ends[:, -1:]
    cells: NDArray[np.int64] = (ends[:, :-1] <= at).sum(axis=1)
    return cells


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities, row by row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _first_weights(
    schema: Schema, label: int, num_labels: int, fitting: Fitting, rng: np.random.Generator
) -> Weights:
    """Random matrices that keep the size of what passes through, the last one small; no bias."""
    hidden = fitting.num_hidden
    widths = [fitting.num_codes + num_labels, hidden, hidden, num_outputs(schema, label)]
    return random_weights(widths, rng, last=0.1)


def random_weights(widths: Sequence[int], rng: np.random.Generator, *, last: float) -> Weights:
    """Matrices that keep the size of what passes through, but for the last; biases of zero.

    Args:
      widths: Numbers that enter each layer and, at the end, leave the last.
      rng: Public randomness.
      last: Factor of the last matrix.
    """
    matrices: Weights = []
    for rows, columns in itertools.pairwise(widths):
        normal = rng.standard_normal((rows, columns), dtype=np.float32)
        matrices.append(normal * np.float32((2 / rows) ** 0.5))
    matrices[-1] *= np.float32(last)
    return matrices + [np.zeros(width, dtype=np.float32) for width in widths[1:]]


def backward(
    weights: Sequence[NDArray[np.float32]],
    hidden: list[NDArray[np.float32]],
    slope: NDArray[np.float32],
) -> Weights:
    """Gradient of the weights, given what `layers` made and the outputs' gradient."""
    matrices, biases = [], []
    for number in (2, 1, 0):
        matrices.append(hidden[number].T @ slope)
        biases.append(slope.sum(axis=0))
        slope = (slope @ weights[number].T) * (hidden[number] > 0)
    return matrices[::-1] + biases[::-1]


@dataclass(frozen=True)
class _Made:
    """Records on the way out of a network.

    Attributes:
      features: Their mean features over draws of cells, `(num_records, num_features)`.
      parts: Points on the wheels: the image's, then each column's mean over its cells. Their
        product is what the wheels see.
      lit: How much of a pixel's change shows, `(num_records, num_pixels)`.
      probs: Probabilities of each column's cells.
    """

    features: NDArray[np.float32]
    parts: list[NDArray[np.complex64]]
    lit: NDArray[np.float32] | None
    probs: list[NDArray[np.float32]]


@dataclass(frozen=True)
class _Maker:
    """The way from a network's outputs to features, and back for gradients.

    Attributes:
      pixels: Angle for a whole pixel, `(num_pixels, num_frequencies)`; no rows without images.
      blur: Mixes neighboring pixels, `(num_pixels, num_pixels)`, or `None`.
      pixel_noise: Standard deviation of noise on a pixel.
      wheels: Points of each column's cells, `(num_cells, num_frequencies)`.
      wheel_height: Factor of a cosine or sine.
      cell_height: Factor of a cell's probability.
    """

    pixels: NDArray[np.float32]
    blur: NDArray[np.float32] | None
    pixel_noise: np.float32
    wheels: list[NDArray[np.complex64]]
    wheel_height: np.float32
    cell_height: np.float32

    @staticmethod
    def of(schema: Schema, label: int, features: Features, fitting: Fitting) -> "_Maker":
        return _Maker(
            pixels=(255 * features.pixels).astype(np.float32),
            blur=None if schema.image is None else _blur(schema.image.shape, fitting.smoothing),
            pixel_noise=np.float32(fitting.pixel_noise),
            wheels=[features.wheel(column) for column in others(schema, label)],
            wheel_height=features.wheel_height,
            cell_height=features.cell_height,
        )

    def make(self, outputs: NDArray[np.float32], rng: np.random.Generator) -> _Made:
        first = len(self.pixels)
        parts: list[NDArray[np.complex64]] = []
        probs: list[NDArray[np.float32]] = []
        lit = None
        if first:
            raw = outputs[:, :first] if self.blur is None else outputs[:, :first] @ self.blur
            noise = rng.standard_normal(raw.shape, dtype=np.float32)
            shade = raw + np.float32(0.5) + self.pixel_noise * noise
            lit = np.where((shade > 0) & (shade < 1), np.float32(1), np.float32(_LEAK))
            angles = np.clip(shade, 0, 1) @ self.pixels
            parts.append((np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64))
        for wheel in self.wheels:
            last = first + len(wheel)
            probs.append(_softmax(outputs[:, first:last]))
            parts.append(probs[-1] @ wheel)
            first = last
        seen = _product(parts) * self.wheel_height
        cells = [p * self.cell_height for p in probs]
        return _Made(np.concatenate([seen.real, seen.imag, *cells], axis=1), parts, lit, probs)

    def slope(self, made: _Made, gap: NDArray[np.float32]) -> NDArray[np.float32]:
        """Gradient of the outputs, given the gradient of `made.features`."""
        count = self.pixels.shape[1]
        turned = (gap[:, :count] - 1j * gap[:, count : 2 * count]) * self.wheel_height
        slopes = []
        beside = _without_each(made.parts)
        if made.lit is not None:
            turn = (turned * (1j * made.parts[0] * beside.pop(0))).real
            slope = (turn @ self.pixels.T) * made.lit
            slopes.append(slope if self.blur is None else slope @ self.blur.T)
        first = 2 * count
        for wheel, probs, rest in zip(self.wheels, made.probs, beside, strict=True):
            chance = ((turned * rest) @ wheel.T).real
            chance += gap[:, first : first + len(wheel)] * self.cell_height
            slopes.append(probs * (chance - (probs * chance).sum(axis=1, keepdims=True)))
            first += len(wheel)
        return np.concatenate(slopes, axis=1)

    def fold(self, weights: Weights) -> None:
        """Make the last layer blur by itself."""
        if self.blur is not None:
            for layer in (weights[2], weights[5]):
                layer[..., : len(self.blur)] = layer[..., : len(self.blur)] @ self.blur


def _product(parts: Sequence[NDArray[np.complex64]]) -> NDArray[np.complex64]:
    """The product of all, element by element."""
    product = parts[0]
    for part in parts[1:]:
        product = product * part
    return product


def _without_each(parts: Sequence[NDArray[np.complex64]]) -> list[NDArray[np.complex64]]:
    """For each part the product of all others, in as many steps as there are parts."""
    after = [np.ones_like(parts[0])]
    for part in parts[:0:-1]:
        after.append(after[-1] * part)
    products, before = [], after[0]
    for part, rest in zip(parts, after[::-1], strict=True):
        products.append(before * rest)
        before = before * part
    return products


def _blur(shape: tuple[int, int, int], smoothing: float) -> NDArray[np.float32] | None:
    """A Gaussian blur of each channel as a matrix, `(num_pixels, num_pixels)`."""
    height, width, channels = shape
    if smoothing == 0:
        return None
    sides = []
    for side in (height, width):
        places = np.arange(side)
        weights = np.exp(-0.5 * ((places[:, None] - places) / smoothing) ** 2)
        sides.append(weights / weights.sum(axis=1, keepdims=True))
    blur = np.kron(np.kron(sides[0], sides[1]), np.eye(channels))
    blur[blur < _FAINT] = 0  # numbers too small for float32's usual form slow every product
    return blur.astype(np.float32)


class Adam:
    """Adam's moving averages of the gradient and of its square.

    Reference:
      Kingma and Ba (2015), "Adam: A Method for Stochastic Optimization", algorithm 1.
    """

    def __init__(self, weights: Weights, *, kept: float = 0.9, kept_square: float = 0.999) -> None:
        self._mean = [np.zeros_like(w) for w in weights]
        self._square = [np.zeros_like(w) for w in weights]
        self._kept, self._kept_square = kept, kept_square
        self._steps = 0

    def step(self, weights: Weights, gradient: Weights, rate: float) -> None:
        """Move the weights, in place."""
        self._steps += 1
        fresh, fresh_square = 1 - self._kept**self._steps, 1 - self._kept_square**self._steps
        share, share_square = np.float32(1 - self._kept), np.float32(1 - self._kept_square)
        for w, g, mean, square in zip(weights, gradient, self._mean, self._square, strict=True):
            mean += share * (g - mean)
            square += share_square * (g * g - square)
            size = np.sqrt(square / np.float32(fresh_square)) + np.float32(1e-8)
            w -= np.float32(rate / fresh) * mean / size

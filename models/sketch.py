# SPDX-License-Identifier: Apache-2.0
"""A pen and paper: line drawings, bent and rendered, a simulator for images of handwriting."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.generation import Subject
from .variation import Capabilities, VariationModel, image_shape

NUM_POINTS = 32
_CHUNK = 1 << 21  # distances held at a time
_FAR = 1e3

Stroke = tuple[bool, Sequence[tuple[float, float]]]  # smooth or not; points (x, y), y downwards

# Ways of writing each digit: public knowledge. Points x,y of a box of 100 by 100; `/` lifts the
# pen, `~` makes a stroke smooth.
_DIGITS = {
    0: (
        "~ 50,0 12,20 5,60 40,100 80,80 90,35 50,0",
        "~ 60,0 20,30 10,70 40,100 80,70 85,25 60,0",
    ),
    1: (
        "50,0 50,100",
        "30,22 55,0 55,100",
        "28,22 52,0 52,100 / 25,100 80,100",
        "65,0 40,100",
    ),
    2: (
        "~ 10,25 40,0 80,20 60,60 10,100 / 10,100 90,100",
        "~ 10,20 50,0 80,25 55,65 20,98 8,85 30,78 60,95 95,95",
    ),
    3: (
        "~ 15,10 55,0 80,22 40,47 / ~ 40,47 85,70 55,100 10,90",
        "15,0 85,0 45,40 / ~ 45,40 85,65 55,100 10,90",
    ),
    4: (
        "20,0 12,55 90,55 / 75,10 65,100",
        "60,0 8,65 95,65 / 65,30 60,100",
        "70,100 70,0 8,65 95,65",
    ),
    5: (
        "85,0 20,0 15,45 / ~ 15,45 60,38 85,70 50,100 10,92",
        "80,2 35,0 20,42 / ~ 20,42 75,55 70,90 35,100 5,85",
    ),
    6: (
        "~ 65,0 25,35 12,75 45,100 82,75 50,52 15,75",
        "~ 45,0 15,40 15,80 50,100 80,80 55,60 20,80",
    ),
    7: (
        "10,2 85,0 40,100",
        "10,2 85,0 45,100 / 25,50 85,48",
        "~ 10,15 45,2 85,2 60,45 40,100",
    ),
    8: (
        "~ 75,12 40,0 18,22 50,48 82,75 50,100 15,78 48,50 80,25 70,8",
        "~ 50,0 20,20 50,45 80,20 50,0 / ~ 50,45 12,75 50,100 88,75 50,45",
    ),
    9: (
        "~ 80,20 45,0 15,25 45,50 80,25 / 80,20 65,100",
        "~ 80,20 45,0 15,25 45,50 80,25 85,60 60,95 15,95",
    ),
}


@dataclass(frozen=True)
class Sketches:
    """Line drawings in the unit square, x to the right and y downwards.

    Attributes:
      points: Corners of each drawing, `(num_sketches, NUM_POINTS, 2)`, float32.
      pen: 1 where the line from a point to the next is drawn, 0 where the pen is lifted,
        `(num_sketches, NUM_POINTS - 1)`, uint8.
      ink: Width of the line and of its soft edge, as fractions of the side,
        `(num_sketches, 2)`, float32.
    """

    points: NDArray[np.float32]
    pen: NDArray[np.uint8]
    ink: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.points)

    @property
    def extras(self) -> dict[str, NDArray[Any]]:
        """The drawings as `Candidates` carry them."""
        return {"points": self.points, "pen": self.pen, "ink": self.ink}

    @staticmethod
    def of(candidates: Candidates) -> "Sketches":
        """The drawings that candidates are renderings of.

        Raises:
          ConfigError: They were not drawn here.
        """
        if not {"points", "pen", "ink"} <= set(candidates.extras):
            raise ConfigError("these candidates are no drawings, so that no pen can vary them")
        return Sketches(*(candidates.extras[name] for name in ("points", "pen", "ink")))


@dataclass(frozen=True)
class Strokes(VariationModel):
    """Draws random curves with a pen, and bends them."""

    name: ClassVar[str] = "strokes"

    def capabilities(self) -> Capabilities:
        """Images, in this process."""
        return Capabilities("image")

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """A drawing each, rendered."""
        return _drawn(blank, random_sketches(len(blank), rng), subject)

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """The drawings bent and rendered again."""
        return _drawn(candidates, bent(Sketches.of(candidates), degree, rng), subject)


@dataclass(frozen=True)
class Digits(Strokes):
    """Draws the digit that a candidate's label says, in one of many ways of writing it."""

    name: ClassVar[str] = "digits"

    def check(self, subject: Subject) -> None:
        """Refuse what is no image of a digit.

        Raises:
          ConfigError: There is no image column, or the label's categories are no digits.
        """
        super().check(subject)
        _digits(subject)

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """A digit each, rendered.

        Raises:
          ConfigError: The label's categories are no digits.
        """
        digits = _digits(subject)[blank.codes[:, subject.label]]
        return _drawn(blank, digit_sketches(digits, rng), subject)


def _drawn(candidates: Candidates, sketches: Sketches, subject: Subject) -> Candidates:
    """Candidates with other drawings."""
    images = rendered(sketches, image_shape(subject.schema))
    return replace(candidates, images=images, extras=sketches.extras)


def _digits(subject: Subject) -> NDArray[np.int64]:
    """The digit that each label stands for."""
    label = subject.label
    column = None if label < 0 else subject.schema.columns[label]
    listed = () if column is None else column.categories
    if (
        not listed
        or not set(listed) <= set("0123456789")
        or (column is not None and column.missing)
    ):
        raise ConfigError(
            "model = 'digits' needs a label whose categories are digits, without a cell for"
            f" missing values; they are {', '.join(listed[:10]) or 'none'}. Use model = 'strokes'"
        )
    return np.array([int(text) for text in listed], dtype=np.int64)


def digit_sketches(digits: NDArray[np.int64], rng: np.random.Generator) -> Sketches:
    """A drawing of each digit, `(num_sketches,)`, in a random way, size, slant and pen."""
    ways = [_sampled(_strokes(way)) for digit in range(10) for way in _DIGITS[digit]]
    first = np.cumsum([0, *(len(_DIGITS[digit]) for digit in range(10))])
    num_ways = np.diff(first)
    chosen = first[digits] + (rng.random(len(digits)) * num_ways[digits]).astype(np.int64)
    points = np.stack([points for points, _ in ways])[chosen]
    height = rng.uniform(0.65, 1.0, len(digits))
    width = height * rng.uniform(0.5, 1.0, len(digits))
    points = 0.5 + (points - 0.5) * np.stack([width, height], axis=1)[:, None, :]
    plain = Sketches(
        points.astype(np.float32),
        np.stack([pen for _, pen in ways])[chosen],
        _pens(len(digits), rng),
    )
    return bent(plain, 0.5, rng)


def random_sketches(num_sketches: int, rng: np.random.Generator) -> Sketches:
    """Random smooth curves: one or two strokes each, anywhere in the square."""
    points = np.empty((num_sketches, NUM_POINTS, 2), dtype=np.float32)
    pen = np.ones((num_sketches, NUM_POINTS - 1), dtype=np.uint8)
    for i in range(num_sketches):
        num_strokes = 1 + int(rng.random() < 0.4)
        strokes: list[Stroke] = [
            (True, [tuple(p) for p in rng.uniform(0.1, 0.9, (int(rng.integers(2, 7)), 2))])
            for _ in range(num_strokes)
        ]
        points[i], pen[i] = _sampled(strokes)
    return Sketches(points, pen, _pens(num_sketches, rng))


def bent(sketches: Sketches, degree: float, rng: np.random.Generator) -> Sketches:
    """Each drawing turned, stretched, slanted, moved and bent at random, with another pen.

    Args:
      sketches: Drawings.
      degree: How far, from 0 (not at all) to 1.
      rng: Public randomness.
    """
    num = len(sketches)
    turn, slant = degree * rng.normal(size=(2, num)) * np.array([[0.25], [0.25]])
    stretch = np.exp(degree * 0.2 * rng.normal(size=(num, 2)))
    shift = degree * 0.08 * rng.normal(size=(num, 1, 2))
    rotation = np.stack(
        [np.cos(turn), np.sin(turn) + slant, -np.sin(turn), np.cos(turn)], axis=1
    ).reshape(num, 2, 2)
    centre = np.full((1, 1, 2), 0.5)
    points = ((sketches.points - centre) * stretch[:, None, :]) @ rotation + centre + shift
    # a smooth random field moves points that are near each other alike
    waves = 4.0 * rng.normal(size=(num, 2, 4))
    phase = rng.uniform(0, 2 * np.pi, (num, 1, 4))
    height = degree * 0.06 * rng.normal(size=(num, 4, 2))
    points = points + np.sin(points @ waves + phase) @ height
    ink = sketches.ink * np.exp(degree * np.array([0.4, 0.2]) * rng.normal(size=(num, 2)))
    return replace(
        sketches,
        points=np.clip(points, -0.2, 1.2).astype(np.float32),
        ink=np.clip(ink, (0.02, 0.01), (0.4, 0.3)).astype(np.float32),
    )


def rendered(sketches: Sketches, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The drawings as images, bright line on dark ground, `(num_sketches, *shape)`."""
    height, width, channels = shape
    y, x = np.indices((height, width), dtype=np.float32) + np.float32(0.5)
    pixels = np.stack([x.ravel() / np.float32(width), y.ravel() / np.float32(height)])
    images = np.empty((len(sketches), height * width), dtype=np.uint8)
    size = max(1, _CHUNK // (NUM_POINTS * height * width))
    for first in range(0, len(sketches), size):
        part = slice(first, first + size)
        distance = _distance(sketches.points[part], sketches.pen[part], pixels)
        wide, soft = sketches.ink[part, :1], sketches.ink[part, 1:] + np.float32(1 / max(shape))
        inked = np.clip(0.5 + (wide / 2 - distance) / soft, 0.0, 1.0)
        images[part] = np.rint(inked * 255).astype(np.uint8)
    square = images.reshape(len(sketches), height, width, 1)
    return np.repeat(square, channels, axis=3)


def _distance(
    points: NDArray[np.float32], pen: NDArray[np.uint8], pixels: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Distance of each pixel to each drawing's line, `(num_sketches, num_pixels)`."""
    steps = np.diff(points, axis=1)[..., None]  # (num_sketches, num_lines, 2, 1)
    starts = points[:, :-1, :, None]
    squared = np.maximum((steps**2).sum(axis=2), np.float32(1e-8))
    right, down = (pixels[k] - starts[:, :, k] for k in range(2))  # from start to pixel
    part = (right * steps[:, :, 0] + down * steps[:, :, 1]) / squared
    np.clip(part, 0, 1, out=part)
    right -= part * steps[:, :, 0]
    down -= part * steps[:, :, 1]
    found = right**2 + down**2
    found += np.where(pen, np.float32(0), np.float32(_FAR))[:, :, None]
    nearest: NDArray[np.float32] = np.sqrt(found.min(axis=1))
    return nearest


def _pens(num: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random widths of line and edge."""
    wide, soft = rng.uniform(0.06, 0.22, num), rng.uniform(0.01, 0.1, num)
    return np.stack([wide, soft], axis=1).astype(np.float32)


def _strokes(way: str) -> list[Stroke]:
    """The strokes that one line of `_DIGITS` describes."""
    strokes: list[Stroke] = []
    for text in way.split(" / "):
        pairs = [pair.split(",") for pair in text.removeprefix("~ ").split(" ")]
        strokes.append((text.startswith("~"), [(int(x) / 100, int(y) / 100) for x, y in pairs]))
    return strokes


def _sampled(strokes: Sequence[Stroke]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Points at equal steps along the strokes, and where the pen is down between them."""
    lines = [_spline(points) if smooth else np.array(points, float) for smooth, points in strokes]
    lengths = np.array([np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in lines])
    shares = np.maximum(2, np.floor(lengths / lengths.sum() * NUM_POINTS)).astype(int)
    shares[np.argmax(shares)] += NUM_POINTS - shares.sum()
    pen = np.ones(NUM_POINTS - 1, dtype=np.uint8)
    pen[np.cumsum(shares)[:-1] - 1] = 0
    parts = [_resampled(line, num) for line, num in zip(lines, shares, strict=True)]
    return np.concatenate(parts).astype(np.float32), pen


def _spline(points: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """A smooth curve through the points; smooth at its ends too if they meet."""
    from scipy.interpolate import CubicSpline

    p = np.array(points, float)
    if len(p) < 3:
        return p
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(p, axis=0), axis=1) ** 0.5)])
    ends = "periodic" if (p[0] == p[-1]).all() else "natural"
    curve: NDArray[np.float64] = CubicSpline(along, p, bc_type=ends)(
        np.linspace(0, along[-1], 12 * len(p))
    )
    return curve


def _resampled(line: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    """`num` points at equal steps along a line."""
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    at = np.linspace(0, along[-1], num)
    return np.stack([np.interp(at, along, line[:, k]) for k in range(2)], axis=1)

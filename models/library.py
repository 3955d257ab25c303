# SPDX-License-Identifier: Apache-2.0
"""A public library of images: candidates are drawn from it, and vary to their neighbors in it."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.generation import Subject
from ..core.schema import Schema
from .pixels import pooled
from .variation import Capabilities, VariationModel, image_shape

_CHUNK = 1 << 22  # distances held at a time


@dataclass(frozen=True)
class Library(VariationModel):
    """Public images of a file, as they are: a simulator for whoever has pictures and no renderer.

    A candidate is drawn from the images of its label, where the library has such images, else
    from all. It varies to one of the images of the same kind that are nearest in blurred and
    pooled pixels: at degree d, of k images to one of the nearest k^d, each as likely. So 0 leaves
    it where it is and 1 draws anew.

    The release shows images of the library themselves: take one that may be shown.

    Attributes:
      path: An npz file with `images`, `(num_images, height, width)` or with channels behind, uint8
        and of the schema's shape; and, if they are labelled, `labels`, `(num_images,)`, whole
        numbers or texts, which are held against the names of the label's categories. Read at the
        server only, when a run is planned and candidates are made: a client or a replay opens no
        file that settings name.

    Privacy:
      Nothing is spent, as the library is public. It must hold no record of a user.

    Reference:
      Lin et al. (2025), "Differentially Private Synthetic Data via APIs 3: Using Simulators
      Instead of Foundation Models", https://arxiv.org/abs/2502.05505: simulator-generated data
      without access to the simulator.
    """

    path: str = ""
    name: ClassVar[str] = "library"

    def check(self, subject: Subject) -> None:
        """Refuse a schema without images and a file that holds none of its shape.

        Raises:
          ConfigError: There is no image column, or no such file.
        """
        super().check(subject)
        self._shelf(subject)

    def capabilities(self) -> Capabilities:
        """Images, in this process; to be recorded, since others may not have the file."""
        return Capabilities("image", is_exact=False)

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """Images drawn from the library, by label where it has the label.

        Raises:
          ConfigError: The file is missing, or holds no such images.
        """
        shelf = self._shelf(subject)
        names = _names(subject, blank)
        position = np.empty(len(blank), dtype=np.int64)
        for name in np.unique(names):
            asking = np.flatnonzero(names == name)
            kind = shelf.of_label(name)
            position[asking] = kind[rng.integers(len(kind), size=len(asking))]
        return shelf.shown(blank, position)

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """Each image exchanged for one that is near it.

        Raises:
          ConfigError: The candidates are not of this library, or the file is missing or holds
            other images.
        """
        shelf = self._shelf(subject)
        position = candidates.extras.get("position")
        if (
            position is None
            or position.shape != (len(candidates),)
            or position.dtype != np.int64
            or not ((position >= 0) & (position < len(shelf.images))).all()
        ):
            raise ConfigError("these candidates are no images of the library, so none is near them")
        names = _names(subject, candidates)
        moved = position.copy()
        for name in np.unique(names):
            kind = shelf.of_label(name)
            num_near = round(len(kind) ** degree)
            asking = np.flatnonzero(names == name)
            for part, near in shelf.near(position[asking], kind, num_near):
                rows = asking[part]
                moved[rows] = near[np.arange(len(rows)), rng.integers(num_near, size=len(rows))]
        return shelf.shown(candidates, moved)

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes and this package's version.

        Raises:
          ConfigError: The file is missing.
        """
        facts = [__version__, self.name, hashlib.sha256(_bytes_of(self.path)).hexdigest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _shelf(self, subject: Subject) -> "_Shelf":
        """The images, checked against the schema.

        Raises:
          ConfigError: There is no file, or it holds no such images.
        """
        if not self.path:
            raise ConfigError("model 'library' needs path, the npz file with public images")
        shelf, shape = _loaded(self.path), image_shape(subject.schema)
        if shelf.images.shape[1:] != shape:
            raise ConfigError(
                f"the library {self.path} holds images of shape {shelf.images.shape[1:]}, and the"
                f" schema's are of {shape}; scale one to the other"
            )
        return shelf


@dataclass(frozen=True)
class _Shelf:
    """Images with their labels.

    Attributes:
      images: `(num_images, height, width, channels)`, uint8.
      labels: `(num_images,)`, texts; empty where there are none.
      places: Pooled pixels, `(num_images, dim)`: whole numbers, whose distances are exact.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.str_]
    places: NDArray[np.float64]

    def of_label(self, name: str) -> NDArray[np.int64]:
        """Positions of a label's images; of all, where it has none."""
        found = np.flatnonzero(self.labels == name)
        return found if len(found) else np.arange(len(self.images))

    def near(
        self, position: NDArray[np.int64], kind: NDArray[np.int64], num_near: int
    ) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """The nearest images of a kind, in blocks of `position`, each with its part."""
        others = self.places[kind]
        lengths = (others**2).sum(axis=1)
        size = max(1, _CHUNK // len(kind))
        for start in range(0, len(position), size):
            part = slice(start, start + size)
            distance = lengths - 2 * self.places[position[part]] @ others.T
            yield part, kind[np.argpartition(distance, num_near - 1, axis=1)[:, :num_near]]

    def shown(self, candidates: Candidates, position: NDArray[np.int64]) -> Candidates:
        """Candidates with the images at `position`."""
        return replace(candidates, images=self.images[position], extras={"position": position})


def _names(subject: Subject, candidates: Candidates) -> NDArray[np.str_]:
    """Name of each candidate's label; empty where it has none."""
    if subject.label < 0:
        return np.zeros(len(candidates), dtype=np.str_)
    return _categories(subject.schema, subject.label)[candidates.codes[:, subject.label]]


def _categories(schema: Schema, label: int) -> NDArray[np.str_]:
    """Name of each cell of the label's column; empty for a cell that is no category."""
    column = schema.columns[label]
    names = list(column.categories or ())
    return np.array(names + [""] * (column.num_cells - len(names)), dtype=np.str_)


def _loaded(path: str) -> _Shelf:
    """The library of a file, kept while the file stays as it is."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ConfigError(f"model 'library' cannot open {path}: {error.strerror}") from error
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(path: str, size: int, mtime_ns: int) -> _Shelf:
    """What the file holds.

    Raises:
      ConfigError: It is no npz file, holds pickled objects, or no images that can be used.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("images", "labels") if name in arrays}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"model 'library' reads npz files of plain arrays, and {path} is none: {error}"
        ) from error
    images, labels = found.get("images"), found.get("labels")
    if images is not None and images.ndim == 3:
        images = images[..., None]
    if images is None or images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise ConfigError(
            f"the library {path} must hold `images`, uint8 and of shape (num_images, height,"
            " width) or (num_images, height, width, channels)"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iuU"):
        raise ConfigError(
            f"the library {path} must hold one label an image, whole numbers or texts"
        )
    names = np.zeros(0, dtype=np.str_) if labels is None else labels.astype(np.str_)
    places = pooled(images)[0].reshape(len(images), -1).astype(np.float64)
    return _Shelf(images, names, places)


def _bytes_of(path: str) -> bytes:
    """The file's content."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"model 'library' cannot open {path}: {error.strerror}") from error

# SPDX-License-Identifier: Apache-2.0
"""A small generator of handwritten characters, trained on public ones: shapes from latent vectors.

The network is computed in whole numbers, whose sums are exact in any order, so that a latent
vector has the same image on every machine.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.generation import Subject
from .variation import Capabilities, Estimate, VariationModel, image_shape
from .whole import VALUE_STEPS, through

SIDE = 28
_WEIGHTS = Path(__file__).with_name("glyphs.safetensors")
_MOST_LOGIT = 8 * VALUE_STEPS  # beyond it a pixel is white
_IMAGES_A_CPU_S = 5000  # on one core of 2024


@dataclass(frozen=True)
class Glyphs(VariationModel):
    """Writes characters of no alphabet: the decoder of a variational autoencoder.

    It was trained on eight alphabets of Omniglot, cut, turned and stretched, on the condition of
    the pen's width, by `examples/glyphs/train.py`. A candidate is a latent vector of independent
    standard normal numbers: the shape, and last the pen. Varying it by a degree d mixes it with
    another one, sqrt(1 - d^2) of the old to d of the new, so that what random vectors look like
    stays what varied ones do; 1 forgets the old one.

    Nothing is known of what characters mean. Candidates of every label start from the same
    characters, and users' votes choose among them.

    Attributes:
      truncation: The standard deviation of a first candidate's shape: below 1, more of what the
        network has seen often.
      contrast: By how much the edges of lines are harder than the network, which is unsure of
        them, has them; 1: not at all.

    Reference:
      Kingma and Welling (2014), "Auto-Encoding Variational Bayes",
      https://arxiv.org/abs/1312.6114; Lake, Salakhutdinov and Tenenbaum (2015), "Human-Level
      Concept Learning through Probabilistic Program Induction",
      https://doi.org/10.1126/science.aab3050, for the alphabets (MIT licence).
    """

    truncation: float = 1.0
    contrast: float = 2.0
    name: ClassVar[str] = "glyphs"

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 < self.truncation <= 1:
            raise ConfigError(f"truncation must lie in (0, 1], not {self.truncation!r}")
        if not 0 < self.contrast <= 100:
            raise ConfigError(f"contrast must lie in (0, 100], not {self.contrast!r}")

    def check(self, subject: Subject) -> None:
        """Refuse images of another size than it makes.

        Raises:
          ConfigError: There is no image column, or its images are not gray ones of 28 x 28.
        """
        super().check(subject)
        if (shape := image_shape(subject.schema)) != (SIDE, SIDE, 1):
            raise ConfigError(
                f"model 'glyphs' makes images of shape ({SIDE}, {SIDE}, 1), not {shape}; use"
                " model = 'strokes', which draws at any size"
            )

    def capabilities(self) -> Capabilities:
        """Images, in this process, the same on every machine."""
        return Capabilities("image")

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """A character each.

        Raises:
          ConfigError: Images of this shape are not what it makes.
        """
        self.check(subject)
        latent = rng.normal(size=(len(blank), _latent_dim()))
        latent[:, :-1] *= self.truncation
        return self._written(blank, latent)

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """The characters mixed with others.

        Raises:
          ConfigError: They were not written here.
        """
        latent = candidates.extras.get("latent")
        if latent is None or latent.shape[1:] != (_latent_dim(),):
            raise ConfigError("these candidates have no latent vectors of model 'glyphs'")
        other = rng.normal(size=latent.shape)
        return self._written(candidates, (1 - degree**2) ** 0.5 * latent + degree * other)

    def estimate(self, num_candidates: int, subject: Subject) -> Estimate:
        """CPU-seconds."""
        return Estimate(cpu_s=num_candidates / _IMAGES_A_CPU_S)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the settings and this package's version."""
        facts = [__version__, self.name, self.truncation, self.contrast, _digest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _written(self, candidates: Candidates, latent: NDArray[np.floating]) -> Candidates:
        """Candidates of other latent vectors."""
        kept = latent.astype(np.float32)
        return replace(candidates, images=decoded(kept, self.contrast), extras={"latent": kept})


def decoded(latent: NDArray[np.float32], contrast: float) -> NDArray[np.uint8]:
    """Images of latent vectors, `(num_images, 28, 28, 1)`.

    Args:
      latent: `(num_images, 21)`; what lies further out than 8 counts as 8.
      contrast: What logits are multiplied with.
    """
    values = np.rint(np.clip(latent.astype(np.float64), -8, 8) * VALUE_STEPS)
    logits = np.clip(through(values, _weights()), -_MOST_LOGIT, _MOST_LOGIT).astype(np.int64)
    return _shades(contrast)[logits + _MOST_LOGIT].reshape(-1, SIDE, SIDE, 1)


@cache
def _shades(contrast: float) -> NDArray[np.uint8]:
    """Brightness of each logit, in its steps, from the lowest."""
    logits = np.arange(-_MOST_LOGIT, _MOST_LOGIT + 1) / VALUE_STEPS
    return np.rint(255 / (1 + np.exp(-contrast * logits))).astype(np.uint8)


def _latent_dim() -> int:
    """Length of a latent vector: the shape, and the pen."""
    return len(_weights()["weight0"])


@cache
def _weights() -> Mapping[str, NDArray[Any]]:
    """Weights and biases of the layers, in whole numbers."""
    from safetensors.numpy import load_file

    return {name: array.astype(np.float64) for name, array in load_file(_WEIGHTS).items()}


@cache
def _digest() -> str:
    """SHA-256 of the file of weights."""
    return hashlib.sha256(_WEIGHTS.read_bytes()).hexdigest()

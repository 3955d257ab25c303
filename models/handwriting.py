# SPDX-License-Identifier: Apache-2.0
"""Handwriting as a few numbers and back, and a denoiser of them, learned from public scripts.

Encoder and decoder are computed in whole numbers, so that an image has the same numbers on every
machine, whatever images stand beside it.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .whole import VALUE_STEPS, through

SIDE = 28
_WEIGHTS = Path(__file__).with_name("handwriting.safetensors")
_FARTHEST = 16  # a latent number further out counts as this
_MOST_LOGIT = 8  # beyond it a pixel is white


def num_latents() -> int:
    """Numbers that say an image."""
    return len(_weights()["decoder.weight0"])


def encoded(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Latent numbers of images, in steps of 1 / 256, `(num_images, num_latents)`.

    Within one character of the public scripts each varies by one, and no two vary together.

    Args:
      images: `(num_images, 28, 28, 1)`, bright strokes on dark ground.
    """
    shades = np.rint(images.reshape(len(images), SIDE * SIDE) * (VALUE_STEPS / 255))
    found = through(shades, _weights(), "encoder.")
    most = _FARTHEST * VALUE_STEPS
    return np.clip(found, -most, most).astype(np.int64)


def decoded(latent: NDArray[np.floating[Any]], contrast: float) -> NDArray[np.uint8]:
    """Images of latent numbers, `(num_images, 28, 28, 1)`.

    Args:
      latent: `(num_images, num_latents)`.
      contrast: By how much the edges of lines are harder than the network, which is unsure of
        them, has them; 1: not at all.
    """
    steps = np.rint(np.clip(latent.astype(np.float64), -_FARTHEST, _FARTHEST) * VALUE_STEPS)
    logits = np.clip(
        through(steps, _weights(), "decoder.") / VALUE_STEPS, -_MOST_LOGIT, _MOST_LOGIT
    )
    shades = np.rint(255 / (1 + np.exp(-contrast * logits)))
    return shades.astype(np.uint8).reshape(-1, SIDE, SIDE, 1)


def between() -> NDArray[np.float64]:
    """Covariance of the public characters' means, `(num_latents, num_latents)`."""
    return _weights()["between"]


def denoiser() -> dict[str, NDArray[np.float32]]:
    """Weights of the denoiser, by the names of `strategies/parts/denoiser.py`."""
    prefix = "denoiser."
    return {
        name.removeprefix(prefix): array.astype(np.float32)
        for name, array in _weights().items()
        if name.startswith(prefix)
    }


@cache
def digest() -> bytes:
    """SHA-256 of the file of weights."""
    return hashlib.sha256(_WEIGHTS.read_bytes()).digest()


@cache
def _weights() -> Mapping[str, NDArray[np.float64]]:
    """All arrays of the file."""
    from safetensors.numpy import load_file

    return {name: array.astype(np.float64) for name, array in load_file(_WEIGHTS).items()}

# SPDX-License-Identifier: Apache-2.0
"""Find public models by name, and build them from settings."""

import json
from collections.abc import Mapping
from typing import Any

from ..core.embedding import Embedder
from ..core.plugins import build, installed
from .variation import VariationModel

MODELS = {
    "table": "models.table:TableMutator",
    "strokes": "models.sketch:Strokes",
    "digits": "models.sketch:Digits",
    "blobs": "models.augment:ImageAugmenter",
    "glyphs": "models.glyphs:Glyphs",
    "library": "models.library:Library",
    "diffuser": "models.diffuser:Diffuser",
    "words": "models.words:Words",
    "writer": "models.text:TextWriter",
    "policy": "models.policy:Policy",
    "corpus": "models.corpus:Corpus",
}
EMBEDDERS = {
    "word_hashes": "models.words:WordHashes",
    "minilm": "models.minilm:MiniLM",
    "efficientnet_lite0": "models.efficientnet:EfficientNetLite0",
    "pixels": "models.pixels:Pixels",
}


def build_model(name: str, settings: Mapping[str, Any]) -> VariationModel:
    """A model by its name with its settings checked.

    Raises:
      ConfigError: No such model, an unknown key, or a value of the wrong type or range.
    """
    kind = installed("model", name, MODELS, "fedsynth.models", VariationModel)  # type: ignore[type-abstract]
    return build(kind, settings, f"model {name!r}")


def build_embedder(name: str, settings: Mapping[str, Any]) -> Embedder:
    """An embedder by its name with its settings checked.

    Raises:
      ConfigError: No such embedder, an unknown key, or a value of the wrong type or range.
    """
    kind = installed("embedder", name, EMBEDDERS, "fedsynth.embedders", Embedder)  # type: ignore[type-abstract]
    return build(kind, settings, f"embedder {name!r}")


def canonical(settings: Mapping[str, Any]) -> str:
    """Settings as canonical JSON."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)

# SPDX-License-Identifier: Apache-2.0
"""Answer generations by the models that they name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.embedding import EMBEDDER, Embedder, whole
from ..core.errors import ConfigError, DataError, FedsynthError
from ..core.generation import PLACES, Generation
from .registry import build_embedder, build_model
from .variation import VariationModel


def make(request: Generation, folder: Path | None = None) -> Candidates:
    """What a public model makes of a request, placed if the request names an embedder.

    Args:
      request: The request.
      folder: Where a model keeps what must not be asked for twice; `None`: nowhere.

    Raises:
      ConfigError: There is no such model, or it cannot make records of this schema.
      FedsynthError: The model gave something that is no candidates of it.
    """
    model = build_model(request.model, json.loads(request.settings))
    if folder is not None:
        model = model.kept_in(folder)
    rng = np.random.default_rng(request.seed)
    given, subject = request.candidates, request.subject
    if request.task == "random":
        made = model.random(given, subject, rng)
    elif request.shown is not None:
        made = model.expand(given, request.shown, subject, rng)
    else:
        made = model.vary(given, request.degree, subject, rng)
    try:
        made.check(subject.schema)
        if len(made) != len(given):
            raise DataError(f"{len(made)} candidates where {len(given)} were asked for")
    except DataError as error:
        raise FedsynthError(f"model {request.model!r} gave {error}") from error
    if not request.embedder:
        return made
    embedder = build_embedder(request.embedder, json.loads(request.embedder_settings))
    return with_places(made, _places(embedder, request, model, made, rng), embedder)


def with_places(
    candidates: Candidates, places: NDArray[np.int16], embedder: Embedder
) -> Candidates:
    """Candidates with where they stand, and with the fingerprint of what placed them.

    Args:
      candidates: The candidates.
      places: In whole steps, `(num_candidates, dim)`.
      embedder: What placed them.
    """
    fingerprint = np.frombuffer(bytes.fromhex(embedder.fingerprint()), dtype=np.uint8)
    by = np.tile(fingerprint, (len(candidates), 1))
    return replace(candidates, extras={**candidates.extras, PLACES: places, EMBEDDER: by})


def _places(
    embedder: Embedder,
    request: Generation,
    model: VariationModel,
    made: Candidates,
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """Embeddings of candidates, or the mean of those of their variations."""
    if not request.lookahead:
        return whole(embedded(embedder, made))
    total = np.zeros((len(made), embedder.dim))
    for _ in range(request.lookahead):
        varied = model.vary(made, request.lookahead_degree, request.subject, rng)
        total += embedded(embedder, varied)
    return whole(total / request.lookahead)


def embedded(embedder: Embedder, candidates: Candidates) -> NDArray[np.float32]:
    """Embeddings of candidates, `(num_candidates, dim)`.

    Raises:
      ConfigError: They have nothing of the kind that the embedder places.
    """
    parts: dict[str, list[str] | NDArray[np.uint8] | None] = {
        "text": None if candidates.texts is None else candidates.texts.tolist(),
        "image": candidates.images,
    }
    part = parts[embedder.modality]
    if part is None:
        raise ConfigError(
            f"embedder {embedder.name!r} places {embedder.modality}s, and the schema has no"
            f" {embedder.modality} column"
        )
    return embedder.embed(part)

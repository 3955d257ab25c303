# SPDX-License-Identifier: Apache-2.0
"""Place private records by a public embedder: once a shard, kept at its owner, never sent."""

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.embedding import Embedder, whole
from ..core.errors import ConfigError
from ..core.records import BoundedShard

_log = logging.getLogger(__name__)
_MOST_KEPT = 4  # files of embeddings beside an odometer
_IN_MEMORY = 64  # shards whose embeddings a process holds


def placed(shard: BoundedShard, embedder: Embedder, state: Path | None = None) -> BoundedShard:
    """The shard with each record's embedding beside it.

    Args:
      shard: Private records.
      embedder: The public model.
      state: The owner's folder, in which embeddings are kept between messages; `None`: in memory.

    Raises:
      ConfigError: The records have nothing of the kind that the embedder places.

    Privacy:
      An embedding is a function of one record and public weights. It is as private as the record:
      it stays in the owner's folder, which nobody else may read, and in this process.
    """
    records = shard.records
    part: Any = records.texts if embedder.modality == "text" else records.images
    if part is None:
        raise ConfigError(
            f"embedder {embedder.name!r} places {embedder.modality}s, and the schema has none"
        )
    key = _digest(part, embedder)
    places = _recent(key)
    if not places:
        found = None if state is None else _read(state, key, len(records), embedder.dim)
        if found is None:
            found = _embedded(embedder, part.tolist() if embedder.modality == "text" else part)
            if state is not None:
                _keep(state, key, found)
        places.append(found)
    return replace(shard, records=replace(records, places=places[0]))


def _embedded(embedder: Embedder, given: Any) -> NDArray[np.int16]:
    """Embeddings in whole steps; zeros for a record that makes the embedder fail.

    A record's failure must not void the others: they would be gone from a sum by one user's doing.
    """
    try:
        found = embedder.embed(given)
        if found.shape != (len(given), embedder.dim):
            raise TypeError("an embedder must give one embedding a record")
        return whole(found)
    except Exception as error:  # noqa: BLE001  (closed: the record takes no part)
        if len(given) <= 1:
            _log.error("a record cannot be placed: %s", type(error).__name__)
            return np.zeros((len(given), embedder.dim), dtype=np.int16)
    middle = len(given) // 2
    return np.concatenate([_embedded(embedder, half) for half in (given[:middle], given[middle:])])


@lru_cache(maxsize=_IN_MEMORY)
def _recent(key: str) -> list[NDArray[np.int16]]:
    """Where the embeddings of a shard are held in memory; empty until they are there."""
    return []


def _digest(part: NDArray[np.object_] | NDArray[np.uint8], embedder: Embedder) -> str:
    """A name for the embeddings of these records by this embedder."""
    digest = hashlib.sha256(embedder.fingerprint().encode())
    if part.dtype == np.uint8:
        digest.update(np.ascontiguousarray(part).tobytes())
    else:
        for text in part:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _read(state: Path, key: str, num_records: int, dim: int) -> NDArray[np.int16] | None:
    """Embeddings that are kept, unless there are none or the file is damaged."""
    try:
        kept = np.load(state / f"places.{key[:24]}.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = kept.shape == (num_records, dim) and kept.dtype == np.int16
    return kept if fits else None


def _keep(state: Path, key: str, places: NDArray[np.int16]) -> None:
    """Store embeddings: whole or not at all, and for nobody but their owner to read."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / f"places.{key[:24]}.npy"
    descriptor, partial = mkstemp(dir=state, prefix=f"{path.name}.")  # 0600 from the start
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, places, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another process of this client tidies up as well
        others = [other for other in state.glob("places.*.npy") if other != path]
        others.sort(key=lambda other: other.stat().st_mtime_ns, reverse=True)
        for other in others[_MOST_KEPT - 1 :]:
            other.unlink()

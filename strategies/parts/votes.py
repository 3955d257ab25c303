# SPDX-License-Identifier: Apache-2.0
"""Votes for candidates: the query that shows a pool, and each record's nearest candidates."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.candidates import Candidates
from ...core.embedding import EMBEDDER, MOST_SQUARED
from ...core.errors import ConfigError
from ...core.generation import PLACES
from ...core.query import Query
from ...core.records import Records
from ...core.schema import MAX_CELLS, Schema
from .nearest import Finder, TableMetric
from .tally import Tally

CLUSTERS = "clusters"
RESOLUTION = 12  # of votes: four bytes a candidate travel, and a vote is right to one part in 4,096
_log = logging.getLogger(__name__)


def ballot(
    schema: Schema,
    label: int,
    pool: Candidates,
    *,
    clip: float,
    noise_multiplier: float,
    cells: bool,
    clusters: NDArray[np.int64] | None = None,
) -> Query:
    """The query for votes on a pool.

    Args:
      schema: Public schema.
      label: Column that a record and the candidates it votes for agree on, or -1.
      pool: What is voted on, with the fingerprint of what placed it, which clients check.
      clip: The query's.
      noise_multiplier: The query's.
      cells: Whether a user's votes are counted cells.
      clusters: Cluster of each candidate, whose votes are counted too, or `None`.
    """
    num_cells, num_bins = _columns_of(schema)
    inputs: dict[str, NDArray[Any]] = {
        "codes": pool.codes,
        "num_cells": num_cells,
        "num_bins": num_bins,
        "label": np.array([label]),
    }
    if PLACES in pool.extras:
        inputs[PLACES] = pool.extras[PLACES]
        inputs[EMBEDDER] = pool.extras[EMBEDDER][0]
    elif pool.images is not None:
        inputs["images"] = pool.images
    dim = len(pool)
    if clusters is not None:
        inputs[CLUSTERS] = clusters.astype(np.int32)
        dim += int(clusters.max()) + 1
    return Query(
        "votes",
        dim=dim,
        clip=clip,
        noise_multiplier=noise_multiplier,
        inputs=inputs,
        cells=cells,
        resolution=RESOLUTION,
    )


def finder_of(query: Query, records: Records, category_weight: float) -> tuple[Finder, int]:
    """What finds a ballot's nearest candidates, once its arrays are checked; and the label.

    Raises:
      ConfigError: The arrays contradict each other or the records' shape; whether they do does
        not depend on any record.
    """
    given = dict(query.inputs)
    images, places = given.pop("images", None), given.pop(PLACES, None)
    clusters = given.pop(CLUSTERS, None)
    given.pop(EMBEDDER, None)  # held against the client's own before anything was asked of it
    seen = None if places is not None else records.images
    num_columns = records.codes.shape[1]
    if set(given) != {"codes", "num_cells", "num_bins", "label"}:
        raise ConfigError("a query for votes comes with other arrays than it should")
    codes, cells, bins, label = (given[k] for k in ("codes", "num_cells", "num_bins", "label"))
    num_candidates = len(codes) if codes.ndim else 0
    if not (
        all(a.dtype.kind == "i" for a in (codes, cells, bins, label))
        and codes.shape == (num_candidates, num_columns)
        and _are_clusters(clusters, num_candidates, query.dim)
        and cells.shape == bins.shape == (num_columns,)
        and ((cells >= 1) & (cells <= MAX_CELLS) & (bins >= 0) & (bins <= cells)).all()
        and label.shape == (1,)
        and -1 <= int(label[0]) < num_columns
        and ((codes >= 0) & (codes < cells)).all()
        and (images is None) == (seen is None)
        and (
            images is None
            or seen is None
            or (images.dtype == np.uint8 and images.shape == (num_candidates, *seen.shape[1:]))
        )
        and (places is None or _are_places(places, num_candidates, records.places))
    ):
        raise ConfigError("a query for votes comes with arrays that contradict each other")
    position = int(label[0])
    metric = TableMetric(cells, bins, position, category_weight)
    groups = labels_of(codes, position)
    return Finder(codes, images, groups, metric=metric, places=places), position


def features_of(
    schema: Schema, label: int, pool: Candidates, category_weight: float
) -> NDArray[np.floating]:
    """Whole numbers whose squared distances are those by which votes are cast."""
    num_cells, num_bins = _columns_of(schema)
    metric = TableMetric(num_cells, num_bins, label, category_weight)
    groups = np.zeros(len(pool), dtype=np.int64)
    places = pool.extras.get(PLACES)
    images = None if places is not None else pool.images
    return Finder(pool.codes, images, groups, metric=metric, places=places).features


def tally_of(query: Query, share: float) -> Tally:
    """What a checked ballot's votes are counted in, where clusters have a share of a vote."""
    clusters = query.inputs.get(CLUSTERS)
    if clusters is None:
        return Tally(query.dim)
    return Tally(len(clusters), clusters.astype(np.int64), share)


def _are_clusters(clusters: NDArray[Any] | None, num_candidates: int, dim: int) -> bool:
    """Whether a ballot's cells are those of its candidates and of their clusters."""
    if clusters is None:
        return num_candidates == dim
    return bool(
        clusters.dtype.kind == "i"
        and clusters.shape == (num_candidates,)
        and num_candidates < dim
        and ((clusters >= 0) & (clusters < dim - num_candidates)).all()
    )


def _are_places(
    places: NDArray[Any], num_candidates: int, of_records: NDArray[np.int16] | None
) -> bool:
    """Whether these are embeddings like those of the records, none of them too long to be exact."""
    if of_records is None or places.dtype != np.int16:
        return False
    if places.shape != (num_candidates, of_records.shape[1]):
        return False
    squared = np.einsum("nd,nd->n", places, places, dtype=np.int64)
    return bool((squared <= MOST_SQUARED).all())


def _columns_of(schema: Schema) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells of each column, and how many of them have an order."""
    cells = np.array(schema.shape, dtype=np.int64)
    bins = np.array([c.num_ordered_cells for c in schema.columns])
    return cells, bins.astype(np.int64)


def warn_of_drowned(num_drowned: int, num_rounds: int, num_candidates: int) -> None:
    """Say how to be heard, where votes of some rounds were nothing but noise.

    Args:
      num_drowned: Rounds in which they were.
      num_rounds: All rounds.
      num_candidates: That votes were cast on.
    """
    if num_drowned:
        _log.warning(
            "in %d of %d rounds votes could not be told from noise, and the pool stayed as it was;"
            " set num_candidates below %d",
            *(num_drowned, num_rounds, num_candidates),
        )


def labels_of(codes: NDArray[np.int32], label: int) -> NDArray[np.int64]:
    """Label of each record; all alike without a label."""
    if label < 0:
        return np.zeros(len(codes), dtype=np.int64)
    return codes[:, label].astype(np.int64)


def label_of(schema: Schema, name: str | None) -> int:
    """Position of the label's column; -1 for none.

    Args:
      schema: Public schema.
      name: A category. `None`: the schema's target, where that is a category. `""`: none.

    Raises:
      ConfigError: There is no such column, or it is no category.
    """
    wanted = schema.target if name is None else name
    if not wanted:
        return -1
    if name is not None and wanted not in schema.names:
        raise ConfigError(f"label = {name!r} is no column; there are {', '.join(schema.names)}")
    position = schema.index(wanted)
    if schema.columns[position].is_categorical:
        return position
    if name is None:
        return -1
    raise ConfigError(f"label = {name!r} must be a category; it is {schema.columns[position].kind}")

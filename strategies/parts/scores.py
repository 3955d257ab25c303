# SPDX-License-Identifier: Apache-2.0
"""Scores of prompts' responses: which of them are like what users write, and what is read of it.

A response's score is the mean cosine of its embedding with those of a user's texts. Only the order
of responses to one prompt is wanted, so what prompts differ in is taken off before a user's scores
are scaled to length one, and all of that length is spent on the order. A mean of cosines is linear
in the texts' embeddings, so the sum of these tells the order of any responses, for once and all.

Embeddings are whole steps, so every cosine is exact in float64: a user's scores hang neither on the
linear algebra library nor on who else is in the block.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.embedding import EMBEDDER, MOST_SQUARED, STEPS
from ...core.errors import ConfigError
from ...core.generation import PLACES, PROMPTS
from ...core.query import NoisySum, Query
from ...core.records import BoundedShard
from .simplex import CLEAR
from .votes import RESOLUTION

Form = Literal["prompt", "pool", "direction"]
_CHUNK = 1 << 18  # of users' numbers that are held at a time
_LEVELS = 1 << 15  # of a user's largest score: squares add up exactly in float64


def sheet(
    form: Form,
    places: NDArray[np.int16],
    embedder: NDArray[np.uint8],
    prompts: NDArray[np.int32],
    *,
    noise_multiplier: float,
) -> Query:
    """The query for scores of responses, or for the direction that users' texts lie in.

    Args:
      form: What a user's vector is; see `Popri.scores`.
      places: Embeddings of the responses, in whole steps, `(num_responses, dim)`.
      embedder: Fingerprint of what placed them, 32 bytes, which clients check.
      prompts: Prompt of each response, `(num_responses,)`, from 0.
      noise_multiplier: The query's.
    """
    if form == "direction":
        inputs: dict[str, NDArray[Any]] = {EMBEDDER: embedder}
        return Query(
            *(form, places.shape[1], 1.0, noise_multiplier), inputs=inputs, resolution=RESOLUTION
        )
    inputs = {PLACES: places, EMBEDDER: embedder, PROMPTS: prompts}
    return Query(
        *("scores", len(places), 1.0, noise_multiplier), inputs=inputs, resolution=RESOLUTION
    )


def rows_of(query: Query, shard: BoundedShard, form: Form) -> NDArray[np.float64]:
    """Each user's vector, of length one, `(num_users, dim)`; zeros for who likes nothing better.

    Raises:
      ConfigError: The query's arrays contradict each other or the records'; whether they do does
        not depend on any record.
    """
    written = shard.records.places
    if written is None:
        raise ConfigError("a query for scores needs records placed, and names no embedder")
    given = {name: array for name, array in query.inputs.items() if name != EMBEDDER}
    if form == "direction":
        if given or query.dim != written.shape[1]:
            raise ConfigError("a query for a direction comes with other arrays than it should")
        return np.concatenate([unit_rows(sums) for sums, _ in _users(written, shard, query.dim)])
    places, prompts = given.get(PLACES), given.get(PROMPTS)
    if places is None or prompts is None or len(given) != 2:
        raise ConfigError("a query for scores comes with other arrays than it should")
    if not (
        places.dtype == np.int16
        and places.shape == (query.dim, written.shape[1])
        and prompts.dtype.kind == "i"
        and prompts.shape == (query.dim,)
        and bool(((prompts >= 0) & (prompts < query.dim)).all())
        and bool((np.einsum("nd,nd->n", places, places, dtype=np.int64) <= MOST_SQUARED).all())
    ):
        raise ConfigError("a query for scores comes with arrays that contradict each other")
    responses = places.T.astype(np.float64)
    groups = np.zeros(query.dim, dtype=np.int64) if form == "pool" else prompts.astype(np.int64)
    rows = [
        standardized(np.rint(sums @ responses / counts), groups)  # in steps of 1 / STEPS^2
        for sums, counts in _users(written, shard, query.dim)
    ]
    return np.concatenate(rows)


def standardized(scores: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows of length one, in which each group of columns has mean zero and an equal part of that.

    A group in which a row's scores are all alike stays zeros, and its part is lost.

    Args:
      scores: Whole numbers, so small that sums of a row's groups are exact, `(num_rows, dim)`.
      groups: Group of each column, `(dim,)`.
    """
    order = np.argsort(groups, kind="stable")
    _, starts, of, sizes = np.unique(
        groups[order], return_index=True, return_inverse=True, return_counts=True
    )
    ordered = scores[:, order]
    # times the group's size, so that whole numbers stay whole
    ordered = ordered * sizes[of] - np.add.reduceat(ordered, starts, axis=1)[:, of]
    largest = np.maximum.reduceat(np.abs(ordered), starts, axis=1)
    whole = np.rint(ordered / np.where(largest > 0, largest, 1.0)[:, of] * _LEVELS)
    lengths = np.sqrt(np.maximum(np.add.reduceat(whole**2, starts, axis=1), 1.0) * len(sizes))
    found = np.empty_like(ordered)
    found[:, order] = whole / lengths[:, of]
    return found


def unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows scaled to length one, to the same bits whatever rows stand beside; zeros stay zeros."""
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    whole = np.rint(rows / np.where(largest > 0, largest, 1.0) * _LEVELS)
    squared = np.einsum("nd,nd->n", whole, whole)[:, None]
    return np.asarray(whole / np.sqrt(np.maximum(squared, 1.0)))


def read_scores(
    noisy: NoisySum, form: Form, places: NDArray[np.int16]
) -> NDArray[np.float64] | None:
    """The score of each response, `(num_responses,)`; `None` where the round was lost.

    Args:
      noisy: What `sheet` was answered by; for `direction` it may have been asked beside others.
      form: What it asked.
      places: Embeddings of the responses.
    """
    if noisy.is_void:
        return None
    if form == "direction":
        return np.asarray(places.astype(np.float64) @ noisy.vector / STEPS)
    return noisy.vector


def is_clear(noisy: NoisySum, form: Form, prompts: NDArray[np.int32]) -> bool:
    """Whether a sum is longer than noise alone would be, by three standard deviations."""
    vector = noisy.vector
    freedom = degrees(form, len(vector), len(np.unique(prompts)))
    if form != "direction":
        _, of, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
        vector = vector - (np.bincount(of, weights=vector) / sizes)[of]
    power = float(vector @ vector) / noisy.stddev**2
    return power > freedom + CLEAR * math.sqrt(2 * freedom)


def degrees(form: Form, dim: int, num_prompts: int) -> int:
    """Directions of a vector in which the order of some prompt's responses changes."""
    return dim if form == "direction" else max(1, dim - num_prompts)


def pairs_of(
    scores: NDArray[np.float64], prompts: NDArray[np.int32], reject_rank: int
) -> list[tuple[int, int]]:
    """Of each prompt the response with the best score, and the one at a rank below it.

    Args:
      scores: Of each response.
      prompts: Prompt of each.
      reject_rank: From 2; the last one, where a prompt has fewer responses.
    """
    pairs = []
    for prompt in np.unique(prompts):
        members = np.flatnonzero(prompts == prompt)
        ranked = members[np.argsort(-scores[members], kind="stable")]
        if len(ranked) > 1:
            pairs.append((int(ranked[0]), int(ranked[min(reject_rank, len(ranked)) - 1])))
    return pairs


def recovery(
    noisy: NDArray[np.float64],
    exact: NDArray[np.float64],
    prompts: NDArray[np.int32],
    reject_rank: int,
) -> float:
    """Share of pairs, as noisy scores choose them, that exact scores put in the same order."""
    pairs = np.array(pairs_of(noisy, prompts, reject_rank))
    return float((exact[pairs[:, 0]] > exact[pairs[:, 1]]).mean())


def _users(
    places: NDArray[np.int16], shard: BoundedShard, dim: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Sum of each user's embeddings, and of how many; so many users at a time as memory takes.

    A block of users is measured by the length of their vectors, `dim`, which may be much shorter
    than an embedding.
    """
    starts = shard.starts
    step = max(1, _CHUNK // max(places.shape[1], dim))
    for first in range(0, max(shard.num_users, 1), step):
        own = starts[first : first + step + 1]
        sums = np.zeros((len(own) - 1, places.shape[1]))
        if len(sums):
            records = places[own[0] : own[-1]]
            sums[:] = np.add.reduceat(records, own[:-1] - own[0], axis=0, dtype=np.int64)
        yield sums, np.diff(own)[:, None]

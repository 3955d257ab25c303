# SPDX-License-Identifier: Apache-2.0
"""A judge in whole numbers: predicts the target of a record, whoever stands beside it.

Logistic regression on cells and pixels, fitted to public (synthetic) records. Its weights are
rounded to integers, so a record's scores are exact sums: the same to the last bit in any block.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from scipy.special import softmax

from ...core.errors import ConfigError
from ...core.records import BoundedShard, Records
from ...core.schema import Schema

WEIGHTS, STARTS, TARGET = "score_weights", "score_starts", "score_target"

_STEPS, _RIDGE = 300, 1e-4
_SCALE = 65_536  # whole steps in a weight of one
_WHITE = 255  # of a pixel; a lit cell counts as much
_AT_ONCE = 4096  # records, and
_SCORES = 1 << 22  # numbers of theirs, for a server says how many a record has


def fitted(records: Records, schema: Schema) -> dict[str, NDArray[Any]]:
    """A judge of a schema's target, as the arrays of a query.

    Full-batch gradient descent with Nesterov's momentum and a fixed number of steps, so that the
    same records give the same judge.

    Args:
      records: Synthetic records.
      schema: Their closed schema; its target is a category.
    """
    at = schema.index(schema.target or "")
    sides = [0 if i == at else column.num_cells for i, column in enumerate(schema.columns)]
    starts = np.cumsum([0, *sides]).astype(np.int64)
    seen, truth = _features(records, starts), records.codes[:, at]
    wanted = np.eye(schema.columns[at].num_cells)[truth]
    weights = np.zeros((seen.shape[1], wanted.shape[1]))
    step, before = 1 / (_steepest(seen) + _RIDGE), weights
    for number in range(_STEPS if len(records) else 0):
        ahead = weights + number / (number + 3) * (weights - before)
        slope = seen.T @ (softmax(seen @ ahead, axis=1) - wanted) / len(truth) + _RIDGE * ahead
        before, weights = weights, ahead - step * slope
    whole = np.clip(np.rint(weights * _SCALE), -(2.0**30), 2.0**30).astype(np.int32)
    return {WEIGHTS: whole, STARTS: starts, TARGET: np.array([at], dtype=np.int64)}


def correct_shares(told: Mapping[str, NDArray[Any]], shard: BoundedShard) -> NDArray[np.float64]:
    """Which share of each user's records a judge predicts, `(num_users,)`.

    Args:
      told: The arrays of a query, which came over a network.
      shard: The users.

    Raises:
      ConfigError: The arrays are no judge of such records; none was looked at.
    """
    weights, starts, target = _checked(told, shard.records)
    right = np.zeros(len(shard.records))
    at_once = max(1, min(_AT_ONCE, _SCORES // weights.shape[1]))
    for first in range(0, len(right), at_once):
        part = shard.records.take(slice(first, first + at_once))
        scores = np.zeros((len(part), weights.shape[1]), dtype=np.int64)
        scores += weights[-1]
        for column, (low, high) in enumerate(itertools.pairwise(starts.tolist())):
            if high > low:
                scores += weights[low + np.clip(part.codes[:, column], 0, high - low - 1)]
        scores *= _WHITE
        if part.images is not None:
            pixels = part.images.reshape(len(part), -1).astype(np.int64)
            scores += pixels @ weights[starts[-1] : -1]
        right[first : first + at_once] = scores.argmax(axis=1) == part.codes[:, target]
    total = np.bincount(shard.user_index, weights=right, minlength=shard.num_users)
    return total / np.bincount(shard.user_index, minlength=shard.num_users)


def _features(records: Records, starts: NDArray[np.int64]) -> csr_matrix:
    """Lit cells, pixels in [0, 1] and a one, `(num_records, num_features)`."""
    rows, blocks = np.arange(len(records)), []
    for column, side in enumerate(np.diff(starts).tolist()):
        if side:
            cells = (rows, records.codes[:, column])
            blocks.append(csr_matrix((np.ones(len(rows)), cells), (len(rows), side)))
    if records.images is not None:
        blocks.append(csr_matrix(records.images.reshape(len(rows), -1) / _WHITE))
    return csr_matrix(hstack([*blocks, csr_matrix(np.ones((len(rows), 1)))]))


def _steepest(seen: csr_matrix) -> float:
    """About the most that a slope changes by a step of one, a little more."""
    vector = np.ones(seen.shape[1])
    for _ in range(20):
        vector = seen.T @ (seen @ vector)
        vector /= max(float(np.linalg.norm(vector)), 1e-30)
    longest = float(np.linalg.norm(seen @ vector))
    return 0.55 * longest**2 / max(1, int(seen.shape[0]))


def _checked(
    told: Mapping[str, NDArray[Any]], records: Records
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Weights, where each column's begin, and the target; looks at shapes alone."""
    if not {WEIGHTS, STARTS, TARGET} <= set(told):
        raise ConfigError("a score is asked without the judge that gives it")
    weights, starts, target = told[WEIGHTS], told[STARTS], told[TARGET]
    num_columns = records.codes.shape[1]
    pixels = 0 if records.images is None else int(np.prod(records.images.shape[1:]))
    if not (
        weights.dtype == np.int32
        and starts.dtype == target.dtype == np.int64
        and (weights.ndim, starts.shape, target.shape) == (2, (num_columns + 1,), (1,))
        and starts[0] == 0
        and bool((starts[1:] >= starts[:-1]).all())
        and len(weights) == int(starts[-1]) + pixels + 1
        and weights.shape[1] >= 1
        and 0 <= target[0] < num_columns
    ):
        raise ConfigError("a score is asked by a judge that does not fit the records")
    return weights.astype(np.int64), starts, int(target[0])

# SPDX-License-Identifier: Apache-2.0
"""A critic of records: its scores, and their gradients, by user or by batch.

The score of a record x is `v . tanh(W x + b)`: one hidden layer over the cells that the record
lights and its pixels, at heights that keep the layer's size alike however many there are. All its
weights are one float32 matrix of `num_inputs + 2` rows: those of W, then b, then v. A gradient by
them has the same shape, and for one record it is an outer product, so the gradients of many users
are one sparse product and need no autograd.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix

from ...core.errors import ConfigError
from ...core.query import Query
from ...core.records import BoundedShard
from .exact import GRID, sums_exactly

Loss = Literal["wasserstein", "logistic"]

_USUAL = 16.0  # columns, or pixels, whose height is one
_MOST_SCORE = 30.0  # beyond which a sigmoid is flat


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a critic is shown of a record: its pixels, then a one for each column's group of cells.

    Attributes:
      num_pixels: Pixels of an image times channels; 0 without images. They are the first inputs.
      columns: Position of each table column that is shown, `(num_columns,)`.
      starts: Where each column's cells start in `places` and, last, where they end,
        `(num_columns + 1,)`.
      places: Input that is lit by each cell of each column, `(num_cells,)`.
    """

    num_pixels: int
    columns: NDArray[np.int64]
    starts: NDArray[np.int64]
    places: NDArray[np.int64]

    @staticmethod
    def of(
        num_pixels: int, columns: Sequence[int], groups: Sequence[NDArray[np.int64]]
    ) -> "Inputs":
        """The inputs for columns whose cells are merged into groups.

        Args:
          num_pixels: Pixels of an image times channels.
          columns: Position of each column.
          groups: Group of each of its cells, from 0 without a gap.
        """
        firsts = np.cumsum([num_pixels, *(int(g.max()) + 1 for g in groups)])
        return Inputs(
            num_pixels,
            np.array(columns, dtype=np.int64),
            np.cumsum([0, *map(len, groups)]).astype(np.int64),
            np.concatenate([g + first for g, first in zip(groups, firsts[:-1], strict=True)]),
        )

    @cached_property
    def size(self) -> int:
        """Number of inputs."""
        return int(self.places.max()) + 1

    @cached_property
    def cell_height(self) -> np.float32:
        """What a lit cell counts for."""
        return np.float32((_USUAL / len(self.columns)) ** 0.5)

    @cached_property
    def pixel_height(self) -> np.float32:
        """What a full pixel counts for."""
        return np.float32((_USUAL / max(1, self.num_pixels)) ** 0.5)

    def arrays(self, weights: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        """What a query carries; `read_critic` turns it back."""
        return {
            "weights": weights,
            "num_pixels": np.array([self.num_pixels], dtype=np.int64),
            "columns": self.columns,
            "starts": self.starts,
            "places": self.places,
        }

    def lit(self, codes: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Inputs that records light, `(num_records, num_columns)`, and whose codes are all cells.

        A code that is no cell of its column stands for the column's first cell.
        """
        shown = codes[:, self.columns].astype(np.int64)
        known = (shown >= 0) & (shown < np.diff(self.starts))
        places = self.places[np.where(known, shown, 0) + self.starts[:-1]]
        return places, np.asarray(known.all(axis=1))


def read_critic(query: Query, shard: BoundedShard) -> tuple[Inputs, NDArray[np.float32]]:
    """The inputs and weights that a query carries.

    Raises:
      ConfigError: They contradict each other or the shape of the shard's records. Whether they do
        does not depend on any record.
    """
    names = ("weights", "num_pixels", "columns", "starts", "places")
    if set(query.inputs) != set(names):
        raise ConfigError(f"query {query.name!r} comes with other arrays than {', '.join(names)}")
    weights, pixels, columns, starts, places = (query.inputs[name] for name in names)
    images = shard.records.images
    num_pixels = 0 if images is None else int(np.prod(images.shape[1:]))
    if not (
        all(a.dtype.kind == "i" and a.ndim == 1 for a in (pixels, columns, starts, places))
        and weights.dtype == np.float32
        and weights.ndim == 2
        and weights.size == query.dim
        and np.isfinite(weights).all()
        and sums_exactly(weights[:num_pixels], (_USUAL / max(1, num_pixels)) ** 0.5)
        and pixels.tolist() == [num_pixels]
        and len(starts) == len(columns) + 1 > 1
        and starts[0] == 0
        and starts[-1] == len(places)
        and (np.diff(starts) > 0).all()
        and ((columns >= 0) & (columns < shard.records.codes.shape[1])).all()
        and ((places >= num_pixels) & (places < len(weights) - 2)).all()
        and places.max() == len(weights) - 3
    ):
        raise ConfigError(f"query {query.name!r} comes with arrays that contradict each other")
    inputs = Inputs(
        num_pixels, columns.astype(np.int64), starts.astype(np.int64), places.astype(np.int64)
    )
    return inputs, weights


def push(loss: Loss, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much each score should still rise: the slope of what a critic gains on real records.

    A Wasserstein critic gains the score itself; a logistic one the logarithm of `sigmoid(score)`,
    and on synthetic records that of `sigmoid(-score)`.
    """
    if loss == "wasserstein":
        return np.ones_like(scores)
    powers = np.exp(np.clip(scores, -_MOST_SCORE, _MOST_SCORE))
    return np.asarray(1 / (1 + powers), dtype=np.float32)


def user_gradients(
    inputs: Inputs, weights: NDArray[np.float32], shard: BoundedShard, loss: Loss
) -> NDArray[np.float32]:
    """Each user's gradient of what the critic gains on their records, `(num_users, weights.size)`.

    Args:
      inputs: What the critic is shown.
      weights: The critic, `(num_inputs + 2, num_hidden)`.
      shard: The users; may be none.
      loss: What the critic gains.

    Privacy:
      A row is the mean over one user's own records, the same to the bit whoever stands beside:
      each number is a sum over that user's records, in the order in which they are held. The row
      of a user with a code that is no cell is not finite, so it counts as zeros.
    """
    num_users, (height, width) = shard.num_users, weights.shape
    if not num_users:
        return np.zeros((0, weights.size), dtype=np.float32)
    records, user = shard.records, shard.user_index
    lit, known = inputs.lit(records.codes)
    entering = np.zeros((len(lit), width), dtype=np.float32)
    for places in lit.T:  # one column after the other, so that a sum never depends on the batch
        entering += weights[places]
    entering *= inputs.cell_height
    values = np.ones((len(lit), inputs.num_pixels + lit.shape[1] + 1), dtype=np.float32)
    values[:, :-1] = inputs.cell_height
    if records.images is not None and inputs.num_pixels:
        flat = records.images.reshape(len(lit), -1)
        full = inputs.pixel_height * (GRID / 255)
        grid = np.rint(weights[: inputs.num_pixels] * full) / GRID
        # whole numbers on a grid, in float64: exact, so that it does not depend on the batch
        entering += (flat.astype(np.float64) @ grid).astype(np.float32)
        values[:, : inputs.num_pixels] = flat * (inputs.pixel_height / np.float32(255))
    hidden = np.tanh(entering + weights[-2])
    starts = shard.starts
    share = push(loss, (hidden * weights[-1]).sum(axis=1))
    share /= np.diff(starts)[user].astype(np.float32)
    share[~known] = np.nan
    slopes = (1 - hidden * hidden) * weights[-1] * share[:, None]
    every = np.arange(inputs.num_pixels)
    rows_lit = np.concatenate(
        [
            np.broadcast_to(every, (len(lit), len(every))),
            lit,
            np.full((len(lit), 1), height - 2),
        ],
        axis=1,
    )
    rows_lit = rows_lit + (user * height)[:, None]
    ends = np.arange(0, values.size + 1, values.shape[1])
    spread = csc_matrix(
        (values.ravel(), rows_lit.ravel(), ends), shape=(num_users * height, len(lit))
    )
    rows = np.asarray(spread @ slopes).reshape(num_users, height, width)
    rows[:, -1] = np.add.reduceat(hidden * share[:, None], starts[:-1], axis=0)
    return rows.reshape(num_users, -1)


@dataclass(frozen=True, eq=False)
class Batch:
    """Synthetic records as a critic sees them, with all that its gradients are made of.

    Attributes:
      shown: What enters the critic, at its height, `(num_records, num_inputs)`.
      hidden: Its hidden layer, `(num_records, num_hidden)`.
      slopes: Gradient of each score by what enters the hidden layer, of the same shape.
      scores: `(num_records,)`.
      lengths: L2 norm of the gradient of each score by all weights, `(num_records,)`.
    """

    shown: NDArray[np.float32]
    hidden: NDArray[np.float32]
    slopes: NDArray[np.float32]
    scores: NDArray[np.float32]
    lengths: NDArray[np.float32]

    @staticmethod
    def of(weights: NDArray[np.float32], shown: NDArray[np.float32]) -> "Batch":
        """What a critic makes of records."""
        hidden = np.tanh(shown @ weights[:-2] + weights[-2])
        slopes = (1 - hidden * hidden) * weights[-1]
        enters = np.einsum("ij,ij->i", shown, shown) + np.float32(1)
        squared = enters * np.einsum("ij,ij->i", slopes, slopes)
        squared += np.einsum("ij,ij->i", hidden, hidden)
        return Batch(shown, hidden, slopes, hidden @ weights[-1], np.sqrt(squared))

    def gradient(self, heights: NDArray[np.float32]) -> NDArray[np.float32]:
        """The records' gradients by the weights, each times its height, summed."""
        slopes = self.slopes * heights[:, None]
        return np.concatenate(
            [self.shown.T @ slopes, slopes.sum(axis=0)[None], (heights @ self.hidden)[None]]
        )

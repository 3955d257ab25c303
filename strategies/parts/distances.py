# SPDX-License-Identifier: Apache-2.0
"""How near a pool comes to users who judge instead of voting, and when it comes no nearer.

A share of the users is held out: their cells of a round's sum are not candidates but bins of how
far their records are from the nearest candidate. A user has one role or the other in all rounds,
so the whole vector, votes and bins, is one bounded vector a user and costs what votes alone do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.generation import PLACES
from ...core.query import NoisySum, Query
from ...core.records import BoundedShard
from .nearest import Finder, TableMetric
from .simplex import CLEAR
from .votes import labels_of

RULER = "ruler"
_NUM_BINS = 12
_MOST_BINS = 256  # that a client answers with
_ROLE = 0x6A75646765  # stirred into users' words, so that a role is drawn by nothing else
_BARS = "▁▂▃▄▅▆▇█"


def ruler_of(query: Query, category_weight: float) -> NDArray[np.float64]:
    """Edges of bins of squared distances, fine about how far candidates are from their neighbors.

    With s the median distance of every other candidate from the nearest of the rest, bin k of n
    ends at the distance d where d / (d + s) = (k + 1) / n. The last is open.

    Args:
      query: A ballot on a first pool, whose candidates are as far apart as before any vote.
      category_weight: Distance of two categories.

    Returns:
      `(num_bins - 1,)`, rising.
    """
    given = query.inputs
    label = int(given["label"][0])
    metric = TableMetric(given["num_cells"], given["num_bins"], label, category_weight)
    codes, others = given["codes"][::2], given["codes"][1::2]
    images, their_images = _halves(given.get("images"))
    places, their_places = _halves(given.get(PLACES))
    finder = Finder(codes, images, labels_of(codes, label), metric=metric, places=places)
    groups = labels_of(others, label)
    _, squared = finder.nearest(others, their_images, groups, places=their_places)
    apart = squared[np.isfinite(squared) & (squared > 0)]
    scale = float(np.median(apart)) if len(apart) else 1.0
    shares = np.arange(1, _NUM_BINS) / _NUM_BINS
    return np.asarray(scale * (shares / (1 - shares)) ** 2)


def _halves(
    array: NDArray[Any] | None,
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Every other row, and the rest; `None` of what is not there."""
    return (None, None) if array is None else (array[::2], array[1::2])


def with_ruler(query: Query, ruler: NDArray[np.float64]) -> Query:
    """A ballot that asks held-out users for their distances, in cells of their own at the end."""
    inputs = {**query.inputs, RULER: ruler}
    return replace(query, dim=query.dim + len(ruler) + 1, inputs=inputs)


def without_ruler(query: Query) -> tuple[Query, NDArray[np.float64] | None]:
    """The ballot alone, and the edges that came with it; `None`: nobody judges.

    Raises:
      ConfigError: The edges are none, or there are more of them than cells.
    """
    if RULER not in query.inputs:
        return query, None
    ruler = query.inputs[RULER]
    if not (
        ruler.ndim == 1
        and ruler.dtype == np.float64
        and 1 <= len(ruler) < min(_MOST_BINS, query.dim - 1)
        and np.isfinite(ruler).all()
        and (np.diff(ruler, prepend=0.0) > 0).all()
    ):
        raise ConfigError("a query for votes comes with a ruler that measures nothing")
    inputs = {name: array for name, array in query.inputs.items() if name != RULER}
    return replace(query, dim=query.dim - len(ruler) - 1, inputs=inputs), ruler


def judges(shard: BoundedShard, held_out: float) -> NDArray[np.bool_]:
    """Which users judge instead of voting, `(num_users,)`: the same ones whoever stands beside.

    Drawn by a pseudorandom number from each user's id, or from the records of users without ids,
    of whom those with equal records have one role. It carries no privacy claim: in either role a
    user's vector is within the clip.
    """
    drawn = (shard.user_words(_ROLE) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(drawn < held_out)


def judged(
    cells: NDArray[np.int64],
    heights: NDArray[np.float64],
    bins: NDArray[np.int64],
    users: NDArray[np.int64],
    is_judge: NDArray[np.bool_],
    clip: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Votes with a bin beside them, of which a voter's votes count and a judge's bin.

    Args:
      cells: That each record votes for, `(num_records, num_cells)`.
      heights: Of those, `(num_cells,)`.
      bins: Cell of each record's distance, `(num_records,)`.
      users: User of each record.
      is_judge: Which users judge, `(num_users,)`.
      clip: The query's: how long a judge's vector is, at most, whatever records the judge has.

    Returns:
      Cells, their heights, and what each is multiplied by, as `Contribution.cells` takes them.
    """
    judging = is_judge[users]
    share = 1.0 / np.bincount(users, minlength=len(is_judge))[users]
    scales = np.repeat(np.where(judging, 0.0, 1.0)[:, None], len(heights) + 1, axis=1)
    scales[:, -1] = np.where(judging, share, 0.0)
    return np.column_stack([cells, bins]), np.append(heights, clip), scales


@dataclass(frozen=True)
class Reading:
    """How far judges were from a pool, in one round.

    Attributes:
      near: Mean of d / (d + s) over judges, each the mean over the judge's records; in (0, 1).
      stddev: Of its noise.
    """

    near: float
    stddev: float

    @property
    def distance(self) -> tuple[float, float]:
        """The distance that has this mean, where s is 1, and the standard deviation of its noise.

        One is thus how far candidates of the first pool are from their neighbors.
        """
        return self.near / (1 - self.near), self.stddev / (1 - self.near) ** 2


def reading_of(counts: NoisySum, clip: float) -> Reading | None:
    """What bins say; `None` where the judges cannot be told from noise, or the round was void.

    Args:
      counts: Of the bins, `(num_bins,)`.
      clip: Height of a judge.
    """
    num_bins = len(counts.vector)
    total = float(counts.vector.sum()) / clip
    noise = counts.stddev / clip
    if counts.is_void or total < CLEAR * noise * math.sqrt(num_bins):
        return None
    middles = (np.arange(num_bins) + 0.5) / num_bins
    near = float(np.clip(middles @ counts.vector / clip / total, middles[0], middles[-1]))
    return Reading(near, noise * float(np.linalg.norm(middles - near)) / total)


def is_settled(readings: Sequence[Reading | None], patience: int) -> bool:
    """Whether a pool came no nearer for so many readings but by what noise explains.

    A reading is held against the last that was lower than the one it was held against by more than
    one standard deviation of their difference, so that small steps add up until they are seen.
    Rounds without a reading say nothing.

    Args:
      readings: Of each round so far.
      patience: How many; 0: it never is.
    """
    nearest: Reading | None = None
    since = 0
    for reading in readings:
        if reading is None:
            continue
        fallen = math.inf if nearest is None else nearest.near - reading.near
        if nearest is None or fallen > math.hypot(nearest.stddev, reading.stddev):
            nearest, since = reading, 0
        else:
            since += 1
    return 0 < patience <= since


@dataclass(frozen=True, eq=False)
class Curve:
    """How near the pools of a run came to its judges.

    Attributes:
      held_out: Share of the users who judged.
      num_rounds: Rounds that were planned; there may be fewer readings.
      readings: Distance and the standard deviation of its noise in each round, in distances of
        neighbors in the first pool, `(rounds asked, 2)`; NaN where there was none.
    """

    held_out: float
    num_rounds: int
    readings: NDArray[np.float64]

    @staticmethod
    def of(readings: Sequence[Reading | None], *, held_out: float, num_rounds: int) -> "Curve":
        """The curve of a run's readings, round by round."""
        nothing = (math.nan, math.nan)
        points = [nothing if reading is None else reading.distance for reading in readings]
        return Curve(held_out, num_rounds, np.array(points, dtype=np.float64).reshape(-1, 2))

    @property
    def told(self) -> tuple[str, ...]:
        """What a person is told of it."""
        asked, known = len(self.readings), np.isfinite(self.readings[:, 0])
        stopped = ""
        if asked < self.num_rounds:
            stopped = (
                f" The run stopped after {asked} of {self.num_rounds} rounds of votes, as the pool"
                " came no nearer but by what noise explains."
            )
        if not known.any():
            return (f"Users who judged could not be told from noise in {asked} rounds.{stopped}",)
        points = self.readings[known]
        (first, off), (last, last_off) = points[0], points[-1]
        return (
            f"Distance of users from the nearest candidate, round by round: {_drawn(self.readings)}"
            f" from {first:.3g} ± {off:.2g} to {last:.3g} ± {last_off:.2g}, where 1 is the"
            " distance of neighbors in the first pool and ± one standard deviation of the noise."
            f" About {self.held_out:.0%} of all users were asked for it, and did not vote."
            f"{stopped}",
        )

    def settings(self) -> dict[str, Any]:
        """What is no array, as plain data."""
        return {"held_out": self.held_out, "num_rounds": self.num_rounds}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], readings: NDArray[Any] | None) -> Self:
        """The curve that was saved.

        Raises:
          ConfigError: It is none.
        """
        held_out, num_rounds = settings.get("held_out"), settings.get("num_rounds")
        if not (
            isinstance(held_out, float)
            and 0 < held_out < 1
            and isinstance(num_rounds, int)
            and readings is not None
            and readings.dtype == np.float64
            and readings.ndim == 2
            and readings.shape[1] == 2
            and 1 <= len(readings) <= num_rounds
            and bool((np.isnan(readings) | ((readings >= 0) & np.isfinite(readings))).all())
        ):
            raise ConfigError("a saved curve of distances that cannot be")
        return cls(held_out, num_rounds, readings)


def _drawn(readings: NDArray[np.float64]) -> str:
    """Distances as bars, one a round; a dot where there is none."""
    distances = readings[:, 0]
    top = float(np.nanmax(distances)) or 1.0
    levels = [
        "·" if math.isnan(d) else _BARS[min(len(_BARS) - 1, int(d / top * len(_BARS)))]
        for d in distances.tolist()
    ]
    return "".join(levels)

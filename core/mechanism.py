# SPDX-License-Identifier: Apache-2.0
"""Clip each user's vector onto an integer lattice, sum exactly, add lattice noise.

The whole privacy claim of a sum stands here: whatever a strategy hands over, each user moves
the integer sum by at most `Lattice.bound` in L2, and noise is scaled to that. For a query that
asks a choice the same bound holds for the L1 norm of the user's part in every block.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .query import Contribution, NoisySum, Query
from .randomness import KeyStream, lattice_noise
from .series import ONE, Turn

_SLICE = 1 << 15  # values clipped at a time; a slice stays in the processor's cache
_SPAN = 1 << 10  # values of a row pulled in at a time
_MISSHAPEN = (
    "a contribution must hold a row of the query's length for each user of the block, or whole"
    " numbers of cells in the order of users, with a finite height for each; make it by"
    " Contribution.rows or Contribution.cells"
)
_LEAST_SHARE = 2  # grains: a share of noise that is finer would not survive being rounded
_FARTHEST = 9  # standard deviations, which no draw of noise reaches: see `lattice_noise`
_MOST = 1 << 62  # in a cell, of whatever resolution
_MOST_GROWTH = 0.25  # of a row's squared norm by rounding; beyond that it is mostly rounded away
_SHRINK = 1 - 1e-6  # keeps a clipped row inside the bound in spite of float32 rounding


@dataclass(frozen=True)
class Lattice:
    """The integer grid that a query's vectors are put on.

    Attributes:
      unit: Width of one step, in the vectors' own unit; a power of two, so counts are exact.
      bound: Bound of a user's integer vector, `clip / unit`: of its L2 norm, or, for a choice, of
        its L1 norm in each block.
    """

    unit: float
    bound: float

    @staticmethod
    def of(query: Query) -> "Lattice":
        """The lattice of a query; the same at every client and at the server."""
        _, exponent = math.frexp(query.clip)  # exact on every machine, which log2 need not be
        unit = 2.0 ** (exponent - 1 - query.finest)
        return Lattice(unit, query.clip / unit)

    def coarser(self, grain: int) -> "Lattice":
        """The lattice of every so many steps; `grain` is a power of two."""
        return Lattice(self.unit * grain, self.bound / grain)


def clipped_sum(
    contribution: Contribution, query: Query, *, num_users: int | None = None
) -> NDArray[np.int64]:
    """Exact sum of the users' clipped vectors on the query's lattice, `(dim,)`.

    All of it whole multiples of `query.grain`, which is what each vector is rounded to. Bit-equal
    whatever the order of users and however they are split into blocks and clients.

    Args:
      contribution: What a strategy handed over for a block of users.
      query: What was asked.
      num_users: Users in the block. `None`: as many as the contribution says.

    Raises:
      ConfigError: The contribution is for another number of users, or its arrays have shapes or
        types that no contribution has. It is not taken as zeros: one user's records could be what
        makes it so, and would void everybody's; a client asks again for fewer users.

    Privacy:
      Adding or removing one user of the block changes the result by at most
      `Lattice.of(query).bound` in L2; for a choice, in the L1 norm of every block of it. A user
      whose vector is not finite or names a cell out of range counts as zeros.
    """
    if num_users is not None and contribution.num_users != num_users:
        raise ConfigError(_MISSHAPEN)
    grid = Lattice.of(query).coarser(query.grain)
    if contribution.dense is not None:
        total = _dense_sum(contribution.dense, contribution.num_users, query, grid)
    elif contribution.indices is not None:
        total = _cell_sum(contribution, query, grid)
    else:
        raise ConfigError(_MISSHAPEN)
    return total * query.grain


def encoded(
    total: NDArray[np.int64], turn: Turn, earlier: Iterable[tuple[int, NDArray[np.int64]]]
) -> NDArray[np.int64]:
    """A client's exact sum with the echoes of its earlier sums of the series, `(dim,)`.

    Args:
      total: Of this round, in whole grains, which are multiples of `ONE` steps.
      turn: Which round of which series.
      earlier: Exact sums of earlier rounds, each once with its position before it; one that is
        missing counts as zeros.

    Privacy:
      Exact: over all rounds of the series one user moves what comes out as `core.series` reckons.
    """
    coefficients = turn.series.coefficients
    echoed = total // ONE * coefficients[0]
    for position, sum_then in earlier:
        lag = turn.position - position
        if 0 < lag < len(coefficients) and coefficients[lag]:
            echoed += sum_then // ONE * coefficients[lag]
    return np.asarray(echoed)


def sent(total: NDArray[np.int64], query: Query) -> NDArray[np.integer]:
    """A client's sum as it travels, `(dim,)`: in whole grains, no cell beyond what a reply holds.

    Privacy:
      A function of what would travel otherwise. An exact sum is in whole grains already, and
      holding cells at an end brings no two sums further apart: what one user moves stays bounded.
    """
    most = np.iinfo(query.reply_dtype).max
    grains = (total + query.reply_grain // 2) // query.reply_grain
    return np.asarray(np.clip(grains, -most, most).astype(query.reply_dtype))


def share_arrives(query: Query, *, stddev: float) -> bool:
    """Whether one client's share of noise arrives whole: not too fine or too wide for a reply.

    Shares of two grains or more, rounded each, add up to what their sum would be rounded with
    noise of its own added, but for parts in 10^15: the Fourier transform of such a Gaussian is
    exp(-2 pi^2) at the highest frequency that whole grains hold, in each of several shares.
    """
    steps = stddev / (Lattice.of(query).unit * query.reply_grain)
    return _LEAST_SHARE <= steps <= np.iinfo(query.reply_dtype).max / (2 * _FARTHEST)


def with_room(total: NDArray[np.int64], query: Query, *, stddev: float) -> NDArray[np.int64]:
    """A client's exact sum, no cell so near the most a reply holds that its noise would be cut off.

    Privacy:
      Holding cells at an end brings no two sums further apart. It is done before the noise of a
      share is added: several shares are noise enough together only if each of them arrives whole,
      and what `sent` held at an end would arrive without its noise.
    """
    room = math.ceil(_FARTHEST * stddev / (Lattice.of(query).unit * query.reply_grain)) + 1
    most = (int(np.iinfo(query.reply_dtype).max) - room) * query.reply_grain
    return np.clip(total, -min(most, _MOST), min(most, _MOST))


def noised(
    total: NDArray[np.int64], *, stddev: float, lattice: Lattice, stream: KeyStream
) -> NDArray[np.int64]:
    """An integer sum with Gaussian noise rounded to the lattice, `(dim,)`.

    Args:
      total: Exact sum, `(dim,)`.
      stddev: Of the noise, in the vectors' own unit; > 0.
      lattice: The query's lattice.
      stream: Secret randomness.

    Raises:
      ConfigError: `stddev` is not a positive number, or would overflow the lattice.
    """
    steps = stddev / lattice.unit
    if not (math.isfinite(steps) and 0 < steps < 2.0**52):
        raise ConfigError(f"noise of standard deviation {stddev!r} is outside the lattice's range")
    return total + lattice_noise(len(total), steps, stream)


def real_sum(
    total: NDArray[np.int64], *, stddev: float, lattice: Lattice, num_clients: int
) -> NoisySum:
    """A noised integer sum in the vectors' own unit."""
    return NoisySum(total.astype(np.float64) * lattice.unit, stddev, num_clients)


def _dense_sum(
    rows: NDArray[Any], num_users: int, query: Query, lattice: Lattice
) -> NDArray[np.int64]:
    """`clipped_sum` of dense rows, in steps of a lattice."""
    if rows.ndim != 2 or rows.shape != (num_users, query.dim) or rows.dtype.kind not in "fiu":
        raise ConfigError(_MISSHAPEN)
    size = max(1, min(num_users, _SLICE // query.dim))
    steps = np.empty((size, query.dim))
    exact = np.zeros(query.dim)  # a sum of integers below 2^53 is exact in float64
    for start in range(0, num_users, size):
        part = steps[: min(size, num_users - start)]
        part[:] = rows[start : start + size]
        if query.choice is None:
            _to_lattice(part, query.clip, lattice)
        else:
            _blocks_to_lattice(part, query.choice.starts, query.clip, lattice)
        exact += part[0] if len(part) == 1 else part.sum(axis=0)
    return exact.astype(np.int64)


def _to_lattice(rows: NDArray[np.float64], clip: float, lattice: Lattice) -> None:
    """Clip each of `rows`, `(num_users, dim)`, and round it to whole lattice steps, in place."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        norms = np.sqrt(_squares(rows))
        for row in np.flatnonzero(~(norms <= 1e15 * clip)):
            norms[row] = _tame(rows[row], clip)
        fitting = clip * _SHRINK * _room_for_rounding(rows.shape[1], lattice)
        scale = np.where(norms > clip, fitting / np.maximum(norms, clip), 1.0)
        rows *= (scale / lattice.unit)[:, None]
        np.rint(rows, out=rows)
        squared = np.einsum("ij,ij->i", rows, rows)  # of integers: exact while below 2^53
        for row in np.flatnonzero(~(squared <= lattice.bound**2)):
            _pull_in(rows[row], squared[row] - lattice.bound**2)
            if not float(np.einsum("i,i", rows[row], rows[row])) <= lattice.bound**2:
                rows[row] = 0.0


def _room_for_rounding(dim: int, lattice: Lattice) -> float:
    """What a clipped row is shortened by, so that it is as long as the clip once it is rounded.

    Rounding lengthens a row: its squared norm, in steps, grows by a twelfth a value. Where values
    are too small for that to hold, nothing is left for it.
    """
    grows = dim / (12 * lattice.bound**2)
    return math.sqrt(1 - grows) if grows < _MOST_GROWTH else 1.0


def _pull_in(steps: NDArray[np.float64], excess: float) -> None:
    """Move values one step towards zero, from the first on, till the squared norm is less enough.

    So a row that rounding took just over the bound stays as long as the bound, to a step.
    """
    for first in range(0, len(steps), _SPAN):
        part = steps[first : first + _SPAN]
        falls = np.cumsum(np.maximum(2 * np.abs(part) - 1, 0))
        last = int(np.searchsorted(falls, excess))
        part[: last + 1] -= np.sign(part[: last + 1])
        if last < len(part):
            return
        excess -= falls[-1]


def _squares(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared norm of each row, the same to the bit however many rows there are."""
    if rows.shape[1] > _SLICE:  # one by one, without a copy
        return np.array([np.einsum("i,i", row, row) for row in rows])
    squares: NDArray[np.float64] = (rows * rows).sum(axis=1)
    return squares


def _tame(row: NDArray[np.float64], clip: float) -> float:
    """Give a row whose norm overflows the norm `clip`, one that is not finite zeros; its norm."""
    largest = np.abs(row).max()
    if not np.isfinite(largest):
        row[:] = 0.0
        return 0.0
    row /= largest
    row *= clip * _SHRINK / np.sqrt(np.einsum("i,i", row, row))
    return clip * _SHRINK


def _blocks_to_lattice(
    rows: NDArray[np.float64], starts: NDArray[np.int64], clip: float, lattice: Lattice
) -> None:
    """Clip each block of each of `rows` in L1 and round it to whole lattice steps, in place."""
    first, sizes = starts[:-1], np.diff(starts)
    rows[~np.isfinite(rows).all(axis=1)] = 0.0
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        norms = np.add.reduceat(np.abs(rows), first, axis=1)
        if not (norms <= 1e15 * clip).all():
            largest = np.maximum.reduceat(np.abs(rows), first, axis=1)
            tamed = np.where(norms <= 1e15 * clip, 1.0, clip / np.maximum(largest, clip))
            rows *= np.repeat(tamed, sizes, axis=1)  # no cell is above the clip, one is equal to it
            norms = np.add.reduceat(np.abs(rows), first, axis=1)
        scale = np.where(norms > clip, clip * _SHRINK / np.maximum(norms, clip), 1.0)
        rows *= np.repeat(scale / lattice.unit, sizes, axis=1)
        np.rint(rows, out=rows)
        steps = np.add.reduceat(np.abs(rows), first, axis=1)  # of integers: exact below 2^53
        over = ~(steps <= lattice.bound)
        if over.any():  # rounding took a block that just fitted over the bound: towards zero
            pull = np.where(over, lattice.bound * _SHRINK / np.maximum(steps, 1.0), 1.0)
            np.trunc(rows * np.repeat(pull, sizes, axis=1), out=rows)
            steps = np.add.reduceat(np.abs(rows), first, axis=1)
            rows[np.repeat(~(steps <= lattice.bound), sizes, axis=1)] = 0.0


def _cell_sum(contribution: Contribution, query: Query, lattice: Lattice) -> NDArray[np.int64]:
    """`clipped_sum` of counted cells, in steps of a lattice; never forms a dense row."""
    cells, users, weights = contribution.indices, contribution.user_index, contribution.weights
    scales = contribution.scales
    if (
        cells is None
        or users is None
        or weights is None
        or cells.ndim != 2
        or cells.dtype != np.int64
        or users.shape != (len(cells),)
        or users.dtype.kind not in "iu"  # a NaN would compare as being in order
        or weights.shape != (cells.shape[1],)
        or weights.dtype.kind not in "fiu"
        or not np.isfinite(weights).all()
        or (scales is not None and not _fits(scales, cells))
        or (len(users) and not (users[0] >= 0 and users[-1] < contribution.num_users))
        or (users[1:] < users[:-1]).any()  # not a difference: that of unsigned numbers is never < 0
    ):
        raise ConfigError(_MISSHAPEN)
    total = np.zeros(query.dim, dtype=np.int64)
    if not len(users):
        return total
    blocks = None if query.choice is None else query.choice.starts
    with np.errstate(over="ignore", invalid="ignore"):
        heights = np.clip(weights.astype(np.float64) / lattice.unit, -(2.0**40), 2.0**40)
    step = max(1, _SLICE // max(1, cells.shape[1]))
    starts = np.flatnonzero(np.diff(users, prepend=-1))  # first record of each user
    first = 0
    while first < len(users):
        # whole users only; one user with more records than a slice is a slice of their own
        after = np.searchsorted(starts, first + step, side="right") - 1
        last = int(starts[after]) if starts[after] > first else _next(starts, after, len(users))
        if first + step >= len(users):
            last = len(users)
        part = None if scales is None else scales[first:last]
        _add_cells(total, cells[first:last], users[first:last], heights, part, lattice, blocks)
        first = last
    return total


def _fits(scales: NDArray[Any], cells: NDArray[np.int64]) -> bool:
    """Whether scales are real numbers, one a record or one a cell."""
    return scales.dtype.kind in "fiu" and scales.shape in (cells.shape[:1], cells.shape)


def _next(starts: NDArray[np.intp], after: int, num_records: int) -> int:
    """First record of the user after the one that begins at `starts[after]`."""
    return int(starts[after + 1]) if after + 1 < len(starts) else num_records


def _add_cells(
    total: NDArray[np.int64],
    cells: NDArray[np.int64],
    users: NDArray[np.int64],
    heights: NDArray[np.float64],
    scales: NDArray[np.float64] | None,
    lattice: Lattice,
    blocks: NDArray[np.int64] | None,
) -> None:
    """Add a slice of whole users to `total`; `blocks` are the starts of a choice's blocks."""
    dim = len(total)
    if scales is not None and scales.ndim == 1:
        scales = scales[:, None]
    valid = ((cells >= 0) & (cells < dim)).all(axis=1)
    if scales is not None:
        valid &= np.isfinite(scales).all(axis=1)
    if not valid.all():
        bad = np.unique(users[~valid])
        keep = ~np.isin(users, bad)
        cells, users = cells[keep], users[keep]
        scales = None if scales is None else scales[keep]
    if not len(users):
        return
    alone = np.diff(users, prepend=-1) > 0
    alone[:-1] &= np.diff(users) > 0
    # a user with one record whose cells all differ: every height once, so one norm for them all
    simple = alone & (cells[:, 1:] > cells[:, :-1]).all(axis=1)
    if scales is not None:
        simple &= (scales == 1.0).all(axis=1)
    whole = np.rint(heights)
    if blocks is None:
        fits = float(whole @ whole) <= lattice.bound**2
    else:
        tallest = max(np.abs(heights).max(initial=0), np.abs(whole).max(initial=0))
        fits = tallest <= lattice.bound and _one_a_block(cells, blocks)
    if not fits:
        simple[:] = False
    picked = cells[simple]
    np.add.at(total, picked.ravel(), np.broadcast_to(whole, picked.shape).ravel().astype(np.int64))
    cells, users = cells[~simple], users[~simple]
    if not len(users):
        return
    lit = np.broadcast_to(heights, cells.shape)
    if scales is not None:
        with np.errstate(over="ignore"):
            lit = np.clip(heights * scales[~simple], -(2.0**40), 2.0**40)
    _, local = np.unique(users, return_inverse=True)
    keys, inverse = np.unique(local[:, None] * dim + cells, return_inverse=True)
    heights_by_key = np.bincount(inverse.ravel(), weights=lit.ravel(), minlength=len(keys))
    values = heights_by_key.astype(np.float64)
    owner, cell = keys // dim, keys % dim
    if blocks is None:
        steps = _clipped_values(values, owner, lattice)
    else:
        place = owner * len(blocks) + np.searchsorted(blocks, cell, side="right")
        _, group = np.unique(place, return_inverse=True)
        steps = _clipped_in_l1(values, group.ravel(), lattice)
    np.add.at(total, cell, steps.astype(np.int64))


def _clipped_values(
    values: NDArray[np.float64], owner: NDArray[np.int64], lattice: Lattice
) -> NDArray[np.float64]:
    """Nonzero values of each owner's vector, clipped to the bound in whole steps."""
    norms = np.sqrt(np.bincount(owner, weights=values * values))
    over = norms > lattice.bound
    scale = np.where(over, lattice.bound * _SHRINK / np.maximum(norms, lattice.bound), 1.0)
    steps = np.rint(values * scale[owner])
    beyond = ~(np.bincount(owner, weights=steps * steps) <= lattice.bound**2)
    if beyond.any():
        steps = np.where(beyond[owner], np.trunc(values * scale[owner] * _SHRINK), steps)
        still = ~(np.bincount(owner, weights=steps * steps) <= lattice.bound**2)
        steps = np.where(still[owner], 0.0, steps)
    return steps


def _one_a_block(cells: NDArray[np.int64], blocks: NDArray[np.int64]) -> bool:
    """Whether each column of `cells` stays in one block, which no other column enters."""
    low = np.searchsorted(blocks, cells.min(axis=0), side="right")
    high = np.searchsorted(blocks, cells.max(axis=0), side="right")
    return bool((low == high).all()) and len(np.unique(low)) == len(low)


def _clipped_in_l1(
    values: NDArray[np.float64], group: NDArray[np.int64], lattice: Lattice
) -> NDArray[np.float64]:
    """Nonzero values of each group, one user's part in one block, clipped to the bound in L1."""
    norms = np.bincount(group, weights=np.abs(values))
    over = norms > lattice.bound
    scale = np.where(over, lattice.bound * _SHRINK / np.maximum(norms, lattice.bound), 1.0)
    steps = np.rint(values * scale[group])
    beyond = ~(np.bincount(group, weights=np.abs(steps)) <= lattice.bound)
    if beyond.any():
        steps = np.where(beyond[group], np.trunc(values * scale[group] * _SHRINK), steps)
        still = ~(np.bincount(group, weights=np.abs(steps)) <= lattice.bound)
        steps = np.where(still[group], 0.0, steps)
    return steps

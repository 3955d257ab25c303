# SPDX-License-Identifier: Apache-2.0
"""What every aggregator owes, checked on neighboring sums made to break it.

An aggregator declares how far one user can move what it returns, and noise is scaled to that. A
claim that is too small is a privacy hole that no noise shows, so a plug-in's author runs this
before anyone relies on it. Passing proves nothing; failing comes with the smallest input found.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.aggregator import Aggregator
from ..core.mechanism import Lattice
from ..core.query import Query
from .check import Broken, Finding, finding_of

_TRIALS = 300
_ROUNDING = 1e-9  # what float64 may lose in computing a length


@dataclass(frozen=True, eq=False)
class _Neighbors:
    """Clients' sums, and the same with one user more at the first client.

    Attributes:
      query: What was asked.
      sums: `(num_clients, dim)`.
      user: That user's vector on the lattice, `(dim,)`; within the query's bound.
    """

    query: Query
    sums: NDArray[np.int64]
    user: NDArray[np.int64]

    @property
    def moved(self) -> NDArray[np.int64]:
        """The sums with the user."""
        with_user = self.sums.copy()
        with_user[0] += self.user
        return with_user


def check_aggregator(aggregator: Aggregator, *, seed: int = 0) -> list[Finding]:
    """Try an aggregator on honest and hostile sums.

    Args:
      aggregator: With the settings to be tried.
      seed: Of the sums that are tried.

    Returns:
      One finding for each thing owed, in a fixed order; those whose `ok` is false say on which
      input, as small as it could be made.
    """
    rng = np.random.default_rng(seed)
    trials = [_drawn(rng) for _ in range(_TRIALS)]
    claims: dict[str, Callable[[], None]] = {
        "its sensitivity is a number above 0": lambda: _sensible(aggregator, trials),
        "it returns int64 of the sums' length, and leaves the sums alone": lambda: _shaped(
            aggregator, trials
        ),
        "the same sums in another order give the same": lambda: _unordered(aggregator, trials),
        "one user moves what it returns by at most its sensitivity": lambda: _bounded(
            aggregator, trials
        ),
    }
    return [finding_of(claim, check) for claim, check in claims.items()]


def _sensible(aggregator: Aggregator, trials: list[_Neighbors]) -> None:
    """Noise of any other size means nothing."""
    for trial in trials:
        declared = aggregator.sensitivity(trial.query, Lattice.of(trial.query))
        if not (isinstance(declared, int | float) and 0 < declared < math.inf):
            raise Broken(f"{declared!r} for clip {trial.query.clip:g} and dim {trial.query.dim}")


def _shaped(aggregator: Aggregator, trials: list[_Neighbors]) -> None:
    """The federation refuses anything else in the middle of a run."""
    for trial in trials:
        given = [row.copy() for row in trial.sums]
        total = aggregator.combine(given)
        if total.dtype != np.int64 or total.shape != (trial.query.dim,):
            raise Broken(f"{total.dtype} {total.shape} from {_shown(trial.sums)}")
        if not all(np.array_equal(a, b) for a, b in zip(given, trial.sums, strict=True)):
            raise Broken(f"it writes into the sums it is given: {_shown(trial.sums)}")


def _unordered(aggregator: Aggregator, trials: list[_Neighbors]) -> None:
    """Clients have no order, and a resumed run may see another one."""
    for trial in trials:
        forward, backward = (aggregator.combine(list(s)) for s in (trial.sums, trial.sums[::-1]))
        if not np.array_equal(forward, backward):
            raise Broken(f"{_shown(trial.sums)}: {forward.tolist()}, or {backward.tolist()}")


def _bounded(aggregator: Aggregator, trials: list[_Neighbors]) -> None:
    """The promise itself."""
    failing = next((trial for trial in trials if _excess(aggregator, trial) > 0), None)
    if failing is None:
        return
    least = _shrunk(aggregator, failing)
    lattice = Lattice.of(least.query)
    raise Broken(
        f"it declares {aggregator.sensitivity(least.query, lattice):.6g} for clip"
        f" {least.query.clip:g}, but a user moves it by {_distance(aggregator, least):.6g}: sums"
        f" {_shown(least.sums)} and a user {_shown(least.user)} at the first client, in lattice"
        f" steps of {lattice.unit:.6g}"
    )


def _excess(aggregator: Aggregator, trial: _Neighbors) -> float:
    """By how much a user moves the result further than declared, in the vectors' own unit."""
    declared = aggregator.sensitivity(trial.query, Lattice.of(trial.query))
    return _distance(aggregator, trial) - declared * (1 + _ROUNDING)


def _distance(aggregator: Aggregator, trial: _Neighbors) -> float:
    """How far a user moves the result, in the vectors' own unit."""
    without, with_user = (aggregator.combine(list(sums)) for sums in (trial.sums, trial.moved))
    steps = with_user.astype(np.float64) - without.astype(np.float64)
    return float(np.sqrt(steps @ steps)) * Lattice.of(trial.query).unit


def _shrunk(aggregator: Aggregator, trial: _Neighbors) -> _Neighbors:
    """A smaller trial that still fails: fewer clients, fewer coordinates, smaller numbers."""
    while True:
        smaller = (t for t in _smaller(trial) if _excess(aggregator, t) > 0)
        found = next(smaller, None)
        if found is None:
            return trial
        trial = found


def _smaller(trial: _Neighbors) -> Iterator[_Neighbors]:
    """Trials one step simpler, the boldest steps first."""
    query, sums, user = trial.query, trial.sums, trial.user
    for client in range(1, len(sums)):
        yield _Neighbors(query, np.delete(sums, client, axis=0), user)
    for k in range(query.dim if query.dim > 1 else 0):
        fewer = Query(query.name, query.dim - 1, query.clip, query.noise_multiplier)
        yield _Neighbors(fewer, np.delete(sums, k, axis=1), np.delete(user, k))
    for place in zip(*np.nonzero(sums), strict=True):
        for value in (0.0, np.trunc(sums[place] / 2)):
            other = sums.copy()
            other[place] = value
            yield _Neighbors(query, other, user)
    for cell in np.flatnonzero(user):
        other = user.copy()
        other[cell] = 0
        yield _Neighbors(query, sums, other)


def _drawn(rng: np.random.Generator) -> _Neighbors:
    """A random trial: few or many users behind each sum, or a hostile client among them."""
    query = Query("check", int(rng.integers(1, 7)), float(2.0 ** rng.uniform(-3, 6)), 1.0)
    bound = Lattice.of(query).bound
    num_clients = int(rng.integers(1, 7))
    sums = np.zeros((num_clients, query.dim))
    match int(rng.integers(4)):
        case 0:  # next to nobody anywhere
            sums += np.rint(bound * rng.normal(size=sums.shape) * rng.integers(0, 2, sums.shape))
        case 1:  # sums of a few users, so that clients are hard to tell apart
            sums += np.rint(bound * rng.normal(size=sums.shape))
        case 2:  # many users, at clients of very different sizes
            size = 10.0 ** rng.uniform(0, 5, (num_clients, 1))
            sums += np.rint(bound * size * rng.normal(size=sums.shape))
        case _:  # one client says whatever it likes
            sums += np.rint(bound * rng.normal(size=sums.shape))
            sums[int(rng.integers(num_clients))] *= 10.0 ** rng.uniform(3, 9)
    return _Neighbors(query, sums.astype(np.int64), _user(bound, query.dim, sums[0], rng))


def _user(
    bound: float, dim: int, beside: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """A user's vector as long as it may be: one cell, all cells alike, along the sum, or random."""
    ways = [np.eye(dim)[int(rng.integers(dim))], np.ones(dim), beside, rng.normal(size=dim)]
    way = ways[int(rng.integers(len(ways)))] * rng.choice([-1, 1])
    norm = float(np.sqrt(way @ way))
    if not norm > 0:
        way, norm = np.ones(dim), math.sqrt(dim)
    return np.asarray(np.trunc(way * (bound / norm)), dtype=np.int64)


def _shown(numbers: NDArray[np.int64]) -> str:
    """Numbers as they may be pasted into a test."""
    return str(numbers.tolist())

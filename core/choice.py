# SPDX-License-Identifier: Apache-2.0
"""Choose candidates in private by the exponential mechanism, and what that costs as a sum.

A choice is priced as one Gaussian sum. The exponential mechanism at epsilon has a bounded range:
whatever the data, its privacy loss lies within an interval of length epsilon. Any such mechanism
is at least as hard to test as telling a logistic variable from the same one shifted by epsilon,
and that is at least as hard as telling two unit Gaussians apart whose means differ by

    mu(epsilon) = 2 Phi^-1(1 / (1 + exp(-epsilon / 2))),

so a choice is mu-GDP, and composes with sums exactly as they do among themselves: by adding mu^2.

Why. Let the loss lie in [t - epsilon, t]. Every f-divergence is largest when the loss takes the
two ends only, for it is the mean of a convex function of the likelihood ratio, whose own mean is
one. Of these two-point losses the best t for a test of false alarm a leaves (1 - a) / (1 + a
(e^epsilon - 1)) undetected: its logit is logit(1 - a) - epsilon. Write h = Phi^-1 of the logistic
function. That test is no better than the Gaussians' if h(u) - h(u - epsilon) <= mu for all u. The
derivative of h is even; it falls on u > 0, since the inverse of h has the derivative phi / (Phi
(1 - Phi)), which is the Gaussian's hazard rate at z and at -z added up, so even and convex
(Sampford, 1953). So the difference is largest at u = epsilon / 2, where it is mu.

Reference:
  McSherry, Talwar (2007), "Mechanism Design via Differential Privacy"; Dong, Durfee, Rogers (2020),
  "Optimal Differential Privacy Composition for Exponential Mechanisms", section 3 (bounded range
  and its worst case), arXiv 1909.13830; Dong, Roth, Su (2019), "Gaussian Differential Privacy",
  section 2, arXiv 1905.02383; Sampford (1953), "Some Inequalities on Mill's Ratio and Related
  Functions", Annals of Mathematical Statistics 24.
"""

import math
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from .mechanism import Lattice
from .query import Choice, Query
from .randomness import KeyStream

_MARGIN = 1 - 1e-6  # of epsilon: covers all rounding in the probabilities, which is below 1e-12
_LARGEST = 1 << 53  # lattice steps at which a cell or an estimate is cut off
_LOW_BITS = 27
_ODDS_BITS = 128  # odds are whole multiples of 2^-128 of the largest


def epsilon_of_choice(noise_multiplier: float) -> float:
    """Epsilon of the exponential mechanism that costs what a sum with this noise costs.

    Args:
      noise_multiplier: Of the Gaussian sum; > 0.

    Example:
      >>> round(epsilon_of_choice(1.0), 3)
      1.615
    """
    from scipy.special import log_ndtr

    half = 0.5 / noise_multiplier  # mu / 2
    return 2 * float(log_ndtr(half) - log_ndtr(-half)) * _MARGIN


def noise_of_choice(epsilon: float) -> float:
    """Noise multiplier of the Gaussian sum that costs what a choice at `epsilon` costs.

    Example:
      >>> round(noise_of_choice(epsilon_of_choice(2.5)), 5)
      2.5
    """
    from scipy.special import expit, ndtri

    # 1 - expit(x) = expit(-x), whose quantile is exact where that of a number near one is not
    return -0.5 / float(ndtri(expit(-epsilon / _MARGIN / 2)))


def score_sensitivity(query: Query) -> float:
    """Most that one user at one client changes any candidate's score, in the scores' own unit.

    Raises:
      TypeError: The query asks no choice.
    """
    choice = _asked(query)
    return query.clip * float((choice.weights * choice.most_clips).max())


def distances(total: NDArray[np.int64], query: Query) -> list[int]:
    """L1 distance between a sum and the estimate in each block, exact, in lattice steps.

    Privacy:
      Adding or removing one user at one client changes each distance by at most the L1 norm of
      the user's part in that block. Cells and estimates beyond 2^53 steps are cut off there,
      which brings no two sums further apart.
    """
    choice, lattice = _asked(query), Lattice.of(query)
    guess = np.rint(np.clip(choice.estimates / lattice.unit, -_LARGEST, _LARGEST))
    gap = np.abs(np.clip(total, -_LARGEST, _LARGEST) - guess.astype(np.int64))
    starts = choice.starts[:-1]
    high = np.add.reduceat(gap >> _LOW_BITS, starts)  # in two parts, so that no sum wraps
    low = np.add.reduceat(gap & ((1 << _LOW_BITS) - 1), starts)
    return [(h << _LOW_BITS) + part for h, part in zip(high.tolist(), low.tolist(), strict=True)]


def scores(total: NDArray[np.int64], query: Query) -> list[Fraction]:
    """Exact score of each candidate, in the scores' own unit; see `Choice`."""
    choice, unit = _asked(query), Fraction(Lattice.of(query).unit)
    found = distances(total, query)
    result = []
    for number, (weight, penalty) in enumerate(
        zip(choice.weights.tolist(), choice.penalties.tolist(), strict=True)
    ):
        blocks = [block for block in choice.against[number].tolist() if block >= 0]
        distance = Fraction(found[number])
        if blocks:
            distance -= Fraction(sum(found[block] for block in blocks), len(blocks))
        result.append(Fraction(weight) * (distance * unit - Fraction(penalty)))
    return result


def chosen(
    total: NDArray[np.int64], query: Query, *, max_clients: int, stream: KeyStream
) -> NDArray[np.int64]:
    """Candidates chosen by the exponential mechanism: ones among zeros, `(num_candidates,)`.

    `choice.count` different candidates are drawn one after another, each among those that are
    left, with odds exp(epsilon * score / (2 * sensitivity)).

    Args:
      total: Exact sum whose users were clipped by the query, `(dim,)`.
      query: Asks a choice.
      max_clients: Most clients that hold records of one user.
      stream: Secret randomness.

    Privacy:
      Costs what one Gaussian sum with `query.noise_multiplier` costs: each of the `count` draws
      is at the epsilon of a sum with the square root of `count` times that noise. Of one
      candidate's true odds, those drawn by differ by less than one part in 2^40, which the
      epsilon leaves room for, and by 2^-128 of the largest.
    """
    choice = _asked(query)
    epsilon = epsilon_of_choice(query.noise_multiplier * math.sqrt(choice.count))
    factor = epsilon / (2 * score_sensitivity(query) * max_clients)
    found = scores(total, query)
    left = list(range(len(found)))
    picked = np.zeros(len(found), dtype=np.int64)
    for _ in range(choice.count):
        best = max(found[number] for number in left)
        odds = [math.exp(float(found[number] - best) * factor) for number in left]
        whole = [max(1, int(math.ldexp(value, _ODDS_BITS))) for value in odds]
        picked[left.pop(_drawn(whole, stream))] = 1
    return picked


def best(total: NDArray[np.int64], query: Query) -> NDArray[np.int64]:
    """The candidates of the highest scores, without privacy; the first of equal ones."""
    choice = _asked(query)
    found = scores(total, query)
    order = sorted(range(len(found)), key=lambda number: -found[number])
    picked = np.zeros(len(found), dtype=np.int64)
    picked[order[: choice.count]] = 1
    return picked


def _drawn(odds: list[int], stream: KeyStream) -> int:
    """A position, each with probability exactly proportional to its odds."""
    ends = list(accumulate(odds))
    bits = ends[-1].bit_length()
    while True:
        value = int.from_bytes(stream.read((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if value < ends[-1]:
            return bisect_right(ends, value)


def _asked(query: Query) -> Choice:
    """The choice that a query asks.

    Raises:
      TypeError: It asks a sum, or comes without estimates.
    """
    if query.choice is None or not len(query.choice.estimates):
        raise TypeError(f"query {query.name!r} asks no choice that can be made here")
    return query.choice

# SPDX-License-Identifier: Apache-2.0
"""The price of a Gaussian sum in which a user has several vectors, each by its own coin.

How many of a user's `records` vectors join is binomial; the sum then moves by as many clips. With
noise of standard deviation `noise_multiplier` clips, one user tells a mixture P of Gaussians at 0,
1, ..., `records` from the Gaussian Q at 0, and both directions count. In units of that deviation
the privacy loss r(x) = ln P(x) / Q(x) rises with x and is convex, by which both the Rényi
divergences and the loss distribution are found for many points at a time.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp, ndtr, ndtri
from scipy.stats import binom

_TAIL = 12.0  # standard deviations, beyond which no integral has any mass
_STEP = 0.125  # of the integrals, at most; a quarter of the noise where that is less
_MOST_CELLS = 10_000_000  # points times vectors of one function; an order beyond is left out
_SLICE = 1 << 16  # cells computed at a time; a slice stays in the processor's cache
_RARE = 1e-30  # probability of so many vectors that they may as well be all
_CUT = 0.5 * math.exp(-50)  # mass beyond the ends of a loss distribution, which counts as infinite
_TOLERANCE, _MOST_STEPS = 1e-10, 60  # of a loss whose point is sought


@dataclass(frozen=True)
class _Mixture:
    """How far a sum is moved, in standard deviations of its noise, and how likely that is."""

    shifts: NDArray[np.float64]  # (num_parts,), rising from 0 or above
    log_probs: NDArray[np.float64]  # (num_parts,)

    def losses(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The privacy loss r and its slope at points, each `(num_points,)`."""
        loss, slope = np.empty(len(x)), np.empty(len(x))
        offsets = self.log_probs - self.shifts**2 / 2
        size = max(1, _SLICE // len(self.shifts))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            odds = x[part, None] * self.shifts + offsets
            most = odds.max(axis=1)
            np.exp(odds - most[:, None], out=odds)
            total = odds.sum(axis=1)
            loss[part] = np.log(total) + most
            slope[part] = (odds @ self.shifts) / total
        return loss, slope

    def above(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of a sum above each of some points, `(num_points,)`."""
        return self._mass(x, -1.0)

    def below(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of a sum below each of some points, `(num_points,)`."""
        return self._mass(x, 1.0)

    def _mass(self, x: NDArray[np.float64], side: float) -> NDArray[np.float64]:
        found, probs = np.empty(len(x)), np.exp(self.log_probs)
        size = max(1, _SLICE // len(self.shifts))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            found[part] = ndtr(side * (x[part, None] - self.shifts)) @ probs
        return found


@lru_cache(maxsize=1024)
def mixture_rdp(
    noise_multiplier: float, sampling_prob: float, records: int, orders: tuple[float, ...]
) -> NDArray[np.float64]:
    """Rényi divergence at each of `orders`, the greater of both directions, `(num_orders,)`.

    Infinite at orders whose integral would take too long, which errs on the safe side.

    Args:
      noise_multiplier: Standard deviation of the noise / the clip of one vector.
      sampling_prob: Probability with which each vector joins.
      records: Most vectors of one user.
      orders: Of the divergence, each above 1.

    Reference:
      Mironov (2017), "Rényi Differential Privacy", definition 3; Ganesh (2024), arXiv 2401.10294,
      for the mixture.
    """
    joined = np.arange(records + 1)
    mixture = _Mixture(joined / noise_multiplier, binom.logpmf(joined, records, sampling_prob))
    # ln of P^a Q^(1 - a) curves by a r'' - 1, never more sharply than that of a normal density,
    # and no zero of P is nearer to the real line than about pi times the noise
    step = min(_STEP, noise_multiplier / 4)
    slope_at_0 = float(mixture.losses(np.zeros(1))[1][0])
    most_points = _MOST_CELLS // (records + 1)
    lows = [-(order - 1) * slope_at_0 - _TAIL for order in orders]  # of Q^a P^(1 - a), as r' rises
    highs = [order * records / noise_multiplier + _TAIL for order in orders]
    fits = [(high - low) / step < most_points for low, high in zip(lows, highs, strict=True)]
    if not any(fits):
        return np.full(len(orders), np.inf)
    first = math.floor(min(low for low, ok in zip(lows, fits, strict=True) if ok) / step)
    last = math.ceil(max(high for high, ok in zip(highs, fits, strict=True) if ok) / step)
    x = np.arange(first, last + 1, dtype=np.float64) * step
    loss, _ = mixture.losses(x)
    absent = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
    found = np.full(len(orders), np.inf)
    for number in np.flatnonzero(fits):
        order, low, high = orders[number], lows[number], highs[number]
        part = slice(math.floor(low / step) - first, math.ceil(high / step) - first + 1)
        removed = logsumexp(absent[part] + order * loss[part]) + math.log(step)
        added = logsumexp(absent[part] + (1 - order) * loss[part]) + math.log(step)
        found[number] = max(removed, added, 0.0) / (order - 1)
    return found


def least_interval(noise_multiplier: float, sampling_prob: float, records: int) -> float:
    """Width of the grid of losses on which a loss distribution is still found fast."""
    num_parts = len(_condensed(noise_multiplier, sampling_prob, records).shifts)
    return losses_span(noise_multiplier, sampling_prob, records) * num_parts / _MOST_CELLS


def losses_span(noise_multiplier: float, sampling_prob: float, records: int) -> float:
    """From the least loss of a loss distribution to the greatest."""
    mixture = _condensed(noise_multiplier, sampling_prob, records)
    low, high = mixture.losses(np.array([ndtri(_CUT), _upper_end(mixture)]))[0]
    return float(high - low)


def mixture_pld(
    noise_multiplier: float, sampling_prob: float, records: int, interval: float
) -> Any:
    """The privacy loss distribution of one sum, as `dp_accounting` has it; an upper bound.

    Args:
      noise_multiplier: Standard deviation of the noise / the clip of one vector.
      sampling_prob: Probability with which each vector joins.
      records: Most vectors of one user.
      interval: Width of the grid of losses.

    Reference:
      Doroshenko et al. (2022), "Connect the Dots", arXiv 2207.04380, Algorithm 1; the hockey-stick
      divergences that it takes are exact here.
    """
    from dp_accounting.pld import privacy_loss_distribution

    mixture = _condensed(noise_multiplier, sampling_prob, records)
    return privacy_loss_distribution.PrivacyLossDistribution(
        _pmf(mixture, interval, added=False), _pmf(mixture, interval, added=True)
    )


def _condensed(noise_multiplier: float, sampling_prob: float, records: int) -> _Mixture:
    """The mixture, its rare parts moved to others where a user moves the sum by more.

    A mixture whose shifts are never less is never easier to hide in: Choquette-Choo et al.
    (2023), "Privacy Amplification for Matrix Mechanisms", arXiv 2310.15526, Lemma 4.4.
    """
    first = int(binom.ppf(_RARE, records, sampling_prob))
    last = min(records, int(binom.isf(_RARE, records, sampling_prob)) + 1)
    joined = np.arange(first, last + 1)
    probs = binom.pmf(joined, records, sampling_prob)
    if first > 0:
        probs[0] += binom.cdf(first - 1, records, sampling_prob)
    if last < records:
        joined = np.append(joined, records)
        probs = np.append(probs, max(binom.sf(last, records, sampling_prob), _RARE))
    keep = probs > 0
    probs = probs[keep] / probs.sum()
    return _Mixture(joined[keep] / noise_multiplier, np.log(probs))


def _upper_end(mixture: _Mixture) -> float:
    """A point above which a sum with the user lies with next to no probability."""
    low, high = float(-ndtri(_CUT)), float(mixture.shifts[-1] - ndtri(_CUT))
    for _ in range(60):
        middle = (low + high) / 2
        if mixture.above(np.array([middle]))[0] > _CUT:
            low = middle
        else:
            high = middle
    return high


def _pmf(mixture: _Mixture, interval: float, *, added: bool) -> Any:
    """Probabilities of losses where the user is added, or removed."""
    from dp_accounting.pld import pld_pmf

    low, high = float(ndtri(_CUT)), float(-ndtri(_CUT))
    if added:
        ends = -mixture.losses(np.array([high, low]))[0]
    else:
        ends = mixture.losses(np.array([low, _upper_end(mixture)]))[0]
    first, last = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    epsilons = np.arange(first, last + 1) * interval
    deltas = _hockey_sticks(mixture, epsilons, added=added)
    deltas = np.maximum.accumulate(np.clip(deltas, 0, 1)[::-1])[::-1]
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)


def _hockey_sticks(
    mixture: _Mixture, epsilons: NDArray[np.float64], *, added: bool
) -> NDArray[np.float64]:
    """The hockey-stick divergence at each of rising `epsilons`."""
    has_floor = mixture.shifts[0] == 0  # the loss falls no lower than ln P(no vector joins)
    floor = mixture.log_probs[0] if has_floor else -np.inf
    if added:
        deltas = np.zeros(len(epsilons))
        reached = -epsilons > floor
        x = _points(mixture, -epsilons[reached][::-1])[::-1]
        with np.errstate(divide="ignore"):  # nothing below: ln 0
            deltas[reached] = ndtr(x) - np.exp(epsilons[reached] + np.log(mixture.below(x)))
        return deltas
    deltas = -np.expm1(np.minimum(epsilons, 0))
    reached = epsilons > floor
    x = _points(mixture, epsilons[reached])
    deltas[reached] = mixture.above(x) - np.exp(epsilons[reached] + log_ndtr(-x))
    return deltas


def _points(mixture: _Mixture, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the privacy loss has each of some rising values.

    Newton's method from a table, held to the table's cell. A point that is a little off gives a
    divergence that is lower by that much squared only: a hockey stick is the greatest over sets.
    """
    if not len(losses):
        return losses
    low, high = -1.0, 1.0
    while mixture.losses(np.array([low]))[0][0] > losses[0] and low > -1e4:
        low *= 2
    while mixture.losses(np.array([high]))[0][0] < losses[-1]:
        high *= 2
    table = np.linspace(low, high, max(64, min(1 << 14, _MOST_CELLS // len(mixture.shifts))))
    known = np.maximum.accumulate(mixture.losses(table)[0])
    cell = np.clip(np.searchsorted(known, losses), 1, len(table) - 1)
    left, right = table[cell - 1], table[cell]
    x = np.interp(losses, known, table)
    for _ in range(_MOST_STEPS):
        loss, slope = mixture.losses(x)
        left, right = np.where(loss < losses, x, left), np.where(loss < losses, right, x)
        off = losses - loss
        if (np.abs(off) <= _TOLERANCE).all():
            break
        moved = x + off / np.maximum(slope, 1e-300)
        inside = (moved > left) & (moved < right)
        x = np.where(inside, moved, (left + right) / 2)
    return x

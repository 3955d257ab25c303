# SPDX-License-Identifier: Apache-2.0
"""Rényi divergences of a Gaussian sum in which a user has several vectors, each by its own coin.

How many of a user's `records` vectors join is binomial; the sum then moves by as many clips. With
noise of standard deviation `noise_multiplier` clips, one user tells a mixture of Gaussians at 0,
1, ..., `records` from the Gaussian at 0, and both directions count.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom, norm

_STEP, _TAIL = 0.02, 12.0  # of the integrals, in standard deviations
_MOST_POINTS = 2_000_000  # beyond, an order is left out, which errs on the safe side


@lru_cache(maxsize=256)
def mixture_rdp(
    noise_multiplier: float, sampling_prob: float, records: int, orders: tuple[float, ...]
) -> NDArray[np.float64]:
    """Rényi divergence at each of `orders`, the greater of both directions, `(num_orders,)`.

    Args:
      noise_multiplier: Standard deviation of the noise / the clip of one vector.
      sampling_prob: Probability with which each vector joins.
      records: Most vectors of one user.
      orders: Of the divergence, each above 1.

    Reference:
      Mironov (2017), "Rényi Differential Privacy", definition 3; Ganesh (2024), arXiv 2401.10294,
      for the mixture.
    """
    found = [
        _divergence(noise_multiplier, sampling_prob, records, float(order)) for order in orders
    ]
    return np.array(found)


def _divergence(noise: float, prob: float, records: int, order: float) -> float:
    """The greater of both directions at one order."""
    # P^a Q^(1 - a) has its mass between -(a - 1) times the farthest center and a times it
    farthest = records / noise
    low, high = -(order - 1) * farthest - _TAIL, order * farthest + _TAIL
    if (high - low) / _STEP > _MOST_POINTS:
        return float("inf")
    x = np.arange(low, high + _STEP, _STEP)
    joined = np.arange(records + 1)
    shares = binom.logpmf(joined, records, prob)
    absent = norm.logpdf(x)
    parts = [
        norm.logpdf(x - many / noise) + share for many, share in zip(joined, shares, strict=True)
    ]
    present = logsumexp(np.stack(parts), axis=0)
    removed = logsumexp(order * present + (1 - order) * absent)
    added = logsumexp(order * absent + (1 - order) * present)
    return float(max(removed, added, np.log(1 / _STEP)) + np.log(_STEP)) / (order - 1)

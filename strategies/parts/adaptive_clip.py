# SPDX-License-Identifier: Apache-2.0
"""Let the clip follow a quantile of users' norms, told by one bit inside the clipped vector.

A user's vector is (update clipped to C sqrt(1 - r^2), +r C or -r C): plus if the update fitted.
Whatever the update is, the whole is no longer than C, so one Gaussian sum of noise multiplier z
covers both, and an adaptive clip costs what a fixed one does. Updates are heard through
z / sqrt(1 - r^2) and the bit, taken as +-1/2, through noise of standard deviation z / (2 r): the
z_Delta and sigma_b of Andrew et al., for which z^-2 = z_Delta^-2 + (2 sigma_b)^-2.

Reference:
  Andrew, Thakkar, McMahan, Ramaswamy (2021), "Differentially Private Learning with Adaptive
  Clipping", arXiv 1905.03871, Algorithm 1 and Theorem 1.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.query import NoisySum

FARTHEST = 1000.0  # the clip stays within this factor of the first one


def with_bit(updates: NDArray[Any], *, clip: float, bit_share: float) -> NDArray[Any]:
    """Users' updates with the bit that tells whether each fitted, as one row a user.

    Args:
      updates: `(num_users, num_weights)`, not clipped.
      clip: L2 bound of the whole row; the query's.
      bit_share: r, the share of the clip that is the bit's; in (0, 1).

    Returns:
      `(num_users, num_weights + 1)`, of the updates' own type. Each row depends on one user alone.

    Privacy:
      The bound on a row is not this function's promise: the framework clips it again. A row that is
      not finite stays so, and counts as zeros there.
    """
    num_users, num_weights = updates.shape
    room = clip * math.sqrt(1 - bit_share * bit_share)
    rows = np.empty((num_users, num_weights + 1), dtype=updates.dtype)
    for row, update in zip(rows, updates, strict=True):
        norm = _norm(update)
        row[:-1] = update
        if norm > room:
            with np.errstate(invalid="ignore"):  # of an infinite one: not finite it stays
                row[:-1] *= room / norm
        row[-1] = bit_share * clip if norm <= room else -bit_share * clip
    return rows


class AdaptiveClip:
    """The server's half: the clip from round to round.

    Of each noisy sum the last number tells the share of users whose update fitted, over a fixed,
    public number of them. The clip then grows by the factor exp(rate * (quantile - share)).

    The share is held in [0, 1], so a round moves the clip by at most the factor exp(rate), and the
    clip within a factor of 1000 of the first: noise that drowns the bit makes it wander there, and
    neither blows it up nor lets it die. A void round moves nothing.

    Attributes:
      clip: Of the next query.

    Example:
      >>> clip = AdaptiveClip(1.0, quantile=0.5, rate=0.2, bit_share=0.1, num_users=100)
      >>> told = clip.take(NoisySum(np.array([7.0, -10.0]), stddev=1.0, num_clients=1))
      >>> told.vector.tolist(), round(clip.clip, 4)  # nobody fitted
      ([7.0], 1.1052)
    """

    def __init__(
        self,
        first: float,
        *,
        quantile: float,
        rate: float,
        bit_share: float,
        num_users: float,
    ) -> None:
        """Start at a clip.

        Args:
          first: The first round's.
          quantile: Share of users whose update shall fit; in (0, 1).
          rate: By how much the logarithm of the clip moves if no user fits that should, or all do
            that should not; in (0, 1].
          bit_share: As of `with_bit`.
          num_users: Declared, public number of users whom a round expects.

        Raises:
          ConfigError: A number is out of range.
        """
        check_settings(quantile=quantile, rate=rate, bit_share=bit_share)
        self.clip = first
        self._least, self._most = first / FARTHEST, first * FARTHEST
        self._quantile, self._rate = quantile, rate
        self._bit_share, self._num_users = bit_share, num_users

    def take(self, noisy: NoisySum) -> NoisySum:
        """The sum of updates alone; the clip moves by the bit."""
        told = NoisySum(noisy.vector[:-1], noisy.stddev, noisy.num_clients)
        if not noisy.is_void:
            whole = 2 * self._bit_share * self.clip * self._num_users
            share = min(max(float(noisy.vector[-1]) / whole + 0.5, 0.0), 1.0)
            moved = self.clip * math.exp(self._rate * (self._quantile - share))
            # single precision: two machines' exponentials may differ in the last bit
            self.clip = float(np.float32(min(max(moved, self._least), self._most)))
        return told

    def state(self) -> dict[str, NDArray[np.float64]]:
        """What goes into a checkpoint."""
        return {"clip": np.array([self.clip])}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Go on where `state` was taken.

        Raises:
          ConfigError: It holds no clip, or one that cannot have come from the same first clip.
        """
        found = state.get("clip")
        if found is None or found.shape != (1,) or not self._least <= found[0] <= self._most:
            raise ConfigError("a checkpoint without this run's clip; start from another or anew")
        self.clip = float(found[0])


def clip_that_follows(
    first: float,
    *,
    quantile: float | None,
    rate: float,
    bit_share: float,
    num_users: int,
    sampling_prob: float,
) -> AdaptiveClip | None:
    """The clip of a strategy's settings, or `None` without a quantile: it is fixed.

    Args:
      first: The first round's.
      quantile: Share of users whose update shall fit.
      rate: As of `AdaptiveClip`.
      bit_share: As of `with_bit`.
      num_users: Declared, public number of users.
      sampling_prob: Probability that a user joins a round.
    """
    if quantile is None:
        return None
    expected = sampling_prob * num_users
    return AdaptiveClip(
        first, quantile=quantile, rate=rate, bit_share=bit_share, num_users=expected
    )


def check_settings(*, quantile: float, rate: float, bit_share: float) -> None:
    """Refuse impossible settings.

    Raises:
      ConfigError: One is out of range.
    """
    if not 0 < quantile < 1:
        raise ConfigError(f"clip_quantile must lie between 0 and 1, not {quantile}")
    if not 0 < rate <= 1:
        raise ConfigError(f"clip_rate must lie in (0, 1], not {rate}")
    if not 0 < bit_share <= 0.9:
        raise ConfigError(f"clip_bit_share must lie in (0, 0.9], not {bit_share}")


def share_stddev(noise_multiplier: float, *, bit_share: float, num_users: float) -> float:
    """Standard deviation of noise in the share of users that a round tells.

    Example:
      >>> share_stddev(1.0, bit_share=0.1, num_users=100)
      0.05
    """
    return noise_multiplier / (2 * bit_share * num_users)


def _norm(update: NDArray[Any]) -> float:
    """L2 norm in double precision; infinite or NaN where the update is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(float(np.square(update, dtype=np.float64).sum()))

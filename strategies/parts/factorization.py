# SPDX-License-Identifier: Apache-2.0
"""Correlate the noise of rounds so that sums of rounds are heard best: coefficients, decoding.

In a series of rounds clients send, instead of round t's sum X_t, the encoded Y_t = sum_j c_j
X_{t-j}, with independent noise Z_t. Decoded, X + C^-1 Z is left, where C is the lower-triangular
Toeplitz matrix of the coefficients: noise that later rounds take back. Weights learned from sums
of all rounds so far then carry A C^-1 Z, with A the matrix of prefix sums, where independent
rounds at the same price would leave sqrt(participations) A Z.

Coefficients are whole numbers of steps of 1/4096 (`core.series`), not negative and not rising,
and so small that one user moves the whole series by at most one clip in L2. The series therefore
costs one Gaussian sum.

Reference:
  Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", arXiv 2306.08153,
  sections 3 and 4; McMahan, Xu, Zhang (2024), "A Hassle-free Algorithm for Private Learning in
  Practice: Don't Use Tree Aggregation, Use BLTs", arXiv 2408.08868, section 4; Kalinin, Lampert
  (2024), "Banded Square Root Matrix Factorization for Differentially Private Model Training",
  arXiv 2405.13763, Theorem 2 (users who come back at once are the worst case).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.query import NoisySum
from ...core.series import ONE as STEPS
from ...core.series import Series, moved_steps

MAX_ROUNDS = 4096  # of one series; matrices of their square are made of it
_GRID = 1 << 12  # rates and shares of buffers are whole numbers of these, for every machine alike
_WORTH = 1e-4  # by how much one buffer more must lower the noise to be taken

Correlation = Literal["none", "banded", "blt"]
"""How the noise of rounds hangs together."""

Error = Literal["rms", "max"]
"""What coefficients are chosen by: the root mean square of the noise of all prefix sums, or that
of the noisiest, which is the last."""


def series_of(correlation: Correlation, *, num_rounds: int, separation: int) -> Series | None:
    """The series of a training's rounds; `None` without correlation.

    Raises:
      ConfigError: There is no such correlation, or a number is out of range.
    """
    if correlation == "none":
        return None
    if correlation not in ("banded", "blt"):
        raise ConfigError(f"correlation must be 'none', 'banded' or 'blt', not {correlation!r}")
    coefficients = (banded if correlation == "banded" else blt)(num_rounds, separation)
    return Series(coefficients, num_rounds, separation)


@lru_cache(maxsize=64)
def banded(
    num_rounds: int, separation: int, *, bands: int | None = None, error: Error = "rms"
) -> tuple[int, ...]:
    """The best coefficients of which only the first `bands` are not zero, in whole steps.

    Args:
      num_rounds: Rounds of the series.
      separation: Rounds from one turn of a user to the next.
      bands: At most `separation`, so that two turns of a user meet in no round; `None`: as many.
        A client keeps that many past sums.
      error: What is least.

    Returns:
      `(at most bands,)` whole numbers; trailing zeros are left out.

    Raises:
      ConfigError: A number is out of range.
    """
    check_turns(num_rounds, separation)
    widest = min(separation, num_rounds)
    width = widest if bands is None else bands
    if not 1 <= width <= widest:
        raise ConfigError(
            f"bands must be 1 to the smaller of separation and num_rounds, {widest}, not {bands}"
        )
    weights = _weights(num_rounds, error)
    turns = np.array([_num_turns(num_rounds - j, separation) for j in range(width)], dtype=float)
    # the square root of A's own coefficients is nearly best already
    odd = np.arange(1, width)
    start = np.concatenate([[1.0], np.cumprod((2 * odd - 1) / (2 * odd))])
    return _in_steps(_best_band(start, turns, weights), num_rounds, separation)


@lru_cache(maxsize=64)
def blt(
    num_rounds: int, separation: int, *, buffers: int = 3, error: Error = "rms"
) -> tuple[int, ...]:
    """The best coefficients that fade as a few powers do: 1, then a sum of w_i r_i^(j-1).

    They do not end with the separation, and few numbers describe them whatever the number of
    rounds. Decoding takes the whole steps that clients encode by and not the powers, so here
    nothing is saved by there being few: clients and the server keep as many past sums as there
    are coefficients.

    Args:
      num_rounds: As of `banded`.
      separation: As of `banded`.
      buffers: At most so many powers; fewer where one more would lower the noise by less than
        a ten-thousandth. 1 to 8.
      error: As of `banded`.

    Raises:
      ConfigError: A number is out of range.
    """
    check_turns(num_rounds, separation)
    if not 1 <= buffers <= 8:
        raise ConfigError(f"buffers must be 1 to 8, not {buffers}")
    weights = _weights(num_rounds, error)
    fitted = np.array([1 - 1 / min(separation + 1, num_rounds + 1), 0.4])
    fitted, loss = _fit_powers(fitted, separation, weights)
    for _ in range(buffers - 1):
        tries = [_fit_powers(_with_one_more(fitted, rate), separation, weights)
                 for rate in (0.2, 0.5, 0.8)]  # fmt: skip
        richer, less = min(tries, key=lambda found: found[1])
        if not less < loss - 2 * _WORTH:  # the loss is the logarithm of a variance
            break
        fitted, loss = richer, less
    rounded = np.rint(fitted * _GRID) / _GRID
    return _in_steps(_powers(rounded, num_rounds)[0], num_rounds, separation)


def check_turns(num_rounds: int, separation: int) -> None:
    """Refuse a series that cannot be.

    Raises:
      ConfigError: It has too few rounds or too many, or turns that do not lie within it.
    """
    if not 1 <= num_rounds <= MAX_ROUNDS:
        raise ConfigError(f"correlated noise spans 1 to {MAX_ROUNDS} rounds, not {num_rounds}")
    if not 1 <= separation <= num_rounds:
        raise ConfigError(
            f"separation must be 1 to the number of rounds, {num_rounds}, not {separation}"
        )


def sensitivity(coefficients: Sequence[int], num_rounds: int, separation: int) -> float:
    """L2 norm by which one user of clip 1 moves a whole series, in the worst case.

    A user's turns lie `separation` rounds apart. Columns of C have no negative entry, so the worst
    case is the same vector in every turn; whoever begins first has the most turns. Where
    coefficients do not rise, no other turns at least so far apart are worse.

    Example:
      >>> sensitivity((2048,), num_rounds=8, separation=2)
      1.0
    """
    return math.sqrt(moved_steps(coefficients, num_rounds, separation)) / STEPS


def prefix_noise(coefficients: Sequence[int], num_rounds: int, *, error: Error = "rms") -> float:
    """Standard deviation of noise in a sum of the first rounds, over that of an encoded sum.

    Over all prefixes their root mean square, or that of the noisiest. Independent rounds at the
    price of one Gaussian sum have the one coefficient `independent(...)`.

    Example:
      >>> round(prefix_noise((4096,), 3), 6)
      1.414214
    """
    known = np.asarray(coefficients, dtype=np.float64) / STEPS
    prefix = np.cumsum(inverse(known, num_rounds))
    return float(np.sqrt(_weights(num_rounds, error) @ prefix**2))


def independent(num_rounds: int, separation: int) -> tuple[int]:
    """The coefficient of rounds whose noise is not correlated, at the price of one sum."""
    return (math.isqrt(STEPS * STEPS // _num_turns(num_rounds, separation)),)


def inverse(coefficients: NDArray[np.float64], num_rounds: int) -> NDArray[np.float64]:
    """Coefficients of C^-1, `(num_rounds,)`: what decoded rounds carry of each round's noise."""
    found = np.zeros(num_rounds)
    found[0] = 1.0 / coefficients[0]
    for t in range(1, num_rounds):
        reach = min(t, len(coefficients) - 1)
        past = found[t - reach : t][::-1]
        found[t] = -(coefficients[1 : reach + 1] @ past) / coefficients[0]
    return found


class Decoder:
    """Takes encoded noisy sums, round by round, and gives back the rounds' own.

    A void round counts as a sum of zeros: nothing is known of it. What clients hold of that round
    arrives bit by bit with the rounds that encode it, in the long run all but the share c_0 / (sum
    of all c_j). A client that falls silent is unlearned in the same way: later rounds take back
    what they suppose that it still echoes.

    Args:
      coefficients: Those that the clients encode by, in whole steps.

    Raises:
      ConfigError: There are none, or they are no whole steps.
    """

    def __init__(self, coefficients: Sequence[int]) -> None:
        if not len(coefficients) or not 0 < coefficients[0] <= STEPS or min(coefficients) < 0:
            raise ConfigError(f"coefficients must be whole steps, 0 to {STEPS}, the first above 0")
        self._first = coefficients[0] / STEPS
        self._others = [step / STEPS for step in coefficients[1:]]
        self._past: deque[NDArray[np.float64]] = deque(maxlen=len(self._others))
        self._heard: deque[float] = deque(maxlen=len(self._others))  # C^-1, the last ones first
        self._power = 0.0  # sum of squares of C^-1's coefficients so far

    def take(self, noisy: NoisySum) -> NoisySum:
        """The round's own sum, and the standard deviation of its noise; void if the round is."""
        heard = -sum(c * h for c, h in zip(self._others, self._heard, strict=False))
        heard = (heard if self._power else 1.0) / self._first
        self._power += heard * heard
        own = np.zeros_like(noisy.vector)
        if not noisy.is_void:
            own += noisy.vector
            for share, past in zip(self._others, self._past, strict=False):
                own -= share * past
            own /= self._first
        if self._others:
            self._past.appendleft(own)
            self._heard.appendleft(heard)
        return NoisySum(own, noisy.stddev * math.sqrt(self._power), noisy.num_clients)

    def state(self) -> dict[str, NDArray[np.float64]]:
        """What goes into a checkpoint: past decoded sums, the last ones first, and two more."""
        return {
            "past": np.stack(self._past) if self._past else np.zeros((0, 0)),
            "heard": np.array(self._heard),
            "power": np.array([self._power]),
        }

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Go on where `state` was taken; of a decoder that has taken no round yet.

        Raises:
          ConfigError: It is not the state of a decoder of this series.
        """
        try:
            past, heard, power = state["past"], state["heard"], state["power"]
        except KeyError as error:
            raise ConfigError(f"a decoder's state without {error}") from error
        fits = past.ndim == 2 and heard.shape == (len(past),) and power.shape == (1,)
        if not fits or len(past) > len(self._others):
            raise ConfigError("the state of a decoder of another series")
        self._past.extend(np.array(row, dtype=np.float64) for row in past)
        self._heard.extend(float(value) for value in heard)
        self._power = float(power[0])


def _num_turns(num_rounds: int, separation: int) -> int:
    """Turns of a user who takes the first of so many rounds."""
    return max(0, -(-num_rounds // separation))


def _weights(num_rounds: int, error: Error) -> NDArray[np.float64]:
    """How much the square of each coefficient of A C^-1 weighs in the variance."""
    if error == "rms":
        return (num_rounds - np.arange(num_rounds)) / num_rounds
    if error == "max":
        return np.ones(num_rounds)
    raise ConfigError(f"error must be 'rms' or 'max', not {error!r}")


def _in_steps(
    coefficients: NDArray[np.float64], num_rounds: int, separation: int
) -> tuple[int, ...]:
    """Coefficients as large as the sensitivity allows, in whole steps, trailing zeros left out."""
    shape = np.minimum.accumulate(np.maximum(coefficients / coefficients[0], 0.0))

    def steps(first: int) -> tuple[int, ...]:  # with a first coefficient of first / 256 steps
        return tuple(int(step) for step in np.rint(shape * (first / 256)))

    low, high = 0, 256 * STEPS
    while high - low > 0:
        middle = (low + high + 1) // 2
        fits = moved_steps(steps(middle), num_rounds, separation) <= STEPS * STEPS
        low, high = (middle, high) if fits else (low, middle - 1)
    found = steps(low)
    if not found[0]:
        raise ConfigError(
            f"{num_rounds} rounds with a turn every {separation} are too many for one series"
        )
    return found[: max(i for i, step in enumerate(found) if step) + 1]


def _best_band(
    start: NDArray[np.float64], turns: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Coefficients of least noise by Newton's method, the first of them 1, `(bands,)`.

    Minimizes log(sum_j turns_j c_j^2) + log(variance of prefix sums). With b = A C^-1 as a power
    series, db/dc_j is -b/c moved by j, and the second derivatives 2 b/c^2 moved by j + l.
    """
    num_rounds, width = len(weights), len(start)
    found = start.copy()
    loss = _band_loss(found, turns, weights)
    for _ in range(50):
        inverted = inverse(found, num_rounds)
        prefix = np.cumsum(inverted)
        first = np.convolve(prefix, inverted)[:num_rounds]
        second = np.convolve(first, inverted)[:num_rounds]
        moved = np.zeros((width, num_rounds))
        for j in range(width):
            moved[j, j:] = first[: num_rounds - j]
        heavy = weights * prefix
        bent = np.zeros(2 * width)
        for j in range(min(2 * width, num_rounds)):
            bent[j] = heavy[j:] @ second[: num_rounds - j]
        norm, variance = found @ (turns * found), heavy @ prefix
        by_norm, by_variance = 2 * turns * found / norm, -2 * (moved @ heavy) / variance
        pairs = np.add.outer(np.arange(width), np.arange(width))
        hessian = (
            np.diag(2 * turns / norm)
            - np.outer(by_norm, by_norm)
            + (2 * (moved * weights) @ moved.T + 4 * bent[pairs]) / variance
            - np.outer(by_variance, by_variance)
        )[1:, 1:]
        slope = (by_norm + by_variance)[1:]
        if width == 1 or np.abs(slope).max() < 1e-12:
            break
        lowest = float(np.linalg.eigvalsh(hessian)[0])
        damped = hessian + max(0.0, 1e-6 - lowest) * np.eye(width - 1)
        step = np.concatenate([[0.0], -np.linalg.solve(damped, slope)])
        while not (less := _band_loss(found + step, turns, weights)) <= loss:
            step /= 2
            if np.abs(step).max() < 1e-13:
                return found
        found, loss = found + step, less
    return found


def _band_loss(
    coefficients: NDArray[np.float64], turns: NDArray[np.float64], weights: NDArray[np.float64]
) -> float:
    """Logarithm of the variance of prefix sums at sensitivity 1; infinite beyond all numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        prefix = np.cumsum(inverse(coefficients, len(weights)))
        variance = float((coefficients @ (turns * coefficients)) * (weights @ prefix**2))
    return math.log(variance) if math.isfinite(variance) else math.inf


def _powers(
    fitted: NDArray[np.float64], num_rounds: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients of rates and shares, `(num_rounds,)`, and their derivatives by each."""
    rates, shares = np.split(fitted, 2)
    order = np.arange(num_rounds - 1.0)
    powers = rates[:, None] ** order
    lower = rates[:, None] ** np.maximum(order - 1, 0) * order
    by_each = np.concatenate([shares[:, None] * lower, powers])
    return (
        np.concatenate([[1.0], shares @ powers]),
        np.concatenate([np.zeros((len(fitted), 1)), by_each], axis=1),
    )


def _fit_powers(
    start: NDArray[np.float64], separation: int, weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Rates and shares of least noise from a start, sorted by rate, and the loss."""
    from scipy.optimize import minimize

    num_rounds, count = len(weights), len(start) // 2

    def loss(fitted: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        known, by_each = _powers(fitted, num_rounds)
        met = np.zeros(num_rounds)
        for turn in range(0, num_rounds, separation):
            met[turn:] += known[: num_rounds - turn]
        norm, by_norm = met @ met, np.zeros(num_rounds)
        for turn in range(0, num_rounds, separation):
            by_norm[: num_rounds - turn] += 2 * met[turn:]
        inverted = inverse(known, num_rounds)
        prefix = np.cumsum(inverted)
        heavy = weights * prefix
        variance = heavy @ prefix
        first = np.convolve(prefix, inverted)[:num_rounds]
        by_variance = -2 * np.correlate(heavy, first, "full")[num_rounds - 1 :]
        slope = by_each @ (by_norm / norm + by_variance / variance)
        return float(np.log(norm) + np.log(variance)), slope

    fitted = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(1e-3, 1 - 1e-5)] * count + [(0.0, 1.0 / count)] * count,  # so nothing rises
        options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10},
    )
    order = np.argsort(fitted.x[:count])
    return np.concatenate([fitted.x[:count][order], fitted.x[count:][order]]), float(fitted.fun)


def _with_one_more(fitted: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Rates and shares with one power more that weighs little yet."""
    rates, shares = np.split(fitted, 2)
    count = len(rates) + 1
    return np.concatenate([rates, [rate], np.minimum(shares, 0.8 / count), [0.2 / count]])

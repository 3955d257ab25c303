# SPDX-License-Identifier: Apache-2.0
"""Coefficients of correlated noise: no user moves a series by more than a clip, and little noise.

The reference figures are those of jax-privacy's optimizer for banded Toeplitz matrices.
"""

import math
from itertools import combinations, pairwise, product

import dp_accounting
import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.query import NoisySum, Query
from fedsynth.strategies.parts import factorization
from fedsynth.strategies.parts.factorization import (
    STEPS,
    Decoder,
    banded,
    blt,
    independent,
    inverse,
    prefix_noise,
    sensitivity,
)
from scipy.linalg import toeplitz
from scipy.optimize import brentq, minimize

EIGHT = [(rounds, apart) for rounds in range(1, 9) for apart in range(1, rounds + 1)]


def matrix(coefficients, num_rounds):
    """C, in units of one."""
    column = np.zeros(num_rounds)
    column[: len(coefficients)] = np.array(coefficients[:num_rounds]) / STEPS
    return np.tril(toeplitz(column))


def turns(num_rounds, separation):
    """Rounds that a user may answer who comes every so many rounds, and all parts of them."""
    for first in range(separation):
        own = range(first, num_rounds, separation)
        for many in range(1, len(own) + 1):
            yield from combinations(own, many)


def at_least_apart(num_rounds, separation):
    """All sets of rounds no two of which lie closer."""
    for many in range(1, -(-num_rounds // separation) + 1):
        for own in combinations(range(num_rounds), many):
            if all(b - a >= separation for a, b in pairwise(own)):
                yield own


def worst_by_brute_force(coefficients, num_rounds, patterns):
    """The farthest that one user moves a series, over all patterns and all signs."""
    c = matrix(coefficients, num_rounds)
    return max(
        float(np.linalg.norm(c[:, list(own)] @ np.array(signs)))
        for own in patterns
        for signs in product((1.0, -1.0), repeat=len(own))
    )


@pytest.mark.parametrize(("num_rounds", "separation"), EIGHT)
@pytest.mark.parametrize("method", [banded, blt])
def test_the_sensitivity_of_up_to_eight_rounds_is_that_of_brute_force(
    method, num_rounds, separation
):
    coefficients = method(num_rounds, separation)

    found = sensitivity(coefficients, num_rounds, separation)
    by_turns = worst_by_brute_force(coefficients, num_rounds, turns(num_rounds, separation))
    by_gaps = worst_by_brute_force(coefficients, num_rounds, at_least_apart(num_rounds, separation))
    assert found == pytest.approx(by_turns, rel=1e-12)
    assert found == pytest.approx(by_gaps, rel=1e-12)
    assert 0.999 < found <= 1.0


def test_brute_force_sees_what_rising_or_negative_coefficients_would_break():
    rising, negative = (100, 0, 0, 300), (400, 10, -300)

    farther = worst_by_brute_force(rising, 5, at_least_apart(5, 2))
    opposed = worst_by_brute_force(negative, 4, turns(4, 2))
    assert farther > sensitivity(rising, 5, 2) * 1.1
    assert opposed > sensitivity(negative, 4, 2) * 1.1


def test_vectors_that_are_not_aligned_never_move_a_series_farther():
    rng = np.random.default_rng(0)
    coefficients = blt(8, 2)
    own = matrix(coefficients, 8)[:, ::2]

    moved = []
    for _ in range(2000):
        vectors = rng.normal(size=(4, 3))
        vectors *= (rng.random(4) / np.linalg.norm(vectors, axis=1))[:, None]
        moved.append(float(np.linalg.norm(own @ vectors)))

    assert max(moved) <= sensitivity(coefficients, 8, 2)


@pytest.mark.parametrize("method", [banded, blt])
@pytest.mark.parametrize("error", ["rms", "max"])
@pytest.mark.parametrize(("num_rounds", "separation"), [(256, 32), (100, 7), (64, 64), (50, 1)])
def test_coefficients_are_whole_steps_that_do_not_rise(method, error, num_rounds, separation):
    coefficients = method(num_rounds, separation, error=error)

    assert all(isinstance(steps, int) and 0 <= steps <= STEPS for steps in coefficients)
    assert list(coefficients) == sorted(coefficients, reverse=True)
    assert coefficients[-1] > 0
    assert 0.998 < sensitivity(coefficients, num_rounds, separation) <= 1.0


def test_only_so_many_bands_are_not_zero():
    assert len(banded(64, 16)) <= 16
    assert len(banded(64, 16, bands=4)) == 4
    assert len(blt(64, 16)) > 16


def multiplier(epsilon):
    return brentq(lambda z: dp_accounting.get_epsilon_gaussian(z, 1e-6) - epsilon, 0.1, 50)


@pytest.mark.parametrize(
    ("epsilon", "turns", "plain", "least"),
    [
        (1, 4, 95.8, 23.5),
        (3, 4, 35.0, 8.6),
        (8, 4, 14.8, 3.6),
        (1, 8, 135.5, 36.9),
        (3, 8, 49.5, 13.5),
        (8, 8, 20.9, 5.7),
    ],
)
def test_256_rounds_carry_the_noise_of_the_reference_optimizer(epsilon, turns, plain, least):
    apart = 256 // turns

    z = multiplier(epsilon)
    found = z * prefix_noise(banded(256, apart), 256)
    powers = z * prefix_noise(blt(256, apart), 256)
    assert z * math.sqrt(turns) * math.sqrt(257 / 2) == pytest.approx(plain, abs=0.06)
    assert found == pytest.approx(least, abs=0.06)
    assert found < powers < 1.07 * found


def test_whole_steps_cost_less_than_a_thousandth_of_the_noise():
    weights = factorization._weights(256, "rms")
    start = np.cumprod([1.0, *[(2 * j - 1) / (2 * j) for j in range(1, 64)]])
    exact = factorization._best_band(start, np.full(64, 4.0), weights)
    least = math.sqrt(4 * exact @ exact) * math.sqrt(weights @ np.cumsum(inverse(exact, 256)) ** 2)

    found = prefix_noise(banded(256, 64), 256)

    assert least <= found < 1.001 * least


@pytest.mark.parametrize("error", ["rms", "max"])
def test_no_other_band_is_better(error):
    num_rounds, separation = 12, 4
    found = prefix_noise(banded(num_rounds, separation, error=error), num_rounds, error=error)

    def noise(others):
        known = np.array([1.0, *others])
        b = np.linalg.inv(matrix(known * STEPS, num_rounds))
        squares = np.cumsum(np.cumsum(b[:, 0]) ** 2)
        spread = squares.mean() if error == "rms" else squares[-1]
        return math.sqrt(3 * (known @ known) * spread)

    best = minimize(noise, [0.3, 0.2, 0.1], method="Nelder-Mead", options={"xatol": 1e-8})
    assert best.fun <= found < 1.002 * best.fun


def test_the_noise_of_a_prefix_sum_is_that_of_the_matrices():
    coefficients = blt(20, 5)
    left = np.tril(np.ones((20, 20))) @ np.linalg.inv(matrix(coefficients, 20))

    assert prefix_noise(coefficients, 20) == pytest.approx(math.sqrt((left**2).sum(axis=1).mean()))
    assert prefix_noise(coefficients, 20, error="max") == pytest.approx(
        np.linalg.norm(left, axis=1).max()
    )


def test_independent_rounds_cost_one_sum_too():
    (first,) = independent(256, 64)

    assert first == STEPS // 2
    assert sensitivity((first,), 256, 64) == 1.0


@pytest.mark.parametrize("coefficients", [banded(40, 10), blt(40, 10), independent(40, 10)])
def test_decoded_sums_are_the_rounds_own(coefficients):
    rng = np.random.default_rng(0)
    own = rng.integers(-1000, 1000, size=(40, 3)).astype(np.float64)
    decoder = Decoder(coefficients)

    decoded = [decoder.take(NoisySum(row, 0.5, 2)) for row in matrix(coefficients, 40) @ own]

    assert np.allclose([one.vector for one in decoded], own, atol=1e-9)
    assert {one.num_clients for one in decoded} == {2}
    heard = inverse(np.array(coefficients) / STEPS, 40)
    assert np.allclose([one.stddev for one in decoded], 0.5 * np.sqrt(np.cumsum(heard**2)))


def test_what_a_void_round_held_arrives_later_and_bit_by_bit():
    coefficients = banded(40, 10)
    own = np.zeros((40, 1))
    own[5] = 1.0
    sent = matrix(coefficients, 40) @ own
    decoder = Decoder(coefficients)

    decoded = [
        decoder.take(
            NoisySum.void(Query("q", 1, 1.0, 1.0)) if t == 5 else NoisySum(sent[t], 1.0, 1)
        )
        for t in range(40)
    ]

    prefix = np.cumsum([one.vector[0] for one in decoded])
    lost = coefficients[0] / STEPS * np.cumsum(inverse(np.array(coefficients) / STEPS, 35))
    assert decoded[5].is_void
    assert not decoded[5].vector.any()
    assert np.allclose(prefix[5:], 1.0 - lost)
    assert 0.4 < prefix[6] < 0.6
    assert prefix[-1] == pytest.approx(1 - coefficients[0] / sum(coefficients), abs=0.01)


def test_a_decoder_goes_on_from_its_state():
    coefficients, rng = banded(12, 4), np.random.default_rng(0)
    sums = [NoisySum(rng.normal(size=2), 1.0, 1) for _ in range(12)]
    whole, first = Decoder(coefficients), Decoder(coefficients)
    expected = [whole.take(noisy) for noisy in sums][7:]
    for noisy in sums[:7]:
        first.take(noisy)

    second = Decoder(coefficients)
    second.restore(first.state())

    found = [second.take(noisy) for noisy in sums[7:]]
    assert all(
        np.array_equal(a.vector, b.vector) and a.stddev == b.stddev
        for a, b in zip(found, expected, strict=True)
    )


def test_a_decoder_of_another_series_is_refused():
    decoder = Decoder(banded(12, 4))
    for _ in range(5):
        decoder.take(NoisySum(np.zeros(2), 1.0, 1))

    with pytest.raises(ConfigError, match="another series"):
        Decoder(banded(12, 2)).restore(decoder.state())
    with pytest.raises(ConfigError, match="without"):
        Decoder(banded(12, 4)).restore({})


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: banded(0, 1),
        lambda: banded(10, 11),
        lambda: banded(10, 5, bands=6),
        lambda: banded(10, 5, error="mean"),
        lambda: blt(10, 5, buffers=0),
        lambda: banded(10**6, 10),
        lambda: Decoder(()),
        lambda: Decoder((0, 1)),
    ],
)
def test_what_cannot_be_is_refused(impossible):
    with pytest.raises(ConfigError):
        impossible()

# SPDX-License-Identifier: Apache-2.0
"""The noise has the law it is priced by, and a sample that sees a third's error would say so."""

import multiprocessing

import numpy as np
import pytest
from fedsynth.core.mechanism import Lattice, noised
from fedsynth.core.query import Query
from fedsynth.core.randomness import OsKeyStream, coins, lattice_noise, uniform_words
from scipy.stats import binomtest, chi2, kstest, norm

STDDEV = 1.7
PASSES, FAILS = 1e-6, 1e-9


@pytest.fixture(scope="module")
def draws():
    """Noise of a sum, in the query's own unit; fresh from the operating system each time."""
    query = Query("q", 1_000_000, 1.0, STDDEV)
    total = np.zeros(query.dim, dtype=np.int64)
    lattice = Lattice.of(query)
    return noised(total, stddev=STDDEV, lattice=lattice, stream=OsKeyStream()) * lattice.unit


def test_the_noise_of_a_sum_is_gaussian_of_the_declared_stddev(draws):
    assert kstest(draws[:20_000], norm(scale=STDDEV).cdf).pvalue > PASSES
    assert kstest(draws[:20_000], norm(scale=STDDEV * 4 / 3).cdf).pvalue < FAILS
    assert kstest(draws[:20_000], norm(scale=STDDEV * 2 / 3).cdf).pvalue < FAILS


def chi2_pvalue(draws, stddev, num_bins=60):
    """Fit of a million draws to a Gaussian, by bins of equal probability."""
    edges = norm(scale=stddev).ppf(np.linspace(0, 1, num_bins + 1)[1:-1])
    counts = np.bincount(np.searchsorted(edges, draws), minlength=num_bins)
    expected = len(draws) / num_bins
    return chi2(num_bins - 1).sf(((counts - expected) ** 2 / expected).sum())


def test_a_million_draws_fit_the_law_bin_by_bin(draws):
    assert chi2_pvalue(draws, STDDEV) > PASSES
    assert chi2_pvalue(draws, STDDEV * 1.02) < FAILS


def test_the_tail_is_as_heavy_as_it_should_be(draws):
    beyond = (np.abs(draws) > 4 * STDDEV).sum()

    assert binomtest(int(beyond), len(draws), 2 * norm.sf(4)).pvalue > PASSES


def test_coordinates_are_independent_of_their_neighbors(draws):
    half = len(draws) // 2
    for left, right in ((draws[:-1], draws[1:]), (draws[:half], draws[half:])):
        correlation = np.corrcoef(left, right)[0, 1]
        assert abs(correlation) * np.sqrt(len(left)) < 5


def test_noise_of_one_lattice_step_is_the_rounded_gaussian():
    draws = lattice_noise(200_000, 1.0, OsKeyStream())

    values = np.arange(-3, 4)
    expected = norm.cdf(values + 0.5) - norm.cdf(values - 0.5)
    wrong = norm.cdf((values + 0.5) * 0.75) - norm.cdf((values - 0.5) * 0.75)
    counts = (draws[:, None] == values).sum(axis=0)
    assert all(
        binomtest(int(c), len(draws), p).pvalue > PASSES
        for c, p in zip(counts, expected, strict=True)
    )
    assert binomtest(int(counts[3]), len(draws), wrong[3]).pvalue < FAILS


@pytest.mark.parametrize("prob", [0.5, 0.1, 0.003])
def test_coins_come_up_as_often_as_priced(prob):
    heads = int(coins(400_000, prob, OsKeyStream()).sum())

    assert binomtest(heads, 400_000, prob).pvalue > PASSES
    assert binomtest(heads, 400_000, min(1.0, prob * 4 / 3)).pvalue < FAILS


def test_coins_of_two_rounds_and_of_two_users_are_independent():
    stream = OsKeyStream()
    first, second = coins(400_000, 0.3, stream), coins(400_000, 0.3, stream)

    both = int((first & second).sum())
    neighbors = int((first[:-1] & first[1:]).sum())
    assert binomtest(both, 400_000, 0.09).pvalue > PASSES
    assert binomtest(neighbors, 399_999, 0.09).pvalue > PASSES
    assert binomtest(int((first & first).sum()), 400_000, 0.09).pvalue < FAILS


def test_a_coin_of_probability_one_always_comes_up():
    assert coins(1000, 1.0, OsKeyStream()).all()


def _child(stream, pipe):
    pipe.send(stream.read(16))


def test_a_hundred_forks_never_share_a_stream():
    stream = OsKeyStream()
    stream.read(1)
    context = multiprocessing.get_context("fork")
    seen = [stream.read(16)]

    for _ in range(100):
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(stream, theirs))
        child.start()
        seen.append(ours.recv())
        child.join()

    assert len(set(seen)) == 101


def test_no_two_reads_are_equal():
    stream = OsKeyStream()

    assert not np.array_equal(uniform_words(4, stream), uniform_words(4, stream))
    assert not np.array_equal(uniform_words(4, OsKeyStream()), uniform_words(4, OsKeyStream()))

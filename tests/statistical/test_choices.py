# SPDX-License-Identifier: Apache-2.0
"""Choices fall as often as the exponential mechanism says; an epsilon off by a third would show."""

import numpy as np
import pytest
from fedsynth.core.choice import chosen, epsilon_of_choice
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import Choice, Query
from fedsynth.core.randomness import OsKeyStream
from scipy.stats import chisquare

PASSES, FAILS = 1e-6, 1e-9
DRAWS = 8000
COUNTS = np.array([6.0, 5.0, 3.0, 0.0])
WEIGHTS = np.array([1.0, 0.5, 2.0, 1.0])


def question(noise, count=1):
    choice = Choice.among([1] * 4, np.zeros(4), weights=WEIGHTS, count=count)
    return Query("q", 4, 1.5, noise, choice=choice)


def odds(epsilon, max_clients):
    """Odds of each candidate, from the definition."""
    weight = np.exp(epsilon * WEIGHTS * COUNTS / (2 * 2.0 * 1.5 * max_clients))
    return weight / weight.sum()


@pytest.mark.parametrize("max_clients", [1, 2])
def test_candidates_are_chosen_as_often_as_priced(max_clients):
    query, stream = question(0.8), OsKeyStream()
    total = (COUNTS / Lattice.of(query).unit).astype(np.int64)

    drawn = sum(chosen(total, query, max_clients=max_clients, stream=stream) for _ in range(DRAWS))

    epsilon = epsilon_of_choice(0.8)
    assert chisquare(drawn, DRAWS * odds(epsilon, max_clients)).pvalue > PASSES
    assert chisquare(drawn, DRAWS * odds(epsilon * 4 / 3, max_clients)).pvalue < FAILS
    assert chisquare(drawn, DRAWS * odds(epsilon * 2 / 3, max_clients)).pvalue < FAILS


def test_several_are_drawn_one_after_another_without_being_put_back():
    query, stream = question(0.4, count=2), OsKeyStream()
    total = (COUNTS / Lattice.of(query).unit).astype(np.int64)

    pairs = [
        tuple(np.flatnonzero(chosen(total, query, max_clients=1, stream=stream)))
        for _ in range(DRAWS)
    ]

    def expected(epsilon):
        p = odds(epsilon, 1)
        return {
            (a, b): p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
            for a in range(4)
            for b in range(a + 1, 4)
        }

    def fit(epsilon):
        probs = expected(epsilon)
        return chisquare([pairs.count(k) for k in probs], [DRAWS * p for p in probs.values()])

    each = epsilon_of_choice(0.4 * np.sqrt(2))
    assert fit(each).pvalue > PASSES
    assert fit(each * 4 / 3).pvalue < FAILS
    assert fit(each * 2 / 3).pvalue < FAILS

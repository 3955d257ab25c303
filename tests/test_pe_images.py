# SPDX-License-Identifier: Apache-2.0
"""The baselines of benchmarks/pe_images.py hold nothing of what users voted for."""

import numpy as np
import pytest
from fedsynth.strategies.private_evolution import PrivateEvolution

SETTINGS = {"model": "digits", "num_candidates": 60, "num_rounds": 3, "vote": "l2_normalize"}


@pytest.fixture(scope="module")
def bench(benchmark_of):
    return benchmark_of("pe_images")


@pytest.fixture(scope="module")
def case(bench):
    return bench.writers.case_of(True)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_enlarged_digits_are_images_of_the_schema(case):
    images = case.train.records.images

    assert images.shape == (len(case.train.records), 28, 28, 1)
    assert (images[:, [0, -1]] == 0).all()
    assert images.mean() > 20


def test_without_answers_the_first_pool_comes_back_with_equal_weights(bench, case):
    strategy = PrivateEvolution(**SETTINGS)

    pool = bench._unheard(strategy, case.schema, rng())

    first = next(strategy.rounds(case.schema, 1.0, rng())).inputs
    assert np.array_equal(pool.candidates.images, first["images"])
    assert pool.weights == pytest.approx(1 / 60)


def test_random_votes_are_as_many_for_each_label_and_tell_nothing_of_the_images(bench, case):
    strategy = PrivateEvolution(**SETTINGS)
    query = next(strategy.rounds(case.schema, 1.0, rng()))
    labels = query.inputs["codes"][:, 0]
    true = strategy.answer(query, case.train, rng()).dense

    def exchanged(seed) -> np.ndarray:
        shuffled = bench.RandomVotes(strategy, rng(seed))
        asked = next(shuffled.rounds(case.schema, 1.0, rng()))
        return shuffled.answer(asked, case.train, rng()).dense

    votes = [exchanged(seed) for seed in range(40)]

    for given in votes:
        for label in range(10):
            assert given[:, labels == label].sum() == pytest.approx(true[:, labels == label].sum())
    alike = [np.corrcoef(given.sum(axis=0), true.sum(axis=0))[0, 1] for given in votes]
    by_label = np.array([true[:, labels == k].sum(axis=0).mean() for k in range(10)])[labels]
    expected = np.corrcoef(by_label, true.sum(axis=0))[0, 1]
    assert np.mean(alike) == pytest.approx(expected**2, abs=0.05)
    assert np.mean(alike) < 0.5

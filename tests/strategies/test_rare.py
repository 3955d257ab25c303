# SPDX-License-Identifier: Apache-2.0
"""Rare cells are merged by their measured counts alone."""

import math

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.strategies.parts.rare import compress


def test_clear_cells_stay_alone_and_rare_ones_share_a_group():
    counts = np.array([5.0, 100.0, -3.0, 50.0, 2.0])

    groups = compress(counts, 2.0)

    assert groups.tolist() == [0, 1, 0, 2, 0]


def test_groups_are_numbered_without_a_gap():
    rng = np.random.default_rng(0)
    for ordered in (False, True):
        groups = compress(rng.normal(0, 3, 200), 1.0, ordered=ordered)

        assert sorted(set(groups.tolist())) == list(range(groups.max() + 1))


def test_a_single_rare_cell_stays_alone():
    assert compress(np.array([100.0, 1.0, 90.0]), 2.0).tolist() == [0, 1, 2]


def test_without_noise_nothing_but_empty_cells_is_merged():
    assert compress(np.array([1.0, 0.0, 2.0, 0.0]), 0.0).tolist() == [0, 1, 2, 1]


def test_a_column_that_was_not_measured_is_one_group():
    assert compress(np.zeros(5), math.inf).tolist() == [0, 0, 0, 0, 0]


def test_rare_bins_of_a_number_are_merged_with_neighbors_only():
    counts = np.array([100.0, 3.0, 3.0, 100.0, 3.0, 3.0, 3.0, 3.0])

    groups = compress(counts, 1.0, clear=6.0, ordered=True)

    assert (np.diff(groups) >= 0).all()
    assert groups[0] != groups[1] == groups[2] != groups[3]
    assert np.bincount(groups, counts).min() >= 6


@pytest.mark.parametrize(("stddev", "clear"), [(-1.0, 3.0), (math.nan, 3.0), (1.0, 0.0)])
def test_noise_and_threshold_must_mean_something(stddev, clear):
    with pytest.raises(ConfigError, match="must be 0 or more"):
        compress(np.ones(3), stddev, clear=clear)


def test_few_cells_that_hold_nothing_are_taken_for_clear():
    counts = np.random.default_rng(0).normal(0, 5.0, 100_000)

    alone = compress(counts, 5.0).max()

    assert alone / 100_000 == pytest.approx(0.00135, rel=0.2)  # P(normal > 3)

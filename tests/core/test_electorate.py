# SPDX-License-Identifier: Apache-2.0
"""What is declared of users says how their votes spread."""

import numpy as np
import pytest
from fedsynth.core.electorate import Electorate
from fedsynth.core.errors import ConfigError


def test_four_records_of_which_half_the_pairs_agree_are_spread_over_one_candidate_and_six_tenths():
    assert Electorate(1, (4,), 0.5).spread(100).tolist() == [4 / (1 + 3 * 0.5)]


def test_one_record_is_spread_over_one_candidate_however_much_records_agree():
    assert Electorate(1, (1, 1), 0.9).spread(7).tolist() == [1, 1]


def test_records_agree_less_often_in_a_larger_pool_and_never_less_than_by_chance():
    users = Electorate(1, (10,), 0.175)  # 0.015 by chance, and 0.16 more

    assert users.spread(100)[0] == pytest.approx(10 / (1 + 9 * 0.175))
    assert users.spread(1600)[0] == pytest.approx(10 / (1 + 9 * (0.015 / 16 + 0.16 / 2)))
    assert Electorate(1, (10,), 0.0).spread(50)[0] == pytest.approx(10 / (1 + 9 * 0.03))
    assert users.spread(1)[0] == pytest.approx(1)


def test_the_spread_is_that_of_users_whose_records_agree_so_often():
    """Users with a favourite candidate each, which a record votes for with one chance in two."""
    rng = np.random.default_rng(1)
    held, num = 6, 4000
    favourite = rng.random((num, held)) < 0.5
    votes = np.where(favourite, 0, rng.integers(1, 100, (num, held)))
    agree = 0.5**2 + 0.5**2 / 99
    counts = np.stack([np.bincount(user, minlength=100) for user in votes])
    squared = (counts**2).sum(axis=1).mean()

    told = held**2 / Electorate(1, (held,), agree).spread(100)[0]

    assert squared == pytest.approx(told, rel=0.02)
    assert squared != pytest.approx(held**2 / Electorate(1, (held,), agree * 4 / 3).spread(100)[0],
                                    rel=0.02)  # fmt: skip


def test_of_declared_records_no_more_count_than_are_used():
    assert Electorate.of(9, [1, 3, 80], 0.1, max_records=5).records == (1, 3, 5)
    assert Electorate.of(9, 7, 0.1, max_records=1).records == (1,)


@pytest.mark.parametrize("records", [(), (0,), (3, -1)])
def test_users_without_records_are_none(records):
    with pytest.raises(ConfigError, match="typical_records"):
        Electorate(1, records)


@pytest.mark.parametrize("alike", [-0.1, 1.1, float("nan")])
def test_a_share_of_pairs_lies_between_nothing_and_all(alike):
    with pytest.raises(ConfigError, match="alike"):
        Electorate(1, (1,), alike)

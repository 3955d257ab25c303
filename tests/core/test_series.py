# SPDX-License-Identifier: Apache-2.0
"""A series of sums with correlated noise costs one Gaussian sum, and no user moves it by more."""

from itertools import product

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum, encoded, sent
from fedsynth.core.query import Contribution, Query
from fedsynth.core.series import ONE, Series, Turn

BANDED = Series((1900, 1150, 650), 8, 3)
LONG = Series((1300, 800, 600, 450, 350, 300, 250, 200), 8, 3)


def query_at(series: Series, position: int, **changes) -> Query:
    facts = {"dim": 4, "clip": 1.0, "noise_multiplier": 2.0, "resolution": 14}
    return Query("update", **{**facts, **changes}, turn=Turn(series, position))


def sums_of(series: Series, vectors: dict[int, np.ndarray]) -> list[np.ndarray]:
    """What one client sends in each round when a single user gives `vectors` in its rounds."""
    told, kept = [], {}
    for position in range(series.num_rounds):
        query = query_at(series, position)
        rows = np.array([vectors[position]]) if position in vectors else np.zeros((0, query.dim))
        kept[position] = clipped_sum(Contribution.rows(rows), query)
        told.append(encoded(kept[position], Turn(series, position), kept.items()))
    return told


@pytest.mark.parametrize("series", [BANDED, LONG], ids=["banded", "long"])
def test_no_user_moves_a_series_by_more_than_it_is_priced_for(series):
    clip_steps = Lattice.of(query_at(series, 0)).bound
    most = 0.0

    for turn in range(series.separation):
        rounds = range(turn, series.num_rounds, series.separation)
        for signs in product((1.0, -1.0), repeat=len(rounds)):
            vectors = {
                position: sign * np.array([1.0, 0.0, 0.0, 0.0])
                for position, sign in zip(rounds, signs, strict=True)
            }
            told = sums_of(series, vectors)
            most = max(most, sum(float((sum_ / clip_steps) @ (sum_ / clip_steps)) for sum_ in told))

    assert most == pytest.approx(series.moved_steps / ONE**2, rel=1e-3)
    assert most <= series.moved_steps / ONE**2 * (1 + 1e-12)


def test_taking_the_echoes_off_again_gives_each_rounds_own_sum_exactly():
    rng = np.random.default_rng(0)
    vectors = {position: rng.normal(size=4) / 4 for position in range(8)}

    told = sums_of(LONG, vectors)

    own = []
    for position, sum_ in enumerate(told):
        echoes = sum(
            LONG.coefficients[position - then] * own[then] // ONE for then in range(position)
        )
        own.append((sum_ - echoes) * ONE // LONG.coefficients[0])
    for position, sum_ in enumerate(own):
        alone = clipped_sum(Contribution.rows(vectors[position][None]), query_at(LONG, position))
        assert sum_.tolist() == alone.tolist()


def test_an_earlier_sum_that_is_missing_counts_as_zeros():
    now = np.array([ONE * 5, 0])

    told = encoded(now, Turn(BANDED, 2), [(0, np.array([ONE * 7, ONE]))])

    assert told.tolist() == [5 * 1900 + 7 * 650, 650]


def test_encoded_sums_travel_whole():
    query = query_at(BANDED, 1)
    total = np.array([3, -5, (1 << 40) + 1, 0])

    assert query.reply_dtype == np.int64
    assert (sent(total, query).astype(np.int64) * query.reply_grain).tolist() == total.tolist()


@pytest.mark.parametrize(
    ("coefficients", "num_rounds", "separation"),
    [
        ((ONE,), 8, 4),  # the user takes part twice
        ((ONE, 1), 8, 8),
        ((2100, 1900), 8, 2),
        ((0, 100), 8, 2),
        ((100, -1), 8, 2),
        ((100,) * 9, 8, 2),
        ((), 8, 2),
        ((100,), 0, 2),
        ((100,), 8, 0),
        ((100.0,), 8, 2),
    ],
)
def test_a_series_that_one_user_could_move_too_far_or_that_is_none_is_refused(
    coefficients, num_rounds, separation
):
    with pytest.raises(ConfigError):
        Series(coefficients, num_rounds, separation)


def test_a_full_coefficient_is_allowed_where_users_take_part_once():
    assert Series((ONE,), 8, 8).moved_steps == ONE**2


def test_the_movement_of_a_long_series_is_reckoned_without_rounding_and_at_once():
    series = Series((1,) * 2_000, 100_000, 50_000)

    assert series.moved_steps == 4_000


@pytest.mark.parametrize(
    "changes", [{"sampling_prob": 0.5}, {"resolution": 15}, {"records": 2}], ids=str
)
def test_a_series_knows_neither_coins_nor_records_nor_finer_grids(changes):
    with pytest.raises(ConfigError, match="take turns"):
        query_at(BANDED, 0, **changes)


def test_a_series_has_no_round_after_its_last():
    with pytest.raises(ConfigError, match="no round 8"):
        Turn(BANDED, 8)

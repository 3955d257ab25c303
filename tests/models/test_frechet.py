# SPDX-License-Identifier: Apache-2.0
"""Distances of samples in a space of features: values known beforehand, and what they show."""

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError, DataError
from fedsynth.models import frechet
from fedsynth.models.frechet import (
    area,
    frechet_distance,
    mauve_like,
    precision_recall,
    real_against_real,
)
from scipy.integrate import quad
from scipy.linalg import sqrtm


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(num_records, dim=8, shift=0.0, seed=0):
    return rng(seed).normal(size=(num_records, dim)) + shift


def groups(counts, seed=0, dim=4):
    """Records at well separated places, so many at each."""
    centers = 100 * rng(9).normal(size=(len(counts), dim))
    return np.repeat(centers, counts, axis=0) + rng(seed).normal(size=(sum(counts), dim))


def test_a_shift_alone_costs_its_square():
    a = normal(500)

    found = frechet_distance(a, a + np.array([3.0, 4.0, 0, 0, 0, 0, 0, 0]))

    assert found.distance == pytest.approx(25, abs=1e-9)
    assert frechet_distance(a, a).distance == pytest.approx(0, abs=1e-9)


def test_commuting_covariances_cost_the_squared_difference_of_their_roots():
    a = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]])  # variances 2/3 and 8/3
    b = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # variances 6 and 2/3

    found = frechet_distance(a, b)

    by_hand = (np.sqrt(2 / 3) - np.sqrt(6)) ** 2 + (np.sqrt(8 / 3) - np.sqrt(2 / 3)) ** 2
    assert found.distance == pytest.approx(by_hand)
    assert (found.ranks, found.dim) == ((2, 2), 2)


def test_it_is_what_the_square_root_of_the_product_gives_where_that_can_be_had():
    mix = rng(3).normal(size=(6, 6))
    a, b = normal(400, 6) @ mix, normal(300, 6, 0.5, seed=1)
    s, t = np.cov(a.T), np.cov(b.T)

    found = frechet_distance(a, b)

    apart = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    usual = apart + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert found.distance == pytest.approx(usual, rel=1e-9)


def test_fewer_records_than_dimensions_give_a_number_and_say_so():
    a, b = normal(20, 300), normal(30, 300, seed=1)

    found = frechet_distance(a.astype(np.float32), b.astype(np.float32))

    assert found.ranks == (19, 29)
    assert found.dim == 300
    # without shared directions the distance is about both traces
    assert 300 < found.distance < 800
    assert frechet_distance(a, a).distance == pytest.approx(0, abs=1e-8)


def test_it_does_not_mind_a_large_common_offset():
    a, b = normal(100), normal(100, seed=1)

    assert frechet_distance(a + 1e6, b + 1e6).distance == pytest.approx(
        frechet_distance(a, b).distance, rel=1e-6
    )


def test_precision_falls_with_what_is_invented_and_recall_with_what_is_missing():
    real = groups([60, 60])
    half = groups([60, 0], seed=1)
    more = np.concatenate([groups([30, 30], seed=1), 1000 + groups([30, 30], seed=2)])

    missing, invented = precision_recall(real, half), precision_recall(real, more)

    assert missing.precision > 0.9
    assert missing.recall == pytest.approx(0.5, abs=0.05)
    assert invented.precision == pytest.approx(0.5, abs=0.1)
    assert invented.recall > 0.8


def test_balls_reach_to_the_kth_neighbor_by_hand():
    real = np.array([[0.0], [1.0], [3.0], [10.0]])  # first neighbors 1, 1, 2 and 7 away
    synthetic = np.array([[-1.0], [-1.5], [2.9], [17.5]])  # 0.5, 0.5, 3.9 and 14.6 away

    found = precision_recall(real, synthetic, k=1)

    assert found.precision == 2 / 4  # -1 and 2.9; a ball holds its border
    assert found.recall == 4 / 4


def test_equal_records_lie_in_balls_of_radius_zero():
    real = np.repeat([[0.1, 0.7], [5.3, 2.2]], 10, axis=0) + 1e3

    found = precision_recall(real, real.copy(), k=3)

    assert (found.precision, found.recall) == (1.0, 1.0)
    assert precision_recall(real, real + 0.01, k=3).precision == 0.0


def test_blocks_change_nothing(monkeypatch):
    real, synthetic = normal(150), normal(130, shift=0.7, seed=1)
    whole = precision_recall(real, synthetic)
    monkeypatch.setattr(frechet, "_BLOCK", 1000)

    assert precision_recall(real, synthetic) == whole


def test_the_area_of_samples_that_share_nothing_is_one_in_252():
    # x = (1 - s)^5 and y = s^5: the integral is 5 B(5, 6) = 1/252
    assert area(np.array([3, 0]), np.array([0, 1])) == pytest.approx(1 / 252, rel=1e-3)
    assert area(np.array([2, 5]), np.array([4, 10])) == pytest.approx(1)


def test_the_area_is_the_integral_of_the_published_curve():
    p, q = np.array([0.7, 0.3, 0.0]), np.array([0.2, 0.4, 0.4])

    def point(s):
        r = s * p + (1 - s) * q
        kl = [np.sum([a * np.log(a / m) for a, m in zip(h, r, strict=True) if a]) for h in (q, p)]
        return np.exp(-5 * np.array(kl))

    def slope(s):
        return (point(s + 1e-6)[0] - point(s - 1e-6)[0]) / 2e-6

    inside = quad(lambda s: -point(s)[1] * slope(s), 1e-5, 1 - 1e-5)[0]
    corner = point(1 - 1e-5)[0]  # left of where the curve starts, the area is as high as one
    assert area(p, q) == pytest.approx(inside + corner, abs=1e-3)
    assert area(p, q) == pytest.approx(area(q, p), abs=1e-3)


def test_it_sees_the_shares_of_clusters():
    real, twin = groups([50, 50, 50]), groups([50, 50, 50], seed=1)
    tilted, other = groups([120, 20, 10], seed=2), groups([50, 50, 50], seed=3) + 5000

    values = [mauve_like(real, x, 6, rng(), num_resamples=1).value for x in (twin, tilted, other)]

    assert values[0] > 0.85 > values[1] > 0.1 > values[2]
    assert values[2] == pytest.approx(1 / 252, rel=1e-2)


def test_the_interval_is_around_the_value_and_narrows_with_records():
    few = mauve_like(groups([30, 30]), groups([40, 20], seed=1), 2, rng())
    many = mauve_like(groups([600, 600]), groups([800, 400], seed=1), 2, rng())

    assert few.low < few.value < few.high
    assert many.low < many.value < many.high
    assert few.value == pytest.approx(many.value, abs=1e-6)
    assert many.high - many.low < 0.4 * (few.high - few.low)


def test_the_interval_covers_as_often_as_it_says():
    truth = area(np.array([0.5, 0.5]), np.array([0.7, 0.3]))
    hits = 0
    for seed in range(100):
        draw = rng(100 + seed)
        a, b = draw.binomial(300, 0.5), draw.binomial(300, 0.7)
        found = mauve_like(
            groups([a, 300 - a], seed), groups([b, 300 - b], seed), 2, draw, num_resamples=200
        )
        hits += found.low <= truth <= found.high

    assert 87 <= hits <= 100


def test_records_of_one_user_are_drawn_together_so_the_interval_is_wider():
    a, b = groups([400, 400]), groups([500, 300], seed=1)
    users = np.arange(800) // 40

    by_record = mauve_like(a, b, 2, rng())
    by_user = mauve_like(a, b, 2, rng(), units_a=users, units_b=users)

    assert by_user.value == by_record.value
    assert by_user.high - by_user.low > 2 * (by_record.high - by_record.low)


def test_real_against_real_is_as_high_as_it_gets():
    real = normal(1200, 16)

    ceiling = real_against_real(real, 400, 40, rng(), num_splits=4)
    worse = mauve_like(real[:400], normal(400, 16, 0.7, seed=1), 40, rng(), num_resamples=1)

    assert ceiling.shape == (4,)
    assert ceiling.min() > worse.value
    assert 0.8 < ceiling.mean() < 1


@pytest.mark.parametrize("seed", range(5))
def test_the_two_real_samples_are_of_one_size_and_share_no_user(seed):
    users = rng(seed).integers(60, size=600)

    first, second = frechet._two_samples(users, 255, rng(seed))

    assert len(set(first.tolist() + second.tolist())) == 2 * 255
    assert not set(users[first]) & set(users[second])


def test_the_same_seed_gives_the_same_answer():
    a, b = normal(200), normal(200, shift=0.3, seed=1)

    assert mauve_like(a, b, 10, rng(4)) == mauve_like(a, b, 10, rng(4))


def test_what_cannot_be_compared_is_refused_without_a_count():
    a = normal(10)
    bad = a.copy()
    bad[3, 2] = np.nan

    with pytest.raises(DataError, match="of one length"):
        frechet_distance(a, normal(10, 7))
    with pytest.raises(DataError, match="2 records or more"):
        frechet_distance(a, a[:1])
    with pytest.raises(DataError, match="finite"):
        frechet_distance(a, bad)
    with pytest.raises(DataError, match="4 records or more"):
        precision_recall(a, a[:3])
    with pytest.raises(ConfigError, match="k must be 1"):
        precision_recall(a, a, k=0)
    with pytest.raises(DataError, match="as many records as there are clusters"):
        mauve_like(a, a, 30, rng())
    with pytest.raises(ConfigError, match="num_clusters must be 2"):
        mauve_like(a, a, 1, rng())
    with pytest.raises(DataError, match="twice as many real records"):
        real_against_real(a, 6, 2, rng())
    with pytest.raises(ConfigError, match="num_records and num_splits"):
        real_against_real(a, 0, 2, rng())

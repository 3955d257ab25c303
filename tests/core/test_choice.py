# SPDX-License-Identifier: Apache-2.0
"""A private choice: exact scores, a cost that no data beats, and users bounded in every block."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting.dp_event import ZCDpEvent
from dp_accounting.rdp import RdpAccountant
from fedsynth.core.accounting import compose, epsilon_of, single_event
from fedsynth.core.choice import (
    best,
    chosen,
    distances,
    epsilon_of_choice,
    noise_of_choice,
    score_sensitivity,
    scores,
)
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.query import Choice, Contribution, NoisySum, Query
from fedsynth.core.randomness import OsKeyStream
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import ndtr, ndtri

NASTY = [np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e308, -1e308, 1e-300, 3.4e38, 1.0, -1.0, 0.0]


def query(sizes=(2, 3, 1), clip=1.0, noise=1.0, **more):
    choice = Choice.among(sizes, more.pop("estimates", np.zeros(sum(sizes))), **more)
    return Query("q", sum(sizes), clip, noise, choice=choice)


def most_moved(total, q):
    """Largest L1 norm of a block, in clips."""
    blocks = np.split(total.astype(object), q.choice.starts[1:-1])
    return max(Fraction(int(np.abs(block).sum())) for block in blocks) * Fraction(
        Lattice.of(q).unit
    )


# ---- cost --------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 5.0, 30.0])
def test_cost_and_epsilon_are_each_others_inverse(epsilon):
    assert epsilon_of_choice(noise_of_choice(epsilon)) == pytest.approx(epsilon, rel=1e-6)


def tradeoff(p, q):
    """Type I and II errors of the best tests between two distributions, at its corners."""
    order = np.argsort(-q / p)
    alpha = np.concatenate([[0], np.cumsum(p[order])])
    beta = np.concatenate([[1], 1 - np.cumsum(q[order])])
    return np.clip(alpha, 1e-300, 1), beta


def test_no_exponential_mechanism_is_easier_to_test_than_the_gaussian_it_is_priced_as():
    rng = np.random.default_rng(0)
    beaten_by_a_third_less = 0
    for _ in range(4000):
        epsilon = rng.choice([0.1, 0.5, 1, 2, 5])
        values = rng.normal(size=rng.integers(2, 6)) * rng.choice([0.0, 0.1, 1, 10])
        moved = values + rng.choice([-1, -0.5, 0, 1], size=len(values))
        p, q = (np.exp(epsilon * (v - v.max()) / 2) for v in (values, moved))
        alpha, beta = tradeoff(p / p.sum(), q / q.sum())
        mu = 1 / noise_of_choice(epsilon)

        assert (beta >= ndtr(-ndtri(alpha) - mu) - 1e-12).all()
        beaten_by_a_third_less += (beta < ndtr(-ndtri(alpha) - mu * 2 / 3) - 1e-12).any()

    assert beaten_by_a_third_less > 0  # the bound is near what such mechanisms can reach


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_the_price_of_a_choice_holds_for_every_mechanism_of_that_range(epsilon, delta):
    priced = epsilon_of(single_event(noise_of_choice(epsilon)), delta)
    # worst delta of a mechanism of bounded range, Dong, Durfee, Rogers (2020)
    worst = max(0.0, np.exp(epsilon / 2) - np.exp(min(priced, epsilon) / 2)) ** 2

    assert worst / np.expm1(epsilon) <= delta


@pytest.mark.parametrize(("choice_share", "is_cheaper"), [(0.1, True), (0.5, False)])
def test_a_tenth_of_rho_on_choices_costs_less_than_by_zcdp_and_half_of_it_more(
    choice_share, is_cheaper
):
    rho = 0.015  # epsilon 1 at delta 1e-9
    choice = noise_of_choice(np.sqrt(8 * choice_share * rho / 30))
    measure = 1 / np.sqrt(2 * (1 - choice_share) * rho)

    by_zcdp = RdpAccountant().compose(ZCDpEvent(rho)).get_epsilon(1e-9)
    ours = epsilon_of(compose([single_event(measure)] + [single_event(choice)] * 30), 1e-9)

    assert (ours < by_zcdp) == is_cheaper


def test_many_candidates_at_once_cost_what_one_does():
    q = query([1] * 8, noise=2.0, count=4)

    each = epsilon_of_choice(2.0 * np.sqrt(4))
    assert single_event(q.noise_multiplier) == single_event(2.0)
    assert 4 / noise_of_choice(each) ** 2 == pytest.approx(1 / 2.0**2, rel=1e-5)


# ---- scores ------------------------------------------------------------------------------


def test_scores_are_those_worked_out_by_hand():
    q = query(
        [2, 1, 1],
        clip=1.0,
        estimates=np.array([3.0, 1.0, 0.0, 4.0]),
        penalties=np.array([0.5, 0.25]),
        weights=np.array([2.0, 1.0]),
        against=np.array([[2, 1], [-1, -1]]),
    )
    total = np.array([5, 0, 2, 1]) * round(1 / Lattice.of(q).unit)

    # distances 2 + 1, 2 and 3; the first is held against the mean of the other two
    assert scores(total, q) == [Fraction(2 * (3 - 2.5 - 0.5)), Fraction(2 - 0.25)]
    assert best(total, q).tolist() == [0, 1]
    assert score_sensitivity(q) == 4.0  # weight 2, and two clips


def test_distances_of_any_sums_are_exact_and_never_wrap():
    q = query([3, 2], estimates=np.array([-1e29, 1e29, 0, 0, 0]))
    largest = np.iinfo(np.int64)
    total = np.array([largest.max, largest.min, 5, -7, 1])

    assert distances(total, q) == [2 * 2**54 + 5, 8]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_user_moves_each_score_by_at_most_its_sensitivity(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    sizes = rng.integers(1, 5, size=4)
    q = query(
        sizes,
        clip=data.draw(st.floats(0.1, 50)),
        estimates=rng.normal(size=sizes.sum()) * 10,
        penalties=rng.normal(size=3),
        weights=rng.uniform(0.1, 3, size=3),
        against=np.array([[3], [-1], [3]]),
    )
    others = clipped_sum(Contribution.rows(rng.normal(size=(7, q.dim)) * 5), q)
    user = clipped_sum(Contribution.rows(rng.normal(size=(1, q.dim)) * 50), q)

    moved = [abs(a - b) for a, b in zip(scores(others + user, q), scores(others, q), strict=True)]

    assert max(moved) <= Fraction(score_sensitivity(q)) * (1 + Fraction(1, 2**40))


def test_the_candidates_that_lie_far_ahead_are_chosen():
    q = query([1] * 6, noise=0.5, count=2)
    total = np.array([0, 500, 0, 0, 900, 0]) * round(1 / Lattice.of(q).unit)

    picked = chosen(total, q, max_clients=1, stream=OsKeyStream())

    assert picked.tolist() == best(total, q).tolist() == [0, 1, 0, 0, 1, 0]


def test_all_candidates_can_be_drawn_and_each_is_drawn_once():
    q = query([1] * 5, count=5)
    total = np.array([0, 2**50, 0, -(2**50), 1])

    assert chosen(total, q, max_clients=3, stream=OsKeyStream()).tolist() == [1] * 5


# ---- the L1 clip -------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.just(1), st.integers(3, 20)),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, -1.0, 0.5, 1024.0]), st.floats(-100, 100, width=32)
        ),
    ),
    st.floats(1e-3, 1e3),
    st.lists(st.sampled_from(NASTY), max_size=4),
    st.integers(1, 3),
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_no_user_moves_a_block_by_more_than_the_clip(row, clip, nasty, num_blocks):
    for place, value in enumerate(nasty[: row.shape[1]]):
        row[0, place] = value
    sizes = [len(part) for part in np.array_split(row[0], num_blocks)]
    q = query(sizes, clip)

    total = clipped_sum(Contribution.rows(row), q)

    assert most_moved(total, q) <= Fraction(clip)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.int64, (30, 2), elements=st.integers(-2, 12)),
    st.floats(0.01, 50),
    st.floats(0.01, 1e6),
    st.integers(1, 30),
)
def test_no_user_of_many_records_moves_a_block_of_cells_by_more_than_the_clip(
    cells, clip, weight, num_records
):
    q = query([3, 7, 1], clip)
    heights = np.array([weight, -0.3])
    users = np.zeros(num_records, dtype=np.int64)

    total = clipped_sum(
        Contribution.cells(cells[:num_records], users, num_users=1, weights=heights), q
    )

    assert most_moved(total, q) <= Fraction(clip)


def test_an_l2_clip_would_not_bound_a_block():
    # ten cells of height one: L2 norm 3.2, L1 norm 10; the failing twin of the tests above
    row = np.ones((1, 10))
    summed = clipped_sum(Contribution.rows(row), Query("q", 10, np.sqrt(10.0), 1.0))
    q = query([10], np.sqrt(10.0))

    assert np.abs(summed).sum() * Lattice.of(q).unit > 3 * q.clip
    assert most_moved(clipped_sum(Contribution.rows(row), q), q) <= q.clip


def test_blocks_are_clipped_each_by_itself():
    rows = np.array([[0.25, 0.5, 30.0, 0.0, 10.0, 0.5]])
    q = query([2, 3, 1])

    total = clipped_sum(Contribution.rows(rows), q) * Lattice.of(q).unit

    assert total == pytest.approx([0.25, 0.5, 0.75, 0.0, 0.25, 0.5], abs=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_user_who_is_not_finite_in_one_block_counts_in_none(value):
    rows = np.array([[0.5, 0, 0, 0, 0, 0.5], [value, 0, 0, 0, 0, 0.25]])
    q = query([2, 3, 1])

    total = clipped_sum(Contribution.rows(rows), q) * Lattice.of(q).unit

    assert total.tolist() == [0.5, 0, 0, 0, 0, 0.5]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counted_blocks_equal_dense_ones_in_any_split(data):
    num_users = data.draw(st.integers(1, 12))
    records = data.draw(st.lists(st.integers(1, 4), min_size=num_users, max_size=num_users))
    users = np.repeat(np.arange(num_users), records)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    wild = data.draw(st.booleans())  # cells that leave their column's block
    low, high = ([0, 0, 0], [9, 9, 9]) if wild else ([0, 2, 5], [2, 5, 9])
    cells = np.stack([rng.integers(a, b, len(users)) for a, b in zip(low, high, strict=True)], 1)
    weights = np.array([1.0, 0.5, 2.0])
    q = query([2, 3, 4], data.draw(st.sampled_from([0.7, 1.0, 2.0, 10.0])))
    dense = np.zeros((num_users, 9))
    np.add.at(dense, (users[:, None], cells), weights)

    def counted(keep):
        _, local = np.unique(users[keep], return_inverse=True)
        some = Contribution.cells(
            cells[keep], local, num_users=len(np.unique(local)), weights=weights
        )
        return clipped_sum(some, q)

    whole = counted(np.ones(len(users), dtype=bool))
    parts = sum(counted(users == user) for user in range(num_users))

    assert np.array_equal(whole, parts)
    expected = clipped_sum(Contribution.rows(dense), q)
    assert np.abs(whole - expected).max() <= 4 * num_users  # a few rounding steps a user at most


# ---- what cannot be ----------------------------------------------------------------------

GOOD = Choice.among([2, 3], np.zeros(5))


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.array([0, 2, 2])},
        {"starts": np.array([1, 2, 5])},
        {"starts": np.array([0, 2, 5], dtype=np.int32)},
        {"starts": np.array([0, 2, 5, 4])},
        {"estimates": np.zeros(4)},
        {"estimates": np.array([0, 0, 0, 0, np.nan])},
        {"estimates": np.zeros(0), "where": "client"},
        {"estimates": np.float64(0.0), "where": "client"},
        {"weights": np.array([1.0, 0.0])},
        {"weights": np.array([1.0, np.inf])},
        {"weights": np.ones(3)},
        {"penalties": np.ones(1)},
        {"against": np.array([[0], [-1]])},
        {"against": np.array([[5], [-1]])},
        {"count": 0},
        {"count": 3},
        {"where": "nowhere"},
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(change):
    with pytest.raises(ConfigError):
        replace(GOOD, **change)


def test_a_choice_must_fill_its_query_and_ask_all_users():
    with pytest.raises(ConfigError, match="all users"):
        Query("q", 6, 1.0, 1.0, choice=GOOD)
    with pytest.raises(ConfigError, match="all users"):
        Query("q", 5, 1.0, 1.0, sampling_prob=0.5, choice=GOOD)


def test_a_void_choice_tells_nothing():
    noisy = NoisySum.void(query([2, 3]))

    assert noisy.is_void
    assert noisy.vector.tolist() == [0.0, 0.0]

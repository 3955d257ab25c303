# SPDX-License-Identifier: Apache-2.0
"""Clip, lattice and exact sum: bounds that no input breaks."""

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import (
    Lattice,
    clipped_sum,
    noised,
    sent,
    share_arrives,
    with_room,
)
from fedsynth.core.query import Contribution, Query
from fedsynth.core.randomness import OsKeyStream
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

NASTY = [np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e308, -1e308, 1e-300, 3.4e38, 1.0, -1.0, 0.0]


def query(dim=4, clip=1.0, **more):
    return Query("q", dim, clip, 1.0, **more)


def norm(total, q):
    return float(np.sqrt((total.astype(object) ** 2).sum())) * Lattice.of(q).unit


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.just(1), st.integers(1, 20)),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, -1.0, 0.5, 1024.0]), st.floats(-100, 100, width=32)
        ),
    ),
    st.floats(1e-3, 1e3),
    st.lists(st.sampled_from(NASTY), max_size=4),
    st.sampled_from([22, 12, 8]),
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_one_user_never_moves_the_sum_by_more_than_the_clip(row, clip, nasty, resolution):
    for place, value in enumerate(nasty[: row.shape[1]]):
        row[0, place] = value
    q = query(row.shape[1], clip, resolution=resolution)

    total = clipped_sum(Contribution.rows(row), q)

    assert norm(total, q) <= clip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_user_who_is_not_finite_counts_as_zeros_and_voids_nobody(value):
    rows = np.array([[0.5, 0, 0, 0], [value, 0.1, 0, 0], [0, 0.25, 0, 0]])

    total = clipped_sum(Contribution.rows(rows), query())

    assert (total * Lattice.of(query()).unit).tolist() == [0.5, 0.25, 0, 0]


def test_a_user_whose_norm_overflows_is_clipped_not_dropped():
    rows = np.array([[1e308, 1e308, 0, 0]])

    total = clipped_sum(Contribution.rows(rows), query()) * Lattice.of(query()).unit

    assert total == pytest.approx([np.sqrt(0.5), np.sqrt(0.5), 0, 0], abs=1e-5)


@pytest.mark.parametrize(
    "rows",
    [np.ones((2, 5)), np.ones(4), np.ones((2, 4), dtype=object), np.ones((2, 4), dtype=complex)],
)
def test_a_misshapen_contribution_is_no_sum_of_zeros(rows):
    # zeros for all would let the user whose records made it so take everybody else away
    with pytest.raises(ConfigError, match="a row of the query's length"):
        clipped_sum(Contribution.rows(rows), query())


def test_more_rows_than_users_are_refused():
    with pytest.raises(ConfigError, match="a row of the query's length"):
        clipped_sum(Contribution.rows(np.ones((3, 4))), query(), num_users=2)


def test_a_contribution_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="a row of the query's length"):
        clipped_sum(Contribution(num_users=2), query())


@pytest.mark.parametrize(
    ("indices", "weights"),
    [
        (np.array([[0, 1]]), np.array([1000 + 1000j, 1000 + 1000j])),  # 1,414 clips, once
        (np.array([[True, True]]), np.ones(2)),  # a mask to numpy, not two cells
        (np.array([[0.0, 1.0]]), np.ones(2)),
        (np.array([[0, 1]], dtype=np.uint64), np.ones(2)),
        (np.array([[0, 1]]), np.ones(3)),
        (np.array([[0, 1]]), np.array([1.0, np.nan])),
    ],
)
def test_cells_and_heights_of_other_types_are_refused(indices, weights):
    odd = Contribution(1, None, indices, np.zeros(1, dtype=np.int64), weights)

    with pytest.raises(ConfigError, match="whole numbers of cells"):
        clipped_sum(odd, query(4, 1.0, cells=True))


def test_heights_of_single_precision_are_squared_in_double():
    cells, user = np.arange(1 << 17, dtype=np.int64)[None], np.zeros(1, dtype=np.int64)
    for step in range(4097, 8192, 271):  # in float32 a sum of many squares comes out too small
        heights = np.full(cells.size, step / 4096, dtype=np.float32)
        q = query(cells.size, float(np.sqrt(heights @ heights)) * (1 + 1e-9), cells=True)

        total = clipped_sum(Contribution.cells(cells, user, num_users=1, weights=heights), q)

        assert norm(total, q) <= q.clip


@pytest.mark.parametrize("dim", [4, 9_000, 20_000, 100_000])
def test_a_row_at_the_edge_of_the_clip_is_the_same_alone_and_beside_others(dim):
    rng = np.random.default_rng(dim)
    q = query(dim, 1.0)
    for _ in range(5):
        row = rng.normal(size=dim)
        row *= (1 + rng.normal() * 1e-16) / np.linalg.norm(row)
        beside = np.stack([row, np.zeros(dim), np.zeros(dim)])

        alone = clipped_sum(Contribution.rows(row[None]), q)

        assert np.array_equal(alone, clipped_sum(Contribution.rows(beside), q))


def test_small_vectors_pass_unchanged_to_the_lattice_step():
    rows = np.array([[0.125, -0.25, 0.5, 0.0]], dtype=np.float32)

    total = clipped_sum(Contribution.rows(rows), query())

    assert (total * Lattice.of(query()).unit).tolist() == [0.125, -0.25, 0.5, 0.0]


def test_a_sum_is_bit_equal_in_any_order_and_any_split():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(500, 37)).astype(np.float32)
    q = query(37, 2.5)

    whole = clipped_sum(Contribution.rows(rows), q)
    shuffled = clipped_sum(Contribution.rows(rng.permutation(rows)), q)
    parts = sum(clipped_sum(Contribution.rows(part), q) for part in np.array_split(rows, 17))

    assert np.array_equal(whole, shuffled)
    assert np.array_equal(whole, parts)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_counted_cells_equal_dense_rows(data):
    num_users = data.draw(st.integers(1, 12))
    records = data.draw(st.lists(st.integers(1, 6), min_size=num_users, max_size=num_users))
    users = np.repeat(np.arange(num_users), records)
    dim = 9
    cells = data.draw(hnp.arrays(np.int64, (len(users), 3), elements=st.integers(0, dim - 1)))
    weights = np.array([1.0, 0.5, 2.0])
    q = query(dim, data.draw(st.sampled_from([0.7, 1.0, 2.3, 10.0])), cells=True)
    dense = np.zeros((num_users, dim))
    np.add.at(dense, (users[:, None], cells), weights)

    counted = clipped_sum(Contribution.cells(cells, users, num_users=num_users, weights=weights), q)

    expected = clipped_sum(Contribution.rows(dense), q)
    assert np.abs(counted - expected).max() <= 2 * num_users  # a rounding step a user at most


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.int64, (30, 2), elements=st.integers(-2, 12)),
    st.floats(0.01, 50),
    st.integers(1, 30),
)
def test_one_user_of_many_records_moves_counted_cells_by_at_most_the_clip(cells, clip, records):
    q = query(10, clip, cells=True)
    users = np.zeros(records, dtype=np.int64)

    total = clipped_sum(Contribution.cells(cells[:records], users, num_users=1), q)

    assert norm(total, q) <= clip


def test_a_cell_out_of_range_voids_its_user_only():
    cells = np.array([[0], [99], [1], [-1]])
    q = query(4, 1.0, cells=True)

    total = clipped_sum(Contribution.cells(cells, np.arange(4), num_users=4), q)

    assert (total * Lattice.of(q).unit).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "users", [np.array([1, 0]), np.array([0, 2]), np.array([-1, 0]), np.array([0])]
)
def test_user_indices_that_cannot_be_are_refused(users):
    q = query(4, 1.0, cells=True)

    with pytest.raises(ConfigError, match="order of users"):
        clipped_sum(Contribution.cells(np.array([[0], [1]]), users, num_users=2), q)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint32", "uint64", "float64"])
def test_a_user_whose_records_lie_apart_is_refused_whatever_the_type_of_the_index(dtype):
    users = np.array([0, 1, 0], dtype=dtype)  # counted as two, user 0 would be clipped twice
    q = query(4, 1.0, cells=True)

    with pytest.raises(ConfigError, match="order of users"):
        clipped_sum(Contribution.cells(np.array([[0], [1], [0]]), users, num_users=2), q)


def test_user_indices_that_are_no_numbers_are_refused():
    users = np.array([0, np.nan, 0])
    q = query(4, 1.0, cells=True)

    with pytest.raises(ConfigError, match="order of users"):
        clipped_sum(Contribution.cells(np.array([[0], [1], [0]]), users, num_users=1), q)


def test_a_row_of_many_cells_keeps_its_norm_on_a_coarse_lattice_and_no_more():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(20, 2000))
    q = query(2000, 1.0, resolution=12)

    lengths = [norm(clipped_sum(Contribution.rows(row[None]), q), q) for row in rows]

    assert 0.98 < min(lengths) <= max(lengths) <= 1.0


def test_what_does_not_fit_a_reply_stays_at_what_does_and_brings_no_two_sums_apart():
    q = query(3, resolution=12)
    one = np.array([2**31 - 5, -(2**40), 7]) * q.grain
    other = np.array([2**31 + 90, -(2**40) - 1, 7]) * q.grain

    apart = np.abs(sent(one, q).astype(np.int64) - sent(other, q))

    assert sent(other, q).tolist() == [2**31 - 1, -(2**31) + 1, 7]
    assert sent(other, q).dtype == np.int32
    assert (apart * q.grain <= np.abs(one - other)).all()
    assert sent(other, query(3)).tolist() == other.tolist()


def shares_of(total, q, stddev):
    """What clients with equal sums send, each with its share of noise, in the vectors' own unit."""
    grid = Lattice.of(q)
    held = with_room(total, q, stddev=stddev)
    return sent(noised(held, stddev=stddev, lattice=grid, stream=OsKeyStream()), q) * (
        grid.unit * q.grain
    )


@pytest.mark.parametrize("cell", [0, 2**31, -(2**40)])
@pytest.mark.parametrize(("resolution", "stddev"), [(12, 0.01), (12, 30.0), (16, 2.0), (8, 1.0)])
def test_a_share_of_noise_arrives_whole_also_where_a_cell_is_full(cell, resolution, stddev):
    q = query(20_000, resolution=resolution)
    total = np.full(20_000, cell * q.grain)

    arrived = shares_of(total, q, stddev)

    assert share_arrives(q, stddev=stddev)
    assert arrived.std() == pytest.approx(stddev, rel=0.03)
    assert arrived.std() != pytest.approx(stddev * 2 / 3, rel=0.03)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**50), 2**50), st.integers(-(2**50), 2**50), st.sampled_from([8, 12, 17, 22]))
def test_making_room_for_noise_brings_no_two_sums_apart(one, other, resolution):
    q = query(1, resolution=resolution)

    held = [int(with_room(np.array([total]), q, stddev=3.0)[0]) for total in (one, other)]

    assert abs(held[0] - held[1]) <= abs(one - other)


def test_a_share_that_would_be_rounded_away_or_cut_off_does_not_arrive():
    q = query(3, resolution=8)

    assert [share_arrives(q, stddev=s) for s in (2**-7, 2**-8, 2.0**18, 2.0**19)] == [
        *(True, False, True, False)
    ]


def test_a_noisy_sum_travels_rounded_to_the_nearest_grain():
    q = query(5, resolution=12)
    half = q.grain // 2

    assert sent(np.array([half - 1, half, -half, -half - 1, 3 * q.grain]), q).tolist() == [
        *(0, 1, 0, -1, 3)
    ]


def test_a_sum_on_a_coarse_grid_is_in_whole_grains_of_the_same_lattice():
    rows = np.random.default_rng(0).normal(size=(50, 6)) / 4
    q = query(6, resolution=12)

    coarse, fine = (
        clipped_sum(Contribution.rows(rows), q),
        clipped_sum(Contribution.rows(rows), query(6)),
    )

    assert not (coarse % q.grain).any()
    assert np.abs(coarse - fine).max() <= 50 * q.grain


@pytest.mark.parametrize("exponent", [-99, -3, 0, 1, 20, 99])
def test_the_clip_is_two_to_the_22_to_23_steps_also_just_below_a_power_of_two(exponent):
    for clip in (2.0**exponent, np.nextafter(2.0**exponent, 0), np.nextafter(2.0**exponent, 4e33)):
        lattice = Lattice.of(query(1, float(clip)))

        assert 2.0**22 <= lattice.bound < 2.0**23
        assert lattice.bound * lattice.unit == clip


def test_counts_of_single_record_users_are_exact():
    q = query(300, np.sqrt(15), cells=True)
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 20, size=(40_000, 15)) + 20 * np.arange(15)

    total = clipped_sum(Contribution.cells(cells, np.arange(40_000), num_users=40_000), q)

    assert (total * Lattice.of(q).unit).tolist() == np.bincount(
        cells.ravel(), minlength=300
    ).tolist()


def test_users_of_many_records_are_counted_across_slices():
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 40, size=400_000))
    cells = rng.integers(0, 7, size=(400_000, 1))
    q = query(7, 1e9, cells=True)

    total = clipped_sum(Contribution.cells(cells, users, num_users=40), q)

    counts = np.bincount(cells.ravel(), minlength=7)
    assert np.abs(total * Lattice.of(q).unit - counts).max() <= 40 * Lattice.of(q).unit


def some_scales(data, cells):
    shape = data.draw(st.sampled_from([cells.shape[:1], cells.shape]))
    return data.draw(hnp.arrays(np.float64, shape, elements=st.floats(-3, 3)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_scaled_cells_equal_dense_rows(data):
    num_users = data.draw(st.integers(1, 8))
    users = np.repeat(np.arange(num_users), data.draw(st.integers(1, 4)))
    cells = data.draw(hnp.arrays(np.int64, (len(users), 3), elements=st.integers(0, 8)))
    scales, weights = some_scales(data, cells), np.array([1.0, 0.5, 2.0])
    q = query(9, data.draw(st.sampled_from([0.7, 2.3, 100.0])), cells=True)
    dense = np.zeros((num_users, 9))
    np.add.at(dense, (users[:, None], cells), (scales.T * np.ones(cells.shape).T).T * weights)

    counted = clipped_sum(
        Contribution.cells(cells, users, num_users=num_users, weights=weights, scales=scales), q
    )

    assert np.abs(counted - clipped_sum(Contribution.rows(dense), q)).max() <= 2 * num_users


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(np.int64, (12, 2), elements=st.integers(0, 5)),
    hnp.arrays(
        np.float64,
        st.sampled_from([(12,), (12, 2)]),
        elements=st.one_of(st.sampled_from(NASTY), st.floats(-2, 2)),
    ),
    hnp.arrays(np.int64, 12, elements=st.integers(0, 4)),
    st.floats(0.01, 50),
)
def test_neighbours_with_any_scales_differ_by_at_most_the_clip(cells, scales, users, clip):
    users = np.sort(users)
    q = query(6, clip, cells=True)

    def total(keep):
        _, index = np.unique(users[keep], return_inverse=True)
        part = Contribution.cells(cells[keep], index, num_users=5, scales=scales[keep])
        return clipped_sum(part, q)

    for user in range(5):
        assert norm(total(users >= 0) - total(users != user), q) <= clip


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.int64, (30, 2), elements=st.integers(0, 5)),
    hnp.arrays(np.float64, 30, elements=st.sampled_from([1.0, 1 / 3, 0.1, -0.7, np.nan, 1e308])),
    hnp.arrays(np.int64, 30, elements=st.integers(0, 9)),
    st.floats(0.1, 5),
)
def test_a_scaled_sum_is_bit_equal_whatever_the_blocks(cells, scales, users, clip):
    users = np.sort(users)
    q = query(6, clip, cells=True)

    def total(keep):
        part = Contribution.cells(cells[keep], users[keep], num_users=10, scales=scales[keep])
        return clipped_sum(part, q)

    whole, one_by_one = total(users >= 0), sum(total(users == user) for user in range(10))
    assert np.array_equal(whole, one_by_one)
    assert np.array_equal(whole, total(users < 4) + total(users >= 4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_voids_its_user_only(value):
    users = np.array([0, 1, 1, 2])
    q = query(4, 1.0, cells=True)

    total = clipped_sum(
        Contribution.cells(
            np.array([[0], [1], [1], [2]]),
            users,
            num_users=3,
            scales=np.array([1.0, value, 0.5, 0.25]),
        ),
        q,
    )

    assert (total * Lattice.of(q).unit).tolist() == [1, 0, 0.25, 0]


@pytest.mark.parametrize(
    "scales", [np.ones(3), np.ones((2, 2)), np.ones((1, 2)), np.array(1.0), np.ones((2, 1, 1))]
)
def test_misshapen_scales_are_refused(scales):
    q = query(4, 1.0, cells=True)
    cells = np.array([[0], [1]])

    with pytest.raises(ConfigError, match="a finite height for each"):
        clipped_sum(Contribution.cells(cells, np.arange(2), num_users=2, scales=scales), q)


def test_scales_of_one_change_no_bit():
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 300, size=500))
    cells = np.sort(rng.integers(0, 50, size=(500, 3)), axis=1)
    q = query(50, 1.5, cells=True)
    plain = Contribution.cells(cells, users, num_users=300)
    scaled = Contribution.cells(cells, users, num_users=300, scales=np.ones(500))

    assert np.array_equal(clipped_sum(plain, q), clipped_sum(scaled, q))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mean_over_records_never_meets_a_clip_of_one_record(data):
    records = data.draw(st.integers(1, 40))
    cells = data.draw(hnp.arrays(np.int64, (records, 3), elements=st.integers(0, 3)))
    cells = cells + np.array([0, 4, 8])
    q = query(12, 3**0.5 * (1 + 2.0**-40), cells=True)
    user = Contribution.cells(cells, np.zeros(records, dtype=np.int64), num_users=1)

    total = clipped_sum(user.user_means(), q)

    exact = np.bincount(cells.ravel(), minlength=12) / records
    # a step of rounding, or of pulling the few in that rounding took over the bound
    assert np.abs(total * Lattice.of(q).unit - exact).max() <= 3 * 2.0**-22


def test_dense_rows_have_no_mean_over_records():
    with pytest.raises(ConfigError, match="counted cells"):
        Contribution.rows(np.ones((2, 2))).user_means()


@pytest.mark.parametrize("stddev", [0.0, -1.0, np.nan, np.inf, 1e300])
def test_noise_that_cannot_be_is_refused(stddev):
    with pytest.raises(ConfigError):
        noised(
            np.zeros(3, dtype=np.int64),
            stddev=stddev,
            lattice=Lattice.of(query()),
            stream=OsKeyStream(),
        )


@pytest.mark.parametrize(
    "change",
    [
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": np.nan},
        {"clip": np.inf},
        {"dim": 0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": np.nan},
        {"sampling_prob": 0.0},
        {"sampling_prob": 1.01},
        {"resolution": 7},
        {"resolution": 23},
    ],
)
def test_a_query_that_cannot_be_is_refused(change):
    with pytest.raises(ConfigError):
        Query(**{"name": "q", "dim": 3, "clip": 1.0, "noise_multiplier": 1.0} | change)


@pytest.mark.parametrize("resolution", [8, 16, 22])
@pytest.mark.parametrize("dim", [(1 << 15) + 1, 40_000, 99_385])
def test_a_long_row_comes_out_to_the_same_bit_alone_and_never_beyond_the_bound(dim, resolution):
    draws = np.random.default_rng(dim)
    rows = draws.normal(size=(13, dim)) * 10.0 ** draws.integers(-3, 4, (13, 1))
    rows[2, 7], rows[3], rows[4], rows[5] = np.nan, 1e200, 0.0, 1.0  # of norms 0 to beyond double
    rows[6] *= 1.0 / np.linalg.norm(rows[6])  # just at the clip
    q = query(dim, resolution=resolution)
    grid = Lattice.of(q).coarser(q.grain)

    total = clipped_sum(Contribution.rows(rows), q)

    alone = [clipped_sum(Contribution.rows(row[None]), q) for row in rows]
    assert np.abs(total).max() > 0
    assert (total == sum(alone)).all()
    assert max(float(one // q.grain @ (one // q.grain)) for one in alone) <= grid.bound**2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [300, 20_000, 99_385, 215_370])
def test_a_clipped_row_of_a_wide_model_keeps_length_and_direction(dim, dtype):
    q = query(dim, 0.7, resolution=16)
    step = Lattice.of(q).unit * q.grain
    rows = np.random.default_rng(dim).normal(size=(8, dim)).astype(dtype)

    for row in rows:
        total = clipped_sum(Contribution.rows(row[None]), q) * Lattice.of(q).unit

        fitting = 0.7 * row / np.linalg.norm(row.astype(np.float64))
        cut = np.trunc(fitting / step) * step
        assert 0.7 * (1 - 1e-4) < np.linalg.norm(total) <= 0.7
        assert np.abs(total - fitting).max() <= 1.6 * step  # rounded, and a step towards zero
        assert dim < 20_000 or np.linalg.norm(cut) < 0.7 * (1 - 1e-4)


@pytest.mark.parametrize("resolution", [8, 12, 16])
@pytest.mark.parametrize("fraction", [0.5, 0.5 + 1e-9, 1.5 + 1e-9, 7.5 + 1e-9])
def test_a_row_all_of_whose_values_are_rounded_up_is_pulled_in(fraction, resolution):
    dim, base = 40_000, query(resolution=resolution)
    step = Lattice.of(base).unit * base.grain
    row = np.full(dim, fraction * step)
    q = query(dim, float(np.linalg.norm(row)) * (1 + 1e-12), resolution=resolution)

    total = clipped_sum(Contribution.rows(row[None]), q)

    assert norm(total, q) <= q.clip
    assert norm(total, q) > 0.9 * q.clip or fraction == 0.5

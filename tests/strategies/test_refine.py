# SPDX-License-Identifier: Apache-2.0
"""Refining lowers the squared gaps to all targets at once, and never enters a forbidden cell."""

from itertools import combinations

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.strategies.parts.gum import Target, cells_in, gum
from fedsynth.strategies.parts.histograms import Grid
from fedsynth.strategies.parts.refine import refined

SHAPE = (6, 4, 5, 2)
GRIDS = [Grid.whole(j, size) for j, size in enumerate(SHAPE)]


def linked(num_records, rng):
    """Records whose columns all follow one hidden cause."""
    cause = rng.integers(0, 4, num_records)
    codes = [(cause + (rng.random(num_records) < 0.3) * rng.integers(0, s, num_records)) % s
             for s in SHAPE]  # fmt: skip
    return np.stack(codes, axis=1).astype(np.int32)


def shuffled(codes, rng):
    """The same columns, independent of each other."""
    return np.stack([rng.permutation(column) for column in codes.T], axis=1)


def counts(codes, grids):
    size = [grid.size for grid in grids]
    cells = cells_in(np.ascontiguousarray(codes.T), grids)
    return np.bincount(cells, minlength=int(np.prod(size))).reshape(size)


def all_pairs(codes):
    return [Target(pair, counts(codes, pair) / len(codes)) for pair in combinations(GRIDS, 2)]


def loss(codes, targets):
    """The weighted sum of squared gaps."""
    return sum(
        t.weight * float(np.square(counts(codes, t.grids) - t.probs * len(codes)).sum())
        for t in targets
    )


def test_gaps_fall_far_below_those_of_gum_alone():
    rng = np.random.default_rng(0)
    real = linked(8000, rng)
    targets = all_pairs(real)
    start = gum(shuffled(real, rng), targets, rng)

    better = refined(start, targets, rng)

    assert loss(better, targets) < loss(start, targets) / 4


def test_records_stay_as_varied_as_they_were():
    rng = np.random.default_rng(1)
    real = rng.integers(0, 50, (3000, 4)).astype(np.int32)
    grids = [Grid.whole(j, 50) for j in range(4)]
    cells = cells_in(np.ascontiguousarray(real.T), grids[:2])
    target = Target(tuple(grids[:2]), np.bincount(cells, minlength=2500).reshape(50, 50) / 3000)
    start = shuffled(real, rng)

    better = refined(start, [target], rng)

    assert len(np.unique(better, axis=0)) > 2900
    assert np.array_equal(np.sort(better[:, 2:], axis=0), np.sort(start[:, 2:], axis=0))


def test_three_columns_and_merged_grids_are_fitted_too():
    rng = np.random.default_rng(2)
    real = linked(6000, rng)
    merged = (Grid(0, np.array([0, 0, 1, 1, 2, 2])), GRIDS[1], Grid(2, np.array([0, 1, 0, 1, 0])))
    target = [Target(merged, counts(real, merged) / 6000)]
    start = shuffled(real, rng)

    better = refined(start, target, rng)

    assert loss(better, target) < loss(start, target) / 50


def test_no_record_enters_a_cell_that_is_not_allowed():
    rng = np.random.default_rng(3)
    real = linked(4000, rng)
    start = shuffled(real, rng)
    start[:, 3] = start[:, 0] % 2
    rule = np.arange(6)[:, None] % 2 == np.arange(2)
    targets = all_pairs(real)

    free = refined(start, targets, rng)
    bound = refined(start, targets, rng, allowed=[((0, 3), rule)])

    assert (free[:, 0] % 2 != free[:, 3]).any()
    assert (bound[:, 0] % 2 == bound[:, 3]).all()
    assert loss(bound, targets) < loss(start, targets)


def test_what_no_target_speaks_of_is_kept_but_for_the_records_that_must_move():
    rng = np.random.default_rng(10)
    start = rng.integers(0, 2, (8000, 4)).astype(np.int32)
    start[:, 3] = start[:, :3].sum(axis=1) % 2  # a parity that no pair of columns shows
    share = float(start[:, 3].mean()) + 0.05

    fitted = refined(start, [Target((GRIDS[3],), np.array([1 - share, share]))], rng)

    assert abs(fitted[:, 3].mean() - share) < 1e-3
    kept = (fitted[:, :3].sum(axis=1) % 2 == fitted[:, 3]).mean()
    assert 0.93 < kept < 0.96


def test_a_heavier_target_wins_where_two_contradict_each_other():
    one, other = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    start = np.zeros((4000, 4), dtype=np.int32)
    start[::2, 3] = 1
    targets = [Target((GRIDS[3],), one, weight=9.0), Target((GRIDS[3],), other, weight=1.0)]

    fitted = refined(start, targets, np.random.default_rng(4), passes=20)

    assert abs((fitted[:, 3] == 0).mean() - 0.82) < 0.02  # the weighted mean of .9 and .1


def test_the_same_rng_gives_the_same_records_and_the_start_is_left_alone():
    real = linked(500, np.random.default_rng(5))
    start = shuffled(real, np.random.default_rng(6))
    before = start.copy()

    first, second = (
        refined(start, all_pairs(real), np.random.default_rng(7), passes=3) for _ in range(2)
    )

    assert np.array_equal(first, second)
    assert np.array_equal(start, before)
    assert not np.array_equal(first, start)


@pytest.mark.parametrize("num_records", [0, 1, 5])
def test_hardly_any_records_are_left_as_many(num_records):
    start = np.zeros((num_records, 4), dtype=np.int32)
    targets = all_pairs(linked(50, np.random.default_rng(8)))

    assert refined(start, targets, np.random.default_rng(8)).shape == (num_records, 4)


def test_without_targets_nothing_changes():
    start = np.arange(12, dtype=np.int32).reshape(3, 4)

    fitted = refined(start, [], np.random.default_rng(9))

    assert np.array_equal(np.sort(fitted, axis=0), start)


@pytest.mark.parametrize("settings", [{"passes": -1}, {"batches": 0}])
def test_a_setting_out_of_range_is_refused(settings):
    with pytest.raises(ConfigError):
        refined(np.zeros((3, 4), dtype=np.int32), [], np.random.default_rng(0), **settings)

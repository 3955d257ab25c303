# SPDX-License-Identifier: Apache-2.0
"""GUM moves records until their marginals fit, and keeps what it is told to keep."""

from itertools import combinations

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.strategies.parts.gum import Target, cells_in, gum
from fedsynth.strategies.parts.histograms import Grid

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


def marginal(codes, grids):
    size = [grid.size for grid in grids]
    cells = cells_in(np.ascontiguousarray(codes.T), grids)
    return np.bincount(cells, minlength=int(np.prod(size))).reshape(size) / len(codes)


def distance(codes, targets):
    """Mean total variation distance to the targets."""
    return np.mean([np.abs(marginal(codes, t.grids) - t.probs).sum() / 2 for t in targets])


def all_pairs(codes):
    return [Target(pair, marginal(codes, pair)) for pair in combinations(GRIDS, 2)]


def test_records_come_to_fit_all_pairs():
    rng = np.random.default_rng(0)
    real = linked(8000, rng)
    targets, start = all_pairs(real), shuffled(real, rng)

    fitted = gum(start, targets, rng)

    assert distance(start, targets) > 0.2
    assert distance(fitted, targets) < 0.02
    triple = [Target(tuple(GRIDS[:3]), marginal(real, GRIDS[:3]))]
    assert distance(fitted, triple) < distance(start, triple) / 3


def test_cells_that_no_record_holds_are_filled_and_forbidden_ones_emptied():
    probs = np.zeros((6, 4))
    probs[5, 3] = probs[0, 0] = 0.5
    start = np.zeros((1001, 4), dtype=np.int32)
    start[:300, 0] = 2

    fitted = gum(start, [Target((GRIDS[0], GRIDS[1]), probs)], np.random.default_rng(1))

    counts = marginal(fitted, GRIDS[:2]) * 1001
    assert counts[2].sum() <= 1
    assert abs(counts[5, 3] - 500.5) < 2


def test_a_merged_target_leaves_shares_within_its_groups_alone():
    rng = np.random.default_rng(2)
    start = np.stack([rng.choice(6, 20_000, p=[0.3, 0.1, 0.1, 0.05, 0.4, 0.05]),
                      *(rng.integers(0, s, 20_000) for s in SHAPE[1:])], axis=1)  # fmt: skip
    halves = Grid(0, np.array([0, 0, 0, 1, 1, 1]))

    fitted = gum(start.astype(np.int32), [Target((halves,), np.array([0.8, 0.2]))], rng)

    expected = np.array([0.48, 0.16, 0.16, 0.02, 0.16, 0.02])
    assert np.abs(np.bincount(fitted[:, 0], minlength=6) / 20_000 - expected).max() < 0.01


def test_a_scrambled_grid_means_its_groups():
    rng = np.random.default_rng(3)
    scrambled = Grid(0, np.array([5, 4, 3, 2, 1, 0]))
    start = rng.integers(0, 2, (3000, 4)).astype(np.int32)

    fitted = gum(start, [Target((scrambled,), np.array([1.0, 0, 0, 0, 0, 0]))], rng)

    assert (fitted[:, 0] == 5).all()


def test_copies_alone_keep_what_holds_of_every_record():
    rng = np.random.default_rng(4)
    real = linked(5000, rng)
    start = shuffled(real, rng)
    start[:, 3] = start[:, 0] % 2  # a rule that replacing a column would break
    targets = all_pairs(real)

    copied = gum(start, targets, rng, copy_share=1.0)
    mixed = gum(start, targets, rng, copy_share=0.5)

    assert (copied[:, 3] == copied[:, 0] % 2).all()
    assert not (mixed[:, 3] == mixed[:, 0] % 2).all()
    assert distance(copied, targets) < distance(start, targets)


def test_the_same_rng_gives_the_same_records_and_the_start_is_left_alone():
    real = linked(500, np.random.default_rng(5))
    start = shuffled(real, np.random.default_rng(6))
    before = start.copy()

    first, second = (
        gum(start, all_pairs(real), np.random.default_rng(7), passes=5) for _ in range(2)
    )

    assert np.array_equal(first, second)
    assert np.array_equal(start, before)
    assert not np.array_equal(first, start)


def test_a_heavier_target_wins_where_two_contradict_each_other():
    one, other = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    start = np.zeros((4000, 4), dtype=np.int32)
    targets = [Target((GRIDS[3],), one, weight=1.0), Target((GRIDS[3],), other, weight=0.05)]

    fitted = gum(start, targets, np.random.default_rng(8))

    assert (fitted[:, 3] == 0).mean() > 0.8


@pytest.mark.parametrize("num_records", [0, 1])
def test_hardly_any_records_are_left_as_many(num_records):
    start = np.zeros((num_records, 4), dtype=np.int32)

    fitted = gum(start, all_pairs(linked(50, np.random.default_rng(9))), np.random.default_rng(9))

    assert fitted.shape == (num_records, 4)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target((GRIDS[0],), np.full(5, 0.2)), "probability"),
        (Target((GRIDS[0],), np.full(6, 0.2)), "adding up"),
        (Target((GRIDS[1],), np.array([1.5, -0.5, 0, 0])), "below zero"),
        (Target((GRIDS[1], GRIDS[1]), np.full((4, 4), 1 / 16)), "columns"),
        (Target((GRIDS[1],), np.full(4, 0.25), weight=0.0), "weight"),
        (Target((Grid.whole(9, 4),), np.full(4, 0.25)), "columns"),
    ],
)
def test_a_target_that_cannot_be_is_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        gum(np.zeros((3, 4), dtype=np.int32), [target], np.random.default_rng(0))


@pytest.mark.parametrize(
    "settings", [{"passes": -1}, {"step_first": 0.0}, {"step_last": 1.5}, {"copy_share": 2.0}]
)
def test_a_setting_out_of_range_is_refused(settings):
    with pytest.raises(ConfigError):
        gum(np.zeros((3, 4), dtype=np.int32), [], np.random.default_rng(0), **settings)

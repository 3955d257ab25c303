# SPDX-License-Identifier: Apache-2.0
"""Trees of noisy counts give ranks, bounds and bins."""

import numpy as np
import pytest
from fedsynth.strategies.parts.quantiles import (
    BRANCHING,
    CountTree,
    bin_edges,
    coarse_edges,
    finer_edges,
)


def noisy_tree(cells, stddev, rng):
    tree = CountTree(len(cells))
    exact = np.zeros(tree.num_nodes)
    np.add.at(exact, tree.nodes(np.arange(len(cells))), cells[:, None])
    return tree, exact + rng.normal(0, stddev, tree.num_nodes)


@pytest.mark.parametrize("num_cells", [1, 2, 8, 9, 64, 65, 500, 964])
def test_without_noise_a_tree_gives_the_counts_of_its_cells(num_cells):
    cells = np.random.default_rng(0).integers(0, 9, num_cells).astype(float)

    tree, exact = noisy_tree(cells, 0.0, np.random.default_rng(0))

    assert np.allclose(tree.counts(exact), cells)


def test_a_cell_lights_one_node_of_each_level():
    tree = CountTree(500)

    nodes = tree.nodes(np.array([0, 499]))

    assert tree.sizes == [8, 63, 500]
    assert nodes.tolist() == [[0, 8, 71], [7, 70, 570]]


def test_counts_are_never_negative_and_add_up_to_the_best_total():
    rng = np.random.default_rng(3)
    tree, noisy = noisy_tree(np.full(512, 2.0), 10.0, rng)

    counts = tree.counts(noisy)

    assert counts.min() >= 0
    assert abs(counts.sum() - 1024) < 5 * 10 * BRANCHING**0.5


def test_a_tree_tells_ranks_better_than_a_flat_histogram_of_the_same_norm():
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 40, 512).astype(float)
    tree_errors, flat_errors = [], []

    for _ in range(30):
        tree, noisy = noisy_tree(cells, 20.0 * CountTree(512).num_levels ** 0.5, rng)
        tree_errors.append(np.abs(np.cumsum(tree.counts(noisy) - cells)).mean())
        flat_errors.append(np.abs(np.cumsum(rng.normal(0, 20.0, 512))).mean())

    assert np.mean(tree_errors) < 0.6 * np.mean(flat_errors)


def test_averaging_the_levels_leaves_the_least_variance():
    rng = np.random.default_rng(1)
    cells = np.full(64, 1000.0)  # so full that none is brought to zero
    firsts = [
        tree.counts(noisy)[:8].sum()
        for tree, noisy in (noisy_tree(cells, 10.0, rng) for _ in range(4000))
    ]

    # own count of variance 100 and eight children's of 800; then the same over all 8 such nodes
    assert np.std(firsts) == pytest.approx(10 * (8 / 9) ** 0.5, rel=0.05)


def test_the_coarse_grid_holds_any_number():
    edges = coarse_edges(whole=False)

    assert (np.diff(edges) > 0).all()
    assert edges[0] < -1e38
    assert edges[-1] > 1e38
    assert 0.0 in edges
    beside = edges[np.abs(edges) >= 1]
    assert (np.diff(beside[beside > 0]) / beside[beside > 0][:-1]).max() <= 1 / 8


def test_the_coarse_grid_tells_microseconds_of_this_century_apart():
    years = np.array(["2001", "2026", "2090"], "datetime64[us]").astype(np.int64)

    for whole in (True, False):
        edges = coarse_edges(whole=whole)
        cells = np.searchsorted(edges, years.astype(float))

        assert len(set(cells.tolist())) == 3
        assert cells.max() < len(edges) - 1
        assert CountTree(len(edges) - 1).num_levels == 4


def test_the_bounds_of_whole_numbers_are_exact_as_doubles():
    edges = coarse_edges(whole=True)

    assert edges[0] > -(2.0**53)
    assert edges[-1] < 2.0**53


def test_edges_for_whole_numbers_stand_at_halves():
    edges = coarse_edges(whole=True)
    fine = finer_edges(edges, np.ones(len(edges) - 1) * 100, 1.0, num_cells=512, whole=True)

    small = fine[np.abs(fine) < 2**20]
    assert (small % 1 == 0.5).all()
    assert {-0.5, 0.5, 1.5} <= set(fine.tolist())


def test_bins_are_about_equally_heavy():
    cells = np.full(320, 10.0)

    edges = bin_edges(np.arange(321.0), cells, 0.01, num_bins=32)

    assert edges.tolist() == np.arange(0.0, 321.0, 10.0).tolist()


def test_a_heavy_cell_is_one_bin_and_leaves_the_others_to_the_rest():
    cells = np.full(101, 10.0)
    cells[0] = 9000.0

    edges = bin_edges(np.arange(102.0), cells, 0.01, num_bins=11)

    assert edges.tolist() == [0, *range(1, 102, 10)]


def test_bounds_leave_out_no_more_than_noise():
    cells = np.zeros(100)
    cells[[0, 99]] = 3.0  # under four deviations
    cells[40:60] = 1000.0

    edges = bin_edges(np.arange(101.0), cells, 1.0, num_bins=10)

    assert (edges[0], edges[-1]) == (40, 60)


def test_where_nothing_is_known_bins_spread_over_all_cells():
    edges = coarse_edges(whole=False)

    for counts, stddev in ((np.zeros(len(edges) - 1), np.inf), (np.ones(len(edges) - 1), 1e6)):
        bins = bin_edges(edges, counts, stddev, num_bins=32)

        assert len(bins) == 33
        assert (bins[0], bins[-1]) == (edges[0], edges[-1])


def test_a_grid_is_finer_where_there_is_more():
    edges = coarse_edges(whole=False)
    counts = np.zeros(len(edges) - 1)
    at = int(np.searchsorted(edges, 1950.0)) - 1
    counts[at] = 1e5

    fine = finer_edges(edges, counts, 1.0, num_cells=512, whole=False)

    assert (fine[0], fine[-1]) == (edges[at], edges[at + 1])
    assert len(fine) == 513

# SPDX-License-Identifier: Apache-2.0
"""The tree model and what feeds it: grids, denoising, forests, least squares, sampling."""

import itertools

import numpy as np
import pytest
from fedsynth.strategies.parts.coarsen import coarsen
from fedsynth.strategies.parts.denoise import shrink, smooth
from fedsynth.strategies.parts.forest import best_forest, path, spanning_forest, walk
from fedsynth.strategies.parts.histograms import Grid, Measured
from fedsynth.strategies.parts.tree_model import (
    Link,
    TreeModel,
    columns_of,
    fit,
    total_of,
    with_margins,
)
from scipy.optimize import minimize


def random_tree(shape, edges, seed):
    """A full joint that is a tree: a product of random conditionals, `shape`."""
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.ones(shape[0])).reshape(shape[0], *[1] * (len(shape) - 1))
    for parent, child in edges:  # each child once, after its parent
        conditional = rng.dirichlet(np.ones(shape[child]) * 0.7, shape[parent])
        axes = [1] * len(shape)
        axes[parent], axes[child] = shape[parent], shape[child]
        if parent > child:
            conditional = conditional.T
        joint = joint * conditional.reshape(axes)
    return joint


def marginal_of(joint, columns):
    """A marginal of a full joint, axes in the order of `columns`."""
    others = tuple(set(range(joint.ndim)) - set(columns))
    return joint.sum(axis=others).transpose(np.argsort(np.argsort(columns)))


def measured_of(joint, columns, *, total, stddev, grids=None, rng=None):
    grids = grids or tuple(Grid.whole(c, joint.shape[c]) for c in columns)
    counts = total * marginal_of(joint, columns)
    for axis, grid in enumerate(grids):
        merged = np.zeros((grid.size, counts.shape[1 - axis] if len(grids) > 1 else 1))
        moved = np.moveaxis(counts, axis, 0).reshape(len(grid.groups), -1)
        np.add.at(merged, grid.groups, moved)
        counts = np.moveaxis(merged, 0, axis) if len(grids) > 1 else merged[:, 0]
    noise = 0.0 if rng is None else rng.normal(0, stddev, counts.shape)
    return Measured(tuple(grids), counts + noise, stddev)


def test_a_grid_adds_up_its_groups():
    grid = Grid(0, np.array([0, 1, 1, 0]))

    assert grid.size == 2
    assert grid.merge(np.array([1.0, 2, 3, 4])).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("shares", "most", "expected"),
    [
        ([0.1, 0.9], 5, [0, 1]),
        ([0.1, 0.1, 0.5, 0.1, 0.1, 0.1], 3, [0, 0, 1, 2, 2, 2]),
        ([0.0, 0.0, 0.0, 1.0], 2, [0, 0, 0, 1]),
        ([0.25] * 4, 2, [0, 0, 1, 1]),
        ([0.3, 0.7], 1, [0, 0]),
    ],
)
def test_cells_are_merged_by_hand(shares, most, expected):
    assert coarsen(np.array(shares), most).tolist() == expected


def test_merged_cells_are_few_numbered_without_gap_and_no_heavier_than_they_must_be():
    rng = np.random.default_rng(0)

    for _ in range(200):
        num_cells, most = rng.integers(1, 300), int(rng.integers(2, 40))
        shares = rng.dirichlet(np.full(num_cells, rng.choice([0.01, 0.3, 5])))
        groups = coarsen(shares, most)
        weights = np.bincount(groups, weights=shares)
        crowds = weights[np.bincount(groups) > 1]
        assert len(weights) <= most
        assert np.array_equal(np.unique(groups), np.arange(len(weights)))
        assert (np.diff(groups) >= 0).all()
        assert not len(crowds) or crowds.max() < max(6 / most, 2 * shares.min() + 1e-9)


def test_smoothing_flattens_noise_and_keeps_spikes():
    truth = np.full(64, 100.0)
    truth[20] = 5000.0
    noisy = truth + np.random.default_rng(0).normal(0, 10, 64)

    smoothed = smooth(noisy, 10.0)

    assert np.square(smoothed - truth).mean() < np.square(noisy - truth).mean() / 3
    assert abs(smoothed[20] - 5000) < 30


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_smoothing_without_noise_changes_nothing(size):
    counts = np.random.default_rng(1).random(size) * 100

    np.testing.assert_allclose(smooth(counts, 1e-9), counts, rtol=1e-9)


def test_shrinking_without_noise_only_centers():
    rng = np.random.default_rng(2)
    table = rng.normal(0, 1, (1, 5, 7))
    table -= table.mean(axis=1, keepdims=True)
    table -= table.mean(axis=2, keepdims=True)

    kept = shrink(table + 3.0, np.array([1e-9]), np.array([[5, 7]]))

    np.testing.assert_allclose(kept, table, atol=1e-6)


def test_pure_noise_shrinks_to_independence_and_a_link_survives():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 1, (300, 8, 8))
    link = np.outer(np.tile([1.0, -1.0], 4), np.repeat([1.0, -1.0], 4))
    sizes = np.full((300, 2), 8)

    silent = np.abs(shrink(noise, np.full(300, 1.3), sizes)).sum(axis=(1, 2)) == 0
    heard = np.abs(shrink(noise + link, np.full(300, 1.3), sizes)).sum(axis=(1, 2)) > 0

    assert silent.mean() > 0.95
    assert heard.mean() > 0.95


def test_shrinking_brings_a_noisy_table_closer_to_the_truth():
    rng = np.random.default_rng(4)
    truth = 30 * np.outer(np.linspace(-1, 1, 20), np.linspace(-1, 1, 30))
    noisy = truth + rng.normal(0, 10, truth.shape)

    kept = shrink(noisy[None], np.array([10.0]), np.array([[20, 30]]))[0]

    assert np.square(kept - truth).mean() < np.square(noisy - truth).mean() / 4


def test_padding_does_not_change_what_is_shrunk():
    table = np.random.default_rng(5).normal(0, 5, (4, 6))
    padded = np.zeros((1, 9, 8))
    padded[0, :4, :6] = table

    alone = shrink(table[None], np.array([1.0]), np.array([[4, 6]]))
    kept = shrink(padded, np.array([1.0]), np.array([[4, 6]]))

    np.testing.assert_allclose(kept[:, :4, :6], alone, atol=1e-12)
    assert np.abs(kept[0, 4:]).max() < 1e-12


def test_the_spanning_forest_is_the_heaviest_by_hand():
    scores = np.zeros((5, 5))
    for (a, b), score in {(0, 1): 5, (1, 2): 4, (0, 2): 3, (3, 4): 1}.items():
        scores[a, b] = scores[b, a] = score

    assert spanning_forest(scores) == [(0, 1), (1, 2), (3, 4)]


def test_a_way_through_a_forest_by_hand():
    edges = [(0, 2), (1, 2), (3, 4)]

    assert path(edges, 0, 1) == [(0, 2), (1, 2)]
    assert path(edges, 0, 3) is None
    assert [column for column, _, _ in walk(edges, 1)] == [1, 2, 0]


def test_the_best_forest_is_the_tree_that_made_the_pairs():
    edges = [(0, 3), (3, 1), (1, 4), (3, 2)]
    joint = random_tree((3, 4, 3, 4, 2), edges, seed=6)

    found = best_forest(*pairs_of(joint))

    assert found == sorted(tuple(sorted(edge)) for edge in edges)


def test_the_best_forest_fits_all_pairs_no_worse_than_the_spanning_tree():
    for seed in range(5):
        joint = np.random.default_rng(seed).dirichlet(np.full(3**5, 0.1)).reshape([3] * 5)
        columns, pairs, linked = pairs_of(joint)
        independent = np.einsum("ai,bj->abij", columns, columns)
        spanning = spanning_forest(np.abs(pairs - independent).sum(axis=(2, 3)))

        errors = [
            pair_error(joint, edges) for edges in (best_forest(columns, pairs, linked), spanning)
        ]

        assert errors[0] <= errors[1] + 1e-12


def test_a_pair_that_may_not_be_linked_is_not():
    joint = random_tree((2, 2, 2), [(0, 1), (1, 2)], seed=7)
    columns, pairs, linked = pairs_of(joint)
    linked[0, 1] = linked[1, 0] = linked[0, 2] = linked[2, 0] = False

    assert best_forest(columns, pairs, linked) == [(1, 2)]
    assert best_forest(columns, pairs, np.zeros((3, 3), dtype=bool)) == []


def pairs_of(joint):
    """Arguments of `best_forest` from a full joint."""
    num_columns, cells = joint.ndim, max(joint.shape)
    columns = np.zeros((num_columns, cells))
    pairs = np.zeros((num_columns, num_columns, cells, cells))
    for a in range(num_columns):
        columns[a, : joint.shape[a]] = marginal_of(joint, [a])
        for b in range(num_columns):
            if a != b:
                pairs[a, b, : joint.shape[a], : joint.shape[b]] = marginal_of(joint, [a, b])
    return columns, pairs, ~np.eye(num_columns, dtype=bool)


def pair_error(joint, edges):
    """Sum over pairs of the L1 distance from a tree with the exact marginals of its edges."""
    model = exact_model(joint, edges)
    pairs = itertools.combinations(range(joint.ndim), 2)
    return sum(np.abs(model.marginal(p) - marginal_of(joint, p)).sum() for p in pairs)


def exact_model(joint, edges):
    return TreeModel(
        tuple(marginal_of(joint, [c]) for c in range(joint.ndim)),
        tuple(
            Link(
                Grid.whole(a, joint.shape[a]),
                Grid.whole(b, joint.shape[b]),
                marginal_of(joint, [a, b]),
            )
            for a, b in edges
        ),
    )


@pytest.mark.parametrize(
    "columns", [[0], [3], [2, 0], [0, 1], [4, 2], [1, 5], [4, 0, 2], [5, 3, 0]]
)
def test_marginals_are_those_of_the_full_joint(columns):
    edges = [(0, 3), (3, 1), (1, 4), (3, 2)]  # column 5 stands alone
    joint = random_tree((3, 4, 3, 5, 2), edges, seed=8)[..., None] * np.array([0.3, 0.7])

    model = exact_model(joint, edges)

    np.testing.assert_allclose(model.marginal(columns), marginal_of(joint, columns), atol=1e-12)


def test_a_marginal_of_one_column_twice_is_refused():
    with pytest.raises(ValueError, match="must differ"):
        TreeModel((np.ones(1),), ()).marginal([0, 0])


def test_cells_of_a_group_keep_their_columns_shares():
    grid = Grid(0, np.array([0, 0, 1]))
    model = TreeModel(
        (np.array([0.1, 0.3, 0.6]), np.array([0.5, 0.5])),
        (Link(grid, Grid.whole(1, 2), np.array([[0.4, 0.0], [0.1, 0.5]])),),
    )

    np.testing.assert_allclose(model.marginal([0, 1]), [[0.1, 0], [0.3, 0], [0.1, 0.5]])


def test_exact_tables_of_a_tree_give_back_its_joint():
    edges = [(0, 3), (3, 1), (1, 4), (3, 2)]
    joint = random_tree((3, 4, 3, 5, 2), edges, seed=9)
    measured = [measured_of(joint, [c], total=1e4, stddev=1e-6) for c in range(5)]
    measured += [measured_of(joint, e, total=1e4, stddev=1e-6) for e in edges]

    model = fit(joint.shape, measured, edges)

    np.testing.assert_allclose(model.marginal(range(5)), joint, atol=1e-6)


def test_columns_are_the_inverse_variance_mean_of_all_that_is_known():
    whole = Grid.whole(0, 4)
    first = Measured((whole,), np.array([10.0, 20, 30, 40]), 1.0)
    second = Measured((Grid.whole(0, 4),), np.array([20.0, 30, 20, 30]), 2.0)

    (counts,) = columns_of([4], [first, second], 100.0)

    np.testing.assert_allclose(counts, [12, 22, 28, 38])


def test_columns_are_the_least_squares_solution_over_cells_and_groups():
    rng = np.random.default_rng(10)
    grids = [Grid(0, np.array([0, 0, 1, 1, 2, 2])), Grid(0, np.array([0, 0, 0, 1, 1, 1]))]
    cells = Measured((Grid.whole(0, 6),), rng.uniform(50, 60, 6), 3.0)
    groups = [Measured((g,), g.merge(cells.counts) + rng.normal(0, 5, g.size), 2.0) for g in grids]
    rows, values, weights = [np.eye(6)], [cells.counts], [np.full(6, 1 / 3)]
    for grid, table in zip(grids, groups, strict=True):
        rows.append((grid.groups == np.arange(grid.size)[:, None]).astype(float))
        values.append(table.counts)
        weights.append(np.full(grid.size, 1 / 2))
    w = np.concatenate(weights)
    solution, *_ = np.linalg.lstsq(np.concatenate(rows) * w[:, None], np.concatenate(values) * w)

    (counts,) = columns_of([6], [cells, *groups], float(solution.sum()))

    np.testing.assert_allclose(counts, solution, atol=1e-6)


def test_a_column_known_by_groups_alone_is_flat_inside_them():
    table = Measured((Grid(0, np.array([0, 0, 1, 1, 1])),), np.array([40.0, 60.0]), 0.1)

    (counts,) = columns_of([5], [table], 100.0)

    np.testing.assert_allclose(counts, [20, 20, 20, 20, 20], atol=0.01)


def test_no_tables_at_all_give_uniform_independent_columns():
    model = fit([2, 4], [], [(0, 1)])

    assert [c.tolist() for c in model.columns] == [[0.5] * 2, [0.25] * 4]
    assert model.links == ()
    assert total_of([]) == 0.0


def test_an_edge_without_a_table_is_an_error():
    table = Measured((Grid.whole(0, 2),), np.array([50.0, 50.0]), 1.0)

    with pytest.raises(ValueError, match=r"no table was measured for the edge \(0, 1\)"):
        fit([2, 2], [table], [(0, 1)])


def test_a_table_gets_the_closest_form_with_its_margins():
    rng = np.random.default_rng(11)
    for _ in range(5):
        table = rng.normal(0.3, 0.4, (3, 4))
        rows, columns = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(4))
        found = minimize(
            lambda x, table=table: np.square(x - table.ravel()).sum(),
            np.outer(rows, columns).ravel(),
            bounds=[(0, None)] * 12,
            constraints={
                "type": "eq",
                "fun": lambda x, rows=rows, columns=columns: np.concatenate(
                    [x.reshape(3, 4).sum(1) - rows, (x.reshape(3, 4).sum(0) - columns)[:-1]]
                ),
            },
            tol=1e-12,
        )

        closest = with_margins(table, rows, columns)

        np.testing.assert_allclose(closest, found.x.reshape(3, 4), atol=1e-4)


def test_margins_hold_for_hard_tables():
    rng = np.random.default_rng(12)

    for _ in range(300):
        num_rows, num_columns = rng.integers(1, 33, 2)
        rows = rng.random(num_rows) ** rng.integers(1, 12)
        columns = rng.random(num_columns) ** rng.integers(1, 12)
        rows[rng.random(num_rows) < 0.2] = 0
        rows[0], columns = 1.0, columns / columns.sum()
        rows /= rows.sum()
        noise = rng.normal(0, 10.0 ** rng.integers(-5, 3), (num_rows, num_columns))
        table = with_margins(np.outer(rows, columns) + noise, rows, columns)
        assert (table >= 0).all()
        np.testing.assert_allclose(table.sum(axis=1), rows, atol=1e-6)
        np.testing.assert_allclose(table.sum(axis=0), columns, atol=1e-6)


def test_samples_follow_columns_and_links_as_closely_as_counts_can():
    edges = [(0, 1), (1, 2)]
    joint = random_tree((3, 4, 3), edges, seed=13)
    model = exact_model(joint, edges)

    codes = model.sample(5000, np.random.default_rng(0))

    for pair in edges:
        counts = np.zeros([joint.shape[c] for c in pair])
        np.add.at(counts, tuple(codes[:, pair].T), 1)
        assert np.abs(counts - 5000 * marginal_of(joint, pair)).max() < 5  # sqrt(5000 / 12) is 20


def test_a_pair_that_no_link_holds_follows_the_model_too():
    joint = random_tree((3, 4, 3), [(0, 1), (1, 2)], seed=13)
    codes = exact_model(joint, [(0, 1), (1, 2)]).sample(200_000, np.random.default_rng(0))
    counts = np.zeros((3, 3))

    np.add.at(counts, (codes[:, 0], codes[:, 2]), 1)

    np.testing.assert_allclose(counts / 200_000, marginal_of(joint, [0, 2]), atol=0.005)


def test_sampling_is_unbiased_where_counts_are_tiny():
    edges = [(0, 1)]
    joint = random_tree((2, 3), edges, seed=15)
    model, rng = exact_model(joint, edges), np.random.default_rng(2)
    counts = np.zeros((2, 3))

    for _ in range(8000):
        np.add.at(counts, tuple(model.sample(3, rng).T), 1)

    np.testing.assert_allclose(counts / 24_000, joint, atol=0.012)
    assert np.abs(joint.sum(0) * joint.sum(1)[:, None] - joint).max() > 2 * 0.012


def test_zero_one_and_very_few_records_can_be_sampled():
    joint = random_tree((3, 4, 3), [(0, 1), (1, 2)], seed=16)
    model = exact_model(joint, [(0, 1), (1, 2)])

    for num_records in (0, 1, 2):
        assert model.sample(num_records, np.random.default_rng(0)).shape == (num_records, 3)

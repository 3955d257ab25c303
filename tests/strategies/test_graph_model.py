# SPDX-License-Identifier: Apache-2.0
"""The estimator: junction trees, exact marginals, fits, records, and what is saved of them."""

import itertools
import math

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.schema import Column, Schema
from fedsynth.strategies.parts.cliques import junction_tree, tree_cells
from fedsynth.strategies.parts.descent import fit
from fedsynth.strategies.parts.graph import Graph
from fedsynth.strategies.parts.graph_model import GraphModel, sum_out
from fedsynth.strategies.parts.histograms import Grid, Measured
from fedsynth.strategies.parts.propagation import Propagation
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def problems(draw):
    """A small shape, sets of its columns, and a seed."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)))
    subsets = st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=3)
    cliques = draw(st.lists(subsets, max_size=7))
    return shape, [tuple(sorted(c)) for c in cliques], draw(st.integers(0, 2**31))


def product(shape, potentials):
    """All cells of the distribution that is a product of tables, by brute force."""
    total = np.zeros(shape)
    for scope, table in potentials.items():
        total = total + table.reshape([s if i in scope else 1 for i, s in enumerate(shape)])
    cells = np.exp(total)
    return cells / cells.sum(), math.log(cells.sum())


def onto(joint, columns):
    """Marginal of a full table, axes in the order given."""
    kept = sorted(columns)
    sums = joint.sum(axis=tuple(i for i in range(joint.ndim) if i not in columns))
    return sums.transpose([kept.index(c) for c in columns])


def model_of(shape, cliques, seed):
    """A model with random potentials, all cells of it, and the logarithm of its constant."""
    rng = np.random.default_rng(seed)
    scopes = tuple(sorted({*cliques, *((i,) for i in range(len(shape)))}))
    potentials = {scope: rng.normal(size=[shape[c] for c in scope]) for scope in scopes}
    work = Propagation(shape, junction_tree(scopes, shape), scopes)
    model, constant = work.calibrated(potentials)
    joint, wanted = product(shape, potentials)
    assert constant == pytest.approx(wanted, abs=1e-9)
    return model, joint


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_junction_tree_holds_every_clique_and_connects_every_column(problem):
    shape, cliques, _ = problem

    tree = junction_tree(cliques, shape)

    assert all(tree.holding(clique, shape) >= 0 for clique in cliques)
    assert {c for clique in tree.cliques for c in clique} == set(range(len(shape)))
    assert sum(math.prod(shape[c] for c in q) for q in tree.cliques) == tree_cells(cliques, shape)
    for column in range(len(shape)):
        entries = [
            i
            for i, clique in enumerate(tree.cliques)
            if column in clique
            and (tree.parents[i] < 0 or column not in tree.cliques[tree.parents[i]])
        ]
        assert len(entries) == 1


@settings(max_examples=60, deadline=None)
@given(problems())
def test_marginals_are_those_of_the_full_table(problem):
    model, joint = model_of(*problem)
    asked = [columns for k in (1, 2, 3) for columns in itertools.permutations(range(joint.ndim), k)]

    for columns, found in zip(asked, model.marginals(asked), strict=True):
        np.testing.assert_allclose(found, onto(joint, columns), atol=1e-12)


def test_a_marginal_over_a_column_twice_or_unknown_is_refused():
    model, _ = model_of((2, 3), [(0, 1)], 0)

    for columns in ((0, 0), (0, 2), (-1,)):
        with pytest.raises(ValueError, match="different columns"):
            model.marginal(columns)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_summing_out_an_axis_is_a_sum(axis):
    table = np.random.default_rng(0).random((3, 4, 5))

    np.testing.assert_allclose(sum_out(table, axis), table.sum(axis=axis))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_exact_tables_are_fit_exactly(problem):
    shape, cliques, seed = problem
    _, joint = model_of(shape, cliques, seed)
    measured = [
        Measured(tuple(Grid.whole(c, shape[c]) for c in clique), 1e4 * onto(joint, clique), 1.0)
        for clique in cliques
    ]

    model = fit(shape, measured, total=1e4, max_steps=2000, tolerance=1e-9)

    for clique in cliques:
        np.testing.assert_allclose(model.marginal(clique), onto(joint, clique), atol=1e-3)


def test_a_fit_is_the_least_squares_one_with_each_table_weighted_by_its_noise():
    one, two = np.array([600.0, 400.0]), np.array([300.0, 700.0])
    grid = Grid.whole(0, 2)

    model = fit((2,), [Measured((grid,), one, 10.0), Measured((grid,), two, 20.0)], total=1000.0)

    # weights 4 : 1, so (4 * 0.6 + 0.3) / 5
    np.testing.assert_allclose(model.marginal((0,)), [0.54, 0.46], atol=1e-4)


def test_among_equally_close_models_the_one_of_most_entropy_is_fit():
    pair = Measured((Grid.whole(0, 2), Grid.whole(1, 2)), np.array([[40.0, 10], [10, 40]]), 1.0)

    model = fit((2, 2, 3), [pair], total=100.0)

    np.testing.assert_allclose(model.marginal((0, 2)), np.full((2, 3), 1 / 6), atol=1e-9)


def test_tables_over_merged_cells_are_fit_too():
    merged = Grid(0, np.array([0, 0, 1]))
    other = Grid.whole(1, 2)
    table = np.array([[30.0, 10.0], [20.0, 40.0]])

    model = fit((3, 2), [Measured((other, merged), table.T, 1.0)], total=100.0)

    joint = model.marginal((0, 1))
    np.testing.assert_allclose([joint[:2].sum(axis=0), joint[2]], table / 100, atol=1e-4)
    np.testing.assert_allclose(joint[0], joint[1], atol=1e-9)


def test_what_constraints_forbid_has_no_probability_and_is_never_drawn():
    rng = np.random.default_rng(1)
    possible = rng.random((4, 3)) < 0.6
    possible[0, 0] = True
    noisy = Measured((Grid.whole(0, 3), Grid.whole(1, 4)), rng.random((3, 4)) * 100, 5.0)

    model = fit((3, 4, 2), [noisy], total=600.0, zeros=[((1, 0), possible)])
    codes = model.sample(5000, rng)

    assert (model.marginal((1, 0))[~possible] == 0).all()
    assert possible[codes[:, 1], codes[:, 0]].all()


def test_constraints_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="no combination"):
        fit((2, 2), [], zeros=[((0, 1), np.zeros((2, 2), dtype=np.bool_))])


def test_a_fit_that_begins_where_another_ended_is_there_at_once():
    rng = np.random.default_rng(2)
    grids = [Grid.whole(i, 6) for i in range(4)]
    tables = [
        Measured((grids[a], grids[b]), rng.random((6, 6)) * 100, 5.0)
        for a, b in ((0, 1), (1, 2), (2, 3), (0, 3))
    ]
    long = fit((6,) * 4, tables, total=1800.0, max_steps=500)

    cold = fit((6,) * 4, tables, total=1800.0, max_steps=3)
    warm = fit((6,) * 4, tables, total=1800.0, max_steps=3, start=long)

    def gap(model):
        return np.abs(model.marginal((0, 1)) - long.marginal((0, 1))).sum()

    assert gap(warm) < 0.05 * gap(cold)


def test_without_tables_the_model_is_uniform():
    np.testing.assert_allclose(fit((2, 3), []).marginal((0, 1)), np.full((2, 3), 1 / 6))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_records_follow_every_clique_within_a_count_or_so_a_cell(problem):
    model, _ = model_of(*problem)

    codes = model.sample(20_000, np.random.default_rng(3))

    shape = problem[0]
    for clique in model.tree.cliques:
        counts = np.zeros([shape[c] for c in clique])
        np.add.at(counts, tuple(codes[:, c] for c in clique), 1.0)
        gap = np.abs(counts / 20_000 - model.marginal(clique))
        assert gap.max() < 0.02


def test_records_that_ignore_the_model_would_be_noticed():
    model, _ = model_of((3, 3), [(0, 1)], 7)
    codes = model.sample(20_000, np.random.default_rng(3))
    codes[:, 1] = np.random.default_rng(4).permutation(codes[:, 1])

    counts = np.zeros((3, 3))
    np.add.at(counts, (codes[:, 0], codes[:, 1]), 1.0)

    assert np.abs(counts / 20_000 - model.marginal((0, 1))).max() > 0.02


def schema_of(*sizes):
    return Schema(
        tuple(
            Column(f"c{i}", "category", "public: made up", categories=tuple(map(str, range(size))))
            for i, size in enumerate(sizes)
        )
    )


def saved_graph() -> Graph:
    model, _ = model_of((3, 2, 4), [(0, 1), (1, 2)], 5)
    grids = (Grid(0, np.array([0, 1, 1, 2])), Grid.whole(1, 2), Grid.whole(2, 4))
    columns = (np.array([0.4, 0.1, 0.3, 0.2]), np.full(2, 0.5), np.full(4, 0.25))
    return Graph(schema_of(4, 2, 4), model, grids, columns)


def test_a_saved_graph_samples_the_same_records():
    graph = saved_graph()

    again = Graph.restore(graph.schema, graph.settings(), graph.tensors())

    one, two = (g.sample(500, np.random.default_rng(6)).codes for g in (graph, again))
    np.testing.assert_array_equal(one, two)


def test_cells_of_a_group_are_told_apart_by_the_columns_own_shares():
    codes = saved_graph().sample(40_000, np.random.default_rng(8)).codes

    inside = codes[np.isin(codes[:, 0], (1, 2)), 0]
    assert (inside == 1).mean() == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("beliefs", lambda a: a[1:]),
        ("beliefs", lambda a: -a),
        ("beliefs", lambda a: a * 2),
        ("groups", lambda a: a + 1),
        ("groups", lambda a: a[1:]),
        ("columns", lambda a: a * 0),
    ],
)
def test_a_saved_graph_that_was_changed_is_refused(name, change):
    graph = saved_graph()
    tensors = graph.tensors()

    with pytest.raises(ConfigError, match="saved graph"):
        Graph.restore(graph.schema, graph.settings(), {**tensors, name: change(tensors[name])})


@pytest.mark.parametrize(
    "broken",
    [
        {"cliques": [[0, 1]], "parents": [-1]},
        {"cliques": [[0, 1], [1, 2]], "parents": [-1, 1]},
        {"cliques": [[0, 1], [2, 1]], "parents": [-1, 0]},
        {"cliques": [[0, 1], [1, 3]], "parents": [-1, 0]},
        {"cliques": [], "parents": []},
    ],
)
def test_a_saved_graph_whose_tree_was_changed_is_refused(broken):
    graph = saved_graph()

    with pytest.raises(ConfigError, match="saved graph"):
        Graph.restore(graph.schema, broken, graph.tensors())


def test_beliefs_of_a_model_agree_on_what_they_share():
    model, _ = model_of((3, 4, 2, 3), [(0, 1), (1, 2), (2, 3), (0, 3)], 9)

    for i, parent in enumerate(model.tree.parents):
        shared = model.tree.separator(i)
        if parent >= 0 and shared:
            alone = [
                GraphModel(model.shape, model.tree, model.beliefs)
                .beliefs[j]
                .sum(
                    axis=tuple(
                        axis
                        for axis, column in enumerate(model.tree.cliques[j])
                        if column not in shared
                    )
                )
                for j in (i, parent)
            ]
            np.testing.assert_allclose(*alone, atol=1e-12)

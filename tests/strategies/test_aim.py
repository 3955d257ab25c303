# SPDX-License-Identifier: Apache-2.0
"""AIM and its family find the tables that matter, stay in their limits, and cost what they say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fedsynth.core.accounting import epsilon_of, single_event
from fedsynth.core.choice import best
from fedsynth.core.constraints import constraint_from_json
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.simulation.quality import total_variation
from fedsynth.strategies.absyn import Absyn
from fedsynth.strategies.aim import Aim
from fedsynth.strategies.flaim import Flaim
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.mwem import Mwem
from fedsynth.strategies.parts.cliques import tree_cells
from fedsynth.strategies.parts.descent import fit
from fedsynth.strategies.parts.histograms import Grid, Measured
from fedsynth.strategies.parts.possible import possible_groups
from fedsynth.strategies.parts.search import growing_steps
from fedsynth.strategies.parts.worst import Contest, Workload

FAMILY = [
    Aim(num_steps=3),
    Aim(num_steps=3, select="sums"),
    Mwem(num_steps=3),
    Absyn(num_steps=2, batch=2),
    Flaim(num_steps=3, batch=1),
    Flaim(num_steps=3, batch=1, augmented=True),
]
NAMES = ["aim", "aim by sums", "mwem", "absyn", "flaim", "augmented flaim"]
every = pytest.mark.parametrize("strategy", FAMILY, ids=NAMES)


def schema_of(*sizes):
    return Schema(
        tuple(
            Column(f"c{i}", "category", "public: made up", tuple(map(str, range(size))))
            for i, size in enumerate(sizes)
        )
    )


def shard_of(codes):
    users = np.arange(len(codes))
    return BoundedShard(Records(codes.astype(np.int32)), users, len(codes), 1)


def dependent(num_records=4000, seed=0):
    """Five columns of which only the second and the fourth depend on each other."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (num_records, 5))
    copied = rng.random(num_records) < 0.8
    codes[copied, 3] = codes[copied, 1]
    return schema_of(4, 4, 4, 4, 4), shard_of(codes)


def asked(strategy, schema, noise, shard=None):
    """Every query of a run; all rounds are void."""
    rounds = strategy.rounds(schema, noise, np.random.default_rng(0))
    queries = [next(rounds)]
    try:
        while True:
            queries.append(rounds.send(NoisySum.void(queries[-1])))
    except StopIteration as end:
        return queries, end.value


@every
def test_the_one_pair_that_depends_is_found(strategy):
    schema, shard = dependent()

    learned = direct_run(strategy, schema, shard, 0.2, rng=np.random.default_rng(0))

    pair = learned.model.marginal((1, 3))
    assert np.trace(pair) > 0.75  # 0.8 copied, and a fourth of the others equal by chance
    assert abs(np.trace(learned.model.marginal((0, 2))) - 0.25) < 0.05


@every
def test_without_noise_the_workload_is_better_than_by_independent_columns(strategy):
    schema, shard = dependent(1500, seed=3)
    rng = np.random.default_rng(1)

    def error(method):
        learned = non_private(method, schema, shard, rng)
        return total_variation(shard.records, learned.sample(1500, rng), schema, 2)

    assert error(strategy) < 0.75 * error(Independent())


@every
@pytest.mark.parametrize("noise", [0.3, 5.0])
def test_a_run_costs_what_one_sum_with_its_noise_costs(strategy, noise):
    schema, _ = dependent(10)

    whole = epsilon_of(strategy.event(schema, noise), 1e-6)

    assert whole == pytest.approx(epsilon_of(single_event(noise), 1e-6), rel=1e-6)


@every
@pytest.mark.parametrize("sizes", [(3,), (2, 3), (1, 1, 4)])
def test_few_columns_and_void_rounds_end_in_a_synthesizer(strategy, sizes):
    schema = schema_of(*sizes)

    _, learned = asked(strategy, schema, 1.0)

    assert learned.sample(7, np.random.default_rng(0)).codes.shape == (7, len(sizes))


@every
def test_nobody_at_all_ends_in_a_synthesizer(strategy):
    schema, shard = dependent(20)

    learned = direct_run(
        strategy, schema, shard.only(np.zeros(20, dtype=bool)), 1.0, rng=np.random.default_rng(0)
    )

    assert len(learned.sample(5, np.random.default_rng(0))) == 5


def test_by_sums_nothing_is_chosen_in_private():
    schema, _ = dependent(10)
    exact, _ = asked(Aim(num_steps=3), schema, 1.0)
    sums, _ = asked(Aim(num_steps=3, select="sums"), schema, 1.0)

    assert sum(query.choice is not None for query in exact) == 3
    assert not any(query.choice is not None for query in sums)


@pytest.mark.parametrize(
    "strategy",
    [
        Aim(num_steps=8, max_model_mb=0.002),
        Absyn(num_steps=3, batch=4, max_model_mb=0.002),
        Mwem(num_steps=8, max_model_mb=0.002),
        Flaim(num_steps=4, batch=3, max_model_mb=0.002),
    ],
    ids=["aim", "absyn", "mwem", "flaim"],
)
def test_the_model_stays_within_its_limit(strategy):
    rng = np.random.default_rng(0)
    common = rng.integers(0, 6, 3000)
    codes = np.where(rng.random((3000, 5)) < 0.7, common[:, None], rng.integers(0, 6, (3000, 5)))

    learned = direct_run(strategy, schema_of(*[6] * 5), shard_of(codes), 0.1, rng=rng)

    cells = sum(belief.size for belief in learned.model.beliefs)
    assert 36 < cells <= 0.002e6 / 8  # some pairs, and no more than fit


def test_weights_count_the_columns_shared_with_each_table_of_the_workload():
    workload = Workload.all_ways((2, 3, 4), 2)

    # a pair shares two columns with itself and one with each of two others; a column one with two
    by_clique = dict(zip(workload.cliques, workload.weights.tolist(), strict=True))
    assert by_clique == {(0,): 0.5, (1,): 0.5, (2,): 0.5, (0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0}
    assert len(Workload.all_ways((2, 3), 3).cliques) == 3


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_weights_equal_those_counted_one_by_one(ways):
    workload = Workload.all_ways((2,) * 5, ways)
    tables = [clique for clique in workload.cliques if len(clique) == ways]

    counted = np.array([sum(len(set(c) & set(t)) for t in tables) for c in workload.cliques])

    assert workload.weights == pytest.approx(counted / counted.max())


def test_only_tables_that_the_model_can_hold_may_be_chosen():
    workload = Workload.all_ways((10, 10, 2), 2)
    measured = [(0,), (1,), (2,)]

    assert [workload.cliques[i] for i in workload.within(measured, 32)] == [
        *measured,
        (0, 2),
        (1, 2),
    ]
    assert len(workload.within(measured, 1000)) == 6
    assert [workload.cliques[i] for i in workload.within([(0, 1), (2,)], 1)] == [*measured, (0, 1)]
    assert tree_cells([(0, 1), (2,)], (10, 10, 2)) == 102


def test_scores_are_distances_less_what_noise_brings_and_users_are_bounded_in_records():
    grids = [Grid.whole(i, 2) for i in range(2)]
    half = Measured((grids[0],), np.array([5.0, 5.0]), 1.0)
    model = fit((2, 2), [half])
    contest = Contest(grids, [(0,), (0, 1)], np.array([1.0, 2.0]), np.array([0.0, 3.0]))
    query = contest.query("worst", model, 10.0, noise_multiplier=1.0, max_norm=2.0)
    codes = np.array([[0, 0]] * 6)
    owner = np.array([0, 0, 0, 0, 1, 2])
    shard = BoundedShard(Records(codes.astype(np.int32)), owner, 3, 4)

    total = clipped_sum(Aim().answer(query, shard, np.random.default_rng(0)), query)

    assert query.choice.estimates.tolist() == pytest.approx([5, 5, 2.5, 2.5, 2.5, 2.5])
    # the first user's four records count as two, so there are four
    assert (total * Lattice.of(query).unit).tolist() == pytest.approx([4, 0, 4, 0, 0, 0], abs=1e-4)
    # distances 1 + 5 and 1.5 + 7.5, worth 6 and 2 * (9 - 3)
    assert best(total, query).tolist() == [0, 1]


def test_a_correction_for_how_clients_differ_changes_what_is_chosen():
    # a client that differs in a column differs in each of its pairs, whatever else is wrong
    grids = [Grid.whole(i, 2) for i in range(4)]
    even = [Measured((grid,), np.array([50.0, 50.0]), 1.0) for grid in grids]
    model = fit((2, 2, 2, 2), even)
    pairs = [(0, 1), (2, 3)]
    contest = Contest(grids, pairs, np.ones(2), np.zeros(2))
    rng = np.random.default_rng(0)
    codes = np.zeros((1000, 4))
    codes[:, 1] = rng.integers(0, 2, 1000)  # column 0 holds one value here: a distance of 1000
    codes[:, 2] = rng.integers(0, 2, 1000)
    codes[:, 3] = np.where(rng.random(1000) < 0.85, codes[:, 2], 1 - codes[:, 2])  # about 700

    def chosen(**more):
        query = contest.query("worst", model, 1000.0, noise_multiplier=1, max_norm=1.0, **more)
        total = clipped_sum(Flaim().answer(query, shard_of(codes), rng), query)
        return best(total, query).tolist()

    corrected = {
        "beside": [(0,), (1,), (2,), (3,)],
        "against": np.array([[2, 3], [4, 5]]),
    }
    assert chosen() == [1, 0]
    assert chosen(**corrected) == [0, 1]


def test_steps_grow_and_spend_what_is_left():
    steps = growing_steps(
        0.5, num_steps=4, growth=2.0, spent=0.25, choice_share=0.2, max_model_mb=8e-6 * 100
    )

    budgets = [1 / step.choice_noise**2 + 1 / step.table_noise**2 for step in steps]
    assert sum(budgets) == pytest.approx(0.75 * 4)
    assert np.diff(np.log2(budgets)) == pytest.approx(1.0)
    assert [step.max_cells for step in steps] == pytest.approx([30, 40, 60, 100])
    assert (1 / steps[0].choice_noise ** 2) / budgets[0] == pytest.approx(0.2)


def test_two_choices_of_a_batch_are_different_tables():
    schema, _ = dependent(10)
    queries, _ = asked(Absyn(num_steps=1, batch=3), schema, 1.0)

    (choice,) = [query.choice for query in queries if query.choice is not None]
    assert choice.count == 3
    assert len(choice.weights) == 15


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Aim, {"ways": 4}),
        (Aim, {"num_steps": 0}),
        (Aim, {"growth": 0.0}),
        (Aim, {"choice_share": 1.0}),
        (Aim, {"column_share": 0.0}),
        (Aim, {"max_model_mb": 0.0}),
        (Aim, {"max_model_mb": math.inf}),
        (Aim, {"select": "noise"}),
        (Aim, {"select": "sums", "column_share": 0.6, "pair_share": 0.4}),
        (Aim, {"pair_cells": 1}),
        (Mwem, {"num_steps": 0}),
        (Mwem, {"total_share": 1.0}),
        (Absyn, {"batch": 0}),
        (Flaim, {"batch": 0}),
        (Flaim, {"growth": -1.0}),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, settings):
    with pytest.raises(ConfigError):
        kind(**settings)


def test_images_are_refused():
    from fedsynth.simulation.check import small_images

    for strategy in FAMILY:
        with pytest.raises(ConfigError, match="image"):
            strategy.event(small_images(), 1.0)


def test_every_table_asked_for_is_one_that_a_user_may_light():
    schema, shard = dependent(30)
    for strategy in FAMILY:
        for query in asked(strategy, schema, 1.0)[0]:
            assert isinstance(query, Query)
            answer = strategy.answer(query, shard, np.random.default_rng(0))
            assert 0 <= answer.indices.min() <= answer.indices.max() < query.dim


def constrained():
    """Five columns, two of which the schema forbids a combination of that records have."""
    schema, shard = dependent()
    rule = constraint_from_json({"forbid": {"c0": "0", "c2": "1"}}, 1)
    return replace(schema, constraints=(rule,)), shard


@every
def test_constraints_are_held_by_the_model_itself(strategy):
    schema, shard = constrained()

    learned = direct_run(strategy, schema, shard, 0.2, rng=np.random.default_rng(0))

    pair = learned.model.marginal((0, 2))
    assert pair[0, 1] == 0
    assert np.delete(pair.ravel(), 1).min() > 0


@pytest.mark.parametrize(("max_cells", "is_held"), [(60, True), (50, False)])
def test_constraints_take_up_at_most_half_of_the_limit_on_the_model(max_cells, is_held):
    schema, shard = constrained()  # a model of its constraint alone has 16 + 3 x 4 cells
    strategy = Aim(num_steps=4, max_model_mb=8e-6 * max_cells)

    learned = direct_run(strategy, schema, shard, 0.2, rng=np.random.default_rng(0))

    assert (learned.model.marginal((0, 2))[0, 1] == 0) == is_held
    assert tree_cells(learned.model.tree.cliques, schema.shape) <= max_cells
    pair = learned.model.marginal((1, 3))  # the one that depends still finds room
    assert np.abs(pair - np.outer(pair.sum(1), pair.sum(0))).sum() > 0.5
    codes = learned.sample(1000, np.random.default_rng(1)).codes
    assert schema.rules.valid(codes).all()


def test_groups_of_cells_are_possible_if_any_of_their_cells_are():
    schema, _ = constrained()
    grids = [Grid.whole(i, 4) for i in range(5)]
    grids[2] = Grid(2, np.array([1, 0, 2, 2]))
    ((clique, alone),) = possible_groups(schema, grids)
    grids[2] = Grid(2, np.array([0, 1, 1, 2]))
    ((_, merged),) = possible_groups(schema, grids)

    assert clique == (0, 2)
    np.testing.assert_array_equal(np.argwhere(~alone), [[0, 0]])
    assert merged.shape == (4, 3)
    assert merged.all()

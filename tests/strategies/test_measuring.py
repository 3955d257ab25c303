# SPDX-License-Identifier: Apache-2.0
"""Users with many records: whom a strategy counts, and the bound that it measures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fedsynth.client.respond import REFUSED
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.check import check_strategy, made_up, small_table
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.parts.histograms import Grid, Histograms
from fedsynth.strategies.parts.measuring import (
    NORM_EDGES,
    best_norm,
    norm_cells,
    norm_query,
    norm_tables,
    quantile_norm,
)
from fedsynth.strategies.registry import build_strategy

STRATEGIES = ("independent", "mst")
TWO = Schema(
    (
        Column("few", "category", "public", tuple("ab")),
        Column("many", "category", "public", tuple("cdefg")),
    )
)


def shard_of(users):
    """A shard of users, each a list of records."""
    counts = [len(records) for records in users]
    codes = np.array([record for records in users for record in records], dtype=np.int32)
    index = np.repeat(np.arange(len(users)), counts).astype(np.int64)
    return BoundedShard(Records(codes.reshape(-1, 2)), index, len(users), max([1, *counts]))


def cells_lit(shard, schema=TWO, ways=2):
    query = norm_query(norm_tables(schema, ways), noise_multiplier=1.0)
    total = clipped_sum(norm_cells(query, shard), query) * Lattice.of(query).unit
    return {int(cell): total[cell] for cell in np.flatnonzero(total)}


def histogram(counts, stddev=1.0):
    vector = np.zeros(len(NORM_EDGES))
    vector[list(counts)] = list(counts.values())
    return NoisySum(vector, stddev, 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_norms_are_told_only_where_they_are_measured(name):
    query = norm_query(norm_tables(TWO, 2), noise_multiplier=1.0)
    shard, rng = shard_of([[(0, 1)]]), np.random.default_rng(0)

    assert build_strategy(name, {"max_norm": "auto"}).answer(query, shard, rng).num_users == 1
    with pytest.raises(REFUSED):
        build_strategy(name, {}).answer(query, shard, rng)


def test_no_groups_let_a_users_norm_count_for_another_user():
    query = norm_query(norm_tables(TWO, 2), noise_multiplier=1.0)
    groups = query.inputs["grid_groups"].copy()
    groups[1] = 10**9
    hostile = replace(query, inputs={**query.inputs, "grid_groups": groups})

    with pytest.raises(ConfigError, match="contradict"):
        norm_cells(hostile, shard_of([[(0, 1)], [(1, 1)]]))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"weight": "user"},
        {"max_norm": "auto"},
        {"norm_quantile": 0.9, "norm_share": 0.01},
        {"max_norm": 3.0},
    ],
)
def test_every_way_to_bound_a_user_keeps_all_a_strategy_owes(name, settings):
    findings = check_strategy(build_strategy(name, settings), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_norm": 0.0}, "above 0"),
        ({"max_norm": math.inf}, "above 0"),
        ({"max_norm": "best"}, "max_norm"),
        ({"norm_quantile": 1.0}, "between 0 and 1"),
        ({"norm_quantile": math.nan}, "between 0 and 1"),
        ({"norm_share": 0.0}, "norm_share"),
        ({"weight": "household"}, "weight"),
        ({"max_norm": 2.0, "norm_quantile": 0.9}, "keep one of them"),
        ({"max_norm": "auto", "norm_quantile": 0.9}, "keep one of them"),
        ({"max_norm": 2.0, "weight": "user"}, "nothing to clip"),
        ({"max_norm": "auto", "weight": "user"}, "nothing to clip"),
        ({"norm_quantile": 0.5, "weight": "user"}, "nothing to clip"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        build_strategy("mst", settings)


@pytest.mark.parametrize("settings", [{"max_norm": "auto"}, {"norm_quantile": 0.5}])
def test_measuring_norms_is_paid_for_within_the_same_budget(settings):
    plain = build_strategy("mst", {}).event(small_table(), 2.0)
    measuring = build_strategy("mst", settings).event(small_table(), 2.0)

    assert accounting.mu_of(measuring) == pytest.approx(accounting.mu_of(plain), rel=1e-12)
    first = 2.0 / math.sqrt(0.02)
    assert any(noise == pytest.approx(first) for noise, *_ in accounting.leaves(measuring))


def test_a_user_lights_the_cell_of_the_norm_worked_out_by_hand():
    one = [(0, 0)]
    equal = [(0, 0)] * 4  # norm 4: cell 8 of the edges 2^(cell / 4)
    apart = [(0, 0), (1, 1)]  # no pair in common: norm sqrt(2)

    assert cells_lit(shard_of([one])) == {0: 1.0}
    assert cells_lit(shard_of([equal])) == {8: 1.0}
    assert cells_lit(shard_of([apart])) == {2: 1.0}
    assert cells_lit(shard_of([one, equal, apart, one])) == {0: 2.0, 2: 1.0, 8: 1.0}


def test_records_that_share_a_column_are_alike_in_columns_and_apart_in_pairs():
    user = [[(0, 0), (0, 1)]]

    assert cells_lit(shard_of(user), ways=2) == {2: 1.0}
    heights = norm_tables(TWO, 1).heights ** 2  # of the columns: squares 4 and 1 + 1
    norm = math.sqrt((4 * heights[0] + 2 * heights[1]) / heights.sum())
    assert cells_lit(shard_of(user), ways=1) == {int(np.searchsorted(NORM_EDGES, norm)): 1.0}


def test_a_norm_beyond_the_last_edge_lights_the_last_cell():
    assert cells_lit(shard_of([[(0, 0)] * 3000])) == {len(NORM_EDGES) - 1: 1.0}


def test_a_quantile_is_the_edge_that_enough_users_stay_below():
    noisy = histogram({0: 9000.0, 4: 800.0, 8: 200.0})

    assert quantile_norm(noisy, 0.89) == 1.0
    assert quantile_norm(noisy, 0.95) == 2.0
    assert quantile_norm(noisy, 0.995) == 4.0


@pytest.mark.parametrize("noisy", [histogram({}), histogram({0: 5.0}, 1e3)])
def test_norms_that_are_lost_in_noise_leave_the_bound_at_one_record(noisy):
    assert quantile_norm(noisy, 0.9) == 1.0
    assert best_norm(noisy, norm_tables(TWO, 2), noise_multiplier=1.0) == 1.0


def test_noise_in_cells_that_nobody_lights_does_not_raise_the_bound():
    rng = np.random.default_rng(0)
    tables = norm_tables(small_table(), 2)
    for _ in range(50):
        noisy = histogram({0: 50_000.0, 4: 9000.0}, 100.0)
        noisy = NoisySum(noisy.vector + rng.normal(0, 100.0, len(NORM_EDGES)), 100.0, 1)

        assert quantile_norm(noisy, 0.999) <= 2.0
        assert best_norm(noisy, tables, noise_multiplier=1e-3) <= 2.0


def test_the_best_bound_falls_as_noise_rises_and_rises_as_users_hold_more():
    tables = norm_tables(small_table(), 2)
    some = histogram({0: 50_000.0, 4: 9000.0, 8: 2000.0, 12: 300.0})
    more = histogram({0: 20_000.0, 4: 30_000.0, 8: 9000.0, 12: 3000.0})

    bounds = [best_norm(some, tables, noise_multiplier=z) for z in (0.1, 10.0, 100.0, 1e4)]

    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == 8.0
    assert bounds[-1] == 1.0
    assert best_norm(more, tables, noise_multiplier=30.0) >= best_norm(
        some, tables, noise_multiplier=30.0
    )


def test_the_measured_bound_is_the_clip_of_every_query_that_follows():
    strategy = build_strategy("mst", {"max_norm": "auto"})
    declared = build_strategy("mst", {"max_norm": 4.0})
    rounds = strategy.rounds(TWO, 1.0, np.random.default_rng(0))
    plain = declared.rounds(TWO, 1.0, np.random.default_rng(0))

    assert next(rounds).name == "norms"
    first = rounds.send(histogram({0: 5e8, 8: 5e8}, 1e-3))

    assert first.clip == next(plain).clip
    assert first.noise_multiplier == pytest.approx(
        accounting.split(1.0, (0.02, 0.98 * 0.4, 0.98 * 0.6))[1]
    )


def test_user_weights_describe_a_random_user_and_record_weights_a_random_record():
    heavy, light = [[(0, 0)] * 9] * 500, [[(1, 4)]] * 1500
    shard, rng = shard_of(heavy + light), np.random.default_rng(0)

    by_user = non_private(build_strategy("independent", {"weight": "user"}), TWO, shard, rng)
    by_record = non_private(build_strategy("independent", {"max_norm": 9.0}), TWO, shard, rng)
    clipped = non_private(build_strategy("independent", {"max_norm": 3.0}), TWO, shard, rng)

    assert by_user.probs[0] == pytest.approx([0.25, 0.75], abs=1e-6)
    assert by_record.probs[0] == pytest.approx([0.75, 0.25], abs=1e-6)
    assert clipped.probs[0] == pytest.approx([0.5, 0.5], abs=1e-4)


def test_under_user_weights_a_user_of_many_records_moves_no_more_than_one_of_one():
    strategy = build_strategy("mst", {"weight": "user"})
    query = Histograms.balanced([(Grid.whole(0, 2), Grid.whole(1, 5))]).query(
        "tree", noise_multiplier=1.0, max_norm=1.0
    )
    rng = np.random.default_rng(0)

    def sum_of(user):
        return clipped_sum(strategy.answer(query, shard_of([user]), rng), query)

    many = sum_of([(0, 0)] * 30 + [(1, 1)] * 10) * Lattice.of(query).unit

    assert np.array_equal(sum_of([(0, 0)]), sum_of([(0, 0)] * 64))  # a clip would shrink it
    assert many[:7] == pytest.approx([0.75, 0, 0, 0, 0, 0, 0.25], abs=1e-6)


def test_bounds_that_are_measured_err_less_than_those_of_one_record():
    rng = np.random.default_rng(3)
    users = [[(1, 3)] * 6 if rng.random() < 0.3 else [(0, 0)] for _ in range(4000)]
    shard = shard_of(users)
    truth = np.bincount(shard.records.codes[:, 0], minlength=2) / len(shard.records)

    def error(settings):
        learned = direct_run(
            build_strategy("mst", settings), TWO, shard, 2.0, rng=np.random.default_rng(0)
        )
        return abs(learned.model.marginal((0,)) - truth).sum() / 2

    assert error({"max_norm": "auto"}) < 0.05 < 0.2 < error({})


def test_settings_of_a_measured_bound_survive_as_json():
    text = json.dumps({"max_norm": "auto", "norm_share": 0.01, "weight": "record"})

    assert build_strategy("independent", json.loads(text)).max_norm == "auto"


def test_wide_columns_and_many_pairs_are_told_by_a_few_tables():
    wide = Schema(
        tuple(
            Column(f"c{i}", "integer", "public", bounds=(0, 9999), num_bins=10_000)
            for i in range(40)
        )
    )
    tables = norm_tables(wide, 2)

    assert len(tables.members) == 200
    assert norm_query(tables, noise_multiplier=1.0).dim == len(NORM_EDGES)
    everyone = made_up(wide, [1, 7, 2], seed=0)
    query = norm_query(tables, noise_multiplier=1.0)
    assert norm_cells(query, everyone).num_users == 3

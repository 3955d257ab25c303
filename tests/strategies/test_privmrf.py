# SPDX-License-Identifier: Apache-2.0
"""PrivMRF: its rounds, the limit of its model, what it links, what it learns, void rounds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core.accounting import calibrate, epsilon_of, single_event
from fedsynth.core.constraints import constraint_from_json
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum, real_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.check import check_strategy, small_images, small_table
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.simulation.quality import total_variation
from fedsynth.strategies.parts.cliques import tree_cells
from fedsynth.strategies.privmrf import PrivMrf
from fedsynth.strategies.registry import build_strategy

PUBLIC = "public: made up"
TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "tabular"


def schema_of(*sizes):
    names = [f"c{i}" for i in range(len(sizes))]
    return Schema(
        tuple(
            Column(name, "category", PUBLIC, tuple(map(str, range(size))))
            for name, size in zip(names, sizes, strict=True)
        )
    )


def shard_of(codes):
    codes = np.asarray(codes, dtype=np.int32)
    return BoundedShard(Records(codes), np.arange(len(codes)), len(codes), 1)


def looped(num_records, num_columns=5, cells=3, seed=0):
    """Columns in a ring, each close to both of its neighbors: no tree tells all of them."""
    rng = np.random.default_rng(seed)
    codes = np.zeros((num_records, num_columns), dtype=np.int64)
    codes[:, 0] = rng.integers(0, cells, num_records)
    for i in range(1, num_columns):
        own = rng.integers(0, cells, num_records)
        codes[:, i] = np.where(rng.random(num_records) < 0.5, codes[:, i - 1], own)
    back = rng.random(num_records) < 0.5
    codes[back, -1] = codes[back, 0]
    return shard_of(codes)


def asked(strategy, schema, shard, noise_multiplier=1e-9, void=()):
    """All queries of a run with exact sums, and what it learned; the rounds in `void` are lost."""
    rounds = strategy.rounds(schema, noise_multiplier, np.random.default_rng(0))
    query, queries = next(rounds), []
    while True:
        sent = NoisySum.void(query)
        if len(queries) not in void:
            total = clipped_sum(strategy.answer(query, shard, np.random.default_rng(0)), query)
            sent = real_sum(total, stddev=1e-9, lattice=Lattice.of(query), num_clients=1)
        queries.append(query)
        try:
            query = rounds.send(sent)
        except StopIteration as end:
            return queries, end.value


def distance(shard, schema, learned, order=2):
    records = learned.sample(len(shard.records), np.random.default_rng(0))
    return total_variation(shard.records, records, schema, order)


def model_cells(learned):
    return tree_cells(learned.model.tree.cliques, learned.model.shape)


def test_a_run_costs_one_gaussian():
    for strategy in (PrivMrf(), PrivMrf(num_refinements=0), PrivMrf(num_refinements=3)):
        event = strategy.event(schema_of(2, 3), 1.3)
        assert epsilon_of(event, 1e-6) == pytest.approx(epsilon_of(single_event(1.3), 1e-6))


def test_rounds_are_columns_pairs_cliques_and_refinements():
    names = [
        q.name for q in asked(PrivMrf(num_refinements=2), schema_of(3, 3, 3), looped(500, 3))[0]
    ]

    assert names == ["columns", "pairs", "cliques", "refine", "refine"]


def test_a_ring_is_learned_and_no_tree_learns_it():
    schema, shard = schema_of(*[3] * 5), looped(20_000)

    ours = non_private(PrivMrf(), schema, shard, np.random.default_rng(0))
    tree = non_private(build_strategy("mst", {}), schema, shard, np.random.default_rng(0))

    assert distance(shard, schema, ours) < 0.005
    assert distance(shard, schema, tree) > 0.02


@pytest.mark.parametrize("max_model_mb", [0.0002, 0.0008, 0.01])
def test_the_model_never_passes_its_limit(max_model_mb):
    schema, shard = schema_of(*[4] * 6), looped(20_000, 6, 4)
    strategy = PrivMrf(max_model_mb=max_model_mb)
    limit = max_model_mb * 1e6 / 8

    for noise_multiplier in (1e-9, 3.0, 100.0):
        rng = np.random.default_rng(0)
        learned = direct_run(strategy, schema, shard, noise_multiplier, rng=rng)
        assert model_cells(learned) <= max(limit, 6 * 4)


def test_a_smaller_limit_is_felt():
    schema, shard = schema_of(*[4] * 6), looped(20_000, 6, 4)

    cells = [
        model_cells(non_private(PrivMrf(max_model_mb=mb), schema, shard, np.random.default_rng(0)))
        for mb in (0.0004, 0.01)
    ]

    assert 24 <= cells[0] <= 50 < cells[1]


def test_tables_are_theta_useful():
    rng = np.random.default_rng(1)
    first = rng.integers(0, 40, 20_000)
    codes = np.column_stack([first, (first + rng.integers(0, 8, 20_000)) % 40])
    schema, shard = schema_of(40, 40), shard_of(codes)

    def cells_at(theta, noise):
        strategy = PrivMrf(theta=theta)
        rounds = strategy.rounds(schema, noise, np.random.default_rng(0))
        query = next(rounds)
        while query.name != "cliques":
            total = clipped_sum(strategy.answer(query, shard, np.random.default_rng(0)), query)
            sent = real_sum(
                total,
                stddev=query.noise_multiplier * query.clip,
                lattice=Lattice.of(query),
                num_clients=1,
            )
            query = rounds.send(sent)
        return query.dim, 20_000 / (theta * query.noise_multiplier)

    for theta, noise in [(1.0, 30.0), (6.0, 10.0), (6.0, 30.0)]:
        dim, most = cells_at(theta, noise)
        assert 16 <= dim <= most
    assert cells_at(1.0, 0.1)[0] == 1600


def test_columns_that_know_nothing_of_each_other_are_not_linked():
    rng = np.random.default_rng(2)
    schema, shard = schema_of(4, 4, 4, 4), shard_of(rng.integers(0, 4, (5000, 4)))

    learned = direct_run(PrivMrf(), schema, shard, 20.0, rng=np.random.default_rng(0))

    assert all(len(clique) == 1 for clique in learned.model.tree.cliques)


def test_three_columns_that_belong_together_are_measured_as_one_table():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, (2, 20_000))
    c = np.where(rng.random(20_000) < 0.9, a & b, 1 - (a & b))
    schema, shard = schema_of(2, 2, 2), shard_of(np.column_stack([a, a ^ (b & c), c]))

    queries, learned = asked(PrivMrf(), schema, shard)

    assert any(
        (q.inputs["members"] >= 0).all(axis=1).any()
        for q in queries[2:]
        if q.inputs["members"].shape[1] == 3
    )
    assert distance(shard, schema, learned, order=3) < 0.005


@pytest.mark.parametrize("void", [(0,), (1,), (2,), (3,), (0, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_void_rounds_are_gone_on_without(void):
    schema, shard = schema_of(*[3] * 5), looped(5000)

    _, learned = asked(PrivMrf(), schema, shard, void=void)

    codes = learned.sample(1000, np.random.default_rng(0)).codes
    assert codes.shape == (1000, 5)
    assert (codes < 3).all()
    if void in ((1,), (2,), (3,)):  # single columns are known still
        assert distance(shard, schema, learned, order=1) < 0.01


def test_a_single_column_is_one_sum():
    queries, learned = asked(PrivMrf(), schema_of(5), shard_of(np.arange(500)[:, None] % 5))

    assert [q.name for q in queries] == ["columns"]
    assert distance(shard_of(np.arange(500)[:, None] % 5), schema_of(5), learned, order=1) < 1e-9


def test_pure_noise_gives_columns_without_links():
    learned = prior(PrivMrf(), schema_of(3, 4, 5), 5.0, np.random.default_rng(0))

    assert len(learned.sample(100, np.random.default_rng(0))) == 100


def test_constraints_are_in_the_model_and_kept_by_samples():
    rule = constraint_from_json({"forbid": {"c0": "0", "c1": "0"}}, 1)
    schema = replace(schema_of(*[3] * 5), constraints=(rule,))
    shard = looped(5000)

    learned = direct_run(PrivMrf(), schema, shard, 1.0, rng=np.random.default_rng(0))

    assert learned.model.marginal((0, 1))[0, 0] == 0
    assert not (learned.sample(5000, np.random.default_rng(0)).codes[:, :2] == 0).all(axis=1).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"column_share": 0.0},
        {"graph_share": 0.5, "refine_share": 0.5},
        {"num_refinements": -1},
        {"select_cells": 1},
        {"max_groups": 1},
        {"clique_size": 1},
        {"theta": 0.0},
        {"max_model_mb": 0.0},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError):
        build_strategy("privmrf", settings)


def test_images_are_refused():
    with pytest.raises(ConfigError, match="image"):
        PrivMrf().event(small_images(), 1.0)


@pytest.mark.parametrize(
    "settings", [{"num_refinements": 0}, {"weight": "user"}, {"max_norm": "auto"}]
)
def test_other_settings_keep_all_a_strategy_owes(settings):
    findings = check_strategy(build_strategy("privmrf", settings), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "two", "three"), [(1.0, 0.0384, 0.0841), (10.0, 0.0214, 0.0609)]
)
def test_coded_adult_is_learned_better_than_by_swift(epsilon, two, three):
    if not (TABLES / "adult_coded.parquet").exists():
        pytest.skip("coded Adult is not on this machine")
    import pyarrow.parquet as pq

    table = pq.read_table(TABLES / "adult_coded.parquet")
    sizes = json.loads((TABLES / "adult_coded_domain.json").read_text(encoding="utf-8"))
    codes = np.column_stack([table[name].to_numpy() for name in sizes])
    numbers = ("age", "fnlwgt", "capital-gain", "capital-loss", "hours-per-week")
    schema = Schema(
        tuple(
            Column(name, "integer", PUBLIC, bounds=(0.0, size - 1.0), num_bins=size)
            if name in numbers
            else Column(name, "category", PUBLIC, tuple(map(str, range(size))))
            for name, size in sizes.items()
        )
    )
    shard, strategy = shard_of(codes), PrivMrf()
    dial = calibrate(lambda noise: strategy.event(schema, noise), Budget(epsilon, 1e-9))

    learned = direct_run(strategy, schema, shard, dial, rng=np.random.default_rng(0))

    records = learned.sample(len(codes), np.random.default_rng(1))
    assert total_variation(shard.records, records, schema, 2) < two
    assert total_variation(shard.records, records, schema, 3) < three
    assert model_cells(learned) <= strategy.max_model_mb * 1e6 / 8

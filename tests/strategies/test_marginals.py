# SPDX-License-Identifier: Apache-2.0
"""The default for tables: what it asks, what it finds, when it stops, and its figures on Adult."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core.accounting import calibrate, leaves, mu_of
from fedsynth.core.errors import ConfigError
from fedsynth.core.leaf import Leaf
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.direct import direct_run, prior
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.marginals import Marginals
from fedsynth.strategies.parts.cliques import tree_cells
from fedsynth.strategies.parts.histograms import Grid, Measured
from fedsynth.strategies.parts.pairs import denoised_pairs, pooled
from fedsynth.strategies.parts.worthwhile import worthwhile

TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "tabular"


def schema_of(*sizes, constraints=()):
    return Schema(
        tuple(
            Column(f"c{i}", "category", "public: made up", categories=tuple(map(str, range(size))))
            for i, size in enumerate(sizes)
        ),
        constraints=constraints,
    )


def shard_of(codes):
    codes = np.asarray(codes, dtype=np.int32)
    return BoundedShard(Records(codes), np.arange(len(codes)), len(codes), 1)


def ring(num_records, num_columns, size, seed=0):
    """Records whose columns follow their neighbors in a ring: no tree holds all of it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, size, (num_records, num_columns))
    for _ in range(4):
        for i in range(num_columns):
            copies = rng.random(num_records) < 0.5
            codes[copies, i] = codes[copies, (i + 1) % num_columns]
    return shard_of(codes)


def run_with_exact_sums(strategy, schema, shard, noise_multiplier, void=()):
    """All queries of a run without noise, in which the rounds in `void` are lost."""
    rng, asked = np.random.default_rng(0), []
    rounds = strategy.rounds(schema, noise_multiplier, rng)
    query = next(rounds)
    while True:
        asked.append(query)
        if len(asked) in void:
            answer = NoisySum.void(query)
        else:
            total = clipped_sum(strategy.answer(query, shard, rng), query)
            exact = total * Lattice.of(query).unit
            answer = NoisySum(exact, query.noise_multiplier * query.clip, 1)
        try:
            query = rounds.send(answer)
        except StopIteration as end:
            return asked, end.value


def two_way(real, codes, shape):
    """Mean total variation distance of all pairs of columns."""
    gaps = []
    for a, b in itertools.combinations(range(len(shape)), 2):
        tables = [
            np.bincount(c[:, a] * shape[b] + c[:, b], minlength=shape[a] * shape[b]) / len(c)
            for c in (real.astype(np.int64), codes.astype(np.int64))
        ]
        gaps.append(np.abs(tables[0] - tables[1]).sum() / 2)
    return float(np.mean(gaps))


def error_of(strategy, schema, shard, noise_multiplier):
    """Two-way distance of a run's sample from its records."""
    rng = np.random.default_rng(0)
    learned = direct_run(strategy, schema, shard, noise_multiplier, rng=rng)
    codes = learned.sample(shard.num_users, np.random.default_rng(1)).codes
    return two_way(shard.records.codes, codes, schema.shape)


def test_three_sums_are_asked_and_cost_what_the_event_says():
    schema, strategy = schema_of(5, 4, 6, 3), Marginals()

    asked, _ = run_with_exact_sums(strategy, schema, ring(2000, 4, 3), 2.0)

    assert [query.name for query in asked] == ["columns", "pairs", "tables"]
    event = strategy.event(schema, 2.0)
    assert leaves(event) == Counter(Leaf(q.noise_multiplier) for q in asked)
    assert mu_of(event) == pytest.approx(1 / 2.0)


def test_one_column_takes_one_sum_with_the_whole_budget():
    asked, learned = run_with_exact_sums(Marginals(), schema_of(5), ring(500, 1, 5), 2.0)

    assert [query.noise_multiplier for query in asked] == [2.0]
    assert learned.sample(10, np.random.default_rng(0)).codes.shape == (10, 1)


def test_a_ring_is_learned_far_better_than_by_independent_columns_or_a_prior():
    schema, shard = schema_of(*[4] * 6), ring(20_000, 6, 4)

    error = error_of(Marginals(), schema, shard, 2.0)

    assert error < 0.1 * error_of(Independent(), schema, shard, 2.0)
    learned = prior(Marginals(), schema, 2.0, np.random.default_rng(0))
    codes = learned.sample(20_000, np.random.default_rng(1)).codes
    assert two_way(shard.records.codes, codes, schema.shape) > 5 * error


def test_where_noise_drowns_all_pairs_it_measures_columns_and_links_none():
    schema, shard = schema_of(*[5] * 8), ring(300, 8, 5)

    learned = direct_run(Marginals(), schema, shard, 80.0, rng=np.random.default_rng(0))

    assert all(len(clique) == 1 for clique in learned.model.tree.cliques)


def test_where_no_pair_could_be_seen_the_columns_are_asked_again():
    schema, shard = schema_of(*[5] * 8), ring(2000, 8, 5)

    drowned, _ = run_with_exact_sums(Marginals(), schema, shard, 30.0)
    clear, _ = run_with_exact_sums(Marginals(), schema, shard, 1.0)

    assert [query.name for query in drowned] == ["columns", "columns", "tables"]
    assert drowned[2].dim == schema.num_cells
    assert [query.name for query in clear] == ["columns", "pairs", "tables"]


def test_heavy_noise_costs_it_no_more_than_independent_columns_pay():
    schema, shard = schema_of(*[5] * 8), ring(2000, 8, 5)
    runs = range(24)

    ours = np.mean([error_of(Marginals(), schema, shard, 30.0) for _ in runs])
    theirs = np.mean([error_of(Independent(), schema, shard, 30.0) for _ in runs])

    assert ours < 1.06 * theirs  # the means differ by one or two percent from run to run


@pytest.mark.parametrize("void", [(1,), (2,), (3,), (1, 2), (2, 3), (1, 3), (1, 2, 3)])
def test_lost_rounds_leave_something_to_sample_from(void):
    schema, shard = schema_of(4, 3, 5), ring(3000, 3, 3)

    _, learned = run_with_exact_sums(Marginals(), schema, shard, 0.5, void)

    codes = learned.sample(1000, np.random.default_rng(0)).codes
    assert codes.shape == (1000, 3)
    assert (codes.max(axis=0) < schema.shape).all()


def test_a_lost_third_round_is_made_up_for_by_the_second():
    schema, shard = schema_of(4, 4, 4, 4), ring(20_000, 4, 4)

    _, learned = run_with_exact_sums(Marginals(), schema, shard, 0.5, (3,))

    codes = learned.sample(20_000, np.random.default_rng(0)).codes
    assert two_way(shard.records.codes, codes, schema.shape) < 0.03


@pytest.mark.parametrize("megabytes", [0.01, 0.1])
def test_the_model_never_outgrows_its_bound(megabytes):
    schema, shard = schema_of(*[8] * 5), ring(30_000, 5, 8)

    strategy = Marginals(max_model_mb=megabytes)
    learned = direct_run(strategy, schema, shard, 0.2, rng=np.random.default_rng(0))

    assert sum(belief.nbytes for belief in learned.model.beliefs) <= megabytes * 2**20
    unbound = direct_run(Marginals(), schema, shard, 0.2, rng=np.random.default_rng(0))
    assert sum(belief.nbytes for belief in unbound.model.beliefs) > megabytes * 2**20


@pytest.mark.parametrize(
    "settings",
    [
        {"column_share": 0.0},
        {"column_share": 0.5, "pair_share": 0.5},
        {"pair_cells": 1},
        {"table_cells": 1},
        {"max_model_mb": 0.0},
        {"max_norm": -1.0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        Marginals(**settings)


def pairs_of(tables, total, stddev=1.0):
    """Denoised pairs of exact tables by their columns."""
    shape = {}
    for ends, table in tables.items():
        shape |= dict(zip(ends, table.shape, strict=True))
    counts: list = [None] * len(shape)
    for ends, table in tables.items():
        counts[ends[0]], counts[ends[1]] = table.sum(axis=1), table.sum(axis=0)
    measured = [
        Measured(tuple(Grid.whole(c, shape[c]) for c in ends), table, stddev)
        for ends, table in tables.items()
    ]
    return denoised_pairs(counts, measured, total, sure=1.1), [shape[i] for i in range(len(shape))]


def three_columns():
    """Counts of two linked columns and one that stands alone."""
    linked = np.array([[400.0, 100.0], [100.0, 400.0]])
    apart = np.full((2, 2), 250.0)
    return pairs_of({(0, 1): linked, (0, 2): apart, (1, 2): apart}, 1000.0)


def test_a_pair_is_chosen_only_while_its_gap_outweighs_its_noise():
    pairs, shape = three_columns()
    ask = {"others": 10.0, "weight": 1.0, "max_cells": 10**6}

    # the gap of the linked pair is 0.3; four cells more cost about 1.5 * noise * 10^0.5 * 2.5
    cheap = worthwhile(pairs, shape, noise=0.02, **ask)
    dear = worthwhile(pairs, shape, noise=0.04, **ask)

    assert cheap == ([(0, 1)], [])
    assert dear == ([], [])


def test_a_pair_that_outgrows_the_model_is_measured_beside_it():
    pairs, shape = three_columns()
    ask = {"noise": 1e-3, "others": 1.0, "weight": 1.0}

    fits = worthwhile(pairs, shape, max_cells=tree_cells([(0, 1)], shape), **ask)
    beside = worthwhile(pairs, shape, max_cells=5, **ask)

    assert fits == ([(0, 1)], [])
    assert beside == ([], [(0, 1)])


def test_a_fine_table_is_moved_to_what_a_coarse_one_says_by_their_noise():
    fine = Measured((Grid.whole(0, 4), Grid.whole(1, 2)), np.full((4, 2), 10.0), 1.0)
    halves = Grid(0, np.array([0, 0, 1, 1]))
    coarse = Measured((halves, Grid.whole(1, 2)), np.full((2, 2), 26.0), np.sqrt(2.0))

    table = pooled(fine, coarse)

    # a sum of two cells has variance 2 as well, so it moves half of the way from 20 to 26
    np.testing.assert_allclose(table.counts, np.full((4, 2), 11.5))


def test_constraints_are_held_by_the_model_itself():
    rule = {"forbid": {"c0": ["0"], "c1": ["1"]}}
    plain = schema_of(3, 3, 3)
    schema = Schema.from_json({**plain.to_json(), "constraints": [rule]})
    shard = ring(5000, 3, 3)

    learned = direct_run(Marginals(), schema, shard, 1.0, rng=np.random.default_rng(0))

    assert learned.model.marginal((0, 1))[0, 1] == 0


@pytest.mark.skipif(
    not (TABLES / "adult_coded.parquet").exists(), reason="../shared/data is not on this machine"
)
def test_on_coded_adult_it_beats_the_strongest_central_figures():
    # SWIFT, by a trusted server: 0.0384 and 0.0841 in 115 CPU-s; AIM 0.0397 and 0.0864
    import pyarrow.parquet as pq

    domain = json.loads((TABLES / "adult_coded_domain.json").read_text(encoding="utf-8"))
    table = pq.read_table(TABLES / "adult_coded.parquet")
    codes = np.column_stack([table[name].to_numpy() for name in domain])
    schema, shard = schema_of(*domain.values()), shard_of(codes)
    strategy = Marginals(max_model_mb=1.6)
    budget = Budget(epsilon=1.0, delta=1e-9)
    noise = calibrate(lambda z: strategy.event(schema, z), budget)

    started = time.process_time()
    error = error_of(strategy, schema, shard, noise)

    assert error < 0.0340  # 0.0303 to 0.0311 over several runs
    assert time.process_time() - started < 115 / 4  # a quarter, for a machine under load

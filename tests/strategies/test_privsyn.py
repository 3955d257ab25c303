# SPDX-License-Identifier: Apache-2.0
"""PrivSyn: which marginals are chosen, dense data beaten, and what a release holds."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from fedsynth.core.accounting import calibrate, leaves, mu_of, single_event
from fedsynth.core.constraints import constraint_from_json
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.simulation.quality import total_variation
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.mst import Mst
from fedsynth.strategies.parts.gum import Target
from fedsynth.strategies.parts.histograms import Grid, Histograms, Measured
from fedsynth.strategies.privsyn import Edited, Privsyn, chosen_marginals, dependences

PUBLIC = "public: made up"


def schema_of(*sizes):
    return Schema(
        tuple(
            Column(f"c{i}", "category", PUBLIC, categories=tuple(map(str, range(size))))
            for i, size in enumerate(sizes)
        )
    )


def shard_of(codes):
    codes = np.asarray(codes, dtype=np.int32)
    users = np.arange(len(codes), dtype=np.int64)
    return BoundedShard(Records(codes), users, len(codes), 1)


def dense(num_records, rng, num_columns=8, size=4):
    """Columns that all follow one hidden cause: every pair depends, and no tree holds it all."""
    cause = rng.integers(0, size, num_records)
    noise = rng.random((num_records, num_columns)) < 0.5
    drawn = rng.integers(0, size, (num_records, num_columns))
    return np.where(noise, drawn, cause[:, None])


def two_way(schema, shard, learned):
    sampled = learned.sample(len(shard.records), np.random.default_rng(99))
    return total_variation(shard.records, sampled, schema, 2)


def dependence(codes, a, b):
    """Total variation distance of a pair's table from that of independent columns."""
    table = np.zeros((4, 4))
    np.add.at(table, (codes[:, a], codes[:, b]), 1 / len(codes))
    return np.abs(table - np.outer(table.sum(1), table.sum(0))).sum() / 2


def test_dense_data_are_learned_better_than_by_a_tree():
    schema = schema_of(*[4] * 8)
    noise = calibrate(single_event, Budget(epsilon=1, delta=1e-6))
    found = {name: [] for name in ("privsyn", "mst", "independent")}
    for seed in range(4):
        shard = shard_of(dense(10_000, np.random.default_rng(seed)))
        for strategy in (Privsyn(), Mst(), Independent()):
            learned = direct_run(strategy, schema, shard, noise, rng=np.random.default_rng(seed))
            found[strategy.name].append(two_way(schema, shard, learned))

    assert max(found["privsyn"]) < 0.5 * min(found["mst"])
    assert max(found["mst"]) < min(found["independent"])  # the tree is no straw man


PUBLISHED = Privsyn(passes=30, refinements=0)


def test_refining_fits_a_sample_better_than_the_published_sampler():
    schema = schema_of(*[4] * 8)
    shard = shard_of(dense(10_000, np.random.default_rng(0)))

    fitted, plain = (
        two_way(schema, shard, non_private(strategy, schema, shard, np.random.default_rng(1)))
        for strategy in (Privsyn(), PUBLISHED)
    )

    assert fitted < 0.5 * plain < 0.05


def test_columns_that_no_table_links_stay_apart_where_the_published_sampler_links_them():
    rng = np.random.default_rng(1)
    shard = shard_of(np.hstack([dense(10_000, rng), dense(10_000, rng)]))
    across = [(a, b) for a in range(8) for b in range(8, 16)]
    found = []
    for strategy in (Privsyn(), PUBLISHED):
        noise = calibrate(single_event, Budget(epsilon=1, delta=1e-6))
        learned = direct_run(strategy, schema_of(*[4] * 16), shard, noise, rng=rng)
        sampled = learned.sample(10_000, rng).codes
        found.append(np.mean([dependence(sampled, a, b) for a, b in across]))

    assert found[0] < 0.015  # what chance alone gives 10,000 records: 0.012
    assert found[1] > 1.5 * found[0]


def test_columns_that_are_independent_stay_so():
    rng = np.random.default_rng(2)
    codes = dense(10_000, rng, 5)
    codes[:, 4] = rng.integers(0, 4, 10_000)
    schema, shard = schema_of(*[4] * 5), shard_of(codes)
    noise = calibrate(single_event, Budget(epsilon=1, delta=1e-6))

    learned = direct_run(Privsyn(), schema, shard, noise, rng=rng)
    sampled = learned.sample(20_000, rng).codes

    assert max(dependence(sampled, i, 4) for i in range(4)) < 0.03
    assert min(dependence(sampled, a, b) for a, b in combinations(range(4), 2)) > 0.1


def test_dependence_is_that_of_the_table_without_the_noise():
    rng = np.random.default_rng(3)
    grids = (Grid.whole(0, 8), Grid.whole(1, 8))
    joint = np.full((8, 8), 100.0) + 60 * np.eye(8) - 60 / 8
    counts = [joint.sum(axis=1), joint.sum(axis=0)]
    truth = np.abs(joint - np.outer(*counts) / joint.sum()).sum()
    noise = 8.0 * rng.normal(size=(8, 8))

    (linked,) = dependences([Measured(grids, joint + noise, 8.0)], counts).values()
    flat = Measured(grids, np.outer(*counts) / joint.sum() + noise, 8.0)
    (nothing,) = dependences([flat], counts).values()

    assert abs(linked - truth) < 0.3 * truth
    assert nothing == 0
    assert np.abs(noise).sum() > 0.3 * truth  # which the plain L1 norm would have counted


def error_of(cliques, sizes, found, stddev):
    """Error that DenseMarg makes small, of a choice of pairs."""
    cost = sum((sizes[a] * sizes[b]) ** (2 / 3) for a, b in cliques)
    left = sum(value for pair, value in found.items() if pair not in cliques)
    return 0.5 * math.sqrt(2 / math.pi) * stddev * cost**1.5 + left


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_choice_is_nearly_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 20, 5).tolist()
    found = {pair: float(rng.exponential(400)) for pair in combinations(range(5), 2)}
    pairs = list(found)

    # cliques are kept apart, so that the choice of pairs can be told
    chosen = chosen_marginals(found, sizes, stddev=2.0, max_cells=2)

    every = [[pairs[i] for i in range(10) if choice >> i & 1] for choice in range(1 << len(pairs))]
    errors = [error_of(choice, sizes, found, 2.0) for choice in every]
    assert error_of(chosen, sizes, found, 2.0) <= 1.05 * min(errors)
    assert 0 < len(chosen) <= 10
    assert min(errors) < 0.9 * errors[0]  # choosing nothing would be far worse


def test_the_noise_reckoned_with_is_the_noise_that_is_asked_for():
    grids = [Grid.whole(0, 4), Grid.whole(1, 9), Grid.whole(2, 20)]
    pairs = list(combinations(grids, 2))
    asked = Histograms.balanced(pairs)
    query = asked.query("q", noise_multiplier=3.0, max_norm=1.0)

    stddevs = 3.0 * query.clip / asked.heights
    summed = math.sqrt(2 / math.pi) * sum(c * s for c, s in zip(asked.sizes, stddevs, strict=True))

    reckoned = math.sqrt(2 / math.pi) * 3.0 * sum(c ** (2 / 3) for c in asked.sizes) ** 1.5
    assert summed == pytest.approx(reckoned, rel=0.01)


def test_pairs_become_one_marginal_only_where_it_is_no_larger_than_they_are():
    triangle = dict.fromkeys(combinations(range(3), 2), 1000000.0)

    small = chosen_marginals(triangle, [2, 2, 2], stddev=1.0, max_cells=5000)
    large = chosen_marginals(triangle, [9, 9, 9], stddev=1.0, max_cells=5000)
    capped = chosen_marginals(triangle, [2, 2, 2], stddev=1.0, max_cells=7)

    assert small == [(0, 1, 2)]
    assert large == capped == [(0, 1), (0, 2), (1, 2)]


def test_every_chosen_pair_is_in_exactly_one_marginal():
    rng = np.random.default_rng(4)
    found = {pair: float(rng.exponential(1e5)) for pair in combinations(range(12), 2)}

    chosen = chosen_marginals(found, [2, 3] * 6, stddev=1.0, max_cells=5000)

    inside = [pair for clique in chosen for pair in combinations(clique, 2)]
    assert len(inside) == len(set(inside)) > 30
    assert max(map(len, chosen)) > 2


def test_noise_that_drowns_the_pairs_leaves_hardly_any_of_them():
    schema, shard = schema_of(*[4] * 5), shard_of(dense(200, np.random.default_rng(5), 5))

    learned = direct_run(Privsyn(), schema, shard, 50.0, rng=np.random.default_rng(5))

    assert len(learned.targets) <= 3  # of ten; each by chance alone, rarely
    assert learned.sample(100, np.random.default_rng(0)).codes.shape == (100, 5)


def test_its_rounds_cost_one_gaussian():
    event = Privsyn().event(schema_of(3, 4, 5), 2.0)

    assert mu_of(event) == pytest.approx(0.5)
    assert sum(leaves(event).values()) == 3
    assert sum(leaves(Privsyn().event(schema_of(3), 2.0)).values()) == 1


def saved():
    codes = dense(2000, np.random.default_rng(6), 4)
    codes[:, 3] = codes[:, :3].sum(axis=1) % 2
    schema, shard = schema_of(4, 4, 4, 2), shard_of(codes)
    return non_private(Privsyn(), schema, shard, np.random.default_rng(6))


def test_a_saved_synthesizer_samples_the_same():
    learned = saved()

    again = Edited.restore(learned.schema, learned.settings(), learned.tensors())

    assert any(len(target.grids) > 2 for target in learned.targets)
    first, second = (s.sample(300, np.random.default_rng(7)).codes for s in (learned, again))
    assert np.array_equal(first, second)


def _spoiled(tensors, key, value):
    return {**tensors, key: value(tensors[key])}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tables", lambda t: t[:-1]),
        ("tables", lambda t: np.append(t, 0.0)),
        ("tables", lambda t: -t),
        ("members", lambda t: t + 100),
        ("members", lambda t: t[:, 0]),
        ("members", lambda t: np.full_like(t, -1)),
        ("grid_columns", lambda t: t + 9),
        ("grid_groups", lambda t: t + 1),
        ("grid_groups", lambda t: t[1:]),
        ("probs", lambda t: t * 2),
    ],
)
def test_a_saved_synthesizer_that_was_spoiled_is_refused(key, value):
    learned = saved()

    with pytest.raises(ConfigError):
        Edited.restore(learned.schema, learned.settings(), _spoiled(learned.tensors(), key, value))


@pytest.mark.parametrize("settings", [{}, {"passes": -1, "refinements": 0}, {"passes": 1.5}])
def test_saved_settings_that_cannot_be_are_refused(settings):
    learned = saved()

    with pytest.raises(ConfigError):
        Edited.restore(learned.schema, settings, learned.tensors())


@pytest.mark.parametrize(
    "settings",
    [
        {"column_share": 0.0},
        {"column_share": 0.5, "select_share": 0.5},
        {"pair_cells": 1},
        {"clique_cells": 0},
        {"passes": -1},
        {"refinements": 10**6},
        {"max_norm": math.nan},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError):
        Privsyn(**settings)


def test_images_are_refused():
    schema = Schema((), image=ImageColumn("x", (8, 8, 1), PUBLIC))

    with pytest.raises(ConfigError, match="image"):
        Privsyn().event(schema, 1.0)


def test_no_record_is_refined_into_what_a_constraint_forbids():
    plain = schema_of(3, 3)
    rule = constraint_from_json({"forbid": {"c0": "0", "c1": "1"}}, 1)
    table = np.array([[0.0, 0.3, 0.0], [0.15, 0.0, 0.2], [0.15, 0.0, 0.2]])
    columns = (np.array([0.0, 0.5, 0.5]), np.full(3, 1 / 3))  # none begins in a forbidden cell
    wanted = Target((Grid.whole(0, 3), Grid.whole(1, 3)), table)

    def forbidden(schema):
        learned = Edited(schema, columns, (wanted,), passes=0, refinements=8)
        sampled = Edited.sample.__wrapped__(learned, 1000, np.random.default_rng(0))  # unmended
        return (sampled.codes == [0, 1]).all(axis=1).sum()

    assert forbidden(plain) > 50
    assert forbidden(replace(plain, constraints=(rule,))) == 0

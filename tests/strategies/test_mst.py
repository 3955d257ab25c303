# SPDX-License-Identifier: Apache-2.0
"""MST: three sums, a tree that is found, void rounds survived, and the figure on coded Adult."""

import itertools
import json
import math
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
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.mst import Mst, Tree
from fedsynth.strategies.parts.histograms import Grid, Histograms, cells_of

PUBLIC = "public: made up"
TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "tabular"


def schema_of(*sizes, numbers=()):
    return Schema(
        tuple(
            Column(f"c{i}", "integer", PUBLIC, bounds=(0.0, float(size)), num_bins=size)
            if i in numbers
            else Column(f"c{i}", "category", PUBLIC, categories=tuple(map(str, range(size))))
            for i, size in enumerate(sizes)
        )
    )


def shard_of(codes, users=None):
    codes = np.asarray(codes, dtype=np.int32)
    users = np.arange(len(codes)) if users is None else np.asarray(users)
    return BoundedShard(Records(codes), users, int(users[-1]) + 1 if len(users) else 0, 100)


def chain(num_records, sizes, seed=0, stay=0.7):
    """Records whose columns are a chain: each follows the one before it with probability `stay`."""
    rng = np.random.default_rng(seed)
    codes = np.empty((num_records, len(sizes)), dtype=np.int32)
    codes[:, 0] = rng.integers(0, sizes[0], num_records)
    for i, size in enumerate(sizes[1:], start=1):
        own = rng.integers(0, size, num_records)
        codes[:, i] = np.where(rng.random(num_records) < stay, codes[:, i - 1] % size, own)
    return shard_of(codes)


def queries_and_result(strategy, schema, shard, noise_multiplier=1e-9, void=()):
    """All queries of a run with exact sums, in which the rounds in `void` are lost."""
    rng, asked = np.random.default_rng(0), []
    rounds = strategy.rounds(schema, noise_multiplier, rng)
    query = next(rounds)
    while True:
        asked.append(query)
        total = clipped_sum(strategy.answer(query, shard, rng), query)
        stddev = query.noise_multiplier * query.clip
        noisy = NoisySum(total * Lattice.of(query).unit, stddev, 1)
        try:
            query = rounds.send(NoisySum.void(query) if len(asked) in void else noisy)
        except StopIteration as end:
            return asked, end.value


def pair_table(codes, a, b, shape):
    counts = np.zeros((shape[a], shape[b]))
    np.add.at(counts, (codes[:, a], codes[:, b]), 1)
    return counts / len(codes)


def mean_pair_tvd(ours, theirs, shape):
    return np.mean(
        [
            np.abs(pair_table(ours, a, b, shape) - pair_table(theirs, a, b, shape)).sum() / 2
            for a, b in itertools.combinations(range(len(shape)), 2)
        ]
    )


def test_histograms_of_one_and_of_two_columns_are_counted_as_by_hand():
    whole, merged = Grid.whole(0, 2), Grid(1, np.array([0, 1, 1]))
    histograms = Histograms(((whole,), (whole, merged), (merged,)), np.ones(3))
    query = histograms.query("tree", noise_multiplier=1.0, max_norm=1.0)
    shard = shard_of([[0, 0], [1, 1], [1, 2], [1, 0]])

    total = clipped_sum(cells_of(query, shard), query)
    tables = histograms.measured(NoisySum(total * Lattice.of(query).unit, 1.0, 1))

    assert [t.counts.tolist() for t in tables] == [[1, 3], [[1, 0], [1, 2]], [2, 2]]


def test_a_higher_histogram_has_less_noise_and_the_same_counts():
    histograms = Histograms.balanced([(Grid.whole(0, 2),), (Grid.whole(1, 16),)])
    query = histograms.query("columns", noise_multiplier=3.0, max_norm=1.0)
    shard = shard_of([[0, 7], [1, 7], [1, 2]])

    total = clipped_sum(cells_of(query, shard), query)
    small, large = histograms.measured(NoisySum(total * Lattice.of(query).unit, 1.0, 1))

    assert small.counts.tolist() == [1, 2]
    assert large.counts[[2, 7]].tolist() == [1, 2]
    assert small.stddev / large.stddev == pytest.approx(2.0, rel=1e-2)  # the cube root of 16 / 2
    assert 1.99 < (histograms.heights**2).sum() <= 2


@pytest.mark.parametrize("num_histograms", range(1, 40))
def test_a_single_record_is_never_clipped(num_histograms):
    rng = np.random.default_rng(num_histograms)
    sizes = rng.integers(1, 50, num_histograms)
    histograms = Histograms.balanced([(Grid.whole(i, n),) for i, n in enumerate(sizes)])
    query = histograms.query("columns", noise_multiplier=1.0, max_norm=1.0)
    shard = shard_of(sizes[None, :] - 1)

    total = clipped_sum(cells_of(query, shard), query) * Lattice.of(query).unit

    assert total[total > 0].tolist() == histograms.heights.tolist()


def test_a_void_sum_measures_nothing():
    histograms = Histograms.balanced([(Grid.whole(0, 2),)])
    query = histograms.query("columns", noise_multiplier=1.0, max_norm=1.0)

    assert histograms.measured(NoisySum.void(query)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid_columns", np.array([0, 2], dtype=np.int32)),
        ("grid_columns", np.array([0.0, 1.0])),
        ("grid_starts", np.array([0, 2, 99])),
        ("grid_starts", np.array([0, 5, 5])),
        ("grid_sizes", np.array([0, 3], dtype=np.int32)),
        ("grid_sizes", np.array([2], dtype=np.int32)),
        ("members", np.array([[0, 2]], dtype=np.int32)),
        ("members", np.array([[-1, 0]], dtype=np.int32)),
        ("members", np.zeros((0, 2), dtype=np.int32)),
        ("heights", np.ones(2)),
    ],
)
def test_arrays_that_contradict_each_other_are_refused_whoever_the_records_are(name, value):
    histograms = Histograms.balanced([(Grid.whole(0, 2), Grid.whole(1, 3))])
    query = histograms.query("tree", noise_multiplier=1.0, max_norm=1.0)
    wrong = Query("tree", query.dim, query.clip, 1.0, inputs={**query.inputs, name: value})

    for shard in (shard_of([[0, 0], [1, 2]]), shard_of(np.zeros((0, 2)))):
        with pytest.raises(ConfigError, match="contradict"):
            cells_of(wrong, shard)


def test_a_grid_that_does_not_know_a_code_says_nothing_about_who_has_it():
    histograms = Histograms.balanced([(Grid.whole(0, 2), Grid.whole(1, 3))])
    query = histograms.query("tree", noise_multiplier=1.0, max_norm=1.0)

    for code in (2, 2**31 - 1, -1, -(2**31)):
        assert clipped_sum(cells_of(query, shard_of([[code, 0]])), query).any()


def test_the_event_is_the_queries_and_costs_what_one_gaussian_does():
    schema = schema_of(3, 4, 2)

    asked, _ = queries_and_result(Mst(), schema, chain(500, schema.shape), noise_multiplier=2.0)
    event = Mst().event(schema, 2.0)

    assert [q.name for q in asked] == ["columns", "pairs", "tree"]
    assert leaves(event) == Counter(Leaf(q.noise_multiplier) for q in asked)
    assert mu_of(event) == pytest.approx(1 / 2.0)


def test_noiseless_records_of_a_chain_give_back_its_tree_and_its_joint():
    schema = schema_of(3, 4, 3, 2)
    shard = chain(60_000, schema.shape)
    codes = shard.records.codes

    learned = non_private(Mst(), schema, shard, np.random.default_rng(0))

    assert sorted(learned.model.edges) == [(0, 1), (1, 2), (2, 3)]
    for a, b in [(0, 1), (1, 2), (2, 3)]:
        np.testing.assert_allclose(
            learned.model.marginal([a, b]), pair_table(codes, a, b, schema.shape), atol=1e-4
        )
    for a, b in [(0, 2), (1, 3), (0, 3)]:  # a chain only but for chance in the records
        np.testing.assert_allclose(
            learned.model.marginal([a, b]), pair_table(codes, a, b, schema.shape), atol=0.01
        )


def test_columns_wider_than_the_grids_come_back_by_their_own_histograms():
    schema = schema_of(300, 200, numbers=(0,))
    shard = chain(50_000, schema.shape)

    learned = non_private(Mst(), schema, shard, np.random.default_rng(0))

    for column in (0, 1):
        share = np.bincount(shard.records.codes[:, column], minlength=schema.shape[column]) / 50_000
        np.testing.assert_allclose(learned.model.marginal([column]), share, atol=1e-6)


@pytest.mark.parametrize("void", [{1}, {2}, {3}, {1, 2}, {1, 3}, {2, 3}, {1, 2, 3}])
def test_void_rounds_end_in_what_the_others_told(void):
    schema = schema_of(4, 4, 4, numbers=(1,))
    shard = chain(20_000, schema.shape)

    asked, learned = queries_and_result(Mst(), schema, shard, void=void)
    codes = learned.sample(20_000, np.random.default_rng(1)).codes
    error = mean_pair_tvd(codes, shard.records.codes, schema.shape)

    assert len(asked) == 3
    assert ((codes >= 0) & (codes < 4)).all()
    assert bool(learned.model.links) == (2 not in void)
    assert error < 0.03 if 2 not in void else error > 0.2  # without a link 0.3 is missing


def test_a_schema_of_one_column_is_measured_once():
    schema = schema_of(5)
    shard = shard_of(np.repeat(np.arange(5), [10, 20, 30, 40, 0])[:, None].repeat(1, axis=1))

    asked, learned = queries_and_result(Mst(), schema, shard, noise_multiplier=1e-9)

    assert len(asked) == 1
    assert leaves(Mst().event(schema, 1.0)) == {Leaf(1.0, 1.0): 1}
    np.testing.assert_allclose(learned.model.columns[0], [0.1, 0.2, 0.3, 0.4, 0], atol=1e-6)


def test_a_schema_of_two_columns_is_one_link():
    schema = schema_of(2, 3)
    shard = chain(5000, schema.shape)

    learned = non_private(Mst(), schema, shard, np.random.default_rng(0))

    assert learned.model.edges == [(0, 1)]
    table = pair_table(shard.records.codes, 0, 1, schema.shape)
    np.testing.assert_allclose(learned.model.marginal([0, 1]), table, atol=1e-6)


def test_columns_with_a_single_cell_do_no_harm():
    schema = schema_of(1, 3, 1, 3)
    shard = chain(5000, (3, 3))
    codes = np.zeros((5000, 4))
    codes[:, [1, 3]] = shard.records.codes

    learned = direct_run(Mst(), schema, shard_of(codes), 2.0, rng=np.random.default_rng(0))

    assert learned.model.edges == [(1, 3)]


def test_columns_that_have_nothing_to_do_with_each_other_are_seldom_linked():
    rng = np.random.default_rng(5)
    schema = schema_of(4, 5, 6, 3, 2)
    shard = shard_of(np.stack([rng.integers(0, n, 5000) for n in schema.shape], axis=1))

    runs = [direct_run(Mst(), schema, shard, 10.0, rng=np.random.default_rng(i)) for i in range(20)]

    assert np.mean([len(run.model.links) for run in runs]) < 1.5  # of 4


def test_the_links_of_a_chain_are_found_under_noise_and_lost_under_far_more():
    schema = schema_of(4, 4, 4, 4)
    shard = chain(5000, schema.shape)

    found = [direct_run(Mst(), schema, shard, z, rng=np.random.default_rng(0)) for z in (5.0, 1e4)]

    assert sorted(found[0].model.edges) == [(0, 1), (1, 2), (2, 3)]
    assert len(found[1].model.links) < 3


def test_nobody_ends_in_a_synthesizer_of_the_schema():
    schema = schema_of(4, 30, 2, numbers=(1,))

    for seed in range(20):
        learned = prior(Mst(), schema, 3.0, np.random.default_rng(seed))
        codes = learned.sample(200, np.random.default_rng(0)).codes
        assert ((codes >= 0) & (codes < np.array(schema.shape))).all()


def test_users_with_many_records_are_clipped_to_the_bound():
    schema = schema_of(3, 3)
    crowd = np.repeat(chain(50, schema.shape).records.codes, 40, axis=0)
    shard = shard_of(crowd, users=np.repeat(np.arange(50), 40))

    asked, _ = queries_and_result(Mst(max_norm=2.0), schema, shard)

    for query in asked:
        one = shard.only(np.arange(50) == 7)
        total = clipped_sum(cells_of(query, one), query).astype(np.float64)
        assert np.linalg.norm(total) == pytest.approx(Lattice.of(query).bound, rel=1e-4)
        assert query.clip == pytest.approx(2 * np.linalg.norm(query.inputs["heights"]))


def test_a_saved_tree_samples_the_same():
    schema = schema_of(3, 40, 3, 2)
    learned = direct_run(
        Mst(), schema, chain(5000, schema.shape), 5.0, rng=np.random.default_rng(0)
    )

    again = Tree.restore(schema, learned.settings(), learned.tensors())

    assert learned.model.links
    assert again.sample(99, np.random.default_rng(0)).codes.tobytes() == (
        learned.sample(99, np.random.default_rng(0)).codes.tobytes()
    )
    assert {k: v.tobytes() for k, v in again.tensors().items()} == {
        k: v.tobytes() for k, v in learned.tensors().items()
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("probs", lambda a: a[:-1]),
        ("probs", lambda a: a * 2),
        ("edges", lambda a: a[:, :1]),
        ("edges", lambda a: np.concatenate([a, a])),
        ("edges", lambda a: a + 1),
        ("edges", lambda a: a[:1]),
        ("groups", lambda a: a[:-1]),
        ("groups", lambda a: a + 1),
        ("groups", lambda a: a - 1),
        ("tables", lambda a: a[:-1]),
        ("tables", lambda a: -a),
        ("tables", lambda a: a * np.nan),
        ("tables", lambda a: a[::-1]),
        ("tables", lambda a: np.append(a, 0.0)),
    ],
)
def test_a_broken_saved_tree_is_refused(name, change):
    schema = schema_of(2, 3, 2)
    learned = non_private(Mst(), schema, chain(999, schema.shape), np.random.default_rng(0))
    tensors = {**learned.tensors(), name: change(learned.tensors()[name])}

    with pytest.raises(ConfigError, match="saved"):
        Tree.restore(schema, {}, tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"column_share": 0.0},
        {"select_share": -0.1},
        {"column_share": 0.7, "select_share": 0.3},
        {"column_share": math.nan},
        {"select_cells": 1},
        {"pair_cells": 0},
        {"max_norm": 0.0},
        {"max_norm": math.inf},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Mst(**settings)


def test_images_are_refused_before_anything_is_asked():
    schema = Schema(schema_of(2).columns, ImageColumn("images", (2, 2, 1), PUBLIC))

    with pytest.raises(ConfigError, match="image column 'images'"):
        Mst().event(schema, 1.0)


def test_coded_adult_at_epsilon_one_is_closer_than_central_mst():
    """Central MST, on the same coding at delta 1e-9: 0.0505 to 0.0510, mean over seeds."""
    if not (TABLES / "adult_coded.parquet").exists():
        pytest.skip("../shared/data/tabular/adult_coded.parquet is not here")
    from pyarrow import parquet

    domain = json.loads((TABLES / "adult_coded_domain.json").read_text())
    table = parquet.read_table(TABLES / "adult_coded.parquet")
    schema = schema_of(*domain.values())
    shard = shard_of(np.stack([table[name].to_numpy() for name in domain], axis=1))
    budget = Budget(epsilon=1.0, delta=1e-9)
    noise = calibrate(lambda z: Mst().event(schema, z), budget)

    start = time.process_time()
    learned = direct_run(Mst(), schema, shard, noise, rng=np.random.default_rng(0))
    codes = learned.sample(len(shard.records), np.random.default_rng(1)).codes
    seconds = time.process_time() - start

    assert mean_pair_tvd(codes, shard.records.codes, schema.shape) <= 0.0475  # mean 0.043
    assert seconds < 2  # 0.15 here

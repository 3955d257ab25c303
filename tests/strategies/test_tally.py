# SPDX-License-Identifier: Apache-2.0
"""Votes counted by candidate and by cluster: unbiased, less noisy, and bounded as before."""

import numpy as np
import pytest
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.check import check_strategy, small_table, small_texts
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.parts.parents import Choosing, limited
from fedsynth.strategies.parts.tally import Estimate, Tally, clusters_of
from fedsynth.strategies.private_evolution import PrivateEvolution

ORIGIN = "public: made up for this test"
CUBE = Schema(tuple(Column(n, "real", ORIGIN, bounds=(0.0, 1.0), num_bins=256) for n in "xyz"))
FAMILIES = np.repeat(np.arange(5), 4)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_vote_lights_its_candidate_and_its_cluster_within_one_norm():
    tally = Tally(4, np.array([0, 1, 1, 0]), 0.36)

    assert tally.dim == 6
    assert tally.cells(np.array([[2], [3]])).tolist() == [[2, 5], [3, 4]]
    assert tally.heights(1) == pytest.approx([0.8, 0.6])
    assert tally.longest(1) == pytest.approx(1.0)
    assert tally.longest(3) == pytest.approx(np.hypot(0.8 * 3**0.5, 0.6 * 3))


def test_agreeing_is_least_squares_with_its_variance():
    """Against many draws: no bias, and the variance that it states, to 5 %; a third off shows."""
    truth, draw = rng().uniform(0, 9, 20), rng(1)
    totals = np.bincount(FAMILIES, weights=truth)
    fits = []
    for _ in range(20_000):
        own = Estimate(truth + draw.normal(size=20), np.ones(20))
        fits.append(own.agreeing(FAMILIES, totals + 1.5 * draw.normal(size=5), np.full(5, 2.25)))

    votes = np.array([fit.votes for fit in fits])
    assert votes.mean(axis=0) == pytest.approx(truth, abs=0.04)
    assert votes.var(axis=0) == pytest.approx(fits[0].variance, rel=0.05)
    assert fits[0].variance[0] == pytest.approx(1 - (4 / 6.25) / 4)
    sums = np.add.reduceat(votes, range(0, 20, 4), axis=1).var(axis=0)
    assert sums == pytest.approx(1 / (1 / 4 + 1 / 2.25), rel=0.05)


def test_nothing_known_of_a_group_changes_nothing():
    own = Estimate(rng().normal(size=20), np.ones(20))

    same = own.agreeing(FAMILIES, np.full(5, 99.0), np.full(5, np.inf))

    assert (same.votes == own.votes).all()
    assert (same.variance == own.variance).all()


def test_shares_come_out_of_exact_counts_as_they_are():
    tally = Tally(20, FAMILIES, 0.5)
    votes = rng().integers(0, 30, 20) * (FAMILIES != 2)
    vector = np.concatenate([votes, np.bincount(FAMILIES, weights=votes)]) * 0.5**0.5
    noisy = NoisySum(vector, 1e-9, 1)

    found = tally.read(noisy, None, np.arange(20))

    assert tally.shares(noisy, found) == pytest.approx(votes / votes.sum(), abs=1e-6)


def test_clusters_far_apart_are_found_and_no_label_shares_one():
    places = np.repeat([[0, 0], [0, 900], [900, 0]], 6, axis=0) + rng().integers(0, 9, (18, 2))
    labels = np.tile([0, 1], 9)

    together = clusters_of(places, np.zeros(18, np.int64), 3)
    apart = clusters_of(places, labels, 6)

    assert [len(set(together[i : i + 6])) for i in (0, 6, 12)] == [1, 1, 1]
    assert len(set(together)) == 3
    assert not set(apart[labels == 0]) & set(apart[labels == 1])
    assert len(set(apart)) == 6
    assert len(set(clusters_of(np.zeros((5, 2)), np.zeros(5, np.int64), 4))) == 1


def test_a_limited_lineage_hands_over_what_it_has_too_much():
    shares = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
    lineages = np.array([7, 7, 3, 3, 1])

    found = limited(shares, lineages, 0.4)

    assert found == pytest.approx([0.4 * 5 / 7, 0.4 * 2 / 7, 0.2, 0.2, 0.2])
    assert limited(shares, lineages, 1.0) == pytest.approx(shares)
    assert np.bincount(lineages, weights=limited(shares, lineages, 0.1))[[1, 3, 7]] == (
        pytest.approx([1 / 3] * 3)
    )
    assert limited(np.array([1.0, 0.0]), np.array([0, 1]), 0.3).tolist() == [1.0, 0.0]


def test_a_quota_keeps_several_lineages_alive():
    fitness = np.array([0.9, *[0.1 / 29] * 29])
    choosing = Choosing("sample", 3, True, max_lineage=0.25)

    kept, varied = choosing.parents(fitness, np.zeros(30, np.int64), np.arange(30), rng())

    assert np.bincount(np.concatenate([kept, varied]), minlength=30)[0] in (7, 8)


def test_clusters_are_heard_where_single_candidates_drown():
    """Shares that are read from votes of a few clusters, with two and a half votes a candidate."""
    clusters = np.repeat(np.arange(20), 20)
    truth = 10.0 * (clusters % 4 == 0)
    draw = rng(5)

    def error(tally):
        exact = truth * (1 - tally.share) ** 0.5
        if tally.clusters is not None:
            by_cluster = np.bincount(clusters, weights=truth) * tally.share**0.5
            exact = np.concatenate([exact, by_cluster])
        noisy = NoisySum(exact + 12.0 * draw.normal(size=tally.dim), 12.0, 1)
        shares = tally.shares(noisy, tally.read(noisy, None, np.arange(400)))
        return 1.0 if shares is None else 0.5 * np.abs(shares - truth / truth.sum()).sum()

    single = [error(Tally(400)) for _ in range(50)]
    clustered = [error(Tally(400, clusters, 0.5)) for _ in range(50)]

    assert np.mean(clustered) < 0.8 * np.mean(single)


@pytest.mark.parametrize("vote", ["l2_clip", "l2_normalize", "l1", "one_record"])
@pytest.mark.parametrize("num_votes", [1, 3])
def test_votes_by_cluster_keep_all_that_votes_owe(vote, num_votes):
    strategy = PrivateEvolution(
        num_rounds=3,
        num_candidates=40,
        num_votes=num_votes,
        vote=vote,
        num_clusters=7,
        remember=True,
        max_lineage=0.3,
        label_shares=(0.75, 0.25),
    )

    findings = check_strategy(strategy, small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_texts_are_clustered_by_their_embeddings():
    strategy = PrivateEvolution(
        num_rounds=2, num_candidates=40, num_votes=1, num_clusters=9, model="words",
        embedder="word_hashes", lookahead=2,
    )  # fmt: skip

    findings = check_strategy(strategy, small_texts())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_declared_label_shares_shape_the_pool_and_the_sample():
    strategy = PrivateEvolution(
        num_rounds=1, num_candidates=100, num_votes=1, label_shares=(0.9, 0.1), grounding=0.0
    )
    users = rng().integers(0, 2, 500)
    codes = np.zeros((500, 5), dtype=np.int32)
    codes[:, 4] = users
    shard = BoundedShard(Records(codes), np.arange(500), 500, 1)

    learned = direct_run(strategy, small_table(), shard, 0.1, rng=rng())

    ill = learned.sample(1000, rng()).codes[:, 4]
    assert ill.mean() == pytest.approx(0.1, abs=0.002)
    assert (learned.candidates.codes[:, 4] == 1).sum() == pytest.approx(11, abs=2)

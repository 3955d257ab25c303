# SPDX-License-Identifier: Apache-2.0
"""What votes can be heard is known beforehand, and a run that cannot hear any is refused."""

import json
import re

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.electorate import Electorate
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget, NoisePlacement
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.server.planned import plan_of
from fedsynth.strategies.private_evolution import PrivateEvolution

ORIGIN = "public: made up for this test"
PLANE = Schema(tuple(Column(name, "real", ORIGIN, bounds=(0.0, 1.0), num_bins=64) for name in "xy"))
USERS = 4000


def rng(seed=0):
    return np.random.default_rng(seed)


def measured(strategy, noise):
    """Mean votes of a candidate, and of a cluster, beside the noise of the query's sum."""
    codes = rng().integers(0, 64, (USERS, 2)).astype(np.int32)
    shard = BoundedShard(Records(codes), np.arange(USERS), USERS, 1)
    rounds = strategy.rounds(PLANE, noise, rng())
    query = next(rounds)
    while query.name != "votes":
        query = rounds.send(NoisySum.void(query))
    total = clipped_sum(strategy.answer(query, shard, rng(2)), query) * Lattice.of(query).unit
    num = strategy.num_candidates
    stddev = query.noise_multiplier * query.clip
    return total[:num].mean() / stddev, total[num:].mean() / stddev if query.dim > num else 0.0


@pytest.mark.parametrize("vote", ["l2_clip", "l2_normalize", "l1", "one_record"])
@pytest.mark.parametrize("num_votes", [1, 3])
@pytest.mark.parametrize("num_clusters", [0, 25])
def test_the_signal_is_as_predicted(vote, num_votes, num_clusters):
    settings = {"vote": vote, "num_votes": num_votes, "num_clusters": num_clusters}
    strategy = PrivateEvolution(num_rounds=2, num_candidates=200, grounding=0.0, **settings)

    told = strategy.signal(PLANE, 3.0, Electorate(USERS))
    each, of_clusters = measured(strategy, 3.0)

    # normalized votes of one record fall into one cluster or several; a prediction takes one
    slack = 0.2 if vote == "l2_normalize" and num_votes > 1 and num_clusters else 0.01
    assert each == pytest.approx(told.each, rel=slack)
    assert of_clusters == pytest.approx(told.of_clusters, rel=max(slack, 0.05))
    if not slack > 0.01:  # and it would show if it were wrong by a third
        assert each != pytest.approx(told.each * 4 / 3, rel=slack)


def test_a_bound_below_one_record_is_told_as_it_is():
    strategy = PrivateEvolution(num_rounds=2, num_candidates=200, grounding=0.0, max_norm=0.5)

    assert measured(strategy, 3.0)[0] == pytest.approx(
        strategy.signal(PLANE, 3.0, Electorate(USERS)).each
    )


RULES = [("l2_clip", 1.0), ("l2_clip", 3.0), ("l2_normalize", 1.0), ("l1", 1.0)]


@pytest.mark.parametrize(("vote", "max_norm"), [*RULES, ("one_record", 1.0)])
def test_the_signal_of_users_with_many_records_is_as_predicted_from_others_like_them(
    vote, max_norm
):
    """Each has a corner of the plane; what is declared was seen in another half of the users."""
    sizes = rng(4).geometric(0.25, 2 * USERS // 4).clip(max=12)
    users = np.repeat(np.arange(len(sizes)), sizes)
    corners = rng(5).integers(0, 64, (len(sizes), 2))[users]
    codes = np.clip(np.rint(corners + 12 * rng(6).normal(size=corners.shape)), 0, 63)
    strategy = PrivateEvolution(
        num_rounds=2, num_candidates=100, grounding=0.0, num_votes=1, vote=vote, max_norm=max_norm
    )
    query = next(strategy.rounds(PLANE, 3.0, rng()))
    seen, asked = users < len(sizes) // 2, users >= len(sizes) // 2

    def shard(chosen):
        of = users[chosen] - users[chosen].min()
        return BoundedShard(Records(codes[chosen].astype(np.int32)), of, int(of.max()) + 1, 12)

    one_each = BoundedShard(Records(codes[seen].astype(np.int32)), np.arange(seen.sum()),
                            int(seen.sum()), 1)  # fmt: skip
    votes = PrivateEvolution(num_candidates=100, num_votes=1).answer(query, one_each, rng())
    counts = np.zeros((len(sizes) // 2, 100))
    np.add.at(counts, (users[seen], votes.indices[:, 0]), 1)
    held = counts.sum(axis=1)
    alike = ((counts**2).sum() - held.sum()) / (held * (held - 1)).sum()
    declared = Electorate(len(sizes) - len(sizes) // 2, tuple(sizes[: len(sizes) // 2]), alike)

    told = strategy.signal(PLANE, 3.0, declared).each
    answer = strategy.answer(query, shard(asked), rng(2))
    total = clipped_sum(answer, query) * Lattice.of(query).unit
    each = total.mean() / (query.noise_multiplier * query.clip)

    assert each == pytest.approx(told, rel=0.05)
    if vote not in ("l1", "one_record"):  # where records count, taking one of each tells too little
        assert each > 4 / 3 * strategy.signal(PLANE, 3.0, Electorate(declared.num_users)).each


def test_a_rule_that_hears_more_is_proposed_with_its_gain_and_only_by_a_margin():
    users = Electorate(USERS, (1, 1, 2, 5, 20))
    loose = PrivateEvolution(num_candidates=100, grounding=0.0, num_votes=1, max_norm=8.0)
    tight = PrivateEvolution(num_candidates=100, grounding=0.0, num_votes=1)

    gain = tight.signal(PLANE, 3.0, users).each / loose.signal(PLANE, 3.0, users).each

    told = loose.prospect(PLANE, 3.0, users)
    assert gain > 2
    assert f"vote = 'l2_clip' with max_norm = 1 would hear {gain:,.3g} times" in told.proposal
    assert "max_norm" not in tight.prospect(PLANE, 3.0, users).proposal
    alone = PrivateEvolution(num_candidates=100, grounding=0.0, num_votes=1, vote="l1")
    assert "max_norm" not in alone.prospect(PLANE, 3.0, Electorate(USERS)).proposal


def test_a_pool_that_drowns_singly_is_told_which_size_would_not():
    strategy = PrivateEvolution(num_candidates=2000, grounding=0.0, num_votes=1)

    told = strategy.prospect(PLANE, 3.0, Electorate(USERS))

    size = int(re.search(r"set num_candidates = (\d+)", told.proposal)[1])
    assert told.ratio < 1
    better = PrivateEvolution(num_candidates=size, grounding=0.0, num_votes=1)
    assert 1 <= better.signal(PLANE, 3.0, Electorate(USERS)).each < 1.2


def test_a_pool_that_is_heard_well_is_told_how_large_it_may_be():
    strategy = PrivateEvolution(num_candidates=50, grounding=0.0, num_votes=1)

    told = strategy.prospect(PLANE, 3.0, Electorate(USERS))

    size = int(re.search(r"num_candidates = (\d+) would be usable", told.proposal)[1])
    assert told.ratio > 5
    larger = PrivateEvolution(num_candidates=size, grounding=0.0, num_votes=1)
    assert 1 <= larger.signal(PLANE, 3.0, Electorate(USERS)).each < 1.2


def configured(base, num_users, epsilon, **strategy):
    (base / "schema.json").write_text(json.dumps(PLANE.to_json()))
    budget = {"epsilon": epsilon, "delta": 1e-6}
    return parse_config(
        {
            "population": {"name": "few", "num_users": num_users, **budget},
            "data": {"schema": "schema.json"},
            "unit": {"column": "id", "max_records": 2},
            "budget": {"epsilon": epsilon},
            "strategy": {"name": "private_evolution", "grounding": 0.0, **strategy},
        },
        base=base,
    )


def test_a_hopeless_run_is_refused_with_settings_that_are_not(tmp_path):
    hopeless = configured(tmp_path, 2000, 0.5, num_rounds=10, num_candidates=5000, num_votes=1)

    with pytest.raises(ConfigError, match="would not be heard") as refusal:
        plan_of(hopeless)

    assert not (tmp_path / "ledger.db").exists()
    size = int(re.search(r"set num_candidates = (\d+)", str(refusal.value))[1])
    rounds = re.search(r"num_rounds = (\d+)", str(refusal.value))
    better = {"num_rounds": int(rounds[1]) if rounds else 10, "num_candidates": size}
    plan = plan_of(configured(tmp_path, 2000, 0.5, num_votes=1, **better))
    told = plan.strategy.signal(PLANE, plan.noise_multiplier, Electorate(2000))
    assert 1.0 <= told.each < 1.2


def test_a_hundred_users_at_a_small_epsilon_are_told_that_nothing_helps(tmp_path):
    with pytest.raises(ConfigError, match="more users or a larger epsilon are needed"):
        plan_of(configured(tmp_path, 20, 0.05, num_candidates=100))


def test_clusters_make_a_pool_audible_that_is_not_without(tmp_path):
    settings = {"num_rounds": 8, "num_candidates": 4000, "num_votes": 1}
    with pytest.raises(ConfigError, match="would not be heard"):
        plan_of(configured(tmp_path, 2000, 0.5, **settings))

    plan_of(configured(tmp_path, 2000, 0.5, num_clusters=20, **settings))


def test_local_noise_needs_more_users(tmp_path):
    config = configured(tmp_path, 2000, 1.0, num_candidates=3000, num_votes=1)
    plan_of(config)
    local = config.noise.model_copy(update={"placement": NoisePlacement.LOCAL})

    with pytest.raises(ConfigError, match="would not be heard"):
        plan_of(config.model_copy(update={"noise": local}))


def test_what_is_refused_learns_nothing_and_what_is_allowed_does():
    """The refusal's bound is where rounds begin to be taken for noise."""

    def heard(num_users):
        strategy = PrivateEvolution(num_rounds=1, num_candidates=400, num_votes=1, grounding=0.0)
        noise = accounting.calibrate(lambda z: strategy.event(PLANE, z), Budget(1.0, 1e-5))
        signal = strategy.signal(PLANE, noise, Electorate(num_users))
        tally_total = num_users + signal.stddev * 20 * rng().normal(size=2000)
        return signal.total, float((tally_total > 3 * signal.stddev * 20).mean())

    few, many = heard(150), heard(600)

    assert few[0] < 3
    assert few[1] < 0.5
    assert many[0] > 3
    assert many[1] > 0.9

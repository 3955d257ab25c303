# SPDX-License-Identifier: Apache-2.0
"""Users who judge tell how near a pool is, under the same clip; a run that gets no nearer stops."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.parts.distances import (
    RULER,
    Curve,
    Reading,
    is_settled,
    judges,
    reading_of,
    ruler_of,
    without_ruler,
)
from fedsynth.strategies.parts.nearest import Finder, TableMetric
from fedsynth.strategies.private_evolution import PrivateEvolution

ORIGIN = "public: made up for this test"
PLANE = Schema(tuple(Column(name, "real", ORIGIN, bounds=(0.0, 1.0), num_bins=64) for name in "xy"))
VOTES = ["l2_clip", "l2_normalize", "l1", "one_record"]


def rng(seed=0):
    return np.random.default_rng(seed)


def users_of(num_users, seed=0, most=4):
    """Users with one to four records, near one of three places."""
    draw = rng(seed)
    index = np.repeat(np.arange(num_users), draw.integers(1, most + 1, num_users))
    centers = np.array([[10, 12], [50, 50], [14, 52]])[draw.integers(3, size=len(index))]
    codes = np.clip(np.rint(centers + 3 * draw.normal(size=centers.shape)), 0, 63)
    return BoundedShard(Records(codes.astype(np.int32)), index, num_users, most)


def strategy_of(**settings):
    usual = {"num_rounds": 4, "num_candidates": 50, "num_votes": 1, "grounding": 0.0}
    return PrivateEvolution(**usual | {"held_out": 0.3} | settings)


def first_query(strategy):
    return next(strategy.rounds(PLANE, 1.0, rng()))


def bins_in(total, query):
    """The part of a sum that judges fill, in users."""
    return total[-12:] * Lattice.of(query).unit / query.clip


# --- what judges say


@pytest.mark.parametrize("vote", VOTES)
def test_judges_fill_bins_by_their_mean_and_voters_candidates(vote):
    strategy, shard = strategy_of(vote=vote), users_of(300)
    query = first_query(strategy)
    is_judge = judges(shard, 0.3)

    total = clipped_sum(strategy.answer(query, shard, rng()), query)

    asked, ruler = without_ruler(query)
    metric = TableMetric(np.array([64, 64]), np.array([64, 64]), -1, 0.3)
    finder = Finder(asked.inputs["codes"], None, np.zeros(50, np.int64), metric=metric)
    _, squared = finder.nearest(shard.records.codes, None, np.zeros(len(shard.records), np.int64))
    wanted = np.zeros(12)
    for user in np.flatnonzero(is_judge):
        own = np.searchsorted(ruler, squared[shard.user_index == user], side="right")
        wanted += np.bincount(own, minlength=12) / len(own)
    assert bins_in(total, query) == pytest.approx(wanted, abs=1e-3)
    voters = clipped_sum(strategy.answer(query, shard.only(~is_judge), rng()), query)
    assert np.array_equal(total[:-12], voters[:-12])
    assert voters[:-12].any()
    assert not voters[-12:].any()


def test_a_role_is_a_users_own_and_stays_whoever_stands_beside():
    shard = users_of(400)
    together = judges(shard, 0.25)

    alone = np.concatenate([judges(one, 0.25) for one in shard.blocks(1)])

    assert np.array_equal(together, alone)
    assert 0.18 < together.mean() < 0.32
    assert not judges(shard, 0.0).any()


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize(("vote", "max_norm"), [*((vote, 1.0) for vote in VOTES), ("l2_clip", 4.0)])
def test_a_judge_with_equal_records_fills_the_clip_and_nothing_else(vote, max_norm, count):
    strategy = strategy_of(vote=vote, max_norm=max_norm, held_out=0.5)
    query = first_query(strategy)
    same = (
        BoundedShard(
            one.records.take(np.zeros(count, dtype=np.int64)), np.zeros(count, np.int64), 1, count
        )
        for one in users_of(60, most=1).blocks(1)
    )
    judge = next(user for user in same if judges(user, 0.5)[0])

    total = clipped_sum(strategy.answer(query, judge, rng()), query)

    assert not total[:-12].any()
    assert query.clip * 0.999 < total.sum() * Lattice.of(query).unit <= query.clip


def test_what_judges_say_is_told_with_the_noise_that_it_has():
    truth, noise, clip = np.array([0, 0, 5, 40, 90, 120, 60, 30, 10, 5, 0, 0.0]), 6.0, 2.0
    middles = (np.arange(12) + 0.5) / 12
    exact = middles @ truth / truth.sum()
    draws = rng(3).normal(size=(4000, 12)) * noise

    readings = [reading_of(NoisySum((truth + d) * clip, noise * clip, 1), clip) for d in draws]

    assert all(readings)
    near = np.array([reading.near for reading in readings])
    told = np.mean([reading.stddev for reading in readings])
    assert near.mean() == pytest.approx(exact, abs=3e-3)
    assert near.std() == pytest.approx(told, rel=0.06)
    assert near.std() != pytest.approx(told * 4 / 3, rel=0.06)


def test_a_distance_is_one_where_the_mean_is_a_half_and_its_noise_grows_with_it():
    assert Reading(0.5, 0.01).distance == pytest.approx((1.0, 0.04))
    assert Reading(0.2, 0.01).distance == pytest.approx((0.25, 0.015625))


def test_judges_that_cannot_be_told_from_noise_say_nothing():
    assert reading_of(NoisySum(np.full(12, 5.0), 100.0, 1), 1.0) is None
    assert reading_of(NoisySum(np.zeros(12), np.inf, 0), 1.0) is None


def test_the_ruler_is_fine_where_neighbors_of_the_first_pool_are():
    """On a grid of steps of 16 every other candidate's nearest is one step away."""
    side = np.arange(0, 64, 16)
    codes = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2).astype(np.int32)
    query = first_query(strategy_of())
    query = replace(query, dim=28, inputs={**query.inputs, "codes": codes})

    ruler = ruler_of(query, 0.3)

    assert np.sqrt(ruler[5]) == pytest.approx(16 / 63, rel=0.01)  # the sixth of eleven edges
    assert np.sqrt(ruler[1]) == pytest.approx(np.sqrt(ruler[5]) / 5)


@pytest.mark.parametrize(
    "ruler",
    [
        np.array([1.0, 1.0]),
        np.array([0.0, 1.0]),
        np.array([2.0, 1.0]),
        np.array([np.nan]),
        np.array([np.inf]),
        np.zeros(0),
        np.ones((2, 2)),
        np.arange(1, 400) / 7.0,
        np.array([1.0], dtype=np.float32),
    ],
)
def test_a_ruler_that_measures_nothing_is_refused_without_a_look_at_a_record(ruler):
    strategy = strategy_of()
    query = first_query(strategy)
    hostile = replace(query, inputs={**query.inputs, RULER: ruler})

    for shard in (users_of(0), users_of(5)):
        with pytest.raises(ConfigError):
            strategy.answer(hostile, shard, rng())


# --- when to stop


def steps(means, stddev, seed):
    """Readings of these means, with their noise."""
    return [Reading(m, stddev) for m in means + stddev * rng(seed).normal(size=len(means))]


def naively(readings, patience):
    """The twin: whatever is not below the last reading is no progress, and noise may be either."""
    since = 0
    for before, after in pairwise(readings):
        since = 0 if after.near < before.near else since + 1
        if since >= patience:
            return True
    return False


def ends_of(rule, patience):
    """When runs end whose ten rounds come nearer by a reading's noise each, and twenty more do not.

    Returns:
      Shares of runs that end while they come nearer, and that go on for eight rounds more.
    """
    falling = 0.7 - 0.03 * np.arange(10)
    means = np.concatenate([falling, np.full(20, falling[-1])])
    ends = []
    for seed in range(300):
        readings = steps(means, 0.03, seed)
        stops = (n for n in range(1, 31) if rule(readings[:n], patience))
        ends.append(next(stops, 31))
    return np.mean(np.array(ends) <= 10), np.mean(np.array(ends) > 18)


def test_it_goes_on_while_a_pool_comes_nearer_and_stops_soon_after():
    early, late = ends_of(is_settled, 4)

    assert early < 0.15
    assert late < 0.05


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
def test_a_twin_that_takes_noise_for_progress_ends_too_early_or_far_too_late(patience):
    early, late = ends_of(naively, patience)

    assert early > 0.3 or late > 0.2


def test_small_steps_add_up_until_they_are_seen():
    means = 0.7 - 0.004 * np.arange(12)  # each a fifth of the noise of a difference

    assert not is_settled([Reading(m, 0.014) for m in means], 6)
    assert is_settled([Reading(0.7, 0.014)] * 12, 6)


def test_rounds_without_a_reading_say_nothing():
    flat = [Reading(0.5, 0.01), None, Reading(0.5, 0.01), None]

    assert not is_settled(flat, 2)
    assert is_settled([*flat, Reading(0.5, 0.01)], 2)
    assert not is_settled([None] * 9, 1)


def test_without_patience_nothing_stops():
    assert not is_settled([Reading(0.5, 0.01)] * 30, 0)


# --- whole runs


def asked_in(strategy, epsilon, num_users, seed=0):
    """A run's curve, and its truth: how many rounds it had and its last distance."""
    noise = accounting.calibrate(lambda z: strategy.event(PLANE, z), Budget(epsilon, 1e-5))
    return direct_run(strategy, PLANE, users_of(num_users), noise, rng=rng(seed)).curve


def test_a_run_over_a_pool_that_cannot_come_nearer_stops_and_one_that_can_goes_on():
    """Offspring that hardly differ from their parents bring a pool no nearer."""
    stuck = {"degree_first": 1e-4, "degree_last": 1e-4, "keep_parents": True}
    can = {"degree_first": 0.5, "degree_last": 0.05}

    ends = {
        name: [
            len(asked_in(strategy_of(num_rounds=8, patience=3, **degrees), 8.0, 1500, s).readings)
            for s in range(4)
        ]
        for name, degrees in (("stuck", stuck), ("can", can))
    }

    assert np.mean(ends["stuck"]) < 7
    assert ends["can"] == [8] * 4


def test_the_curve_falls_as_the_pool_comes_nearer_and_is_told_in_words():
    curve = asked_in(strategy_of(num_rounds=6), 10.0, 3000)

    (first, off), (last, last_off) = curve.readings[0], curve.readings[-1]
    (told,) = curve.told

    assert len(curve.readings) == 6
    assert last + 3 * (last_off + off) < first
    assert f"from {first:.3g} ± {off:.2g} to {last:.3g} ± {last_off:.2g}" in told
    assert "About 30% of all users" in told
    assert "stopped" not in told


def test_a_curve_says_when_it_stopped_and_when_nothing_was_heard():
    two = Curve.of([Reading(0.5, 0.01), None, Reading(0.25, 0.01)], held_out=0.2, num_rounds=5)
    none = Curve.of([None, None], held_out=0.2, num_rounds=2)

    assert "█·▃ from 1 ± 0.04 to 0.333 ± 0.018" in two.told[0]
    assert "stopped after 3 of 5 rounds" in two.told[0]
    assert none.told == ("Users who judged could not be told from noise in 2 rounds.",)


def test_a_saved_curve_comes_back_and_a_forged_one_does_not():
    curve = Curve.of([Reading(0.5, 0.01), None], held_out=0.2, num_rounds=5)

    again = Curve.restore(curve.settings(), curve.readings)

    assert again.told == curve.told
    for settings, readings in (
        ({"held_out": 0.2, "num_rounds": 1}, curve.readings),
        ({"held_out": 2.0, "num_rounds": 5}, curve.readings),
        (curve.settings(), curve.readings[:, :1]),
        (curve.settings(), None),
        *((curve.settings(), np.array([[1e-308, 0.0], [bad, 0.0]])) for bad in (-1e308, np.inf)),
    ):
        with pytest.raises(ConfigError):
            Curve.restore(settings, readings)


def test_fewer_users_vote_where_some_judge():
    from fedsynth.core.electorate import Electorate

    everyone = strategy_of(held_out=0.0).signal(PLANE, 3.0, Electorate(1000))
    rest = strategy_of(held_out=0.25).signal(PLANE, 3.0, Electorate(1000))

    assert rest.each == pytest.approx(0.75 * everyone.each)


@pytest.mark.parametrize(
    "settings",
    [{"held_out": 0.6}, {"held_out": -0.1}, {"patience": 5}, {"held_out": 0.0, "patience": 1}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match=r"held_out|patience"):
        strategy_of(**settings)

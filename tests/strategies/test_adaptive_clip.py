# SPDX-License-Identifier: Apache-2.0
"""The clip follows its quantile whatever it starts at, where Flower's runs away."""

import math

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.query import Contribution, NoisySum, Query
from fedsynth.strategies.parts.adaptive_clip import (
    FARTHEST,
    AdaptiveClip,
    share_stddev,
    with_bit,
)

NUM_USERS, DIM = 100, 6


def tracker(first=1.0, **changed):
    settings = {"quantile": 0.5, "rate": 0.2, "bit_share": 0.1, "num_users": NUM_USERS}
    return AdaptiveClip(first, **{**settings, **changed})


def updates_of(norms, rng):
    """Random directions of given norms, `(len(norms), DIM)`."""
    found = rng.normal(size=(len(norms), DIM))
    return found * (norms / np.linalg.norm(found, axis=1))[:, None]


def tracked(clip, *, noise_multiplier=1.0, num_rounds=250, seed=0):
    """The clip of each round over users whose norms are lognormal of median 1."""
    rng, path = np.random.default_rng(seed), []
    for _ in range(num_rounds):
        updates = updates_of(np.exp(rng.normal(size=NUM_USERS)), rng)
        total = with_bit(updates, clip=clip.clip, bit_share=0.1).sum(axis=0)
        stddev = noise_multiplier * clip.clip
        clip.take(NoisySum(total + stddev * rng.normal(size=DIM + 1), stddev, 1))
        path.append(clip.clip)
    return path


def test_a_row_is_the_clipped_update_and_then_the_bit():
    updates = np.array([[3.0, 4.0], [0.3, 0.4]])

    small, large = with_bit(updates, clip=1.0, bit_share=0.6)[::-1]

    assert np.allclose(large, [0.6 * 0.8, 0.8 * 0.8, -0.6])
    assert np.allclose(small, [0.3, 0.4, 0.6])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_row_is_longer_than_the_clip(dtype):
    rng = np.random.default_rng(0)
    updates = updates_of(10.0 ** rng.uniform(-9, 9, size=500), rng).astype(dtype)

    rows = with_bit(updates, clip=2.5, bit_share=0.3)

    assert np.linalg.norm(rows.astype(np.float64), axis=1).max() <= 2.5 * (1 + 1e-6)


def test_a_users_row_is_the_same_to_the_bit_whoever_stands_beside():
    rng = np.random.default_rng(0)
    updates = updates_of(np.exp(rng.normal(size=37)), rng).astype(np.float32)

    together = with_bit(updates, clip=1.0, bit_share=0.1)

    alone = [with_bit(updates[u : u + 1], clip=1.0, bit_share=0.1)[0] for u in range(37)]
    assert np.array_equal(together, np.stack(alone))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_user_whose_update_is_no_number_counts_as_zeros_and_a_huge_one_as_clipped(bad):
    query = Query("update", DIM + 1, 1.0, 1.0)
    updates = np.zeros((1, DIM))
    updates[0, 2] = bad

    rows = with_bit(updates, clip=1.0, bit_share=0.1)
    total = clipped_sum(Contribution.rows(rows), query) * Lattice.of(query).unit

    assert np.isfinite(total).all()
    assert np.linalg.norm(total) <= 1.0
    assert (not total.any()) or total[-1] < 0


@pytest.mark.parametrize("noise_multiplier", [0.5, 2.0, 9.0])
@pytest.mark.parametrize("bit_share", [0.05, 0.5])
def test_the_two_parts_cost_what_the_whole_does(noise_multiplier, bit_share):
    by_update = noise_multiplier / math.sqrt(1 - bit_share**2)
    by_bit = share_stddev(noise_multiplier, bit_share=bit_share, num_users=1)

    # Andrew et al., Theorem 1: z_Delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)
    assert by_update == pytest.approx((noise_multiplier**-2 - (2 * by_bit) ** -2) ** -0.5)


@pytest.mark.parametrize("first", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_the_clip_finds_the_median_from_anywhere(first):
    path = tracked(tracker(first))

    fitting = np.array(path[-100:]) * math.sqrt(1 - 0.1**2)  # what an update must not exceed
    assert np.exp(np.mean(np.log(fitting))) == pytest.approx(1.0, rel=0.05)
    assert all(0.8 < clip < 1.25 for clip in path[-100:])


@pytest.mark.parametrize(("quantile", "expected"), [(0.25, -0.6745), (0.9, 1.2816)])
def test_the_clip_finds_any_quantile(quantile, expected):
    path = tracked(tracker(quantile=quantile))

    wrong = 1.3 * expected
    found = np.mean(np.log(path[-100:])) + math.log(math.sqrt(1 - 0.1**2))
    assert abs(found - expected) < 0.1 < abs(found - wrong)


@pytest.fixture
def flower_task(monkeypatch):
    """An identity, without which Flower makes no message."""
    from flwr.supercore.task_identity import TaskIdentity

    for key in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)


@pytest.mark.usefixtures("flower_task")
@pytest.mark.parametrize("first", [0.1, 10.0])
def test_flowers_clip_runs_away_from_the_median_that_ours_finds(first):
    theirs = flowers_clip(first, num_rounds=60, num_users=20)

    ours = tracked(tracker(first), num_rounds=100)[-1]
    assert 0.8 < ours < 1.25
    assert theirs < 0.1 / 100 if first < 1 else theirs > 10.0 * 100


def flowers_clip(first, *, num_rounds, num_users):
    """Where Flower's adaptive clipping is after some rounds of such norms, by its own code."""
    import logging

    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg

    logging.getLogger("flwr").setLevel(logging.ERROR)
    np.random.seed(0)  # noqa: NPY002  (its noise comes from there)
    strategy = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), 1.0, num_users, initial_clipping_norm=first, target_clipped_quantile=0.5
    )
    rng = np.random.default_rng(0)
    for number in range(num_rounds):
        strategy.current_arrays = ArrayRecord([np.zeros(DIM)])
        replies = [
            Message(
                RecordDict(
                    {"arrays": ArrayRecord([row]), "metrics": MetricRecord({"num-examples": 1})}
                ),
                1,
                "train",
            )
            for row in updates_of(np.exp(rng.normal(size=num_users)), rng)
        ]
        strategy.aggregate_train(number, replies)
    return strategy.clipping_norm


@pytest.mark.parametrize(("told", "end"), [(1e9, 1 / FARTHEST), (-1e9, FARTHEST)])
def test_noise_that_drowns_the_bit_neither_blows_the_clip_up_nor_kills_it(told, end):
    clip = tracker()

    for _ in range(200):
        clip.take(NoisySum(np.array([0.0, told]), 1e9, 1))

    assert clip.clip == pytest.approx(end)


def test_one_round_moves_the_clip_by_no_more_than_its_rate():
    clip = tracker()

    clip.take(NoisySum(np.array([0.0, -1e300]), 1.0, 1))

    assert clip.clip == pytest.approx(math.exp(0.2 * 0.5))


def test_a_void_round_moves_nothing():
    clip = tracker(0.7)

    told = clip.take(NoisySum.void(Query("update", DIM + 1, 1.0, 1.0)))

    assert (clip.clip, told.is_void, len(told.vector)) == (0.7, True, DIM)


def test_a_clip_goes_on_from_its_state():
    first, second = tracker(), tracker()
    path = tracked(first, num_rounds=5)

    second.restore(first.state())

    assert second.clip == path[-1]


@pytest.mark.parametrize("state", [{}, {"clip": np.array([1e9])}, {"clip": np.array([np.nan])}])
def test_the_state_of_another_run_is_refused(state):
    with pytest.raises(ConfigError, match="this run's clip"):
        tracker().restore(state)


@pytest.mark.parametrize(
    "bad", [{"quantile": 0.0}, {"quantile": 1.0}, {"rate": 0.0}, {"bit_share": 0.0}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        tracker(**bad)

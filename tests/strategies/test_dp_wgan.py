# SPDX-License-Identifier: Apache-2.0
"""A critic's gradients are each user's own, sums are divided by what is public, and tables learned.

What is said here of `dp_wgan` holds for `rdp_gan` too: they play one game.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import Contribution, NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.check import check_strategy, made_up, small_images, small_table
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.simulation.quality import total_variation
from fedsynth.strategies.dp_wgan import DpWgan
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.parts import adversarial
from fedsynth.strategies.parts.critic import Batch, push, read_critic, user_gradients
from fedsynth.strategies.rdp_gan import RdpGan
from fedsynth.strategies.registry import build_strategy

PUBLIC = "public: made up"
MIXED = Schema(small_table().columns, small_images().image, "ill")
SCHEMAS = pytest.mark.parametrize(
    "schema", [small_table(), small_images(), MIXED], ids=["table", "images", "mixed"]
)
BOTH = pytest.mark.parametrize("kind", [DpWgan, RdpGan])
SHORT = {"num_rounds": 3, "steps_per_round": 2, "batch_size": 64}
SMALL = {
    "num_rounds": 30,
    "batch_size": 256,
    "num_hidden": 64,
    "network_lr": 0.003,
}
RNG = np.random.default_rng(0)  # answers do not draw from it


def category(name, size):
    return Column(name, "category", PUBLIC, categories=tuple(map(str, range(size))))


def critic_query(strategy, schema, *, num_users=1000.0, seed=0):
    """The first query for gradients, after exact and even histograms of so many users."""
    rounds = strategy.rounds(schema, 1.0, np.random.default_rng(seed))
    columns = next(rounds)
    return rounds.send(even(schema, columns, num_users))


def even(schema, query, num_users):
    """An answer to the first query that holds so many users, spread evenly over cells."""
    heights = query.inputs["heights"]
    shares = [h * num_users * np.full(s, 1 / s) for h, s in zip(heights, schema.shape, strict=True)]
    return NoisySum(np.concatenate(shares), 1e-6, 1)


def gain(strategy, query, shard, weights):
    """What the critic gains on each user's records, written plainly, in float64."""
    inputs, _ = read_critic(query, shard)
    lit, _ = inputs.lit(shard.records.codes)
    entering = (16 / lit.shape[1]) ** 0.5 * weights[lit].sum(axis=1)
    if inputs.num_pixels:
        pixels = (16 / inputs.num_pixels) ** 0.5 * shard.records.images.reshape(len(lit), -1) / 255
        entering = entering + pixels @ weights[: inputs.num_pixels]
    scores = np.tanh(entering + weights[-2]) @ weights[-1]
    gained = scores if strategy.loss == "wasserstein" else -np.logaddexp(0, -scores)
    return np.bincount(shard.user_index, gained) / np.bincount(shard.user_index)


@BOTH
@SCHEMAS
def test_a_users_row_is_the_gradient_of_what_the_critic_gains_on_their_records(kind, schema):
    strategy, shard = kind(**SHORT, num_critic=5), made_up(schema, [1, 3, 2], seed=4)
    query = critic_query(strategy, schema)
    rows = strategy.answer(query, shard, RNG).dense
    weights = query.inputs["weights"].astype(np.float64)
    lit = np.flatnonzero(np.abs(rows).sum(axis=0))

    for place in np.random.default_rng(1).choice(lit, 40):
        step = np.zeros(weights.size)
        step[place] = 1e-5
        above, below = (
            gain(strategy, query, shard, weights + sign * step.reshape(weights.shape))
            for sign in (1, -1)
        )
        assert rows[:, place] == pytest.approx((above - below) / 2e-5, rel=2e-3, abs=2e-6)


@BOTH
@SCHEMAS
def test_a_users_row_is_the_same_to_the_bit_whoever_stands_beside(kind, schema):
    strategy, shard = kind(**SHORT), made_up(schema, [1, 3, 1, 7, 2], seed=4)
    query = critic_query(strategy, schema)

    together = strategy.answer(query, shard, RNG).dense
    alone = [strategy.answer(query, user, RNG).dense for user in shard.blocks(1)]

    assert together.tobytes() == np.concatenate(alone).tobytes()
    assert together.any()


@BOTH
def test_it_keeps_all_it_owes_on_tables_with_images(kind):
    findings = check_strategy(kind(**SHORT), MIXED)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_a_user_with_a_code_that_is_no_cell_counts_as_zeros():
    strategy, schema = DpWgan(**SHORT), small_table()
    query = critic_query(strategy, schema)
    shard = made_up(schema, [2, 3], seed=1)
    good = clipped_sum(strategy.answer(query, next(shard.blocks(1)), RNG), query)
    shard.records.codes[4, 1] = 10**6

    assert np.array_equal(clipped_sum(strategy.answer(query, shard, RNG), query), good)


@BOTH
def test_server_and_client_have_the_same_gradient_of_a_record(kind):
    strategy, schema = kind(**SHORT), MIXED
    query = critic_query(strategy, schema)
    shard = made_up(schema, [1], seed=2)
    inputs, weights = read_critic(query, shard)
    shown = np.zeros((1, inputs.size), dtype=np.float32)
    shown[0, : inputs.num_pixels] = shard.records.images.ravel() / 255 * inputs.pixel_height
    shown[0, inputs.lit(shard.records.codes)[0]] = inputs.cell_height

    batch = Batch.of(weights, shown)
    made = batch.gradient(push(strategy.loss, batch.scores))
    asked = strategy.answer(query, shard, RNG).dense

    assert made.ravel() == pytest.approx(asked.ravel(), rel=1e-4, abs=1e-6)
    length = batch.lengths * push(strategy.loss, batch.scores)
    assert float(length[0]) == pytest.approx(float(np.linalg.norm(asked)), rel=1e-5)


def test_a_noisy_sum_is_divided_by_the_expected_and_never_by_the_realised_cohort(monkeypatch):
    strategy, schema = DpWgan(**SHORT, sampling_prob=0.25), small_table()
    played = []
    monkeypatch.setattr(adversarial._Game, "play", lambda game, real, *rest: played.append(real))
    rounds = strategy.rounds(schema, 1.0, np.random.default_rng(0))
    query = rounds.send(even(schema, next(rounds), 800.0))

    for num_clients in (1, 7):
        answer = NoisySum(np.full(query.dim, query.clip), 1.0, num_clients)
        query = rounds.send(answer)

    for real in played:
        assert real == pytest.approx(np.full(real.shape, 1 / (0.25 * 800)), rel=1e-5)


@BOTH
def test_without_sampling_a_run_costs_one_gaussian(kind):
    strategy = kind(sampling_prob=1.0, num_rounds=7, columns_share=0.3)

    assert accounting.mu_of(strategy.event(small_table(), 2.5)) == pytest.approx(1 / 2.5)


@BOTH
def test_sampling_is_priced_by_coins_and_only_in_the_rounds(kind):
    strategy = kind(num_rounds=5, sampling_prob=0.5, columns_share=0.2)
    first, each = 2 / 0.2**0.5, 2 * 0.5 * (5 / 0.8) ** 0.5

    found = accounting.leaves(strategy.event(small_table(), 2.0))

    assert {(round(n, 9), q): c for (n, q, *_), c in found.items()} == {
        (round(first, 9), 1.0): 1,
        (round(each, 9), 0.5): 5,
    }


def dependent(num_users, seed=0):
    """Four columns: the second and third follow the first, the fourth nothing."""
    rng = np.random.default_rng(seed)
    first = rng.choice(4, num_users, p=(0.4, 0.3, 0.2, 0.1))
    noise = rng.random((2, num_users)) < 0.1
    second = np.where(noise[0], rng.integers(0, 4, num_users), first)
    third = np.where(noise[1], rng.integers(0, 2, num_users), first % 2)
    codes = np.stack([first, second, third, rng.integers(0, 3, num_users)], axis=1)
    shard = BoundedShard(
        Records(codes.astype(np.int32)), np.arange(num_users), num_users, max_records=1
    )
    schema = Schema(tuple(category(name, c) for name, c in zip("abcd", (4, 4, 2, 3), strict=True)))
    return schema, shard


def distance(schema, shard, learned, order=2):
    """Mean distance of `order`-way marginals."""
    records = learned.sample(20_000, np.random.default_rng(9))
    return total_variation(shard.records, records, schema, order)


@BOTH
def test_dependence_is_learned_where_budget_is_generous(kind):
    schema, shard = dependent(5000)
    strategy = kind(**SMALL)
    dial = accounting.calibrate(lambda n: strategy.event(schema, n), Budget(10, 1e-6))
    alone = direct_run(Independent(), schema, shard, 0.1, rng=np.random.default_rng(0))
    floor = distance(schema, shard, alone)

    learned = [
        direct_run(strategy, schema, shard, dial, rng=np.random.default_rng(seed))
        for seed in range(3)
    ]
    nothing = prior(strategy, schema, dial, np.random.default_rng(0))

    assert floor > 0.15
    assert max(distance(schema, shard, each) for each in learned) < 0.5 * floor
    assert distance(schema, shard, nothing) > 1.5 * floor


@BOTH
def test_noise_that_swamps_leaves_no_dependence_to_be_learned(kind):
    schema, shard = dependent(5000)
    alone = direct_run(Independent(), schema, shard, 0.1, rng=np.random.default_rng(0))

    swamped = direct_run(kind(**SMALL), schema, shard, 1e4, rng=np.random.default_rng(0))

    assert distance(schema, shard, swamped) > distance(schema, shard, alone)


@BOTH
def test_images_follow_their_label(kind):
    schema = Schema((category("label", 2),), ImageColumn("image", (4, 4, 1), PUBLIC), "label")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    left = np.arange(4) < 2  # the left half is lit for one label, the right half for the other
    lit = np.where(left == (labels[:, None] == 0), 220, 30)
    images = np.tile(lit[:, None, :, None], (1, 4, 1, 1)) + rng.integers(0, 30, (1000, 4, 4, 1))
    records = Records(labels[:, None].astype(np.int32), images.astype(np.uint8))
    shard = BoundedShard(records, np.arange(1000), 1000, 1)

    learned = non_private(kind(**SMALL), schema, shard, np.random.default_rng(1))

    made = learned.sample(500, np.random.default_rng(2))
    for label, half in ((0, left), (1, ~left)):
        mean = made.images[made.codes[:, 0] == label].mean(axis=(0, 1, 3))
        assert mean[half].min() > mean[~half].max() + 80


def test_columns_are_right_where_every_round_of_gradients_is_lost():
    rng = np.random.default_rng(0)
    schema = Schema((category("a", 3), category("wide", 40), category("b", 2)), target="b")
    wide = rng.permutation(np.repeat(np.arange(40), np.arange(1, 41)))
    codes = np.stack([wide % 3, wide, wide % 2], axis=1).astype(np.int32)
    shard = BoundedShard(Records(codes), np.arange(len(codes)), len(codes), 1)
    strategy = DpWgan(num_rounds=2, max_groups=5)
    rounds = strategy.rounds(schema, 1.0, np.random.default_rng(0))
    query = next(rounds)
    exact = clipped_sum(strategy.answer(query, shard, RNG), query)
    query = rounds.send(NoisySum(exact * 2.0 ** round(np.log2(query.clip / 2**22)), 1e-3, 1))

    query = rounds.send(NoisySum.void(query))
    with pytest.raises(StopIteration) as end:
        rounds.send(NoisySum.void(query))

    assert distance(schema, shard, end.value.value, order=1) < 0.03


def test_cells_too_rare_to_be_seen_are_merged_and_drawn_in_their_measured_shares():
    schema = Schema((category("wide", 40), category("b", 2)))
    strategy = DpWgan(**SHORT, max_groups=5)
    shares = np.arange(1, 41) / 820
    known = adversarial._Known(1e5, [shares, np.ones(2) / 2], is_void=False)
    game = adversarial._Game(strategy, schema, -1, known, 1e-9, np.random.default_rng(0))
    groups = game._groups[0]
    game.average()

    codes = game.network().sample(50_000, np.random.default_rng(1)).codes[:, 0]

    drawn = np.bincount(codes, minlength=40)
    assert groups[-1] == 4
    for start, stop in pairwise([*np.flatnonzero(np.diff(groups, prepend=-1)), 40]):
        part = slice(start, stop)
        within = shares[part] / shares[part].sum()
        assert drawn[part] / drawn[part].sum() == pytest.approx(within, abs=0.03)


def test_the_louder_the_noise_the_fewer_groups_a_critic_tells_apart():
    schema, strategy = Schema((category("wide", 40), category("b", 2))), DpWgan(max_groups=16)
    known = adversarial._Known(1e5, [np.full(40, 1 / 40), np.ones(2) / 2], is_void=False)

    sizes = [
        adversarial._Game(strategy, schema, -1, known, noise, np.random.default_rng(0)).inputs.size
        for noise in (1e-6, 3e-3, 1.0)
    ]

    assert sizes[0] > sizes[1] > sizes[2] >= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be 1 or more"),
        ({"sampling_prob": 0.0}, "sampling_prob must lie in"),
        ({"columns_share": 1.0}, "columns_share must lie between"),
        ({"critic_lr": 0.0}, "critic_lr must lie between"),
        ({"weight_clip": 0.0}, "weight_clip must be above 0"),
        ({"label": "nobody"}, "is no column"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_strategy("dp_wgan", settings).event(small_table(), 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.zeros((3, 64), dtype=np.float32)},
        {"weights": np.zeros(5)},
        {"columns": np.array([0, 1, 2, 3, 9])},
        {"starts": np.array([0, 3])},
        {"places": np.zeros(3, dtype=np.int64)},
        {"num_pixels": np.array([4])},
        {"more": np.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_request_whose_arrays_contradict_each_other_is_refused(change):
    strategy, shard = DpWgan(**SHORT), made_up(small_table(), [1, 2], seed=1)
    query = critic_query(strategy, small_table())

    with pytest.raises(ConfigError, match="arrays"):
        strategy.answer(replace(query, inputs={**query.inputs, **change}), shard, RNG)


@pytest.mark.parametrize("width", [4, 64])
def test_pixel_weights_whose_sums_would_hang_on_the_batch_are_refused(width):
    schema = small_images()
    strategy, shard = DpWgan(**SHORT, num_critic=width), made_up(schema, [1] * 40, seed=1)
    query = critic_query(strategy, schema)
    weights = query.inputs["weights"].copy()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], weights[:64].shape)

    def asked(scale):
        weights[:64] = signs * scale
        forged = replace(query, inputs={**query.inputs, "weights": weights})
        return lambda users: clipped_sum(strategy.answer(forged, users, RNG), forged)

    with pytest.raises(ConfigError, match="arrays"):
        asked(1e30)(shard)
    answer = asked(1e5)  # the largest that is let pass is summed exactly, in any block
    assert np.array_equal(answer(shard), sum(answer(user) for user in shard.blocks(1)))


# What must never be: each twin is `dp_wgan` with one known mistake, and the checks find it.


class ClippedAfterAveraging(DpWgan):
    """Twin: gradients are averaged over all users first, and the mean is clipped."""

    def answer(self, query, shard, rng):
        if query.name != "critic":
            return super().answer(query, shard, rng)
        rows = super().answer(query, shard, rng).dense
        mean = rows.mean(axis=0) if len(rows) else np.zeros(query.dim)
        mean *= min(1.0, query.clip / max(float(np.linalg.norm(mean)), 1e-12))
        return Contribution.rows(np.tile(mean, (len(rows), 1)))


class DividedByTheRealisedCohort(DpWgan):
    """Twin: every user's part is divided by the number of users who happen to be there."""

    def answer(self, query, shard, rng):
        if query.name != "critic":
            return super().answer(query, shard, rng)
        rows = super().answer(query, shard, rng).dense
        return Contribution.rows(rows / max(1, len(rows)))


class NormalisedOverTheBatch(DpWgan):
    """Twin: the critic's first layer is centered over the batch, as BatchNorm does."""

    def answer(self, query, shard, rng):
        if query.name != "critic" or not shard.num_users:
            return super().answer(query, shard, rng)
        inputs, weights = read_critic(query, shard)
        lit, _ = inputs.lit(shard.records.codes)
        centered = weights.copy()
        centered[-2] -= weights[lit].sum(axis=1).mean(axis=0)
        return Contribution.rows(user_gradients(inputs, centered, shard, self.loss))


@pytest.mark.parametrize(
    "twin", [ClippedAfterAveraging, DividedByTheRealisedCohort, NormalisedOverTheBatch]
)
def test_a_twin_whose_users_are_not_apart_is_found_out(twin):
    findings = {f.name: f.ok for f in check_strategy(twin(**SHORT), small_table())}
    sound = {f.name: f.ok for f in check_strategy(DpWgan(**SHORT), small_table())}

    assert not findings["no user's answer depends on another user's records"]
    assert all(sound.values())


def released_sum(rows, clip, *, per_user):
    """The sum that a critic's step releases before noise: clipped by user, or after averaging."""
    if per_user:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows * np.minimum(1, clip / np.maximum(lengths, 1e-12))).sum(axis=0)
    mean = rows.mean(axis=0)
    return len(rows) * mean * min(1, clip / np.linalg.norm(mean))


def test_a_clip_of_the_mean_lets_one_user_move_the_sum_beyond_the_clip():
    strategy, schema = DpWgan(**SHORT), small_table()
    query = critic_query(strategy, schema)
    rows = strategy.answer(query, made_up(schema, [1] * 50, seed=1), RNG).dense
    one = strategy.answer(query, made_up(schema, [1], seed=2), RNG).dense
    more = np.concatenate([rows, 100 * one])  # a long gradient, as a critic out of bounds can have
    clip = 0.2 * query.clip

    moved = {
        per_user: np.linalg.norm(
            released_sum(more, clip, per_user=per_user)
            - released_sum(rows, clip, per_user=per_user)
        )
        for per_user in (True, False)
    }

    assert moved[True] <= clip * (1 + 1e-6)
    assert moved[False] > 3 * clip

# SPDX-License-Identifier: Apache-2.0
"""A critic learns at the users, a network at the server, and what users share can be seen in it."""

from dataclasses import replace

import numpy as np
import pytest
from fedsynth.client.respond import block_sum
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.leaf import Leaf
from fedsynth.core.mechanism import Lattice
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.check import joined, made_up, small_images, small_table
from fedsynth.simulation.direct import direct_run, prior
from fedsynth.strategies.dp_fedavg_gan import DpFedAvgGan
from fedsynth.strategies.parts.duel import _widened
from fedsynth.strategies.parts.image_critic import ImageCritic

torch = pytest.importorskip("torch")

SHORT = DpFedAvgGan(num_users=20, num_rounds=4, sampling_prob=0.5, steps_per_round=3)
PUBLIC = "public: made up"
LARGE = ImageCritic((28, 28, 1), 10, True, 4)
COLORED = ImageCritic((24, 48, 3), 1, False, 4)


def critic_question(strategy=SHORT, schema=None):
    """The first question about the critic."""
    rounds = strategy.rounds(schema or small_images(), 1.0, np.random.default_rng(0))
    labels = next(rounds)
    return rounds.send(NoisySum(np.full(labels.dim, 5.0), 0.1, 1))


def questions(rounds, answer):
    """Drive rounds; each question, and in the end what was learned."""
    asked, sent = [], None
    while True:
        try:
            query = rounds.send(sent)
        except StopIteration as end:
            return asked, end.value
        sent = None
        if isinstance(query, Query):
            asked.append(query)
            sent = answer(query, len(asked))


def told(query, number):
    """A made-up answer that depends on the question's number alone."""
    vector = np.random.default_rng(number).normal(0, 1, query.dim)
    return NoisySum(vector, 1.0, 1)


@pytest.fixture(scope="module")
def digits():
    """Scikit-learn's digits, six a user."""
    pixels, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    label = Column("label", "category", PUBLIC, tuple("0123456789"))
    schema = Schema((label,), ImageColumn("image", (8, 8, 1), PUBLIC), target="label")
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    users = np.arange(len(images)) // 6
    shard = BoundedShard(Records(labels.astype(np.int32)[:, None], images), users, users[-1] + 1, 6)
    return schema, shard


def test_a_critics_gradient_by_numpy_is_that_of_torch():
    critic = ImageCritic((8, 8, 1), 3, True, 5)
    rng = np.random.default_rng(0)
    weights = critic.initial(rng) + rng.normal(0, 0.1, critic.num_weights).astype(np.float32)
    fakes = rng.random((2, 3, 64), dtype=np.float32)
    records = made_up(small_images(), [4], seed=1).records
    flat = torch.from_numpy(weights).requires_grad_()

    model = replace(critic, fakes=fakes)
    model.losses(torch, critic.split(flat), model.read(torch, records), ()).mean().backward()

    labels = records.codes[:, 0].astype(np.int64)
    quarter = np.full(4, 0.25, dtype=np.float32)
    by_hand = -critic.gradient(weights, critic.seen(records.images), labels, quarter)
    for label in labels:
        alike, eighth = np.full(2, label), np.full(2, 0.125, dtype=np.float32)
        by_hand += critic.gradient(weights, fakes[:, label], alike, eighth)
    np.testing.assert_allclose(flat.grad.numpy(), by_hand, atol=1e-6)


def test_uphill_is_where_an_images_score_rises():
    critic = ImageCritic((8, 8, 1), 3, True, 5)
    rng = np.random.default_rng(0)
    weights = critic.initial(rng) + rng.normal(0, 0.1, critic.num_weights).astype(np.float32)
    image = torch.from_numpy(rng.random((4, 64), dtype=np.float32)).requires_grad_()
    labels = np.array([0, 2, 1, 2])

    model = replace(critic, fakes=np.zeros((1, 3, 64), dtype=np.float32))
    given = (image - 0.5, torch.from_numpy(labels))
    model.losses(torch, critic.split(torch.from_numpy(weights)), given, ()).sum().backward()

    up = critic.uphill(weights, image.detach().numpy(), labels)
    np.testing.assert_allclose(-image.grad.numpy(), up, atol=1e-6)


@pytest.mark.parametrize("critic", [LARGE, COLORED], ids=["28", "24 x 48 x 3"])
def test_a_widened_image_is_seen_as_the_image_it_was_made_of(critic):
    seen = np.random.default_rng(0).random((5, critic.num_seen)).astype(np.float32)

    wide = (seen @ _widened(critic)).reshape(5, *critic.image)

    height, width, channels = critic.seen_shape
    pooled = wide.reshape(5, height, critic.pool, width, critic.pool, channels).mean(axis=(2, 4))
    assert critic.pool == 2
    np.testing.assert_allclose(pooled.reshape(5, -1), seen, atol=1e-4)


def test_the_event_is_a_sum_of_labels_and_one_for_each_round():
    strategy, schema = replace(SHORT, num_rounds=30, sampling_prob=0.2), small_images()

    leaves = accounting.leaves(strategy.event(schema, 2.0))

    first, each = 2.0 / 0.03**0.5, 2.0 * (30 / 0.97) ** 0.5 * 0.2
    assert {(leaf.sampling_prob, count) for leaf, count in leaves.items()} == {(1.0, 1), (0.2, 30)}
    assert sorted(leaf.noise_multiplier for leaf in leaves) == pytest.approx([each, first])
    assert isinstance(next(iter(leaves)), Leaf)


def test_images_without_labels_cost_the_rounds_alone_and_are_learned():
    schema = Schema((), ImageColumn("image", (8, 8, 1), PUBLIC))

    asked, learned = questions(SHORT.rounds(schema, 1.0, np.random.default_rng(0)), told)

    assert [query.name for query in asked] == ["critic"] * 4
    assert sum(accounting.leaves(SHORT.event(schema, 1.0)).values()) == 4
    assert learned.sample(7, np.random.default_rng(0)).images.shape == (7, 8, 8, 1)


def test_what_is_clipped_is_all_that_a_user_sends():
    strategy, schema = replace(SHORT, clip=0.05, clip_quantile=None), small_images()
    query = critic_question(strategy)
    shard = made_up(schema, [1, 3, 2], seed=1)
    others, user = shard.only(np.arange(3) != 1), shard.only(np.arange(3) == 1)

    raw = strategy.answer(query, user, np.random.default_rng(0)).dense[0]
    moved = block_sum(strategy, query, joined(others, user), seed=(1, 1))
    moved = (moved - block_sum(strategy, query, others, seed=(1, 1))) * Lattice.of(query).unit

    assert len(raw) == query.dim == ImageCritic((8, 8, 1), 3, True, 24).num_weights
    assert np.linalg.norm(raw) > 10 * query.clip
    assert 0.99 * query.clip < np.linalg.norm(moved) <= query.clip


def test_a_users_row_is_the_same_to_the_bit_whoever_stands_beside():
    query = critic_question()
    shard = made_up(small_images(), [1, 3, 2, 5, 1], seed=1)

    together = SHORT.answer(query, shard, np.random.default_rng(0)).dense

    for user in range(5):
        alone = SHORT.answer(query, shard.only(np.arange(5) == user), np.random.default_rng(0))
        assert (alone.dense[0] == together[user]).all()


def test_a_user_whose_images_are_the_synthetic_ones_sends_nothing():
    strategy = replace(SHORT, num_fakes=1, clip_quantile=None, pixel_noise=0.0)
    query = critic_question(strategy)
    whole = np.rint(query.inputs["fakes"] * 255).astype(np.uint8)
    inputs = query.inputs | {"fakes": (whole / 255).astype(np.float32)}
    records = Records(np.arange(3, dtype=np.int32)[:, None], whole[0].reshape(3, 8, 8, 1))
    alike = BoundedShard(records, np.zeros(3, dtype=np.int64), 1, 3)
    unlike = replace(alike, records=Records(records.codes, 255 - records.images))

    rows = [
        strategy.answer(replace(query, inputs=inputs), shard, np.random.default_rng(0)).dense[0]
        for shard in (alike, unlike)
    ]

    # same images: the same gradient; what differs in the second is the sign of all pixels
    assert np.linalg.norm(rows[0]) < 1e-5
    assert np.linalg.norm(rows[1]) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fakes": np.zeros((2, 3, 63), dtype=np.float32)}, "synthetic images do not fit"),
        ({"fakes": np.full((2, 3, 64), np.nan, dtype=np.float32)}, "synthetic images do not fit"),
        ({"fakes": np.zeros((2, 3, 64))}, "synthetic images do not fit"),
        ({"weights": np.zeros(7, dtype=np.float32)}, "weights do not fit"),
        ({"cells": np.array([3, 4])}, "images with at most one column"),
        ({"image": np.array([4, 4, 1])}, "synthetic images do not fit"),
    ],
)
def test_a_request_whose_arrays_contradict_each_other_is_refused_for_nobody_too(change, message):
    query = critic_question()
    nobody = made_up(small_images(), [1], seed=1).only(np.array([False]))

    with pytest.raises(ConfigError, match=message):
        SHORT.answer(replace(query, inputs=query.inputs | change), nobody, np.random.default_rng(0))


def test_tables_and_images_with_more_columns_are_refused_with_what_to_take():
    label, other = (Column(name, "category", PUBLIC, ("a", "b")) for name in ("label", "other"))
    image = ImageColumn("image", (8, 8, 1), PUBLIC)

    with pytest.raises(ConfigError, match="take dp_wgan"):
        SHORT.event(small_table(), 1.0)
    with pytest.raises(ConfigError, match="take dp_wgan"):
        SHORT.event(Schema((label, other), image, target="label"), 1.0)
    with pytest.raises(ConfigError, match="is no label"):
        SHORT.event(Schema((label,), image), 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_rounds": 0},
        {"num_users": 0},
        {"sampling_prob": 0.0},
        {"pull": 1.0},
        {"gain": 0.0},
        {"memory": 1.0},
        {"pixel_noise": 2.0},
        {"clip_quantile": 1.0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DpFedAvgGan(**settings)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_network():
    schema, state, later = small_images(), None, None
    rounds = SHORT.rounds_from(schema, 1.0, rng := np.random.default_rng(0), None)
    sent, number = None, 0
    while True:
        try:
            step = rounds.send(sent)
        except StopIteration as end:
            whole = end.value
            break
        sent = None
        if isinstance(step, Query):
            number += 1
            sent = told(step, number)
        elif number == 3:  # the sum of labels and two rounds
            state = {name: array.copy() for name, array in step.state().items()}
            later = np.random.default_rng(0)
            later.bit_generator.state = rng.bit_generator.state

    resumed = SHORT.rounds_from(schema, 1.0, later, state)
    asked, again = questions(resumed, lambda query, n: told(query, n + 3))

    assert len(asked) == 2
    for ours, theirs in zip(again.tensors().values(), whole.tensors().values(), strict=True):
        assert (ours == theirs).all()


def share_of_bright_edges(learned):
    """Share of samples whose left and right columns, which are empty in digits, are bright."""
    images = learned.sample(400, np.random.default_rng(0)).images
    return float((images[:, :, [0, -1]].mean(axis=(1, 2, 3)) > 0.8 * 255).mean())


def test_the_federated_gan_finds_a_planted_preprocessing_bug(digits):
    schema, clean = digits
    images = clean.records.images.copy()
    hit = (np.random.default_rng(1).permutation(clean.num_users) % 2 == 0)[clean.user_index]
    images[hit] = 255 - images[hit]
    buggy = replace(clean, records=Records(clean.records.codes, images))
    strategy = DpFedAvgGan(
        num_users=clean.num_users, num_rounds=12, sampling_prob=0.4, steps_per_round=60
    )
    dial = accounting.calibrate(lambda z: strategy.event(schema, z), Budget(8.0, 1e-4))

    found = [
        share_of_bright_edges(direct_run(strategy, schema, shard, dial, rng=rng))
        for shard, rng in ((buggy, np.random.default_rng(0)), (clean, np.random.default_rng(0)))
    ]
    noise = prior(strategy, schema, dial, np.random.default_rng(0))

    assert found[0] > 0.2
    assert found[1] < 0.02
    assert share_of_bright_edges(noise) < 0.02

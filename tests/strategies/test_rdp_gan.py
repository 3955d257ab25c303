# SPDX-License-Identifier: Apache-2.0
"""RDP-GAN as published releases what it would have released without noise; the mended one does not.

What both adversarial strategies owe alike is tested in `test_dp_wgan.py`.
"""

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum, noised, real_sum
from fedsynth.core.query import NoisySum
from fedsynth.core.randomness import OsKeyStream
from fedsynth.simulation.check import joined, made_up, small_table
from fedsynth.strategies.parts.critic import push, read_critic
from fedsynth.strategies.rdp_gan import RdpGan
from fedsynth.strategies.registry import build_strategy

STRATEGY, SCHEMA = RdpGan(batch_size=64), small_table()
ROUNDS = STRATEGY.rounds(SCHEMA, 1.0, np.random.default_rng(0))
QUERY = ROUNDS.send(NoisySum(np.full(next(ROUNDS).dim, 100.0), 1e-6, 1))  # the first for gradients
PEOPLE = made_up(SCHEMA, [1] * 30, seed=1)
ONE_MORE = joined(PEOPLE, made_up(SCHEMA, [1], seed=2))
NUM_RELEASES = 20


def mended(shard, stddev):
    """A step's released gradient: users' gradients clipped and summed, with noise on the sum."""
    lattice = Lattice.of(QUERY)
    total = clipped_sum(STRATEGY.answer(QUERY, shard, np.random.default_rng(0)), QUERY)
    total = noised(total, stddev=stddev, lattice=lattice, stream=OsKeyStream())
    return real_sum(total, stddev=stddev, lattice=lattice, num_clients=1).vector


def as_published(shard, stddev):
    """Twin, never to be used: a step's gradient by torch, after noise on the value of the loss.

    It is what the paper's equations and a public implementation of it do: the loss is computed,
    a Gaussian number is added to it, and the sum is differentiated.
    """
    torch = pytest.importorskip("torch")
    inputs, weights = read_critic(QUERY, shard)
    lit, _ = inputs.lit(shard.records.codes)
    critic = torch.tensor(weights, requires_grad=True)
    entering = float(inputs.cell_height) * critic[torch.from_numpy(lit)].sum(dim=1)
    scores = torch.tanh(entering + critic[-2]) @ critic[-1]
    loss = torch.nn.functional.softplus(-scores).mean()
    noise = float(np.random.default_rng().normal(0, stddev))
    (loss + noise).backward()
    return critic.grad.numpy().ravel()


def noise_reaches(release):
    """The grey-box check: the same records, released again, must not come out the same."""
    first = release(PEOPLE, QUERY.clip)
    return all(not np.array_equal(first, release(PEOPLE, QUERY.clip)) for _ in range(NUM_RELEASES))


def told_apart(release):
    """Share of releases of one of two neighbors that an onlooker who knows both puts right."""
    centers = {more: release(shard, 1e-9) for more, shard in ((0, PEOPLE), (1, ONE_MORE))}
    right = 0
    for number in range(NUM_RELEASES):
        shard = ONE_MORE if number % 2 else PEOPLE
        seen = release(shard, 20 * QUERY.clip)
        nearest = min(centers, key=lambda more: np.linalg.norm(seen - centers[more]))
        right += nearest == number % 2
    return right / NUM_RELEASES


def test_noise_on_the_value_of_the_loss_never_reaches_the_release():
    without = as_published(PEOPLE, 0.0)

    for stddev in (1.0, 1e3, 1e6):
        assert as_published(PEOPLE, stddev).tobytes() == without.tobytes()
    assert without.any()


def test_the_grey_box_check_flags_the_published_form_and_passes_the_mended_one():
    assert not noise_reaches(as_published)
    assert noise_reaches(mended)


def test_neighbors_are_told_apart_for_certain_in_the_published_form_alone():
    assert told_apart(as_published) == 1.0
    assert told_apart(mended) < 0.9


def test_the_logistic_critic_pushes_hardest_where_it_is_most_wrong():
    scores = np.array([-40, -2, 0, 2, 40], dtype=np.float32)

    pushed = push("logistic", scores)

    assert pushed == pytest.approx([1, 0.880797, 0.5, 0.119203, 0], abs=1e-6)
    assert push("logistic", -scores) == pytest.approx(1 - pushed, abs=1e-6)


def test_a_decay_that_is_no_share_is_refused():
    with pytest.raises(ConfigError, match="weight_decay must lie in"):
        build_strategy("rdp_gan", {"weight_decay": 1.0})


def test_weights_decay_at_each_step():
    weights = np.ones((3, 2), dtype=np.float32)

    RdpGan(weight_decay=0.25).hold(weights)

    assert weights == pytest.approx(np.full((3, 2), 0.75))

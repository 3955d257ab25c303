# SPDX-License-Identifier: Apache-2.0
"""Updates are each user's own gradient steps, and nothing of one user is in another's row."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from fedsynth.client.respond import block_sum
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.leaf import Leaf
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.simulation.check import joined, made_up, small_images, small_table
from fedsynth.strategies.dp_fedavg import DpFedAvg
from fedsynth.strategies.parts.autoencoder import Autoencoder, Net
from fedsynth.strategies.parts.local_training import LocalTraining, places, updates
from fedsynth.strategies.parts.trainable import Made, RecordShape

torch = pytest.importorskip("torch")

ONE_STEP = LocalTraining(steps=1, lr=0.1, per_user="loop")
THREE_STEPS = LocalTraining(steps=3, lr=0.02, per_user="loop")
BATCHES = LocalTraining(steps=3, lr=0.02, batch=4, per_user="loop")
TABLE = Net("mlp", (3, 4, 2), None, 6, 2, 0.7)
DENSE = Net("mlp", (3,), (8, 8, 1), 16, 3, 0.7)
CONVOLUTIONAL = Net("cnn", (3,), (8, 8, 1), 16, 3, 0.7)
LARGE = Net("mlp", (10,), (28, 28, 1), 61, 8, 0.7)  # 99k weights
NETS = pytest.mark.parametrize("net", [TABLE, DENSE, CONVOLUTIONAL], ids=["table", "mlp", "cnn"])
TRAININGS = pytest.mark.parametrize(
    "training",
    [
        replace(t, per_user=how)
        for how in ("loop", "vmap")
        for t in (ONE_STEP, THREE_STEPS, BATCHES)
    ],
    ids=lambda t: f"{t.per_user}-{t.steps}-{t.batch}",
)


def people(net, records_per_user, seed=1):
    """Users of random records."""
    rng = np.random.default_rng(seed)
    total = sum(records_per_user)
    codes = np.stack([rng.integers(0, size, total) for size in net.cells], axis=1)
    images = None
    if net.image is not None:
        images = rng.integers(0, 256, (total, *net.image), dtype=np.uint8)
    index = np.repeat(np.arange(len(records_per_user)), records_per_user)
    return BoundedShard(
        Records(codes.astype(np.int32), images), index, len(records_per_user), max(records_per_user)
    )


def made_of(net):
    return Made(RecordShape(net.cells, net.image), net)


def weights_of(net, seed=0):
    """Weights with biases too, so that no gradient is trivially zero."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.05, net.num_weights)
    return (net.initial(rng) + noise).astype(np.float32)


def only(shard, *users):
    """Some users of a shard, in the order given."""
    parts = [shard.only(np.arange(shard.num_users) == user) for user in users]
    together = parts[0]
    for part in parts[1:]:
        together = joined(together, part)
    return together


def torch_decoder(net, weights, codes):
    """Pixel means and cell logits, by torch's own layers."""
    fn = torch.nn.functional
    w = {name: torch.from_numpy(value.copy()) for name, value in net.split(weights).items()}
    opened = torch.relu(fn.linear(torch.from_numpy(codes), w["open.w"].T, w["open.b"]))
    if net.form == "mlp":
        out = fn.linear(opened, w["leave.w"].T, w["leave.b"])
        return torch.sigmoid(out[:, : net.num_pixels]), out[:, net.num_pixels :]
    height, width, channels = net.image
    up1 = torch.nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
    up2 = torch.nn.ConvTranspose2d(16, channels, 4, stride=2, padding=1)
    for layer, name in ((up1, "up1"), (up2, "up2")):
        layer.weight.data, layer.bias.data = w[f"{name}.w"], w[f"{name}.b"]
    spread = torch.relu(fn.linear(opened, w["spread.w"].T, w["spread.b"]))
    drawn = up2(torch.relu(up1(spread.unflatten(1, (32, height // 4, width // 4)))))
    pixels = torch.sigmoid(drawn).permute(0, 2, 3, 1).flatten(1)
    return pixels.detach(), fn.linear(opened, w["columns.w"].T, w["columns.b"])


class HandWritten(torch.nn.Module):
    """The autoencoder as one would write it in torch, with its loss over one user's records."""

    def __init__(self, net, weights):
        super().__init__()
        self.net = net
        nn = torch.nn
        width = net.num_pixels + net.num_cells
        if net.form == "mlp":
            self.enter = nn.Linear(width, net.hidden)
            self.leave = nn.Linear(net.hidden, width)
        else:
            height, breadth, channels = net.image
            self.grid = (32, height // 4, breadth // 4)
            flat = int(np.prod(self.grid))
            self.conv1 = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
            self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.enter = nn.Linear(flat + net.num_cells, net.hidden)
            self.columns = nn.Linear(net.hidden, net.num_cells)
            self.spread = nn.Linear(net.hidden, flat)
            self.up1 = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
            self.up2 = nn.ConvTranspose2d(16, channels, 4, stride=2, padding=1)
        self.code = nn.Linear(net.hidden, 2 * net.latent)
        self.open = nn.Linear(net.latent, net.hidden)
        for name, value in net.split(weights).items():
            self._parameter(name).data.copy_(self._turned(torch.from_numpy(value.copy()), name))

    def _parameter(self, name):
        layer, part = name.split(".")
        return getattr(getattr(self, layer), "weight" if part == "w" else "bias")

    @staticmethod
    def _turned(value, name):
        return value.T if name.endswith(".w") and value.ndim == 2 else value

    def flat(self, of):
        """Something of every parameter, in the order of the flat vector."""
        return np.concatenate(
            [
                self._turned(of(self._parameter(name)), name).detach().numpy().ravel()
                for name in self.net.shapes
            ]
        )

    def loss(self, records, noise, kl_weight):
        fn, net = torch.nn.functional, self.net
        codes = torch.from_numpy(records.codes.astype(np.int64))
        hot = [fn.one_hot(codes[:, i], size).float() for i, size in enumerate(net.cells)]
        pixels = torch.zeros((len(records), 0))
        if records.images is not None:
            pixels = torch.from_numpy(records.images.astype(np.float32) / 255)
        if net.form == "mlp":
            seen = [pixels.flatten(1)]
        else:
            pixels = pixels.permute(0, 3, 1, 2)
            seen = [torch.relu(self.conv2(torch.relu(self.conv1(pixels)))).flatten(1)]
        code = self.code(torch.relu(self.enter(torch.cat([*seen, *hot], dim=1))))
        mean, log_var = code.chunk(2, dim=1)
        opened = torch.relu(self.open(mean + torch.exp(log_var / 2) * noise))
        if net.form == "mlp":
            drawn, logits = self.leave(opened).split([net.num_pixels, net.num_cells], dim=1)
        else:
            logits = self.columns(opened)
            grid = torch.relu(self.spread(opened)).unflatten(1, self.grid)
            drawn = self.up2(torch.relu(self.up1(grid)))
        total = kl_weight * -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        if net.num_pixels:
            target = pixels.reshape(drawn.shape)
            total = total + fn.binary_cross_entropy_with_logits(drawn, target, reduction="sum")
        for column, part in enumerate(logits.split(net.cells, dim=1)):
            total = total + fn.cross_entropy(part, codes[:, column], reduction="sum")
        return total / len(records)


def hand_written_update(net, weights, records, training, seed):
    """A user's change of the weights by `torch.optim.SGD`."""
    noise = [net.chance(np.random.default_rng([seed, 1, step]), len(records))[0]
             for step in range(training.steps)]  # fmt: skip
    noise = torch.from_numpy(np.array(noise))
    taken = places(len(records), training, seed=seed)
    model = HandWritten(net, weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=training.lr)
    for step in range(training.steps):
        optimizer.zero_grad()
        model.loss(records.take(taken[step]), noise[step][taken[step]], net.kl_weight).backward()
        optimizer.step()
    return model.flat(lambda parameter: parameter) - weights


@NETS
@TRAININGS
def test_a_users_update_is_that_of_a_hand_written_module_and_optimizer(net, training):
    shard, weights = people(net, [1, 3, 20]), weights_of(net)
    seen = [Records(s.records.codes, s.records.images) for s in (only(shard, u) for u in range(3))]

    rows = updates(net, weights, shard, training, made=made_of(net), seed=5)

    expected = [hand_written_update(net, weights, records, training, 5) for records in seen]
    assert np.abs(np.array(expected)).max() > 0.01
    np.testing.assert_allclose(rows, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@NETS
@TRAININGS
def test_a_users_row_is_the_same_bits_whoever_else_is_in_the_block(net, training):
    shard, weights = people(net, [1, 3, 1, 20, 2, 9, 1, 1, 5, 3] * 4), weights_of(net)
    order = np.random.default_rng(3).permutation(shard.num_users)

    rows = updates(net, weights, shard, training, made=made_of(net), seed=5)
    mixed = updates(net, weights, only(shard, *order), training, made=made_of(net), seed=5)
    alone = [
        updates(net, weights, only(shard, user), training, made=made_of(net), seed=5)[0]
        for user in range(10)
    ]

    assert (rows[order] == mixed).all()
    assert (rows[:10] == np.array(alone)).all()


@pytest.mark.parametrize("per_user", ["loop", "vmap"])
def test_a_users_row_is_the_same_bits_in_a_model_of_99k_weights(per_user):
    training = replace(ONE_STEP, per_user=per_user)
    shard, weights = people(LARGE, [20] * 19), weights_of(LARGE)
    others = people(LARGE, [20] * 18, seed=9)

    rows = updates(LARGE, weights, shard, training, made=made_of(LARGE), seed=5)

    for place in (0, 7, 18):
        before = others.only(np.arange(18) < place)
        after = others.only(np.arange(18) >= place)
        neighbors = joined(joined(before, only(shard, 4)), after)
        row = updates(LARGE, weights, neighbors, training, made=made_of(LARGE), seed=5)[place]
        assert (row == rows[4]).all()


def query_for(strategy, schema, weights=None):
    """The strategy's first question, with other weights if some are given."""
    query = next(strategy.rounds(schema, 1.0, np.random.default_rng(0)))
    inputs = dict(query.inputs) if weights is None else {**query.inputs, "weights": weights}
    return Query(query.name, query.dim, query.clip, query.noise_multiplier, inputs=inputs)


@pytest.mark.parametrize("cell", [-1, 99])
def test_a_user_outside_the_schema_counts_as_zeros_and_the_others_as_before(cell):
    strategy, schema = DpFedAvg(hidden=6, latent=2), small_table()
    good, bad = made_up(schema, [1, 2, 3, 4], seed=1), made_up(schema, [2], seed=2)
    bad.records.codes[1, 0] = cell
    query = query_for(strategy, schema)

    together = block_sum(strategy, query, joined(joined(good, bad), good), seed=(1, 1))

    assert np.abs(together).max() > 0
    assert (together == 2 * block_sum(strategy, query, good, seed=(1, 1))).all()
    assert (block_sum(strategy, query, bad, seed=(1, 1)) == 0).all()


def test_a_user_whose_gradient_overflows_counts_as_zeros_and_the_others_as_before():
    strategy, schema = DpFedAvg(hidden=6, latent=2), small_table()
    shard = made_up(schema, [1, 2, 3, 4], seed=1)
    shard.records.codes[:, 0] = [0] * 3 + [1] + [0] * 6  # a record of the third user
    first = query_for(strategy, schema)
    weights = first.inputs["weights"].copy()
    strategy_net = Net("mlp", schema.shape, None, 6, 2)
    strategy_net.split(weights)["enter.w"][1] = 3e38
    query = query_for(strategy, schema, weights)

    rows = strategy.answer(query, shard, np.random.default_rng(0)).dense
    total = block_sum(strategy, query, shard, seed=(1, 1))

    assert [bool(np.isfinite(row).all()) for row in rows] == [True, True, False, True]
    assert (total == block_sum(strategy, query, only(shard, 0, 1, 3), seed=(1, 1))).all()
    assert np.abs(total).max() > 0


@pytest.mark.parametrize("values", [7, 100_000])
def test_weights_of_another_size_are_refused_before_any_user_is_looked_at(values):
    strategy, schema = DpFedAvg(), small_table()
    query = query_for(strategy, schema, np.zeros(values, dtype=np.float32))
    nobody = made_up(schema, [1], seed=1).only(np.array([False]))

    with pytest.raises(ConfigError, match="do not fit the model"):
        strategy.answer(query, nobody, np.random.default_rng(0))


def test_a_client_without_torch_says_so_even_before_it_has_users(monkeypatch):
    strategy, schema = DpFedAvg(), small_table()
    query = query_for(strategy, schema)
    nobody = made_up(schema, [1], seed=1).only(np.array([False]))
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(ConfigError, match=r"needs torch .* pip install 'fedsynth\[train\]'"):
        strategy.answer(query, nobody, np.random.default_rng(0))


def test_a_convolutional_model_of_a_table_is_refused():
    with pytest.raises(ConfigError, match="needs an image column"):
        DpFedAvg(model="cnn").event(small_table(), 1.0)


def test_the_event_is_as_many_poisson_sampled_sums_as_rounds():
    event = DpFedAvg(num_rounds=30, sampling_prob=0.2).event(small_table(), 1.5)

    by_hand = SelfComposedDpEvent(PoissonSampledDpEvent(0.2, GaussianDpEvent(1.5)), 30)
    assert accounting.leaves(event) == {Leaf(1.5, 0.2): 30}
    assert accounting.epsilon_of(event, 1e-5) == accounting.epsilon_of(by_hand, 1e-5)


@pytest.mark.parametrize("optimizer", ["fedadam", "fedavgm"])
def test_a_void_round_leaves_the_weights_as_they_were(optimizer):
    strategy = DpFedAvg(num_rounds=5, server_optimizer=optimizer)
    rounds = strategy.rounds(small_table(), 1.0, np.random.default_rng(0))
    first = next(rounds)
    second = rounds.send(NoisySum(np.ones(first.dim), 1.0, 1))

    third = rounds.send(NoisySum.void(second))

    assert (first.inputs["weights"] != second.inputs["weights"]).any()
    assert (second.inputs["weights"] == third.inputs["weights"]).all()


@pytest.mark.parametrize(("optimizer", "lr"), [("fedadam", 0.05), ("fedavgm", 1.0)])
def test_without_noise_the_loss_falls_over_the_rounds(optimizer, lr):
    schema = small_table()
    shard = made_up(schema, [1, 2, 3] * 20, seed=1)
    shard.records.codes[:, :2] = 1  # something to learn
    settings = {"num_users": 60, "sampling_prob": 1.0, "num_rounds": 40, "hidden": 64}
    strategy = DpFedAvg(server_optimizer=optimizer, server_lr=lr, kl_weight=1.0, **settings)
    rounds = strategy.rounds(schema, 1.0, np.random.default_rng(0))
    query = next(rounds)
    net = Net("mlp", schema.shape, None, strategy.hidden, strategy.latent)
    noise = torch.zeros((len(shard.records), strategy.latent))
    losses = []
    for _ in range(strategy.num_rounds - 1):
        model = HandWritten(net, query.inputs["weights"])
        losses.append(model.loss(shard.records, noise, strategy.kl_weight).item())
        total = block_sum(strategy, query, shard, seed=(1, 1)) * Lattice.of(query).unit
        query = rounds.send(NoisySum(total, 1e-9, 1))

    uniform = sum(np.log(size) for size in schema.shape)
    assert losses[0] > 0.8 * uniform
    assert losses[-1] < 0.75 * losses[0]
    assert np.mean(losses[-10:]) < np.mean(losses[10:20]) < np.mean(losses[:10])


@NETS
def test_the_numpy_decoder_is_torchs(net):
    weights = weights_of(net)
    codes = np.random.default_rng(2).standard_normal((7, net.latent)).astype(np.float32)

    pixels, logits = net.decoded(weights, codes)

    expected_pixels, expected_logits = torch_decoder(net, weights, codes)
    np.testing.assert_allclose(pixels, expected_pixels.numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, expected_logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_restored_autoencoder_samples_the_same_records(model):
    schema = small_images()
    net = Net(model, schema.shape, schema.image.shape, 16, 3)
    learned = Autoencoder(schema, net, weights_of(net))

    restored = Autoencoder.restore(schema, learned.settings(), learned.tensors())

    records = learned.sample(50, np.random.default_rng(4))
    again = restored.sample(50, np.random.default_rng(4))
    assert (records.codes == again.codes).all()
    assert (records.images == again.images).all()


def test_saved_weights_of_another_model_are_refused():
    schema = small_table()
    net = Net("mlp", schema.shape, None, 6, 2)
    learned = Autoencoder(schema, net, weights_of(net))
    short = {"weights": learned.weights[:-1]}

    with pytest.raises(ConfigError, match="do not fit"):
        Autoencoder.restore(schema, learned.settings(), short)

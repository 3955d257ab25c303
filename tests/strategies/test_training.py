# SPDX-License-Identifier: Apache-2.0
"""What all strategies share that train by users' updates: optimizers, devices, bad requests."""

import random
import sys
from dataclasses import astuple, dataclass, replace

import numpy as np
import pytest
from fedsynth.client.respond import block_sum
from fedsynth.core import devices
from fedsynth.core.errors import ConfigError
from fedsynth.core.query import Query
from fedsynth.core.records import Records
from fedsynth.simulation.check import made_up, small_images, small_table
from fedsynth.strategies.dp_fedavg import DpFedAvg
from fedsynth.strategies.parts import local_training, side_by_side
from fedsynth.strategies.parts.autoencoder import Net
from fedsynth.strategies.parts.device import device_for, take_device
from fedsynth.strategies.parts.local_training import LocalTraining, places, updates
from fedsynth.strategies.parts.server_optimizer import ServerOptimizer
from fedsynth.strategies.parts.trainable import Made, RecordShape
from flwr.serverapp.strategy import FedAvg

torch = pytest.importorskip("torch")

NET = Net("mlp", (3, 2), None, 6, 2)
MADE = Made(RecordShape((3, 2), None))
BESIDE = LocalTraining(steps=2, lr=0.1, per_user="vmap")


def users(records_per_user, seed=1):
    """Users of random records of two columns."""
    shard = made_up(small_table(), records_per_user, seed=seed)
    codes = np.random.default_rng(seed).integers(0, [3, 2], (len(shard.records), 2))
    return type(shard)(
        Records(codes.astype(np.int32)), shard.user_index, shard.num_users, shard.max_records
    )


def one(shard, user):
    """One user alone."""
    own = shard.records.take(np.flatnonzero(shard.user_index == user))
    return type(shard)(own, np.zeros(len(own), dtype=np.int64), 1, shard.max_records)


def weights_of(net):
    return net.initial(np.random.default_rng(0))


def updates_of(shard, training):
    return updates(NET, weights_of(NET), shard, training, made=MADE, seed=1)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_an_optimizer_goes_the_way_of_the_mean_and_the_same_way_again(name):
    before, mean = np.zeros(5), np.array([1e-3, -1e-3, 2e-3, 0.0, 5e-3])

    once, again = (ServerOptimizer(name).build(seed=3).moved(before, mean) for _ in range(2))

    assert (np.sign(once) == np.sign(mean)).all()
    assert (once == again).all()


def test_fedavg_takes_the_mean_as_it_is_and_fedavgm_with_step_and_momentum():
    before, mean = np.ones(3), np.array([0.5, 0.0, -0.25])
    plain = ServerOptimizer("fedavg").build(seed=3)
    heavy = ServerOptimizer("fedavgm", lr=0.1, momentum=0.5).build(seed=3)

    once = heavy.moved(before, mean)

    np.testing.assert_allclose(plain.moved(before, mean), before + mean)
    np.testing.assert_allclose(once, before + 0.1 * mean)
    np.testing.assert_allclose(heavy.moved(once, mean), once + 0.1 * 1.5 * mean)


class Nosy(FedAvg):
    """Draws from global generators, wants a hundred clients, and may give nothing."""

    def __init__(self, gives="weights"):
        super().__init__(min_available_nodes=4, min_train_nodes=4)
        self.gives = gives

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        moved = arrays["weights"].numpy() + random.random() + np.random.random()  # noqa: NPY002
        if self.gives == "nan":
            moved = moved * np.nan
        arrays["weights"] = type(arrays["weights"])(moved)
        return (arrays if self.gives != "nothing" else None), metrics


def own(gives="weights"):
    from fedsynth.strategies.parts.flower_optimizer import FlowerOptimizer

    return FlowerOptimizer(Nosy, "nosy", {"gives": gives}, 3)


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda s: None)


def test_a_strategy_of_flowers_that_draws_at_random_replays_and_moves_no_global_generator(
    no_waiting,
):
    random.seed(1)
    plain, bits = random.getstate(), np.random.get_bit_generator().state["state"]["pos"]

    first = own().moved(np.zeros(3), np.ones(3))

    assert (first == own().moved(np.zeros(3), np.ones(3))).all()
    assert random.getstate() == plain
    assert np.random.get_bit_generator().state["state"]["pos"] == bits


@pytest.mark.parametrize(("waits_for", "most"), [(2, 2), (100, 128)])
def test_a_strategy_of_flowers_is_shown_no_more_clients_from_round_to_round(
    no_waiting, waits_for, most
):
    from fedsynth.strategies.parts.flower_optimizer import FlowerOptimizer

    optimizer = FlowerOptimizer(FedAvg, "fedavg", {"min_available_nodes": waits_for}, 3)

    for _ in range(20):
        optimizer.moved(np.zeros(3), np.ones(3))

    optimizer._nodes.starts_again()
    assert len(list(optimizer._nodes.get_node_ids())) == most


@pytest.mark.parametrize(("gives", "why"), [("nothing", "gave no arrays"), ("nan", "no numbers")])
def test_a_strategy_of_flowers_that_makes_no_weights_is_refused(no_waiting, gives, why):
    with pytest.raises(ConfigError, match=why):
        own(gives).moved(np.zeros(3), np.ones(3))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"server_optimizer": "my_module:Mine"}, "entry point of fedsynth.server_optimizers"),
        ({"server_optimizer": "fedsgd"}, "fedadam"),
        ({"server_settings": {"no_such": 1}}, "no_such"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_anything_is_spent(settings, match):
    with pytest.raises(ConfigError, match=match):
        DpFedAvg(**settings).event(small_table(), 1.0)


def test_a_client_answers_without_ever_loading_flowers_strategies(monkeypatch):
    strategy, schema = DpFedAvg(hidden=6, latent=2), small_table()
    query = next(strategy.rounds(schema, 1.0, np.random.default_rng(0)))
    monkeypatch.setitem(sys.modules, "flwr.serverapp.strategy", None)
    monkeypatch.delitem(sys.modules, "fedsynth.strategies.parts.flower_optimizer")

    made = DpFedAvg(hidden=6, latent=2).answer(
        query, made_up(schema, [2, 1], seed=1), np.random.default_rng(0)
    )

    assert np.abs(made.dense).max() > 0


def test_a_step_takes_its_records_in_turn_and_a_place_knows_no_number_of_records():
    training = LocalTraining(steps=3, lr=0.1, batch=4)

    of_ten, of_three = places(10, training, seed=7), places(3, training, seed=7)

    assert sorted(np.concatenate(of_ten)[:10]) == list(range(10))
    assert [len(part) for part in of_ten] == [4, 4, 4]
    assert [sorted(part) for part in of_three] == [[0, 1, 2]] * 3
    ranks = [list(np.concatenate(places(n, training, seed=7))[:n]) for n in (5, 10)]
    assert [place for place in ranks[1] if place < 5] == ranks[0]


def test_a_user_with_one_record_trains_on_it_in_every_step():
    shard = users([1])

    row = updates_of(shard, LocalTraining(3, 0.1, batch=10))

    assert np.isfinite(row).all()
    assert np.abs(row).max() > 0


def test_users_do_stand_side_by_side_where_that_was_asked(monkeypatch):
    shard = users([1, 3, 2, 2, 7])
    alone = updates_of(shard, LocalTraining(2, 0.1, per_user="loop"))

    def refuse(*args):
        raise AssertionError("one by one")

    monkeypatch.setattr(local_training, "_loop", refuse)

    beside = updates_of(shard, BESIDE)

    np.testing.assert_allclose(beside, alone, atol=1e-6)


@dataclass(frozen=True)
class Strange(Net):
    """A net that does something else with one of its weights, or computes its slopes wrongly."""

    does: str = ""

    def losses(self, torch, weights, seen, chance):
        lost = super().losses(torch, weights, seen, chance)
        matrix, bias = weights["enter.w"], weights["enter.b"]
        if self.does == "squares a bias":
            return lost + bias.square().sum()
        if self.does == "takes a part":
            return lost + matrix[:2].sum()
        if self.does == "sends other rows through":
            return lost + (torch.ones(1, 5) @ matrix).sum()
        return lost + 0 * (seen[2] @ matrix + bias).sum(1)  # once more, as is allowed


@pytest.mark.parametrize(
    ("does", "is_known"),
    [
        ("squares a bias", False),
        ("takes a part", False),
        ("sends other rows through", False),
        ("uses a matrix twice", True),
    ],
)
def test_users_share_products_where_all_weights_are_matrices_of_rows_and_biases(does, is_known):
    net, shard = Strange(*astuple(NET)[:5], does=does), users([2, 2, 3, 7])
    device = torch.device("cpu")
    steps = side_by_side.FactoredSteps(torch, net, weights_of(net), 0.1, device)
    chance = local_training.chances(torch, device, net, shard, BESIDE, seed=1)

    assert bool(side_by_side._sizes(steps, MADE, chance, 2)) == is_known


def test_shared_products_are_refused_where_they_give_other_slopes(monkeypatch):
    steps = side_by_side.FactoredSteps(torch, NET, weights_of(NET), 0.1, torch.device("cpu"))
    chance = local_training.chances(torch, steps.device, NET, users([2]), BESIDE, seed=1)
    plain = side_by_side.FactoredSteps.__call__

    def wrong(self, batches, share, out):
        plain(self, batches, share, out)
        for part in out.values():
            part.mul_(1.001)

    assert side_by_side._sizes(steps, MADE, chance, 2)
    monkeypatch.setattr(side_by_side.FactoredSteps, "__call__", wrong)
    assert not side_by_side._sizes(steps, MADE, chance, 2)


@pytest.mark.parametrize("way", [side_by_side.FactoredSteps, side_by_side._Steps])
def test_what_stood_in_memory_before_changes_no_bit(way):
    device, shard = torch.device("cpu"), users([2, 2, 2])
    steps = way(torch, NET, weights_of(NET), 0.1, device)
    chance = local_training.chances(torch, device, NET, shard, BESIDE, seed=1)
    seen = [part.unflatten(0, (3, 2)) for part in NET.read(torch, shard.records)]
    drawn = [part[:2].expand(3, 2, *part.shape[1:]) for part in chance[0]]
    given = [(tuple(seen), tuple(drawn))] * 2
    rows = []

    for before in (0.0, np.nan, 1e30):
        memory = torch.full((3, NET.num_weights), before)
        steps(given, torch.full((3, 2), 0.5), side_by_side.parts_of(NET, memory))
        rows.append(memory)

    assert rows[0].abs().max() > 0
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


WIDE, ALONE = replace(NET, hidden=64), LocalTraining(2, 0.1, batch=1, per_user="loop")


def shared_by(net, settings):
    """Which matrices of a net are kept as outer products where users are taken one by one."""
    device = torch.device("cpu")
    given = (torch, device, net, weights_of(net), ALONE.lr)
    chance = local_training.chances(torch, device, net, users([2]), ALONE, seed=1)
    made = Made(MADE.shape, settings)
    return local_training._shared_products(given, made, ALONE, chance)


def test_wide_matrices_of_single_users_change_as_by_plain_steps(monkeypatch):
    shard, made = users([1, 3, 2, 5]), Made(MADE.shape, "a wide net")
    assert shared_by(WIDE, "a wide net")
    assert not shared_by(NET, "a narrow net")

    rows = updates(WIDE, weights_of(WIDE), shard, ALONE, made=made, seed=1)
    alone = updates(WIDE, weights_of(WIDE), one(shard, 2), ALONE, made=made, seed=1)
    monkeypatch.setattr(local_training, "_shared_products", lambda *_: frozenset())
    plain = updates(WIDE, weights_of(WIDE), shard, ALONE, made=made, seed=1)

    assert rows[2].tobytes() == alone[0].tobytes()
    np.testing.assert_allclose(rows, plain, atol=1e-6)
    assert np.abs(plain).max() > 1e-3


def test_how_many_records_another_user_has_changes_no_bit_of_outer_products():
    training, made = replace(ALONE, steps=1, batch=2), Made(MADE.shape, "a wide net, two by two")
    few, many = users([1, 1]), users([1, 5])

    rows = [
        updates(WIDE, weights_of(WIDE), shard, training, made=made, seed=1) for shard in (few, many)
    ]

    assert np.array_equal(few.records.codes[:1], many.records.codes[:1])
    assert rows[0][0].tobytes() == rows[1][0].tobytes()


def test_matrices_are_no_outer_products_where_a_model_uses_them_otherwise():
    strange = Strange(*astuple(WIDE)[:5], does="takes a part")

    assert not shared_by(strange, "a strange net")


def test_outer_products_that_give_other_changes_are_refused(monkeypatch):
    plain = local_training.Factored.write
    monkeypatch.setattr(
        local_training.Factored, "write", lambda self, out: plain(self, out) or out.mul_(1.001)
    )

    assert not shared_by(WIDE, "a wide net that comes out wrong")


@pytest.mark.parametrize("batch", [None, 4])
def test_how_many_records_another_user_has_changes_no_bit_side_by_side(batch):
    training = LocalTraining(2, 0.1, batch=batch, per_user="vmap")
    few, many = users([2, 2, 3, 3, 5]), users([2, 2, 3, 3, 9])

    rows = [updates_of(shard, training) for shard in (few, many)]

    assert np.array_equal(few.records.codes[:10], many.records.codes[:10])
    assert rows[0][:4].tobytes() == rows[1][:4].tobytes()
    assert (rows[0][4] != rows[1][4]).any()


def test_a_user_whose_loss_is_no_number_counts_as_zeros_and_the_others_as_they_are(monkeypatch):
    strategy = DpFedAvg(hidden=6, latent=2, per_user="loop")
    query = next(strategy.rounds(small_table(), 1.0, np.random.default_rng(0)))
    shard, plain = made_up(small_table(), [1] * 5, seed=1), Net.losses
    bad = shard.records.codes[2]
    is_bad = (shard.records.codes == bad).all(axis=1)
    honest = [block_sum(strategy, query, one(shard, user), seed=(1, 1)) for user in range(5)]

    def losses(self, torch, weights, seen, chance):
        hit = (seen[1] == torch.from_numpy(bad)).all(dim=1)
        return torch.where(hit, torch.nan, plain(self, torch, weights, seen, chance))

    monkeypatch.setattr(Net, "losses", losses)
    with_bad = block_sum(strategy, query, shard, seed=(1, 1))

    expected = sum(row for row, is_out in zip(honest, is_bad, strict=True) if not is_out)
    assert (with_bad == expected).all()
    assert np.abs(expected).max() > 0


def test_a_verdict_on_chunks_of_one_model_is_none_on_a_model_of_other_shapes(monkeypatch):
    """A request may say more of a model than its settings do, as which column is the label."""
    tried, device = [], torch.device("cpu")
    made = Made(MADE.shape, "what both are made of")
    monkeypatch.setattr(
        side_by_side, "_tried", lambda steps, *rest: tried.append(steps.model) or (1, 2)
    )
    wide = replace(NET, hidden=NET.hidden + 1)

    for model in (NET, NET, wide):
        steps = side_by_side._Steps(torch, model, weights_of(model), 0.1, device)
        assert side_by_side._sizes(steps, made, [()], 2) == (1, 2)

    assert tried == [NET, wide]


def spoil(monkeypatch, way, fault):
    """Have a way of taking users together change bits as real products might."""
    plain = way.__call__

    def unlike(self, batches, share, change):
        plain(self, batches, share, change)
        name = next(iter(change))
        tiny = 1e-7 * torch.arange(len(share)) if fault == "by place" else torch.zeros(len(share))
        if fault == "by neighbor":
            tiny = tiny + 1e-7 * batches[0][0][1].flatten(1).sum(1).roll(1)
        change[name] += tiny.view(-1, *[1] * (change[name].dim() - 1))

    monkeypatch.setattr(way, "__call__", unlike)


@pytest.mark.parametrize("fault", ["by place", "by neighbor", "not at all"])
def test_users_are_taken_one_by_one_where_places_or_neighbors_change_a_bit(monkeypatch, fault):
    shard = users([2, 2, 2])
    for way in (side_by_side._Steps, side_by_side.FactoredSteps):
        spoil(monkeypatch, way, fault)
    device = torch.device("cpu")
    rows = side_by_side.room_for(torch, 3, NET, device)
    chance = local_training.chances(torch, device, NET, shard, BESIDE, seed=1)

    taken = side_by_side.side_by_side(
        torch, device, NET, weights_of(NET), MADE, shard, BESIDE, 1, chance, rows
    )

    assert taken.tolist() == [fault == "not at all"] * 3


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"cells": np.array([2, 3])},
        {"cells": np.array([2, 0]), "image": np.array([], dtype=np.int64)},
        {"cells": np.array([2.0]), "image": np.array([], dtype=np.int64)},
        {"cells": np.array([2]), "image": np.array([8, 8])},
        {"cells": np.array([2]), "image": np.array([8, 8, 1 << 40])},
    ],
)
def test_a_request_that_describes_no_records_is_refused(inputs):
    with pytest.raises(ConfigError, match="describe"):
        RecordShape.from_inputs(inputs)


def test_a_client_whose_images_are_of_another_size_answers_with_zeros_for_nobody_elses_harm():
    strategy = DpFedAvg(hidden=6, latent=2)
    query = next(strategy.rounds(small_images(), 1.0, np.random.default_rng(0)))
    given = {**query.inputs, "image": np.array([16, 4, 1])}  # as many pixels, laid out otherwise
    other = Query(query.name, query.dim, query.clip, query.noise_multiplier, inputs=given)
    shard = made_up(small_images(), [1, 2], seed=1)

    with pytest.raises(ConfigError, match="another size"):
        strategy.answer(other, shard, np.random.default_rng(0))
    assert (block_sum(strategy, other, shard, seed=(1, 1)) == 0).all()


@pytest.fixture
def device():
    yield
    devices.choose("cpu")


def test_a_gpu_that_is_not_there_is_missed_with_a_word_on_what_to_do(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="device = 'auto'"):
        take_device("cuda")


def test_auto_takes_the_processor_where_there_is_no_gpu(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    take_device("auto")

    assert device_for(torch).type == "cpu"


def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(ConfigError, match="cpu, cuda, auto"):
        take_device("tpu")

# SPDX-License-Identifier: Apache-2.0
"""Research runs in one process: one client or many, sums that do not care, choices that do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from dp_accounting.dp_event import GaussianDpEvent
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard
from fedsynth.core.privacy import PrivacyUnit
from fedsynth.core.query import Choice, Contribution, Query, Strategy
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.independent import Columns
from fedsynth.strategies.mst import Mst

SCHEMA = Schema(
    tuple(
        Column(name, "category", "public: test", tuple(map(str, range(cells))))
        for name, cells in (("a", 3), ("b", 4), ("c", 2))
    )
)


class Fixed:
    """The same bytes every time."""

    is_secret = False

    def __init__(self):
        self._rng = np.random.default_rng(0)

    def read(self, num_bytes):
        return self._rng.bytes(num_bytes)


def population(num_users: int) -> BoundedShard:
    rng = np.random.default_rng(1)
    first = rng.integers(0, 3, num_users)
    codes = np.column_stack([first, (first + rng.integers(0, 2, num_users)) % 4, first > 1])
    ids = np.arange(num_users).astype(np.str_)
    return bound(Shard(Records(codes.astype(np.int32)), ids), PrivacyUnit(), seed=0)


def split(shard: BoundedShard, client: Sequence[int]) -> list[BoundedShard]:
    return [shard.only(np.asarray(client) == k) for k in np.unique(client)]


def test_the_same_noise_gives_the_same_records_however_people_are_dealt_out():
    shard = population(900)
    by_value = split(shard, shard.records.codes[:, 0])
    at_random = split(shard, np.random.default_rng(2).integers(0, 7, 900))

    made = [
        direct_run(Mst(), SCHEMA, people, 0.3, rng=np.random.default_rng(3), stream=Fixed())
        .sample(500, np.random.default_rng(4))
        .codes
        for people in (shard, by_value, at_random)
    ]

    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_the_same_people_under_other_noise_give_other_records():
    shard = population(900)

    made = [
        direct_run(Mst(), SCHEMA, shard, 0.3, rng=np.random.default_rng(3))
        .sample(500, np.random.default_rng(4))
        .codes
        for _ in range(2)
    ]

    assert not np.array_equal(made[0], made[1])


@dataclass(frozen=True)
class Commonest(Strategy):
    """Every client, or the server, says which value of the first column is commonest."""

    where: str = "client"
    name: ClassVar[str] = "commonest"

    def event(self, schema, noise_multiplier):
        return GaussianDpEvent(noise_multiplier)

    def rounds(self, schema, noise_multiplier, rng):
        choice = Choice.among([1, 1, 1], np.zeros(3), where=self.where)
        query = Query("commonest", 3, 1.0, noise_multiplier, cells=True, choice=choice)
        picked = yield query
        probs = (picked.vector / picked.vector.sum(), np.full(4, 0.25), np.full(2, 0.5))
        return Columns(schema, probs)

    def answer(self, query, shard, rng):
        return Contribution.cells(
            shard.records.codes[:, :1], shard.user_index, num_users=shard.num_users
        )


def test_clients_that_choose_choose_by_their_own_records_and_are_counted():
    shard = population(900)
    value = shard.records.codes[:, 0]
    clients = split(shard, value)  # each has one value only

    at_client = direct_run(Commonest(), SCHEMA, clients, 0.1, rng=np.random.default_rng(0))
    at_server = direct_run(Commonest("server"), SCHEMA, clients, 0.1, rng=np.random.default_rng(0))

    np.testing.assert_allclose(at_client.probs[0], np.full(3, 1 / 3))
    assert at_server.probs[0][np.bincount(value).argmax()] == 1.0

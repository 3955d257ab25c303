# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a series: users take turns, it is charged once, and its release verifies."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import PrivacyRefusal
from fedsynth.core.leaf import Leaf
from fedsynth.core.query import Contribution, NoisySum, Query, Strategy
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.series import ONE, Series, Turn
from fedsynth.server.audit_trail import check_trail
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of
from fedsynth.simulation.direct import non_private
from fedsynth.simulation.plan import outlook
from fedsynth.simulation.run import run_local
from fedsynth.strategies.independent import Columns

import fedsynth as fs

SERIES = Series((1900, 1150, 650), 8, 3)
USERS = 120
own_sums: list[np.ndarray] = []
answered: list[tuple[int, int]] = []


@dataclass(frozen=True)
class Presence(Strategy):
    """Eight rounds of a series in which every user whose turn it is gives a one."""

    name: ClassVar[str] = "presence"
    repeats: bool = False

    def event(self, schema: Any, noise_multiplier: float) -> Any:
        return accounting.SeriesDpEvent(noise_multiplier, SERIES.num_rounds)

    def rounds(self, schema: Any, noise_multiplier: float, rng: Any) -> Iterator[Query]:
        own_sums.clear()
        for position in range(SERIES.num_rounds):
            noisy: NoisySum = yield Query(
                "ones",
                2,
                1.0,
                noise_multiplier,
                resolution=14,
                turn=Turn(SERIES, min(position, 4) if self.repeats else position),
            )
            own = noisy.vector - sum(
                SERIES.coefficients[lag] / ONE * own_sums[-lag]
                for lag in range(1, min(position, 2) + 1)
            )
            own_sums.append(own * ONE / SERIES.coefficients[0])
        return Columns(schema, [np.full(size, 1 / size) for size in schema.shape])

    def answer(self, query: Query, shard: Any, rng: Any) -> Contribution:
        if shard.num_users:
            answered.append((query.turn.position, shard.num_users))
        return Contribution.rows(np.tile([1.0, 0.0], (shard.num_users, 1)))


@pytest.fixture
def config(tmp_path):
    lines = ["who,color", *(f"u{user},red" for user in range(USERS))]
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    color = {"type": "category", "categories": ["red", "green"], "origin": "public: made up"}
    (tmp_path / "schema.json").write_text(json.dumps({"columns": {"color": color}}))
    answered.clear()

    def of(**settings: Any) -> Any:
        described = {
            "population": {"name": "town", "num_users": USERS, "epsilon": 9.0, "delta": 1e-3},
            "data": {"path": "people.csv", "schema": "schema.json"},
            "unit": {"column": "who"},
            "budget": {"epsilon": 4.0},
            "strategy": {"name": f"{__name__}:Presence", **settings},
            "engine": {"clients": 3, "timeout_s": 20.0},
            "release": {"num_records": 10},
        }
        return parse_config(described, base=tmp_path)

    return of


def test_a_series_is_charged_as_one_sum_and_its_release_verifies(config, tmp_path):
    plan = plan_of(config())

    folder = run_local(plan, stream=OsKeyStream())

    leaf = Leaf(plan.noise_multiplier, rounds=8)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert accounting.leaves(ledger.spent("town")) == {leaf: 1}
        assert check_trail(ledger, plan.run) == []
    exact = accounting.epsilon_of(accounting.single_event(plan.noise_multiplier), 1e-3)
    release = fs.Release.open(folder)
    assert release.card.epsilon == exact
    assert release.verify().ok
    assert "users took turns" in release.card.to_markdown()


def test_each_user_answers_each_third_round_and_no_other(config):
    run_local(plan_of(config()), stream=OsKeyStream())

    counts = np.zeros(8, dtype=int)
    for position, num_users in answered:
        counts[position] += num_users
    assert counts[:3].sum() == counts[3:6].sum() == USERS
    assert counts[:3].tolist() == counts[3:6].tolist()
    assert counts[6:].tolist() == counts[:2].tolist()
    assert counts[:3].min() > USERS / 6


def test_what_the_server_takes_the_echoes_off_is_each_rounds_own_sum(config):
    plan = plan_of(config())

    run_local(plan, stream=OsKeyStream())

    counts = np.zeros(8)
    for position, num_users in answered:
        counts[position] += num_users
    c = np.zeros((8, 8))
    for lag, coefficient in enumerate(SERIES.coefficients):
        c += np.diag(np.full(8 - lag, coefficient / ONE), -lag)
    spread = plan.noise_multiplier * np.sqrt((np.linalg.inv(c) ** 2).sum(axis=1))
    assert (np.abs(np.array(own_sums)[:, 0] - counts) < 5 * spread).all()
    assert (np.abs(np.array(own_sums)[:, 1]) < 5 * spread).all()


def test_a_direct_run_without_noise_gives_the_same_sums(config):
    schema = plan_of(config()).schema
    codes = np.zeros((USERS, 1), dtype=np.int32)
    words = np.random.default_rng(0).integers(1 << 63, size=USERS).astype(np.uint64)
    shard = BoundedShard(Records(codes), np.arange(USERS), USERS, 1, words)

    non_private(Presence(), schema, shard, np.random.default_rng(0))

    counts = np.zeros(8)
    for position, num_users in answered:
        counts[position] += num_users
    assert np.array(own_sums)[:, 0] == pytest.approx(counts, abs=1e-3)


def test_a_series_that_asks_a_round_twice_is_stopped_before_anybody_is_asked_again(config):
    plan = plan_of(config(repeats=True))

    with pytest.raises(PrivacyRefusal, match="comes once, in order"):
        run_local(plan, stream=OsKeyStream())

    assert sorted({position for position, _ in answered}) == [0, 1, 2, 3, 4]


def test_a_plan_shows_all_rounds_of_a_series_at_the_price_of_one(config):
    seen = outlook(config())

    (step,) = seen.steps
    assert (step.num_rounds, seen.num_rounds) == (8, 8)
    assert step.epsilon_after == pytest.approx(4.0, rel=1e-3)

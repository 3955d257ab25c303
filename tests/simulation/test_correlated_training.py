# SPDX-License-Identifier: Apache-2.0
"""Whole trainings with correlated noise, or with a clip that follows: priced, killed, resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fedsynth.client.bounding import bound
from fedsynth.client.policy import Policy
from fedsynth.client.respond import respond
from fedsynth.client.shard import Shard
from fedsynth.client.site import simulated_site
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ClientCode, ConfigError
from fedsynth.core.leaf import Leaf
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.server.conduct import _draft
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of
from fedsynth.server.release import Release, verify
from fedsynth.simulation.check import check_strategy, small_table
from fedsynth.simulation.faults import small_run, survive
from fedsynth.simulation.run import run_local
from fedsynth.strategies.registry import build_strategy

pytest.importorskip("torch")
ORIGIN = "public: everybody knows digits"
DIGIT = Column("digit", "category", ORIGIN, categories=tuple("0123456789"))
SCHEMA = Schema((DIGIT,), ImageColumn("image", (8, 8, 1), ORIGIN), target="digit")
USERS = 150
TINY = {"num_users": USERS, "hidden": 8, "latent": 2, "num_rounds": 6}
TURNS = {"sampling_prob": 1.0, "correlation": "banded", "separation": 3}


def digits():
    """One of scikit-learn's digits a user."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images[:USERS] * 255 / 16).astype(np.uint8)[..., None]
    codes = found.target[:USERS, None].astype(np.int32)
    return Shard(Records(codes, images), np.array([f"u{i}" for i in range(USERS)]))


def planned(base, *, placement="central", **settings):
    (base / "schema.json").write_text(json.dumps(SCHEMA.to_json()))
    config = {
        "population": {"name": "digits", "num_users": USERS, "epsilon": 9.0, "delta": 1e-4},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user"},
        "budget": {"epsilon": 8.0},
        "strategy": {"name": "dp_fedavg", **TINY, **settings},
        "noise": {"placement": placement},
        "engine": {"clients": 2},
        "release": {"num_records": 40},
    }
    return plan_of(parse_config(config, base=base))


@pytest.mark.parametrize("correlation", ["banded", "blt"])
def test_a_training_with_correlated_noise_is_charged_as_one_sum(tmp_path, correlation):
    plan = planned(tmp_path, **TURNS | {"correlation": correlation})

    folder = run_local(plan, stream=OsKeyStream(), data=digits())

    with Ledger(tmp_path / "ledger.db") as ledger:
        assert accounting.leaves(ledger.spent("digits")) == {
            Leaf(plan.noise_multiplier, rounds=6): 1
        }
    exact = accounting.epsilon_of(accounting.single_event(plan.noise_multiplier), 1e-4)
    assert Release.open(folder).card.epsilon == exact <= 8.0
    assert [check.name for check in verify(folder, replay=True) if not check.ok] == []


@pytest.mark.parametrize("point", ["after-draw:3", "after-client-store:4", "before-seal:2"])
def test_a_killed_training_with_correlated_noise_goes_on_where_it_was(tmp_path, point):
    settings = {"name": "dp_fedavg", **TINY, "num_users": 90, **TURNS}

    survival = survive(small_run(tmp_path, table_strategy=settings), failpoint=point)

    assert survival.kills == 1
    assert survival.ok, survival


def test_a_client_that_is_asked_a_round_again_sends_the_same_bytes(tmp_path):
    plan = planned(tmp_path, placement="local", **TURNS)
    steps = plan.strategy.rounds(plan.schema, plan.noise_multiplier, plan.rng)
    shard = bound(digits(), plan.config.privacy_unit, seed=0)
    site = simulated_site(
        Policy.for_simulation(plan.config),
        plan.schema,
        0,
        1,
        tmp_path / "odometer.db",
        lambda unit, seed: shard,
        secure=False,
    )
    first = replace(_draft(plan), query=next(steps), head=(1, "a"))
    heard = respond(first, site, OsKeyStream())
    asked = steps.send(NoisySum(heard.total * 1e-9, 1.0, 1))
    while not isinstance(asked, Query):  # a checkpoint
        asked = next(steps)

    again = respond(first, site, OsKeyStream())
    second = replace(first, round=2, query=asked, head=(2, "b"))
    told = [respond(second, site, OsKeyStream()) for _ in range(2)]
    back = respond(replace(first, round=3, head=(3, "c")), site, OsKeyStream())

    assert heard.code is told[0].code is ClientCode.OK
    assert np.array_equal(heard.total, again.total)
    assert np.array_equal(told[0].total, told[1].total)
    assert not np.array_equal(heard.total, told[0].total)
    assert (back.code, back.total) == (ClientCode.OUTSIDE_PLAN, None)


def test_a_clip_that_follows_costs_what_a_fixed_one_does(tmp_path):
    fixed, following = (
        planned(tmp_path, sampling_prob=0.5, **more) for more in ({}, {"clip_quantile": 0.5})
    )

    assert following.noise_multiplier == fixed.noise_multiplier
    assert accounting.leaves(following.event) == accounting.leaves(fixed.event)


def test_a_training_whose_clip_follows_is_released_and_replays(tmp_path):
    plan = planned(tmp_path, sampling_prob=0.5, clip_quantile=0.5, clip_rate=0.5, clip=0.1)

    seen = []
    folder = run_local(plan, stream=OsKeyStream(), data=digits(), on_event=seen.append)

    assert [check.name for check in verify(folder, replay=True) if not check.ok] == []
    clips = [event.stddev / plan.noise_multiplier for event in seen if event.stddev]
    assert clips[0] == pytest.approx(0.1)
    assert clips == sorted(clips)
    assert clips[-1] > 0.2  # updates are far longer


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"correlation": "banded"}, "sampling_prob to 1"),
        (TURNS | {"clip_quantile": 0.5}, "one clip"),
        (TURNS | {"separation": 101}, "separation"),
        (TURNS | {"correlation": "tree"}, "'banded' or 'blt'"),
        ({"clip_quantile": 1.0}, "clip_quantile"),
        ({"clip_bit_share": 0.0}, "clip_bit_share"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        build_strategy("dp_fedavg", settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"clip_quantile": 0.5}, TURNS, TURNS | {"correlation": "blt"}]
)
def test_a_training_keeps_all_that_a_strategy_owes(settings):
    short = {"num_rounds": 3, "num_users": 40, "hidden": 8, "latent": 2, **settings}

    findings = check_strategy(build_strategy("dp_fedavg", short), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []

# SPDX-License-Identifier: Apache-2.0
"""Whole runs of votes: one that stops early is charged for what it asked; the card says it all."""

import json
from pathlib import Path

import numpy as np
import pytest
from fedsynth.client.odometer import Odometer
from fedsynth.client.shard import Shard
from fedsynth.client.site import simulation_state
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import Interrupted
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, Schema
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import Plan, plan_of, unfinished
from fedsynth.server.release import Release, verify
from fedsynth.server.statement import statement
from fedsynth.simulation.run import run_local

ORIGIN = "public: made up for this test"
PLANE = Schema(tuple(Column(name, "real", ORIGIN, bounds=(0.0, 1.0), num_bins=64) for name in "xy"))
PLANNED = 15


def population():
    """Users of whom each has one record, anywhere: a pool drawn evenly can come no nearer."""
    codes = np.random.default_rng(0).integers(0, 64, (900, 2)).astype(np.int32)
    return Shard(Records(codes), np.array([f"u{i}" for i in range(900)]))


def planned(base: Path, run="run-1", **strategy) -> Plan:
    (base / "schema.json").write_text(json.dumps(PLANE.to_json()))
    settings = {"num_rounds": PLANNED, "num_candidates": 40, "num_votes": 1, "grounding": 0.0}
    config = {
        "population": {"name": "plane", "num_users": 900, "epsilon": 9.0, "delta": 1e-5},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user"},
        "budget": {"epsilon": 4.0},
        "strategy": {"name": "private_evolution", "held_out": 0.3, "patience": 1}
        | settings
        | strategy,
        "engine": {"clients": 2},
        "release": {"num_records": 50},
    }
    return plan_of(parse_config(config, base=base), run=run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Plan, Path]:
    plan = planned(tmp_path_factory.mktemp("stopped"))
    return plan, run_local(plan, stream=OsKeyStream(), data=population())


def test_what_was_not_asked_is_not_charged(stopped):
    plan, folder = stopped
    ledger = Ledger(plan.config.path(plan.config.ledger))
    asked = len(Release.open(folder).card.rounds)
    (leaf,) = accounting.leaves(plan.event)

    spent = accounting.leaves(ledger.spent("plane"))

    assert 2 <= asked < PLANNED
    assert spent == {leaf: asked}
    lines = statement(ledger, "plane")
    assert len(lines) == asked
    assert lines[-1].total == pytest.approx(
        accounting.epsilon_of(accounting.event_of({leaf: asked}), 1e-5)
    )
    assert lines[-1].total < 0.9 * accounting.epsilon_of(plan.event, 1e-5)


def test_what_was_saved_can_be_spent_on_another_run(stopped):
    plan, _ = stopped
    ledger = Ledger(plan.config.path(plan.config.ledger))
    left = planned(plan.config.base, run="run-2")

    both = accounting.epsilon_of(accounting.compose([ledger.spent("plane"), left.event]), 1e-5)
    as_planned = accounting.epsilon_of(accounting.compose([plan.event, left.event]), 1e-5)

    assert both < as_planned - 0.3


def test_clients_keep_the_whole_plan_on_their_odometers(stopped):
    plan, _ = stopped
    state = simulation_state(plan.config) / "odometer.db"

    spent = Odometer(state, "client-0-of-2").spent("plane", delta=1e-5)

    assert spent.epsilon == pytest.approx(accounting.epsilon_of(plan.event, 1e-5), rel=1e-6)


def test_a_release_that_stopped_early_verifies_and_replays(stopped):
    _, folder = stopped

    assert [check for check in verify(folder, replay=True) if not check.ok] == []


def test_the_card_says_how_near_it_came_and_that_it_stopped(stopped):
    _, folder = stopped
    release = Release.open(folder)
    asked = len(release.card.rounds)

    (told,) = release.card.findings

    assert f"stopped after {asked} of {PLANNED} rounds" in told
    page = (folder / "card.md").read_text(encoding="utf-8")
    assert "## What the run measured of itself" in page
    assert f"stopped after {asked} of {PLANNED} rounds" in page
    assert release.synthesizer.findings == release.card.findings


def test_a_stopped_run_that_was_killed_resumes_to_the_same_end(tmp_path):
    plan = planned(tmp_path, patience=2)

    def stop_after_two(event):
        if event.round == 2 and not event.replayed:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_local(plan, stream=OsKeyStream(), data=population(), on_event=stop_after_two)
    folder = plan.config.path(plan.config.release.path) / f"{plan.run}.unfinished"
    seen = []
    release = run_local(
        unfinished(folder), stream=OsKeyStream(), data=population(), on_event=seen.append
    )

    assert [event.replayed for event in seen[:3]] == [True, True, False]
    assert len(seen) == len(Release.open(release).card.rounds) < PLANNED
    assert [check for check in verify(release, replay=True) if not check.ok] == []


def test_without_patience_every_round_is_asked_and_told(tmp_path):
    plan = planned(tmp_path, patience=0, num_rounds=4)

    release = Release.open(run_local(plan, stream=OsKeyStream(), data=population()))

    assert len(release.card.rounds) == 4
    assert "stopped" not in release.card.findings[0]


def test_without_judges_a_card_tells_no_distances(tmp_path):
    plan = planned(tmp_path, patience=0, held_out=0.0, num_rounds=2)

    folder = run_local(plan, stream=OsKeyStream(), data=population())

    assert Release.open(folder).card.findings == ()
    assert "measured of itself" not in (folder / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"vote": "l2_clip", "max_norm": 2.5}, "longer than 2.5 times one record's"),
        ({"vote": "l2_normalize"}, "neither users nor records count equally"),
        ({"vote": "l1"}, "a user's records share one vote"),
        ({"vote": "one_record"}, "one record of each votes"),
    ],
)
def test_the_card_says_whom_a_rule_of_votes_counts(tmp_path, rule, words):
    plan = planned(tmp_path, patience=0, held_out=0.0, num_rounds=1, **rule)

    folder = run_local(plan, stream=OsKeyStream(), data=population())

    page = (folder / "card.md").read_text(encoding="utf-8")
    assert words in page.split("## What it describes")[1].split("##")[0]

# SPDX-License-Identifier: Apache-2.0
"""Runs that choose in private: charged, sealed and replayed like sums, and only where trusted."""

from dataclasses import replace

import numpy as np
import pytest
from fedsynth.client.policy import Policy
from fedsynth.client.respond import respond
from fedsynth.client.site import simulated_site
from fedsynth.core.choice import epsilon_of_choice
from fedsynth.core.errors import ClientCode, ConfigError
from fedsynth.core.privacy import NoisePlacement
from fedsynth.core.query import NoisySum, trusts_server
from fedsynth.core.randomness import OsKeyStream
from fedsynth.server.audit_trail import check_trail
from fedsynth.server.conduct import _draft
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of
from fedsynth.server.release import Release, verify
from fedsynth.simulation.faults import made_up_population, small_run, survive
from fedsynth.simulation.plan import lines_of, outlook
from fedsynth.simulation.run import run_local
from fedsynth.strategies.aim import Aim
from fedsynth.strategies.flaim import Flaim
from fedsynth.strategies.registry import build_strategy


def configured(folder, strategy, placement="central", **settings):
    """A small run of a strategy, over the made-up population."""
    return small_run(folder, placement=placement, table_strategy={"name": strategy, **settings})


def done(config):
    """Its release."""
    plan = plan_of(config)
    return run_local(plan, stream=OsKeyStream(), data=made_up_population(plan.schema))


def test_a_run_that_chooses_at_the_server_is_charged_sealed_and_replayed(tmp_path):
    config = configured(tmp_path, "mwem", num_steps=3)

    folder = done(config)

    assert [check.name for check in verify(folder, replay=True) if not check.ok] == []
    card = Release.open(folder).card
    assert [r.chooses for r in card.rounds] == [0, 1, 0, 1, 0, 1, 0]
    assert "exponential mechanism" in (folder / "card.md").read_text()
    with Ledger(config.path(config.ledger)) as ledger:
        (run,) = ledger.runs()
        assert check_trail(ledger, run.run) == []
        sealed = ledger.sum_of(run.run, 2)
        assert sealed.unit == 1.0
        assert sorted(sealed.total.tolist())[-2:] == [0, 1]  # which one, and nothing of the sum


@pytest.mark.parametrize("placement", ["central", "local", "distributed"])
def test_clients_choose_under_any_placement(tmp_path, placement):
    config = configured(tmp_path, "flaim", placement, num_steps=2, augmented=True)

    folder = done(config)

    assert [check.name for check in verify(folder, replay=True) if not check.ok] == []
    with Ledger(config.path(config.ledger)) as ledger:
        (run,) = ledger.runs()
        assert check_trail(ledger, run.run) == []
        assert ledger.sum_of(run.run, 2).total.sum() == 3  # one choice a client


@pytest.mark.parametrize("placement", ["local", "distributed"])
@pytest.mark.parametrize("strategy", ["aim", "mwem", "absyn"])
def test_a_server_that_is_not_trusted_with_sums_does_not_choose(tmp_path, strategy, placement):
    config = configured(tmp_path, strategy, placement)

    with pytest.raises(ConfigError, match="'central' only"):
        plan_of(config)

    assert not config.path(config.ledger).exists()


@pytest.mark.parametrize("placement", ["local", "distributed"])
def test_aim_by_sums_trusts_nobody(tmp_path, placement):
    config = configured(tmp_path, "aim", placement, num_steps=2, select="sums")

    assert all(check.ok for check in verify(done(config)))


def test_a_choice_that_was_not_declared_is_refused_before_it_is_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(Aim, "trusts_server", False)
    config = configured(tmp_path, "aim", "local", num_steps=2)

    with pytest.raises(ConfigError, match="'central' only"):
        done(config)

    with Ledger(config.path(config.ledger)) as ledger:
        (run,) = ledger.runs()
        assert [state.query for state in ledger.attempts(run.run)] == ["columns"]


def test_a_client_gives_no_sum_to_choose_by_but_to_a_trusted_server(tmp_path):
    plan = plan_of(configured(tmp_path, "mwem", num_steps=2))
    rounds = plan.strategy.rounds(plan.schema, plan.noise_multiplier, plan.rng)
    query = rounds.send(NoisySum.void(next(rounds)))
    ask = replace(_draft(plan), query=query, placement=NoisePlacement.LOCAL, head=(1, "a"))
    site = simulated_site(
        Policy.for_simulation(configured(tmp_path, "mwem", "local")),
        plan.schema,
        0,
        1,
        tmp_path / "odometer.db",
        lambda unit, seed: pytest.fail("the records were looked at"),
        secure=True,
    )

    reply = respond(ask, site, OsKeyStream())

    assert query.choice is not None
    assert (reply.code, reply.total) == (ClientCode.POLICY_REFUSED, None)


@pytest.mark.parametrize("point", ["before-draw", "after-draw", "before-seal", "after-seal"])
def test_a_choice_lost_with_a_crash_is_charged_and_never_made_again(tmp_path, point):
    # the second round is the first choice
    survival = survive(configured(tmp_path, "mwem", num_steps=2), failpoint=f"{point}:2")

    assert survival.kills == 1
    assert survival.ok, survival
    assert survival.void_rounds == (point in ("after-draw", "before-seal"))


@pytest.mark.parametrize("placement", ["central", "local"])
def test_a_choice_that_a_client_lost_is_not_made_again(tmp_path, placement):
    # three clients answer the first query, which is a sum; the fourth answer is a choice
    config = configured(tmp_path, "flaim", placement, num_steps=1)
    survival = survive(config, failpoint="before-client-store:4")

    assert survival.kills == 1
    assert survival.ok, survival
    assert survival.void_rounds == 1  # with central noise a lost sum would be computed again


def test_a_plan_says_who_chooses_and_at_what_epsilon(tmp_path):
    config = configured(tmp_path, "absyn", num_steps=1, batch=2)

    seen = outlook(config)

    (step,) = [step for step in seen.steps if step.query == "worst"]
    epsilon = epsilon_of_choice(step.noise_multiplier * np.sqrt(2))
    assert "2 of 15 candidates chosen at the server" in step.expect
    assert f"epsilon {epsilon:.3g}" in step.expect
    assert "exponential mechanism" in "".join(text for _, text in lines_of(seen))


def test_only_strategies_that_choose_at_the_server_trust_it():
    assert trusts_server(Aim())
    assert not trusts_server(Aim(select="sums"))
    assert not trusts_server(Flaim())
    assert not trusts_server(build_strategy("mst", {}))

# SPDX-License-Identifier: Apache-2.0
"""What training will tell from noise is known beforehand, and a hopeless run is refused."""

import json
import math

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.electorate import Electorate
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget, NoisePlacement
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.server.planned import plan_of
from fedsynth.simulation.plan import lines_of, outlook
from fedsynth.strategies.dp_fedavg import DpFedAvg
from fedsynth.strategies.parts.proposal import COMMON, HOPELESS, Pull

ORIGIN = "public: made up for this test"
DIGITS = Schema(
    (Column("label", "category", ORIGIN, tuple("0123456789")),),
    ImageColumn("image", (8, 8, 1), ORIGIN),
    target="label",
)


def test_the_pull_of_a_round_is_as_measured_on_vectors():
    rng = np.random.default_rng(0)
    pull = Pull(2000, 400, num_rounds=9, sampling_prob=0.5, noise_multiplier=3.0, common=0.3)
    direction = np.zeros(400)
    direction[0] = 1.0

    apart = rng.normal(size=(1000, 400))  # what users do not have in common cancels, but for noise
    apart[:, 0] = 0.0
    apart *= math.sqrt(1 - 0.3**2) / np.linalg.norm(apart, axis=1, keepdims=True)
    total = (0.3 * direction + apart).sum(axis=0)
    noise = 3.0 * rng.normal(size=(200, 400))

    measured = total[0] / np.linalg.norm(noise, axis=1).mean()
    assert pull.of_round == pytest.approx(measured, rel=0.02)
    assert pull.of_round != pytest.approx(measured * 4 / 3, rel=0.02)
    assert pull.of_run == pytest.approx(3 * pull.of_round)


@pytest.mark.parametrize("prob", [0.1, 0.3, 1.0])
def test_another_cohort_is_predicted_as_the_accountant_prices_it(prob):
    budget = Budget(4.0, 1e-5)

    def dial(q):
        return accounting.calibrate(lambda z: accounting.event_of({(z, q): 50}), budget)

    pull = Pull(1000, 1000, 50, 0.2, dial(0.2))
    exact = Pull(1000, 1000, 50, prob, dial(prob))

    assert pull.with_cohort(prob).of_run == pytest.approx(exact.of_run, rel=0.12)


def test_with_everybody_in_every_round_the_number_of_rounds_is_of_no_account():
    one = Pull(1000, 1000, 1, 1.0, 2.0)
    many = Pull(1000, 1000, 100, 1.0, 20.0)  # as much noise for the budget as one round

    assert many.of_run == pytest.approx(one.of_run)
    assert many.of_everybody == pytest.approx(one.of_run)


def test_the_cohort_that_is_enough_has_nine_tenths_of_what_everybody_has():
    pull = Pull(1438, 3150, 30, 0.2, 1.523)

    there = pull.with_cohort(pull.enough)

    assert there.of_run == pytest.approx(0.9 * pull.of_everybody, rel=1e-3)


def test_a_cohort_that_pulls_too_little_is_told_of_a_larger_one():
    small = Pull(1438, 3150, 30, 0.02, 0.6).prospect("update").proposal
    large = Pull(1438, 3150, 30, 1.0, 6.0).prospect("update").proposal

    assert "would pull" in small
    assert "of the work" in large


@pytest.mark.parametrize(("step", "told"), [(0.001, True), (0.06, False), (1.0, True)])
def test_a_step_that_does_not_fit_the_rounds_is_told_of_another(step, told):
    proposal = Pull(1438, 3150, 30, 0.2, 1.523).prospect("update", step=step).proposal

    assert ("server_lr" in proposal) == told


@pytest.mark.parametrize(
    ("settings", "told"), [({}, True), ({"clip_quantile": 0.5}, False)], ids=["fixed", "follows"]
)
def test_a_fixed_clip_is_told_to_be_short(settings, told):
    strategy = DpFedAvg(num_users=1438, **settings)

    seen = strategy.prospect(DIGITS, 2.0, Electorate(1438))

    assert ("shorter than most updates" in seen.proposal) == told


def test_where_noise_is_correlated_nothing_is_foretold():
    strategy = DpFedAvg(num_users=50, sampling_prob=1.0, correlation="banded")

    assert strategy.prospect(DIGITS, 2.0, Electorate(50)) is None
    strategy.check_signal(DIGITS, 2.0, Electorate(50))


def test_a_run_that_noise_alone_would_move_is_refused_and_says_what_would_do():
    pull = Pull(100, 22_362, 100, 0.2, 2.0)

    with pytest.raises(ConfigError, match=r"would not be heard.*Nothing was asked"):
        pull.check()

    most = Pull(100, 22_362, 100, 0.2, 2.0, common=1.0).of_run
    assert most < HOPELESS
    Pull(100 / most * 1.01, 22_362, 100, 0.2, 2.0).check()  # and more users would do


def test_few_users_are_refused_before_anything_is_asked():
    strategy = DpFedAvg(num_users=50)

    with pytest.raises(ConfigError, match="22,362 weights"):
        strategy.check_signal(DIGITS, 2.0, Electorate(50))
    strategy.check_signal(DIGITS, 2.0, Electorate(1438))


def config_in(folder, placement):
    """A run of dp_fedavg on digits."""
    (folder / "schema.json").write_text(json.dumps(DIGITS.to_json()), encoding="utf-8")
    return parse_config(
        {
            "population": {"name": "p", "num_users": 1438, "epsilon": 4.0, "delta": 1e-5},
            "data": {"schema": "schema.json"},
            "budget": {"epsilon": 4.0},
            "strategy": {"name": "dp_fedavg", "num_users": 1438, "num_rounds": 20},
            "noise": {"placement": placement.value},
            "engine": {"clients": 400},
        },
        base=folder,
    )


def test_a_plan_shows_the_signal_of_a_round_and_of_the_run(tmp_path):
    seen = outlook(config_in(tmp_path, NoisePlacement.CENTRAL))

    (expected,) = [text for label, text in lines_of(seen) if label == "Expect"]
    assert f"if {COMMON:g} of a clipped update is common to all" in expected
    assert "times over the run" in expected


def test_noise_that_each_client_adds_makes_a_run_hopeless(tmp_path):
    with pytest.raises(ConfigError, match="would not be heard"):
        plan_of(config_in(tmp_path, NoisePlacement.LOCAL))

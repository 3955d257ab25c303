# SPDX-License-Identifier: Apache-2.0
"""Epsilon of known plans, to the third decimal, and the algebra of events."""

import math
import time

import pytest
from dp_accounting.dp_event import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from fedsynth.core import accounting
from fedsynth.core.accounting import event_of
from fedsynth.core.errors import ConfigError
from fedsynth.core.leaf import Leaf
from fedsynth.core.privacy import Budget
from hypothesis import given, settings
from hypothesis import strategies as st

# (noise_multiplier, sampling_prob, count, delta): exact or PLD epsilon, RDP epsilon.
# Computed with dp-accounting 0.6 and cross-checked with autodp and Opacus.
GOLDEN = [
    ((1.0, 1.0, 1, 1e-5), 4.3772, 4.7285),
    ((4.0, 1.0, 10, 1e-5), 3.3414, 3.6171),
    ((10 * math.sqrt(2), 1.0, 7, 1e-5), 0.6745, 0.7388),
    ((5 * math.sqrt(2), 1.0, 20, 1e-5), 2.5944, None),
    ((1.0, 0.01, 1000, 1e-5), 1.8282, 2.1014),
    ((2.0, 0.1, 200, 1e-6), 3.8059, 4.1176),
    ((1.1, 256 / 60000, 14062, 1e-5), 2.3817, 2.5966),
    ((1.0, 100 / 3400, 200, 3400**-1.1), 2.1911, 2.5933),
    ((11.3, 1.0, 11, 3e-6), 1.189, None),
    ((2.31, 1.0, 11, 3e-6), 7.080, None),
    ((19.3, 1.0, 20, 3e-6), 0.920, None),
    # Aug-PE's published noise, delta = 1 / (N ln N)
    ((15.34, 1.0, 10, 1 / (1939290 * math.log(1939290))), 1.0045, None),
    ((11.60, 1.0, 10, 1 / (8396 * math.log(8396))), 1.000, None),
    ((3.75, 1.0, 10, 1 / (75316 * math.log(75316))), 3.999, None),
]


@pytest.mark.parametrize(("plan", "epsilon", "rdp"), GOLDEN)
def test_epsilon_equals_the_golden_value(plan, epsilon, rdp):
    noise, prob, count, delta = plan

    price = accounting.price(event_of({(noise, prob): count}), delta)

    assert price.epsilon == pytest.approx(epsilon, abs=1e-3)
    if rdp is not None:
        assert price.rdp_epsilon == pytest.approx(rdp, abs=1e-3)
    assert price.epsilon <= price.rdp_epsilon


def test_unsampled_sums_compose_exactly():
    split = accounting.split(1.7, [0.1, 0.3, 0.6])

    whole = accounting.epsilon_of(GaussianDpEvent(1.7), 1e-6)
    parts = accounting.epsilon_of(ComposedDpEvent([GaussianDpEvent(z) for z in split]), 1e-6)

    assert parts == pytest.approx(whole, rel=1e-9)


def test_an_event_survives_json_and_regrouping():
    event = ComposedDpEvent(
        [
            SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 5),
            GaussianDpEvent(3.0),
            ComposedDpEvent([GaussianDpEvent(3.0)]),
        ]
    )

    again = accounting.from_json(accounting.to_json(event))

    assert accounting.leaves(again) == {Leaf(2.0, 0.1): 5, Leaf(3.0): 2}


def test_an_event_that_is_not_a_gaussian_sum_is_refused():
    with pytest.raises(ConfigError, match="LaplaceDpEvent"):
        accounting.price(LaplaceDpEvent(1.0), 1e-6)


@pytest.mark.parametrize(
    "entry",
    [
        {"noise_multiplier": 0.0, "sampling_prob": 1.0, "count": 1},
        {"noise_multiplier": 1.0, "sampling_prob": 1.5, "count": 1},
        {"noise_multiplier": 1.0, "sampling_prob": 1.0, "count": -1},
        {"noise_multiplier": float("nan"), "sampling_prob": 1.0, "count": 1},
    ],
)
def test_a_foreign_event_that_cannot_be_is_refused(entry):
    with pytest.raises(ConfigError):
        accounting.from_json([entry])


@pytest.mark.parametrize(
    ("noise", "count"), [(0.001, 1), (0.01, 1), (1.0, 10**9), (1e6, 10**9), (1e3, 10**8)]
)
def test_a_strangers_plan_that_no_loss_distribution_could_hold_is_priced_at_once(noise, count):
    begun = time.process_time()

    price = accounting.price(event_of({(noise, 0.5): count}), 1e-6)

    assert price.accountant == "rdp"
    assert price.epsilon == price.rdp_epsilon
    assert time.process_time() - begun < 5


def test_calibration_meets_the_budget_and_wastes_none_of_it():
    budget = Budget(epsilon=1.0, delta=1e-9)

    noise = accounting.calibrate(GaussianDpEvent, budget)

    assert accounting.epsilon_of(GaussianDpEvent(noise), 1e-9) <= 1.0
    assert accounting.epsilon_of(GaussianDpEvent(noise * 0.999), 1e-9) > 1.0


def test_calibration_of_a_sampled_plan_meets_the_budget():
    budget = Budget(epsilon=2.0, delta=1e-6)

    noise = accounting.calibrate(lambda z: event_of({(z, 0.1): 100}), budget)

    assert 1.9 < accounting.epsilon_of(event_of({(noise, 0.1): 100}), 1e-6) <= 2.0


def test_belief_in_presence_rises_no_further_than_epsilon_allows():
    assert accounting.largest_odds(2.0) == pytest.approx(0.8808, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.6, 30), st.sampled_from([1.0, 0.5, 0.05, 0.01]), st.integers(1, 60)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([1e-5, 1e-6, 1e-9]),
)
def test_rdp_is_never_lower_and_more_sums_never_cost_less(sums, delta):
    event = accounting.compose(event_of({(z, q): n}) for z, q, n in sums)
    more = accounting.compose([event, event_of({(5.0, 1.0): 1})])

    price = accounting.price(event, delta)

    assert price.epsilon <= price.rdp_epsilon * (1 + 1e-6) + 1e-9
    assert accounting.epsilon_of(more, delta) >= price.epsilon * (1 - 1e-6)

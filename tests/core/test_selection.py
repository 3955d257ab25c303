# SPDX-License-Identifier: Apache-2.0
"""The best of a secret number of tries is priced as published, and never below one try."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.dp_event import (
    GaussianDpEvent,
    PoissonSampledDpEvent,
    RepeatAndSelectDpEvent,
    SelfComposedDpEvent,
)
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.selection import Tries, selected_rdp, selection_epsilon, stopping_prob

SAMPLED = SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0)), 1000)
DELTA = 1e-5


@pytest.mark.parametrize(
    ("mean", "law", "epsilon"),
    [  # one try costs 2.101 by RDP, ten tries that are all published 6.71
        (10, Tries.LOGARITHMIC, 3.523),
        (10, Tries.GEOMETRIC, 4.103),
        (3, Tries.LOGARITHMIC, 3.007),
        (3, Tries.GEOMETRIC, 3.337),
    ],
)
def test_golden_prices(mean, law, epsilon):
    assert selection_epsilon([SAMPLED], mean=mean, law=law, delta=DELTA) == pytest.approx(
        epsilon, abs=1e-3
    )


@pytest.mark.parametrize("law", list(Tries))
@pytest.mark.parametrize("mean", [1.5, 4.0, 40.0])
def test_prices_are_those_of_dp_accounting(mean, law):
    peer = dp_accounting.rdp.RdpAccountant()
    peer.compose(RepeatAndSelectDpEvent(GaussianDpEvent(2.0), mean, int(law)))

    ours = selection_epsilon([GaussianDpEvent(2.0)], mean=mean, law=law, delta=DELTA)

    assert ours == pytest.approx(peer.get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize("law", list(Tries))
def test_more_tries_cost_more_and_all_of_them_more_than_one(law):
    costs = [
        selection_epsilon([SAMPLED], mean=mean, law=law, delta=DELTA) for mean in (1.01, 2, 8, 64)
    ]

    assert costs == sorted(costs)
    assert costs[0] > accounting.price(SAMPLED, DELTA).rdp_epsilon


def test_settings_of_which_one_costs_more_are_priced_at_least_as_that_one():
    cheap, dear = GaussianDpEvent(4.0), GaussianDpEvent(2.0)
    alone = selection_epsilon([dear], mean=5, law=Tries.GEOMETRIC, delta=DELTA)

    both = selection_epsilon([cheap, dear], mean=5, law=Tries.GEOMETRIC, delta=DELTA)

    assert both >= alone
    assert both == pytest.approx(alone)


def test_a_law_of_given_mean_is_found():
    gamma = stopping_prob(10.0, Tries.LOGARITHMIC)

    tries = np.arange(1, 200_000)
    probs = np.exp(tries * math.log1p(-gamma)) / tries / -math.log(gamma)

    assert probs.sum() == pytest.approx(1, abs=1e-9)
    assert (probs * tries).sum() == pytest.approx(10.0, rel=1e-6)
    assert stopping_prob(10.0, Tries.GEOMETRIC) == 0.1


def test_divergences_rise_with_the_order():
    orders = np.array([1.1, 1.5, 2.0, 8.0, 64.0])

    found = selected_rdp(orders, orders / 8, mean=10, law=Tries.GEOMETRIC)

    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize(("tries", "mean"), [([], 3.0), ([SAMPLED], 1.0), ([SAMPLED], math.inf)])
def test_no_settings_or_one_try_are_no_selection(tries, mean):
    with pytest.raises(ConfigError, match="more than one try"):
        selection_epsilon(tries, mean=mean, law=Tries.GEOMETRIC, delta=DELTA)


def test_an_event_of_a_selection_is_no_gaussian_sum():
    with pytest.raises(ConfigError, match="is not a sum"):
        accounting.leaves(RepeatAndSelectDpEvent(GaussianDpEvent(1.0), 3, 1))

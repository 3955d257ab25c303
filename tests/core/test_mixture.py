# SPDX-License-Identifier: Apache-2.0
"""Sums over records cost what the mixture of Gaussians costs, found in a fraction of a second."""

import time

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from fedsynth.core import accounting
from fedsynth.core.accounting import RecordsDpEvent, calibrate, epsilon_of
from fedsynth.core.leaf import Leaf
from fedsynth.core.mixture import mixture_pld, mixture_rdp
from fedsynth.core.privacy import Budget
from scipy.special import logsumexp
from scipy.stats import binom, norm

DELTA = 1e-5


def epsilon(noise, prob, records, rounds=1, delta=DELTA):
    """Epsilon of rounds of one sum over records."""
    return epsilon_of(accounting.event_of({Leaf(noise, prob, records): rounds}), delta)


# shared method notes: sigma 1, q 0.01, 1,000 rounds, delta 1e-5
@pytest.mark.parametrize(("records", "golden"), [(1, 1.83), (5, 11.6), (10, 27.9), (20, 72.3)])
def test_epsilon_equals_the_golden_value(records, golden):
    assert epsilon(1.0, 0.01, records, 1000) == pytest.approx(golden, rel=5e-3)


@pytest.mark.parametrize(
    ("noise", "prob", "records", "rounds"), [(1.0, 0.01, 5, 1000), (2.0, 0.2, 3, 10)]
)
def test_epsilon_equals_that_of_dp_accounting_to_nine_digits(noise, prob, records, rounds):
    probs = binom.pmf(np.arange(records + 1), records, prob)
    theirs = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, list(range(records + 1)), (probs / probs.sum()).tolist(),
        value_discretization_interval=1e-3,
    )  # fmt: skip

    ours = mixture_pld(noise, prob, records, 1e-3)

    expected = theirs.self_compose(rounds).get_epsilon_for_delta(DELTA)
    assert ours.self_compose(rounds).get_epsilon_for_delta(DELTA) == pytest.approx(
        expected, rel=1e-8
    )


@pytest.mark.parametrize("records", [1, 4])
@pytest.mark.parametrize("added", [False, True])
def test_a_loss_distribution_never_understates_a_hockey_stick(records, added):
    noise, prob = 0.8, 0.3
    pld = mixture_pld(noise, prob, records, 1e-3)
    pmf = pld._pmf_add if added else pld._pmf_remove

    x = np.linspace(-12, 20, 200_001)
    joined, absent = np.arange(records + 1), norm.pdf(x)
    present = norm.pdf(x[:, None] - joined / noise) @ binom.pmf(joined, records, prob)

    for level in (0.0, 0.3, 0.7):
        upper, lower = (absent, present) if added else (present, absent)
        exact = np.trapezoid(np.maximum(upper - np.exp(level) * lower, 0), x)
        assert exact - 1e-7 <= pmf.get_delta_for_epsilon(level) <= exact * 1.001 + 1e-6


def test_renyi_divergences_are_those_of_a_direct_integral():
    noise, prob, records = 1.5, 0.2, 3
    joined = np.arange(records + 1)

    x = np.linspace(-14, 30, 40_001)
    absent = norm.logpdf(x)
    parts = norm.logpdf(x[:, None] - joined / noise) + binom.logpmf(joined, records, prob)
    present = logsumexp(parts, axis=1)

    for order in (1.5, 2.0, 6.0):
        removed = np.trapezoid(np.exp(order * present + (1 - order) * absent), x)
        added = np.trapezoid(np.exp(order * absent + (1 - order) * present), x)
        exact = np.log(max(removed, added)) / (order - 1)
        found = mixture_rdp(noise, prob, records, (order,))[0]
        assert found == pytest.approx(exact, rel=1e-6)
        assert mixture_rdp(noise * 1.33, prob, records, (order,))[0] < 0.8 * exact  # it would tell


def test_one_record_a_user_costs_what_a_poisson_sampled_sum_costs():
    mixture = mixture_pld(1.2, 0.1, 1, 1e-3).self_compose(50).get_epsilon_for_delta(DELTA)

    assert mixture == pytest.approx(epsilon(1.2, 0.1, 1, 50), rel=1e-6)


@pytest.mark.parametrize("records", [2, 8])
def test_a_mixture_is_cheaper_than_what_holds_for_groups(records):
    together = epsilon_of(  # of one vector that is as long as all the user's: the group's bound
        accounting.event_of({Leaf(6.0 / records, 0.05): 20}), DELTA
    )

    assert epsilon(6.0, 0.05, 1, 20) < epsilon(6.0, 0.05, records, 20)
    assert epsilon(6.0, 0.05, records, 20) < epsilon(6.0, 1.0, records, 20)
    one_coin_for_all = 1 - (1 - 0.05) ** records
    assert epsilon(6.0, 0.05, records, 20) < epsilon_of(
        accounting.event_of({Leaf(6.0 / records, one_coin_for_all): 20}), DELTA
    )
    assert together < epsilon_of(
        accounting.event_of({Leaf(6.0 / records, one_coin_for_all): 20}), DELTA
    )


def test_epsilon_rises_with_records_coins_and_rounds_and_falls_with_noise():
    base = epsilon(4.0, 0.05, 8, 20)

    assert base < epsilon(4.0, 0.05, 9, 20)
    assert base < epsilon(4.0, 0.06, 8, 20)
    assert base < epsilon(4.0, 0.05, 8, 21)
    assert base < epsilon(3.9, 0.05, 8, 20)


def test_without_coins_all_records_join():
    assert epsilon(8.0, 1.0, 4, 3) == pytest.approx(
        epsilon_of(accounting.event_of({Leaf(2.0): 3}), DELTA), rel=1e-9
    )


def test_rare_but_large_sums_are_priced_although_renyis_figure_is_hopeless():
    price = accounting.price(accounting.event_of({Leaf(2.0, 1e-4, 1000): 10}), DELTA)

    assert price.rdp_epsilon > 1000
    assert 0.5 < price.epsilon < 2  # a tenth of a record joins in the mean; at most a few ever do


def test_calibrated_noise_is_just_enough_and_found_by_few_prices(monkeypatch):
    asked = []
    priced = accounting.epsilon_of
    monkeypatch.setattr(accounting, "epsilon_of", lambda *a: asked.append(a) or priced(*a))
    begun = time.process_time()

    noise = calibrate(
        lambda z: accounting.event_of({Leaf(z, 0.02, 64): 100}), Budget(epsilon=4.0, delta=1e-6)
    )

    spent = time.process_time() - begun
    assert (
        epsilon(noise, 0.02, 64, 100, 1e-6)
        <= 4.0
        < epsilon(noise * (1 - 2e-5), 0.02, 64, 100, 1e-6)
    )
    assert len(asked) <= 24
    assert spent < 30  # a bisection by dp_accounting's own distribution takes minutes


@pytest.mark.parametrize(
    "leaf",
    [Leaf(5000.0, 0.5, 10_000), Leaf(0.1, 0.001, 3000), Leaf(1000.0, 0.01, 10_000)],
    ids=["many", "hopeless", "wide"],
)
def test_no_single_sum_over_records_takes_long_to_price(leaf):
    begun = time.process_time()

    accounting.price(accounting.event_of({leaf: 50}), DELTA)

    assert time.process_time() - begun < 15


def test_an_event_over_records_survives_as_json():
    event = RecordsDpEvent(3.0, 0.1, 16)

    again = accounting.from_json(accounting.to_json(event))

    assert accounting.leaves(again) == {Leaf(3.0, 0.1, 16): 1}

# SPDX-License-Identifier: Apache-2.0
"""The best of a secret number of tries: priced as published, never below one try, and as drawn."""

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
from fedsynth.core.selection import (
    Tries,
    drawn_number,
    drawn_settings,
    selected_rdp,
    stopping_prob,
)
from scipy.stats import chisquare

SAMPLED = SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0)), 1000)
DELTA = 1e-5


class Stream:
    """Bytes that can be drawn fast."""

    is_secret = False

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def read(self, num_bytes):
        return self._rng.bytes(num_bytes)


def selection_epsilon(tries, *, mean, law, delta):
    return accounting.epsilon_of(accounting.select(tries, mean=mean, law=law), delta)


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


def test_a_selection_is_no_sum_so_whoever_knows_none_fails_closed():
    ours = accounting.select([SAMPLED], mean=3, law=Tries.GEOMETRIC)

    with pytest.raises(ConfigError, match="is not a sum"):
        accounting.leaves(RepeatAndSelectDpEvent(GaussianDpEvent(1.0), 3, 1))
    with pytest.raises(ConfigError, match="is not a sum"):
        accounting.leaves(ours)
    assert accounting.mu_of(ours) == math.inf


def test_what_is_written_of_a_selection_is_read_again_and_sums_beside_it_stay():
    one = accounting.select([SAMPLED, GaussianDpEvent(3.0)], mean=4, law=Tries.LOGARITHMIC)
    other = accounting.select([SAMPLED], mean=4, law=Tries.GEOMETRIC)
    event = accounting.compose([one, GaussianDpEvent(5.0), other, one])

    again = accounting.from_json(accounting.to_json(event))

    assert again == event
    sums, chosen = accounting.parts(again)
    assert sums == accounting.leaves(GaussianDpEvent(5.0))
    assert chosen == {one: 2, other: 1}


@pytest.mark.parametrize(
    "change",
    [{"mean": 1.0}, {"mean": math.inf}, {"law": "poisson"}, {"count": 0}, {"tries": []}],
)
def test_what_is_no_selection_is_not_read_as_one(change):
    (entry,) = accounting.to_json(accounting.select([SAMPLED], mean=4, law=Tries.GEOMETRIC))

    with pytest.raises(ConfigError):
        accounting.from_json([entry | change])


def test_equal_sums_of_a_try_add_up_however_they_are_written():
    (entry,) = accounting.to_json(accounting.select([SAMPLED], mean=4, law=Tries.GEOMETRIC))
    ((sums,),) = entry["tries"]
    halves = [{**sums, "count": sums["count"] // 2}] * 2

    again = accounting.from_json([{**entry, "tries": [halves]}])

    assert accounting.epsilon_of(again, DELTA) == selection_epsilon(
        [SAMPLED], mean=4, law=Tries.GEOMETRIC, delta=DELTA
    )


def test_beside_a_selection_everything_costs_more_than_either_and_less_than_both():
    best = accounting.select([SAMPLED], mean=10, law=Tries.LOGARITHMIC)
    alone, twice = (accounting.epsilon_of(accounting.compose([best] * n), DELTA) for n in (1, 2))

    for noise in (0.3, 1.0, 5.0):  # for much beside it, the two at half of delta each are better
        beside = GaussianDpEvent(noise)
        own = accounting.epsilon_of(beside, DELTA)
        together = accounting.epsilon_of(accounting.compose([best, beside]), DELTA)

        assert max(alone, own) < together
        assert together < accounting.epsilon_of(beside, DELTA / 2) + accounting.epsilon_of(
            best, DELTA / 2
        ) * (1 + 1e-9)
    assert alone < twice < 2 * alone


@pytest.mark.parametrize(("law", "other"), [tuple(Tries), tuple(Tries)[::-1]])
def test_there_are_as_many_tries_as_the_law_says_and_another_law_is_found(law, other):
    stream = Stream(int(law))
    draws = [drawn_number(mean=6, law=law, stream=stream) for _ in range(4000)]
    seen = np.bincount(np.minimum(draws, 20), minlength=21)[1:]

    assert min(draws) >= 1
    assert chisquare(seen, probs_of(6, law) * len(draws)).pvalue > 1e-5
    assert chisquare(seen, probs_of(6, other) * len(draws)).pvalue < 1e-9
    assert chisquare(seen, probs_of(8, law) * len(draws)).pvalue < 1e-9  # a mean wrong by a third


def probs_of(mean, law):
    """Probabilities of 1 to 19 tries, and of more."""
    gamma, tries = stopping_prob(float(mean), law), np.arange(1, 100_000)
    odds = np.exp(tries * math.log1p(-gamma)) / (tries if law is Tries.LOGARITHMIC else 1)
    probs = odds / odds.sum()
    return np.array([*probs[:19], probs[19:].sum()])


def test_each_try_takes_any_setting_as_often_as_another():
    stream = Stream(0)
    drawn = [
        setting
        for _ in range(400)
        for setting in drawn_settings(3, mean=8, law=Tries.GEOMETRIC, stream=stream)
    ]

    seen = np.bincount(drawn, minlength=3)

    assert chisquare(seen).pvalue > 1e-5
    assert chisquare(seen, np.array([4, 3, 2]) / 9 * len(drawn)).pvalue < 1e-9

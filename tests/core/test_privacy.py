# SPDX-License-Identifier: Apache-2.0
"""Promises that mean nothing are refused; weak ones need consent."""

import math

import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget, PrivacyUnit, User


@pytest.mark.parametrize("epsilon", [0, -1, math.nan, math.inf, 1e9, 101, "2", None])
@pytest.mark.parametrize("accept_weak", [False, True])
def test_an_impossible_epsilon_is_refused(epsilon, accept_weak):
    with pytest.raises(ConfigError, match="epsilon"):
        Budget(epsilon=epsilon, delta=1e-6, accept_weak=accept_weak)


@pytest.mark.parametrize("delta", [0.0, 1e-13, 1.0, -1e-6, math.nan, math.inf, 0, 1, "1e-6", None])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(ConfigError, match="delta"):
        Budget(epsilon=1, delta=delta)


def test_a_weak_epsilon_needs_consent():
    with pytest.raises(ConfigError, match="accept_weak"):
        Budget(epsilon=20, delta=1e-6)

    assert Budget(epsilon=20, delta=1e-6, accept_weak=True).epsilon == 20


@pytest.mark.parametrize(("delta", "num_users"), [(1e-3, 1000), (0.45, 100), (1e-2, 1000)])
def test_a_delta_that_exposes_whole_users_is_refused(delta, num_users):
    with pytest.raises(ConfigError, match="too weak"):
        Budget(epsilon=1, delta=delta).check_users(num_users)


def test_a_delta_below_one_in_the_number_of_users_passes():
    Budget(epsilon=1, delta=9e-4).check_users(1000)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_records": 0},
        {"max_clients": 0},
        {"keep": "best"},
        {"column": None, "max_records": 2},
        {"relation": "replace-one"},
    ],
)
def test_an_impossible_unit_is_refused(fields):
    with pytest.raises(ConfigError):
        PrivacyUnit(**{"column": "id"} | fields)


def test_a_user_is_the_default_unit_and_a_record_the_other():
    assert User("id", max_records=5).level == "user"
    assert PrivacyUnit().level == "record"

# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed with SIGKILL: none under-reports, none draws noise twice, all finish."""

import random

import pytest
from fedsynth.core.failpoints import NAMES
from fedsynth.simulation.faults import (
    small_run,
    survive,
    survive_at_random,
    typical_seconds,
)

# where a client can be killed with its own noise drawn, or about to be
CLIENT_POINTS = [name for name in NAMES if "client" in name or "clip" in name]


@pytest.fixture(scope="module")
def typical_s(tmp_path_factory):
    """Seconds that an undisturbed run takes here."""
    return typical_seconds(small_run(tmp_path_factory.mktemp("typical")))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_killed_at_a_fail_point_finishes(tmp_path, name):
    survival = survive(small_run(tmp_path), failpoint=name)

    assert survival.kills == 1, f"{name} was never passed"
    assert survival.ok, survival


@pytest.mark.parametrize("name", CLIENT_POINTS)
def test_a_run_with_local_noise_killed_within_a_client_finishes(tmp_path, name):
    survival = survive(small_run(tmp_path, placement="local"), failpoint=f"{name}:2")

    assert survival.kills == 1, f"{name} was never passed twice"
    assert survival.ok, survival


def test_noise_lost_with_a_crash_is_charged_and_never_drawn_again(tmp_path):
    central = survive(small_run(tmp_path / "central"), failpoint="after-draw:2")
    local = survive(
        small_run(tmp_path / "local", placement="local"), failpoint="before-client-store"
    )

    assert (central.void_rounds, local.void_rounds) == (1, 1)
    assert central.ok
    assert local.ok


@pytest.mark.parametrize("seed", range(50))
def test_a_run_killed_at_random_instants_finishes(tmp_path, typical_s, seed):
    survival = survive_at_random(tmp_path, typical_s, random.Random(seed))

    assert survival.kills >= 1
    assert survival.ok, survival

# SPDX-License-Identifier: Apache-2.0
"""The door adds a share of noise that arrives whole, or answers nothing."""

from dataclasses import replace

import numpy as np
import pytest
from fedsynth.client.policy import Policy
from fedsynth.client.respond import _noise_share, respond
from fedsynth.client.site import simulated_site
from fedsynth.core.errors import ClientCode
from fedsynth.core.mechanism import Lattice, sent
from fedsynth.core.privacy import NoisePlacement
from fedsynth.core.query import Query
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.wire import Ask
from fedsynth.server.conduct import _draft
from fedsynth.server.planned import plan_of
from fedsynth.simulation.faults import small_run

VOTES = Query("votes", dim=20_000, clip=1.0, noise_multiplier=3.0, resolution=12)


def ask_of(folder, **changes) -> Ask:
    """A question of a small run whose clients each add a share of its noise."""
    plan = plan_of(small_run(folder, placement="distributed"))
    return replace(_draft(plan), query=VOTES, **{"head": (1, "a"), **changes})


def test_where_a_cell_is_full_a_share_still_has_its_noise(tmp_path):
    ask = ask_of(tmp_path, num_shares=4)
    full = np.full(VOTES.dim, 2**31 * VOTES.grain)

    share = sent(_noise_share(full, ask, 1, OsKeyStream()), VOTES)

    step = Lattice.of(VOTES).unit * VOTES.grain
    assert float(share.std()) * step == pytest.approx(3.0 / 2, rel=0.03)


def test_a_share_of_noise_that_would_be_rounded_away_is_not_asked_for(tmp_path):
    ask = ask_of(tmp_path, num_shares=1 << 30)
    site = simulated_site(
        Policy.for_simulation(small_run(tmp_path, placement="distributed")),
        plan_of(small_run(tmp_path, placement="distributed")).schema,
        0,
        1,
        tmp_path / "odometer.db",
        lambda unit, seed: pytest.fail("the records were looked at"),
        secure=True,
    )

    reply = respond(ask, site, OsKeyStream())

    assert ask.placement is NoisePlacement.DISTRIBUTED
    assert (reply.code, reply.total) == (ClientCode.POLICY_REFUSED, None)

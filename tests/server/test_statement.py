# SPDX-License-Identifier: Apache-2.0
"""What `fedsynth ledger` prints adds up to what the population has spent."""

import numpy as np
import pytest
from fedsynth.core.accounting import epsilon_of, event_of
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget
from fedsynth.server.ledger import Ledger
from fedsynth.server.statement import statement

CAP = Budget(6.0, 1e-6)


def opened(ledger: Ledger, run: str, plan: dict[tuple[float, float], int]) -> None:
    facts = {"unit": {"column": "patient"}}
    ledger.open_run(run, "people", cap=CAP, event=event_of(plan), facts=facts)


def reserved(ledger: Ledger, run: str, round_: int, noise: float, prob: float = 1.0) -> None:
    ledger.reserve(run, round_, 1, query="votes", noise_multiplier=noise, sampling_prob=prob)


def released(ledger: Ledger, run: str, round_: int) -> None:
    sums = np.zeros(2, dtype=np.int64)
    ledger.seal(run, round_, 1, sums, unit=1e-6, stddev=5.0, num_clients=1)
    ledger.release(run, round_, 1)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.db") as made:
        opened(made, "done", {(5.0, 1.0): 3})
        reserved(made, "done", 1, 5.0)
        released(made, "done", 1)
        reserved(made, "done", 2, 5.0)
        made.void("done", 2, 1, "lost-in-crash")
        made.finish("done")
        opened(made, "given-up", {(4.0, 1.0): 2})
        reserved(made, "given-up", 1, 4.0)
        made.close("given-up")
        opened(made, "sampled", {(5.0, 0.1): 4})
        reserved(made, "sampled", 1, 5.0, 0.1)
        opened(made, "going-on", {(9.0, 1.0): 3})
        reserved(made, "going-on", 1, 9.0)
        yield made


def test_every_charge_has_a_line_and_a_state(ledger):
    assert [(row.run, row.what, row.state) for row in statement(ledger, "people")] == [
        ("done", "votes, round 1", "released"),
        ("done", "votes, round 2", "charged, never released (lost-in-crash)"),
        ("given-up", "votes, round 1", "charged, never released"),
        ("sampled", "all 4 rounds", "open"),
        ("going-on", "votes, round 1", "reserved"),
        ("going-on", "2 rounds to come", "committed"),
    ]


def test_the_last_total_is_what_the_population_has_spent(ledger):
    rows = statement(ledger, "people")

    assert rows[-1].total == epsilon_of(ledger.spent("people"), CAP.delta)
    assert rows[0].epsilon == rows[0].total == epsilon_of(event_of({(5.0, 1.0): 1}), CAP.delta)
    assert [row.total for row in rows] == sorted(row.total for row in rows)
    assert {row.unit for row in rows} == {"patient"}


def test_an_unknown_population_is_named_with_the_known_ones(ledger):
    with pytest.raises(ConfigError, match=r"'nobody' is not on .*; it holds: people"):
        statement(ledger, "nobody")

# SPDX-License-Identifier: Apache-2.0
"""The checker finds each broken promise in entries that the ledger itself would never write."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import Query
from fedsynth.server.audit_trail import _LEAST_STEPS, check_trail
from fedsynth.server.chain import Chain
from fedsynth.server.ledger import Ledger

STORED = np.arange(3).astype("<i8").tobytes()
PLAN = [{"noise_multiplier": 5.0, "sampling_prob": 1.0, "count": 2}]
OPEN = ("open", 0, 0, {"plan": PLAN, "facts": {"placement": "central"}})
ASKED = {"query": "q", "noise_multiplier": 5.0, "sampling_prob": 1.0}
SUM = {
    "sha256": hashlib.sha256(STORED).hexdigest(),
    "dim": 3,
    "unit": 2.0**-22,
    "stddev": 5.0,
    "num_clients": 1,
}
VOID = {"reason": "interrupted"}


def reserve(round_: int = 1, attempt: int = 1, **other: Any):
    return ("reserve", round_, attempt, ASKED | other)


def step(kind: str, round_: int = 1, attempt: int = 1):
    return (kind, round_, attempt, VOID if kind == "void" else {})


def seal(round_: int = 1, attempt: int = 1, **other: Any):
    return ("seal", round_, attempt, SUM | other)


WHOLE = [OPEN, reserve(), step("draw"), seal(), step("release")]
AGAIN = [reserve(2), step("void", 2), step("finish", 0, 0)]


def found(path: Path, entries: list[tuple[str, int, int, dict[str, Any]]]) -> list[str]:
    """What the checker says of entries that were put in the chain past the ledger's rules."""
    chain = Chain(path)
    with chain.writing():
        cap = {"epsilon": 4.0, "delta": 1e-6, "unit": None}
        chain.append("population", "people", data=cap)
        for kind, round_, attempt, data in entries:
            number = chain.append(kind, "people", "run", round_, attempt, data)
            if kind == "seal":
                chain.attach(number, STORED)
    chain.disconnect()
    with Ledger(path) as ledger:
        return check_trail(ledger, "run")


OPEN_SERIES = (
    *OPEN[:3],
    {**OPEN[3], "plan": [{"noise_multiplier": 5.0, "sampling_prob": 1.0, "rounds": 3, "count": 1}]},
)


@pytest.mark.parametrize(
    "entries",
    [
        [OPEN],
        WHOLE,
        WHOLE + AGAIN,
        [OPEN, reserve(), step("void"), reserve(1, 2), step("draw", 1, 2)],
        [OPEN, reserve(sensitivity=1.0), step("draw"), seal(), step("close", 0, 0)],
        [(*OPEN[:3], {"plan": PLAN, "facts": {"placement": "local"}}), reserve(), seal()],
        [OPEN_SERIES, *(reserve(i + 1, series="s", rounds=3, position=i) for i in range(3))],
    ],
)
def test_a_trail_that_keeps_every_promise_is_clean(tmp_path, entries):
    assert found(tmp_path / "ledger.db", entries) == []


BROKEN = {
    "never committed": ([reserve(), OPEN], "was not committed before"),
    "drawn without a reservation": ([OPEN, step("draw")], "not right after its reservation"),
    "sealed without a reservation": ([OPEN, seal()], "comes after []"),
    "reserved after the seal": ([*WHOLE[:1], seal(), reserve()], "comes after ['seal']"),
    "drawn after the seal": ([OPEN, reserve(), seal(), step("draw")], "but after"),
    "sealed undrawn": ([OPEN, reserve(), seal()], "never marked as drawn"),
    "outside the plan": ([OPEN, reserve(noise_multiplier=4.0)], "outside the committed plan"),
    "sampled outside the plan": ([OPEN, reserve(sampling_prob=0.5)], "outside the committed"),
    "once too often": (
        [OPEN, reserve(), reserve(2), reserve(3)],
        "entry 5 (reserve) is outside the committed plan",
    ),
    "the next attempt of a live one": ([OPEN, reserve(), reserve(1, 2)], "that is not void"),
    "released unsealed": ([OPEN, reserve(), step("draw"), step("release")], "is not sealed"),
    "void after the seal": ([*WHOLE[:-1], step("void")], "comes after"),
    "released and void": ([OPEN, reserve(), step("void"), step("release")], "is not sealed"),
    "after the end": ([*WHOLE, step("close", 0, 0), reserve(2)], "after the end of the run"),
    "finished too soon": ([OPEN, reserve(), step("finish", 0, 0)], "leaves round 1 at reserve"),
    "too little noise": ([*WHOLE[:3], seal(stddev=4.9)], "has noise 4.9"),
    "too little for its sensitivity": (
        [OPEN, reserve(sensitivity=1.5), step("draw"), seal()],
        "at least 7.5 was reserved",
    ),
    "no noise": ([*WHOLE[:3], seal(stddev=0.0)], "has noise 0.0"),
    "another sum": ([*WHOLE[:3], seal(sha256="0" * 64)], "is not the one stored"),
    "a reason of its own": ([OPEN, reserve(), ("void", 1, 1, {"reason": "x"})], "no known reason"),
    "a kind of its own": ([OPEN, step("refund")], "of no known kind"),
    "going on with nothing": ([OPEN, reserve(position=1)], "goes on with no series"),
    "a series that is not in the plan": (
        [OPEN, reserve(series="s", rounds=3, position=0)],
        "outside the committed plan",
    ),
    "a series that begins in its middle": (
        [OPEN_SERIES, reserve(series="s", rounds=3, position=1)],
        "not the next round of its series",
    ),
    "a series that goes on after its end": (
        [OPEN_SERIES, *(reserve(i + 1, series="s", rounds=3, position=i) for i in range(4))],
        "not the next round of its series",
    ),
    "a series whose noise changes": (
        [
            OPEN_SERIES,
            reserve(1, series="s", rounds=3, position=0),
            reserve(2, series="s", rounds=3, position=1, noise_multiplier=1.0),
        ],
        "changes the noise of its series",
    ),
    "more records than planned": ([OPEN, reserve(records=4)], "outside the committed plan"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(tmp_path, name):
    entries, expected = BROKEN[name]

    said = found(tmp_path / "ledger.db", entries)

    assert any(expected in line for line in said), said


def test_what_happens_twice_does_not_even_get_into_the_file(tmp_path):
    with pytest.raises(Exception, match="UNIQUE"):
        found(tmp_path / "ledger.db", [*WHOLE[:3], step("draw")])


def test_spending_that_leaves_a_run_out_is_found(tmp_path, monkeypatch):
    path = tmp_path / "ledger.db"
    assert found(path, WHOLE) == []

    # a ledger whose rule were to charge an open run for its reservations only
    monkeypatch.setattr(Ledger, "_spent", lambda self, _: _spent_too_little(self))

    with Ledger(path) as ledger:
        assert any("but 2 are due" in line for line in check_trail(ledger, "run"))


def _spent_too_little(ledger: Ledger):
    from fedsynth.core.accounting import event_of

    return event_of(ledger._reserved("run"))


def test_the_least_number_of_steps_is_the_lattices():
    bounds = [Lattice.of(Query("q", 1, clip, 1.0)).bound for clip in (1.0, 1.5, 0.7, 2.0**0.5, 8.0)]

    assert min(bounds) == _LEAST_STEPS
    assert max(bounds) < 2 * _LEAST_STEPS

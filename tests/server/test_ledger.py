# SPDX-License-Identifier: Apache-2.0
"""The ledger: exact rules, edited files, kills, full disks, rivals, and all of these at random."""

import json
import math
import os
import random
import resource
import signal
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedsynth.core import failpoints
from fedsynth.core.accounting import (
    RecordsDpEvent,
    SeriesDpEvent,
    compose,
    epsilon_of,
    event_of,
    leaves,
)
from fedsynth.core.errors import (
    BudgetExceeded,
    ConfigError,
    FedsynthError,
    PrivacyRefusal,
    SecurityRefusal,
)
from fedsynth.core.leaf import Leaf
from fedsynth.core.privacy import Budget
from fedsynth.server.audit_trail import check_trail
from fedsynth.server.chain import GENESIS, LedgerError
from fedsynth.server.ledger import Ledger, Stage
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

CAP = Budget(4.0, 1e-6)
FACTS = {"unit": {"column": "user_id"}, "placement": "central"}
UNIT = 2.0**-22
TOTAL = np.array([3, -1, 2**62, -(2**63)], dtype=np.int64)
STEPS = ("commit", "reserve", "draw", "seal", "release", "checkpoint", "finish")
KILLS = [f"{side}-{step}" for step in STEPS for side in ("before", "after")]


def gaussian(noise: float, count: int):
    return event_of({(noise, 1.0): count})


def opened(ledger: Ledger, run: str = "run", *, noise: float = 5.0, count: int = 3) -> None:
    ledger.open_run(run, "people", cap=CAP, event=gaussian(noise, count), facts=FACTS)


def reserved(ledger: Ledger, round_: int, attempt: int = 1, run: str = "run", **other: Any) -> None:
    asked = {"query": "votes", "noise_multiplier": 5.0, "sampling_prob": 1.0, **other}
    ledger.reserve(run, round_, attempt, **asked)


def sealed(ledger: Ledger, round_: int, total=TOTAL, run: str = "run", attempt: int = 1) -> None:
    ledger.seal(run, round_, attempt, total, unit=UNIT, stddev=5.0, num_clients=3)


def measured(ledger: Ledger, round_: int, run: str = "run", total=TOTAL) -> None:
    reserved(ledger, round_, run=run)
    ledger.draw(run, round_, 1)
    sealed(ledger, round_, total, run)
    ledger.release(run, round_, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as made:
        yield made


# ---- exact -------------------------------------------------------------------------------


def test_a_run_over_budget_writes_nothing_and_says_that_nothing_was_asked(ledger):
    with pytest.raises(BudgetExceeded, match=r"Nothing was asked.*Lower budget\.epsilon"):
        opened(ledger, noise=0.5)

    assert ledger.head() == (0, GENESIS)
    assert ledger.runs() == []


def test_two_runs_cost_what_gaussian_dp_says_to_the_last_digit(ledger):
    opened(ledger, "one", noise=5.0, count=10)
    opened(ledger, "two", noise=8.0, count=4)

    epsilon, mu = ledger.populations()[0].epsilon, math.sqrt(10 / 25 + 4 / 64)
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(CAP.delta, rel=1e-6)


def test_the_second_run_is_held_against_what_the_first_one_committed(ledger):
    opened(ledger, "one", noise=5.0, count=10)  # epsilon 2.92 of 4

    with pytest.raises(BudgetExceeded, match=r"2\.92"):
        opened(ledger, "two", noise=5.0, count=10)  # both: epsilon 4.32

    assert leaves(ledger.spent("people")) == {Leaf(5.0, 1.0): 10}


def test_a_run_that_just_fits_is_opened(ledger):
    event = gaussian(5.0, 3)
    cap = Budget(epsilon_of(event, 1e-6), 1e-6)

    ledger.open_run("run", "people", cap=cap, event=event, facts=FACTS)

    assert ledger.populations()[0].epsilon == cap.epsilon


def test_populations_have_budgets_of_their_own(ledger):
    opened(ledger, "one", count=10)
    ledger.open_run("two", "others", cap=CAP, event=gaussian(5.0, 10), facts=FACTS)

    assert [p.name for p in ledger.populations()] == ["people", "others"]
    assert leaves(ledger.spent("others")) == {Leaf(5.0, 1.0): 10}


def test_a_finished_run_gives_back_unsampled_sums_that_it_never_reserved(ledger):
    opened(ledger, count=10)
    measured(ledger, 1)
    reserved(ledger, 2)
    ledger.void("run", 2, 1, "no-quorum")
    assert leaves(ledger.spent("people")) == {Leaf(5.0, 1.0): 10}

    ledger.finish("run")

    assert leaves(ledger.spent("people")) == {Leaf(5.0, 1.0): 2}


@pytest.mark.parametrize("end", ["finish", "close"])
def test_a_run_with_a_sampled_sum_stays_charged_as_a_whole(ledger, end):
    plan = event_of({Leaf(5.0, 1.0): 2, (3.0, 0.1): 6})
    ledger.open_run("run", "people", cap=CAP, event=plan, facts=FACTS)
    reserved(ledger, 1, noise_multiplier=3.0, sampling_prob=0.1)
    ledger.void("run", 1, 1, "no-quorum")

    getattr(ledger, end)("run")

    assert leaves(ledger.spent("people")) == leaves(plan)


def test_a_closed_run_stays_charged_for_what_it_reserved_and_asks_nothing_more(ledger):
    opened(ledger)
    reserved(ledger, 1)

    ledger.close("run")

    assert leaves(ledger.spent("people")) == {Leaf(5.0, 1.0): 1}
    with pytest.raises(ConfigError, match="closed; nothing was asked"):
        reserved(ledger, 2)
    with pytest.raises(ConfigError, match="was closed"):
        opened(ledger)


def test_a_run_with_an_open_round_is_not_finished(ledger):
    opened(ledger)
    reserved(ledger, 1)

    with pytest.raises(ConfigError, match="cannot be finished: round 1, attempt 1 is reserved"):
        ledger.finish("run")


def test_opening_finishing_and_closing_again_change_nothing(ledger):
    opened(ledger)
    opened(ledger)
    assert ledger.head()[0] == 2  # the population and the run

    ledger.finish("run")
    ledger.finish("run")
    opened(ledger)
    assert ledger.head()[0] == 3


@pytest.mark.parametrize(
    ("event", "facts"), [(gaussian(5.0, 4), FACTS), (gaussian(5.0, 3), {**FACTS, "seed": 1})]
)
def test_a_run_is_resumed_with_its_own_plan_and_facts_only(ledger, event, facts):
    opened(ledger)

    with pytest.raises(SecurityRefusal, match="another plan or other facts"):
        ledger.open_run("run", "people", cap=CAP, event=event, facts=facts)


def test_another_cap_is_refused_with_both_and_how_to_change_it(ledger):
    opened(ledger)

    with pytest.raises(ConfigError, match=r"epsilon 4.0 .*epsilon 5.0.*set-epsilon"):
        ledger.open_run("two", "people", cap=Budget(5.0, 1e-6), event=gaussian(9, 1), facts=FACTS)


def test_a_cap_is_raised_by_an_entry_of_its_own_and_never_put_below_what_is_spent(ledger):
    opened(ledger, count=10)  # epsilon 2.92

    ledger.set_cap("people", Budget(6.0, 1e-6))

    assert ledger.populations()[0].cap.epsilon == 6.0
    with pytest.raises(BudgetExceeded, match=r"2\.92"):
        ledger.set_cap("people", Budget(2.9, 1e-6))
    with pytest.raises(ConfigError, match="not on"):
        ledger.set_cap("nobody", CAP)
    opened(ledger, count=10)  # the old configuration still resumes the old run


def test_users_and_records_do_not_share_a_budget(ledger):
    opened(ledger)

    with pytest.raises(ConfigError, match=r"'user_id'.*'record'.*do not add up"):
        ledger.open_run(
            "two", "people", cap=CAP, event=gaussian(9, 1), facts={"unit": {"column": None}}
        )


def test_a_plan_that_could_not_be_read_again_is_not_written(ledger):
    with pytest.raises(ConfigError, match="not an event"):
        ledger.open_run("run", "people", cap=CAP, event=gaussian(1e7, 1), facts=FACTS)

    assert ledger.head() == (0, GENESIS)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "x" * 129, "é"])
def test_names_are_plain(ledger, name):
    with pytest.raises(ConfigError, match="plain name"):
        ledger.open_run(name, "people", cap=CAP, event=gaussian(5, 1), facts=FACTS)


def test_a_sum_outside_the_plan_is_refused_before_anything_is_asked(ledger):
    opened(ledger, count=1)

    for wrong in ({"noise_multiplier": 4.999}, {"sampling_prob": 0.5}):
        with pytest.raises(BudgetExceeded, match=r"no such sum.*Nothing was asked"):
            reserved(ledger, 1, **wrong)
    reserved(ledger, 1)
    with pytest.raises(BudgetExceeded, match="left are none"):
        reserved(ledger, 2)


def test_an_attempt_is_reserved_once_and_the_next_only_when_it_is_void(ledger):
    opened(ledger)
    reserved(ledger, 1)

    for attempt in (1, 2):
        with pytest.raises(PrivacyRefusal, match="attempt 1 is reserved"):
            reserved(ledger, 1, attempt)
    ledger.void("run", 1, 1, "no-quorum")
    with pytest.raises(PrivacyRefusal, match="attempt 1 is void"):
        reserved(ledger, 1, 3)
    reserved(ledger, 1, 2)

    state = ledger.state("run", 1)
    assert (state.attempt, state.stage) == (2, "reserved")
    assert Counter(a.stage for a in ledger.attempts("run")) == {"void": 1, "reserved": 1}


def test_stages_follow_one_another_and_none_is_passed_twice(ledger):
    opened(ledger)
    steps: dict[str, Callable[[], None]] = {
        "draw": lambda: ledger.draw("run", 1, 1),
        "seal": lambda: sealed(ledger, 1),
        "release": lambda: ledger.release("run", 1, 1),
        "void": lambda: ledger.void("run", 1, 1, "interrupted"),
    }
    allowed = {None: [], "reserved": ["draw", "void"], "drawing": ["seal", "void"]}
    allowed |= {"sealed": ["release"], "released": []}
    onwards = ["reserve", "draw", "seal", "release"]

    for stage in (None, "reserved", "drawing", "sealed", "released"):
        now = ledger.state("run", 1)
        assert (now and now.stage) == stage
        for step in set(steps) - set(allowed[stage]):
            with pytest.raises(PrivacyRefusal):
                steps[step]()
        if onwards:
            (steps | {"reserve": lambda: reserved(ledger, 1)})[onwards.pop(0)]()

    assert check_trail(ledger, "run") == []


def test_a_void_round_is_charged_and_has_no_sum(ledger):
    opened(ledger)
    reserved(ledger, 1)
    ledger.draw("run", 1, 1)

    ledger.void("run", 1, 1, "lost-in-crash")

    assert ledger.state("run", 1).reason == "lost-in-crash"
    assert ledger.sum_of("run", 1) is None
    with pytest.raises(ConfigError, match="one of: lost-in-crash"):
        ledger.void("run", 1, 1, "user 7 was missing")


@pytest.mark.parametrize("placement", ["local", "distributed"])
def test_a_sum_whose_noise_clients_drew_is_sealed_without_a_draw(ledger, placement):
    facts = {**FACTS, "placement": placement}
    ledger.open_run("run", "people", cap=CAP, event=gaussian(5.0, 1), facts=facts)
    reserved(ledger, 1)

    sealed(ledger, 1)

    assert ledger.state("run", 1).stage is Stage.SEALED


def test_a_sum_is_read_back_bit_for_bit_in_another_process_life(path):
    total = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 2**21 + 1, dtype=np.int64)
    with Ledger(path) as ledger:  # two parts: 2^21 numbers are 16 MiB
        opened(ledger)
        measured(ledger, 1, total=total)

    with Ledger(path) as again:
        found = again.sum_of("run", 1)

    assert found.total.tobytes() == total.tobytes()
    assert (found.unit, found.stddev, found.num_clients, found.attempt) == (UNIT, 5.0, 3, 1)


def test_less_noise_than_reserved_is_not_sealed(ledger):
    opened(ledger)
    reserved(ledger, 1, sensitivity=1.5)
    ledger.draw("run", 1, 1)

    with pytest.raises(PrivacyRefusal, match=r"7\.5"):
        sealed(ledger, 1)  # 5.0


@pytest.mark.parametrize("bad", [{"unit": 0.0}, {"stddev": math.inf}, {"num_clients": 0}])
def test_a_sum_with_impossible_noise_is_not_sealed(ledger, bad):
    opened(ledger)
    reserved(ledger, 1)
    ledger.draw("run", 1, 1)

    with pytest.raises(ConfigError):
        ledger.seal("run", 1, 1, TOTAL, **({"unit": UNIT, "stddev": 5.0, "num_clients": 3} | bad))


def test_what_is_not_on_the_ledger_is_named(ledger, path):
    with pytest.raises(ConfigError, match=f"run 'run' is not on {path}"):
        ledger.finish("run")
    assert ledger.state("run", 1) is None
    assert leaves(ledger.spent("people")) == {}


# ---- the file ----------------------------------------------------------------------------


def test_the_file_is_its_owners_alone(ledger, path):
    opened(ledger)

    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file


def test_what_is_not_a_ledger_is_refused(path):
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(SecurityRefusal, match="not a database"):
        Ledger(path)

    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE birds (name)")
    other.close()
    with pytest.raises(SecurityRefusal, match="not a ledger"):
        Ledger(path)


def test_a_ledger_of_another_version_is_refused(path):
    Ledger(path).disconnect()
    with edited(path) as db:
        db.execute("PRAGMA user_version = 2")

    with pytest.raises(SecurityRefusal, match="version 2"):
        Ledger(path)


def test_a_place_that_cannot_hold_a_ledger_is_named(tmp_path):
    with pytest.raises(LedgerError, match="local disk"):
        Ledger(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="local disk"):
        Ledger(tmp_path / "file" / "ledger.db")


def test_sqlite_itself_refuses_to_change_what_is_written(ledger, path):
    opened(ledger)
    measured(ledger, 1)
    db = sqlite3.connect(path)

    for change in ("UPDATE entries SET body = '{}'", "DELETE FROM entries", "DELETE FROM parts"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(change)
    db.close()


@contextmanager
def edited(path: Path) -> Iterator[sqlite3.Connection]:
    """The file, open to somebody who does not care for triggers."""
    db = sqlite3.connect(path, isolation_level=None)
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    yield db
    db.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A ledger with a finished and an open run, folded into one file."""
    path = tmp_path_factory.mktemp("whole") / "ledger.db"
    with Ledger(path) as ledger:
        opened(ledger)
        for round_ in (1, 2, 3):
            measured(ledger, round_)
        ledger.finish("run")
        opened(ledger, "next")
        measured(ledger, 1, "next")
        reserved(ledger, 2, run="next")
        ledger.verify()
    return path


def copied(whole: Path, path: Path) -> None:
    path.write_bytes(whole.read_bytes())


def test_a_flipped_bit_anywhere_in_a_body_is_found(whole, path):
    with Ledger(whole) as ledger:
        entries = ledger.entries("run")[:3] + ledger.entries("next")[-1:]

    for entry in entries:
        for place in range(0, len(entry.body), 7):
            copied(whole, path)
            body = bytearray(entry.body.encode())
            body[place] ^= 1 << (place % 8)
            with edited(path) as db:
                row = (bytes(body), entry.number)
                db.execute("UPDATE entries SET body = CAST(? AS TEXT) WHERE number = ?", row)

            with pytest.raises(SecurityRefusal, match=f"entry {entry.number} is not what"):
                Ledger(path)


EDITS = {
    "an entry is gone": "DELETE FROM entries WHERE number = 5",
    "the first entry is gone": "DELETE FROM entries WHERE number = 1",
    "a population is renamed": "UPDATE entries SET population = 'x' WHERE number = 2",
    "a round is renumbered": "UPDATE entries SET round = 9 WHERE number = 3",
    "a number is text": "UPDATE entries SET attempt = 'one' WHERE number = 3",
    "a body is a blob": "UPDATE entries SET body = CAST(body AS BLOB) WHERE number = 3",
    "a body is no text": "UPDATE entries SET body = CAST(x'ff' AS TEXT) WHERE number = 3",
    "a time is put back": "UPDATE entries SET time = '2020' WHERE number = 4",
    "two entries changed places": (
        "UPDATE entries SET number = 99 WHERE number = 4",
        "UPDATE entries SET number = 4 WHERE number = 5",
        "UPDATE entries SET number = 5 WHERE number = 99",
    ),
    "an entry came in between": (
        "UPDATE entries SET number = 99 WHERE number = (SELECT max(number) FROM entries)",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_chain_is_refused_by_whoever_opens_it_or_has_it_open(whole, path, name):
    edits = EDITS[name] if isinstance(EDITS[name], tuple) else (EDITS[name],)
    copied(whole, path)
    with Ledger(path) as before:
        with edited(path) as db:
            for edit in edits:
                db.execute(edit)

        with pytest.raises(SecurityRefusal, match="entry"):
            before.verify()
    with pytest.raises(SecurityRefusal, match="entry"):
        Ledger(path)


def test_a_gap_before_the_last_entry_is_found_though_every_hash_fits(whole, path):
    copied(whole, path)
    with Ledger(whole) as ledger:
        last = ledger.entries("next")[-1]
    other = replace(last, number=last.number + 1)
    with edited(path) as db:
        row = (other.number, other.digest(), last.number)
        db.execute("UPDATE entries SET number = ?, hash = ? WHERE number = ?", row)

    with pytest.raises(SecurityRefusal, match=f"entry {last.number} is missing"):
        Ledger(path)


def test_an_entry_that_was_hashed_anew_does_not_fit_the_next_one(whole, path):
    copied(whole, path)
    with Ledger(whole) as ledger:
        entry = ledger.entries("run")[1]
    other = replace(entry, body=entry.body.replace("votes", "hints"))
    with edited(path) as db:
        row = (other.body, other.digest(), entry.number)
        db.execute("UPDATE entries SET body = ?, hash = ? WHERE number = ?", row)

    with pytest.raises(SecurityRefusal, match=f"entry {entry.number + 1} does not follow"):
        Ledger(path)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE parts SET bytes = zeroblob(length(bytes))",
        "UPDATE parts SET bytes = substr(bytes, 1, 31)",
        "DELETE FROM parts",
        "INSERT INTO parts SELECT number, 1, bytes FROM parts",
    ],
)
def test_an_edited_sum_is_neither_verified_nor_handed_out(whole, path, edit):
    copied(whole, path)
    with edited(path) as db:
        db.execute(edit)

    with Ledger(path) as ledger:  # sums are read when they are needed, not at the door
        with pytest.raises(SecurityRefusal, match="the sum that entry 5 sealed"):
            ledger.verify()
        with pytest.raises(SecurityRefusal, match="sealed is not the one stored"):
            ledger.sum_of("run", 2)
        assert len(check_trail(ledger, "run")) == 3


def test_a_sum_that_nobody_sealed_is_found(whole, path):
    copied(whole, path)
    with edited(path) as db:
        db.execute("INSERT INTO parts VALUES (2, 0, x'00')")

    with Ledger(path) as ledger, pytest.raises(SecurityRefusal, match="entry 2, which sealed none"):
        ledger.verify()


def content(path: Path) -> list[Any]:
    with Ledger(path) as ledger:
        ledger.verify()
        runs = ledger.runs()
        return [
            ledger.head(),
            leaves(ledger.spent("people")),
            [ledger.entries(run.run) for run in runs],
            [ledger.state(run.run, n) for run in runs for n in (1, 2, 3)],
            [s.total.tolist() for r in runs for n in (1, 2, 3) if (s := ledger.sum_of(r.run, n))],
        ]


def flips_that_change_something(whole: Path, path: Path, *, num_flips: int, seed: int) -> int:
    """How many of `num_flips` flipped bytes of the file are refused; the others change nothing."""
    rng, original, expected = random.Random(seed), whole.read_bytes(), content(whole)
    refused = 0
    for _ in range(num_flips):
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        path.write_bytes(data)
        try:
            assert content(path) == expected
        except (SecurityRefusal, LedgerError):
            refused += 1
    return refused


def test_no_flipped_bit_of_the_file_changes_what_the_ledger_says(whole, path):
    assert flips_that_change_something(whole, path, num_flips=150, seed=1) >= 20


@pytest.mark.slow
def test_no_flipped_bit_of_the_file_changes_what_the_ledger_says_at_length(whole, path):
    assert flips_that_change_something(whole, path, num_flips=5000, seed=2) >= 1000


# ---- kills -------------------------------------------------------------------------------


class Child:
    """A real process that runs `work(say)`; what it said before it died can be heard."""

    def __init__(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        out, into = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no thread
            self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.close(out)
                work(lambda words: void(os.write(into, json.dumps(words).encode() + b"\n")))
                status = 0
            finally:
                os._exit(status)
        os.close(into)
        self.out = os.fdopen(out, "rb")

    def hear(self) -> Any:
        """The next thing it says; `None` when it has ended."""
        line = self.out.readline()
        return json.loads(line) if line else None

    def rest(self) -> list[Any]:
        """All it says until it ends, and then its end: an exit code, or minus a signal."""
        said = [json.loads(line) for line in self.out]
        self.out.close()
        return [*said, os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])]


def void(_: object) -> None:
    """Throw a value away."""


def drive(path: Path, say: Callable[[Any], None], *, rounds: int = 3, dim: int = 4) -> None:
    """What the server's loop does with the ledger, saying each step once it was acknowledged."""
    ledger = Ledger(path)
    opened(ledger, count=rounds)
    say(["open"])
    for round_ in range(1, rounds + 1):
        state = ledger.state("run", round_)
        if state is None:
            reserved(ledger, round_)
            say(["reserve", round_])
            state = ledger.state("run", round_)
        if state.stage == "drawing":
            ledger.void("run", round_, state.attempt, "lost-in-crash")
            say(["void", round_])
        if state.stage == "reserved":
            ledger.draw("run", round_, 1)
            say(["draw", round_])
            noise = np.frombuffer(os.urandom(8 * dim), dtype=np.int64)
            sealed(ledger, round_, noise)
            say(["seal", round_, int(noise[0])])
        if ledger.state("run", round_).stage == "sealed":
            ledger.release("run", round_, 1)
            say(["release", round_, int(ledger.sum_of("run", round_).total[0])])
    ledger.finish("run")
    say(["finish"])


def holds(ledger: Ledger, said: list[list[Any]]) -> None:
    """Assert that the ledger is whole and holds every step that was acknowledged."""
    ledger.verify()
    runs = ledger.runs()
    done = [(e.kind, e.round) for run in runs for e in ledger.entries(run.run)]
    for kind, *where in said:
        assert (kind, where[0] if where else 0) in done
        if kind in ("seal", "release"):
            assert ledger.sum_of("run", where[0]).total[0] == where[1]
    for run in runs:
        assert check_trail(ledger, run.run) == []
    drawn = Counter({Leaf(5.0, 1.0): sum(kind == "draw" for kind, *_ in said)})
    assert leaves(ledger.spent("people")) >= drawn


def set_failpoint(name: str) -> None:
    os.environ[failpoints.VARIABLE] = name
    failpoints._passed.clear()


@pytest.mark.parametrize("name", KILLS)
def test_a_server_killed_at_a_fail_point_under_reports_nothing_and_finishes(path, name):
    once = name.split("-")[1] in ("commit", "finish")

    def work(say):
        set_failpoint(name if once else f"{name}:2")
        drive(path, say)

    *said, end = Child(work).rest()
    assert end == -signal.SIGKILL
    with Ledger(path) as ledger:
        holds(ledger, said)

    *after, end = Child(lambda say: drive(path, say)).rest()

    assert end == 0
    with Ledger(path) as ledger:
        holds(ledger, said + after)
        assert ledger.runs()[0].state == "finished"
        lost = [s for s in ledger.attempts("run") if s.stage == "void"]
        # noise that was drawn and not sealed is gone for good; nothing else is lost
        assert len(lost) == (name in ("after-draw", "before-seal"))


def killed_at_random(path: Path, seed: int) -> int:
    """Kill a driver at random moments until one life finishes; check each time. How many kills."""
    rng, said, end, kills = random.Random(seed), [], None, 0
    while end != 0:
        child = Child(lambda say: drive(path, say, rounds=14))
        said += [heard for _ in range(rng.randrange(5)) if (heard := child.hear())]
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(child.pid, signal.SIGKILL)
        *heard, end = child.rest()
        said, kills = said + heard, kills + (end == -signal.SIGKILL)
        with Ledger(path) as ledger:
            holds(ledger, said)
    assert max(Counter(w[0] for kind, *w in said if kind == "draw").values()) == 1
    return kills


def test_kills_at_random_moments_lose_nothing_that_was_acknowledged(path):
    assert killed_at_random(path, seed=1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_kills_at_random_moments_lose_nothing_at_length(path, seed):
    assert killed_at_random(path, seed=seed) >= 1


def test_no_noise_is_drawn_twice_for_one_attempt(path):
    said: list[Any] = []
    for name in KILLS:
        heard = Child(lambda say, name=name: (set_failpoint(name), drive(path, say))).rest()
        said += heard[:-1]

    draws = Counter((w[0]) for kind, *w in said if kind == "draw")
    seals = Counter((w[0]) for kind, *w in said if kind == "seal")
    assert max(draws.values(), default=0) <= 1
    assert max(seals.values(), default=0) <= 1


# ---- a full disk -------------------------------------------------------------------------


def filled(path: Path, limit: int) -> bool:
    """Drive with files limited to `limit` bytes, check, drive on without; whether it was hit."""

    def work(say):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        try:
            drive(path, say, rounds=8, dim=2000)
        except LedgerError as error:
            say(["full", str(error)])

    *said, end = Child(work).rest()
    assert end == 0
    is_full = bool(said) and said[-1][0] == "full"
    if is_full:
        assert "What it acknowledged before is safe" in said.pop()[1]
    with Ledger(path) as ledger:
        holds(ledger, said)
    *after, end = Child(lambda say: drive(path, say, rounds=8, dim=2000)).rest()
    assert end == 0
    with Ledger(path) as ledger:
        holds(ledger, said + after)
    return is_full


SIZES = (0, 100, 4096, 20_000, 33_000, 50_000, 60_000, 75_000, 90_000, 120_000, 150_000, 1 << 24)


@pytest.mark.parametrize("limit", SIZES)
def test_a_full_disk_stops_a_run_before_release_and_loses_nothing(path, limit):
    assert filled(path, limit) == (limit <= 150_000)


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(0, 250_000, 5_000))
def test_a_full_disk_at_fifty_sizes_loses_nothing(path, limit):
    filled(path, limit)


# ---- rivals ------------------------------------------------------------------------------


def test_of_two_servers_that_reserve_the_same_rounds_each_round_goes_to_one(path):
    with Ledger(path) as ledger:
        opened(ledger, noise=9.0, count=25)

    def rival(say):
        with Ledger(path) as ledger:
            say("ready")
            for round_ in range(1, 26):
                try:
                    reserved(ledger, round_, noise_multiplier=9.0)
                    say(round_)
                except PrivacyRefusal:
                    pass

    rivals = [Child(rival) for _ in range(2)]
    assert [child.hear() for child in rivals] == ["ready", "ready"]
    won = [child.rest() for child in rivals]

    assert [rounds.pop() for rounds in won] == [0, 0]
    assert sorted(won[0] + won[1]) == list(range(1, 26))
    with Ledger(path) as ledger:
        ledger.verify()


def test_of_runs_that_fit_singly_only_so_many_are_opened_as_fit_together(path):
    def rival(name):
        def work(say):
            with Ledger(path) as ledger:  # the file itself is made by whoever comes first
                try:
                    opened(ledger, name, count=5)  # epsilon 1.95; two: 2.92; three: 3.71; four: 4.4
                    say(name)
                except BudgetExceeded:
                    pass

        return Child(work)

    ends = [child.rest() for child in [rival(f"run-{n}") for n in range(6)]]

    assert [end[-1] for end in ends] == [0] * 6
    with Ledger(path) as ledger:
        assert sorted(run.run for run in ledger.runs()) == sorted(e[0] for e in ends if len(e) > 1)
        assert leaves(ledger.spent("people")) == {Leaf(5.0, 1.0): 15}
        ledger.verify()


def test_a_run_is_driven_by_one_living_process(path, ledger):
    def work(say):
        with Ledger(path).hold("run"):
            if not os.fork():
                time.sleep(3)  # a worker that outlives the server holds nothing
                os._exit(0)
            say("held")
            time.sleep(60)

    child = Child(work)
    assert child.hear() == "held"
    with pytest.raises(ConfigError, match="another process, which is alive"), ledger.hold("run"):
        pass
    with ledger.hold("another"):
        pass

    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    child.out.close()
    with (
        ledger.hold("run"),
        Ledger(path) as other,
        pytest.raises(ConfigError, match="by this process already"),
        other.hold("run"),
    ):
        pass
    with ledger.hold("run"):
        pass


# ---- all of it at random -----------------------------------------------------------------

RUNS = {
    "one": {Leaf(5.0, 1.0): 3},
    "two": {(6.0, 1.0): 1, (9.0, 1.0): 2},
    "three": {(5.0, 0.1): 3},  # sampled
    "four": {(1.5, 1.0): 2},  # never fits beside the others
}

operations = st.tuples(
    st.sampled_from(
        ["open", "reserve", "draw", "seal", "release", "void", "void", "finish", "close"]
        + ["go"] * 30
    ),
    st.sampled_from(["one", "one", "one", "two", "two", "three", "three", "four"]),
    st.sampled_from([1, 1, 2, 2, 3]),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from([None] * 9 + ["before", "after"]),
)


def leaf_of(run: str, round_: int, attempt: int) -> Leaf:
    """The sum that the schedule reserves at a place; not always one that the plan still holds."""
    return Leaf(*sorted(RUNS[run])[(round_ + attempt) % len(RUNS[run])])


def next_step(ledger: Ledger, run: str, round_: int) -> tuple[str, int]:
    """What a server would do with a round next, and the attempt."""
    if run not in {r.run for r in ledger.runs()}:
        return "open", 1
    state = ledger.state(run, round_)
    if state is None:
        return "reserve", 1
    onwards = {"reserved": "draw", "drawing": "seal", "sealed": "release", "void": "reserve"}
    attempt = state.attempt + 1 if state.stage == "void" else state.attempt
    return onwards.get(state.stage, "release"), attempt


def operate(ledger: Ledger, kind: str, run: str, round_: int, attempt: int) -> None:
    """Do one operation of a schedule."""
    match kind:
        case "open":
            ledger.open_run(run, "people", cap=CAP, event=event_of(RUNS[run]), facts=FACTS)
        case "reserve":
            noise, prob, *_ = leaf_of(run, round_, attempt)
            ledger.reserve(
                run, round_, attempt, query="q", noise_multiplier=noise, sampling_prob=prob
            )
        case "seal":
            ledger.seal(run, round_, attempt, TOTAL, unit=UNIT, stddev=9.0, num_clients=1)
        case "void":
            ledger.void(run, round_, attempt, "interrupted")
        case "draw" | "release":
            getattr(ledger, kind)(run, round_, attempt)
        case "finish" | "close":
            getattr(ledger, kind)(run)


def schedule_holds(path: Path, schedule: list[tuple[str, str, int, int, str | None]]) -> None:
    """Follow a schedule through its crashes; nothing that left may be missing from `spent`."""
    left, done = list(schedule), []

    def work(say):
        ledger = Ledger(path)
        for kind, run, round_, attempt, side in left:
            if kind == "go":
                kind, attempt = next_step(ledger, run, round_)
            set_failpoint(f"{side}-{'commit' if kind == 'open' else kind}" if side else "nowhere")
            try:
                operate(ledger, kind, run, round_, attempt)
            except FedsynthError:
                kind = "refused"
            say([kind, run, round_, attempt])

    while left:
        *said, _ = Child(work).rest()
        del left[: len(said) + 1]  # with the one that was cut short, if there is one
        done += said
        with Ledger(path) as ledger:
            ledger.verify()
            for run in ledger.runs():
                assert check_trail(ledger, run.run) == []
            drawn = [tuple(where) for kind, *where in done if kind == "draw"]
            assert len(set(drawn)) == len(drawn)  # nothing is drawn twice
            spent = ledger.spent("people")
            assert leaves(spent) >= Counter(leaf_of(*where) for where in drawn)
            assert epsilon_of(spent, CAP.delta) <= CAP.epsilon
            for kind, run_, round_, _ in done:
                if kind in ("seal", "release"):
                    assert ledger.sum_of(run_, round_).total.tolist() == TOTAL.tolist()


@settings(max_examples=20, deadline=None)
@given(schedule=st.lists(operations, min_size=20, max_size=60))
def test_no_schedule_of_operations_and_crashes_spends_less_than_what_left(
    tmp_path_factory, schedule
):
    schedule_holds(tmp_path_factory.mktemp("schedule") / "ledger.db", schedule)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(schedule=st.lists(operations, min_size=20, max_size=100))
def test_no_long_schedule_spends_less_than_what_left(tmp_path_factory, schedule):
    schedule_holds(tmp_path_factory.mktemp("schedule") / "ledger.db", schedule)


def test_composition_is_that_of_the_accountant(ledger):
    opened(ledger, "one", count=2)
    ledger.open_run("two", "people", cap=CAP, event=event_of({(6.0, 0.2): 3}), facts=FACTS)

    both = compose([gaussian(5.0, 2), event_of({(6.0, 0.2): 3})])
    assert ledger.populations()[0].epsilon == epsilon_of(both, CAP.delta)


# --- series and records -----------------------------------------------------------------------


def in_series(position: int, **changes: Any) -> dict[str, Any]:
    return {"rounds": 4, "series": "s", "position": position, **changes}


def test_a_series_takes_one_sum_from_the_plan_and_its_rounds_come_in_order(ledger):
    ledger.open_run("run", "people", cap=CAP, event=SeriesDpEvent(5.0, 4), facts=FACTS)

    for position in range(4):
        reserved(ledger, position + 1, **in_series(position))

    assert leaves(ledger.spent("people")) == {Leaf(5.0, rounds=4): 1}
    assert [state.goes_on for state in ledger.attempts("run")] == [False, True, True, True]
    assert check_trail(ledger, "run") == []


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (in_series(2), PrivacyRefusal),
        (in_series(0), PrivacyRefusal),
        (in_series(1, noise_multiplier=4.0), PrivacyRefusal),
        (in_series(1, rounds=5), PrivacyRefusal),
        (in_series(1, series="another"), PrivacyRefusal),
        (in_series(0, series="another"), BudgetExceeded),
        ({"position": 1}, ConfigError),
        ({"rounds": 4}, ConfigError),
        ({}, BudgetExceeded),
        ({"records": 3}, BudgetExceeded),
    ],
)
def test_a_round_that_is_not_the_next_of_its_series_is_not_reserved(ledger, asked, error):
    ledger.open_run("run", "people", cap=CAP, event=SeriesDpEvent(5.0, 4), facts=FACTS)
    reserved(ledger, 1, **in_series(0))

    with pytest.raises(error):
        reserved(ledger, 2, **asked)

    assert len(ledger.attempts("run")) == 1


def test_a_finished_run_of_a_series_that_ended_early_has_paid_for_all_of_it(ledger):
    ledger.open_run("run", "people", cap=CAP, event=SeriesDpEvent(5.0, 4), facts=FACTS)
    reserved(ledger, 1, **in_series(0))
    ledger.void("run", 1, 1, "interrupted")

    ledger.finish("run")

    assert leaves(ledger.spent("people")) == {Leaf(5.0, rounds=4): 1}


def test_sums_over_records_are_charged_as_such(ledger):
    ledger.open_run("run", "people", cap=CAP, event=RecordsDpEvent(9.0, 0.1, 3), facts=FACTS)

    reserved(ledger, 1, noise_multiplier=9.0, sampling_prob=0.1, records=3)

    assert leaves(ledger.spent("people")) == {Leaf(9.0, 0.1, 3): 1}
    with pytest.raises(BudgetExceeded, match="of up to 4 records a user"):
        reserved(ledger, 2, noise_multiplier=9.0, sampling_prob=0.1, records=4)

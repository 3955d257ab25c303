# SPDX-License-Identifier: Apache-2.0
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from fedsynth.client.odometer import Odometer, digest_of
from fedsynth.core import accounting
from fedsynth.core.errors import ClientCode, ConfigError, FedsynthError, SecurityRefusal
from fedsynth.core.leaf import Leaf
from fedsynth.core.privacy import Budget, NoisePlacement
from fedsynth.core.query import Query
from fedsynth.core.selection import Tries
from fedsynth.core.series import Series, Turn
from fedsynth.core.wire import Ask, canonical

ROOT = Path(__file__).resolve().parents[2]
DELTA = 1e-6
PLAN = SelfComposedDpEvent(GaussianDpEvent(10.0), 3)
CAP = Budget(1.0, DELTA)  # holds the plan, whose epsilon is 0.77, and no second one
QUERY = Query("votes", dim=2, clip=1.0, noise_multiplier=10.0)


def plan_of(event: DpEvent) -> str:
    return canonical(accounting.to_json(event))


def ask_of(round: int = 1, *, query: Query = QUERY, **changes: Any) -> Ask:  # noqa: A002
    fields: dict[str, Any] = {
        "run": "run-1",
        "population": "cardio",
        "round": round,
        "attempt": 1,
        "strategy": "mst",
        "settings": "{}",
        "schema_digest": "abc",
        "unit": "{}",
        "placement": NoisePlacement.LOCAL,
        "num_shares": 1,
        "plan": plan_of(PLAN),
        "delta": DELTA,
        "public_seed": 0,
        "head": (round, "head"),
        "query": query,
    }
    return Ask(**{**fields, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "odometer.db"


@pytest.fixture
def odometer(path: Path) -> Odometer:
    """An odometer that has joined run-1."""
    made = Odometer(path, "clinic")
    assert made.join(ask_of(), cap=CAP) is None
    return made


# --- heads ------------------------------------------------------------------------------------


def test_a_servers_head_may_only_move_forward(path: Path):
    odometer = Odometer(path, "clinic")

    assert odometer.witness("cardio", (5, "a")) is None
    assert odometer.witness("cardio", (5, "a")) is None
    assert odometer.witness("cardio", (9, "b")) is None
    assert odometer.witness("cardio", (8, "c")) is ClientCode.HEAD_REWOUND
    assert odometer.witness("cardio", (9, "forked")) is ClientCode.HEAD_REWOUND
    assert odometer.witness("cardio", (9, "b")) is None


def test_a_refused_head_is_not_remembered_and_a_seen_one_outlives_the_process(path: Path):
    Odometer(path, "clinic").witness("cardio", (9, "b"))

    again = Odometer(path, "clinic")

    assert again.witness("cardio", (3, "a")) is ClientCode.HEAD_REWOUND
    assert again.witness("cardio", (9, "b")) is None


def test_heads_are_kept_by_server_and_by_client(path: Path):
    Odometer(path, "clinic").witness("cardio", (9, "b"))

    assert Odometer(path, "clinic").witness("onco", (1, "x")) is None
    assert Odometer(path, "practice").witness("cardio", (1, "x")) is None


# --- joining ----------------------------------------------------------------------------------


def test_a_plan_within_the_cap_is_committed_once(path: Path):
    odometer = Odometer(path, "clinic")

    answers = [odometer.join(ask_of(round), cap=CAP) for round in (1, 2, 3, 1)]  # noqa: A001

    spent = odometer.spent("cardio", delta=DELTA)
    assert answers == [None] * 4
    assert spent.runs == ("run-1",)
    assert spent.epsilon == accounting.epsilon_of(PLAN, DELTA)


def test_a_plan_beyond_the_cap_is_refused_and_charges_nothing(path: Path):
    odometer = Odometer(path, "clinic")

    refused = odometer.join(ask_of(), cap=Budget(0.7, DELTA))

    assert refused is ClientCode.BUDGET_REFUSED
    assert odometer.spent("cardio", delta=DELTA).epsilon == 0
    assert odometer.reserve(ask_of()) is ClientCode.OUTSIDE_PLAN
    assert odometer.join(ask_of(), cap=CAP) is None


def test_all_plans_on_a_population_count_together_and_are_never_refunded(odometer: Odometer):
    second = ask_of(run="run-2")
    both = accounting.epsilon_of(accounting.compose([PLAN, PLAN]), DELTA)

    assert odometer.join(second, cap=CAP) is ClientCode.BUDGET_REFUSED
    assert odometer.join(second, cap=Budget(both, DELTA)) is None
    assert odometer.spent("cardio", delta=DELTA).epsilon == both


def test_another_population_and_another_client_have_budgets_of_their_own(
    path: Path, odometer: Odometer
):
    other = Odometer(path, "practice")

    assert odometer.join(ask_of(run="run-2", population="onco"), cap=CAP) is None
    assert other.spent("cardio", delta=DELTA).epsilon == 0
    assert other.join(ask_of(), cap=CAP) is None
    assert odometer.populations() == ["cardio", "onco"]
    assert other.populations() == ["cardio"]


def test_sampled_sums_are_priced_as_sampled(path: Path):
    sampled = SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0)), 20)
    ask = ask_of(plan=plan_of(sampled), query=replace(QUERY, noise_multiplier=1.0))
    whole = accounting.epsilon_of(SelfComposedDpEvent(GaussianDpEvent(1.0), 20), DELTA)

    odometer = Odometer(path, "clinic")

    assert odometer.join(ask, cap=Budget(2.0, DELTA)) is None
    assert odometer.spent("cardio", delta=DELTA).epsilon < 2 < whole


CHANGED = {
    "plan": plan_of(SelfComposedDpEvent(GaussianDpEvent(10.0), 2)),
    "delta": 1e-7,
    "unit": '{"column":null}',
    "schema_digest": "other",
    "strategy": "independent",
    "settings": '{"rounds":2}',
    "placement": NoisePlacement.CENTRAL,
    "population": "onco",
}


@pytest.mark.parametrize("field", CHANGED)
def test_a_run_that_changes_its_terms_is_in_conflict(odometer: Odometer, field: str):
    changed = ask_of(2, **{field: CHANGED[field]})

    assert odometer.join(changed, cap=CAP) is ClientCode.CONFLICT
    assert odometer.join(ask_of(2), cap=CAP) is None


def test_a_cap_that_the_owner_lowers_holds_at_once(odometer: Odometer):
    assert odometer.join(ask_of(2), cap=Budget(0.7, DELTA)) is ClientCode.BUDGET_REFUSED
    assert odometer.join(ask_of(2), cap=Budget(0.77, 1e-12)) is ClientCode.BUDGET_REFUSED
    assert odometer.join(ask_of(2), cap=CAP) is None


MALFORMED_PLANS = [
    "",
    "{",
    "{}",
    "[1]",
    '["noise_multiplier"]',
    '[{"noise_multiplier":1.0}]',
    '[{"noise_multiplier":-1.0,"sampling_prob":1.0,"count":1}]',
    '[{"noise_multiplier":NaN,"sampling_prob":1.0,"count":1}]',
    '[{"noise_multiplier":1.0,"sampling_prob":1.5,"count":1}]',
    '[{"noise_multiplier":1.0,"sampling_prob":1.0,"count":0}]',
    '[{"noise_multiplier":1.0,"sampling_prob":1.0,"count":1.5}]',
    '[{"noise_multiplier":"1","sampling_prob":1.0,"count":1}]',
    "[" * 100_000,
    canonical(
        [{"noise_multiplier": 1.0 + i, "sampling_prob": 1.0, "count": 1} for i in range(5000)]
    ),
]


@pytest.mark.parametrize("plan", MALFORMED_PLANS, ids=range(len(MALFORMED_PLANS)))
def test_a_plan_that_is_none_is_malformed(path: Path, plan: str):
    odometer = Odometer(path, "clinic")

    assert odometer.join(ask_of(plan=plan), cap=CAP) is ClientCode.MALFORMED
    assert odometer.populations() == []


@pytest.mark.parametrize("noise", [1e-4, 1e-200, 5e-324])
def test_a_plan_without_noise_to_speak_of_is_refused(path: Path, noise: float):
    plan = canonical([{"noise_multiplier": noise, "sampling_prob": 1.0, "count": 1}])

    assert Odometer(path, "clinic").join(ask_of(plan=plan), cap=CAP) is ClientCode.MALFORMED


def test_processes_that_join_at_once_cannot_share_one_budget(crashes: Path):
    codes = (crashes / "race" / "codes").read_text()

    assert codes.strip() == "[0, 6, 6, 6, 6]"  # 6 is BUDGET_REFUSED


def test_a_plan_may_hold_four_kinds_of_sums_over_records_and_no_fifth(odometer: Odometer):
    kinds = {Leaf(40.0 + kind, 0.5, 2): 1 for kind in range(5)}
    plan = plan_of(accounting.event_of(kinds))
    fewer = plan_of(accounting.event_of(dict(list(kinds.items())[:4])))
    wide = Budget(10.0, DELTA)

    assert odometer.join(ask_of(run="run-2", plan=plan), cap=wide) is ClientCode.MALFORMED
    assert odometer.join(ask_of(run="run-2", plan=fewer), cap=wide) is None


def test_others_may_write_while_a_sampled_plan_is_priced(
    path: Path, odometer: Odometer, monkeypatch: pytest.MonkeyPatch
):
    price, was_free = accounting.epsilon_of, []

    def watched(event: DpEvent, delta: float) -> float:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                was_free.append(False)
            else:
                was_free.append(True)
        return price(event, delta)

    monkeypatch.setattr(accounting, "epsilon_of", watched)
    plan = plan_of(PoissonSampledDpEvent(0.125, GaussianDpEvent(31.0)))

    assert odometer.join(ask_of(run="run-2", plan=plan), cap=Budget(10.0, DELTA)) is None
    assert was_free == [True, False]  # and again, from memory, beside what may have come since


def test_threads_that_join_at_once_cannot_share_one_budget(path: Path):
    codes: dict[str, ClientCode | None] = {}

    def join(run: str) -> None:
        codes[run] = Odometer(path, "clinic").join(ask_of(run=run), cap=CAP)

    threads = [threading.Thread(target=join, args=(f"run-{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    refused = [code for code in codes.values() if code is ClientCode.BUDGET_REFUSED]
    assert len(codes) == 6
    assert len(refused) == 5


# --- one answer a question --------------------------------------------------------------------


def test_a_question_is_reserved_once_and_a_repeat_gets_the_same_bytes(odometer: Odometer):
    assert odometer.reserve(ask_of()) is None
    odometer.store(ask_of(), b"answer 1")

    assert odometer.reserve(ask_of()) == b"answer 1"
    assert odometer.reserve(ask_of(head=(99, "later"))) == b"answer 1"
    assert odometer.reserve(ask_of(2)) is None


def test_answers_outlive_the_process(path: Path, odometer: Odometer):
    odometer.reserve(ask_of())
    odometer.store(ask_of(), bytes(range(256)))

    assert Odometer(path, "clinic").reserve(ask_of()) == bytes(range(256))


INPUTS = {"w": np.array([[1.0, 2.0]], np.float32), "i": np.array([3], np.int8)}
OTHERWISE: dict[str, Ask] = {
    "the query's name": ask_of(query=replace(QUERY, name="other")),
    "dim": ask_of(query=replace(QUERY, dim=3)),
    "clip": ask_of(query=replace(QUERY, clip=2.0)),
    "noise": ask_of(query=replace(QUERY, noise_multiplier=11.0)),
    "sampling": ask_of(query=replace(QUERY, sampling_prob=0.5)),
    "cells": ask_of(query=replace(QUERY, cells=True)),
    "resolution": ask_of(query=replace(QUERY, resolution=12)),
    "an input more": ask_of(query=replace(QUERY, inputs=INPUTS)),
    "public seed": ask_of(public_seed=1),
    "shares": ask_of(num_shares=2),
    "settings": ask_of(settings="[]"),
    "schema": ask_of(schema_digest="x"),
    "unit": ask_of(unit="[]"),
    "placement": ask_of(placement=NoisePlacement.CENTRAL),
    "plan": ask_of(plan="[]"),
    "delta": ask_of(delta=0.5),
    "population": ask_of(population="onco"),
    "strategy": ask_of(strategy="other"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_another_question_under_the_same_name_is_in_conflict(odometer: Odometer, case: str):
    odometer.reserve(ask_of())
    odometer.store(ask_of(), b"answer")

    assert odometer.reserve(OTHERWISE[case]) is ClientCode.CONFLICT
    assert odometer.reserve(ask_of()) == b"answer"


OTHER_INPUTS: dict[str, dict[str, Any]] = {
    "a bit": {**INPUTS, "w": np.array([[1.0, np.nextafter(np.float32(2), np.float32(3))]], "f4")},
    "a dtype": {**INPUTS, "i": np.array([3], np.uint8)},
    "a shape": {**INPUTS, "w": INPUTS["w"].ravel()},
    "a name": {"v": INPUTS["w"], "i": INPUTS["i"]},
    "names exchanged": {"w": INPUTS["i"], "i": INPUTS["w"]},
    "the sign of zero": {**INPUTS, "w": np.array([[-0.0, 2.0]], np.float32)},
    "an empty array more": {**INPUTS, "e": np.zeros((0, 3))},
}


@pytest.mark.parametrize("case", OTHER_INPUTS)
def test_a_digest_covers_every_bit_of_the_inputs(case: str):
    one = ask_of(query=replace(QUERY, inputs=INPUTS))

    other = ask_of(query=replace(QUERY, inputs=OTHER_INPUTS[case]))

    assert digest_of(one) != digest_of(other)


def test_a_digest_does_not_depend_on_how_arrays_lie_in_memory():
    wide = np.arange(12.0).reshape(3, 4)
    one = ask_of(query=replace(QUERY, inputs={"a": wide[:, ::2], "b": wide.T}))

    other = ask_of(query=replace(QUERY, inputs={"b": wide.T.copy(), "a": wide[:, ::2].copy()}))

    assert digest_of(one) == digest_of(other)


def test_attempts_are_questions_of_their_own_and_each_is_charged(odometer: Odometer):
    attempts = [odometer.reserve(ask_of(attempt=attempt)) for attempt in (1, 2, 3, 4)]

    assert attempts == [None, None, None, ClientCode.OUTSIDE_PLAN]


def test_no_more_sums_are_answered_than_the_plan_holds(path: Path):
    odometer = Odometer(path, "clinic")
    plan = ComposedDpEvent(
        [
            SelfComposedDpEvent(GaussianDpEvent(10.0), 2),
            PoissonSampledDpEvent(0.5, GaussianDpEvent(20.0)),
        ]
    )
    sampled = replace(QUERY, noise_multiplier=20.0, sampling_prob=0.5)
    odometer.join(ask_of(plan=plan_of(plan)), cap=CAP)

    def reserved(round: int, query: Query) -> Any:  # noqa: A002
        return odometer.reserve(ask_of(round, query=query, plan=plan_of(plan)))

    assert reserved(1, QUERY) is None
    assert reserved(2, replace(QUERY, noise_multiplier=20.0)) is ClientCode.OUTSIDE_PLAN
    assert reserved(2, replace(QUERY, sampling_prob=0.5)) is ClientCode.OUTSIDE_PLAN
    assert reserved(2, replace(QUERY, noise_multiplier=np.nextafter(10.0, 0))) == (
        ClientCode.OUTSIDE_PLAN
    )
    assert reserved(2, sampled) is None
    assert reserved(3, QUERY) is None
    assert reserved(4, QUERY) is ClientCode.OUTSIDE_PLAN
    assert reserved(4, sampled) is ClientCode.OUTSIDE_PLAN


def test_a_plan_of_many_kinds_of_sampled_sums_is_refused_before_it_is_priced(path: Path):
    kinds = [
        {"noise_multiplier": 50 + i / 4096, "sampling_prob": 0.5, "count": 1} for i in range(4096)
    ]
    begun = time.process_time()

    refusal = Odometer(path, "clinic").join(ask_of(plan=canonical(kinds)), cap=CAP)

    assert refusal is ClientCode.MALFORMED
    assert time.process_time() - begun < 5


def test_a_run_that_never_joined_has_no_plan(path: Path):
    assert Odometer(path, "clinic").reserve(ask_of()) is ClientCode.OUTSIDE_PLAN


def test_an_answer_is_gone_once_a_later_round_is_reserved(path: Path, odometer: Odometer):
    for round_ in (1, 2):
        odometer.reserve(ask_of(round_))
        odometer.store(ask_of(round_), b"answer %d" % round_)

    assert odometer.reserve(ask_of(1)) is ClientCode.ANSWER_GONE
    assert odometer.reserve(ask_of(2)) == b"answer 2"
    assert odometer.reserve(ask_of(1, settings="[]")) is ClientCode.CONFLICT


def test_a_later_round_of_one_run_drops_no_answer_of_another(path: Path):
    odometer, cap = Odometer(path, "clinic"), Budget(4.0, DELTA)
    for run in ("run-1", "run-2"):
        odometer.join(ask_of(run=run), cap=cap)
        odometer.reserve(ask_of(run=run))
        odometer.store(ask_of(run=run), run.encode())

    odometer.reserve(ask_of(2))

    assert odometer.reserve(ask_of(run="run-2")) == b"run-2"


def test_clients_that_share_a_file_answer_each_for_themselves(path: Path, odometer: Odometer):
    other = Odometer(path, "practice")
    other.join(ask_of(), cap=CAP)
    odometer.reserve(ask_of())
    odometer.store(ask_of(), b"clinic")

    assert other.reserve(ask_of()) is None
    other.store(ask_of(), b"practice")
    assert odometer.reserve(ask_of()) == b"clinic"


def test_an_answer_to_a_question_that_was_not_reserved_is_not_kept(odometer: Odometer):
    with pytest.raises(FedsynthError, match="must not be sent"):
        odometer.store(ask_of(), b"answer")


def test_a_question_has_one_answer(odometer: Odometer):
    odometer.reserve(ask_of())
    odometer.store(ask_of(), b"answer")

    odometer.store(ask_of(), b"answer")
    with pytest.raises(FedsynthError, match="must not be sent"):
        odometer.store(ask_of(), b"another")

    assert odometer.reserve(ask_of()) == b"answer"


# --- crashes ----------------------------------------------------------------------------------

CRASHES = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
from test_odometer import CAP, NoisePlacement, Odometer, ask_of

folder = Path({folder!r})
for placement in NoisePlacement:
    for stored in (False, True):
        child = os.fork()
        if child == 0:
            path = folder / f"{{placement.value}}-{{stored}}" / "odometer.db"
            odometer, ask = Odometer(path, "clinic"), ask_of(placement=placement)
            assert odometer.join(ask, cap=CAP) is None
            assert odometer.reserve(ask) is None
            if stored:
                odometer.store(ask, b"answer")
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL

odometer = Odometer(folder / "fork" / "odometer.db", "clinic")
odometer.join(ask_of(), cap=CAP)
child = os.fork()
if child == 0:
    inherited = odometer._kept
    odometer.reserve(ask_of())
    odometer.store(ask_of(), b"from the child")
    os._exit(odometer._kept is inherited)
assert os.waitpid(child, 0)[1] == 0
assert odometer.reserve(ask_of()) == b"from the child"

begin, end = os.pipe()
children = []
for i in range(5):
    children.append(os.fork())
    if children[-1] == 0:
        os.close(end)
        os.read(begin, 1)  # until all are there
        mine = Odometer(folder / "race" / "odometer.db", "clinic")
        os._exit(mine.join(ask_of(run=f"run-{{i}}"), cap=CAP) or 0)
os.close(end)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odometers of clients that were killed after a reservation or after storing an answer."""
    folder = tmp_path_factory.mktemp("crashes")
    here = str(Path(__file__).parent)
    script = CRASHES.format(root=str(ROOT), here=here, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "race" / "codes").write_text(done.stdout)
    return folder


def crashed(crashes: Path, tmp_path: Path, placement: NoisePlacement, *, stored: bool) -> Odometer:
    """A copy of what one killed client left on disk."""
    shutil.copytree(crashes / f"{placement.value}-{stored}", tmp_path / "left")
    return Odometer(tmp_path / "left" / "odometer.db", "clinic")


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (NoisePlacement.LOCAL, ClientCode.ANSWER_GONE),
        (NoisePlacement.DISTRIBUTED, ClientCode.ANSWER_GONE),
        (NoisePlacement.CENTRAL, None),
    ],
)
def test_after_a_crash_noise_is_never_drawn_again_for_a_question(
    crashes: Path, tmp_path: Path, placement: NoisePlacement, expected: ClientCode | None
):
    odometer = crashed(crashes, tmp_path, placement, stored=False)

    assert odometer.reserve(ask_of(placement=placement)) is expected
    assert odometer.spent("cardio", delta=DELTA).epsilon == accounting.epsilon_of(PLAN, DELTA)
    rest = [odometer.reserve(ask_of(r, placement=placement)) for r in (2, 3, 4)]
    assert rest == [None, None, ClientCode.OUTSIDE_PLAN]  # the lost one stays charged


@pytest.mark.parametrize("placement", NoisePlacement)
def test_a_stored_answer_survives_a_crash(crashes: Path, tmp_path: Path, placement: NoisePlacement):
    odometer = crashed(crashes, tmp_path, placement, stored=True)

    assert odometer.reserve(ask_of(placement=placement)) == b"answer"


def test_under_central_noise_the_answer_after_a_crash_is_kept_as_any_other(
    crashes: Path, tmp_path: Path
):
    odometer = crashed(crashes, tmp_path, NoisePlacement.CENTRAL, stored=False)
    ask = ask_of(placement=NoisePlacement.CENTRAL)
    odometer.reserve(ask)

    odometer.store(ask, b"answer")

    assert odometer.reserve(ask) == b"answer"


def test_a_forked_child_uses_a_connection_of_its_own(crashes: Path):
    odometer = Odometer(crashes / "fork" / "odometer.db", "clinic")

    assert odometer.reserve(ask_of()) == b"from the child"


# --- the file ---------------------------------------------------------------------------------


def test_only_the_owner_may_read_the_file(path: Path, odometer: Odometer):
    odometer.reserve(ask_of())

    beside = [p for p in path.parent.iterdir() if p.name.startswith("odometer.db")]

    assert len(beside) > 1  # the write-ahead log too
    assert {stat.S_IMODE(p.stat().st_mode) for p in beside} == {0o600}


def test_writes_wait_for_the_disk(path: Path, odometer: Odometer):
    odometer.witness("cardio", (1, "a"))  # rides on the next write's sync

    with odometer._store.transaction(synced=odometer._synced) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_clients_of_one_process_share_a_connection(path: Path):
    clients = [Odometer(path, f"client-{i}") for i in range(50)]

    assert len({id(client._store) for client in clients}) == 1


def test_a_file_that_was_replaced_is_opened_anew(path: Path, odometer: Odometer):
    for file in path.parent.iterdir():
        file.unlink()

    assert Odometer(path, "clinic").populations() == []


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(4080)])
def test_a_file_that_is_no_odometer_is_refused_and_left_alone(path: Path, content: bytes):
    path.write_bytes(content)

    with pytest.raises(SecurityRefusal, match="Deleting it would forget"):
        Odometer(path, "clinic")

    assert path.read_bytes() == content


def test_another_database_is_refused(path: Path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE other (x)")
    db.close()

    with pytest.raises(SecurityRefusal, match="not an odometer of this version"):
        Odometer(path, "clinic")


def test_a_plan_that_was_edited_is_noticed(path: Path, odometer: Odometer):
    db = sqlite3.connect(path)
    db.execute("UPDATE runs SET commitment = replace(commitment, '10.0', '99.0')")
    db.commit()
    db.close()

    with pytest.raises(SecurityRefusal, match="damaged"):
        odometer.spent("cardio", delta=DELTA)
    with pytest.raises(SecurityRefusal, match="damaged"):
        odometer.join(ask_of(run="run-2"), cap=CAP)


def test_an_answer_that_was_damaged_is_gone(path: Path, odometer: Odometer):
    odometer.reserve(ask_of())
    odometer.store(ask_of(), b"answer")
    db = sqlite3.connect(path)
    db.execute("UPDATE answers SET total = x'00'")
    db.commit()
    db.close()

    assert odometer.reserve(ask_of()) is ClientCode.ANSWER_GONE


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot keep an odometer"):
        Odometer(tmp_path / "file" / "odometer.db", "clinic")


def test_a_full_disk_answers_nothing_and_forgets_nothing(path: Path, odometer: Odometer):
    odometer.reserve(ask_of())
    odometer.store(ask_of(), b"answer")
    db = odometer._store._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")

    odometer.reserve(ask_of(2))
    with pytest.raises(FedsynthError, match="the disk has room"):
        odometer.store(ask_of(2), bytes(1 << 20))

    db.execute("PRAGMA max_page_count = 1000000")
    assert odometer.reserve(ask_of(2)) is ClientCode.ANSWER_GONE
    assert odometer.reserve(ask_of(3)) is None


# --- series -----------------------------------------------------------------------------------

SERIES = Series((1900, 1150, 650), 8, 3)
SERIES_PLAN = accounting.SeriesDpEvent(10.0, 8)


def in_series(position: int, *, round: int | None = None, **changes: Any) -> Ask:  # noqa: A002
    facts = {"dim": 2, "clip": 1.0, "noise_multiplier": 10.0, "resolution": 14, **changes}
    query = Query("update", **facts, turn=Turn(SERIES, position))
    return ask_of(round or position + 1, query=query, plan=plan_of(SERIES_PLAN))


@pytest.fixture
def in_turn(path: Path) -> Odometer:
    """An odometer that has joined a run of one series."""
    made = Odometer(path, "clinic")
    assert made.join(in_series(0), cap=CAP) is None
    return made


def test_a_series_is_taken_from_the_plan_once_for_all_its_rounds(in_turn: Odometer):
    reserved = [in_turn.reserve(in_series(position)) for position in range(8)]

    assert reserved == [None] * 8
    alone = accounting.epsilon_of(GaussianDpEvent(10.0), DELTA)
    assert in_turn.spent("cardio", delta=DELTA).epsilon == alone


@pytest.mark.parametrize(
    "asked",
    {
        "again": in_series(2, round=9),
        "an earlier one": in_series(1, round=9),
        "with less noise": in_series(3, noise_multiplier=9.0),
        "with another clip": in_series(3, clip=2.0),
        "of another name": replace(
            in_series(3), query=replace(in_series(3).query, name="something")
        ),
        "in another series": replace(
            in_series(3),
            query=replace(in_series(3).query, turn=Turn(Series((1900, 1150, 651), 8, 3), 3)),
        ),
        "alone": replace(in_series(3), query=replace(in_series(3).query, turn=None)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_round_out_of_its_series_is_not_answered(in_turn: Odometer, asked: tuple[str, Ask]):
    for position in range(3):
        assert in_turn.reserve(in_series(position)) is None

    assert in_turn.reserve(asked[1]) is ClientCode.OUTSIDE_PLAN


def test_a_client_that_missed_a_series_beginning_still_pays_for_it_once(in_turn: Odometer):
    assert in_turn.reserve(in_series(4)) is None
    assert in_turn.reserve(in_series(6)) is None

    other = Series((1900,), 8, 4)
    asked = in_series(7)
    asked = replace(asked, query=replace(asked.query, name="else", turn=Turn(other, 7)))
    assert in_turn.reserve(asked) is ClientCode.OUTSIDE_PLAN


def test_sums_are_kept_for_as_many_rounds_as_they_echo_and_no_longer(in_turn: Odometer):
    kept = []
    for position in range(8):
        ask = in_series(position)
        in_turn.reserve(ask)
        kept.append(dict(in_turn.earlier(ask)))
        in_turn.store(ask, b"told %d" % position, alone=b"own %d" % position)

    assert kept[0] == {}
    assert kept[1] == {0: b"own 0"}
    assert kept[5] == {3: b"own 3", 4: b"own 4"}
    assert b"own" not in b"".join(
        row[0] or b"" for row in sqlite3.connect(in_turn._path).execute("SELECT total FROM series")
    )


def test_a_question_of_a_series_that_is_repeated_gets_the_same_bytes(in_turn: Odometer):
    for position in range(2):
        in_turn.reserve(in_series(position))
        in_turn.store(in_series(position), b"told %d" % position, alone=b"own")

    assert in_turn.reserve(in_series(1)) == b"told 1"


def test_an_odometer_of_the_first_version_is_read_on_and_forgets_nothing(path: Path):
    odometer = Odometer(path, "clinic")
    odometer.join(ask_of(), cap=CAP)
    odometer.reserve(ask_of(1))
    odometer.store(ask_of(1), b"told")
    before = odometer.spent("cardio", delta=DELTA)
    old = path.with_name("old.db")
    with sqlite3.connect(path) as db, sqlite3.connect(old) as copy:
        db.backup(copy)
    with sqlite3.connect(old) as db:  # as a file of version 1 was
        db.executescript(
            "DROP TABLE series; ALTER TABLE sums RENAME TO new_sums;"
            "CREATE TABLE sums (client TEXT, run TEXT, noise_multiplier REAL, sampling_prob REAL,"
            " planned INTEGER NOT NULL, reserved INTEGER NOT NULL CHECK (reserved <= planned),"
            " PRIMARY KEY (client, run, noise_multiplier, sampling_prob)) WITHOUT ROWID;"
            "INSERT INTO sums SELECT client, run, noise_multiplier, sampling_prob, planned,"
            " reserved FROM new_sums; DROP TABLE new_sums; PRAGMA user_version = 1;"
        )

    again = Odometer(old, "clinic")

    assert again.spent("cardio", delta=DELTA) == before
    assert [again.reserve(ask_of(round)) for round in (2, 3)] == [None, None]  # noqa: A001
    assert again.reserve(ask_of(4)) is ClientCode.OUTSIDE_PLAN


def test_a_server_cannot_move_users_turns_by_another_seed(in_turn: Odometer):
    in_turn.reserve(in_series(0))

    assert in_turn.join(replace(in_series(1), public_seed=1), cap=CAP) is ClientCode.CONFLICT


def test_what_a_stopped_run_kept_for_its_echoes_goes_when_the_next_is_joined(in_turn: Odometer):
    in_turn.reserve(in_series(0))
    in_turn.store(in_series(0), b"told", alone=b"own sum of the first round")
    wide = Budget(10.0, DELTA)

    assert in_turn.join(replace(in_series(0), run="run-2"), cap=wide) is None

    assert list(in_turn.earlier(in_series(1))) == []
    del in_turn._kept
    assert b"own sum" not in in_turn._path.read_bytes()


def test_a_plan_of_secret_tries_is_no_plan_to_a_client(tmp_path):
    best = accounting.select([GaussianDpEvent(100.0)], mean=2, law=Tries.GEOMETRIC)
    odometer = Odometer(tmp_path / "odometer.db", "here")

    for plan in (best, accounting.compose([PLAN, best])):
        assert odometer.join(ask_of(plan=plan_of(plan)), cap=CAP) is ClientCode.MALFORMED
    assert odometer.populations() == []

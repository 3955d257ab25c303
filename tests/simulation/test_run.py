# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the local engine: what is released, charged, refused, lost and resumed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import (
    BudgetExceeded,
    ConfigError,
    DataError,
    FedsynthError,
    Interrupted,
    QuorumError,
    SchemaError,
    SecurityRefusal,
)
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import Query
from fedsynth.core.randomness import OsKeyStream
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of, start, unfinished
from fedsynth.server.release import verify
from fedsynth.simulation.finished import finished
from fedsynth.simulation.run import run, run_local
from flwr.app import ArrayRecord, Message

import fedsynth as fs

SCHEMA = {
    "columns": {
        "color": {"type": "category", "categories": ["red", "green"], "origin": "public: made up"},
        "age": {"type": "integer", "bounds": [0, 9], "num_bins": 10, "origin": "public: made up"},
    }
}
HOST = "people"


class CountingStream:
    """Deterministic bytes; not secret, and the card has to say so."""

    is_secret = False

    def __init__(self):
        self._rng = np.random.default_rng(9)

    def read(self, num_bytes):
        return self._rng.bytes(num_bytes)


def write_population(folder, num_users=200):
    """Users of one to three records."""
    rng = np.random.default_rng(4)
    users = np.repeat(np.arange(num_users), 1 + np.arange(num_users) % 3)
    lines = ["who,color,age"]
    lines += [f"u{u},{['red', 'green'][rng.integers(2)]},{rng.integers(10)}" for u in users]
    (folder / "people.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))


@pytest.fixture
def described(tmp_path):
    """A run's description, to be changed by a test, over a population on disk."""
    write_population(tmp_path)
    return {
        "population": {"name": HOST, "num_users": 150, "epsilon": 3.0, "delta": 1e-4},
        "data": {"path": "people.csv", "schema": "schema.json"},
        "unit": {"column": "who", "max_records": 2},
        "budget": {"epsilon": 1.0},
        "strategy": {"name": "independent"},
        "engine": {"clients": 4, "timeout_s": 20.0},
        "release": {"num_records": 100},
    }


def config_of(described, tmp_path):
    return parse_config(described, base=tmp_path)


def ledger_of(tmp_path):
    return Ledger(tmp_path / "ledger.db")


def spent(tmp_path):
    with ledger_of(tmp_path) as ledger:
        return accounting.leaves(ledger.spent(HOST)) if ledger.populations() else {}


def test_a_run_ends_in_a_release_that_verifies(described, tmp_path):
    folder = run(config_of(described, tmp_path))

    release = fs.Release.open(folder)
    assert release.verify().ok
    assert release.data.num_rows == 100
    assert release.card.epsilon <= 1.0
    assert not list((tmp_path / "releases").glob("*.unfinished"))


@pytest.mark.parametrize("name", ["independent", "mst"])
def test_the_ledgers_events_are_the_strategys_event(described, tmp_path, name):
    described["strategy"] = {"name": name}
    config = config_of(described, tmp_path)
    plan = plan_of(config)

    run_local(plan, stream=OsKeyStream())

    with ledger_of(tmp_path) as ledger:
        reserved = [e.data for e in ledger.entries(plan.run) if e.kind == "reserve"]
    charged = accounting.event_of(
        {
            (z, 1.0): sum(r["noise_multiplier"] == z for r in reserved)
            for z in {r["noise_multiplier"] for r in reserved}
        }
    )
    assert accounting.leaves(charged) == accounting.leaves(plan.event)
    assert spent(tmp_path) == accounting.leaves(plan.event)


def test_the_python_face_makes_the_same_kind_of_release(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pa.table(
        {
            "who": [f"u{i // 2}" for i in range(400)],
            "color": ["red", "green"] * 200,
            "age": [i % 10 for i in range(400)],
        }
    )

    release = fs.simulate(
        "independent",
        table,
        schema=fs.Schema.from_json(SCHEMA),
        budget=fs.Budget(epsilon=1, delta=1e-4),
        unit=fs.User("who", max_records=2),
        num_users=200,
        num_records=50,
    )

    assert release.verify().ok
    assert release.data.column_names == ["color", "age"]


def test_two_runs_add_up_and_a_third_over_the_cap_asks_nobody(described, tmp_path):
    described["population"]["epsilon"] = 1.6
    run(config_of(described, tmp_path))
    run(config_of(described | {"seed": 1}, tmp_path))
    before = spent(tmp_path)

    with pytest.raises(BudgetExceeded, match="Nothing was asked"):
        run(config_of(described | {"seed": 2}, tmp_path))

    assert spent(tmp_path) == before


def test_sums_do_not_depend_on_the_number_of_clients(described, tmp_path):
    sums = []
    for clients in (1, 7):
        folder = tmp_path / str(clients)
        folder.mkdir()
        write_population(folder)
        described["engine"]["clients"] = clients
        plan = plan_of(config_of(described, folder))
        run_local(plan, stream=CountingStream())
        with ledger_of(folder) as ledger:
            sums.append(ledger.sum_of(plan.run, 1).total.tolist())

    assert sums[0] == sums[1]


def test_the_wire_changes_no_bit(described, tmp_path):
    sums = []
    for wire in (False, True):
        folder = tmp_path / str(wire)
        folder.mkdir()
        write_population(folder)
        described["engine"]["wire"] = wire
        plan = plan_of(config_of(described, folder))
        run_local(plan, stream=CountingStream())
        with ledger_of(folder) as ledger:
            sums.append(ledger.sum_of(plan.run, 1).total.tolist())

    assert sums[0] == sums[1]


def test_a_release_with_test_noise_says_that_it_is_not_private(described, tmp_path):
    plan = plan_of(config_of(described, tmp_path))

    release = fs.Release.open(run_local(plan, stream=CountingStream()))

    assert "NOT PRIVATE" in (release.folder / "card.md").read_text()


@pytest.mark.parametrize(("placement", "factor"), [("central", 1.0), ("local", 2.0)])
def test_noise_is_as_large_as_its_placement_demands(described, tmp_path, placement, factor):
    described["noise"] = {"placement": placement}
    plan = plan_of(config_of(described, tmp_path))

    run_local(plan, stream=OsKeyStream())

    with ledger_of(tmp_path) as ledger:
        sealed = ledger.sum_of(plan.run, 1)
    clip = 2**0.5
    assert sealed.stddev == pytest.approx(plan.noise_multiplier * clip * factor)


def test_distributed_shares_are_sized_for_the_fewest_clients(described, tmp_path):
    described["noise"] = {"placement": "distributed"}
    described["engine"]["min_clients"] = 2
    plan = plan_of(config_of(described, tmp_path))

    run_local(plan, stream=OsKeyStream())

    with ledger_of(tmp_path) as ledger:
        sealed = ledger.sum_of(plan.run, 1)
    assert sealed.stddev == pytest.approx(plan.noise_multiplier * 2**0.5 * (4 / 2) ** 0.5)


@pytest.mark.parametrize("placement", ["local", "distributed"])
def test_the_noise_that_clients_add_is_as_large_as_declared(described, tmp_path, placement):
    many = {
        f"c{i}": {"type": "integer", "bounds": [0, 99], "num_bins": 100, "origin": "policy"}
        for i in range(20)
    }
    (tmp_path / "schema.json").write_text(json.dumps({"columns": many}))
    header = "who," + ",".join(many)
    (tmp_path / "people.csv").write_text(header + "\n" + "u1" + ",1" * 20 + "\n")
    described["noise"] = {"placement": placement}
    plan = plan_of(config_of(described, tmp_path))

    run_local(plan, stream=OsKeyStream())

    with ledger_of(tmp_path) as ledger:
        sealed = ledger.sum_of(plan.run, 1)
    noise = sealed.total * sealed.unit
    noise[np.arange(20) * 100 + 1] -= 1  # the one user's cells
    measured = noise.std() / sealed.stddev
    assert abs(measured - 1) < 0.15  # 2,000 draws: 9 standard errors; a third would be 21


def test_lost_replies_above_the_quorum_are_gone_on_without(described, tmp_path):
    described["engine"]["min_clients"] = 3
    plan = plan_of(config_of(described, tmp_path))

    run_local(plan, stream=OsKeyStream(), loses=lambda number, message: number == 2)

    with ledger_of(tmp_path) as ledger:
        assert ledger.sum_of(plan.run, 1).num_clients == 3


def test_a_missed_quorum_forms_no_sum_and_can_be_resumed(described, tmp_path):
    plan = plan_of(config_of(described, tmp_path))

    with pytest.raises(QuorumError, match="3 of 4 clients gave a valid sum, 4 are needed"):
        run_local(plan, stream=OsKeyStream(), loses=lambda number, message: number == 2)
    with ledger_of(tmp_path) as ledger:
        assert ledger.sum_of(plan.run, 1) is None
    folder = run(resume=tmp_path / "releases" / f"{plan.run}.unfinished")

    assert fs.Release.open(folder).verify().ok
    assert spent(tmp_path) == accounting.leaves(plan.event)


def test_a_ledger_that_was_rolled_back_is_asked_for_once_and_stays_charged(
    described, tmp_path, caplog
):
    run(config_of(described, tmp_path))
    for file in tmp_path.glob("ledger.db*"):
        file.unlink()
    plan = plan_of(config_of(described, tmp_path))

    with pytest.raises(SecurityRefusal, match=r"4 x HEAD_REWOUND(?s:.*)restore \S+ledger\.db"):
        run_local(plan, stream=OsKeyStream())

    assert "asking again" not in caplog.text
    assert spent(tmp_path) == accounting.leaves(plan.event)


def test_a_reply_of_another_shape_is_not_used(described, tmp_path, monkeypatch):
    from fedsynth.client import app as client_app

    made = client_app.reply_to_records

    def misshapen(reply):
        records = made(reply)
        total = records["arrays"]["total"]
        records["arrays"] = ArrayRecord(
            {"total": type(total)("int64", (1,), "fedsynth.raw", b"\0" * 8)}
        )
        return records

    monkeypatch.setattr(client_app, "reply_to_records", misshapen)
    plan = plan_of(config_of(described, tmp_path))

    with pytest.raises(QuorumError, match=r"malformed reply: .*\(12,\) was asked for"):
        run_local(plan, stream=OsKeyStream())
    monkeypatch.undo()

    assert fs.Release.open(run(resume=tmp_path / "releases" / plan.run)).verify().ok


def test_ctrl_c_saves_and_resume_ends_in_the_same_synthesizer(described, tmp_path):
    described["strategy"] = {"name": "mst"}
    plan = plan_of(config_of(described, tmp_path))
    rounds = []

    def stop_in_the_second(event):
        rounds.append(event.round)
        if event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"--resume"):
        run_local(plan, stream=OsKeyStream(), on_event=stop_in_the_second)
    replayed = []
    folder = run(
        resume=tmp_path / "releases" / plan.run, on_event=lambda e: replayed.append(e.replayed)
    )

    assert replayed == [True, True, False]
    release = fs.Release.open(folder)
    assert release.verify().ok
    assert spent(tmp_path) == accounting.leaves(plan.event)


def test_a_finished_run_is_not_resumed(described, tmp_path):
    folder = run(config_of(described, tmp_path))

    for name in (folder, f"{folder}.unfinished", f"{folder}.unfinished/run.json"):
        with pytest.raises(ConfigError, match=f"finished already: {folder};"):
            run(resume=Path(name))


def test_an_unfinished_run_is_no_release_yet_and_says_how_to_go_on(described, tmp_path):
    folder = start(plan_of(config_of(described, tmp_path)))

    for path in (folder, folder.with_suffix("")):
        with pytest.raises(ConfigError, match=f"is not a release: .* run --resume {folder}$"):
            verify(path)
        with pytest.raises(ConfigError, match=f"is not a release: .* run --resume {folder}$"):
            fs.Release.open(path)


@pytest.mark.parametrize("declared", [None, {"type": "id"}])
def test_a_column_of_user_ids_may_be_left_out_or_declared_an_id(described, tmp_path, declared):
    _describe_users(tmp_path, declared)

    assert plan_of(config_of(described, tmp_path)).config.unit.column == "who"


def test_a_column_of_user_ids_is_not_synthesized(described, tmp_path):
    _describe_users(tmp_path, {"type": "category", "categories": ["u1"], "origin": "public: x"})

    with pytest.raises(ConfigError, match=r"unit\.column = 'who'.* type = .id."):
        plan_of(config_of(described, tmp_path))


def _describe_users(folder, declared):
    """Declare the column of user ids in the schema, or not."""
    columns = SCHEMA["columns"] | ({"who": declared} if declared else {})
    (folder / "schema.json").write_text(json.dumps({"columns": columns}))


def test_a_resumed_run_with_another_configuration_is_refused(described, tmp_path):
    plan = plan_of(config_of(described, tmp_path))
    with pytest.raises(QuorumError):
        run_local(plan, stream=OsKeyStream(), loses=lambda number, message: True)
    path = tmp_path / "releases" / f"{plan.run}.unfinished" / "run.json"
    changed = json.loads(path.read_text())
    changed["config"]["seed"] = 5
    path.write_text(json.dumps(changed))

    with pytest.raises((SecurityRefusal, ConfigError)):
        run_local(unfinished(path.parent), stream=OsKeyStream())


def broken(described, tmp_path, fault):
    """Break one thing; what the error must name."""
    people = tmp_path / "people.csv"
    text = people.read_text()
    match fault:
        case "null user id":
            people.write_text(text + ",red,1\n")
            return "who"
        case "missing column":
            people.write_text(text.replace("who,color,age", "who,colour,age"))
            return "color"
        case "missing user column":
            described["unit"]["column"] = "name"
            return "name"
        case "wrong dtype":
            people.write_text(text + "u1,red,old\n")
            return "age"
        case "category outside the schema":
            people.write_text(text + "u1,blue,3\n")
            return "color"
        case "unparsable shard":
            people.write_bytes(b"\xff\xfe\x00" * 50)
            return "people.csv"
        case "no shard":
            people.unlink()
            return "people.csv"
        case "unknown strategy":
            described["strategy"] = {"name": "mts"}
            return "did you mean 'mst'"
        case "unknown setting":
            described["strategy"] = {"name": "mst", "max-nrom": 1.0}
            return "did you mean 'max_norm'"
        case "clip of zero":
            described["strategy"] = {"name": "independent", "max_norm": 0.0}
            return "max_norm"
        case "clip below zero":
            described["strategy"] = {"name": "mst", "max_norm": -1.0}
            return "max_norm"
        case "distributed noise over a network":
            described["noise"] = {"placement": "distributed", "aggregator": "nobody:Nothing"}
            return "nobody"
        case "budget above the population's":
            described["budget"]["epsilon"] = 3.5
            return "Nothing was asked"
    raise AssertionError(fault)


@pytest.mark.parametrize(
    "fault",
    [
        "null user id",
        "missing column",
        "missing user column",
        "wrong dtype",
        "category outside the schema",
        "unparsable shard",
        "no shard",
        "unknown strategy",
        "unknown setting",
        "clip of zero",
        "clip below zero",
        "distributed noise over a network",
        "budget above the population's",
    ],
)
def test_bad_input_is_named_before_anything_is_spent(described, tmp_path, fault):
    named = broken(described, tmp_path, fault)

    with pytest.raises(FedsynthError, match=named) as caught:
        run(config_of(described, tmp_path))

    assert isinstance(caught.value, ConfigError | DataError | BudgetExceeded)
    assert not (tmp_path / "ledger.db").exists() or spent(tmp_path) == {}


LOST = {
    "a date of another country": (
        {"type": "date", "bounds": ["2015-01-01", "2024-12-31"], "origin": "policy"},
        ["31/12/2020", "01/02/2021", ""],
        "not one of its values is a date like 2024-12-31",
    ),
    "yes and no": ({"type": "boolean"}, ["yes", "no", "?"], "is true, false, 1 or 0"),
    "numbers with a comma": (
        {"type": "real", "bounds": [0, 9], "origin": "policy"},
        ["1,5", "2,5", "NaN"],
        "is a number, so that all would count as missing",
    ),
    "other words": (
        {"type": "category", "categories": ["F", "M"], "origin": "policy"},
        ["female", "male", None],
        "one of its categories, such as 'F'",
    ),
    "an open number": (
        {"type": "real", "bounds": "private", "origin": "measured"},
        ["1,5", "2,5", ""],
        "is a number",
    ),
}


def with_column(described, tmp_path, column, values):
    """The population with one more column, its values in turn."""
    schema = {"columns": {**SCHEMA["columns"], "x": {**column, "missing": True}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    header, *rows = (tmp_path / "people.csv").read_text().splitlines()
    texts = ['"{}"'.format(value or "") for value in values]
    lines = [f"{row},{texts[i % len(texts)]}" for i, row in enumerate(rows)]
    (tmp_path / "people.csv").write_text("\n".join([f"{header},x", *lines]) + "\n")
    return config_of(described, tmp_path)


@pytest.mark.parametrize("engine", ["local", "ray", "loopback"])
@pytest.mark.parametrize("case", LOST)
def test_a_column_that_would_be_lost_entirely_is_refused_before_anything_is_spent(
    described, tmp_path, case, engine
):
    column, values, says = LOST[case]
    described["engine"] = {"kind": engine, "clients": 4}
    config = with_column(described, tmp_path, column, values)

    with pytest.raises(SchemaError, match=f"column 'x': .*{says}"):
        run(config)

    assert not (tmp_path / "ledger.db").exists()
    assert not (tmp_path / "releases").exists()


@pytest.mark.parametrize("case", LOST)
def test_a_column_of_which_some_is_lost_is_shown_to_whoever_holds_the_records(
    described, tmp_path, case
):
    column, values, _ = LOST[case]
    good = {"date": "2020-12-31", "boolean": "true", "real": "1.5", "category": "F"}
    described["release"]["num_records"] = 10
    config = with_column(described, tmp_path, column, [*values, good[column["type"]]])

    done = finished(run(config), config)

    (unread,) = done.unread
    assert unread.share == pytest.approx(2 / 3, abs=0.01)  # of the three in four that are there
    assert done.to_json()["site_only"]["unread_by_column"] == {"x": unread.share}


def test_a_column_without_any_value_is_no_lost_one(described, tmp_path):
    column = {"type": "date", "bounds": ["2015-01-01", "2024-12-31"], "origin": "policy"}
    config = with_column(described, tmp_path, column, ["", "?", " "])

    done = finished(run(config), config)

    assert done.unread == ()


def test_what_was_not_read_changes_no_reply_of_a_client(described, tmp_path):
    column, _, _ = LOST["yes and no"]
    totals = []
    for good in ("?", "maybe"):  # the same cells: missing, and not read
        folder = tmp_path / good.replace("?", "missing")
        folder.mkdir()
        write_population(folder)
        plan = plan_of(with_column(described, folder, column, ["true", good]))
        run_local(plan, stream=CountingStream())
        with ledger_of(folder) as ledger:
            totals.append(ledger.sum_of(plan.run, 1).total.tolist())

    assert totals[0] == totals[1]


def test_distributed_noise_is_refused_where_single_sums_are_seen(described, tmp_path):
    from fedsynth.core.aggregator import Sum
    from fedsynth.core.privacy import NoisePlacement
    from fedsynth.server.federation import Federation

    federation = Federation(None, 1, 1, 1.0, Sum(), sums_are_hidden=False)

    with pytest.raises(ConfigError, match="secure sum"):
        federation.check(NoisePlacement.DISTRIBUTED)


def test_a_user_at_several_clients_is_paid_for(described, tmp_path):
    described["unit"]["max_clients"] = 3
    plan = plan_of(config_of(described, tmp_path))

    run_local(plan, stream=OsKeyStream())

    with ledger_of(tmp_path) as ledger:
        sealed = ledger.sum_of(plan.run, 1)
    assert sealed.stddev == pytest.approx(plan.noise_multiplier * 3 * 2**0.5)


def test_coins_of_several_clients_are_refused_for_they_have_no_price(described, tmp_path):
    described["unit"]["max_clients"] = 2
    described["strategy"] = {"name": "dp_fedavg", "sampling_prob": 0.5}

    with pytest.raises(ConfigError, match="flip a coin each"):
        plan_of(config_of(described, tmp_path))


def test_a_record_never_stands_in_a_log(described, tmp_path, monkeypatch, caplog):
    from fedsynth.strategies.independent import Independent

    honest = Independent.answer

    def indiscreet(self, query, shard, rng):
        if shard.num_users:
            raise ValueError(f"cannot read {shard.records.codes.tolist()} MARKED")
        return honest(self, query, shard, rng)

    monkeypatch.setattr(Independent, "answer", indiscreet)
    caplog.set_level("DEBUG")

    run(config_of(described, tmp_path))

    assert "count as zeros: ValueError at" in caplog.text
    assert "MARKED" not in caplog.text


def test_a_strategy_that_asks_outside_its_event_is_stopped(tmp_path, described, monkeypatch):
    from fedsynth.strategies.independent import Independent

    honest = Independent.rounds

    def greedy(self, schema, noise_multiplier, rng):
        yield from honest(self, schema, noise_multiplier / 2, rng)

    monkeypatch.setattr(Independent, "rounds", greedy)
    plan = plan_of(config_of(described, tmp_path))
    asked: list[Message] = []

    with pytest.raises(BudgetExceeded, match="Nothing was asked"):
        run_local(plan, stream=OsKeyStream(), loses=lambda n, m: asked.append(m))

    assert asked == []


def test_a_lattice_is_the_same_at_client_and_server():
    query = Query("q", 3, 1.7, 1.0)

    assert Lattice.of(query).unit == 2.0**-22


def test_a_started_run_is_found_by_its_folder(described, tmp_path):
    plan = plan_of(config_of(described, tmp_path))

    assert unfinished(start(plan)).facts == plan.facts

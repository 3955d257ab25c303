# SPDX-License-Identifier: Apache-2.0
"""Every bad table gets a clear error or a stated treatment; nothing is spent, nothing is shown.

Each is met twice: by a client, as a SuperNode calls it, and by a whole run in one process. Marked
values stand in every record, and must stand in no log, no reply and no file of the client's.
"""

import datetime
import gzip
import itertools
import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fedsynth.client.app import app as client_app
from fedsynth.client.odometer import Odometer
from fedsynth.client.shard import encode, read_shard
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ClientCode, ConfigError, DataError, SchemaError, ShardError
from fedsynth.core.privacy import PrivacyUnit, User
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, Schema
from fedsynth.core.wire import (
    MESSAGE_TYPE,
    Ask,
    ask_to_records,
    canonical,
    reply_from_records,
)
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of
from fedsynth.simulation.direct import direct_run
from fedsynth.simulation.local import LocalGrid
from fedsynth.simulation.run import run
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.mst import Mst
from fedsynth.strategies.registry import build_strategy, settings_of
from flwr.app import Context, Message, RecordDict

MARK, NUMBER = "zqx77", 739_152
HOST = "people"
ORIGIN = "public: made up"
DRUG = {"type": "category", "categories": ["aspirin", "none"], "origin": ORIGIN}
DOSE = {"type": "real", "bounds": [0, 10], "num_bins": 5, "origin": ORIGIN}
AGE = {"type": "integer", "bounds": [0, 99], "num_bins": 10, "origin": ORIGIN}
SEEN = {"type": "date", "bounds": ["2024-01-01", "2024-01-10"], "num_bins": 10, "origin": ORIGIN}
SMOKES = {"type": "boolean"}
POLICY = """
max_epsilon = 2.0
delta = 1e-4
user_column = "who"
relation = "add-or-remove"
max_records = 2
max_clients = 1
min_users = 2
[allow]
populations = ["people"]
strategies = ["independent"]
placements = ["central"]
"""

Bad = tuple[str, str | bytes | dict[str, Any] | Callable[[Path], None], dict[str, Any], str]
"""File name, content, columns of the schema, and what the error says."""


def csv(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def users(num_records: int) -> list[str]:
    return [f"{MARK}{i}" for i in range(num_records)]


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


ERRORS: dict[str, Bad] = {
    "nothing at all": ("t.csv", "", {"drug": DRUG}, "is empty; expected a header"),
    "a header of another table": (
        "t.csv",
        csv("who,drog", f"{MARK},aspirin"),
        {"drug": DRUG},
        "no column 'drug'; did you mean 'drog'",
    ),
    "two columns of one name": (
        "t.csv",
        csv("who,drug,drug", f"{MARK},aspirin,none"),
        {"drug": DRUG},
        "two columns are called 'drug'",
    ),
    "two columns of one name in parquet": (
        "t.parquet",
        lambda path: pq.write_table(
            pa.Table.from_arrays([pa.array([MARK])] * 3, names=["who", "drug", "drug"]), path
        ),
        {"drug": DRUG},
        "two columns are called 'drug'",
    ),
    "semicolons": (
        "t.csv",
        csv("who;drug", f"{MARK};aspirin"),
        {"drug": DRUG},
        "save it with commas",
    ),
    "a row of another length": (
        "t.csv",
        csv("who,drug", f"{MARK},aspirin,{NUMBER}"),
        {"drug": DRUG},
        "does not parse in row 2: expected 2 values",
    ),
    "text that is not UTF-8": (
        "t.csv",
        csv("who,drug", f"{MARK},aspirin").encode() + f"{MARK},\xe9\n".encode("latin-1"),
        {"drug": DRUG},
        "not UTF-8 at byte offset 29",
    ),
    "text that is not UTF-8 in parquet": (
        "t.parquet",
        {"who": [MARK], "drug": pa.array([b"zqx77\xff"])},
        {"drug": DRUG},
        "text is not UTF-8",
    ),
    "UTF-16": (
        "t.csv",
        csv("who,drug", f"{MARK},aspirin").encode("utf-16"),
        {"drug": DRUG},
        "is UTF-16; save it as UTF-8",
    ),
    "a file cut off": (
        "t.csv.gz",
        gzip.compress(csv("who,drug", *[f"{MARK}{i},aspirin" for i in range(500)]).encode())[:-40],
        {"drug": DRUG},
        "cut off, damaged",
    ),
    "a spreadsheet under another name": ("t.parquet", b"PK\3\4zqx77", {"drug": DRUG}, "damaged"),
    "not JSON": (
        "t.jsonl",
        csv(f'{{"who": "{MARK}", "drug": "aspirin"}}', f"{MARK}"),
        {"drug": DRUG},
        "line 2: not JSON",
    ),
    "lists in JSON": (
        "t.jsonl",
        csv(f'{{"who": "{MARK}", "drug": ["{MARK}"]}}'),
        {"drug": DRUG},
        "not a list or an object",
    ),
    "lists in parquet": (
        "t.parquet",
        {"who": [MARK], "drug": [[MARK]]},
        {"drug": DRUG},
        "flatten it",
    ),
    "Python objects in npz": (
        "t.npz",
        npz(who=np.array([MARK]), drug=np.array([{MARK: NUMBER}], dtype=object)),
        {"drug": DRUG},
        "holds Python objects",
    ),
    "arrays of different length": (
        "t.npz",
        npz(who=np.array([MARK]), drug=np.array([MARK] * 3)),
        {"drug": DRUG},
        "differ in length",
    ),
    "all missing": (
        "t.csv",
        csv("who,drug", f"{MARK}1,", f"{MARK}2,"),
        {"drug": DRUG},
        "is missing or not among the schema's categories.*missing = true",
    ),
    "all missing numbers": (
        "t.parquet",
        {"who": users(3), "dose": pa.nulls(3)},
        {"dose": DOSE},
        "is missing or not a number.*missing = true",
    ),
    "NaN": (
        "t.parquet",
        {"who": users(2), "dose": [NUMBER * 1.5, float("nan")]},
        {"dose": DOSE},
        "is missing or not a number",
    ),
    "an unlisted category": (
        "t.csv",
        csv("who,drug", f"{MARK},{MARK}"),
        {"drug": DRUG},
        "not among the schema's categories",
    ),
    "numbers and text": (
        "t.csv",
        csv("who,dose", f"{MARK}1,{NUMBER}", f"{MARK}2,{MARK}"),
        {"dose": DOSE},
        "not a number",
    ),
    "numbers and text in JSON": (
        "t.jsonl",
        csv(
            f'{{"who": "{MARK}1", "age": {NUMBER}}}',
            f'{{"who": "{MARK}2", "age": "{MARK}"}}',
            f'{{"who": "{MARK}3", "age": true}}',
        ),
        {"age": AGE},
        "not a number",
    ),
    "dates as numbers": (
        "t.parquet",
        {"who": users(1), "seen": [NUMBER]},
        {"seen": SEEN},
        "expected dates, found int64",
    ),
    "dates of no calendar": (
        "t.csv",
        csv("who,seen", f"{MARK},2024-02-30"),
        {"seen": SEEN},
        "not a date like 2024-12-31",
    ),
    "dates of another country": (
        "t.csv",
        csv("who,seen", f"{MARK},31/12/2024"),
        {"seen": SEEN},
        "not a date like 2024-12-31",
    ),
    "times as numbers": (
        "t.parquet",
        {"who": users(1), "age": [datetime.time(7, 39, 15)]},
        {"age": AGE},
        "expected numbers, found time64",
    ),
    "yes and no": (
        "t.csv",
        csv("who,smokes", f"{MARK},yes"),
        {"smokes": SMOKES},
        "not among the schema's categories",
    ),
    "a user who is nobody": (
        "t.csv",
        csv("who,drug", f"{MARK},aspirin", ",none"),
        {"drug": DRUG},
        "user-id column 'who' holds null ids",
    ),
    "user ids that a float rounded": (
        "t.parquet",
        {"who": [7.39152e18], "drug": ["none"]},
        {"drug": DRUG},
        "a float has rounded them",
    ),
    "no user ids": (
        "t.csv",
        csv("whom,drug", f"{MARK},aspirin"),
        {"drug": DRUG},
        "no column 'who'",
    ),
}


def write(path: Path, content: Any) -> Path:
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def described(folder: Path, file: str, columns: dict[str, Any]) -> Any:
    """A run on a file's records; its schema is written beside it."""
    (folder / "schema.json").write_text(json.dumps({"columns": columns}))
    return parse_config(
        {
            "population": {"name": HOST, "num_users": 100, "epsilon": 2.0, "delta": 1e-4},
            "data": {"path": file, "schema": "schema.json"},
            "unit": {"column": "who", "max_records": 2},
            "budget": {"epsilon": 1.0},
            "strategy": {"name": "independent"},
            "engine": {"clients": 1},
            "release": {"num_records": 20},
        },
        base=folder,
    )


def answered(folder: Path, file: str, columns: dict[str, Any]) -> tuple[ClientCode, RecordDict]:
    """What the client whose shard is `file` answers to the first question of a run."""
    plan = plan_of(described(folder, file, columns))
    (folder / "policy.toml").write_text(POLICY)
    query = next(plan.strategy.rounds(plan.schema, plan.noise_multiplier, np.random.default_rng(0)))
    ask = Ask(
        run=plan.run,
        population=HOST,
        round=1,
        attempt=1,
        strategy="independent",
        settings=settings_of(plan.strategy),
        schema_digest=plan.schema.digest,
        unit=canonical(asdict(plan.config.privacy_unit)),
        placement=plan.config.noise.placement,
        num_shares=1,
        plan=canonical(accounting.to_json(plan.event)),
        delta=1e-4,
        public_seed=0,
        head=(0, "0" * 64),
        query=query,
    )
    LocalGrid(client_app, 1)  # gives messages their sender
    context = Context(
        run_id=1,
        node_id=2,
        node_config={
            "shard": str(folder / file),
            "schema": str(folder / "schema.json"),
            "policy": str(folder / "policy.toml"),
            "state": str(folder / "state"),
        },
        state=RecordDict(),
        run_config={},
    )
    reply = client_app(Message(ask_to_records(ask), 2, MESSAGE_TYPE), context)
    return reply_from_records(reply.content, query).code, reply.content


def is_unspent(folder: Path) -> bool:
    """Whether neither the client's odometer nor the server's ledger has anything on it."""
    odometer = Odometer(folder / "state" / "odometer.db", "client")
    if odometer.spent(HOST, delta=1e-4).epsilon:
        return False
    if not (folder / "ledger.db").exists():
        return True
    with Ledger(folder / "ledger.db") as ledger:
        return not ledger.populations() or not accounting.leaves(ledger.spent(HOST))


def says_nothing_of_a_record(text: str | bytes) -> bool:
    """Whether no marked value stands in a text."""
    text = text if isinstance(text, bytes) else text.encode()
    return MARK.encode() not in text.lower() and str(NUMBER).encode() not in text


@pytest.mark.parametrize("case", ERRORS)
def test_a_client_refuses_a_bad_table_with_a_code_alone(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file, content, columns, says = ERRORS[case]
    write(tmp_path / file, content)
    caplog.set_level("DEBUG")

    code, sent = answered(tmp_path, file, columns)

    assert code is ClientCode.SHARD_INVALID
    with pytest.raises(ShardError, match=says) as refusal:
        read_shard(tmp_path / file, Schema.from_json({"columns": columns}), User("who"))
    assert str(refusal.value) in caplog.text
    assert says_nothing_of_a_record(caplog.text)
    assert says_nothing_of_a_record(str(sent))
    for kept in (tmp_path / "state").iterdir():
        assert says_nothing_of_a_record(kept.read_bytes())
    assert is_unspent(tmp_path)


@pytest.mark.parametrize("case", ERRORS)
def test_a_run_on_a_bad_table_spends_nothing(case: str, tmp_path: Path):
    file, content, columns, says = ERRORS[case]
    write(tmp_path / file, content)

    with pytest.raises(DataError, match=says) as refusal:
        run(described(tmp_path, file, columns))

    chain: BaseException | None = refusal.value
    while chain is not None:  # a traceback shows all of them
        assert says_nothing_of_a_record(str(chain))
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    assert is_unspent(tmp_path)
    assert not (tmp_path / "releases").exists()


# --- what is taken as it is -------------------------------------------------------------------

Taken = tuple[str, Any, dict[str, Any], list[list[int]]]
"""File name, content, columns of the schema, and the cells that the records get."""
MISSING = {"missing": True}
TREATED: dict[str, Taken] = {
    "one value in a column": (
        "t.csv",
        csv("who,drug,dose", "a,none,7", "b,none,7", "c,none,7"),
        {"drug": {**DRUG, "categories": ["none"]}, "dose": DOSE},
        [[0, 3]] * 3,
    ),
    "all missing, and a cell for it": (
        "t.parquet",
        {"who": ["a", "b"], "drug": pa.nulls(2), "dose": [None, float("nan")], "seen": pa.nulls(2)},
        {"drug": DRUG | MISSING, "dose": DOSE | MISSING, "seen": SEEN | MISSING},
        [[2, 5, 10]] * 2,
    ),
    "infinities count in the outermost bins": (
        "t.csv",
        csv("who,dose", "a,inf", "b,-Infinity", "c,1e999"),
        {"dose": DOSE},
        [[4], [0], [4]],
    ),
    "bounds that do not cover": (
        "t.csv",
        csv("who,dose,age,seen", "a,-3,120,1999-01-01", "b,11,-1,2030-12-31T23:59"),
        {"dose": DOSE, "age": AGE, "seen": SEEN},
        [[0, 9, 0], [4, 0, 9]],
    ),
    "categories that do not cover, and a cell for it": (
        "t.csv",
        csv("who,drug", "a,none", "b,heroin"),
        {"drug": DRUG | MISSING},
        [[1], [2]],
    ),
    "numbers and text, and a cell for it": (
        "t.jsonl",
        csv('{"who": 1, "age": 37}', '{"who": "2", "age": "old"}', '{"who": "3", "age": "37.0"}'),
        {"age": AGE | MISSING},
        [[3], [10], [3]],
    ),
    "numbers where categories are": (
        "t.parquet",
        {"who": [1, 2, 3], "grade": [1.0, 2.0, None]},
        {"grade": {"type": "ordinal", "categories": ["1", "2"], "origin": ORIGIN, "missing": True}},
        [[0], [1], [2]],
    ),
    "integers beyond 64 bits": (
        "t.csv",
        csv("who,age", f"a,{10**30}", f"b,-{10**400}"),
        {"age": AGE},
        [[9], [0]],
    ),
    "columns and ids that nobody asked for": (
        "t.csv",
        csv("who,visit,note,drug", "a,v1,\u2028,none", "b,v1,'; DROP TABLE,aspirin"),
        {"visit": {"type": "id"}, "drug": DRUG},
        [[1], [0]],
    ),
    "no records": ("t.csv", csv("who,drug"), {"drug": DRUG}, []),
    "no records in parquet": (
        "t.parquet",
        {"who": pa.array([], pa.string()), "drug": pa.nulls(0)},
        {"drug": DRUG},
        [],
    ),
}


@pytest.mark.parametrize("case", TREATED)
def test_a_stated_treatment_is_what_happens(case: str, tmp_path: Path):
    file, content, columns, cells = TREATED[case]
    write(tmp_path / file, content)

    shard = read_shard(tmp_path / file, Schema.from_json({"columns": columns}), User("who"))

    assert shard.records.codes.tolist() == cells


@pytest.mark.parametrize("case", TREATED)
def test_a_table_that_is_treated_ends_in_a_release(case: str, tmp_path: Path):
    file, content, columns, _ = TREATED[case]
    write(tmp_path / file, content)

    folder = run(described(tmp_path, file, columns))

    table = pq.read_table(folder / "data" / "synthetic.parquet")
    assert table.num_rows == 20
    assert table.column_names == [n for n, column in columns.items() if column["type"] != "id"]


def test_a_constant_user_id_is_one_user_whom_a_policy_of_more_refuses(tmp_path: Path):
    write(tmp_path / "t.csv", csv("who,drug", *["a,none"] * 50))

    code, _ = answered(tmp_path, "t.csv", {"drug": DRUG})

    assert code is ClientCode.POLICY_REFUSED
    assert is_unspent(tmp_path)


def test_a_good_table_is_answered_and_charged(tmp_path: Path):
    """The twin of all refusals: what they show as unspent is spent here."""
    write(tmp_path / "t.csv", csv("who,drug", "a,none", "b,aspirin"))

    code, _ = answered(tmp_path, "t.csv", {"drug": DRUG})

    assert code is ClientCode.OK
    assert not is_unspent(tmp_path)


# --- a schema that cannot be ------------------------------------------------------------------

SCHEMAS = {
    "one value as a number": ({"dose": DOSE | {"bounds": [7, 7]}}, "one value only is a category"),
    "no bounds": ({"dose": {"type": "real", "origin": ORIGIN}}, "needs finite bounds"),
    "infinite bounds": ({"dose": DOSE | {"bounds": [0, float("inf")]}}, "finite"),
    "NaN for a bound": ({"dose": DOSE | {"bounds": [float("nan"), 1]}}, "finite"),
    "too many categories": (
        {"drug": DRUG | {"categories": [str(i) for i in range((1 << 20) + 1)]}},
        "more than 1,048,576 cells",
    ),
    "a category twice": ({"drug": DRUG | {"categories": ["a", "a"]}}, "must differ"),
    "nothing to synthesize": ({"who": {"type": "id"}}, "at least one column that is not an id"),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_a_schema_that_cannot_be_is_refused_before_the_table_is_read(case: str, tmp_path: Path):
    columns, says = SCHEMAS[case]

    with pytest.raises(SchemaError, match=says):
        run(described(tmp_path, "not_even_there.csv", columns))

    assert is_unspent(tmp_path)


def test_a_schema_with_a_column_twice_does_not_parse(tmp_path: Path):
    config = described(tmp_path, "t.csv", {"drug": DRUG})
    twice = '[columns.drug]\ntype = "boolean"\n[columns.drug]\ntype = "boolean"\n'
    (tmp_path / "schema.toml").write_text(twice)

    with pytest.raises(SchemaError, match="does not parse"):
        Schema.read(tmp_path / "schema.toml")
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads(twice)
    assert config.data.schema_path == Path("schema.json")


# --- every type there is ----------------------------------------------------------------------

KINDS = [
    Column("x", "category", ORIGIN, ("a", "1", "2"), missing=True),
    Column("x", "ordinal", ORIGIN, ("a", "1", "2"), missing=True),
    Column("x", "boolean", ORIGIN, missing=True),
    Column("x", "integer", ORIGIN, bounds=(0, 9), num_bins=10, missing=True),
    Column("x", "real", ORIGIN, bounds=(0, 9), num_bins=10, missing=True),
    Column("x", "date", ORIGIN, bounds=(0, 9), num_bins=10, missing=True),
    Column("x", "date", ORIGIN, bounds=(0, 9), num_bins=10, missing=True, resolution="second"),
]
TYPES: dict[str, pa.Array] = {
    "null": pa.nulls(3),
    "int8": pa.array([1, None, -5], pa.int8()),
    "uint64": pa.array([1, None, 2**64 - 1], pa.uint64()),
    "int64": pa.array([1, None, -(2**63)], pa.int64()),
    "float16": pa.array(np.array([1, np.nan, np.inf], np.float16)),
    "float32": pa.array([1, None, float("inf")], pa.float32()),
    "float64": pa.array([5e-324, float("nan"), -float("inf")]),
    "decimal": pa.array([None, 10**60], pa.decimal256(70, 0)),
    "boolean": pa.array([True, None, False]),
    "text": pa.array(["1", None, "1e400", "1" * 400, "-0", "nan", "", "?", "\u0661", "a\u0301"]),
    "text by view": pa.array(["a", None, "x"], pa.string_view()),
    "bytes": pa.array([b"1", None]),
    "bytes that are no text": pa.array([b"\xff", None]),
    "bytes by view": pa.array([b"1"], pa.binary_view()),
    "bytes of one length": pa.array([b"ab", None], pa.binary(2)),
    "days": pa.array([2**31 - 1, None, -(2**31)], pa.int32()).cast(pa.date32()),
    "milliseconds of days": pa.array([86_400_000, None], pa.date64()),
    "seconds": pa.array([2**63 - 1, None, -(2**63)], pa.timestamp("s")),
    "nanoseconds somewhere": pa.array([1, None, -1], pa.timestamp("ns", tz="Europe/Rome")),
    "times of day": pa.array([1, None], pa.time32("s")),
    "durations": pa.array([1, None], pa.duration("s")),
    "intervals": pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
    "lists": pa.array([[1], None]),
    "lists of one length": pa.array([[1, 2]], pa.list_(pa.int64(), 2)),
    "structs": pa.array([{"a": 1}, None]),
    "maps": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "unions": pa.UnionArray.from_sparse(
        pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]
    ),
    "runs": pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "1"]),
    "text in a dictionary": pa.array(["1", None, "a"]).dictionary_encode(),
    "numbers in a dictionary": pa.array([1.0, None, float("nan")]).dictionary_encode(),
    "dates in a dictionary": pa.array([datetime.date(1970, 1, 2), None]).dictionary_encode(),
    "truth in a dictionary": pa.array([True, None]).dictionary_encode(),
    "null in a dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["a", None])),
    "text by view in a dictionary": pa.DictionaryArray.from_arrays(
        pa.array([0, None]), pa.array(["1"], pa.string_view())
    ),
    "lists in a dictionary": pa.DictionaryArray.from_arrays(pa.array([0]), pa.array([[1]])),
    "nothing": pa.array([], pa.null()),
}


@pytest.mark.parametrize("case", TYPES)
def test_every_type_is_read_or_refused_and_nothing_else(case: str):
    outcomes = set()
    for column in KINDS:
        try:
            shard = encode(pa.table({"x": TYPES[case]}), Schema((column,)), PrivacyUnit())
        except ShardError as refusal:
            outcomes.add("column 'x'" in str(refusal))
            continue
        outcomes.add(True)
        codes = shard.records.codes[:, 0]
        assert len(codes) == len(TYPES[case])
        assert ((codes >= 0) & (codes < column.num_cells)).all()
        gone = TYPES[case].is_null().to_numpy(zero_copy_only=False)
        assert (codes[gone] == column.num_cells - 1).all()
    assert outcomes == {True}


def test_some_types_are_read_and_some_refused():
    """The test above would pass if all were refused."""
    refused = []
    for case, column in itertools.product(TYPES, KINDS):
        try:
            encode(pa.table({"x": TYPES[case]}), Schema((column,)), PrivacyUnit())
        except ShardError:
            refused.append((case, column.kind))
    assert 60 < len(refused) < 160
    assert ("lists", "category") in refused
    assert ("runs", "category") not in refused


# --- a million categories ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def million() -> Schema:
    names = tuple(f"code-{i:07d}" for i in range(1_000_000))
    return Schema((Column("code", "category", ORIGIN, names, missing=True),))


def test_a_million_categories_are_coded_without_a_loop_over_records(million: Schema):
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 1_000_000, 100_000)
    names = np.array(million.columns[0].categories)
    table = pa.table({"code": pa.array([*names[wanted], "unlisted", None])})

    codes = encode(table, million, PrivacyUnit()).records.codes[:, 0]

    assert (codes[:-2] == wanted).all()
    assert codes[-2:].tolist() == [1_000_000] * 2


def test_a_million_categories_are_learnt_and_sampled(million: Schema):
    from fedsynth.client.bounding import bound
    from fedsynth.client.shard import Shard

    schema = Schema((*million.columns, Column("ill", "boolean", ORIGIN)))
    codes = np.zeros((5_000, 2), dtype=np.int32)
    codes[:, 0] = 7
    ids = np.arange(5_000).astype(str)
    shard = bound(Shard(Records(codes), ids), PrivacyUnit(), seed=0)

    for strategy in (Independent(), Mst()):
        learnt = direct_run(strategy, schema, shard, 0.5, rng=np.random.default_rng(0))
        sample = learnt.sample(1_000, np.random.default_rng(0)).codes
        assert (sample[:, 0] == 7).mean() > 0.9


@pytest.mark.parametrize("name", ["dp_merf", "dp_fedavg", "dp_wgan", "rdp_gan"])
def test_a_network_refuses_a_million_categories_before_anybody_is_asked(name: str, million: Schema):
    schema = Schema((*million.columns, Column("ill", "boolean", ORIGIN)))

    with pytest.raises(ConfigError, match="column 'code' alone has 1,000,001 cells"):
        build_strategy(name, {}).event(schema, 1.0)


def test_a_setting_is_refused_before_a_bad_table_is_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="num_users"):
        parse_config({"population": {"name": HOST}}, base=tmp_path)

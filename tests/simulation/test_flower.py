# SPDX-License-Identifier: Apache-2.0
"""The parts of Flower's engines that need no process: files, certificates, bundles, outcomes."""

import io
import json
import math
import stat
import tomllib
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from fedsynth.client.app import app as client_app
from fedsynth.client.bounding import bound
from fedsynth.client.policy import Policy
from fedsynth.client.shard import read_shard
from fedsynth.client.site import simulated, simulated_site, simulation_state
from fedsynth.core.config import parse_config, run_file
from fedsynth.core.errors import BudgetExceeded, ConfigError, FedsynthError, QuorumError
from fedsynth.core.randomness import OsKeyStream
from fedsynth.server.app import conduct_named
from fedsynth.server.conduct import RoundEvent
from fedsynth.server.planned import plan_of, start
from fedsynth.simulation import flower, loopback
from fedsynth.simulation.local import LocalGrid
from fedsynth.simulation.processes import last_words, plain
from flwr.app import Context, RecordDict

PEOPLE = {
    "person": ["a", "b", "c", "d", "e", "f", "g", "a", "b", "007"],
    "color": ["red", "blue"] * 5,
    "weight": ["0.5", "", "1", "0.25", "1e-3", "0.75", "?", "0.1", "0.2", "0.3"],
}
SCHEMA = {
    "columns": {
        "color": {"type": "category", "categories": ["red", "blue"], "origin": "public: made up"},
        "weight": {
            "type": "real",
            "bounds": [0, 1],
            "num_bins": 4,
            "missing": True,
            "origin": "public: made up",
        },
    }
}
CONFIG = {
    "population": {"name": "people", "num_users": 8, "epsilon": 8.0, "delta": 1e-3},
    "data": {"schema": "schema.json"},
    "unit": {"column": "person", "max_records": 2},
    "budget": {"epsilon": 4.0},
    "strategy": {"name": "independent"},
    "release": {"num_records": 20},
}


def plan_in(folder, name="people.csv", *, clients=3, kind="loopback", unit=None):
    """A plan over ten records of eight people, in the format that the name's ending says."""
    write_people(folder / name)
    (folder / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    changed = {"data": {"schema": "schema.json", "path": name}}
    changed["engine"] = {"kind": kind, "clients": clients}
    return plan_of(parse_config(CONFIG | changed | ({"unit": unit} if unit else {}), base=folder))


def write_people(path):
    rows = [dict(zip(PEOPLE, row, strict=True)) for row in zip(*PEOPLE.values(), strict=True)]
    match path.suffix:
        case ".csv":
            lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
            path.write_text("\n".join([",".join(PEOPLE), *lines]) + "\n", encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.table(PEOPLE), path)
        case ".npz":
            np.savez(path, **{name: np.array(values) for name, values in PEOPLE.items()})


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet", "p.npz"])
@pytest.mark.parametrize("unit", [{"column": "person", "max_records": 2}, {"column": None}])
def test_an_owner_of_a_rehearsal_holds_what_the_simulated_client_would_read(tmp_path, name, unit):
    plan = plan_in(tmp_path, name, unit={k: v for k, v in unit.items() if v is not None})
    privacy_unit = plan.config.privacy_unit

    owners = loopback.deal(plan)

    for number, owner in enumerate(owners):
        given = tomllib.loads(owner.node_config.read_text(encoding="utf-8"))
        path = loopback.Path(given["shard"])
        dealt = bound(read_shard(path, plan.schema, privacy_unit), privacy_unit, seed=0)
        read = read_shard(
            tmp_path / name, plan.schema, privacy_unit, partition=(number, len(owners))
        )
        simulated_shard = bound(read, privacy_unit, seed=0)
        np.testing.assert_array_equal(dealt.records.codes, simulated_shard.records.codes)
        np.testing.assert_array_equal(dealt.user_index, simulated_shard.user_index)
    assert sum(len(read_shard(p, plan.schema, privacy_unit).records) for p in _shards(owners)) == 10


def test_an_owner_without_any_user_holds_an_empty_shard(tmp_path):
    plan = plan_in(tmp_path, clients=40)

    sizes = [len(pq.read_table(path)) for path in _shards(loopback.deal(plan))]

    assert sum(sizes) == 10
    assert sizes.count(0) >= 32


def test_an_owner_of_a_rehearsal_allows_the_run_and_nobody_else_may_look(tmp_path):
    plan = plan_in(tmp_path)

    owners = loopback.deal(plan)

    for owner in owners:
        policy = Policy.read(owner.folder / "policy.toml")
        assert policy == Policy.for_simulation(plan.config)
        assert policy.missing == []
        assert stat.S_IMODE(owner.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(simulation_state(plan.config).stat().st_mode) == 0o700


def test_dealing_again_leaves_an_unchanged_shard_as_old_as_its_source(tmp_path):
    plan = plan_in(tmp_path)

    first = [path.stat().st_mtime_ns for path in _shards(loopback.deal(plan))]
    second = [path.stat().st_mtime_ns for path in _shards(loopback.deal(plan))]

    assert set(first + second) == {(tmp_path / "people.csv").stat().st_mtime_ns}


def test_a_rehearsal_with_too_many_supernodes_is_refused_before_anything_starts(tmp_path):
    plan = plan_in(tmp_path, clients=loopback.MAX_CLIENTS + 1)

    with pytest.raises(ConfigError, match="SuperNodes on this machine"):
        loopback.run_loopback(plan, on_event=lambda event: None)

    assert not plan.config.path(plan.config.release.path).exists()


def test_the_certificate_is_for_the_loopback_address_and_signed_by_the_authority(tmp_path):
    loopback.write_certificates(tmp_path)

    authority = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())

    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert isinstance(server.public_key().curve, ec.SECP384R1)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ca.crt", "server.key", "server.pem"]
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600


def test_each_node_has_a_key_of_its_own_that_only_its_owner_reads(tmp_path):
    for name in ("one", "two"):
        loopback.write_node_key(tmp_path, name)

    public = [(tmp_path / f"{name}.pub").read_bytes() for name in ("one", "two")]

    assert public[0] != public[1]
    assert all(isinstance(load_ssh_public_key(key).curve, ec.SECP384R1) for key in public)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_that_is_sent_carries_configuration_and_no_code(tmp_path):
    from flwr.cli.build import build_fab_from_disk

    app = flower._write_app(tmp_path / "fedsynth-run")

    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app)))

    carried = {name for name in bundle.namelist() if not name.startswith(".info")}
    assert carried == {"pyproject.toml", "README.md"}
    components = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert components["components"]["clientapp"] == "fedsynth.client.app:app"


def test_an_unfinished_line_of_the_progress_file_waits_for_its_end(tmp_path):
    event = RoundEvent(1, 3, "q", 2, 3, False, False, 1.5, 0.5, 0.5, 2.0)
    line = json.dumps(vars(event)) + "\n"
    path = tmp_path / "progress.jsonl"
    path.write_text(line + line[:20], encoding="utf-8")

    with path.open(encoding="utf-8") as lines:
        first = list(flower._events(lines))
        path.write_text(line + line, encoding="utf-8")
        second = list(flower._events(lines))

    assert (first, second) == ([event], [event])


def test_a_void_round_comes_through_the_progress_file(tmp_path):
    path = tmp_path / "progress.jsonl"
    event = RoundEvent(1, 3, "q", 0, 3, True, False, math.inf, 0.5, 0.5, 2.0)
    path.write_text(json.dumps(vars(event) | {"stddev": None}) + "\n", encoding="utf-8")

    with path.open(encoding="utf-8") as lines:
        assert list(flower._events(lines)) == [event]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("BudgetExceeded", BudgetExceeded), ("IntEnum", FedsynthError), ("Unheard", FedsynthError)],
)
def test_an_outcome_is_raised_as_the_error_that_it_names(tmp_path, name, kind):
    outcome = tmp_path / "outcome.json"
    outcome.write_text(json.dumps({"error": name, "message": "so it is", "exit_code": 4}))

    error = flower._error_of(outcome)

    assert type(error) is kind
    assert (str(error), error.exit_code) == ("so it is", 4)


def test_the_last_words_of_a_log_are_its_error_box_or_its_last_error():
    box = "started\n╭─ Error ─╮\n│ no such │\n│ link.   │\n╰─────────╯\n"

    assert last_words(box) == "no such link."
    assert last_words("fine\nValueError: wrong\nbye\n") == "ValueError: wrong"
    assert last_words("") == "it said nothing"
    assert plain(b"\x1b[91mERROR \x1b[0m: \x07no") == "ERROR : no"


def test_an_error_that_ends_a_started_run_is_written_where_its_follower_looks(tmp_path):
    plan = plan_in(tmp_path, clients=2)
    folder = start(plan)
    grid = LocalGrid(client_app, 2)  # with no site at all: every client refuses

    with pytest.raises(QuorumError):
        conduct_named(grid, flower_context(folder / "run.json"), OsKeyStream())

    error = flower._error_of(folder / "outcome.json")
    assert type(error) is QuorumError
    assert "NO_SHARD" in str(error)


def test_a_run_that_flwr_run_begins_asks_as_many_clients_as_flower_simulates(tmp_path):
    plan = plan_in(tmp_path, clients=5, kind="local")
    text = "\n".join(f"{key} = {value}" for key, value in tables_of(plan))
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    config, unit = plan.config, plan.config.privacy_unit

    class InMemoryGrid(LocalGrid):
        """Named as the grid of Flower's simulation is."""

    def site(context):
        number, of = context.node_config["partition-id"], context.node_config["num-partitions"]
        read = read_shard(tmp_path / "people.csv", plan.schema, unit, partition=(number, of))
        return simulated_site(
            Policy.for_simulation(config),
            plan.schema,
            number,
            of,
            tmp_path / "odometer.db",
            lambda unit, seed: bound(read, unit, seed=seed),
            secure=False,
        )

    with simulated(site):
        release = conduct_named(
            InMemoryGrid(client_app, 2), flower_context(tmp_path / "run.toml"), OsKeyStream()
        )

    card = json.loads((release / "card.json").read_text(encoding="utf-8"))
    assert (card["num_clients"], card["engine"]) == (2, "ray")


def test_a_relative_run_is_found_in_the_working_folder_and_else_named_in_full(
    tmp_path, monkeypatch
):
    (tmp_path / "mine.toml").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    assert run_file("mine.toml") == tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match="names no run"):
        run_file("")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere"):
        run_file("nowhere.toml")


def flower_context(run) -> Context:
    return Context(1, 1, {}, RecordDict(), {"run": str(run)})


def tables_of(plan):
    """The keys of a `run.toml`, dotted, with their values as TOML."""
    dumped = CONFIG | {"data": {"schema": "schema.json", "path": "people.csv"}}
    dumped |= {"engine": {"clients": plan.config.engine.clients}}
    for section, entries in dumped.items():
        for key, value in entries.items():
            yield f"{section}.{key}", json.dumps(value)


def _shards(owners):
    configs = [tomllib.loads(owner.node_config.read_text(encoding="utf-8")) for owner in owners]
    return [loopback.Path(config["shard"]) for config in configs]

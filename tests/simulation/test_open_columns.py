# SPDX-License-Identifier: Apache-2.0
"""Runs whose schema leaves domains open: planned, charged, resumed, released, verified."""

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ConfigError, Interrupted
from fedsynth.core.schema import Schema
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of, unfinished
from fedsynth.server.release import Release, verify
from fedsynth.simulation.finished import finished
from fedsynth.simulation.plan import lines_of, outlook
from fedsynth.simulation.run import run, run_local
from fedsynth.strategies.discovered import OTHER

UNIQUE = "Snowflake Bay"
SCHEMA = {
    "columns": {
        "ill": {"type": "boolean"},
        "city": {"type": "category", "categories": "private"},
        "age": {"type": "integer", "bounds": "private", "num_bins": 6},
    }
}


class TestStream:
    """Deterministic bytes; not secret, and the card has to say so."""

    __test__, is_secret = False, False

    def __init__(self):
        self._rng = np.random.default_rng(9)

    def read(self, num_bytes):
        return self._rng.bytes(num_bytes)


@pytest.fixture
def described(tmp_path):
    """A run over 2,000 users, one of whom alone is from `UNIQUE`."""
    rng = np.random.default_rng(4)
    cities = rng.choice(["Lagos", "New York", "Zürich"], 2000, p=[0.5, 0.3, 0.2]).tolist()
    cities[1000] = UNIQUE
    lines = ["who,ill,city,age"]
    lines += [
        f"u{i},{['false', 'true'][rng.integers(2)]},{city},{rng.integers(18, 90)}"
        for i, city in enumerate(cities)
    ]
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return {
        "population": {"name": "people", "num_users": 2000, "epsilon": 8.0, "delta": 1e-6},
        "data": {"path": "people.csv", "schema": "schema.json"},
        "unit": {"column": "who"},
        "budget": {"epsilon": 4.0},
        "strategy": {"name": "mst", "domain_share": 0.25},
        "engine": {"clients": 3, "wire": True},
        "release": {"num_records": 300},
    }


def config_of(described, tmp_path):
    return parse_config(described, base=tmp_path)


def test_a_run_finds_its_domains_and_its_release_verifies(described, tmp_path):
    folder = run(config_of(described, tmp_path))

    release = Release.open(folder)
    found = release.synthesizer.schema
    assert [check.name for check in verify(folder, replay=True) if not check.ok] == []
    assert release.card.schema == Schema.from_json(SCHEMA)
    assert release.card.schema.allows(found)
    assert found.columns[1].categories == ("Lagos", "New York", "Zürich", OTHER)
    assert found.columns[2].bounds[0] < 25
    assert set(release.data["city"].to_pylist()) <= {*found.columns[1].categories}
    assert release.data["age"].type == "int64"


def test_the_ledger_shows_the_domains_share(described, tmp_path):
    plan = plan_of(config_of(described, tmp_path))

    run_local(plan, stream=TestStream())

    with Ledger(tmp_path / "ledger.db") as ledger:
        reserved = [e.data for e in ledger.entries(plan.run) if e.kind == "reserve"]
    spent = {r["query"]: 1 / r["noise_multiplier"] ** 2 for r in reserved}
    domain = spent["domain"] + spent["domain_bins"]
    assert list(spent)[:2] == ["domain", "domain_bins"]
    assert domain / sum(spent.values()) == pytest.approx(0.25)
    assert accounting.epsilon_of(plan.event, 1e-6) == pytest.approx(4.0, abs=1e-3)


def test_a_run_that_was_stopped_between_domain_and_method_resumes(described, tmp_path):
    plan = plan_of(config_of(described, tmp_path))
    whole = run_local(
        plan_of(config_of(described | {"ledger": "other.db"}, tmp_path)), stream=TestStream()
    )

    def stop(event):
        if event.query == "domain_bins":
            raise KeyboardInterrupt

    stream = TestStream()
    with pytest.raises(Interrupted):
        run_local(plan, stream=stream, on_event=stop)
    resumed = run_local(unfinished(tmp_path / "releases" / plan.run), stream=stream)

    one, two = (Release.open(folder).synthesizer for folder in (whole, resumed))
    assert one.schema == two.schema
    assert all(np.array_equal(one.tensors()[k], two.tensors()[k]) for k in one.tensors())


def test_a_plan_says_what_the_domain_costs_and_finds(described, tmp_path):
    seen = outlook(config_of(described, tmp_path))
    told = "\n".join(f"{label} {text}" for label, text in lines_of(seen))

    assert [step.query for step in seen.steps] == [
        *("domain", "domain_bins", "columns", "pairs", "tree")
    ]
    assert "a category of about" in told
    assert "bounds of numbers leave out about" in told


def test_quality_is_held_against_the_domains_that_were_found(described, tmp_path):
    config = config_of(described, tmp_path)

    quality = finished(run(config), config).quality

    assert 0 <= quality.total_variation[1] < 0.1


def test_settings_of_the_domain_need_an_open_column(described, tmp_path):
    columns = {"ill": {"type": "boolean"}}
    (tmp_path / "schema.json").write_text(json.dumps({"columns": columns}))

    with pytest.raises(ConfigError, match="unknown key 'domain_share'"):
        plan_of(config_of(described, tmp_path))


def test_what_one_user_alone_has_is_nowhere_in_a_release(described, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)

    folder = run(config_of(described, tmp_path))

    assert seen_in(folder, tmp_path) == []
    assert UNIQUE not in caplog.text
    assert UNIQUE not in "".join(capsys.readouterr())


def test_a_schema_read_off_the_data_puts_it_in_many_places(described, tmp_path):
    """The failing twin: the same run, its categories inferred from the records."""
    table = (tmp_path / "people.csv").read_text(encoding="utf-8").splitlines()[1:]
    columns = SCHEMA["columns"] | {
        "city": {
            "type": "category",
            "categories": sorted({line.split(",")[2] for line in table}),
            "origin": "public: so they say",
        }
    }
    (tmp_path / "schema.json").write_text(json.dumps({"columns": columns}))

    places = seen_in(run(config_of(described, tmp_path)), tmp_path)

    assert {"card.json", "synthesizer/synthesizer.json"} <= set(places)


def seen_in(folder, tmp_path):
    """Files of a release, and what else a run leaves at the server, that hold `UNIQUE`."""
    text = UNIQUE.encode()
    places = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and text in path.read_bytes()
    ]
    if UNIQUE in pq.read_table(folder / "data" / "synthetic.parquet")["city"].to_pylist():
        places.append("data")
    left = [path for path in tmp_path.glob("ledger.db*") if text in path.read_bytes()]
    return places + [path.name for path in left]

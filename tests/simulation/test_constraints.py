# SPDX-License-Identifier: Apache-2.0
"""Constraints and ids from the schema file to the released table, and what is sampled later."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedsynth.core.config import parse_config
from fedsynth.server.release import Release
from fedsynth.simulation.export import write_table
from fedsynth.simulation.finished import finished
from fedsynth.simulation.run import run

ORIGIN = "public: made up"
SCHEMA = {
    "columns": {
        "patient": {"type": "id", "synthesize": "serial"},
        "sex": {"type": "category", "categories": ["F", "M"], "origin": ORIGIN},
        "pregnant": {"type": "boolean", "missing": True},
        "came": {
            "type": "date",
            "bounds": ["2024-01-01", "2024-01-28"],
            "num_bins": 4,
            "origin": ORIGIN,
        },
        "left": {
            "type": "date",
            "bounds": ["2024-01-01", "2024-01-28"],
            "num_bins": 4,
            "origin": ORIGIN,
        },
    },
    "constraints": [
        {"forbid": {"sex": "M", "pregnant": True}},
        {"order": ["came", "<=", "left"]},
    ],
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A release of records of which some break the constraints, and its configuration."""
    folder = tmp_path_factory.mktemp("constraints")
    rng = np.random.default_rng(0)
    lines = ["patient,sex,pregnant,came,left"]
    for i in range(400):
        came, stay = rng.integers(1, 20), rng.integers(-1, 9)
        pregnant = ["true", "false", ""][rng.integers(3)]
        lines.append(
            f"zqx77-{i},{'FM'[rng.integers(2)]},{pregnant},2024-01-{came:02d},"
            f"2024-01-{max(1, came + stay):02d}"
        )
    (folder / "people.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    config = parse_config(
        {
            "population": {"name": "people", "num_users": 300, "epsilon": 8.0, "delta": 1e-4},
            "data": {"path": "people.csv", "schema": "schema.json"},
            "unit": {"column": "patient"},
            "budget": {"epsilon": 8.0},
            "strategy": {"name": "mst"},
            "engine": {"clients": 3},
            "release": {"num_records": 300},
        },
        base=folder,
    )
    return run(config), config


def keeps_all(table: Any) -> bool:
    """Whether every record of a table keeps both constraints."""
    frame = table.to_pandas()
    impossible = (frame["sex"] == "M") & (frame["pregnant"] == True)  # noqa: E712
    return bool((~impossible).all() and (frame["came"] <= frame["left"]).all())


def test_a_release_and_what_is_sampled_from_it_keep_the_constraints(released: tuple[Path, Any]):
    release = Release.open(released[0])

    assert release.data.num_rows == 300
    assert keeps_all(release.data)
    assert keeps_all(release.sample(2000, seed=5))
    assert release.card.schema.rules.valid(release.records(2000, seed=6).codes).all()


def test_a_release_under_constraints_verifies_and_replays(released: tuple[Path, Any]):
    release = Release.open(released[0])

    release.verify(replay=True).require()

    assert len(release.card.schema.constraints) == 2
    assert "- never sex is M and pregnant is true" in (released[0] / "card.md").read_text()


def test_ids_of_a_release_are_fresh_numbers(released: tuple[Path, Any], tmp_path: Path):
    folder, config = released
    release = Release.open(folder)

    assert release.data["patient"].to_pylist() == list(range(1, 301))
    write_table(release.sample(5, seed=1), tmp_path / "more.csv")
    assert (tmp_path / "more.csv").read_text().splitlines()[5].startswith("5,")
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"zqx77" not in path.read_bytes()
    assert finished(folder, config).quality is not None

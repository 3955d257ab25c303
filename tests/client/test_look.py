# SPDX-License-Identifier: Apache-2.0
"""What an owner is shown of a shard: gaps, and records that break the schema's constraints."""

import json
from pathlib import Path

from fedsynth.client.look import look

SCHEMA = {
    "columns": {
        "who": {"type": "id"},
        "came": {"type": "date", "bounds": ["2024-01-01", "2024-01-31"], "origin": "policy"},
        "left": {
            "type": "date",
            "bounds": ["2024-01-01", "2024-01-31"],
            "missing": True,
            "origin": "policy",
        },
        "ill": {"type": "boolean"},
    },
    "constraints": [{"order": ["came", "<=", "left"]}, {"forbid": {"ill": False}}],
}
RECORDS = """who,came,left,ill
a,2024-01-05,2024-01-07,true
b,2024-01-05,2024-01-03,true
c,2024-01-05,,true
d,2024-01-05,unknown,true
"""


def test_an_owner_sees_which_constraints_the_records_break(tmp_path: Path):
    (tmp_path / "stays.csv").write_text(RECORDS)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    seen = look(tmp_path / "stays.csv", schema=tmp_path / "schema.json", user="who")

    assert seen.missing == {"left": 0.5}
    assert seen.broken == {"came <= left": 0.25, "never ill is false": 0.0}
    assert ("Constraints", "25.0% not: came <= left") in seen.lines
    assert seen.to_json()["broken"] == seen.broken


def test_an_owner_sees_which_columns_hold_values_of_another_form(tmp_path: Path):
    (tmp_path / "stays.csv").write_text(RECORDS)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    seen = look(tmp_path / "stays.csv", schema=tmp_path / "schema.json", user="who")

    assert seen.to_json()["unread"] == {"left": 1 / 3}  # of the three that are there
    assert dict(seen.lines)["No cell"] == (
        "column 'left': 33.33% of the values count as missing, being not a date like 2024-12-31"
        " or 2024-12-31T08:30"
    )


def test_an_owner_sees_that_a_whole_column_would_be_lost(tmp_path: Path):
    (tmp_path / "stays.csv").write_text(
        "who,came,left,ill\na,2024-01-05,07/01/2024,true\nb,2024-01-05,,true\n"
    )
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    seen = look(tmp_path / "stays.csv", schema=tmp_path / "schema.json", user="who")

    assert "column 'left': every value counts as missing" in dict(seen.lines)["No cell"]
    assert "a simulation refuses this" in dict(seen.lines)[""]


def test_without_constraints_an_owner_reads_nothing_of_them(tmp_path: Path):
    (tmp_path / "stays.csv").write_text(RECORDS)
    plain = {"columns": SCHEMA["columns"]}
    (tmp_path / "schema.json").write_text(json.dumps(plain))

    seen = look(tmp_path / "stays.csv", schema=tmp_path / "schema.json", user="who")

    assert "Constraints" not in dict(seen.lines)

# SPDX-License-Identifier: Apache-2.0
"""A schema says what is public and where it came from, or it is refused."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from fedsynth.core.errors import SchemaError
from fedsynth.core.schema import KINDS as KINDS_OF_COLUMNS
from fedsynth.core.schema import Column, Schema

GOOD = {
    "columns": {
        "age": {
            "type": "integer",
            "bounds": [0, 120],
            "num_bins": 12,
            "origin": "public: declared",
        },
        "sex": {"type": "category", "categories": ["F", "M"], "missing": True, "origin": "policy"},
        "pixels": {"type": "image", "shape": [8, 8], "origin": "public: sensor"},
    },
    "target": "sex",
}


def changed(column, **entry):
    data = {**GOOD, "columns": {k: dict(v) for k, v in GOOD["columns"].items()}}
    for key, value in entry.items():
        if value is None:
            data["columns"][column].pop(key)
        else:
            data["columns"][column][key] = value
    return data


def test_a_schema_survives_json_and_keeps_its_digest():
    schema = Schema.from_json(GOOD)

    again = Schema.from_json(schema.to_json())

    assert again == schema
    assert again.digest == schema.digest
    assert schema.shape == (12, 3)
    assert schema.image.shape == (8, 8, 1)


def test_the_digest_changes_with_the_order_of_columns():
    turned = {**GOOD, "columns": dict(reversed(GOOD["columns"].items()))}

    assert Schema.from_json(turned).digest != Schema.from_json(GOOD).digest


@pytest.mark.parametrize(
    ("column", "entry", "says"),
    [
        ("age", {"origin": None}, "does not say where"),
        ("age", {"origin": "I looked"}, "must begin with one of public, policy, measured"),
        ("age", {"bounds": [5, 5]}, "must rise"),
        ("age", {"bounds": [0, float("inf")]}, "finite"),
        ("age", {"bounds": [0]}, r"\[low, high\]"),
        ("age", {"bounds": None}, "bounds"),
        ("age", {"num_bins": 0}, "num_bins"),
        ("age", {"num_bins": 1 << 30}, "more than"),
        ("age", {"type": "float"}, "must be category, ordinal, boolean, integer, real or date"),
        ("age", {"bins": 3}, "unknown key 'bins'"),
        ("sex", {"categories": []}, "categories"),
        ("sex", {"categories": ["F", "F"]}, "differ"),
        ("sex", {"max_bytes": "all"}, "whole number"),
        ("sex", {"categories": "privat", "origin": None}, "or 'private', not 'privat'"),
        ("age", {"bounds": "privat", "origin": None}, "or 'private', not 'privat'"),
        ("age", {"bounds": [0.2, 0.8], "num_bins": 1}, "no whole number lies in bounds 0.2 to 0.8"),
        ("age", {"bounds": [0, 2**53 + 2]}, r"within ± 2\*\*53 .*, not 0 to 9007199254740994"),
        ("age", {"bounds": [-1e300, 0]}, "or declare a real"),
        ("pixels", {"shape": [8]}, "height, width, channels"),
        ("pixels", {"shape": [8, 0]}, "height, width, channels"),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused(column, entry, says):
    with pytest.raises(SchemaError, match=says):
        Schema.from_json(changed(column, **entry))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({**GOOD, "target": "height"}, "target"),
        ({**GOOD, "tarjet": "sex"}, "unknown key"),
        ({"columns": {}}, "needs a table"),
        ({}, "needs a table"),
    ],
)
def test_a_schema_with_a_wrong_frame_is_refused(data, says):
    with pytest.raises(SchemaError, match=says):
        Schema.from_json(data)


def test_a_schema_file_that_does_not_parse_is_named(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text("[columns.x\n")

    with pytest.raises(SchemaError, match="does not parse"):
        Schema.read(path)


# --- kinds ------------------------------------------------------------------------------------

KINDS = {
    "columns": {
        "patient": {"type": "id", "synthesize": "serial"},
        "visit": {"type": "id"},
        "grade": {"type": "ordinal", "categories": ["low", "mid", "high"], "origin": "policy"},
        "ill": {"type": "boolean", "missing": True},
        "seen": {"type": "date", "bounds": ["2024-02-27", "2024-03-01"], "origin": "policy"},
        "hour": {
            "type": "date",
            "bounds": ["2024-01-01T00:00", "2024-01-31T23:00"],
            "resolution": "hour",
            "num_bins": 31,
            "missing": True,
            "origin": "public: the study ran in January",
        },
    }
}


def test_every_kind_survives_json_and_keeps_its_digest():
    schema = Schema.from_json(KINDS)

    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))

    assert again == schema
    assert again.digest == schema.digest
    assert schema.names == ("grade", "ill", "seen", "hour")
    assert schema.shape == (3, 3, 4, 32)
    assert [c.synthesize for c in schema.ids] == ["serial", "none"]


def test_toml_has_dates_of_its_own(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(
        '[columns.seen]\ntype = "date"\norigin = "policy"\nbounds = [2024-02-27, 2024-03-01]\n'
        '[columns.at]\ntype = "date"\norigin = "policy"\n'
        "bounds = [2024-02-27T08:00:00, 2024-02-27T09:00:00]\n"
    )

    schema = Schema.read(path)

    assert schema.columns[0] == Column(
        "seen", "date", "policy", bounds=(19780.0, 19783.0), num_bins=4
    )
    assert schema.columns[1].resolution == "second"
    assert schema.columns[1].bounds[1] - schema.columns[1].bounds[0] == 3600


def test_what_is_ordered_says_how_many_cells_are():
    ordered = {c.name: (c.is_ordered, c.num_ordered_cells) for c in Schema.from_json(KINDS).columns}

    assert ordered == {
        "grade": (True, 3),
        "ill": (False, 0),
        "seen": (True, 4),
        "hour": (True, 31),
    }


def test_a_schema_without_what_is_new_has_the_digest_it_had():
    assert Schema.from_json(GOOD).digest == (
        "313590098cb50768c0bce68c21bf0cc2b70c2e2a003a1ed1afd6b26a1a951039"
    )


@pytest.mark.parametrize(
    ("column", "entry", "says"),
    [
        ("seen", {"bounds": ["2024-02-30", "2024-03-01"]}, "ISO dates"),
        ("seen", {"bounds": ["27.02.2024", "2024-03-01"]}, "ISO dates"),
        ("seen", {"bounds": [0, 5]}, "ISO dates"),
        ("seen", {"bounds": ["2024-03-01", "2024-03-01"]}, "must rise, not 2024-03-01 to"),
        ("seen", {"bounds": ["2024-02-27T08:00", "2024-03-01"], "resolution": "day"}, "within one"),
        ("seen", {"resolution": "month"}, "resolution must be one of day, hour"),
        ("grade", {"resolution": "day"}, "only a date"),
        ("grade", {"categories": None}, "ordinal needs its categories listed"),
        ("grade", {"categories": "low"}, "must be a list"),
        ("grade", {"missing": "false"}, "must be true or false"),
        ("ill", {"categories": ["no", "yes"]}, "false and true"),
        ("visit", {"synthesize": "hash"}, "none or serial"),
        ("visit", {"origin": "policy"}, "unknown key 'origin'"),
        ("hour", {"num_bins": "7"}, "whole number"),
        ("hour", {"cuts": "noon"}, "cuts must be a list of numbers"),
    ],
)
def test_a_kind_that_contradicts_itself_is_refused(column, entry, says):
    data = {"columns": {k: dict(v) for k, v in KINDS["columns"].items()}}
    data["columns"][column].update(entry)
    data["columns"][column] = {k: v for k, v in data["columns"][column].items() if v is not None}

    with pytest.raises(SchemaError, match=says):
        Schema.from_json(data)


@pytest.mark.parametrize(
    ("column", "entry", "says"),
    [
        ("grade", {"bounds": [0, 1]}, "only an integer, a real or a date has 'bounds', not an ord"),
        ("grade", {"num_bins": 3}, "only an integer, a real or a date has 'num_bins'"),
        ("grade", {"max_bytes": 8}, "only a category has 'max_bytes', not an ordinal"),
        ("ill", {"other": "false"}, "only a category or an ordinal has 'other', not a boolean"),
        ("seen", {"categories": ["early", "late"]}, "has 'categories', not a date"),
        ("seen", {"other": "late"}, "has 'other', not a date; take it out, or change the type"),
    ],
)
def test_a_key_of_another_type_of_column_is_refused(column, entry, says):
    data = {"columns": {k: dict(v) for k, v in KINDS["columns"].items()}}
    data["columns"][column].update(entry)

    with pytest.raises(SchemaError, match=says):
        Schema.from_json(data)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"type": "ordinal", "categories": "private"}, "can be 'private', not 'ordinal'"),
        ({"type": "boolean", "categories": "private"}, "can be 'private', not 'boolean'"),
        ({"type": "date", "bounds": "private"}, "can be 'private', not 'date'"),
        ({"type": "integer", "categories": "private"}, "has 'categories', not an integer"),
        ({"type": "category", "bounds": "private"}, "has 'bounds', not a category"),
    ],
)
def test_what_cannot_be_private_is_told_so_by_its_type(entry, says):
    with pytest.raises(SchemaError, match=says):
        Schema.from_json({"columns": {"x": entry}})


def test_the_largest_whole_numbers_that_a_float_holds_are_bounds():
    data = {"type": "integer", "bounds": [-(2**53), 2**53], "origin": "policy"}

    (column,) = Schema.from_json({"columns": {"x": data}}).columns

    assert column.bounds == (-(2.0**53), 2.0**53)


@pytest.mark.parametrize("bounds", [[-1e308, 1e308], [1.0, 1.0 + 2**-52], [float("nan"), 1.0]])
def test_bounds_that_cannot_be_cut_are_refused(bounds):
    data = {"columns": {"x": {"type": "real", "bounds": bounds, "origin": "policy"}}}

    with pytest.raises(SchemaError, match="bounds"):
        Schema.from_json(data)


def test_a_schema_of_ids_alone_has_nothing_to_synthesize():
    with pytest.raises(SchemaError, match="at least one column that is not an id"):
        Schema.from_json({"columns": {"patient": {"type": "id"}}})


def test_the_documented_schema_is_one():
    page = (Path(__file__).parents[2] / "docs" / "schema.md").read_text(encoding="utf-8")

    schema = Schema.from_json(tomllib.loads(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1]))

    assert {column.kind for column in schema.columns} == set(KINDS_OF_COLUMNS)
    assert len(schema.constraints) == 4

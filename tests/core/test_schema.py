# SPDX-License-Identifier: Apache-2.0
"""A schema says what is public and where it came from, or it is refused."""

import pytest
from fedsynth.core.errors import SchemaError
from fedsynth.core.schema import Schema

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
        ("age", {"type": "float"}, "must be category, integer or real"),
        ("age", {"bins": 3}, "unknown key 'bins'"),
        ("sex", {"categories": []}, "categories"),
        ("sex", {"categories": ["F", "F"]}, "differ"),
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

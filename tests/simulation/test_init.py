# SPDX-License-Identifier: Apache-2.0
"""Drafts come from headers and types, hold no value, and are refused until they are filled."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fedsynth.core.config import read_config
from fedsynth.core.errors import ConfigError, DataError, SchemaError, ShardError
from fedsynth.core.schema import Schema
from fedsynth.server.planned import plan_of
from fedsynth.simulation.init import Draft, check_filled, draft
from pyarrow import parquet

CSV = """patient_id,age,sex,los_days,email,smoker
p1,34,F,1.5,zelda@example.org,true
p2,71,M,9.0,yorick@example.org,false
"""
FILLED = {
    "num_users": 1000,
    "bounds": {"age": (0.0, 120.0), "los_days": (0.0, 60.5)},
    "categories": {"sex": ("F", "M")},
}


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    path = tmp_path / "patients.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


def written(made: Draft, folder: Path) -> Path:
    (folder / "run.toml").write_text(made.run_toml, encoding="utf-8")
    (folder / "schema.toml").write_text(made.schema_toml, encoding="utf-8")
    return folder / "run.toml"


def test_types_and_roles_come_from_the_header(patients: Path):
    made = draft(patients, user="patient_id")

    assert {c.name: (c.type, c.role, c.needs) for c in made.columns} == {
        "patient_id": ("category", "user id", ""),
        "age": ("integer", "feature", "bounds"),
        "sex": ("category", "feature", "categories"),
        "los_days": ("real", "feature", "bounds"),
        "email": ("category", "left out", ""),
        "smoker": ("boolean", "feature", ""),
    }


def test_no_value_of_a_row_reaches_the_draft(patients: Path):
    made = draft(patients, user="patient_id", keep=["email"])
    drafts = (made.run_toml + made.schema_toml).replace(str(patients.parent), "")

    for value in ("p1", "p2", "34", "71", "1.5", "9.0", "zelda", "yorick"):
        assert value not in drafts


def test_every_hole_of_a_draft_is_named_at_once(patients: Path, tmp_path: Path):
    run = written(draft(patients, user="patient_id"), tmp_path)

    with pytest.raises(ConfigError) as refusal:
        check_filled(run)

    for key in ("population.num_users", "columns.age.bounds", "columns.sex.categories"):
        assert key in str(refusal.value)


def test_a_hole_in_the_schema_alone_is_an_error_of_the_schema(patients: Path, tmp_path: Path):
    run = written(draft(patients, user="patient_id", num_users=1000), tmp_path)

    with pytest.raises(SchemaError, match=r"schema\.toml: columns\.los_days\.bounds"):
        check_filled(run)


def test_a_draft_with_holes_is_refused_by_its_readers_too(patients: Path, tmp_path: Path):
    run = written(draft(patients, user="patient_id"), tmp_path)

    with pytest.raises(ConfigError, match="num_users"):
        read_config(run)
    with pytest.raises(SchemaError, match="age"):
        Schema.read(tmp_path / "schema.toml")


def test_a_filled_draft_is_a_run(patients: Path, tmp_path: Path):
    made = draft(patients, user="patient_id", target="smoker", folder=tmp_path, **FILLED)
    run = written(made, tmp_path)

    check_filled(run)
    config, schema = read_config(run), Schema.read(tmp_path / "schema.toml")

    assert made.holes == []
    assert config.privacy_unit.column == "patient_id"
    assert config.run_budget.delta < 1 / (10 * 1000)
    assert config.path(config.data.path) == patients
    assert schema.names == ("age", "sex", "los_days", "smoker")
    assert schema.columns[2].bounds == (0.0, 60.5)
    assert schema.target == "smoker"


def test_a_draft_for_another_folder_still_finds_the_data(patients: Path, tmp_path: Path):
    folder = tmp_path / "study" / "one"
    folder.mkdir(parents=True)
    run = written(draft(patients, user="patient_id", folder=folder, **FILLED), folder)

    config = read_config(run)

    assert config.path(config.data.path).resolve() == patients


def test_names_that_need_quotes_survive(tmp_path: Path):
    names = ["a b", 'say "hi"', "ümlaut", "dot.ted", "back\\slash"]
    parquet.write_table(pa.table({name: [1] for name in names}), tmp_path / "t.parquet")
    made = draft(tmp_path / "t.parquet", bounds=dict.fromkeys(names, (0.0, 1.0)))

    columns = tomllib.loads(made.schema_toml)["columns"]

    assert list(columns) == names


def test_a_column_kept_by_name_is_a_feature(patients: Path):
    made = draft(patients, user="patient_id", keep=["email"])

    (email,) = (c for c in made.columns if c.name == "email")

    assert (email.role, email.needs) == ("feature", "categories")


@pytest.mark.parametrize("name", ["Email", "home_phone", "firstName", "ip_addr", "admission_id"])
def test_names_that_look_identifying_are_left_out(name: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(f"{name},x\na,1\n", encoding="utf-8")

    made = draft(tmp_path / "t.csv")

    assert [c.role for c in made.columns] == ["left out", "feature"]


@pytest.mark.parametrize("name", ["valid", "middle_age", "inpatient", "shipment", "number"])
def test_names_that_hold_such_a_word_inside_another_are_not(name: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(f"{name}\n1\n", encoding="utf-8")

    assert draft(tmp_path / "t.csv").columns[0].role == "feature"


def test_a_number_given_categories_becomes_a_category(patients: Path):
    made = draft(patients, categories={"age": ("young", "old")})

    assert tomllib.loads(made.schema_toml)["columns"]["age"]["categories"] == ["young", "old"]


def test_a_text_given_bounds_becomes_a_number(patients: Path):
    made = draft(patients, bounds={"sex": (0.0, 1.0)})

    assert tomllib.loads(made.schema_toml)["columns"]["sex"]["type"] == "real"


def test_images_are_found_in_an_archive(tmp_path: Path):
    path = tmp_path / "digits.npz"
    np.savez(path, images=np.zeros((3, 8, 8), np.uint8), digit=np.arange(3))

    made = draft(path, categories={"digit": tuple("0123456789")}, num_users=100)

    assert tomllib.loads(made.schema_toml)["columns"]["images"]["shape"] == [8, 8, 1]
    assert tomllib.loads(made.run_toml)["strategy"]["name"] == "private_evolution"


def test_options_that_fit_no_column_are_refused(patients: Path):
    with pytest.raises(ConfigError, match="no column 'aeg'"):
        draft(patients, bounds={"aeg": (0.0, 1.0)})
    with pytest.raises(ConfigError, match="bounds mean nothing"):
        draft(patients, bounds={"smoker": (0.0, 1.0)})


def test_a_file_without_a_usable_column_is_refused(tmp_path: Path):
    (tmp_path / "t.csv").write_text("email\na@b\n", encoding="utf-8")

    with pytest.raises(DataError, match="no column to synthesize"):
        draft(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_two_columns_of_one_name_are_refused(name: str, tmp_path: Path):
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text("a,a\n1,2\n", encoding="utf-8")
    else:
        parquet.write_table(pa.Table.from_arrays([pa.array([1])] * 2, ["a", "a"]), path)

    with pytest.raises(ShardError, match="two columns are called 'a'"):
        draft(path)


@pytest.mark.parametrize("header", ["a;b;c", "a\tb\tc"])
def test_a_header_without_commas_is_not_one_column(header: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(f"{header}\n", encoding="utf-8")

    with pytest.raises(ShardError, match="save it with commas between values"):
        draft(tmp_path / "t.csv")


@pytest.mark.parametrize("spelled", ["nan", "NaN"])
def test_numbers_among_which_some_are_nan_are_numbers(spelled: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(f"a,b\n1,{spelled}\n{spelled},2.5\n", encoding="utf-8")

    made = draft(tmp_path / "t.csv")

    assert [column.type for column in made.columns] == ["integer", "real"]


@pytest.mark.parametrize("epsilon", [-1.0, 0.0, float("nan"), 101.0])
def test_an_epsilon_that_no_budget_has_is_not_drafted(patients: Path, epsilon: float):
    with pytest.raises(ConfigError, match="privacy epsilon"):
        draft(patients, epsilon=epsilon)


def test_a_population_never_gets_a_budget_that_needs_consent(patients: Path):
    made = draft(patients, epsilon=4.0)

    assert tomllib.loads(made.run_toml)["population"]["epsilon"] == 10


def test_private_columns_are_left_to_the_run(patients: Path):
    made = draft(patients, user="patient_id", private=["age", "sex", "los_days"], num_users=1000)

    schema = Schema.from_json(tomllib.loads(made.schema_toml))

    assert {column.name for column in schema.columns if column.is_open} == {
        *("age", "sex", "los_days")
    }
    assert made.holes == []


@pytest.mark.parametrize("name", ["smoker", "patient_id"])
def test_only_what_needs_bounds_or_categories_can_be_private(patients: Path, name: str):
    with pytest.raises(ConfigError, match="needs no bounds or categories"):
        draft(patients, user="patient_id", private=[name])


def test_a_column_of_free_text_is_drafted_with_what_a_language_model_needs(tmp_path: Path):
    path = tmp_path / "chat.csv"
    path.write_text("nick,text\na,hello there\nb,how are you\n", encoding="utf-8")

    made = draft(path, user="nick", text="text", num_users=1000)

    run, schema = tomllib.loads(made.run_toml), Schema.from_json(tomllib.loads(made.schema_toml))
    assert run["strategy"]["name"] == "private_evolution"
    assert schema.text is not None
    assert schema.text.name == "text"
    assert schema.columns == ()
    (hole,) = made.holes
    assert hole.startswith("run.toml: strategy.model_settings.about")


def test_a_filled_draft_of_free_text_is_a_plan(tmp_path: Path):
    path = tmp_path / "chat.csv"
    path.write_text("nick,text\na,hello there\nb,how are you\n", encoding="utf-8")
    made = draft(path, user="nick", text="text", num_users=5000, folder=tmp_path)
    run = written(made, tmp_path)
    about = re.sub(r'about = "[^"]*"', 'about = "chat"', made.run_toml)
    run.write_text(about, encoding="utf-8")

    check_filled(run)

    assert plan_of(read_config(run)).schema.text is not None


@pytest.mark.parametrize("name", ["age", "smoker"])
def test_only_text_is_free_text(patients: Path, name: str):
    with pytest.raises(ConfigError, match="and no text"):
        draft(patients, text=name)


def test_free_text_is_nothing_else_beside(patients: Path):
    with pytest.raises(ConfigError, match="nothing else beside it"):
        draft(patients, text="sex", private=["sex"])

# SPDX-License-Identifier: Apache-2.0
"""A run's file is checked whole: what is wrong with it is said before anything is read."""

import pytest
from fedsynth.core.config import parse_config, read_config
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import NoisePlacement


def described(**change):
    data = {
        "population": {"name": "p", "num_users": 1000, "epsilon": 4.0, "delta": 1e-5},
        "data": {"schema": "schema.toml"},
        "budget": {"epsilon": 1.0},
        "strategy": {"name": "independent"},
    }
    for key, value in change.items():
        section, _, field = key.partition("__")
        if field:
            data.setdefault(section, {})[field] = value
        else:
            data[section] = value
    return data


def parsed(tmp_path, **change):
    return parse_config(described(**change), base=tmp_path)


def test_defaults_are_filled_in(tmp_path):
    config = parsed(tmp_path)

    assert config.noise.placement is NoisePlacement.CENTRAL
    assert config.run_budget.delta == 1e-5
    assert config.path(config.data.schema_path) == tmp_path / "schema.toml"


def test_keys_may_be_spelled_with_dashes(tmp_path):
    config = parsed(tmp_path, unit={"column": "id", "max-records": 3})

    assert config.privacy_unit.max_records == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget__epsilon": 0}, "epsilon"),
        ({"budget__epsilon": -1.0}, "epsilon"),
        ({"budget__epsilon": float("nan")}, "epsilon"),
        ({"budget__epsilon": 1e9}, "epsilon"),
        ({"budget__epsilon": 20.0}, "accept_weak"),
        ({"budget__epsilon": True}, "budget.epsilon = True: expected a number"),
        ({"budget__epsilon": "2"}, "budget.epsilon = '2': expected a number"),
        ({"population__num_users": "1500"}, "num_users = '1500': expected a number"),
        ({"population__num_users": True}, "num_users = True: expected a number"),
        ({"engine": {"min_clients": True}}, "min_clients = True: expected a number"),
        ({"budget__accept_weak": 1}, "budget.accept_weak = 1"),
        ({"budget__delta": 0.0}, "delta"),
        ({"budget__delta": 1e-3}, "too weak for 1,000 users"),
        ({"population__delta": 0.01}, "too weak for 1,000 users"),
        ({"population__num_users": 0}, "num_users"),
        ({"population__name": "../x"}, "population.name"),
        ({"budget__epsilom": 1.0}, "did you mean 'epsilon'"),
        ({"enigne": {}}, "did you mean 'engine'"),
        ({"engine__clients": 0}, "clients"),
        ({"engine": {"clients": 3, "min_clients": 4}}, "never be reached"),
        ({"noise__placement": "nowhere"}, "placement"),
        ({"unit__max_records": 0}, "max_records"),
        ({"unit__relation": "replace-one"}, "relation"),
        ({"release__num_records": 0}, "num_records"),
        ({"base": "/"}, "unknown key 'base'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        parsed(tmp_path, **change)


def test_a_missing_section_is_named(tmp_path):
    data = described()
    del data["budget"]

    with pytest.raises(ConfigError, match="budget is missing"):
        parse_config(data, base=tmp_path)


def test_a_file_that_does_not_parse_is_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[population\n")

    with pytest.raises(ConfigError, match=r"run\.toml does not parse"):
        read_config(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "none.toml")


def test_a_configuration_survives_its_own_json(tmp_path):
    config = parsed(
        tmp_path, unit={"column": "id", "max_records": 3}, strategy={"name": "mst", "max-norm": 2.0}
    )

    again = parse_config(config.model_dump(mode="json", by_alias=True), base=config.base)

    assert again == config

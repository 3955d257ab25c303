# SPDX-License-Identifier: Apache-2.0
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fedsynth.client.policy import Policy
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ClientCode, ConfigError, PolicyRefusal
from fedsynth.core.privacy import Budget, NoisePlacement, PrivacyUnit, Relation
from fedsynth.core.query import Query
from fedsynth.core.wire import Ask, canonical

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "policy.toml"
UNIT = PrivacyUnit(column="patient", max_records=3)
TERMS: dict[str, Any] = {
    "max_epsilon": 4.0,
    "delta": 1e-6,
    "user_column": "patient",
    "relation": "add-or-remove",
    "max_records": 3,
    "max_clients": 1,
    "min_users": 50,
    "allow": {"populations": ["cardio"], "strategies": ["mst"], "placements": ["local"]},
}
ASK = Ask(
    run="run-1",
    population="cardio",
    round=1,
    attempt=1,
    strategy="mst",
    settings="{}",
    schema_digest="ab",
    unit=canonical(asdict(UNIT)),
    placement=NoisePlacement.LOCAL,
    num_shares=1,
    plan="[]",
    delta=1e-6,
    public_seed=0,
    head=(1, "ab"),
    query=Query("q", dim=1, clip=1.0, noise_multiplier=1.0),
)


def written(tmp_path: Path, terms: dict[str, Any]) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(tomli_w.dumps(terms), encoding="utf-8")
    return path


def with_unit(**changes: Any) -> Ask:
    return replace(ASK, unit=canonical({**asdict(UNIT), **changes}))


def test_what_the_owner_allows_is_allowed(tmp_path: Path):
    policy = Policy.read(written(tmp_path, TERMS))

    assert policy.refuses(ASK) is None
    assert policy.refuses(ASK, 50) is None
    assert policy.missing == []
    assert policy.cap == Budget(4.0, 1e-6)


def test_without_a_file_everything_is_refused(tmp_path: Path):
    policy = Policy.read(tmp_path / "policy.toml")

    assert policy.refuses(ASK, 10**9) is ClientCode.POLICY_REFUSED
    with pytest.raises(PolicyRefusal, match="nothing is allowed"):
        _ = policy.cap


@pytest.mark.parametrize("key", [*TERMS, *(f"allow.{key}" for key in TERMS["allow"])])
def test_without_any_one_key_everything_is_refused(tmp_path: Path, key: str):
    outer, _, inner = key.partition(".")
    terms = {k: v for k, v in TERMS.items() if k != outer}
    if inner:
        terms["allow"] = {k: v for k, v in TERMS["allow"].items() if k != inner}

    policy = Policy.read(written(tmp_path, terms))

    assert policy.refuses(ASK, 10**9) is ClientCode.POLICY_REFUSED
    assert any(missing.startswith(key) for missing in policy.missing)


OVER_ASKING = {
    "another population": replace(ASK, population="cardio2"),
    "a population in other letters": replace(ASK, population="Cardio"),
    "another strategy": replace(ASK, strategy="independent"),
    "a strategy of the server's own": replace(ASK, strategy="evil.module:Method"),
    "a strategy with a space": replace(ASK, strategy="mst "),
    "central noise": replace(ASK, placement=NoisePlacement.CENTRAL),
    "distributed noise": replace(ASK, placement=NoisePlacement.DISTRIBUTED),
    "records as users": with_unit(column=None, max_records=1),
    "another column of users": with_unit(column="visit"),
    "no name for the column": with_unit(column=""),
    "more records of a user": with_unit(max_records=4),
    "another relation": with_unit(relation=Relation.ZERO_OUT),
}


@pytest.mark.parametrize("case", OVER_ASKING)
def test_a_request_that_asks_for_more_is_refused(tmp_path: Path, case: str):
    policy = Policy.read(written(tmp_path, TERMS))

    assert policy.refuses(OVER_ASKING[case], 50) is ClientCode.POLICY_REFUSED


MALFORMED = {
    "no JSON": "{",
    "no object": "[]",
    "an unknown key": canonical({**asdict(UNIT), "level": "user"}),
    "no relation": canonical({"column": "patient"}),
    "another relation than there is": canonical({**asdict(UNIT), "relation": "replace-one"}),
    "half a record": canonical({**asdict(UNIT), "max_records": 2.5}),
    "records as text": canonical({**asdict(UNIT), "max_records": "2"}),
    "records as truth": canonical({**asdict(UNIT), "max_records": True}),
    "not a number of records": json.dumps({**asdict(UNIT), "max_records": float("nan")}),
    "a list of columns": canonical({**asdict(UNIT), "column": ["patient"]}),
    "no clients": canonical({**asdict(UNIT), "max_clients": 0}),
    "a well": "[" * 9000,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_unit_that_is_none_is_malformed(tmp_path: Path, case: str):
    policy = Policy.read(written(tmp_path, TERMS))

    assert policy.refuses(replace(ASK, unit=MALFORMED[case])) is ClientCode.MALFORMED


def test_fewer_users_than_the_floor_answer_nothing(tmp_path: Path):
    policy = Policy.read(written(tmp_path, TERMS))

    assert policy.refuses(ASK, 49) is ClientCode.POLICY_REFUSED
    assert policy.min_users == 50


def test_a_request_must_reckon_with_all_clients_that_hold_a_user(tmp_path: Path):
    policy = Policy.read(written(tmp_path, {**TERMS, "max_clients": 2}))

    assert policy.refuses(ASK) is ClientCode.POLICY_REFUSED
    assert policy.refuses(with_unit(max_clients=2)) is None
    assert policy.refuses(with_unit(max_clients=5)) is None


def test_an_owner_whose_records_are_users_says_so(tmp_path: Path):
    policy = Policy.read(written(tmp_path, {**TERMS, "user_column": False}))

    assert policy.refuses(with_unit(column=None, max_records=1)) is None
    assert policy.refuses(ASK) is ClientCode.POLICY_REFUSED


def test_a_strategy_by_module_needs_its_whole_name_and_is_not_imported_to_see(tmp_path: Path):
    allow = {**TERMS["allow"], "strategies": ["wave:Wave_read"]}
    policy = Policy.read(written(tmp_path, {**TERMS, "allow": allow}))
    sys.modules.pop("wave", None)

    assert policy.refuses(replace(ASK, strategy="wave:Wave_read")) is None
    assert policy.refuses(replace(ASK, strategy="wave:Wave_write")) is ClientCode.POLICY_REFUSED
    assert "wave" not in sys.modules


WRONG = {
    "an unknown key": ({**TERMS, "max_epsilom": 1.0}, "did you mean 'max_epsilon'"),
    "an unknown key of allow": (
        {**TERMS, "allow": {**TERMS["allow"], "strategy": ["mst"]}},
        r"unknown key 'allow.strategy'; did you mean 'strategies'",
    ),
    "epsilon as text": ({**TERMS, "max_epsilon": "4"}, "max_epsilon = '4'"),
    "epsilon as truth": ({**TERMS, "max_epsilon": True}, "max_epsilon = True"),
    "epsilon of zero": ({**TERMS, "max_epsilon": 0.0}, "policy.toml: privacy epsilon"),
    "a weak epsilon": ({**TERMS, "max_epsilon": 12.0}, "accept_weak"),
    "a delta of one": ({**TERMS, "delta": 1.0}, "privacy delta"),
    "a placement there is not": (
        {**TERMS, "allow": {**TERMS["allow"], "placements": ["anywhere"]}},
        "allow.placements.0 = 'anywhere'",
    ),
    "one strategy, not a list": (
        {**TERMS, "allow": {**TERMS["allow"], "strategies": "mst"}},
        "allow.strategies",
    ),
    "half a user": ({**TERMS, "min_users": 1.5}, "min_users = 1.5"),
    "no records": ({**TERMS, "max_records": 0}, "max_records = 0"),
    "a true user column": ({**TERMS, "user_column": True}, "user_column"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_policy_that_cannot_be_says_what_is_wrong(tmp_path: Path, case: str):
    terms, reason = WRONG[case]

    with pytest.raises(ConfigError, match=reason):
        Policy.read(written(tmp_path, terms))


@pytest.mark.parametrize("content", [b"max_epsilon =", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "policy.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="does not parse"):
        Policy.read(path)


def test_keys_may_be_written_with_hyphens(tmp_path: Path):
    terms = {key.replace("_", "-"): value for key, value in TERMS.items()}

    assert Policy.read(written(tmp_path, terms)).refuses(ASK) is None


def test_the_example_is_a_whole_policy():
    policy = Policy.read(EXAMPLE)

    assert policy.missing == []
    assert policy.cap == Budget(4.0, 1e-6)


def test_a_simulations_owner_agrees_to_its_run_and_to_nothing_else(tmp_path: Path):
    config = parse_config(
        {
            "population": {"name": "cardio", "num_users": 100, "epsilon": 4.0, "delta": 1e-6},
            "data": {"schema": "schema.toml"},
            "unit": {"column": "patient", "max_records": 3},
            "budget": {"epsilon": 1.0},
            "strategy": {"name": "mst"},
            "noise": {"placement": "local"},
        },
        base=tmp_path,
    )

    policy = Policy.for_simulation(config)

    assert policy.missing == []
    assert policy.refuses(ASK, 0) is None
    assert policy.cap == Budget(4.0, 1e-6)
    for ask in OVER_ASKING.values():
        assert policy.refuses(ask) is ClientCode.POLICY_REFUSED
    assert Policy.read(written(tmp_path, policy.model_dump(mode="json"))) == policy

# SPDX-License-Identifier: Apache-2.0
"""What a schema declares of its columns together holds for every record that is sampled."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from fedsynth.client.shard import encode
from fedsynth.core.decode import decode
from fedsynth.core.enforce import repaired
from fedsynth.core.errors import SchemaError
from fedsynth.core.privacy import PrivacyUnit
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.core.synthesizer import Synthesizer
from hypothesis import given, settings
from hypothesis import strategies as st

COLUMNS = {
    "sex": {"type": "category", "categories": ["F", "M"], "origin": "policy"},
    "pregnant": {"type": "boolean", "missing": True},
    "age": {
        "type": "integer",
        "bounds": [0, 99],
        "num_bins": 20,
        "missing": True,
        "origin": "policy",
    },
    "grade": {"type": "ordinal", "categories": ["low", "mid", "high"], "origin": "policy"},
    "aim": {"type": "ordinal", "categories": ["low", "mid", "high"], "origin": "policy"},
    "city": {
        "type": "category",
        "categories": ["Rome", "Milan", "Paris", "Bonn"],
        "missing": True,
        "origin": "policy",
    },
    "country": {
        "type": "category",
        "categories": ["IT", "FR", "DE"],
        "missing": True,
        "origin": "policy",
    },
    "dose": {"type": "real", "bounds": [0, 1], "num_bins": 5, "missing": True, "origin": "policy"},
    "limit": {"type": "real", "bounds": [0, 2], "num_bins": 3, "origin": "policy"},
    "came": {
        "type": "date",
        "bounds": ["2024-01-01", "2024-03-31"],
        "num_bins": 3,
        "origin": "policy",
    },
    "left": {
        "type": "date",
        "bounds": ["2024-01-01T00:00", "2024-04-30T23:00"],
        "resolution": "hour",
        "num_bins": 4,
        "missing": True,
        "origin": "policy",
    },
}
ALL = [
    {"forbid": {"sex": "M", "pregnant": True}},
    {"if": {"age": {"below": 15}}, "then": {"pregnant": {"not": ["true"], "missing": True}}},
    {"order": ["grade", "<=", "aim"]},
    {
        "from": "city",
        "to": "country",
        "table": {"Rome": "IT", "Milan": "IT", "Paris": "FR"},
        "missing": True,
    },
    {"order": ["dose", "<", "limit"]},
    {"order": ["came", "<", "left"]},
]


def schema_of(*constraints: Mapping[str, Any], **columns: Mapping[str, Any]) -> Schema:
    return Schema.from_json({"columns": {**COLUMNS, **columns}, "constraints": list(constraints)})


def random_codes(schema: Schema, num_records: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    cells = [rng.integers(0, c, num_records) for c in schema.shape]
    return np.stack(cells, axis=1).astype(np.int32)


def all_codes(schema: Schema) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, schema.shape))), dtype=np.int32)


# --- what is declared -------------------------------------------------------------------------


def test_constraints_survive_json_and_stand_in_the_digest():
    schema = schema_of(*ALL)

    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))

    assert again == schema
    assert again.digest == schema.digest != schema_of().digest
    assert "constraints" not in schema_of().to_json()


def test_every_constraint_reads_as_a_sentence():
    assert [str(constraint) for constraint in schema_of(*ALL).constraints] == [
        "never sex is M and pregnant is true",
        "if age is below 15, then pregnant is other than true or missing",
        "grade <= aim",
        "city determines country, by a table of 3 values",
        "dose < limit",
        "came < left",
    ]


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"forbid": {"sax": "M"}}, "'sax' is no column"),
        ({"forbid": {"sex": "X"}}, "no category 'X'"),
        ({"forbid": {}}, "expected a table of columns"),
        ({"forbid": {"sex": ["F", "M"]}}, "no record can keep the constraint 'never sex is F, M'"),
        ({"forbid": {"sex": {"missing": True}}}, "column 'sex' has no missing = true; take miss"),
        ({"forbid": {"age": {"from": 200}}}, "no value of 'age' lies there.* are 0 to 99$"),
        ({"forbid": {"age": {"below": 0, "missing": True}}}, "no value of 'age' lies there"),
        ({"forbid": {"dose": {"from": 5, "to": 6}}}, "bounds are 0 to 1$"),
        ({"forbid": {"came": {"below": "2024-01-01"}}}, "are 2024-01-01 to 2024-03-31$"),
        ({"forbid": {"grade": {"from": "high", "to": "low"}}}, "categories are low to high$"),
        ({"forbid": {"sex": {"from": "F"}}}, "has no order"),
        ({"forbid": {"age": {"below": 17}}}, r"divides the bin from \d+(\.\d+)? to"),
        ({"forbid": {"age": {"to": 9, "below": 10}}}, "not both"),
        ({"forbid": {"age": {"upto": 9}}}, "unknown key 'upto'"),
        ({"forbid": {"age": {"in": [3]}}}, "no bin for 3 alone"),
        ({"forbid": {"age": {"from": "young"}}}, "has no 'young'"),
        ({"forbid": {"came": {"from": "yesterday"}}}, "has no 'yesterday'"),
        ({"forbid": {"sex": [["M"]]}}, "expected values"),
        ({"if": {"sex": "M"}}, "expected the keys"),
        ({"order": ["age", ">", "dose"]}, "order must be"),
        ({"order": ["age", "<", "sex"]}, "only two numbers, two dates or two ordinals"),
        ({"order": ["age", "<", "came"]}, "only two numbers"),
        ({"order": ["age", "<", "age"]}, "only two numbers"),
        ({"from": "sex", "to": "sex", "table": {"F": "F"}}, "cannot determine itself"),
        ({"from": "city", "to": "country", "table": {"Rome": ["IT", "FR"]}}, "one value"),
        ({"from": "city", "to": "country", "table": {"Oslo": "IT"}}, "no category 'Oslo'"),
        (
            {"from": "city", "to": "sex", "table": {"Rome": "F"}, "missing": True},
            "'sex' has no missing",
        ),
        ("never", "expected a table"),
    ],
)
def test_a_constraint_that_does_not_fit_is_refused(constraint: Any, says: str):
    with pytest.raises(SchemaError, match=says):
        schema_of(constraint)


def test_orderings_in_a_circle_are_refused():
    with pytest.raises(SchemaError, match="grade, aim go in a circle"):
        schema_of({"order": ["grade", "<=", "aim"]}, {"order": ["aim", "<=", "grade"]})


def test_constraints_that_contradict_each_other_are_refused():
    with pytest.raises(SchemaError, match="no record can keep all constraints on sex, pregnant"):
        schema_of(
            {"if": {"sex": "F"}, "then": {"pregnant": True}},
            {"forbid": {"pregnant": [True]}},
            {"forbid": {"sex": "M"}},
        )


def test_a_contradiction_names_the_constraints_that_take_part_and_no_others():
    with pytest.raises(SchemaError) as caught:
        schema_of(
            {"forbid": {"sex": "M"}},
            {"order": ["grade", "<=", "aim"]},
            {"if": {"sex": "F"}, "then": {"pregnant": True}},
            {"forbid": {"pregnant": True}},
        )

    assert str(caught.value).endswith(
        "they contradict each other: 'never sex is M'; 'if sex is F, then pregnant is true';"
        " 'never pregnant is true'"
    )


def test_two_tables_that_disagree_on_a_value_are_refused():
    tables = [
        {"from": "city", "to": "country", "table": {"Rome": "IT", "Paris": paris}, "missing": True}
        for paris in ("FR", "DE")
    ]

    with pytest.raises(SchemaError, match="gives 'city' = 'Paris' the 'country' 'FR', this one"):
        schema_of(*tables)

    assert schema_of(tables[0], {"from": "city", "to": "country", "table": {"Rome": "IT"}})


def test_an_id_and_an_open_column_have_no_constraints():
    with pytest.raises(SchemaError, match="never synthesized"):
        schema_of({"forbid": {"patient": "1"}}, patient={"type": "id"})
    with pytest.raises(SchemaError, match="are private"):
        schema_of(
            {"forbid": {"drug": "aspirin"}},
            drug={"type": "category", "categories": "private", "origin": "measured"},
        )


# --- what is possible -------------------------------------------------------------------------


def valid_cells(constraint: Mapping[str, Any], **columns: Mapping[str, Any]) -> np.ndarray:
    """Whether each combination of cells of some columns is valid."""
    schema = Schema.from_json({"columns": columns, "constraints": [constraint]})
    return schema.rules.valid(all_codes(schema)).reshape(schema.shape)


def only(*names: str) -> dict[str, Any]:
    return {name: COLUMNS[name] for name in names}


def test_a_forbidden_combination_is_the_only_impossible_one():
    valid = valid_cells(ALL[0], **only("sex", "pregnant"))

    assert valid.tolist() == [[True, True, True], [True, False, True]]


def test_an_implication_speaks_only_where_its_condition_holds():
    valid = valid_cells(ALL[1], **only("age", "pregnant"))

    assert (~valid).nonzero()[0].tolist() == [0, 1, 2]  # bins of the ages 0 to 14
    assert (~valid).nonzero()[1].tolist() == [1, 1, 1]  # pregnant


def test_a_missing_value_is_in_no_set_that_does_not_say_so():
    then = {"if": {"sex": "M"}, "then": {"pregnant": False}}

    assert valid_cells(then, **only("sex", "pregnant")).tolist()[1] == [True, False, False]
    assert (
        valid_cells(
            {"forbid": {"pregnant": {"missing": True}, "sex": "*"}}, **only("sex", "pregnant")
        ).tolist()
        == [[True, True, False]] * 2
    )


def test_a_dependency_leaves_what_it_does_not_list():
    valid = valid_cells(ALL[3], **only("city", "country"))

    it, fr = [True, False, False, True], [False, True, False, True]
    assert valid.tolist() == [it, it, fr, [True] * 4, [True] * 4]


def test_a_range_of_dates_is_a_range_of_bins():
    days = {"type": "date", "bounds": ["2024-01-01", "2024-01-31"], "num_bins": 31}
    valid = valid_cells(
        {"forbid": {"day": {"from": "2024-01-03", "below": "2024-01-06"}}},
        day=days | {"origin": "policy"},
    )

    assert np.flatnonzero(~valid).tolist() == [2, 3, 4]


KINDS_OF_RANGES = {
    "integers": {"type": "integer", "bounds": [0, 7], "num_bins": 3},
    "single integers": {"type": "integer", "bounds": [0, 5], "num_bins": 6},
    "reals": {"type": "real", "bounds": [0, 6], "num_bins": 4},
    "coarse reals": {"type": "real", "bounds": [1, 7], "num_bins": 2, "missing": True},
    "days": {"type": "date", "bounds": ["1970-01-01", "1970-01-07"], "num_bins": 3},
    "hours": {
        "type": "date",
        "bounds": ["1970-01-01T12:00", "1970-01-06T12:00"],
        "resolution": "hour",
        "num_bins": 4,
        "missing": True,
    },
    "grades": {"type": "ordinal", "categories": list("abcd"), "missing": True},
}


@pytest.mark.parametrize("sign", ["<", "<="])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("integers", "single integers"),
        ("integers", "reals"),
        ("coarse reals", "reals"),
        ("reals", "integers"),
        ("days", "hours"),
        ("hours", "days"),
        ("grades", "grades"),
    ],
)
def test_cells_can_be_in_order_exactly_if_values_of_theirs_are(low: str, high: str, sign: str):
    entries = {"a": KINDS_OF_RANGES[low], "b": KINDS_OF_RANGES[high]}
    entries = {name: entry | {"origin": "policy"} for name, entry in entries.items()}

    valid = valid_cells({"order": ["a", sign, "b"]}, **entries)

    schema = Schema.from_json({"columns": entries})
    units = [1.0 if c.kind != "date" else {"day": 24.0, "hour": 1.0}[c.resolution]
             for c in schema.columns]  # fmt: skip
    for i, j in itertools.product(*map(range, valid.shape)):
        values = []
        for column, cell, unit in zip(schema.columns, (i, j), units, strict=True):
            if column.missing and cell == column.num_cells - 1:
                break
            first, last = (end[cell] for end in column.ends)
            if column.kind == "real":
                values.append(np.linspace(first, last, 400) * unit)
            else:
                values.append(np.arange(first, last + 1) * unit)
        else:
            left, right = values[0][:, None], values[1][None, :]
            expected = bool((left < right).any() if sign == "<" else (left <= right).any())
            assert valid[i, j] == expected, (i, j)
            continue
        assert valid[i, j]  # where either is missing, nothing is said


def test_orderings_that_meet_are_judged_together():
    bins = {"type": "integer", "bounds": [0, 3], "num_bins": 2, "origin": "policy"}
    chain = [{"order": ["a", "<", "b"]}, {"order": ["b", "<", "c"]}]
    schema = Schema.from_json({"columns": dict.fromkeys("abc", bins), "constraints": chain})

    valid = schema.rules.valid(all_codes(schema)).reshape(2, 2, 2)

    expected = np.zeros((2, 2, 2), dtype=np.bool_)
    for a, b, c in itertools.product(range(4), repeat=3):
        expected[a // 2, b // 2, c // 2] |= a < b < c
    assert (valid == expected).all()
    assert not valid[0, 0, 0]  # any two of them could be in order, all three cannot


def test_a_whole_number_between_two_reals_must_fit_between_them():
    reals = {"type": "real", "bounds": [0, 3], "num_bins": 12, "origin": "policy"}
    whole = {"type": "integer", "bounds": [0, 3], "num_bins": 2, "origin": "policy"}
    chain = [{"order": ["a", "<=", "b"]}, {"order": ["b", "<", "c"]}]
    schema = Schema.from_json(
        {"columns": {"a": reals, "b": whole, "c": reals}, "constraints": chain}
    )

    valid = schema.rules.valid(all_codes(schema)).reshape(schema.shape)

    for a, b, c in np.ndindex(valid.shape):
        between = any(a / 4 <= n < (c + 1) / 4 for n in ([0, 1] if b == 0 else [2, 3]))
        assert valid[a, b, c] == between
    assert not valid[1, 0, 2]  # 0.25 to 0.5 and 0.5 to 0.75: in order, but nothing whole between


def test_a_missing_link_says_nothing_of_what_it_would_link():
    bins = {"type": "integer", "bounds": [0, 3], "num_bins": 4, "origin": "policy"}
    columns = {"a": bins, "b": bins | {"missing": True}, "c": bins}
    chain = [{"order": ["a", "<=", "b"]}, {"order": ["b", "<=", "c"]}]
    schema = Schema.from_json({"columns": columns, "constraints": chain})

    codes = np.array([[3, 4, 0], [3, 3, 0], [0, 3, 3]], dtype=np.int32)

    assert schema.rules.valid(codes).tolist() == [True, False, True]


# --- masks for an estimator -------------------------------------------------------------------


def test_masks_are_what_valid_says_clique_by_clique():
    schema = schema_of(*ALL)

    zeros = dict(schema.rules.zeros())

    names = [tuple(schema.names[c] for c in clique) for clique in zeros]
    assert names == [
        ("sex", "pregnant"),
        ("pregnant", "age"),
        ("grade", "aim"),
        ("city", "country"),
        ("dose", "limit"),
        ("came", "left"),
    ]
    codes = random_codes(schema, 20_000)
    allowed = np.all([mask[tuple(codes[:, clique].T)] for clique, mask in zeros.items()], axis=0)
    assert (allowed == schema.rules.valid(codes)).all()
    assert 0 < allowed.mean() < 1


def test_what_follows_is_split_so_that_cliques_stay_small():
    both = {"if": {"sex": "M"}, "then": {"pregnant": False, "grade": ["low", "mid"]}}
    schema = schema_of(both, {"forbid": {"sex": "M", "grade": "mid"}})

    zeros = dict(schema.rules.zeros())

    assert set(zeros) == {(0, 1), (0, 3)}
    assert zeros[0, 3].tolist() == [[True, True, True], [True, False, False]]


def test_a_clique_too_large_has_no_mask_but_still_holds():
    many = {"type": "category", "categories": [f"c{i}" for i in range(2000)], "origin": "policy"}
    table = {f"c{i}": f"c{i // 2}" for i in range(2000)}
    schema = Schema.from_json(
        {
            "columns": {"a": many, "b": many},
            "constraints": [{"from": "a", "to": "b", "table": table}],
        }
    )

    assert schema.rules.zeros() == []
    assert schema.rules.valid(np.array([[10, 5], [10, 6]], dtype=np.int32)).tolist() == [
        True,
        False,
    ]


# --- every sample -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Careless(Synthesizer):
    """Draws every cell at random, or ever the same record; knows nothing of constraints."""

    schema: Schema
    always: tuple[int, ...] = ()
    kind = "careless"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        cells = [rng.integers(0, c, num_records) for c in self.schema.shape]
        codes = np.stack(cells, axis=1).astype(np.int32)
        if self.always:
            codes[:] = self.always
        images = None
        if self.schema.image:
            images = codes[:, 0].astype(np.uint8)[:, None, None, None]
        return Records(codes, images)

    def settings(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, np.ndarray]:
        return {}

    @classmethod
    def restore(cls, schema: Schema, settings: Any, tensors: Any) -> "Careless":
        return cls(schema)


def test_every_record_of_every_synthesizer_keeps_every_constraint():
    schema = schema_of(*ALL)

    for num_records in (0, 1, 7, 3000):
        records = Careless(schema).sample(num_records, np.random.default_rng(0))

        assert len(records) == num_records
        assert schema.rules.valid(records.codes).all()


def test_a_synthesizer_that_never_keeps_them_is_mended():
    schema = schema_of(*ALL)
    broken = (1, 1, 1, 2, 0, 0, 1, 4, 0, 2, 0)
    assert not schema.rules.valid(np.array([broken], dtype=np.int32))[0]

    records = Careless(schema, broken).sample(500, np.random.default_rng(0))

    assert schema.rules.valid(records.codes).all()


def test_without_constraints_a_sample_is_what_it_was():
    schema = schema_of()
    plain = Careless.__dict__["sample"].__wrapped__(Careless(schema), 50, np.random.default_rng(3))

    records = Careless(schema).sample(50, np.random.default_rng(3))

    assert (records.codes == plain.codes).all()


def test_the_same_rng_gives_the_same_sample():
    schema = schema_of(*ALL)

    one, two = (Careless(schema).sample(200, np.random.default_rng(5)).codes for _ in range(2))

    assert (one == two).all()


def test_records_drawn_again_have_the_distribution_under_the_constraints():
    schema = Schema.from_json({"columns": only("sex", "pregnant"), "constraints": [ALL[0]]})

    codes = Careless(schema).sample(60_000, np.random.default_rng(1)).codes

    counts = np.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=6)[[0, 1, 2, 3, 5]]

    def chi_squared(expected: np.ndarray) -> float:
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_squared(np.full(5, 12_000.0)) < 18.5  # 4 degrees of freedom, p = 0.001
    moved = np.array([3, 3, 3, 4.5, 4.5]) / 18 * 60_000  # as if what is forbidden changed its half
    assert chi_squared(moved) > 1000


def test_an_image_stays_with_its_record():
    image = ImageColumn("picture", (1, 1, 1), "policy")
    plain = Schema.from_json({"columns": only("age", "pregnant"), "constraints": [ALL[1]]})

    records = Careless(replace(plain, image=image)).sample(400, np.random.default_rng(0))

    assert plain.rules.valid(records.codes).all()
    assert (records.images[:, 0, 0, 0] == records.codes[:, 0]).all()


@dataclass(frozen=True)
class Families(Careless):
    """Users of one to four records, who agree on the first column."""

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        alone = Careless(replace(self.schema, constraints=()), self.always).sample(num_records, rng)
        owners = np.repeat(np.arange(num_records), 1 + rng.integers(0, 4, num_records))
        owners = owners[:num_records]
        codes = alone.codes.copy()
        codes[:, 0] = codes[np.searchsorted(owners, owners), 0]
        return Records(codes, owners=owners)


@pytest.mark.parametrize("num_records", [0, 1, 30, 2000])
def test_users_are_kept_or_drawn_again_with_all_their_records(num_records: int):
    schema = Schema.from_json({"columns": only("sex", "pregnant", "grade"), "constraints": ALL[:1]})

    records = Families(schema).sample(num_records, np.random.default_rng(0))

    assert len(records) == num_records
    assert schema.rules.valid(records.codes).all()
    if num_records:
        assert set(np.diff(records.owners, prepend=-1)) <= {0, 1}
        assert records.owners[0] == 0
        first = np.searchsorted(records.owners, records.owners)
        assert (records.codes[:, 0] == records.codes[first, 0]).all()
    if num_records == 2000:
        assert np.bincount(np.bincount(records.owners))[2:].min() > 50  # of every size


def test_users_none_of_whom_keeps_them_end_as_users_of_one_record():
    schema = Schema.from_json({"columns": only("sex", "pregnant", "grade"), "constraints": ALL[:1]})

    records = Families(schema, (1, 1, 0)).sample(40, np.random.default_rng(0))

    assert schema.rules.valid(records.codes).all()
    assert records.owners.tolist() == list(range(40))


def test_too_few_users_come_again():
    """With eight columns at odds, hardly any user keeps all; those who do are repeated."""
    columns = {name: {"type": "boolean"} for name in "abcdefghij"}
    schema = Schema.from_json(
        {
            "columns": columns,
            "constraints": [{"forbid": {a: True, b: True}} for a, b in itertools.pairwise(columns)],
        }
    )

    records = Families(schema).sample(500, np.random.default_rng(0))

    assert len(records) == 500
    assert schema.rules.valid(records.codes).all()
    assert set(np.diff(records.owners, prepend=-1)) <= {0, 1}


# --- repair -----------------------------------------------------------------------------------


def mended(schema: Schema, codes: np.ndarray, good: np.ndarray) -> np.ndarray:
    return repaired(schema.rules.parts, schema.shape, codes, good, np.random.default_rng(0))


def test_a_repair_changes_as_few_columns_as_can_be():
    schema = schema_of(
        *ALL,
        {"if": {"sex": "F", "grade": "high"}, "then": {"age": {"from": 50}}},
        {"if": {"grade": "high"}, "then": {"sex": "M"}},
    )
    group = [schema.index(n) for n in ("sex", "pregnant", "age", "grade", "aim")]
    part = next(p for p in schema.rules.parts if set(p.columns) == set(group))
    possible = np.array(list(itertools.product(*(range(schema.shape[c]) for c in group))))
    possible = possible[part.holds(dict(zip(group, possible.T, strict=True)))]
    codes = random_codes(schema, 400)
    codes = codes[~part.holds(dict(enumerate(codes.T)))]

    changed = mended(schema, codes, codes[:0]) != codes

    fewest = (codes[:, None, group] != possible[None]).sum(axis=2).min(axis=1)
    assert len(codes) > 100
    assert fewest.max() > 1
    assert (changed[:, group].sum(axis=1) == fewest).all()


def test_a_repair_prefers_what_is_common():
    schema = Schema.from_json({"columns": only("sex", "pregnant"), "constraints": [ALL[0]]})
    good = np.repeat([[0, 1], [0, 0], [1, 0]], [900, 50, 50], axis=0).astype(np.int32)
    codes = np.repeat([[1, 1]], 2000, axis=0).astype(np.int32)

    result = mended(schema, codes, good)

    assert schema.rules.valid(result).all()
    # a woman is 19 times as common as a man, a man not pregnant a ninth as common as pregnant
    assert (result[:, 0] == 0).mean() > 0.6
    assert 0 < (result[:, 1] == 0).mean() < 0.4


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_constraints_that_can_be_kept_are(data: st.DataObject):
    sides = data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=4))
    columns = {
        f"c{i}": {
            "type": "ordinal",
            "categories": [str(v) for v in range(side)],
            "origin": "policy",
            "missing": data.draw(st.booleans()),
        }
        for i, side in enumerate(sides)
    }

    def some_values(name: str) -> list[str]:
        return data.draw(st.lists(st.sampled_from(columns[name]["categories"]), min_size=1))

    constraints = []
    for _ in range(data.draw(st.integers(1, 4))):
        a, b = data.draw(st.permutations(sorted(columns)))[:2]
        form = data.draw(st.sampled_from(["forbid", "if", "order", "from"]))
        if form == "forbid":
            constraints.append({"forbid": {a: some_values(a), b: some_values(b)}})
        elif form == "if":
            constraints.append({"if": {a: some_values(a)}, "then": {b: some_values(b)}})
        elif form == "order" and columns[a]["categories"] == columns[b]["categories"]:
            constraints.append(
                {"order": [min(a, b), data.draw(st.sampled_from(["<", "<="])), max(a, b)]}
            )
        else:
            table = {
                v: data.draw(st.sampled_from(columns[b]["categories"])) for v in some_values(a)
            }
            constraints.append({"from": a, "to": b, "table": table})
    free = Schema.from_json({"columns": columns})
    everything = all_codes(free)
    try:
        schema = Schema.from_json({"columns": columns, "constraints": constraints})
    except SchemaError as error:
        if "no record can keep" in str(error) or "another table" in str(error):
            return
        raise

    result = mended(schema, everything, everything[:0])

    valid = schema.rules.valid(everything)
    assert valid.any()
    assert schema.rules.valid(result).all()
    assert (result[valid] == everything[valid]).all()


def test_a_contradiction_is_found_exactly():
    """Whenever the search says that no record can keep all, trying every record agrees."""
    columns = {name: {"type": "boolean"} for name in "abc"}
    found = {True: 0, False: 0}
    for pairs in itertools.combinations(itertools.product("ab", "bc", [True, False]), 4):
        rules = [{"if": {a: value}, "then": {b: not value}} for a, b, value in pairs if a != b] + [
            {"if": {"b": True}, "then": {"a": True}},
            {"if": {"a": False}, "then": {"b": True}},
        ]
        singles = [Schema.from_json({"columns": columns, "constraints": [r]}) for r in rules]
        codes = all_codes(singles[0])
        possible = bool(np.all([s.rules.valid(codes) for s in singles], axis=0).any())
        try:
            Schema.from_json({"columns": columns, "constraints": rules})
            said = True
        except SchemaError:
            said = False
        assert said == possible
        found[possible] += 1
    assert min(found.values()) > 0


def test_wide_groups_copy_from_a_record_that_keeps_them():
    cells = {"type": "category", "categories": [str(i) for i in range(20_000)], "origin": "policy"}
    table = {str(i): str(i) for i in range(20_000)}
    schema = Schema.from_json(
        {
            "columns": {"a": cells, "b": cells},
            "constraints": [{"from": "a", "to": "b", "table": table}],
        }
    )
    good = np.array([[7, 7], [9, 9]], dtype=np.int32)

    result = mended(schema, np.array([[7, 8], [1, 9]], dtype=np.int32), good)

    assert result.tolist() == [[7, 7], [9, 9]]
    assert schema.rules.valid(mended(schema, np.array([[7, 8]], dtype=np.int32), good[:0])).all()


# --- values inside a cell ---------------------------------------------------------------------


def test_values_of_one_bin_are_in_order_too():
    schema = schema_of(*ALL)
    codes = random_codes(schema, 40_000)
    codes = codes[schema.rules.valid(codes)]

    table = decode(schema, Records(codes), np.random.default_rng(0)).to_pandas()

    same_month = (codes[:, 9] == codes[:, 10]).sum()
    assert same_month > 100
    assert ((table["came"].astype("datetime64[s]") < table["left"]) | table["left"].isna()).all()
    assert ((table["dose"] < table["limit"]) | table["dose"].isna()).all()
    again = encode(decode(schema, Records(codes), np.random.default_rng(0)), schema, PrivacyUnit())
    assert (again.records.codes == codes).all()


def test_values_in_order_are_uniform_under_it():
    bins = {"type": "integer", "bounds": [0, 3], "num_bins": 1, "origin": "policy"}
    schema = Schema.from_json(
        {"columns": {"a": bins, "b": bins}, "constraints": [{"order": ["a", "<", "b"]}]}
    )

    table = decode(schema, Records(np.zeros((60_000, 2), np.int32)), np.random.default_rng(0))

    a, b = (table[name].to_numpy() for name in "ab")
    counts = np.bincount(a * 4 + b, minlength=16).reshape(4, 4)
    pairs = counts[np.triu_indices(4, 1)]
    assert pairs.sum() == 60_000

    def chi_squared(expected: np.ndarray) -> float:
        return float(((pairs - expected) ** 2 / expected).sum())

    assert chi_squared(np.full(6, 10_000.0)) < 20.5  # 5 degrees of freedom, p = 0.001
    in_turn = np.array([1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6, 1 / 3]) * 60_000  # a first, then b
    assert chi_squared(in_turn) > 1000


def test_a_long_chain_in_one_bin_is_in_order():
    bins = {"type": "integer", "bounds": [0, 9], "num_bins": 1, "origin": "policy"}
    names = "abcdefghij"
    chain = [{"order": [x, "<", y]} for x, y in itertools.pairwise(names)]
    schema = Schema.from_json({"columns": dict.fromkeys(names, bins), "constraints": chain})

    table = decode(schema, Records(np.zeros((50, 10), np.int32)), np.random.default_rng(0))

    assert table.to_pydict() == {name: [i] * 50 for i, name in enumerate(names)}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_orderings_hold_for_the_values(data: st.DataObject):
    names = "abcde"
    columns = {
        name: {
            "type": data.draw(st.sampled_from(["integer", "real"])),
            "bounds": [0, data.draw(st.integers(3, 9))],
            "num_bins": data.draw(st.integers(1, 3)),
            "missing": data.draw(st.booleans()),
            "origin": "policy",
        }
        for name in names
    }
    pairs = data.draw(
        st.lists(st.sampled_from(list(itertools.combinations(names, 2))), min_size=1, unique=True)
    )
    orders = [{"order": [a, data.draw(st.sampled_from(["<", "<="])), b]} for a, b in pairs]
    try:
        schema = Schema.from_json({"columns": columns, "constraints": orders})
    except SchemaError as error:
        if "no record can keep" in str(error):
            return
        raise
    codes = random_codes(schema, 3_000)
    codes = codes[schema.rules.valid(codes)]

    table = decode(schema, Records(codes), np.random.default_rng(0))

    assert (encode(table, schema, PrivacyUnit()).records.codes == codes).all()
    for order in orders:
        low, sign, high = order["order"]
        left, right = (table[n].to_numpy().astype(float) for n in (low, high))
        kept = left < right if sign == "<" else left <= right
        assert (kept | np.isnan(left) | np.isnan(right)).all()


def test_real_records_that_break_a_constraint_still_decode():
    schema = schema_of({"order": ["grade", "<=", "aim"]}, {"order": ["dose", "<", "limit"]})
    codes = np.zeros((3, len(schema.shape)), dtype=np.int32)
    codes[:, schema.index("dose")] = 4

    table = decode(schema, Records(codes), np.random.default_rng(0))

    assert (encode(table, schema, PrivacyUnit()).records.codes == codes).all()


def test_decoding_without_orderings_draws_what_it_drew():
    columns = only("age", "dose", "limit", "came")
    plain = Schema.from_json({"columns": columns})
    other = Schema.from_json(
        {"columns": columns, "constraints": [{"forbid": {"age": {"below": 5}}}]}
    )
    codes = random_codes(plain, 100)

    one, two = (decode(s, Records(codes), np.random.default_rng(0)) for s in (plain, other))

    assert one.equals(two)


def test_a_bin_without_an_integer_stands_for_the_nearest_one():
    column = Column("n", "integer", "policy", bounds=(0, 3), num_bins=8)

    least, greatest = column.ends

    assert (least == greatest).all()
    assert set(least) == {0.0, 1.0, 2.0, 3.0}
    assert math.isfinite(least.sum())

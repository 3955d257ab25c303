# SPDX-License-Identifier: Apache-2.0
"""Users with their records: what a user adds, what two models learn, and two tables that join."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from fedsynth.core.config import parse_config
from fedsynth.core.decode import decode, joined_table, split_tables
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.query import caution_of
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema
from fedsynth.simulation.check import check_strategy, small_images, small_table
from fedsynth.simulation.cli import app
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.simulation.run import run
from fedsynth.strategies.parts.histograms import Grid, Histograms
from fedsynth.strategies.parts.relation import Layout, paired, relation_query
from fedsynth.strategies.registry import build_strategy
from fedsynth.strategies.relational import Household
from typer.testing import CliRunner

import fedsynth as fs


def column(cells):
    return {
        "type": "category",
        "categories": [f"v{cell}" for cell in range(cells)],
        "origin": "public: made up",
    }


SCHEMA = Schema.from_json(
    {"columns": {"town": column(3), "shop": column(4), "day": column(3), "mood": column(2)}}
)
PARENT, MOST = ["town"], 4


def shard_of(users):
    """A shard of users, each a list of records."""
    counts = [len(records) for records in users]
    codes = np.array([record for records in users for record in records], dtype=np.int32)
    index = np.repeat(np.arange(len(users)), counts).astype(np.int64)
    codes = codes.reshape(-1, len(users[0][0]) if users else 1)
    return BoundedShard(Records(codes), index, len(users), max([1, *counts]))


def population(num_users=6000, seed=0):
    """Users of towns with favorite shops, who mostly keep to their shop; days alone are free."""
    rng = np.random.default_rng(seed)
    town = rng.choice(3, num_users, p=[0.6, 0.3, 0.1])
    counts = 1 + np.minimum(rng.poisson(0.4 + 0.8 * town), MOST - 1)
    favorite = np.where(rng.random(num_users) < 0.7, town, rng.integers(0, 4, num_users))
    owner = np.repeat(np.arange(num_users), counts)
    stays = rng.random(len(owner)) < 0.9
    shop = np.where(stays, favorite[owner], rng.integers(0, 4, len(owner)))
    day = rng.integers(0, 3, len(owner))
    mood = (day == 0) ^ (rng.random(len(owner)) < 0.1)
    codes = np.column_stack([town[owner], shop, day, mood]).astype(np.int32)
    return BoundedShard(Records(codes), owner.astype(np.int64), num_users, MOST)


def sizes_of(owners):
    sizes = np.bincount(np.bincount(owners), minlength=MOST + 1)[1:]
    return sizes / sizes.sum()


def same_shop(codes, owners):
    """Joint distribution of two different records' shops, each user weighing one."""
    shard = BoundedShard(Records(codes), owners, int(owners.max()) + 1, MOST)
    first, second, user = paired(shard)
    several = first != second
    first, second, user = first[several], second[several], user[several]
    weights = 1.0 / np.bincount(user)[user]
    table = np.bincount(codes[first, 1] * 4 + codes[second, 1], weights=weights, minlength=16)
    return table / table.sum()


def tvd(one, two):
    return 0.5 * np.abs(one - two).sum()


@pytest.fixture(scope="module")
def exact():
    """What is learnt without noise, and many records of it."""
    strategy = build_strategy("relational", {"parent": PARENT, "most_records": MOST})
    learned = non_private(strategy, SCHEMA, population(), np.random.default_rng(0))
    return learned, learned.sample(20_000, np.random.default_rng(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"parent": ["color", "ill"]},
        {"parent": ["color"], "most_records": 2, "max_model_mb": 0.001},
        {"parent": ["age", "weight", "size", "ill"], "most_records": 5},
    ],
)
def test_every_choice_of_the_users_columns_keeps_all_a_strategy_owes(settings):
    findings = check_strategy(build_strategy("relational", settings), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parent": ["nobody"]}, "names 'nobody'"),
        ({"parent": ["town", "town"]}, "twice"),
        ({"parent": ["town", "shop", "day", "mood"]}, "at least one must belong to a record"),
        ({"most_records": 1}, "most_records"),
        ({"key": "town"}, "column of the schema"),
        ({"parent_table": "../etc"}, "digits"),
        ({"parent_table": "same", "child_table": "same"}, "different names"),
        ({"weight": "record"}, "weight"),
        ({"column_share": 0.7, "select_share": 0.3}, "leave something"),
        ({"max_model_mb": 0.0}, "max_model_mb"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        build_strategy("relational", settings).event(SCHEMA, 1.0)


def test_images_are_refused():
    with pytest.raises(ConfigError, match="image"):
        build_strategy("relational", {}).event(small_images(), 1.0)


def test_constraints_are_kept_by_whole_users():
    implied = {"if": {"day": "v0"}, "then": {"mood": "v1"}}
    schema = Schema.from_json(SCHEMA.to_json() | {"constraints": [implied]})
    strategy = build_strategy("relational", {"parent": PARENT, "most_records": MOST})
    learned = direct_run(strategy, schema, population(), 3.0, rng=np.random.default_rng(0))

    made = learned.sample(2000, np.random.default_rng(1))

    assert (made.codes[made.codes[:, 2] == 0, 3] == 1).all()
    first = np.flatnonzero(np.diff(made.owners, prepend=-1))
    assert np.array_equal(made.codes[:, 0], made.codes[first[made.owners], 0])


def test_records_are_paired_around_the_circle_of_their_user():
    shard = shard_of([[(0,)], [(0,)] * 3, [(0,)] * 7])

    first, second, user = paired(shard)

    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    assert {(0, 0)} | {(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b} <= pairs
    assert len(pairs) == len(first) == 1 + 6 + 7 * 4
    assert np.bincount(user).tolist() == [1, 6, 28]
    assert np.bincount(first[user == 2]).tolist() == np.bincount(second[user == 2]).tolist()


def answered(users, members):
    """Cells of a query over the wide relation, and its counts."""
    layout = Layout((0,), (1, 2, 3), MOST)
    query = relation_query(Histograms.balanced(members), layout, "q", noise_multiplier=1.0)
    strategy = build_strategy("relational", {})
    answer = strategy.answer(query, shard_of(users), np.random.default_rng(0))
    return query, clipped_sum(answer, query)


def test_a_user_adds_what_is_worked_out_by_hand():
    town, size = Grid.whole(0, 3), Grid.whole(1, MOST)
    shop, other_shop = Grid.whole(2, 4), Grid.whole(5, 4)
    loner = [(1, 3, 0, 0)]
    friend = [(2, 0, 0, 0), (2, 1, 0, 0)]

    for users, expected_pair, expected_size in (
        ([loner], {}, {0: 1.0}),
        ([friend], {1: 0.5, 4: 0.5}, {1: 1.0}),
        ([loner, friend], {1: 0.5, 4: 0.5}, {0: 1.0, 1: 1.0}),
        ([[(0, 0, 0, 0)] * 9], {0: 1.0}, {MOST - 1: 1.0}),
    ):
        query, total = answered(users, [(shop, other_shop), (size,), (town,)])
        heights = query.inputs["heights"]
        counts = total * Lattice.of(query).unit
        pair, sizes, towns = counts[:16], counts[16:20], counts[20:]
        assert dict(enumerate((pair / heights[0]).tolist())) == pytest.approx(
            {c: expected_pair.get(c, 0.0) for c in range(16)}, abs=1e-5
        )
        assert (sizes / heights[1]).tolist() == pytest.approx(
            [expected_size.get(c, 0.0) for c in range(MOST)], abs=1e-5
        )
        assert towns.sum() / heights[2] == pytest.approx(len(users), abs=1e-5)


def test_a_user_of_any_number_of_records_is_no_longer_than_a_row():
    grids = [Grid.whole(c, n) for c, n in enumerate((3, MOST, 4, 3, 2, 4, 3, 2))]
    members = [(grids[0],), (grids[1], grids[2]), (grids[2], grids[5]), (grids[3], grids[7])]
    rng = np.random.default_rng(0)

    for count in (1, 2, 3, 6, 300):
        user = [tuple(rng.integers(0, (3, 4, 3, 2))) for _ in range(count)]
        query, total = answered([user], members)
        query_of_one, one = answered([user[:1] * count], members)
        assert float(np.sqrt((total.astype(float) ** 2).sum())) <= Lattice.of(query).bound
        longest = 1 if count > 1 else np.sqrt(sum(query_of_one.inputs["heights"][:2] ** 2))
        length = np.sqrt((one.astype(float) ** 2).sum()) / Lattice.of(query_of_one).bound
        whole = np.sqrt((query_of_one.inputs["heights"] ** 2).sum())
        assert length == pytest.approx(longest if count > 1 else longest / whole, abs=1e-5)


def test_numbers_of_records_towns_and_shops_come_back(exact):
    truth, (_, made) = population(), exact

    assert tvd(sizes_of(made.owners), sizes_of(truth.user_index)) < 0.01
    first = np.flatnonzero(np.diff(made.owners, prepend=-1))
    towns = np.bincount(made.codes[first, 0], minlength=3) / len(first)
    first = truth.starts[:-1]
    assert tvd(towns, np.bincount(truth.records.codes[first, 0]) / len(first)) < 0.02


def test_two_records_of_a_user_are_alike_as_they_were(exact):
    truth, (_, made) = population(), exact
    shuffled = made.codes[np.random.default_rng(0).permutation(len(made))]

    real = same_shop(truth.records.codes, truth.user_index)
    apart = tvd(same_shop(shuffled, made.owners), real)

    assert tvd(same_shop(made.codes, made.owners), real) < 0.04 < apart / 3


def test_what_is_free_stays_free(exact):
    _, made = exact
    day, shop = made.codes[:, 2], made.codes[:, 1]
    table = np.bincount(day * 4 + shop, minlength=12).reshape(3, 4) / len(made)

    assert tvd(table, np.outer(table.sum(axis=1), table.sum(axis=0))) < 0.02


def test_a_users_columns_are_the_same_in_all_its_records(exact):
    _, made = exact

    first = np.flatnonzero(np.diff(made.owners, prepend=-1))
    assert np.array_equal(made.codes[:, 0], made.codes[first[made.owners], 0])
    assert np.array_equal(np.unique(made.owners), np.arange(made.owners[-1] + 1))


def test_noise_of_a_budget_leaves_records_of_a_user_alike():
    truth = population()
    strategy = build_strategy("relational", {"parent": PARENT, "most_records": MOST})
    learned = direct_run(strategy, SCHEMA, truth, 3.0, rng=np.random.default_rng(0))
    made = learned.sample(20_000, np.random.default_rng(1))
    shuffled = made.codes[np.random.default_rng(0).permutation(len(made))]

    real = same_shop(truth.records.codes, truth.user_index)
    assert tvd(same_shop(made.codes, made.owners), real) < 0.1
    assert tvd(same_shop(shuffled, made.owners), real) > 0.2


@pytest.mark.parametrize("num_records", [0, 1, 2, 3, 500])
def test_as_many_records_come_as_are_asked_for(exact, num_records):
    made = exact[0].sample(num_records, np.random.default_rng(0))

    assert made.codes.shape == (num_records, 4)
    assert made.owners.shape == (num_records,)


def test_both_tables_join_to_the_records_they_were_split_from(exact):
    learned, made = exact
    table = decode(SCHEMA, made, np.random.default_rng(0))

    tables = split_tables(table, learned.family, made.owners)

    assert tables["users"].column_names == ["user", "town"]
    assert tables["records"].column_names == ["user", "shop", "day", "mood"]
    keys = tables["users"].column("user").to_numpy()
    assert np.array_equal(keys, np.arange(1, len(keys) + 1))
    assert set(tables["records"].column("user").to_pylist()) == set(keys.tolist())
    joined = joined_table(tables, learned.family)
    assert joined.select(table.column_names).equals(table)


@pytest.mark.parametrize(
    "change",
    [
        {"parent": ["nobody"]},
        {"tables": ["users", "records", "../key"]},
        {"tables": ["users"]},
        {"steps": []},
        {"steps": [[5, [6]], [6, [5]], [7, []]]},
        {"steps": [[5, []], [5, []], [7, []]]},
        {"more": 1},
    ],
)
def test_a_saved_household_that_cannot_be_is_refused(exact, change):
    settings = json.loads(json.dumps(exact[0].settings())) | change

    with pytest.raises(ConfigError, match=r"household|names"):
        Household.restore(SCHEMA, settings, exact[0].tensors())


def test_a_run_releases_two_tables_that_verify_and_can_be_sampled_again(tmp_path):
    truth = population(300)
    table = decode(SCHEMA, truth.records, np.random.default_rng(0))
    names = table.column_names
    lines = [
        ",".join([f"u{u}", *(table.column(n)[i].as_py() for n in names)])
        for i, u in enumerate(truth.user_index)
    ]
    (tmp_path / "people.csv").write_text("\n".join([",".join(["who", *names]), *lines]) + "\n")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA.to_json()))
    described = {
        "population": {"name": "shoppers", "num_users": 250, "epsilon": 3.0, "delta": 1e-4},
        "data": {"path": "people.csv", "schema": "schema.json"},
        "unit": {"column": "who", "max_records": MOST},
        "budget": {"epsilon": 2.0},
        "strategy": {"name": "relational", "parent": PARENT, "most_records": MOST},
        "engine": {"clients": 3, "timeout_s": 20.0},
        "release": {"num_records": 200},
    }

    release = fs.Release.open(run(parse_config(described, base=tmp_path)))

    assert release.verify(replay=True).ok
    users = pq.read_table(release.folder / "data" / "users.parquet")
    records = pq.read_table(release.folder / "data" / "records.parquet")
    assert not (release.folder / "data" / "synthetic.parquet").exists()
    assert records.num_rows == release.data.num_rows == 200
    assert set(records.column("user").to_pylist()) == set(users.column("user").to_pylist())
    assert "every user equally" in (release.folder / "card.md").read_text()
    arguments = ["sample", str(release.folder), "-n", "50", "--seed", "3"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "more.csv")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "more_users.csv").read_text().startswith('"user","town"')
    assert len((tmp_path / "more_records.csv").read_text().splitlines()) == 51


def test_where_no_column_is_a_users_whoever_uses_the_records_is_warned():
    assert "parent = [" in caution_of(build_strategy("relational", {}))
    assert caution_of(build_strategy("relational", {"parent": PARENT})) == ""

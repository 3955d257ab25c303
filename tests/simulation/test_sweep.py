# SPDX-License-Identifier: Apache-2.0
"""A sweep tries settings on records that cost nothing, says so, and goes on where it was cut."""

import json

import numpy as np
import pytest
from fedsynth.core.config import parse_config, read_config
from fedsynth.core.errors import ConfigError
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of
from fedsynth.simulation.cli import app
from fedsynth.simulation.run import run
from fedsynth.simulation.stand_ins import Source, stand_ins
from fedsynth.simulation.sweep import parse_grid, points_of, sweep, with_point
from typer.testing import CliRunner

RUN = """
[population]
name = "people"
num_users = 300
epsilon = 4.0
delta = 1e-5

[data]
path = "private.csv"
schema = "schema.toml"

[unit]
column = "who"
max_records = 2

[budget]
epsilon = 1.0

[strategy]
name = "independent"

[engine]
clients = 2

[release]
num_records = 500
"""
SCHEMA = """
target = "color"

[columns.color]
type = "category"
categories = ["red", "green", "blue"]
origin = "public: made up"

[columns.age]
type = "integer"
bounds = [0, 9]
num_bins = 10
origin = "public: made up"
"""


def write_people(path, num_users, seed):
    """Users of one to three records."""
    rng = np.random.default_rng(seed)
    lines = ["who,color,age"]
    for user in range(num_users):
        for _ in range(1 + user % 3):
            color = "red" if rng.random() < 0.8 else "green"
            lines.append(f"{path.stem}{user},{color},{int(rng.integers(10))}")
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    (tmp_path / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    write_people(tmp_path / "public.csv", 60, seed=1)
    return tmp_path  # and no private.csv: a sweep must not miss it


def swept(folder, grid, **changes):
    """A sweep on the public file."""
    source = Source.of(folder / "public.csv", None)
    config = read_config(folder / "run.toml")
    return sweep(config, parse_grid(grid), source, kept=folder / "kept.jsonl", **changes)


def test_more_budget_scores_better_and_comes_first(folder):
    write_people(folder / "public.csv", 600, seed=1)

    found = swept(folder, ["budget.epsilon=0.05,4"], num_seeds=2)

    assert [row.point["budget.epsilon"] for row in found.rows] == [4, 0.05]
    assert found.score == "variation"
    assert found.rows[0].mean < 0.6 * found.rows[1].mean
    assert found.rows[0].noise_multiplier < found.rows[1].noise_multiplier


def test_no_ledger_no_private_file_and_no_client_is_touched(folder):
    before = {path.name for path in folder.iterdir()}

    swept(folder, ["strategy.max_norm=1,1.5"])

    assert {path.name for path in folder.iterdir()} == before | {"kept.jsonl"}


def test_what_was_tried_is_not_tried_again(folder, monkeypatch):
    first = swept(folder, ["budget.epsilon=1,2"])
    kept = folder / "kept.jsonl"
    with kept.open("a", encoding="utf-8") as file:
        file.write('{"key": "cut sh')  # the process was killed here
    assert [row.point["budget.epsilon"] for row in first.rows] in ([1, 2], [2, 1])

    def never(*args, **kwargs):
        raise AssertionError("tried again")

    monkeypatch.setattr("fedsynth.simulation.sweep.direct_run", never)
    again = swept(folder, ["budget.epsilon=2,1"])

    assert again.rows == first.rows
    with pytest.raises(AssertionError, match="tried again"):
        swept(folder, ["budget.epsilon=3"])


def test_another_public_file_is_tried_anew(folder):
    swept(folder, ["budget.epsilon=1"])
    write_people(folder / "public.csv", 61, seed=2)

    swept(folder, ["budget.epsilon=1"])

    lines = (folder / "kept.jsonl").read_text(encoding="utf-8").split()
    assert len({json.loads(line)["key"] for line in _entries(folder)}) == 2, lines


def _entries(folder):
    text = (folder / "kept.jsonl").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def test_users_stand_in_as_many_as_are_declared_and_whole(folder):
    plan = plan_of(read_config(folder / "run.toml"))
    source = Source.of(folder / "public.csv", None)

    shard, test = stand_ins(plan, source, np.random.default_rng(0))

    assert shard.num_users == 300  # of 48 people, so each several times over
    assert np.bincount(np.diff(shard.starts)).tolist()[:1] == [0]
    assert shard.max_records == 2
    assert 12 <= len(test) <= 36  # a fifth of the people, with all of their records


def test_a_point_that_cannot_be_is_said_and_the_others_are_tried(folder):
    found = swept(folder, ["strategy.max_norm=1,-1"])

    good, bad = found.rows
    assert good.scores
    assert not good.refused
    assert "max_norm" in bad.refused


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "by --grid"),
        (["strategy.max_norm"], "KEY=VALUE"),
        (["strategy.max_norm=1", "strategy.max-norm=2"], "twice"),
        (["strategy.max_nrom=1"], "max_nrom"),
        (["budgets.epsilon=1"], "no key of a run file"),
        (["budget.epsilom=1"], "no key of a run file"),
        (["strategy.name=nothing"], "nothing"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_is_tried(folder, grid, message):
    with pytest.raises(ConfigError, match=message):
        swept(folder, grid)

    assert not (folder / "kept.jsonl").exists()


def test_every_combination_is_a_point():
    grid = parse_grid(["strategy.a=1,2", 'strategy.b="x",y'])

    assert grid == {"strategy.a": [1, 2], "strategy.b": ['"x"', "y"]}
    assert len(points_of(grid)) == 4


def test_a_point_replaces_a_key_however_it_is_spelled(folder):
    text = RUN.replace('name = "independent"', 'name = "independent"\nmax-norm = 2.0')
    (folder / "run.toml").write_text(text, encoding="utf-8")

    changed = with_point(read_config(folder / "run.toml"), {"strategy.max_norm": 3.0})

    assert changed.strategy.settings == {"max_norm": 3.0}


def test_accuracy_needs_a_target(folder):
    schema = SCHEMA.replace('target = "color"\n', "")
    (folder / "schema.toml").write_text(schema, encoding="utf-8")

    with pytest.raises(ConfigError, match="needs a category as the schema's target"):
        swept(folder, ["budget.epsilon=1"], score="accuracy")


def test_a_release_stands_in_for_its_population(folder):
    write_people(folder / "private.csv", 300, seed=3)
    release = run(read_config(folder / "run.toml"))
    with Ledger(folder / "ledger.db") as ledger:
        head = ledger.head()

    found = sweep(
        read_config(folder / "run.toml"),
        parse_grid(["budget.epsilon=0.5,2"]),
        Source.of(None, release),
        kept=folder / "kept.jsonl",
        score="accuracy",
    )

    assert "synthetic" in found.source
    assert all(0 <= row.mean <= 1 for row in found.rows)
    with Ledger(folder / "ledger.db") as ledger:
        assert ledger.head() == head


def test_a_release_of_another_schema_is_refused(folder):
    write_people(folder / "private.csv", 300, seed=3)
    release = run(read_config(folder / "run.toml"))
    schema = SCHEMA.replace('"blue"', '"black"')
    (folder / "schema.toml").write_text(schema, encoding="utf-8")

    with pytest.raises(ConfigError, match="another schema"):
        sweep(
            read_config(folder / "run.toml"),
            parse_grid(["budget.epsilon=0.5"]),
            Source.of(None, release),
            kept=folder / "kept.jsonl",
        )


def test_the_command_says_that_it_is_free_and_what_is_best(folder):
    told = CliRunner().invoke(
        app,
        [
            *("sweep", str(folder / "run.toml"), "--public", str(folder / "public.csv")),
            *("--grid", "budget.epsilon=0.1,3", "--seeds", "2"),
        ],
    )

    assert told.exit_code == 0, told.output
    assert "This is free" in told.output
    assert (folder / "run.sweep.jsonl").exists()


def test_the_command_without_a_source_asks_for_one(folder):
    told = CliRunner().invoke(
        app, ["sweep", str(folder / "run.toml"), "--grid", "budget.epsilon=1", "--format", "json"]
    )

    assert told.exit_code == ConfigError.exit_code
    assert "--public FILE" in json.loads(told.stdout)["error"]


def test_the_local_placement_is_tried_with_its_own_noise(folder):
    write_people(folder / "public.csv", 600, seed=1)
    changes = {"noise": {"placement": "local"}, "engine": {"clients": 100}}
    plain = read_config(folder / "run.toml")
    noisy = parse_config(
        plain.model_dump(mode="json", by_alias=True) | changes, base=folder, where="test"
    )
    source, grid = Source.of(folder / "public.csv", None), parse_grid(["budget.epsilon=0.3"])

    one, other = (
        sweep(config, grid, source, kept=folder / "kept.jsonl", num_seeds=2).rows[0].mean
        for config in (plain, noisy)
    )

    assert other > 1.3 * one

# SPDX-License-Identifier: Apache-2.0
"""The worked examples: a strategy and an aggregator from folders of their own."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core import accounting, plugins
from fedsynth.core.decode import decode
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice
from fedsynth.core.privacy import Budget, NoisePlacement
from fedsynth.core.query import Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.server.federation import Federation
from fedsynth.simulation.check import check_strategy
from fedsynth.simulation.check_aggregator import check_aggregator
from fedsynth.simulation.direct import direct_run, prior
from fedsynth.strategies import registry
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.registry import build_aggregator, build_strategy

EXAMPLES = Path(__file__).parents[2] / "examples"
ORIGIN = "public: made up for this test"
SCHEMA = Schema(
    (
        Column("kind", "category", ORIGIN, categories=("a", "b", "c")),
        Column("length", "real", ORIGIN, bounds=(0.0, 1.0), num_bins=20),
        Column("color", "category", ORIGIN, categories=("red", "green", "blue", "gold")),
    ),
    target="kind",
)


@pytest.fixture
def naive_bayes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_strategy"))
    return build_strategy("naive_bayes:NaiveBayes", {})


@pytest.fixture
def bounded(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_aggregator"))
    return lambda max_users: build_aggregator(
        "bounded_clients:BoundedClients", {"max_users": max_users}
    )


def records(num_records, seed=0):
    """Kinds of different sizes, each with its own length and color."""
    draw = np.random.default_rng(seed)
    kind = draw.choice(3, size=num_records, p=[0.5, 0.3, 0.2])
    length = np.clip(np.rint(3 + 6 * kind + 1.5 * draw.normal(size=num_records)), 0, 19)
    color = (kind + (draw.random(num_records) < 0.3)) % 4
    return Records(np.column_stack([kind, length, color]).astype(np.int32))


def accuracy(made):
    """Of a classifier that learned from synthetic records, on real ones."""
    from sklearn.neighbors import KNeighborsClassifier

    real = records(500, seed=9)
    judge = KNeighborsClassifier(5).fit(made.codes[:, 1:], made.codes[:, 0])
    return judge.score(real.codes[:, 1:], real.codes[:, 0])


def test_the_example_strategy_keeps_what_tells_classes_apart_and_independent_does_not(naive_bayes):
    shard = BoundedShard(records(3000), np.arange(3000), 3000, 1)
    made = {}
    for strategy in (naive_bayes, Independent()):
        noise = accounting.calibrate(lambda z, s=strategy: s.event(SCHEMA, z), Budget(1.0, 1e-6))
        rng = np.random.default_rng(0)
        synthesizer = direct_run(strategy, SCHEMA, shard, noise, rng=rng)
        made[strategy.name] = synthesizer.sample(2000, rng)
    blind = prior(naive_bayes, SCHEMA, noise, rng).sample(2000, rng)

    assert accuracy(made["naive_bayes"]) > 0.9
    assert accuracy(made["independent"]) < 0.7
    assert accuracy(blind) < 0.7


def test_the_example_strategy_refuses_a_schema_without_target(naive_bayes):
    with pytest.raises(ConfigError, match="target"):
        naive_bayes.event(Schema(SCHEMA.columns), 1.0)


@pytest.mark.parametrize("max_users", [1, 3, 10_000])
def test_the_example_aggregator_keeps_all_it_owes(bounded, max_users):
    assert [f"{f.name}: {f.detail}" for f in check_aggregator(bounded(max_users)) if not f.ok] == []


def test_the_example_aggregator_leaves_honest_clients_alone_and_binds_hostile_ones(bounded):
    query = Query("votes", dim=4, clip=1.5, noise_multiplier=1.0)
    step = Lattice.of(query).bound
    honest = np.array([100 * step, 0, 0, 0], dtype=np.int64)
    hostile = np.array([0, 2**62, 0, -(2**62)])

    alone = bounded(100).combine([honest])
    total = bounded(100).combine([honest, hostile])

    assert (alone == honest).all()
    assert 100 * step <= np.linalg.norm(total - honest) <= 200 * step


def test_the_example_aggregator_declares_little_more_than_the_clip(bounded):
    query = Query("votes", dim=1000, clip=1.5, noise_multiplier=1.0)

    declared = bounded(10_000).sensitivity(query, Lattice.of(query))

    assert 1.5 < declared < 1.5 * 1.0001


def test_an_aggregator_that_looks_at_single_sums_cannot_stand_behind_a_secure_sum(bounded):
    federation = Federation(
        grid=None,
        num_clients=3,
        quorum=3,
        timeout_s=1.0,
        aggregator=bounded(5),
        sums_are_hidden=True,
    )

    federation.check(NoisePlacement.CENTRAL)
    with pytest.raises(ConfigError, match="single clients' sums"):
        federation.check(NoisePlacement.DISTRIBUTED)


@pytest.mark.parametrize(
    ("folder", "group"),
    [("own_strategy", "fedsynth.strategies"), ("own_aggregator", "fedsynth.aggregators")],
)
def test_an_example_s_entry_points_name_what_is_there(monkeypatch, folder, group):
    monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    project = tomllib.loads((EXAMPLES / folder / "pyproject.toml").read_text(encoding="utf-8"))

    points = project["project"]["entry-points"]

    assert group in points
    for named in points.values():
        for name, target in named.items():
            module, _, attribute = target.partition(":")
            found = getattr(__import__(module), attribute)
            assert name in (getattr(found, "name", None), getattr(found, "kind", None))


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The examples as pip lays them down: modules and the entry points of their projects."""
    for folder in ("own_strategy", "own_aggregator"):
        project = tomllib.loads((EXAMPLES / folder / "pyproject.toml").read_text(encoding="utf-8"))
        name = project["project"]["name"].replace("-", "_")
        info = tmp_path / f"{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        lines = []
        for group, points in project["project"]["entry-points"].items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module in (EXAMPLES / folder).glob("*.py"):
            (tmp_path / module.name).write_text(module.read_text(encoding="utf-8"))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._plugins.cache_clear()
    yield
    plugins._plugins.cache_clear()


def test_installed_plug_ins_are_found_by_their_entry_points(installed):
    strategy = build_strategy("naive_bayes", {})
    aggregator = build_aggregator("bounded_clients", {"max_users": 10})
    synthesizer = registry.synthesizer_class("classes")

    assert "naive_bayes" in registry.strategy_names()
    assert (strategy.name, aggregator.name) == ("naive_bayes", "bounded_clients")
    assert synthesizer.kind == "classes"


def test_an_installed_strategys_release_is_opened_again(installed, tmp_path, monkeypatch):
    import pyarrow as pa

    import fedsynth as fs

    monkeypatch.chdir(tmp_path)
    made = decode(SCHEMA, records(300), np.random.default_rng(0))
    table = made.append_column("who", pa.array([f"u{i}" for i in range(300)]))

    release = fs.simulate(
        "naive_bayes",
        table,
        schema=SCHEMA,
        budget=Budget(epsilon=1, delta=1e-5),
        unit=fs.User("who"),
        num_users=300,
        num_records=50,
    )

    assert fs.Release.open(release.folder).sample(10, seed=1).num_rows == 10
    assert release.verify(replay=True).ok


@pytest.fixture
def own_model(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_model"))
    settings = {"num_users": 2000, "sampling_prob": 0.3, "clip": 0.5, "server_lr": 0.2}
    return lambda **more: build_strategy("own_model:OwnModel", {**settings, **more})


@pytest.mark.parametrize(
    "level", [{}, {"level": "example", "records_per_user": 1}], ids=["user", "example"]
)
def test_the_example_model_learns_what_its_prior_does_not_know(own_model, level):
    shard = BoundedShard(records(2000), np.arange(2000), 2000, 1)
    strategy = own_model(num_rounds=20, **level)

    synthesizer = direct_run(strategy, SCHEMA, shard, 1.0, rng=np.random.default_rng(0))

    blind = prior(strategy, SCHEMA, 1.0, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    assert accuracy(synthesizer.sample(2000, rng)) > 0.9
    assert accuracy(blind.sample(2000, rng)) < 0.7


def test_the_example_model_keeps_what_every_strategy_owes(own_model):
    strategy = own_model(num_users=40, num_rounds=3)

    assert [(f.name, f.detail) for f in check_strategy(strategy) if not f.ok] == []

# SPDX-License-Identifier: Apache-2.0
"""Domains found under privacy: what is found, what never shows, and what it costs."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from fedsynth.client.bounding import bound
from fedsynth.client.shard import encode
from fedsynth.core import accounting
from fedsynth.core.electorate import Electorate
from fedsynth.core.errors import ConfigError, ShardError
from fedsynth.core.privacy import Budget, PrivacyUnit
from fedsynth.core.query import Contribution, NoisySum, check_signal
from fedsynth.core.schema import OPEN, Schema
from fedsynth.simulation.check import check_strategy
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.discovered import OTHER, Discovered
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.mst import Mst
from fedsynth.strategies.private_evolution import PrivateEvolution
from fedsynth.strategies.registry import build_strategy, settings_of, strategy_names
from scipy.stats import kstest, norm

UNIQUE = "Snowflake Bay"
UNIT = PrivacyUnit("who", max_records=3)
SCHEMA = Schema.from_json(
    {
        "columns": {
            "city": {"type": "category", "categories": OPEN, "missing": True},
            "age": {"type": "integer", "bounds": OPEN, "num_bins": 8, "missing": True},
            "ill": {"type": "boolean"},
            "weight": {"type": "real", "bounds": OPEN},
        }
    }
)


SMALL = Schema.from_json(
    {
        "columns": {
            name: {"type": "category", "categories": ["a", "b"], "origin": "public: made up"}
            for name in ("one", "two", "three", "four")
        }
    }
)


def population(num_users, seed=0, *, unique=True):
    """A table of users with one to three records; one user alone is from `UNIQUE`."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), 1 + np.arange(num_users) % 3)
    size = len(users)
    city = rng.choice(["Lagos", "New York", "Zürich", "428"], size, p=[0.5, 0.3, 0.15, 0.05])
    city = city.astype(object)
    city[users == num_users // 2] = UNIQUE if unique else "Lagos"
    city[rng.random(size) < 0.05] = None
    age = rng.integers(18, 90, size).astype(float)
    age[rng.random(size) < 0.05] = np.nan
    return pa.table(
        {
            "who": [f"u{user}" for user in users],
            "city": pa.array(city.tolist(), pa.string()),
            "age": age,
            "ill": rng.random(size) < 0.3,
            "weight": rng.lognormal(4, 0.5, size),
        }
    )


def shard_of(table, schema=SCHEMA):
    return bound(encode(table, schema, UNIT), UNIT, seed=0)


def noise_for(strategy, epsilon, delta=1e-6, schema=SCHEMA):
    return accounting.calibrate(lambda z: strategy.event(schema, z), Budget(epsilon, delta))


def test_without_noise_domains_are_those_of_the_data():
    table = population(600)

    learned = non_private(Discovered(Independent()), SCHEMA, shard_of(table), rng())
    city, age, ill, weight = learned.schema.columns

    assert city.categories == ("Lagos", "New York", "Zürich", "428", OTHER)  # one user: beneath
    assert (city.other, city.missing, age.missing) == (OTHER, True, True)
    assert age.bounds == (17.5, 89.5)
    assert age.num_bins == 8
    assert ill == SCHEMA.columns[2]
    values = table["weight"].to_numpy()
    assert weight.bounds[0] <= values.min()
    assert weight.bounds[1] >= values.max()
    assert {c.origin.split(":")[0] for c in (city, age, weight)} == {"measured"}
    assert not learned.schema.is_open
    assert SCHEMA.allows(learned.schema)


def test_bins_hold_about_equally_many():
    table = population(3000)

    learned = non_private(Discovered(Independent()), SCHEMA, shard_of(table), rng())
    counts, _ = np.histogram(table["weight"].to_numpy(), learned.schema.columns[3].edges)

    assert counts.max() < 1.5 * counts.mean()
    assert counts.min() > 0.5 * counts.mean()


def test_clients_code_records_as_the_schema_that_was_found_does():
    table, seen = population(500), []

    learned = non_private(Discovered(Spy(seen)), SCHEMA, shard_of(table), rng())
    again = shard_of(table, learned.schema).records.codes

    assert np.array_equal(np.concatenate(seen), again)
    other = learned.schema.columns[0].categories.index(OTHER)
    assert (again[:, 0] == other).sum() == table["city"].to_pylist().count(UNIQUE) > 0


@pytest.mark.parametrize("inner", [Independent(), Mst()], ids=["independent", "mst"])
def test_a_wrapped_strategy_keeps_all_it_owes(inner):
    findings = check_strategy(Discovered(inner), SCHEMA)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_a_closed_schema_is_left_to_the_inner_strategy():
    closed = non_private(Discovered(Independent()), SCHEMA, shard_of(population(300)), rng()).schema

    event = Discovered(Independent()).event(closed, 2.0)

    assert accounting.leaves(event) == accounting.leaves(Independent().event(closed, 2.0))


def test_the_domain_costs_its_share_and_the_rest_is_the_inner_strategys():
    strategy = Discovered(Mst(), domain_share=0.2)
    event = strategy.event(SCHEMA, 2.0)

    mu = accounting.mu_of(event)
    inner = accounting.mu_of(Mst().event(SCHEMA, 2.0 / math.sqrt(0.8)))

    assert mu == pytest.approx(0.5)
    assert inner**2 == pytest.approx(0.8 * mu**2)


def test_settings_are_the_inner_strategys_and_those_of_the_domain():
    strategy = build_strategy("mst", {"pair_cells": 20, "domain_share": 0.3}, is_open=True)
    settings = json.loads(settings_of(strategy))

    assert isinstance(strategy, Discovered)
    assert strategy.inner == Mst(pair_cells=20)
    assert (settings["pair_cells"], settings["domain_share"]) == (20, 0.3)
    assert build_strategy("mst", settings, is_open=True) == strategy
    with pytest.raises(
        ConfigError, match="unknown key 'domain_share': it is for schemas with open"
    ):
        build_strategy("mst", {"domain_share": 0.3})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"domain_share": 1.0}, "domain_share"),
        ({"domain_values": 0}, "domain_values"),
        ({"domain_norm": math.inf}, "domain_norm"),
        ({"domain_surprise": 0.5}, "domain_surprise"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        Discovered(Independent(), **settings)


def test_a_strategy_whose_cost_depends_on_the_domain_is_refused():
    with pytest.raises(ConfigError, match="declare bounds and categories"):
        Discovered(CostsByCells()).event(SCHEMA, 1.0)


@pytest.mark.parametrize("name", strategy_names())
def test_every_installed_strategy_may_have_its_domain_found(name):
    strategy = build_strategy(name, {}, is_open=True)

    try:
        known = strategy.inner.event(SMALL, 1.0)
    except ConfigError:
        pytest.skip("refuses small tables, open or not")
    event = strategy.event(SCHEMA, 1.0)

    assert sum(accounting.leaves(event).values()) == 2 + sum(accounting.leaves(known).values())


def test_what_the_inner_strategy_declares_is_passed_on():
    strategy = Discovered(Declares(max_norm=2.5))

    assert strategy.trusts_server is True
    assert strategy.caution == "mind the step"
    assert strategy.max_norm == 2.5


def test_what_the_inner_strategy_expects_and_refuses_is_that_of_its_part_of_the_budget():
    inner = PrivateEvolution(num_candidates=60, num_votes=1, patience=1, held_out=0.2)
    wrapped = Discovered(inner)
    users = Electorate(20_000)
    few = Electorate(5)

    *_, noise = wrapped._noise(SCHEMA, 2.0)
    told = wrapped.prospect(SCHEMA, 2.0, users)

    assert noise > 2.0
    closed = Discovered(Independent())
    assert told.ratio == inner.prospect(SMALL, noise, users).ratio
    assert closed.prospect(SCHEMA, 2.0, users) is None
    assert wrapped.workload(SCHEMA).num_candidates == inner.workload(SMALL).num_candidates
    assert closed.workload(SCHEMA) is None
    assert (wrapped.describes, wrapped.stops_early) == (inner.describes, True)
    with pytest.raises(ConfigError, match="would not be heard"):
        check_signal(wrapped, SCHEMA, 2.0, few)


def test_where_the_domain_rounds_are_lost_the_run_still_ends():
    rounds = Discovered(Independent()).rounds(SCHEMA, 1.0, rng())
    query = next(rounds)
    for _ in range(2):
        query = rounds.send(NoisySum.void(query))

    assert query.name == "histograms"
    with pytest.raises(StopIteration) as end:
        rounds.send(NoisySum.void(query))
    city, age, _, weight = end.value.value.schema.columns
    assert city.categories == (OTHER,)
    assert age.num_bins == 8
    assert age.bounds[1] > 1e12
    assert weight.bounds[0] < -1e12


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("domain_numbers", np.array([99], np.int32)),
        ("domain_edge_starts", np.array([0, 1, 2, 99], np.int64)),
        ("domain_texts", np.array([[0, 4, 65]], np.int32)),
        ("domain_texts", np.array([[0, 9, 32]], np.int32)),
        ("domain_heights", np.array([1], np.int32)),
        ("domain_surplus", np.array([1], np.int32)),
    ],
)
def test_arrays_from_the_network_that_cannot_be_are_refused(key, value):
    strategy, shard = Discovered(Independent()), shard_of(population(5))
    query = next(strategy.rounds(SCHEMA, 1.0, rng()))
    query.inputs[key] = value

    with pytest.raises(ConfigError, match="domain arrays"):
        strategy.answer(query, shard, rng())


# --- what one user alone has ---------------------------------------------------------------------


def test_a_category_of_one_user_alone_never_shows():
    """At most (Phi(Phi^-1(p) + mu)) a run, with p < 1e-6 and mu < 0.1: 2e-6 for each run here."""
    strategy = Discovered(Independent())
    noise = noise_for(strategy, 1.0)
    with_user, without = shard_of(population(300)), shard_of(population(300, unique=False))
    mu = math.sqrt(strategy.domain_share) / noise

    runs = [direct_run(strategy, SCHEMA, with_user, noise, rng=rng()) for _ in range(40)]
    shown = [UNIQUE in learned.schema.columns[0].categories for learned in runs]

    assert norm.cdf(norm.ppf(1e-6) + mu) < 2e-6
    assert not any(shown)
    assert UNIQUE not in json.dumps([learned.schema.to_json() for learned in runs])
    assert without.num_users == with_user.num_users


def test_a_domain_read_from_the_data_shows_it_at_once():
    """The failing twin: what wrappers do that infer categories without budget."""
    table = population(300)
    read_off = json.loads(json.dumps(SCHEMA.to_json()))
    read_off["columns"]["city"] = {
        "type": "category",
        "categories": sorted({c for c in table["city"].to_pylist() if c}),
        "origin": "public: so they say",
        "missing": True,
    }
    twin = Schema.from_json(read_off)

    learned = direct_run(Discovered(Independent()), twin, shard_of(table, twin), 3.0, rng=rng())

    assert UNIQUE in learned.schema.columns[0].categories


def test_a_category_that_many_have_shows_in_every_run():
    strategy, shard = Discovered(Independent()), shard_of(population(3000))
    noise = noise_for(strategy, 4.0)

    found = [direct_run(strategy, SCHEMA, shard, noise, rng=rng()) for _ in range(5)]

    assert all({"Lagos", "New York"} <= set(f.schema.columns[0].categories) for f in found)


def test_errors_of_an_open_column_show_no_value():
    schema = Schema.from_json({"columns": {"city": {"type": "category", "categories": OPEN}}})
    unit = PrivacyUnit("who")

    for bad, what in ((None, "is missing"), ("\0" + UNIQUE, "NUL")):
        with pytest.raises(ShardError, match=what) as refused:
            encode(pa.table({"who": ["a", "b"], "city": [UNIQUE, bad]}), schema, unit)
        assert UNIQUE not in str(refused.value)


def test_a_text_that_is_cut_counts_as_the_category_of_its_beginning():
    schema = Schema.from_json(
        {"columns": {"city": {"type": "category", "categories": OPEN, "max_bytes": 8}}}
    )
    table = pa.table({"who": [str(i) for i in range(200)], "city": ["Llanfairpwll"] * 200})

    shard = shard_of(table, schema)
    learned = non_private(Discovered(Independent()), schema, shard, rng())

    assert learned.schema.columns[0].categories == ("Llanfair", OTHER)
    assert (shard_of(table, learned.schema).records.codes == 0).all()


# --- numbers -------------------------------------------------------------------------------------


def test_quantiles_come_closer_to_the_exact_ones_as_epsilon_rises():
    values = np.random.default_rng(1).lognormal(3, 1, 4000)
    schema = Schema.from_json({"columns": {"x": {"type": "real", "bounds": OPEN, "num_bins": 16}}})
    table = pa.table({"who": [str(i) for i in range(len(values))], "x": values})
    shard = shard_of(table, schema)

    def error(epsilon):
        strategy = Discovered(Independent())
        noise = noise_for(strategy, epsilon, schema=schema)
        gaps = []
        for _ in range(6):
            edges = direct_run(strategy, schema, shard, noise, rng=rng()).schema.columns[0].edges
            ranks = np.searchsorted(np.sort(values), edges) / len(values)
            gaps.append(np.abs(ranks - np.linspace(0, 1, len(edges))).max())
        return float(np.mean(gaps))

    errors = [error(epsilon) for epsilon in (0.5, 2.0, 8.0)]

    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.05


def test_the_noise_of_the_domain_rounds_is_what_was_asked_for():
    strategy, shard = Discovered(Independent()), shard_of(population(200))
    exact, noisy = {}, {}

    direct_run(Recording(strategy, noisy), SCHEMA, shard, 4.0, rng=rng())
    non_private(Recording(strategy, exact), SCHEMA, shard, rng())

    query = next(strategy.rounds(SCHEMA, 4.0, rng()))
    residuals = (noisy["domain"].vector - exact["domain"].vector)[:20_000] / query.clip

    planned = query.noise_multiplier
    assert kstest(residuals, norm(scale=planned).cdf).pvalue > 1e-3
    assert kstest(residuals, norm(scale=planned * 4 / 3).cdf).pvalue < 1e-9
    assert kstest(residuals, norm(scale=planned * 3 / 4).cdf).pvalue < 1e-9


def rng():
    return np.random.default_rng(7)


@dataclass(frozen=True)
class Spy(Independent):
    """`independent`, that keeps the codes it is given."""

    seen: list = None
    name: ClassVar[str] = "spy"

    def __init__(self, seen):
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "max_norm", 1.0)

    def answer(self, query, shard, rng):
        self.seen.append(shard.records.codes.copy())
        return super().answer(query, shard, rng)


@dataclass(frozen=True)
class Recording(Independent):
    """A strategy that keeps the sums it is sent."""

    inner: object = None
    kept: dict = None
    name: ClassVar[str] = "recording"

    def __init__(self, inner, kept):
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "kept", kept)

    def event(self, schema, noise_multiplier):
        return self.inner.event(schema, noise_multiplier)

    def rounds(self, schema, noise_multiplier, rng):
        rounds = self.inner.rounds(schema, noise_multiplier, rng)
        query = next(rounds)
        while True:
            self.kept[query.name] = yield query
            try:
                query = rounds.send(self.kept[query.name])
            except StopIteration as end:
                return end.value

    def answer(self, query, shard, rng):
        return self.inner.answer(query, shard, rng)


@dataclass(frozen=True)
class Declares(Independent):
    """A strategy with something to say of itself."""

    name: ClassVar[str] = "declares"
    trusts_server: ClassVar[bool] = True
    caution: ClassVar[str] = "mind the step"


@dataclass(frozen=True)
class CostsByCells(Independent):
    """A strategy that asks more where there are more cells."""

    name: ClassVar[str] = "costs_by_cells"

    def event(self, schema, noise_multiplier):
        return GaussianDpEvent(noise_multiplier / schema.num_cells)

    def answer(self, query, shard, rng):
        return Contribution.rows(np.zeros((shard.num_users, query.dim)))


def test_records_hold_words_after_all_columns():
    shard = shard_of(population(10))

    assert SCHEMA.num_codes == shard.records.codes.shape[1] == 4 + 8

# SPDX-License-Identifier: Apache-2.0
"""A plan says what a run costs and what to expect, from public facts alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from dp_accounting.dp_event import DpEvent
from fedsynth.core import accounting
from fedsynth.core.config import RunConfig, parse_config
from fedsynth.core.errors import BudgetExceeded, ConfigError
from fedsynth.core.query import Contribution, NoisySum, Query, Strategy
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import plan_of
from fedsynth.simulation.dry_run import made_up
from fedsynth.simulation.plan import _together, lines_of, outlook
from fedsynth.strategies.parts.histograms import Grid, Histograms

SCHEMA = """
[columns.age]
type = "integer"
bounds = [0, 9]
num_bins = 10
origin = "public: made up"

[columns.sex]
type = "category"
categories = ["F", "M"]
origin = "public: made up"
"""


@dataclass(frozen=True)
class TwoSteps(Strategy):
    """One count of cells, then `votes` rounds of votes with inputs."""

    name: ClassVar[str] = "two-steps"
    max_norm: float = 1.0
    votes: int = 4
    sampling_prob: float = 1.0

    def _noise(self, noise_multiplier: float) -> tuple[float, float]:
        first, rest = accounting.split(noise_multiplier, [0.5, 0.5])
        return first, rest * math.sqrt(self.votes)

    def event(self, schema: Any, noise_multiplier: float) -> DpEvent:
        first, each = self._noise(noise_multiplier)
        leaves = {(first, 1.0): 1}
        leaves[(each, self.sampling_prob)] = self.votes
        return accounting.event_of(leaves)

    def rounds(self, schema: Any, noise_multiplier: float, rng: Any) -> Iterator[Query]:
        first, each = self._noise(noise_multiplier)
        noisy = yield Query("cells", 12, math.sqrt(2.0) * self.max_norm, first, cells=True)
        for _ in range(self.votes):
            inputs = {"candidates": np.zeros((100, 2), np.int32)}
            noisy = yield Query("votes", 100, 1.0, each, self.sampling_prob, inputs)
            assert isinstance(noisy, NoisySum)
        raise AssertionError("a plan must not learn anything")

    def answer(self, query: Query, shard: Any, rng: Any) -> Contribution:
        raise AssertionError("a plan must ask nobody")


def config_in(folder: Path, **changes: Any) -> RunConfig:
    (folder / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    data: dict[str, Any] = {
        "population": {"name": "town", "num_users": 600, "epsilon": 2.0, "delta": 1e-6},
        "unit": {"column": "person"},
        "data": {"path": "nowhere.csv", "schema": "schema.toml"},
        "budget": {"epsilon": 1.0},
        "strategy": {"name": f"{__name__}:TwoSteps"},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    return parse_config(data, base=folder)


def test_a_plan_costs_exactly_its_budget_and_no_more(tmp_path: Path):
    seen = outlook(config_in(tmp_path))

    assert 0.999 < seen.epsilon <= 1.0
    assert seen.largest_odds == pytest.approx(math.e / (1 + math.e), abs=1e-3)


def test_a_plan_reads_no_records_and_writes_nothing(tmp_path: Path):
    config = config_in(tmp_path)  # its data file does not exist

    outlook(config)

    assert [p.name for p in tmp_path.iterdir()] == ["schema.toml"]


def test_rounds_that_are_alike_stand_together_with_what_they_send(tmp_path: Path):
    seen = outlook(config_in(tmp_path))

    cells, votes = seen.steps

    assert (cells.query, cells.num_rounds, cells.bytes_down, cells.bytes_up) == ("cells", 1, 0, 96)
    assert (votes.query, votes.num_rounds, votes.bytes_down, votes.bytes_up) == (
        "votes",
        4,
        800,
        800,
    )
    assert seen.num_rounds == 5


def test_epsilon_grows_by_round_to_the_whole(tmp_path: Path):
    seen = outlook(config_in(tmp_path))

    rounds, epsilons = zip(*seen.by_round, strict=True)

    assert rounds == (1, 2, 3, 4, 5)
    assert list(epsilons) == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(seen.epsilon)
    assert seen.steps[0].epsilon_after == pytest.approx(epsilons[0])


def test_the_expected_signal_is_users_over_cells_beside_the_noise(tmp_path: Path):
    seen = outlook(config_in(tmp_path))

    # 600 users, each lighting one of 10 and one of 2 cells: 1200 marks over 12 cells
    assert "about 100 users" in seen.steps[0].expect
    assert f"± {seen.steps[0].stddev:.3g}" in seen.steps[0].expect


def test_few_users_are_told_that_they_will_see_mostly_noise(tmp_path: Path):
    crowd = outlook(config_in(tmp_path, population={"num_users": 100_000, "delta": 1e-7}))
    few = outlook(config_in(tmp_path, population={"num_users": 10}))

    assert crowd.steps[0].expect.endswith("clear")
    assert "mostly noise" in few.steps[0].expect


def test_local_noise_is_as_much_larger_as_there_are_clients(tmp_path: Path):
    central = outlook(config_in(tmp_path, engine={"clients": 9}))
    local = outlook(config_in(tmp_path, engine={"clients": 9}, noise={"placement": "local"}))

    assert local.steps[0].stddev == pytest.approx(3 * central.steps[0].stddev)


def test_sampled_rounds_are_priced_at_a_few_checkpoints(tmp_path: Path):
    strategy = {"votes": 40, "sampling_prob": 0.1}

    seen = outlook(config_in(tmp_path, strategy=strategy))

    assert seen.accountant == "pld"
    assert 3 <= len(seen.by_round) <= 5
    assert seen.by_round[-1] == (41, pytest.approx(seen.epsilon))


def test_what_was_spent_before_counts(tmp_path: Path):
    config = config_in(tmp_path)
    first = outlook(config)
    with Ledger(config.path(config.ledger)) as ledger:
        ledger.open_run(
            "earlier",
            "town",
            cap=config.population.cap,
            event=TwoSteps().event(None, first.noise_multiplier),
            facts={"unit": {"column": "person"}, "placement": "central"},
        )

    second = outlook(config)

    assert first.spent == 0
    assert second.spent == pytest.approx(first.epsilon, rel=1e-3)
    # Gaussian sums compose in the square: twice the run is less than twice its epsilon
    assert second.spent < second.spent_after < 2 * second.spent


def test_a_run_that_the_population_cannot_pay_is_refused(tmp_path: Path):
    seen = outlook(config_in(tmp_path, population={"epsilon": 0.5}))

    assert not seen.fits
    with pytest.raises(BudgetExceeded, match="Nothing was asked"):
        seen.check()


def test_the_lines_for_a_person_say_it_in_words(tmp_path: Path):
    text = "\n".join(f"{a} {b}" for a, b in lines_of(outlook(config_in(tmp_path))))

    assert "for each user of person, adding or removing all their records" in text
    assert "0.00 of 2.00 on town" in text
    assert "4 rounds of votes" in text
    assert "73.2 %" in text  # e / (1 + e), rounded up


def mixed_schema(folder: Path) -> None:
    """Eight columns of five categories, in place of the two of `SCHEMA`."""
    columns = (
        f'[columns.c{i}]\ntype = "category"\ncategories = ["a", "b", "c", "d", "e"]\n'
        'origin = "public: made up"\n'
        for i in range(8)
    )
    (folder / "schema.toml").write_text("\n".join(columns), encoding="utf-8")


def test_a_plan_names_the_rounds_that_a_run_of_the_declared_users_takes(tmp_path: Path):
    crowd = config_in(
        tmp_path,
        strategy={"name": "marginals"},
        population={"num_users": 20_000, "delta": 1e-6},
    )
    few = config_in(
        tmp_path, strategy={"name": "marginals"}, population={"num_users": 20, "delta": 1e-6}
    )
    mixed_schema(tmp_path)

    names = [[(s.query, s.num_rounds) for s in outlook(config).steps] for config in (crowd, few)]

    assert names == [
        [("columns", 1), ("pairs", 1), ("tables", 1)],
        [("columns", 2), ("tables", 1)],  # no pair could be seen beside the noise
    ]


def test_rounds_of_one_name_stand_on_one_line_with_the_range_of_their_numbers(tmp_path: Path):
    config = config_in(
        tmp_path, strategy={"name": "aim"}, population={"num_users": 20_000, "delta": 1e-6}
    )
    mixed_schema(tmp_path)

    seen = outlook(config)
    lines = [text for _, text in lines_of(seen)]

    assert [step.query for step in seen.steps] == ["columns", "worst", "table"]
    worst, table = seen.steps[1:]
    assert worst.noise_multiplier < worst.noise_multiplier_most
    told = f"multiplier {worst.noise_multiplier:.3g} to {worst.noise_multiplier_most:.3g}"
    assert sum(told in line for line in lines) == 1
    assert "each at epsilon 0." in worst.expect
    assert " to 0." in worst.expect
    assert len([line for line in lines if line.startswith("table: ")]) == 1
    assert table.epsilon_after == pytest.approx(seen.epsilon)


def test_rounds_that_differ_in_more_than_numbers_say_in_how_many_each_holds():
    told = ["noise ± 9: usable", "noise ± 1,000: clear", "noise ± 2.5: clear"]

    together = _together(told)

    assert together == (
        "in 1 of 3 rounds noise ± 9: usable; in 2 of 3 rounds noise ± 2.5 to 1,000: clear"
    )


def test_made_up_sums_count_the_declared_users_in_every_table(tmp_path: Path):
    plan = plan_of(
        config_in(
            tmp_path, strategy={"name": "marginals"}, population={"num_users": 600, "delta": 1e-6}
        )
    )
    grids = (Grid(0, np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1])), Grid.whole(1, 2))
    tables = Histograms.balanced([grids, (grids[1],)])

    found = tables.measured(
        made_up(plan, tables.query("pairs", noise_multiplier=1.0, max_norm=1.0))
    )

    assert found[0].counts == pytest.approx(np.array([[90, 90], [210, 210]]))
    assert found[1].counts == pytest.approx(np.array([300, 300]))


def voting_in(folder: Path, **population: Any) -> RunConfig:
    strategy = {"name": "private_evolution", "num_candidates": 60, "max_norm": 4.0, "lookahead": 0}
    return config_in(
        folder,
        population={"num_users": 20_000, "delta": 1e-7, **population},
        unit={"max_records": 10},
        strategy=strategy,
    )


def test_more_records_of_typical_users_are_expected_to_be_heard_better(tmp_path: Path):
    few = outlook(voting_in(tmp_path))
    many = outlook(voting_in(tmp_path, typical_records=[2, 5, 40]))
    as_used = outlook(voting_in(tmp_path, typical_records=[2, 5, 10]))

    (told,), (told_few,) = (
        [step.expect for step in seen.steps if step.query == "votes"] for seen in (many, few)
    )
    assert "each of 60 candidates has" in told
    assert float(told.split("has ")[1].split()[0]) > 1.5 * float(
        told_few.split("has ")[1].split()[0]
    )
    assert many.steps == as_used.steps  # of forty records ten are used
    assert "max_norm = 1 would hear" in many.proposal
    assert ("Propose", many.proposal) in lines_of(many)


@pytest.mark.parametrize(
    ("wrong", "where"), [({"typical_records": 0}, "typical_records"), ({"alike": 2}, "alike")]
)
def test_users_that_cannot_be_are_refused_by_name(tmp_path: Path, wrong: Any, where: str):
    with pytest.raises(ConfigError, match=where):
        voting_in(tmp_path, **wrong)


def test_a_plan_says_what_its_model_is_asked_and_where(tmp_path: Path):
    seen = outlook(voting_in(tmp_path))

    assert seen.model is not None
    assert (seen.model.name, seen.model.num_candidates, seen.model.sends_to) == ("table", 360, "")
    assert seen.to_json()["model"]["fingerprint"] == seen.model.fingerprint
    assert dict(lines_of(seen))["Model"] == (
        f"at most 360 candidates by table ({seen.model.fingerprint[:12]}); made here and sent"
        " nowhere"
    )
    assert outlook(config_in(tmp_path)).model is None


def test_a_plan_says_to_whom_candidates_go_and_what_that_costs(tmp_path: Path):
    endpoint = {"base_url": "https://models.example/v1", "model": "large"}
    prices = {"price_in": 2.0, "price_out": 8.0, "max_cost": 5.0}
    config = config_in(
        tmp_path,
        population={"num_users": 20_000, "delta": 1e-7},
        data={"schema": "texts.toml"},
        strategy={
            "name": "private_evolution",
            "num_candidates": 60,
            "embedder": "word_hashes",
            "model_settings": {
                "about": "notes",
                "language": "endpoint",
                "language_settings": endpoint | prices,
            },
        },
    )
    (tmp_path / "texts.toml").write_text('[columns.note]\ntype = "text"\nmax_bytes = 100\n')

    seen = outlook(config)

    told = dict(lines_of(seen))["Model"]
    assert seen.model is not None
    assert seen.model.estimate.cost > 0
    assert f"a cost of about {seen.model.estimate.cost:,.3g}" in told
    assert "at most 360 candidates by writer" in told
    assert "sent to https://models.example/v1" in told
    assert f"about {seen.model.estimate.tokens_in:,.3g} tokens in" in told

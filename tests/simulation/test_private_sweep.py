# SPDX-License-Identifier: Apache-2.0
"""A private sweep is charged once and whole, shows its best try alone, and tells nothing else."""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.dp_event import GaussianDpEvent
from fedsynth.core import accounting
from fedsynth.core.card import Card
from fedsynth.core.config import parse_config
from fedsynth.core.errors import (
    BudgetExceeded,
    ConfigError,
    FedsynthError,
    Interrupted,
    SecurityRefusal,
)
from fedsynth.core.failpoints import VARIABLE
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.selection import Tries
from fedsynth.server.audit_trail import check_trail
from fedsynth.server.chain import Chain
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import unfinished
from fedsynth.server.release import Release, verify
from fedsynth.server.release import _paid as paid
from fedsynth.server.statement import statement
from fedsynth.simulation import private_sweep as module
from fedsynth.simulation.cli import app
from fedsynth.simulation.faults import made_up_population, small_run
from fedsynth.simulation.private_sweep import planned, private_sweep, resumed
from typer.testing import CliRunner

GRID = {"strategy.max_norm": [1.0, 1.5]}
DRAWN = (0, 1, 0)


def config_in(folder, **changes):
    config = small_run(folder, table_strategy={"name": "independent"})
    data = config.model_dump(mode="json", by_alias=True)
    return parse_config(data | changes, base=folder, where="test")


def done(sweep):
    return private_sweep(
        sweep, stream=OsKeyStream(), data=made_up_population(sweep.tries[0].schema)
    )


def ledger_of(sweep):
    return Ledger(sweep.config.path(sweep.config.ledger))


@pytest.fixture
def three_tries(monkeypatch):
    """Draws that are known, and how often there were any."""
    asked = []

    def drawn(num_settings, **law):
        asked.append(law)
        return DRAWN

    monkeypatch.setattr(module, "drawn_settings", drawn)
    return asked


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing went wrong with, and its release."""
    sweep = planned(config_in(tmp_path_factory.mktemp("whole")), GRID)
    return sweep, done(sweep)


def test_the_budget_holds_the_whole_sweep_and_each_try_has_less(tmp_path):
    config = config_in(tmp_path)

    sweep = planned(config, GRID, mean=6)

    budget = config.run_budget
    tries = [accounting.epsilon_of(plan.event, budget.delta) for plan in sweep.tries]
    assert 0.99 * budget.epsilon < sweep.epsilon <= budget.epsilon
    assert max(tries) < 0.7 * sweep.epsilon
    assert sweep.event.mean == 6
    assert all(sweep.event.holds(accounting.leaves(plan.event)) for plan in sweep.tries)


def test_the_price_of_a_golden_sweep(tmp_path):
    """One sum of mu 1/2, ten tries: 3.64 at 1e-5 by Papernot and Steinke (2022), theorem 2."""
    config = config_in(tmp_path, budget={"epsilon": 3.639, "delta": 1e-5})

    sweep = planned(config, {"strategy.max_norm": [1.0]}, mean=10)

    assert accounting.mu_of(sweep.tries[0].event) == pytest.approx(0.5, rel=1e-3)


def test_a_sweep_is_charged_whole_and_once_and_its_best_try_costs_nothing_more(whole):
    sweep, release = whole

    with ledger_of(sweep) as ledger:
        (population,) = ledger.populations()
        runs = ledger.runs()
        rows = statement(ledger, population.name)
        wrong = [problem for run in runs for problem in check_trail(ledger, run.run)]
        ledger.verify()

    assert population.epsilon == pytest.approx(sweep.epsilon)
    assert accounting.parts(population.spent) == accounting.parts(sweep.event)
    assert [run.run for run in runs] == [sweep.run, release.name]
    assert {run.state for run in runs} == {"finished"}
    assert [row.total for row in rows] == pytest.approx([sweep.epsilon] * 2)
    assert rows[1].epsilon == 0
    assert wrong == []


def test_the_release_is_the_best_try_at_the_price_of_the_sweep(whole):
    sweep, folder = whole

    checks = verify(folder, replay=True)

    card = Release.open(folder).card
    assert [check for check in checks if not check.ok] == []
    assert card.epsilon == pytest.approx(sweep.epsilon)
    assert card.settings["max_norm"] in GRID["strategy.max_norm"]
    assert card.selection["grid"] == GRID
    page = (folder / "card.md").read_text()
    assert "price of the whole sweep" in page
    assert "Whoever saw the run itself saw all tries" in page


def test_afterwards_nothing_but_the_winner_is_left(whole):
    sweep, release = whole
    config = sweep.config
    folder = config.path(config.release.path)

    assert [path.name for path in folder.iterdir()] == [release.name]
    inside = b"".join(path.read_bytes() for path in release.rglob("*") if path.is_file())
    assert sweep.salt.encode() not in inside
    names = {path.name.split(".")[0] for path in folder.parent.iterdir()}
    assert names == {"ledger", "releases", "schema"}


def test_the_times_of_the_release_tell_nothing_of_when_the_sweep_began(whole):
    sweep, folder = whole

    entries = Release.open(folder).transcript.entries
    with ledger_of(sweep) as ledger:
        begun = ledger.entries(sweep.run)[0]

    assert begun.time < entries[0].time
    assert begun.time not in (folder / "transcript.jsonl").read_text()
    assert re.fullmatch("sweep-[0-9a-f]{16}", sweep.run)  # where a run's name has its date
    assert "salt" in begun.data["facts"]


def test_the_best_is_the_try_of_the_highest_noisy_score(tmp_path, three_tries, monkeypatch):
    scores = []
    key = module._key
    monkeypatch.setattr(
        module, "_key", lambda place: scores.append((key(place), place)) or key(place)
    )
    sweep = planned(config_in(tmp_path), GRID)

    folder = done(sweep)

    (best, _), place = max(scores, key=lambda entry: entry[0])
    setting = DRAWN[int(place.name)]
    card = Release.open(folder).card
    transcript = Release.open(folder).transcript
    sealed = [entry for entry in transcript.entries if entry.kind == "seal"][-1]
    assert len({path for _, path in scores}) == 3
    assert card.settings["max_norm"] == GRID["strategy.max_norm"][setting]
    assert float(transcript.sums[sealed.round][0]) * sealed.data["unit"] == best


def test_tries_wait_in_a_folder_for_the_owner_alone_and_losers_go_at_once(
    tmp_path, three_tries, monkeypatch
):
    sweep, seen = planned(config_in(tmp_path), GRID), []
    forget = module._forget_losers

    def watched(folder):
        forget(folder)
        seen.append([len(list(place.iterdir())) for place in sorted((folder / "tries").iterdir())])
        modes = [folder, folder / "secret.json", folder / "sweep.json", folder / "tries"]
        assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in modes)

    monkeypatch.setattr(module, "_forget_losers", watched)
    done(sweep)

    assert [sum(count > 1 for count in counts) for counts in seen] == [1, 1, 1]
    assert [len(counts) for counts in seen] == [1, 2, 3]


def test_no_log_counts_tries(tmp_path, three_tries, caplog):
    caplog.set_level(logging.INFO, logger="fedsynth")

    done(planned(config_in(tmp_path), GRID))

    assert caplog.records == []


# the first commit is the sweep's, the next three are its tries', the fifth is the winner's
POINTS = ["after-commit", "after-secret", "after-done:2", "after-choice", "after-seal:8"]
MORE_POINTS = [
    *("before-commit", "before-secret", "after-draw:2", "before-seal:3", "before-done"),
    *("before-commit:5", "after-commit:5", "after-reserve:7", "after-draw:7", "before-export:4"),
    *("after-export:4", "after-finish:4", "before-finish:5", "before-clearing"),
]


@pytest.mark.parametrize(
    "point", [*POINTS, *(pytest.param(point, marks=pytest.mark.slow) for point in MORE_POINTS)]
)
def test_a_sweep_killed_anywhere_goes_on_is_charged_once_and_draws_once(
    tmp_path, three_tries, point
):
    sweep = planned(config_in(tmp_path), GRID)

    assert killed(sweep, point)
    before = charged(sweep)
    secret = sweep.folder / "secret.json"
    drawn = secret.read_text() if secret.exists() else None
    release = done(resumed(sweep.folder))

    assert before in (0.0, charged(sweep))
    assert charged(sweep) == sweep.epsilon
    assert before == 0.0 or point != "before-commit"
    assert len(three_tries) == (drawn is None)
    with ledger_of(sweep) as ledger:
        runs = ledger.runs()
        wrong = [problem for run in runs for problem in check_trail(ledger, run.run)]
    assert ([run.run for run in runs], wrong) == ([sweep.run, release.name], [])
    assert all(check.ok for check in verify(release, replay=True))
    assert not sweep.folder.exists()


def killed(sweep, point):
    """Do a sweep in a child that kills itself; whether it did."""

    def work():
        os.environ[VARIABLE] = point
        done(sweep)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    return child.exitcode == -signal.SIGKILL


def charged(sweep):
    with ledger_of(sweep) as ledger:
        return sum(population.epsilon for population in ledger.populations())


@pytest.mark.parametrize("damage", ["gone", "cut", "foreign", "empty", "beyond"])
def test_a_secret_that_is_lost_is_never_drawn_again_and_the_price_stays(
    tmp_path, three_tries, damage
):
    sweep = planned(config_in(tmp_path), GRID)
    assert killed(sweep, "before-done:2")
    secret = sweep.folder / "secret.json"
    kept = json.loads(secret.read_text())
    if damage == "gone":
        secret.unlink()
    else:
        changed = {
            "cut": secret.read_text()[:-3],
            "foreign": json.dumps(kept | {"sweep": "another"}),
            "empty": json.dumps(kept | {"drawn": []}),
            "beyond": json.dumps(kept | {"drawn": [2]}),
        }
        secret.write_text(changed[damage])

    with pytest.raises(SecurityRefusal, match="never drawn again"):
        done(resumed(sweep.folder))
    with pytest.raises(ConfigError, match="was closed"):
        done(resumed(sweep.folder))

    assert three_tries == []  # the draw was the child's
    assert not (sweep.folder / "tries").exists()
    assert charged(sweep) == sweep.epsilon
    assert not list(sweep.folder.parent.glob("*/card.json"))


def test_once_the_best_is_on_the_ledger_no_other_draw_and_no_other_best_takes_its_place(tmp_path):
    sweep = planned(config_in(tmp_path), {"strategy.max_norm": [1.0]})
    module_drawn = module.drawn_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "drawn_settings", lambda num, **law: (0,))
        assert killed(sweep, "before-export:2")  # the first is the try's own
    (sweep.folder / "secret.json").unlink()
    shutil.rmtree(sweep.folder / "tries")
    assert module.drawn_settings is module_drawn

    with pytest.raises(SecurityRefusal, match="never drawn again"):
        done(resumed(sweep.folder))

    assert charged(sweep) == sweep.epsilon
    assert not list(sweep.folder.parent.glob("*/card.json"))


def test_a_try_that_was_lost_and_done_again_is_not_mixed_with_what_was_shown_of_the_first(tmp_path):
    sweep = planned(config_in(tmp_path), {"strategy.max_norm": [1.0]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "drawn_settings", lambda num, **law: (0,))
        assert killed(sweep, "before-export:2")
    shutil.rmtree(sweep.folder / "tries" / "000000")

    with pytest.raises(SecurityRefusal, match="not this try's"):
        done(resumed(sweep.folder))

    assert charged(sweep) == sweep.epsilon
    assert not (sweep.folder.parent / sweep.run).exists()
    assert not list(sweep.folder.parent.glob("*/card.json"))


def test_where_every_score_was_lost_nothing_is_released_and_the_price_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "drawn_settings", lambda num, **law: (0,))
    sweep = planned(config_in(tmp_path), GRID)
    assert killed(sweep, "after-draw:2")  # the score's noise

    with pytest.raises(FedsynthError, match="no try has a score"):
        done(resumed(sweep.folder))

    assert not (sweep.folder / "tries").exists()
    assert charged(sweep) == sweep.epsilon
    assert not list(sweep.folder.parent.glob("*/card.json"))


def test_ctrl_c_saves_and_the_printed_folder_goes_on(tmp_path, three_tries, monkeypatch):
    sweep = planned(config_in(tmp_path), GRID)
    real, calls = module.run_local, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "run_local", stopped)
    with pytest.raises(Interrupted, match="sweep --resume") as stop:
        done(sweep)
    with pytest.raises(ConfigError, match="sweep --resume"):
        unfinished(sweep.folder)

    assert "tries" not in str(stop.value)
    assert str(sweep.folder) in str(stop.value)
    assert done(resumed(sweep.folder)).is_dir()
    assert len(three_tries) == 1


def test_a_budget_that_does_not_hold_the_sweep_asks_nobody_and_leaves_nothing(tmp_path):
    first = planned(config_in(tmp_path), GRID, mean=2)
    done(first)
    sweep = planned(config_in(tmp_path, budget={"epsilon": 3.9}), GRID)

    with pytest.raises(BudgetExceeded, match="Nothing was asked"):
        done(sweep)

    assert charged(sweep) == pytest.approx(first.epsilon)
    assert not sweep.folder.exists()


def test_a_setting_that_cannot_begin_is_found_before_anything_is_spent(tmp_path, monkeypatch):
    def broken(self, schema, noise_multiplier, rng):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
        yield

    sweep = planned(config_in(tmp_path), GRID)
    monkeypatch.setattr(type(sweep.tries[1].strategy.inner), "rounds", broken)

    with pytest.raises(ModuleNotFoundError):
        done(sweep)

    assert not (tmp_path / "ledger.db").exists()


@pytest.mark.parametrize(
    ("change", "grid", "said"),
    [
        ({"engine": {"kind": "ray"}}, GRID, "engine.kind = 'local'"),
        ({"engine": {"kind": "superlink"}}, GRID, "sees every try"),
        ({"noise": {"placement": "local"}}, GRID, "noise.placement = 'central' alone"),
        ({"noise": {"placement": "distributed"}}, GRID, "Nothing was asked or spent"),
        ({"noise": {"aggregator": "mine:Own"}}, GRID, "use 'sum'"),
        ({}, {"budget.epsilon": [1, 2]}, "settings of the strategy alone"),
        ({}, {"unit.max_records": [1, 2]}, "settings of the strategy alone"),
        ({}, {}, "name them by --grid"),
        ({}, {"strategy.max_norm": [0.1 * n for n in range(1, 300)]}, "at most 256"),
        ({}, {"strategy.max_norm": [1.0, -1.0]}, "max_norm"),
        ({}, {"strategy.no_such": [1]}, "unknown key"),
    ],
)
def test_what_cannot_be_swept_in_private_is_refused_before_anything_is_asked(
    tmp_path, change, grid, said
):
    with pytest.raises(ConfigError, match=said):
        planned(config_in(tmp_path, **change), grid)

    assert not (tmp_path / "ledger.db").exists()


def test_one_try_on_average_is_no_sweep(tmp_path):
    with pytest.raises(ConfigError, match="more than one try"):
        planned(config_in(tmp_path), GRID, mean=1.0)


# ---- what the ledger and a reader refuse -------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    """A sweep that is open on its ledger, and the facts of its first setting."""
    sweep = planned(config_in(tmp_path), GRID)
    with ledger_of(sweep) as ledger:
        module._start(sweep)
        module._open(sweep, ledger)
        plan = sweep.tries[0]
        told = {
            "grid": {key: list(values) for key, values in GRID.items()},
            "event": accounting.to_json(sweep.event),
        }
        yield sweep, ledger, plan, plan.facts | {"within": sweep.run, "selection": told}


def open_within(sweep, ledger, event, facts, name="winner", population=None):
    ledger.open_run(
        name,
        population or sweep.config.population.name,
        cap=sweep.config.population.cap,
        event=event,
        facts=facts,
    )


def test_nothing_is_reserved_under_a_sweep_itself(opened):
    sweep, ledger, plan, _ = opened
    leaf = next(iter(accounting.leaves(plan.event)))

    with pytest.raises(ConfigError, match="is not a sum"):
        ledger.reserve(sweep.run, 1, 1, query="q", noise_multiplier=leaf[0], sampling_prob=leaf[1])


def test_a_sweep_pays_for_one_run_and_no_second(opened):
    sweep, ledger, plan, facts = opened

    open_within(sweep, ledger, plan.event, facts)
    with pytest.raises(SecurityRefusal, match="have shown no other try"):
        open_within(sweep, ledger, plan.event, facts, name="second")

    assert charged(sweep) == sweep.epsilon
    assert [p for run in ledger.runs() for p in check_trail(ledger, run.run)] == []


@pytest.mark.parametrize("wrong", ["sums", "settings", "sweep", "population", "price", "closed"])
def test_a_sweep_pays_for_none_but_its_own_tries(opened, wrong):
    sweep, ledger, plan, facts = opened
    event, population = plan.event, None
    if wrong == "sums":
        event = accounting.compose([plan.event, plan.event])
    elif wrong == "settings":
        facts = facts | {"settings": {"max_norm": 9.0}}
    elif wrong == "sweep":
        facts = facts | {"within": "another"}
    elif wrong == "population":
        population = "others"
    elif wrong == "price":
        cheap = accounting.select([plan.event], mean=1.1, law=Tries.LOGARITHMIC)
        told = facts["selection"] | {"event": accounting.to_json(cheap)}
        facts = facts | {"selection": told}
    else:
        ledger.close(sweep.run)

    with pytest.raises(SecurityRefusal, match="Nothing was written"):
        open_within(sweep, ledger, event, facts, population=population)

    assert charged(sweep) == sweep.epsilon
    assert len(ledger.runs()) == 1


@pytest.mark.parametrize("wrong", ["second", "sums", "settings", "price"])
def test_an_entry_put_past_the_rules_is_charged_and_the_checker_finds_it(opened, wrong):
    sweep, ledger, plan, facts = opened
    body = {"plan": accounting.to_json(plan.event), "facts": facts}
    if wrong == "sums":
        body["plan"] = accounting.to_json(accounting.compose([plan.event, plan.event]))
    elif wrong == "settings":
        body["facts"] = facts | {"noise_multiplier": 0.1}
    elif wrong == "price":
        body["facts"] = facts | {"selection": {}}
    else:
        open_within(sweep, ledger, plan.event, facts)
    chain = Chain(ledger.path)
    with chain.writing():
        chain.append("open", sweep.config.population.name, "winner-2", data=body)
    chain.disconnect()

    problems = check_trail(ledger, "winner-2")

    assert any("sweep" in problem for problem in problems)
    assert charged(sweep) > sweep.epsilon


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        ({"selection": {}}, "differ in the sweep"),
        ({"selection": {}, "epsilon": 0.5}, "claims epsilon 0.5"),
        ({"epsilon": 0.5}, "claims epsilon 0.5"),
        ({"settings": {"max_norm": 1.2}}, "differ in: settings"),
    ],
)
def test_a_winner_that_claims_something_else_is_found(whole, tmp_path, forgery, said):
    folder = copied(whole[1], tmp_path)

    forged(folder, forgery)

    assert said in failures(folder)


def test_a_winner_of_a_cheaper_sweep_is_found(whole, tmp_path):
    folder = copied(whole[1], tmp_path)
    card = Release.open(folder).card
    cheap = accounting.select([accounting.from_json(card.event)], mean=1.01, law=Tries.LOGARITHMIC)
    epsilon = accounting.epsilon_of(cheap, card.delta)

    told = card.selection | {"event": accounting.to_json(cheap)}
    forged(folder, {"selection": told, "epsilon": epsilon, "rdp_epsilon": epsilon})

    assert "differ in the sweep" in failures(folder)


def test_a_run_whose_sums_no_try_has_is_not_paid_for_by_what_its_card_says(whole):
    card = Release.open(whole[1]).card
    plan = accounting.from_json(card.event)
    other = accounting.select([GaussianDpEvent(9.0)], mean=2, law=Tries.LOGARITHMIC)
    twice = accounting.compose([accounting.from_json(card.selection["event"])] * 2)

    assert paid(card, plan) == accounting.from_json(card.selection["event"])
    for event in (other, twice, plan):
        told = card.selection | {"event": accounting.to_json(event)}
        with pytest.raises(FedsynthError):
            paid(replace(card, selection=told), plan)


@pytest.mark.parametrize("told", [{"grid": {}}, {"grid": {"a": 1}, "event": []}, {"event": 3}])
def test_a_card_with_no_sweep_in_its_selection_is_no_card(whole, tmp_path, told):
    folder = copied(whole[1], tmp_path)
    data = json.loads((folder / "card.json").read_text())

    with pytest.raises(FedsynthError, match="not a card"):
        Card.from_json(data | {"selection": told})


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def forged(folder, facts):
    """Claim something else on the card, with all hashes made to fit."""
    data = json.loads((folder / "card.json").read_text())
    card = Card.from_json(data | facts)
    (folder / "card.json").write_text(card.to_text())
    (folder / "card.md").write_text(card.to_markdown())
    names = sorted([file.name for file in card.files] + ["card.json", "card.md"])
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def failures(folder):
    return " ".join(check.detail for check in verify(folder) if not check.ok)


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path):
    """A run file and its records, as a person has them."""
    config = config_in(tmp_path)
    shard = made_up_population(planned(config, GRID).tries[0].schema)
    schema = planned(config, GRID).tries[0].schema
    lines = [",".join(["id", *schema.names])]
    for codes, user in zip(shard.records.codes, shard.user_ids, strict=True):
        values = [
            column.categories[code % len(column.categories)]
            if column.categories
            else f"{(column.bounds or (0,))[0]}"
            for column, code in zip(schema.columns, codes, strict=True)
        ]
        lines.append(",".join([str(user), *values]))
    (tmp_path / "people.csv").write_text("\n".join(lines))
    (tmp_path / "run.toml").write_text(
        '[population]\nname = "people"\nnum_users = 90\nepsilon = 4.0\ndelta = 1e-3\n'
        '[data]\nschema = "schema.json"\npath = "people.csv"\n'
        '[unit]\ncolumn = "id"\nmax_records = 2\n[budget]\nepsilon = 4.0\n'
        '[strategy]\nname = "independent"\n[engine]\nclients = 3\n[release]\nnum_records = 50\n'
    )
    return tmp_path / "run.toml"


def told(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def test_the_command_tells_the_price_and_spends_nothing(run_file):
    said = told(run_file, "--private", "--price", "--grid", "strategy.max_norm=1,1.5")

    assert said.exit_code == 0, said.output
    assert "epsilon 4 at delta 0.001, the whole sweep" in said.output
    assert "Nothing has been read or spent" in said.output
    assert not (run_file.parent / "ledger.db").exists()


def test_the_command_sweeps_and_shows_the_best_alone(run_file):
    said = told(
        run_file, "--private", "--tries", 2, "--grid", "strategy.max_norm=1,1.5", "--format", "json"
    )

    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert found["settings"]["max_norm"] in (1.0, 1.5)
    assert found["epsilon"] <= 4.0
    assert not any("tries" in key for key in found)


def test_the_command_goes_on_with_a_sweep_that_was_stopped(run_file, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_local", stopped)
        said = told(run_file, "--private", "--grid", "strategy.max_norm=1,1.5")
    (folder,) = (run_file.parent / "releases").glob("*.unfinished")
    again = told("--resume", folder)

    assert said.exit_code == Interrupted.exit_code
    assert folder.name in said.output.replace("\n", "")
    assert again.exit_code == 0, again.output
    assert "Best: strategy.max_norm" in again.output
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--private", "--seeds", "2"], ["--tries", "4"], ["--price"], ["--resume", "none"]],
)
def test_arguments_that_do_not_go_together_are_refused(run_file, arguments):
    said = told(run_file, *arguments, "--grid", "strategy.max_norm=1,1.5")

    assert said.exit_code == ConfigError.exit_code

# SPDX-License-Identifier: Apache-2.0
"""The command line: each command's facts, each error's message and exit code."""

import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedsynth.core.errors import FedsynthError
from fedsynth.simulation import cli
from typer.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    *("--user", "patient_id", "--num-users", "200", "--bounds", "age=0,120"),
    *("--categories", "sex=F,M", "--categories", "ward=A,B,C"),
]
Command = Callable[..., Result]


@pytest.fixture
def fedsynth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, run in an empty folder with a small table."""
    monkeypatch.chdir(tmp_path)
    write_patients(tmp_path / "patients.csv")
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run was done, to be copied and not changed."""
    folder = tmp_path_factory.mktemp("finished")
    write_patients(folder / "patients.csv")
    draft_run(folder)
    result = in_process(folder, "run", "run.toml", "--format", "json")
    assert result.returncode == 0, result.stderr
    return folder


def write_patients(path: Path) -> None:
    rng = random.Random(1)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["patient_id", "age", "sex", "ward"])
        for _ in range(600):
            ward = rng.choice("ABC")
            age = rng.randint(0, 40) + 20 * "ABC".index(ward)
            rows.writerow([f"p{rng.randint(1, 300)}", age, rng.choice("FM"), ward])


def draft_run(folder: Path) -> None:
    """A filled draft for a method that is quick."""
    result = in_process(folder, "init", "patients.csv", *OPTIONS)
    assert result.returncode == 0, result.stderr
    run = folder / "run.toml"
    text = run.read_text(encoding="utf-8").replace('name = "marginals"', 'name = "independent"')
    run.write_text(text.replace("num_records = 10000", "num_records = 500"), encoding="utf-8")


def in_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a person starts it."""
    with started(folder, *arguments) as process:
        stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    program = "from fedsynth.simulation.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test that runs in the background inherits a Ctrl-C that is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def the_release(folder: Path) -> Path:
    (release,) = (folder / "releases").iterdir()
    return release


def facts(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_names_every_command_and_takes_little_more_than_its_terminal_library():
    def work_of(start) -> tuple[float, Any]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = start()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, result

    library = [sys.executable, "-c", "import typer.rich_utils, rich.markdown, typer.main"]
    alone = max(work_of(lambda: subprocess.run(library, check=True))[0] for _ in range(2))
    work, result = work_of(lambda: in_process(ROOT, "--help"))

    for command in ("init", "plan", "run", "sweep", "sample", "verify", "ledger", "check"):
        assert f" {command} " in result.stdout
    assert work < 2 * alone  # with the accountants it would be many times


def test_the_version_is_the_package_s(fedsynth: Command):
    import fedsynth as package

    assert fedsynth("--version").stdout == f"{package.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "--nonsense"], ["sample"]])
def test_wrong_usage_exits_2(fedsynth: Command, arguments: list[str]):
    assert fedsynth(*arguments).exit_code == 2


def test_init_writes_a_draft_and_names_what_it_lacks(fedsynth: Command, tmp_path: Path):
    found = facts(fedsynth("init", "patients.csv", "--user", "patient_id", "--format", "json"))

    assert (tmp_path / "run.toml").exists()
    assert any("population.num_users" in hole for hole in found["holes"])


def test_init_does_not_overwrite(fedsynth: Command, tmp_path: Path):
    (tmp_path / "run.toml").write_text("mine", encoding="utf-8")

    refused = fedsynth("init", "patients.csv")

    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "run.toml").read_text(encoding="utf-8") == "mine"


def test_categories_come_from_a_file_too(fedsynth: Command, tmp_path: Path):
    (tmp_path / "wards.txt").write_text("A\nB\n\nC, closed\n", encoding="utf-8")

    fedsynth("init", "patients.csv", "--categories", "ward=wards.txt")

    text = (tmp_path / "schema.toml").read_text(encoding="utf-8")
    assert 'categories = ["A", "B", "C, closed"]' in text


@pytest.mark.parametrize("bounds", ["age", "age=", "age=5", "age=9,1", "age=0,nan", "age=a,b"])
def test_bounds_that_mean_nothing_are_refused(fedsynth: Command, bounds: str):
    result = fedsynth("init", "patients.csv", "--bounds", bounds)

    assert result.exit_code == 2
    assert "error: --bounds" in result.stderr


def test_a_draft_with_holes_is_refused_by_plan_and_by_run(fedsynth: Command):
    fedsynth("init", "patients.csv", "--user", "patient_id")

    for command in ("plan", "run"):
        refused = fedsynth(command, "run.toml")

        assert refused.exit_code == 2
        assert "schema.toml: columns.age.bounds" in refused.stderr


def test_plan_prints_the_promise_and_reads_nothing(fedsynth: Command, tmp_path: Path):
    fedsynth("init", "patients.csv", *OPTIONS)
    (tmp_path / "patients.csv").unlink()

    result = fedsynth("plan", "run.toml")

    assert result.exit_code == 0, result.output
    assert "for each user of patient_id" in result.stdout
    assert "Nothing has been read or spent." in result.stdout
    assert not (tmp_path / "ledger.db").exists()


def test_plan_gives_the_same_facts_to_programs(fedsynth: Command):
    fedsynth("init", "patients.csv", *OPTIONS)

    found = facts(fedsynth("plan", "run.toml", "--format", "json"))

    assert found["fits"]
    assert found["epsilon"] <= 1.0
    assert found["num_rounds"] == sum(step["num_rounds"] for step in found["steps"])


def test_a_plan_above_the_budget_exits_4(fedsynth: Command, tmp_path: Path):
    fedsynth("init", "patients.csv", *OPTIONS)
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(text.replace("epsilon = 4 ", "epsilon = 0.5 "))

    refused = fedsynth("plan", "run.toml")

    assert refused.exit_code == 4
    assert "Nothing was asked" in refused.stderr


def test_an_unknown_key_gets_a_hint(fedsynth: Command, tmp_path: Path):
    fedsynth("init", "patients.csv", *OPTIONS)
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(text.replace("[strategy]", "[startegy]"))

    refused = fedsynth("plan", "run.toml")

    assert refused.exit_code == 2
    line = text.splitlines().index("[strategy]") + 1
    assert f"run.toml, line {line}: unknown key 'startegy'" in refused.stderr
    assert "did you mean 'strategy'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("clients = 10", "cleints = 10", "unknown key 'engine.cleints'"),
        ("clients = 10", 'clients = "ten"', "engine.clients = 'ten'"),
        ("num_users = 200", "num_users = 0", "population.num_users = 0"),
    ],
)
def test_an_error_names_the_line(
    fedsynth: Command, tmp_path: Path, before: str, after: str, said: str
):
    fedsynth("init", "patients.csv", *OPTIONS)
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    (line,) = (n for n, each in enumerate(text.splitlines(), 1) if each.startswith(before))
    (tmp_path / "run.toml").write_text(text.replace(before, after), encoding="utf-8")

    refused = fedsynth("plan", "run.toml")

    assert refused.exit_code == 2
    assert f"error: run.toml, line {line}: {said}" in refused.stderr


def test_a_promise_that_means_nothing_is_refused_in_its_section(fedsynth: Command, tmp_path: Path):
    fedsynth("init", "patients.csv", *OPTIONS)
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(text.replace("delta = 1e-06", "delta = 0.02"))

    refused = fedsynth("plan", "run.toml")

    assert refused.exit_code == 2
    assert "[population] privacy delta = 0.02 is too weak for 200 users" in refused.stderr


def test_a_missing_file_is_an_error_and_not_a_traceback(fedsynth: Command):
    for command in (["plan", "gone.toml"], ["run", "gone.toml"], ["init", "gone.csv"]):
        result = fedsynth(*command)

        assert result.exit_code in (2, 3)
        assert result.stderr.startswith("error: ")


def test_an_error_for_programs_is_json_with_its_code(fedsynth: Command):
    result = fedsynth("plan", "gone.toml", "--format", "json")

    assert json.loads(result.stdout)["exit_code"] == result.exit_code == 2


def test_run_prints_quality_promise_and_place(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "again")

    result = in_process(tmp_path / "again", "run", "run.toml")

    assert result.returncode == 0, result.stderr
    for said in ("Site only", "1-way total variation", "Promise", "releases/", "fedsynth verify"):
        assert said in result.stdout


def test_run_says_on_site_which_values_it_could_not_read(fedsynth: Command, tmp_path: Path):
    draft_run(tmp_path)
    patients = tmp_path / "patients.csv"
    patients.write_text(patients.read_text().replace(",A\n", ",Ward A\n"))

    result = in_process(tmp_path, "run", "run.toml")

    assert result.returncode == 0, result.stderr
    said = r"Site only: column 'ward': 3\d\.\d\d% of the values count as missing, being not one of"
    assert re.search(said, result.stdout)


def test_run_says_on_site_where_there_are_fewer_users_than_declared(
    fedsynth: Command, tmp_path: Path
):
    draft_run(tmp_path)
    run = tmp_path / "run.toml"
    declared = re.sub(r"num_users = \d+", "num_users = 30000", run.read_text(encoding="utf-8"))
    run.write_text(declared, encoding="utf-8")

    result = in_process(tmp_path, "run", "run.toml")

    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert re.search(r"Site only: fewer users than declared: 2\d\d, and population.num_users", said)
    card = next((tmp_path / "releases").glob("*/card.json")).read_text(encoding="utf-8")
    assert "fewer users" not in card


def test_run_is_silent_about_users_where_there_are_as_many_as_declared(
    fedsynth: Command, tmp_path: Path
):
    draft_run(tmp_path)
    run = tmp_path / "run.toml"
    declared = re.sub(r"num_users = \d+", "num_users = 200", run.read_text(encoding="utf-8"))
    run.write_text(declared, encoding="utf-8")

    result = in_process(tmp_path, "run", "run.toml")

    assert result.returncode == 0, result.stderr
    assert "fewer users" not in result.stdout


def test_run_for_programs_prints_one_object(fedsynth: Command, tmp_path: Path):
    draft_run(tmp_path)

    found = facts(fedsynth("run", "run.toml", "--format", "json"))

    assert Path(found["release"], "card.json").exists()
    assert found["epsilon"] <= 1.0
    assert 0 <= found["site_only"]["total_variation"]["1"] < 0.5


def test_run_takes_a_file_or_a_run_to_resume(fedsynth: Command):
    assert fedsynth("run").exit_code == 2
    assert fedsynth("run", "run.toml", "--resume", "x").exit_code == 2


SLOW = """
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsynth.core import accounting
from fedsynth.core.query import Contribution, Query, Strategy
from fedsynth.strategies.independent import Columns


@dataclass(frozen=True)
class Slow(Strategy):
    name: ClassVar[str] = "slow"

    def event(self, schema, noise_multiplier):
        return accounting.event_of({(noise_multiplier * 5**0.5, 1.0): 5})

    def rounds(self, schema, noise_multiplier, rng):
        for number in range(5):
            time.sleep(0.4)
            yield Query(f"q{number}", schema.num_cells, 1.0, noise_multiplier * 5**0.5, cells=True)
        return Columns(schema, tuple(np.full(n, 1 / n) for n in schema.shape))

    def answer(self, query, shard, rng):
        return Contribution.cells(
            shard.records.codes[:, :1], shard.user_index, num_users=shard.num_users
        )
"""


def test_ctrl_c_saves_and_the_printed_command_goes_on(tmp_path: Path):
    write_patients(tmp_path / "patients.csv")
    draft_run(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(text.replace('"independent"', '"slow:Slow"'))

    with started(tmp_path, "run", "run.toml") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "2/5" in line:
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate(timeout=60)
    (command,) = re.findall(r"fedsynth (run --resume \S+)", said)
    resumed = in_process(tmp_path, *command.split())

    assert process.returncode == 7, said
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("from the ledger") in (2, 3)  # the rounds that were done before
    book = in_process(tmp_path, "ledger", "--format", "json")
    (population,) = json.loads(book.stdout)["populations"]
    assert [row["state"] for row in population["rows"]] == ["released"] * 5
    assert population["spent"] <= 1.0


def test_verify_finds_a_release_whole(finished: Path, fedsynth: Command):
    found = facts(fedsynth("verify", str(the_release(finished)), "--format", "json"))

    assert found["ok"]
    assert all(check["ok"] for check in found["checks"])


def test_verify_exits_5_on_a_changed_file(finished: Path, fedsynth: Command, tmp_path: Path):
    release = tmp_path / "copy"
    shutil.copytree(the_release(finished), release)
    path = release / "data" / "synthetic.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    result = fedsynth("verify", str(release))

    assert result.exit_code == 5
    assert "✗" in result.stdout


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_sample_writes_as_many_records_as_asked(finished: Path, fedsynth: Command, ending: str):
    path = Path(f"more.{ending}")

    found = facts(
        fedsynth(
            *("sample", str(the_release(finished)), "-n", "70", "-o", str(path), "--seed", "3"),
            *("--format", "json"),
        )
    )

    import pandas as pd

    read = {"parquet": pd.read_parquet, "csv": pd.read_csv, "jsonl": _read_lines}[ending]
    assert found["num_records"] == len(read(path)) == 70
    assert set(read(path).columns) == {"age", "sex", "ward"}


def _read_lines(path: Path) -> Any:
    import pandas as pd

    return pd.read_json(path, lines=True)


def test_sample_with_a_seed_repeats_and_without_differs(finished: Path, fedsynth: Command):
    release = str(the_release(finished))
    for name in ("a", "b"):
        fedsynth("sample", release, "-n", "50", "-o", f"{name}.csv", "--seed", "3")
    for name in ("c", "d"):
        fedsynth("sample", release, "-n", "50", "-o", f"{name}.csv")

    read = {name: Path(f"{name}.csv").read_text(encoding="utf-8") for name in "abcd"}

    assert read["a"] == read["b"]
    assert len(set(read.values())) == 3


def test_sample_refuses_before_it_draws(finished: Path, fedsynth: Command, tmp_path: Path):
    release = str(the_release(finished))
    (tmp_path / "there.csv").write_text("mine", encoding="utf-8")

    assert fedsynth("sample", release, "-o", "x.xlsx").exit_code == 2
    assert fedsynth("sample", release, "-o", "there.csv").exit_code == 2
    assert (tmp_path / "there.csv").read_text(encoding="utf-8") == "mine"


def test_ledger_adds_up_to_what_the_plan_says_is_spent(finished: Path, fedsynth: Command):
    book = facts(fedsynth("ledger", str(finished / "run.toml"), "--format", "json"))
    after = facts(fedsynth("plan", str(finished / "run.toml"), "--format", "json"))

    (population,) = book["populations"]

    assert population["name"] == "patients"
    assert population["rows"][-1]["total"] == pytest.approx(population["spent"])
    assert after["spent"] == pytest.approx(population["spent"])


def test_ledger_for_a_person_shows_each_query(finished: Path, fedsynth: Command):
    result = fedsynth("ledger", str(finished / "ledger.db"))

    assert result.exit_code == 0, result.output
    assert "of 4.00 spent, for each patient_id" in result.stdout
    assert "round 1" in result.stdout


def test_a_ledger_that_is_not_there_is_not_made(fedsynth: Command, tmp_path: Path):
    assert fedsynth("ledger").exit_code == 2
    assert not (tmp_path / "ledger.db").exists()


def test_check_passes_a_built_in_method(fedsynth: Command):
    found = facts(fedsynth("check", "independent", "--format", "json"))

    assert found["ok"]
    assert len(found["findings"]) > 3


def test_check_says_which_settings_there_are(fedsynth: Command):
    result = fedsynth("check", "independent", "--setting", "max_nrom=2")

    assert result.exit_code == 2
    assert "did you mean 'max_norm'" in result.stderr


def test_client_check_shows_an_owner_what_a_server_would_meet(fedsynth: Command, tmp_path: Path):
    fedsynth("init", "patients.csv", *OPTIONS)
    (tmp_path / "policy.toml").write_text(
        'max_epsilon = 4.0\ndelta = 1e-6\nuser_column = "patient_id"\nmax_records = 1\n'
        'relation = "add-or-remove"\nmax_clients = 1\nmin_users = 10\n'
        '[allow]\npopulations = ["p"]\nstrategies = ["mst"]\nplacements = ["local"]\n',
        encoding="utf-8",
    )

    found = facts(fedsynth("client", "check", str(tmp_path), "--format", "json"))

    assert found["refuses"] == []
    assert found["num_records"] == 600
    assert found["num_kept"] == found["num_users"] < 300


def test_client_check_without_a_policy_says_that_all_is_refused(fedsynth: Command, tmp_path: Path):
    fedsynth("init", "patients.csv", *OPTIONS)

    result = fedsynth("client", "check", str(tmp_path / "patients.csv"), "--user", "patient_id")

    assert result.exit_code == 0, result.output
    assert "refuses every request" in result.stdout


def test_every_kind_of_error_has_its_exit_code():
    def leaves(kind: type[FedsynthError]) -> set[int]:
        return {kind.exit_code}.union(*map(leaves, kind.__subclasses__()), set())

    assert leaves(FedsynthError) == set(range(1, 8))


def test_an_error_that_nobody_foresaw_exits_70(
    fedsynth: Command, monkeypatch: pytest.MonkeyPatch, finished: Path
):
    import fedsynth.server.statement

    def broken(*_: Any) -> None:
        raise KeyError("a secret value")

    monkeypatch.setattr(fedsynth.server.statement, "statement", broken)
    result = CliRunner().invoke(cli.app, ["ledger", str(finished / "ledger.db")])

    assert result.exit_code == 70
    assert "a bug in fedsynth: KeyError" in result.stderr
    assert "secret" not in result.output


def test_a_traceback_is_shown_only_when_asked_for(tmp_path: Path):
    quiet = in_process(tmp_path, "plan", "gone.toml")
    loud = in_process(tmp_path, "plan", "gone.toml", "--debug")

    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert quiet.returncode == loud.returncode == 2


def test_names_from_a_file_cannot_steer_a_terminal(fedsynth: Command, tmp_path: Path):
    (tmp_path / "t.csv").write_text("a\x1b[31mred,b\n1,2\n", encoding="utf-8")

    result = fedsynth("init", "t.csv")

    assert "\x1b" not in result.output


def test_a_populations_budget_is_changed_on_the_ledger(tmp_path: Path):
    from dp_accounting.dp_event import GaussianDpEvent
    from fedsynth.core.privacy import Budget
    from fedsynth.server.ledger import Ledger

    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.open_run("r", "people", cap=Budget(1.0, 1e-6), event=GaussianDpEvent(10.0), facts={})

    raised = CliRunner().invoke(
        cli.app, ["ledger", str(path), "--population", "people", "--set-epsilon", "3"]
    )
    lowered = CliRunner().invoke(
        cli.app, ["ledger", str(path), "--population", "people", "--set-epsilon", "0.1"]
    )

    assert raised.exit_code == 0
    assert "of 3.00 spent" in raised.output
    assert lowered.exit_code == 4
    with Ledger(path) as ledger:
        ledger.verify()
        assert ledger.populations()[0].cap.epsilon == 3.0

# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages in docs tell a reader to do, done."""

import csv
import os
import random
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fedsynth.client.policy import Policy
from fedsynth.core.config import RunConfig
from fedsynth.core.errors import ClientCode
from fedsynth.simulation import cli
from fedsynth.strategies.registry import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
PAGES = [README, *(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, language: str) -> list[str]:
    """The page's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table that the README speaks of and the command `fedsynth`."""
    folder = tmp_path_factory.mktemp("reader")
    rng = random.Random(3)
    with (folder / "patients.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["patient_id", "age", "sex", "ward", "los_days", "email"])
        for i in range(800):
            ward = rng.choice("ABC")
            days = round(rng.expovariate(0.2), 1)
            rows.writerow([f"p{i % 600}", rng.randint(0, 99), rng.choice("FM"), ward, days, "x"])
    (folder / "bin").mkdir()
    command = folder / "bin" / "fedsynth"
    program = "from fedsynth.simulation.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n', encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return folder


def done(reader: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command as the reader gives it, in the reader's folder."""
    environment = {
        **os.environ,
        "PATH": f"{reader / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command,
        cwd=reader,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def followed(reader: Path) -> subprocess.CompletedProcess[str]:
    """What the four commands of the README gave; they leave a schema in the reader's folder."""
    (commands,) = (b for b in blocks(README, "sh") if "fedsynth init" in b)
    assert len([line for line in commands.splitlines() if line.startswith("fedsynth ")]) == 4
    return done(reader, "sh", "-eu", "-c", commands)


def test_the_four_commands_make_and_verify_a_release(
    followed: subprocess.CompletedProcess[str],
):
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "epsilon recomputed from the events: 1.0000" in followed.stdout
    assert "✗" not in followed.stdout


@pytest.mark.usefixtures("followed")
def test_the_python_lines_make_a_release_too(reader: Path):
    (program,) = blocks(README, "python")

    result = done(reader, sys.executable, "-c", program)

    assert result.returncode == 0, result.stderr
    folder, epsilon = result.stdout.split()
    assert Path(reader, folder, "card.json").exists()
    assert 0.99 < float(epsilon) <= 1.0
    assert len(program.splitlines()) <= 12


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))

    named = {w for page in PAGES for w in re.findall(r"(?:^|`)make ([a-z]+)", page, re.M)}

    assert {"demo", "test", "bench"} <= named <= targets


def test_every_command_that_is_named_exists():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}

    named = {w for page in PAGES for w in re.findall(r"(?:^|`)fedsynth ([a-z]+)", page, re.M)}

    assert {"init", "plan", "run", "verify"} <= named
    assert named - {"client"} <= known | {"makes"}  # "fedsynth makes ..." opens a page


def test_every_link_between_pages_leads_somewhere():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_folder_of_examples_that_is_named_exists():
    named = {name for page in PAGES for name in re.findall(r"examples/[\w/.]+\w", page)}

    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_table_of_methods_is_the_registry():
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)

    assert sorted(rows) == sorted(STRATEGIES)


def test_the_engines_that_are_named_are_those_that_a_run_takes():
    engine = RunConfig.model_fields["engine"].annotation
    kinds = set(engine.model_fields["kind"].annotation.__args__)
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    engines = design.split("## Engines")[1].split("\n## ")[0]

    assert set(re.findall(r'`(?:engine\.kind = )?"(\w+)"`', README)) <= kinds
    assert set(re.findall(r"^\| `(\w+)` \|", engines, flags=re.MULTILINE)) == kinds


def test_the_policy_that_is_shown_lacks_nothing(tmp_path: Path):
    (policy,) = (b for b in blocks(DEPLOYMENT, "toml") if "max_epsilon" in b)
    (tmp_path / "policy.toml").write_text(policy, encoding="utf-8")

    assert Policy.read(tmp_path / "policy.toml").missing == []


def test_the_node_configuration_that_is_shown_names_all_paths():
    (node,) = (b for b in blocks(DEPLOYMENT, "toml") if "state =" in b)

    assert set(tomllib.loads(node)) == {"client", "shard", "schema", "policy", "state", "device"}


def test_the_table_of_codes_is_what_clients_say():
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", DEPLOYMENT, flags=re.MULTILINE)

    assert [(int(n), name) for n, name in rows] == [(int(c), c.name) for c in ClientCode if c]
    assert f"one of {len(ClientCode) - 1} fixed codes".replace("13", "thirteen") in README


def test_every_test_that_the_promises_name_exists():
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    found = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)

    for file, name in found:
        text = (ROOT / file).read_text(encoding="utf-8")

        assert not name or f"def {name}(" in text, f"{file}::{name}"
    assert len(found) >= 8

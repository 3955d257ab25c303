# SPDX-License-Identifier: Apache-2.0
"""Fail points kill where they are told to, and do nothing else."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fedsynth.core import failpoints

ROOT = Path(__file__).parents[2]
SCRIPT = """
from fedsynth.core.failpoints import at
for n in range(1, 4):
    at("before-draw")
    print(n, flush=True)
    at("after-draw")
"""


def run(value: str | None) -> tuple[int, str]:
    env = {} if value is None else {failpoints.VARIABLE: value}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout.replace("\n", " ").strip()


@pytest.mark.parametrize(
    ("value", "end", "printed"),
    [
        (None, 0, "1 2 3"),
        ("", 0, "1 2 3"),
        ("before-seal", 0, "1 2 3"),
        ("before-draw:9", 0, "1 2 3"),
        ("before-draw", -signal.SIGKILL, ""),
        ("after-draw", -signal.SIGKILL, "1"),
        ("before-draw:3", -signal.SIGKILL, "1 2"),
    ],
)
def test_a_process_dies_at_the_named_place_and_time_and_nowhere_else(value, end, printed):
    assert run(value) == (end, printed)


def test_every_fail_point_in_the_package_has_a_name_here_and_every_name_is_somewhere():
    found = set()
    for folder in ("core", "client", "server", "simulation", "strategies"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            found |= set(re.findall(r'\bat\("([a-z-]+)"\)', text))
            for step in re.findall(r'\.writing\("([a-z-]+)"\)', text):
                found |= {f"before-{step}", f"after-{step}"}

    assert found == {*failpoints.NAMES, *failpoints.IN_SWEEPS}

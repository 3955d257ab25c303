# SPDX-License-Identifier: Apache-2.0
"""What benchmarks conclude from their figures, and that a benchmark which was cut goes on."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def tabular(benchmark_of):
    return benchmark_of("tabular")


@pytest.fixture(scope="module")
def measure(tabular):
    return importlib.import_module("measure")


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.01], [0.01]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # Holm (1979): 3 x .01; 2 x .03; at least that
        ([0.5, 0.9, 0.02], [1.0, 1.0, 0.06]),
        ([], []),
    ],
)
def test_corrected_p_values_are_those_worked_out_by_hand(tabular, p_values, expected):
    assert tabular.holm(p_values) == pytest.approx(expected)


def test_a_difference_in_every_pair_is_found_where_figures_apart_would_hide_it(tabular):
    rng = np.random.default_rng(0)
    hard = rng.normal(1.0, 0.5, 5)  # seeds differ far more than the two methods do

    assert tabular.paired_p(hard, hard + 0.01 + rng.normal(0, 1e-3, 5)) < 1e-3
    assert tabular.paired_p(hard, hard + rng.normal(0, 1e-3, 5)) > 0.05


def test_figures_without_spread_are_alike_or_not(tabular):
    assert tabular.paired_p([0.1, 0.2], [0.1, 0.2]) == 1.0
    assert tabular.paired_p([0.1, 0.2], [0.3, 0.4]) == 0.0


def test_runs_are_kept_and_read_again_even_where_a_line_was_cut(measure, tmp_path):
    path = tmp_path / "x.runs.jsonl"
    first, second = (measure.Job("adult", "mst", "epsilon=1", seed) for seed in (0, 1))
    runs = measure.Runs(path)
    runs.add(measure.Run(first, {"2-way TVD": 0.04}))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"job": {"table": "adult", "me')  # the process was killed here

    again = measure.Runs(path)
    again.add(measure.Run(second, {"2-way TVD": 0.05}))

    known = measure.Runs(path)
    assert known.has(first)
    assert known.has(second)
    assert known.values("adult", "mst", "epsilon=1", "2-way TVD") == [0.04, 0.05]


def test_what_ran_too_long_is_not_tried_again_and_what_failed_is(measure):
    slow, broken = (measure.Job("adult", name, "epsilon=1", 0) for name in ("aim", "mst"))
    runs = measure.Runs(None)

    runs.add(measure.Run(slow, failed="no result in 900 s"))
    runs.add(measure.Run(broken, failed="NameError: name 'x' is not defined"))

    assert runs.has(slow)
    assert not runs.has(broken)


def test_a_run_without_judges_does_not_stand_for_one_with_them(measure):
    runs = measure.Runs(None)

    runs.add(measure.Run(measure.Job("adult", "mst", "epsilon=1", 0), {"CPU-s": 1.0}))

    assert not runs.has(measure.Job("adult", "mst", "epsilon=1", 0, judge=True))
    assert runs.has(measure.Job("adult", "mst", "epsilon=1", 0))


def test_what_a_policy_came_to_is_measured_once_even_where_a_line_was_cut(tabular, tmp_path):
    preferences, path = importlib.import_module("preferences"), tmp_path / "x.runs.jsonl"
    assert preferences.Kept(path).value("seed 0", lambda: 0.25) == 0.25
    with path.open("a", encoding="utf-8") as file:
        file.write('{"seed 1": 0.')  # the process was killed here

    again = preferences.Kept(path)

    assert again.value("seed 0", lambda: 9.0) == 0.25
    assert again.value("seed 1", lambda: 0.5) == 0.5


def test_figures_become_a_page_and_a_picture(tmp_path):
    docs = Path(__file__).resolve().parent.parent / "docs"
    cases = {
        "mean-of-2-tables marginals epsilon=1": {"2-way TVD": 0.03},
        "mean-of-2-tables marginals epsilon=4": {"2-way TVD": 0.02},
        "adult_coded marginals epsilon=1": {"2-way TVD": 0.029, "CPU-s": 4.8},
        "adult_coded other_mst epsilon=1": {"2-way TVD": 0.054, "CPU-s": 90.0},
    }
    figures = [
        {"benchmark": "tabular", "case": case, "metric": metric, "mean": value, "std": 0.001,
         "n": 5, "unit": "", "peer": "other 1.0" if "other" in case else None}
        for case, found in cases.items() for metric, value in found.items()
    ]  # fmt: skip
    path = tmp_path / "tabular.json"
    path.write_text(json.dumps(figures), encoding="utf-8")
    for name in ("record.py", "draw.py"):
        shutil.copy(docs / name, tmp_path)  # each writes beside itself
        subprocess.run([sys.executable, tmp_path / name, path], check=True, timeout=120)

    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    picture = (tmp_path / "tables.svg").read_text(encoding="utf-8")

    assert "| `other_mst` (other 1.0) | epsilon=1 | 0.054 ± 0.001 | 90 ± 0.001 | 5 |" in page
    for word in ("Mean of 2 tables", "marginals", "other_mst", "SWIFT (its figures)"):
        assert word in picture


def test_the_page_keeps_the_sections_of_benchmarks_that_were_not_run_again(tmp_path):
    shutil.copy(Path(__file__).resolve().parent.parent / "docs" / "record.py", tmp_path)

    def record(benchmark, mean):
        figure = {"benchmark": benchmark, "case": "all", "metric": "TVD", "mean": mean}
        path = tmp_path / "figures.json"
        path.write_text(json.dumps([figure | {"std": 0.0, "n": 1, "unit": ""}]), encoding="utf-8")
        subprocess.run([sys.executable, tmp_path / "record.py", path], check=True, timeout=120)
        return (tmp_path / "results.md").read_text(encoding="utf-8")

    record("votes", 0.25)
    record("kills", 0.5)
    page = record("votes", 0.125)

    assert page.index("## Votes") < page.index("| all | 0.125 | 1 |") < page.index("## Kills")
    assert "| all | TVD | 0.5  | 1 |" in page
    assert "0.25" not in page

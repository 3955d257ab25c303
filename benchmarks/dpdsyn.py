# SPDX-License-Identifier: Apache-2.0
"""Put `dpdsyn` beside every other method for tables: on its task, off it, and how long it takes.

Judges are trained on synthetic records and tested on real ones of other people: on the task, which
is the schema's target, and off it, on two other columns. The paper's figures, an accuracy 2.40
times and a speed 333.73 times that of another method, are the greatest of single runs. Here are the
medians and the greatest ratios over seeds, levels and tables, with their spread.

    python benchmarks/dpdsyn.py --json dpdsyn.json              some hours of one core
    python benchmarks/dpdsyn.py --json dpdsyn.json --only 'dpdsyn*,mst' --tables adult
    python benchmarks/dpdsyn.py --quick                         a minute

Runs are kept in FILE.runs.jsonl as those of tabular.py are. `private_evolution` and what trains
networks are slow, and run only where --only names them.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import tables
from fedsynth.core.query import Strategy
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema
from fedsynth.simulation.quality import train_on_synthetic
from fedsynth.strategies.dpdsyn import Guided
from fedsynth.strategies.registry import build_strategy, strategy_names
from measure import (
    NO_NOISE,
    NOISE_ONLY,
    REAL,
    RECORDS,
    UNITS,
    Job,
    Runs,
    asked,
    choices,
    distances,
    made,
    measure_all,
    measured,
    note_runs,
    settings_of,
)

OURS = "dpdsyn"
VARIANTS: Mapping[str, Mapping[str, Any]] = {  # ways to do the second step, and other features
    "dpdsyn-accept": {"mode": "accept"},
    "dpdsyn-invert": {"mode": "invert"},
    "dpdsyn-mst": {"features": "mst"},
    "dpdsyn-one-way": {"features": "independent"},
    "dpdsyn-uniform": {"features": "uniform"},
    "dpdsyn-1-step": {"num_steps": 1},
}
EPSILONS = (0.1, 1.0, 4.0)
OFF_TASK: Mapping[str, tuple[str, str]] = {
    "adult": ("marital_status", "sex"),
    "smoking": ("dental caries", "hearing(left)"),
    "acs_national2019": ("SEX", "MSP"),
    "diabetes130": ("gender", "insulin"),
}
_JUDGED = 10_000  # synthetic records that judges are trained on
_SLOW = ("private_evolution",)  # and others that train networks; only when --only names them
_TASK = ("accuracy, logistic", "accuracy, boosting")
_LEFT_OUT = ("rounds", "kB up", "kB down", "only sums")  # tabular.py has them


def main() -> int:
    """Run the benchmark."""
    args = choices(__doc__, list(OFF_TASK), EPSILONS).parse_args()
    figures = report.Report(OURS, args)
    runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
    jobs = [job for job in _jobs(args) if args.fresh or not runs.has(job)]
    measure_all(
        jobs, runs, lambda job: measured(job, limit_s=args.limit, by=judged), at_once=args.jobs
    )
    for job in runs.cases(quick=args.quick):
        name = " ".join(job.key[:3])
        for metric in runs.of(*job.key[:3])[0].figures:
            if metric not in _LEFT_OUT:
                unit = "CPU-s" if metric.endswith("CPU-s") else UNITS.get(metric, "")
                figures.add(name, metric, runs.values(*job.key[:3], metric), unit=unit)
    note_runs(figures, runs)
    _ratios(figures, runs, quick=args.quick)
    return figures.finish()


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Everything that is to be measured."""
    names = ["adult"] if args.quick else [t for t in OFF_TASK if asked(t, args.tables)]
    levels = [("epsilon=1", 0)]
    if not args.quick:
        noisy = [f"epsilon={float(e):g}" for e in args.epsilons.split(",")]
        levels = [(NOISE_ONLY, 0), (NO_NOISE, 0), *product(noisy, range(args.seeds))]
    for table in names:
        yield Job(table, REAL, RECORDS, 0, judge=True, quick=args.quick)
        for method, (level, seed) in product(_methods(args), levels):
            yield Job(table, method, level, seed, judge=True, quick=args.quick)


def _methods(args: argparse.Namespace) -> list[str]:
    """Ours, its variants, and all other installed methods for tables."""
    if args.quick:
        return [OURS, "dpdsyn-accept", "dpdsyn-invert", "mst"]
    every = [OURS, *VARIANTS, *(name for name in strategy_names() if name != OURS)]
    if args.only:
        return [name for name in every if asked(name, args.only)]
    return [m for m in every if m not in _SLOW and not m.startswith(("dp_", "rdp_"))]


def judged(job: Job) -> dict[str, float]:
    """Learn, sample, and judge on and off the task."""
    case = tables.load(job.table, quick=job.quick)
    if job.method == REAL:
        return distances(case, case.test) | _judged(case, case.train.records, job.table)
    learned, records, found = made(job, case, _strategy(job.method, case, quick=job.quick))
    found |= distances(case, records)
    if isinstance(learned, Guided):
        at = case.schema.index(case.schema.target or "")
        right = learned.soft_labels(case.test).argmax(axis=1) == case.test.codes[:, at]
        found["accuracy, classifier itself"] = float(right.mean())
    return found | _judged(case, records, job.table)


def _strategy(method: str, case: tables.Case, *, quick: bool) -> Strategy:
    """A method, with what its author would set for the table."""
    if method not in VARIANTS:
        return build_strategy(method, settings_of(method, case, quick=quick))
    settings = settings_of(OURS, case) | dict(VARIANTS[method])
    if settings.get("features") == "uniform":  # a kind of features that measures nothing
        settings.pop("feature_settings", None)
    return build_strategy(OURS, settings)


def _judged(case: tables.Case, records: Records, table: str) -> dict[str, float]:
    """Accuracies of judges trained on some records, on the task and off it."""
    few = Records(records.codes[np.random.default_rng(0).permutation(len(records))[:_JUDGED]])
    found: dict[str, float] = {}
    targets = (case.schema.target or "", *OFF_TASK[table])
    for target in targets:
        schema = _with_target(case.schema, target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            judges = train_on_synthetic(case.test, few, schema, target=target)
        where = "" if target == targets[0] else f" of {target}"
        for name, accuracy in judges.items():
            found[f"accuracy{where}, {name}"] = accuracy.synthetic
            found[f"accuracy{where}, commonest class"] = accuracy.majority
    return found


def _with_target(schema: Schema, target: str) -> Schema:
    """A schema for another task."""
    return replace(schema, target=target)


def _ratios(figures: report.Report, runs: Runs, *, quick: bool) -> None:
    """How many times as accurate, and as fast, ours is as each other method at the same epsilon."""
    bounds = (NOISE_ONLY, NO_NOISE)
    cases = [job.key[:3] for job in runs.cases(quick=quick) if job.level not in bounds]
    methods = sorted({m for _, m, _ in cases if m not in (OURS, REAL) and m not in VARIANTS})
    everything: dict[str, list[float]] = {}
    for method in methods:
        found: dict[str, list[float]] = {}
        for table, _, level in (case for case in cases if case[1] == method):
            theirs = {run.job.seed: run.figures for run in runs.of(table, method, level)}
            for run in runs.of(table, OURS, level):
                other = theirs.get(run.job.seed)
                if other is None:
                    continue
                for metric in _TASK:
                    ratio = run.figures[metric] / other[metric]
                    found.setdefault(f"{metric}: ratio", []).append(ratio)
                spent = [f["learning CPU-s"] + f["sampling CPU-s"] for f in (other, run.figures)]
                found.setdefault("speed: ratio", []).append(spent[0] / spent[1])
        for name, values in found.items():
            _spread(figures, f"ours to {method}", name, values)
            everything.setdefault(name, []).extend(values)
    for name, values in everything.items():
        _spread(figures, "ours to any", name, values)


def _spread(figures: report.Report, case: str, name: str, values: list[float]) -> None:
    """The mean and deviation of ratios, their median, and the greatest."""
    figures.add(case, name, values, unit="")
    figures.add(case, f"{name}, median", statistics.median(values), unit="")
    figures.add(case, f"{name}, greatest", max(values), unit="")


if __name__ == "__main__":
    raise SystemExit(main())

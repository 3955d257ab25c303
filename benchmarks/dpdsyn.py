# SPDX-License-Identifier: Apache-2.0
"""Put `dpdsyn` beside every other method for tables: on its task, off it, and how long it takes.

Judges are trained on synthetic records and tested on real ones of other people: on the task, which
is the schema's target, and off it, on two other columns. The paper's figures, an accuracy 2.40
times and a speed 333.73 times that of another method, are the greatest of single runs. Here are the
medians and the greatest ratios over seeds, levels and tables, with their spread.

A method that is slow can be left out, and measured apart later: with `--keep FILE` every run is
kept as soon as it ends, and not measured again.

    python benchmarks/dpdsyn.py --keep build/dpdsyn.jsonl --only 'mst/*' --only 'dpdsyn*/adult'
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import tables
from fedsynth.core.query import Strategy
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema
from fedsynth.simulation.direct import direct_run
from fedsynth.simulation.quality import quality_of, total_variation, train_on_synthetic
from fedsynth.strategies.dpdsyn import Guided
from fedsynth.strategies.registry import build_strategy, strategy_names
from measure import (
    REAL,
    Failed,
    Job,
    OverTime,
    Run,
    Runs,
    dial_of,
    in_own_process,
    measure_all,
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
LEVELS = ("epsilon=0.1", "epsilon=0.2", "epsilon=1", "epsilon=4")
OFF_TASK: Mapping[str, tuple[str, str]] = {
    "adult": ("marital_status", "education"),
    "smoking": ("dental caries", "hearing(left)"),
    "acs_national2019": ("SEX", "EDU"),
    "diabetes130": ("gender", "insulin"),
}
MOST_RECORDS = 100_000  # synthetic records that are sampled and timed
_JUDGED = 10_000  # of them judges are trained on
_SLOW = ("private_evolution",)  # and others that train networks; only when --only names them
_TASK = ("accuracy, logistic", "accuracy, boosting")


def main() -> int:
    """Run the benchmark."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    options.add_argument("--keep", type=Path, help="keep every run here, and do none twice")
    options.add_argument(
        "--only", action="append", help="METHOD/TABLE, a pattern; may be given twice"
    )
    options.add_argument("--limit-s", type=float, default=900.0, help="of one run")
    options.add_argument("--at-once", type=int, default=1)
    args = options.parse_args()
    figures, runs = report.Report(OURS, args), Runs(args.keep)

    jobs = [job for job in _jobs(args) if not runs.has(job)]
    measure_all(jobs, runs, lambda job: _run(job, args.limit_s), at_once=args.at_once)
    for job in runs.cases(quick=args.quick):
        name = " ".join(job.key[:3])
        mine = runs.of(*job.key[:3])
        for metric in mine[0].figures:
            values = [run.figures[metric] for run in mine]
            figures.add(name, metric, values, unit="CPU-s" if metric.endswith("CPU-s") else "")
    for run in runs.failures(quick=args.quick):
        figures.note(f"{' '.join(map(str, run.job.key))}: {run.failed}")
    _ratios(figures, runs, quick=args.quick)
    return figures.finish()


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Everything that is to be measured."""
    names = ["adult"] if args.quick else list(OFF_TASK)
    levels = ["epsilon=1"] if args.quick else args.levels
    seeds = 1 if args.quick else args.seeds
    for table in names:
        if _wanted(args, REAL, table):
            yield Job(table, REAL, "records", 0, judge=True, quick=args.quick)
        for level in levels:
            for method in _methods(args):
                for seed in range(seeds):
                    if _wanted(args, method, table):
                        yield Job(table, method, level, seed, judge=True, quick=args.quick)


def _methods(args: argparse.Namespace) -> list[str]:
    """Ours, its variants, and all other installed methods for tables."""
    if args.quick:
        return [OURS, "dpdsyn-accept", "dpdsyn-invert", "mst"]
    return [OURS, *VARIANTS, *(name for name in strategy_names() if name != OURS)]


def _wanted(args: argparse.Namespace, method: str, table: str) -> bool:
    """Whether --only asks for a pair; without it, whatever does not train a network."""
    if not args.only:
        return method not in _SLOW and not method.startswith(("dp_", "rdp_"))
    return any(fnmatch(f"{method}/{table}", pattern) for pattern in args.only)


def _run(job: Job, limit_s: float) -> Run:
    """A run, in a process of its own."""
    try:
        return Run(job, in_own_process(_measured, job, limit_s=limit_s))
    except OverTime:
        return Run(job, failed=f"no result in {limit_s:g} s")
    except Failed as failed:
        return Run(job, failed=str(failed))


def _measured(job: Job) -> dict[str, float]:
    """Learn, sample, and judge on and off the task."""
    case = tables.load(job.table, quick=job.quick)
    if job.method == REAL:
        found = {"2-way TVD": total_variation(case.train.records, case.test, case.schema, 2)}
        return found | _judged(case, case.train.records, job.table)
    strategy = _strategy(job.method, case, quick=job.quick)
    rng = np.random.default_rng([job.seed, 1])
    dial = dial_of(strategy, case, float(job.level.removeprefix("epsilon=")))
    with report.cpu_timer() as learning:
        learned = direct_run(strategy, case.schema, case.train, dial, rng=rng)
    with report.cpu_timer() as sampling:
        records = learned.sample(min(MOST_RECORDS, len(case.train.records)), rng)
    found = {"learning CPU-s": learning[0], "sampling CPU-s": sampling[0]}
    distances = quality_of(case.train.records, records, case.schema, orders=(1, 2, 3))
    found |= {f"{k}-way TVD": v for k, v in distances.total_variation.items()}
    if isinstance(learned, Guided):
        at = case.schema.index(case.schema.target or "")
        right = learned.soft_labels(case.test).argmax(axis=1) == case.test.codes[:, at]
        found["accuracy, classifier itself"] = float(right.mean())
    return found | _judged(case, records, job.table)


def _strategy(method: str, case: tables.Case, *, quick: bool) -> Strategy:
    """A method, with what its author would set for the table."""
    if method == OURS or method in VARIANTS:
        settings: dict[str, Any] = dict(VARIANTS.get(method, {}))
        if case.train.max_records > 1 and settings.get("features") != "uniform":
            settings["feature_settings"] = {"max_norm": 3.0}  # as for all others, see measure.py
        return build_strategy(OURS, settings)
    return build_strategy(method, settings_of(method, case, quick=quick))


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
    """How many times as accurate, and as fast, ours is as each other method."""
    cases = [job.key[:3] for job in runs.cases(quick=quick)]
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

# SPDX-License-Identifier: Apache-2.0
"""Tables by every method of ours and by peers: how far off, at what cost, and what is claimed.

Each figure of a method stands between two others of it: `epsilon=0`, what it makes of pure noise,
and `no noise`, what it makes of exact sums. TVD is the total variation distance of k-way marginals
of synthetic and real records, the mean of all of them; of threes, at most 400, the same for all.
CPU-seconds are those of learning and sampling, memory the most that the process held, rounds
the questions asked of each client, and kB up and down what it sends and is sent in all.

    python benchmarks/tabular.py --json tabular.json            everything: a day of one core
    python benchmarks/tabular.py --json tabular.json --only 'mst,dpmm_*' --tables adult_coded
    python benchmarks/tabular.py --quick                        the shipped example, a minute

Each run goes into FILE.runs.jsonl as soon as it has ended, and is not run again: a benchmark that
is cut goes on where it was, and parts run with --only add up. --fresh runs what is asked for anew.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import tables
from fedsynth.core.records import Records
from fedsynth.strategies.registry import strategy_names
from measure import (
    AT_LEAST,
    NO_NOISE,
    NOISE_ONLY,
    REAL,
    RECORDS,
    Job,
    Run,
    Runs,
    add_cases,
    asked,
    choices,
    compared,
    distances,
    measure_all,
    measured,
)
from peers.environment import PEERS, Unavailable, run_peer

DEFAULT, LOWER, TRUSTED = "marginals", "independent", "aim"
METHODS = (
    "independent",
    "mst",
    "marginals",
    "aim",
    "mwem",
    "privsyn",
    "privmrf",
    "absyn",
    "flaim",
    "tab_pe",
    "dpdsyn",
    "dp_merf",
    "dp_wgan",
    "rdp_gan",
)
EPSILONS = (0.1, 1.0, 4.0, 10.0)
PEER_TABLES, PEER_EPSILONS = ("adult_coded",), (1.0, 10.0)
TVDS = ("2-way TVD", "3-way TVD")
SWIFT = {1.0: (0.0384, 0.0841, 115.0), 10.0: (0.0214, 0.0609, 347.0)}  # notes of its measurement


def main() -> int:
    """Measure what was asked for and is not known yet; print all that is known."""
    args = _options().parse_args()
    figures = report.Report("tabular", args)
    runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
    jobs = [job for job in _jobs(figures, args) if args.fresh or not runs.has(job)]
    measure_all(jobs, runs, lambda job: _run(job, args), at_once=args.jobs)
    shown = {REAL, *METHODS, *PEERS}  # the file may hold runs of methods that stood here once
    cases = sorted((c for c in runs.cases(quick=args.quick) if c.method in shown), key=_place)
    add_cases(figures, runs, cases)
    for peer in sorted({job.method for job in cases} & PEERS.keys()):
        if PEERS[peer].known:
            figures.note(f"{peer}: {PEERS[peer].known}")
    if not args.quick:
        _add_tests(figures, runs, cases)
        _claim_swift(figures, runs)
        _claim_averages(figures, runs, cases)
        _claim_speed(figures, runs)
    return figures.finish(by_case=True)


def _options() -> argparse.ArgumentParser:
    """What can be asked for."""
    options = choices(__doc__, tables.TABLES, EPSILONS)
    options.add_argument("--judge", action="store_true", help="accuracy on real records too: slow")
    options.add_argument("--no-peers", action="store_true", help="leave other packages out")
    return options


def _jobs(figures: report.Report, args: argparse.Namespace) -> Iterator[Job]:
    """All runs that were asked for and can be had, those of a table together."""
    installed = [m for m in METHODS if m in strategy_names()]
    wanted = [m for m in (*METHODS, *PEERS) if asked(m, args.only)]
    if missing := [m for m in wanted if m not in installed and m not in PEERS]:
        figures.note(f"not installed, left out: {', '.join(missing)}")
    if args.quick:
        quick = [m for m in (LOWER, "mst", DEFAULT) if m in installed and m in wanted]
        figures.note(f"--quick: 1,500 patients, epsilon 4, one seed, {', '.join(quick)} only")
        for method, level in product(quick, (NOISE_ONLY, "epsilon=4", NO_NOISE)):
            yield Job("diabetes130_cut", method, level, 0, quick=True)
        return
    epsilons = [float(e) for e in args.epsilons.split(",")]
    for table in (t for t in tables.TABLES if asked(t, args.tables)):
        try:
            case = tables.load(table)
        except tables.Missing as missing_table:
            figures.note(str(missing_table))
            continue
        if len(case.test):
            yield Job(table, REAL, RECORDS, 0, judge=args.judge)
        for method in (m for m in installed if m in wanted):
            for level in (NOISE_ONLY, NO_NOISE):
                yield Job(table, method, level, 0, judge=args.judge)
            for epsilon, seed in product(epsilons, range(args.seeds)):
                yield Job(table, method, f"epsilon={epsilon:g}", seed, judge=args.judge)
        if table in PEER_TABLES and not args.no_peers:
            for peer, epsilon, seed in product(PEERS, PEER_EPSILONS, range(args.seeds)):
                if peer in wanted and epsilon in epsilons:
                    level = f"epsilon={epsilon:g}"
                    yield Job(table, peer, level, seed, peer=PEERS[peer].package)


def _run(job: Job, args: argparse.Namespace) -> Run:
    """What one job gives."""
    if job.peer is None:
        return measured(job, limit_s=args.limit, by=compared)
    case = tables.load(job.table)
    domain = dict(zip(case.schema.names, map(int, case.schema.shape), strict=True))
    try:
        made, cost = run_peer(
            job.method,
            case.train.records.codes,
            domain,
            epsilon=float(job.level.removeprefix("epsilon=")),
            delta=case.delta,
            seed=job.seed,
            limit_s=round(args.limit),
        )
    except Unavailable as why:
        return Run(job, {AT_LEAST: why.worked_s} if why.worked_s else {}, failed=str(why))
    found = {"CPU-s": cost["cpu_s"], "memory MB": cost["peak_bytes"] / 1e6}
    return Run(job, distances(case, Records(made)) | found)


def _place(job: Job) -> tuple[int, int, float]:
    """Tables, methods and levels in their order."""
    names, methods = (*tables.TABLES, *tables.SHIPPED), (REAL, *METHODS, *PEERS)
    level = math.inf if "=" not in job.level else float(job.level.removeprefix("epsilon="))
    return (names.index(job.table), methods.index(job.method), level)


def _add_tests(figures: report.Report, runs: Runs, cases: Sequence[Job]) -> None:
    """The default against each other method, paired by seed; all tests corrected together."""
    tests: list[tuple[str, str, float]] = []
    for case, metric in product(cases, TVDS):
        ours = runs.values(case.table, DEFAULT, case.level, metric)
        theirs = runs.values(case.table, case.method, case.level, metric)
        paired = min(len(ours), len(theirs))
        if case.method != DEFAULT and paired > 1:
            p = paired_p(ours[:paired], theirs[:paired])
            tests.append((f"{case.table} {case.method} {case.level}", f"{metric}, p", p))
    for (name, metric, _), p in zip(tests, holm([p for *_, p in tests]), strict=True):
        figures.add(name, metric, p, unit="")


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value that paired figures are alike in the mean: Student's t-test."""
    from scipy.stats import ttest_rel

    apart = np.subtract(first, second)
    if np.ptp(apart) <= 1e-12 * max(1.0, float(np.abs(apart).max())):  # no spread: t is 0 / 0
        return 1.0 if abs(apart[0]) < 1e-12 else 0.0
    return float(ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all tests at once.

    Reference:
      Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    raised = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    adjusted = np.empty(len(p_values))
    adjusted[order] = raised
    return [float(p) for p in adjusted]


def _claim_swift(figures: report.Report, runs: Runs) -> None:
    """Coded Adult against the best central method that was measured."""
    for epsilon, (two, three, cpu_s) in SWIFT.items():
        found = runs.of("adult_coded", DEFAULT, f"epsilon={epsilon:g}")
        if not found:
            continue

        def mean(metric: str, found: list[Run] = found) -> float:
            return float(np.mean([r.figures[metric] for r in found]))

        case = f"{DEFAULT} on coded Adult, epsilon {epsilon:g}"
        for metric, most in zip(TVDS, (two, three), strict=True):
            got = mean(metric)
            figures.claim(f"{case}: {metric} {got:.4f}, at most SWIFT's {most}", got <= most)
        got = mean("CPU-s")
        figures.claim(f"{case}: {got:.1f} CPU-s, a tenth of SWIFT's {cpu_s:g}", got <= cpu_s / 10)
        rounds = mean("rounds")
        figures.claim(
            f"{case}: {rounds:.0f} rounds, at most 6, of sums only",
            rounds <= 6 and all(r.figures["only sums"] for r in found),
        )


def _claim_averages(figures: report.Report, runs: Runs, cases: Sequence[Job]) -> None:
    """All tables together: never worse than trusted-server AIM, nor than columns on their own."""
    levels = [f"epsilon={epsilon:g}" for epsilon in EPSILONS]
    for level, metric in product(levels, TVDS):
        known = [
            table
            for table in tables.TABLES
            if all(runs.values(table, m, level, metric) for m in (DEFAULT, TRUSTED))
        ]
        for method in (m for m in METHODS if m in {c.method for c in cases}):
            means = [np.mean(v) for t in known if (v := runs.values(t, method, level, metric))]
            if known and len(means) == len(known):
                case = f"mean-of-{len(known)}-tables {method} {level}"
                figures.add(case, metric, float(np.mean(means)), unit="")
        if known:
            ours, theirs = (
                float(np.mean([np.mean(runs.values(t, m, level, metric)) for t in known]))
                for m in (DEFAULT, TRUSTED)
            )
            figures.claim(
                f"mean of {len(known)} tables, {level}: {metric} {ours:.4f} of {DEFAULT} at most"
                f" {theirs:.4f} of {TRUSTED}",
                ours <= theirs,
            )
    for table, metric in product(tables.TABLES, TVDS):
        sides = [runs.values(table, m, "epsilon=0.1", metric) for m in (DEFAULT, LOWER)]
        if all(sides):
            ours, theirs = map(float, map(np.mean, sides))
            figures.claim(
                f"{table}, epsilon 0.1: {metric} {ours:.4f} of {DEFAULT} at most {theirs:.4f} of"
                f" {LOWER}",
                ours <= theirs,
            )


def _claim_speed(figures: report.Report, runs: Runs) -> None:
    """A tenth of the CPU of every peer's AIM and of mbi's MST, on the same table and budget."""
    for table, epsilon, peer in product(PEER_TABLES, PEER_EPSILONS, ("dpmm_aim", "mbi_mst")):
        level = f"epsilon={epsilon:g}"
        ours = runs.values(table, DEFAULT, level, "CPU-s")
        theirs = [
            *runs.values(table, peer, level, "CPU-s"),
            *runs.values(table, peer, level, AT_LEAST),
        ]
        if ours and theirs:
            ratio = float(np.mean(theirs)) / float(np.mean(ours))
            case = f"{DEFAULT} on {table}, epsilon {epsilon:g}"
            figures.claim(f"{case}: CPU-s 1/{ratio:.0f} of {peer}'s, at most 1/10", ratio >= 10)


if __name__ == "__main__":
    raise SystemExit(main())

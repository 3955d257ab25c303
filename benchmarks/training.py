# SPDX-License-Identifier: Apache-2.0
"""Generators trained on MNIST by its 539 writers: from nothing, and from public handwriting.

A user is a writer with all of up to 150 digits. Judged by 297 other writers: the accuracy of a
small network that saw synthetic images alone (TSTR), and the Fréchet distance on
EfficientNet-Lite0 at 64 pixels. Every generator is judged by 20,000 images, which cost no privacy.

`scratch` is `dp_diffusion` with all weights trained by users, from random ones; `scratch, warm`
has the same code but starts from the classes' moments. `fine-tuned` starts from networks of
Omniglot and from the moments; `moments alone` spends its whole budget on these. Beside each, at
epsilon 1, 4 and 10 (delta 1e-4): `epsilon=0`, what it makes of pure noise, and `no noise`, exact
sums of the same bounded contributions. `real`: as many records of the 539 writers themselves.

    python benchmarks/training.py --json training.json     everything: three CPU-hours
    python benchmarks/training.py --quick                  scikit-learn's digits, half a minute

Runs are kept in FILE.runs.jsonl, and a benchmark that was cut goes on where it was. Settings of
`dp_diffusion` were chosen on seeds of their own, by about thirty runs that looked at the judges'
writers; those of `dp_merf` by about thirty runs that learned from 439 of the 539 writers and were
judged by the other 100.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import tables
import writers
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.registry import build_strategy
from measure import (
    NO_NOISE,
    NOISE_ONLY,
    REAL,
    RECORDS,
    UNITS,
    Counted,
    Job,
    Runs,
    Tally,
    asked,
    choices,
    compared,
    dial_of,
    measure_all,
    measured,
    note_runs,
)
from numpy.typing import NDArray
from tabular import holm, paired_p
from writers import FRECHET, TABLE, TSTR

ONE_EACH = "digits"  # scikit-learn's, of which every user has one
EPSILONS = (1.0, 4.0, 10.0)
NUM_SAMPLED = 20_000
SCRATCH, SCRATCH_WARM, MOMENTS, TUNED, MERF = (
    "scratch",
    "scratch, warm",
    "moments alone",
    "fine-tuned",
    "dp_merf",
)
FROM_NOTHING: Mapping[str, Any] = {
    "start": "scratch",
    "scope": "all",
    "warm_share": 0.0,
    "num_rounds": 20,
    "local_steps": 2,
    "local_batch": 30,
    "local_lr": 0.1,
    "clip": 1.0,
    "server_optimizer": "fedadam",
    "server_lr": 0.01,
    "momentum": 0.9,
}
# by name: a strategy and its settings; another generator is one line more
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    MERF: ("dp_merf", {}),
    SCRATCH: ("dp_diffusion", FROM_NOTHING),
    SCRATCH_WARM: ("dp_diffusion", {"start": "scratch"}),
    MOMENTS: ("dp_diffusion", {"warm_share": 1.0}),
    TUNED: ("dp_diffusion", {}),
}
QUICK: Mapping[str, Mapping[str, Any]] = {
    MERF: {"num_steps": 50},
    SCRATCH: {"num_rounds": 2},
    SCRATCH_WARM: {"num_rounds": 2},
    TUNED: {"num_rounds": 2},
}
LEAST = {(MERF, "epsilon=10"): 0.80, (TUNED, "epsilon=10"): 0.90}
LEAST_ONE_EACH = 0.87  # of dp_merf at epsilon 1


def main() -> int:
    """Run the benchmark."""
    args = choices(__doc__, [TABLE, ONE_EACH], EPSILONS).parse_args()
    figures = report.Report("training", args)
    try:
        case = writers.case_of(args.quick)
    except tables.Missing as missing:
        figures.note(str(missing))
        return figures.finish()
    runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
    jobs = [job for job in _jobs(args) if args.fresh or not runs.has(job)]
    seen = None if args.quick or not jobs else writers.seen(case, figures)
    one = partial(measured, limit_s=args.limit, by=partial(judged, seen))
    measure_all(jobs, runs, one, at_once=args.jobs)
    for job in sorted(runs.cases(quick=args.quick), key=_place):
        for metric in runs.of(*job.key[:3])[0].figures:
            values = runs.values(*job.key[:3], metric)
            figures.add(" ".join(job.key[:3]), metric, values, unit=UNITS.get(metric, ""))
    note_runs(figures, runs)
    _claims(figures, runs)
    return figures.finish(by_case=True)


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Everything that is to be measured, the first seed of all first."""
    methods = [method for method in METHODS if asked(method, args.only)]
    noisy = [f"epsilon={float(epsilon):g}" for epsilon in args.epsilons.split(",")]
    if args.quick:
        for method in methods:
            yield Job(TABLE, method, "epsilon=10", 0, quick=True)
        return
    for seed in range(args.seeds):
        if asked(REAL, args.only):
            yield Job(TABLE, REAL, RECORDS, seed)
        for method, level in product(methods, (NOISE_ONLY, *noisy)):
            yield Job(TABLE, method, level, seed)
        if MERF in methods:
            yield Job(ONE_EACH, MERF, "epsilon=1", seed, judge=True)
        if seed == 0:
            for method in methods:
                yield Job(TABLE, method, NO_NOISE, seed)


def _place(job: Job) -> tuple[bool, int, int]:
    """Methods and levels in their order."""
    levels = (RECORDS, NOISE_ONLY, *(f"epsilon={epsilon:g}" for epsilon in EPSILONS), NO_NOISE)
    place = levels.index(job.level) if job.level in levels else len(levels)
    return (job.table == ONE_EACH, (REAL, *METHODS).index(job.method), place)


def judged(seen: NDArray[np.float32] | None, job: Job) -> dict[str, float]:
    """One run: learn, sample, and compare with real records of other writers.

    Args:
      seen: Features of some of those, or `None`: no distances.
      job: What is to be measured.
    """
    if job.table == ONE_EACH:
        return compared(job)
    case = writers.case_of(job.quick)
    rng = np.random.default_rng([job.seed, 6])  # settings were chosen on other seeds
    num = min(NUM_SAMPLED, len(case.train.records))
    if job.method == REAL:
        records, cost = writers.some(case.train.records, num, job.seed), {}
    else:
        tally = Tally()
        with report.cpu_timer() as learning:
            synthesizer = _learned(job, case, tally, rng)
        with report.cpu_timer() as sampling:
            records = synthesizer.sample(num, rng)
        cost = writers.cost_of(tally, learning[0] + sampling[0])
    return writers.judged(case, records, seen, seed=job.seed) | cost


def _learned(job: Job, case: tables.Case, tally: Tally, rng: np.random.Generator) -> Synthesizer:
    """What the method learns at the job's level."""
    name, settings = METHODS[job.method]
    settings = {**settings, **(QUICK.get(job.method, {}) if job.quick else {})}
    if name != "dp_merf":
        settings["num_users"] = case.train.num_users
    strategy = build_strategy(name, settings)
    counted: Any = Counted(strategy, tally)
    if job.level == NO_NOISE:
        return non_private(counted, case.schema, case.train, rng)
    if job.level == NOISE_ONLY:
        return prior(counted, case.schema, dial_of(strategy, case, EPSILONS[0]), rng)
    dial = dial_of(strategy, case, float(job.level.partition("=")[2]))
    return direct_run(counted, case.schema, case.train, dial, rng=rng)


def _claims(figures: report.Report, runs: Runs) -> None:
    """What must be shown, and fine-tuned against what it should beat, paired by seed."""
    if figures.quick:
        return
    for (method, level), least in LEAST.items():
        if reached := runs.values(TABLE, method, level, TSTR):
            mean = float(np.mean(reached))
            figures.claim(f"{method} {level}: {TSTR} {mean:.4f} of {least}", mean >= least)
    if reached := runs.values(ONE_EACH, MERF, "epsilon=1", "accuracy, logistic"):
        mean = float(np.mean(reached))
        figures.claim(
            f"{MERF} on one image a user, epsilon=1: {mean:.3f} of {LEAST_ONE_EACH}",
            mean >= LEAST_ONE_EACH,
        )
    for metric, sign in ((TSTR, 1), (FRECHET, -1)):
        tests: list[tuple[str, bool, float]] = []
        for epsilon in EPSILONS:
            level = f"epsilon={epsilon:g}"
            ours = runs.values(TABLE, TUNED, level, metric)
            for method, against in ((SCRATCH, level), (SCRATCH_WARM, level), (TUNED, NOISE_ONLY)):
                theirs = runs.values(TABLE, method, against, metric)
                if len(ours) == len(theirs) > 1:
                    better = sign * (np.mean(ours) - np.mean(theirs)) > 0
                    case = f"{TUNED} {level} against {method} {against}"
                    tests.append((case, bool(better), paired_p(ours, theirs)))
        adjusted = holm([p for *_, p in tests])
        for (case, better, _), p in zip(tests, adjusted, strict=True):
            figures.claim(f"{case}: better {metric}, p = {p:.2g}", better and p < 0.05)


if __name__ == "__main__":
    raise SystemExit(main())

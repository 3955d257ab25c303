# SPDX-License-Identifier: Apache-2.0
"""Skewed clients: whose error depends on how people are dealt out to clients, and whose does not.

The people of the ACS excerpt are dealt out to 20 clients: at random; by Dirichlet shares of each
value of OWN_RENT, the smaller alpha the more skewed; and by PUMA, the area they live in. A method
of sums cannot tell these apart: with the same noise it learns the same model bit by bit, which is
shown first. A method in which clients choose can.

    python benchmarks/skew.py --json skew.json                  half an hour
    python benchmarks/skew.py --quick                           a minute
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

from itertools import product

import numpy as np
import tables
from fedsynth.core.query import Strategy
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.registry import STRATEGIES, build_strategy
from measure import (
    Job,
    Runs,
    dial_of,
    distances,
    in_own_process,
    measure_all,
    measured,
    note_runs,
    settings_of,
)
from tabular import DEFAULT, holm, paired_p

TABLE = "acs_national2019"
SPLITS = ("IID", "Dirichlet 10", "Dirichlet 1", "Dirichlet 0.1", "PUMA")
METHODS = (DEFAULT, "mst", "privsyn", "aim", "flaim", "flaim_augmented")
LOCAL = ("flaim", "flaim_augmented")  # in which clients choose
AUGMENTED = "_augmented"  # with the correction for how clients differ
EPSILON, SEEDS, LIMIT_S = 1.0, 5, 1800.0
METRIC = "2-way TVD"


def main() -> int:
    """Measure what is not known yet."""
    options = report.parser(__doc__)
    options.add_argument("--fresh", action="store_true", help="run anew what is known already")
    options.add_argument("--seeds", type=int, default=SEEDS, help="repetitions (default 5)")
    args = options.parse_args()
    figures = report.Report("skew", args)
    runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
    table = "diabetes130_cut" if args.quick else TABLE
    splits = ("IID", "Dirichlet 0.1") if args.quick else SPLITS
    seeds = range(1 if args.quick else args.seeds)
    methods = [m for m in METHODS if m.removesuffix(AUGMENTED) in STRATEGIES]
    try:
        tables.load(table)
    except tables.Missing as absent:
        figures.note(str(absent))
        return figures.finish(by_case=True)
    jobs = [
        Job(table, method, split, seed, quick=args.quick)
        for method, split, seed in product(methods, splits, seeds)
    ]
    missing = [job for job in jobs if args.fresh or not runs.has(job)]
    measure_all(
        missing, runs, lambda job: measured(job, limit_s=LIMIT_S, by=measured_split), at_once=1
    )
    for method, split in product(methods, splits):
        for metric in ("2-way TVD", "3-way TVD"):
            if values := runs.values(table, method, split, metric):
                figures.add(f"{table} {method} {split}", metric, values, unit="")
    note_runs(figures, runs)
    _claims(figures, runs, methods, table, splits)
    return figures.finish(by_case=True)


def _claims(
    figures: report.Report, runs: Runs, methods: list[str], table: str, splits: tuple[str, ...]
) -> None:
    """Sums are alike in every split; local choices are not."""
    for method in (m for m in methods if m not in LOCAL):
        same = in_own_process(
            same_everywhere, method, table, splits, figures.quick, limit_s=LIMIT_S
        )
        figures.claim(f"{method}: the same records, bit by bit, in every split", same)
    for method in methods:
        base = runs.values(table, method, splits[0], METRIC)
        others = [runs.values(table, method, split, METRIC) for split in splits[1:]]
        if len(base) < 2 or not all(others):
            continue
        found = holm([paired_p(base, other) for other in others])
        for split, p in zip(splits[1:], found, strict=True):
            figures.add(f"{table} {method} {split}", "p against IID", p, unit="")
        worst = max(float(np.mean(other)) for other in others) / float(np.mean(base))
        if method == DEFAULT:
            sentence = f"{method}: no split differs from IID beyond noise (worst {worst:.3f} of it)"
            figures.claim(sentence, min(found) > 0.05)
        if method in LOCAL:
            sentence = f"{method}: some split is worse than IID ({worst:.3f} of it)"
            figures.claim(sentence, worst > 1 and min(found) < 0.05)


def measured_split(job: Job) -> dict[str, float]:
    """How far off a method is whose people are dealt out in one way."""
    case = tables.load(job.table, quick=job.quick)
    strategy = _strategy(job.method, case, quick=job.quick)
    clients = tables.dealt_out(case, job.level, np.random.default_rng([job.seed, 2]))
    rng = np.random.default_rng([job.seed, 1])
    dial = dial_of(strategy, case, EPSILON)
    with report.cpu_timer() as spent:
        learned = direct_run(strategy, case.schema, clients, dial, rng=rng)
        made = learned.sample(len(case.train.records), rng)
    return distances(case, made) | {"CPU-s": spent[0]}


def same_everywhere(method: str, table: str, splits: tuple[str, ...], quick: bool) -> bool:
    """Whether the same noise gives the same records however people are dealt out."""
    case = tables.load(table, quick=quick)
    strategy = _strategy(method, case, quick=quick)
    dial = dial_of(strategy, case, EPSILON)
    made = []
    for split in splits:
        clients = tables.dealt_out(case, split, np.random.default_rng(2))
        rng, stream = np.random.default_rng(1), Seeded()
        learned = direct_run(strategy, case.schema, clients, dial, rng=rng, stream=stream)
        made.append(learned.sample(10_000, rng).codes)
    return all(np.array_equal(made[0], codes) for codes in made)


def _strategy(method: str, case: tables.Case, *, quick: bool) -> Strategy:
    """A method by its name here."""
    name = method.removesuffix(AUGMENTED)
    settings = settings_of(name, case, quick=quick)
    return build_strategy(name, settings | ({"augmented": True} if name != method else {}))


class Seeded:
    """Noise that can be drawn again: for this comparison, never for a release."""

    is_secret = False

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def read(self, num_bytes: int) -> bytes:
        """The next bytes."""
        return self._rng.bytes(num_bytes)


if __name__ == "__main__":
    raise SystemExit(main())

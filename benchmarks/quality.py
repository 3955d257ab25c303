# SPDX-License-Identifier: Apache-2.0
"""Images: how good what each method makes of them is, by epsilon; tables stand in tabular.py.

`epsilon=0` is what a method makes of pure noise, `no noise` what it makes of exact sums. TVD is
that of the labels (lower is better). Accuracy is that of judges trained on synthetic images and
tested on real ones of other people.

    python benchmarks/quality.py --json quality.json            everything: ten minutes
    python benchmarks/quality.py --quick                        a minute
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

from itertools import product

import numpy as np
from measure import (
    NO_NOISE,
    NOISE_ONLY,
    REAL,
    RECORDS,
    Job,
    Runs,
    add_cases,
    compared,
    measure_all,
    measured,
)

METHODS = ("private_evolution", "dp_merf", "dp_fedavg")
EPSILONS = (1.0, 4.0, 10.0)
SEEDS = 3
TABLE = "digits"
LIMIT_S = 1800.0


def main() -> int:
    """Measure what is not known yet."""
    options = report.parser(__doc__)
    options.add_argument("--fresh", action="store_true", help="run anew what is known already")
    options.add_argument("--seeds", type=int, default=SEEDS, help="repetitions (default 3)")
    args = options.parse_args()
    figures = report.Report("quality", args)
    runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
    jobs = [Job(TABLE, REAL, RECORDS, 0, judge=True, quick=args.quick)]
    epsilons, seeds = ((4.0,), 1) if args.quick else (EPSILONS, args.seeds)
    for method in METHODS:
        levels = [(NOISE_ONLY, 0), (NO_NOISE, 0)]
        levels += [(f"epsilon={e:g}", seed) for e, seed in product(epsilons, range(seeds))]
        jobs += [Job(TABLE, method, *level, judge=True, quick=args.quick) for level in levels]
    missing = [job for job in jobs if args.fresh or not runs.has(job)]
    measure_all(missing, runs, lambda job: measured(job, limit_s=LIMIT_S, by=compared), at_once=1)
    add_cases(figures, runs, runs.cases(quick=args.quick))
    found = runs.values(TABLE, "dp_merf", "epsilon=1", "accuracy, logistic")
    if found:
        reached = float(np.mean(found))
        figures.claim(f"dp_merf on digits, epsilon 1: {reached:.3f} of 0.85", reached >= 0.85)
    return figures.finish(by_case=True)


if __name__ == "__main__":
    raise SystemExit(main())

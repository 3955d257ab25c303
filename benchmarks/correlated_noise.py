# SPDX-License-Identifier: Apache-2.0
"""Correlated noise: how much less of it weights carry, by formula, by draws, and in a training.

First, noise alone. Weights after t rounds rest on the sum of t rounds' sums; a figure is the
standard deviation of the noise in one coordinate of that, in clips, as the root mean square over
t = 1 ... 256, at delta 1e-6. Nothing is divided by a number of users: in all rows of one k each
user takes part in k of the 256 rounds (by coins: in k expected), so cohorts are equal and figures
compare. `no amplification` is independent noise priced as k sums. `coins` is independent noise
priced as if each user joined each round by a secret coin of probability k / 256, which the clients
of this package flip and a server that picks its cohorts cannot. `banded` and `blt` are a series,
priced as one sum. Beside each formula stands what 2,000 coordinates of noise carried that was drawn
and went through the decoder.

Then scikit-learn's digits, one a user, by `dp_fedavg`: coins and turns with correlated noise at
equal epsilon, 100 rounds and expected cohorts of 72 of the 1,438 users. `sgd` (Flower's FedAvgM)
moves weights by sums of rounds, which is what coefficients are chosen for; `adam` divides by the
spread of rounds. The server's step is for each the best of three on a seed of its own. Accuracy is
that of a judge trained on synthetic digits and tested on real ones of other people.

    python benchmarks/correlated_noise.py --json correlated_noise.json     ten CPU-minutes
    python benchmarks/correlated_noise.py --quick                          noise alone

Trainings are kept in FILE.runs.jsonl, and a benchmark that was cut goes on where it was.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tables
from fedsynth.core import accounting
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.parts.factorization import (
    Decoder,
    banded,
    blt,
    prefix_noise,
)
from fedsynth.strategies.registry import build_strategy
from measure import Job, Run, Runs, distances

NUM_ROUNDS, DELTA, NUM_COORDINATES = 256, 1e-6, 2000
EPSILONS, TURNS = (1.0, 3.0, 8.0), (4, 8)
LEVELS, SEPARATION, TRAINING_ROUNDS = (10.0, 4.0), 20, 100
SGD = {"server_optimizer": "fedavgm", "momentum": 0.9}
COINS = {"sampling_prob": 1 / SEPARATION}
TURN = {"sampling_prob": 1.0, "correlation": "banded", "separation": SEPARATION}
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "coins, sgd": (SGD | COINS, (0.1, 0.2, 0.4)),
    "coins, adam": (COINS, (0.005, 0.01, 0.02)),
    "banded, sgd": (SGD | TURN, (0.1, 0.2, 0.4)),
    "banded, adam": (TURN, (0.005, 0.01, 0.02)),
}
APART = 1000  # the seed that steps are chosen by
ACCURACY = "accuracy, logistic"


def main() -> int:
    """Measure both."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="trainings of each way (default 3)")
    args = options.parse_args()
    figures = report.Report("correlated_noise", args)
    for turns in TURNS[:1] if args.quick else TURNS:
        _noise(figures, turns, EPSILONS[1:2] if args.quick else EPSILONS)
    if not args.quick:
        runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
        for epsilon in LEVELS:
            _trainings(figures, runs, epsilon, args.seeds)
    return figures.finish(by_case=True)


def _noise(figures: report.Report, turns: int, epsilons: tuple[float, ...]) -> None:
    """Noise of prefix sums where each user takes part in so many rounds."""
    apart = NUM_ROUNDS // turns
    alone = math.sqrt((NUM_ROUNDS + 1) / 2)  # of independent noise of one clip
    rows = {"banded": banded(NUM_ROUNDS, apart), "blt": blt(NUM_ROUNDS, apart)}
    shares = {name: prefix_noise(steps, NUM_ROUNDS) for name, steps in rows.items()}
    drawn = {name: _drawn(steps) for name, steps in rows.items()}
    drawn_alone = _drawn((4096,))
    ratios = []
    for epsilon in epsilons:
        one = _multiplier({(1.0, 1)}, epsilon)
        many = _multiplier({(1.0, turns)}, epsilon)
        coins = _multiplier({(turns / NUM_ROUNDS, NUM_ROUNDS)}, epsilon)
        formula = {"no amplification": many * alone, "coins": coins * alone}
        formula |= {name: one * share for name, share in shares.items()}
        found = {"no amplification": many * drawn_alone, "coins": coins * drawn_alone}
        found |= {name: one * share for name, share in drawn.items()}
        for name, value in formula.items():
            case = f"k={turns}, epsilon={epsilon:g}: {name}"
            figures.add(case, "noise, formula", value, unit="clips")
            figures.add(case, "noise, drawn", found[name], unit="clips")
            gain = formula["no amplification"] / value
            figures.add(case, "times less than no amplification", gain, unit="")
        ratios.append(formula["no amplification"] / formula["banded"])
    figures.claim(
        f"k={turns}: banded noise is 3.6 to 4.1 times less than without amplification:"
        f" {min(ratios):.2f} to {max(ratios):.2f}",
        3.6 <= min(ratios) <= max(ratios) <= 4.1,
    )
    figures.claim(
        f"k={turns}: drawn noise is within 2 % of its formula",
        all(abs(drawn[name] / share - 1) < 0.02 for name, share in shares.items()),
    )


def _multiplier(sums: set[tuple[float, int]], epsilon: float) -> float:
    """Noise multiplier of sums, each with its sampling probability and number, at an epsilon."""
    return accounting.calibrate(
        lambda noise: accounting.event_of({(noise, prob): number for prob, number in sums}),
        Budget(epsilon, DELTA),
    )


def _drawn(coefficients: Sequence[int]) -> float:
    """What drawn noise of one clip leaves in prefix sums, after the decoder."""
    rng, decoder = np.random.default_rng(0), Decoder(coefficients)
    prefix, squares = np.zeros(NUM_COORDINATES), 0.0
    for _ in range(NUM_ROUNDS):
        prefix += decoder.take(NoisySum(rng.normal(size=NUM_COORDINATES), 1.0, 1)).vector
        squares += float(prefix @ prefix)
    return math.sqrt(squares / (NUM_ROUNDS * NUM_COORDINATES))


def _trainings(figures: report.Report, runs: Runs, epsilon: float, seeds: int) -> None:
    """Digits at one epsilon, by every way with its own best step."""
    reached: dict[str, list[float]] = {}
    for way, (_, steps) in WAYS.items():
        tried = {step: _accuracy(runs, epsilon, way, step, APART) for step in steps}
        best = max(tried, key=lambda step: tried[step])
        reached[way] = [_accuracy(runs, epsilon, way, best, seed) for seed in range(seeds)]
        case = f"digits, epsilon={epsilon:g}: {way}"
        figures.add(case, "accuracy", reached[way], unit="")
        figures.add(case, "server_lr", best, unit="")
    ours = np.array(reached["banded, sgd"])
    for other in ("coins, sgd", "coins, adam"):
        gains = ours - np.array(reached[other])
        figures.claim(
            f"digits, epsilon {epsilon:g}: banded with sgd is above {other}, seed by seed:"
            f" {gains.mean():+.3f}, {int((gains > 0).sum())} of {len(gains)}",
            bool(gains.mean() > 0),
        )


def _accuracy(runs: Runs, epsilon: float, way: str, step: float, seed: int) -> float:
    """Of a judge that saw one training's digits, from the runs that are known or a new one."""
    job = Job("digits", f"dp_fedavg {way}, {step:g}", f"epsilon={epsilon:g}", seed, judge=True)
    if not runs.has(job):
        runs.add(Run(job, _trained(job, epsilon, WAYS[way][0] | {"server_lr": step})))
    (found,) = (r.figures for r in runs.of(*job.key[:3]) if r.job.seed == seed)
    return float(found[ACCURACY])


def _trained(job: Job, epsilon: float, settings: dict[str, Any]) -> dict[str, float]:
    """One training's figures."""
    case = tables.load(job.table, quick=False)
    strategy = build_strategy(
        "dp_fedavg",
        {"num_users": case.train.num_users, "num_rounds": TRAINING_ROUNDS, **settings},
    )
    noise = accounting.calibrate(
        lambda z: strategy.event(case.schema, z), Budget(epsilon, case.delta)
    )
    rng = np.random.default_rng([job.seed, 1])
    with report.cpu_timer() as cpu:
        learned = direct_run(strategy, case.schema, [case.train], noise, rng=rng)
        records = learned.sample(len(case.train.records), rng)
    return distances(case, records, judge=True) | {"CPU-s": cpu[0]}


if __name__ == "__main__":
    raise SystemExit(main())

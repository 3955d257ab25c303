# SPDX-License-Identifier: Apache-2.0
"""Private Evolution on MNIST by its 539 writers: what votes add to what a public model draws.

A user is a writer with all of up to 150 digits. Three public models draw: `strokes` (random
curves), `glyphs` (a network that learned public alphabets) and `digits` (a renderer that knows how
digits are written: Sim-PE). Judged by 297 other writers: the accuracy of a small network that saw
synthetic images alone (TSTR), the Fréchet distance on EfficientNet-Lite0 at 64 pixels, and
precision and recall on it.

Beside each model at epsilon 1, 4 and 10 (delta 1e-4): `epsilon=0`, the first pool on which nobody
has voted; `random votes`, the same rounds in which all votes go to other candidates of the same
label, by chance; and `no noise`, exact sums of the same bounded votes, which no budget passes. The
bound is `real`: as many records of the 539 writers themselves.

    python benchmarks/pe_images.py --json pe_images.json     everything: 40 CPU-minutes
    python benchmarks/pe_images.py --quick                   scikit-learn's digits, seconds

Runs are kept in FILE.runs.jsonl, and a benchmark that was cut goes on where it was. Settings were
chosen on seeds of their own, by 100 of the 539 writers who had no vote then; about nineteen runs
before that looked at the other writers.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import tables
import writers
from fedsynth.core.errors import ConfigError
from fedsynth.core.query import Contribution, NoisySum, Query, Rounds
from fedsynth.core.records import BoundedShard
from fedsynth.core.schema import Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.private_evolution import PrivateEvolution
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
    dial_of,
    measure_all,
    measured,
    note_runs,
)
from numpy.typing import NDArray
from tabular import holm, paired_p
from writers import FRECHET, TABLE, TSTR

RANDOM_VOTES = "random votes"
MODELS = ("strokes", "glyphs", "digits")
EPSILONS = (1.0, 4.0, 10.0)
NUM_SAMPLED = 6_000  # records that the judge learns from
SIM_PE = 0.89  # TSTR accuracy of Sim-PE at epsilon 10, by example (Lin et al. 2025)
COMMON: Mapping[str, Any] = {"vote": "l2_normalize", "sample_degree": 0.2, "degree_last": 0.15}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "epsilon=1": {"num_candidates": 3000, "num_rounds": 4},
    "epsilon=4": {"num_candidates": 6000, "num_rounds": 5},
    "epsilon=10": {"num_candidates": 10_000, "num_rounds": 5},
}
MIDDLE = "epsilon=4"  # whose settings and noise those levels have that have none of their own
QUICK: Mapping[str, Any] = {"num_candidates": 200, "num_rounds": 3}


def main() -> int:
    """Run the benchmark."""
    args = choices(__doc__, [TABLE], EPSILONS).parse_args()
    figures = report.Report("pe_images", args)
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
            figures.add(" ".join(job.key[1:3]), metric, values, unit=UNITS.get(metric, ""))
    note_runs(figures, runs)
    _tests(figures, runs)
    _claims(figures, runs)
    return figures.finish(by_case=True)


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Everything that is to be measured, the first seed of all first."""
    if args.quick:
        yield Job(TABLE, REAL, RECORDS, 0, quick=True)
        yield Job(TABLE, "digits", NOISE_ONLY, 0, quick=True)
        for model in ("digits", "glyphs"):
            yield Job(TABLE, model, "epsilon=10", 0, quick=True)
        return
    noisy = [f"epsilon={float(epsilon):g}" for epsilon in args.epsilons.split(",")]
    models = [model for model in MODELS if asked(model, args.only)]
    for seed in range(args.seeds):
        if asked(REAL, args.only):
            yield Job(TABLE, REAL, RECORDS, seed)
        for model, level in product(models, (NOISE_ONLY, RANDOM_VOTES, *noisy)):
            yield Job(TABLE, model, level, seed)
        if seed == 0:
            for model in models:
                yield Job(TABLE, model, NO_NOISE, seed)


def _place(job: Job) -> tuple[int, int]:
    """Models and levels in their order."""
    levels = (RECORDS, NOISE_ONLY, RANDOM_VOTES, *SETTINGS, NO_NOISE)
    place = levels.index(job.level) if job.level in levels else len(levels)
    return ((REAL, *MODELS).index(job.method), place)


def judged(seen: NDArray[np.float32] | None, job: Job) -> dict[str, float]:
    """One run: learn, sample, and compare with real records of other writers.

    Args:
      seen: Features of some of those, or `None`: no distances.
      job: What is to be measured.
    """
    case = writers.case_of(job.quick)
    rng = np.random.default_rng([job.seed, 4])  # settings were chosen on other seeds
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
    """What the strategy learns at the job's level."""
    settings = QUICK if job.quick else SETTINGS.get(job.level, SETTINGS[MIDDLE])
    strategy = PrivateEvolution(model=job.method, **COMMON, **settings)
    if job.level == NOISE_ONLY:
        return _unheard(strategy, case.schema, rng)
    if job.level == NO_NOISE:
        counted: Any = Counted(strategy, tally)
        return non_private(counted, case.schema, case.train, rng)
    epsilon = float((MIDDLE if job.level == RANDOM_VOTES else job.level).partition("=")[2])
    dial = dial_of(strategy, case, epsilon)
    inner: Any = RandomVotes(strategy, rng.spawn(1)[0]) if job.level == RANDOM_VOTES else strategy
    counted = Counted(inner, tally)
    return direct_run(counted, case.schema, case.train, dial, rng=rng)


def _unheard(strategy: PrivateEvolution, schema: Schema, rng: np.random.Generator) -> Synthesizer:
    """What the strategy makes of rounds in which nobody answers: its first pool."""
    steps: Any = strategy.rounds(schema, 1.0, rng)
    try:
        query = next(steps)
        while True:
            query = steps.send(NoisySum.void(query))
    except StopIteration as end:
        learned: Synthesizer = end.value
        return learned


class RandomVotes:
    """A strategy whose users' votes go to other candidates of the same label, by chance."""

    def __init__(self, strategy: PrivateEvolution, rng: np.random.Generator) -> None:
        self._strategy, self._rng = strategy, rng
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """The strategy's rounds, with another exchange of candidates in each."""
        steps = self._strategy.rounds(schema, noise_multiplier, rng)
        query = next(steps)
        while True:
            labels = query.inputs["codes"][:, int(query.inputs["label"][0])]
            order = np.arange(len(labels))
            for label in np.unique(labels):
                members = np.flatnonzero(labels == label)
                order[members] = self._rng.permutation(members)
            self._order = order
            answer = yield query
            try:
                query = steps.send(answer)
            except StopIteration as end:
                return end.value

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The users' votes, exchanged."""
        votes = self._strategy.answer(query, shard, rng)
        if votes.dense is None:
            raise ConfigError("votes are exchanged as rows: use vote = 'l2_normalize' or 'l1'")
        return Contribution.rows(votes.dense[:, self._order])


def _tests(figures: report.Report, runs: Runs) -> None:
    """Each model at each epsilon against what it draws without votes, paired by seed."""
    tests: list[tuple[str, str, str, bool, float]] = []
    for metric, sign in ((TSTR, 1), (FRECHET, -1)):
        for model, epsilon, null in product(MODELS, EPSILONS, (NOISE_ONLY, RANDOM_VOTES)):
            level = f"epsilon={epsilon:g}"
            ours, theirs = (runs.values(TABLE, model, v, metric) for v in (level, null))
            if len(ours) == len(theirs) > 1:
                better = sign * (np.mean(ours) - np.mean(theirs)) > 0
                p = paired_p(ours, theirs)
                tests.append((metric, f"{model} {level}", null, bool(better), p))
    for wanted in (TSTR, FRECHET):
        family = [test for test in tests if test[0] == wanted]
        adjusted = holm([p for *_, p in family])
        for (metric, case, null, better, _), p in zip(family, adjusted, strict=True):
            figures.add(case, f"p, {metric} as {null}", p, unit="")
            if metric == TSTR:
                figures.claim(f"{case}: {TSTR} above {null}, p = {p:.2g}", better and p < 0.05)
        if wanted == FRECHET and family:
            pairs = zip(family, adjusted, strict=True)
            nearer = sum(better and p < 0.05 for (*_, better, _), p in pairs)
            figures.note(f"{FRECHET}: {nearer} of {len(family)} below theirs, p < 0.05")


def _claims(figures: report.Report, runs: Runs) -> None:
    """Sim-PE's own figure."""
    reached: Sequence[float] = runs.values(TABLE, "digits", "epsilon=10", TSTR)
    if reached and not figures.quick:
        mean = float(np.mean(reached))
        figures.claim(
            f"digits at epsilon 10 by user: {TSTR} {mean:.4f}, at least {SIM_PE} as Sim-PE's by"
            " example",
            mean >= SIM_PE,
        )


if __name__ == "__main__":
    raise SystemExit(main())

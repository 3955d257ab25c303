# SPDX-License-Identifier: Apache-2.0
"""Training by users' updates: cohort x clip x learning rate x local steps, with noise and without.

A small autoencoder (`drawing.py`) learns scikit-learn's digits, a user an image, by the same rounds
as `dp_fedavg`. Accuracy is that of a logistic judge trained on synthetic images alone and tested on
real ones of other people. Beside it stands what an update meets: the share of users who are
clipped, the share of a clipped update that users have in common, and the signal of a run beside its
noise, as measured and as `fedsynth plan` predicts it from public facts.

The whole surface is searched with noise and without. The two best settings are then held against
each other on seeds that the search has not seen, beside what they make of pure noise.

    python benchmarks/sensitivity.py --json sensitivity.json    everything: six CPU-minutes
    python benchmarks/sensitivity.py --quick                    one small corner
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tables
from drawing import Drawing
from fedsynth.core import accounting
from fedsynth.core.privacy import Budget
from fedsynth.core.query import Contribution, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.parts.proposal import COMMON, Pull
from fedsynth.strategies.parts.trainable import RecordShape
from numpy.typing import NDArray
from scipy.stats import ttest_rel

COHORTS = (0.05, 0.2)
CLIPS = (0.1, 0.5, 2.5)
RATES = (0.03, 0.1, 0.3)
STEPS = (1, 4)
LOCAL = 0.1  # what a user's steps add up to, however many there are
ROUNDS = 30
EPSILON = 4.0
SEARCHED, HELD_OUT = 1, 5  # seeds of the search, and of the comparison after it
NUM_SYNTHETIC = 2000
METRICS = {
    "accuracy": "",
    "clipped": "",
    "common": "",
    "noise multiplier": "",
    "CPU-s": "CPU-s",
}


@dataclass(frozen=True)
class Setting:
    """One point of the surface."""

    cohort: float
    clip: float
    rate: float
    steps: int

    def __str__(self) -> str:
        """As a case of the table."""
        return f"q={self.cohort:g} clip={self.clip:g} lr={self.rate:g} steps={self.steps}"

    def strategy(self, watch: "Watch", num_users: int, num_rounds: int) -> "Watched":
        """The method with these settings."""
        return Watched(
            num_users=num_users,
            num_rounds=num_rounds,
            sampling_prob=self.cohort,
            clip=self.clip,
            local_steps=self.steps,
            local_lr=LOCAL / self.steps,
            server_lr=self.rate,
            watch=watch,
        )


class Watch:
    """What the updates of a run are like, from exact sums: for simulation only."""

    def __init__(self) -> None:
        self._users: list[tuple[int, int]] = []  # clipped, and all, by block
        self._common: list[float] = []

    def see(self, rows: NDArray[Any], clip: float) -> None:
        """Look at the updates of some users of a round."""
        lengths = np.sqrt(np.einsum("ud,ud->u", rows, rows, dtype=np.float64))
        self._users.append((int((lengths > clip).sum()), len(rows)))
        kept = np.minimum(1.0, clip / np.maximum(lengths, 1e-12))
        total = (rows * kept[:, None]).sum(axis=0, dtype=np.float64)
        alone = float(((lengths * kept) ** 2).sum())
        if len(rows) > 1:  # mean inner product of two users' updates
            pairs = len(rows) * (len(rows) - 1)
            self._common.append((float(total @ total) - alone) / pairs / clip**2)

    @property
    def clipped(self) -> float:
        """Share of users whose update was longer than the clip."""
        clipped, users = np.sum(self._users, axis=0)
        return float(clipped / max(1, users))

    @property
    def common(self) -> float:
        """Share of the clip that two users' updates have in common, over all rounds."""
        return math.sqrt(max(0.0, float(np.mean(self._common))))


@dataclass(frozen=True)
class Watched(Drawing):
    """The method, with somebody who looks at each exact update."""

    watch: Watch | None = None

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's change of the weights, looked at."""
        made = super().answer(query, shard, rng)
        if self.watch is not None and made.dense is not None and made.num_users:
            self.watch.see(made.dense, self.clip)
        return made


class Kept:
    """Runs by name, each with its figures: in a file too, from which a cut benchmark goes on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, dict[str, float]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._known.update(json.loads(line))
                except ValueError:  # the process was killed while it wrote
                    continue

    def figures(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is known of a run, else what it measures now."""
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{json.dumps({name: self._known[name]})}\n")
        return self._known[name]


def main() -> int:
    """Search the surface, then compare the two best settings."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=SEARCHED, help="of the search (default 1)")
    args = options.parse_args()
    figures = report.Report("sensitivity", args)
    kept = Kept(None if args.json is None else args.json.with_suffix(".runs.jsonl"))
    grid = [Setting(*point) for point in product(COHORTS, CLIPS, RATES, STEPS)]
    num_rounds, seeds, others = ROUNDS, args.seeds, HELD_OUT
    if args.quick:
        grid, num_rounds, seeds, others = [s for s in grid if _is_corner(s)], 5, 1, 2
    surface = {}
    for private in (True, False):
        for setting in grid:
            surface[private, setting] = _measured(kept, setting, private, num_rounds, range(seeds))
            _add(
                *(figures, f"{_level(private)}, {setting}", setting, num_rounds),
                surface[private, setting],
            )
    best = {
        private: max(grid, key=lambda s: _mean(surface[private, s], "accuracy"))
        for private in (True, False)
    }
    fresh = range(100, 100 + others)
    again = {
        (private, chosen): _measured(kept, best[chosen], private, num_rounds, fresh)
        for private in (True, False)
        for chosen in (True, False)
    }
    for (private, chosen), runs in again.items():
        case = f"{_level(private)}, best {_level(chosen)}: {best[chosen]}"
        _add(figures, case, best[chosen], num_rounds, runs)
    for private in (True, False):
        blind = [_blind(kept, best[private], num_rounds, seed) for seed in fresh]
        case = f"epsilon=0, best {_level(private)}: {best[private]}"
        figures.add(case, "accuracy", blind, unit="")
    _compare(figures, again)
    _shape(figures, surface, grid)
    return figures.finish(by_case=True)


def _is_corner(setting: Setting) -> bool:
    """Whether a setting is one of the few of a smoke run."""
    return setting.cohort == 0.05 and setting.steps == 1 and setting.clip < 1


def _level(private: bool) -> str:
    """A level in words."""
    return f"epsilon={EPSILON:g}" if private else "no noise"


def _measured(
    kept: Kept, setting: Setting, private: bool, num_rounds: int, seeds: Sequence[int]
) -> list[dict[str, float]]:
    """A setting's runs."""
    return [
        kept.figures(
            json.dumps([asdict(setting), private, num_rounds, seed]),
            lambda seed=seed: _run(setting, private, num_rounds, seed),  # type: ignore[misc]
        )
        for seed in seeds
    ]


def _run(setting: Setting, private: bool, num_rounds: int, seed: int) -> dict[str, float]:
    """One run and what its updates were like."""
    case, watch = _digits(), Watch()
    num_users = case.train.num_users
    strategy = setting.strategy(watch, num_users, num_rounds)
    dial = _dial(setting.cohort, num_rounds, case.delta)
    rng = np.random.default_rng(seed)
    _warm_up()
    started = time.process_time()
    if private:
        made = direct_run(strategy, case.schema, case.train, dial, rng=rng)
    else:
        made = non_private(strategy, case.schema, case.train, rng)
    took = time.process_time() - started
    accuracy = _judged(made.sample(NUM_SYNTHETIC, np.random.default_rng(seed)), case.test)
    return {
        "accuracy": accuracy,
        "clipped": watch.clipped,
        "common": watch.common,
        "noise multiplier": dial,
        "CPU-s": took,
    }


def _blind(kept: Kept, setting: Setting, num_rounds: int, seed: int) -> float:
    """Accuracy of what a setting makes of pure noise."""

    def measured() -> dict[str, float]:
        case = _digits()
        strategy = setting.strategy(Watch(), case.train.num_users, num_rounds)
        dial = _dial(setting.cohort, num_rounds, case.delta)
        made = prior(strategy, case.schema, dial, np.random.default_rng(seed))
        synthetic = made.sample(NUM_SYNTHETIC, np.random.default_rng(seed))
        return {"accuracy": _judged(synthetic, case.test)}

    name = json.dumps([asdict(setting), "epsilon=0", num_rounds, seed])
    return kept.figures(name, measured)["accuracy"]


@lru_cache(maxsize=1)
def _warm_up() -> None:
    """Have whatever is loaded or tried when it is first used be so before a run is timed."""
    case = _digits()
    once = Setting(COHORTS[0], 1.0, 0.1, 1).strategy(Watch(), case.train.num_users, 1)
    non_private(once, case.schema, case.train, np.random.default_rng(0))


@lru_cache(maxsize=1)
def _num_weights() -> int:
    """Weights of the model."""
    return Drawing().model_for(RecordShape.of(_digits().schema)).num_weights


@lru_cache(maxsize=1)
def _digits() -> tables.Case:
    """Scikit-learn's digits, one user an image."""
    return tables.load("digits")


@lru_cache
def _dial(cohort: float, num_rounds: int, delta: float) -> float:
    """The noise multiplier that the budget calls for."""
    event = Drawing(num_rounds=num_rounds, sampling_prob=cohort).event
    schema = _digits().schema
    return accounting.calibrate(lambda noise: event(schema, noise), Budget(EPSILON, delta))


def _judged(synthetic: Records, real: Records) -> float:
    """Accuracy on real images of a judge that saw synthetic ones alone."""
    from sklearn.linear_model import LogisticRegression

    labels = synthetic.codes[:, 0]
    if len(np.unique(labels)) < 2:
        return float(np.mean(real.codes[:, 0] == labels[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a judge that stops early is still a judge
        judge = LogisticRegression(max_iter=60, tol=1e-3).fit(_pixels(synthetic), labels)
    return float(judge.score(_pixels(real), real.codes[:, 0]))


def _pixels(records: Records) -> NDArray[np.float64]:
    """Images in rows."""
    return np.asarray(records.images).reshape(len(records), -1) / 255


def _add(
    figures: report.Report,
    case: str,
    setting: Setting,
    num_rounds: int,
    runs: Sequence[Mapping[str, float]],
) -> None:
    """Set down a setting's figures."""
    for metric, unit in METRICS.items():
        figures.add(case, metric, [run[metric] for run in runs], unit=unit)
    for metric, common in (("signal", None), ("predicted", COMMON)):
        pulls = [
            Pull(
                *(_digits().train.num_users, _num_weights(), num_rounds, setting.cohort),
                run["noise multiplier"],
                run["common"] if common is None else common,
            )
            for run in runs
        ]
        figures.add(case, metric, [pull.of_run for pull in pulls], unit="")


def _mean(runs: Sequence[Mapping[str, float]], metric: str) -> float:
    """Mean of a figure over runs."""
    return float(np.mean([run[metric] for run in runs]))


def _compare(
    figures: report.Report, again: Mapping[tuple[bool, bool], Sequence[Mapping[str, float]]]
) -> None:
    """Claim that with noise the setting found there is better than the one found without."""
    own, other = ([run["accuracy"] for run in again[True, chosen]] for chosen in (True, False))
    p = float(ttest_rel(own, other, alternative="greater").pvalue)
    figures.claim(
        f"{_level(True)}: the best setting found there beats the best found without noise, on"
        f" {len(own)} new seeds: {np.mean(own):.3f} against {np.mean(other):.3f}, p = {p:.2g} of"
        " 0.05",
        p < 0.05,
    )
    near, best = (_mean(again[False, chosen], "accuracy") for chosen in (True, False))
    figures.note(f"without noise the two are at {near:.3f} and {best:.3f}")


def _shape(
    figures: report.Report,
    surface: Mapping[tuple[bool, Setting], Sequence[Mapping[str, float]]],
    grid: Sequence[Setting],
) -> None:
    """What each setting alone does to accuracy, over all others; what users have in common."""
    for private in (True, False):
        for key, name in (("cohort", "q"), ("clip", "clip"), ("rate", "lr"), ("steps", "steps")):
            for value in sorted({getattr(s, key) for s in grid}):
                of = [surface[private, s] for s in grid if getattr(s, key) == value]
                accuracy = [max(_mean(runs, "accuracy") for runs in of)]
                figures.add(
                    f"{_level(private)}, best with {name}={value:g}", "accuracy", accuracy, unit=""
                )
    common = [_mean(surface[True, s], "common") for s in grid]
    middle = sorted(common)[len(common) // 2]
    figures.note(
        f"with noise, users had {min(common):.2f} to {max(common):.2f} of the clip in common,"
        f" {middle:.2f} in the middle"
    )


if __name__ == "__main__":
    raise SystemExit(main())

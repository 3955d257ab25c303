# SPDX-License-Identifier: Apache-2.0
"""Users synthesized with their records: how near both come, and what independent records miss.

Two populations: diabetes130 by patient (up to 10 encounters; race and gender are the patient's) and
a sample of an online shop by customer (up to 20 lines; the country is the customer's). Every figure
is a mean total variation in which each user weighs one: of the number of records a user; of pairs
of the user's columns; of a user's and a record's column; of pairs of columns of one record; and of
pairs of columns of two different records of one user, among these the same column twice.

`relational` is held against `independent_records`: those of `mst`, each drawn by itself (`weight =
"user"`, the whole budget) and dealt out to users whose exact numbers of records it is told for
free.

    python benchmarks/relations.py --json relations.json    about fifteen minutes
    python benchmarks/relations.py --quick                   a cut of the patients, one seed
"""

import report  # isort: skip  (first: it holds numpy to one thread)

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np
import tables
from fedsynth.core import accounting
from fedsynth.core.privacy import Budget, User
from fedsynth.core.query import Strategy
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.registry import build_strategy
from numpy.typing import NDArray
from users import bounded, diabetes

EPSILONS = (1.0, 4.0, 10.0)
RECORDS, WITHIN, SAME = "records a user", "two records of a user", "the same column of two records"

Figures = dict[str, float]
Tables = dict[str, list[NDArray[np.float64]]]
Drawing = Callable[..., tuple[NDArray[np.int32], NDArray[np.int64]]]


@dataclass(frozen=True)
class Relation:
    """A population of users with their records."""

    name: str
    schema: Schema
    shard: BoundedShard
    parent: tuple[str, ...]
    most_records: int
    delta: float


def main() -> int:
    """Measure both populations."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="repetitions (default 3)")
    options.add_argument("--only", choices=("diabetes130", "online_retail"), help="one population")
    args = options.parse_args()
    figures = report.Report("relations", args)
    seeds = 1 if args.quick else args.seeds
    for name, load in (("diabetes130", patients), ("online_retail", customers)):
        if args.only not in (None, name):
            continue
        try:
            relation = load(quick=args.quick)
        except tables.Missing as missing:
            figures.note(str(missing))
            continue
        measure(figures, relation, EPSILONS[:1] if args.quick else EPSILONS, seeds)
    return figures.finish()


def patients(*, quick: bool) -> Relation:
    """Diabetes-130: all patients, up to ten encounters of each."""
    schema, shard = diabetes(quick=quick)
    whole = bounded(shard, User("patient_nbr", max_records=10))
    return Relation("diabetes130", schema, whole, ("race", "gender"), 10, 1e-6)


def customers(*, quick: bool) -> Relation:
    """Online retail: four fifths of the customers, up to twenty lines of each."""
    case = tables.load("online_retail", quick=quick)
    return Relation("online_retail", case.schema, case.train, ("Country",), 20, 1e-5)


def measure(
    figures: report.Report, relation: Relation, epsilons: tuple[float, ...], seeds: int
) -> None:
    """All figures of one population."""
    truth = found(relation, relation.shard.records.codes, relation.shard.user_index)
    ways: dict[str, tuple[Strategy, Drawing]] = {
        "relational": (
            build_strategy(
                "relational",
                {"parent": list(relation.parent), "most_records": relation.most_records},
            ),
            with_users,
        ),
        "independent_records": (build_strategy("mst", {"weight": "user"}), dealt_out),
    }
    reached: dict[tuple[str, float], Figures] = {}
    for epsilon in (*epsilons, np.inf):
        for name, (strategy, drawn) in ways.items():
            each: list[Figures] = []
            for seed in range(seeds if np.isfinite(epsilon) else 1):
                rng = np.random.default_rng([seed, 1])
                with report.cpu_timer() as cpu:
                    learned = _learned(relation, strategy, epsilon, seed)
                made = learned.sample(len(relation.shard.records), rng)
                codes, owners = drawn(relation, made, rng)
                errors = _errors(found(relation, codes, owners), truth)
                each.append(errors | {"CPU-s": cpu[0]})
            level = f"epsilon={epsilon:g}" if np.isfinite(epsilon) else "no noise"
            for metric in each[0]:
                unit = "CPU-s" if metric == "CPU-s" else "TVD"
                values = [one[metric] for one in each]
                figures.add(f"{relation.name} {name} {level}", metric, values, unit=unit)
            reached[name, epsilon] = {m: float(np.mean([e[m] for e in each])) for m in each[0]}
    for epsilon in epsilons:
        ours, apart = (reached[name, epsilon][WITHIN] for name in ways)
        figures.claim(
            f"{relation.name}, epsilon {epsilon:g}: two records of a user are nearer the truth than"
            f" independent ones: {ours:.4f} against {apart:.4f}",
            ours < apart,
        )
    if relation.name == "diabetes130":
        first = epsilons[0]
        ours, apart = (reached[name, first][WITHIN] for name in ways)
        figures.claim(
            f"{relation.name}, epsilon {first:g}: in a third of their error", ours <= apart / 3
        )


def _learned(relation: Relation, strategy: Strategy, epsilon: float, seed: int) -> Synthesizer:
    """What a strategy learns at an epsilon, or from exact sums at an infinite one."""
    rng = np.random.default_rng(seed)
    if not np.isfinite(epsilon):
        return non_private(strategy, relation.schema, relation.shard, rng)
    noise = accounting.calibrate(
        lambda z: strategy.event(relation.schema, z), Budget(epsilon, relation.delta)
    )
    return direct_run(strategy, relation.schema, relation.shard, noise, rng=rng)


def with_users(
    relation: Relation, made: Records, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Records with the users they were drawn with; every key must have its user."""
    if made.owners is None or not np.array_equal(
        np.unique(made.owners), np.arange(int(made.owners[-1]) + 1)
    ):
        raise SystemExit("records whose keys do not join the table of users")
    return made.codes, made.owners


def dealt_out(
    relation: Relation, made: Records, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Records dealt out to users with the true numbers of records."""
    counts = rng.permutation(np.bincount(relation.shard.user_index))
    return made.codes, np.repeat(np.arange(len(counts)), counts)


def found(relation: Relation, codes: NDArray[np.int32], owners: NDArray[np.int64]) -> Tables:
    """All tables of a population, each user weighing one."""
    schema, most = relation.schema, relation.most_records
    shape, counts = schema.shape, np.bincount(owners)
    starts, share = np.cumsum(counts) - counts, 1.0 / counts[owners]
    own = [schema.index(name) for name in relation.parent]
    child = [i for i in range(len(shape)) if i not in own]
    size = np.minimum(counts, most)[owners] - 1

    def pair(a: int, b: int) -> NDArray[np.float64]:
        return _shares(codes[:, a] * np.int64(shape[b]) + codes[:, b], share, shape[a] * shape[b])

    tables: Tables = {
        RECORDS: [_shares(size, share, most)],
        "a column by records a user": [
            _shares(codes[:, c] * most + size, share, shape[c] * most) for c in range(len(shape))
        ],
        "user's columns": [pair(a, b) for a, b in combinations(own, 2)]
        or [_shares(codes[:, own[0]], share, shape[own[0]])],
        "user's and record's": [pair(a, b) for a in own for b in child],
        "columns of a record": [pair(a, b) for a, b in combinations(child, 2)],
        WITHIN: [],
        SAME: [],
    }
    place = np.arange(len(owners)) - starts[owners]
    firsts, seconds = [], []
    for shift in range(1, int(counts.max())):
        row = np.flatnonzero(counts[owners] > shift)
        firsts.append(row)
        seconds.append(starts[owners[row]] + (place[row] + shift) % counts[owners[row]])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    ordered = 1.0 / (counts[owners[first]] * (counts[owners[first]] - 1.0))
    for a, b in combinations_with_replacement(child, 2):
        cells = codes[first, a] * np.int64(shape[b]) + codes[second, b]
        table = _shares(cells, ordered, shape[a] * shape[b])
        tables[WITHIN].append(table)
        tables[SAME] += [table] if a == b else []
    return tables


def _shares(
    cells: NDArray[np.int64], weights: NDArray[np.float64], num_cells: int
) -> NDArray[np.float64]:
    """Weighted shares of cells."""
    counts = np.bincount(cells, weights=weights, minlength=num_cells)
    return np.asarray(counts / counts.sum())


def _errors(made: Tables, truth: Tables) -> Figures:
    """Mean total variation of each kind of table."""
    return {
        kind: float(
            np.mean(
                [0.5 * np.abs(m - t).sum() for m, t in zip(made[kind], truth[kind], strict=True)]
            )
        )
        for kind in truth
    }


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""What the default costs as tables grow: curves over records, users and columns, and one large run.

Records are generated with a known structure, a binary tree in which each column depends on one
other, a few thousand users at a time, so that memory is the method's own; the CPU-seconds of
generating them are taken off. TVD is that of synthetic records and fresh ones of the same law,
beside that of as many other fresh ones, which lies above where synthetic records are drawn with
less chance. Each point is a process of its own, at epsilon 1. The large run is a whole one, with
ledger, odometers, ten clients and a release, over a table held in memory.

    python benchmarks/scaling.py --json scaling.json            about ten minutes
    python benchmarks/scaling.py --quick                        a minute
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.privacy import Budget
from fedsynth.core.records import BoundedShard, Records
from fedsynth.simulation.direct import direct_run
from fedsynth.simulation.quality import total_variation
from fedsynth.strategies.registry import STRATEGIES, build_strategy
from measure import Counted, Failed, OverTime, Tally, in_own_process
from numpy.typing import NDArray
from throughput import cpu_seconds_of_run, table_schema

BUDGET = Budget(1.0, 1e-9)
COLUMNS = 15
FRESH = 100_000  # records that are sampled and compared
CHUNK = 1 << 13  # users generated at a time
LIMIT_S = 1800.0
RECORDS = (10_000, 100_000, 1_000_000, 10_000_000)
USERS = (1_000, 10_000, 100_000, 1_000_000)  # of 1e6 records together
WIDTHS = (8, 15, 25, 40, 64, 100)
LARGE, MOST_GB, MOST_S = 1_000_000, 4.0, 600.0


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
      users: People.
      each: Records of each of them.
      columns: Columns of a record.
    """

    users: int
    each: int = 1
    columns: int = COLUMNS


def main() -> int:
    """Measure the curves, then the large run."""
    options = report.parser(__doc__)
    options.add_argument("--method", help="another method than the default")
    args = options.parse_args()
    figures = report.Report("scaling", args)
    method = args.method or ("marginals" if "marginals" in STRATEGIES else "mst")
    few = slice(0, 2 if args.quick else None)
    total = 20_000 if args.quick else 1_000_000
    curves = {
        "records": [Point(n) for n in RECORDS[few]],
        "users": [Point(n, total // n) for n in USERS[few]],
        "columns": [Point(10_000 if args.quick else 100_000, columns=n) for n in WIDTHS[few]],
    }
    for name, points in curves.items():
        _curve(figures, name, points, method)
    _large(figures, 20_000 if args.quick else LARGE, method)
    return figures.finish(by_case=True)


def _curve(figures: report.Report, name: str, points: list[Point], method: str) -> None:
    """One figure of each kind at every point, and how steeply the cost grows."""
    known: list[tuple[int, float]] = []
    for point in points:
        number = {"records": point.users, "users": point.users, "columns": point.columns}[name]
        case = f"{method}, {number:,} {name}"
        try:
            found = in_own_process(measured_point, point, method, limit_s=LIMIT_S)
        except (OverTime, Failed) as why:
            figures.note(f"{case}: {why or f'no result in {LIMIT_S:g} s'}")
            continue
        known.append((number, found["CPU-s"]))
        for metric, unit in (("CPU-s", "CPU-s"), ("memory MB", "MB"), ("kB up", "kB")):
            figures.add(case, metric, found[metric], unit=unit)
        figures.add(case, "rounds", found["rounds"], unit="")
        for metric in ("2-way TVD", "of fresh ones"):
            figures.add(case, metric, found[metric], unit="")
    if len(known) > 1:
        sizes, costs = np.log(np.array(known, dtype=np.float64)).T
        slope = float(np.polyfit(sizes, costs, 1)[0])
        figures.add(f"{method}, CPU-s by {name}", "power of growth", slope, unit="")


def measured_point(point: Point, method: str) -> dict[str, float]:
    """What a method costs over a stream of records, and how far off it is."""
    schema = table_schema(point.columns)
    source = Stream(point)
    strategy = build_strategy(method, {"max_norm": "auto"} if point.each > 1 else {})
    dial = accounting.calibrate(lambda noise: strategy.event(schema, noise), BUDGET)
    tally, rng = Tally(), np.random.default_rng(1)
    counted: Any = Counted(strategy, tally)
    stream: Any = source  # all that `direct_run` reads of a shard
    with report.cpu_timer() as spent:
        learned = direct_run(counted, schema, [stream], dial, rng=rng)
        made = learned.sample(FRESH, rng)
    peak = report.peak_rss_bytes()
    fresh, others = (Records(source.law.codes(FRESH, np.random.default_rng(i))) for i in (2, 5))
    return {
        "CPU-s": spent[0] - source.generating_s,
        "memory MB": peak / 1e6,
        "kB up": tally.bytes_up / 1e3,
        "rounds": float(tally.rounds),
        "2-way TVD": total_variation(fresh, made, schema, 2, max_marginals=200),
        "of fresh ones": total_variation(fresh, others, schema, 2, max_marginals=200),
    }


class Law:
    """A tree of columns, each depending on one before it; the same for the same shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        parents = [1, *(shape[(i - 1) // 2] for i in range(1, len(shape)))]
        self._ends = [
            rng.dirichlet(np.full(cells, 0.5), size).cumsum(axis=1)[:, :-1]
            for cells, size in zip(shape, parents, strict=True)
        ]

    def codes(self, num_records: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Records, `(num_records, num_columns)`."""
        codes = np.zeros((num_records, len(self._ends)), dtype=np.int32)
        for column, ends in enumerate(self._ends):
            given = codes[:, (column - 1) // 2] if column else codes[:, 0]
            codes[:, column] = (rng.random((num_records, 1)) > ends[given]).sum(axis=1)
        return codes


class Stream:
    """A shard that is generated anew whenever it is read, the same each time.

    Attributes:
      num_users: People in it.
      max_records: Records of each of them.
      law: What their records follow.
      generating_s: CPU-seconds spent on making records so far.
    """

    def __init__(self, point: Point) -> None:
        self.num_users, self.generating_s = point.users, 0.0
        self.law = Law(tuple(table_schema(point.columns).shape))
        self.max_records = point.each

    def only(self, chosen: NDArray[np.bool_]) -> BoundedShard:
        """Nobody: all that is asked for is a shard without users."""
        if chosen.any():
            raise ValueError("a stream is read whole")
        codes = self.law.codes(0, np.random.default_rng(0))
        return BoundedShard(Records(codes), np.zeros(0, dtype=np.int64), 0, self.max_records)

    def blocks(self, num_users: int) -> Iterator[BoundedShard]:
        """Blocks of at most `num_users` users."""
        chunk = max(1, CHUNK // self.max_records)
        for first in range(0, self.num_users, chunk):
            begun = time.process_time()
            users = min(chunk, self.num_users - first)
            rng = np.random.default_rng([3, first])
            codes = self.law.codes(users * self.max_records, rng)
            index = np.repeat(np.arange(users), self.max_records)
            block = BoundedShard(Records(codes), index, users, self.max_records)
            self.generating_s += time.process_time() - begun
            yield from block.blocks(num_users)


def _large(figures: report.Report, users: int, method: str) -> None:
    """A whole run over many users, in a process of its own."""
    case = f"{method}, whole run of {users:,} users, {COLUMNS} columns"
    try:
        found = in_own_process(measured_run, users, method, limit_s=LIMIT_S)
    except (OverTime, Failed) as why:
        figures.note(f"{case}: {why or f'no result in {LIMIT_S:g} s'}")
        figures.claim(f"{case} ends", False)
        return
    gb = found["bytes"] / 1e9
    figures.add(case, "CPU-s", found["CPU-s"], unit="CPU-s")
    figures.add(case, "clock", found["clock_s"], unit="s")
    figures.add(case, "memory", gb, unit="GB")
    figures.claim(f"{case}: {gb:.2f} GB, under {MOST_GB:g}", gb < MOST_GB)
    figures.claim(f"{case}: {found['clock_s']:.0f} s, under {MOST_S:g}", found["clock_s"] < MOST_S)


def measured_run(users: int, method: str) -> dict[str, float]:
    """Cost of a run on the local engine, the table in memory."""
    law = Law(tuple(table_schema(COLUMNS).shape))
    codes = law.codes(users, np.random.default_rng(4))
    data = Shard(Records(codes), np.array([f"user-{number}" for number in range(users)]))
    begun = time.perf_counter()
    cpu_s = cpu_seconds_of_run(data, users, method, {}, columns=COLUMNS, clients=10)
    clock_s = time.perf_counter() - begun
    return {"CPU-s": cpu_s, "clock_s": clock_s, "bytes": float(report.peak_rss_bytes())}


if __name__ == "__main__":
    raise SystemExit(main())

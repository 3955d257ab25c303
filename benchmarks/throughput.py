# SPDX-License-Identifier: Apache-2.0
"""What users and messages cost: training beside pfl, Flower and bare torch; a million users.

Training is the task of `training_task.py`, the same for everybody. Start-up excluded is the cost of
the second half of the rounds; included, all CPU-seconds of all processes, imports among them.
`--quick` leaves pfl and Flower out.
"""

import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import report  # first: it sets up threads and paths
import training_task as task  # and then what finds the peers
from dp_accounting.dp_event import DpEvent
from environment import Unavailable
from fedsynth.client.respond import block_sum
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import FINE, Contribution, NoisySum, Query, Rounds, Strategy
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.server.planned import plan_of
from fedsynth.simulation.run import run_local
from fedsynth.strategies.independent import Columns, Independent
from fedsynth.strategies.parts.local_training import LocalTraining, places
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 26  # as in client/respond.py: dense rows held at a time
SEED = (1, 1)
COLUMNS = 15
_CHILD_LIMIT_S = 900.0


def main() -> int:
    """Run the benchmark."""
    args = report.parser(__doc__).parse_args()
    figures = report.Report("throughput", args)
    many_users(figures, users=20_000 if args.quick else 1_000_000)
    messages(figures, clients=(10, 60) if args.quick else (100, 1000))
    for form in task.SHAPES:
        training(figures, form)
    return figures.finish()


def training(figures: report.Report, form: str) -> None:
    """Users per CPU-second of whole runs, ours and peers', in turn; and that all learn the same."""
    rounds, repetitions = (4, 1) if figures.quick else (20, 3)
    orders = np.tile(np.arange(task.IMAGES), (rounds, 1))
    case = f"{form}, {len(task.start_of(form)):,} weights"
    rates: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], task.Spent]] = {"ours": lambda: task.child("ours", form, rounds)}
    if not figures.quick:
        runs["pfl"] = lambda: task.pfl(form, rounds, noise_multiplier=1.0, orders=orders)
        runs["Flower"] = lambda: task.child("flower", form, rounds // 4)
    for _ in range(repetitions):
        for who, run in list(runs.items()):
            try:
                spent = run()
            except Unavailable as error:
                figures.note(f"{case}: no {who}: {error}")
                del runs[who]
                continue
            rates.setdefault(who, []).append(spent.marginal())
            whole.setdefault(who, []).append(spent.included())
    for who, values in rates.items():
        peer = None if who == "ours" else who
        figures.add(case, "users, start-up excluded", values, unit="users/CPU-s", peer=peer)
        figures.add(case, "users, start-up included", whole[who], unit="users/CPU-s", peer=peer)
    for who, least in (("pfl", 1.5 if form == "cnn" else 3.0), ("Flower", 10.0)):
        if who in rates:
            ratio = float(np.median(rates["ours"]) / np.median(rates[who]))
            figures.add(case, f"ours / {who}", ratio, unit="")
            figures.claim(f"{form}: at least {least:g} times {who} ({ratio:.2f})", ratio >= least)
    beside_bare(figures, case, form)
    if "pfl" in runs:
        apart = apart_from_pfl(form, rounds)
        figures.add(case, f"weights after {rounds} rounds, apart from pfl's", apart, unit="")
        figures.claim(f"{form}: the weights of pfl to 1e-5 ({apart:.1e})", apart <= 1e-5)


def beside_bare(figures: report.Report, case: str, form: str) -> None:
    """The client path beside a plain torch loop over the same users, in turn."""
    users = 10 if figures.quick else task.USERS
    shard = task_users(users)
    strategy = task.Train(**task.settings(form, 1))
    query = next(strategy.rounds(task.schema(), 1.0, np.random.default_rng(0)))
    block_users = max(1, BLOCK_BYTES // (8 * query.dim))
    bare = task.bare_loop(form, shard, order_of(SEED))

    def client_path(per_user: str, query: Query) -> Callable[[], NDArray[np.float64]]:
        told = replace(strategy, per_user=per_user)

        def summed() -> NDArray[np.float64]:
            total = np.zeros(query.dim, dtype=np.int64)
            for block in shard.blocks(block_users):
                total += block_sum(told, query, block, seed=SEED)
            return total * Lattice.of(query).unit

        return summed

    paths = {how: client_path(how, query) for how in ("auto", "loop", "vmap")}
    fine, expected = client_path("auto", replace(query, resolution=FINE)), bare()
    apart = float(np.linalg.norm(fine() - expected) / np.linalg.norm(expected))
    rates: dict[str, list[float]] = {name: [] for name in (*paths, "bare")}
    for path in paths.values():
        path()
    for _ in range(1 if figures.quick else 5):
        for name, path in {**paths, "bare": bare}.items():
            with report.cpu_timer() as spent:
                path()
            rates[name].append(users / spent[0])
    for name in paths:
        figures.add(case, f"client path, per_user = {name}", rates[name], unit="users/CPU-s")
    figures.add(case, "bare torch loop", rates["bare"], unit="users/CPU-s", peer="torch")
    ratio = float(np.median(np.array(rates["auto"]) / np.array(rates["bare"])))
    figures.add(case, "client path / bare loop", ratio, unit="")
    figures.add(case, "difference of the two sums, relative", apart, unit="")
    figures.claim(f"{form}: at least 90 % of the bare loop ({ratio:.2f})", ratio >= 0.9)
    figures.claim(f"{form}: both compute the same sum to 1e-4 ({apart:.1e})", apart <= 1e-4)


def apart_from_pfl(form: str, rounds: int) -> float:
    """The largest difference of weights from pfl's after as many rounds, without noise.

    There is no such option: here the rounds are driven by hand, with exact sums on the finest
    lattice in place of the noisy ones. The convolutions take smaller steps: a last bit flips the
    choice of a pooled maximum, and what comes of that grows tenfold a round at the usual steps.
    """
    pace = 0.1 if form == "cnn" else 1.0
    strategy = task.Train(**task.settings(form, rounds + 1, pace=pace))
    shard = task_users(task.USERS)
    driven = strategy.rounds(task.schema(), 1.0, np.random.default_rng(0))
    query, orders = next(driven), []
    for number in range(rounds):
        orders.append(order_of((1, number)))
        fine = replace(query, resolution=FINE)
        total = sum(
            block_sum(strategy, fine, block, seed=(1, number)) for block in shard.blocks(25)
        )
        query = driven.send(NoisySum(total * Lattice.of(fine).unit, 1e-9, 1))
    taken = np.array(orders)
    theirs = task.pfl(form, rounds, noise_multiplier=0.0, orders=taken, pace=pace)
    return float(np.abs(query.inputs["weights"] - theirs.weights).max())


def order_of(seed: tuple[int, int]) -> NDArray[np.int64]:
    """In which order our users take their images where a round's public seed is this."""
    drawn = int(np.random.default_rng(seed).integers(1 << 62))
    local = LocalTraining(task.STEPS, task.LOCAL_LR, task.BATCH)
    return np.concatenate(places(task.IMAGES, local, seed=drawn))


def task_users(users: int) -> BoundedShard:
    """The first users of the task."""
    records = task.people().take(slice(0, users * task.IMAGES))
    return BoundedShard(records, np.repeat(np.arange(users), task.IMAGES), users, task.IMAGES)


def messages(figures: report.Report, *, clients: tuple[int, int]) -> None:
    """CPU of one more message: what a whole run of many clients takes above that of a few."""
    users = 2 * max(clients)
    data = table_users(users, columns=5)
    for name, settings, rounds in (
        ("independent", {}, 1),
        ("throughput:Repeated", {"num_rounds": 5}, 5),
    ):
        slopes = []
        for _ in range(2 if figures.quick else 5):
            few, many = (
                cpu_seconds_of_run(data, users, name, settings, columns=5, clients=number)
                for number in clients
            )
            slopes.append(1000 * (many - few) / (rounds * (clients[1] - clients[0])))
        case = f"local engine, {rounds} rounds, {clients[0]} to {clients[1]:,} clients"
        figure = figures.add(case, "CPU of a message", slopes, unit="CPU-ms")
        if rounds > 1:
            figures.claim(f"a message under 1 CPU-ms ({figure.mean:.2f})", figure.mean < 1)
    figures.note(
        "a client is set up once a run: odometer, policy and plan; of one round its message bears"
        " all of that, of five a fifth"
    )


@dataclass(frozen=True)
class Repeated(Strategy):
    """`independent`, asked again and again: rounds whose own work is small."""

    name: ClassVar[str] = "repeated"
    num_rounds: int = 5

    def event(self, schema: Schema, noise_multiplier: float) -> DpEvent:
        """Equal parts of the budget."""
        (each, *_) = accounting.split(noise_multiplier, [1 / self.num_rounds] * self.num_rounds)
        return accounting.event_of({(each, 1.0): self.num_rounds})

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """The same histograms each round; the last are kept."""
        (each, *_) = accounting.split(noise_multiplier, [1 / self.num_rounds] * self.num_rounds)
        once = Independent().rounds(schema, each, rng)
        query = next(once)
        for _ in range(self.num_rounds):
            noisy = yield query
        try:
            once.send(noisy)
        except StopIteration as end:
            learned: Columns = end.value
        return learned

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """As `independent`."""
        return Independent().answer(query, shard, rng)


def many_users(figures: report.Report, *, users: int) -> None:
    """One run over many users of one record each, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_many_users, args=(users, queue))
    child.start()
    cpu_s, rss = queue.get(timeout=_CHILD_LIMIT_S)
    child.join()
    case = f"{users:,} one-record users, {COLUMNS} columns, independent"
    figures.add(case, "CPU of the run", cpu_s, unit="CPU-s")
    figures.add(case, "peak memory of its process", rss / 1e9, unit="GB")
    figures.claim(f"{users:,} users under 60 CPU-s ({cpu_s:.1f})", cpu_s < 60)
    figures.claim(f"{users:,} users under 2 GB ({rss / 1e9:.2f})", rss < 2e9)


def _many_users(users: int, queue: Any) -> None:
    """What the child does."""
    data = table_users(users, columns=COLUMNS)
    spent = cpu_seconds_of_run(data, users, "independent", {}, columns=COLUMNS, clients=10)
    queue.put((spent, report.peak_rss_bytes()))


def cpu_seconds_of_run(
    data: Shard,
    users: int,
    strategy: str,
    settings: dict[str, Any],
    *,
    columns: int,
    clients: int,
) -> float:
    """CPU-seconds of one whole run on the local engine: ledger, odometers, release and all."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        schema = json.dumps(table_schema(columns).to_json())
        (base / "schema.json").write_text(schema, encoding="utf-8")
        config = parse_config(
            {
                "population": {
                    "name": "throughput",
                    "num_users": users,
                    "epsilon": 4.0,
                    "delta": 1e-7,
                },
                "data": {"schema": "schema.json"},
                "unit": {"column": "id", "max_records": 1},
                "budget": {"epsilon": 4.0},
                "strategy": {"name": strategy, **settings},
                "engine": {"clients": clients},
                "release": {"num_records": 1000},
            },
            base=base,
        )
        gc.collect()
        begun = time.process_time()
        run_local(plan_of(config), stream=OsKeyStream(), data=data)
        return time.process_time() - begun


def table_schema(columns: int) -> Schema:
    """Categories of 2 to 16 cells."""
    return Schema(
        tuple(
            Column(
                f"c{number}",
                "category",
                "public: made up for this benchmark",
                categories=tuple(str(cell) for cell in range(2 + number % COLUMNS)),
            )
            for number in range(columns)
        )
    )


def table_users(users: int, *, columns: int) -> Shard:
    """Users of one random record each."""
    rng = np.random.default_rng(0)
    codes = np.empty((users, columns), dtype=np.int32)
    for number, cells in enumerate(table_schema(columns).shape):
        codes[:, number] = rng.integers(0, cells, users)
    return Shard(Records(codes), np.array([f"user-{number}" for number in range(users)]))


if __name__ == "__main__":
    sys.exit(main())

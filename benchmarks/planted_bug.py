# SPDX-License-Identifier: Apache-2.0
"""A preprocessing bug on half of all devices, found in what a federated GAN draws.

The use case of Augenstein et al. (2020): a modeler who may look at no user's image sees that
something is wrong. Users are MNIST's 539 writers; in the `buggy` population half of them send
inverted images. `dp_fedavg_gan` learns each population at epsilon 8 by user (delta 1e-4), and a
detector looks at 1,000 synthetic images: the share whose left and right edges, which no writer
fills, are bright. Above a tenth, it says that there is a bug. The control is `clean`, the same
writers without the bug; `epsilon=0` is the same run on noise alone, from which nothing may show.
All settings but the number of users are the strategy's own; they were chosen on seeds of their own.

    python benchmarks/planted_bug.py --json planted_bug.json     everything: four CPU-minutes
    python benchmarks/planted_bug.py --quick                     scikit-learn's digits, seconds

Runs are kept in FILE.runs.jsonl, and a benchmark that was cut goes on where it was.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import User
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.direct import direct_run, prior
from fedsynth.strategies.dp_fedavg_gan import DpFedAvgGan
from measure import NOISE_ONLY, UNITS, Job, Runs, choices, dial_of, measure_all, measured, note_runs

TABLE = "mnist_writers"
CLEAN, BUGGY = "clean", "buggy"
EPSILON = 8.0
LEVEL = f"epsilon={EPSILON:g}"
DELTA = 1e-4
MOST_RECORDS = 150  # of a writer
NUM_SAMPLED = 1_000
BRIGHT = 0.7  # of the range; noise alone leaves edges gray
ALARM = 0.1  # share of bright images
SHARE = "share with bright edges"
QUICK: dict[str, Any] = {"num_rounds": 12, "sampling_prob": 0.4, "steps_per_round": 60}
QUICK_RECORDS = 5  # of a made-up user


def main() -> int:
    """Run the benchmark."""
    args = choices(__doc__, [TABLE], [EPSILON]).parse_args()
    figures = report.Report("planted_bug", args)
    try:
        _population(CLEAN, 0, args.quick)
    except tables.Missing as missing:
        figures.note(str(missing))
        return figures.finish()
    runs = Runs(args.json.with_suffix(".runs.jsonl") if args.json else None)
    jobs = [job for job in _jobs(args) if args.fresh or not runs.has(job)]
    measure_all(jobs, runs, partial(measured, limit_s=args.limit, by=found), at_once=args.jobs)
    for job in _cases():
        for metric in (SHARE, "alarm", "CPU-s"):
            if values := runs.values(*job, metric):
                figures.add(" ".join(job[1:]), metric, values, unit=UNITS.get(metric, ""))
    note_runs(figures, runs)
    _claims(figures, runs)
    return figures.finish(by_case=True)


def _cases() -> list[tuple[str, str, str]]:
    """Population and level, in the order of the table."""
    return [(TABLE, who, level) for who in (BUGGY, CLEAN) for level in (LEVEL, NOISE_ONLY)][:3]


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Everything that is to be measured, the first seed of all first."""
    for seed in range(1 if args.quick else args.seeds):
        for table, who, level in _cases():
            yield Job(table, who, level, seed, quick=args.quick)


def found(job: Job) -> dict[str, float]:
    """One run: learn, sample, and look at the edges."""
    case = _population(job.method, job.seed, job.quick)
    strategy = DpFedAvgGan(num_users=case.train.num_users, **(QUICK if job.quick else {}))
    dial = dial_of(strategy, case, EPSILON)
    rng = np.random.default_rng([job.seed, 6])  # settings were chosen on other seeds
    with report.cpu_timer() as learning:
        if job.level == NOISE_ONLY:
            learned = prior(strategy, case.schema, dial, rng)
        else:
            learned = direct_run(strategy, case.schema, case.train, dial, rng=rng)
        share = share_bright(learned.sample(NUM_SAMPLED, rng))
    return {SHARE: share, "alarm": float(share > ALARM), "CPU-s": learning[0]}


def share_bright(records: Records) -> float:
    """Share of images whose left and right edges are bright."""
    if records.images is None:
        raise ConfigError("records without images")
    width = records.images.shape[2]
    edge = max(1, width // 14)
    edges = np.concatenate([records.images[:, :, :edge], records.images[:, :, -edge:]], axis=2)
    return float((edges.mean(axis=(1, 2, 3)) > 255 * BRIGHT).mean())


def with_bug(shard: BoundedShard, seed: int) -> BoundedShard:
    """The same users, every other of them, by chance, with inverted images."""
    if shard.records.images is None:
        raise ConfigError("records without images")
    order = np.random.default_rng([seed, 7]).permutation(shard.num_users)
    is_hit = (order < shard.num_users // 2)[shard.user_index]
    images = shard.records.images.copy()
    images[is_hit] = 255 - images[is_hit]
    records = Records(shard.records.codes, images)
    return BoundedShard(records, shard.user_index, shard.num_users, shard.max_records)


def _population(who: str, seed: int, quick: bool) -> tables.Case:
    """Writers, or made-up users of scikit-learn's digits; half of them with the bug.

    Raises:
      Missing: MNIST by writer is not on this machine.
    """
    case = _digits() if quick else _writers()
    if who == CLEAN:
        return case
    return tables.Case(case.name, case.schema, with_bug(case.train, seed), case.test, case.delta)


@lru_cache(maxsize=1)
def _writers() -> tables.Case:
    """MNIST by its writers."""
    label = Column("label", "category", "public: ten digits", tuple("0123456789"))
    image = ImageColumn("image", (28, 28, 1), "public: the scanner's format")
    schema = Schema((label,), image, target="label")
    path = tables.folder().parent / "image" / "mnist_writers_train.npz"
    if not path.is_file():
        raise tables.Missing(f"{path.name} is not at {path.parent}: nothing was measured")
    with np.load(path, allow_pickle=False) as arrays:
        codes = arrays["labels"].astype(np.int32)[:, None]
        records = Records(codes, arrays["images"][..., None])
        writers = arrays["writer_id"].astype(np.str_)
    shard = bound(Shard(records, writers), User("writer", max_records=MOST_RECORDS), seed=0)
    return tables.Case(TABLE, schema, shard, records.take(slice(0, 0)), DELTA)


@lru_cache(maxsize=1)
def _digits() -> tables.Case:
    """Scikit-learn's digits, dealt out to users of a few each."""
    small = tables.load("digits")
    records = small.train.records
    users = np.arange(len(records)) // QUICK_RECORDS
    shard = BoundedShard(records, users, int(users[-1]) + 1, QUICK_RECORDS)
    return tables.Case(TABLE, small.schema, shard, small.test, DELTA)


def _claims(figures: report.Report, runs: Runs) -> None:
    """The detector is right about every run."""
    for table, who, level in _cases():
        alarms = runs.values(table, who, level, "alarm")
        if alarms:
            wanted = who == BUGGY and level == LEVEL
            right = sum(bool(alarm) == wanted for alarm in alarms)
            what = "the bug is found" if wanted else "nothing is found"
            figures.claim(
                f"{who} {level}: {what} in {right} of {len(alarms)} seeds", right == len(alarms)
            )


if __name__ == "__main__":
    raise SystemExit(main())

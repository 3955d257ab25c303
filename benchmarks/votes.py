# SPDX-License-Identifier: Apache-2.0
"""Votes of real users: what each rule hears at equal epsilon, and what counting them costs.

One round of ten on a pool of 100 candidates, records of people who do not vote. TV is the total
variation distance of the shares that are read from the noisy votes from the exact shares: with
every user weighing one, and with every record weighing one. The signal is a candidate's mean votes
over the noise, beside what the planner says of it from how many records users hold, and over how
many candidates their votes are spread.

    python benchmarks/votes.py --json votes.json        everything: ten minutes
    python benchmarks/votes.py --quick                  the shipped example, seconds
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.placing import placed
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.candidates import Candidates
from fedsynth.core.embedding import EMBEDDER, whole
from fedsynth.core.generation import PLACES
from fedsynth.core.mechanism import Lattice, clipped_sum, noised
from fedsynth.core.privacy import Budget, User
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.registry import build_embedder
from fedsynth.strategies.parts.nearest import Finder, TableMetric
from fedsynth.strategies.parts.votes import ballot
from fedsynth.strategies.private_evolution import PrivateEvolution
from numpy.typing import NDArray

NUM_ROUNDS, NUM_CANDIDATES, DELTA = 10, 100, 1e-6
MOST_RECORDS = 50  # of a user, before any rule
MOST_USERS = 2000
RULES = {
    "one_record": {"vote": "one_record"},
    "l1": {"vote": "l1"},
    "l2_normalize": {"vote": "l2_normalize"},
    "l2_clip 1": {"vote": "l2_clip", "max_norm": 1.0},
    "l2_clip 2": {"vote": "l2_clip", "max_norm": 2.0},
    "l2_clip 5": {"vote": "l2_clip", "max_norm": 5.0},
    "l2_clip 20": {"vote": "l2_clip", "max_norm": 20.0},
}
CAPPED = "cap 16, noise x 16"  # how PrE-Text bounds a user: so many records, all for one candidate
SPEED = (20_000, 2_000, 384)  # records, candidates, dimensions


@dataclass(frozen=True)
class Electorate:
    """Users who vote, and a pool to vote on.

    Attributes:
      name: Of the data.
      schema: Public schema.
      shard: The users, placed if they write.
      pool: Records of others.
      embedder: What placed both, or empty.
    """

    name: str
    schema: Schema
    shard: BoundedShard
    pool: Candidates
    embedder: str


def main() -> int:
    """Measure all."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="repetitions (default 5)")
    args = options.parse_args()
    figures = report.Report("votes", args)
    seeds, epsilons = (2, (1.0,)) if args.quick else (args.seeds, (1.0, 4.0))
    off: list[float] = []
    for electorate in _electorates(figures, quick=args.quick):
        for epsilon in epsilons:
            off += _rules(figures, electorate, epsilon, seeds)
    worst = max(off, default=0.0)
    figures.claim(f"signal as predicted, within 10 %: at most {worst:.1%} off", worst <= 0.10)
    _speed(figures, quick=args.quick)
    return figures.finish(by_case=True)


def _electorates(figures: report.Report, *, quick: bool) -> Iterator[Electorate]:
    """Patients by their encounters, customers by their lines, and chatters by their messages."""
    for name in ["diabetes130_cut"] if quick else ["diabetes130", "online_retail"]:
        try:
            case = tables.load(name, quick=quick)
        except tables.Missing as missing:
            figures.note(str(missing))
            continue
        num_users = min(MOST_USERS, case.train.num_users)
        shard = next(case.train.blocks(num_users))
        rows = np.random.default_rng(0).choice(len(case.test), NUM_CANDIDATES)
        yield Electorate(name, case.schema, shard, Candidates(case.test.codes[rows]), "")
    path = tables.folder().parent / "text" / "irc_users.jsonl.gz"
    if quick:
        return
    if not path.exists():
        figures.note(f"{path.name} is not at hand: no votes of chatters")
        return
    yield _chatters(path)


def _chatters(path) -> Electorate:  # type: ignore[no-untyped-def]
    """Users of a technical chat room with five messages or more."""
    messages: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if not row.get("bot") and len(row["text"].split()) >= 5:
                messages.setdefault(row["user"], []).append(row["text"])
    heavy = sorted(user for user, texts in messages.items() if len(texts) >= 5)
    chosen = np.random.default_rng(0).permutation(heavy)[: MOST_USERS + NUM_CANDIDATES].tolist()
    schema = Schema((), text=TextColumn("text", 300))
    embedder = build_embedder("minilm", {})
    voters, others = chosen[NUM_CANDIDATES:], chosen[:NUM_CANDIDATES]
    texts = as_texts(text for user in voters for text in messages[user])
    ids = np.array([user for user in voters for _ in messages[user]])
    records = Records(np.zeros((len(texts), 0), dtype=np.int32), texts=texts)
    shard = bound(Shard(records, ids), User("user", max_records=MOST_RECORDS), seed=0)
    seen = as_texts(messages[user][0] for user in others)
    fingerprint = np.frombuffer(bytes.fromhex(embedder.fingerprint()), dtype=np.uint8)
    extras = {
        PLACES: whole(embedder.embed(seen.tolist())),
        EMBEDDER: np.tile(fingerprint, (len(seen), 1)),
    }
    pool = Candidates(np.zeros((len(seen), 0), dtype=np.int32), texts=seen, extras=extras)
    return Electorate("irc", schema, placed(shard, embedder), pool, "minilm")


def _rules(
    figures: report.Report, electorate: Electorate, epsilon: float, seeds: int
) -> list[float]:
    """Every rule at one epsilon; how far off each predicted signal is."""
    noise = accounting.calibrate(
        lambda z: accounting.compose([accounting.single_event(z * NUM_ROUNDS**0.5)] * NUM_ROUNDS),
        Budget(epsilon, DELTA),
    )
    votes = _votes(electorate)
    by_user = np.zeros((electorate.shard.num_users, NUM_CANDIDATES))
    np.add.at(by_user, (electorate.shard.user_index, votes), 1)
    held = by_user.sum(axis=1)
    spread = held**2 / np.maximum((by_user**2).sum(axis=1), 1)
    truths = {
        "users": (by_user / np.maximum(held, 1)[:, None]).sum(axis=0),
        "records": by_user.sum(axis=0),
    }
    off = []
    for name, settings in RULES.items():
        strategy = PrivateEvolution(
            num_rounds=NUM_ROUNDS,
            num_candidates=NUM_CANDIDATES,
            num_votes=1,
            grounding=0.0,
            embedder=electorate.embedder,
            label="",
            model="words" if electorate.embedder else "",
            **settings,  # type: ignore[arg-type]
        )
        told = strategy.signal(
            electorate.schema, noise, electorate.shard.num_users, records=held, distinct=spread
        )
        signal = _heard(figures, electorate, strategy, noise, epsilon, name, truths, seeds)
        figures.add(_case(electorate, epsilon, name), "signal predicted", told.each, unit="")
        off.append(abs(signal / told.each - 1))
    _capped(figures, electorate, by_user, noise * NUM_ROUNDS**0.5, epsilon, truths, seeds)
    return off


def _heard(
    figures: report.Report,
    electorate: Electorate,
    strategy: PrivateEvolution,
    noise: float,
    epsilon: float,
    name: str,
    truths: dict[str, NDArray[np.float64]],
    seeds: int,
) -> float:
    """One rule: its errors and its signal."""
    query = _ballot(electorate, strategy, noise * NUM_ROUNDS**0.5)
    lattice, stddev = Lattice.of(query), query.noise_multiplier * query.clip
    errors: dict[str, list[float]] = {which: [] for which in truths}
    signal = 0.0
    for seed in range(seeds):
        answer = strategy.answer(query, electorate.shard, np.random.default_rng(seed))
        total = clipped_sum(answer, query)
        signal += float(total.mean()) * lattice.unit / stddev / seeds
        noisy = noised(total, stddev=stddev, lattice=lattice, stream=OsKeyStream())
        shares = strategy.read(NoisySum(noisy * lattice.unit, stddev, 1))
        for which, truth in truths.items():
            errors[which].append(_off(shares, truth))
    case = _case(electorate, epsilon, name)
    for which, found in errors.items():
        figures.add(case, f"TV, {which} alike", found, unit="")
    figures.add(case, "signal", signal, unit="")
    return signal


def _capped(
    figures: report.Report,
    electorate: Electorate,
    by_user: NDArray[np.float64],
    noise: float,
    epsilon: float,
    truths: dict[str, NDArray[np.float64]],
    seeds: int,
) -> None:
    """Sixteen records of a user at most, with noise for all of them on one candidate."""
    held = by_user.sum(axis=1, keepdims=True)
    kept = by_user * np.minimum(1.0, 16 / np.maximum(held, 1))
    total, stddev = kept.sum(axis=0), 16 * noise
    strategy = PrivateEvolution(num_candidates=NUM_CANDIDATES, num_votes=1)
    errors: dict[str, list[float]] = {which: [] for which in truths}
    for seed in range(seeds):
        noisy = total + stddev * np.random.default_rng(seed).normal(size=len(total))
        shares = strategy.read(NoisySum(noisy, stddev, 1))
        for which, truth in truths.items():
            errors[which].append(_off(shares, truth))
    case = _case(electorate, epsilon, CAPPED)
    for which, found in errors.items():
        figures.add(case, f"TV, {which} alike", found, unit="")
    figures.add(case, "signal", float(total.mean() / stddev), unit="")


def _off(shares: NDArray[np.float64] | None, truth: NDArray[np.float64]) -> float:
    """Total variation distance of shares from the truth's; equal shares where nothing is heard."""
    found = np.full(len(truth), 1 / len(truth)) if shares is None else shares
    return float(0.5 * np.abs(found - truth / truth.sum()).sum())


def _ballot(electorate: Electorate, strategy: PrivateEvolution, noise: float) -> Query:
    """The query for votes on the pool."""
    return ballot(
        electorate.schema,
        -1,
        electorate.pool,
        clip=strategy.max_norm if strategy.vote == "l2_clip" else 1.0,
        noise_multiplier=noise,
        cells=strategy.vote in ("l2_clip", "one_record"),
    )


def _votes(electorate: Electorate) -> NDArray[np.int64]:
    """The candidate that each record votes for."""
    strategy = PrivateEvolution(num_candidates=NUM_CANDIDATES, num_votes=1, max_norm=1e6)
    query = _ballot(electorate, strategy, 1.0)
    answer = strategy.answer(query, electorate.shard, np.random.default_rng(0))
    if answer.indices is None or len(answer.indices) != len(electorate.shard.records):
        raise SystemExit("a record does not vote")
    return answer.indices[:, 0]


def _case(electorate: Electorate, epsilon: float, name: str) -> str:
    """How a row is called."""
    return f"{electorate.name} {name.replace(' ', '_')} epsilon={epsilon:g}"


def _speed(figures: report.Report, *, quick: bool) -> None:
    """Votes of many records on many candidates, beside the matrix product alone."""
    records, candidates, dim = (size // (10 if quick else 1) for size in SPEED)
    rng = np.random.default_rng(0)
    places = whole(_directions(rng, records, dim))
    pool = whole(_directions(rng, candidates, dim))
    metric = TableMetric(np.zeros(0, np.int64), np.zeros(0, np.int64), -1, 0.3)
    plain, transposed = places.astype(np.float32), pool.astype(np.float32).T.copy()
    ratios, seconds = [], []
    for _ in range(5):
        begun = time.process_time()
        for first in range(0, records, 2000):
            plain[first : first + 2000] @ transposed
        alone = time.process_time() - begun
        begun = time.process_time()
        groups = np.zeros(candidates, dtype=np.int64)
        finder = Finder(
            np.zeros((candidates, 0), np.int32), None, groups, metric=metric, places=pool
        )
        everyone = np.zeros(records, dtype=np.int64)
        finder.nearest(np.zeros((records, 0), np.int32), None, everyone, 1, places=places)
        seconds.append(time.process_time() - begun)
        ratios.append(seconds[-1] / alone)
    case = f"{records:,} records, {candidates:,} candidates, {dim} dimensions"
    figures.add(case, "CPU-s", seconds, unit="CPU-s")
    figures.add(case, "to the matrix product alone", ratios, unit="")
    if not quick:
        figures.claim(f"{case}: {min(seconds):.2f} CPU-s, under one", min(seconds) < 1)
        median = float(np.median(ratios))
        figures.claim(f"counting within 1.5x of the product: {median:.2f}x", median <= 1.5)
    up = 8 * candidates
    figures.add(case, "kB up, client and round", up / 1e3, unit="kB")


def _directions(rng: np.random.Generator, num: int, dim: int) -> NDArray[np.float64]:
    """Random vectors of length one."""
    found = rng.normal(size=(num, dim))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


if __name__ == "__main__":
    raise SystemExit(main())

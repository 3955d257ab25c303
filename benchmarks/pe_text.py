# SPDX-License-Identifier: Apache-2.0
"""Federated text by PrE-Text: what votes of real users add to what a public model writes unasked.

Users of a technical chat room, and roles in Shakespeare's plays, each with a few short texts. A
public language model (SmolLM2-135M) writes a first pool; users vote by MiniLM's embeddings; the
model expands what survived. Rows are `epsilon=inf` (exact votes), 4, 1, and 0: what the model makes
of the same first pool when nobody votes, expanded alike. Two judges, on users who took no part:

- next-token accuracy of a small language model, trained on other public text and then on as many
  texts of a row as of any other, `real` ones among them; the interval is of a bootstrap over users,
  and so is `p over users`, for these very models; `p over seeds` is over other pools and models;
- divergence: area under MAUVE's curve on MiniLM embeddings of equally many texts, beside that of
  real texts of other users (`real`), which nothing synthetic of that size can pass.

SmolLM2 has read much of the public web, most likely Shakespeare and chat logs among it: figures of
epsilon = 0 profit from that as much as all others, and none of them says what a model would do on
texts that were never public.

    python benchmarks/pe_text.py --json FILE             an hour of one idle core
    python benchmarks/pe_text.py --size two-minutes
    python benchmarks/pe_text.py --quick                 the example's cut, without any network

Each row of a seed goes into FILE.SIZE.runs.jsonl when it is done, the language model's replies into
the folder FILE.SIZE: a benchmark that was cut goes on where it was.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import gzip
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.placing import placed
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.answering import answered
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError
from fedsynth.core.generation import Generation
from fedsynth.core.privacy import Budget, User
from fedsynth.core.query import Rounds, Strategy
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.frechet import mauve_like
from fedsynth.models.live import make
from fedsynth.models.registry import build_embedder
from fedsynth.models.small_model import Shape, SmallModel, fine_tune
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.pre_text import PreText
from fedsynth.strategies.private_evolution import PrivateEvolution
from numpy.typing import NDArray

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shakespeare"
LEVELS = {"inf": math.inf, "4": 4.0, "1": 1.0, "0": 0.0}
MOST_WORDS = 30
SCHEMA = Schema((), text=TextColumn("text", 300))
ACCURACY, DIVERGENCE, LIFT = "next-token accuracy", "divergence", "lift"
BRIEFS: dict[str, dict[str, Any]] = {  # public words alone: nobody's text was looked up for them
    "irc": {
        "about": "short messages in a chat room where people help each other with Linux",
        "examples": (
            "my sound stopped working after the upgrade, any ideas?",
            "try to run it again from a terminal and paste the error",
            "which version are you running?",
            "ok thanks, that fixed it",
            "it says permission denied when i run the script",
            "has anyone got wireless working on this laptop?",
            "you need to be root to edit that file",
            "i think the driver is in the kernel already, just load the module",
        ),
    },
    "shakespeare": {
        "about": "lines that a character speaks in a play by Shakespeare",
        "examples": (
            "My lord, the messenger is come, and he brings heavy news from the north.",
            "What, wilt thou stay, and leave thy brother to fight alone?",
            "I never saw thee ere this morning, good man; go to thy bed.",
            "O, that this night would end, and I might see her face again!",
            "Come, sirrah, bring us wine, and let the fiddler play.",
            "He is a knave, and I will have his purse ere morning.",
            "Madam, the duke attends you in the garden.",
            "Speak not of love to me; my heart is buried with the king.",
        ),
    },
}
PUBLISHED = (11.3, 11, 3e-6)  # PrE-Text: sigma, rounds and delta of its epsilon 1.29


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
      users: Who vote, at most.
      judges: Users who judge.
      records: Texts of a user, at most.
      rounds: Of votes.
      candidates: In the pool.
      expanded: Texts that are written after the seeds.
      trained: Texts that a small model learns from, and that are embedded.
      public: Other texts that it has learned from before.
      seeds: Repetitions.
    """

    users: int
    judges: int
    records: int
    rounds: int
    candidates: int
    expanded: int
    trained: int
    public: int
    seeds: int


SIZES = {
    "quick": Size(400, 100, 4, 2, 40, 120, 150, 150, 2),
    "two-minutes": Size(200, 60, 2, 2, 16, 12, 40, 200, 1),
    "one-hour": Size(1200, 300, 4, 3, 48, 80, 300, 4000, 5),
}


@dataclass(frozen=True)
class Case:
    """Texts of one kind.

    Attributes:
      name: Of the data.
      voters: The users, bounded.
      delta: At which their votes are priced.
      others: Texts of users who neither vote nor judge: for the bound that a corpus of real texts
        sets.
      judges: Texts of users who judge.
      judge_of: Whom each of them is of.
      public: Texts of another kind that a small model starts from.
    """

    name: str
    voters: BoundedShard
    delta: float
    others: list[str]
    judges: list[str]
    judge_of: NDArray[np.int64]
    public: list[str]


def main() -> int:
    """Measure all."""
    options = report.parser(__doc__)
    options.add_argument("--size", choices=("two-minutes", "one-hour"), default="one-hour")
    options.add_argument("--seeds", type=int, help="repetitions")
    options.add_argument("--data", help="only this data set")
    args = options.parse_args()
    name = "quick" if args.quick else args.size
    size = replace(SIZES[name], seeds=args.seeds or SIZES[name].seeds)
    figures = report.Report("pe_text", args)
    _noise(figures)
    with kept(args.json, name) as (known, folder):
        cases = [
            case
            for case in cases_of(figures, size, quick=args.quick)
            if args.data in (None, case.name)
        ]
        rows = ["real", *(f"epsilon={level}" for level in LEVELS)]
        rows += [] if args.quick else ["private_evolution epsilon=4"]
        for seed in range(size.seeds):
            for case in cases:
                _measure(case, size, known, folder, rows, seed, quick=args.quick)
        found = [_told(figures, case, size, known, rows) for case in cases]
        if name == "one-hour":
            _claims(figures, found)
    if not args.quick:
        figures.note("SmolLM2 has most likely read Shakespeare and chat logs: see the docstring")
    return figures.finish(by_case=True)


def _noise(figures: report.Report) -> None:
    """Noise of the published code beside what its epsilon calls for."""
    sigma, rounds, delta = PUBLISHED
    from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(sigma), rounds))
    told = accountant.get_epsilon(delta)
    strategy = PreText(num_rounds=rounds, model="words", embedder="word_hashes")
    dial = accounting.calibrate(lambda z: strategy.event(SCHEMA, z), Budget(told, delta))
    ours = next(iter(accounting.leaves(strategy.event(SCHEMA, dial))))[0]
    added = 1.541 * 2**0.5 * sigma
    case = f"noise of PrE-Text at epsilon {told:.2f}"
    figures.add(case, "published code", added, unit="", peer="PrE-Text")
    figures.add(case, "ours", ours, unit="")
    figures.add(case, "published to ours", added / ours, unit="")
    figures.claim(
        f"at PrE-Text's epsilon {told:.2f} a record's vote has {added / ours:.2f} times less noise",
        added / ours > 2.17,
    )


# --- data


def cases_of(figures: report.Report, size: Size, *, quick: bool) -> Iterator[Case]:
    """Chatters and roles; quick: the example's roles."""
    if quick:
        yield case_of("shakespeare", parquet("speeches"), flat(parquet("holdout")), size)
        return
    texts: dict[str, dict[str, list[str]]] = {}
    for name, file, fewest in (
        ("irc", "irc_users.jsonl.gz", 5),
        ("shakespeare", "shakespeare_roles.jsonl.gz", 1),
    ):
        path = tables.folder().parent / "text" / file
        if not path.exists():
            figures.note(f"{file} is not at hand: nothing of {name}")
            return
        by_user = read(path)
        texts[name] = {user: own for user, own in by_user.items() if len(own) >= fewest}
    for name, other in (("irc", "shakespeare"), ("shakespeare", "irc")):
        yield case_of(name, texts[name], flat(texts[other]), size)


def read(path: Path) -> dict[str, list[str]]:
    """Texts of each user: those of five words or more, cut at thirty."""
    texts: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            words = row["text"].split()
            if not row.get("bot") and len(words) >= 5:
                texts.setdefault(row["user"], []).append(" ".join(words[:MOST_WORDS]))
    return texts


def parquet(name: str) -> dict[str, list[str]]:
    """Texts of each role of the example."""
    texts: dict[str, list[str]] = {}
    for row in pq.read_table(EXAMPLE / f"{name}.parquet").to_pylist():
        texts.setdefault(row["role"], []).append(row["speech"])
    return texts


def flat(texts: dict[str, list[str]]) -> list[str]:
    """All texts in a fixed random order."""
    every = [text for user in sorted(texts) for text in texts[user]]
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))]


def case_of(name: str, texts: dict[str, list[str]], public: list[str], size: Size) -> Case:
    """Users dealt out: judges, others, and those who vote."""
    rng = np.random.default_rng(0)
    users = rng.permutation(sorted(texts)).tolist()
    judges, rest = users[: size.judges], users[size.judges :]
    num_others = min(len(rest) // 4, size.trained)
    others, voters = rest[:num_others], rest[num_others:][: size.users]
    judged = [(i, t) for i, user in enumerate(judges) for t in texts[user][: size.records]]
    ids = np.array([user for user in voters for _ in texts[user]])
    written = as_texts(text for user in voters for text in texts[user])
    records = Records(np.zeros((len(written), 0), dtype=np.int32), texts=written)
    return Case(
        name,
        bound(Shard(records, ids), User("user", max_records=size.records), seed=0),
        delta=10.0 ** math.floor(math.log10(1 / (2 * len(voters)))),
        others=flat({user: texts[user][: size.records] for user in others}),
        judges=[text for _, text in judged],
        judge_of=np.array([i for i, _ in judged]),
        public=public[: size.public],
    )


# --- runs


@dataclass
class Known:
    """What was measured, by data, row and seed; in a file too, if one is named."""

    path: Path | None
    found: dict[str, dict[str, Any]]

    def of(self, *key: object) -> dict[str, Any] | None:
        """What is known of a row of a seed."""
        return self.found.get(" ".join(map(str, key)))

    def add(self, found: dict[str, Any], *key: object) -> dict[str, Any]:
        """Keep it, at once."""
        name = " ".join(map(str, key))
        self.found[name] = found
        print(f"{name}: {found['accuracy']:.4f}", file=sys.stderr)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": name} | found) + "\n")
        return found


@contextmanager
def kept(path: Path | None, size: str) -> Iterator[tuple[Known, Path]]:
    """Where rows and replies of a size are kept: beside the JSON, or nowhere for long."""
    with tempfile.TemporaryDirectory() as nowhere:
        runs = None if path is None else path.with_suffix(f".{size}.runs.jsonl")
        found: dict[str, dict[str, Any]] = {}
        if runs is not None and runs.exists():
            for line in runs.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut short
                found[row.pop("row")] = row
        folder = Path(nowhere) if path is None else path.with_suffix(f".{size}")
        folder.mkdir(parents=True, exist_ok=True)
        yield Known(runs, found), folder


class Cached:
    """A strategy whose language model is asked for nothing twice, and is otherwise as it was."""

    def __init__(self, strategy: Strategy, folder: Path) -> None:
        self._strategy, self._folder = strategy, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """The strategy's rounds, with all that it asks of models answered."""

        def source(request: Generation) -> Candidates:
            return make(request, self._folder)

        return answered(self._strategy.rounds(schema, noise_multiplier, rng), source)


def _settings(case: Case, size: Size, *, quick: bool) -> dict[str, Any]:
    """What both strategies are told."""
    shared = {"num_rounds": size.rounds, "num_candidates": size.candidates, "label": ""}
    if quick:
        words = tuple(dict.fromkeys(" ".join(case.public[:40]).casefold().split()))
        model = {"model": "words", "model_settings": {"words": words, "max_words": 12}}
        return shared | model | {"embedder": "word_hashes"}
    brief = BRIEFS[case.name] | {"max_words": MOST_WORDS}
    return shared | {"model": "writer", "model_settings": brief}


def _texts_of(
    case: Case, size: Size, level: str, seed: int, folder: Path, *, quick: bool, alone: bool = False
) -> list[str]:
    """As many texts as a small model learns from, of a level.

    Args:
      case: The users.
      size: How much is done.
      level: Of `LEVELS`.
      seed: Of the public randomness: all levels of a seed begin with the same pool.
      folder: Where replies are kept.
      quick: Without any network.
      alone: By `private_evolution`, which neither keeps seeds nor expands them.
    """
    settings = _settings(case, size, quick=quick)
    if alone:
        far = {"degree_first": PreText.degree_first, "degree_last": PreText.degree_last}
        strategy: PrivateEvolution | PreText = PrivateEvolution(**settings, **far)
    else:
        strategy = PreText(**settings, num_expanded=size.expanded, seed_share=0.3)
    cached: Any = Cached(strategy, folder)
    if (embedder := strategy.embedder_for(SCHEMA)) is not None:
        placed(case.voters, embedder, folder)  # once for all runs on this data
    rng, epsilon = np.random.default_rng([seed, 7]), LEVELS[level]
    heard = logging.WARNING if epsilon else logging.ERROR  # of nobody nothing can be heard
    logging.getLogger("fedsynth").setLevel(heard)
    if math.isinf(epsilon):
        learned = non_private(cached, SCHEMA, case.voters, rng)
    else:
        voters = case.voters if epsilon else case.voters.only(np.zeros(case.voters.num_users, bool))
        budget = Budget(epsilon or 1.0, case.delta)
        dial = accounting.calibrate(lambda z: strategy.event(SCHEMA, z), budget)
        learned = direct_run(cached, SCHEMA, voters, dial, rng=rng)
    drawn = learned.sample(size.trained, np.random.default_rng([seed, 8])).texts
    if drawn is None:
        raise SystemExit("a strategy of texts gave none")
    return [str(text) for text in drawn]


# --- judges


def _measure(
    case: Case,
    size: Size,
    known: Known,
    folder: Path,
    rows: Sequence[str],
    seed: int,
    *,
    quick: bool,
) -> None:
    """All rows of one data set and seed, and the base alone."""
    for row in rows:
        if known.of(case.name, row, seed) is None:
            with report.cpu_timer() as spent:
                found = _judged(case, size, row, seed, folder, quick=quick)
            known.add(found | {"CPU-s": spent[0]}, case.name, row, seed)
    if known.of(case.name, "base", 0) is None:
        known.add(accuracy_of(base_of(case, folder), case), case.name, "base", 0)


def _judged(
    case: Case, size: Size, row: str, seed: int, folder: Path, *, quick: bool
) -> dict[str, Any]:
    """What both judges say of the texts of a row."""
    if row == "real":
        rng = np.random.default_rng([seed, 9])
        texts = [case.others[i] for i in rng.permutation(len(case.others))[: size.trained]]
    else:
        level = row.partition("epsilon=")[2]
        texts = _texts_of(
            case, size, level, seed, folder, quick=quick, alone=row.startswith("private")
        )
    base = base_of(case, folder)
    model = fine_tune(texts, base, seed=seed, learning_rate=step_of(base.shape))
    judges = np.random.default_rng([seed, 10]).permutation(len(case.judges))[: len(texts)]
    divergence = mauve_like(
        _embedded(tuple(texts), quick=quick),
        _embedded(tuple(case.judges[i] for i in judges), quick=quick),
        max(2, min(len(texts), len(judges)) // 10),
        np.random.default_rng([seed, 11]),
        units_b=case.judge_of[judges],
        num_resamples=200,
    )
    return accuracy_of(model, case) | {
        "divergence": divergence.value,
        "low": divergence.low,
        "high": divergence.high,
        "different": len({*texts}),
    }


def accuracy_of(model: SmallModel, case: Case) -> dict[str, Any]:
    """How often a model guesses judges' next tokens, and what of it each of them adds."""
    guesses = np.zeros((int(case.judge_of.max()) + 1, 2), dtype=np.int64)
    np.add.at(guesses, case.judge_of, model.guesses(case.judges))
    return {
        "accuracy": float(guesses[:, 0].sum() / guesses[:, 1].sum()),
        "guesses": guesses.tolist(),
    }


def base_of(case: Case, folder: Path) -> SmallModel:
    """The small model that all rows start from, which knows other public texts alone.

    A smaller one, where there are few of them. It is kept in a folder.
    """
    kept = folder / f"base-{case.name}"
    if not kept.exists():
        few = Shape(vocabulary=512, dim=64, max_tokens=48)
        shape = Shape() if len(case.public) > 1000 else few
        fine_tune(case.public, shape=shape, epochs=4, learning_rate=step_of(shape)).save(kept)
    return SmallModel.load(kept)


def step_of(shape: Shape) -> float:
    """Learning rate of a model: smaller ones take larger steps."""
    return 0.002 if shape.dim > 64 else 0.01


@lru_cache(maxsize=8)
def _embedded(texts: tuple[str, ...], *, quick: bool) -> NDArray[np.float32]:
    """Embeddings."""
    return build_embedder("word_hashes" if quick else "minilm", {}).embed(texts)


# --- figures


def _told(
    figures: report.Report, case: Case, size: Size, known: Known, rows: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Put the rows of one data set into the table; its runs by row, one a seed."""
    base = known.of(case.name, "base", 0) or {}
    name = f"{case.name} public base alone"
    figures.add(name, f"{ACCURACY}, %", 100 * base["accuracy"], unit="%")
    found = {
        row: [known.of(case.name, row, seed) or {} for seed in range(size.seeds)] for row in rows
    }
    zero = found["epsilon=0"]
    for row in rows:
        name = f"{case.name} {row}"
        figures.add(name, f"{ACCURACY}, %", [100 * r["accuracy"] for r in found[row]], unit="%")
        low, high = _interval(found[row])
        figures.add(name, "95 % from", 100 * low, unit="%")
        figures.add(name, "to", 100 * high, unit="%")
        if row not in ("real", "epsilon=0"):
            lifts = apart(found[row], zero, "accuracy")
            figures.add(name, f"{LIFT}, points", [100 * lift for lift in lifts], unit="")
            figures.add(name, "p over users", p_users(found[row], zero), unit="")
            figures.add(name, "p over seeds", p_seeds(lifts), unit="")
        figures.add(name, DIVERGENCE, [r["divergence"] for r in found[row]], unit="")
        figures.add(name, "its 95 % from", float(np.mean([r["low"] for r in found[row]])), unit="")
        figures.add(name, "its to", float(np.mean([r["high"] for r in found[row]])), unit="")
        figures.add(name, "CPU-s", [r["CPU-s"] for r in found[row]], unit="CPU-s")
    return found


def _claims(figures: report.Report, found: Sequence[dict[str, list[dict[str, Any]]]]) -> None:
    """What votes must add to what nobody votes on, over the seeds of all data sets together."""
    for level in ("inf", "4", "1"):
        for what, scale in (("accuracy", 100), ("divergence", 1)):
            lifts = [
                scale * lift
                for rows in found
                for lift in apart(rows[f"epsilon={level}"], rows["epsilon=0"], what)
            ]
            mean, p = float(np.mean(lifts)), p_seeds(lifts)
            points = " points" if scale > 1 else ""
            figures.claim(
                f"epsilon {level}: {what} {mean:+.2g}{points} over epsilon = 0 in"
                f" {len(lifts)} pairs, p = {p:.2g}",
                mean > 0 and p < 0.05,
            )


def _interval(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Of the mean accuracy over seeds, by a bootstrap over judges."""
    found = _resampled(runs)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def apart(runs: Sequence[dict[str, Any]], zero: Sequence[dict[str, Any]], what: str) -> list[float]:
    """How far each seed's figure is above that of epsilon = 0."""
    return [run[what] - none[what] for run, none in zip(runs, zero, strict=True)]


def p_users(runs: Sequence[dict[str, Any]], zero: Sequence[dict[str, Any]]) -> float:
    """Two-sided p-value of a difference in accuracy, by a paired bootstrap over judges.

    It says that these very models differ, whatever users they are judged by; another seed may
    give others, which `p_seeds` tells.
    """
    drawn = _resampled(runs) - _resampled(zero)
    below = (1 + (drawn <= 0).sum()) / (1 + len(drawn))
    above = (1 + (drawn >= 0).sum()) / (1 + len(drawn))
    return min(1.0, 2 * float(min(below, above)))


def p_seeds(lifts: Sequence[float]) -> float:
    """Two-sided p-value that lifts are 0 in the mean: Student's t-test; 1 for a single one."""
    from scipy.stats import ttest_1samp

    if len(lifts) < 2 or np.ptp(lifts) == 0:
        return 1.0
    return float(ttest_1samp(lifts, 0.0).pvalue)


def _resampled(runs: Sequence[dict[str, Any]], num: int = 4000) -> NDArray[np.float64]:
    """Mean accuracy over seeds for judges drawn with replacement, the same draws each time."""
    guesses = np.array([run["guesses"] for run in runs], dtype=np.float64)  # (seeds, judges, 2)
    judges = guesses.shape[1]
    drawn = np.random.default_rng(0).multinomial(judges, np.full(judges, 1 / judges), size=num)
    sums = np.einsum("dj,sjk->dsk", drawn.astype(np.float64), guesses)
    return np.asarray((sums[:, :, 0] / sums[:, :, 1]).mean(axis=1))


if __name__ == "__main__":
    try:
        code = main()
    except ConfigError as error:
        print(f"skipped: {error}", file=sys.stderr)
        code = 0
    raise SystemExit(code)

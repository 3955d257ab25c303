# SPDX-License-Identifier: Apache-2.0
"""Measure one run of one method on one table, in a process of its own, and keep what was found.

A run is told apart by its table, method, level and seed. `Runs` keeps each as a line of a file as
soon as it has ended, so that a benchmark which is cut goes on where it was, and parts of it that
were run apart are one whole once their files are put together, in any order.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tables
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum, Query, Rounds, Strategy
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.simulation.quality import quality_of, train_on_synthetic
from fedsynth.strategies.parts.measuring import MarginalStrategy
from fedsynth.strategies.registry import build_strategy

T = TypeVar("T")

NOISE_ONLY, NO_NOISE = "epsilon=0", "no noise"
REAL, RECORDS = "real", "records"  # in place of a method and a level: real records of other people
AT_LEAST = "CPU-s at least"  # of a run that was ended for working too long
TVDS = ("1-way TVD", "2-way TVD", "3-way TVD")
METRICS = (*TVDS, "CPU-s", AT_LEAST, "memory MB", "rounds", "kB up", "kB down")
UNITS = {"CPU-s": "CPU-s", AT_LEAST: "CPU-s", "memory MB": "MB", "kB up": "kB", "kB down": "kB"}
SEEDS = 5
LOCAL = ("flaim",)  # methods whose clients choose: their people are dealt out at random
MOST_RECORDS = 100_000  # synthetic records that are compared
_TOO_LONG = "no result in"
QUICK: Mapping[str, Mapping[str, Any]] = {
    "private_evolution": {"num_rounds": 2},
    "dp_merf": {"num_steps": 50},
    "dp_fedavg": {"num_rounds": 3},
}


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
      table: A name that `tables.load` knows.
      method: A strategy's name, or a peer's.
      level: `epsilon=...`, or one of the two bounds that need no epsilon of their own.
      seed: Of the public randomness.
      judge: Whether to train judges on the synthetic records, which takes long.
      quick: Whether to take a small part of the table and few rounds.
      peer: The package that the method comes from; `None`: ours.
    """

    table: str
    method: str
    level: str
    seed: int
    judge: bool = False
    quick: bool = False
    peer: str | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes it another run."""
        return (self.table, self.method, self.level, self.seed)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A short digest of all that a method is made of."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for path in sorted(
        p for folder in ("core", "strategies") for p in (root / folder).rglob("*.py")
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
      job: Of what.
      figures: By metric; empty if it failed.
      failed: Why there is nothing; empty if there is.
      code: Digest of the code that was measured.
    """

    job: Job
    figures: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""
    code: str = field(default_factory=code_digest)


class Runs:
    """Runs that were measured, the last of each key; in a file too, if one is named."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[tuple[str, str, str, int], Run] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut short: that run has not been kept
                run = Run(**(entry | {"job": Job(**entry["job"])}))
                self._known[run.job.key] = run

    def has(self, job: Job) -> bool:
        """Whether a job need not be measured again."""
        run = self._known.get(job.key)
        if run is None or run.job.quick != job.quick:
            return False
        if run.failed:
            return run.failed.startswith(_TOO_LONG)  # what else went wrong may have been mended
        return run.job.judge or not job.judge

    def add(self, run: Run) -> None:
        """Keep a run, at once."""
        self._known[run.job.key] = run
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(asdict(run), allow_nan=False)
            with self._path.open("a", encoding="utf-8") as file:  # one write: parts may run at once
                file.write(f"\n{line}\n")  # a line that was cut short ends here

    def of(self, table: str, method: str, level: str) -> list[Run]:
        """The runs of one case that have figures, by seed."""
        found = [r for r in self._known.values() if r.job.key[:3] == (table, method, level)]
        return sorted((r for r in found if r.figures), key=lambda r: r.job.seed)

    def cases(self, *, quick: bool) -> list[Job]:
        """One job of each case that has figures."""
        found = [r.job for r in self._known.values() if r.figures and r.job.quick == quick]
        return list({job.key[:3]: job for job in found}.values())

    def of_other_code(self, *, quick: bool) -> int:
        """How many runs of our own were measured before the code was changed."""
        ours = [r for r in self._known.values() if r.job.peer is None and r.job.quick == quick]
        return sum(run.code != code_digest() for run in ours)

    def failures(self, *, quick: bool) -> list[Run]:
        """Runs that gave nothing."""
        return [r for r in self._known.values() if r.failed and r.job.quick == quick]

    def values(self, table: str, method: str, level: str, metric: str) -> list[float]:
        """One metric of the runs of a case, by seed."""
        return [r.figures[metric] for r in self.of(table, method, level) if metric in r.figures]


def add_cases(figures: report.Report, runs: Runs, cases: Iterable[Job]) -> None:
    """Report the metrics of cases, each over its seeds, and what is to be said of their runs."""
    for job in cases:
        table, method, level, _ = job.key
        judged = {m for r in runs.of(table, method, level) for m in r.figures if "accuracy" in m}
        for metric in (*METRICS, *sorted(judged)):
            if values := runs.values(table, method, level, metric):
                name = f"{table} {method} {level}"
                figures.add(name, metric, values, unit=UNITS.get(metric, ""), peer=job.peer)
    note_runs(figures, runs)


def note_runs(figures: report.Report, runs: Runs) -> None:
    """Say which runs gave nothing, and how many are not of this code."""
    for run in runs.failures(quick=figures.quick):
        figures.note(f"{' '.join(map(str, run.job.key))}: {run.failed}")
    if other := runs.of_other_code(quick=figures.quick):
        figures.note(f"{other} runs were measured before the code was changed; --fresh runs anew")


def choices(
    description: str | None, table_names: Sequence[str], epsilons: Sequence[float]
) -> argparse.ArgumentParser:
    """The options of a benchmark of methods on tables at epsilons: what to run, and how."""
    options = report.parser(description)
    lists = {
        "only": ("methods; with * for any", None),
        "tables": ("tables, of " + ", ".join(table_names), None),
        "epsilons": ("epsilons", ",".join(f"{e:g}" for e in epsilons)),
    }
    for name, (what, default) in lists.items():
        options.add_argument(f"--{name}", metavar="A,B", help=f"only these {what}", default=default)
    options.add_argument("--seeds", type=int, default=SEEDS, help="repetitions (default 5)")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    options.add_argument(
        "--limit", type=float, default=900.0, help="seconds a run may take; of a peer, CPU-s (900)"
    )
    options.add_argument("--fresh", action="store_true", help="run anew what is known already")
    return options


def asked(name: str, patterns: str | None) -> bool:
    """Whether a list of patterns, if there is one, holds a name."""
    return patterns is None or any(fnmatch(name, p.strip()) for p in patterns.split(","))


def measure_all(
    jobs: Sequence[Job], runs: Runs, one: Callable[[Job], Run], *, at_once: int
) -> None:
    """Run every job and keep what it gives, some at a time; say so on the error stream."""
    with ThreadPoolExecutor(at_once) as pool:  # each job is a process; a thread waits for it
        for number, run in enumerate(pool.map(one, jobs), 1):
            runs.add(run)
            said = run.failed or f"{run.figures.get('CPU-s', 0.0):.3g} CPU-s"
            print(
                f"{number}/{len(jobs)} {' '.join(map(str, run.job.key))}: {said}", file=sys.stderr
            )


def measured(job: Job, *, limit_s: float, by: Callable[[Job], dict[str, float]]) -> Run:
    """A run of one of our own, in a process of its own; its figures `by` a module's function."""
    try:
        return Run(job, in_own_process(by, job, limit_s=limit_s))
    except OverTime:
        return Run(job, failed=f"{_TOO_LONG} {limit_s:g} s")
    except Failed as failed:
        return Run(job, failed=str(failed))


class OverTime(Exception):
    """A process that was ended for taking too long."""


class Failed(Exception):
    """A process that ended without a result; its message is the last line of its error."""


def in_own_process(function: Callable[..., T], *args: Any, limit_s: float) -> T:
    """What a function of a module gives, called in a fresh process that has the imports ready.

    Raises:
      OverTime: It took longer than `limit_s`, and was ended.
      Failed: It raised, or its process died.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise OverTime
        try:
            kind, value = ours.recv()
        except EOFError:
            process.join()
            raise Failed(f"its process died with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if kind == "failed":
        raise Failed(value)
    result: T = value
    return result


def _context() -> Any:
    """Processes forked from a clean one that has imported this file, so that each starts alike."""
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).resolve().parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    context.set_forkserver_preload(["measure"])
    return context


def _send(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What the child does."""
    try:
        pipe.send(("done", function(*args)))
    except Exception as error:  # noqa: BLE001  (whatever it was, the benchmark goes on and says so)
        if not isinstance(error, ConfigError):
            traceback.print_exc(file=sys.stderr)
        pipe.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]))
    pipe.close()


def compared(job: Job) -> dict[str, float]:
    """Learn, sample, and compare with the real records."""
    case = tables.load(job.table, quick=job.quick)
    if job.method == REAL:
        return _real(case, judge=job.judge)
    strategy = build_strategy(job.method, settings_of(job.method, case, quick=job.quick))
    _, records, cost = made(job, case, strategy)
    return distances(case, records, judge=job.judge) | cost


def made(
    job: Job, case: tables.Case, strategy: Strategy
) -> tuple[Synthesizer, Records, dict[str, float]]:
    """What a strategy learns at the job's level, records of it, and what both cost.

    The CPU-seconds are those of this process from the first question to the last record; its
    memory is the most that it held until then, the table and all imports included.
    """
    rng = np.random.default_rng([job.seed, 1])
    dial = 1.0 if job.level == NO_NOISE else dial_of(strategy, case, _epsilon(job.level))
    tally = Tally()
    counted: Any = Counted(strategy, tally)
    people = tables.dealt_out(case, "IID", rng) if job.method in LOCAL else [case.train]
    with report.cpu_timer() as learning:
        if job.level == NO_NOISE:
            synthesizer = non_private(counted, case.schema, people, rng)
        elif job.level == NOISE_ONLY:
            synthesizer = prior(counted, case.schema, dial, rng)
        else:
            synthesizer = direct_run(counted, case.schema, people, dial, rng=rng)
    with report.cpu_timer() as sampling:
        records = synthesizer.sample(min(MOST_RECORDS, len(case.train.records)), rng)
    cost = {
        "CPU-s": learning[0] + sampling[0],
        "learning CPU-s": learning[0],
        "sampling CPU-s": sampling[0],
        "memory MB": report.peak_rss_bytes() / 1e6,
        "rounds": float(tally.rounds),
        "kB up": tally.bytes_up / 1e3,
        "kB down": tally.bytes_down / 1e3,
        "only sums": float(tally.only_sums),
    }
    return synthesizer, records, cost


def distances(case: tables.Case, records: Records, *, judge: bool = False) -> dict[str, float]:
    """Total variation of all columns and pairs and of a fixed choice of threes, and accuracies."""
    test = case.test if judge and len(case.test) else None
    quality = quality_of(case.train.records, records, case.schema, test=test)
    found = {f"{order}-way TVD": value for order, value in quality.total_variation.items()}
    for name, accuracy in quality.accuracy.items():
        found[f"accuracy, {name}"] = accuracy.synthetic
    return found


def _real(case: tables.Case, *, judge: bool) -> dict[str, float]:
    """How far off real records of other people are, and how good judges that saw the real ones."""
    if not len(case.test):
        raise ConfigError("every record is in the population; nobody is left to compare with")
    found = distances(case, case.test)
    if judge and case.schema.target is not None:
        judges = train_on_synthetic(
            case.test, case.train.records, case.schema, target=case.schema.target
        )
        for name, accuracy in judges.items():
            found[f"accuracy, {name}"] = accuracy.synthetic
            found["accuracy, commonest class"] = accuracy.majority
    return found


def settings_of(method: str, case: tables.Case, *, quick: bool = False) -> dict[str, Any]:
    """What differs from a method's defaults: what its author would set for the table."""
    strategy = build_strategy(method, {})
    fields = {f.name for f in dataclasses.fields(strategy)}  # type: ignore[arg-type]
    num_users = case.train.num_users
    settings: dict[str, Any] = {}
    if "max_norm" in fields and case.train.max_records > 1:
        # several records a user call for a larger norm, found within the budget where a method
        # can; 3 was chosen by looking at diabetes130, so figures of other methods flatter a little
        settings["max_norm"] = "auto" if isinstance(strategy, MarginalStrategy) else 3.0
    if "feature_settings" in fields and case.train.max_records > 1:
        settings["feature_settings"] = {"max_norm": "auto"}
    if "num_users" in fields:
        settings["num_users"] = num_users
        if "sampling_prob" in fields:  # cohorts of about 300 users, whatever the table
            settings["sampling_prob"] = min(0.2, round(300 / num_users, 4))
    return settings | dict(QUICK.get(method, {}) if quick else {})


def dial_of(strategy: Strategy, case: tables.Case, epsilon: float) -> float:
    """The noise multiplier that an epsilon calls for."""
    return accounting.calibrate(
        lambda noise: strategy.event(case.schema, noise), Budget(epsilon, case.delta)
    )


def _epsilon(level: str) -> float:
    """The epsilon that a level is priced at; pure noise is that of epsilon 1."""
    return float(level.removeprefix("epsilon=")) or 1.0


@dataclass
class Tally:
    """What a run sent: filled as it goes.

    Attributes:
      rounds: Questions that were asked.
      bytes_up: Numbers that each client sends back in all, eight bytes each.
      bytes_down: Arrays that each client is sent in all.
      only_sums: Whether every question was a clipped, noised sum.
    """

    rounds: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    only_sums: bool = True

    def add(self, query: Query) -> None:
        """Count a question."""
        self.rounds += 1
        self.bytes_up += query.reply_bytes
        self.bytes_down += sum(array.nbytes for array in query.inputs.values())
        if query.choice is not None:
            self.only_sums = False
            if query.choice.where == "client":
                self.bytes_down += query.choice.estimates.nbytes


class Counted:
    """A strategy that counts what it asks, and is otherwise as it was."""

    def __init__(self, strategy: Strategy, tally: Tally) -> None:
        self._strategy, self._tally = strategy, tally

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """The strategy's rounds."""
        inner = self._strategy.rounds(schema, noise_multiplier, rng)
        answer: NoisySum | None = None
        while True:
            try:
                query = next(inner) if answer is None else inner.send(answer)
            except StopIteration as end:
                return end.value
            self._tally.add(query)
            answer = yield query

# SPDX-License-Identifier: Apache-2.0
"""Kill a simulated run at any instant, again and again, and see that it ends as promised."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..client.shard import Shard
from ..core import accounting
from ..core.config import RunConfig, parse_config
from ..core.errors import FedsynthError
from ..core.failpoints import VARIABLE
from ..core.randomness import OsKeyStream
from ..core.schema import Schema
from ..server.audit_trail import check_trail
from ..server.ledger import Ledger
from ..server.planned import Plan, plan_of, start, unfinished
from ..server.release import verify
from .check import made_up, small_table, small_texts
from .run import run_local

_MOST_RESUMPTIONS = 6
_CHILD_LIMIT_S = 120.0


@dataclass(frozen=True)
class Survival:
    """How one run fared that was killed.

    Attributes:
      where: The fail point, or the second, at which it was killed first.
      kills: How often it was killed.
      finished: It ended in a release that verifies.
      void_rounds: Rounds that were lost and stay charged.
      violations: Promises that its ledger breaks; empty when all are kept.
    """

    where: str
    kills: int
    finished: bool
    void_rounds: int
    violations: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise was kept and the run finished."""
        return self.finished and not self.violations


def small_run(
    folder: Path,
    *,
    placement: str = "central",
    rounds: int = 6,
    table_strategy: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A run of several short rounds over made-up records, in a folder of its own.

    Args:
      folder: Where its files go.
      placement: Of the noise.
      rounds: Rounds of Private Evolution over short texts, with a model and an embedder.
      table_strategy: Instead: a strategy's section, over a small table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema = small_texts() if table_strategy is None else small_table()
    (folder / "schema.json").write_text(json.dumps(schema.to_json()), encoding="utf-8")
    evolution = {
        "name": "private_evolution",
        "num_rounds": rounds,
        "num_candidates": 20,
        "num_votes": 1,
        "model": "words",
        "embedder": "word_hashes",
    }
    return parse_config(
        {
            "population": {"name": "kills", "num_users": 90, "epsilon": 4.0, "delta": 1e-3},
            "data": {"schema": "schema.json"},
            "unit": {"column": "id", "max_records": 2},
            "budget": {"epsilon": 4.0},
            "strategy": evolution if table_strategy is None else dict(table_strategy),
            "noise": {"placement": placement},
            "engine": {"clients": 3, "timeout_s": 60.0},
            "release": {"num_records": 50},
        },
        base=folder,
    )


def made_up_population(schema: Schema) -> Shard:
    """A hundred users of one to three records."""
    shard = made_up(schema, [1 + user % 3 for user in range(100)], seed=11)
    ids = np.array([f"user-{user}" for user in shard.user_index])
    return Shard(shard.records, ids)


def survive(
    config: RunConfig,
    *,
    failpoint: str | None = None,
    kill_times_s: tuple[float, ...] = (),
) -> Survival:
    """Run, kill, resume, until the run is finished; then hold its ledger to the promises.

    Every kill is a SIGKILL of a real process: by the process itself at a fail point, or from
    outside after each of `kill_times_s`, the later ones during the resumptions.

    Args:
      config: A run that `small_run` made.
      failpoint: Where the first process kills itself, as in `core/failpoints.py`.
      kill_times_s: Seconds after which the first, second, ... process is killed.
    """
    plan = plan_of(config)
    folder = start(plan)
    charged, kills, violations = 0.0, 0, []
    release = folder.with_name(plan.run)
    for attempt in range(_MOST_RESUMPTIONS):
        limit = kill_times_s[attempt] if attempt < len(kill_times_s) else _CHILD_LIMIT_S
        killed = _killed(folder, failpoint if attempt == 0 else None, limit)
        kills += killed
        after = _charged(config)
        if after < charged * (1 - 1e-9):
            violations.append(f"spending fell from {charged} to {after} at kill {kills}")
        charged = after
        if not killed:
            break
    with Ledger(config.path(config.ledger)) as ledger:
        violations += check_trail(ledger, plan.run)
        void_rounds = sum(a.stage == "void" for a in ledger.attempts(plan.run))
        state = next((r.state for r in ledger.runs() if r.run == plan.run), "never opened")
    finished = state == "finished" and release.is_dir() and all(c.ok for c in verify(release))
    where = failpoint or f"{kill_times_s[0]:.3f} s"
    return Survival(where, kills, finished, void_rounds, tuple(violations))


def survive_at_random(
    folder: Path, typical_s: float, rng: random.Random, *, placement: str = "central"
) -> Survival:
    """Kill a run at random instants; one that ended before its kill came is run anew.

    Args:
      folder: Where the runs go, each in a folder of its own.
      typical_s: How long a run takes.
      rng: Chooses the instants.
      placement: Of the noise.

    Raises:
      FedsynthError: Ten runs in a row ended before they were killed.
    """
    for number in range(10):
        times = random_kill_times(typical_s, rng)
        survival = survive(small_run(folder / str(number), placement=placement), kill_times_s=times)
        if survival.kills or not survival.ok:
            return survival
    raise FedsynthError(f"ten runs ended before they were killed, within {typical_s:.3g} s each")


def random_kill_times(typical_s: float, rng: random.Random) -> tuple[float, ...]:
    """One to three instants, each somewhere within a run of `typical_s` seconds."""
    return tuple(rng.uniform(0.0, typical_s) for _ in range(rng.choice([1, 1, 2, 3])))


def typical_seconds(config: RunConfig) -> float:
    """How long a run takes that nobody kills, in a process forked from this one."""
    plan = plan_of(config)
    begun = time.monotonic()
    _killed(start(plan), None, _CHILD_LIMIT_S)
    return time.monotonic() - begun


def _killed(folder: Path, failpoint: str | None, limit_s: float) -> bool:
    """Run or resume in a child process; whether it was killed."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_resume, args=(folder, failpoint))
    child.start()
    child.join(limit_s)
    if child.is_alive() and child.pid is not None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    return child.exitcode == -signal.SIGKILL


def _resume(folder: Path, failpoint: str | None) -> None:
    """What the child does."""
    if failpoint is not None:
        os.environ[VARIABLE] = failpoint
    plan: Plan = unfinished(folder)
    run_local(plan, stream=OsKeyStream(), data=made_up_population(plan.schema))


def _charged(config: RunConfig) -> float:
    """Epsilon that the population is charged, by the ledger as it lies on the disk."""
    path = config.path(config.ledger)
    if not path.exists():
        return 0.0
    with Ledger(path) as ledger:
        if config.population.name not in {p.name for p in ledger.populations()}:
            return 0.0
        spent = ledger.spent(config.population.name)
    return accounting.epsilon_of(spent, config.population.delta)

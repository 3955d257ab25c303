# SPDX-License-Identifier: Apache-2.0
"""Conduct a run from its configuration to a release: commit, learn, sample, write, finish."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import accounting
from ..core.errors import Interrupted
from ..core.failpoints import at
from ..core.leaf import Leaves, num_rounds_of
from ..core.query import Query, trusts_server
from ..core.randomness import KeyStream
from ..core.synthesizer import Synthesizer
from ..core.wire import Ask, canonical
from ..strategies.parts.device import take_device
from ..strategies.registry import build_aggregator, settings_of
from .checkpoints import CHECKPOINT, Checkpoints
from .federation import Federation
from .generations import clear, files_of, kept
from .ledger import Ledger, charged
from .loop import Measured, learn
from .planned import Plan, start
from .release import write_release

if TYPE_CHECKING:
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundEvent:
    """What a person may be shown of a run while it goes on; nothing in it is private.

    Attributes:
      round: Rounds done.
      num_rounds: Rounds of the plan.
      query: Name of the round's query.
      replied: Clients whose sums are in it.
      clients: Clients asked.
      void: The round gave nothing.
      replayed: The round was taken from the ledger, not asked.
      stddev: Of the sum's noise.
      epsilon_spent: Of this run, after the round.
      epsilon_left: Of this run's budget.
      seconds: Since the run, or its resumption, began.
    """

    round: int
    num_rounds: int
    query: str
    replied: int
    clients: int
    void: bool
    replayed: bool
    stddev: float
    epsilon_spent: float
    epsilon_left: float
    seconds: float


def conduct(
    plan: Plan,
    grid: "Grid",
    *,
    stream: KeyStream,
    sums_are_hidden: bool = False,
    on_event: Callable[[RoundEvent], None] = lambda event: None,
) -> Path:
    """Do a planned run, or what is left of it, and write its release.

    Args:
      plan: The run.
      grid: Carries messages to clients.
      stream: Secret randomness of `central` noise.
      sums_are_hidden: Nobody can see a single client's sum (the local engine only).
      on_event: Told of every round.

    Returns:
      The release folder.

    Raises:
      ConfigError: The device that it was told to train on is not there; nothing was spent.
      PrivacyRefusal: The budget does not hold the run, or a query is outside its plan.
      QuorumError: Too few clients; resumable.
      Interrupted: A person stopped it; resumable.
    """
    config = plan.config
    take_device(config.engine.device)
    federation = Federation(
        grid=grid,
        num_clients=config.engine.clients,
        quorum=config.engine.quorum,
        timeout_s=config.engine.timeout_s,
        aggregator=build_aggregator(config.noise.aggregator, config.noise.aggregator_settings),
        sums_are_hidden=sums_are_hidden,
    )
    federation.check(config.noise.placement)
    if trusts_server(plan.strategy):
        federation.check_choice(config.noise.placement)
    if any(leaf.rounds > 1 for leaf in accounting.leaves(plan.event)):
        federation.check_series(config.noise.placement)
    folder = start(plan)
    progress = _Progress(plan, on_event, folder / "progress.jsonl")
    try:
        release = _driven(plan, folder, federation, stream, progress)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"stopped after round {progress.done}. What was spent is on the ledger and"
            f" nothing is lost. Resume: fedsynth run --resume {folder}"
        ) from stop
    _clear(folder)
    return release


def _driven(
    plan: Plan, folder: Path, federation: Federation, stream: KeyStream, progress: "_Progress"
) -> Path:
    """Commit a run, learn, write its release, mark it finished; the release folder."""
    config = plan.config
    ledger = Ledger(config.path(config.ledger))
    with ledger.hold(plan.run):
        commit(plan, ledger)
        checkpoints = Checkpoints(folder, plan, ledger)
        rounds, done = checkpoints.rounds(kept(folder))
        progress.go_on(ledger, done)
        synthesizer = learn(
            rounds,
            done=done,
            draft=_draft(plan),
            max_clients=config.unit.max_clients,
            ledger=ledger,
            federation=federation,
            stream=stream,
            on_round=progress,
        )
        return publish(
            plan,
            synthesizer,
            ledger,
            noise_is_secret=stream.is_secret,
            generations=files_of(folder),
        )


def commit(plan: Plan, ledger: Ledger) -> None:
    """Commit a run's whole plan and facts on the ledger, or find that they are; as `open_run`."""
    population = plan.config.population
    ledger.open_run(
        plan.run, population.name, cap=population.cap, event=plan.event, facts=plan.facts
    )


def publish(
    plan: Plan,
    synthesizer: Synthesizer,
    ledger: Ledger,
    *,
    noise_is_secret: bool,
    generations: Mapping[str, bytes],
) -> Path:
    """Write a run's release and mark the run finished; the release folder."""
    at("before-export")
    release: Path = write_release(
        plan,
        synthesizer,
        ledger=ledger,
        noise_is_secret=noise_is_secret,
        generations=generations,
    )
    at("after-export")
    ledger.finish(plan.run)
    return release


def _draft(plan: Plan) -> Ask:
    """The run's facts as each request carries them; round, head and query are placeholders."""
    config = plan.config
    return Ask(
        run=plan.run,
        population=config.population.name,
        round=1,
        attempt=1,
        strategy=config.strategy.name,
        settings=settings_of(plan.strategy),
        schema_digest=plan.schema.digest,
        unit=canonical(asdict(config.privacy_unit)),
        placement=config.noise.placement,
        num_shares=config.engine.quorum,
        plan=canonical(accounting.to_json(plan.event)),
        delta=config.run_budget.delta,
        public_seed=config.seed,
        head=(0, "0"),
        query=Query("none", 1, 1.0, 1.0),
    )


class _Progress:
    """Turns rounds into events: for a person, and for a file that others can follow."""

    def __init__(self, plan: Plan, on_event: Callable[[RoundEvent], None], path: Path) -> None:
        self._plan, self._on_event, self._path = plan, on_event, path
        self._begun = time.monotonic()
        self._leaves: Leaves = Counter()
        self.done = 0

    def go_on(self, ledger: Ledger, done: int) -> None:
        """Reckon with rounds that a checkpoint stands for, and that are not shown again."""
        self.done = done
        if done:
            entries = ledger.entries(self._plan.run)
            early = [e for e in entries if e.kind == "reserve" and e.round <= done]
            self._leaves += charged(early)

    def __call__(self, measured: Measured) -> None:
        self.done = measured.round
        query, plan = measured.query, self._plan
        if not query.goes_on:
            self._leaves[query.leaf] += 1
        budget = plan.config.run_budget
        num_rounds = num_rounds_of(accounting.leaves(plan.event))
        spent = self._spent(num_rounds)
        event = RoundEvent(
            round=measured.round,
            num_rounds=num_rounds,
            query=query.name,
            replied=measured.noisy.num_clients,
            clients=plan.config.engine.clients,
            void=measured.noisy.is_void,
            replayed=measured.replayed,
            stddev=measured.noisy.stddev,
            epsilon_spent=spent,
            epsilon_left=max(0.0, budget.epsilon - spent),
            seconds=time.monotonic() - self._begun,
        )
        _log.info(
            "round %d/%d %s: %d of %d clients, stddev %.4g, epsilon %.3g",
            event.round,
            event.num_rounds,
            event.query,
            event.replied,
            event.clients,
            event.stddev,
            event.epsilon_spent,
        )
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(asdict(event))) + "\n")
        self._on_event(event)

    def _spent(self, num_rounds: int) -> float:
        """Epsilon of the rounds so far; in long sampled runs priced at every fiftieth round."""
        event = accounting.event_of(self._leaves)
        sampled = any(leaf.is_sampled for leaf in self._leaves)
        every = max(1, num_rounds // 50) if sampled else 1
        if self.done % every == 0 or self.done == num_rounds or not hasattr(self, "_last"):
            self._last = accounting.epsilon_of(event, self._plan.config.run_budget.delta)
        return self._last


def _finite(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; a void round's noise is null."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in data.items()}


def _clear(folder: Path) -> None:
    """Remove a finished run's working folder."""
    for name in (
        "run.json",
        "progress.jsonl",
        "run.json.partial",
        CHECKPOINT,
        f"{CHECKPOINT}.partial",
    ):
        (folder / name).unlink(missing_ok=True)
    clear(folder)
    folder.rmdir()

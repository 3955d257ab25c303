# SPDX-License-Identifier: Apache-2.0
"""Run a whole federation from one place: the local engine, Flower's simulation, or real nodes."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..client.policy import Policy
from ..client.shard import Shard, encode, read_shard
from ..client.site import Site, simulated, simulated_site, simulation_state
from ..client.unread import check_read
from ..core.config import RunConfig, parse_config
from ..core.errors import ConfigError
from ..core.privacy import Budget, NoisePlacement, PrivacyUnit
from ..core.query import Strategy
from ..core.randomness import KeyStream, OsKeyStream
from ..core.schema import Schema
from ..server.conduct import RoundEvent, conduct
from ..server.planned import Plan, plan_of, unfinished
from ..strategies.registry import STRATEGIES
from .partition import bounded_partitions

if TYPE_CHECKING:
    import pyarrow as pa
    from flwr.app import Context, Message

    from ..server.release import Release

Listener = Callable[[RoundEvent], None]


def run(
    config: RunConfig | None = None,
    *,
    resume: Path | None = None,
    on_event: Listener = lambda event: None,
) -> Path:
    """Do the run that a configuration describes, or finish one that was stopped.

    Args:
      config: The run; its `engine.kind` says what carries the messages.
      resume: Instead: the folder of an unfinished run.
      on_event: Told of every round.

    Returns:
      The release folder.
    """
    if (config is None) == (resume is None):
        raise ConfigError("give a configuration or a run to resume, one of the two")
    plan = plan_of(config) if config is not None else unfinished(Path(resume or ""))
    if plan.config.engine.kind in ("ray", "loopback"):  # their clients see a part each
        check_read(population_of(plan.config, plan.schema).unread)
    match plan.config.engine.kind:
        case "local":
            return run_local(plan, stream=OsKeyStream(), on_event=on_event)
        case "ray":
            from .flower import run_ray

            return run_ray(plan, on_event=on_event)
        case "loopback":
            from .loopback import run_loopback

            return run_loopback(plan, on_event=on_event)
        case "superlink":
            from .flower import run_superlink

            return run_superlink(plan, on_event=on_event)


def run_local(
    plan: Plan,
    *,
    stream: KeyStream,
    data: Shard | None = None,
    on_event: Listener = lambda event: None,
    loses: "Callable[[int, Message], bool] | None" = None,
) -> Path:
    """Do a planned run in this process.

    Args:
      plan: The run.
      stream: Secret randomness of `central` noise; tests may bring a stream of their own, and
        the card then says that the release is not private.
      data: The population's records; `None`: read them from the configuration's `data.path`.
      on_event: Told of every round.
      loses: See `LocalGrid`; for tests of lost replies.
    """
    from ..client.app import app
    from .local import LocalGrid

    config = plan.config
    num_clients = config.engine.clients
    shard = population_of(config, plan.schema) if data is None else data
    check_read(shard.unread)
    parts = bounded_partitions(
        shard, config.privacy_unit, num_clients=num_clients, seed=config.seed
    )
    del shard
    state = simulation_state(config)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)

    policy = Policy.for_simulation(config)

    @cache
    def site(number: int) -> Site:
        return simulated_site(
            policy,
            plan.schema,
            number,
            num_clients,
            state / "odometer.db",
            lambda unit, seed: parts[number],
            secure=True,
        )

    def site_of(context: "Context") -> Site:
        return site(int(context.node_config["partition-id"]))

    grid = LocalGrid(app, num_clients, wire=config.engine.wire, loses=loses)
    with simulated(site_of):
        return conduct(plan, grid, stream=stream, sums_are_hidden=True, on_event=on_event)


def population_of(config: RunConfig, schema: Schema) -> Shard:
    """All records of a simulated population."""
    if config.data.path is None:
        raise ConfigError("data.path is missing: a simulation needs the population's records")
    return read_shard(config.path(config.data.path), schema, config.privacy_unit)


def simulate(
    strategy: str | Strategy,
    data: "Path | str | pa.Table",
    *,
    schema: Schema | Path | str,
    budget: Budget,
    unit: PrivacyUnit,
    num_users: int,
    population: str = "simulated",
    cap: Budget | None = None,
    placement: NoisePlacement = NoisePlacement.CENTRAL,
    clients: int = 10,
    num_records: int = 10_000,
    seed: int = 0,
    folder: Path | str = "releases",
    ledger: Path | str = "ledger.db",
    on_event: Listener = lambda event: None,
    **settings: Any,
) -> "Release":
    """Make a release from a table in this process; the Python face of `fedsynth run`.

    Args:
      strategy: Name of a strategy, with its settings as further keywords, or a strategy.
      data: A CSV, parquet, jsonl or npz file, or a pyarrow table.
      schema: The population's public schema, or its file.
      budget: What this run may spend.
      unit: Whom the promise protects, as `User("patient_id", max_records=5)`.
      num_users: Declared, public lower bound on the number of users.
      population: Name that the ledger keys the budget to.
      cap: The most that may ever be spent on the population; `None`: this run's budget.
      placement: Where noise is added.
      clients: Clients the users are dealt out to.
      num_records: Records in the release.
      seed: Of public randomness only.
      folder: Where releases go.
      ledger: The ledger's file.
      on_event: Told of every round.
      settings: Of the strategy.

    Returns:
      The release.

    Raises:
      FedsynthError: See its tree; nothing is spent unless the run began.

    Privacy:
      (epsilon, delta) of `budget` for each unit, against everyone who sees the release.
    """
    from ..server.release import Release

    name, given = _named(strategy, settings)
    limit = cap or budget
    base = Path.cwd()
    schema_path = Path(schema) if isinstance(schema, Path | str) else _kept(schema, base / folder)
    config = parse_config(
        {
            "population": {
                "name": population,
                "num_users": num_users,
                "epsilon": limit.epsilon,
                "delta": limit.delta,
                "accept_weak": limit.accept_weak,
            },
            "data": {"schema": str(schema_path)}
            | ({"path": str(data)} if isinstance(data, Path | str) else {}),
            "unit": dataclasses.asdict(unit),
            "budget": dataclasses.asdict(budget),
            "strategy": {"name": name, **given},
            "noise": {"placement": placement.value},
            "engine": {"clients": clients},
            "release": {"path": str(folder), "num_records": num_records},
            "ledger": str(ledger),
            "seed": seed,
        },
        base=base,
        where="simulate",
    )
    plan = plan_of(config)
    shard = None if isinstance(data, Path | str) else encode(data, plan.schema, unit)
    return Release.open(run_local(plan, stream=OsKeyStream(), data=shard, on_event=on_event))


def _named(strategy: str | Strategy, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A strategy's name and settings."""
    if isinstance(strategy, str):
        return strategy, settings
    if settings:
        raise ConfigError(f"unknown argument {next(iter(settings))!r}: the strategy is built")
    kind = type(strategy)
    name = kind.name if kind.name in STRATEGIES else f"{kind.__module__}:{kind.__qualname__}"
    return name, dataclasses.asdict(strategy)  # type: ignore[call-overload]


def _kept(schema: Schema, folder: Path) -> Path:
    """A schema's file, written under its digest so that an unfinished run finds it again."""
    path = folder / "schemas" / f"{schema.digest[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(schema.to_json(), indent=1), encoding="utf-8")
    return path

# SPDX-License-Identifier: Apache-2.0
"""A run as it is fixed before anybody is asked, and as it is found again when it was stopped."""

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import accounting
from ..core.config import RunConfig, read_started
from ..core.electorate import Electorate
from ..core.errors import ConfigError
from ..core.files import write_whole
from ..core.privacy import NoisePlacement
from ..core.query import Strategy, check_reads, check_signal, trusts_server
from ..core.schema import Schema
from ..core.seeds import rounds_rng, sample_rng
from ..strategies.registry import build_strategy, settings_of

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from ..core.selection import SelectDpEvent

UNFINISHED = ".unfinished"
SWEEP = "sweep.json"  # in a working folder: it is a private sweep's


@dataclass(frozen=True)
class Won:
    """That a run is the try of a sweep that is shown, which the sweep has paid for.

    Attributes:
      sweep: The sweep's run.
      grid: What was tried, by key; public.
      event: What the whole sweep costs.
    """

    sweep: str
    grid: Mapping[str, Sequence[Any]]
    event: "SelectDpEvent"

    def to_json(self) -> dict[str, Any]:
        """What a card tells of it."""
        grid = {key: list(values) for key, values in self.grid.items()}
        return {"grid": grid, "event": accounting.to_json(self.event)}


@dataclass(frozen=True)
class Plan:
    """A run as it is fixed before anybody is asked.

    Attributes:
      run: Its identity.
      config: Its configuration.
      schema: The population's public schema.
      strategy: The method.
      noise_multiplier: The method's noise dial, calibrated to the budget.
      event: What the whole run costs.
      won: Set where a sweep has paid for the run.
    """

    run: str
    config: RunConfig
    schema: Schema
    strategy: Strategy
    noise_multiplier: float
    event: "DpEvent"
    won: Won | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger commits beside the event; a resumed run must match it."""
        config, won = self.config, self.won
        told = {} if won is None else {"within": won.sweep, "selection": won.to_json()}
        return {
            "strategy": config.strategy.name,
            "settings": json.loads(settings_of(self.strategy)),
            "schema": self.schema.digest,
            "unit": asdict(config.privacy_unit),
            "epsilon": config.run_budget.epsilon,
            "delta": config.run_budget.delta,
            "num_users": config.population.num_users,
            "placement": config.noise.placement.value,
            "aggregator": config.noise.aggregator,
            "aggregator_settings": config.noise.aggregator_settings,
            "noise_multiplier": self.noise_multiplier,
            "quorum": config.engine.quorum,
            "seed": config.seed,
            **told,
        }

    @property
    def heard(self) -> Electorate:
        """The declared users; as many fewer as the noise is more than a query's own."""
        config = self.config
        local = config.noise.placement is NoisePlacement.LOCAL
        over = math.sqrt(config.engine.clients) if local else 1.0
        return config.electorate(config.population.num_users / (config.unit.max_clients * over))

    @property
    def rng(self) -> np.random.Generator:
        """Public randomness of the strategy's server half."""
        return rounds_rng(self.config.seed)

    @property
    def sample_rng(self) -> np.random.Generator:
        """Public randomness of the released sample."""
        return sample_rng(self.config.seed)


def plan_of(
    config: RunConfig,
    *,
    run: str | None = None,
    paid: Callable[["DpEvent"], "DpEvent"] = lambda event: event,
) -> Plan:
    """The plan of a run; reads the schema, never the data, and asks nobody.

    Args:
      config: The run.
      run: Its identity; `None`: a new one.
      paid: What the budget is to hold where the run costs such an event; the event itself but for
        the tries of a sweep.

    Raises:
      ConfigError: A setting, the strategy or the budget cannot be.
    """
    schema = Schema.read(config.path(config.data.schema_path))
    strategy = build_strategy(
        config.strategy.name, config.strategy.settings, is_open=schema.is_open
    )
    check_reads(strategy, schema)
    if config.unit.column in schema.names:
        raise ConfigError(
            f"unit.column = {config.unit.column!r} keys the promise, but the schema has it as a"
            ' column to synthesize; declare it there as type = "id", or leave it out'
        )
    if trusts_server(strategy) and config.noise.placement is not NoisePlacement.CENTRAL:
        raise ConfigError(
            f"strategy {config.strategy.name!r} with these settings lets the server choose by the"
            " exact sum of all clients, which it sees under noise.placement = 'central' only, not"
            f" {config.noise.placement.value!r}. Use 'central' if clients trust the server, or a"
            " strategy or setting that needs noisy sums alone, as aim with select = 'sums'"
        )
    budget = config.run_budget
    noise = accounting.calibrate(lambda z: paid(strategy.event(schema, z)), budget)
    event = strategy.event(schema, noise)
    if config.unit.max_clients > 1 and any(leaf.is_sampled for leaf in accounting.leaves(event)):
        raise ConfigError(
            f"strategy {config.strategy.name!r} samples users by coins, but a user may lie at"
            f" {config.unit.max_clients} clients, which flip a coin each; what that costs has no"
            " price here. Use sampling_prob = 1, or unit.max_clients = 1"
        )
    _check_records(strategy, config)
    plan = Plan(run or new_run_id(config.strategy.name), config, schema, strategy, noise, event)
    check_signal(strategy, schema, noise, plan.heard)
    accounting.price(event, budget.delta)  # the cross-check must hold before anything is asked
    return plan


def _check_records(strategy: Strategy, config: RunConfig) -> None:
    """Refuse a strategy that prices fewer records of a user than the unit lets in.

    Raises:
      ConfigError: Every client would refuse it.
    """
    priced = getattr(strategy, "records_per_user", None)
    if priced is not None and config.unit.max_records > priced:
        raise ConfigError(
            f"strategy {config.strategy.name!r} is priced for users of at most {priced} records,"
            f" but unit.max_records = {config.unit.max_records}. Set its records_per_user to that,"
            " or lower unit.max_records"
        )


def new_run_id(strategy: str) -> str:
    """A name for a run that no other has: when, what, and eight random hex digits."""
    plain = "".join(c if c.isalnum() else "-" for c in strategy.split(":")[-1].lower())[:24]
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{plain}-{secrets.token_hex(4)}"


def start(plan: Plan) -> Path:
    """Write down a run before it begins, so that it can be found again; its working folder."""
    folder = plan.config.path(plan.config.release.path) / f"{plan.run}{UNFINISHED}"
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "run.json"
    if not described.exists():
        data = {
            "run": plan.run,
            "base": str(plan.config.base),
            "config": plan.config.model_dump(mode="json", by_alias=True),
        }
        write_whole(described, json.dumps(data, indent=1).encode())
    return folder


def unfinished(path: Path) -> Plan:
    """The plan of a run that was started and not finished.

    Args:
      path: Its release folder, its working folder, or the `run.json` in that.

    Raises:
      ConfigError: There is no such run, or it is finished.
    """
    candidates = [path, path / "run.json", Path(f"{path}{UNFINISHED}") / "run.json"]
    found = next((p for p in candidates if p.is_file() and p.name == "run.json"), None)
    if found is None:
        folder = path.parent if path.name == "run.json" else path
        release = Path(str(folder).removesuffix(UNFINISHED))
        if (release / "card.json").exists():
            raise ConfigError(f"finished already: {release}; there is nothing to resume")
        if (folder / SWEEP).exists():
            raise ConfigError(
                f"{folder} is a private sweep's; go on with: fedsynth sweep --resume {folder}"
            )
        raise ConfigError(f"{path} is not an unfinished run: it holds no run.json")
    run, config = read_started(found)
    return plan_of(config, run=run)

# SPDX-License-Identifier: Apache-2.0
"""What a data owner allows: a `policy.toml` read at the client, by which all else is refused.

The server says what it wants to know; this file says what it may. Nothing is allowed by
default: without the file, or with a key of it missing, every request is refused.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..core.config import RunConfig, Section
from ..core.errors import ClientCode, ConfigError, PolicyRefusal
from ..core.privacy import Budget, NoisePlacement, PrivacyUnit, Relation
from ..core.wire import Ask

_NEVER = 1 << 62  # what a key that was not given asks for


class Allow(Section):
    """What a request may name; each is compared letter by letter.

    Attributes:
      populations: Names under which the owner's users may be counted. Each has a budget of its
        own, so a name more is `max_epsilon` more.
      strategies: Installed methods. One written as `module:Name` is imported only if it stands
        here.
      placements: Where noise may be added.
    """

    populations: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    placements: tuple[NoisePlacement, ...] = ()


class Policy(Section):
    """The owner's terms. What a key asks for when it is not given, no request can meet.

    Attributes:
      max_epsilon: Most that all runs on a population may together ever cost one user.
      delta: At which that is priced.
      accept_weak: The owner knows that an epsilon above 10 promises little. May be left out.
      user_column: Column of user ids by which a request must count users; `False`: each record
        is a user of its own.
      relation: Neighboring relation of the promise.
      max_records: Most records of one user that a request may use.
      max_clients: At how many clients one user's records lie. A request must reckon with as many
        or more, for its noise grows with them.
      min_users: Fewest users that this shard must hold before it answers anything.
      allow: Populations, strategies and placements.
    """

    max_epsilon: float = Field(default=0.0, strict=True)
    delta: float = Field(default=0.0, strict=True)
    accept_weak: bool = Field(default=False, strict=True)
    user_column: str | Literal[False] = ""
    relation: Relation | None = None
    max_records: int = Field(default=0, strict=True, ge=1)
    max_clients: int = Field(default=_NEVER, strict=True, ge=1)
    min_users: int = Field(default=_NEVER, strict=True, ge=0)
    allow: Allow = Allow()

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if {"max_epsilon", "delta"} <= self.model_fields_set:
            Budget(self.max_epsilon, self.delta, self.accept_weak)
        return self

    @staticmethod
    def read(path: Path) -> "Policy":
        """The policy in a TOML file; one that refuses everything where there is no file.

        Raises:
          ConfigError: The file cannot be read, a key is unknown, or a value cannot be. For the
            owner's eyes: a client answers a server with a code alone.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Policy()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} does not parse: {error}") from error
        try:
            return Policy.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explained(error, path.name)) from error
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from error

    @staticmethod
    def for_simulation(config: RunConfig) -> "Policy":
        """The terms of an owner who agrees to one run's configuration and to nothing else.

        `model_dump(mode="json")` gives what a `policy.toml` of these terms holds.
        """
        unit, cap = config.privacy_unit, config.population.cap
        return Policy(
            max_epsilon=cap.epsilon,
            delta=cap.delta,
            accept_weak=cap.accept_weak,
            user_column=unit.column if unit.column is not None else False,
            relation=unit.relation,
            max_records=unit.max_records,
            max_clients=unit.max_clients,
            min_users=0,
            allow=Allow(
                populations=(config.population.name,),
                strategies=(config.strategy.name,),
                placements=(config.noise.placement,),
            ),
        )

    @property
    def missing(self) -> list[str]:
        """Keys that were not given; while there is one, every request is refused."""
        own = [k for k in Policy.model_fields if k not in self.model_fields_set | _OPTIONAL]
        allow = [k for k in Allow.model_fields if k not in self.allow.model_fields_set]
        return own + [f"allow.{key}" for key in allow]

    @property
    def cap(self) -> Budget:
        """The most that may ever be spent on a population; what `Odometer.join` is given.

        Raises:
          PolicyRefusal: The policy names no budget.
        """
        if not {"max_epsilon", "delta"} <= self.model_fields_set:
            raise PolicyRefusal("the policy names no max_epsilon or no delta: nothing is allowed")
        return Budget(self.max_epsilon, self.delta, self.accept_weak)

    def refuses(self, ask: Ask, num_users: int | None = None) -> ClientCode | None:
        """Why a request is not answered; `None`: these terms allow it.

        Args:
          ask: The request, trusted in nothing.
          num_users: Users in this client's shard. `None` while that is not known: refusing early
            saves reading the shard, and importing a strategy that is not allowed; `min_users`
            must then be held against the shard before anything is answered.

        Privacy:
          A refusal for `min_users` tells the server that this shard is smaller than the floor
          that its owner declared, and nothing else.
        """
        if self.missing:
            return ClientCode.POLICY_REFUSED
        try:
            unit = unit_of(ask)
        except ConfigError:
            return ClientCode.MALFORMED
        allowed = (
            ask.population in self.allow.populations
            and ask.strategy in self.allow.strategies
            and ask.placement in self.allow.placements
            and (False if unit.column is None else unit.column) == self.user_column
            and unit.relation == self.relation
            and unit.max_records <= self.max_records
            and unit.max_clients >= self.max_clients
            and (num_users is None or num_users >= self.min_users)
        )
        return None if allowed else ClientCode.POLICY_REFUSED


_OPTIONAL = {"accept_weak", "allow"}


def unit_of(ask: Ask) -> PrivacyUnit:
    """The privacy unit that a request states.

    Raises:
      ConfigError: It states none.
    """
    try:
        fields = json.loads(ask.unit)
        unit = PrivacyUnit(**{**fields, "relation": Relation(fields["relation"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError("a request that states no privacy unit") from error
    whole = type(unit.max_records) is int and type(unit.max_clients) is int
    if not (whole and (unit.column is None or type(unit.column) is str)):
        raise ConfigError("a request whose privacy unit has values of another type")
    return unit


def _explained(error: ValidationError, where: str) -> str:
    """The first few problems, each with what was expected and what came."""
    lines = []
    for problem in error.errors()[:5]:
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            section = Allow if problem["loc"][0] == "allow" else Policy
            hint = _did_you_mean(str(problem["loc"][-1]), section.model_fields)
            lines.append(f"{where}: unknown key {key!r}{hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key} = {problem['input']!r}: {message}")
    return "\n".join(lines)


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    """The known keys, the nearest first."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known keys: {', '.join(known)}"

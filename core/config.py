# SPDX-License-Identifier: Apache-2.0
"""A run's configuration: one TOML file, checked whole before anything is read or asked."""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from .devices import Device
from .electorate import ALIKE, Electorate
from .errors import ConfigError
from .privacy import Budget, NoisePlacement, PrivacyUnit, Relation


def _number(value: Any) -> Any:
    """A value as it came; a text or a truth value is none, though it could be read as a number."""
    if isinstance(value, bool | str):
        raise ValueError("expected a number, as in 1 or 0.5, without quotes")
    return value


Real = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]


class Section(BaseModel):
    """A table of the file; unknown keys are refused, `kebab-case` reads as `snake_case`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _snake_case(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {str(key).replace("-", "_"): value for key, value in data.items()}
        return data


class PopulationSection(Section):
    """Whose records these are; the budget belongs to them, whatever run asks."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    num_users: Whole = Field(ge=1)  # a public lower bound on the number of users
    # publicly known of typical users, each of whom stands for as many; a plan alone reads it
    typical_records: Whole | tuple[Whole, ...] = 1
    alike: Real = ALIKE  # share of pairs of one user's records nearest to one candidate of 100
    epsilon: Real  # the most that all runs together may ever spend
    delta: Real
    accept_weak: StrictBool = False

    @property
    def cap(self) -> Budget:
        """The most that may ever be spent on the population."""
        return Budget(float(self.epsilon), self.delta, self.accept_weak)


class DataSection(Section):
    """Where records and their public schema lie; `path` is read in simulations only."""

    path: Path | None = None
    schema_path: Path = Field(alias="schema")


class UnitSection(Section):
    """The privacy unit; see `PrivacyUnit`."""

    column: str | None = None
    max_records: Whole = 1
    keep: Literal["random", "first", "deduplicate"] = "random"
    relation: Relation = Relation.ADD_OR_REMOVE
    max_clients: Whole = 1


class BudgetSection(Section):
    """What this run may spend; `delta` is the population's unless given."""

    epsilon: Real
    delta: Real | None = None
    accept_weak: StrictBool = False


class StrategySection(BaseModel):
    """The method and its settings; the strategy itself checks the settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """All keys but the name, in snake case."""
        return {key.replace("-", "_"): value for key, value in (self.model_extra or {}).items()}


class NoiseSection(Section):
    """Where noise is added, and how clients' sums become one."""

    placement: NoisePlacement = NoisePlacement.CENTRAL
    aggregator: str = "sum"
    aggregator_settings: dict[str, Any] = Field(default_factory=dict)


class EngineSection(Section):
    """What carries the messages."""

    kind: Literal["local", "ray", "loopback", "superlink"] = "local"
    clients: Whole = Field(default=10, ge=1, le=100_000)
    min_clients: Whole | None = Field(default=None, ge=1)  # None: all of `clients`
    timeout_s: Real = Field(default=600.0, gt=0)
    wire: StrictBool = False  # local: send every message through its serialized form
    connection: str = "superlink"  # superlink: its name in Flower's configuration
    device: Device = "cpu"  # of this side; a deployed client's is in its node's configuration

    @property
    def quorum(self) -> int:
        """Fewest clients whose sums make a round."""
        return self.clients if self.min_clients is None else self.min_clients

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.quorum > self.clients:
            raise ValueError(
                f"min_clients = {self.quorum} can never be reached with clients = {self.clients}"
            )
        return self


class ReleaseSection(Section):
    """Where the release goes and how many records it holds."""

    path: Path = Path("releases")
    num_records: Whole = Field(default=10_000, ge=1, le=100_000_000)


class RunConfig(Section):
    """A whole run, as `run.toml` describes it.

    Attributes:
      base: Folder that relative paths start from: where the file lies.
    """

    population: PopulationSection
    data: DataSection
    unit: UnitSection = UnitSection()
    budget: BudgetSection
    strategy: StrategySection
    noise: NoiseSection = NoiseSection()
    engine: EngineSection = EngineSection()
    release: ReleaseSection = ReleaseSection()
    ledger: Path = Path("ledger.db")
    seed: Whole = Field(default=0, ge=0, lt=1 << 62)
    base: Path = Field(default=Path("."), exclude=True)

    @field_validator("base")
    @classmethod
    def _absolute(cls, base: Path) -> Path:
        return base.resolve()

    def path(self, relative: Path) -> Path:
        """A path of the file, made absolute."""
        return relative if relative.is_absolute() else self.base / relative

    @property
    def privacy_unit(self) -> PrivacyUnit:
        """The unit of the promise."""
        return PrivacyUnit(**self.unit.model_dump())

    @property
    def run_budget(self) -> Budget:
        """What this run may spend."""
        delta = self.population.delta if self.budget.delta is None else self.budget.delta
        return Budget(float(self.budget.epsilon), delta, self.budget.accept_weak)

    def electorate(self, num_heard: float | None = None) -> Electorate:
        """What is declared of the users, or of so many of them as are heard."""
        declared = self.population
        return Electorate.of(
            declared.num_users if num_heard is None else num_heard,
            declared.typical_records,
            declared.alike,
            max_records=self.unit.max_records,
        )

    def check(self) -> Self:
        """This configuration, once the promise it describes means something.

        Raises:
          ConfigError: An epsilon, delta or unit is impossible or too weak.
        """
        for section in ("population", "budget"):
            try:
                budget = self.population.cap if section == "population" else self.run_budget
                budget.check_users(self.population.num_users)
            except ConfigError as error:
                raise ConfigError(f"[{section}] {error}") from error
        _ = self.privacy_unit
        try:
            _ = self.electorate()
        except ConfigError as error:
            raise ConfigError(f"[population] {error}") from error
        return self


def read_config(path: Path) -> RunConfig:
    """The checked configuration in a TOML file.

    Raises:
      ConfigError: The file cannot be read, a key is unknown, or a value cannot be.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} does not parse: {error}") from error
    return parse_config(data, base=path.parent, where=path.name, text=text)


def read_started(path: Path) -> tuple[str, RunConfig]:
    """Identity and configuration of a run that was started, from its `run.json`.

    Raises:
      ConfigError: The file cannot be read or is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        run, config, base = str(data["run"]), dict(data["config"]), Path(data["base"])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} does not describe a started run: {error}") from error
    return run, parse_config(config, base=base, where=str(path))


def run_file(named: str) -> Path:
    """The file that Flower's run configuration names as `run`, at the server.

    A relative path starts from the working folder or, where this package is a checkout, from
    its root: Flower's local SuperLink keeps the working folder of whoever started it first.

    Raises:
      ConfigError: It names nothing, or no file.
    """
    if not named:
        raise ConfigError(
            "Flower's run configuration names no run: --run-config 'run=\"run.toml\"'"
        )
    root = Path(__file__).resolve().parents[1]
    places = [Path(named).absolute(), root / named]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"there is no file {places[0]}; `run` is a path on the server's machine")
    return found


def parse_config(
    data: dict[str, Any], *, base: Path, where: str = "run.toml", text: str = ""
) -> RunConfig:
    """The checked configuration in plain data; relative paths start from `base`.

    With the `text` that the data was read from, messages name its lines.
    """
    if "base" in data:
        raise ConfigError(f"{where}: unknown key 'base'")
    try:
        return RunConfig.model_validate({**data, "base": base}).check()
    except ValidationError as error:
        raise ConfigError(_explained(error, where, text)) from error


def _explained(error: ValidationError, where: str, text: str) -> str:
    """The first few problems, each with what was expected and what came."""
    lines = []
    for problem in error.errors()[:5]:
        key = ".".join(str(part) for part in problem["loc"])
        number = _line_of(problem["loc"], text)
        place = f"{where}, line {number}" if number else where
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key {key!r}{_did_you_mean(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{place}: {key} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{place}: {key} = {problem['input']!r}: {message}")
    return "\n".join(lines)


def _line_of(location: tuple[int | str, ...], text: str) -> int | None:
    """The line of a TOML file on which a key, or else its table, stands; from 1."""
    table, key = [str(part) for part in location[:-1]], str(location[-1])
    inside, found = not table, None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            named = header[1].replace("-", "_").split(".")
            inside = named == table
            if inside or named == [*table, key]:
                found = number
        elif inside and line.partition("=")[0].strip().replace("-", "_") == key:
            return number
    return found


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    """The known keys at a place in the file, the nearest first."""
    model: type[BaseModel] = RunConfig
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return ""
        model = inner
    known = [f.alias or name for name, f in model.model_fields.items() if name != "base"]
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known keys: {', '.join(known)}"

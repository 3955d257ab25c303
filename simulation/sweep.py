# SPDX-License-Identifier: Apache-2.0
"""Try settings of a run on records that are public, or synthetic: free, and never on private ones.

A point of the grid is a run file with some keys changed. It is learned from stand-ins for the
population, as many as it declares users, with the noise that its budget calls for, and judged on
stand-ins that it has not seen. Nothing is asked of a client and no ledger is opened.
"""

import hashlib
import json
import math
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from .. import __version__
from ..core import accounting
from ..core.config import RunConfig, parse_config
from ..core.errors import ConfigError
from ..core.records import Records
from ..core.schema import Schema
from ..core.seeds import rounds_rng, sample_rng
from ..core.selection import Tries, selection_epsilon
from ..core.wire import canonical
from ..server.planned import Plan, plan_of
from .direct import direct_run
from .quality import total_variation, train_on_synthetic
from .stand_ins import Source, stand_ins

Score = Literal["accuracy", "variation"]
Point = Mapping[str, Any]
"""Keys of a run file and their values, as `{"strategy.clip": 0.3}`."""

_MOST_TRIES = 10_000
_MOST_COMPARED = 20_000  # synthetic records


@dataclass(frozen=True)
class Try:
    """One point, learned with one seed.

    Attributes:
      point: The settings.
      seed: Of all public randomness, and of who stands in for the population.
      score: By which points are compared.
      noise_multiplier: The method's noise dial at this point.
      cpu_s: CPU-seconds that it took.
    """

    point: Point
    seed: int
    score: float
    noise_multiplier: float
    cpu_s: float


@dataclass(frozen=True)
class Row:
    """A point of the grid, with what its tries gave.

    Attributes:
      point: The settings.
      scores: By seed; empty for a point that was refused.
      noise_multiplier: The method's noise dial; NaN if refused.
      cpu_s: CPU-seconds of a try, on average; NaN if refused.
      refused: Why the point cannot be; empty if it can.
    """

    point: Point
    scores: tuple[float, ...] = ()
    noise_multiplier: float = math.nan
    cpu_s: float = math.nan
    refused: str = ""

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(np.mean(self.scores)) if self.scores else math.nan

    @property
    def stddev(self) -> float:
        """Standard deviation of the scores; NaN for fewer than two."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else math.nan


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
      source: What the tries learned from, in words.
      score: `accuracy`, higher is better, or `variation`, lower is better.
      epsilon: Budget that each try's noise is made for.
      rows: The points, the best first and the refused last.
    """

    source: str
    score: Score
    epsilon: float
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for other programs."""
        rows = [asdict(row) | {"mean": row.mean, "stddev": row.stddev} for row in self.rows]
        for row in rows:
            row.update({k: None for k, v in row.items() if isinstance(v, float) and math.isnan(v)})
        return {"cost": 0.0, "source": self.source, "score": self.score, "rows": rows}


def parse_grid(given: Sequence[str]) -> dict[str, list[Any]]:
    """Keys and the values to try, from texts like `strategy.clip=0.1,0.3`.

    Values are read as in TOML, else as plain text.

    Raises:
      ConfigError: A text is of another form, or names a key twice.

    Example:
      >>> parse_grid(["strategy.clip=0.1,1", "strategy.server-optimizer=fedadam,fedavgm"])
      {'strategy.clip': [0.1, 1], 'strategy.server_optimizer': ['fedadam', 'fedavgm']}
    """
    grid: dict[str, list[Any]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not (equals and values.strip()) or not all(key.split(".")):
            raise ConfigError(
                f"--grid takes KEY=VALUE,VALUE,... as strategy.clip=0.1,1, not {text!r}"
            )
        if key in grid:
            raise ConfigError(f"--grid names {key} twice; give all of its values at once")
        grid[key] = _values(values)
    return grid


def points_of(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the grid's values.

    Raises:
      ConfigError: There are none, or too many.
    """
    num = math.prod(len(values) for values in grid.values()) if grid else 0
    if not 1 <= num <= _MOST_TRIES:
        raise ConfigError(
            f"a sweep tries 1 to {_MOST_TRIES:,} settings, not {num:,}; name them by --grid"
        )
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def with_point(config: RunConfig, point: Point) -> RunConfig:
    """The configuration with some keys changed.

    Raises:
      ConfigError: A key or a value cannot be.
    """
    data = config.model_dump(mode="json", by_alias=True)
    for key, value in point.items():
        *tables, last = key.split(".")
        inside = data
        for name in tables:
            inside = inside.get(name, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"{key!r} is no key of a run file")
        here = next((known for known in inside if known.replace("-", "_") == last), "")
        if not here and tables[:1] != ["strategy"]:
            raise ConfigError(f"{key!r} is no key of a run file; a method's are strategy.NAME")
        inside[here or last] = value
    return parse_config(data, base=config.base, where=f"the run with {said(point)}")


def said(point: Point) -> str:
    """A point in words."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in point.items())


def sweep(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    source: Source,
    *,
    kept: Path,
    num_seeds: int = 1,
    score: Score | None = None,
    on_try: Callable[[int, int, Try], None] = lambda done, all_of_them, tried: None,
) -> Sweep:
    """Every point of a grid, learned and judged; best first.

    Args:
      config: The run.
      grid: Values to try, by key.
      source: What is learned from.
      kept: File that each try is added to as soon as it is done; what it holds of this sweep
        already is not tried again.
      num_seeds: Tries a point.
      score: How points are compared; `None`: by the distance of tables, of images by accuracy.
      on_try: Told of each try: how many are done, of how many.

    Raises:
      ConfigError: No point can be, or nothing can be judged.

    Privacy:
      Looks at `source` alone, whose records nobody is promised anything about.
    """
    if num_seeds < 1:
        raise ConfigError(f"a point is tried once or more, not {num_seeds} times")
    plans, refused = _planned(config, points_of(grid))
    schema = plans[0][1].schema
    chosen = score or ("accuracy" if schema.image is not None else "variation")
    _check_score(schema, chosen)
    known = _read(kept)
    tries: dict[int, list[Try]] = {}
    total = len(plans) * num_seeds
    for done, ((index, (point, plan)), seed) in enumerate(
        product(enumerate(plans), range(num_seeds)), start=1
    ):
        key = _key(plan, source, seed, chosen)
        if key not in known:
            known[key] = _tried(point, plan, source, seed, chosen)
            _append(kept, key, known[key])
        tries.setdefault(index, []).append(known[key])
        on_try(done, total, known[key])
    rows = [_row(plans[index][0], of_point) for index, of_point in tries.items()]
    rows.sort(key=lambda row: row.mean, reverse=chosen == "accuracy")
    return Sweep(source.said, chosen, config.run_budget.epsilon, (*rows, *refused))


def refuse_private(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> NoReturn:
    """Say what the same tries would cost on the population's own records, and try none.

    Raises:
      ConfigError: Always.
    """
    plans, _ = _planned(config, points_of(grid))
    budget, events = config.run_budget, [plan.event for _, plan in plans]
    once = max(accounting.epsilon_of(event, budget.delta) for event in events)
    mean = max(2.0, float(len(events)))
    best = selection_epsilon(events, mean=mean, law=Tries.LOGARITHMIC, delta=budget.delta)
    every = accounting.epsilon_of(accounting.compose(events), budget.delta)
    raise ConfigError(
        "settings are not tried on private records here. One run costs epsilon"
        f" {once:.3g}; all {len(events)} as runs of their own, {every:.3g}, which is what each of"
        f" them would charge; the best of a random, secret number of tries, {mean:g} on average and"
        f" nothing shown of the others, {best:.3g} at least. Nothing was asked or spent; try them"
        " on records that are public or of a release, which is free"
    )


def _values(text: str) -> list[Any]:
    """Values as in TOML, else texts between commas."""
    try:
        found: list[Any] = tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        found = [part.strip() for part in text.split(",")]
    return found


def _planned(
    config: RunConfig, points: Iterable[Point]
) -> tuple[list[tuple[Point, Plan]], list[Row]]:
    """The plan of each point that can be, and the rows of those that cannot."""
    plans, refused, first = [], [], None
    for point in points:
        try:
            plans.append((point, plan_of(with_point(config, point))))
        except ConfigError as error:
            first = first or error
            refused.append(Row(point, refused=str(error)))
    if first is not None and not plans:
        raise ConfigError(f"no point of the grid can be: {first}") from first
    return plans, refused


def _check_score(schema: Schema, score: Score) -> None:
    """Refuse a score that such records do not have.

    Raises:
      ConfigError: They do not.
    """
    if schema.is_open:
        raise ConfigError("a sweep needs a schema whose columns are all closed, to compare by")
    target = None if schema.target is None else schema.columns[schema.index(schema.target)]
    if score == "accuracy" and (target is None or not target.is_categorical):
        raise ConfigError(
            "accuracy needs a category as the schema's target, for judges to predict; declare one,"
            " or compare tables by --score variation"
        )
    if score == "variation" and len(schema.columns) < 1:
        raise ConfigError("the distance of tables needs table columns; use --score accuracy")


def _tried(point: Point, plan: Plan, source: Source, seed: int, score: Score) -> Try:
    """Learn a point from stand-ins for the population, and judge it by others."""
    shard, test = stand_ins(plan, source, np.random.default_rng([seed, plan.config.seed]))
    started = time.process_time()
    # noise that clients add, or that users at several clients call for, is more than a query's own
    more = plan.config.population.num_users / plan.heard.num_users
    made = direct_run(
        *(plan.strategy, plan.schema, shard, plan.noise_multiplier * more), rng=rounds_rng(seed)
    )
    num_records = min(_MOST_COMPARED, max(1000, len(shard.records)))
    synthetic = made.sample(num_records, sample_rng(seed))
    took = time.process_time() - started
    return Try(
        point, seed, _judged(synthetic, test, plan.schema, score), plan.noise_multiplier, took
    )


def _judged(synthetic: Records, test: Records, schema: Schema, score: Score) -> float:
    """How good synthetic records are beside others."""
    if score == "variation":
        return total_variation(test, synthetic, schema, min(2, len(schema.columns)))
    judges = train_on_synthetic(test, synthetic, schema, target=schema.target or "")
    return float(np.mean([judge.synthetic for judge in judges.values()]))


def _row(point: Point, tries: Sequence[Try]) -> Row:
    """A point's tries together."""
    return Row(
        point,
        tuple(tried.score for tried in tries),
        tries[0].noise_multiplier,
        float(np.mean([tried.cpu_s for tried in tries])),
    )


def _key(plan: Plan, source: Source, seed: int, score: Score) -> str:
    """What makes it another try."""
    told = {
        "version": __version__,
        "facts": plan.facts,
        "source": source.digest,
        "seed": seed,
        "score": score,
        "typical": list(plan.config.electorate().records),
    }
    return hashlib.sha256(canonical(told).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Try]:
    """What was tried before; a line that was cut short does not count."""
    known: dict[str, Try] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                key = entry.pop("key")
                known[key] = Try(**entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return known


def _append(path: Path, key: str, tried: Try) -> None:
    """Keep a try, at once.

    Raises:
      ConfigError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:  # a line that was cut short ends here
            file.write(f"\n{json.dumps({'key': key, **asdict(tried)}, default=str)}\n")
    except OSError as error:
        raise ConfigError(f"cannot keep the tries in {path}: {error.strerror}") from error

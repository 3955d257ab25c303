# SPDX-License-Identifier: Apache-2.0
"""A private sweep: settings are tried on the private records, and one try alone is ever shown.

The budget holds the whole sweep; each try has the noise that this leaves it (`core/selection.py`).
In order, each step on the disk before the next:

1. The sweep is opened on the population's ledger. It counts whole from here on and for ever.
2. How many tries there are, and which setting each takes, is drawn in secret, once.
3. Each try is an ordinary run on a ledger of its own, in a folder that only the owner can read. It
   ends with its noisy score. Of those that are done, all but the best are deleted.
4. The best is opened on the population's ledger as the run within the sweep, and its entries are
   written there anew, one after the other, so that their times tell nothing.
5. Its release is written, both are finished, and the folder is deleted.

A sweep that was stopped, anywhere, goes on from there. Whoever runs it sees all tries, so it runs
in one process that is trusted with the records anyway, and the price holds against readers of the
release.
"""

import hashlib
import json
import logging
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..client.unread import check_read
from ..core import accounting
from ..core.aggregator import Sum
from ..core.config import ReleaseSection, RunConfig, parse_config
from ..core.errors import BudgetExceeded, ConfigError, FedsynthError, Interrupted, SecurityRefusal
from ..core.failpoints import at
from ..core.files import sync, write_whole
from ..core.privacy import NoisePlacement
from ..core.selection import SelectDpEvent, Tries, drawn_settings
from ..server.conduct import commit, publish
from ..server.ledger import Ledger
from ..server.planned import SWEEP, UNFINISHED, Plan, Won, new_run_id, plan_of
from ..server.release import Release
from ..strategies.discovered import Discovered
from ..strategies.parts.device import take_device
from ..strategies.scored import SCORE, Scored
from .run import population_of, run_local
from .sweep import points_of, with_point

if TYPE_CHECKING:
    from ..client.shard import Shard
    from ..core.randomness import KeyStream

_MOST_SETTINGS = 256
_SHARE = 0.1  # of a try's budget for its score, where the run names none
_SECRET, _DONE = "secret.json", "done.json"
_TRY = "try"  # what each try's run is called on its own ledger
_LOST = -math.inf  # the score of a try whose last round was lost in a crash


@dataclass(frozen=True)
class PrivateSweep:
    """A sweep as it is fixed before anybody is asked.

    Attributes:
      run: Its identity; says nothing of when it began.
      config: The run, without the grid.
      grid: Values to try, by key.
      event: What the whole sweep costs.
      tries: One plan for each setting, with the score at its end.
      salt: In the ledger's entry, so that its hash cannot be searched for the time it was written.
    """

    run: str
    config: RunConfig
    grid: Mapping[str, Sequence[Any]]
    event: SelectDpEvent
    tries: tuple[Plan, ...]
    salt: str

    @property
    def folder(self) -> Path:
        """Where it works."""
        return self.config.path(self.config.release.path) / f"{self.run}{UNFINISHED}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger commits beside the event."""
        return {
            "unit": asdict(self.config.privacy_unit),
            "placement": self.config.noise.placement.value,
            "settings": [plan.facts for plan in self.tries],
            "salt": self.salt,
        }

    @property
    def epsilon(self) -> float:
        """Price of the whole sweep."""
        return accounting.epsilon_of(self.event, self.config.run_budget.delta)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What it costs, as labelled lines."""
        told = self.to_json()
        return [
            (
                "Sweep",
                f"{told['settings']} settings; {told['tries']:g} tries on average ({told['law']})",
            ),
            ("Costs", f"epsilon {told['epsilon']:.4g} at delta {told['delta']:g}, the whole sweep"),
            (
                "Tries",
                f"each at epsilon {told['epsilon_of_a_try']:.3g}; each setting once, and all shown,"
                f" would be {told['epsilon_of_all']:.3g}",
            ),
            ("Shown", "the best try, by a noisy score; never the others, nor how many there were"),
            ("Trust", "whoever runs this sees all tries; the price holds for readers of a release"),
        ]

    def to_json(self) -> dict[str, Any]:
        """What it costs, as plain data for other programs."""
        delta = self.config.run_budget.delta
        events = [plan.event for plan in self.tries]
        return {
            "settings": len(events),
            "tries": self.event.mean,
            "law": self.event.law.name.lower(),
            "epsilon": self.epsilon,
            "delta": delta,
            "epsilon_of_a_try": max(accounting.epsilon_of(event, delta) for event in events),
            "epsilon_of_all": accounting.epsilon_of(accounting.compose(events), delta),
        }


def planned(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    *,
    mean: float | None = None,
    law: Tries = Tries.LOGARITHMIC,
    run: str | None = None,
    salt: str | None = None,
) -> PrivateSweep:
    """A private sweep, planned; reads the schema, never the data, and asks nobody.

    Args:
      config: The run; its budget is the whole sweep's.
      grid: Values to try, by key, all of them the strategy's.
      mean: Tries on average; `None`: as many as there are settings, two at least.
      law: Of the number of tries.
      run: Its identity; `None`: a new one.
      salt: Its secret salt; `None`: a new one.

    Raises:
      ConfigError: It cannot be, or not here.
    """
    outside = [key for key in grid if not key.startswith("strategy.")]
    if outside:
        raise ConfigError(
            f"a private sweep tries settings of the strategy alone, not {outside[0]!r}: whom it"
            " protects, and what it costs, is the same for every try"
        )
    points = points_of(grid)
    if len(points) > _MOST_SETTINGS:
        raise ConfigError(
            f"a private sweep tries at most {_MOST_SETTINGS} settings, not {len(points):,}"
        )
    _check_trusted(config, len(points))
    average = max(2.0, float(len(points))) if mean is None else mean
    share = {} if "score_share" in config.strategy.settings else {"strategy.score_share": _SHARE}
    tries: list[Plan] = []
    for point in points:

        def whole(event: Any) -> SelectDpEvent:
            events = [*(plan.event for plan in tries), event]
            return accounting.select(events, mean=average, law=law)

        tries.append(plan_of(with_point(config, {**share, **point}), run=_TRY, paid=whole))
    if not all(_is_scored(plan) for plan in tries):
        raise ConfigError("a try has no score at its end; leave strategy.score-share to the sweep")
    event = accounting.select([plan.event for plan in tries], mean=average, law=law)
    sweep = PrivateSweep(
        run or f"sweep-{secrets.token_hex(8)}",
        config,
        grid,
        event,
        tuple(tries),
        salt or secrets.token_hex(16),
    )
    if not sweep.epsilon <= config.run_budget.epsilon * (1 + 1e-9):
        raise ConfigError(
            f"the sweep would cost epsilon {sweep.epsilon!r}, above its budget of"
            f" {config.run_budget.epsilon!r}; nothing was asked. Give other settings or tries"
        )
    return sweep


def resumed(folder: Path) -> PrivateSweep:
    """The sweep that was begun in a working folder.

    Raises:
      ConfigError: There is none.
    """
    path = folder / SWEEP
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = parse_config(data["config"], base=Path(data["base"]), where=str(path))
        law, mean = Tries[data["law"]], float(data["mean"])
        run, salt, grid = str(data["run"]), str(data["salt"]), dict(data["grid"])
    except OSError as error:
        raise ConfigError(
            f"{folder} is not an unfinished private sweep: {error.strerror}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} does not describe a private sweep: {error}") from error
    return planned(config, grid, mean=mean, law=law, run=run, salt=salt)


def private_sweep(sweep: PrivateSweep, *, stream: "KeyStream", data: "Shard | None" = None) -> Path:
    """Do a private sweep, or what is left of it, and write the release of its best try.

    Args:
      sweep: As it was planned.
      stream: Secret randomness of noise, and of which tries there are.
      data: The population's records; `None`: read them from the configuration's `data.path`.

    Returns:
      The release folder.

    Raises:
      BudgetExceeded: The population's budget does not hold it; nothing was asked.
      SecurityRefusal: What was drawn in secret is lost. The sweep is closed, and stays charged.
      FedsynthError: No try has a score. The sweep is closed, and stays charged.
      Interrupted: A person stopped it; resumable.

    Privacy:
      The budget's epsilon, for each unit, against everyone who sees the release: candidate, noisy
      sums and score of the best of K tries, each with a setting drawn uniformly, K by the sweep's
      law (`core.selection.selected_rdp`). Tries are ordered by score and then by a digest of all of
      their sums, both part of what is released. Against whoever sees the process, its files while
      it lasts, or how long it takes: what all tries cost together.
    """
    config = sweep.config
    take_device(config.engine.device)
    shard = population_of(config, sweep.tries[0].schema) if data is None else data
    check_read(shard.unread)
    _check_begins(sweep)
    _start(sweep)
    try:
        with (
            Ledger(config.path(config.ledger)) as ledger,
            ledger.hold(sweep.run),
            _without_a_word(),
        ):
            _open(sweep, ledger)
            release = _released(sweep, ledger, stream, shard)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            "stopped. The whole sweep is on the ledger and nothing is lost. Resume:"
            f" fedsynth sweep --resume {sweep.folder}"
        ) from None
    at("before-clearing")
    shutil.rmtree(sweep.folder)
    return release


def _check_trusted(config: RunConfig, num_settings: int) -> None:
    """Refuse a sweep where somebody who is not trusted with records would see all tries."""
    kind, placement = config.engine.kind, config.noise.placement
    if (kind, placement) != ("local", NoisePlacement.CENTRAL):
        once = config.run_budget.epsilon
        raise ConfigError(
            "settings are tried on private records under engine.kind = 'local' and noise.placement"
            f" = 'central' alone, not {kind!r} and {placement.value!r}: elsewhere somebody beside"
            " the owner of the process sees every try, and to them it costs as much as all"
            f" {num_settings} settings in runs of their own, at epsilon {once:g} each. Nothing was"
            " asked or spent; try them on records that are public or of a release, which is free"
        )
    if config.noise.aggregator != Sum.name:
        raise ConfigError(
            f"a private sweep compares exact sums with noise, which aggregator"
            f" {config.noise.aggregator!r} does not form; use 'sum'"
        )


def _check_begins(sweep: PrivateSweep) -> None:
    """Have every setting say what it asks first, so that what cannot begin costs nothing."""
    for plan in sweep.tries:
        steps = plan.strategy.rounds(plan.schema, plan.noise_multiplier, plan.rng)
        next(steps)
        steps.close()


def _is_scored(plan: Plan) -> bool:
    """Whether a plan ends with a score."""
    strategy = plan.strategy
    return isinstance(strategy.inner if isinstance(strategy, Discovered) else strategy, Scored)


def _start(sweep: PrivateSweep) -> None:
    """Write a sweep down before it begins, so that it can be found again."""
    sweep.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (sweep.folder / SWEEP).exists():
        data = {
            "run": sweep.run,
            "salt": sweep.salt,
            "base": str(sweep.config.base),
            "config": sweep.config.model_dump(mode="json", by_alias=True),
            "grid": {key: list(values) for key, values in sweep.grid.items()},
            "mean": sweep.event.mean,
            "law": sweep.event.law.name,
        }
        _keep(sweep.folder / SWEEP, data)


def _open(sweep: PrivateSweep, ledger: Ledger) -> None:
    """Commit the whole sweep; one that is not held by the budget leaves nothing behind."""
    population = sweep.config.population
    try:
        ledger.open_run(
            sweep.run, population.name, cap=population.cap, event=sweep.event, facts=sweep.facts
        )
    except BudgetExceeded:
        shutil.rmtree(sweep.folder)
        raise


def _released(sweep: PrivateSweep, ledger: Ledger, stream: "KeyStream", shard: "Shard") -> Path:
    """Try, choose, and write the release of what was chosen; the release folder."""
    runs = ledger.runs(sweep.config.population.name)
    within = [run.run for run in runs if run.facts.get("within") == sweep.run]
    if any(run.run == sweep.run and run.state == "finished" for run in runs):
        return sweep.config.path(sweep.config.release.path) / within[0]
    drawn = _drawn(sweep, ledger, stream, is_shown=bool(within))
    for number, setting in enumerate(drawn):
        _tried(sweep.tries[setting], _place(sweep, number), stream, shard)
        _forget_losers(sweep.folder)
    best = max(range(len(drawn)), key=lambda number: _key(_place(sweep, number)))
    place = _place(sweep, best)
    if _key(place)[0] == _LOST:
        _close(sweep, ledger)
        raise FedsynthError(
            "no try has a score: the process was stopped while its noise was drawn. The sweep is"
            " closed and stays charged; nothing is released"
        )
    at("after-choice")
    plan = replace(
        sweep.tries[drawn[best]],
        run=within[0] if within else new_run_id(sweep.config.strategy.name),
        won=Won(sweep.run, sweep.grid, sweep.event),
    )
    return _shown(plan, place, ledger, noise_is_secret=stream.is_secret)


def _drawn(
    sweep: PrivateSweep, ledger: Ledger, stream: "KeyStream", *, is_shown: bool
) -> tuple[int, ...]:
    """The setting of each try: drawn once, and on the disk before the first try begins.

    Once the best is on the population's ledger (`is_shown`), whole or in part, there was a draw.
    """
    path, tries = sweep.folder / _SECRET, sweep.folder / "tries"
    if not path.exists() and not tries.exists() and not is_shown:
        num_settings, event = len(sweep.tries), sweep.event
        new = drawn_settings(num_settings, mean=event.mean, law=event.law, stream=stream)
        at("before-secret")
        _keep(path, {"sweep": sweep.run, "drawn": new})
        at("after-secret")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        drawn = tuple(kept["drawn"])
        fits = kept["sweep"] == sweep.run and len(drawn) > 0
        fits = fits and all(type(n) is int and 0 <= n < len(sweep.tries) for n in drawn)
    except (OSError, ValueError, TypeError, KeyError):
        fits, drawn = False, ()
    if not fits:
        _close(sweep, ledger)
        raise SecurityRefusal(
            f"{path}, which says how many tries there are, is lost or damaged, and it is never"
            " drawn again. The sweep is closed and stays charged; nothing is released. Start a new"
            " one"
        )
    tries.mkdir(exist_ok=True, mode=0o700)
    sync(sweep.folder)
    return drawn


def _close(sweep: PrivateSweep, ledger: Ledger) -> None:
    """End a sweep that shows nothing: charged for ever, and its tries deleted."""
    ledger.close(sweep.run)
    tries = sweep.folder / "tries"
    if tries.exists():
        shutil.rmtree(tries)


def _tried(plan: Plan, place: Path, stream: "KeyStream", shard: "Shard") -> None:
    """Do one try, or what is left of it, on a ledger of its own, and set its score down."""
    if (place / _DONE).exists():
        return
    place.mkdir(exist_ok=True, mode=0o700)
    sync(place.parent)  # a try that is done stays so, and is never done twice
    apart = {
        "ledger": place / "ledger.db",
        "release": ReleaseSection(path=place / "releases", num_records=1),
    }
    run_local(replace(plan, config=plan.config.model_copy(update=apart)), stream=stream, data=shard)
    with Ledger(place / "ledger.db") as ledger:
        last = ledger.attempts(_TRY)[-1]
        sealed = ledger.sum_of(_TRY, last.round) if last.query == SCORE else None
        sums = [e.data["sha256"] for e in ledger.entries(_TRY) if e.kind == "seal"]
    score = None if sealed is None else float(sealed.total[0]) * sealed.unit
    at("before-done")
    _keep(place / _DONE, [score, hashlib.sha256("".join(sums).encode()).hexdigest()])
    at("after-done")


def _key(place: Path) -> tuple[float, str]:
    """By what tries are ordered: the noisy score, and a digest of all noisy sums."""
    score, digest = json.loads((place / _DONE).read_text(encoding="utf-8"))
    return (_LOST if score is None else float(score)), str(digest)


def _forget_losers(folder: Path) -> None:
    """Delete all that tries left which are done and not the best, but for their scores."""
    done = [path.parent for path in sorted((folder / "tries").glob(f"*/{_DONE}"))]
    best = max(done, key=_key)
    for place in done:
        for path in place.iterdir() if place != best else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _DONE:
                path.unlink()


def _place(sweep: PrivateSweep, number: int) -> Path:
    """Where a try works."""
    return sweep.folder / "tries" / f"{number:06d}"


def _shown(plan: Plan, place: Path, ledger: Ledger, *, noise_is_secret: bool) -> Path:
    """Write a try's sums on the population's ledger, and its release; the release folder."""
    made = Release.open(place / "releases" / _TRY)
    with ledger.hold(plan.run):
        commit(plan, ledger)
        with Ledger(place / "ledger.db") as source:
            _copy(source, ledger, plan.run)
        folder = publish(
            plan,
            made.synthesizer,
            ledger,
            noise_is_secret=noise_is_secret,
            generations=made.generations,
        )
        if plan.won is not None:
            ledger.finish(plan.won.sweep)
    return folder


def _copy(source: Ledger, ledger: Ledger, run: str) -> None:
    """Do every step of a try again on another ledger, but for those that it holds already.

    Raises:
      SecurityRefusal: It holds a sum of another try: of each sweep one alone is shown.
    """
    known = {(e.round, e.attempt, e.kind): e.data for e in ledger.entries(run)}
    for entry in source.entries(_TRY):
        where, data = (run, entry.round, entry.attempt), entry.data
        before = known.get((*where[1:], entry.kind))
        if entry.kind == "seal" and before is not None and before != data:
            raise SecurityRefusal(
                f"run {run!r} holds a sum that is not this try's, and one try alone is shown;"
                " nothing is released. The sweep stays charged; start a new one"
            )
        if not entry.round or before is not None:
            continue
        match entry.kind:
            case "reserve":
                ledger.reserve(*where, **data)
            case "draw":
                ledger.draw(*where)
            case "seal":
                sealed = source.sum_of(_TRY, entry.round)
                if sealed is None:
                    raise SecurityRefusal("a try's sum is not on its ledger; nothing is released")
                told = {key: data[key] for key in ("unit", "stddev", "num_clients")}
                ledger.seal(*where, sealed.total, **told)
            case "release":
                ledger.release(*where)
            case "void":
                ledger.void(*where, data["reason"])


def _keep(path: Path, data: Any) -> None:
    """Write a file that the owner alone can read."""
    write_whole(path, json.dumps(data).encode(), is_secret=True)


@contextmanager
def _without_a_word() -> Iterator[None]:
    """While it lasts, no log counts rounds, and so tries."""
    log = logging.getLogger(__name__.split(".")[0])
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)

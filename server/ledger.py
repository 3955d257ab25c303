# SPDX-License-Identifier: Apache-2.0
"""The write-ahead privacy ledger: what each population has spent, durable before anyone is asked.

A ledger is one list of entries (`server/chain.py`); whatever else can be asked of it is read off
that list. A run's entries follow one another so, every step on the disk before the call returns::

    open ──► reserve ──► draw ──► seal ──► release        and at the end: finish, or close
             (charged)    └────┬───┘ the noised sum, stored with its hash
                └──► void ◄────┘     charged, never released

Why spending is never under-stated (promises I1 and I2): `open` writes a run's whole plan before
any client is asked, and an open run counts as its whole plan. `reserve` comes before a question
is sent and takes one sum out of that plan, each (round, attempt) once; nothing puts it back. So
at any moment, and after a crash at any moment, every noise that was drawn belongs to a
reservation, every reservation to a plan, and both are on the disk. A run that ended counts as
its reservations, or as its whole plan: see `Ledger.spent`.

A sweep is a run whose plan is the best of a secret number of tries. Nothing is ever reserved under
it, and it counts whole for ever. One run, the try that is shown, may be `within` it: it is paid
for.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BudgetExceeded, ConfigError, PrivacyRefusal, SecurityRefusal
from ..core.leaf import Leaf, Leaves
from ..core.privacy import Budget
from ..core.wire import canonical
from .chain import Chain, Entry

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

WON = ("within", "selection")  # facts that a sweep's shown try has beside those of its settings

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Stage(StrEnum):
    """How far an attempt at a round has come."""

    RESERVED = "reserved"  # charged; clients may have been asked
    DRAWING = "drawing"  # noise may exist
    SEALED = "sealed"  # the noised sum is stored
    RELEASED = "released"  # the noised sum may be used
    VOID = "void"  # charged, never released


class VoidReason(StrEnum):
    """Why a round was given up; nothing in it depends on a record."""

    LOST_IN_CRASH = "lost-in-crash"
    NO_QUORUM = "no-quorum"
    TOO_FEW_SHARES = "too-few-shares"
    INVALID_SUM = "invalid-sum"
    INTERRUPTED = "interrupted"


_STAGE_AFTER = {
    "reserve": Stage.RESERVED,
    "draw": Stage.DRAWING,
    "seal": Stage.SEALED,
    "release": Stage.RELEASED,
    "void": Stage.VOID,
}
_IN_ROUND = f"kind IN ({', '.join(repr(kind) for kind in _STAGE_AFTER)})"


@dataclass(frozen=True)
class RoundState:
    """The latest attempt at a round.

    Attributes:
      round: Position in the run, from 1.
      attempt: From 1.
      stage: How far it has come.
      query: Name of the question.
      noise_multiplier: As reserved.
      sampling_prob: As reserved.
      sensitivity: As reserved; `None` where it was not stated.
      reason: Why it is void; empty otherwise.
      leaf: What was reserved, or the series that it belongs to.
      series: Name of the series that it belongs to, or "".
      position: Which of its rounds it is; from 1 on charged already, with the first.
    """

    round: int
    attempt: int
    stage: Stage
    query: str
    noise_multiplier: float
    sampling_prob: float
    sensitivity: float | None
    reason: str
    leaf: Leaf
    series: str
    position: int

    @property
    def goes_on(self) -> bool:
        """Whether it is a later round of a series, and so charged already."""
        return self.position > 0


@dataclass(frozen=True)
class SealedSum:
    """A noised sum as it was stored.

    Attributes:
      total: Noised integers, `(dim,)`.
      unit: Width of one lattice step.
      stddev: Of the noise in each coordinate, in the vectors' own unit.
      num_clients: Clients whose sums are in it.
      attempt: Which attempt gave it.
    """

    total: NDArray[np.int64]
    unit: float
    stddev: float
    num_clients: int
    attempt: int


@dataclass(frozen=True)
class Population:
    """A population's budget: `spent` is an event, `epsilon` its price at the cap's delta."""

    name: str
    cap: Budget
    unit: str  # column of user ids, or "record"
    spent: "DpEvent"
    epsilon: float


@dataclass(frozen=True)
class Run:
    """A run as it was committed, and where it stands: `open`, `finished` or `closed`."""

    run: str
    population: str
    when: str
    event: "DpEvent"
    facts: Mapping[str, Any]
    state: str


class Ledger:
    """The ledger in the file at `path`, made if it is not there.

    Any number of processes may have the file open; each operation is one transaction that waits
    for its turn. Drive one run from one process at a time: see `hold`.

    Raises:
      SecurityRefusal: The file is damaged, edited, or not a ledger.
      LedgerError: The file cannot be read or written; every method may raise this one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chain = Chain(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Let go of the file; the ledger cannot be used after this."""
        self._chain.disconnect()

    # ---- what is written -----------------------------------------------------------------

    def open_run(
        self,
        run: str,
        population: str,
        *,
        cap: Budget,
        event: "DpEvent",
        facts: Mapping[str, Any],
    ) -> None:
        """Commit a run's whole plan; comes before any client is asked.

        Committing the same run again, with the same plan and facts, changes nothing: so a run is
        resumed.

        Args:
          run: Identity of the run, unique for ever.
          population: Whose budget pays. Its first run registers it with its cap and its unit.
          cap: The most that all runs of the population together may spend.
          event: Cost of the whole run.
          facts: Whatever else is fixed for the run, plain data. Three facts are read here:
            `"unit"`, a mapping whose `"column"` must be the same in all runs of a population, for
            epsilons of users and of records do not add up; `"placement"`: under `"central"` a
            sum is sealed only after `draw`; and `"within"`: the sweep that has paid for the run.

        Raises:
          BudgetExceeded: The cap does not hold it. Nothing was written.
          ConfigError: The cap or the unit is not the population's, or the run was closed.
          SecurityRefusal: The run is committed with another plan or other facts, or the sweep that
            it is within did not pay for it.

        Privacy:
          The check is that epsilon, at the cap's delta, of everything committed on the population
          and of this plan stays within the cap. Where all sums are unsampled this holds however
          the plan was chosen, for Gaussian DP composes fully adaptively (Smith and Thakurta, 2022,
          "Fully Adaptive Composition for Gaussian Differential Privacy", arXiv 2210.17520).
          Where some are Poisson-sampled, or there is a sweep, it holds for plans that were not
          chosen by looking at what earlier runs on the same population gave; within a run the plan
          is fixed anyway.
        """
        from ..core import accounting

        for name in (run, population):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} is not a plain name of a run or a population")
        plan = accounting.to_json(event)
        accounting.from_json(plan)  # what is written must be read again
        body = canonical({"plan": plan, "facts": facts})
        unit = _protected(facts)
        with self._chain.writing("commit"):
            committed = self._chain.select("run = ? AND kind = 'open'", run)
            if committed and (committed[0].population, committed[0].body) != (population, body):
                raise SecurityRefusal(
                    f"run {run!r} is on {self.path} already, with another plan or other facts;"
                    " a run is resumed exactly as it was begun. Restore its configuration and"
                    " versions, or start a new run"
                )
            if committed:
                if self._run(run).state == "closed":
                    raise ConfigError(f"run {run!r} was closed and is not resumed; start a new one")
                return
            registered = self._chain.select("population = ? AND kind = 'population'", population)
            if registered:
                self._check_population(population, cap, unit)
            else:
                data = {"epsilon": float(cap.epsilon), "delta": cap.delta, "unit": unit}
                self._chain.append("population", population, data=data)
            if facts.get("within") is not None:
                self._check_within(Run(run, population, "", event, facts, "open"))
            spent = self._spent(population)
            before = accounting.epsilon_of(spent, cap.delta)
            due = [spent] if facts.get("within") is not None else [spent, event]
            after = accounting.epsilon_of(accounting.compose(due), cap.delta)
            if not after <= cap.epsilon:
                raise BudgetExceeded(
                    f"run {run!r} would bring epsilon of population {population!r} to"
                    f" {after:.6g}, above the budget of {cap.epsilon:.6g} (delta={cap.delta:g});"
                    f" {before:.6g} is spent or committed already. Nothing was asked. Lower"
                    " budget.epsilon, or raise population.epsilon if the people it belongs to agree"
                )
            self._chain.append("open", population, run, data={"plan": plan, "facts": facts})
        self._chain.checkpoint()  # the plan, on which spending rests, is in both files from here on

    def set_cap(self, population: str, cap: Budget) -> None:
        """Change the most that all runs of a population may spend.

        Raises:
          BudgetExceeded: More than that is spent or committed already.
          ConfigError: There is no such population.
        """
        from ..core.accounting import epsilon_of

        with self._chain.writing():
            self._cap(population)
            spent = epsilon_of(self._spent(population), cap.delta)
            if not spent <= cap.epsilon:
                raise BudgetExceeded(
                    f"population {population!r} has spent or committed epsilon {spent:.6g} at"
                    f" delta={cap.delta:g}; its budget cannot be lowered to {cap.epsilon:.6g}"
                )
            data = {"epsilon": float(cap.epsilon), "delta": cap.delta}
            self._chain.append("cap", population, data=data)

    def reserve(
        self,
        run: str,
        round: int,  # noqa: A002  (the field's word)
        attempt: int,
        *,
        query: str,
        noise_multiplier: float,
        sampling_prob: float,
        sensitivity: float | None = None,
        chooses: int = 0,
        records: int = 1,
        rounds: int = 1,
        series: str = "",
        position: int = 0,
    ) -> None:
        """Charge one sum of the run's plan; comes before its question is sent.

        Args:
          run: An open run.
          round: Position in the run, from 1.
          attempt: 1, or one more than an attempt at this round that is void.
          query: Name of the question.
          noise_multiplier: Of the sum.
          sampling_prob: Of the sum.
          sensitivity: L2 change that one user can cause; where it is given, a sum with less
            noise than `noise_multiplier * sensitivity` cannot be sealed.
          chooses: How many candidates a choice draws, which costs what such a sum costs; 0: it is
            a sum.
          records: Most vectors of one user in the sum, as in `Leaf`.
          rounds: Rounds of the series that the sum belongs to; 1: it stands alone.
          series: Name of that series; its first round is charged for all of them.
          position: Which of the series' rounds it is, from 0; each comes once and in order.

        Raises:
          BudgetExceeded: The plan holds no such sum, or no more of them.
          PrivacyRefusal: The attempt was reserved before, or is out of turn.
        """
        if round < 1 or attempt < 1:
            raise ConfigError(f"rounds and attempts count from 1, not {round} and {attempt}")
        if not series and (position or rounds != 1):
            raise ConfigError("a sum that goes on is one of a series, which has a name")
        leaf = Leaf(float(noise_multiplier), float(sampling_prob), int(records), int(rounds))
        with self._chain.writing("reserve"):
            opened = self._open_run(run)
            latest = self._state(run, round)
            expected = 1 if latest is None else latest.attempt + 1
            if attempt != expected or (latest is not None and latest.stage != Stage.VOID):
                raise PrivacyRefusal(
                    f"round {round} of run {run!r} cannot be reserved as attempt {attempt}:"
                    f" {'no attempt came before' if latest is None else _described(latest)}."
                    " An attempt is reserved once, and the next one when that is void"
                )
            left = _plan(opened)
            left.subtract(self._reserved(run))
            if series:
                self._check_turn(run, leaf, series, position)
            if left[leaf] < 1 and not position:
                raise BudgetExceeded(
                    f"query {query!r} in round {round} asks for a sum with noise_multiplier"
                    f" {leaf[0]!r} and sampling_prob {leaf[1]!r}{_more(leaf)}, but the plan that"
                    f" run {run!r} committed holds no such sum any more; left are {_listed(left)}."
                    " Nothing was"
                    " asked. A strategy's event() must list exactly what its rounds() ask."
                )
            data: dict[str, Any] = {
                "query": query,
                "noise_multiplier": leaf[0],
                "sampling_prob": leaf[1],
            }
            if sensitivity is not None:
                data["sensitivity"] = float(sensitivity)
            if chooses:
                data["chooses"] = int(chooses)
            if leaf.records > 1:
                data["records"] = leaf.records
            if series:
                data |= {"rounds": leaf.rounds, "series": series, "position": int(position)}
            self._chain.append("reserve", opened.population, run, round, attempt, data)

    def draw(self, run: str, round: int, attempt: int) -> None:  # noqa: A002
        """Mark that from here on noise may exist; comes before the server draws any.

        Raises:
          PrivacyRefusal: The attempt is not `reserved`: its noise may have been drawn before.
        """
        with self._chain.writing("draw"):
            opened, _ = self._at_stage(run, round, attempt, "draw", Stage.RESERVED)
            self._chain.append("draw", opened.population, run, round, attempt)

    def seal(
        self,
        run: str,
        round: int,  # noqa: A002
        attempt: int,
        total: NDArray[np.int64],
        *,
        unit: float,
        stddev: float,
        num_clients: int,
    ) -> None:
        """Store a noised sum, and its hash in the chain; comes before anything is done with it.

        Args:
          run: An open run.
          round: Position in the run.
          attempt: `drawing`; or `reserved` where clients drew the noise.
          total: Noised integers, `(dim,)`.
          unit: Width of one lattice step.
          stddev: Of the noise in each coordinate, in the vectors' own unit.
          num_clients: Clients whose sums are in it.

        Raises:
          PrivacyRefusal: The attempt is at another stage, or has less noise than reserved.
        """
        if total.dtype != np.int64 or total.ndim != 1:
            raise ConfigError(f"a sum is int64 of one dimension, not {total.dtype} {total.shape}")
        if not (0 < unit < math.inf and 0 < stddev < math.inf and num_clients >= 1):
            raise ConfigError(
                "unit, stddev and num_clients of a sum must be above 0 and finite, not"
                f" {unit!r}, {stddev!r} and {num_clients!r}"
            )
        stored = total.astype("<i8").tobytes()
        data = {
            "sha256": hashlib.sha256(stored).hexdigest(),
            "dim": len(total),
            "unit": float(unit),
            "stddev": float(stddev),
            "num_clients": int(num_clients),
        }
        with self._chain.writing("seal"):
            stages = (Stage.RESERVED, Stage.DRAWING)
            opened, state = self._at_stage(run, round, attempt, "seal", *stages)
            if state.stage == Stage.RESERVED and opened.facts.get("placement") == "central":
                raise PrivacyRefusal(
                    f"round {round} of run {run!r}: noise that the server draws is marked by"
                    " draw() first; this sum cannot have any"
                )
            if state.sensitivity is not None:
                least = state.noise_multiplier * state.sensitivity
                if stddev < least * (1 - 1e-9):
                    raise PrivacyRefusal(
                        f"round {round} of run {run!r} was reserved with noise of standard"
                        f" deviation {least!r}; a sum with {stddev!r} is not released"
                    )
            number = self._chain.append("seal", opened.population, run, round, attempt, data)
            self._chain.attach(number, stored)

    def release(self, run: str, round: int, attempt: int) -> None:  # noqa: A002
        """Mark that the sealed sum may be used from here on.

        Raises:
          PrivacyRefusal: The attempt is not `sealed`.
        """
        with self._chain.writing("release"):
            opened, _ = self._at_stage(run, round, attempt, "release", Stage.SEALED)
            self._chain.append("release", opened.population, run, round, attempt)
        self._chain.checkpoint()

    def void(self, run: str, round: int, attempt: int, reason: str) -> None:  # noqa: A002
        """Give an attempt up: it stays charged and is never released.

        Args:
          run: An open run.
          round: Position in the run.
          attempt: `reserved` or `drawing`.
          reason: One of `VoidReason`.

        Raises:
          PrivacyRefusal: The attempt is at another stage.
        """
        if reason not in set(VoidReason):
            known = ", ".join(VoidReason)
            raise ConfigError(f"{reason!r} is no reason for a void round; it is one of: {known}")
        with self._chain.writing():
            stages = (Stage.RESERVED, Stage.DRAWING)
            opened, _ = self._at_stage(run, round, attempt, "void", *stages)
            self._chain.append(
                "void", opened.population, run, round, attempt, {"reason": str(reason)}
            )

    def finish(self, run: str) -> None:
        """Mark a run complete; what its plan still holds is given back as `spent` describes.

        Finishing a finished run changes nothing.

        Raises:
          ConfigError: A round is neither released nor void, or the run was closed.
        """
        with self._chain.writing("finish"):
            found = self._run(run)
            if found.state == "finished":
                return
            self._open_run(run)
            for state in self._attempts(run):
                if state.stage not in (Stage.RELEASED, Stage.VOID):
                    raise ConfigError(
                        f"run {run!r} cannot be finished: round {state.round},"
                        f" {_described(state)}; resume the run, or close it"
                    )
            self._chain.append("finish", found.population, run)

    def close(self, run: str) -> None:
        """Give up an unfinished run for ever; its reservations stay charged.

        Closing a closed run changes nothing.

        Raises:
          ConfigError: The run is finished.
        """
        with self._chain.writing():
            found = self._run(run)
            if found.state == "finished":
                raise ConfigError(f"run {run!r} is finished; there is nothing to close")
            if found.state == "open":
                self._chain.append("close", found.population, run)

    def hold(self, run: str) -> AbstractContextManager[None]:
        """Be the only process that drives a run, until the context or the process ends.

        Raises:
          ConfigError: A living process, this one included, holds the run.
        """
        return self._chain.hold(run)

    # ---- what is read --------------------------------------------------------------------

    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry; `(0, GENESIS)` when there is none."""
        with self._chain.reading():
            return self._chain.head()

    def state(self, run: str, round: int) -> RoundState | None:  # noqa: A002
        """The latest attempt at a round; `None`: nothing was reserved for it."""
        with self._chain.reading():
            return self._state(run, round)

    def sum_of(self, run: str, round: int) -> SealedSum | None:  # noqa: A002
        """The sum that the latest attempt at a round sealed, bit for bit; `None`: none is.

        Call `release` before it is used, if its stage is still `sealed`.

        Raises:
          SecurityRefusal: The stored bytes are not those that were sealed.
        """
        with self._chain.reading():
            state = self._state(run, round)
            sealed = self._chain.select(
                "run = ? AND kind = 'seal' AND round = ? AND attempt = ?",
                *(run, round, state.attempt if state else 0),
            )
            if not sealed:
                return None
            data, stored = sealed[0].data, self._chain.attached(sealed[0])
        return SealedSum(
            np.frombuffer(stored, dtype="<i8").astype(np.int64),
            data["unit"],
            data["stddev"],
            data["num_clients"],
            sealed[0].attempt,
        )

    def spent(self, population: str) -> "DpEvent":
        """All that the population has spent or committed.

        Privacy:
          An open run counts as its whole plan, whatever it has asked so far. A finished or closed
          run counts as what it reserved, void rounds included, if its plan holds unsampled
          Gaussian sums only: those compose fully adaptively, so stopping early, even because of
          what was seen, frees the rest (beside sampled runs of the same population, with the
          caveat of `open_run`). If its plan holds any Poisson-sampled sum, it counts as
          its whole plan for ever: for privacy loss distributions no theorem allows to stop on
          what was seen and pay for the rounds so far only. So does a sweep, and the one run within
          it costs nothing more.
        """
        with self._chain.reading():
            return self._spent(population)

    def populations(self) -> list[Population]:
        """Every population, in the order of their registration."""
        from ..core.accounting import epsilon_of

        found = []
        with self._chain.reading():
            for entry in self._chain.select("kind = 'population'"):
                cap, spent = self._cap(entry.population), self._spent(entry.population)
                unit = _unit_name(entry.data["unit"])
                epsilon = epsilon_of(spent, cap.delta)
                found.append(Population(entry.population, cap, unit, spent, epsilon))
        return found

    def runs(self, population: str | None = None) -> list[Run]:
        """Every run, or every run of one population, in the order they were opened."""
        with self._chain.reading():
            return self._runs(population)

    def attempts(self, run: str) -> list[RoundState]:
        """Every attempt at every round of a run, in the order they were reserved."""
        with self._chain.reading():
            return self._attempts(run)

    def entries(self, run: str) -> list[Entry]:
        """A run's entries, in order."""
        with self._chain.reading():
            return self._chain.select("run = ?", run)

    def verify(self) -> None:
        """Read the whole ledger: every entry, its place in the chain, and every stored sum.

        Raises:
          SecurityRefusal: Names the first entry that is not as it was written.
        """
        with self._chain.reading():
            self._chain.verify()

    # ---- how a run stands ----------------------------------------------------------------

    def _runs(self, population: str | None = None) -> list[Run]:
        """`runs`, inside a transaction."""
        where = "kind = 'open'" + ("" if population is None else " AND population = ?")
        names = () if population is None else (population,)
        return [self._run(entry.run) for entry in self._chain.select(where, *names)]

    def _run(self, run: str) -> Run:
        """A run as it stands."""
        from ..core.accounting import from_json

        found = {
            entry.kind: entry
            for entry in self._chain.select("run = ? AND kind IN ('open', 'finish', 'close')", run)
        }
        if "open" not in found:
            raise ConfigError(f"run {run!r} is not on {self.path}")
        opened = found["open"]
        state = "finished" if "finish" in found else "closed" if "close" in found else "open"
        event = from_json(opened.data["plan"])
        return Run(run, opened.population, opened.time, event, opened.data["facts"], state)

    def _open_run(self, run: str) -> Run:
        """A run that may still be charged."""
        found = self._run(run)
        if found.state != "open":
            raise ConfigError(f"run {run!r} is {found.state}; nothing was asked. Start a new run")
        return found

    def _attempts(self, run: str) -> list[RoundState]:
        """Every attempt at every round of a run, in the order they were reserved."""
        by_attempt: dict[tuple[int, int], list[Entry]] = {}
        for entry in self._chain.select(f"run = ? AND {_IN_ROUND}", run):
            by_attempt.setdefault((entry.round, entry.attempt), []).append(entry)
        return [_state_of(entries) for entries in by_attempt.values()]

    def _state(self, run: str, round_: int) -> RoundState | None:
        """`state`, inside a transaction."""
        entries = self._chain.select(f"run = ? AND {_IN_ROUND} AND round = ?", run, round_)
        if not entries:
            return None
        attempt = max(entry.attempt for entry in entries)
        return _state_of([entry for entry in entries if entry.attempt == attempt])

    def _at_stage(
        self, run: str, round_: int, attempt: int, step: str, *stages: Stage
    ) -> tuple[Run, RoundState]:
        """An open run and a round's latest attempt, which must be at one of `stages`."""
        opened, state = self._open_run(run), self._state(run, round_)
        if state is None or state.attempt != attempt or state.stage not in stages:
            raise PrivacyRefusal(
                f"{step}: round {round_}, attempt {attempt} of run {run!r} must be"
                f" {' or '.join(stages)}, but"
                f" {'nothing is reserved' if state is None else _described(state)}"
            )
        return opened, state

    def _reserved(self, run: str) -> Leaves:
        """Every sum that a run has reserved."""
        return charged(self._chain.select("run = ? AND kind = 'reserve'", run))

    def _check_turn(self, run: str, leaf: Leaf, series: str, position: int) -> None:
        """Refuse a round of a series that does not come right after the one before."""
        before = [
            entry
            for entry in self._chain.select("run = ? AND kind = 'reserve'", run)
            if entry.data.get("series") == series
        ]
        if len(before) != position or position >= leaf.rounds:
            raise PrivacyRefusal(
                f"a series of {leaf.rounds} rounds is at its round {len(before) + 1}, and was asked"
                f" for round {position + 1}; nothing was asked. Each of its rounds comes once, in"
                " order"
            )
        if any(leaf_of(entry) != leaf for entry in before):
            raise PrivacyRefusal("a series changes its noise; nothing was asked")

    def _spent(self, population: str) -> "DpEvent":
        """`spent`, inside a transaction."""
        from ..core.accounting import compose, event_of, parts

        total: Leaves = Counter()
        sweeps: list[DpEvent] = []
        runs = self._runs(population)
        for run in runs:
            plan, chosen = parts(run.event)
            if chosen:
                sweeps.append(run.event)
            elif not is_paid(run, runs):
                ended = run.state != "open" and not _is_sampled(plan)
                total += self._reserved(run.run) if ended else plan
        return compose([event_of(total), *sweeps])

    def _check_within(self, run: Run) -> None:
        """Refuse a run that says that a sweep has paid for it, if that is not so."""
        runs = [*self._runs(run.population), run]
        sweep = next((r for r in runs if r.run == run.facts["within"]), None)
        if sweep is None or sweep.state != "open" or not is_paid(run, runs):
            raise SecurityRefusal(
                f"run {run.run!r} is not the try that sweep {run.facts['within']!r} has paid for:"
                " that must be open, of the same population, hold these settings and these sums,"
                " and have shown no other try. Nothing was written"
            )

    def _cap(self, population: str) -> Budget:
        """The budget that holds for a population."""
        caps = self._chain.select("population = ? AND kind IN ('population', 'cap')", population)
        if not caps:
            raise ConfigError(f"population {population!r} is not on {self.path}")
        data = caps[-1].data
        return Budget(data["epsilon"], data["delta"], accept_weak=True)  # checked when it came

    def _check_population(self, population: str, cap: Budget, unit: str | None) -> None:
        """Refuse a run that means another budget, or another unit, by the population's name."""
        known = self._cap(population)
        if (known.epsilon, known.delta) != (cap.epsilon, cap.delta):
            raise ConfigError(
                f"population {population!r} has a budget of epsilon {known.epsilon!r} at delta"
                f" {known.delta!r} on {self.path}, but the run says epsilon {cap.epsilon!r} at"
                f" delta {cap.delta!r}. Say the same, or change the budget on the ledger:"
                f" fedsynth ledger {self.path} --population {population}"
                f" --set-epsilon {cap.epsilon!r}"
            )
        first = self._chain.select("population = ? AND kind = 'population'", population)[0]
        if first.data["unit"] != unit:
            raise ConfigError(
                f"the budget of population {population!r} protects one"
                f" {_unit_name(first.data['unit'])!r}, but the run protects one"
                f" {_unit_name(unit)!r}; their epsilons do not add up. Keep unit.column, or name"
                " another population"
            )


def _protected(facts: Mapping[str, Any]) -> str | None:
    """The column of user ids by which a run's unit is found; `None`: records, or not stated."""
    unit = facts.get("unit", {})
    if not isinstance(unit, Mapping):
        raise ConfigError(f"facts['unit'] must be a mapping of the unit's fields, not {unit!r}")
    column = unit.get("column")
    return None if column is None else str(column)


def _unit_name(column: str | None) -> str:
    """How a unit is shown."""
    return "record" if column is None else column


def _plan(run: Run) -> Leaves:
    """The sums that a run committed."""
    from ..core.accounting import leaves

    return leaves(run.event)


def is_paid(run: Run, runs: Sequence[Run]) -> bool:
    """Whether a run is the one try of a sweep that is shown, so that the sweep has paid for it.

    Args:
      run: The run.
      runs: All runs of its population, itself among them.
    """
    from ..core.accounting import parts, to_json

    within, own = run.facts.get("within"), parts(run.event)
    sweeps = [other for other in runs if other.run == within]
    shown = [other for other in runs if other.facts.get("within") == within]
    if within is None or own[1] or len(sweeps) != 1 or len(shown) != 1:
        return False
    sums, chosen = parts(sweeps[0].event)
    if sums or list(chosen.values()) != [1] or not all(best.holds(own[0]) for best in chosen):
        return False
    settings = {key: value for key, value in run.facts.items() if key not in WON}
    offered = [canonical(one) for one in sweeps[0].facts.get("settings", ())]
    told = run.facts.get("selection")
    return (
        canonical(settings) in offered
        and isinstance(told, Mapping)
        and told.get("event") == to_json(sweeps[0].event)
    )


def _is_sampled(plan: Leaves) -> bool:
    """Whether a plan holds a Poisson-sampled sum."""
    return any(leaf.is_sampled for leaf in plan)


def leaf_of(reservation: Entry) -> Leaf:
    """The sum, or the series, that a `reserve` entry belongs to."""
    data = reservation.data
    return Leaf(
        data["noise_multiplier"],
        data["sampling_prob"],
        data.get("records", 1),
        data.get("rounds", 1),
    )


def charged(reservations: Iterable[Entry]) -> Leaves:
    """What `reserve` entries charge: each its sum, but of a series the first alone."""
    return Counter(leaf_of(entry) for entry in reservations if not entry.data.get("position", 0))


def _more(leaf: Leaf) -> str:
    """What is unusual about a sum, for a message."""
    records = f", of up to {leaf.records} records a user" if leaf.records > 1 else ""
    return records + (f", in a series of {leaf.rounds} rounds" if leaf.rounds > 1 else "")


def _listed(left: Leaves) -> str:
    """What a plan still holds, for a message."""
    some = [
        f"{n} with {leaf.noise_multiplier!r} and {leaf.sampling_prob!r}{_more(leaf)}"
        for leaf, n in sorted(left.items())
        if n > 0
    ]
    return ", ".join(some[:5]) + (", ..." if len(some) > 5 else "") if some else "none"


def _state_of(entries: list[Entry]) -> RoundState:
    """One attempt at one round, from its entries in order."""
    first, last = entries[0].data, entries[-1]
    return RoundState(
        last.round,
        last.attempt,
        _STAGE_AFTER[last.kind],
        first["query"],
        first["noise_multiplier"],
        first["sampling_prob"],
        first.get("sensitivity"),
        last.data.get("reason", ""),
        leaf_of(entries[0]),
        first.get("series", ""),
        first.get("position", 0),
    )


def _described(state: RoundState) -> str:
    """An attempt and its stage, for a message."""
    return f"attempt {state.attempt} is {state.stage}"

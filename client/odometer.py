# SPDX-License-Identifier: Apache-2.0
"""The client's own durable record of what it answered and what that cost, whatever a server says.

A question is reserved on disk before any noise is drawn, and its answer stored on disk before it
is sent; asked again, the client sends the same bytes. So no noise is drawn twice for one
question, and what was spent is never less than what left.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakValueDictionary, finalize, ref

import numpy as np

from ..core.errors import ClientCode, ConfigError, FedsynthError, SecurityRefusal
from ..core.privacy import Budget, NoisePlacement
from ..core.wire import Ask, canonical, echoes, series_of, told

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_APPLICATION_ID = 0x66736F64  # "fsod"
_VERSION = 2
_BUSY_S = 60.0
_MAX_PLAN_ENTRIES = 4096  # kinds of sums in one plan
_MAX_SAMPLED_KINDS = 128  # pricing takes a fifth of a second for each
_MAX_KINDS_OVER_RECORDS = 4  # of those, over several records of a user: up to five seconds each
_MAX_ANSWER = 999_000_000  # bytes; SQLite holds a thousand million in a row
_SUMS = """
CREATE TABLE sums (
  client TEXT, run TEXT, noise_multiplier REAL, sampling_prob REAL, records INTEGER, rounds INTEGER,
  planned INTEGER NOT NULL, reserved INTEGER NOT NULL CHECK (reserved <= planned),
  PRIMARY KEY (client, run, noise_multiplier, sampling_prob, records, rounds)) WITHOUT ROWID;"""
_SERIES = """
CREATE TABLE series (
  client TEXT, run TEXT, series TEXT, position INTEGER, total BLOB,
  PRIMARY KEY (client, run, series, position));"""
_TABLES = f"""
CREATE TABLE names (client TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE heads (
  client TEXT, server TEXT, number INTEGER NOT NULL, hash TEXT NOT NULL,
  PRIMARY KEY (client, server)) WITHOUT ROWID;
CREATE TABLE runs (
  client TEXT, population TEXT, run TEXT, commitment TEXT NOT NULL, digest TEXT NOT NULL,
  delta REAL NOT NULL, epsilon REAL NOT NULL,
  PRIMARY KEY (client, population, run)) WITHOUT ROWID;
{_SUMS}
CREATE TABLE questions (
  client TEXT, run TEXT, round INTEGER, attempt INTEGER,
  digest TEXT NOT NULL, noise_here INTEGER NOT NULL, is_answered INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (client, run, round, attempt)) WITHOUT ROWID;
CREATE TABLE answers (
  client TEXT, run TEXT, round INTEGER, attempt INTEGER,
  sha256 BLOB NOT NULL, total BLOB NOT NULL,
  PRIMARY KEY (client, run, round, attempt));
{_SERIES}
"""
_FROM_1 = f"""
ALTER TABLE sums RENAME TO old_sums;
{_SUMS}
INSERT INTO sums SELECT client, run, noise_multiplier, sampling_prob, 1, 1, planned, reserved
  FROM old_sums;
DROP TABLE old_sums;
{_SERIES}"""  # noqa: S608  (both are constants)
"""What makes a file of version 1, which knew of neither records nor series, one of version 2."""


@dataclass(frozen=True)
class Spent:
    """What a client's answers may have cost each of its users, for the owner's own eyes.

    Attributes:
      population: Whose budget paid.
      epsilon: Of all plans ever committed on it, at `delta`.
      delta: At which `epsilon` was priced.
      runs: The runs, in no order of time.
    """

    population: str
    epsilon: float
    delta: float
    runs: tuple[str, ...]


class Odometer:
    """What one client remembers of the questions it was asked, in a SQLite file.

    Several clients of a simulation may share a file; each sees its own rows alone. All clients
    of one process share one connection to it. The file is for the owner's eyes only (0600).

    Args:
      path: The file, made if there is none.
      client: Whose rows.
      synced: Every step is on the disk before it returns. `False`: it is with the operating
        system, so it outlives this process but not a loss of power; for simulated clients only,
        whose records lie on the machine of whoever asks.

    Raises:
      SecurityRefusal: The file is not an odometer, or is damaged. Never answered by starting
        anew, which would forget what was spent.

    Example:
      >>> import tempfile
      >>> odometer = Odometer(Path(tempfile.mkdtemp()) / "odometer.db", "hospital-1")
      >>> odometer.witness("cardio", (7, "ab")), odometer.witness("cardio", (6, "cd"))
      (None, <ClientCode.HEAD_REWOUND: 10>)
    """

    def __init__(self, path: Path, client: str, *, synced: bool = True) -> None:
        self._path = path.absolute()
        self._client = client
        self._synced = synced
        self._kept = _store(self._path)

    @property
    def _store(self) -> "_Store":
        """This process's connection; a forked child opens its own."""
        if self._kept.pid != os.getpid():
            self._kept = _store(self._path)
        return self._kept

    @cached_property
    def name(self) -> str:
        """A random name of this odometer, drawn once: two nodes that share it are one site."""
        with self._store.transaction(synced=self._synced) as db:
            db.execute(
                "INSERT OR IGNORE INTO names VALUES (?, ?)", (self._client, secrets.token_hex(16))
            )
            row = db.execute("SELECT name FROM names WHERE client = ?", (self._client,)).fetchone()
        return str(row[0])

    def witness(self, server: str, head: tuple[int, str]) -> ClientCode | None:
        """Remember the newest head of a server's ledger; refuse one that went back or forked.

        It outlives this process at once, and a loss of power from the next reservation on, so
        before anything is answered.

        Args:
          server: Whose ledger: its name must be the same each time.
          head: Sequence number and hash of the ledger's last entry.
        """
        number, digest = head
        with self._store.transaction(synced=False) as db:
            row = db.execute(
                "SELECT number, hash FROM heads WHERE client = ? AND server = ?",
                (self._client, server),
            ).fetchone()
            if row is not None and (number < row[0] or (number == row[0] and digest != row[1])):
                return ClientCode.HEAD_REWOUND
            if row is None or number > row[0]:
                db.execute(
                    "INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)",
                    (self._client, server, number, digest),
                )
        return None

    def join(self, ask: Ask, *, cap: Budget) -> ClientCode | None:
        """Commit the whole plan of the run that a question belongs to, once.

        A plan stays charged for ever, also the part of it that is never asked.

        Privacy:
          Unsampled plans compose as Gaussian DP, however a server chose each. Where plans hold
          Poisson-sampled sums the price of several holds for plans that were not chosen by what
          the earlier ones gave; each single plan is fixed beforehand.

        Args:
          ask: Any question of the run.
          cap: The most that all plans on the population may together cost one user.

        Returns:
          `None`, or `BUDGET_REFUSED` if the cap does not hold the plan beside all that were ever
          committed, `CONFLICT` if the run was committed otherwise, `MALFORMED` if the plan is
          not one.
        """
        commitment = _commitment(ask)
        digest = hashlib.sha256(commitment.encode()).hexdigest()
        row = self._joined(ask)
        if row is None:
            return self._commit(ask, commitment, digest, cap)
        if row[0] != digest:
            return ClientCode.CONFLICT
        _, delta, epsilon = row
        if delta != cap.delta:  # the owner changed the policy since
            epsilon = self.spent(ask.population, delta=cap.delta).epsilon
        return None if epsilon <= cap.epsilon else ClientCode.BUDGET_REFUSED

    def reserve(self, ask: Ask) -> bytes | ClientCode | None:
        """Set a question down, durably, before its answer is computed.

        Answers of earlier rounds of the run are dropped: a server that asks on has them.

        Returns:
          `None`: go on and answer. Bytes: the answer that was given before; send the same.
          `CONFLICT`: another question was asked under the same run, round and attempt.
          `OUTSIDE_PLAN`: the run's plan holds no such sum, or no more of them.
          `ANSWER_GONE`: the answer was dropped, or noise may have been drawn for one that a crash
          lost; the charge stays.
        """
        digest = self._store.digest_of(ask)
        key = (self._client, ask.run, ask.round, ask.attempt)
        with self._store.transaction(synced=self._synced) as db:
            row = db.execute(
                "SELECT digest, noise_here, is_answered FROM questions"
                " WHERE client = ? AND run = ? AND round = ? AND attempt = ?",
                key,
            ).fetchone()
            if row is not None:
                return self._repeated(db, ask, row, digest)
            if not self._charged(db, ask):
                return ClientCode.OUTSIDE_PLAN
            choice = ask.query.choice
            drawn_here = choice is not None and choice.where == "client"
            noise_here = drawn_here or ask.placement is not NoisePlacement.CENTRAL
            db.execute(
                "INSERT INTO questions (client, run, round, attempt, digest, noise_here)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (*key, digest, noise_here),
            )
            db.execute("DELETE FROM answers WHERE client = ? AND run = ? AND round < ?", key[:3])
        return None

    def earlier(self, ask: Ask) -> Iterator[tuple[int, bytes]]:
        """This client's exact sums of earlier rounds of a question's series, one at a time.

        Each with its position; those that the round does not echo are left out.
        """
        if ask.query.turn is None:
            return
        now, coefficients = ask.query.turn.position, ask.query.turn.series.coefficients
        for then in range(max(0, now - len(coefficients) + 1), now):
            if coefficients[now - then]:
                yield from self._store.rows(
                    "SELECT position, total FROM series WHERE client = ? AND run = ?"
                    " AND series = ? AND position = ? AND total IS NOT NULL",
                    (self._client, ask.run, series_of(ask.query), then),
                )

    def store(self, ask: Ask, total: bytes, *, alone: bytes = b"") -> None:
        """Keep an answer, durably, before it is sent.

        Args:
          ask: The question.
          total: The answer.
          alone: In a series: the exact sum of this round alone, whose echoes later rounds carry.
            It is for this client's own eyes.

        Raises:
          FedsynthError: The question was not reserved, was answered with other bytes, or the
            answer is larger than a row of the file may be.
        """
        if len(total) > _MAX_ANSWER:
            raise FedsynthError(f"an answer of more than {_MAX_ANSWER:,} bytes cannot be kept")
        digest = self._store.digest_of(ask)
        key = (self._client, ask.run, ask.round, ask.attempt)
        sha256 = hashlib.sha256(total).digest()
        with self._store.transaction(synced=self._synced) as db:
            reserved = db.execute(
                "UPDATE questions SET is_answered = 1 WHERE client = ? AND run = ? AND round = ?"
                " AND attempt = ? AND digest = ? AND NOT is_answered",
                (*key, digest),
            )
            if reserved.rowcount == 1:
                db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", (*key, sha256, total))
                if ask.query.turn is not None:
                    self._keep(db, ask, alone)
                return
            kept = db.execute(
                "SELECT sha256 FROM answers"
                " WHERE client = ? AND run = ? AND round = ? AND attempt = ?",
                key,
            ).fetchone()
        if kept is None or kept[0] != sha256:
            raise FedsynthError(
                "an answer to a question that was not reserved, or that has another answer; it"
                " must not be sent"
            )

    def spent(self, population: str, *, delta: float) -> Spent:
        """All that was ever committed on a population by this client, priced at `delta`."""
        from ..core.accounting import compose, epsilon_of

        plans = self._plans(population)
        epsilon = epsilon_of(compose(plans.values()), delta)
        return Spent(population, epsilon, delta, tuple(plans))

    def populations(self) -> list[str]:
        """Populations on which this client committed anything."""
        rows = self._store.rows(
            "SELECT DISTINCT population FROM runs WHERE client = ?", (self._client,)
        )
        return sorted(population for (population,) in rows)

    def _charged(self, db: sqlite3.Connection, ask: Ask) -> bool:
        """Take a question's sum out of the run's plan, if it is in there.

        The first round of a series that this client sees takes the whole series. Of the others
        each position comes once, and later than those before.
        """
        query, series = ask.query, series_of(ask.query)
        if query.turn is not None:
            (latest,) = db.execute(
                "SELECT max(position) FROM series WHERE client = ? AND run = ? AND series = ?",
                (self._client, ask.run, series),
            ).fetchone()
            if latest is not None and query.turn.position <= latest:
                return False
        if query.turn is None or latest is None:
            counted = db.execute(
                "UPDATE sums SET reserved = reserved + 1 WHERE client = ? AND run = ?"
                " AND noise_multiplier = ? AND sampling_prob = ? AND records = ? AND rounds = ?"
                " AND reserved < planned",
                (self._client, ask.run, *query.leaf),
            )
            if counted.rowcount != 1:
                return False
        if query.turn is not None:
            db.execute(
                "INSERT INTO series VALUES (?, ?, ?, ?, NULL)",
                (self._client, ask.run, series, query.turn.position),
            )
        return True

    def _keep(self, db: sqlite3.Connection, ask: Ask, alone: bytes) -> None:
        """Keep a round's exact sum for the echoes, and none that no round will echo any more."""
        turn = ask.query.turn
        if turn is None:
            return
        key = (self._client, ask.run, series_of(ask.query))
        db.execute(
            "UPDATE series SET total = ? WHERE client = ? AND run = ? AND series = ?"
            " AND position = ?",
            (alone, *key, turn.position),
        )
        is_last = turn.position == turn.series.num_rounds - 1
        kept = 0 if is_last else len(turn.series.coefficients) - 1
        db.execute(
            "UPDATE series SET total = NULL WHERE client = ? AND run = ? AND series = ?"
            " AND position <= ?",
            (*key, turn.position - kept),
        )

    def _joined(self, ask: Ask) -> tuple[str, float, float] | None:
        """Digest, delta and epsilon that the run was committed with."""
        rows = self._store.rows(
            "SELECT digest, delta, epsilon FROM runs"
            " WHERE client = ? AND population = ? AND run = ?",
            (self._client, ask.population, ask.run),
        )
        return rows[0] if rows else None

    def _commit(self, ask: Ask, commitment: str, digest: str, cap: Budget) -> ClientCode | None:
        """Price the run beside all others and set it down, if the cap holds it."""
        from ..core.accounting import leaves

        try:
            plan = _event(ask.plan)
        except ConfigError:
            return ClientCode.MALFORMED
        if any(leaf.is_sampled for leaf in leaves(plan)):
            # seconds, in which no other client of the file should wait; the price below is kept
            self._priced(ask.population, plan, cap)
        with self._store.transaction(synced=self._synced) as db:
            elsewhere = db.execute(
                "SELECT digest FROM runs WHERE client = ? AND run = ?", (self._client, ask.run)
            ).fetchone()
            if elsewhere is not None:  # by another process just now, or on another population
                return None if elsewhere[0] == digest else ClientCode.CONFLICT
            epsilon = self._priced(ask.population, plan, cap)
            if not epsilon <= cap.epsilon:
                return ClientCode.BUDGET_REFUSED
            db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(self._client, ask.population, ask.run, commitment, digest),
                    *(cap.delta, epsilon),
                ),
            )
            db.execute(  # what an earlier run left, that was stopped in the middle of a series
                "UPDATE series SET total = NULL WHERE client = ? AND run IN"
                " (SELECT run FROM runs WHERE client = ? AND population = ?) AND run != ?",
                (self._client, self._client, ask.population, ask.run),
            )
            db.executemany(
                "INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                [(self._client, ask.run, *leaf, count) for leaf, count in leaves(plan).items()],
            )
        return None

    def _priced(self, population: str, plan: "DpEvent", cap: Budget) -> float:
        """Epsilon of a plan beside all that were committed on the population."""
        from ..core.accounting import compose, epsilon_of

        return epsilon_of(compose([*self._plans(population).values(), plan]), cap.delta)

    def _plans(self, population: str) -> "dict[str, DpEvent]":
        """The plans committed on a population, by run."""
        rows = self._store.rows(
            "SELECT run, commitment, digest FROM runs WHERE client = ? AND population = ?",
            (self._client, population),
        )
        plans: dict[str, DpEvent] = {}
        for run, commitment, digest in rows:
            if hashlib.sha256(commitment.encode()).hexdigest() != digest:
                raise _damaged(self._path)
            plans[run] = _event(json.loads(commitment)["plan"])
        return plans

    def _repeated(
        self, db: sqlite3.Connection, ask: Ask, row: tuple[str, int, int], digest: str
    ) -> bytes | ClientCode | None:
        """What a question gets that was reserved before."""
        asked, noise_here, is_answered = row
        if asked != digest:
            return ClientCode.CONFLICT
        if not is_answered:
            return ClientCode.ANSWER_GONE if noise_here else None
        kept = db.execute(
            "SELECT sha256, total FROM answers"
            " WHERE client = ? AND run = ? AND round = ? AND attempt = ?",
            (self._client, ask.run, ask.round, ask.attempt),
        ).fetchone()
        if kept is None or hashlib.sha256(kept[1]).digest() != kept[0]:
            return ClientCode.ANSWER_GONE
        return bytes(kept[1])


class _Store:
    """One process's connection to a file, and the last question whose digest was taken."""

    def __init__(self, path: Path) -> None:
        self.pid = os.getpid()
        self._path = path
        self._db = _opened(path)
        self._file = _identity(path)
        self._lock = threading.RLock()
        self._level = ""  # of syncing, as last said
        self._last: tuple[ReferenceType[Ask], str] | None = None
        finalize(self, _close, self._db, self.pid)

    @property
    def is_current(self) -> bool:
        """Whether the path still names the file that is open."""
        return _identity(self._path) == self._file

    def digest_of(self, ask: Ask) -> str:
        """Digest of a question; taken once for the steps, and the clients, that share it."""
        if self._last is None or self._last[0]() is not ask:
            self._last = (ref(ask), digest_of(ask))
        return self._last[1]

    def rows(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        """What a query finds."""
        with self._lock, _whole(self._path):
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def transaction(self, *, synced: bool) -> Iterator[sqlite3.Connection]:
        """Everything or nothing, and on disk when it ends, or else with the next that is synced."""
        with self._lock, _whole(self._path):
            level = "FULL" if synced else "NORMAL"
            if self._level != level:
                self._level = ""  # should the next line fail, it is said again before anything else
                self._db.execute(f"PRAGMA synchronous = {level}")
                self._level = level
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:  # it failed, or its commit did
                    self._db.execute("ROLLBACK")


_open_stores: WeakValueDictionary[tuple[int, Path], _Store] = WeakValueDictionary()


def digest_of(ask: Ask) -> str:
    """SHA-256 of all that a question says, its arrays included; the ledger's head is not in it."""
    query = ask.query
    arrays = dict(query.inputs) | {f"choice {k}": v for k, v in told(query.choice).items()}
    arrays |= {f"series {k}": v for k, v in echoes(query.turn).items()}
    inputs = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    said = {
        **_terms(ask),
        "run": ask.run,
        "round": ask.round,
        "attempt": ask.attempt,
        "num_shares": ask.num_shares,
        "public_seed": ask.public_seed,
        "query": query.name,
        "dim": query.dim,
        "clip": float(query.clip),
        "noise_multiplier": float(query.noise_multiplier),
        "sampling_prob": float(query.sampling_prob),
        "cells": query.cells,
        "resolution": query.resolution,
        "records": query.records,
        "series": series_of(query),
        "position": None if query.turn is None else query.turn.position,
        "choice": None if query.choice is None else [query.choice.where, query.choice.count],
        "inputs": [[name, a.dtype.str, list(a.shape)] for name, a in inputs.items()],
    }
    whole = hashlib.sha256(canonical(said).encode())
    for array in inputs.values():
        whole.update(array.data if array.size else b"")
    return whole.hexdigest()


def _terms(ask: Ask) -> dict[str, str | float]:
    """What every question of a run says alike."""
    return {
        "population": ask.population,
        "strategy": ask.strategy,
        "settings": ask.settings,
        "schema": ask.schema_digest,
        "unit": ask.unit,
        "placement": ask.placement.value,
        "plan": ask.plan,
        "delta": float(ask.delta),
        "public_seed": ask.public_seed,
    }


def _commitment(ask: Ask) -> str:
    """What a run commits, as canonical JSON."""
    return canonical({"run": ask.run, **_terms(ask)})


def _event(plan: str) -> "DpEvent":
    """The event that a plan's JSON describes.

    Raises:
      ConfigError: It describes none, or one with too many kinds of sums.
    """
    from ..core.accounting import from_json

    try:
        entries = json.loads(plan)
        if not isinstance(entries, list) or len(entries) > _MAX_PLAN_ENTRIES:
            raise ConfigError(f"a plan is a list of at most {_MAX_PLAN_ENTRIES} kinds of sums")
        if any("tries" in entry for entry in entries):
            raise ConfigError("tries are no secret to a client, so a plan of them has no price")
        event = from_json(entries)
        sampled = [entry for entry in entries if entry["sampling_prob"] < 1]
        over_records = sum(entry.get("records", 1) > 1 for entry in sampled)
        if len(sampled) > _MAX_SAMPLED_KINDS or over_records > _MAX_KINDS_OVER_RECORDS:
            raise ConfigError(
                f"a plan holds at most {_MAX_SAMPLED_KINDS} kinds of sampled sums, of which"
                f" {_MAX_KINDS_OVER_RECORDS} are over records"
            )
        return event
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError("not a plan") from error


def _store(path: Path) -> _Store:
    """This process's store of a file."""
    key = (os.getpid(), path)
    store = _open_stores.get(key)
    if store is None or not store.is_current:
        store = _open_stores[key] = _Store(path)
    return store


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path names."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _opened(path: Path) -> sqlite3.Connection:
    """A connection to an odometer's file, made if there is none."""
    _touch(path)
    with _whole(path), ExitStack() as on_failure:
        db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        on_failure.callback(db.close)
        _prepare(db, path)
        on_failure.pop_all()
    return db


def _touch(path: Path) -> None:
    """Make a file that its owner alone may read, and make its name durable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"cannot keep an odometer at {path}: {error.strerror}") from error


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make writes durable, and the tables unless they are there."""
    _write_ahead(db)
    db.execute("PRAGMA secure_delete = ON")  # exact sums of a series are here for a while
    db.execute("BEGIN IMMEDIATE")
    (found,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (num_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if num_tables == 0 and found == 0:
        for statement in _TABLES.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {_VERSION}")
    elif (found, version) == (_APPLICATION_ID, 1):
        for statement in _FROM_1.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {_VERSION}")
    elif (found, version) != (_APPLICATION_ID, _VERSION):
        raise _damaged(path)
    db.execute("COMMIT")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Turn to the write-ahead log; SQLite does not wait here for processes that do the same."""
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _close(db: sqlite3.Connection, pid: int) -> None:
    """Close a connection, in the process that opened it."""
    if os.getpid() == pid:
        db.close()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what SQLite says of a damaged file into a refusal."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise FedsynthError(
            f"cannot write the odometer {path}: {error}; nothing was answered. Check that its"
            " folder can be written to, that the disk has room, and that no other program holds it"
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> SecurityRefusal:
    """The refusal of a file that cannot be trusted to remember."""
    return SecurityRefusal(
        f"{path} is not an odometer of this version, or it is damaged; nothing was answered."
        " Restore it from a backup. Deleting it would forget what was spent"
    )

# SPDX-License-Identifier: Apache-2.0
"""A durable list of entries, each carrying the hash of the one before; what the ledger stands on.

One SQLite file. An entry is written once, in a transaction that has reached the disk before it
is acknowledged, and is never changed; every reading holds it against its hash. `server/ledger.py`
says what entries mean and which may follow which.

What the file alone cannot show: entries cut off at its end, or an older copy put in its place.
For that, every client keeps the last `head` it saw and refuses a server that is behind it.
"""

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core import failpoints
from ..core.errors import ConfigError, FedsynthError, LedgerError, SecurityRefusal
from ..core.wire import canonical

GENESIS = "0" * 64

_APPLICATION, _VERSION = 0x66647379, 1
_BUSY_S = 60.0  # how long a process waits for another that is writing
_PART_BYTES = 1 << 24  # bytes are stored in parts, for SQLite's limit on one value
_TYPES = (int, str, str, str, str, int, int, str, str, str)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT)

_SCHEMA = (
    """CREATE TABLE entries (
        number INTEGER PRIMARY KEY CHECK (number >= 1),
        time TEXT NOT NULL,
        kind TEXT NOT NULL,
        population TEXT NOT NULL,
        run TEXT NOT NULL,
        round INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        body TEXT NOT NULL,
        previous TEXT NOT NULL UNIQUE,
        hash TEXT NOT NULL UNIQUE
    )""",
    # nothing happens twice to a run, or to one attempt at one of its rounds
    "CREATE UNIQUE INDEX once ON entries (run, kind, round, attempt) WHERE run <> ''",
    "CREATE INDEX by_run ON entries (run, kind, round)",
    "CREATE INDEX by_population ON entries (population, kind)",
    """CREATE TABLE parts (
        number INTEGER NOT NULL REFERENCES entries (number),
        part INTEGER NOT NULL,
        bytes BLOB NOT NULL,
        PRIMARY KEY (number, part)
    )""",
    *(
        f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table}"
        f" BEGIN SELECT RAISE (ABORT, 'the ledger is append-only'); END"
        for table in ("entries", "parts")
        for verb in ("UPDATE", "DELETE")
    ),
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)

_held: set[Path] = set()  # files that this process holds a lock on
_holding = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
      number: Position, from 1, without gaps.
      time: When the server wrote it, UTC, ISO 8601.
      kind: What happened; see `server/ledger.py`.
      population: Whose budget it concerns.
      run: Empty where the entry concerns no run.
      round: 0 where the entry concerns no round.
      attempt: 0 where the entry concerns no round.
      body: Canonical JSON.
      previous: Hash of the entry before; `GENESIS` for the first.
      hash: SHA-256 of the canonical JSON of the list of all fields above, in this order.
    """

    number: int
    time: str
    kind: str
    population: str
    run: str
    round: int
    attempt: int
    body: str
    previous: str
    hash: str

    @property
    def data(self) -> Mapping[str, Any]:
        """The body, read."""
        data: dict[str, Any] = json.loads(self.body)
        return data

    def digest(self) -> str:
        """What `hash` must be."""
        *fields, _ = vars(self).values()  # in order; `astuple` would copy each of them
        return _digest(tuple(fields))


class Chain:
    """The chain in the file at `path`, made if it is not there.

    Any number of processes may have the file open; whoever writes waits for its turn.

    Raises:
      SecurityRefusal: The file is damaged, edited, or not a ledger.
      LedgerError: The file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                # only ever on a file that is not there: closing a descriptor of a file in use
                # would drop the locks that SQLite holds on it
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        except OSError as error:
            raise self._failure(error) from error
        with self._explained():
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        # bytes that are not text must fail their hash, not the reading
        self._db.text_factory = lambda text: text.decode(errors="surrogateescape")
        try:
            with self._explained():
                self._set_up()
            with self.reading():
                self._integrity("integrity_check('entries')")
                self._follow()
        except FedsynthError:
            self._db.close()
            raise

    def disconnect(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def writing(self, step: str | None = None) -> Iterator[None]:
        """One durable transaction: all of it or, after an error or a kill, nothing of it.

        Args:
          step: The fail points just before and just after the commit; `None`: there are none.
        """
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                if step:
                    failpoints.at(f"before-{step}")
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        if step:
            failpoints.at(f"after-{step}")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One moment of the chain, whatever others write meanwhile."""
        with self._explained():
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def append(
        self,
        kind: str,
        population: str,
        run: str = "",
        round_: int = 0,
        attempt: int = 0,
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Add an entry, inside `writing`; its number."""
        last, previous = self.head()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        body = canonical(data or {})
        row = (last + 1, now, kind, population, run, round_, attempt, body, previous)
        self._db.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, _digest(row))
        )
        return last + 1

    def attach(self, number: int, stored: bytes) -> None:
        """Store bytes with an entry, inside `writing`; its body holds their `sha256`."""
        for part, start in enumerate(range(0, len(stored), _PART_BYTES)):
            self._db.execute(
                "INSERT INTO parts VALUES (?, ?, ?)",
                (number, part, stored[start : start + _PART_BYTES]),
            )

    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry; `(0, GENESIS)` when there is none."""
        query = "SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1"
        row = self._db.execute(query).fetchone()
        return (0, GENESIS) if row is None else (row[0], row[1])

    def select(self, where: str, *values: str | int) -> list[Entry]:
        """Entries in order, each held against its own hash; `where` is ours, never foreign text."""
        query = f"SELECT * FROM entries WHERE {where} ORDER BY number"  # noqa: S608  (see above)
        return [self._entry(row) for row in self._db.execute(query, values)]

    def attached(self, entry: Entry) -> bytes:
        """The bytes stored with an entry, held against the hash in its body."""
        query = "SELECT bytes FROM parts WHERE number = ? ORDER BY part"
        stored = b"".join(row[0] for row in self._db.execute(query, (entry.number,)))
        if hashlib.sha256(stored).hexdigest() != entry.data["sha256"]:
            raise self._damage(f"the sum that entry {entry.number} sealed is not the one stored")
        return stored

    def verify(self) -> None:
        """Read everything: SQLite's pages, every entry and its place, all bytes stored.

        Raises:
          SecurityRefusal: Names the first entry that is not as it was written.
        """
        self._integrity("integrity_check")
        self._follow()
        sealed = self.select("kind = 'seal'")
        for entry in sealed:
            self.attached(entry)
        rows = self._db.execute("SELECT DISTINCT number FROM parts").fetchall()
        strange = sorted({row[0] for row in rows} - {entry.number for entry in sealed})
        if strange:
            raise self._damage(f"a sum is stored for entry {strange[0]}, which sealed none")

    def checkpoint(self) -> None:
        """Fold the write-ahead file into the main one, as far as no reader is in the way."""
        failpoints.at("before-checkpoint")
        with self._explained():
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        failpoints.at("after-checkpoint")

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """A lock that no other process, and nobody else in this one, can take meanwhile.

        It is the operating system's: when a process ends, however it ends, it holds nothing.

        Raises:
          ConfigError: Somebody alive holds it.
        """
        short = hashlib.sha256(name.encode()).hexdigest()[:16]
        path = self.path.resolve().with_name(f"{self.path.name}.{short}.lock")
        with _holding:
            if path in _held:
                raise ConfigError(f"run {name!r} is being driven by this process already")
            _held.add(path)
        try:
            with self._locked(path, name):
                yield
        finally:
            _held.discard(path)

    @contextmanager
    def _locked(self, path: Path, name: str) -> Iterator[None]:
        """The part of `hold` that other processes see."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._failure(error) from error
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"run {name!r} is being driven by another process, which is alive (it holds"
                    f" {path}). Wait for it or stop it; a process that ended holds nothing"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        """A row as an entry, if it is what its hash says."""
        entry = Entry(*row)
        if tuple(map(type, row)) != _TYPES or entry.digest() != entry.hash:
            raise self._damage(f"entry {row[0]} is not what its hash says")
        return entry

    def _follow(self) -> None:
        """Follow the chain from the first entry to the last."""
        last, previous = 0, GENESIS
        for row in self._db.execute("SELECT * FROM entries ORDER BY number"):
            entry = self._entry(row)
            if entry.number != last + 1:
                raise self._damage(f"entry {last + 1} is missing")
            if entry.previous != previous:
                raise self._damage(f"entry {entry.number} does not follow entry {last}")
            last, previous = entry.number, entry.hash

    def _integrity(self, check: str) -> None:
        """SQLite's own check of its pages and indices."""
        said = self._db.execute(f"PRAGMA {check}").fetchone()[0]
        if said != "ok":
            raise self._damage(f"SQLite says: {said}")

    def _set_up(self) -> None:
        """Settings of this connection and, in an empty file, the tables."""
        for setting in (
            "trusted_schema = OFF",
            "foreign_keys = ON",
            "cell_size_check = ON",
            "synchronous = FULL",  # in WAL mode: the disk is synced at every commit
            "fullfsync = ON",  # macOS: past the drive's own cache, too
            "checkpoint_fullfsync = ON",
        ):
            self._db.execute(f"PRAGMA {setting}")
        if self._db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            self._db.execute("PRAGMA journal_mode = WAL")
        with self.writing():
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            mark = self._db.execute("PRAGMA application_id").fetchone()[0]
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if not (tables or mark or version):
                for statement in _SCHEMA:
                    self._db.execute(statement)
            elif mark != _APPLICATION:
                raise SecurityRefusal(f"{self.path} is a database, but not a ledger of fedsynth")
            elif version != _VERSION:
                raise SecurityRefusal(
                    f"{self.path} is a ledger of version {version}; this fedsynth reads version"
                    f" {_VERSION}. Use the fedsynth that wrote it"
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as ours, with what to do."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                raise self._damage(f"SQLite says: {error}") from error
            raise self._failure(error) from error
        except UnicodeDecodeError as error:  # SQLite quotes what it cannot read, as it stands
            raise self._damage("its own description of its tables is not text") from error

    def _damage(self, what: str) -> SecurityRefusal:
        """The refusal of a ledger that is not as it was written."""
        return SecurityRefusal(
            f"the ledger {self.path} was damaged or edited: {what}. Nothing was asked. Put back"
            " the newest whole copy; clients that saw a later one will refuse to answer"
        )

    def _failure(self, error: Exception) -> LedgerError:
        """The error of a ledger that cannot be read or written."""
        return LedgerError(
            f"the ledger {self.path} could not be read or written: {error}. What it acknowledged"
            " before is safe; this step is not on it, or counts as spent. It needs a local disk"
            " that this user may write to, with room for every noised sum (8 bytes a coordinate,"
            " twice while it is written). Then resume the run"
        )


def _digest(fields: tuple[Any, ...]) -> str:
    """Hash of an entry's fields."""
    return hashlib.sha256(canonical(fields).encode()).hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""A durable store of what language models replied: nothing that came is bought twice."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ..core.errors import ConfigError, FedsynthError, SecurityRefusal
from .language import LanguageModel, Prompt, clean

_APPLICATION_ID = 0x66737270  # "fsrp"
_VERSION = 1
_BUSY_S = 60.0
_TABLE = """
CREATE TABLE replies (
  model TEXT, prompt TEXT, reply TEXT,
  PRIMARY KEY (model, prompt)) WITHOUT ROWID
"""


class Replies:
    """Replies by model and prompt, in a SQLite file.

    Each reply is a row of its own and on the disk before anybody sees it, and the first one kept
    stands for ever. So a run that is killed, at whatever instant, and begun again asks only for
    what it had not received. What a model was still working on, or had sent and this process not
    yet read, is lost with the process: at most as many replies as were asked for at once.

    Several processes may share a file. One that several threads share must be guarded by them.

    Args:
      path: The file, made if there is none, for its owner's eyes only (0600). `None`: in memory.

    Raises:
      ConfigError: The file cannot be made.
      SecurityRefusal: The file is something else, or damaged.

    Example:
      >>> with Replies(None) as replies:
      ...     len(replies)
      0
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            _touch(path)
        self._db = sqlite3.connect(
            ":memory:" if path is None else path,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        with ExitStack() as unless_ready:
            unless_ready.callback(self._db.close)
            self._prepare()
            unless_ready.pop_all()

    def completed(self, model: LanguageModel, prompts: Sequence[Prompt]) -> list[str | None]:
        """The reply to each prompt, from the store or else from the model.

        Equal prompts are asked once. Whatever the model hands over is kept, also if it fails
        later on; a failure itself is never kept.

        Args:
          model: Who is asked for what the store does not have.
          prompts: In any number.

        Returns:
          Replies in the prompts' order; `None`: refused, empty, or failed for good.

        Raises:
          ConfigError: The model's settings cannot work.
          FedsynthError: The model failed, or did not answer everything; what it did answer is
            kept, and asking again goes on from there.
        """
        name = model.fingerprint()
        digests = [prompt.digest for prompt in prompts]
        known = self._known(name, digests)
        first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
        missing = [i for digest, i in first.items() if digest not in known]
        if missing:
            missing.sort()
            for place, reply in model.replies([prompts[i] for i in missing]):
                digest = digests[missing[place]]
                known[digest] = self._kept(name, digest, reply)
            lost = sum(digests[i] not in known for i in missing)
            if lost:
                raise FedsynthError(
                    f"model {model.name!r} did not answer {lost} of {len(missing)} prompts; the"
                    " others are kept. Begin again to ask for the rest"
                )
        return [known[digest] for digest in digests]

    def close(self) -> None:
        """Close the file; what it holds stays."""
        self._db.close()

    def __len__(self) -> int:
        with self._whole():
            (count,) = self._db.execute("SELECT count(*) FROM replies").fetchone()
        return int(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _known(self, model: str, digests: Sequence[str]) -> dict[str, str | None]:
        """What the store has of some prompts, by digest."""
        known: dict[str, str | None] = {}
        with self._whole():
            for digest in set(digests):
                row = self._db.execute(
                    "SELECT reply FROM replies WHERE model = ? AND prompt = ?", (model, digest)
                ).fetchone()
                if row is not None:
                    known[digest] = row[0]
        return known

    def _kept(self, model: str, digest: str, reply: str | None) -> str | None:
        """Put a reply on the disk; what the store then has, should another have been faster."""
        text = None if reply is None else clean(reply)
        with self._whole():
            done = self._db.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (model, digest, text)
            )
        return text if done.rowcount == 1 else self._known(model, [digest])[digest]

    def _prepare(self) -> None:
        """Make every commit durable, and the table unless it is there."""
        with self._whole():
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            (found,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (num_tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if num_tables == 0 and found == 0:
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif (found, version) != (_APPLICATION_ID, _VERSION):
                raise self._damaged()
            self._db.execute("COMMIT")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Turn what SQLite says of a file into errors of this package."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise FedsynthError(
                f"cannot use the replies in {self._path}: {error}. Check that its folder can be"
                " written to, that the disk has room, and that no other program holds it; what"
                " was kept still stands"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged() from error

    def _damaged(self) -> SecurityRefusal:
        """The refusal of a file that does not hold replies."""
        return SecurityRefusal(
            f"{self._path} is not a store of replies of this version, or it is damaged. Restore it"
            " from a backup, or name another file: what it held would be asked, and paid, again"
        )


def _touch(path: Path) -> None:
    """Make a file that its owner alone may read, and make its name durable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"cannot keep replies at {path}: {error.strerror}") from error

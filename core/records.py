# SPDX-License-Identifier: Apache-2.0
"""Records as codes: what a shard holds and what a synthesizer samples."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ShardError


@dataclass(frozen=True)
class Family:
    """How records are laid out as two tables, one of users and one of their records.

    Attributes:
      columns: Names of the columns that belong to the user.
      parent: Name of the table of users.
      child: Name of the table of records.
      key: Name of the column by which the two are joined.
    """

    columns: tuple[str, ...]
    parent: str
    child: str
    key: str


@dataclass(frozen=True)
class Records:
    """Encoded records, real or synthetic.

    Attributes:
      codes: Cell of each table column, `(num_records, num_columns)`, int32, each in
        `[0, column.num_cells)`. Under a schema with open columns: `(num_records, num_codes)`, an
        open number's code as by `core.open_codes`, an open category's 0, or 1 where it is
        missing, and after all columns the words of the open categories' texts, in their order.
      images: `(num_records, height, width, channels)`, uint8, or `None` without image column.
      owners: User of each synthetic record, `(num_records,)`, int64, from 0 without a gap and not
        falling, or `None` where records are synthesized without their users.
      texts: `(num_records,)`, each a `str`, or `None` without text column.
      places: Embeddings in whole steps, `(num_records, dim)`, int16, or `None` where nobody asked
        for them; see `core.embedding`.
    """

    codes: NDArray[np.int32]
    images: NDArray[np.uint8] | None = None
    owners: NDArray[np.int64] | None = None
    texts: NDArray[np.object_] | None = None
    places: NDArray[np.int16] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: NDArray[Any] | slice) -> "Records":
        """The records at `rows`: positions, a mask or a slice."""
        parts: list[Any] = [None if part is None else part[rows] for part in self._parts]
        return Records(*parts)

    @staticmethod
    def joined(parts: Sequence["Records"]) -> "Records":
        """Records of the same kind, one after the other; at least one part."""
        columns = zip(*(part._parts for part in parts), strict=True)
        whole: list[Any] = [
            None if any(array is None for array in arrays) else np.concatenate(arrays)
            for arrays in columns
        ]
        return Records(*whole)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class BoundedShard:
    """A shard in which no user holds more than `max_records` records, grouped by user.

    Only `client.bounding.bound` and the slicing methods below make one.

    Attributes:
      records: The records, those of one user next to each other.
      user_index: User of each record, `(num_records,)`, int64, non-decreasing in
        `[0, num_users)`; every user has at least one record.
      num_users: Users in this shard.
      max_records: Bound that holds.
      words: A pseudorandom number for each user, from the user's id and a public seed,
        `(num_users,)`, uint64; `None` where users have no ids.
    """

    records: Records
    user_index: NDArray[np.int64]
    num_users: int
    max_records: int
    words: NDArray[np.uint64] | None = None

    def __post_init__(self) -> None:
        if len(self.user_index) != len(self.records):
            raise ShardError("user_index and records differ in length")
        if self.words is not None and len(self.words) != self.num_users:
            raise ShardError("words and users differ in number")

    @property
    def starts(self) -> NDArray[np.int64]:
        """First record of each user and, last, the number of records, `(num_users + 1,)`."""
        return np.searchsorted(self.user_index, np.arange(self.num_users + 1)).astype(np.int64)

    def user_keys(self, *salt: int) -> NDArray[np.uint64]:
        """A pseudorandom number for each user, `(num_users,)`, from that user's records alone.

        What a strategy draws at random for a user must not depend on who else is in the block;
        numbers taken from here do not. They carry no privacy claim.
        """
        keys = np.full(len(self.records), mixed(np.uint64(0), *salt))
        for column in self.records.codes.T:
            keys = mixed(keys, column)
        if self.records.images is not None:
            shape = self.records.images.shape
            pixels = self.records.images.reshape(len(keys), math.prod(shape[1:]))
            weights = mixed(np.arange(pixels.shape[1], dtype=np.uint64), 1) | np.uint64(1)
            for start in range(0, len(keys), 1024):  # a few at a time: a pixel takes eight bytes
                part = slice(start, start + 1024)
                keys[part] = mixed(keys[part], pixels[part].astype(np.uint64) @ weights)
        if self.records.texts is not None:
            words = np.array([_word(text) for text in self.records.texts], dtype=np.uint64)
            keys = mixed(keys, words)
        total = np.zeros(self.num_users, dtype=np.uint64)
        np.add.at(total, self.user_index, keys)
        stirred: NDArray[np.uint64] = mixed(total, 2)
        return stirred

    def user_words(self, *salt: int) -> NDArray[np.uint64]:
        """A pseudorandom number for each user, `(num_users,)`, that stays when records change.

        By the user's id; where there are no ids, from the user's records, so that users with equal
        records have equal numbers. It depends on nobody else, and carries no privacy claim.
        """
        if self.words is None:
            return self.user_keys(*salt)
        stirred: NDArray[np.uint64] = mixed(self.words, *salt)
        return stirred

    def blocks(self, num_users: int) -> Iterator["BoundedShard"]:
        """The shard in runs of at most `num_users` users; at least one block, even when empty."""
        starts = self.starts
        for first in range(0, max(self.num_users, 1), num_users):
            last = min(first + num_users, self.num_users)
            rows = slice(int(starts[first]), int(starts[last])) if self.num_users else slice(0, 0)
            yield self._part(rows, self.user_index[rows] - first, slice(first, last), last - first)

    def by_record(self) -> "BoundedShard":
        """The same records, each as a user of its own; users' ids are gone."""
        num_records = len(self.records)
        return BoundedShard(self.records, np.arange(num_records, dtype=np.int64), num_records, 1)

    def only(self, chosen: NDArray[np.bool_]) -> "BoundedShard":
        """The users where `chosen`, `(num_users,)`, is true."""
        keep = chosen[self.user_index]
        rank = np.cumsum(chosen) - 1
        return self._part(keep, rank[self.user_index[keep]], chosen, int(chosen.sum()))

    def _part(
        self,
        rows: slice | NDArray[np.bool_],
        user_index: NDArray[np.int64],
        users: slice | NDArray[np.bool_],
        num_users: int,
    ) -> "BoundedShard":
        words = None if self.words is None else self.words[users]
        return BoundedShard(self.records.take(rows), user_index, num_users, self.max_records, words)


def _word(text: str) -> int:
    """64 bits of a text's digest."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mixed(state: Any, *values: Any) -> Any:
    """`state` stirred with each of `values`, as 64-bit words, by the finalizer of SplitMix64."""
    with np.errstate(over="ignore"):
        for value in values:
            state = state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state

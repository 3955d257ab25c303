# SPDX-License-Identifier: Apache-2.0
"""Bound what one user can contribute: at most k records, before anything is computed.

Which records stay depends on the user's id, the user's own records and a public seed alone, so
one user's arrival or departure changes nothing about another's.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.privacy import PrivacyUnit
from ..core.records import BoundedShard, Records, mixed
from .shard import Shard

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bound(shard: Shard, unit: PrivacyUnit, *, seed: int) -> BoundedShard:
    """The shard with at most `unit.max_records` records of each user.

    Users are ordered by canonical id, a user's records as in the file. Where a record is the
    unit, every record is a user and the file's order stays.

    Args:
      shard: Private records with their user ids.
      unit: How many records a user keeps, and which: at random, the first, or at random among
        those that differ from each other.
      seed: Public seed of the random choice; the same seed keeps the same records.

    Raises:
      ConfigError: `seed` is negative.

    Privacy:
      Every user's kept records are a function of the user's id, own records and `seed`, so the
      result without a user is this result with that user's records taken out.
    """
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}")
    if unit.column is None:
        num_records = len(shard.records)
        everyone = np.arange(num_records, dtype=np.int64)
        return BoundedShard(shard.records, everyone, num_records, unit.max_records)
    user_ids, owner = np.unique(shard.user_ids, return_inverse=True)
    rows = np.argsort(owner, kind="stable")  # by user, then by position in the file
    if unit.keep == "deduplicate":
        rows = rows[_first_of_equals(shard.records, owner, rows)]
    kept = _kept(user_ids, owner[rows], unit, seed)
    rows = rows[kept]
    return BoundedShard(
        shard.records.take(rows),
        owner[rows].astype(np.int64),
        len(user_ids),
        unit.max_records,
        _words(user_ids, seed),
    )


def _kept(
    user_ids: NDArray[np.str_], owner: NDArray[np.intp], unit: PrivacyUnit, seed: int
) -> NDArray[np.bool_]:
    """Which records stay, `(num_records,)`; `owner` does not decrease."""
    counts = np.bincount(owner, minlength=len(user_ids))
    starts = np.cumsum(counts) - counts
    position = np.arange(len(owner)) - starts[owner]  # of a record among its user's
    kept = position < unit.max_records
    if unit.keep == "first" or kept.all():
        return kept
    over = counts > unit.max_records
    keys = np.zeros(len(user_ids), dtype=np.uint64)
    keys[over] = _user_keys(user_ids[over].tolist(), seed)
    rows = np.flatnonzero(over[owner])
    draws = _mixed(keys[owner[rows]] + (position[rows].astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    by_draw = np.lexsort((draws, owner[rows]))
    kept[rows[by_draw]] = position[rows] < unit.max_records  # ranks run 0, 1, .. in each user
    return kept


def _words(user_ids: NDArray[np.str_], seed: int) -> NDArray[np.uint64]:
    """A pseudorandom number for each user, by the id alone and not by how long others are."""
    words = mixed(np.zeros(len(user_ids), dtype=np.uint64), seed)
    width = user_ids.dtype.itemsize // 4
    letters = np.ascontiguousarray(user_ids).view(np.uint32).reshape(len(user_ids), width)
    for letter in letters.T:
        rows = np.flatnonzero(letter)  # an id ends where zeros begin
        words[rows] = mixed(words[rows], letter[rows])
    return np.asarray(words, dtype=np.uint64)


def _user_keys(user_ids: list[str], seed: int) -> NDArray[np.uint64]:
    """A random word for each user, known to whoever knows the seed and the id."""
    prefix = f"fedsynth bounding {seed}\0"
    digests = (hashlib.sha256(f"{prefix}{user_id}".encode()).digest()[:8] for user_id in user_ids)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Words whose bits all depend on all bits, by the finalizer of SplitMix64.

    Reference:
      Steele, Lea, Flood (2014), "Fast splittable pseudorandom number generators", figure 16.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _first_of_equals(
    records: Records, owner: NDArray[np.intp], rows: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Which of `rows`, grouped by user, equal none before it of the same user, `(num_records,)`."""
    counts = np.bincount(owner)
    several = np.flatnonzero(counts[owner[rows]] > 1)
    candidates = rows[several]
    prints = _fingerprints(records, candidates)
    order = np.lexsort((prints, owner[candidates]))  # stable: equals stay in file order
    ordered = candidates[order]
    before, after = ordered[:-1], ordered[1:]
    same = (owner[before] == owner[after]) & (prints[order[:-1]] == prints[order[1:]])
    pairs = np.flatnonzero(same)
    equal = (records.codes[before[pairs]] == records.codes[after[pairs]]).all(axis=1)
    if records.images is not None:
        images = records.images.reshape(len(records), -1)
        for at in np.flatnonzero(equal):  # a fingerprint alone is no proof
            pair = pairs[at]
            equal[at] = np.array_equal(images[before[pair]], images[after[pair]])
    if records.texts is not None:
        equal &= records.texts[before[pairs]] == records.texts[after[pairs]]
    first = np.ones(len(rows), dtype=np.bool_)
    first[several[order[1:][pairs[equal]]]] = False
    return first


def _fingerprints(records: Records, rows: NDArray[np.intp]) -> NDArray[np.uint64]:
    """A word for each of `rows` that equal records share."""
    words = np.zeros(len(rows), dtype=np.uint64)
    for column in range(records.codes.shape[1]):
        words = _mixed(words + records.codes[rows, column].astype(np.uint64) + _GOLDEN)
    if records.images is not None:
        for i, row in enumerate(rows.tolist()):
            digest = hashlib.sha256(records.images[row].tobytes()).digest()[:8]
            words[i] ^= np.uint64(int.from_bytes(digest, "little"))
    if records.texts is not None:
        digests = (hashlib.sha256(text.encode()).digest()[:8] for text in records.texts[rows])
        words ^= np.frombuffer(b"".join(digests), dtype="<u8")
    return words

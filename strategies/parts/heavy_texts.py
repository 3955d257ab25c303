# SPDX-License-Identifier: Apache-2.0
"""Find the texts that many users share by one noisy sum of hashed cells; decode, then check.

A record adds to the bucket that its text is hashed to, and to one signed cell a slot of a table.
A slot carries one byte of the text; a short text goes round the slots several times, and all
texts are equally loud in all. Whoever knows the sum reads a heavy bucket's text byte by byte,
keeps it only if it is hashed to that bucket, and takes it out of the table for the others' sake.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.open_codes import text_of
from ...core.records import mixed

BUCKET_BITS, TABLE_BITS = 15, 18
_BUCKETS, _TABLE = 1 << BUCKET_BITS, 1 << TABLE_BITS
_BUCKET_SHARE = 0.25  # of a column's energy, that finds buckets; the slots have the rest
_LENGTHS = 2  # lengths tried for each bucket, the likeliest first
_DOUBTFUL = 6  # bytes of a text whose second-best reading is tried as well
_PASSES = 3  # rounds of reading; a text taken out of the table may let another be read
_SURE = 4.0  # how much likelier, in logarithms, a reading must be than a bucket without a text


@dataclass(frozen=True)
class TextSketch:
    """Cells of one open category in a query: first its buckets, then the table.

    Attributes:
      max_bytes: Longest text, in bytes of UTF-8; as many slots are lit by each record.
    """

    max_bytes: int

    @property
    def dim(self) -> int:
        """Number of cells."""
        return _BUCKETS + _TABLE

    @property
    def num_lit(self) -> int:
        """Cells that a record lights."""
        return 1 + self.max_bytes

    @cached_property
    def heights(self) -> NDArray[np.float64]:
        """Height of each lit cell, the bucket's before the slots', of norm one, `(num_lit,)`."""
        slot = math.sqrt((1 - _BUCKET_SHARE) / self.max_bytes)
        return np.array([math.sqrt(_BUCKET_SHARE)] + [slot] * self.max_bytes)

    def cells(
        self, texts: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
        """Cells that texts light, how loudly, and whether a text is more than nothing.

        Args:
          texts: Bytes filled up with zeros, `(num_texts, width)` with `width >= max_bytes`.

        Returns:
          Cells, and what their heights are multiplied by, `(num_texts, num_lit)` both: a sign, and
          0 for slots that no whole turn of the text fills, which makes the others louder. And
          `(num_texts,)`.
        """
        texts = texts[:, : self.max_bytes]
        lengths = _lengths(texts)
        buckets = bucket_of(texts)
        slots = np.arange(self.max_bytes)
        turn = np.maximum(lengths, 1)[:, None]
        heard = np.take_along_axis(texts, slots % turn, axis=1)
        words = mixed(_salts(self.max_bytes)[turn - 1, slots, heard], buckets[:, None])
        cells = np.empty((len(texts), self.num_lit), dtype=np.int64)
        cells[:, 0] = buckets
        cells[:, 1:] = _BUCKETS + (words & np.uint64(_TABLE - 1)).astype(np.int64)
        loud = np.ones(cells.shape)
        loud[:, 1:] = _signs(words) * self._loudness[turn - 1, slots]
        return cells, loud, lengths > 0

    @cached_property
    def _loudness(self) -> NDArray[np.float64]:
        """What each slot is multiplied by for a text of each length, `(max_bytes, max_bytes)`."""
        lengths = np.arange(1, self.max_bytes + 1)[:, None]
        filled = self.max_bytes // lengths * lengths
        return np.where(np.arange(self.max_bytes) < filled, np.sqrt(self.max_bytes / filled), 0.0)

    def texts(
        self, noisy: NDArray[np.float64], *, stddev: float, threshold: float, max_texts: int
    ) -> list[tuple[str, float]]:
        """The texts that can be read from a sum, the most frequent first, with their counts.

        Args:
          noisy: Sum of the cells, each lit at its height, with noise, `(dim,)`.
          stddev: Standard deviation of the noise; > 0.
          threshold: What a bucket's sum must reach to be looked into.
          max_texts: Most buckets that are looked into, the heaviest first.

        Privacy:
          Post-processing of the sum. A text can come out only if its bucket passes `threshold`.
        """
        heard, table = noisy[:_BUCKETS], noisy[_BUCKETS:].copy()
        heavy = np.flatnonzero(heard >= threshold)
        heavy = heavy[np.argsort(-heard[heavy], kind="stable")][:max_texts]
        bucket_height, slot_height = self.heights[:2].tolist()
        found: dict[str, float] = {}
        waiting = heavy.tolist()
        for _ in range(_PASSES):
            unread = []
            for bucket in waiting:
                strength = slot_height * float(heard[bucket]) / bucket_height / stddev
                encoded = self._read(bucket, table / stddev, strength)
                if encoded is None:
                    unread.append(bucket)
                    continue
                cells, loud, _ = self.cells(encoded[None, :])
                lit, loud = cells[0, 1:] - _BUCKETS, loud[0, 1:]
                level = float(table[lit] @ loud) / self.max_bytes
                np.subtract.at(table, lit, level * loud)
                text = text_of(encoded.tobytes())
                if text is not None:
                    found[text] = level / slot_height
            if len(unread) in (0, len(waiting)):
                break
            waiting = unread
        return sorted(found.items(), key=lambda item: (-item[1], item[0]))

    def _read(
        self, bucket: int, table: NDArray[np.float64], strength: float
    ) -> NDArray[np.uint8] | None:
        """The likeliest text in a bucket that is hashed to it, `(max_bytes,)`; `None`: none is.

        Args:
          bucket: The bucket.
          table: Noisy cells in units of their noise's deviation.
          strength: What a slot of the text adds to its cell, in the same unit.
        """
        words = mixed(_salts(self.max_bytes), np.uint64(bucket))
        values = table[(words & np.uint64(_TABLE - 1)).astype(np.int64)] * _signs(words)
        readings = []
        for length in range(1, self.max_bytes + 1):
            filled = self.max_bytes // length * length
            slots = values[length - 1, :filled].reshape(-1, length, 256)
            scores = slots.sum(axis=0)
            scores *= strength * self._loudness[length - 1, 0]
            scores += _log_prior()
            readings.append((float(scores.max(axis=1).sum()), length, scores))
        readings.sort(key=lambda reading: -reading[0])
        nothing = self.max_bytes * strength**2 / 2
        for likely, length, scores in readings[:_LENGTHS]:
            if likely < nothing + _SURE:
                break
            candidates = _likeliest(scores)
            texts = np.zeros((len(candidates), self.max_bytes), dtype=np.uint8)
            texts[:, :length] = candidates
            right = np.flatnonzero(bucket_of(texts) == bucket)
            if len(right):
                return np.asarray(texts[right[0]])
        return None


def bucket_of(texts: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Bucket that each text is hashed to, `(num_texts,)`."""
    return np.asarray(text_keys(texts) >> np.uint64(64 - BUCKET_BITS))


def text_keys(texts: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A word for each text that, but for one chance in 2^64, no other text has."""
    width = -(-texts.shape[1] // 8) * 8
    padded = np.zeros((len(texts), width), dtype=np.uint8)
    padded[:, : texts.shape[1]] = texts
    keys = np.zeros(len(texts), dtype=np.uint64)
    empty = mixed(np.uint64(0), 0)
    for part in padded.view("<u8").T:  # what is filled up with zeros has the key of the rest
        keys = np.where(part == 0, keys, mixed(keys, part))
    return np.asarray(np.where(keys == 0, empty, keys))


def _likeliest(scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Readings of a text, the likeliest first: doubtful bytes are read in two ways."""
    order = np.argpartition(-scores, 1, axis=1)[:, :2]
    top = np.take_along_axis(scores, order, axis=1)
    loss = top[:, 0] - top[:, 1]
    doubtful = np.argsort(loss, kind="stable")[:_DOUBTFUL]
    flips = (np.arange(1 << len(doubtful))[:, None] >> np.arange(len(doubtful))) & 1
    flips = flips[np.argsort(flips @ loss[doubtful], kind="stable")]
    texts = np.repeat(order[None, :, 0], len(flips), axis=0)
    texts[:, doubtful] = np.where(flips == 1, order[doubtful, 1], order[doubtful, 0])
    return texts.astype(np.uint8)


def _lengths(texts: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Bytes of each text, without the zeros that fill it up."""
    filled = texts[:, ::-1] != 0
    return np.where(filled.any(axis=1), texts.shape[1] - filled.argmax(axis=1), 0)


def _signs(words: NDArray[Any]) -> NDArray[np.float64]:
    """One or minus one, by the highest bit."""
    return 1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64)


@lru_cache(maxsize=8)
def _salts(max_bytes: int) -> NDArray[np.uint64]:
    """A public word for each length, slot and byte, `(max_bytes, max_bytes, 256)`."""
    shape = (max_bytes, max_bytes, 256)
    salts: NDArray[np.uint64] = mixed(np.arange(math.prod(shape), dtype=np.uint64), 0x5E7)
    return salts.reshape(shape)


@lru_cache(maxsize=1)
def _log_prior() -> NDArray[np.float64]:
    """Public log-probability of each byte: letters and digits are likelier than the rest."""
    weights = np.full(256, 0.05)
    weights[:32] = 1e-6
    weights[32:127] = 0.3
    weights[48:58] = 2.0  # digits
    weights[65:91] = 1.0  # capitals
    weights[97:123] = 2.0  # small letters
    weights[32] = 2.0
    return np.asarray(np.log(weights / weights.sum()))

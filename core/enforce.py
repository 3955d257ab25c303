# SPDX-License-Identifier: Apache-2.0
"""Make every sample keep the schema's constraints: draw again, and mend what still does not.

What a synthesizer makes is public, so nothing here costs privacy.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .records import Records
from .ruleset import Part
from .schema import Schema

Sample = Callable[[Any, int, np.random.Generator], Records]

_PASSES = 8  # times that refused records are drawn again
_FEWEST = 64  # records drawn at a time
_MOST_CELLS = 1 << 14  # combinations of new values that are tried for a set of columns
_MOST_SETS = 2_000  # sets of columns that are tried
_BLOCK = 1 << 20  # combinations looked at in one step
_DONORS = 4_096  # accepted records that a last resort may copy from


class Sampler(Protocol):
    """What has a `sample` to keep: a synthesizer, of which only the schema is read here."""

    schema: Schema


def keeping(sample: Sample) -> Sample:
    """A synthesizer's `sample`, with the constraints of its schema kept by every record.

    Records that break one are drawn again, up to eight times over, which samples from the
    synthesizer as it is where the constraints hold. What is left is repaired, see `repaired`.
    Without constraints it is `sample` itself. The same `rng` gives the same records.

    Of records with owners, users are kept or drawn again with all of theirs, see `_whole_users`.
    """

    @wraps(sample)
    def kept(self: Sampler, num_records: int, rng: np.random.Generator) -> Records:
        records = sample(self, num_records, rng)
        rules = self.schema.rules
        if not rules.parts or not len(records):
            return records
        if records.owners is not None:
            return _whole_users(self, sample, records, rng)
        valid = rules.valid(records.codes)
        drawn, accepted = len(records), int(valid.sum())
        for _ in range(_PASSES):
            waiting = np.flatnonzero(~valid)
            if not len(waiting):
                break
            wanted = math.ceil(1.1 * len(waiting) * drawn / max(accepted, 1))
            more = sample(self, min(max(wanted, _FEWEST), max(num_records, _FEWEST)), rng)
            fitting = np.flatnonzero(rules.valid(more.codes))
            drawn, accepted = drawn + len(more), accepted + len(fitting)
            places, fitting = waiting[: len(fitting)], fitting[: len(waiting)]
            order = np.arange(num_records)
            order[places] = num_records + fitting
            records, valid[places] = Records.joined([records, more]).take(order), True
        if valid.all():
            return records
        codes = records.codes.copy()
        codes[~valid] = repaired(rules.parts, self.schema.shape, codes[~valid], codes[valid], rng)
        return replace(records, codes=codes)

    return kept


def _whole_users(
    synthesizer: Sampler, sample: Sample, records: Records, rng: np.random.Generator
) -> Records:
    """As many records, of users all of whose records keep the constraints.

    Users come from up to eight further samples; if those are too few, the same users come again.
    If no user at all is left, each record is repaired by itself and has a user of its own.
    """
    rules, num_records = synthesizer.schema.rules, len(records)
    codes, users, num_users = [records.codes[:0]], [np.zeros(0, dtype=np.int64)], 0
    for _ in range(1 + _PASSES):
        owners = np.zeros(0, np.int64) if records.owners is None else records.owners
        breaks = np.bincount(owners, weights=~rules.valid(records.codes))
        kept = (breaks == 0)[owners]
        rank = np.cumsum(breaks == 0) - 1
        codes.append(records.codes[kept])
        users.append(rank[owners[kept]] + num_users)
        num_users += int((breaks == 0).sum())
        if sum(map(len, codes)) >= num_records:
            break
        records = sample(synthesizer, max(num_records, _FEWEST), rng)
    found, owners = np.concatenate(codes), np.concatenate(users)
    if not len(found):
        found = repaired(rules.parts, synthesizer.schema.shape, records.codes, found, rng)
        owners = np.arange(len(found))
    times = -(-num_records // len(found))
    again = np.repeat(np.arange(times), len(found)) * (int(owners[-1]) + 1)
    return replace(
        records,
        codes=np.tile(found, (times, 1))[:num_records],
        owners=(np.tile(owners, times) + again)[:num_records],
    )


def repaired(
    parts: tuple[Part, ...],
    shape: tuple[int, ...],
    codes: NDArray[np.int32],
    good: NDArray[np.int32],
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    """Records that keep all constraints, each with as few columns changed as possible.

    For each group of constraints: first every way to change one column, then every two, and so
    on; among the ways that work, one is drawn in proportion to how common its values are. Sets of
    columns with more than 16,384 combinations of values, and more than 2,000 sets, are not tried;
    a record that is left copies the group's columns from the accepted record that is nearest.

    Args:
      parts: Groups of constraints.
      shape: Cells of each column.
      codes: The records, `(num_records, num_columns)`.
      good: Records that keep the constraints; may be none.
      rng: Which way is taken.
    """
    codes = codes.copy()
    for part in parts:
        bad = np.flatnonzero(~part.holds(dict(enumerate(codes.T))))
        if len(bad):
            columns = list(part.columns)
            place = (bad[:, None], np.array(columns)[None, :])
            codes[place] = _Repair(part, shape, codes[place], good[:, columns], rng).result
    return codes


class _Repair:
    """The repair of one group's columns of some records."""

    def __init__(
        self,
        part: Part,
        shape: tuple[int, ...],
        rows: NDArray[np.int32],
        good: NDArray[np.int32],
        rng: np.random.Generator,
    ) -> None:
        self.part, self.rng, self.result = part, rng, rows.copy()
        self.sides = [shape[c] for c in part.columns]
        self.probs = [
            (np.bincount(np.append(good[:, i], rows[:, i]), minlength=side) + 1e-3)
            for i, side in enumerate(self.sides)
        ]
        self.patterns, self.of_row = np.unique(rows, axis=0, return_inverse=True)
        self.of_row = self.of_row.ravel()
        waiting = np.arange(len(self.patterns))
        for sets in self._sets():
            width = sum(len(cells) for _, cells in sets)
            blocks = np.array_split(waiting, -(-len(waiting) * width // _BLOCK))
            left = [self._change(block, sets) for block in blocks]
            waiting = np.concatenate(left)
            if not len(waiting):
                return
        self._copy(waiting, good)

    def _sets(self) -> Iterator[list[tuple[list[int], NDArray[np.int32]]]]:
        """Sets of columns, the smallest first, each with all combinations of their cells."""
        tried = 0
        for size in range(1, len(self.sides) + 1):
            found = []
            for chosen in combinations(range(len(self.sides)), size):
                sides = [self.sides[i] for i in chosen]
                tried += 1
                if tried > _MOST_SETS:
                    return
                if math.prod(sides) <= _MOST_CELLS:
                    cells = np.indices(sides).reshape(size, -1).T.astype(np.int32)
                    found.append((list(chosen), cells))
            if found:
                yield found

    def _change(
        self, block: NDArray[np.int64], sets: list[tuple[list[int], NDArray[np.int32]]]
    ) -> NDArray[np.int64]:
        """Repair the patterns that a change of one of the sets repairs, and the others."""
        patterns = self.patterns[block]
        weights = np.concatenate([self._weights(patterns, *way) for way in sets], axis=1)
        ends = np.cumsum(weights, axis=1)
        solved = np.flatnonzero(ends[:, -1] > 0)
        place = np.full(len(self.patterns), -1)
        place[block[solved]] = np.arange(len(solved))
        rows = np.flatnonzero(place[self.of_row] >= 0)
        if not len(rows):
            return block
        # every pattern's ways laid end to end on a line, a unit for each pattern
        line = (ends[solved] / ends[solved, -1:] + np.arange(len(solved))[:, None]).ravel()
        at = place[self.of_row[rows]]
        ways = np.searchsorted(line, at + self.rng.random(len(rows)), side="right")
        ways = np.minimum(ways - at * ends.shape[1], ends.shape[1] - 1)
        first = 0
        for chosen, cells in sets:
            mine = (ways >= first) & (ways < first + len(cells))
            self.result[rows[mine][:, None], np.array(chosen)] = cells[ways[mine] - first]
            first += len(cells)
        return np.delete(block, solved)

    def _weights(
        self, patterns: NDArray[np.int32], chosen: list[int], cells: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        """How common each new combination is, next to the old one; 0 where it is impossible."""
        codes = {
            column: cells[:, chosen.index(i)][None, :] if i in chosen else patterns[:, i][:, None]
            for i, column in enumerate(self.part.columns)
        }
        weights = np.ones((len(patterns), len(cells)))
        for axis, i in enumerate(chosen):
            weights *= self.probs[i][cells[:, axis]] / self.probs[i][patterns[:, i]][:, None]
        return np.asarray(weights * self.part.holds(codes))

    def _copy(self, waiting: NDArray[np.int64], good: NDArray[np.int32]) -> None:
        """Copy from the nearest accepted record, or from the one that shows there is any."""
        donors, counts = np.unique(good, axis=0, return_counts=True)
        donors = donors[np.argsort(-counts, kind="stable")[:_DONORS]]
        donors = np.concatenate([donors, self.part.witness[None, :]]).astype(np.int32)
        for block in np.array_split(waiting, -(-len(waiting) * donors.size // _BLOCK)):
            away = (self.patterns[block][:, None, :] != donors[None]).sum(axis=2)
            place = np.full(len(self.patterns), -1)
            place[block] = away.argmin(axis=1)
            rows = np.flatnonzero(place[self.of_row] >= 0)
            self.result[rows] = donors[place[self.of_row[rows]]]

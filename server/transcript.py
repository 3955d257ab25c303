# SPDX-License-Identifier: Apache-2.0
"""The transcript of a run: its ledger entries and noisy sums, and what they alone can show.

It is all that was ever learnt from private records, so a release carries it: with the same sums
and the same public randomness, a strategy's generator ends in the same synthesizer.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.card import CardRound, State
from ..core.choice import score_sensitivity
from ..core.errors import SecurityRefusal
from ..core.mechanism import Lattice
from ..core.query import NoisySum, Query, Rounds
from ..core.synthesizer import Synthesizer
from ..core.wire import canonical, series_of
from .chain import Entry

ENTRIES, NOISY_SUMS = "transcript.jsonl", "transcript.safetensors"

_KEY = re.compile(r"round-([0-9]{6,9})")
_STATES: dict[tuple[str, ...], State] = {  # what may happen to an attempt at a round, in order
    ("reserve", "draw", "seal", "release"): "sealed",
    ("reserve", "seal", "release"): "sealed",
    ("reserve", "draw", "void"): "void",
    ("reserve", "void"): "void",
}


@dataclass(frozen=True)
class Transcript:
    """One run's entries of the ledger, in order, and its noised integer sums by round."""

    entries: tuple[Entry, ...]
    sums: Mapping[int, NDArray[np.int64]]

    @staticmethod
    def unpack(entries: bytes, sums: bytes) -> "Transcript":
        """The transcript in its two files.

        Raises:
          SecurityRefusal: An entry is not what it hashes to, or a file holds something else.
        """
        found = {}
        for key, values in tensors_in(NOISY_SUMS, sums).items():
            match = _KEY.fullmatch(key)
            if match is None or values.dtype != np.int64 or values.ndim != 1:
                raise SecurityRefusal(f"{NOISY_SUMS} holds something that is no round's sum")
            found[int(match[1])] = values
        return Transcript(_entries(entries), found)

    def pack(self) -> dict[str, bytes]:
        """Its two files, by name."""
        from safetensors.numpy import save

        lines = "".join(f"{canonical(asdict(entry))}\n" for entry in self.entries)
        sums = {f"round-{number:06d}": v.astype("<i8") for number, v in sorted(self.sums.items())}
        return {ENTRIES: lines.encode(), NOISY_SUMS: save(sums)}

    @property
    def committed(self) -> Mapping[str, Any]:
        """What the run committed before anything else: its `plan` and its `facts`.

        Raises:
          SecurityRefusal: The first entry is no commitment.
        """
        first = self.entries[0]
        data = first.data
        if first.kind != "open" or not isinstance(data.get("facts"), dict) or "plan" not in data:
            raise SecurityRefusal(f"{ENTRIES} does not begin with the run's commitment")
        return data

    @cached_property
    def rounds(self) -> tuple[CardRound, ...]:
        """What was asked; see `rounds_of`."""
        return rounds_of(self.entries)

    def check_chain(self) -> int:
        """Follow the entries; how often entries of other runs lie between two of them.

        Where others lie between, the link cannot be followed; but no entry of this run can be
        left out there, for `rounds_of` and the rule on `draw` below ask for every one of them.

        Raises:
          SecurityRefusal: Entries that follow each other are not linked, or are out of order, or
            the server's noise was never marked as drawn.
        """
        gaps = 0
        for before, after in itertools.pairwise(self.entries):
            if after.number <= before.number:
                raise SecurityRefusal(f"{ENTRIES}: entry {after.number} is out of order")
            if after.number > before.number + 1:
                gaps += 1
            elif after.previous != before.hash:
                raise SecurityRefusal(
                    f"{ENTRIES}: entry {after.number} does not follow entry {before.number}"
                )
        if self.committed["facts"].get("placement") == "central":
            drawn, sealed = (
                {(e.round, e.attempt) for e in self.entries if e.kind == kind}
                for kind in ("draw", "seal")
            )
            if sealed - drawn:
                raise SecurityRefusal(f"{ENTRIES}: a sum was sealed whose noise was never drawn")
        return gaps

    def check_sums(self) -> None:
        """Hold each sum against the hash it was sealed with.

        Raises:
          SecurityRefusal: A sum is another than was sealed, is missing, or was never sealed.
        """
        sealed = {entry.round: entry for entry in self.entries if entry.kind == "seal"}
        if set(sealed) != set(self.sums):
            raise SecurityRefusal(f"{NOISY_SUMS} and {ENTRIES} do not hold the same rounds")
        for number, total in self.sums.items():
            stored = total.astype("<i8").tobytes()
            if hashlib.sha256(stored).hexdigest() != sealed[number].data["sha256"]:
                raise SecurityRefusal(
                    f"{NOISY_SUMS}: the sum of round {number} is not what was sealed"
                )

    def replay(self, rounds: Rounds, *, max_clients: int) -> Synthesizer:
        """Learn again from the noisy sums.

        Args:
          rounds: The strategy's generator, not yet started.
          max_clients: Most clients that hold records of one user. 0: the aggregator states a
            sensitivity of its own, so the noise cannot be held against the queries.

        Raises:
          SecurityRefusal: The sums do not answer what the strategy asks.
        """
        reserved = {e.round: e for e in self.entries if e.kind == "reserve"}  # the last attempt
        sealed = {(e.round, e.attempt): e for e in self.entries if e.kind == "seal"}
        noisy: NoisySum | None = None
        number = 0
        while True:
            try:
                query = next(rounds) if noisy is None else rounds.send(noisy)
            except StopIteration as end:
                if number != len(reserved):
                    raise SecurityRefusal(
                        f"{ENTRIES} holds {len(reserved)} rounds where the method asks {number}"
                    ) from None
                synthesizer: Synthesizer = end.value
                return synthesizer
            number += 1
            if number not in reserved:
                raise SecurityRefusal(f"{ENTRIES} holds no round {number}, which the method asks")
            charge = reserved[number]
            _check_charge(query, charge)
            seal = sealed.get((number, charge.attempt))
            noisy = (
                NoisySum.void(query)
                if seal is None
                else _noisy_sum(query, seal, self.sums[number], max_clients)
            )


def rounds_of(entries: Sequence[Entry]) -> tuple[CardRound, ...]:
    """What was asked, from a run's entries in order: one line for each attempt at a round.

    Raises:
      SecurityRefusal: Something happened out of order, twice, or not at all; or a round or an
        attempt that must have come before is not there.
    """
    attempts: dict[tuple[int, int], list[Entry]] = {}
    for entry in entries:
        if entry.round:
            attempts.setdefault((entry.round, entry.attempt), []).append(entry)
    found = []
    for (number, attempt), steps in attempts.items():
        kinds = tuple(entry.kind for entry in steps)
        if kinds not in _STATES:
            raise SecurityRefusal(
                f"round {number}, attempt {attempt} went through {', '.join(kinds)};"
                " a round is reserved, sealed and released, or void"
            )
        before = attempts.get((number, attempt - 1) if attempt > 1 else (number - 1, 1))
        if (number, attempt) != (1, 1) and before is None:
            raise SecurityRefusal(f"round {number}, attempt {attempt} has none before it")
        if attempt > 1 and before is not None and before[-1].kind != "void":
            raise SecurityRefusal(f"round {number} was asked again though it was not void")
        state, first, data = _STATES[kinds], steps[0].data, steps[-2].data
        found.append(
            CardRound(
                number,
                attempt,
                first["query"],
                first["noise_multiplier"],
                first["sampling_prob"],
                state,
                data["num_clients"] if state == "sealed" else 0,
                first.get("chooses", 0),
                first.get("records", 1),
                first.get("rounds", 1),
                first.get("series", ""),
                first.get("position", 0),
            )
        )
    return tuple(found)


def tensors_in(name: str, content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file.

    Raises:
      SecurityRefusal: It is none.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SecurityRefusal(f"{name} does not hold tensors: {error}") from error


def _check_charge(query: Query, charge: Entry) -> None:
    """A round was charged for the query that the strategy asks."""
    data = charge.data
    charged = (
        *(data["query"], data["noise_multiplier"], data["sampling_prob"]),
        data.get("chooses", 0),
        *(data.get("records", 1), data.get("rounds", 1)),
        *(data.get("series", ""), data.get("position", 0)),
    )
    chooses = 0 if query.choice is None else query.choice.count
    noise, prob, records, rounds = query.leaf
    position = 0 if query.turn is None else query.turn.position
    asked = (query.name, noise, prob, chooses, records, rounds, series_of(query), position)
    if charged != asked:
        raise SecurityRefusal(
            f"round {charge.round} was charged as {charged}, but the method asks {asked}"
        )


def _noisy_sum(query: Query, seal: Entry, total: NDArray[np.int64], max_clients: int) -> NoisySum:
    """A sealed sum, once it is shown to be an answer to the query, with noise enough."""
    data = seal.data
    unit = Lattice.of(query).unit if query.choice is None else 1.0
    if len(total) != query.answer_dim or data["unit"] != unit:
        raise SecurityRefusal(f"round {seal.round} holds a sum of another shape or lattice")
    moved = query.clip if query.choice is None else score_sensitivity(query)
    least = query.noise_multiplier * moved * max_clients
    if not data["stddev"] >= least * (1 - 1e-9):
        raise SecurityRefusal(
            f"round {seal.round} has noise of {data['stddev']!r} where {least!r} was promised"
        )
    return NoisySum(total * data["unit"], data["stddev"], data["num_clients"])


def _entries(content: bytes) -> tuple[Entry, ...]:
    """Ledger entries, one a line, each held against its hash."""
    found = []
    try:
        for line in content.decode().splitlines():
            entry = Entry(**json.loads(line))
            if entry.digest() != entry.hash:
                raise SecurityRefusal(f"{ENTRIES}: entry {entry.number} is not what it hashes to")
            found.append(entry)
    except (ValueError, TypeError, RecursionError) as error:
        raise SecurityRefusal(f"{ENTRIES} does not hold ledger entries: {error}") from error
    if not found:
        raise SecurityRefusal(f"{ENTRIES} is empty")
    return tuple(found)

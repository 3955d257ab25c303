# SPDX-License-Identifier: Apache-2.0
"""Check a run's ledger entries against promises I1 and I2, apart from the code that wrote them.

It reads the entries alone, in order, and asks the ledger for nothing that it could work out
itself, so that a mistake in the ledger's own rules shows. Scenario tests call it after every
crash, resumption and cheat.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..core.accounting import from_json, parts
from ..core.errors import SecurityRefusal
from ..core.leaf import Leaf, Leaves
from .chain import Entry
from .ledger import Ledger, VoidReason

if TYPE_CHECKING:
    from ..core.selection import SelectDpEvent

_LEAST_STEPS = 2.0**22  # a lattice has at least so many steps to the clip; see core/mechanism.py


def check_trail(ledger: Ledger, run: str) -> list[str]:
    """Every promise that a run's entries break; empty when all are kept.

    Checked: the plan was committed first and once; every sum was reserved before it was drawn,
    sealed and released, in that order, each at most once for a (round, attempt); reservations
    stay within the plan; a round's next attempt came after the last was void; a sealed sum has at
    least the noise of its reservation; stored sums are those that were sealed; nothing follows
    the end of the run; and what the population has spent holds every sum that may have been drawn
    in any of its runs, and the whole plan of every run that is open or has sampled sums. Nothing is
    asked under a sweep, which counts whole, and the one run within it has sums and settings of its.
    """
    entries = ledger.entries(run)
    if not entries or entries[0].kind != "open":
        return [f"run {run} was not committed before its other entries"]
    found = list(_order(entries))
    # the sums of a broken trail cannot even be asked for
    for entry in [entry for entry in entries if entry.kind == "seal" and not found]:
        try:
            ledger.sum_of(run, entry.round)
        except SecurityRefusal as error:
            found.append(f"round {entry.round}: {error}")
    return found + list(_spending(ledger, entries[0].population))


def _order(entries: list[Entry]) -> Iterator[str]:
    """What is out of order in one run."""
    left, _ = parts(from_json(entries[0].data["plan"]))  # a sweep holds no sum to be asked
    done: dict[tuple[int, int], list[str]] = {}
    reserved: dict[tuple[int, int], Mapping[str, Any]] = {}
    ended = False
    number = 0
    for entry in entries:
        key, where = (entry.round, entry.attempt), f"entry {entry.number} ({entry.kind})"
        kinds = done.setdefault(key, [])
        if entry.number <= number:
            yield f"{where} is out of order"
        number = entry.number
        if entry.population != entries[0].population:
            yield f"{where} charges another population"
        if ended:
            yield f"{where} comes after the end of the run"
        if entry.kind in kinds:
            yield f"{where} repeats what was done at round {key[0]}, attempt {key[1]}"
        match entry.kind:
            case "open":
                if entry is not entries[0]:
                    yield f"{where} commits the run again"
            case "reserve":
                if kinds:
                    yield f"{where} comes after {kinds}"
                if key[0] < 1 or key[1] < 1:
                    yield f"{where} names no round"
                if key[1] > 1 and "void" not in done.get((key[0], key[1] - 1), []):
                    yield f"{where} follows an attempt that is not void"
                left.subtract(_charged([entry]))
                if left[_leaf(entry)] < 0:
                    yield f"{where} is outside the committed plan"
                yield from _turn(where, entry, reserved.values())
                reserved[key] = entry.data
            case "draw":
                if kinds != ["reserve"]:
                    yield f"{where} is not right after its reservation, but after {kinds}"
            case "seal":
                if kinds not in (["reserve"], ["reserve", "draw"]):
                    yield f"{where} comes after {kinds}"
                facts = entries[0].data["facts"]
                if facts.get("placement") == "central" and "draw" not in kinds:
                    yield f"{where} has noise of the server's that was never marked as drawn"
                yield from _noise(where, reserved.get(key, {}), entry.data, facts)
                yield from _chosen(where, reserved.get(key, {}), entry.data)
            case "release":
                if kinds[-1:] != ["seal"]:
                    yield f"{where} releases what is not sealed, but {kinds}"
            case "void":
                if kinds not in (["reserve"], ["reserve", "draw"]):
                    yield f"{where} comes after {kinds}"
                if entry.data.get("reason") not in set(VoidReason):
                    yield f"{where} has no known reason"
            case "finish" | "close":
                ended = True
            case _:
                yield f"{where} is of no known kind"
        kinds.append(entry.kind)
        if entry.kind == "finish":
            for (round_, _), steps in done.items():
                if round_ and steps[-1] not in ("release", "void"):
                    yield f"{where} leaves round {round_} at {steps[-1]}"


def _noise(
    where: str, reserved: Mapping[str, Any], sealed: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with the noise of a sealed sum, as far as the entries can tell."""
    if not reserved:
        yield f"{where} has no reservation"
        return
    multiplier, stddev, unit = reserved["noise_multiplier"], sealed["stddev"], sealed["unit"]
    if not (0 < unit < math.inf and 0 < stddev < math.inf):
        yield f"{where} has noise {stddev!r} on a lattice of {unit!r}"
        return
    if "sensitivity" in reserved:
        least = multiplier * reserved["sensitivity"]
    elif facts.get("aggregator", "sum") == "sum":
        least = multiplier * _LEAST_STEPS * unit
    else:
        return  # a plug-in's own sensitivity, which the entries do not state
    if stddev < least * (1 - 1e-9):
        yield f"{where} has noise {stddev!r} where at least {least!r} was reserved"


def _turn(where: str, entry: Entry, before: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with a reservation's place in its series."""
    if not entry.data.get("series"):
        if entry.data.get("position", 0) or entry.data.get("rounds", 1) != 1:
            yield f"{where} goes on with no series"
        return
    place, length = entry.data["position"], entry.data["rounds"]
    earlier = [data for data in before if data.get("series") == entry.data["series"]]
    if [data["position"] for data in earlier] != list(range(place)) or place >= length:
        yield f"{where} is not the next round of its series"
    alike = ("noise_multiplier", "rounds", "sensitivity")
    if any(data.get(key) != entry.data.get(key) for data in earlier for key in alike):
        yield f"{where} changes the noise of its series"


def _chosen(where: str, reserved: Mapping[str, Any], sealed: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a sealed choice, as far as the entries can tell."""
    chooses = reserved.get("chooses", 0)
    if chooses and not (sealed["unit"] == 1.0 and sealed["dim"] >= chooses):
        yield f"{where} holds a sum where {chooses} candidates were to be chosen"


def _spending(ledger: Ledger, population: str) -> Iterator[str]:
    """What the population's spending leaves out."""
    due: Leaves = Counter()
    sweeps: Counter[SelectDpEvent] = Counter()
    opened = {run.run: ledger.entries(run.run) for run in ledger.runs(population)}
    for run, entries in opened.items():
        plan, chosen = parts(from_json(entries[0].data["plan"]))
        sweeps += chosen
        unpaid = list(_unpaid(run, opened))
        yield from unpaid
        if entries[0].data["facts"].get("within") is not None and not unpaid:
            continue
        ended = any(entry.kind in ("finish", "close") for entry in entries)
        drawn = _charged(entry for entry in entries if entry.kind == "reserve")
        # a reservation that was sent counts as drawn: a client may have added the noise
        due += drawn if ended and not any(leaf.is_sampled for leaf in plan) else plan | drawn
    spent, best = parts(ledger.spent(population))
    if sweeps - best:
        yield f"population {population} has not spent all of its sweeps"
    for leaf, count in due.items():
        if spent[leaf] < count:
            yield (
                f"population {population} has spent {spent[leaf]} sums with noise_multiplier"
                f" {leaf.noise_multiplier!r} and sampling_prob {leaf.sampling_prob!r}, but {count}"
                " are due"
            )


def _unpaid(run: str, opened: Mapping[str, list[Entry]]) -> Iterator[str]:
    """Why a run that says to be within a sweep was not paid for by it."""
    first = opened[run][0]
    facts = dict(first.data["facts"])
    within = facts.pop("within", None)
    if within is None:
        return
    if within not in opened or opened[within][0].number >= first.number:
        yield f"run {run} is within {within}, which was not committed before it"
        return
    told = facts.pop("selection", {})
    paid = opened[within][0].data
    if [one for one, entries in opened.items() if _within(entries) == within] != [run]:
        yield f"sweep {within} shows more than one of its tries"
    if facts not in paid["facts"].get("settings", []):
        yield f"run {run} has settings that sweep {within} did not try"
    if told.get("event") != paid["plan"] or len(paid["plan"]) != 1:
        yield f"run {run} tells another price than sweep {within} was committed with"
    if first.data["plan"] not in paid["plan"][0].get("tries", []):
        yield f"run {run} asks other sums than a try of sweep {within}"
    if paid["plan"][0].get("count") != 1:
        yield f"sweep {within} is committed more than once"


def _within(entries: list[Entry]) -> Any:
    """The sweep that a run says to be within."""
    return entries[0].data["facts"].get("within")


def _charged(reservations: Iterable[Entry]) -> Leaves:
    """What reservations charge: a series with its first round, every other sum by itself."""
    return Counter(_leaf(entry) for entry in reservations if entry.data.get("position", 0) == 0)


def _leaf(entry: Entry) -> Leaf:
    """The sum, or the series, that a reservation is of."""
    data = entry.data
    kind = (data["noise_multiplier"], data["sampling_prob"])
    return Leaf(*kind, data.get("records", 1), data.get("rounds", 1))

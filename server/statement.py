# SPDX-License-Identifier: Apache-2.0
"""A population's account, line by line, as `fedsynth ledger` prints it."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.accounting import compose, epsilon_of, event_of, parts
from ..core.errors import ConfigError
from ..core.leaf import Leaves, num_rounds_of
from .ledger import Ledger, RoundState, Run, Stage, is_paid

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
      when: UTC, ISO 8601.
      run: Its identity.
      what: A round and its query, or all rounds of a run together.
      unit: Who is protected: the column of user ids, or `record`.
      epsilon: Of this line alone, at the cap's delta.
      total: Epsilon of everything down to this line; the last is the population's.
      state: How far a round has come, `charged, never released`, `committed` for what an open
        run may still ask, or a whole run's state.
    """

    when: str
    run: str
    what: str
    unit: str
    epsilon: float
    total: float
    state: str


def statement(ledger: Ledger, population: str) -> list[Row]:
    """Every charge to a population; the last line's total is what `Ledger.spent` costs.

    A run of unsampled sums has a line a round, and while it is open one for what it may still
    ask. A run with sampled sums has one line, for it is charged as a whole. So has a sweep, and the
    run within it has one that costs nothing.

    Raises:
      ConfigError: There is no such population.
    """
    found = {entry.name: entry for entry in ledger.populations()}
    if population not in found:
        raise ConfigError(
            f"population {population!r} is not on {ledger.path}; it holds:"
            f" {', '.join(found) or 'none'}"
        )
    lines: list[tuple[int, str, Run, str, DpEvent, str]] = []  # (entry number, ...)
    runs = ledger.runs(population)
    for run in runs:
        plan, chosen = parts(run.event)
        entries = ledger.entries(run.run)
        if chosen:
            what = ", ".join(f"the best of about {best.mean:g} secret tries" for best in chosen)
            lines.append((entries[0].number, run.when, run, what, run.event, run.state))
            continue
        if is_paid(run, runs):
            what = f"the best try, paid for by {run.facts['within']}"
            lines.append((entries[0].number, run.when, run, what, event_of({}), run.state))
            continue
        if any(leaf.is_sampled for leaf in plan):
            what = f"all {num_rounds_of(plan)} rounds"
            lines.append((entries[0].number, run.when, run, what, event_of(plan), run.state))
            continue
        reserved = [entry for entry in entries if entry.kind == "reserve"]
        for entry, state in zip(reserved, ledger.attempts(run.run), strict=True):
            cost: Leaves = Counter() if state.goes_on else Counter([state.leaf])
            what = f"{state.query}, round {state.round}"
            shown = _shown(state, run)
            lines.append((entry.number, entry.time, run, what, event_of(cost), shown))
            plan.subtract(cost)
        if run.state == "open" and +plan:
            last, what = entries[-1], f"{num_rounds_of(+plan)} rounds to come"
            lines.append((last.number, last.time, run, what, event_of(+plan), "committed"))
    total = event_of({})
    delta, unit = found[population].cap.delta, found[population].unit
    rows = []
    for _, when, run, what, cost, state_ in sorted(lines, key=lambda line: line[0]):
        total = compose([total, cost])
        alone, so_far = epsilon_of(cost, delta), epsilon_of(total, delta)
        rows.append(Row(when, run.run, what, unit, alone, so_far, state_))
    return rows


def _shown(state: RoundState, run: Run) -> str:
    """A round's state as a person reads it."""
    if state.stage == Stage.VOID:
        return f"charged, never released ({state.reason})"
    if state.stage != Stage.RELEASED and run.state != "open":
        return "charged, never released"
    return str(state.stage)

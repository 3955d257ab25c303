# SPDX-License-Identifier: Apache-2.0
"""Show a run while it goes on: round, replies, epsilon spent and left, time to go."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..server.conduct import RoundEvent

_LINES = 20  # rounds that get a line of their own; void ones always do
_HEADER = f"{'round':>9}  {'query':<18} {'replied':>9}  {'spent':>7}  {'left':>7}  {'time':>8}"


@contextmanager
def shown(console: "Console", *, quiet: bool = False) -> Iterator[Callable[["RoundEvent"], None]]:
    """While it lasts, the events passed to the function it gives are shown.

    A terminal gets a line for some of the rounds and a live bar below them; anything else, the
    lines alone; and when `quiet`, nothing.
    """
    if quiet:
        yield lambda event: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.fields[said]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        console.print(_HEADER, style="bold", highlight=False, soft_wrap=True)
        task = bar.add_task("rounds", total=None, said="waiting for the first round")
        num_asked = 0

        def on_event(event: "RoundEvent") -> None:
            nonlocal num_asked
            num_asked += not event.replayed
            said = f"{event.round}/{event.num_rounds}  {to_go(event, num_asked)}"
            bar.update(task, total=event.num_rounds, completed=event.round, said=said)
            if is_shown(event):
                style = "yellow" if event.void else None
                console.print(line_of(event), style=style, highlight=False, soft_wrap=True)

        yield on_event


def is_shown(event: "RoundEvent") -> bool:
    """Whether a round gets a line: the first, the last, void ones, and some between."""
    every = -(-event.num_rounds // _LINES)
    return event.void or event.round in (1, event.num_rounds) or event.round % every == 0


def line_of(event: "RoundEvent") -> str:
    """A round as a line under the header."""
    state = "  void: charged, nothing learnt" if event.void else ""
    state = "  from the ledger" if event.replayed and not event.void else state
    return (
        f"{f'{event.round}/{event.num_rounds}':>9}  {event.query[:18]:<18}"
        f" {f'{event.replied}/{event.clients}':>9}  {event.epsilon_spent:>7.3f}"
        f"  {event.epsilon_left:>7.3f}  {duration(event.seconds):>8}{state}"
    )


def duration(seconds: float) -> str:
    """A length of time as a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def to_go(event: "RoundEvent", num_asked: int) -> str:
    """Time to go, judged by the rounds that were asked so far, not those from the ledger."""
    left = event.num_rounds - event.round
    if not left:
        return "learning and sampling"
    return f"ETA {duration(event.seconds / num_asked * left)}" if num_asked else ""

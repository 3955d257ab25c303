# SPDX-License-Identifier: Apache-2.0
"""A run is shown as it goes on: on a terminal with a bar, elsewhere by lines."""

import io
import math

import pytest
from fedsynth.server.conduct import RoundEvent
from fedsynth.simulation.progress import duration, is_shown, line_of, shown, to_go
from rich.console import Console


def event(number: int, *, num_rounds: int = 5, void: bool = False, replayed: bool = False):
    return RoundEvent(
        round=number,
        num_rounds=num_rounds,
        query="votes",
        replied=0 if void else 20,
        clients=20,
        void=void,
        replayed=replayed,
        stddev=math.inf if void else 4.0,
        epsilon_spent=0.2 * number,
        epsilon_left=1 - 0.2 * number,
        seconds=3.0 * number,
    )


def screen_of(*events: RoundEvent, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with shown(console) as on_event:
        for each in events:
            on_event(each)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_every_round_of_a_short_run_gets_a_line(terminal: bool):
    screen = screen_of(*map(event, range(1, 6)), terminal=terminal)

    for number in range(1, 6):
        assert f"{number}/5  votes" in screen
    assert ("\x1b" in screen) == terminal


def test_a_bar_on_a_terminal_tells_the_time_to_go():
    assert "ETA" in screen_of(event(1), event(2), terminal=True)
    assert "ETA" not in screen_of(event(1), event(2), terminal=False)


def test_the_time_to_go_is_judged_by_rounds_that_were_asked():
    replayed, asked = event(3, replayed=True), event(4)

    assert to_go(replayed, 0) == ""
    assert to_go(asked, 1) == "ETA 12.0 s"  # twelve seconds for the one round that was asked
    assert to_go(event(5), 2) == "learning and sampling"


def test_a_long_run_gets_some_lines_and_every_void_round_one():
    lines = [n for n in range(1, 1001) if is_shown(event(n, num_rounds=1000))]

    assert lines[0] == 1
    assert lines[-1] == 1000
    assert len(lines) <= 21
    assert is_shown(event(7, num_rounds=1000, void=True))


def test_a_line_says_what_was_spent_and_what_is_left():
    line = line_of(event(2))

    assert line.split() == ["2/5", "votes", "20/20", "0.400", "0.600", "6.0", "s"]
    assert "void" in line_of(event(2, void=True))
    assert "from the ledger" in line_of(event(2, replayed=True))


def test_nothing_is_shown_when_programs_listen():
    console = Console(file=io.StringIO(), force_terminal=True)
    with shown(console, quiet=True) as on_event:
        on_event(event(1))

    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.14, "3.1 s"), (98, "1 min 38 s"), (7300, "2 h 1 min")]
)
def test_a_duration_is_said_as_a_person_says_it(seconds: float, said: str):
    assert duration(seconds) == said
